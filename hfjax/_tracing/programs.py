"""Read and run jaxprs, the programs that JAX traces, equation by equation."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

INLINED = frozenset({"jit", "pjit"})
"""Primitives that only wrap an inner program, which may be read in their place."""

CHECKPOINTS = frozenset({"remat2", "checkpoint"})
"""Names of the primitive of `jax.checkpoint` in different versions of JAX."""

RULES = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
}
"""Primitives that carry Python rules, and the parameter that holds their program."""

NO_NAMES = jax.make_jaxpr(lambda: ())().jaxpr.debug_info
"""Debug information without names, for a program made from parts of another."""


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
        debug_info=NO_NAMES,
    )
    return jaxpr_as_fun(ClosedJaxpr(program, []))(*inputs.values())


def evaluate(
    program: Jaxpr,
    consts: Sequence[Any],
    args: Sequence[Any],
    apply: Callable[[Any, list[Any]], Iterable[Any]],
    equations: Sequence[Any] | None = None,
) -> list[Any]:
    """Evaluate a program, computing each equation by `apply(equation, operands)`.

    `equations` are those that the results need; `None` is all of them.
    """
    inputs = (*program.constvars, *program.invars)
    values = dict(zip(inputs, (*consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in program.eqns if equations is None else equations:
        results = apply(equation, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in program.outvars]


def is_program(x: Any) -> bool:
    """Return whether an option of an equation is a program, closed or not."""
    return isinstance(x, ClosedJaxpr | Jaxpr)


def inner_programs(equation: Any) -> list[Any]:
    """Return all programs within an equation, such as the branches of a `cond`."""
    options = jax.tree.leaves(list(equation.params.values()), is_leaf=is_program)
    return [option for option in options if is_program(option)]


def equations_of(program: Any) -> Iterator[Any]:
    """Yield the equations of a program, closed or not, and of its inner programs."""
    for equation in program.eqns:
        yield equation
        for part in inner_programs(equation):
            yield from equations_of(part)


def multiplications(program: Any) -> int:
    """Count the multiplications of matrix products and convolutions.

    Inner programs count too: those of a `scan` once per step, those of a `while` once
    (the number of rounds is unknown), and those of a `cond` for all branches together.

    Args:
      program: a `Jaxpr`, closed or not.
    """
    total = 0
    for equation in program.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += depth * math.prod(equation.outvars[0].aval.shape)
        elif name == "conv_general_dilated":
            # Per output number, one for each kernel entry of its output channel.
            kernel = equation.invars[1].aval.shape
            units = kernel[params["dimension_numbers"].rhs_spec[0]]
            outputs = math.prod(equation.outvars[0].aval.shape)
            total += outputs * math.prod(kernel) // units
        rounds = params["length"] if name == "scan" else 1
        total += rounds * sum(map(multiplications, inner_programs(equation)))
    return total


def contains(program: Any, name: str) -> bool:
    """Return whether a primitive occurs in a program or in one of its inner programs."""
    return any(equation.primitive.name == name for equation in equations_of(program))


def inner(equation: Any) -> Jaxpr | None:
    """Return the inner program of a `jit`, `scan` or `checkpoint`, else `None`."""
    name = equation.primitive.name
    if name in INLINED or name == "scan":
        return equation.params["jaxpr"].jaxpr
    return equation.params["jaxpr"] if name in CHECKPOINTS else None


def branches(equation: Any) -> list[Jaxpr]:
    """Return the branches of a `cond`, none of another equation."""
    params = equation.params
    # Those of `platform_dependent` cannot all be compiled.
    if equation.primitive.name != "cond" or params.get("branches_platforms"):
        return []
    return [branch.jaxpr for branch in params["branches"]]


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
