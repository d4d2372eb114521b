"""Kronecker factors on many devices: activations stay where they are, work is dealt out.

Read from the compiled program of P⁻¹v.
"""

import functools
import math

import collectives
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mapped import DEVICES, mesh, needs_devices
from problems import Problem, layers, normal
from reference import flat, quick_jit
from test_sharded_params import LAYOUTS, model_fn

from benchmarks.micro.programs import called, instructions, loop_of, loops
from hfjax import preconditioners
from hfjax.preconditioners import _inverses

pytestmark = needs_devices
WIDTH, DEPTH, CASES = 8, 4, 2048
TAKEN = CASES // 2


def problem():
    rng = np.random.default_rng(5)
    weights = jnp.asarray(rng.uniform(0.5, 2, CASES))
    batch = (normal(rng, CASES, WIDTH), normal(rng, CASES, WIDTH), weights)
    params = layers(rng, *[WIDTH] * (DEPTH + 1))
    return Problem("deep", params, model_fn, "squared_error", batch, 0.01)


PROBLEM = problem()
# Sharded parameters over automatic axes first, where the compiler has most to decide.
every_layout = pytest.mark.parametrize(
    ("kind", "sharded"), sorted(LAYOUTS, key=lambda layout: not layout[1])
)


def apply(params, batch, v):
    rule = preconditioners.kronecker(cases=TAKEN)
    key, objective = jax.random.key(4), PROBLEM.objective()
    return rule.build(objective, params, batch, jnp.float64(0.3), key)(v)


@functools.cache
def compiled(kind, sharded, large=_inverses.LARGE):
    """Return the program and what it finds; matrices of more than `large` are alone."""
    here = mesh(kind)
    cases = NamedSharding(here, PartitionSpec("cases"))
    layout = cases if sharded else NamedSharding(here, PartitionSpec())
    params, v = jax.device_put((PROBLEM.params, PROBLEM.direction), layout)
    given = params, jax.device_put(PROBLEM.batch, cases), v
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_inverses, "LARGE", large)
        patch.setattr(_inverses, "_TINY", min(large, _inverses._TINY))
        # JAX remembers what it has traced by function.
        program = quick_jit(functools.partial(apply)).lower(*given).compile()
    return program.as_text(), np.asarray(flat(jax.device_get(program(*given))))


@functools.cache
def on_one_device():
    given = PROBLEM.params, PROBLEM.batch, PROBLEM.direction
    return np.asarray(flat(quick_jit(apply)(*given)))


@every_layout
def test_nothing_as_large_as_the_units_of_a_layer_is_gathered_or_moved(kind, sharded):
    text, found = compiled(kind, sharded)
    np.testing.assert_allclose(found, on_one_device(), rtol=1e-11, atol=1e-13)
    moved = [one for one in collectives.read(text) if one.kind != "all-reduce"]
    sizes = [sum(math.prod(dims) for _, dims in one.shapes) for one in moved]
    # A device's own share of the units, for the examples that the factors are built on.
    assert max(sizes, default=0) < TAKEN * WIDTH // DEVICES


@every_layout
def test_equal_matrices_are_inverted_once_dealt_out_over_the_devices(kind, sharded):
    text, _ = compiled(kind, sharded)
    (body,) = {loop_of(text)(name) for name in factorisations(text)}
    # On a CPU, a loop goes through the matrices of a device: two for each layer in all.
    assert loops(text)[body].trips == 2 * DEPTH // DEVICES


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_large_matrices_go_to_one_device_each(kind):
    text, found = compiled(kind, True, large=0)
    np.testing.assert_allclose(found, on_one_device(), rtol=1e-11, atol=1e-13)
    branches = {
        name
        for _, _, opcode, line in instructions(text)
        if opcode == "conditional"
        for _, names in called(line)
        for name in names
    }
    alone = factorisations(text)
    assert len(alone) == 2 * DEPTH
    assert set(alone) <= branches


def factorisations(text):
    """Return the computation of each Cholesky factorisation."""
    return [name for name, _, _, line in instructions(text) if "potrf" in line]
