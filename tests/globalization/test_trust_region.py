"""Steihaug and Toint against dense truth: textbook, and the best point of the region."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import training
from problems import named, symmetric
from reference import flat, quick_jit

import hfjax
from hfjax import trust_region
from hfjax.globalization.damping import Verdict
from hfjax.solvers.cg import Reason

N = 8
seeds = pytest.mark.parametrize("seed", [0, 1, 2])
FRACTIONS = (0.01, 0.3, 0.9, 0.999, 1.001, 50.0)
"""Of the length of the solution: radii, the last two beyond it."""


@functools.partial(quick_jit, static_argnames=("max_iterations", "stopping"))
def solve(a, b, radius, inverse=None, norm=None, *, max_iterations=N, stopping=None):
    return trust_region.solve(
        lambda v: a @ v,
        b,
        radius,
        preconditioner=None if inverse is None else lambda r: inverse @ r,
        norm=None if norm is None else lambda v: norm @ v,
        max_iterations=max_iterations,
        stopping=stopping,
    )


@quick_jit
def solve_to_each_iteration(a, b, radius, inverse, norm):
    """Run to 1, 2, 3, … iterations."""

    def to(last):
        return trust_region.solve(
            lambda v: a @ v,
            b,
            radius,
            preconditioner=lambda r: inverse @ r,
            norm=lambda v: norm @ v,
            max_iterations=N,
            stopping=lambda progress: progress.iteration >= last,
        )

    return jax.vmap(to)(jnp.arange(1, N + 1))


def system(seed, eigenvalues=np.geomspace(0.05, 1, N)):
    """Return A, b and P."""
    rng = np.random.default_rng(seed)
    a = symmetric(rng, np.asarray(eigenvalues))
    return a, rng.standard_normal(N), symmetric(rng, np.geomspace(0.5, 4, N))


def length(x, p):
    x = np.asarray(x, np.float64)
    return np.sqrt(x @ p @ x)


def steihaug(a, b, radius, inverse, q, iterations):
    """Run Steihaug's algorithm as printed, leaving ‖x‖_Q ≤ radius where first met.

    Returns:
      The iterates x₀, x₁, …, and whether the last is on the boundary.
    """
    x, r = np.zeros_like(b), -b
    p, iterates = -inverse @ r, [np.zeros_like(b)]
    for _ in range(iterations):
        curvature, ry = p @ a @ p, r @ inverse @ r
        if curvature > 0:
            ahead = x + ry / curvature * p
        if curvature <= 0 or length(ahead, q) >= radius:
            roots = np.roots([p @ q @ p, 2 * x @ q @ p, x @ q @ x - radius**2])
            return [*iterates, x + np.max(roots.real) * p], True
        x, r_new = ahead, r + ry / curvature * (a @ p)
        p = -inverse @ r_new + (r_new @ inverse @ r_new) / ry * p
        r = r_new
        iterates.append(x)
    return iterates, False


def best(a, b, radius, p):
    """Minimise M over ‖x‖_P ≤ radius: Moré and Sorensen, by eigenvalues.

    Returns:
      The least M.
    """
    root = np.linalg.cholesky(p)
    left = np.linalg.inv(root)
    w, v = np.linalg.eigh(left @ a @ left.T)
    c = v.T @ left @ b
    if w[0] > 0 and np.linalg.norm(c / w) <= radius:
        y = c / w
    else:
        low, high = max(0.0, -w[0]), max(0.0, -w[0]) + np.linalg.norm(c) / radius
        # The hard case: b has nothing along the most negative curvature.
        others = np.abs(w - w[0]) > 1e-12
        y = np.zeros_like(c)
        y[others] = c[others] / (w + low)[others]
        hard = np.allclose(c[~others], 0, atol=1e-13) and np.linalg.norm(y) < radius
        if hard:
            y[0] += np.sqrt(radius**2 - y @ y)
        else:
            for _ in range(200):
                middle = 0.5 * (low + high)
                outside = np.linalg.norm(c / (w + middle)) > radius
                low, high = (middle, high) if outside else (low, middle)
            y = c / (w + high)
    return 0.5 * np.sum(w * y * y) - c @ y


@pytest.mark.parametrize("preconditioned", [False, True])
@seeds
def test_steps_equal_textbook_and_gain_half_of_the_best(seed, preconditioned):
    a, b, p = system(seed)
    p = p if preconditioned else np.eye(N)
    inverse = np.linalg.inv(p)
    options = (inverse, p) if preconditioned else ()
    solution = np.linalg.solve(a, b)
    for fraction in FRACTIONS:
        radius = fraction * length(solution, p)
        result = solve(a, b, radius, *options)
        iterates, on_boundary = steihaug(a, b, radius, inverse, p, N)
        assert result.on_boundary == on_boundary == (fraction < 1)
        assert result.num_iterations == len(iterates) - 1
        scale = np.max(np.abs(iterates[-1]))
        np.testing.assert_allclose(result.x, iterates[-1], atol=1e-8 * scale)
        values = np.asarray(result.model_values)
        truth = [reference.model(a, b, x) for x in iterates]
        truth += [truth[-1]] * (N + 1 - len(truth))
        np.testing.assert_allclose(values, truth, rtol=1e-9, atol=1e-14)
        assert reference.model(a, b, result.x) <= 0.5 * best(a, b, radius, p) + 1e-14
        if on_boundary:
            np.testing.assert_allclose(length(result.x, p), radius, rtol=1e-13)
            assert Reason(int(result.reason)) is Reason.BOUNDARY
        else:
            np.testing.assert_allclose(result.x, solution, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("fraction", [0.8, 2.0])
@seeds
def test_iterates_grow_in_length_and_the_model_falls(seed, fraction):
    a, b, p = system(seed)
    radius = fraction * length(np.linalg.solve(a, b), p)
    runs = solve_to_each_iteration(a, b, radius, np.linalg.inv(p), p)
    lengths = np.array([length(x, p) for x in runs.x])
    last = int(runs.num_iterations[-1])
    np.testing.assert_array_equal(
        runs.num_iterations, np.minimum(np.arange(1, N + 1), last)
    )
    assert last > 2
    assert np.all(np.diff(lengths[:last]) > 0)
    assert np.all(lengths <= radius * (1 + 1e-13))
    models = np.array([reference.model(a, b, x) for x in runs.x])
    assert np.all(np.diff(models[:last]) < 0)
    np.testing.assert_allclose(runs.model_values[-1][1:], models, rtol=1e-9, atol=1e-14)


SPECTRA = {
    "indefinite": [-0.5, -0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 4.0],
    "negative": [-4.0, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, -0.2],
    "singular": [0.0, 0.0, 0.2, 0.5, 1.0, 2.0, 3.0, 4.0],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@seeds
def test_negative_and_no_curvature_lead_to_the_boundary(seed, spectrum):
    a, b, p = system(seed, SPECTRA[spectrum])
    inverse = np.linalg.inv(p)
    for radius in (0.1, 1.0, 100.0):
        result = solve(a, b, radius, inverse, p)
        iterates, on_boundary = steihaug(a, b, radius, inverse, p, N)
        assert on_boundary
        assert result.on_boundary
        np.testing.assert_allclose(length(result.x, p), radius, rtol=1e-12)
        np.testing.assert_allclose(result.x, iterates[-1], rtol=1e-5, atol=1e-6)
        value = reference.model(a, b, result.x)
        np.testing.assert_allclose(result.model_values[-1], value, rtol=1e-8)
        # The best point along the first direction, as any A must allow.
        first = inverse @ b
        along = first * radius / length(first, p)
        fractions = np.linspace(0, 1, 1001)
        cauchy = min(reference.model(a, b, t * along) for t in fractions)
        assert value <= cauchy + 1e-12 * abs(cauchy)
        assert value >= best(a, b, radius, p) - 1e-9
        if spectrum == "singular":
            assert value <= 0.5 * best(a, b, radius, p)


def test_the_best_point_is_that_of_a_fine_search():
    # The truth of this file, checked: the boundary of an ellipse, written out.
    angles = np.linspace(0, 2 * np.pi, 200_001)
    circle = np.stack([np.cos(angles), np.sin(angles)])
    for a, b in [
        (np.diag([1.0, 3.0]), np.array([2.0, 1.0])),
        (np.diag([1.0, -3.0]), np.array([2.0, 1.0])),
        (np.diag([1.0, -3.0]), np.array([2.0, 0.0])),  # The hard case.
        (np.diag([-1.0, 0.0]), np.array([0.3, 1.0])),
    ]:
        p = np.array([[2.0, 0.5], [0.5, 1.0]])
        if not b.all():
            p = np.eye(2)
        on = 0.7 * np.linalg.inv(np.linalg.cholesky(p).T) @ circle
        values = 0.5 * np.einsum("it,ij,jt->t", on, a, on) - b @ on
        np.testing.assert_allclose(best(a, b, 0.7, p), np.min(values), rtol=1e-8)


@seeds
def test_a_euclidean_ball_with_a_preconditioner_is_left_where_it_is_first_met(seed):
    a, b, p = system(seed)
    inverse = np.linalg.inv(p)
    for fraction in (0.05, 0.5, 0.95):
        radius = fraction * np.linalg.norm(np.linalg.solve(a, b))
        result = solve(a, b, radius, inverse)
        iterates, _ = steihaug(a, b, radius, inverse, np.eye(N), N)
        assert result.on_boundary
        np.testing.assert_allclose(np.linalg.norm(result.x), radius, rtol=1e-12)
        np.testing.assert_allclose(result.x, iterates[-1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("spectrum", [None, "indefinite"])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_the_scale_of_the_right_hand_side_and_the_radius_is_only_a_scale(
    size, spectrum
):
    a, b, p = system(1) if spectrum is None else system(1, SPECTRA[spectrum])
    f32 = (a.astype(np.float32), b.astype(np.float32), np.float32(0.7))
    for options in ((), (np.linalg.inv(p).astype(np.float32), p.astype(np.float32))):
        truth = solve(*f32, *options)
        assert truth.on_boundary
        assert truth.x.dtype == truth.model_values.dtype == np.float32
        result = solve(f32[0], np.float32(size) * f32[1], np.float32(size) * f32[2])
        truth = solve(*f32)
        assert result.on_boundary
        np.testing.assert_allclose(
            np.asarray(result.x, np.float64) / size, truth.x, atol=1e-5
        )


@pytest.mark.parametrize("size", [1e20, 1e30])
def test_a_gradient_far_longer_than_the_radius_goes_to_the_boundary(size):
    # Down the gradient: the curvature is of no account.
    a, b, _ = system(0)
    result = solve(a.astype(np.float32), (size * b).astype(np.float32), np.float32(0.5))
    assert result.on_boundary
    np.testing.assert_allclose(result.x, 0.5 * b / np.linalg.norm(b), rtol=1e-5)


@pytest.mark.parametrize("radius", [1e-30, 1e-22])
def test_a_tiny_radius_in_float32_is_kept_to(radius):
    a, b, _ = system(0)
    result = solve(a.astype(np.float32), b.astype(np.float32), np.float32(radius))
    assert result.on_boundary
    expected = radius * b / np.linalg.norm(b)
    np.testing.assert_allclose(np.asarray(result.x, float), expected, rtol=1e-4)


@pytest.mark.parametrize("size", [1e-20, 1e-30])
def test_a_radius_far_beyond_a_tiny_solution_is_no_nan(size):
    a, b, _ = (leaf.astype(np.float32) for leaf in system(0))
    result = solve(a, np.float32(size) * b, np.float32(1))
    assert not result.on_boundary
    truth = size * np.linalg.solve(a.astype(float), b.astype(float))
    np.testing.assert_allclose(
        np.asarray(result.x, float), truth, atol=1e-3 * np.max(np.abs(truth))
    )
    # Along negative curvature, though, the boundary is far away, and finite.
    a, b, _ = (leaf.astype(np.float32) for leaf in system(0, SPECTRA["indefinite"]))
    result = solve(a, np.float32(size) * b, np.float32(1))
    assert result.on_boundary
    np.testing.assert_allclose(np.linalg.norm(result.x), 1, rtol=1e-5)


def test_a_huge_radius_in_float32_is_met_along_negative_curvature():
    a, b, _ = (leaf.astype(np.float32) for leaf in system(0, SPECTRA["indefinite"]))
    result = solve(a, b, np.float32(1e25))
    assert result.on_boundary
    norm = np.linalg.norm(np.asarray(result.x, float))
    np.testing.assert_allclose(norm, 1e25, rtol=1e-5)


def test_the_scale_of_the_preconditioner_counts_in_the_norm_only():
    a, b, p = system(0)
    truth = solve(a, b, 0.5, np.linalg.inv(p), p)
    for scale in (1e-12, 1e12):
        result = solve(a, b, 0.5 * np.sqrt(scale), np.linalg.inv(scale * p), scale * p)
        np.testing.assert_allclose(result.x, truth.x, rtol=1e-9)


def test_zero_right_hand_side_stays_at_zero():
    for spectrum in ("indefinite", "singular"):
        a, b, _ = system(0, SPECTRA[spectrum])
        result = solve(a, 0 * b, 1.0)
        np.testing.assert_array_equal(result.x, np.zeros(N))
        assert (int(result.num_iterations), bool(result.on_boundary)) == (0, False)
        assert not np.any(result.model_values)


CHAIN = 2 * np.eye(N) - 0.5 * np.eye(N, k=1) - 0.5 * np.eye(N, k=-1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_product_that_is_not_finite_leaves_the_last_iterate(bad):
    b = np.eye(N)[0]
    result = quick_jit(
        lambda bad: trust_region.solve(
            # Iterate i reaches entry i − 1; what reaches 3 is spoilt.
            lambda v: (CHAIN @ v) * jnp.where(v[3] != 0, bad, 1.0),
            jnp.asarray(b),
            10.0,
        )
    )(bad)
    truth, _ = reference.pcg(CHAIN, b, iterations=3)
    np.testing.assert_allclose(result.x, truth[3], rtol=1e-10)
    assert Reason(int(result.reason)) is Reason.NONFINITE
    assert not result.on_boundary
    assert np.all(np.isfinite(result.model_values))


def test_a_preconditioner_without_a_pull_is_not_the_boundary():
    # P⁻¹r = 0 though r is not: x stays inside.
    a, b, _ = system(0)
    result = solve(a, b, 1.0, np.zeros((N, N)), np.eye(N))
    np.testing.assert_array_equal(result.x, np.zeros(N))
    assert not result.on_boundary


def test_trees_of_mixed_dtypes_keep_them():
    a, b, p = system(0)
    f32, f64 = jnp.float32, jnp.float64

    def tree(x):
        x = jnp.asarray(x)
        return {
            "a": x[:4].astype(f32).reshape(2, 2),
            "b": [(x[4:5].astype(f64), x[5:])],
        }

    def joined(t):
        parts = [t["a"].ravel(), *t["b"][0]]
        return jnp.concatenate([part.astype(f64) for part in parts])

    inverse = np.linalg.inv(p)
    radius = 0.5 * length(np.linalg.solve(a, b), p)
    result = quick_jit(
        lambda b: trust_region.solve(
            lambda v: tree(a @ joined(v)),
            b,
            radius,
            preconditioner=lambda r: tree(inverse @ joined(r)),
            norm=lambda v: tree(p @ joined(v)),
            max_iterations=N,
        )
    )(tree(b))
    iterates, _ = steihaug(a, b, radius, inverse, p, N)
    np.testing.assert_allclose(joined(result.x), iterates[-1], atol=1e-4)
    assert [leaf.dtype for leaf in jax.tree.leaves(result.x)] == [f32, f64, f64]
    assert result.on_boundary


def test_bad_options_are_refused():
    b = jnp.ones(3)
    for radius in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"`radius` must be above 0\.0"):
            trust_region.solve(lambda v: v, b, radius)
    with pytest.raises(ValueError, match="`max_iterations` must be at least 0"):
        trust_region.solve(lambda v: v, b, 1.0, max_iterations=-1)
    with pytest.raises(TypeError, match="`max_iterations` must be a Python integer"):
        trust_region.steihaug_toint(max_iterations=2.0)
    with pytest.raises(ValueError, match="must not evaluate f"):
        trust_region.steihaug_toint(keep=hfjax.iterates.best())
    for options in ({"init": 0.0}, {"shrink": 0.0}, {"grow": 0.9}, {"maximum": -1.0}):
        with pytest.raises(ValueError, match="must be"):
            trust_region.radius(**options)


# What an update does with it.

PROBLEM = named("mlp_softmax")
OBJECTIVE = PROBLEM.objective()


def one_update(solver, radius, preconditioner):
    tx = hfjax.hessian_free(
        OBJECTIVE,
        solver=solver,
        damping=trust_region.radius(init=radius),
        preconditioner=preconditioner,
        backtracking=None,
        line_search=None,
    )

    @quick_jit
    def update(params, state):
        grads = OBJECTIVE.value_and_grad(params, PROBLEM.batch)[1]
        return tx.update(grads, state, params, batch=PROBLEM.batch)

    return update, tx.init(PROBLEM.params)


@pytest.mark.parametrize("elliptical", [True, False])
def test_an_update_is_steihaugs_step_on_the_dense_gauss_newton_matrix(elliptical):
    # P itself is not at hand in an update: its norm comes from recurrences.
    a, g = reference.ggn(PROBLEM), reference.gradient(PROBLEM)
    p = np.diag(reference.empirical_fisher(PROBLEM) ** 0.75)
    q = p if elliptical else np.eye(len(g))
    solver = trust_region.steihaug_toint(elliptical=elliptical, stopping=None)
    update, state = one_update(solver, 1.0, hfjax.preconditioners.diagonal())
    whole = length(np.linalg.solve(a, -g), q)
    for fraction in (0.02, 0.2, 0.4):
        radius = fraction * whole
        iterates, _ = steihaug(a, -g, radius, np.linalg.inv(p), q, 30)
        state = state._replace(damping=jnp.asarray(radius))
        updates, after = update(PROBLEM.params, state)
        assert after.info.accepted
        step = flat(updates)
        np.testing.assert_allclose(step, iterates[-1], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(length(step, q), radius, rtol=1e-9)
        assert Reason(int(after.info.cg_reason)) is Reason.BOUNDARY
        np.testing.assert_allclose(
            after.info.predicted_change, reference.model(a, -g, step), rtol=1e-8
        )
        # The next run starts from 0, and what is carried over does not matter.
        carried = state._replace(direction=PROBLEM.params)
        again, _ = update(PROBLEM.params, carried)
        np.testing.assert_array_equal(flat(again), step)


def rule(radius, ratio, on_boundary, shrink=2 / 3, grow=3 / 2, maximum=1e18):
    """Adapt the radius, written as the report's rule for λ = 1 / radius."""
    if not ratio >= 0.25:
        return shrink * radius
    if ratio > 0.75 and on_boundary:
        return min(grow * radius, maximum)
    return radius


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_radius_grows_on_the_boundary_only(dtype):
    built = trust_region.radius(init=7.0, maximum=8.0)
    other = trust_region.radius(init=7.0, shrink=0.25, grow=3.0)
    assert built.init() == 7
    for on_boundary in (True, False):
        for ratio in (0.9, 0.75, 0.5, 0.25, 0.2, -3.0, -np.inf, np.nan, np.inf):
            for radius in (7.0, 1e-3):
                verdict = Verdict(dtype(ratio), on_boundary=jnp.asarray(on_boundary))
                now = (dtype(radius), verdict)
                result = built.update(*now)
                truth = rule(radius, ratio, on_boundary, maximum=8.0)
                np.testing.assert_allclose(result, truth, rtol=1e-6)
                assert result.dtype == dtype
                truth = rule(radius, ratio, on_boundary, 0.25, 3.0)
                np.testing.assert_allclose(other.update(*now), truth, rtol=1e-6)


@pytest.mark.slow
def test_training_follows_the_rule_and_f_never_rises():
    tx = hfjax.hessian_free(
        OBJECTIVE,
        solver=trust_region.steihaug_toint(),
        damping=trust_region.radius(init=0.01),
    )
    _, (info, radii) = training.trained(
        OBJECTIVE, tx, PROBLEM.params, PROBLEM.batch, 40
    )
    assert np.all(np.isfinite(info.value_after))
    assert np.all(info.value_after <= info.value_before)
    assert info.value_after[-1] < 0.7 * info.value_before[0]
    before = np.concatenate([[0.01], radii[:-1]])
    seen = set()
    for now, after, ratio, reason, accepted in zip(
        before, radii, info.reduction_ratio, info.cg_reason, info.accepted, strict=True
    ):
        on_boundary = reason == Reason.BOUNDARY
        ratio = ratio if accepted else -np.inf
        np.testing.assert_allclose(after, rule(now, ratio, on_boundary), rtol=1e-9)
        seen.add((bool(on_boundary), bool(after > 1.01 * now)))
    assert {(True, True), (True, False)} <= seen


def test_a_step_chosen_inside_the_region_does_not_let_it_grow():
    # f rises along the second iterate, which reached the boundary; the first is taken.
    d = jnp.array([4.0, 1e-3])
    objective = hfjax.Objective(
        lambda p, x: (0.5 * d[0] * (p[0] - 1) ** 2 + 5 * p[1] ** 2 - 0.1 * p[1])[None],
        lambda z, t: z,
    )
    batch = (jnp.zeros((1, 1)), jnp.zeros((1, 1)))
    tx = hfjax.hessian_free(
        objective,
        solver=trust_region.steihaug_toint(
            stopping=None, keep=hfjax.iterates.every(1), max_iterations=2
        ),
        damping=trust_region.radius(init=3.0),
        preconditioner=None,
        curvature=lambda objective, params, batch: lambda v: d * v,
    )
    _, state = training.one_update(objective, tx, jnp.zeros(2), batch)
    assert state.info.accepted
    assert Reason(int(state.info.cg_reason)) is Reason.BOUNDARY
    assert state.info.chosen_iteration == 1
    assert state.info.reduction_ratio > 0.75
    assert state.damping == pytest.approx(3.0)
