"""Evaluates a program, recording the inputs of kernels and adding to their outputs.

The program is evaluated equation by equation, and so are the programs inside it (`jit`,
`checkpoint`, `scan`, `cond`) that contain a product with a kernel.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from hfjax._core import sharding, trees
from hfjax._tracing import programs
from hfjax._tracing._made import Path, Scale
from hfjax._tracing._products import Use, looked_up

Arrays: TypeAlias = dict[Path, jax.Array]
"""An array for each of some equations."""


class Run(NamedTuple):
    """Evaluates a program that contains some uses.

    Attributes:
      uses: a use for each equation that is one.
      scales: a scale of a kernel for each equation that multiplies by one.
    """

    uses: Mapping[Path, Use]
    scales: Mapping[Path, Scale]

    def program(
        self, program: ClosedJaxpr, args: Sequence[Any], added: Arrays, path: Path = ()
    ) -> tuple[list[Any], Arrays]:
        """Return the outputs, and what is taken out of each equation.

        This is the inputs of a use in the layout `Use.taken`, or the value of a scale.
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
        added = {at: x for at, x in added.items() if at[:depth] == path}
        if not added and not any(at[:depth] == path for at in self.scales):
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
        if programs.branches(equation):
            return self._branches(equation, operands, added, path)
        results = programs.run(equation, operands)
        if path in self.scales:
            return results, {path: jnp.asarray(operands[self.scales[path].operand])}
        (result,) = results
        return [result + added[path]], {
            path: _inputs(equation, self.uses[path], operands)
        }

    def _branches(
        self, equation: Any, operands: list[Any], added: Arrays, path: Path
    ) -> tuple[list[Any], Arrays]:
        index, *rest = operands
        branches = [
            functools.partial(self.program, branch, path=(*path, n))
            for n, branch in enumerate(equation.params["branches"])
        ]
        shapes = [jax.eval_shape(branch, rest, added)[1] for branch in branches]

        def nothing(shape: Any) -> jax.Array:
            """Return inputs of a branch that is not taken: zeros, or no index."""
            names = tuple(sharding.varying(shape))
            x = sharding.vary(sharding.zeros(shape), names)
            return x - 1 if jnp.issubdtype(x.dtype, jnp.integer) else x

        def filled(branch: Any) -> Any:
            def run(rest: list[Any], added: Arrays) -> tuple[list[Any], Arrays]:
                results, taken = branch(rest, added)
                missing = {
                    at: nothing(shape)
                    for known in shapes
                    for at, shape in known.items()
                    if at not in taken
                }
                return results, taken | missing

            return run

        index = jnp.asarray(index).astype(jnp.int32)
        return jax.lax.switch(index, list(map(filled, branches)), rest, added)

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
