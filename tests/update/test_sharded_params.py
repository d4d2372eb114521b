"""Parameters sharded over the devices: the same updates, and no more sent than must be.

Read from the compiled program: what the model must gather, as it is run with whole
weights, and nothing beside.
"""

import functools
import math

import collectives
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mapped import DEVICES, mesh, needs_devices
from problems import Problem, layers, mlp, normal
from reference import flat, quick_jit

import hfjax
from benchmarks.micro.programs import loops

pytestmark = needs_devices
UPDATES = 10
CASES = 64  # So many that it takes less to send the weights than what units hold.


def model_fn(params, x):
    return mlp(jax.tree.map(whole, params), x)


def whole(leaf):
    """Gather a leaf whose sharding is part of its type, as a model must ask for then."""
    sharding = jax.typeof(leaf).sharding
    if not any(sharding.spec):
        return leaf
    return jax.sharding.reshard(leaf, sharding.update(spec=PartitionSpec()))


def problem():
    rng = np.random.default_rng(3)
    weights = jnp.linspace(0.2, 2, CASES).at[16:32].set(0)  # A device's whole share.
    batch = (normal(rng, CASES, 4), normal(rng, CASES, 4), weights)
    params = layers(rng, 4, 8, 12, 4)
    return Problem("sharded", params, model_fn, "squared_error", batch, 0.01)


PROBLEM = problem()
SIZE = sum(leaf.size for leaf in jax.tree.leaves(PROBLEM.params))
TX_OPTIONS = {
    "damping": hfjax.damping.levenberg_marquardt(init=1.0),
    "solver": hfjax.cg.conjugate_gradient(
        max_iterations=8,
        stopping=hfjax.stopping.martens_sutskever2012(1e-2, minimum_window=2),
        keep=hfjax.iterates.grid(),
        warm_start_decay=0.95,
    ),
    "preconditioner": hfjax.preconditioners.diagonal(),
}


def step_of(objective):
    tx = hfjax.hessian_free(objective, **TX_OPTIONS)
    return tx, functools.partial(training.train_step, objective, tx)


def train(tx, step, params, batch):
    state, told = tx.init(params), []
    for _ in range(UPDATES):
        params, state = step(params, state, batch)
        told.append((state.info.value_after, state.damping, state.info.cg_iterations))
    return params, state, np.asarray(told)


@functools.cache
def on_one_device():
    tx, step = step_of(PROBLEM.objective())
    params, _, told = train(tx, quick_jit(step), PROBLEM.params, PROBLEM.batch)
    return flat(params), told


LAYOUTS = [
    (kind, sharded)
    for kind in (AxisType.Auto, AxisType.Explicit)
    for sharded in (False, True)
]
every_layout = pytest.mark.parametrize(
    ("kind", "sharded"),
    LAYOUTS,
    ids=[f"{kind.name}-{'sharded' if s else 'replicated'}" for kind, s in LAYOUTS],
)


@functools.cache
def trained(kind, sharded):
    """Compile one update; train with it. Return parameters, state, course, program."""
    here = mesh(kind)
    return trained_on(here, PartitionSpec("cases") if sharded else PartitionSpec())


def trained_on(here, spec):
    layout = jax.tree.map(
        lambda leaf: NamedSharding(here, PartitionSpec(*spec[: leaf.ndim])),
        PROBLEM.params,
    )
    params = jax.device_put(PROBLEM.params, layout)
    cases = NamedSharding(here, PartitionSpec("cases"))
    batch = jax.device_put(PROBLEM.batch, cases)
    tx, step = step_of(PROBLEM.objective())
    compiled = quick_jit(step).lower(params, tx.init(params), batch).compile()
    return *train(tx, compiled, params, batch), compiled.as_text()


@pytest.mark.slow
@every_layout
def test_ten_updates_are_those_of_one_device(kind, sharded):
    params, _, told, _ = trained(kind, sharded)
    right_params, right = on_one_device()
    np.testing.assert_allclose(told, right, rtol=1e-12)
    np.testing.assert_allclose(
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)]),
        right_params,
        rtol=1e-12,
        atol=1e-12,
    )


@functools.cache
def trained_in_a_square(*spec):
    here = mesh(axes=("cases", "model"), shape=(2, 2))
    return trained_on(here, PartitionSpec(*spec))


@pytest.mark.slow
@pytest.mark.parametrize("spec", [("model",), ("cases", "model")])
def test_vectors_may_lie_over_some_of_the_devices_or_be_cut_both_ways(spec):
    # Two pairs of devices have half of the cases each.
    params, state, told, _ = trained_in_a_square(*spec)
    np.testing.assert_allclose(told, on_one_device()[1], rtol=1e-12)
    for leaf in jax.tree.leaves((params, state.direction)):
        parts = 2 ** len(spec[: leaf.ndim])
        assert parts * leaf.addressable_shards[0].data.size == leaf.size


@every_layout
def test_parameters_and_state_stay_as_they_were_laid_out(kind, sharded):
    params, state, _, _ = trained(kind, sharded)
    for leaf in jax.tree.leaves((params, state.direction)):
        share = leaf.addressable_shards[0].data.size * (DEVICES if sharded else 1)
        assert share == leaf.size


def read(kind, sharded):
    """Return the collectives of the update, and those of an iteration of CG."""
    text = trained(kind, sharded)[-1]
    sent = collectives.read(text)
    # CG is the only loop within a loop: it runs once more, if need be, from zero.
    (inner,) = [body for body, loop in loops(text).items() if loop.parent]
    return sent, [one for one in sent if one.loop == inner]


def entries(sent, *kinds):
    """Return how many entries of arrays are sent, and how many scalars."""
    shapes = [dims for one in sent if one.kind in kinds for _, dims in one.shapes]
    arrays = [math.prod(dims) for dims in shapes if dims]
    return sum(arrays), len(shapes) - len(arrays)


def sums(sent):
    return entries(sent, "all-reduce", "reduce-scatter")


@every_layout
def test_a_product_sums_one_vector_over_the_devices(kind, sharded):
    _, iteration = read(kind, sharded)
    vectors, scalars = sums(iteration)
    assert vectors == SIZE
    # Sums of each leaf (pᵀAp, rᵀy and ‖r‖², whether x is finite) where leaves are cut.
    assert scalars <= (4 * len(jax.tree.leaves(PROBLEM.params)) if sharded else 0)


@every_layout
def test_an_update_sums_gradient_diagonal_and_products_only(kind, sharded):
    sent, iteration = read(kind, sharded)
    outside = [one for one in sent if one not in iteration]
    # Of the gradient, the Fisher's diagonal, and the product with the start x₀.
    assert sums(outside)[0] == 3 * SIZE


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_nothing_is_gathered_where_parameters_are_replicated(kind):
    sent, _ = read(kind, sharded=False)
    assert {one.kind for one in sent} == {"all-reduce"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters_are_gathered_by_the_model_alone(kind):
    sent, iteration = read(kind, sharded=True)
    assert {one.kind for one in sent} == {"all-reduce", "all-gather"}
    # A product gathers its v, once: θ was gathered when the model was linearised.
    assert entries(iteration, "all-gather") == (SIZE, 0)
    # In the other loops, each one evaluation gathers θ + δ, and the product with x₀ that;
    # before them gradient, linearisation, diagonal and f(θ), θ, some of it in common.
    for loop in {one.loop for one in sent} - {None}:
        inside = [one for one in sent if one.loop == loop]
        assert entries(inside, "all-gather") == (SIZE, 0)
    before = [one for one in sent if one.loop is None]
    assert entries(before, "all-gather")[0] <= 4 * SIZE


@pytest.mark.slow
def test_dots_do_not_gather_leaves_that_are_cut_both_ways():
    # As `jnp.vdot` would, which ravels; the model gathers each leaf, or what units hold.
    text = trained_in_a_square("cases", "model")[-1]
    (inner,) = [body for body, loop in loops(text).items() if loop.parent]
    gathers = [
        one
        for one in collectives.read(text)
        if one.loop == inner and one.kind == "all-gather"
    ]
    assert 0 < len(gathers) <= len(jax.tree.leaves(PROBLEM.params))
