"""The update: algorithm 3 against dense truth, acceptance, rejection, recovery."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import training
from jax.flatten_util import ravel_pytree
from reference import assert_close, flat, quick_jit

import hfjax
from hfjax import Rejection
from hfjax.globalization.backtracking import Chosen
from hfjax.solvers.cg import Step

SIZES = (3, 4, 2)


def make_params(dtype=jnp.float64, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(SIZES) - 1)
    return [
        {"w": jax.random.normal(key, shape, dtype), "b": jnp.full(shape[1], 0.1, dtype)}
        for key, shape in zip(keys, itertools.pairwise(SIZES), strict=True)
    ]


def model_fn(params, x):
    first, second = params
    hidden = jnp.tanh(x @ first["w"] + first["b"][None])
    return hidden @ second["w"] + second["b"][None]


def make_batch(cases=12, dtype=jnp.float64, seed=1):
    key_x, key_t = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(key_x, (cases, SIZES[0]), dtype)
    t = jax.random.uniform(key_t, (cases, SIZES[-1]), dtype)
    return x, t


OBJECTIVE = hfjax.Objective(
    model_fn, hfjax.losses.sigmoid_cross_entropy(), weight_decay=1e-3
)


def dense_step(params, batch, damping, weight_decay=1e-3):
    """−(G + λI)⁻¹ g, from Jacobians and the closed form of L″."""
    theta, unravel = ravel_pytree(params)
    x, t = batch

    def outputs(theta):
        return model_fn(unravel(theta), x)

    z = np.asarray(outputs(theta))
    jacobian = np.asarray(jax.jacfwd(outputs)(theta))
    p = 1 / (1 + np.exp(-z))
    cases = len(z)
    gradient = np.einsum("cop,co->p", jacobian, p - np.asarray(t)) / cases
    gradient += weight_decay * np.asarray(theta)
    ggn = np.einsum("cop,co,coq->pq", jacobian, p * (1 - p), jacobian) / cases
    ggn += (weight_decay + damping) * np.eye(len(theta))
    return -np.linalg.solve(ggn, gradient), gradient, ggn


def plain(**options):
    """Without anything that would alter the exact solution of the damped system."""
    defaults = {
        "damping": hfjax.damping.constant(0.5),
        "solver": hfjax.cg.conjugate_gradient(stopping=None, warm_start_decay=None),
        "backtracking": None,
        "line_search": None,
    }
    return hfjax.hessian_free(OBJECTIVE, **(defaults | options))


# Compiling an update takes seconds: tests share these where they can.
DEFAULT = hfjax.hessian_free(OBJECTIVE)
BY_RATIO = hfjax.hessian_free(
    OBJECTIVE, damping=hfjax.damping.levenberg_marquardt(), preconditioner=None
)
jitted = functools.cache(lambda tx: quick_jit(tx.update))
gradient_of = quick_jit(
    lambda params, batch: OBJECTIVE.value_and_grad(params, batch)[1]
)


def one_update(tx, params, batch, grads=None, **extra):
    grads = gradient_of(params, batch) if grads is None else grads
    return jitted(tx)(grads, tx.init(params), params, batch=batch, **extra)


def is_zero(updates):
    return all(not np.any(leaf) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("preconditioner", [None, hfjax.preconditioners.diagonal()])
def test_one_update_is_the_dense_damped_gauss_newton_step(preconditioner):
    params, batch = make_params(), make_batch()
    tx = plain(preconditioner=preconditioner)
    updates, state = one_update(tx, params, batch)
    expected, gradient, ggn = dense_step(params, batch, 0.5)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-8, atol=1e-10)
    assert state.info.accepted
    undamped = ggn - 0.5 * np.eye(len(gradient))
    model = gradient @ expected + 0.5 * expected @ undamped @ expected
    before = OBJECTIVE.value(params, batch)
    after = OBJECTIVE.value(optax.apply_updates(params, updates), batch)
    np.testing.assert_allclose(state.info.predicted_change, model, rtol=1e-8)
    np.testing.assert_allclose(state.info.reduction_ratio, (after - before) / model)
    np.testing.assert_allclose(state.info.value_before, before, rtol=1e-12)
    np.testing.assert_allclose(state.info.value_after, after, rtol=1e-12)
    np.testing.assert_allclose(state.info.gradient_norm, np.linalg.norm(gradient))
    np.testing.assert_allclose(state.info.update_norm, np.linalg.norm(expected))


@pytest.mark.slow
def test_exact_preconditioner_reaches_conjugate_gradients_and_saves_all_but_one():
    params, batch = make_params(), make_batch()
    _, _, damped = dense_step(params, batch, 0.5)
    unravel = ravel_pytree(params)[1]

    def build(objective, params, batch, damping):
        return lambda r: unravel(jnp.linalg.solve(damped, ravel_pytree(r)[0]))

    rule = hfjax.preconditioners.custom(build)
    stopping = hfjax.stopping.residual(1e-8)
    solver = hfjax.cg.conjugate_gradient(stopping=stopping, warm_start_decay=None)
    _, state = one_update(plain(preconditioner=rule, solver=solver), params, batch)
    assert state.info.cg_iterations == 1
    _, state = one_update(plain(preconditioner=None, solver=solver), params, batch)
    assert state.info.cg_iterations > 5


@pytest.mark.parametrize("data", ["batch", "eval_batch"])
def test_preconditioner_is_built_on_the_data_asked_for(data):
    params, batch, larger = make_params(), make_batch(), make_batch(40, seed=5)
    cases = []

    def build(objective, params, batch, damping, key):
        cases.append(len(batch[0]))
        return lambda r: r

    rule = hfjax.preconditioners.PreconditionerRule(build, data=data)
    tx = plain(preconditioner=rule)
    grads = gradient_of(params, batch)
    jax.eval_shape(
        functools.partial(tx.update, batch=batch, eval_batch=larger),
        grads,
        tx.init(params),
        params,
    )
    assert cases == [12 if data == "batch" else 40]


@pytest.mark.slow
def test_gradient_of_a_larger_batch_is_what_the_step_descends():
    params, batch, larger = make_params(), make_batch(), make_batch(40, seed=5)
    grads = gradient_of(params, larger)
    updates, _ = one_update(plain(), params, batch, grads=grads, eval_batch=larger)
    _, _, ggn = dense_step(params, batch, 0.5)
    _, gradient, _ = dense_step(params, larger, 0.5)
    expected = -np.linalg.solve(ggn, gradient)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("data", ["batch", "eval_batch"])
@pytest.mark.parametrize("step", ["chosen", "last", "taken"])
@pytest.mark.parametrize("model", ["undamped", "damped"])
def test_reduction_ratio_is_of_the_step_and_model_asked_for(step, model, data):
    # The last iterate is the fourth, the second is chosen, 0.3 of it taken.
    params, batch, larger = make_params(), make_batch(), make_batch(40, seed=5)

    def second(run, evaluate, before):
        direction = jax.tree.map(lambda leaf: leaf[1], run.iterates.iterates)
        there = Step(direction, run.stats.model_values[2], jnp.int32(2))
        return Chosen(there, evaluate(direction), evaluate(run.last.direction))

    ratio = hfjax.damping.ReductionRatio(model, step, data)
    tx = plain(
        learning_rate=0.3,
        damping=hfjax.damping.levenberg_marquardt(init=0.5, ratio=ratio),
        preconditioner=None,
        solver=hfjax.cg.conjugate_gradient(
            max_iterations=4, stopping=None, keep=hfjax.iterates.every(1)
        ),
        backtracking=hfjax.backtracking.Backtracking(second),
    )
    updates, state = one_update(tx, params, batch, eval_batch=larger)
    _, gradient, damped = dense_step(params, batch, 0.5)
    iterates, _ = reference.pcg(damped, -gradient, iterations=4)
    np.testing.assert_allclose(flat(updates), 0.3 * iterates[2], rtol=1e-8, atol=1e-10)
    judged = {"chosen": iterates[2], "last": iterates[4], "taken": 0.3 * iterates[2]}
    judged = judged[step]
    curved = damped if model == "damped" else damped - 0.5 * np.eye(len(damped))
    predicted = gradient @ judged + 0.5 * judged @ curved @ judged
    np.testing.assert_allclose(state.info.predicted_change, predicted, rtol=1e-7)
    cases = batch if data == "batch" else larger
    after = jax.tree.map(jnp.add, params, ravel_pytree(params)[1](judged))
    change = OBJECTIVE.value(after, cases) - OBJECTIVE.value(params, cases)
    ours = state.info.reduction_ratio
    np.testing.assert_allclose(ours, change / predicted, rtol=1e-6)


@pytest.mark.slow
def test_iterate_and_step_size_are_chosen_on_the_evaluation_batch():
    params, batch = make_params(), make_batch()
    x, t = batch
    contrary = (x, 1 - t)  # Whatever is learnt from `batch` is wrong here.
    _, state = one_update(DEFAULT, params, batch)
    assert state.info.accepted
    updates, state = one_update(DEFAULT, params, batch, eval_batch=contrary)
    np.testing.assert_allclose(
        state.info.value_before, OBJECTIVE.value(params, contrary)
    )
    after = OBJECTIVE.value(optax.apply_updates(params, updates), contrary)
    np.testing.assert_allclose(state.info.value_after, after)
    assert after <= state.info.value_before


def poisoned_batch():
    x, t = make_batch()
    return x.at[3, 1].set(jnp.nan), t


def nan_product_objective():
    """Finite in value and gradient, NaN in its curvature product."""

    @jax.custom_jvp
    def odd(z):
        return z

    odd.defjvp(lambda z, dz: (z[0], dz[0] * jnp.nan))
    return hfjax.Objective(
        lambda params, x: odd(model_fn(params, x)), hfjax.losses.sigmoid_cross_entropy()
    )


def uphill(params, batch):
    return jax.tree.map(jnp.negative, OBJECTIVE.value_and_grad(params, batch)[1])


FAULTS = {
    "gradient": (
        lambda p, b: (OBJECTIVE, b, jax.tree.map(lambda g: g * jnp.nan, p)),
        Rejection.NONFINITE_GRADIENT,
    ),
    "infinite gradient": (
        lambda p, b: (OBJECTIVE, b, jax.tree.map(lambda g: g + jnp.inf, p)),
        Rejection.NONFINITE_GRADIENT,
    ),
    "zero gradient": (
        lambda p, b: (OBJECTIVE, b, jax.tree.map(jnp.zeros_like, p)),
        Rejection.ZERO_GRADIENT,
    ),
    "product": (
        lambda p, b: (nan_product_objective(), b, OBJECTIVE.value_and_grad(p, b)[1]),
        Rejection.NONFINITE_PRODUCT,
    ),
    "case": (
        lambda p, b: (OBJECTIVE, poisoned_batch(), OBJECTIVE.value_and_grad(p, b)[1]),
        Rejection.NONFINITE_PRODUCT,
    ),
    "uphill": (lambda p, b: (OBJECTIVE, b, uphill(p, b)), Rejection.NO_DECREASE),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_rejection_leaves_parameters_bit_identical_and_says_why(fault):
    build, reason = FAULTS[fault]
    params = make_params(jnp.float32)
    batch = make_batch(dtype=jnp.float32)
    objective, batch, grads = build(params, batch)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    batch = jax.tree.map(lambda x: x.astype(jnp.float32), batch)
    # The search would go on until rounding hides that f rises, and λ is high.
    tx = BY_RATIO if objective is OBJECTIVE else hfjax.hessian_free(objective)
    state = tx.init(params)
    # Downhill: what would be taken, were only the line search asked.
    descent = jax.tree.map(lambda g: -0.1 * g, gradient_of(params, make_batch()))
    descent = jax.tree.map(lambda d: d.astype(jnp.float32), descent)
    state = state._replace(direction=descent)
    with jax.debug_nans(True):
        updates, after = jitted(tx)(grads, state, params, batch=batch)
    assert Rejection(int(after.info.rejection)) is reason
    assert not after.info.accepted
    after_it = optax.apply_updates(params, updates)
    for old, new in zip(*map(jax.tree.leaves, (params, after_it)), strict=True):
        assert old.tobytes() == new.tobytes()
    assert is_zero(after.direction)
    if reason is Rejection.ZERO_GRADIENT:
        assert after.damping == state.damping
    else:
        assert after.damping == pytest.approx(1.5 * float(state.damping))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(after))


@pytest.mark.slow
def test_value_that_is_nan_at_every_candidate_is_rejected():
    # f is finite at θ alone: the model refuses any other parameters.
    home = make_params()

    def refuse(params, x):
        moved = sum(
            jnp.sum(jnp.abs(a - b))
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(home), strict=True)
        )
        return jnp.where(jax.lax.stop_gradient(moved) > 0, jnp.nan, model_fn(params, x))

    objective = hfjax.Objective(refuse, hfjax.losses.sigmoid_cross_entropy())
    batch = make_batch()
    grads = objective.value_and_grad(home, batch)[1]
    updates, state = one_update(hfjax.hessian_free(objective), home, batch, grads=grads)
    assert Rejection(int(state.info.rejection)) is Rejection.NONFINITE_VALUE
    assert is_zero(updates)
    assert state.info.reduction_ratio == -1e9
    assert state.damping == pytest.approx(1.5)


@pytest.mark.slow
def test_damping_far_too_high_comes_down_by_itself():
    # λ = 1e15 in float32: a step moves no parameter and f cannot show its gain.
    params, batch = make_params(jnp.float32), make_batch(dtype=jnp.float32)
    rule = hfjax.damping.levenberg_marquardt(init=1e15)
    tx = hfjax.hessian_free(OBJECTIVE, damping=rule)
    _, (info, dampings) = training.trained(OBJECTIVE, tx, params, batch, 120)
    values = info.value_before
    assert dampings[-1] < 10
    assert values[-1] < 0.99 * values[0]
    assert np.all(np.diff(values) <= 0)


def test_second_update_starts_from_the_first_ones_solution():
    params, batch = make_params(), make_batch()
    starts = []

    def spy(system, x0):
        jax.debug.callback(starts.append, x0)
        return solver.solve(system, x0)

    solver = hfjax.cg.conjugate_gradient(warm_start_decay=0.95)
    tx = hfjax.hessian_free(
        OBJECTIVE,
        damping=hfjax.damping.levenberg_marquardt(),
        solver=solver._replace(solve=spy),
    )
    grads = gradient_of(params, batch)
    _, state = jitted(tx)(grads, tx.init(params), params, batch=batch)
    jitted(tx)(grads, state, params, batch=batch)
    jax.effects_barrier()
    assert is_zero(starts[0])
    (x0,) = starts[1]  # All leaves are small: one vector.
    np.testing.assert_allclose(x0, 0.95 * flat(state.direction), rtol=1e-12)


def test_blanking_info_leaves_the_next_update_bit_identical():
    params, batch = make_params(), make_batch()
    tx, update = DEFAULT, jitted(DEFAULT)
    grads = gradient_of(params, batch)
    _, state = update(grads, tx.init(params), params, batch=batch)
    blank = state._replace(info=tx.init(params).info)
    ours = update(grads, state, params, batch=batch)
    theirs = update(grads, blank, params, batch=batch)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_direction_alone_is_the_negative_of_the_step():
    params, batch = make_params(), make_batch()
    tx = hfjax.scale_by_hessian_free(OBJECTIVE)
    alone, _ = one_update(tx, params, batch)
    step, state = one_update(DEFAULT, params, batch)
    assert state.info.step_size == 1
    assert_close(alone, jax.tree.map(jnp.negative, step), rtol=1e-12)


@pytest.mark.slow
def test_exclusive_or_is_learnt_to_high_precision_with_two_cg_iterations():
    x = jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    t = jnp.array([[0.0], [1.0], [1.0], [0.0]])
    keys = jax.random.split(jax.random.key(2), 2)
    params = [
        {"w": 2 * jax.random.normal(keys[0], (2, 5)), "b": jnp.zeros(5)},
        {"w": 2 * jax.random.normal(keys[1], (5, 1)), "b": jnp.zeros(1)},
    ]
    objective = hfjax.Objective(
        lambda p, x: jax.nn.sigmoid(model_fn(p, x)), hfjax.losses.squared_error()
    )
    tx = hfjax.hessian_free(
        objective, solver=hfjax.cg.conjugate_gradient(max_iterations=2)
    )
    _, (info, _) = training.trained(objective, tx, params, (x, t), 120)
    values = info.value_after
    assert values[-1] < 1e-5
    # Until residuals are less than the rounding of outputs that are near 1.
    told = values[:-1] > jnp.finfo(values.dtype).eps ** 2
    assert np.all(np.diff(values)[told] <= 0)


def test_random_preconditioner_gets_a_new_key_in_each_update():
    params, batch = make_params(), make_batch()
    keys = []

    def build(objective, params, batch, damping, key):
        jax.debug.callback(keys.append, jax.random.key_data(key))
        return lambda r: r

    rule = hfjax.preconditioners.custom(build)
    tx = plain(preconditioner=rule, seed=7)
    grads = gradient_of(params, batch)
    _, state = jitted(tx)(grads, tx.init(params), params, batch=batch)
    jitted(tx)(grads, state, params, batch=batch)
    jax.effects_barrier()
    assert keys[0].tolist() != keys[1].tolist()
    np.testing.assert_array_equal(keys[1], [7, 1])  # The seed and the count.
    assert not any(
        jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        for leaf in jax.tree.leaves(tx.init(params))
    )


def test_bad_arguments_are_named():
    params, batch = make_params(), make_batch()
    tx = hfjax.hessian_free(OBJECTIVE)
    grads = jax.tree.map(jnp.ones_like, params)
    with pytest.raises(TypeError, match="`objective` must be an `hfjax"):
        hfjax.hessian_free(model_fn)
    with pytest.raises(TypeError, match="`batch` is missing"):
        tx.update(grads, tx.init(params), params)
    with pytest.raises(TypeError, match="`params` is missing"):
        tx.update(grads, tx.init(params), batch=batch)
    with pytest.raises(ValueError, match="`learning_rate` must be at least 0"):
        hfjax.hessian_free(OBJECTIVE, learning_rate=-1.0)


@pytest.mark.parametrize("radius", [False, True])
def test_a_product_that_is_not_finite_raises_the_damping(radius):
    # From 0, where M is 0 too: that is no step too small to be seen.
    params, batch = make_params(), make_batch()
    rule = hfjax.preconditioners.custom(
        lambda *_: lambda r: optax.tree.scale(np.nan, r)
    )
    options = {"damping": hfjax.damping.levenberg_marquardt(1.0)}
    if radius:
        solver = hfjax.trust_region.steihaug_toint()
        options = {"damping": hfjax.trust_region.radius(1.0), "solver": solver}
    tx = hfjax.hessian_free(OBJECTIVE, preconditioner=rule, **options)
    updates, state = one_update(tx, params, batch)
    assert state.info.rejection == hfjax.Rejection.NONFINITE_PRODUCT
    assert is_zero(updates)
    np.testing.assert_allclose(state.damping, 2 / 3 if radius else 3 / 2)


def test_a_shorter_step_is_compared_with_what_the_model_says_of_it():
    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.normal(size=(6, 1)))
    f = hfjax.Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
    taken = hfjax.damping.ReductionRatio(step="taken")
    tx = hfjax.hessian_free(
        f,
        damping=hfjax.damping.levenberg_marquardt(ratio=taken),
        preconditioner=None,
        learning_rate=0.5,
    )
    params = jnp.zeros((3, 1))
    value, grads = f.value_and_grad(params, batch)
    updates, state = quick_jit(tx.update)(grads, tx.init(params), params, batch=batch)
    change = f.value(params + updates, batch) - value
    assert state.info.step_size == 0.5
    # f is quadratic, and so its own model.
    np.testing.assert_allclose(state.info.predicted_change, change, rtol=1e-12)
