"""Vectors in few arrays: what lies beside what, and back again unchanged."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mapped import DEVICES, needs_devices

import hfjax
from hfjax._core import packing as _packing
from hfjax._core.packing import packing

RNG = np.random.default_rng(0)
LARGE = (257, 256)  # 256 numbers more than are packed.


def normal(*shape, dtype="float64"):
    return jnp.asarray(RNG.standard_normal(shape), dtype)


TREES = {
    "one": normal(3, 2),
    "scalar": {"a": normal(), "b": normal(4)},
    "two_types": [normal(3, 2), normal(5, dtype="float32"), normal(2), normal(1)],
    "large": {"small": normal(4), "w": normal(*LARGE), "z": normal(2, 2)},
    "empty": {"none": normal(0, 3), "some": normal(2), "more": normal(3)},
    "nothing": {},
}


@pytest.mark.parametrize("name", TREES)
def test_what_is_packed_is_unpacked_as_it_was(name):
    tree = TREES[name]
    packed = packing(tree)
    chex.assert_trees_all_equal(packed.unpack(packed.pack(tree)), tree)
    total = sum(x.size for x in packed.pack(tree))
    assert total == sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("one", [(6,)]),
        ("scalar", [(5,)]),
        ("two_types", [(9,), (5,)]),
        ("large", [(8,), (257 * 256,)]),
    ],
)
def test_small_leaves_of_a_type_lie_in_one_array_and_large_ones_apart(name, shapes):
    tree = TREES[name]
    assert [x.shape for x in packing(tree).pack(tree)] == shapes


def test_a_leaf_of_the_largest_small_size_is_packed():
    tree = [normal(_packing.SMALL), normal(1)]
    assert len(packing(tree).pack(tree)) == 1
    tree = [normal(_packing.SMALL + 1), normal(1)]
    assert len(packing(tree).pack(tree)) == 2


def test_the_gradient_through_unpacking_is_laid_end_to_end():
    tree = TREES["scalar"]
    packed = packing(tree)

    def value(x):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(packed.unpack(x)))

    (gradient,) = jax.grad(value)(packed.pack(tree))
    np.testing.assert_allclose(gradient, np.cos(packed.pack(tree)[0]))
    program = str(jax.make_jaxpr(jax.grad(value))(packed.pack(tree)))
    assert "concatenate" in program
    assert "pad[" not in program


@needs_devices
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_what_may_lie_over_devices_stays_apart(kind):
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(kind,))
    cut = NamedSharding(mesh, PartitionSpec("x"))
    whole = NamedSharding(mesh, PartitionSpec())
    tree = {
        "a": jax.device_put(normal(DEVICES), cut),
        "b": jax.device_put(normal(3), whole),
        "c": jax.device_put(normal(2), whole),
    }

    def arrays(tree):
        counts.append(len(packing(tree).pack(tree)))
        return packing(tree).unpack(packing(tree).pack(tree))

    counts = []
    back = jax.jit(arrays)(tree)
    # Of an Auto axis the type does not say whether a leaf is cut.
    assert counts == [3 if kind == AxisType.Auto else 2]
    assert back["a"].sharding.is_equivalent_to(cut, 1)


@pytest.mark.parametrize("layers", [1, 6])
def test_a_solver_sees_as_many_arrays_however_many_layers_there_are(layers):
    seen = []

    def model_fn(params, x):
        for w, b in params:
            x = jnp.tanh(x @ w + b[None])
        return x

    def spy(system, x0):
        seen.append([x.shape for x in jax.tree.leaves(system.b)])
        product = system.matvec(system.b)
        seen.append([x.shape for x in jax.tree.leaves(product)])
        seen.append([x.shape for x in system.preconditioner()(product)])
        return solver.solve(system, x0)

    objective = hfjax.Objective(model_fn, hfjax.losses.squared_error())
    solver = hfjax.cg.conjugate_gradient(max_iterations=1)
    tx = hfjax.hessian_free(
        objective,
        solver=solver._replace(solve=spy),
        preconditioner=hfjax.preconditioners.diagonal(),
    )
    params = [(normal(2, 2), normal(2)) for _ in range(layers)]
    batch = (normal(3, 2), normal(3, 2))
    shapes = jax.eval_shape(
        lambda p: tx.update(p, tx.init(p), p, batch=batch)[0], params
    )
    assert seen == [[(6 * layers,)]] * 3
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)


def test_a_gradient_within_a_run_is_packed_from_leaves_of_several_types():
    # Vectors are wide, so that both leaves lie in one array; the gradient's are not.
    seen = []

    def spy(system, x0):
        _, gradient = system.value_and_grad(system.b)
        seen.append([(x.shape, x.dtype) for x in gradient])
        return solver.solve(system, x0)

    def model_fn(params, x):
        return x * params["a"][None] + params["b"].astype(x.dtype)[None]

    objective = hfjax.Objective(model_fn, hfjax.losses.squared_error())
    solver = hfjax.krylov.subspace_descent(dimension=2)
    tx = hfjax.hessian_free(
        objective,
        solver=solver._replace(solve=spy),
        damping=hfjax.damping.constant(0.0),
        preconditioner=None,
    )
    params = {"a": jnp.ones(2, "float32"), "b": jnp.ones(2, "bfloat16")}
    batch = (jnp.ones((3, 2), "float32"), jnp.ones((3, 2), "float32"))
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, batch=batch), params)
    assert seen == [[((4,), jnp.float32)]]
