"""The exact step: that of the dense system, whatever matrix it is solved by."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import training
from jax.flatten_util import ravel_pytree
from mapped import PROBLEM, axis_name, needs_devices, run
from problems import build, with_hidden
from reference import flat, quick_jit

import hfjax
from hfjax import damping, sample_space
from hfjax.curvature.jacobian import size
from hfjax.curvature.streamed_jacobian import bounded_jacobian
from hfjax.objectives.objective import weighted_sum
from hfjax.objectives.plain import terms_of
from hfjax.objectives.terms import with_decays
from hfjax.update import fitting

PROBLEMS = build()
LAMBDA, OTHER = 0.03, 0.5
SPACES = ("samples", "parameters")
STORED = (10**6, 40)  # The second is less than any J̃ has numbers.
PLAIN = {"backtracking": None, "line_search": None}
SQUARED_ERROR = hfjax.losses.squared_error()


def step_of(objective, params, batch, solver, *, before=None, grads=None, **options):
    """Return what an update with a constant λ adds to the parameters, and its state."""
    options = {"damping": damping.constant(LAMBDA)} | PLAIN | options
    tx = hfjax.hessian_free(objective, solver=solver, **options)
    state = tx.init(params)
    if before is not None:
        state = state._replace(direction=before)
    return training.one_update(objective, tx, params, batch, grads=grads, state=state)


def exact_system(objective, params, batch, damping, b=None):
    """Return what a solver that asks for the Jacobian is given; −∇f is b."""
    _, grads = objective.value_and_grad(params, batch)
    decay = with_decays(terms_of(objective, batch), jnp.zeros(()), params)
    return hfjax.cg.System(
        matvec=None,
        b=jax.tree.map(jnp.negative, grads) if b is None else b,
        scalar=jnp.float64(damping),
        count=jnp.zeros((), jnp.int32),
        value=None,
        batch_value=None,
        value_and_grad=None,
        jacobian=lambda most: (bounded_jacobian(objective, params, batch, most), decay),
    )


def solved(objective, params, batch, solver, *, before=None, b=None, damping=LAMBDA):
    """Return what the solver makes of a subproblem: −∇f on the right, if not `b`."""
    system = exact_system(objective, params, batch, damping, b)
    x0 = None if before is None else solver.start(before, system.count)
    run = solver.solve(system, x0)
    other = run.at_damping(jnp.float64(OTHER))
    assert (run.anchor is None) == (before is None)
    found = (other.direction, other.model, other.undamped)
    return run.last.direction, run.stats.model_values[-1], found


def check(found, matrix, b, before=0.0):
    """Compare with (G + λI) δ = b + λφ, and M; for λ and another."""
    x, model, (other, model_there, undamped) = found
    identity = np.eye(len(matrix))
    damped = matrix + LAMBDA * identity

    def m(x, matrix):
        return 0.5 * x @ matrix @ x - b @ x

    for step, value in ((x, LAMBDA), (other, OTHER)):
        truth = np.linalg.solve(matrix + value * identity, b + value * before)
        size = np.max(np.abs(truth))
        np.testing.assert_allclose(flat(step), truth, rtol=1e-7, atol=1e-9 * size)
    np.testing.assert_allclose(model, m(flat(x), damped), rtol=1e-8)
    np.testing.assert_allclose(model_there, m(flat(other), damped), rtol=1e-8)
    np.testing.assert_allclose(undamped, m(flat(other), matrix), rtol=1e-8)


@pytest.mark.parametrize(
    ("space", "stored"), [*((s, STORED[0]) for s in SPACES), ("parameters", STORED[1])]
)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_step_is_that_of_the_dense_system(problem, space, stored):
    """Of every loss, with weights, weight decay, and trees of outputs."""
    objective = problem.objective(microbatch_size=2)
    solver = sample_space.cholesky(space=space, stored=stored)
    found = quick_jit(functools.partial(solved, objective, solver=solver))(
        problem.params, problem.batch
    )
    check(found, reference.ggn(problem), -reference.gradient(problem))


@pytest.mark.slow
@pytest.mark.parametrize("space", SPACES)
def test_momentum_keeps_the_step_near_the_last_one(space):
    """(G + λ)δ = −g + λφ, with a gradient of other data, too."""
    problem = PROBLEMS[0]
    before, b = (jax.tree.map(f, problem.params) for f in (jnp.sin, jnp.cos))
    solver = sample_space.cholesky(space=space, momentum=0.7)
    found = quick_jit(functools.partial(solved, problem.objective(), solver=solver))(
        problem.params, problem.batch, before=before, b=b
    )
    check(found, reference.ggn(problem), flat(b), 0.7 * flat(before))


@pytest.mark.slow
def test_an_update_starts_from_the_last_step_and_hands_its_own_on():
    f, params, batch, _ = two_terms()
    solver = sample_space.cholesky(momentum=0.5, corrections=0)
    first, state = step_of(f, params, batch, solver)
    np.testing.assert_array_equal(flat(state.direction), flat(first))
    after = jax.tree.map(jnp.add, params, first)
    second, _ = step_of(f, after, batch, solver, before=state.direction)
    x, _, _ = solved(f, after, batch, solver, before=first)
    np.testing.assert_allclose(flat(second), flat(x), rtol=1e-9)


def two_terms(weight_decay=0.0):
    """Return a sum of a slope and values, its batch, parameters and residuals."""
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(1, 5))),
        "v": jnp.asarray(rng.normal(size=(5, 1))),
    }

    def values(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    def slopes(params, x):
        return jax.jvp(lambda x: values(params, x), (x,), (jnp.ones_like(x),))[1]

    f = weighted_sum(
        [
            (0.5, hfjax.Objective(slopes, SQUARED_ERROR)),
            (4.0, hfjax.Objective(values, SQUARED_ERROR, weight_decay=weight_decay)),
        ]
    )
    x, y = (jnp.asarray(rng.normal(size=(n, 1))) for n in (6, 3))
    batch = ((x, jnp.cos(x)), (y, jnp.sin(y)))

    def residuals(params):
        return jnp.concatenate(
            [
                jnp.sqrt(0.5 / 6) * (slopes(params, x) - jnp.cos(x)).ravel(),
                jnp.sqrt(4.0 / 3) * (values(params, y) - jnp.sin(y)).ravel(),
            ]
        )

    return f, params, batch, residuals


def ill_conditioned(rows, columns):
    """Return J with singular values from 1 to 1e-12, and c, as large in each direction."""
    rng = np.random.default_rng(rows)
    few = min(rows, columns)
    left, right = (np.linalg.qr(rng.normal(size=(n, few)))[0] for n in (rows, columns))
    scales = np.geomspace(1, 1e-12, few)
    return (left * scales) @ right.T, left @ (scales * rng.normal(size=few))


@pytest.mark.parametrize(("rows", "columns"), [(9, 6), (6, 9), (7, 7)])
@pytest.mark.parametrize("searched", [1.0, 100.0])
def test_below_the_rounding_of_the_square_the_step_is_that_of_the_jacobian(
    rows, columns, searched
):
    """Of a λ of 1e-18 of the largest eigenvalue: its square has lost six of the scales."""
    j, c = ill_conditioned(rows, columns)
    tiny = 1e-18
    x, t = jnp.asarray(j * np.sqrt(rows)), jnp.asarray(c * np.sqrt(rows))
    objective = hfjax.Objective(lambda p, x: x @ p, SQUARED_ERROR)
    solver = sample_space.cholesky(corrections=0)
    system = exact_system(objective, jnp.zeros(columns), (x, t), searched * tiny)
    found = solver.solve(system, None).at_damping(jnp.float64(tiny)).direction
    augmented = np.concatenate([j, np.sqrt(tiny) * np.eye(columns)])
    step = np.linalg.lstsq(augmented, np.concatenate([c, np.zeros(columns)]), rcond=0)
    np.testing.assert_allclose(found, step[0], rtol=1e-3)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("weak", [1.0, 1e-15])
@pytest.mark.parametrize(
    ("marquardt", "stored"), [(False, STORED[0]), (True, STORED[0]), (True, STORED[1])]
)
def test_weight_decay_and_marquardts_matrix_are_those_of_the_dense_system(
    space, weak, marquardt, stored
):
    """(G + β + λD) δ = −∇f with several β, M there, and so if λ is below the rounding."""
    f, params, batch, residuals = two_terms({"v": 0.01, "w": 0.2})
    theta, unravel = ravel_pytree(params)
    j = np.asarray(jax.jacfwd(lambda p: residuals(unravel(p)))(theta))
    betas = 4 * np.repeat([0.01, 0.2], 5)  # The second term counts four times.
    if weak < 1 and stored < j.size:
        pytest.skip("A J̃ that is not stored is not decomposed.")
    solver = sample_space.cholesky(space=space, corrections=0, stored=stored)
    name = "curvature_diagonal" if marquardt else "identity"
    rule = damping.constant(LAMBDA * weak, matrix=name)
    found, state = step_of(f, params, batch, solver, damping=rule)
    matrix = j.T @ j + np.diag(betas)
    b = -j.T @ np.asarray(residuals(params)) - betas * np.asarray(theta)
    d = np.diag(matrix) if marquardt else np.ones(10)
    step = np.linalg.solve(matrix + weak * LAMBDA * np.diag(d), b)
    np.testing.assert_allclose(flat(found), step, rtol=1e-6)
    predicted = 0.5 * step @ matrix @ step - b @ step
    np.testing.assert_allclose(state.info.predicted_change, predicted, rtol=1e-8)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(9, 5), (5, 9)])
def test_in_a_trust_region_it_is_the_least_damped_step_that_is_short_enough(
    rows, columns, scaled
):
    """(G + λD) δ = −∇f with λ ≥ 0, and ‖√D δ‖ close to the radius unless λ is 0."""
    rng = np.random.default_rng(0)
    j = rng.normal(size=(rows, columns)) * np.geomspace(1, 100, columns)
    c = rng.normal(size=rows)
    batch = tuple(jnp.asarray(np.sqrt(rows) * x) for x in (j, c))
    objective = hfjax.Objective(lambda p, x: x @ p, SQUARED_ERROR)
    solver = sample_space.trust_region(corrections=0, scaled=scaled)
    d = np.sum(j**2, axis=0) if scaled else np.ones(columns)
    whole = np.linalg.lstsq(j / np.sqrt(d), c)[0]
    for share in (0.1, 0.5, 2.0):
        radius = share * np.linalg.norm(whole)
        run = solver.solve(
            exact_system(objective, jnp.zeros(columns), batch, radius), None
        )
        found = np.sqrt(d) * run.last.direction
        inside = run.stats.reason == hfjax.cg.Reason.RESIDUAL_ZERO
        assert inside == (share > 1)
        left = (j / np.sqrt(d)).T @ (c - j @ run.last.direction)
        if inside:
            np.testing.assert_allclose(found, whole, rtol=1e-9)
            continue
        length = np.linalg.norm(found)
        assert 0.9 * radius <= length <= (1 + 1e-12) * radius
        lam = (found @ left) / length**2
        assert lam > 0
        np.testing.assert_allclose(left, lam * found, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_in_a_trust_region_a_correction_is_short_and_pays():
    """Or it is left out; the plain step of this problem is corrected by a tenth."""
    f, params, batch, _ = two_terms()
    steps = {}
    for radius in (0.1, 1.0, 3.0):
        for corrections in (0, 16):
            solver = sample_space.trust_region(corrections=corrections)
            rule = hfjax.trust_region.radius(init=radius)
            steps[corrections], _ = step_of(f, params, batch, solver, damping=rule)
        plain, bent = (flat(steps[n]) for n in (0, 16))
        assert np.linalg.norm(bent - plain) <= 0.375 * np.linalg.norm(plain)
        ends = [
            f.value(jax.tree.map(jnp.add, params, x), batch) for x in steps.values()
        ]
        assert ends[1] <= ends[0]
        if radius == 0.1:
            assert np.any(bent != plain)


@pytest.mark.slow
@pytest.mark.parametrize("space", SPACES)
def test_it_is_where_conjugate_gradients_converge_to(space):
    f, params, batch, _ = two_terms()
    exact, run_out = (
        step_of(f, params, batch, solver)[0]
        for solver in (
            sample_space.cholesky(space=space, corrections=0),
            hfjax.cg.conjugate_gradient(stopping=None, max_iterations=400),
        )
    )
    np.testing.assert_allclose(flat(exact), flat(run_out), rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("stored", STORED)
def test_terms_of_a_sum_are_rows_of_one_system(space, stored):
    f, params, batch, residuals = two_terms()
    solver = sample_space.cholesky(space=space, corrections=0, stored=stored)
    found, _ = step_of(f, params, batch, solver)
    theta, unravel = ravel_pytree(params)
    r = np.asarray(residuals(params))
    j = quick_jit(jax.jacfwd(lambda p: residuals(unravel(p))))(theta)
    step = np.linalg.lstsq(
        np.concatenate([j, np.sqrt(LAMBDA) * np.eye(len(theta))]),
        np.concatenate([-r, np.zeros(len(theta))]),
    )[0]
    np.testing.assert_allclose(flat(found), step, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(
    ("longest", "first"), [(None, 100.0), (0.9, 100.0), (0.9, 1e-4), ("auto", 1e-6)]
)
def test_other_lambdas_are_searched_as_with_conjugate_gradients(space, longest, first):
    """By the lowest f, or by the longest step that M predicts, of the powers of 4."""
    f, params, batch, residuals = two_terms()
    found, state = step_of(
        f,
        params,
        batch,
        sample_space.cholesky(space=space, corrections=0),
        damping=hfjax.damping.searched(init=first, tolerance=0.0, longest=longest),
        backtracking="auto",
    )
    theta, unravel = ravel_pytree(params)
    r, j = residuals(params), jax.jacfwd(lambda p: residuals(unravel(p)))(theta)

    def look(power):
        damping = first * 4.0**power
        step = np.linalg.solve(j.T @ j + damping * np.eye(len(theta)), -j.T @ r)
        there = 0.5 * np.sum(np.square(residuals(unravel(theta + step))))
        model = 0.5 * np.sum(np.square(j @ step + r))
        start = 0.5 * np.sum(np.square(r))
        return step, there, (start - there) / (start - model)

    if longest is None:  # Down from 100 while f falls.
        best = next(k for k in range(7) if k == 6 or look(-k - 1)[1] >= look(-k)[1])
        assert best > 0
        best = -best
    else:
        least = 0.5 if longest == "auto" else longest
        good = [look(k)[2] >= least for k in range(-8, 8)]
        # Down to the last good one without a gap, or up to the first.
        up, down = good[8:], good[8::-1]
        best = 1 - down.index(False) if good[8] else up.index(True)
        assert best != 0
    step, value, _ = look(best)
    np.testing.assert_allclose(state.damping, first * 4.0**best, rtol=1e-12)
    np.testing.assert_allclose(flat(found), step, rtol=1e-7)
    np.testing.assert_allclose(state.info.value_after, value, rtol=1e-7)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_without_damping_a_singular_system_has_a_finite_step(space, dtype):
    """Fewer cases than parameters, and two of them the same."""
    x = jnp.asarray([[1.0, 2.0, 3.0, 4.0]] * 2 + [[0.0, 1.0, 0.0, 1.0]], dtype)
    batch = (x, jnp.asarray([1.0, 1.0, 2.0], dtype))
    objective = hfjax.Objective(lambda p, x: x @ p, SQUARED_ERROR)
    solver, undamped = sample_space.cholesky(space=space), damping.constant(0.0)
    params = jnp.zeros(4, dtype)
    found, state = step_of(objective, params, batch, solver, damping=undamped)
    assert state.info.accepted
    residual = x @ found - batch[1]
    np.testing.assert_allclose(residual, 0, atol=100 * np.sqrt(jnp.finfo(dtype).eps))


@pytest.mark.parametrize(
    ("space", "damping"), [("samples", 1e-13), ("parameters", 1e-10)]
)
def test_hardly_any_damping_leaves_the_digits(space, damping):
    """Of a loss that is no square: the shortest of the undamped steps."""
    (problem,) = (p for p in PROBLEMS if p.name == "softmax_soft_targets")
    solver = sample_space.cholesky(space=space)
    solve = functools.partial(
        solved, problem.objective(), solver=solver, damping=damping
    )
    found, _, _ = quick_jit(solve)(problem.params, problem.batch)
    matrix, gradient = reference.ggn(problem), reference.gradient(problem)
    step = np.linalg.pinv(matrix, rcond=1e-9, hermitian=True) @ -gradient
    error = np.linalg.norm(flat(found) - step) / np.linalg.norm(step)
    assert error < 1e-5


def test_a_model_that_is_not_finite_is_rejected():
    objective = hfjax.Objective(lambda p, x: x * jnp.log(p[None]), SQUARED_ERROR)
    batch = (jnp.ones((3, 1)), jnp.ones((3, 1)))
    solver, grads = sample_space.cholesky(), jnp.ones(1)
    found, state = step_of(objective, jnp.zeros(1), batch, solver, grads=grads)
    assert not state.info.accepted
    np.testing.assert_array_equal(found, 0)
    assert np.all(np.isfinite(state.direction))


@pytest.mark.slow
@needs_devices
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(
    "way",
    [
        "jit_with_shardings",
        "jit_with_explicit_shardings",
        "shard_map_check_vma",
        "shard_map",
        "pmap",
        "vmap",
    ],
)
@pytest.mark.parametrize("stored", STORED)
def test_devices_change_nothing(way, space, stored):
    objective = PROBLEM.objective(axis_name=axis_name(way))
    solver = sample_space.cholesky(space=space, stored=stored)

    def of_device(params, batch, v):
        del v
        return solved(objective, params, batch, solver)

    found = run(way, of_device)
    check(found, reference.ggn(PROBLEM), -reference.gradient(PROBLEM))


@pytest.mark.slow
def test_structural_damping_has_rows_of_its_own():
    problem = with_hidden()[0]
    objective, mu = problem.objective(), 0.7
    strong = 3.0  # So that f falls along the whole step.
    found, _ = step_of(
        objective,
        problem.params,
        problem.batch,
        sample_space.cholesky(space="samples", corrections=0),
        damping=damping.constant(strong, structural=mu, tied=False),
    )
    matrix = reference.ggn(problem) + mu * reference.structural(problem)
    matrix += strong * np.eye(len(matrix))
    step = np.linalg.solve(matrix, -reference.gradient(problem))
    np.testing.assert_allclose(flat(found), step, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_auto_is_exact_where_a_matrix_is_small_and_else_conjugate_gradients(
    monkeypatch,
):
    problem = PROBLEMS[0]
    objective = problem.objective()

    def iterations(**options):
        tx = hfjax.hessian_free(objective, solver="auto", **options)
        _, state = training.one_update(objective, tx, problem.params, problem.batch)
        return int(state.info.cg_iterations), hfjax.cg.Reason(int(state.info.cg_reason))

    assert iterations() == (1, hfjax.cg.Reason.RESIDUAL_ZERO)
    # What a matrix of outputs does not solve.
    assert iterations(curvature=hfjax.curvature.hessian)[0] > 1
    for matrix, exactly in (("curvature", False), ("curvature_diagonal", True)):
        rule = damping.levenberg_marquardt(matrix=matrix)
        assert (iterations(damping=rule)[0] == 1) == exactly
    monkeypatch.setattr(sample_space, "_NOTHING", 0)
    assert iterations()[0] == 1
    monkeypatch.setattr(sample_space, "_WORTH", 0)
    assert iterations()[0] > 1


@pytest.mark.parametrize(("rows", "columns"), [(2000, 3000), (3000, 2000)])
def test_auto_compares_the_multiplications_with_those_of_two_hundred_products(
    rows, columns
):
    # Of J̃ J̃ᵀ or J̃ᵀ J̃, whichever is smaller; a product takes three forward passes.
    limit = 2000 * 3000 * 2000 / (200 * 3)
    for forward, is_small in ((1.01 * limit, True), (0.99 * limit, False)):
        size = rows, columns, forward
        system = SimpleNamespace(jacobian_size=lambda size=size: size)
        assert sample_space._is_small(system) == is_small


def test_what_it_does_not_solve_is_refused():
    objective, exact = PROBLEMS[0].objective(), sample_space.cholesky()
    for options in (
        {"curvature": hfjax.curvature.hessian},
        {"damping": damping.levenberg_marquardt(matrix="curvature")},
        {"damping": hfjax.trust_region.radius()},
    ):
        with pytest.raises(ValueError, match=r"solves with G \+ λD"):
            hfjax.hessian_free(objective, solver=exact, **options)
    with pytest.raises(ValueError, match=r"`solver` must be one of 'auto'"):
        hfjax.hessian_free(objective, solver="cholesky")
    with pytest.raises(TypeError, match="`solver` must be a `Solver`, got function"):
        hfjax.hessian_free(objective, solver=sample_space.cholesky)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="`space` must be"):
        sample_space.cholesky(space="dual")
    with pytest.raises(ValueError, match="`momentum` must be"):
        sample_space.cholesky(momentum=1.5)
    with pytest.raises(ValueError, match="`corrections` must be"):
        sample_space.cholesky(corrections=-1)
    with pytest.raises(TypeError, match="`corrections` must be"):
        sample_space.cholesky(corrections=2.5)  # pyright: ignore[reportArgumentType]


def test_no_preconditioner_is_made_and_no_memory_kept(monkeypatch):
    # Nor the default one, which is only for solvers that ask for it.
    problem = PROBLEMS[0]

    def build(*_):
        msg = "nobody asks"
        raise AssertionError(msg)

    rule = hfjax.preconditioners.custom(build)
    monkeypatch.setattr(fitting, "kronecker", lambda: rule)
    tx = hfjax.hessian_free(problem.objective(), solver=sample_space.cholesky())
    _, grads = problem.objective().value_and_grad(problem.params, problem.batch)
    jax.eval_shape(
        functools.partial(tx.update, batch=problem.batch),
        grads,
        tx.init(problem.params),
        problem.params,
    )


def test_sizes_count_the_multiplications_of_a_pass_forward():
    def model_fn(params, x):
        def step(state, row):
            return jnp.tanh(state @ params["w"]) + row, None

        state, _ = jax.lax.scan(step, jnp.zeros((len(x), 4)), jnp.moveaxis(x, 1, 0))
        image = jax.lax.conv(
            state.reshape(-1, 1, 2, 2), params["kernel"], (1, 1), "VALID"
        )
        return image.reshape(len(x), -1) @ params["head"]

    params = {
        "w": jnp.ones((4, 4)),
        "kernel": jnp.ones((3, 1, 2, 1)),
        "head": jnp.ones((6, 2)),
    }
    one = hfjax.Objective(model_fn, SQUARED_ERROR)
    batch = (jnp.ones((7, 5, 4)), jnp.ones((7, 2)))
    # Five steps of 4 · 4, three channels at two places of 2, and 6 · 2.
    forward = 5 * 16 + 3 * 2 * 2 + 12
    assert size(one, params, batch) == (14, 34, 7 * forward)
    half = (jnp.ones((3, 5, 4)), jnp.ones((3, 2)))
    both = weighted_sum([(1.0, one), (2.0, one)])
    assert size(both, params, (batch, half)) == (20, 34, 10 * forward)
