"""Optax's wrappers around the optimizer: those that work, and what the others say.

`docs/faults.md` has the table of the latter.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import training
from optax import contrib
from problems import Problem
from reference import counted_jit, flat, quick_jit

import hfjax


def model_fn(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


OBJECTIVE = hfjax.Objective(model_fn, hfjax.losses.squared_error())
PARAMS = {"hidden": normal(0, 3, 4), "out": normal(1, 4, 2)}
BATCH = (normal(2, 10, 3), normal(3, 10, 2))
GRADS = OBJECTIVE.value_and_grad(PARAMS, BATCH)[1]
FROZEN = {"hidden": True, "out": False}

PARTS = {
    "damping": hfjax.damping.levenberg_marquardt(),
    "preconditioner": None,
    "solver": hfjax.cg.conjugate_gradient(max_iterations=3),
}
SMALL = functools.partial(hfjax.hessian_free, OBJECTIVE, **PARTS)


@functools.cache
def small_update():
    return quick_jit(SMALL().update)


@functools.cache
def whole_step():
    return small_update()(GRADS, SMALL().init(PARAMS), PARAMS, batch=BATCH)[0]


assert_close = functools.partial(reference.assert_close, rtol=1e-5, atol=1e-8)


def times(factor, tree):
    return jax.tree.map(lambda x: factor * x, tree)


# Each does something to the step, so that it is seen to have had its turn.
HALF = optax.scale(0.5)
WRAPPERS = {
    "chain": lambda tx: optax.chain(tx, HALF),
    "named_chain": lambda tx: optax.named_chain(("hf", tx), ("half", HALF)),
    "apply_if_finite": lambda tx: optax.chain(optax.apply_if_finite(tx, 3), HALF),
    "partition": lambda tx: optax.chain(
        optax.partition({"all": tx}, lambda tree: jax.tree.map(lambda _: "all", tree)),
        HALF,
    ),
    "masked": lambda tx: optax.chain(optax.masked(tx, True), HALF),
    "conditionally_transform": lambda tx: optax.chain(
        optax.conditionally_transform(tx, lambda count: count >= 0), HALF
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapper_forwards_the_batch_and_the_step(wrapper):
    tx = WRAPPERS[wrapper](SMALL())
    update = quick_jit(tx.update)
    updates, state = update(GRADS, tx.init(PARAMS), PARAMS, batch=BATCH)
    assert_close(updates, times(0.5, whole_step()))
    assert hfjax.diagnostics.scalars(state)["accepted"]


FREEZERS = {
    "freeze": optax.freeze(FROZEN),
    "selective_transform": optax.selective_transform(
        optax.identity(), freeze_mask=FROZEN
    ),
}


@pytest.mark.parametrize("freezer", FREEZERS)
def test_a_freezer_after_the_optimizer_takes_frozen_leaves_out_of_the_step(freezer):
    freeze = FREEZERS[freezer]
    updates, _ = freeze.update(whole_step(), freeze.init(PARAMS), PARAMS)
    tx = optax.chain(SMALL(), freeze)
    chained, _ = quick_jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS, batch=BATCH)
    assert_close(chained, updates)
    np.testing.assert_array_equal(chained["hidden"], 0)
    assert_close(chained["out"], whole_step()["out"])


@pytest.mark.slow
def test_parameters_closed_over_leave_the_reduced_system_a_freezer_the_whole_one():
    # What `docs/faults.md` says in the row of masks: 12 parameters, of which 8 train.
    rng = np.random.default_rng(4)
    wide = {"hidden": rng.standard_normal((2, 2)), "out": rng.standard_normal((2, 4))}
    params = jax.tree.map(jnp.asarray, wide)
    batch = (jnp.asarray(rng.standard_normal((6, 2))), jnp.ones((6, 4)))
    problem = Problem("frozen", params, model_fn, "squared_error", batch)
    a = reference.ggn(problem) + 0.5 * np.eye(12)
    gradient = reference.gradient(problem)

    def step(model_fn, params, after):
        objective = hfjax.Objective(model_fn, hfjax.losses.squared_error())
        hf = hfjax.hessian_free(
            objective,
            damping=hfjax.damping.constant(0.5),
            solver=hfjax.cg.conjugate_gradient(max_iterations=24, stopping=None),
            preconditioner=None,
            backtracking=None,
            line_search=None,
        )
        tx = optax.chain(hf, after)
        return flat(training.one_update(objective, tx, params, batch)[0])

    whole = step(model_fn, params, FREEZERS["freeze"])
    truth = np.where(np.arange(12) < 4, 0, np.linalg.solve(a, -gradient))
    np.testing.assert_allclose(whole, truth, rtol=1e-9, atol=1e-12)

    def closed(out, x):
        return model_fn({**params, "out": out}, x)

    reduced = step(closed, params["out"], optax.identity())
    truth = np.linalg.solve(a[4:, 4:], -gradient[4:])
    np.testing.assert_allclose(reduced, truth, rtol=1e-9)
    assert np.max(np.abs(whole[4:] - reduced)) > 0.01 * np.max(np.abs(reduced))


def test_damping_and_every_field_can_be_read_and_set_by_name_inside_a_chain():
    tx = optax.chain(SMALL(), HALF)
    state = tx.init(PARAMS)
    assert optax.tree.get(state, "damping") == 1.0
    for name in hfjax.HessianFreeInfo._fields:
        optax.tree.get(state, name)  # Raises if a name occurs twice.
    high = optax.tree.set(state, damping=jnp.float32(1e4))
    updates, _ = small_update()(GRADS, high[0], PARAMS, batch=BATCH)
    # (G + λI) δ = −∇f, with λ far above G.
    steepest = flat(times(-1e-4, GRADS))
    size = np.max(np.abs(steepest))
    np.testing.assert_allclose(flat(updates), steepest, atol=1e-2 * size)


# Hyperparameters.

INJECTED = functools.partial(
    optax.inject_hyperparams(
        hfjax.hessian_free, static_args=("curvature",), hyperparam_dtype=jnp.float32
    ),
    OBJECTIVE,
    **PARTS,
)


def test_injected_learning_rate_follows_its_schedule():
    tx = INJECTED(learning_rate=optax.linear_schedule(0.5, 0.0, 2))
    update, traced = counted_jit(tx.update)
    updates, state = update(GRADS, tx.init(PARAMS), PARAMS, batch=BATCH)
    assert_close(updates, times(0.5, whole_step()))
    _, state = update(GRADS, state, PARAMS, batch=BATCH)
    assert state.hyperparams["learning_rate"] == 0.25
    assert len(traced) == 1


def test_injected_learning_rate_is_set_by_hand():
    tx = INJECTED(learning_rate=1.0)
    update, traced = counted_jit(tx.update)
    state = tx.init(PARAMS)
    updates, _ = update(GRADS, state, PARAMS, batch=BATCH)
    assert_close(updates, whole_step())
    state.hyperparams["learning_rate"] = jnp.float32(0.125)
    updates, _ = update(GRADS, state, PARAMS, batch=BATCH)
    assert_close(updates, times(0.125, whole_step()))
    assert len(traced) == 1


@pytest.mark.slow
def test_injected_constant_damping_is_read_in_every_update():
    @optax.inject_hyperparams
    def make(damping):
        return SMALL(damping=hfjax.damping.constant(damping))

    tx = make(optax.linear_schedule(1.0, 100.0, 1))
    update = quick_jit(tx.update)
    loose, state = update(GRADS, tx.init(PARAMS), PARAMS, batch=BATCH)
    tight, _ = update(GRADS, state, PARAMS, batch=BATCH)
    assert optax.tree.norm(tight) < 0.1 * optax.tree.norm(loose)


def test_an_injected_first_radius_is_adapted_from_there_on():
    @optax.inject_hyperparams
    def make(init):
        return hfjax.hessian_free(
            OBJECTIVE,
            solver=hfjax.trust_region.steihaug_toint(max_iterations=4),
            damping=hfjax.trust_region.radius(init=init),
            preconditioner=None,
            line_search=None,
        )

    tx = make(jnp.float32(0.01))
    update = quick_jit(tx.update)
    updates, state = update(GRADS, tx.init(PARAMS), PARAMS, batch=BATCH)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.01, rtol=1e-5)
    assert optax.tree.get(state, "damping") == pytest.approx(0.015)
    # The state, not the option, holds the radius that has been adapted.
    updates, _ = update(GRADS, state, PARAMS, batch=BATCH)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.015, rtol=1e-5)


@pytest.mark.parametrize("told", [None, jnp.float32])
def test_injected_numbers_are_as_wide_as_they_are_told_to_be(told):
    make = optax.inject_hyperparams(
        hfjax.hessian_free, static_args="curvature", hyperparam_dtype=told
    )
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    state = jax.eval_shape(make(OBJECTIVE, learning_rate=0.9).init, params)
    assert state.hyperparams["learning_rate"].dtype == (told or jnp.bfloat16)
    assert state.inner_state.damping.dtype == jnp.float32


STATIC = r"`objective` must be .* got int32\[\].* `static_args=\"curvature\"`"


def by_iterations(max_iterations):
    solver = hfjax.cg.conjugate_gradient(max_iterations=max_iterations)
    return hfjax.hessian_free(OBJECTIVE, solver=solver)


@pytest.mark.parametrize(
    ("factory", "options", "static", "words"),
    [
        # Optax calls what is callable as a schedule, with the count.
        (hfjax.hessian_free, (OBJECTIVE,), "curvature", STATIC),
        (hfjax.scale_by_hessian_free, (OBJECTIVE,), "curvature", STATIC),
        (
            by_iterations,
            (5,),
            "max_iterations",
            "`max_iterations` must be a Python integer.* list it in `static_args`",
        ),
    ],
)
def test_an_option_that_cannot_be_injected_is_static(factory, options, static, words):
    with pytest.raises(TypeError, match=words):
        jax.eval_shape(optax.inject_hyperparams(factory)(*options).init, PARAMS)
    static = optax.inject_hyperparams(factory, static_args=static)(*options)
    assert "inner_state" in jax.eval_shape(static.init, PARAMS)._fields


# Accumulation.


def test_multi_steps_forwards_the_batch_and_solves_for_the_mean_gradient():
    tx = optax.MultiSteps(SMALL(), 2)
    update = quick_jit(tx.update)
    state = tx.init(PARAMS)
    first, state = update(times(1.5, GRADS), state, PARAMS, batch=BATCH)
    second, state = update(times(0.5, GRADS), state, PARAMS, batch=BATCH)
    np.testing.assert_array_equal(flat(first), 0)
    assert_close(second, whole_step())
    assert hfjax.diagnostics.scalars(state)["count"] == 1


# Optax's line searches.

WIDE = jax.tree.map(lambda x: x.astype(jnp.float64), (PARAMS, BATCH))
DIRECTION = hfjax.scale_by_hessian_free(
    OBJECTIVE,
    preconditioner=None,
    backtracking=None,
    solver=hfjax.cg.conjugate_gradient(max_iterations=3),
)
SEARCHES = {
    # From a step far too long, so that there is something to find.
    "backtracking": optax.scale_by_backtracking_linesearch(
        15, max_learning_rate=50.0, increase_factor=50.0, store_grad=True
    ),
    "zoom": optax.scale_by_zoom_linesearch(15),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SEARCHES)
def test_a_line_search_of_optax_goes_along_the_direction_and_lowers_f(name):
    params, batch = WIDE
    tx = optax.chain(DIRECTION, optax.scale(-1.0), SEARCHES[name])
    value_and_grad = optax.value_and_grad_from_state(OBJECTIVE.value)

    def step(params, state):
        value, grad = value_and_grad(params, batch, state=state)
        # The parameter `batch` of `Objective.value` is what lets the search have it.
        updates, state = tx.update(
            grad,
            state,
            params,
            value=value,
            grad=grad,
            value_fn=OBJECTIVE.value,
            batch=batch,
        )
        return optax.apply_updates(params, updates), state, updates, grad

    step, traced = counted_jit(step)
    # Optax's start is weakly typed: one program for it, and another for what follows.
    state = jax.tree.map(lambda x: x.astype(x.dtype), tx.init(params))
    before = OBJECTIVE.value(params, batch)
    for _ in range(4):
        params, state, updates, grad = step(params, state)
        # Without backtracking the solution itself is the step.
        alpha = optax.tree.get(state, "learning_rate")
        assert_close(updates, times(alpha, state[0].direction))
        after = OBJECTIVE.value(params, batch)
        assert after < before + 1e-4 * optax.tree.vdot(updates, grad)
        np.testing.assert_allclose(optax.tree.get(state, "value"), after, rtol=1e-12)
        before = after
    assert len(traced) == 1
    assert hfjax.diagnostics.scalars(state)["count"] == 4
    # Both have an `info`: it is the line search's to get in the way.
    with pytest.raises(KeyError, match="Found multiple values for 'info'"):
        optax.tree.get(state, "info")


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize(
    ("value_fn", "extra", "unnamed"),
    [
        (lambda params: OBJECTIVE.value(params, BATCH), {}, "batch"),
        (lambda params, **data: OBJECTIVE.value(params, **data), {}, "batch"),
        (OBJECTIVE.value, {"eval_batch": BATCH}, "eval_batch"),
    ],
)
def test_a_line_search_refuses_what_value_fn_does_not_name(
    name, value_fn, extra, unnamed
):
    tx = optax.chain(DIRECTION, optax.scale(-1.0), SEARCHES[name])
    extra = {"value": jnp.float32(1.0), "grad": GRADS, "batch": BATCH, **extra}
    with pytest.raises(
        TypeError, match=rf"not consumed by `value_fn`: \['{unnamed}'\]"
    ):
        jax.eval_shape(
            functools.partial(tx.update, value_fn=value_fn, **extra),
            GRADS,
            tx.init(PARAMS),
            PARAMS,
        )


# What cannot work says what to do instead.


def traced(tx, params=PARAMS, grads=GRADS, **extra):
    """Trace `init` and `update`, which is where these errors are raised."""
    state = jax.eval_shape(tx.init, params)
    return jax.eval_shape(functools.partial(tx.update, **extra), grads, state, params)


HOLES = {
    "masked": lambda tx: optax.masked(tx, FROZEN),
    "partition": lambda tx: optax.partition(
        {"hf": tx, "frozen": optax.set_to_zero()}, {"hidden": "hf", "out": "frozen"}
    ),
    "selective_transform": lambda tx: optax.selective_transform(
        tx, freeze_mask={"hidden": False, "out": True}
    ),
}


@pytest.mark.parametrize("wrapper", HOLES)
def test_masked_parameters_need_all_of_them_beside(wrapper):
    words = (
        r"params\['out'\] is masked.*`all_params` is missing: call `tx.update\(grads, "
        r"state, params, batch=batch, all_params=params\)`.*close over the rest"
    )
    with pytest.raises(TypeError, match=words):
        traced(HOLES[wrapper](SMALL()), batch=BATCH)
    updates, _ = traced(HOLES[wrapper](SMALL()), batch=BATCH, all_params=PARAMS)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize("call", ["update", "value", "value_and_grad", "ggn"])
def test_masked_parameters_are_refused_wherever_they_come_in(call):
    tx, holed = SMALL(), {**PARAMS, "out": optax.MaskedNode()}
    calls = {
        "update": lambda: tx.update(GRADS, tx.init(PARAMS), holed, batch=BATCH),
        "value": lambda: OBJECTIVE.value(holed, BATCH),
        "value_and_grad": lambda: OBJECTIVE.value_and_grad(holed, BATCH),
        "ggn": lambda: hfjax.curvature.ggn(OBJECTIVE, holed, BATCH),
    }
    with pytest.raises(TypeError, match=r"params\['out'\] is masked"):
        calls[call]()


def test_a_flattened_vector_of_parameters_is_noted_beside_the_models_own_error():
    with pytest.raises(TypeError) as error:
        traced(optax.flatten(SMALL()), batch=BATCH)
    (note,) = [note for note in error.value.__notes__ if "hfjax" in note]
    assert "params float32[20]" in note
    assert "If `optax.flatten` made one vector of `params`, leave it out." in note


def test_a_model_that_fails_on_a_tree_hears_nothing_of_flatten():
    with pytest.raises(TypeError) as error:
        OBJECTIVE.value(PARAMS, (BATCH[1], BATCH[0]))
    assert not any("flatten" in note for note in error.value.__notes__)


LOOKAHEAD = optax.LookaheadParams.init_synced(PARAMS)
DROPPING = {
    "MultiSteps": (
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        PARAMS,
        r"`MultiSteps\(\.\.\.\)\.gradient_transformation\(\)` \(take "
        r"`Objective\(microbatch_size=\.\.\.\)`",
    ),
    "lookahead": (
        lambda tx: optax.lookahead(tx, 5, 0.5),
        LOOKAHEAD,
        "`optax.lookahead`, .*leave them out",
    ),
    "split_real_and_imaginary": (
        contrib.split_real_and_imaginary,
        PARAMS,
        "`optax.contrib.split_real_and_imaginary` .leave them out",
    ),
}


@pytest.mark.parametrize("wrapper", DROPPING)
def test_a_wrapper_that_drops_the_batch_is_named_with_its_cure(wrapper):
    wrap, params, words = DROPPING[wrapper]
    with pytest.raises(TypeError, match="`batch` is missing: .*" + words):
        traced(optax.chain(wrap(SMALL())), params, batch=BATCH)


@pytest.mark.parametrize("opaque_mode", [False, True])
def test_sharpness_aware_minimisation_is_named_too(opaque_mode):
    # It takes `grad_fn` alone, in a chain too.
    tx = contrib.sam(SMALL(), optax.sgd(0.1), opaque_mode=opaque_mode)
    with pytest.raises(TypeError, match=r"`batch` is missing: .*`optax\.contrib\.sam`"):
        traced(tx, grad_fn=lambda params, _: GRADS)
    with pytest.raises(TypeError, match="unexpected keyword argument 'batch'"):
        traced(optax.chain(tx), batch=BATCH)


def test_the_train_state_of_flax_is_named_with_ours_as_its_cure():
    train_state = pytest.importorskip("flax.training.train_state")
    state = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=SMALL())
    words = r"Flax's `TrainState` \(take `hfjax\.flax\.TrainState`\)"
    with pytest.raises(TypeError, match="`batch` is missing: .*" + words):
        state.apply_gradients(grads=GRADS, batch=BATCH)


CHANGING = {
    "schedule_free": lambda tx: contrib.schedule_free(tx, 1.0),
    "mechanize": contrib.mechanize,
}


@pytest.mark.parametrize("wrapper", CHANGING)
def test_a_wrapper_that_applies_another_step_hands_the_batch_on(wrapper):
    updates, _ = traced(CHANGING[wrapper](SMALL()), batch=BATCH)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)
