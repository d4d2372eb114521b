"""Damping matrices: whole updates against a dense solve of (B + λD + μS) δ = −∇f."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import training
from jax.flatten_util import ravel_pytree
from problems import HIDDEN, normal
from reference import flat, quick_jit

import hfjax
from hfjax import damping_matrices, diagonals
from hfjax.globalization.damping import ReductionRatio, constant, levenberg_marquardt
from hfjax.preconditioners import diagonal as preconditioner

SQUARED = hfjax.losses.squared_error()
PROBLEM = HIDDEN[0]
"""A recurrent network of tanh units, with uneven weights and weight decay."""
THETA, UNRAVEL = ravel_pytree(PROBLEM.params)
SCALE = UNRAVEL(jnp.linspace(0.5, 2.0, THETA.size))
ROOT = np.random.default_rng(5).standard_normal((THETA.size, 4))


def plain(objective, damping, **options):
    """Return an optimizer that solves its system, and takes the solution as it is."""
    solver = hfjax.cg.conjugate_gradient(
        stopping=None, warm_start_decay=None, max_iterations=120
    )
    defaults = {
        "solver": solver,
        "preconditioner": None,
        "backtracking": None,
        "line_search": None,
    }
    return hfjax.hessian_free(objective, damping=damping, **(defaults | options))


def one_update(tx, params, batch, grads, count=0):
    state = tx.init(params)._replace(count=jnp.int32(count))
    return quick_jit(tx.update)(grads, state, params, batch=batch)


def low_rank(objective, params, batch):
    """Return D = I + R Rᵀ, and its diagonal."""
    del objective, batch
    unravel = ravel_pytree(params)[1]

    def matvec(v):
        x, _ = ravel_pytree(v)
        return unravel(x + ROOT @ (ROOT.T @ x))

    return matvec, unravel(1 + jnp.sum(ROOT**2, axis=1))


def phi(params):
    """A reparameterisation that mixes parameters and has more entries than them."""
    return {
        "exp": jnp.exp(params["in"]),
        "tied": params["recurrent"] @ params["out"],
        "rest": (params["recurrent"], 2.0 * params["out"]),
    }


def jacobian_of_phi():
    columns = jax.jacfwd(lambda x: ravel_pytree(phi(UNRAVEL(x)))[0])
    return np.asarray(quick_jit(columns)(THETA))


IDENTITY = np.eye(THETA.size)
B, S = reference.ggn(PROBLEM), reference.structural(PROBLEM)
FISHER = np.diag(reference.empirical_fisher(PROBLEM))
MATRICES = {
    "identity": ("identity", lambda mu: IDENTITY),
    "curvature_diagonal": ("curvature_diagonal", lambda mu: np.diag(np.diag(B))),
    "curvature": ("curvature", lambda mu: B + mu * S),
    "interpolated": (
        damping_matrices.diagonal(
            diagonals.empirical_fisher, exponent=0.5, kappa=0.1, scale=SCALE
        ),
        lambda mu: np.sqrt(FISHER + 0.1 * np.diag(flat(SCALE))),
    ),
    "reparameterization": (
        damping_matrices.reparameterization(phi),
        lambda mu: jacobian_of_phi().T @ jacobian_of_phi(),
    ),
    "custom": (low_rank, lambda mu: IDENTITY + ROOT @ ROOT.T),
}
SYSTEMS = [
    ("identity", 0.7, False, preconditioner(), ReductionRatio()),
    ("curvature_diagonal", None, True, None, ReductionRatio()),
    (
        "curvature_diagonal",
        0.7,
        True,
        preconditioner(diagonals.ggn_exact),
        ReductionRatio(model="damped"),
    ),
    ("curvature", 0.7, False, preconditioner(), ReductionRatio(expected=0.25)),
    ("interpolated", 0.7, True, None, ReductionRatio(step="last")),
    (
        "reparameterization",
        None,
        True,
        preconditioner(diagonals.ggn_rademacher),
        ReductionRatio(model="damped", step="taken", expected=0.5),
    ),
    ("custom", 0.7, True, preconditioner(), ReductionRatio(step="taken")),
]


def value_at(step):
    return reference.value(dataclasses.replace(PROBLEM, params=UNRAVEL(THETA + step)))


@pytest.mark.parametrize(("name", "structural", "tied", "p", "ratio"), SYSTEMS)
def test_an_update_is_the_dense_step_and_its_ratio_that_of_the_dense_model(
    name, structural, tied, p, ratio
):
    matrix, dense = MATRICES[name]
    lam, rate = 0.4, 0.5
    rule = levenberg_marquardt(
        lam, matrix=matrix, structural=structural, tied=tied, ratio=ratio
    )
    gradient = reference.gradient(PROBLEM)
    tx = plain(PROBLEM.objective(), rule, preconditioner=p, learning_rate=rate)
    updates, state = one_update(tx, PROBLEM.params, PROBLEM.batch, UNRAVEL(gradient))

    mu = 0.0 if structural is None else structural * (lam if tied else 1)
    damped = B + lam * dense(mu) + mu * S
    step = -np.linalg.solve(damped, gradient)
    assert state.info.accepted
    np.testing.assert_allclose(flat(updates), rate * step, rtol=1e-7, atol=1e-9)

    judged = (rate if ratio.step == "taken" else 1.0) * step
    curved = damped if ratio.model == "damped" else B
    model = gradient @ judged + 0.5 * judged @ curved @ judged
    np.testing.assert_allclose(state.info.predicted_change, model, rtol=1e-7)
    change = value_at(judged) - reference.value(PROBLEM)
    rho = change / model / ratio.expected
    np.testing.assert_allclose(state.info.reduction_ratio, rho, rtol=1e-6)
    factor = 2 / 3 if rho > 0.75 else 1.5 if rho < 0.25 else 1.0
    np.testing.assert_allclose(state.damping, lam * factor, rtol=1e-12)


@pytest.mark.slow
def test_schedules_of_damping_structure_and_weight_decay_are_read_at_the_count():
    def schedule(start):
        return lambda count: start / (1.0 + count)

    objective = PROBLEM.objective(weight_decay=schedule(0.4))
    rule = constant(
        schedule(2.0), matrix="curvature_diagonal", structural=schedule(3.0)
    )
    later = dataclasses.replace(PROBLEM, weight_decay=0.1)
    gradient, curved = reference.gradient(later), reference.ggn(later)
    updates, state = one_update(
        plain(objective, rule), PROBLEM.params, PROBLEM.batch, UNRAVEL(gradient), 3
    )
    lam, mu = 0.5, 0.75 * 0.5  # Tied.
    damped = curved + lam * np.diag(np.diag(curved)) + mu * S
    step = -np.linalg.solve(damped, gradient)
    np.testing.assert_allclose(flat(updates), step, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(
        state.info.value_before, reference.value(later), rtol=1e-12
    )


def elementwise(params, inputs):
    """A network of parameters c · p, whose outputs are multiplied by a."""
    (c,), (a,) = inputs["c"][:1], inputs["a"][:1]
    w = (c * params).reshape(3, 2)
    return a * jnp.tanh(inputs["x"] @ w)


def elementwise_batch(c, a):
    rng = np.random.default_rng(2)
    x, t = normal(rng, 6, 3), normal(rng, 6, 2)
    ones = jnp.ones((6, 1))
    return {"x": x, "c": ones * jnp.asarray(c)[None], "a": a * ones[:, 0]}, a * t


@pytest.mark.slow
def test_the_step_damped_by_the_diagonal_knows_no_scale_of_parameters_or_of_f():
    objective = hfjax.Objective(elementwise, SQUARED)
    p = normal(np.random.default_rng(3), 6)
    tx = plain(objective, constant(0.3, matrix="curvature_diagonal"))

    @quick_jit
    def step(p, batch):
        _, grads = objective.value_and_grad(p, batch)
        return tx.update(grads, tx.init(p), p, batch=batch)[0]

    before = step(p, elementwise_batch(np.ones(6), 1.0))
    c = np.array([0.1, 3.0, 1.0, 20.0, 0.5, 7.0])
    scaled = step(p / c, elementwise_batch(c, 1.0))
    np.testing.assert_allclose(c * scaled, before, rtol=1e-8)
    # Outputs and targets times 9 make 81 f.
    np.testing.assert_allclose(
        step(p, elementwise_batch(np.ones(6), 9.0)), before, rtol=1e-8
    )
    # And it is no multiple of the step without damping.
    inputs, targets = elementwise_batch(np.ones(6), 1.0)
    j = np.asarray(jax.jacfwd(elementwise)(p, inputs)).reshape(12, 6)
    gradient = j.T @ (np.tanh(inputs["x"] @ p.reshape(3, 2)) - targets).ravel()
    g = j.T @ j
    truth = -np.linalg.solve(g + 0.3 * np.diag(np.diag(g)), gradient)
    np.testing.assert_allclose(before, truth, rtol=1e-8)


def network(w, x):
    return jnp.tanh(x @ w.reshape(3, 2))


def step_of(model_fn, params, matrix, lam):
    """Return the whole update, λ traced, and the gradient."""
    rng = np.random.default_rng(8)
    batch = (normal(rng, 7, 3), normal(rng, 7, 2))
    objective = hfjax.Objective(model_fn, SQUARED)

    @quick_jit
    def step(params, lam):
        _, grads = objective.value_and_grad(params, batch)
        tx = plain(objective, constant(lam, matrix=matrix))
        return tx.update(grads, tx.init(params), params, batch=batch)[0], grads

    return step(params, lam)


@pytest.mark.parametrize("lam", [0.1, 10.0])
def test_the_preconditioner_is_told_the_diagonal_of_lambda_d(lam):
    # With P = 1 + diag(λD) one iteration leads along P⁻¹b: λ multiplies D.
    d = np.asarray(ravel_pytree(SCALE)[0])
    rule = hfjax.damping.constant(
        lam, matrix=hfjax.damping_matrices.custom(lambda *_: (lambda v: v, SCALE))
    )
    p = hfjax.preconditioners.custom(
        lambda objective, params, batch, damping: (
            lambda r: jax.tree.map(lambda r, t: r / (1 + t), r, damping)
        )
    )
    gradient = reference.gradient(PROBLEM)
    solver = hfjax.cg.conjugate_gradient(stopping=None, max_iterations=1)
    tx = plain(PROBLEM.objective(), rule, preconditioner=p, solver=solver)
    updates, _ = one_update(tx, PROBLEM.params, PROBLEM.batch, UNRAVEL(gradient))
    along = -gradient / (1 + lam * d)
    step = flat(updates)
    np.testing.assert_allclose(
        step / np.linalg.norm(step), along / np.linalg.norm(along), rtol=1e-7, atol=1e-9
    )


@pytest.mark.slow
def test_damping_by_the_curvature_shortens_every_step_by_one_plus_lambda():
    w = normal(np.random.default_rng(9), 6)
    whole, _ = step_of(network, w, "curvature", 0.0)
    for lam in (0.25, 3.0):
        shorter, _ = step_of(network, w, "curvature", lam)
        np.testing.assert_allclose(shorter, whole / (1 + lam), rtol=1e-8)


def test_damping_the_original_parameters_gives_their_step_through_the_inverse_of_c():
    # w = φ(θ) = M exp(θ): C = M diag(exp(θ)).
    rng = np.random.default_rng(10)
    mixing = np.eye(6) + 0.3 * rng.standard_normal((6, 6))
    theta = 0.5 * normal(rng, 6)

    def original(theta):
        return mixing @ jnp.exp(theta)

    matrix = damping_matrices.reparameterization(original)
    step, _ = step_of(lambda theta, x: network(original(theta), x), theta, matrix, 0.2)
    tikhonov, _ = step_of(network, original(theta), "identity", 0.2)
    c = mixing * np.exp(theta)[None]
    np.testing.assert_allclose(step, np.linalg.solve(c, tikhonov), rtol=1e-7)


def test_the_tikhonov_step_tends_to_the_gradient_over_lambda():
    w = normal(np.random.default_rng(9), 6)
    errors = []
    for lam in (1e4, 1e6):
        step, gradient = step_of(network, w, "identity", lam)
        errors.append(np.max(np.abs(lam * step / -gradient - 1)))
    assert errors[0] < 1e-2
    np.testing.assert_allclose(errors[1], 1e-2 * errors[0], rtol=1e-2)


def separable(params, x):
    """Outputs and hidden units that each know one parameter: B and S are diagonal."""
    return x * params, jnp.sin(x * params)


def cubes(objective, params, batch):
    del objective, params, batch
    d = jnp.arange(1.0, 6.0) ** 3
    return lambda v: d * v, d


EXACT, RANDOM = diagonals.ggn_exact, diagonals.ggn_rademacher


@pytest.mark.parametrize(
    ("matrix", "structural", "estimate"),
    [
        ("identity", 2.0, EXACT),
        ("curvature_diagonal", None, RANDOM),
        (cubes, 2.0, EXACT),
        (damping_matrices.reparameterization(jnp.exp), None, RANDOM),
        ("curvature", 2.0, EXACT),
    ],
)
def test_the_exact_diagonal_of_a_diagonal_system_leaves_one_iteration(
    matrix, structural, estimate
):
    rng = np.random.default_rng(12)
    batch = (normal(rng, 6, 5) * jnp.arange(1.0, 6.0)[None], normal(rng, 6, 5))
    params = normal(rng, 5)
    objective = hfjax.Objective(
        lambda p, x: separable(p[None], x), SQUARED, hidden_loss=SQUARED
    )
    solver = hfjax.cg.conjugate_gradient(
        stopping=hfjax.stopping.residual(1e-9), warm_start_decay=None
    )
    tx = plain(
        objective,
        constant(5.0, matrix=matrix, structural=structural, tied=False),
        solver=solver,
        preconditioner=preconditioner(estimate, exponent=1.0),
    )
    _, state = training.one_update(objective, tx, params, batch)
    assert state.info.cg_iterations == 1


def test_many_outputs_take_the_random_diagonal_which_is_new_in_each_update():
    rng = np.random.default_rng(13)
    x, w = normal(rng, 5, 2), normal(rng, 2, 17)
    objective = hfjax.Objective(lambda w, x: jnp.tanh(x @ w) @ MIX, SQUARED)
    build = damping_matrices.diagonal().build
    batch = (x, jnp.zeros((5, 17)))

    @quick_jit
    def diagonal(key):
        return build(objective, w, batch, None, key).diagonal

    keys = [jax.random.key(seed) for seed in (0, 0, 1)]
    first, again, other = (np.asarray(diagonal(key)) for key in keys)
    np.testing.assert_array_equal(first, again)
    assert np.max(np.abs(first - other)) > 1e-3


MIX = jnp.asarray(np.random.default_rng(14).standard_normal((17, 17)))


def test_sixteen_outputs_take_the_exact_diagonal():
    rng = np.random.default_rng(15)
    x, w = normal(rng, 5, 2), normal(rng, 2, 16)
    objective = hfjax.Objective(lambda w, x: (x @ w) @ MIX[:16, :16], SQUARED)
    build = damping_matrices.diagonal().build
    batch = (x, jnp.zeros((5, 16)))
    matrix = quick_jit(lambda key: build(objective, w, batch, None, key).diagonal)(
        jax.random.key(0)
    )
    # z = x W M: the entry (i, j) of W moves the outputs by xᵢ M_j.
    truth = np.mean(x**2, axis=0)[:, None] * np.sum(MIX[:16, :16] ** 2, axis=1)[None]
    np.testing.assert_allclose(matrix, truth, rtol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", MATRICES)
def test_products_with_d_keep_the_dtype_of_the_vector(name, dtype):
    matrix = constant(1.0, matrix=MATRICES[name][0]).matrix
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PROBLEM.params)
    objective, batch = PROBLEM.objective(), PROBLEM.batch

    def product(params, v, key):
        built = matrix.build(objective, params, batch, lambda v: v, key)
        return built.matvec(v)

    v = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    if name != "custom":  # The caller's own.
        shapes = jax.eval_shape(product, params, v, jax.random.key(0))
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {v["in"].dtype}


def test_the_diagonal_of_a_matrix_may_be_a_python_number():
    updates, _ = updated(lambda objective, params, batch: (lambda v: v, 1.0))
    assert np.all(np.isfinite(updates))


def linear(w, x):
    return x @ w


BATCH = (jnp.ones((4, 3)), jnp.ones((4, 2)))


def updated(matrix):
    objective, w = hfjax.Objective(linear, SQUARED), jnp.ones((3, 2))
    tx = plain(objective, constant(1.0, matrix=matrix))
    return tx.update(w, tx.init(w), w, batch=BATCH)


def test_bad_options_are_named():
    names = "'identity', 'curvature_diagonal', 'curvature', got"
    with pytest.raises(ValueError, match=f"`matrix` must be one of {names}"):
        constant(1.0, matrix="diagonal")
    kinds = "a name, a `DampingMatrix` or a callable"
    with pytest.raises(TypeError, match=f"`matrix` must be {kinds}.*got int"):
        levenberg_marquardt(matrix=3)
    built = r"must be built as \(matvec, diagonal\), got function"
    with pytest.raises(TypeError, match=built):
        updated(lambda objective, params, batch: lambda v: v)
    bounds = r"at least 0\.0 and at most 1\.0"
    with pytest.raises(ValueError, match=f"`exponent` must be {bounds}"):
        damping_matrices.diagonal(exponent=1.5)
    with pytest.raises(ValueError, match="`kappa` must be at least 0"):
        damping_matrices.diagonal(kappa=-1.0)
    with pytest.raises(TypeError, match=r"`matrix` must be .*got NoneType"):
        damping_matrices.custom(None)
    with pytest.raises(ValueError, match="`structural` must be at least 0"):
        constant(1.0, structural=-0.1)
    with pytest.raises(ValueError, match="`structural` must be"):
        levenberg_marquardt(structural=float("nan"))
    with pytest.raises(ValueError, match=r"`ratio\.expected` must be above 0"):
        levenberg_marquardt(ratio=ReductionRatio(expected=0.0))


def test_a_matrix_draws_by_another_key_than_the_preconditioner():
    keys = {}

    def noted(name, key):
        note = functools.partial(keys.__setitem__, name)
        jax.debug.callback(note, jax.random.key_data(key))

    def matrix(objective, params, batch, curvature, key):
        noted("matrix", key)
        return damping_matrices.identity().build(
            objective, params, batch, curvature, key
        )

    def preconditioner(objective, params, batch, damping, key):
        noted("preconditioner", key)
        return lambda r: r

    tx = plain(
        PROBLEM.objective(),
        constant(1.0, matrix=damping_matrices.DampingMatrix(matrix)),
        preconditioner=hfjax.preconditioners.custom(preconditioner),
    )
    one_update(tx, PROBLEM.params, PROBLEM.batch, PROBLEM.params)
    jax.effects_barrier()
    assert np.any(keys["matrix"] != keys["preconditioner"])


def test_a_parameter_without_curvature_is_not_damped_by_the_diagonal():
    objective = hfjax.Objective(lambda w, x: x @ w, hfjax.losses.squared_error())
    batch = (jnp.asarray([[1.0, 0.0], [2.0, 0.0]]), jnp.zeros((2, 1)))
    build = hfjax.damping_matrices.diagonal().build
    w = jnp.zeros((2, 1))
    matvec, diagonal = build(objective, w, batch, None, jax.random.key(0))
    np.testing.assert_array_equal(diagonal[:, 0], [2.5, 0.0])
    np.testing.assert_array_equal(matvec(jnp.ones((2, 1)))[:, 0], [2.5, 0.0])
