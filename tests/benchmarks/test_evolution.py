"""Equations in time, the networks that solve them, and the inverse problem."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from scipy.integrate import solve_ivp

import hfjax
from benchmarks.harness.race import Carry
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.suites import derivatives, evolution, pde_networks
from benchmarks.suites.derivatives import Taylor
from benchmarks.suites.equations import EXPERIMENTS
from benchmarks.suites.experiment import Experiment

KEY = jax.random.key(7)
NAMES = (
    "wave_pulse",
    "burgers",
    "burgers_smooth",
    "standing_wave",
    "korteweg_de_vries",
)


@pytest.fixture(autouse=True)
def _quick():
    jax.config.update("jax_disable_most_optimizations", True)  # Compiling is the cost.
    with jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def grid(times, places):
    t, x = np.meshgrid(times, places, indexing="ij")
    return jnp.asarray(np.stack([t.ravel(), x.ravel()], axis=1))


def tiny(name):
    changes = {"hidden": (6, 5), "interior": 20, "evaluation": 40}
    if EXPERIMENTS[name].boundary:
        changes["boundary"] = 8
    if EXPERIMENTS[name].pool:
        changes |= {"pool": 40, "replaced": 5}
    return dataclasses.replace(EXPERIMENTS[name], **changes)


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_has_no_residual_and_another_function_has(name):
    equation = EXPERIMENTS[name].equation
    points = equation.inside(KEY, 30)

    def residual(points, amplitude):
        def u(points):
            return (
                equation.solution(points) + amplitude * jnp.sin(3 * points[:, 1]) ** 2
            )

        return equation.residual(points, Taylor(u, points))

    compiled = jax.jit(residual)
    np.testing.assert_allclose(compiled(points, 0.0), 0, atol=1e-10)
    assert np.abs(compiled(points, 0.01)).max() > 1e-3


def test_derivatives_along_a_coordinate_are_those_of_nested_ones():
    network = EXPERIMENTS["korteweg_de_vries"].network
    u = functools.partial(network, network.init(KEY, (3, 6, 5, 1)))
    points = jax.random.normal(KEY, (4, 2))

    def derived(function, axis):
        def along(points):
            unit = jnp.zeros_like(points).at[:, axis].set(1)
            return jax.jvp(function, (points,), (unit,))[1]

        return along

    @jax.jit
    def by_taylor(points):
        found = Taylor(u, points, (0, 1))
        return found.value, found.gradient, found.laplacian, found.along(1, 3)[3]

    @jax.jit
    def nested(points):
        slopes = [derived(u, axis) for axis in (0, 1)]
        seconds = [derived(slopes[axis], axis) for axis in (0, 1)]
        gradient = jnp.stack([slope(points) for slope in slopes], axis=1)
        third = derived(seconds[1], 1)(points)
        return u(points), gradient, sum(second(points) for second in seconds), third

    for found, expected in zip(by_taylor(points), nested(points), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-13)


def test_initial_and_boundary_data_are_the_published_ones():
    x = jnp.linspace(-1, 1, 41)
    start = grid([0.0], x)
    for name in ("burgers", "burgers_smooth"):
        u = EXPERIMENTS[name].equation.solution(start)
        np.testing.assert_allclose(u, -np.sin(np.pi * x), atol=1e-14)
    u = EXPERIMENTS["korteweg_de_vries"].equation.solution(start)
    np.testing.assert_allclose(u, np.cos(np.pi * x), atol=1e-13)
    u = EXPERIMENTS["wave_pulse"].equation.solution(start)
    periods = sum(np.exp(-((x + 2 * n) ** 2) / 0.08) for n in range(-4, 5))
    np.testing.assert_allclose(u, periods, atol=1e-14)
    u = EXPERIMENTS["standing_wave"].equation.solution(start)
    expected = np.sin(np.pi * x) + np.sin(4 * np.pi * x) / 2
    np.testing.assert_allclose(u, expected, atol=1e-14)
    # The shock of ν = 0.01/π: u_x(t, 0) is steepest at t = 1.6037/π, with -152.00516
    # (Basdevant et al., 1986).
    shock = EXPERIMENTS["burgers"].equation.solution
    steepest = Taylor(shock, grid([1.6037 / math.pi], [0.0])).along(1, 1)[1]
    assert float(steepest[0]) == pytest.approx(-152.00516, rel=1e-7)


def test_points_and_data_are_where_the_problem_says():
    (inside, _), (known, u), (start, speed) = tiny("standing_wave").batch(KEY)
    assert inside[:, 0].max() < 0.5
    half = known.shape[0] // 2
    assert not known[:half, 0].any()
    assert set(np.unique(known[half:, 1])) <= {0.0, 1.0}
    np.testing.assert_allclose(u[half:], 0, atol=1e-14)
    assert not start[:, 0].any()
    np.testing.assert_allclose(speed, 0, atol=1e-13)
    for name in ("burgers_smooth_dense", "korteweg_de_vries"):
        (inside, zeros), (known, _) = tiny(name).batch(KEY)
        assert not zeros.any()
        assert not known[:, 0].any()
        assert known[:, 1].min() < -0.5
        assert inside[:, 0].max() <= (0.25 if name == "korteweg_de_vries" else 1)
    assert len(tiny("wave_pulse").batch(KEY)) == len(tiny("burgers").batch(KEY)) == 1


class Steep(Experiment):
    """A residual of size |p| on a tenth of the domain, at the side of p, and 0 elsewhere."""

    def residual(self, params, points):
        return params * (points[:, 1] * jnp.sign(params) > 0.8)


def steep(**changes):
    changes = {"interior": 300, "pool": 20_000, "redrawn": 3, **changes}
    return Steep("", EXPERIMENTS["burgers"].equation, (), 1.0, **changes)


def test_points_of_a_pool_are_as_likely_as_their_residuals_relative_to_the_mean_plus_one():
    problem = steep()
    points = problem.by_residual(KEY, jnp.array(2.0))
    places, _ = jax.random.split(KEY)
    pool = {tuple(point) for point in problem.equation.inside(places, 20_000).tolist()}
    chosen = {tuple(point) for point in points.tolist()}
    assert len(chosen) == 300
    assert chosen <= pool
    # Weights are 1 / 0.1 + 1 on the tenth, and 1 elsewhere.
    assert (points[:, 1] > 0.8).mean() == pytest.approx(1.1 / 2, abs=0.09)
    points = problem.by_residual(KEY, jnp.array(-1e-300))
    assert (points[:, 1] < -0.8).mean() == pytest.approx(1.1 / 2, abs=0.09)


def test_chosen_points_are_kept_until_their_interval_is_over():
    problem = steep(boundary=4).problem()
    draw = jax.jit(problem.batch)

    def after(updates, params, kept):
        carry = Carry(jnp.array(params), None, jnp.int32(updates), kept)
        batch, kept = draw(KEY, carry)
        jax.tree.map(np.testing.assert_array_equal, batch, kept)
        return kept

    first = after(0, 1.0, problem.kept)
    for leaf, expected in zip(
        *map(jax.tree.leaves, (first, problem.kept)), strict=True
    ):
        assert leaf.shape == expected.shape
    same = after(2, -1.0, after(1, -1.0, first))
    jax.tree.map(np.testing.assert_array_equal, first, same)
    (inside, _), (known, u) = after(3, 1.0, first)
    assert not set(inside[:, 0].tolist()) & set(first[0][0][:, 0].tolist())
    assert not set(known[:, 1].tolist()) & set(first[1][0][:, 1].tolist())
    np.testing.assert_allclose(u, -np.sin(np.pi * known[:, 1]), atol=1e-14)


def test_a_draw_replaces_the_oldest_points():
    problem = steep(redrawn=1, replaced=100).problem()
    draw, kept, batches = jax.jit(problem.batch), problem.kept, []
    for updates in range(4):
        carry = Carry(jnp.array(1.0), None, jnp.int32(updates), kept)
        ((points, _), *_), kept = draw(KEY, carry)
        batches.append({tuple(point) for point in points.tolist()})
    assert [len(batch) for batch in batches] == [300] * 4
    # The first are uniform but for 100; so after three draws none of them is left.
    shared = [len(batches[0] & batch) for batch in batches]
    assert shared == [300, 200, 100, 0]


def test_intervals_between_draws_grow():
    problem = steep(redrawn=6, growth=1.5)
    draws = [int(problem.draws(updates)) for updates in range(-1, 50)]
    # Intervals of 6, 9, 14 and 20.
    starts = [
        updates - 1 for updates in range(1, 51) if draws[updates] > draws[updates - 1]
    ]
    assert starts == [0, 6, 15, 29, 49]
    assert draws[:2] == [-1, 0]
    assert draws[-1] == 4


@pytest.mark.parametrize("name", ["float32_first", "lbfgs", "adam"])
def test_every_optimizer_learns_from_chosen_points_and_keeps_them(name):
    problem = tiny("burgers").problem()
    params = problem.start(KEY)
    racer = OPTIMIZERS[name].build(problem, params, 0)
    if name == "adam":
        racer = racer(1e-3)
    kept = racer.step(racer.init(params)).kept
    ((points, _),) = kept
    assert points.shape == (20, 2)
    assert float(problem.objective.value(params, kept)) > 0
    assert np.abs(points).min() > 0


def test_what_is_built_in_holds_whatever_the_parameters_are():
    x = jnp.linspace(-1, 1, 9)
    for name in ("wave_pulse", "burgers"):
        problem = tiny(name)
        params, equation = problem.start(KEY), problem.equation
        points = grid([0.0], x)
        found = problem.value(params, points)
        np.testing.assert_allclose(found, equation.solution(points), atol=1e-14)
        left, right = grid([0.3, 0.7], [-1.0]), grid([0.3, 0.7], [1.0])
        difference = problem.value(params, left) - problem.value(params, right)
        np.testing.assert_allclose(difference, 0, atol=1e-13)
    problem = tiny("wave_pulse")
    u = Taylor(problem.equation.solution, grid([0.0], x))
    speed = problem.speed(problem.start(KEY), grid([0.0], x))
    np.testing.assert_allclose(speed, u.along(0, 1)[1], atol=1e-12)


def test_sine_units_start_as_published_and_learn_their_frequencies():
    params = pde_networks.siren(KEY, (3, 400, 300, 1))
    bounds = (1 / 3, (6 / 400) ** 0.5, (3 / 300) ** 0.5)
    for layer, bound in zip(params, bounds, strict=True):
        kernel = np.asarray(layer["kernel"])
        assert 0.95 * bound < np.abs(kernel).max() <= bound
        assert kernel.std() == pytest.approx(bound / math.sqrt(3), rel=0.08)
    assert np.abs(params[0]["bias"]).max() == pytest.approx(1, abs=0.02)
    assert np.asarray(params[1]["bias"]).std() == pytest.approx(0.01, rel=0.15)
    assert not params[2]["bias"].any()
    # ω = 2 by hand.
    layers = [{**layer, "log_frequency": jnp.log(2.0)} for layer in params[:2]]
    point = jnp.array([0.1, 0.2, 0.3])
    hidden = point
    for layer in layers:
        hidden = jnp.sin(2 * (hidden @ layer["kernel"] + layer["bias"]))
    expected = float((hidden @ params[2]["kernel"])[0])
    found = derivatives.network([*layers, params[2]], point)
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_inputs_are_waves_of_the_coordinates():
    points = jnp.array([[0.5, 0.25]])
    t, *waves = np.asarray(pde_networks.periodic(2.0)(points))[0]
    assert t == 0.25
    np.testing.assert_allclose(waves, [0.5**0.5, 0.5**0.5])
    modes = np.asarray(pde_networks.fourier(4)(points)).reshape(4, 2, 2)
    for mode, (cosines, sines) in zip((1, 2, 4, 8), modes, strict=True):
        angles = 2 * np.pi * mode * np.array([0.5, 0.25])
        np.testing.assert_allclose(cosines, np.cos(angles), atol=1e-14)
        np.testing.assert_allclose(sines, np.sin(angles), atol=1e-14)


@pytest.mark.parametrize("name", ["burgers", "burgers_smooth"])
def test_the_solution_of_burgers_is_that_of_gauss_and_hermite(name):
    viscosity = {"burgers": 0.01 / math.pi, "burgers_smooth": 0.01}[name]
    points = grid(np.linspace(0.01, 1, 12), np.linspace(-1, 1, 31))
    t, x = np.asarray(points).T[..., None]
    z, weights = np.polynomial.hermite.hermgauss(160)
    y = x - np.sqrt(4 * viscosity * t) * z
    exponent = -np.cos(np.pi * y) / (2 * np.pi * viscosity)
    weights = weights * np.exp(exponent - exponent.max(axis=1, keepdims=True))
    expected = -(np.sin(np.pi * y) * weights).sum(axis=1) / weights.sum(axis=1)
    found = EXPERIMENTS[name].equation.solution(points)
    np.testing.assert_allclose(found, expected, atol=1e-14)


def by_fourier(change, modes, end, places):
    """Solve from `modes` until `end` by Dormand and Prince's rule of order 8."""
    found = solve_ivp(
        lambda t, modes: change(modes),
        (0, end),
        modes,
        "DOP853",
        rtol=3e-14,
        atol=1e-15,
    )
    waves = np.exp(1j * np.pi * np.outer(places, np.arange(modes.size)))
    double = np.where(np.arange(modes.size), 2, 1)
    return np.real(waves @ (double * found.y[:, -1]))


@pytest.mark.parametrize("name", ["burgers", "burgers_smooth"])
def test_the_solution_of_burgers_in_float32_is_that_in_float64(name):
    equation = EXPERIMENTS[name].equation
    points = jax.random.uniform(KEY, (2000, 2), jnp.float64) * jnp.array([1, 2])
    points = points - jnp.array([0, 1])  # t in [0, 1], x in [−1, 1].
    truth = np.asarray(equation.solution(points))
    with jax.enable_x64(False):
        found = equation.solution(jnp.asarray(np.asarray(points), jnp.float32))
    assert found.dtype == jnp.float32
    # The front is steep: x in float32 is what differs.
    assert np.sqrt(np.mean((found - truth) ** 2)) < 1e-5 * np.sqrt(np.mean(truth**2))


def test_the_solution_of_burgers_is_that_of_a_fourier_method():
    count, places = 512, np.linspace(-1, 1, 33)
    k = np.arange(count // 2 + 1)
    start = np.fft.rfft(-np.sin(2 * np.pi * np.arange(count) / count)) / count

    def change(modes):
        square = np.fft.rfft(np.fft.irfft(modes, count) ** 2) * count
        return -0.5j * np.pi * k * square - 0.01 * (np.pi * k) ** 2 * modes

    expected = by_fourier(change, start, 0.6, places)
    found = EXPERIMENTS["burgers_smooth"].equation.solution(grid([0.6], places))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_solution_of_korteweg_and_de_vries_is_that_of_another_rule():
    count, places = 128, np.linspace(-1, 1, 33)
    k = np.pi * np.arange(count // 2 + 1)
    start = np.fft.rfft(np.cos(2 * np.pi * np.arange(count) / count)) / count

    def change(modes):
        square = np.fft.rfft(np.fft.irfft(modes, count) ** 2) * count
        return -0.5j * k * square + 1j * 0.022**2 * k**3 * modes

    expected = by_fourier(change, start, 0.1, places)
    found = EXPERIMENTS["korteweg_de_vries"].equation.solution(grid([0.1], places))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_soliton_has_no_residual():
    # Its speed is a third of its height, as Korteweg and de Vries found.
    speed, width = 0.4, 2 * 0.022 / math.sqrt(0.4)

    def soliton(points):
        phase = (points[:, 1] - speed * points[:, 0]) / width
        return 3 * speed / jnp.cosh(phase) ** 2

    equation = EXPERIMENTS["korteweg_de_vries"].equation
    points = 0.1 * equation.inside(KEY, 20)
    residual = equation.residual(points, Taylor(soliton, points))
    np.testing.assert_allclose(residual, 0, atol=1e-10)


@pytest.mark.parametrize(
    "name", [*NAMES, "poisson2d_waves", "heat10d_large", "burgers_inverse"]
)
def test_an_update_lowers_f(name):
    problem = tiny(name).problem()
    params, data = problem.start(KEY), problem.data(0)
    tx = hfjax.hessian_free(problem.objective, **problem.options)

    @jax.jit
    def update(params, state, batch):
        value, grads = problem.objective.value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        params = optax.apply_updates(params, updates)
        return value, problem.objective.value(params, batch), params

    batch, _ = problem.batch(data, Carry(params, None, jnp.int32(0), problem.kept))
    before, after, params = update(params, tx.init(params), batch)
    assert after < 0.9 * before
    assert problem.rows == sum(target.shape[0] for _, target in batch)
    value, error = problem.measurer(params, 0)(params, 1)
    assert math.isfinite(value)
    assert 0 < error < 10


def test_data_of_the_inverse_problem_have_their_noise():
    problem = EXPERIMENTS["burgers_inverse"]
    (inside, _), (where, measured) = problem.data(0)
    assert inside.shape == (4000, 2)
    assert where.shape == (1000, 2)
    noise = measured - problem.equation.solution(where)
    size = float(problem.size(problem.evaluation_points()))
    assert float(noise.std()) == pytest.approx(0.01 * size, rel=0.07)
    params = problem.start(KEY)
    assert float(problem.error(params, None, None)) == pytest.approx(2)


def test_the_residual_of_the_inverse_problem_has_the_viscosity_of_the_parameters():
    problem = tiny("burgers_inverse")
    params, points = problem.start(KEY), problem.equation.inside(KEY, 5)

    def u(points):
        return problem.network(params["layers"], points)

    at = {**params, "log_ν": jnp.log(0.3)}
    expected = evolution.burgers_residual(Taylor(u, points), 0.3)
    np.testing.assert_allclose(problem.residual(at, points), expected, rtol=1e-12)


def test_the_error_bar_is_how_far_the_noise_moves_the_viscosity():
    problem = dataclasses.replace(
        tiny("burgers_inverse"), hidden=(2,), interior=30, weights=(0.5, 2.0)
    )
    params, batch = problem.start(KEY), problem.data(0)
    vector, unravel = ravel_pytree(params)
    inside, (where, measured) = batch

    def f(vector, measured):
        return problem.objective.value(unravel(vector), (inside, (where, measured)))

    # At the fit ∇f = 0, so that it moves by −G⁻¹ times the change of ∇f.
    mixed = jax.jit(jax.jacfwd(jax.grad(f), argnums=1))(vector, measured)
    product = hfjax.curvature.ggn(problem.objective, params, batch)
    columns = [ravel_pytree(product(unravel(row)))[0] for row in np.eye(vector.size)]
    moved = -np.linalg.solve(np.stack(columns), mixed)
    place = int(
        np.argmax(ravel_pytree(unravel(vector) | {"log_ν": jnp.array(99.0)})[0])
    )
    deviation = 0.01 * float(problem.size(problem.evaluation_points()))
    expected = deviation * np.linalg.norm(moved[place])
    assert problem.standard_error(params, batch) == pytest.approx(expected, rel=1e-6)
