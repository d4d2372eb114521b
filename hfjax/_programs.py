"""Programs of JAX, equation by equation."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

INLINED = frozenset({"jit", "pjit"})
"""Equations that are a program of their own, to be read in place."""

_NO_NAMES = jax.make_jaxpr(lambda: ())().jaxpr.debug_info


def run(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """Run one equation, as a program of its own: no primitive's rules are ours.

    Args:
      equation: of a `Jaxpr`.
      operands: one for each of its inputs, literals included.

    Returns:
      Its results.
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
