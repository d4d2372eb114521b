"""Calls from outside of `jit`: compiled once for all programs that are alike.

JAX compiles a loop anew in each such call, as its body is another function each time, and
keeps what it compiled. Here a call is traced, which is cheap, and what has been compiled
for a program equal to it, equation by equation, is run with the arrays that it closes over
now. Inside of `jit` or another transformation nothing changes.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import (
    ClosedJaxpr,
    Jaxpr,
    Literal,
    get_opaque_trace_state,
    jaxpr_as_fun,
)

from hfjax._core.types import Tree

_KEPT = 64
"""Compiled programs that are kept (heuristic)."""

_OUTSIDE = get_opaque_trace_state(convention="flax")
"""That of Python itself, outside of all transformations."""

_RULES = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
}
"""Equations with rules of Python beside their program, and the program's name: what runs
here is neither differentiated nor mapped any more."""

_NEEDS_NUMBERS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
"""Errors of a function that looks at the numbers, as it may outside of `jit`."""

Function = TypeVar("Function", bound=Callable[..., Any])

_NO_NAMES = jax.make_jaxpr(lambda: ())().jaxpr.debug_info


def once(function: Function) -> Function:
    """Return a function whose calls from outside of `jit` are compiled once.

    What it closes over is read in its first call with arguments of a kind, as by `jit`.
    Functions that are made anew share what was compiled, if their programs are equal.

    Args:
      function: of trees of arrays; so must be what it returns.

    Returns:
      The function, of positional arguments.
    """
    traceable = jax.jit(function)
    known: weakref.WeakKeyDictionary[Any, Callable] = weakref.WeakKeyDictionary()

    def call(*args: Any) -> Any:
        if not _is_outside(args):
            return function(*args)
        try:
            traced = traceable.trace(*args)
        except _NEEDS_NUMBERS:
            return function(*args)
        program = traced.jaxpr
        if program.effects:
            return function(*args)
        if program not in known:
            known[program] = _compiled(_Program(program.jaxpr))
        results = known[program]([*program.consts, *jax.tree.leaves(args)])
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), results)

    return call  # pyright: ignore[reportReturnType]


def run(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, traced in each call from outside of `jit`.

    What it closes over is read anew each time; what is compiled is kept.

    Args:
      function: of trees of arrays; so must be what it returns.
      *args: the trees.

    Returns:
      What it returns.
    """
    return once(function)(*args) if _is_outside(args) else function(*args)


def built(
    make: Callable[..., Callable[[Tree], Tree]], *args: Any, like: Tree
) -> Callable[[Tree], Tree]:
    """Return `make(*args)`, with what it computes beforehand compiled once.

    Args:
      make: of trees of arrays; returns a function of one tree.
      *args: the trees.
      like: what that function is mostly called with.

    Returns:
      The function. What is not like `like` is handed to one that is made for it.
    """
    if not _is_outside(args):
        return make(*args)
    traced = []

    def beforehand(*args: Any) -> list[Any]:
        function = make(*args)
        if isinstance(function, tuple):
            raise _SeveralError
        program, shapes = jax.make_jaxpr(function, return_shape=True)(like)
        traced.append((_opened(program.jaxpr), jax.tree.structure(shapes)))
        return list(program.consts)

    try:
        consts = run(beforehand, *args)
    except _SeveralError:
        return make(*args)
    program, structure = traced[-1]
    evaluate = jaxpr_as_fun(ClosedJaxpr(program, []))

    def function(x: Tree) -> Tree:
        if _kinds(x) != _kinds(like):
            return make(*args)(x)
        return jax.tree.unflatten(structure, evaluate(*consts, *jax.tree.leaves(x)))

    return function


class _SeveralError(Exception):
    """What was made is no function, but a tuple of them."""


def _kinds(tree: Tree) -> tuple:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(jnp.shape(leaf), leaf.dtype) for leaf in leaves]


def _is_outside(args: tuple) -> bool:
    """Return whether a call may be compiled: in no transformation, of arrays alone."""
    if get_opaque_trace_state(convention="flax") != _OUTSIDE:
        return False
    if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
        return False
    return all(map(_is_array, jax.tree.leaves(args)))


def _is_array(leaf: Any) -> bool:
    """Return whether it holds numbers; what does not, the function itself refuses."""
    if isinstance(leaf, jax.Array):
        return not isinstance(leaf, Tracer)
    dtype = getattr(leaf, "dtype", np.dtype(object))
    return jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)


def _opened(program: Any) -> Jaxpr:
    """Return a program that takes its constants as its first arguments."""
    return Jaxpr(
        constvars=[],
        invars=[*program.constvars, *program.invars],
        outvars=program.outvars,
        eqns=program.eqns,
        effects=program.effects,
        debug_info=_NO_NAMES,
    )


class _Program:
    """A program without its constants, equal to those of the same equations."""

    def __init__(self, program: Any) -> None:
        self.bare = _opened(program)
        self.key = _key_of(self.bare)
        self.hash = hash(self.key)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Program) and self.key == other.key


@functools.lru_cache(maxsize=_KEPT)
def _compiled(program: _Program) -> Callable[[list[Any]], list[Any]]:
    evaluate = jaxpr_as_fun(ClosedJaxpr(program.bare, []))
    return jax.jit(lambda operands: evaluate(*operands))


class _Itself:
    """What cannot be compared, or only with itself."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value


def _key_of(program: Any) -> tuple:
    """Return what two programs have in common if they compute the same.

    Primitives and their options as JAX itself compares them, the kinds of all values, and
    which equation reads what.
    """
    numbers: dict[Any, int] = {}

    def named(atom: Any) -> tuple:
        if isinstance(atom, Literal):
            return _compared(atom.val), atom.aval
        return numbers.setdefault(atom, len(numbers)), atom.aval

    def equation(eqn: Any) -> tuple:
        options = eqn.params
        if eqn.primitive.name in _RULES:
            own = _RULES[eqn.primitive.name]
            options = {own: options[own]}
        return (
            eqn.primitive,
            tuple(map(named, eqn.invars)),
            tuple(map(named, eqn.outvars)),
            _compared(options),
            _compared(eqn.ctx),
        )

    ends = tuple(map(named, (*program.constvars, *program.invars)))
    equations = tuple(map(equation, program.eqns))
    return ends, equations, tuple(map(named, program.outvars))


def _compared(value: Any) -> Any:
    """Return a constant of a program, as it is to be compared."""
    program = getattr(value, "jaxpr", value)
    if hasattr(program, "eqns"):
        consts = tuple(_Itself(const) for const in getattr(value, "consts", ()))
        return _key_of(program), consts
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_compared, value))
    if isinstance(value, dict):
        return tuple((key, _compared(option)) for key, option in value.items())
    if isinstance(value, float | complex | np.generic | np.ndarray):
        # By bits: 0.0 == −0.0, and NaN is not NaN.
        array = np.asarray(value)
        return type(value), array.dtype, array.shape, array.tobytes()
    try:
        hash(value)
    except TypeError:
        return _Itself(value)
    return type(value), value  # True == 1.
