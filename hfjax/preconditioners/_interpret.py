"""Evaluates a program, recording the inputs of kernels and adding to their outputs.

The program is evaluated equation by equation, and so are the programs inside it (`jit`,
`checkpoint`, `scan`) that contain a product with a kernel.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal

from hfjax._core import trees
from hfjax._tracing import programs


class Use(NamedTuple):
    """One product of a layer's inputs with its kernel.

    Attributes:
      path: the number of the equation in its program, after those of the equations
        whose programs contain it.
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

    path: tuple[int, ...]
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
    """Evaluates a program; `places` maps the path of each use to its number."""

    uses: Sequence[Use]
    places: Mapping[tuple[int, ...], int]

    def program(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[Any],
        args: Sequence[Any],
        added: dict[int, jax.Array],
        path: tuple[int, ...],
    ) -> tuple[list[Any], dict[int, jax.Array]]:
        """Return the outputs, and the inputs of each use as rows."""
        values = dict(
            zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True)
        )
        taken: dict[int, jax.Array] = {}

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for number, equation in enumerate(jaxpr.eqns):
            operands = [read(atom) for atom in equation.invars]
            here = (*path, number)
            results, found = self._equation(equation, operands, added, here)
            taken.update(found)
            values.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars], taken

    def _equation(
        self,
        equation: Any,
        operands: list[Any],
        added: dict[int, jax.Array],
        path: tuple[int, ...],
    ) -> tuple[list[Any], dict[int, jax.Array]]:
        if path in self.places:
            number = self.places[path]
            use = self.uses[number]
            (result,) = programs.run(equation, operands)
            inputs = operands[use.operand]
            rows = (
                as_rows(inputs, use.input_axes)
                if use.input_axes
                else _patches(equation, use, inputs)
            )
            return [result + added[number]], {number: rows}
        inside = {
            n: added[n] for at, n in self.places.items() if at[: len(path)] == path
        }
        name, params = equation.primitive.name, equation.params
        if not inside:
            return programs.run(equation, operands), {}
        if name == "scan":
            return self._scan(equation, operands, inside, path)
        if name in programs.CHECKPOINTS:
            # Keep the memory savings of the user's `jax.checkpoint`.
            inner = jax.checkpoint(
                lambda operands, inside: self.program(
                    params["jaxpr"], (), operands, inside, path
                ),
                prevent_cse=params["prevent_cse"],
                policy=params["policy"],
            )
            return inner(operands, inside)
        closed = params["jaxpr"]
        return self.program(closed.jaxpr, closed.consts, operands, inside, path)

    def _scan(
        self,
        equation: Any,
        operands: list[Any],
        inside: dict[int, jax.Array],
        path: tuple[int, ...],
    ) -> tuple[list[Any], dict[int, jax.Array]]:
        params, closed = equation.params, equation.params["jaxpr"]
        split, carried = programs.consts_and_carry(equation)
        consts, rest = operands[:split], operands[split:]

        def body(carry: list[Any], step: tuple[list[Any], dict]) -> tuple:
            arrays, added = step
            results, taken = self.program(
                closed.jaxpr, closed.consts, [*consts, *carry, *arrays], added, path
            )
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


def _patches(equation: Any, use: Use, inputs: jax.Array) -> jax.Array:
    """Return what a convolution multiplies by its kernel, `[positions, inputs]`."""
    params = equation.params
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
