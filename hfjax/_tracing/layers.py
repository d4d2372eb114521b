"""The layers of a model: where its program multiplies inputs by a parameter.

Layers need no registration. JAX traces the model on one example, and `_layer_reader`
looks for products with a parameter, or with what is made of some: the other operand is
the input of a layer, and the result, to which a bias may be added, is its output. The
program is then evaluated so that it also returns these inputs, and adds given arrays to
these outputs. The derivative by what is added is the back-propagated error of the layer.

A parameter belongs to a layer only if nothing else uses it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core.types import Params, Tree
from hfjax._tracing._axes import Sides, laid_out, spread
from hfjax._tracing._layer_reader import Reader
from hfjax._tracing._products import Use
from hfjax._tracing.interpret import Arrays, Run


class Layer(NamedTuple):
    """A kernel with all its uses.

    Attributes:
      kernel: the number of the parameter.
      bias: the number of the parameter that is added in each use, or `None`.
      sides: which of its axes are blocks, inputs and units.
      uses: the indices of its uses in `Model.uses`.
      flipped: those of uses in which inputs and units change places, as in `x @ w.T`.
      is_lookup: as in `Use`; Ā is diagonal.
    """

    kernel: int
    bias: int | None
    sides: Sides
    uses: tuple[int, ...]
    flipped: tuple[int, ...] = ()
    is_lookup: bool = False

    @property
    def blocks(self) -> int:
        """The number of blocks, each with factors of its own."""
        return self.sides.length(self.sides.blocks)

    @property
    def inputs(self) -> int:
        """The number of inputs of a block."""
        return self.sides.length(self.sides.inputs)

    @property
    def units(self) -> int:
        """The number of units of a block."""
        return self.sides.length(self.sides.units)

    @property
    def rows(self) -> int:
        """The number of inputs, and one more if there is a bias."""
        return self.inputs + (self.bias is not None)

    @property
    def ways(self) -> list[tuple[int, ...]]:
        """`uses`, and `flipped` if there are any."""
        return [self.uses, self.flipped] if self.flipped else [self.uses]

    def positions(
        self, uses: Sequence[Use], numbers: Sequence[int] | None = None
    ) -> int:
        """Count how often an example uses a block in all ways, or in uses `numbers`."""
        own = (*self.uses, *self.flipped) if numbers is None else numbers
        return sum(uses[n].positions for n in own)


class Taken(NamedTuple):
    """What is taken out of a program, by the paths of the equations.

    Attributes:
      inputs: the inputs of uses.
      scales: the values by which kernels are multiplied, the same for all examples.
    """

    inputs: Arrays
    scales: Arrays


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """The program of a model, with the layers found in it.

    It is traced on one example or on a batch, and is evaluated on as many.

    Attributes:
      uses: the uses of the kernels of all layers.
      layers: the layers.
      others: why each other parameter is not part of a layer, by its number.
      scalings: for those of `others` that are only multiplied with or added to values,
        entry by entry, the indices of these uses.
      unread: those of `others` that the model does not read.
    """

    uses: tuple[Use, ...]
    layers: tuple[Layer, ...]
    others: Mapping[int, str]
    scalings: Mapping[int, tuple[int, ...]]
    unread: frozenset[int]
    _program: Any
    _structure: Any

    def zeros(self) -> Arrays:
        """Return zeros to add to the output of each use, by the path of its equation."""
        return {
            use.path: jnp.zeros((*use.loops, *use.shape), use.dtype)
            for use in self.uses
        }

    def evaluate(
        self, params: Params, inputs: Tree, added: Arrays
    ) -> tuple[Tree, Taken]:
        """Run the model, adding arrays like `zeros` to the outputs of its uses."""
        args = jax.tree.leaves((params, inputs))
        scales = {scale.path: scale for use in self.uses for scale in use.scales}
        run = Run({use.path: use for use in self.uses}, scales)
        outputs, taken = run.program(self._program, args, added)
        values = {path: taken.pop(path) for path in scales}
        return self._structure.unflatten(outputs), Taken(taken, values)

    def rows(
        self, number: int, taken: Taken, derivatives: Arrays
    ) -> tuple[jax.Array, jax.Array]:
        """Return the inputs and the errors of a use, as those of its kernel.

        They are `[positions, inputs]` and `[positions, units]`, or have the blocks before.
        Of a lookup the inputs are the indices, `[positions, 1]`.

        Args:
          number: the number of the use.
          taken: what `evaluate` took out of the program.
          derivatives: the derivative by what was added.
        """
        use = self.uses[number]
        kinds = use.kinds
        inputs = laid_out(taken.inputs[use.path], use.looped + use.taken, kinds)
        errors = laid_out(derivatives[use.path], use.looped + use.added, kinds)
        for scale in use.scales:
            by_unit = use.is_by_unit(scale)
            rows, side = (errors, kinds.units) if by_unit else (inputs, kinds.inputs)
            value = taken.scales[scale.path].astype(rows.dtype)
            value = spread(value, scale.layout, kinds, side)
            rows = rows / value if scale.divides else rows * value
            inputs, errors = (inputs, rows) if by_unit else (rows, errors)
        if use.factor != 1:
            factor = use.factor if use.is_complex else use.factor.real
            if use.is_lookup:
                errors *= factor
            else:
                inputs *= factor
        # A complex product uses a real kernel twice, for real and for imaginary inputs.
        if use.is_complex:
            inputs = jnp.concatenate([inputs.real, inputs.imag], -2)
            # JAX's derivative by x + iy is ∂/∂x − i ∂/∂y.
            errors = jnp.concatenate([errors.real, -errors.imag], -2)
        return inputs, errors


def read(
    model_fn: Callable[[Params, Tree], Tree],
    params: Params,
    inputs: Tree,
    spoiled: Mapping[int, str],
    unfit: Callable[[Layer], str | None] = lambda layer: None,
) -> Model:
    """Trace a model, and find its layers.

    `inputs` (or their shapes) usually have a leading axis of one. `spoiled` says why
    some parameters, by number, must not be part of a layer, and `unfit` why a layer must
    not be one, or `None`.
    """
    program, shapes = jax.make_jaxpr(model_fn, return_shape=True)(params, inputs)
    leaves = jax.tree.leaves(params)
    reader = Reader([jnp.shape(leaf) for leaf in leaves], spoiled)
    reader.read(program.jaxpr)
    _spoil_by_scalings(reader)
    uses, layers, others = _sorted(reader, unfit)
    scalings: dict[int, tuple[int, ...]] = {}
    for use, _ in reader.scalings:
        if use.kernel not in others:
            scalings[use.kernel] = (*scalings.get(use.kernel, ()), len(uses))
            uses = (*uses, use)
    for use, why in reader.scalings:
        others.setdefault(use.kernel, why)
    known = {n for layer in layers for n in (layer.kernel, layer.bias)}
    unread = frozenset(range(len(leaves))) - known - others.keys()
    others |= dict.fromkeys(unread, "the model does not read it")
    structure = jax.tree.structure(shapes)
    return Model(uses, layers, others, scalings, unread, program, structure)


def _spoil_by_scalings(found: Reader) -> None:
    """Let no parameter be part of a layer that is also multiplied or added elsewhere."""
    known = {use.kernel for use in found.uses} | set(found.biases.values())
    for use, why in found.scalings:
        if use.kernel in known:
            found.others.setdefault(use.kernel, why)


def _sorted(
    found: Reader, unfit: Callable[[Layer], str | None]
) -> tuple[tuple[Use, ...], tuple[Layer, ...], dict[int, str]]:
    """Group the uses of each kernel, with its bias if that has no other use.

    Also returns why each other parameter that is read is not part of a layer.
    """
    others = dict(found.others)
    used: dict[int, list[int]] = {}
    for n, use in enumerate(found.uses):
        used.setdefault(use.kernel, []).append(n)
    known = {kernel: _layer(kernel, numbers, found) for kernel, numbers in used.items()}
    for kernel, layer in known.items():
        why = "it is used in two ways" if layer is None else unfit(layer)
        if why is not None:
            others.setdefault(kernel, why)
    kernels_of: dict[int, set[int]] = {}
    for n, bias in found.biases.items():
        kernels_of.setdefault(bias, set()).add(found.uses[n].kernel)
    for bias, kernels in kernels_of.items():
        if len(kernels) > 1:
            others.setdefault(bias, "several kernels share it")
    uses, layers = [], []
    for kernel, numbers in used.items():
        # A bias must be added in every use: the 1 among the inputs stands for it in all.
        layer, biases = known[kernel], {found.biases.get(n) for n in numbers}
        bias = biases.pop() if len(biases) == 1 else None
        for other in biases | {bias}:
            if other is not None and (other != bias or kernel in others):
                why = "has no factors" if kernel in others else "is used without it"
                others.setdefault(other, f"its kernel {why}")
        if layer is None or kernel in others:
            continue
        bias = None if bias in others else bias
        if bias is not None and layer.flipped:
            bias = (
                others.setdefault(bias, "its kernel is used transposed, too") and None
            )
        places = {n: len(uses) + place for place, n in enumerate(numbers)}
        uses += [found.uses[n] for n in numbers]
        own, flipped = (
            tuple(places[n] for n in some) for some in (layer.uses, layer.flipped)
        )
        layers.append(layer._replace(bias=bias, uses=own, flipped=flipped))
    return tuple(uses), tuple(layers), others


def _layer(kernel: int, numbers: Sequence[int], found: Reader) -> Layer | None:
    """Return the layer of a kernel without its bias, if all of its uses are of one kind.

    A kernel may be used as W and as Wᵀ: an embedding that is the last layer, too.
    """
    uses = {n: found.uses[n] for n in numbers}
    kinds = {n: (use.kinds.sides(), use.is_lookup) for n, use in uses.items()}
    # A lookup comes first: its inputs have the diagonal.
    first = max(numbers, key=lambda n: uses[n].is_lookup)
    sides, is_lookup = kinds[first]
    back = sides._replace(inputs=sides.units, units=sides.inputs)
    own = tuple(n for n in numbers if kinds[n] == kinds[first])
    flipped = tuple(n for n in numbers if kinds[n] == (back, False) and n not in own)
    if len(own) + len(flipped) < len(numbers):
        return None
    return Layer(kernel, None, sides, own, flipped, is_lookup)
