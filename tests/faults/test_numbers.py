"""Faults that only the numbers show: a zero update with its reason, and nothing lost.

`docs/faults.md` has the table; float32, as faults of range show there first.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec
from reference import quick_jit

import hfjax
from hfjax import Rejection, losses

F32 = jnp.float32


def model_fn(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def scaled_error(z, t):
    """½ c (z − t)²: targets hold c too, so that one program serves all scales."""
    return 0.5 * t[:, 1:] * jnp.square(z - t[:, :1])


OBJECTIVE = hfjax.Objective(model_fn, losses.from_function(scaled_error))
PARAMS = {
    "a": jax.random.normal(jax.random.key(1), (3, 4), F32),
    "b": jax.random.normal(jax.random.key(2), (4, 1), F32),
}
X = jax.random.normal(jax.random.key(0), (8, 3), F32)
WEIGHTS = jnp.ones(8, F32)


def targets(scale=1.0):
    t = jnp.sin(X[:, :1]) + X[:, 1:2]
    return jnp.concatenate([t, jnp.full_like(t, scale)], axis=1)


BATCH = (X, targets(), WEIGHTS)
SOLVER = hfjax.cg.conjugate_gradient(max_iterations=12)
TX = hfjax.hessian_free(OBJECTIVE, solver=SOLVER, preconditioner=None)
WITH_P = hfjax.hessian_free(OBJECTIVE, solver=SOLVER)
WARM = hfjax.hessian_free(
    OBJECTIVE,
    damping=hfjax.damping.levenberg_marquardt(),
    solver=hfjax.cg.conjugate_gradient(max_iterations=12, warm_start_decay=0.95),
    preconditioner=None,
)


def train_step(tx, objective, params, state, batch):
    _, grads = objective.value_and_grad(params, batch)
    updates, state = tx.update(grads, state, params, batch=batch)
    return optax.apply_updates(params, updates), state


@functools.cache
def step_of(tx, objective=OBJECTIVE):
    return quick_jit(functools.partial(train_step, tx, objective))


def train(params, state, batch, updates, tx=TX, objective=OBJECTIVE):
    """Train, and see after every update that nothing was spoilt; f before each."""
    values, step = [], step_of(tx, objective)
    for _ in range(updates):
        before, (params, state) = params, step(params, state, batch)
        assert_sound(before, params, state)
        values.append(float(state.info.value_before))
    return params, state, np.array(values)


def assert_sound(before, after, state):
    for leaf in jax.tree.leaves((after, state)):
        assert np.all(np.isfinite(leaf)), state
    info = state.info
    assert info.accepted == (info.rejection == Rejection.NONE)
    if info.accepted:
        assert info.step_size > 0
        assert info.value_after <= info.value_before
    else:
        assert_untouched(before, after, state)


def assert_untouched(before, after, state):
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert old.tobytes() == new.tobytes()
    assert not np.any(state.direction["a"])
    assert state.info.update_norm == 0


def reason(state):
    return Rejection(int(state.info.rejection))


def spoil(what, number):
    x, t, weights = BATCH
    return {
        "input": (x.at[3, 1].set(number), t, weights),
        "target": (x, t.at[3, 0].set(number), weights),
        "weight": (x, t, weights.at[3].set(number)),
        "every input": (jnp.full_like(x, number), t, weights),
    }[what]


@pytest.mark.parametrize("number", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("what", ["input", "target", "weight", "every input"])
def test_bad_data_cost_one_zero_update_and_no_more(what, number):
    params, state, _ = train(PARAMS, TX.init(PARAMS), BATCH, 3)
    after, spoilt = step_of(TX)(params, state, spoil(what, number))
    saturates = np.isinf(number) and "input" in what
    if not saturates:  # tanh(±∞) is a number; its derivative may be one, too.
        assert reason(spoilt) is Rejection.NONFINITE_GRADIENT
        assert spoilt.damping == pytest.approx(1.5 * float(state.damping))
    if not spoilt.info.accepted:
        assert_untouched(params, after, spoilt)
    _, _, values = train(after, spoilt, BATCH, 10)
    assert values[-1] < values[0]


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize("check_vma", [True, False])
def test_bad_data_of_one_device_make_a_zero_update_on_all(check_vma):
    objective = hfjax.Objective(model_fn, OBJECTIVE.loss, axis_name="cases")
    tx = hfjax.hessian_free(objective, solver=SOLVER, preconditioner=None)
    mesh = jax.make_mesh((4,), ("cases",), axis_types=(AxisType.Auto,))
    own, whole = PartitionSpec("cases"), PartitionSpec()

    def of_each_device(params, state, batch):
        after, state = train_step(tx, objective, params, state, batch)
        return jax.tree.map(lambda leaf: leaf[None], (after, state.info.rejection))

    after, rejections = quick_jit(
        jax.shard_map(
            of_each_device,
            mesh=mesh,
            in_specs=(whole, whole, own),
            out_specs=own,
            check_vma=check_vma,
        )
    )(PARAMS, tx.init(PARAMS), spoil("target", jnp.nan))
    assert np.all(np.asarray(rejections) == Rejection.NONFINITE_GRADIENT)
    for old, new in zip(jax.tree.leaves(PARAMS), jax.tree.leaves(after), strict=True):
        assert all(device.tobytes() == old.tobytes() for device in np.asarray(new))


def test_a_product_that_breaks_half_way_makes_a_zero_update():
    def breaking(objective, params, batch):
        product = hfjax.curvature.ggn(objective, params, batch)
        first = objective.value_and_grad(params, batch)[1]

        def matvec(v):
            # The first direction is −∇f; on all others the product is NaN.
            lengths = optax.tree.norm(v) * optax.tree.norm(first)
            along = jnp.abs(optax.tree.vdot(v, first)) >= 0.999 * lengths
            return jax.tree.map(lambda x: jnp.where(along, x, jnp.nan), product(v))

        return matvec

    tx = hfjax.hessian_free(
        OBJECTIVE, solver=SOLVER, preconditioner=None, curvature=breaking
    )
    after, state = step_of(tx)(PARAMS, tx.init(PARAMS), BATCH)
    assert state.info.cg_iterations == 1
    assert reason(state) is Rejection.NONFINITE_PRODUCT
    assert_untouched(PARAMS, after, state)


@pytest.mark.slow
def test_where_f_is_nan_further_out_a_shorter_step_is_taken():
    def bounded(params, x):
        far = jnp.sum(jnp.square(params["b"] - PARAMS["b"])) > 1e-4
        return jnp.where(far, jnp.nan, model_fn(params, x))

    objective = hfjax.Objective(bounded, OBJECTIVE.loss)
    make = functools.partial(
        hfjax.hessian_free, objective, solver=SOLVER, preconditioner=None
    )
    tx = make(damping=hfjax.damping.levenberg_marquardt())
    _, state, _ = train(PARAMS, tx.init(PARAMS), BATCH, 1, tx, objective)
    assert state.info.accepted
    assert state.info.step_size < 1
    _, state, _ = train(PARAMS, make().init(PARAMS), BATCH, 1, make(), objective)
    assert state.info.accepted
    assert state.info.step_size < 1 or state.damping > 1


@pytest.mark.parametrize("exponent", [-70, 70])
def test_curvature_and_gradient_of_any_size_give_the_same_steps(exponent):
    # c = 2^±70 is exact, and its square no float32; λ is on the scale of f.
    scale = 2.0**exponent
    plain = train(PARAMS, TX.init(PARAMS), BATCH, 5)
    state = TX.init(PARAMS)._replace(damping=F32(scale))
    far = train(PARAMS, state, (X, targets(scale), WEIGHTS), 5)
    np.testing.assert_array_equal(far[2], scale * plain[2])
    for one, other in zip(
        jax.tree.leaves(far[0]), jax.tree.leaves(plain[0]), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("tx", [TX, WITH_P], ids=["without P", "with P"])
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_a_loss_of_any_size_is_trained_from_the_default_damping(scale, tx):
    # From λ = 1 to 1e-30 are 170 updates; squares of gradients of 1e30 are no floats.
    batch = (X, targets(scale), WEIGHTS)
    _, _, values = train(PARAMS, tx.init(PARAMS), batch, 200 if scale < 1 else 20, tx)
    assert values[-1] < 0.05 * values[0]


def test_a_gradient_whose_square_and_whose_f_are_no_floats_still_comes_to_zero():
    # f = ½‖z − t‖² underflows to 0 at once: nothing to go by but the model.
    objective = hfjax.Objective(lambda p, x: x @ p["a"][:, :1], losses.squared_error())
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    batch = (X, 1e-30 * X @ PARAMS["a"][:, :1])
    tx = hfjax.hessian_free(objective, solver=SOLVER, preconditioner=None)
    state = tx.init(params)
    first = np.max(np.abs(objective.value_and_grad(params, batch)[1]["a"]))
    params, _, _ = train(params, state, batch, 30, tx, objective)
    last = np.max(np.abs(objective.value_and_grad(params, batch)[1]["a"]))
    assert first > 1e-31
    assert last < 1e-3 * first


def test_without_curvature_the_step_is_the_gradient_over_lambda():
    linear = losses.from_function(lambda z, t: z * t[:, :1])  # L″ = 0.
    objective = hfjax.Objective(model_fn, linear)
    tx = hfjax.hessian_free(objective, preconditioner=None, backtracking=None)
    state = tx.init(PARAMS)._replace(damping=F32(4.0))
    grads = objective.value_and_grad(PARAMS, BATCH)[1]
    after, state = step_of(tx, objective)(PARAMS, state, BATCH)
    assert state.info.accepted
    for old, new, g in zip(*map(jax.tree.leaves, (PARAMS, after, grads)), strict=True):
        np.testing.assert_allclose(
            new - old, -state.info.step_size * g / 4, rtol=1e-4, atol=1e-6
        )
    undamped = state._replace(damping=F32(0.0))
    train(after, undamped, BATCH, 5, tx, objective)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e8, 1e30])
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_saturated_logits_do_no_harm(name, right, size):
    objective = SATURATED[name]
    tx = saturated_tx(name)
    side = 1 if right else -1
    label = (X[:, 0] > 0).astype(jnp.int32)
    target = label if name == "softmax" else label[:, None].astype(F32)
    # The logits are ±size · x₀.
    row = jnp.array([1.0] if name == "sigmoid" else [-1.0, 1.0], F32)
    params = {"a": jnp.zeros((3, len(row)), F32).at[0].set(side * size * row)}
    batch = (X, target, WEIGHTS)
    before = float(objective.value(params, batch))
    params, _, values = train(params, tx.init(params), batch, 5, tx, objective)
    assert objective.value(params, batch) <= before
    if not right and size <= 1e4:
        assert values[-1] < before


def linear(params, x):
    return x @ params["a"]


SATURATED = {
    "sigmoid": hfjax.Objective(linear, losses.sigmoid_cross_entropy()),
    "softmax": hfjax.Objective(
        linear, losses.softmax_cross_entropy_with_integer_labels()
    ),
}


@functools.cache
def saturated_tx(name):
    return hfjax.hessian_free(SATURATED[name], solver=SOLVER)


@pytest.mark.parametrize("label", [-1, 2, 2**31 - 1])
def test_a_label_that_there_is_not_makes_a_zero_update(label):
    objective, tx = SATURATED["softmax"], saturated_tx("softmax")
    labels = (X[:, 0] > 0).astype(jnp.int32).at[2].set(label)
    params = {"a": PARAMS["a"][:, :2]}
    state = tx.init(params)
    after, state = step_of(tx, objective)(params, state, (X, labels, WEIGHTS))
    assert reason(state) is Rejection.NONFINITE_GRADIENT
    assert after["a"].tobytes() == params["a"].tobytes()


BAD_TARGETS = {
    "sigmoid": (
        losses.sigmoid_cross_entropy(),
        jnp.full((8, 1), 0.5, F32).at[5].set(1.5),
        "1 of the cases (case 5) are not between 0 and 1",
    ),
    "softmax": (
        losses.softmax_cross_entropy(),
        jnp.full((8, 2), 0.5, F32).at[0, 1].set(-0.5),
        "1 of the cases (case 0) are not 0 or more",
    ),
    "labels": (
        losses.softmax_cross_entropy_with_integer_labels(),
        jnp.zeros(8, jnp.int32).at[3].set(2).at[4].set(-1),
        "2 of the cases (case 3, 4) are not labels of the classes there are",
    ),
}


@pytest.mark.parametrize("name", BAD_TARGETS)
def test_targets_outside_their_range_are_named_by_the_check(name):
    loss, target, words = BAD_TARGETS[name]
    objective = hfjax.Objective(linear, loss)
    params = {"a": PARAMS["a"][:, : 1 if name == "sigmoid" else 2]}
    grads = jax.tree.map(jnp.ones_like, params)
    (fault,) = hfjax.verify.check(objective, None, params, (X, target), grads)
    assert words in fault


@pytest.mark.parametrize("damping", [jnp.inf, jnp.nan, 1e30, 1e18, 1e-30, 1e-38, 0.0])
def test_a_run_recovers_from_any_damping(damping):
    state = TX.init(PARAMS)._replace(damping=F32(damping))
    # From 1e30 down to 1 are 171 updates.
    _, state, values = train(PARAMS, state, BATCH, 230 if damping == 1e30 else 160)
    assert 0 < state.damping < 1e18
    assert values[-1] < 0.05 * values[0]


def test_a_run_recovers_from_any_radius():
    solver = hfjax.trust_region.steihaug_toint(max_iterations=12)
    tx = hfjax.hessian_free(
        OBJECTIVE,
        damping=hfjax.trust_region.radius(),
        solver=solver,
        preconditioner=None,
    )
    for radius in (jnp.inf, jnp.nan, 1e30, 1e-30, 0.0):
        state = tx.init(PARAMS)._replace(damping=F32(radius))
        updates = 200 if radius < 1 else 30
        _, state, values = train(PARAMS, state, BATCH, updates, tx)
        assert 0 < state.damping <= 1e18
        assert values[-1] < 0.05 * values[0]


def test_a_run_recovers_from_two_hundred_bad_batches():
    params, state, _ = train(PARAMS, TX.init(PARAMS), BATCH, 2)
    params, state, _ = train(params, state, spoil("target", jnp.nan), 200)
    assert state.damping == 1e18
    _, state, values = train(params, state, BATCH, 150)
    assert state.damping < 1e3
    assert values[-1] < 0.1 * values[0]


@pytest.mark.parametrize("number", [jnp.nan, jnp.inf, 1e25])
def test_a_spoilt_warm_start_costs_one_update(number):
    spoilt = jax.tree.map(lambda x: jnp.full_like(x, number), PARAMS)
    state = WARM.init(PARAMS)._replace(direction=spoilt)
    params, state, _ = train(PARAMS, state, BATCH, 1, WARM)
    assert reason(state) is Rejection.NONFINITE_PRODUCT
    _, _, values = train(params, state, BATCH, 10, WARM)
    assert values[-1] < 0.5 * values[0]


def test_all_zero_parameters_of_a_network_are_a_zero_gradient():
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    after, state, _ = train(params, TX.init(params), BATCH, 2)
    assert reason(state) is Rejection.ZERO_GRADIENT
    assert state.damping == 1
    assert not np.any(after["a"])


def test_one_case_is_a_batch():
    one = jax.tree.map(lambda leaf: leaf[:1], BATCH)
    _, _, values = train(PARAMS, TX.init(PARAMS), one, 10)
    assert values[-1] < 1e-6 * values[0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64, jnp.int32])
def test_inputs_of_another_dtype_leave_that_of_the_parameters(dtype):
    x = (10 * X).astype(dtype)
    params, _, values = train(PARAMS, TX.init(PARAMS), (x, targets(), WEIGHTS), 5)
    assert all(leaf.dtype == F32 for leaf in jax.tree.leaves(params))
    assert values[-1] < values[0]


def test_a_step_beyond_the_range_of_half_precision_is_not_taken_whole():
    # δ = −∇f / λ = 10⁵, and 65504 is float16's largest; f has a value even at ∞.
    objective = hfjax.Objective(
        lambda p, x: jnp.tanh(1e-3 * p.astype(F32) * x), losses.squared_error()
    )
    params, batch = jnp.zeros(1, jnp.float16), (jnp.ones(4, F32), jnp.ones(4, F32))
    tx = hfjax.hessian_free(
        objective,
        damping=hfjax.damping.levenberg_marquardt(),
        preconditioner=None,
        curvature=lambda *_: lambda v: jax.tree.map(jnp.zeros_like, v),
    )
    state = tx.init(params)._replace(damping=F32(1e-9))
    updates, state = quick_jit(tx.update)(
        jnp.full(1, -1e-4, F32), state, params, batch=batch
    )
    assert state.info.accepted
    assert state.info.step_size == pytest.approx(0.64)
    assert optax.apply_updates(params, updates)[0] == pytest.approx(64e3, rel=1e-3)


def test_a_mask_of_minus_infinity_among_the_parameters_leaves_the_others_trained():
    objective = hfjax.Objective(
        lambda p, x: x * (p["a"] + jnp.exp(p["mask"])), losses.squared_error()
    )
    params = {"a": jnp.zeros((1, 1), F32), "mask": jnp.full((1, 1), -jnp.inf, F32)}
    tx = hfjax.hessian_free(objective, solver=SOLVER, preconditioner=None)
    batch = (jnp.ones((4, 1), F32), jnp.full((4, 1), 2.0, F32))
    params, state = step_of(tx, objective)(params, tx.init(params), batch)
    assert state.info.accepted
    assert state.info.value_after < 0.1 * state.info.value_before
    assert params["mask"] == -jnp.inf


ILL_SCALED = {
    "ten thousand to one": lambda p: {"a": 1e4 * p["a"], "b": 1e-4 * p["b"]},
    "exponentials": lambda p: {"a": jnp.exp(p["a"]), "b": p["b"]},
    "ninth powers": lambda p: {"a": p["a"], "b": p["b"] ** 9},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ILL_SCALED)
def test_an_ill_scaled_parameterisation_is_trained(name):
    scaled = ILL_SCALED[name]
    objective = hfjax.Objective(lambda p, x: model_fn(scaled(p), x), OBJECTIVE.loss)
    tx = hfjax.hessian_free(objective, solver=SOLVER)
    params = PARAMS
    if name == "ten thousand to one":
        params = {"a": 1e-4 * params["a"], "b": 1e4 * params["b"]}
    _, _, values = train(params, tx.init(params), BATCH, 40, tx, objective)
    assert values[-1] < 0.5 * values[0]


def test_a_random_model_leaves_everything_finite():
    generator = np.random.default_rng(0)

    def noisy(params, x):
        noise = jax.pure_callback(
            lambda: generator.normal(size=x.shape).astype(np.float32),
            jax.ShapeDtypeStruct(x.shape, F32),
        )
        return model_fn(params, x + 0.1 * noise)

    objective = hfjax.Objective(noisy, OBJECTIVE.loss)
    tx = hfjax.hessian_free(objective, solver=SOLVER, preconditioner=None)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(20):
        params, state = step_of(tx, objective)(params, state, BATCH)
        for leaf in jax.tree.leaves((params, state)):
            assert np.all(np.isfinite(leaf))
    assert OBJECTIVE.value(params, BATCH) < OBJECTIVE.value(PARAMS, BATCH)


def test_a_loss_that_is_not_convex_is_trained():
    objective = hfjax.Objective(
        model_fn, losses.from_function(lambda z, t: jnp.cos(3 * z - t[:, :1]))
    )
    tx = hfjax.hessian_free(objective, solver=SOLVER, preconditioner=None)
    _, _, values = train(PARAMS, tx.init(PARAMS), BATCH, 40, tx, objective)
    assert values[-1] < -0.9


def test_a_start_where_f_overflows_is_refused_for_ever():
    objective = hfjax.Objective(
        lambda p, x: model_fn(jax.tree.map(jnp.exp, p), x), OBJECTIVE.loss
    )
    tx = hfjax.hessian_free(objective, solver=SOLVER, preconditioner=None)
    params = {"a": PARAMS["a"], "b": jnp.full((4, 1), 100.0, F32)}
    _, state, _ = train(params, tx.init(params), BATCH, 3, tx, objective)
    assert reason(state) is Rejection.NONFINITE_GRADIENT


@pytest.mark.slow
def test_a_healthy_run_makes_no_nan_on_its_way():
    # `jax_debug_nans` looks at what every compiled program returns, so one update as
    # one program, and the same one operation at a time.
    with jax.debug_nans(True):
        params, state, _ = train(PARAMS, WITH_P.init(PARAMS), BATCH, 3, WITH_P)
        with jax.disable_jit():
            train_step(WITH_P, OBJECTIVE, params, state, BATCH)
