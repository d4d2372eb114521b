"""Tells which parameters of a model have Kronecker factors, and why others do not."""

import jax

from hfjax._core import options
from hfjax._core.arguments import as_params
from hfjax._core.types import Batch, Params
from hfjax.objectives.plain import Objective, check_objective
from hfjax.preconditioners import _factors
from hfjax.preconditioners._merged_layers import merged


def layers(
    objective: Objective, params: Params, batch: Batch, *, max_size: int = 8192
) -> dict[str, str]:
    """Report what `kronecker` finds in a model: what each parameter gets, and why.

    Layers need no registration: the program of `model_fn` is traced. A parameter with
    two or more axes is a kernel if it is used only in products: `x @ w`, `x @ w.T`, an
    `einsum`, or a convolution, at any depth of `jit`, `checkpoint`, `scan` and `cond`. The
    axes that the product sums over are inputs and the others units, in any order and
    number. Before, the kernel may be reshaped, transposed, concatenated with others, added
    to others, or scaled along inputs or along units. A parameter that is added to the
    result with an entry for each unit is the bias.

    Axes that inputs and result have as well number blocks, each with factors of its own:
    experts, groups of a convolution, the layers that a `scan` takes step by step. An
    embedding, whose rows are looked up, has a diagonal Ā, which may be of any length.

    In Flax, this covers Dense, DenseGeneral, Einsum, Embed, attention, convolutions, most
    recurrent cells, and `nn.scan` and `nn.vmap` of them. An embedding that is the last
    layer, too, or any kernel used as W and as Wᵀ, gets the Kronecker product nearest to
    both. Weight normalisation has the factors of the product that it makes; its learned
    scales have a diagonal, as have all scales and shifts. The real and the imaginary part
    of a complex kernel have factors each.

    In a weighted sum, a term that does not read a kernel adds nothing to its factors: Ā
    is the mean over the terms that have the layer, weighted by cₖ, and Ḡ the sum of cₖ
    Ḡₖ. If a term uses the kernel in another way (a penalty on parameters), the mean of
    that term's diagonal of G is added to λ. A kernel that one term uses transposed has
    no factors.

    On a mesh with `Explicit` axes, parameters may be sharded over the axis of the
    examples. If any is sharded over another axis, all get the diagonal.

    Args:
      objective: the objective whose model is traced; nothing is run.
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.
      max_size: longest side of a kernel that gets factors, as in `kronecker`.

    Returns:
      A line of text for each parameter, by its path.

    Raises:
      TypeError: if `objective` is not an `Objective`, or `max_size` not a Python
        integer.

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
    check_objective(objective)
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
        blocks = f"{layer.blocks} blocks with " if layer.blocks > 1 else ""
        lines[layer.kernel] = (
            f"{blocks}factors of {inputs} inputs and {units}{often}{nearly}"
            f"{''.join(beside)}"
        )
        if layer.bias is not None:
            lines[layer.bias] = f"bias of {paths[layer.kernel]}"
    return {path: lines[n] for n, path in enumerate(paths)}
