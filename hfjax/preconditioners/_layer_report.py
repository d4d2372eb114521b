"""What a user is told about the layers of a model."""

import jax

from hfjax._core import options
from hfjax._core.arguments import as_params, describe
from hfjax._core.types import Batch, Params
from hfjax.objectives.objective import Objective
from hfjax.preconditioners import _factors
from hfjax.preconditioners._merged_layers import merged


def layers(
    objective: Objective, params: Params, batch: Batch, *, max_size: int = 8192
) -> dict[str, str]:
    """Say what `kronecker` finds in a model: which parameter gets what, and why.

    No layer is registered: the program of `model_fn` is traced. A parameter of two or
    more axes counts as a kernel if it is only used in products `x @ w`, `x @ w.T`,
    `einsum` of all its axes but the last (or of the last alone), or convolutions whose
    outputs are its last axis, at any depth of `jit` and `checkpoint`, and in a `scan`
    that closes over it. A parameter of one axis that is added to each such product is
    its bias. Of Flax that is Dense, Conv without groups, and most recurrent cells; it is
    not what a scan takes layer by layer, kernels that are concatenated first (linen's
    `OptimizedLSTMCell`), or attention's projections to several heads.

    In a weighted sum a term that does not read a kernel adds nothing to its factors: Ā is
    the mean over the terms that have the layer, weighted by cₖ, and Ḡ their sum. A term
    that reads the kernel otherwise (a penalty on parameters) adds the mean of its
    diagonal of G there to λ. A kernel that one term uses transposed has no factors.

    On a mesh of `Explicit` axes parameters may be sharded
    over the axis of the cases; where some lie over others, all have the diagonal.

    Args:
      objective: whose model is traced; nothing is run.
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.
      max_size: the same as `kronecker` has (8192: as `kronecker`).

    Returns:
      A line for each parameter, by its path.

    Raises:
      TypeError: if `objective` is no `Objective`, or `max_size` no Python integer.

    Example:
      >>> import hfjax, jax.numpy as jnp
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2), "scale": jnp.ones(2)}
      >>> model_fn = lambda p, x: p["scale"] * jnp.tanh(x @ p["w"] + p["b"])
      >>> f = hfjax.Objective(model_fn, hfjax.losses.squared_error())
      >>> for name, what in layers(
      ...     f, params, (jnp.ones((1, 3)), jnp.ones((1, 2)))
      ... ).items():
      ...     print(name, what)
      ['b'] bias of ['w']
      ['scale'] diagonal: `mul` uses it
      ['w'] factors of 3 + 1 inputs and 2 units
    """
    if not isinstance(objective, Objective):
        msg = f"`objective` must be an `hfjax.Objective`, got {describe(objective)}."
        raise TypeError(msg)
    options.check_count("max_size", max_size, low=1)
    params = as_params(params)
    model = merged(_factors.read(objective, params, batch, max_size))
    note = _factors.coarse(objective, params, batch)
    nearly = "" if note is None else f", nearly: {note}"
    paths = [
        jax.tree_util.keystr(path) or "params"
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    lines = {n: f"diagonal: {why}" for n, why in model.others.items()}
    for place, layer in enumerate(model.layers):
        inputs = f"{layer.inputs}" + (" + 1" if layer.bias is not None else "")
        positions = model.positions(place)
        words = " or ".join(map(str, positions))
        often = f", at {words} positions" if positions[-1] > 1 else ""
        units = f"{layer.units} units" if layer.units > 1 else "1 unit"
        beside = [
            f"; term {k} ({why}) adds the mean of its diagonal to the damping"
            for k, why in model.beside.get(layer.kernel, {}).items()
        ]
        lines[layer.kernel] = (
            f"factors of {inputs} inputs and {units}{often}{nearly}{''.join(beside)}"
        )
        if layer.bias is not None:
            lines[layer.bias] = f"bias of {paths[layer.kernel]}"
    return {path: lines[n] for n, path in enumerate(paths)}
