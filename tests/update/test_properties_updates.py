"""Whole updates, whatever comes: numbers of any size, NaN and infinity anywhere."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from reference import quick_jit
from strategies import arrays, like, nonfinite, scales, wild

import hfjax
from hfjax.update.state import Rejection

CASES = 4
F32, BF16, F64 = np.dtype(np.float32), np.dtype(jnp.bfloat16), np.dtype(np.float64)
MLP = {"first": [(2, 2), (2,)], "last": [(2, 2), (2,)]}


class Setting(NamedTuple):
    """An optimizer of options that are traced; shapes and dtypes of what it is given."""

    build: Callable
    dtypes: dict
    labels: bool = False


class Options(NamedTuple):
    """Numbers that a user may choose or schedule."""

    learning_rate: float = 1.0
    decrease: float = 0.5
    exponent: float = 0.75
    kappa: float = 0.0
    shrink: float = 0.5
    weight_decay: float = 0.0


class Inputs(NamedTuple):
    """What an update is given."""

    params: dict
    grads: dict
    direction: dict
    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    eval_weights: np.ndarray
    damping: float


def network(params, x):
    layers = [params["first"], params["last"]]
    return problems.mlp([tuple(layer) for layer in layers], x)


def default(options):
    objective = hfjax.Objective(
        network, hfjax.losses.squared_error(), weight_decay=options.weight_decay
    )
    tx = hfjax.hessian_free(
        objective,
        learning_rate=options.learning_rate,
        damping=hfjax.damping.levenberg_marquardt(decrease=options.decrease),
        solver=hfjax.cg.conjugate_gradient(max_iterations=8),
        preconditioner=hfjax.preconditioners.diagonal(
            exponent=options.exponent, kappa=options.kappa
        ),
        line_search=hfjax.linesearch.armijo(shrink=options.shrink, max_tries=20),
    )
    return objective, tx


def other_parts(options):
    objective = hfjax.Objective(
        network,
        hfjax.losses.softmax_cross_entropy_with_integer_labels(),
        weight_decay=options.weight_decay,
        microbatch_size=3,
    )
    tx = hfjax.hessian_free(
        objective,
        learning_rate=options.learning_rate,
        damping=hfjax.damping.levenberg_marquardt(
            decrease=options.decrease, matrix="curvature_diagonal"
        ),
        solver=hfjax.cg.conjugate_gradient(
            max_iterations=6,
            stopping=hfjax.stopping.martens_sutskever2012(),
            warm_start_from="chosen",
        ),
        preconditioner=hfjax.preconditioners.diagonal(
            hfjax.diagonals.ggn_rademacher, exponent=options.exponent
        ),
        backtracking=hfjax.backtracking.full_search(),
        line_search=hfjax.linesearch.armijo(shrink=options.shrink, max_tries=20),
    )
    return objective, tx


def within_a_region(options):
    objective = hfjax.Objective(
        network, hfjax.losses.sigmoid_cross_entropy(), weight_decay=options.weight_decay
    )
    tx = hfjax.hessian_free(
        objective,
        learning_rate=options.learning_rate,
        damping=hfjax.trust_region.radius(shrink=options.decrease),
        solver=hfjax.trust_region.steihaug_toint(max_iterations=8),
        preconditioner=hfjax.preconditioners.diagonal(
            exponent=options.exponent, kappa=options.kappa
        ),
        curvature=hfjax.curvature.hessian,
        line_search=None,
    )
    return objective, tx


def same(dtype):
    return {"first": dtype, "last": dtype}


SETTINGS = {
    "default": Setting(default, same(F32)),
    "other parts": Setting(other_parts, {"first": BF16, "last": F32}, labels=True),
    "trust region": Setting(within_a_region, same(F64)),
}
every_setting = pytest.mark.parametrize("name", list(SETTINGS))

unit = st.integers(0, 8).map(lambda k: k / 8)
options = st.builds(
    Options,
    learning_rate=st.one_of(st.sampled_from([1.0, 0.0]), scales(-6, 6)),
    decrease=unit.map(lambda x: 1 - x / 2),
    exponent=unit.map(lambda x: 1 - x),
    kappa=st.sampled_from([0.0, 1.0, 1e30]),
    shrink=unit.map(lambda x: 0.9 - 0.8 * x),
    weight_decay=st.one_of(st.just(0.0), scales(-30, 30)),
)
dampings = st.one_of(scales(-30, 30), st.sampled_from([np.inf, 0.0, np.nan]))
tame = st.builds(
    Inputs,
    like(MLP),
    like(MLP),
    like(MLP),
    arrays(CASES, 2),
    arrays(CASES, 2, elements=unit),
    arrays(CASES, elements=st.sampled_from([1.0, 0.0, 2.0, 0.5])),
    arrays(CASES, elements=st.sampled_from([1.0, 0.0, 2.0, 0.5])),
    scales(-3, 3),
)
FIELDS = Inputs._fields[:-1]
faults = st.lists(
    st.tuples(
        st.sampled_from(FIELDS),
        st.integers(0, 15),
        st.one_of(nonfinite, wild(), scales(-30, 30)),
        st.booleans(),
    ),
    max_size=3,
)


@np.errstate(over="ignore", invalid="ignore")
def spoiled(given, damping, faults):
    """Put numbers where they do not belong: one entry, or all of a field scaled."""
    fields = given._replace(damping=damping)._asdict()
    for field, place, value, scaled in faults:
        leaves, structure = jax.tree.flatten(fields[field])
        leaves = [leaf.copy() for leaf in leaves]
        if scaled and np.isfinite(value):
            leaves = [leaf * value for leaf in leaves]
        else:
            leaf = leaves[place % len(leaves)]
            leaf.flat[place % leaf.size] = value
        fields[field] = structure.unflatten(leaves)
    return Inputs(**fields)


@functools.cache
def program(name):
    setting = SETTINGS[name]

    def step(options, state, given, own_gradient):
        objective, tx = setting.build(options)
        batch = (given.inputs, given.targets, given.weights)
        eval_batch = (given.inputs, given.targets, given.eval_weights)
        grads = objective.value_and_grad(given.params, batch)[1]
        grads = jax.tree.map(
            lambda own, other: jnp.where(own_gradient, own, other), grads, given.grads
        )
        updates, state = tx.update(
            grads, state, given.params, batch=batch, eval_batch=eval_batch
        )
        params = optax.apply_updates(given.params, updates)
        values = [objective.value(p, eval_batch) for p in (given.params, params)]
        return updates, state, values

    return quick_jit(step)


@np.errstate(over="ignore", invalid="ignore")
def run(name, options, given, *, own_gradient, state=None):
    """Do an update in the setting's dtypes, from a state of this λ and direction."""
    setting = SETTINGS[name]

    def cast(tree):
        kinds = setting.dtypes
        return {key: [x.astype(kinds[key]) for x in tree[key]] for key in tree}

    params = cast(given.params)
    dtype = max(F32, *setting.dtypes.values(), key=lambda dtype: dtype.itemsize)
    if state is None:
        state = setting.build(Options())[1].init(jax.tree.map(jnp.asarray, params))
        direction = jax.tree.map(
            lambda x, like: x.astype(like.dtype), given.direction, state.direction
        )
        damping = np.asarray(given.damping, state.damping.dtype)
        state = state._replace(damping=damping, direction=direction)
    inputs, targets, weights, eval_weights = (x.astype(dtype) for x in given[3:7])
    if setting.labels:
        targets = (8 * targets[:, 0] % 3).astype(np.int32)  # Of two classes.
    data = (inputs, targets, weights, eval_weights)
    grads = cast(given.grads)
    cast_inputs = Inputs(params, grads, {}, *data, np.zeros(()))
    options = Options(*(np.asarray(option, dtype) for option in options))
    out = program(name)(options, state, cast_inputs, own_gradient)
    check(params, state, *out)
    assert name != "trust region" or out[1].damping > 0
    if not own_gradient:
        entries = [x.astype(float).ravel() for x in jax.tree.leaves(grads)]
        norm = np.linalg.norm(np.concatenate(entries))
        rejection = out[1].info.rejection
        zero, broken = Rejection.ZERO_GRADIENT, Rejection.NONFINITE_GRADIENT
        assert (rejection != broken) == (norm < float(jnp.finfo(dtype).max))
        assert rejection == zero or norm != 0
    return out[1]


def check(params, before, updates, state, values):
    info = state.info
    numbers = jax.tree.leaves((updates, state))
    assert all(np.all(np.isfinite(np.asarray(x, np.float64))) for x in numbers)
    for new, old in ((updates, params), (state, before)):
        assert jax.tree.structure(new) == jax.tree.structure(old)
        kinds = [[(x.shape, x.dtype) for x in jax.tree.leaves(t)] for t in (new, old)]
        assert kinds[0] == kinds[1]
    assert state.count == before.count + 1
    if before.damping != 0:  # Where it may stay; a caller alone can set it so.
        assert state.damping > 0
    accepted = info.rejection == Rejection.NONE
    assert info.accepted == accepted
    if not accepted:
        assert not any(np.any(x) for x in jax.tree.leaves(updates))
        assert not any(np.any(x) for x in jax.tree.leaves(state.direction))
        return
    assert info.value_after <= info.value_before
    # The same sums again, elsewhere in the program: they may round otherwise.
    noise = 64 * float(jnp.finfo(info.value_before.dtype).eps)
    old, new = (float(value) for value in values)
    assert new <= old + noise * abs(old)


ZEROS = {key: [np.zeros(shape) for shape in shapes] for key, shapes in MLP.items()}
EMPTY = np.zeros((CASES, 2))
NOTHING = Inputs(ZEROS, ZEROS, ZEROS, EMPTY, EMPTY, np.ones(CASES), np.ones(CASES), 1.0)


@every_setting
@example(own_gradient=True, given=NOTHING, options=Options(), damping=0.0, faults=[])
@given(
    own_gradient=st.booleans(),
    given=tame,
    options=options,
    damping=dampings,
    faults=faults,
)
def test_no_update_is_bad_whatever_it_is_given(
    name, own_gradient, given, options, damping, faults
):
    bad = spoiled(given, damping, faults)
    state = run(name, options, bad, own_gradient=own_gradient)
    # What it leaves behind must do for the next, with nothing wrong.
    run(name, Options(), given, own_gradient=True, state=state)
