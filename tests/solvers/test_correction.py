"""What an exact step misses as residuals bend: that of a dense iteration in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mapped import PROBLEM, axis_name, needs_devices, run
from problems import build
from reference import assert_close, flat, quick_jit
from test_sample_space import exact_system

import hfjax
from hfjax import damping, sample_space
from hfjax.objectives.objective import weighted_sum
from hfjax.solvers import _exact_steps

SPACES = ("samples", "parameters")
SQUARED_ERROR = hfjax.losses.squared_error()
LAMBDA = 0.1
VALLEY = 1.0  # λ with which f falls in the valley even without corrections.


def update(objective, params, batch, **options):
    """Do one update with a constant λ; return what it adds, and what it tells."""
    corrections = options.pop("corrections", 16)
    momentum, before = options.pop("momentum", None), options.pop("before", None)
    space = options.pop("space", "smaller")
    solver = sample_space.cholesky(
        space=space, momentum=momentum, corrections=corrections
    )
    strength = options.pop("strength", VALLEY)
    options = {"backtracking": None, "line_search": None} | options
    tx = hfjax.hessian_free(
        objective, solver=solver, damping=damping.constant(strength), **options
    )
    state = tx.init(params)
    if before is not None:
        state = state._replace(direction=before)
    steps, state = training.one_update(objective, tx, params, batch, state=state)
    return steps, state.info


def corrections_of(objective, params, batch, solver, strength):
    """Return the step and the correction, as the solver has them."""
    system = exact_system(objective, params, batch, strength)
    last = solver.solve(system, None).last
    return last.direction, last.correction


def rows_of(objective, params, batch):
    """Return θ, θ ↦ r̃(θ) with the S of θ, J̃ and r̃: densely."""
    inputs, targets, *weights = batch
    theta, unravel = ravel_pytree(params)
    count = len(jax.tree.leaves(inputs)[0])
    weights = np.asarray(weights[0] if weights else np.ones(count))
    outputs = objective.model_fn(params, inputs)
    factor = objective.loss.factor(outputs, targets)
    z, like = ravel_pytree(outputs)
    s = np.asarray(jax.vmap(lambda v: ravel_pytree(factor(like(v)))[0])(np.eye(z.size)))
    root = ravel_pytree(
        jax.tree.map(
            lambda leaf: jnp.broadcast_to(
                np.sqrt(weights / weights.sum()).reshape(-1, *[1] * (leaf.ndim - 1)),
                leaf.shape,
            ),
            outputs,
        )
    )[0]
    # Rows of `s` are S eₖ: it is Sᵀ already.
    weighted = np.asarray(root)[:, None] * s
    # The shortest r̃ with S r̃ = ∇L, of each case; of other cases S is 0.
    inverse = np.asarray(root)[:, None] * np.linalg.pinv(s.T)

    def outputs_at(theta):
        return ravel_pytree(objective.model_fn(unravel(theta), inputs))[0]

    def loss(z):
        return jnp.sum(objective.loss.value(like(z), targets))

    def residuals_at(theta):
        return inverse @ np.asarray(jax.grad(loss)(outputs_at(theta)))

    jacobian = np.asarray(jax.jacfwd(lambda theta: weighted @ outputs_at(theta))(theta))
    return theta, residuals_at, jacobian, residuals_at(theta)


def corrected(
    theta,
    residuals_at,
    jacobian,
    residuals,
    most,
    *,
    damping=LAMBDA,
    decay=0.0,
    pull=0.0,
):
    """Iterate as the module says; in parameters, by dense systems."""
    mu = damping + decay
    matrix = jacobian.T @ jacobian + mu * np.eye(len(theta))
    gradient = jacobian.T @ residuals + decay * theta
    step = np.linalg.solve(matrix, damping * pull - gradient)
    correction, change = np.zeros_like(step), np.inf
    missed = np.zeros_like(residuals)
    for _ in range(most + 1):
        trial = -np.linalg.solve(matrix, jacobian.T @ missed)
        left = residuals_at(theta + step + trial)
        now = left - residuals - jacobian @ (step + trial)
        before, change = change, np.linalg.norm(now - missed)
        if change >= before:
            break
        correction, missed = trial, now
        if change <= 0.1 * np.linalg.norm(left):
            break
    return step, correction


PROBLEMS = [
    problem
    for problem in build()
    if problem.name
    in ("mlp_sigmoid", "mlp_softmax", "softmax_soft_targets", "two_heads")
]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_a_step_and_its_correction_are_those_of_a_dense_iteration(problem, space):
    solver = sample_space.cholesky(space=space)
    found = quick_jit(
        lambda params, batch: corrections_of(
            problem.objective(microbatch_size=2), params, batch, solver, LAMBDA
        )
    )(problem.params, problem.batch)
    compare(found, problem)


def compare(found, problem):
    """Compare with the dense iteration, which must have something to correct."""
    dense = rows_of(problem.objective(), problem.params, problem.batch)
    truth = corrected(*dense, 16, decay=problem.weight_decay)
    assert np.linalg.norm(truth[1]) > 1e-3 * np.linalg.norm(truth[0])
    for ours, its in zip(found, truth, strict=True):
        size = np.max(np.abs(its))
        np.testing.assert_allclose(flat(ours), its, rtol=1e-6, atol=1e-9 * size)


def bent():
    """Return a curved valley of two terms and a start in it (Rosenbrock's)."""
    along = hfjax.Objective(lambda p, x: x * (1 - p[None, :1]), SQUARED_ERROR)
    across = hfjax.Objective(
        lambda p, x: 10 * x * (p[None, 1:] - p[None, :1] ** 2), SQUARED_ERROR
    )
    one = (jnp.ones((1, 1)), jnp.zeros((1, 1)))
    return (
        weighted_sum([(1.0, along), (1.0, across)]),
        jnp.array([-1.2, 1.0]),
        (one, one),
    )


def of_valley(theta):
    """Return its residuals, and their Jacobian."""
    a, b = theta
    return np.array([a - 1, 10 * (b - a**2)]), np.array([[1, 0], [-20 * a, 10]])


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_terms_of_a_sum_and_the_last_step_are_part_of_it(momentum):
    f, params, batch = bent()
    before = jnp.array([0.2, -0.3])
    options = {"before": before, "momentum": momentum}
    found, info = update(f, params, batch, **options)
    r, j = of_valley(params)
    signed = np.array([-1, 1])  # The first term is written as 1 − a.
    r, j = signed * r, signed[:, None] * j
    pull = 0.0 if momentum is None else momentum * np.asarray(before)
    step, correction = corrected(
        np.asarray(params),
        lambda theta: signed * of_valley(theta)[0],
        j,
        r,
        16,
        damping=VALLEY,
        pull=pull,
    )
    assert info.accepted
    assert np.linalg.norm(correction) > 0.1 * np.linalg.norm(step)
    np.testing.assert_allclose(found, step + correction, rtol=1e-9)


def test_the_first_correction_of_a_short_step_is_the_geodesic_acceleration(monkeypatch):
    """C = −½ (J̃ᵀJ̃ + λI)⁻¹ J̃ᵀ d²r/dt² along δ, but for third derivatives."""
    monkeypatch.setattr(_exact_steps, "_ENOUGH", 0.0)
    f, params, batch = bent()
    strong = 1e5
    straight, bending = (
        np.asarray(update(f, params, batch, corrections=most, strength=strong)[0])
        for most in (0, 1)
    )
    _, j = of_valley(params)
    second = np.array([0, -20 * straight[0] ** 2])  # Of 10 (b − a²).
    matrix = j.T @ j + strong * np.eye(2)
    acceleration = -0.5 * np.linalg.solve(matrix, j.T @ second)
    np.testing.assert_allclose(bending - straight, acceleration, rtol=1e-4)


@pytest.mark.parametrize("space", SPACES)
def test_of_a_linear_model_there_is_nothing_to_correct(space):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    objective = hfjax.Objective(lambda p, x: x @ p, SQUARED_ERROR)
    straight, bending = (
        update(
            objective, jnp.ones(3), (x, x @ jnp.arange(3.0)), corrections=n, space=space
        )[0]
        for n in (0, 8)
    )
    np.testing.assert_allclose(bending, straight, rtol=1e-12)


@pytest.mark.slow
def test_half_the_step_is_half_of_it_and_a_quarter_of_its_correction():
    f, params, batch = bent()
    straight, whole, half = (
        np.asarray(update(f, params, batch, **options)[0])
        for options in ({"corrections": 0}, {}, {"learning_rate": 0.5})
    )
    np.testing.assert_allclose(half, straight / 2 + (whole - straight) / 4, rtol=1e-9)


@pytest.mark.parametrize("searches", [False, True])
def test_the_model_is_of_the_step_and_f_of_its_corrected_end(searches):
    f, params, batch = bent()
    rule = damping.constant(VALLEY)
    if searches:
        # Both of them find λ itself the best.
        rule = damping.searched(init=VALLEY, max_tries=1)
    solver = sample_space.cholesky()
    tx = hfjax.hessian_free(f, solver=solver, line_search=None, damping=rule)
    found, state = training.one_update(f, tx, params, batch)
    r, j = of_valley(params)
    step = np.linalg.solve(j.T @ j + VALLEY * np.eye(2), -j.T @ r)
    model = 0.5 * np.sum((r + j @ step) ** 2) - 0.5 * np.sum(r**2)
    after = 0.5 * np.sum(of_valley(np.asarray(params + found))[0] ** 2)
    info = state.info
    np.testing.assert_allclose(info.predicted_change, model, rtol=1e-9)
    np.testing.assert_allclose(info.value_after, after, rtol=1e-9)
    fall = after - 0.5 * np.sum(r**2)
    np.testing.assert_allclose(info.reduction_ratio, fall / model, rtol=1e-9)
    np.testing.assert_allclose(info.update_norm, np.linalg.norm(found), rtol=1e-9)
    np.testing.assert_allclose(state.direction, found, rtol=1e-12)


@pytest.mark.parametrize("judged", ["chosen", "last", "taken"])
def test_the_ratio_is_of_the_corrected_path_on_the_curvature_data(judged):
    f, params, batch = bent()
    other = ((jnp.ones((1, 1)), jnp.full((1, 1), 0.3)), batch[1])
    rule = damping.levenberg_marquardt(
        init=VALLEY, ratio=damping.ReductionRatio(step=judged)
    )
    tx = hfjax.hessian_free(
        f,
        learning_rate=0.5,
        damping=rule,
        solver=sample_space.cholesky(),
        line_search=None,
    )
    found, state = training.one_update(f, tx, params, batch, eval_batch=other)
    r, j = of_valley(params)
    step = np.linalg.solve(j.T @ j + VALLEY * np.eye(2), -j.T @ r)
    correction = 4 * (np.asarray(found) - step / 2)
    alpha = 0.5 if judged == "taken" else 1.0
    reached = np.asarray(params) + alpha * step + alpha**2 * correction
    fall = 0.5 * np.sum(of_valley(reached)[0] ** 2) - 0.5 * np.sum(r**2)
    model = 0.5 * np.sum((r + alpha * j @ step) ** 2) - 0.5 * np.sum(r**2)
    assert np.linalg.norm(correction) > 0.1 * np.linalg.norm(step)
    np.testing.assert_allclose(state.info.reduction_ratio, fall / model, rtol=1e-9)


@pytest.mark.slow
def test_a_curved_valley_takes_a_third_of_the_updates():
    f, start, batch = bent()

    def updates(corrections):
        solver = sample_space.cholesky(corrections=corrections)
        tx = hfjax.hessian_free(f, solver=solver)
        step = quick_jit(functools.partial(training.train_step, f, tx))
        params, state = start, tx.init(start)
        for number in range(1, 100):
            params, state = step(params, state, batch)
            if np.allclose(params, 1, atol=1e-6):
                return number
        return None

    assert updates(8) <= updates(0) / 3


@pytest.mark.parametrize(
    "model_fn",
    [
        lambda p, x: x * jnp.sqrt(p)[None],  # Not a number at the step's end.
        lambda p, x: x * jnp.sin(40 * p)[None],  # J changes at once.
    ],
)
def test_what_leads_nowhere_is_no_correction(model_fn):
    objective = hfjax.Objective(model_fn, SQUARED_ERROR)
    batch, params = (jnp.ones((2, 1)), -5 * jnp.ones((2, 1))), jnp.ones(1)
    solver = sample_space.cholesky()
    found = quick_jit(
        lambda params: corrections_of(objective, params, batch, solver, 1e-3)
    )(params)
    r, j = model_fn(params, 1.0)[0] + 5, jax.jacobian(model_fn)(params, 1.0)[0, 0]
    step = -j * r / (j**2 + 1e-3)
    np.testing.assert_allclose(found[0], step, rtol=1e-9)
    np.testing.assert_array_equal(found[1], 0)


WAYS = (
    "jit_with_explicit_shardings",
    "shard_map_check_vma",
    "shard_map",
    "pmap",
    "vmap",
)


@pytest.mark.slow
@needs_devices
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(
    ("way", "loss"),
    [*((way, PROBLEM.loss) for way in WAYS), ("shard_map_check_vma", "squared_error")],
)
def test_devices_change_nothing(way, loss, space):
    solver = sample_space.cholesky(space=space)
    problem = dataclasses.replace(PROBLEM, loss=loss)
    objective = problem.objective(axis_name=axis_name(way))

    def of_device(params, batch, v):
        del v
        return corrections_of(objective, params, batch, solver, LAMBDA)

    compare(run(way, of_device, problem), problem)


@pytest.mark.slow
@needs_devices
def test_parameters_sharded_by_type_change_nothing():
    mesh = jax.make_mesh((4,), ("cases",), axis_types=(AxisType.Explicit,))
    rng = np.random.default_rng(1)
    params = [jnp.asarray(rng.normal(size=shape)) for shape in ((4, 3), (3, 1))]
    batch = tuple(jnp.asarray(rng.normal(size=(8, n))) for n in (4, 1))
    f = hfjax.Objective(lambda p, x: jnp.tanh(x @ p[0]) @ p[1], SQUARED_ERROR)
    solver = sample_space.cholesky(space="samples")

    def solve(params, batch):
        return corrections_of(f, params, batch, solver, LAMBDA)

    here = quick_jit(solve)(params, batch)
    divided = NamedSharding(mesh, PartitionSpec("cases"))
    whole = NamedSharding(mesh, PartitionSpec())
    spread = [jax.device_put(params[0], divided), jax.device_put(params[1], whole)]
    there = quick_jit(solve)(spread, jax.device_put(batch, divided))
    assert np.linalg.norm(flat(here[1])) > 1e-3 * np.linalg.norm(flat(here[0]))
    for one, two in zip(there, here, strict=True):
        assert_close(one, two, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["squared_error", "softmax_cross_entropy"])
def test_outputs_of_fewer_digits_have_the_same_correction_but_for_them(loss):
    rng = np.random.default_rng(2)
    params = [jnp.asarray(rng.normal(size=shape)) for shape in ((3, 4), (4, 3))]
    x = jnp.asarray(rng.normal(size=(5, 3)))
    t = jnp.asarray(rng.dirichlet(np.ones(3), size=5))

    def correction(dtype):
        def model_fn(params, x):
            return (jnp.tanh(x @ params[0]) @ params[1]).astype(dtype)

        f = hfjax.Objective(model_fn, getattr(hfjax.losses, loss)())
        solver = sample_space.cholesky()
        return flat(
            quick_jit(lambda p: corrections_of(f, p, (x, t), solver, LAMBDA)[1])(params)
        )

    exact, rough = correction(jnp.float64), correction(jnp.float32)
    assert np.linalg.norm(rough - exact) < 1e-4 * np.linalg.norm(exact)
