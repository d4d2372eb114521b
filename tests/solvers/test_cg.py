import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from problems import symmetric
from reference import quick_jit

from hfjax import cg, iterates, stopping
from hfjax.solvers.cg import Reason

N = 8
EVERY = iterates.grid(first=1, growth=1.0001)
seeds = pytest.mark.parametrize("seed", [0, 1, 2])


@functools.partial(
    quick_jit, static_argnames=("max_iterations", "min_iterations", "stopping")
)
def solve(a, b, x0=None, inverse=None, *, max_iterations=N, stopping=None, **options):
    """Solve with matrices; every iterate is kept."""
    return cg.solve(
        lambda v: a @ v,
        b,
        x0=x0,
        preconditioner=None if inverse is None else lambda r: inverse @ r,
        max_iterations=max_iterations,
        stopping=stopping,
        keep=EVERY,
        **options,
    )


def system(seed, condition=20.0, n=N):
    """Return A, b, x₀ and P⁻¹, positive definite and far from diagonal."""
    rng = np.random.default_rng(seed)
    a = symmetric(rng, np.geomspace(1 / condition, 1, n))
    inverse = symmetric(rng, np.geomspace(0.5, 2, n))
    return a, rng.standard_normal(n), rng.standard_normal(n), inverse


def reason(result):
    return Reason(int(result.reason))


@pytest.mark.every
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("warm", [False, True])
@seeds
def test_iterates_and_model_equal_textbook(seed, warm, preconditioned):
    a, b, x0, inverse = system(seed)
    x0, inverse = x0 if warm else None, inverse if preconditioned else None
    result = solve(a, b, x0, inverse)
    truth, values = reference.pcg(a, b, x0, inverse, iterations=N)
    assert result.num_iterations == N
    np.testing.assert_array_equal(result.kept.iterations, np.arange(1, N + 1))
    scale = np.max(np.abs(truth))
    np.testing.assert_allclose(
        result.kept.iterates, truth[1:], rtol=1e-8, atol=1e-8 * scale
    )
    np.testing.assert_array_equal(result.x, result.kept.iterates[-1])
    np.testing.assert_allclose(result.model_values, values, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(result.x, np.linalg.solve(a, b), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float64, 1e-13), (np.float32, 2e-6)]
)
@seeds
def test_model_is_that_of_the_iterate_and_falls(seed, dtype, tolerance):
    a, b, x0, inverse = (leaf.astype(dtype) for leaf in system(seed))
    for start in (None, x0):
        result = solve(a, b, start, inverse)
        values = np.asarray(result.model_values)
        assert values.dtype == dtype
        steps = np.diff(values)
        assert np.all(steps <= 0)
        assert np.all(steps[:4] < 0)
        first = np.zeros(N, dtype) if start is None else start
        for x, value in zip([first, *result.kept.iterates], values, strict=True):
            truth = reference.model(a, b, x)
            np.testing.assert_allclose(
                value, truth, atol=tolerance * np.max(np.abs(values))
            )


@seeds
def test_as_many_steps_as_there_are_distinct_eigenvalues(seed):
    rng = np.random.default_rng(seed)
    a = symmetric(rng, np.array([0.5, 0.5, 2.0, 2.0, 2.0, 7.0, 7.0, 7.0]))
    b = rng.standard_normal(N)
    solution = np.linalg.solve(a, b)
    result = solve(a, b)
    error = np.max(np.abs(np.asarray(result.kept.iterates) - solution), axis=1)
    assert error[1] > 1e-3
    assert error[2] < 1e-12
    np.testing.assert_allclose(result.x, solution, rtol=1e-10)


@seeds
def test_one_step_where_the_preconditioner_is_the_matrix(seed):
    a, b, x0, _ = system(seed)
    for start in (None, x0):
        first = solve(a, b, start, np.linalg.inv(a)).kept.iterates[0]
        np.testing.assert_allclose(first, np.linalg.solve(a, b), rtol=1e-10)


@pytest.mark.parametrize("scale", [1e-12, 0.3, 1e12])
def test_the_scale_of_the_preconditioner_changes_nothing(scale):
    a, b, x0, inverse = system(0)
    truth, result = solve(a, b, x0, inverse), solve(a, b, x0, scale * inverse)
    np.testing.assert_allclose(result.kept.iterates, truth.kept.iterates, rtol=1e-7)
    np.testing.assert_allclose(result.model_values, truth.model_values, rtol=1e-10)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_any_scale_of_the_preconditioner_changes_nothing_in_float32(scale):
    a, b, _, _ = (leaf.astype(np.float32) for leaf in system(0))
    inverse = np.eye(N, dtype=np.float32)
    truth, result = solve(a, b, None, inverse), solve(a, b, None, scale * inverse)
    np.testing.assert_allclose(result.x, truth.x, rtol=1e-2)


@seeds
def test_the_preconditioned_norm_grows_from_zero(seed):
    a, b, _, inverse = system(seed)
    iterates = np.asarray(solve(a, b, None, inverse).kept.iterates)
    p = np.linalg.inv(inverse)
    norms = np.sqrt(np.einsum("im,mn,in->i", iterates, p, iterates))
    assert np.all(np.diff(norms) > -1e-12)
    assert norms[-1] > norms[0]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_no_iterations_return_the_start_exactly(dtype):
    a, b, x0, inverse = (leaf.astype(dtype) for leaf in system(0))
    result = solve(a, 1e-10 * b, x0, inverse, max_iterations=0)
    np.testing.assert_array_equal(result.x, x0)
    np.testing.assert_array_equal(result.kept.iterates, [x0])
    assert result.num_iterations == 0
    assert reason(result) == Reason.MAX_ITERATIONS
    truth = reference.model(a, 1e-10 * b, x0)
    np.testing.assert_allclose(result.model_values, [truth], rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_negative_curvature_at_once_gives_the_preconditioned_gradient(scale):
    a, b, _, inverse = system(1)
    for matrix in (-a, 0 * a):
        result = solve(matrix, b, None, scale * inverse)
        # Its length is that of b, to a power of two, whatever the scale of P.
        size = np.max(np.abs(result.x)) / np.max(np.abs(b))
        assert 0.5 <= size <= 2
        parallel = inverse @ b
        parallel *= np.max(np.abs(result.x)) / np.max(np.abs(parallel))
        np.testing.assert_allclose(result.x, parallel, rtol=1e-12)
        assert reason(result) == Reason.NONPOSITIVE_CURVATURE
        assert result.num_iterations == 1
        values = np.asarray(result.model_values)
        truth = reference.model(matrix, b, result.x)
        np.testing.assert_allclose(values[1:], truth, rtol=1e-12)
        assert values[1] < values[0] == 0


def test_a_preconditioner_that_turns_the_gradient_round_ends_the_run():
    """Where rᵀP⁻¹r < 0, p points uphill, although pᵀA p is positive."""
    a, b, x0, inverse = system(0)
    for start in (None, x0):
        result = solve(a, b, start, -inverse)
        assert reason(result) == Reason.NONPOSITIVE_CURVATURE
        np.testing.assert_array_equal(result.x, np.zeros(N) if start is None else x0)


def test_negative_curvature_later_keeps_the_iterate():
    rng = np.random.default_rng(2)
    a = symmetric(rng, np.array([-0.05, 0.2, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0]))
    b = rng.standard_normal(N)
    truth, values = reference.pcg(a, b, iterations=N)
    # With an indefinite A the textbook's M rises where pᵀA p turns negative.
    good = int(np.argmax(np.diff(values) > 0))
    assert good >= 3
    result = solve(a, b)
    assert reason(result) == Reason.NONPOSITIVE_CURVATURE
    assert result.num_iterations == good
    np.testing.assert_allclose(result.x, truth[good], rtol=1e-8)
    np.testing.assert_allclose(result.model_values[: good + 1], values[: good + 1])
    np.testing.assert_array_equal(
        result.model_values[good:], np.full(N + 1 - good, result.model_values[good])
    )
    np.testing.assert_array_equal(
        result.kept.iterations, [*range(1, good + 1), *[-1] * (N - good)]
    )


def test_zero_right_hand_side_has_the_solution_zero():
    a, b, x0, _ = system(0)
    result = solve(a, 0 * b)
    np.testing.assert_array_equal(result.x, np.zeros(N))
    assert (reason(result), result.num_iterations) == (Reason.RESIDUAL_ZERO, 0)
    assert not np.any(result.model_values)
    np.testing.assert_allclose(solve(a, 0 * b, x0).x, np.zeros(N), atol=1e-10)


def test_a_start_at_the_solution_stays():
    _, b, _, _ = system(0)
    result = solve(np.eye(N), b, b)
    np.testing.assert_array_equal(result.x, b)
    assert (reason(result), result.num_iterations) == (Reason.RESIDUAL_ZERO, 0)


@pytest.mark.parametrize("size", [1e-35, 1e-20, 1e20, 1e30])
def test_tiny_and_huge_right_hand_sides_have_the_same_iterates(size):
    a, b, x0, inverse = (leaf.astype(np.float32) for leaf in system(1))
    size = np.float32(size)
    for start in (None, x0):
        truth = solve(a, b, start, inverse)
        scaled = None if start is None else size * start
        result = solve(a, size * b, scaled, inverse)
        np.testing.assert_allclose(
            np.asarray(result.kept.iterates, float) / size,
            truth.kept.iterates,
            atol=2e-3 * np.max(np.abs(truth.x)),
        )
        assert reason(result) != Reason.NONFINITE


@pytest.mark.parametrize("size", [1e20, 1e30])
def test_the_model_of_a_huge_right_hand_side_is_no_nan(size):
    a, b, _, _ = (leaf.astype(np.float32) for leaf in system(1))
    result = solve(a, np.float32(size) * b)
    assert result.model_values[0] == 0
    assert not np.any(np.isnan(result.model_values))


def test_the_model_of_a_tiny_right_hand_side_is_negative():
    # M is near −1e-36, which float32 can hold; ‖b‖² is 1e-40.
    a, b, _, _ = (leaf.astype(np.float32) for leaf in system(1, condition=1e4))
    assert solve(a, np.float32(1e-20) * b).model_values[-1] < 0


CHAIN = 2 * np.eye(N) - 0.5 * np.eye(N, k=1) - 0.5 * np.eye(N, k=-1)
UNIT = np.eye(N)[0]


@functools.partial(quick_jit, static_argnames="where")
def solve_chain(bad, x0=None, *, where):
    """Run on a chain, where iterate i reaches entry i − 1; spoil what reaches 3."""

    def spoil(v):
        return jnp.where(v[3] != 0, bad, 1.0)

    def matvec(v):
        return (CHAIN @ v) * (spoil(v) if where == "product" else 1.0)

    def precondition(r):
        return r * (spoil(r) if where == "preconditioner" else 1.0)

    return cg.solve(
        matvec,
        jnp.asarray(UNIT),
        x0=x0,
        preconditioner=precondition,
        max_iterations=N,
        stopping=None,
        keep=EVERY,
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["product", "preconditioner"])
def test_nonfinite_products_leave_the_last_finite_iterate(where, bad):
    result = solve_chain(bad, where=where)
    truth, values = reference.pcg(CHAIN, UNIT, iterations=3)
    assert reason(result) == Reason.NONFINITE
    assert result.num_iterations == 3
    np.testing.assert_allclose(result.x, truth[3], rtol=1e-10)
    np.testing.assert_allclose(result.model_values[:4], values, rtol=1e-12)
    np.testing.assert_array_equal(result.model_values[3:], result.model_values[3])
    assert np.all(np.isfinite(result.kept.iterates))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_right_hand_side_leaves_the_start(bad):
    a, b, x0, inverse = system(0)
    b[2] = bad
    for start in (None, x0):
        result = solve(a, b, start, inverse)
        np.testing.assert_array_equal(result.x, np.zeros(N) if start is None else start)
        assert (reason(result), result.num_iterations) == (Reason.NONFINITE, 0)


def test_entries_past_the_last_iteration_repeat_it():
    a, b, _, _ = system(0)
    result = solve(a, b, stopping=stopping.residual(0.3))
    count = int(result.num_iterations)
    assert reason(result) == Reason.STOPPING_RULE
    assert 1 <= count < N
    assert result.model_values.shape == (N + 1,)
    truth, values = reference.pcg(a, b, iterations=count)
    residuals = np.linalg.norm(truth @ a - b, axis=1) / np.linalg.norm(b)
    assert residuals[count] <= 0.3 < residuals[count - 1]
    np.testing.assert_allclose(result.model_values[: count + 1], values, rtol=1e-10)
    tail = np.asarray(result.model_values[count:])
    np.testing.assert_array_equal(tail, np.full(len(tail), tail[0]))


@pytest.mark.parametrize("rule", [stopping.martens2010, stopping.martens_sutskever2012])
def test_a_run_ends_where_the_rule_of_the_report_says(rule):
    a, b, _, _ = system(3, condition=100.0, n=40)
    result = solve(a, b, stopping=rule(), max_iterations=40)
    _, values = reference.pcg(a, b, iterations=40)
    per_iteration = rule is stopping.martens2010
    ends = [
        j
        for j in range(11, 41)  # The window is 10 up to iteration 100.
        if 1 - values[j - 10] / values[j] < (5e-3 if per_iteration else 1e-4)
    ]
    assert 11 < ends[0] < 40
    assert (result.num_iterations, reason(result)) == (ends[0], Reason.STOPPING_RULE)


def always(progress):
    return progress.iteration >= 0


@pytest.mark.parametrize("least", [0, 3, N + 5])
def test_the_rule_is_not_asked_before_min_iterations(least):
    a, b, _, _ = system(0)
    result = solve(a, b, stopping=always, min_iterations=least)
    assert result.num_iterations == min(least, N)
    rule = Reason.STOPPING_RULE if least < N else Reason.MAX_ITERATIONS
    assert reason(result) == rule


def test_without_a_rule_a_run_ends_at_a_residual_of_zero():
    result = solve(np.eye(N), np.ones(N))
    assert (reason(result), result.num_iterations) == (Reason.RESIDUAL_ZERO, 1)


def test_a_run_is_the_same_when_jitted():
    a, b, x0, inverse = system(0)
    eager = solve.__wrapped__(a, jnp.asarray(b), jnp.asarray(x0), inverse)
    jitted = solve(a, b, x0, inverse)
    for ours, truth in zip(
        jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True
    ):
        np.testing.assert_allclose(ours, truth, rtol=1e-9, atol=1e-12)


def test_trees_of_mixed_dtypes_keep_them():
    a, b, x0, _ = system(0, condition=10.0)
    f32, f64 = jnp.float32, jnp.float64

    def tree(x):
        return {
            "a": jnp.asarray(x[:4], f32).reshape(2, 2),
            "b": [(jnp.asarray(x[4], f64), jnp.asarray(x[5:7], f64))],
            "c": jnp.asarray(x[7:], jnp.float16),
        }

    def flat(t):
        (b0, b1) = t["b"][0]
        parts = [t["a"].ravel(), b0[None], b1, t["c"]]
        return jnp.concatenate([part.astype(f64) for part in parts])

    result = quick_jit(
        lambda b, x0: cg.solve(
            lambda v: tree(a @ flat(v)), b, x0=x0, max_iterations=4, stopping=None
        )
    )(tree(b), tree(x0))
    truth, values = reference.pcg(a, flat(tree(b)), flat(tree(x0)), iterations=4)
    np.testing.assert_allclose(flat(result.x), truth[-1], atol=5e-3)
    np.testing.assert_allclose(result.model_values, values, rtol=1e-2)
    assert jax.tree.map(lambda leaf: leaf.dtype, result.x) == jax.tree.map(
        lambda leaf: leaf.dtype, tree(b)
    )
    assert result.model_values.dtype == f64


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_short_floats_sum_in_float32(dtype):
    b = jnp.ones(5, dtype)
    result = jax.eval_shape(lambda b: cg.solve(lambda v: 2 * v, b, x0=b), b)
    assert result.x.dtype == dtype
    assert result.kept.iterates.dtype == dtype
    assert result.model_values.dtype == jnp.float32
    assert result.num_iterations.dtype == result.reason.dtype == jnp.int32


def test_bad_arguments_are_refused():
    b = jnp.ones(3)

    def run(**options):
        return cg.solve(lambda v: v, b, **options)

    with pytest.raises(TypeError, match="`max_iterations` must be a Python integer"):
        run(max_iterations=10.0)
    with pytest.raises(TypeError, match="`max_iterations` must be a Python integer"):
        jax.jit(lambda n: run(max_iterations=n))(3)
    with pytest.raises(ValueError, match="`max_iterations` must be at least 0"):
        run(max_iterations=-1)
    with pytest.raises(TypeError, match="`min_iterations` must be a Python integer"):
        run(min_iterations=True)
    with pytest.raises(ValueError, match="`min_iterations` must be at least 0"):
        run(min_iterations=-1)
    with pytest.raises(ValueError, match="`x0` must be a tree like `b`"):
        run(x0={"a": b})


def test_bad_options_of_the_solver_are_refused():
    build = cg.conjugate_gradient
    with pytest.raises(TypeError, match="`max_iterations` must be a Python integer"):
        build(max_iterations=1e2)
    with pytest.raises(ValueError, match="`max_iterations` must be at least 1"):
        build(max_iterations=0)
    with pytest.raises(ValueError, match="`min_iterations` must be at least 0"):
        build(min_iterations=-2)
    for decay in (-0.1, 1.1):
        with pytest.raises(ValueError, match="`warm_start_decay` must be at least 0"):
            build(warm_start_decay=decay)
    with pytest.raises(ValueError, match="`warm_start_from` must be one of 'last'"):
        build(warm_start_from="best")


def test_the_start_is_the_decayed_direction():
    direction, count = {"a": jnp.asarray([2.0, -4.0])}, jnp.asarray(3)
    start = cg.conjugate_gradient(warm_start_decay=0.5).start(direction, count)
    np.testing.assert_array_equal(start["a"], [1.0, -2.0])
    scheduled = cg.conjugate_gradient(warm_start_decay=lambda count: 1 / (1 + count))
    np.testing.assert_array_equal(scheduled.start(direction, count)["a"], [0.5, -1.0])
    assert cg.conjugate_gradient(warm_start_decay=None).start(direction, count) is None


@pytest.mark.parametrize(
    ("dtype", "size", "curvature"), [("float32", 1e30, 1e-10), ("float16", 1e3, 1e-3)]
)
def test_an_iterate_beyond_the_floats_is_not_taken(dtype, size, curvature):
    # In units of b it is a number, 1 / curvature.
    b = jnp.full(3, size, dtype)
    run = cg.solve(lambda v: (curvature * v).astype(dtype), b, stopping=None)
    assert run.reason == Reason.NONFINITE
    assert run.num_iterations == 0
    np.testing.assert_array_equal(run.x, np.zeros(3))


def test_the_last_or_the_chosen_iterate_is_carried_over():
    a, b, _, _ = system(0)
    result, chosen = solve(a, b), jnp.ones(N)
    for options, carried in (
        ({"warm_start_decay": 0.95}, result.x),
        ({"warm_start_decay": lambda count: 0.5 + 0.1 * count}, result.x),
        ({"warm_start_decay": 0.95, "warm_start_from": "chosen"}, chosen),
        ({"warm_start_from": "chosen"}, chosen),
        ({}, chosen),  # The last is not asked for.
    ):
        carry = cg.conjugate_gradient(**options).carry
        np.testing.assert_array_equal(carry(cg.as_run(result), chosen), carried)


TWICE = cg.conjugate_gradient(max_iterations=2, stopping=None, keep=EVERY)


@functools.partial(quick_jit, static_argnames="solver")
def solve_by(solver, a, b, x0=None, inverse=None, count=0):
    """Let a solver solve; f is Σx on the evaluation data, −Σx on the batch."""
    given = cg.System(
        matvec=lambda v: a @ v,
        b=b,
        scalar=jnp.zeros(()),
        count=count,
        value=jnp.sum,
        batch_value=lambda x: -jnp.sum(x),
        value_and_grad=jax.value_and_grad(jnp.sum),
        preconditioner=lambda: None if inverse is None else lambda r: inverse @ r,
    )
    run = solver.solve(given, x0)._replace(at_damping=None)
    return run, solver.carry(run, jnp.zeros_like(b))


def test_a_warm_start_that_stays_above_zero_is_run_again_from_zero():
    a, b, x0, inverse = system(0)
    cold, cold_values = reference.pcg(a, b, None, inverse, iterations=2)
    _, values = reference.pcg(a, b, 30 * x0, inverse, iterations=2)
    assert values[-1] > 0
    result, _ = solve_by(TWICE, a, b, 30 * x0, inverse)
    np.testing.assert_allclose(result.last.direction, cold[-1], rtol=1e-10)
    values = result.stats.model_values
    np.testing.assert_allclose(values, cold_values, rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(result.iterates.iterates, cold[1:], rtol=1e-10)


def test_a_warm_start_that_falls_below_zero_is_not_run_again():
    a, b, _, inverse = system(0)
    for start, above in ((np.linalg.solve(a, b) / 2, False), (-0.1 * b, True)):
        warm, values = reference.pcg(a, b, start, inverse, iterations=2)
        assert (values[0] > 0) == above
        assert values[-1] < 0
        result, _ = solve_by(TWICE, a, b, start, inverse)
        np.testing.assert_allclose(result.last.direction, warm[-1], rtol=1e-9)
        np.testing.assert_allclose(result.stats.model_values, values, rtol=1e-9)


def test_a_cold_start_is_textbook():
    a, b, _, inverse = system(0)
    cold, _ = reference.pcg(a, b, None, inverse, iterations=2)
    result, _ = solve_by(TWICE, a, b, None, inverse)
    np.testing.assert_allclose(result.last.direction, cold[-1], rtol=1e-10)


def test_a_nonfinite_product_is_not_run_again():
    a, b, x0, inverse = system(0)
    result, _ = solve_by(TWICE, np.nan * a, b, x0, inverse)
    np.testing.assert_array_equal(result.last.direction, x0)
    assert reason(result.stats) == Reason.NONFINITE


def test_the_loop_holds_one_product():
    products = []

    def matvec(v):
        products.append(v)
        return 2 * v

    b = jnp.ones(3)
    jax.eval_shape(lambda b: cg.solve(matvec, b, stopping=None), b)
    assert len(products) <= 2  # JAX may trace a loop's body twice.


@pytest.mark.parametrize("x0", [np.zeros(1), np.zeros((N, 1)), {"x": np.zeros(N)}])
def test_a_start_of_another_shape_than_b_is_refused(x0):
    with pytest.raises(ValueError, match="`x0` must be a tree like `b`"):
        cg.solve(lambda v: v, jnp.ones(N), x0=jax.tree.map(jnp.asarray, x0))


def test_a_start_in_another_dtype_leaves_the_solution_that_of_b():
    b = jnp.ones(N, jnp.float32)
    for dtype in (jnp.bfloat16, jnp.float64):
        result = cg.solve(lambda v: 2 * v, b, x0=jnp.ones(N, dtype), max_iterations=2)
        assert result.x.dtype == jnp.float32
        np.testing.assert_allclose(result.x, 0.5)


def test_the_limit_is_read_in_every_update():
    a, b, _, _ = system(0)
    solver = cg.conjugate_gradient(
        max_iterations=6, stopping=None, limit=lambda count: 7.9 - 2 * count
    )
    truth, _ = reference.pcg(a, b, iterations=6)
    for count, last in ((0, 6), (1, 5), (2, 3)):
        result, _ = solve_by(solver, a, b, count=jnp.int32(count))
        assert result.stats.num_iterations == last
        assert reason(result.stats) == Reason.MAX_ITERATIONS
        np.testing.assert_allclose(result.last.direction, truth[last], rtol=1e-9)
        assert result.stats.model_values.shape == (7,)
    with pytest.raises(ValueError, match="`limit` must be at least 1"):
        cg.conjugate_gradient(limit=0)


@pytest.mark.parametrize("data", ["batch", "eval_batch"])
def test_f_is_that_of_the_data_asked_for_and_its_best_is_carried_over(data):
    a, b, _, _ = system(0)
    truth, _ = reference.pcg(a, b, iterations=N)
    sign = -1 if data == "batch" else 1
    values = sign * np.sum(truth, axis=1)
    solver = cg.conjugate_gradient(
        max_iterations=N,
        stopping=None,
        keep=iterates.guarded(1, tolerance=1e9, data=data),
        warm_start_from="best",
    )
    result, carried = solve_by(solver, a, b)
    np.testing.assert_allclose(result.iterates.values, values[1:], rtol=1e-8)
    best = 1 + int(np.argmin(values[1:]))
    np.testing.assert_allclose(carried, truth[best], rtol=1e-7)
    if data == "eval_batch":
        solver = cg.conjugate_gradient(
            max_iterations=N,
            stopping=None,
            keep=iterates.best(first=1, growth=1.0001),
            warm_start_from="best",
        )
        np.testing.assert_allclose(solve_by(solver, a, b)[1], truth[best], rtol=1e-7)


@pytest.mark.slow
def test_above_zero_a_run_goes_on_beyond_the_stopping_rule():
    # From a bad start M is above 0 for more iterations than the rule has patience.
    a, b, _, _ = system(0, condition=100.0, n=80)
    b = a @ b
    x0 = 40 * system(1, n=80)[1]
    _, values = reference.pcg(a, b, x0, iterations=60)
    first = int(np.argmax(values < 0))
    assert 12 < first < 60
    stops = [
        j
        for j in range(first, 60)
        if values[j - 10] < 0 and 1 - values[j - 10] / values[j] < 5e-3
    ]
    warm = functools.partial(
        cg.conjugate_gradient,
        max_iterations=60,
        stopping=stopping.martens2010(),
        warm_start_decay=0.95,
    )
    result, _ = solve_by(warm(), a, b, x0)
    assert reason(result.stats) == Reason.STOPPING_RULE
    assert result.stats.num_iterations == stops[0]
    np.testing.assert_allclose(
        result.stats.model_values[: stops[0]], values[: stops[0]], rtol=1e-4, atol=1e-6
    )
    # Where it may not go on for so long, it starts again from 0.
    short = warm(limit=float(first - 1))
    result, _ = solve_by(short, a, b, x0)
    cold, values = reference.pcg(a, b, iterations=first - 1)
    n = int(result.stats.num_iterations)
    assert n <= first - 1
    np.testing.assert_allclose(result.last.direction, cold[n], rtol=1e-4, atol=1e-6)
    assert result.stats.model_values[-1] < 0


@pytest.mark.parametrize("why", ["residual", "guard"])
def test_a_run_that_anything_ends_above_zero_is_run_again_from_zero(why):
    a, b, x0, _ = system(0)
    x0 = 30 * x0
    options = {
        "residual": {"stopping": stopping.residual(1e9)},
        "guard": {
            "stopping": None,
            # −Σx rises in the first of the two, and f of the batch with it.
            "keep": iterates.guarded(1, tolerance=0.0),
        },
    }[why]
    solver = cg.conjugate_gradient(max_iterations=N, **options)
    result, _ = solve_by(solver, a, b, x0)
    warm, values = reference.pcg(a, b, x0, iterations=2)
    if why == "guard":
        if np.sum(warm[2]) < np.sum(warm[1]):
            assert values[2] > 0
        else:
            pytest.fail("this start is not what the test is about")
    assert values[1] > 0
    assert result.stats.model_values[0] == 0
    assert result.stats.model_values[-1] < 0
    n = int(result.stats.num_iterations)
    cold, _ = reference.pcg(a, b, iterations=n)
    np.testing.assert_allclose(result.last.direction, cold[n], rtol=1e-8)


def test_the_preconditioner_is_in_the_program_once_and_applied_once_an_iteration():
    traced, applied = [], []

    def precondition(r):
        traced.append(r)
        jax.debug.callback(applied.append, r[0])
        return r / 2

    diagonal = jnp.array([1.0, 2.0, 3.0, *[4.0] * (N - 3)])

    def run(b, x0):
        return cg.solve(
            lambda v: diagonal * v, b, x0=x0, preconditioner=precondition, stopping=None
        )

    b = jnp.ones(N)
    for x0 in (None, b / 5):
        traced.clear(), applied.clear()
        jax.eval_shape(lambda b, x0=x0: run(b, x0), b)
        assert len(traced) == 1
        result = run(b, x0)
        jax.effects_barrier()
        assert len(applied) == result.num_iterations == 4
