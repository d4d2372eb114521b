"""Read and run jaxprs, the programs that JAX traces, equation by equation."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

INLINED = frozenset({"jit", "pjit"})
"""Primitives that only wrap an inner program, which may be read in their place."""

CHECKPOINTS = frozenset({"remat2", "checkpoint"})
"""Names of the primitive of `jax.checkpoint` in different versions of JAX."""

_NO_NAMES = jax.make_jaxpr(lambda: ())().jaxpr.debug_info


def run(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """Run one equation of a `Jaxpr`, given one operand per input, literals included.

    It becomes a program of its own, so that JAX applies the rules of every primitive.
    """
    inputs = {
        atom: value
        for atom, value in zip(equation.invars, operands, strict=True)
        if not isinstance(atom, Literal)
    }
    program = Jaxpr(
        constvars=[],
        invars=list(inputs),
        outvars=equation.outvars,
        eqns=[equation],
        effects=equation.effects,
        debug_info=_NO_NAMES,
    )
    return jaxpr_as_fun(ClosedJaxpr(program, []))(*inputs.values())


def multiplications(program: Any) -> int:
    """Count the multiplications of matrix products and convolutions.

    Inner programs count too: those of a `scan` once per step, those of a `while` once
    (the number of rounds is unknown), and those of a `cond` for all branches together.

    Args:
      program: a `Jaxpr`, closed or not.
    """
    total = 0
    for equation in getattr(program, "jaxpr", program).eqns:
        params = equation.params
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += depth * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "conv_general_dilated":
            # Per output number, one for each kernel entry of its output channel.
            kernel = equation.invars[1].aval.shape
            units = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += (
                math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // units
            )
        within = jax.tree.leaves(
            list(params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        )
        rounds = params["length"] if equation.primitive.name == "scan" else 1
        total += rounds * sum(
            multiplications(part) for part in within if hasattr(part, "eqns")
        )
    return total


def contains(program: Any, name: str) -> bool:
    """Return whether a primitive occurs in a program or in one of its inner programs."""
    for equation in getattr(program, "jaxpr", program).eqns:
        within = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        )
        if equation.primitive.name == name or any(
            contains(part, name) for part in within if hasattr(part, "eqns")
        ):
            return True
    return False


def inner(equation: Any) -> Jaxpr | None:
    """Return the inner program of a `jit`, `scan` or `checkpoint`, else `None`."""
    name = equation.primitive.name
    if name in INLINED or name == "scan":
        return equation.params["jaxpr"].jaxpr
    return equation.params["jaxpr"] if name in CHECKPOINTS else None


def consts_and_carry(equation: Any) -> tuple[int, int]:
    """Count the constants and the carried values of a `scan`."""
    # Its parameters for this differ between versions of JAX. Instead: stepwise inputs and
    # outputs have one more axis outside of the scan than in its program, others do not.
    program = inner(equation)
    assert program is not None

    def stepwise(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(x.aval.ndim != y.aval.ndim for x, y in pairs)

    carried = len(program.outvars) - stepwise(equation.outvars, program.outvars)
    taken = stepwise(equation.invars, program.invars)
    return len(program.invars) - carried - taken, carried
