"""Compiles a product and an update for some devices, and reads what they would do.

The network is dense and of one width, so that its layers can be stacked and scanned
over; nothing is run, and no parameter is made.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import hfjax
from benchmarks.scaling_traffic import Traffic, by_place

REPLICATED, MAPPED, SHARDED, SCANNED = "replicated", "shard_map", "FSDP", "FSDP, scan"
LAYOUTS = (REPLICATED, MAPPED, SHARDED, SCANNED)
"""Cases are sharded in all. `MAPPED` is under `shard_map` with an axis name. In `SHARDED`
and `SCANNED` each device has a part of each array of parameters; the latter's layers are
stacked, and one checkpointed layer is scanned over them."""


class Network(NamedTuple):
    """A network of dense tanh layers of one width.

    Attributes:
      width: of its inputs, layers and outputs.
      layers: in number.
    """

    width: int
    layers: int

    @property
    def parameters(self) -> int:
        """Their number, n."""
        return self.layers * self.width * (self.width + 1)


class Program(NamedTuple):
    """What XLA says of a compiled program, for one device.

    Attributes:
      traffic: by place.
      flops: with each loop's body counted once.
      accessed: bytes, read and written, counted likewise.
      temporary: bytes.
      held: bytes of arguments and results, what is both counted once.
    """

    traffic: dict[str, Traffic]
    flops: float
    accessed: float
    temporary: int
    held: int


def compile_product(network: Network, layout: str, mesh: Mesh, cases: int) -> Program:
    """Compile a linearisation, and a loop of products with G.

    Args:
      network: the model.
      layout: one of `LAYOUTS`.
      mesh: of `mesh_of`.
      cases: on all devices.

    Returns:
      What it does; a product is an `ITERATION`.
    """
    params, batch = shapes(network, layout, mesh, cases)
    objective = _objective(layout)

    def products(params: Any, v: Any, batch: tuple, count: jax.Array) -> Any:
        product = hfjax.curvature.ggn(objective, params, batch)
        return jax.lax.fori_loop(0, count, lambda _, v: product(v), v)

    count = _shape((), jnp.int32, mesh)
    return _read(_mapped(products, layout, mesh), params, params, batch, count)


def solver(keep: hfjax.iterates.IterateRule) -> hfjax.cg.Solver:
    """Return the report's conjugate gradients.

    Args:
      keep: which iterates.
    """
    return hfjax.cg.conjugate_gradient(
        stopping=hfjax.stopping.martens2010(), keep=keep, warm_start_decay=0.95
    )


def compile_update(
    network: Network, layout: str, mesh: Mesh, cases: int, **options: Any
) -> Program:
    """Compile a gradient and an update.

    Args:
      network: the model.
      layout: one of `LAYOUTS`.
      mesh: of `mesh_of`.
      cases: on all devices.
      **options: of `hessian_free`, in place of the report's parts.

    Returns:
      What it does.
    """
    params, batch = shapes(network, layout, mesh, cases)
    objective = _objective(layout)
    report = {
        "damping": hfjax.damping.levenberg_marquardt(),
        "solver": solver(hfjax.iterates.grid()),
        "preconditioner": hfjax.preconditioners.diagonal(),
    }
    tx = hfjax.hessian_free(objective, **{**report, **options})

    def update(params: Any, state: Any, batch: tuple) -> Any:
        _, grads = objective.value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    state = jax.tree.map(
        lambda x: _shape(x.shape, x.dtype, mesh), jax.eval_shape(tx.init, params)
    )._replace(direction=params)
    return _read(_mapped(update, layout, mesh), params, state, batch, donate=(0, 1))


def mesh_of(*sizes: int) -> Mesh:
    """Make a mesh of axes `"data"` and, if there is a second size, `"model"`.

    Args:
      *sizes: of the axes.

    Returns:
      The mesh, of the first devices there are.
    """
    names = ("data", "model")[: len(sizes)]
    types = (AxisType.Auto,) * len(sizes)
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, names, axis_types=types, devices=devices)


def shapes(network: Network, layout: str, mesh: Mesh, cases: int) -> tuple[Any, tuple]:
    """Describe the parameters and a batch, with where they lie.

    On a mesh with an axis `"model"` sharded parameters lie over that one alone.

    Args:
      network: the model.
      layout: one of `LAYOUTS`.
      mesh: of `mesh_of`.
      cases: on all devices.

    Returns:
      Trees of `jax.ShapeDtypeStruct`.
    """
    width = network.width
    axis = "model" if "model" in mesh.axis_names else "data"
    lead = (None,) if layout == SCANNED else ()
    stack = (network.layers,) if layout == SCANNED else ()
    kernel, bias = ((axis,), (axis,))
    if axis == "model":
        kernel = (None, axis)
    if layout in (REPLICATED, MAPPED):
        kernel, bias = (), ()
    layer = {
        "kernel": _shape((*stack, width, width), jnp.float32, mesh, *lead, *kernel),
        "bias": _shape((*stack, width), jnp.float32, mesh, *lead, *bias),
    }
    params = layer if layout == SCANNED else [layer] * network.layers
    data = _shape((cases, width), jnp.float32, mesh, "data")
    return params, (data, data)


def model_fn(layout: str) -> Callable[[Any, jax.Array], jax.Array]:
    """Build the network's function.

    Args:
      layout: one of `LAYOUTS`.

    Returns:
      `(params, inputs) -> outputs`.
    """

    def layer(x: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
        return jnp.tanh(x @ params["kernel"] + params["bias"][None])

    def scanned(params: Any, x: jax.Array) -> jax.Array:
        one = jax.checkpoint(layer)
        return jax.lax.scan(lambda x, params: (one(x, params), None), x, params)[0]

    def unrolled(params: Any, x: jax.Array) -> jax.Array:
        for one in params:
            x = layer(x, one)
        return x

    return scanned if layout == SCANNED else unrolled


def _objective(layout: str) -> hfjax.Objective:
    return hfjax.Objective(
        model_fn(layout),
        hfjax.losses.squared_error(),
        axis_name="data" if layout == MAPPED else None,
    )


def _shape(
    shape: tuple[int, ...], dtype: Any, mesh: Mesh, *spec: str | None
) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _mapped(fn: Callable, layout: str, mesh: Mesh) -> Callable:
    """Map a function of (params, state, batch, …) over the devices, if it is to be."""
    if layout != MAPPED:
        return fn
    whole, cases = PartitionSpec(), PartitionSpec("data")

    def mapped(params: Any, state: Any, batch: tuple, *rest: Any) -> Any:
        specs = (whole, whole, cases, *[whole] * len(rest))
        inner = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=whole)
        return inner(params, state, batch, *rest)

    return mapped


def _read(fn: Callable, *args: Any, donate: tuple[int, ...] = ()) -> Program:
    """Compile; results like the arguments lie where these do."""
    params, state = args[:2]
    out = (params, state) if donate else params
    shardings = jax.tree.map(lambda x: x.sharding, out)
    jitted = jax.jit(fn, donate_argnums=donate, out_shardings=shardings)
    compiled = jitted.lower(*args).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    assert memory is not None  # As it would be on a backend that plans none ahead.
    return Program(
        traffic=by_place(compiled.as_text() or ""),
        flops=cost.get("flops", 0.0),
        accessed=cost.get("bytes accessed", 0.0),
        temporary=memory.temp_size_in_bytes,
        held=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
    )
