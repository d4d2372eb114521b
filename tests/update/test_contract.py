"""The contract with Optax and JAX: dtypes, tracing, compilation, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from reference import assert_close, counted_jit, quick_jit

import hfjax

traces = []


def model_fn(params, x):
    traces.append(None)
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


OBJECTIVE = hfjax.Objective(model_fn, hfjax.losses.squared_error())
TX = hfjax.hessian_free(OBJECTIVE)


def make_params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0))
    return {
        "hidden": jax.random.normal(keys[0], (3, 4), dtype),
        "out": jax.random.normal(keys[1], (4, 2), dtype),
    }


def make_batch(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(1))
    return (
        jax.random.normal(keys[0], (10, 3), dtype),
        jax.random.normal(keys[1], (10, 2), dtype),
    )


train_step = functools.partial(training.train_step, OBJECTIVE)
jitted = functools.cache(lambda tx: quick_jit(functools.partial(train_step, tx)))


def test_model_is_traced_six_times_and_never_again():
    # Value and gradient; linearisation; to find the layers, in one example and in all; f at
    # θ; and f at θ + δ, for the search for λ and the line search together.
    params, batch = make_params(), make_batch()
    step = quick_jit(functools.partial(train_step, TX))
    traces.clear()
    params, state = step(params, TX.init(params), batch)
    first = len(traces)
    for _ in range(3):
        params, state = step(params, state, batch)
    assert len(traces) == first
    assert first == 6


def kind(leaf):
    return leaf.dtype, leaf.shape, leaf.weak_type


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_second_call_does_not_recompile_and_dtypes_never_change(dtype):
    params, batch = make_params(dtype), make_batch(dtype)
    step, traced = counted_jit(functools.partial(train_step, TX))
    before = TX.init(params)
    new_params, after = step(params, before, batch)
    step(*step(new_params, after, batch), batch)
    assert len(traced) == 1
    assert jax.tree.map(kind, (params, before)) == jax.tree.map(
        kind, (new_params, after)
    )
    assert after.info.accepted
    assert after.info.value_after < after.info.value_before
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    assert after.damping.dtype == wide


@functools.cache
def jitted_update():
    return quick_jit(TX.update)


def gradients(params, batch):
    return OBJECTIVE.value_and_grad(params, batch)[1]


def test_unknown_extra_arguments_are_ignored():
    params, batch = make_params(), make_batch()
    grads, state = gradients(params, batch), TX.init(params)
    plain, _ = jitted_update()(grads, state, params, batch=batch)
    extra, _ = jitted_update()(grads, state, params, batch=batch, value=jnp.ones(()))
    jax.tree.map(np.testing.assert_array_equal, plain, extra)


def test_state_is_made_from_shapes_alone():
    params = make_params()
    shapes = jax.eval_shape(TX.init, params)
    concrete = TX.init(params)
    assert jax.tree.structure(shapes) == jax.tree.structure(concrete)
    mapped = optax.tree.map_params(TX, lambda x: x, concrete)
    assert jax.tree.structure(mapped) == jax.tree.structure(concrete)


def test_whole_training_runs_inside_scan_with_donated_state():
    params, batch = make_params(), make_batch()

    @functools.partial(quick_jit, donate_argnums=(0, 1))
    def train(params, state):
        def step(carry, _):
            params, state = train_step(TX, *carry, batch)
            return (params, state), state.info.value_after

        return jax.lax.scan(step, (params, state), length=5)

    _, values = train(params, TX.init(params))
    assert np.all(np.diff(values) < 0)


@pytest.mark.parametrize("check_vma", [True, False])
def test_update_on_four_devices_equals_one(check_vma):
    params, batch = make_params(jnp.float64), make_batch(jnp.float64)
    x, t = (jnp.concatenate([leaf, leaf[:2]]) for leaf in batch)  # Padded to 12.
    weights = jnp.array([1.0] * 10 + [0.0] * 2)
    expected, _ = jitted(TX)(params, TX.init(params), batch)

    objective = hfjax.Objective(model_fn, hfjax.losses.squared_error(), axis_name="d")
    tx = hfjax.hessian_free(objective)
    mesh = jax.make_mesh((4,), ("d",), (jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec  # noqa: N806

    sharded = jax.shard_map(
        functools.partial(training.train_step, objective, tx),
        mesh=mesh,
        in_specs=(P(), P(), P("d")),
        out_specs=P(),
        check_vma=check_vma,
    )
    result, state = quick_jit(sharded)(params, TX.init(params), (x, t, weights))
    assert state.info.accepted
    assert_close(result, expected, rtol=1e-9)


def hidden_model_fn(params, x):
    hidden = jnp.tanh(x @ params["hidden"])
    return hidden @ params["out"], hidden


HIDDEN = hfjax.Objective(
    hidden_model_fn,
    hfjax.losses.squared_error(),
    hidden_loss=hfjax.losses.squared_error(),
)
RADEMACHER = functools.partial(hfjax.diagonals.ggn_rademacher, num_probes=2)
LEVENBERG_MARQUARDT = hfjax.damping.levenberg_marquardt

CONFIGURATIONS = {
    "trust_region": lambda objective: hfjax.hessian_free(
        objective,
        solver=hfjax.trust_region.steihaug_toint(max_iterations=8),
        damping=hfjax.trust_region.radius(init=0.1),
    ),
    "krylov": lambda objective: hfjax.hessian_free(
        objective,
        solver=hfjax.krylov.subspace_descent(dimension=4, max_iterations=5),
        damping=hfjax.damping.constant(0.0),
        preconditioner=None,
        backtracking=None,
    ),
    "curvature_guarded": lambda objective: hfjax.recipes.curvature_guarded(
        objective, initial_damping=0.1, max_iterations=8, interval=2, evaluated_cases=5
    ),
    "momentum_like": lambda objective: hfjax.recipes.momentum_like(
        objective, initial_damping=0.1, max_iterations=8
    ),
    "structural": lambda objective: hfjax.hessian_free(
        HIDDEN,
        solver=hfjax.cg.conjugate_gradient(max_iterations=8),
        damping=LEVENBERG_MARQUARDT(init=0.1, structural=0.5),
    ),
    "curvature_diagonal": lambda objective: hfjax.hessian_free(
        objective,
        solver=hfjax.cg.conjugate_gradient(max_iterations=8),
        damping=LEVENBERG_MARQUARDT(
            init=0.1, matrix=hfjax.damping_matrices.diagonal(RADEMACHER)
        ),
        preconditioner=hfjax.preconditioners.diagonal(RADEMACHER),
    ),
}


@pytest.mark.every
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("trust_region", jnp.float32),
        ("trust_region", jnp.bfloat16),
        ("krylov", jnp.bfloat16),
        ("curvature_guarded", jnp.float32),
        ("momentum_like", jnp.bfloat16),
        ("structural", jnp.bfloat16),
        ("curvature_diagonal", jnp.bfloat16),
    ],
)
def test_every_configuration_keeps_the_contract(name, dtype):
    objective = HIDDEN if name == "structural" else OBJECTIVE
    tx = CONFIGURATIONS[name](OBJECTIVE)
    params, batch = make_params(dtype), make_batch(dtype)

    def one(params, state):
        grads = objective.value_and_grad(params, batch)[1]
        updates, state = tx.update(grads, state, params, batch=batch, unknown=1.0)
        return optax.apply_updates(params, updates), updates, state

    step, traced = counted_jit(one)
    before = tx.init(params)
    new_params, updates, after = step(params, before)
    last_params, _, last = step(new_params, after)
    assert len(traced) == 1
    assert jax.tree.structure(before) == jax.tree.structure(last)
    assert jax.tree.map(kind, (params, before)) == jax.tree.map(
        kind, (last_params, last)
    )
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        assert (old.dtype, old.shape) == (new.dtype, new.shape)
    assert after.info.accepted
    assert last.info.value_after < after.info.value_before
    assert optax.tree.get(last, "damping").dtype == jnp.float32
    assert last.count == 2
    for field in hfjax.HessianFreeInfo._fields:
        optax.tree.get(last, field)  # Raises if a name occurs twice.
    shapes = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(shapes) == jax.tree.structure(before)


def test_a_step_in_a_region_is_the_same_without_jit():
    # The simplest one: without jit every loop is compiled by itself.
    tx = hfjax.hessian_free(
        OBJECTIVE,
        solver=hfjax.trust_region.steihaug_toint(max_iterations=4),
        damping=hfjax.trust_region.radius(init=0.1),
        preconditioner=None,
        backtracking=None,
        line_search=None,
    )
    params, batch = make_params(jnp.float64), make_batch(jnp.float64)
    grads, state = gradients(params, batch), tx.init(params)
    eager = tx.update(grads, state, params, batch=batch)
    compiled = quick_jit(tx.update)(grads, state, params, batch=batch)
    assert_close(eager, compiled, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", ["shard_map", "vmap"])
@pytest.mark.parametrize("name", ["trust_region", "krylov"])
def test_two_devices_find_the_step_of_one(name, way):
    params, (x, t) = make_params(jnp.float64), make_batch(jnp.float64)
    expected, _ = jitted(configuration(name))(
        params, configuration(name).init(params), (x, t)
    )
    objective = hfjax.Objective(model_fn, hfjax.losses.squared_error(), axis_name="d")
    tx = CONFIGURATIONS[name](objective)
    # Uneven shards: six real cases, and four with two of padding.
    order = jnp.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1])
    batch = (x[order], t[order], jnp.array([1.0] * 10 + [0.0] * 2))

    def step(batch):
        after, state = training.train_step(
            objective, tx, params, tx.init(params), batch
        )
        return after, state.info.accepted

    if way == "vmap":
        folded = jax.tree.map(lambda leaf: leaf.reshape(2, 6, *leaf.shape[1:]), batch)
        result, accepted = quick_jit(jax.vmap(step, axis_name="d"))(folded)
        assert np.all(accepted)
        for leaf in jax.tree.leaves(result):
            np.testing.assert_array_equal(leaf[0], leaf[1])
        result = jax.tree.map(lambda leaf: leaf[0], result)
    else:
        mesh = jax.make_mesh((2,), ("d",), (jax.sharding.AxisType.Auto,))
        P = jax.sharding.PartitionSpec  # noqa: N806
        result, accepted = quick_jit(
            jax.shard_map(
                step,
                mesh=mesh,
                in_specs=P("d"),
                out_specs=P(),
                check_vma=True,  # The strict one; without, nothing is asked of types.
            )
        )(batch)
        assert accepted
    assert_close(result, expected, rtol=1e-7)


@functools.cache
def configuration(name):
    return CONFIGURATIONS[name](OBJECTIVE)
