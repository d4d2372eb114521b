"""Other optimizers for some of the parameters: `optax.partition` and `optax.masked`."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from reference import counted_jit, quick_jit

import hfjax
from hfjax.objectives.objective import penalty, weighted_sum


def model_fn(params, x):
    for w, b in params["body"]:
        x = jnp.tanh(x @ w + b[None])
    return params["gain"] * (x @ params["out"])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


PARAMS = {
    "body": [(normal(0, 3, 4), normal(1, 4)), (normal(2, 4, 3), normal(3, 3))],
    "out": normal(4, 3, 2),
    "gain": jnp.float64(0.8),
}
BATCH = (normal(5, 7, 3), normal(6, 7, 2))
DECAYS = {"body": 0.1, "out": 0.3, "gain": 0.0}
OBJECTIVE = hfjax.Objective(
    model_fn, hfjax.losses.squared_error(), weight_decay=DECAYS, microbatch_size=4
)
GRADS = OBJECTIVE.value_and_grad(PARAMS, BATCH)[1]
# The first layer and the gain are for another optimizer, which does nothing here.
LABELS = {"body": ["other", "hf"], "out": "hf", "gain": "other"}
IS_OURS = {"body": [False, True], "out": True, "gain": False}
# In the order of the whole tree, in which random numbers are drawn.
VISIBLE = {"body": PARAMS["body"][1], "out": PARAMS["out"]}


def whole(visible):
    body = [PARAMS["body"][0], visible["body"]]
    return {**PARAMS, "body": body, "out": visible["out"]}


def part(tree):
    return {"body": tree["body"][1], "out": tree["out"]}


CLOSED = hfjax.Objective(
    lambda visible, x: model_fn(whole(visible), x),
    hfjax.losses.squared_error(),
    weight_decay={"body": 0.1, "out": 0.3},
    microbatch_size=4,
)


def partitioned(tx):
    return optax.partition({"hf": tx, "other": optax.set_to_zero()}, LABELS)


def masked(tx):
    others = jax.tree.map(operator.not_, IS_OURS)
    return optax.chain(
        optax.masked(tx, IS_OURS), optax.masked(optax.set_to_zero(), others)
    )


def selected(tx):
    others = jax.tree.map(operator.not_, IS_OURS)
    return optax.selective_transform(tx, freeze_mask=others)


WRAPPERS = {"partition": partitioned, "masked": masked, "selective": selected}
RULES = hfjax.preconditioners
KINDS = {
    "default": {},
    "kronecker": {"preconditioner": RULES.kronecker(decay=0.5, interval=2)},
    "nystrom": {"preconditioner": RULES.nystrom(rank=3, interval=2)},
    "diagonal": {"preconditioner": RULES.diagonal()},
    "exact": {"solver": "auto"},
    "hessian": {
        "curvature": hfjax.curvature.hessian,
        "solver": hfjax.trust_region.steihaug_toint(),
        "damping": hfjax.trust_region.radius(),
        "preconditioner": None,
    },
    "damping_matrix": {
        "damping": hfjax.damping.levenberg_marquardt(
            matrix=hfjax.damping_matrices.diagonal()
        )
    },
}


def assert_close(tree, truth, rtol=1e-9):
    assert jax.tree.structure(tree) == jax.tree.structure(truth)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-13),
        tree,
        truth,
    )


def trained(tx, objective, params, updates=2, **extra):
    """Return parameters and state after some updates of one compiled step."""

    def one(params, state):
        grads = objective.value_and_grad(params, BATCH)[1]
        more = dict.fromkeys(extra, params)
        updates, state = tx.update(grads, state, params, batch=BATCH, **more)
        return optax.apply_updates(params, updates), state

    step, traced = counted_jit(one)
    state = tx.init(params)
    for _ in range(updates):
        params, state = step(params, state)
    assert len(traced) == 1
    return params, state


@functools.cache
def closed_over(kind):
    tx = hfjax.hessian_free(CLOSED, **KINDS[kind])
    return trained(tx, CLOSED, VISIBLE)


def numbers(state):
    return hfjax.diagnostics.scalars(state)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_that_of_the_visible_leaves_with_the_others_closed_over(kind):
    tx = partitioned(hfjax.hessian_free(OBJECTIVE, **KINDS[kind]))
    params, state = trained(tx, OBJECTIVE, PARAMS, all_params=True)
    expected, other = closed_over(kind)
    assert_close(part(params), expected, rtol=1e-6)
    assert_close(params["body"][0], PARAMS["body"][0])
    assert_close(params["gain"], PARAMS["gain"])
    ours, theirs = numbers(state), numbers(other)
    assert ours["accepted"]
    for name in ("value_before", "value_after", "damping", "gradient_norm"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_hides_and_hands_on(wrapper):
    options = {
        "solver": hfjax.cg.conjugate_gradient(max_iterations=40, stopping=None),
        "damping": hfjax.damping.constant(0.2),
        "preconditioner": None,
        "backtracking": None,
        "line_search": None,
    }
    tx = WRAPPERS[wrapper](hfjax.hessian_free(OBJECTIVE, **options))
    state = tx.init(PARAMS)
    update, traced = counted_jit(tx.update)
    given = {"batch": BATCH, "all_params": PARAMS}
    updates, new = update(GRADS, state, PARAMS, **given)
    # The dense step of the visible leaves: Gauss-Newton, decay and λ.
    flat, unravel = ravel_pytree(VISIBLE)

    def residuals(vector):
        return model_fn(whole(unravel(vector)), BATCH[0]) - BATCH[1]

    j = np.asarray(quick_jit(jax.jacobian(residuals))(flat)).reshape(14, -1)
    betas = np.repeat([0.1, 0.3], [15, 6])
    slope = j.T @ np.asarray(residuals(flat)).ravel() / 7 + betas * flat
    step = np.linalg.solve(j.T @ j / 7 + np.diag(betas + 0.2), -slope)
    np.testing.assert_allclose(ravel_pytree(part(updates))[0], step, rtol=1e-9)
    np.testing.assert_array_equal(updates["gain"], 0)
    # Later updates find the state as it was, and the same program.
    assert jax.tree.structure(new) == jax.tree.structure(state)
    update(GRADS, new, PARAMS, **given)
    assert len(traced) == 1


def test_the_state_holds_visible_leaves_alone():
    tx = hfjax.hessian_free(OBJECTIVE, preconditioner=RULES.kronecker(interval=2))
    state = optax.masked(tx, IS_OURS).init(PARAMS).inner_state
    assert optax.tree.size(state.direction) == optax.tree.size(VISIBLE)
    assert isinstance(state.direction["gain"], optax.MaskedNode)
    assert len(state.preconditioner["kronecker_inverses"]) == 3


@pytest.mark.slow
def test_an_eager_update_is_compiled_once_and_reads_the_hidden_leaves_anew():
    tx = partitioned(hfjax.hessian_free(OBJECTIVE))
    state = tx.init(PARAMS)
    given = {"batch": BATCH, "all_params": PARAMS}
    first, _ = tx.update(GRADS, state, PARAMS, **given)
    moved = {**PARAMS, "gain": jnp.float64(-0.3)}
    grads = OBJECTIVE.value_and_grad(moved, BATCH)[1]
    second, _ = tx.update(grads, state, moved, batch=BATCH, all_params=moved)
    truth, _ = quick_jit(tx.update)(grads, state, moved, batch=BATCH, all_params=moved)
    assert_close(second, truth, rtol=1e-6)
    assert np.max(np.abs(first["out"] - second["out"])) > 1e-3


@pytest.mark.slow
def test_adam_moves_the_others_meanwhile():
    adam = optax.adam(1e-2)
    hf = hfjax.hessian_free(OBJECTIVE)
    tx = optax.partition({"hf": hf, "other": adam}, LABELS)
    params, state = trained(tx, OBJECTIVE, PARAMS, updates=15, all_params=True)
    assert OBJECTIVE.value(params, BATCH) < 0.5 * OBJECTIVE.value(PARAMS, BATCH)
    assert numbers(state)["accepted"]
    one, _ = trained(tx, OBJECTIVE, PARAMS, updates=1, all_params=True)
    for found, before, slope in (
        (one["gain"], PARAMS["gain"], GRADS["gain"]),
        (one["body"][0][1], PARAMS["body"][0][1], GRADS["body"][0][1]),
    ):
        # Adam's first step is the sign of its own gradient.
        np.testing.assert_allclose(found - before, -1e-2 * np.sign(slope), rtol=1e-3)


@pytest.mark.slow
def test_sums_with_penalties_know_hidden_leaves_too():
    ridge = penalty(lambda p: 0.05 * sum(jnp.sum(x**2) for x in jax.tree.leaves(p)))
    both = weighted_sum([(1.0, OBJECTIVE), (2.0, ridge)])
    closed = weighted_sum(
        [(1.0, CLOSED), (2.0, penalty(lambda v: ridge.value(whole(v), ())))]
    )
    data = (BATCH, ())
    options = {"damping": hfjax.damping.levenberg_marquardt()}

    def one(objective, wrap, params, **more):
        tx = wrap(hfjax.hessian_free(objective, **options))
        grads = objective.value_and_grad(params, data)[1]
        update = quick_jit(tx.update)
        return update(grads, tx.init(params), params, batch=data, **more)

    ours, state = one(both, partitioned, PARAMS, all_params=PARAMS)
    theirs, other = one(closed, lambda tx: tx, VISIBLE)
    assert_close(part(ours), theirs, rtol=1e-6)
    for name in ("value_before", "value_after"):
        np.testing.assert_allclose(numbers(state)[name], numbers(other)[name])


@pytest.mark.slow
def test_structural_damping_sees_the_hidden_states_of_the_whole_model():
    def pair(params, x):
        (w, b), _ = params["body"]
        return model_fn(params, x), jnp.tanh(x @ w + b[None])

    loss, labels = hfjax.losses.squared_error(), {**LABELS, "body": ["hf", "other"]}
    f = hfjax.Objective(pair, loss, hidden_loss=loss)
    first = {"first": PARAMS["body"][0], "out": PARAMS["out"]}

    def fill(v):
        return {**PARAMS, "body": [v["first"], PARAMS["body"][1]], "out": v["out"]}

    g = hfjax.Objective(lambda v, x: pair(fill(v), x), loss, hidden_loss=loss)

    def one(objective, params, wrap, **more):
        rule = hfjax.damping.levenberg_marquardt(structural=0.3)
        tx = wrap(hfjax.hessian_free(objective, damping=rule, preconditioner=None))
        grads = objective.value_and_grad(params, BATCH)[1]
        update = quick_jit(tx.update)
        return update(grads, tx.init(params), params, batch=BATCH, **more)[0]

    def wrap(tx):
        return optax.partition({"hf": tx, "other": optax.set_to_zero()}, labels)

    ours = one(f, PARAMS, wrap, all_params=PARAMS)
    theirs = one(g, first, lambda tx: tx)
    ours = {"first": ours["body"][0], "out": ours["out"]}
    assert_close(ours, theirs, rtol=1e-6)


def test_leaves_that_are_no_numbers_may_be_hidden():
    """Of a tree that holds more than parameters, as integers."""
    params = {"w": normal(0, 3), "degree": jnp.int32(2)}
    f = hfjax.Objective(
        lambda p, x: (x ** p["degree"].astype(x.dtype)) @ p["w"],
        hfjax.losses.squared_error(),
    )
    tx = optax.masked(hfjax.hessian_free(f), {"w": True, "degree": False})
    grads = {"w": normal(1, 3), "degree": jnp.int32(0)}
    batch = (normal(5, 7, 3), normal(6, 7))
    state = tx.init(params)
    shapes = functools.partial(tx.update, batch=batch, all_params=params)
    updates, _ = jax.eval_shape(shapes, grads, state, params)
    assert updates["w"].shape == (3,)


def test_all_parameters_beside_all_parameters_change_nothing():
    tx = hfjax.hessian_free(OBJECTIVE, preconditioner=None)
    state, update = tx.init(PARAMS), quick_jit(tx.update)
    alone, _ = update(GRADS, state, PARAMS, batch=BATCH)
    beside, _ = update(GRADS, state, PARAMS, batch=BATCH, all_params=PARAMS)
    assert_close(alone, beside, rtol=1e-12)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (lambda: PARAMS["body"], ValueError, "must be the parameters that `params` is"),
        (
            lambda: {**PARAMS, "out": normal(0, 3, 9)},
            ValueError,
            "must be the parameters that `params` is",
        ),
        (lambda: None, TypeError, "`all_params` is missing: call"),
    ],
)
def test_what_is_not_the_whole_tree_is_refused(given, error, words):
    tx = partitioned(hfjax.hessian_free(OBJECTIVE))
    state = tx.init(PARAMS)
    with pytest.raises(error, match=words):
        tx.update(GRADS, state, PARAMS, batch=BATCH, all_params=given())


def test_a_wrapper_that_masks_extra_arguments_as_well_is_named():
    tx = optax.masked(
        hfjax.hessian_free(OBJECTIVE),
        jax.tree.map(lambda _: True, PARAMS) | {"gain": False},
        mask_compatible_extra_args=True,
    )
    with pytest.raises(TypeError, match=r"\['gain'\] is masked.*is masked as well"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, batch=BATCH, all_params=PARAMS)


@pytest.mark.slow
def test_a_partition_is_checked_as_a_whole():
    bare = hfjax.Objective(model_fn, hfjax.losses.squared_error())
    tx = partitioned(hfjax.hessian_free(bare))
    grads = bare.value_and_grad(PARAMS, BATCH)[1]
    assert hfjax.verify.check(bare, tx, PARAMS, BATCH, grads) == []


@pytest.mark.slow
def test_an_optimizer_of_nnx_hands_all_parameters_and_a_tree_of_decays_on():
    nnx = pytest.importorskip("flax.nnx")
    from hfjax.flax import nnx_model_fn

    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    batch = jax.tree.map(lambda x: x.astype(jnp.float32), BATCH)
    pure = nnx.as_pure(nnx.state(model, nnx.Param))
    f = hfjax.Objective(
        nnx_model_fn(model),
        hfjax.losses.squared_error(),
        weight_decay=jax.tree.map(lambda p: 0.5 * (p.ndim > 1), pure),
    )
    options = {"backtracking": None, "line_search": None}
    hf = hfjax.hessian_free(f, damping=hfjax.damping.constant(0.0), **options)
    kinds = jax.tree.map(lambda p: "hf" if p.ndim > 1 else "other", pure)
    tx = optax.partition({"hf": hf, "other": optax.set_to_zero()}, kinds)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(3):
        params = nnx.state(model, nnx.Param)
        grads = f.value_and_grad(params, batch)[1]
        optimizer.update(model, grads, batch=batch, all_params=params)
    x, t = (np.asarray(leaf, np.float64) for leaf in batch)
    truth = np.linalg.solve(x.T @ x / 7 + 0.5 * np.eye(3), x.T @ t / 7)
    np.testing.assert_allclose(model.kernel[...], truth, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(model.bias[...], 0)


@pytest.mark.slow
def test_the_train_state_hands_all_parameters_on():
    pytest.importorskip("flax")
    from hfjax.flax import TrainState

    tx = partitioned(hfjax.hessian_free(OBJECTIVE))
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    new = state.apply_gradients(grads=GRADS, batch=BATCH)
    assert OBJECTIVE.value(new.params, BATCH) < OBJECTIVE.value(PARAMS, BATCH)
    assert_close(new.params["gain"], PARAMS["gain"])
