"""Compile eager calls only once for all calls whose programs are equal.

In a call from outside of `jit`, JAX recompiles every loop whose body is a new function
object, and keeps each result in memory. This module traces such a call, which is cheap,
and compares the jaxpr with earlier ones, equation by equation. If an equal one has been
compiled, that executable runs with the arrays that the new call closes over. Inside of
`jit` or any other transformation, nothing changes.
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
from hfjax._tracing import programs

_KEPT = 64
"""Number of compiled programs that are kept, the least recently used dropped first."""

_OUTSIDE = get_opaque_trace_state(convention="flax")
"""JAX's trace state outside of all transformations."""

_NEEDS_NUMBERS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
"""Errors of a function that needs concrete values, which it may have outside of `jit`."""

Function = TypeVar("Function", bound=Callable[..., Any])


def once(function: Function) -> Function:
    """Return a function whose calls from outside of `jit` are compiled once.

    Arrays that `function` closes over are read in the first call with arguments of given
    shapes and dtypes, as by `jit`. Another function whose program is equal shares the
    compiled code. Arguments are positional; they and the results are trees of arrays.
    """
    # Only traced, never run: `jit` keeps the trace for each kind of arguments.
    traceable = jax.jit(function)
    # Building the key of a program takes a pass over all its equations. A repeated call
    # gets the same trace from JAX, and is found by that object's identity.
    known: weakref.WeakKeyDictionary[Any, Callable] = weakref.WeakKeyDictionary()

    def call(*args: Any) -> Any:
        if not _is_outside(args):
            return function(*args)
        try:
            traced = traceable.trace(*args)
        except _NEEDS_NUMBERS:
            return function(*args)
        program = traced.jaxpr
        # Programs with prints or callbacks are left to JAX.
        if program.effects:
            return function(*args)
        if program not in known:
            known[program] = _compiled(_Program(program.jaxpr))
        results = known[program]([*program.consts, *jax.tree.leaves(args)])
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), results)

    return call  # pyright: ignore[reportReturnType]


def run(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, traced anew in each call from outside of `jit`.

    So it always reads the current arrays. Compiled code is reused as in `once`.
    """
    return once(function)(*args) if _is_outside(args) else function(*args)


def built(
    make: Callable[..., Callable[[Tree], Tree]], *args: Any, like: Tree
) -> Callable[[Tree], Tree]:
    """Return `make(*args)`, a function of one tree, compiling what `make` precomputes.

    An example is a linearisation, which evaluates the model once and then gives v ↦ J v.

    Args:
      make: takes trees of arrays and returns the function.
      *args: the trees.
      like: an argument of the usual structure, shapes and dtypes. For any other argument
        the function is made again.
    """
    if not _is_outside(args):
        return make(*args)
    # Never empty below: `run` traces `beforehand` anew, as it is a new function.
    traced = []

    def beforehand(*args: Any) -> list[Any]:
        function = make(*args)
        if isinstance(function, tuple):
            raise _SeveralError
        # What the function closes over are the constants of its program: these are the
        # precomputed arrays, returned so that they outlive this trace.
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
    """`make` returned a tuple of functions (an `Approximate`), not one function."""


def _kinds(tree: Tree) -> tuple:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(jnp.shape(leaf), leaf.dtype) for leaf in leaves]


def _is_outside(args: tuple) -> bool:
    """Return whether to compile a call: no transformation is active, all are arrays."""
    if get_opaque_trace_state(convention="flax") != _OUTSIDE:
        return False
    if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
        return False
    return all(map(_is_array, jax.tree.leaves(args)))


def _is_array(leaf: Any) -> bool:
    """Return whether a leaf is a concrete array; `function` itself rejects others."""
    if isinstance(leaf, jax.Array):
        return not isinstance(leaf, Tracer)
    dtype = getattr(leaf, "dtype", np.dtype(object))
    return jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)


def _opened(program: Any) -> Jaxpr:
    """Return the program with its constants as additional leading arguments."""
    inputs = [*program.constvars, *program.invars]
    return program.replace(constvars=[], invars=inputs, debug_info=programs.NO_NAMES)


class _Program:
    """A program without its constants' values, hashed and compared by its equations."""

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
    """A value that equals only itself: an inner constant, or an option without a hash."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value


def _key_of(program: Any) -> tuple:
    """Return a hashable key that is equal for programs which compute the same function.

    It holds the primitives, their options, the shapes and dtypes of all values, and which
    equation reads which value.
    """
    # Variables are numbered by first appearance, so that their identities do not matter.
    numbers: dict[Any, int] = {}

    def named(atom: Any) -> tuple:
        if isinstance(atom, Literal):
            return _compared(atom.val), atom.aval
        return numbers.setdefault(atom, len(numbers)), atom.aval

    def equation(eqn: Any) -> tuple:
        # Of a primitive with Python rules only the program is compared. Nothing is
        # differentiated or vmapped after tracing, so that the rules, which are new
        # objects in each trace, are never used.
        own = programs.RULES.get(eqn.primitive.name)
        options = eqn.params if own is None else {own: eqn.params[own]}
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
    """Return a hashable stand-in for an option or literal of a program."""
    program = getattr(value, "jaxpr", value)
    if hasattr(program, "eqns"):
        consts = tuple(_Itself(const) for const in getattr(value, "consts", ()))
        return _key_of(program), consts
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_compared, value))
    if isinstance(value, dict):
        return tuple((key, _compared(option)) for key, option in value.items())
    if isinstance(value, float | complex | np.generic | np.ndarray):
        # Compare bits, because 0.0 == −0.0 and NaN ≠ NaN.
        array = np.asarray(value)
        return type(value), array.dtype, array.shape, array.tobytes()
    try:
        hash(value)
    except TypeError:
        return _Itself(value)
    return type(value), value  # With the type, because True == 1 == 1.0.
