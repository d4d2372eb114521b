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

Path: TypeAlias = tuple[int, ...]
"""The number of an equation in its program, after those of the equations around it."""

Arrays: TypeAlias = dict[int, jax.Array]
"""An array for each of some uses, by the number of the use."""


class Use(NamedTuple):
    """One product of a layer's inputs with its kernel.

    Attributes:
      path: where the equation is.
      kernel: the number of the parameter.
      operand: which of the two operands is the input.
      input_axes: its axes that are summed over, in the order of the kernel's axes;
        empty for a convolution, which sums over patches.
      kernel_axes: the axes of the parameter, in the order that they have in the
        equation.
      output_axes: the axes of the result that index units, in the order of the
        kernel's.
      inputs_last: whether the kernel's last axis indexes inputs, and its others units.
      shape: the shape of the result.
      loops: the lengths of the loops around the equation, from the outermost.
      dtype: the dtype of the result.
    """

    path: Path
    kernel: int
    operand: int
    input_axes: tuple[int, ...]
    kernel_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    inputs_last: bool
    shape: tuple[int, ...]
    loops: tuple[int, ...]
    dtype: Any

    @property
    def positions(self) -> int:
        """How often an example uses the kernel here, in time and space."""
        # A complex product uses a real kernel twice, for real and for imaginary inputs.
        units = math.prod(self.shape[axis] for axis in self.output_axes)
        parts = 2 if self.is_complex else 1
        return parts * math.prod((*self.loops, *self.shape)) // max(units, 1)

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
        """Return the outputs, and the inputs of each use as rows.

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
        return [result + extra], {number: _rows(equation, self.uses[number], operands)}

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


def as_rows(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Move some axes to the end, and reshape to `[positions, …]`."""
    rest = [axis for axis in range(x.ndim) if axis not in axes]
    sizes = [math.prod(x.shape[axis] for axis in some) for some in (rest, axes)]
    return x.transpose(*rest, *axes).reshape(sizes)


def _rows(equation: Any, use: Use, operands: list[Any]) -> jax.Array:
    """Return what an equation multiplies by its kernel, `[positions, inputs]`."""
    params, inputs = equation.params, operands[use.operand]
    if use.input_axes:
        return as_rows(inputs, use.input_axes)
    numbers = params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    spatial = tuple(kernel[n] for n in numbers.rhs_spec[2:])
    patches = jax.lax.conv_general_dilated_patches(
        inputs,
        filter_shape=spatial,
        window_strides=params["window_strides"],
        padding=params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=numbers,
        precision=trees.EXACT,  # JAX takes patches by a convolution with zeros and ones.
    )
    rows = jnp.moveaxis(patches, numbers.out_spec[1], -1)
    # JAX puts the channels of a patch first. Put each axis where the kernel has it.
    channels = kernel[numbers.rhs_spec[1]]
    rows = rows.reshape(-1, channels, *spatial)
    order = [use.kernel_axes[n] for n in numbers.rhs_spec[1:]]
    axes = [1 + order.index(axis) for axis in range(len(order))]
    return rows.transpose(0, *axes).reshape(len(rows), -1)
