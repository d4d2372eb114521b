"""Evaluates a program, recording the inputs of kernels and adding to their outputs.

The program is evaluated equation by equation, and so are the programs inside it (`jit`,
`checkpoint`, `scan`) that contain a product with a kernel.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from hfjax._core import trees
from hfjax._tracing import programs
from hfjax._tracing._axes import Kinds, Layout
from hfjax._tracing._products import looked_up

Path: TypeAlias = tuple[int, ...]
"""The number of an equation in its program, after those of the equations around it."""

Arrays: TypeAlias = dict[int, jax.Array]
"""An array for each of some uses, by the number of the use."""


class Use(NamedTuple):
    """One product of a layer's inputs with its kernel.

    Attributes:
      how: the primitive that computes it. Of `gather`, which looks up rows as a product
        with rows of the identity would do, what is taken are indices, -1 for one out of
        range. Of `mul` and `add`, of data and a parameter, each entry has its own.
      path: where the equation is.
      kernel: the number of the parameter.
      operand: which of the two operands is the input.
      kinds: what each piece of the kernel's axes is here.
      taken: the layout of what `Run` takes out of the program, without loops.
      added: the layout of the result.
      looped: for each loop around the equation, the pieces that it runs over.
      shape: the shape of the result.
      loops: the lengths of the loops, from the outermost.
      dtype: the dtype of the result.
    """

    how: str
    path: Path
    kernel: int
    operand: int
    kinds: Kinds
    taken: Layout
    added: Layout
    looped: Layout
    shape: tuple[int, ...]
    loops: tuple[int, ...]
    dtype: Any

    @property
    def is_lookup(self) -> bool:
        """Whether rows of the kernel are looked up."""
        return self.how == "gather"

    @property
    def lead(self) -> dict[int, int]:
        """The lengths of the axes of loops and result that are positions, by number."""
        lengths = enumerate((*self.loops, *self.shape))
        layout = (*self.looped, *self.added)
        return {axis: length for axis, length in lengths if not layout[axis]}

    @property
    def positions(self) -> int:
        """How often an example uses each block of the kernel here, in time and space."""
        # A complex product uses a real kernel twice, for real and for imaginary inputs.
        return (2 if self.is_complex else 1) * math.prod(self.lead.values())

    @property
    def is_complex(self) -> bool:
        """Whether the product is complex."""
        return jnp.issubdtype(self.dtype, jnp.complexfloating)


class Run(NamedTuple):
    """Evaluates a program that contains some uses."""

    uses: Sequence[Use]

    def program(
        self, program: ClosedJaxpr, args: Sequence[Any], added: Arrays, path: Path = ()
    ) -> tuple[list[Any], Arrays]:
        """Return the outputs, and the inputs of each use in the layout `Use.taken`.

        `added` is for the uses in this program, and `path` that of its equation.
        """
        numbers = itertools.count()
        taken: Arrays = {}

        def run(equation: Any, operands: list[Any]) -> list[Any]:
            here = (*path, next(numbers))
            results, found = self._equation(equation, operands, added, here)
            taken.update(found)
            return results

        return programs.evaluate(program.jaxpr, program.consts, args, run), taken

    def _equation(
        self, equation: Any, operands: list[Any], added: Arrays, path: Path
    ) -> tuple[list[Any], Arrays]:
        depth = len(path)
        added = {n: x for n, x in added.items() if self.uses[n].path[:depth] == path}
        if not added:
            return programs.run(equation, operands), {}
        name, params = equation.primitive.name, equation.params
        if name == "scan":
            return self._scan(equation, operands, added, path)
        if name in programs.CHECKPOINTS:
            # Keep the memory savings of the user's `jax.checkpoint`.
            program = functools.partial(
                self.program, ClosedJaxpr(params["jaxpr"], ()), path=path
            )
            options = {key: params[key] for key in ("prevent_cse", "policy")}
            return jax.checkpoint(program, **options)(operands, added)
        if name in programs.INLINED:
            return self.program(params["jaxpr"], operands, added, path)
        ((number, extra),) = added.items()
        (result,) = programs.run(equation, operands)
        taken = _inputs(equation, self.uses[number], operands)
        return [result + extra], {number: taken}

    def _scan(
        self, equation: Any, operands: list[Any], inside: Arrays, path: Path
    ) -> tuple[list[Any], Arrays]:
        params = equation.params
        split, carried = programs.consts_and_carry(equation)
        consts, rest = operands[:split], operands[split:]

        def body(carry: list[Any], step: tuple[list[Any], dict]) -> tuple:
            arrays, added = step
            args = [*consts, *carry, *arrays]
            results, taken = self.program(params["jaxpr"], args, added, path)
            return results[:carried], (results[carried:], taken)

        # What is added is scanned over, and the inputs taken out are stacked: each step of
        # the loop is a position of its own.
        carry, (stacked, taken) = jax.lax.scan(
            body,
            rest[:carried],
            (rest[carried:], inside),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *stacked], taken


def _inputs(equation: Any, use: Use, operands: list[Any]) -> jax.Array:
    """Return what an equation multiplies by its kernel, in the layout `use.taken`."""
    params, inputs = equation.params, operands[use.operand]
    if use.how == "dot_general":
        return inputs
    if use.how in {"mul", "add", "add_any"}:
        return jnp.broadcast_to(inputs, equation.outvars[0].aval.shape)
    if use.is_lookup:
        axis = looked_up(equation)
        place = params["dimension_numbers"].start_index_map.index(axis)
        inputs = inputs[..., place : place + 1]
        count = equation.invars[0].aval.shape[axis]
        if params["mode"] == jax.lax.GatherScatterMode.CLIP:
            return jnp.clip(inputs, 0, count - 1)
        return jnp.where((inputs >= 0) & (inputs < count), inputs, -1)
    numbers = params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    return jax.lax.conv_general_dilated_patches(
        inputs,
        filter_shape=tuple(kernel[n] for n in numbers.rhs_spec[2:]),
        window_strides=params["window_strides"],
        padding=params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=numbers,
        precision=trees.EXACT,  # JAX takes patches by a convolution with zeros and ones.
    )
