"""A random sketch of G and its inverse, against dense matrices in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import training
from jax.flatten_util import ravel_pytree
from mapped import PROBLEM as SPREAD
from mapped import axis_name, needs_devices, run
from problems import HIDDEN, Problem, mlp, named, normal, soft_targets
from reference import flat, matrix_of, quick_jit

import hfjax
from hfjax import preconditioners
from hfjax.curvature.structural import with_structural_loss
from hfjax.preconditioners import _nystrom

RNG = np.random.default_rng(8)
KEY = jax.random.key(3)
NESTED = named("nested")  # Of every structure, a scalar among its leaves; weights.
SIZE, UNRAVEL = flat(NESTED.params).size, ravel_pytree(NESTED.params)[1]
UNDECAYED = dataclasses.replace(NESTED, weight_decay=0.0)


def built(problem, damping, **options):
    """Return P⁻¹, dense, in the order of `ravel_pytree`."""
    objective_options = options.pop("objective", {})
    rule = preconditioners.nystrom(**options)
    objective = problem.objective(**objective_options)

    @quick_jit
    def matrix(params, batch, damping):
        apply = rule.build(objective, params, batch, damping, KEY)
        return matrix_of(apply, params)

    return np.asarray(matrix(problem.params, problem.batch, damping))


def dense_sketch(matrix, params, rank):
    """Return G's Nyström approximation for the same Ω, by NumPy's pseudo-inverse."""
    columns = _nystrom._random(params, rank, KEY)
    omega = np.asarray(jax.vmap(lambda v: ravel_pytree(v)[0])(columns)).T
    y = matrix @ omega
    return y @ np.linalg.pinv(omega.T @ y, rcond=1e-10, hermitian=True) @ y.T


def dense_inverse(matrix, params, rank, damping):
    """Return equation 1.3 of Frangella, Tropp & Udell, of the dense approximation."""
    values, vectors = np.linalg.eigh(dense_sketch(matrix, params, rank))
    values, u = values[-rank:], vectors[:, -rank:]
    values = np.where(values > 1e-12 * values[-1], values, 0)
    inner = (values[0] + damping) / (values + damping)
    return u * inner @ u.T + np.eye(len(u)) - u @ u.T


@functools.cache
def data_matrix(problem):
    return reference.ggn(dataclasses.replace(problem, weight_decay=0.0))


@pytest.mark.parametrize("rank", [1, 4])
def test_preconditioner_is_the_formula_of_the_dense_approximation(rank):
    ours = built(NESTED, jnp.float64(0.02), rank=rank)
    # Weight decay counts with λ.
    matrix = data_matrix(NESTED)
    assert NESTED.weight_decay > 0
    truth = dense_inverse(matrix, NESTED.params, rank, 0.02 + NESTED.weight_decay)
    np.testing.assert_allclose(ours, truth, atol=1e-9)


@pytest.mark.slow
def test_a_rank_beyond_the_number_of_parameters_inverts_the_damped_matrix():
    damping = 0.05
    ours = built(NESTED, jnp.float64(damping), rank=SIZE + 7)
    ratio = ours @ (reference.ggn(NESTED) + damping * np.eye(SIZE))
    np.testing.assert_allclose(ratio / ratio[0, 0], np.eye(SIZE), atol=1e-8)


@pytest.mark.slow
def test_with_the_rank_of_the_matrix_two_iterations_are_enough():
    cases, n = 6, 40  # G has rank 6.
    objective = hfjax.Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
    params = jnp.zeros(n)
    batch = (normal(RNG, cases, n), normal(RNG, cases))
    x = np.asarray(batch[0])
    b = normal(RNG, n)

    @quick_jit
    def solved(damping):
        rule = preconditioners.nystrom(rank=8)
        product = hfjax.curvature.ggn(objective, params, batch)
        return hfjax.cg.solve(
            lambda v: product(v) + damping * v,
            b,
            preconditioner=rule.build(objective, params, batch, damping, KEY),
            stopping=hfjax.stopping.residual(1e-8),
        )

    for damping in (10.0, 1e-3, 1e-6):
        found = solved(jnp.float64(damping))
        truth = np.linalg.solve(x.T @ x / cases + damping * np.eye(n), b)
        assert int(found.num_iterations) <= 2
        np.testing.assert_allclose(found.x, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_condition_number_is_within_the_bound_of_the_theorem():
    # Twelve large eigenvalues of many sizes, and a slow decay of the rest.
    n, rank, damping = 80, 16, 1e-3
    spectrum = np.concatenate([10.0 ** np.linspace(3, 0, 12), 0.01 / np.arange(1, 69)])
    q, _ = np.linalg.qr(RNG.standard_normal((n, n)))
    x = jnp.asarray(np.sqrt(n * spectrum)[:, None] * q.T)  # XᵀX / n.
    problem = Problem(
        "spectrum", jnp.zeros(n), lambda p, x: x @ p, "squared_error", (x, jnp.zeros(n))
    )
    ours = built(problem, jnp.float64(damping), rank=rank)
    matrix = q * spectrum @ q.T
    approximation = dense_sketch(matrix, problem.params, rank)
    root = np.linalg.cholesky(ours)
    values = np.linalg.eigvalsh(root.T @ (matrix + damping * np.eye(n)) @ root)
    # Their bound for any Ω: (Λᵣ + λ + ‖G − Ĝ‖) / λ.
    least = np.linalg.eigvalsh(approximation)[-rank]
    error = np.linalg.norm(matrix - approximation, 2)
    condition = values[-1] / values[0]
    assert condition <= (least + damping + error) / damping
    assert condition < 30 < 1e5 < spectrum[0] / damping


@pytest.mark.slow
def test_microbatches_change_nothing():
    options = {"microbatch_size": 3}
    ours = built(NESTED, jnp.float64(0.02), rank=4, objective=options)
    damping = 0.02 + NESTED.weight_decay
    truth = dense_inverse(data_matrix(NESTED), NESTED.params, 4, damping)
    np.testing.assert_allclose(ours, truth, atol=1e-9)


@pytest.mark.slow
def test_joined_structural_damping_is_in_the_sketch():
    problem = HIDDEN[0]
    objective = with_structural_loss(problem.objective(), 0.7)
    size = flat(problem.params).size
    rule = preconditioners.nystrom(rank=size)

    @quick_jit
    def matrix(params, batch):
        apply = rule.build(objective, params, batch, jnp.float64(0.1), KEY)
        return matrix_of(apply, params)

    truth = reference.ggn(problem) + 0.7 * reference.structural(problem)
    ours = np.asarray(matrix(problem.params, problem.batch))
    ratio = ours @ (truth + 0.1 * np.eye(size))
    np.testing.assert_allclose(ratio / ratio[0, 0], np.eye(size), atol=1e-7)


@pytest.mark.slow
def test_with_a_damping_tree_the_whole_of_it_is_inverted():
    damping = jnp.exp(jnp.linspace(-6, 2, SIZE))
    ours = built(NESTED, UNRAVEL(damping), rank=SIZE)
    ratio = ours @ (reference.ggn(NESTED) + np.diag(damping))
    np.testing.assert_allclose(ratio / ratio[0, 0], np.eye(SIZE), atol=1e-7)


@pytest.mark.slow
def test_a_damping_tree_with_zeros_leaves_a_positive_matrix():
    for entries in (jnp.arange(SIZE) % 2.0, jnp.zeros(SIZE)):
        ours = built(UNDECAYED, UNRAVEL(entries), rank=3)
        np.testing.assert_allclose(ours, ours.T, atol=1e-6 * np.max(ours))
        assert np.linalg.eigvalsh((ours + ours.T) / 2)[0] > 0


@pytest.mark.slow
@needs_devices
@pytest.mark.parametrize(
    "way", ["shard_map_check_vma", "vmap", "jit_with_explicit_shardings"]
)
def test_however_the_cases_are_spread_the_preconditioner_is_the_same(way):
    objective = SPREAD.objective(axis_name=axis_name(way))
    rule = preconditioners.nystrom(rank=4)

    def precondition(params, batch, v):
        return rule.build(objective, params, batch, jnp.float64(0.02), KEY)(v)

    ours = flat(jax.device_get(run(way, precondition)))
    damping = 0.02 + SPREAD.weight_decay
    inverse = dense_inverse(data_matrix(SPREAD), SPREAD.params, 4, damping)
    truth = inverse @ flat(SPREAD.direction)
    np.testing.assert_allclose(ours, truth, rtol=1e-6, atol=1e-8)


def graded(n, digits, dtype):
    """Return a matrix whose eigenvalues fall from 1e3 by some digits."""
    rng = np.random.default_rng(4)
    q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    values = 10.0 ** (3 - np.linspace(0, digits, n))
    return q * values @ q.T, jnp.asarray(q * values @ q.T, dtype)


def sketched(matvec, like, rank):
    found = _nystrom.approximate(matvec, like, rank, KEY)
    return _nystrom.Sketch(*found, jnp.ones_like(like))


def test_in_float32_it_is_positive_and_finite_whatever_the_damping():
    n, rank = 60, 20
    _, matrix = graded(n, 12, jnp.float32)

    @quick_jit
    def products(damping):
        found = sketched(lambda v: matrix @ v, jnp.zeros(n, jnp.float32), rank)
        r = jnp.concatenate([found.vectors, jnp.eye(n, dtype=jnp.float32)])
        return found, r, jax.vmap(_nystrom.inverse(found, damping))(r)

    for power in range(3, -13, -3):
        found, r, y = products(jnp.float32(10.0**power))
        assert np.all(np.isfinite(y))
        known = int(np.sum(np.asarray(found.values) > 0))
        assert known > 5
        u = np.asarray(found.vectors[:known], np.float64)
        np.testing.assert_allclose(u @ u.T, np.eye(known), atol=3e-5)
        quadratic = np.sum(np.asarray(r, np.float64) * np.asarray(y), axis=1)
        lengths = np.sum(np.square(np.asarray(r, np.float64)), axis=1)
        assert np.all(quadratic[lengths > 0] > 0)
        # What it is worth for its own vectors, down to a millionth.
        rest = max(found.noise, 100 * jnp.finfo(jnp.float32).eps * found.values[0])
        least = (10.0**power + rest) / (10.0**power + np.asarray(found.values))
        assert np.all(quadratic[:known] > 0.9 * least[:known])


def test_in_float32_small_eigenvalues_are_found_beside_large_ones():
    n, rank, damping = 60, 40, 0.1
    truth, matrix = graded(n, 12, jnp.float32)  # From 1e3 to 1e-9.

    @quick_jit
    def dense():
        found = sketched(lambda v: matrix @ v, jnp.zeros(n, jnp.float32), rank)
        apply = _nystrom.inverse(found, jnp.float32(damping))
        return jax.vmap(apply)(jnp.eye(n, dtype=jnp.float32))

    ours = np.asarray(dense(), np.float64)
    ratio = np.linalg.eigvals(ours @ (truth + damping * np.eye(n)))
    assert np.max(ratio.real) / np.min(ratio.real) < 1.5


def test_many_parameters_in_float32_leave_it_positive_to_the_rounding_of_the_matrix():
    # Sums over so many entries are not exact to the last digit; P⁻¹ goes down to it.
    n, rank = 40_000, 12
    v = np.linalg.qr(RNG.standard_normal((n, 10)))[0]
    spectrum = 10.0 ** (3 - np.arange(10.0))
    columns, values = jnp.asarray(v, jnp.float32), jnp.asarray(spectrum, jnp.float32)

    def matvec(x):
        return columns @ (values * (x @ columns))

    @quick_jit
    def products(r):
        found = sketched(matvec, jnp.zeros(n, jnp.float32), rank)
        return found, jax.vmap(_nystrom.inverse(found, jnp.float32(1e-12)))(r)

    r = jnp.asarray(v.T, jnp.float32)
    found, y = products(r)
    known = int(np.sum(np.asarray(found.values) > 0))
    assert known >= 5
    np.testing.assert_allclose(found.values[:4], spectrum[:4], rtol=0.1)
    assert np.all(found.values[:known] < 1.01 * spectrum[:known])
    u = np.asarray(found.vectors, np.float64)[:known]
    np.testing.assert_allclose(u @ u.T, np.eye(known), atol=1e-5)
    quadratic = np.sum(np.asarray(r, np.float64) * np.asarray(y), axis=1)
    least = 100 * jnp.finfo(jnp.float32).eps * spectrum[0] / spectrum[:known]
    assert np.all(quadratic[:known] > 0.9 * least)
    assert quadratic[0] < 1.2 * least[0]


def test_shift_is_taken_off_again(monkeypatch):
    share = 0.01
    monkeypatch.setattr(_nystrom, "_noise", lambda *_: jnp.float64(share))
    diagonal = jnp.array([8.0, 4.0, 2.0, 1e-3, 0.0])
    values, noise = quick_jit(lambda r: sketched(lambda v: diagonal * v, r, 5)[1:3])(
        jnp.zeros(5)
    )
    # In units of a power of two near the largest entry of the products.
    assert 8 * share / 2 <= noise < 32 * share
    np.testing.assert_allclose(values[:3], diagonal[:3], rtol=1e-12)
    np.testing.assert_array_equal(values[3:], 0)


def test_errors_of_the_products_that_are_not_symmetric_count_as_noise():
    # As of a device that multiplies in fewer digits than the parameters have.
    n, rank, damping = 60, 20, 0.1
    truth, matrix = graded(n, 12, jnp.float64)
    errors = 0.01 * RNG.standard_normal((n, n))

    @quick_jit
    def dense():
        found = sketched(lambda v: (matrix + errors) @ v, jnp.zeros(n), rank)
        apply = _nystrom.inverse(found, jnp.float64(damping))
        return found.noise, jax.vmap(apply)(jnp.eye(n))

    noise, ours = dense()
    # Of n columns the norm is 2 σ √n, of a few σ √n.
    assert 0.3 < noise / np.linalg.norm(errors, 2) < 0.8
    root = np.linalg.cholesky(ours)
    values = np.linalg.eigvalsh(root.T @ (truth + damping * np.eye(n)) @ root)
    assert values[-1] / values[0] < 50  # Without any ν more than 100; G's own is 10⁴.


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_of_nothing_or_what_is_not_finite_it_is_the_identity(bad):
    @quick_jit
    def product(r, damping):
        return _nystrom.inverse(sketched(lambda v: bad * v, r, 3), damping)(r)

    r = jnp.arange(5.0)
    for damping in (0.0, 1e-30, 1e30):
        np.testing.assert_array_equal(product(r, jnp.float64(damping)), r)


@pytest.mark.parametrize("power", [-200, -30, 30, 200])
def test_unit_of_the_objective_does_not_matter(power):
    n = 6
    diagonal = jnp.arange(1.0, n + 1)

    @quick_jit
    def product(scale, r):
        found = sketched(lambda v: scale * diagonal * v, r, n)
        return _nystrom.inverse(found, scale)(r)

    ours = product(jnp.float64(10.0**power), jnp.ones(n))
    np.testing.assert_allclose(ours / ours[0], 2 / (1 + diagonal), rtol=1e-9)


def test_without_any_damping_it_is_positive():
    # Singular G, λ = 0: the rest has the noise of G for its curvature.
    diagonal = jnp.array([4.0, 1.0, 0.0, 0.0, 0.0])

    @quick_jit
    def product(r):
        found = sketched(lambda v: diagonal * v, r, 3)
        return jax.vmap(_nystrom.inverse(found, jnp.zeros(())))(jnp.eye(5))

    ours = np.diag(product(jnp.zeros(5)))
    assert np.all(ours > 0)
    np.testing.assert_allclose(ours[0] * 4, ours[1], rtol=0.1)
    np.testing.assert_allclose(ours[2:], 1)


def test_bfloat16_parameters_get_what_their_digits_allow():
    x = np.ones((8, 6)) * 10 + RNG.standard_normal((8, 6))
    problem = Problem(
        "coarse",
        jnp.zeros(6, jnp.bfloat16),
        lambda p, x: x @ p,
        "squared_error",
        (jnp.asarray(x, jnp.bfloat16), jnp.zeros(8, jnp.bfloat16)),
    )
    rule = preconditioners.nystrom(rank=3)

    @quick_jit
    def dense(r):
        apply = rule.build(
            problem.objective(), problem.params, problem.batch, jnp.float32(1.0), KEY
        )
        assert apply(problem.params).dtype == jnp.bfloat16
        return jax.vmap(apply)(r)

    ours = np.asarray(dense(jnp.eye(6, dtype=jnp.float32)), np.float64)
    matrix = x.T @ x / 8 + np.eye(6)
    condition = np.linalg.cond(ours @ matrix)
    assert condition < 20 < np.linalg.cond(matrix) / 10


def classifier(dtype=jnp.float32):
    rng = np.random.default_rng(6)
    params = [(normal(rng, 4, 5), jnp.zeros(5)), (normal(rng, 5, 3), jnp.zeros(3))]
    batch = (normal(rng, 30, 4), soft_targets(rng, 30, 3))
    params, batch = jax.tree.map(lambda x: x.astype(dtype), (params, batch))
    return Problem("classifier", params, mlp, "softmax_cross_entropy", batch, 1e-4)


@functools.cache
def trainer(interval):
    problem, traces = classifier(), []

    def model_fn(params, x):
        traces.append(1)
        return mlp(params, x)

    objective = hfjax.Objective(
        model_fn, hfjax.losses.softmax_cross_entropy(), weight_decay=1e-4
    )
    rule = preconditioners.nystrom(rank=10, interval=interval)
    tx = hfjax.hessian_free(objective, preconditioner=rule)
    step = quick_jit(functools.partial(training.train_step, objective, tx))
    return problem, tx, step, traces


@pytest.mark.slow
@pytest.mark.parametrize("interval", [1, 2])
def test_updates_with_it_lower_f_and_are_compiled_once(interval):
    problem, tx, step, traces = trainer(interval)
    params, state = problem.params, tx.init(problem.params)
    types = jax.tree.map(jax.typeof, state)
    values, sketches, traced = [], [], []
    for _ in range(4):
        params, state = step(params, state, problem.batch)
        values.append(float(state.info.value_before))
        sketches.append(state.preconditioner)
        traced.append(len(traces))
    assert traced[0] == traced[-1]
    assert jax.tree.map(jax.typeof, state) == types
    assert np.all(np.diff(values) < 0)
    if interval == 1:
        assert sketches[0] is None
        return
    first, second, third, fourth = (np.asarray(s["nystrom"][0][0][0]) for s in sketches)
    assert np.any(first)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(third, fourth)
    assert np.any(second != third)


@pytest.mark.slow
@pytest.mark.parametrize("interval", [1, 2])
def test_a_batch_that_is_not_finite_is_refused_and_forgotten(interval):
    problem, tx, step, _ = trainer(interval)
    params, state = problem.params, tx.init(problem.params)
    broken = (problem.batch[0].at[3, 1].set(jnp.nan), problem.batch[1])
    after, state = step(params, state, broken)
    jax.tree.map(np.testing.assert_array_equal, after, params)
    assert not bool(state.info.accepted)
    arrays = jax.tree.leaves(state)
    assert all(np.all(np.isfinite(np.asarray(x, np.float64))) for x in arrays)
    for _ in range(2):
        after, state = step(after, state, problem.batch)
    assert bool(state.info.accepted)


@pytest.mark.slow
def test_a_kept_sketch_is_inverted_with_the_damping_of_the_update():
    rule = preconditioners.nystrom(rank=SIZE, interval=5)
    objective, shape = UNDECAYED.objective(), jnp.linspace(0.5, 2, SIZE)

    @quick_jit
    def dense(damping, memory, count):
        given = (objective, NESTED.params, NESTED.batch, UNRAVEL(damping), KEY)
        apply, memory = rule.build(*given, memory, count)
        return matrix_of(apply, NESTED.params), memory

    _, memory = dense(3.0 * shape, rule.init(NESTED.params), jnp.int32(0))
    ours, _ = dense(0.1 * shape, memory, jnp.int32(1))
    ratio = np.asarray(ours) @ (reference.ggn(UNDECAYED) + 0.1 * np.diag(shape))
    np.testing.assert_allclose(ratio / ratio[0, 0], np.eye(SIZE), atol=1e-7)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "`rank` must be at least 1"),
        ({"rank": 2.5}, TypeError, "`rank` must be a Python integer"),
        ({"interval": 0}, ValueError, "`interval`"),
        ({"data": "all"}, ValueError, "`data`"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        preconditioners.nystrom(**options)
