"""Transpose convolutions within loops to the layout that XLA runs fast on a CPU.

XLA's fast CPU code takes the layout NHWC, HWIO → NHWC only. XLA transposes other
convolutions to it by itself, but not within loops and branches, where its naive code
took 4 to 130 times as long. Derivatives need this even if the model uses that layout:
the derivative by the inputs swaps the channels of the kernel, and the derivative by the
kernel sums over the examples as if they were channels.

hfjax applies this to whatever it runs within a loop or a branch, above all to
curvature-vector products. Results and operation counts do not change.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from hfjax._tracing import programs

_Function = TypeVar("_Function", bound=Callable[..., Any])

_HOLDERS = frozenset(
    {"scan", "while", "cond", "closed_call", "custom_jvp_call", "custom_vjp_call"}
)
"""Primitives whose inner programs are rewritten, besides `jit` and `checkpoint`."""

# With 1 or 2 channels per group the naive code was 9 to 50 times faster than the other;
# with 4 it was 1.3 to 1.5 times slower, and with 32 it was 5 to 16 times slower.
_CHANNELS_PER_GROUP = 8
"""Input channels per group from which on a grouped convolution is transposed."""


def for_loops(function: _Function) -> _Function:
    """Return the same function with its convolutions transposed for loops on a CPU.

    Other platforms run the convolutions as they are. Derivatives of the returned function
    are those of the original convolutions, so differentiate first and apply this last.
    """

    def laid_out(*args: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        operands = jax.tree.leaves(args)
        if _any_to_move(program.jaxpr):
            results = _evaluate(program.jaxpr, program.consts, operands)
        else:
            results = jaxpr_as_fun(program)(*operands)
        return jax.tree.structure(shapes).unflatten(results)

    return laid_out  # pyright: ignore[reportReturnType]


def to_move(program: Jaxpr | ClosedJaxpr) -> Iterator[Any]:
    """Yield the convolutions to be transposed, in a program and its inner programs."""
    for equation in program.eqns:
        if _is_to_move(equation):
            yield equation
        for inner in _inner(equation):
            yield from to_move(inner)


def _any_to_move(program: Jaxpr | ClosedJaxpr) -> bool:
    return next(to_move(program), None) is not None


def _inner(equation: Any) -> Sequence[Any]:
    """Return the inner programs of an equation that are to be rewritten."""
    name = equation.primitive.name
    if name not in _HOLDERS | programs.INLINED | programs.CHECKPOINTS:
        return ()
    # The branches of `platform_dependent` are made for each platform already.
    if equation.params.get("branches_platforms") is not None:
        return ()
    return programs.inner_programs(equation)


def _is_to_move(equation: Any) -> bool:
    """Return whether XLA would run a convolution as a naive loop that is slower."""
    if equation.primitive.name != "conv_general_dilated":
        return False
    numbers = equation.params["dimension_numbers"]
    inputs, kernel = (atom.aval.shape for atom in equation.invars)
    if numbers == _channels_last(len(inputs)):
        return False
    groups = equation.params["batch_group_count"]
    if groups > 1:
        # This is the derivative of a grouped convolution by its kernel.
        return inputs[numbers.lhs_spec[0]] == groups
    channels = kernel[numbers.rhs_spec[1]]
    grouped = equation.params["feature_group_count"] > 1
    return not grouped or channels >= _CHANNELS_PER_GROUP


def _evaluate(
    program: Jaxpr, consts: Sequence[Any], args: Sequence[Any]
) -> list[jax.Array]:
    """Evaluate a program, transposing its convolutions."""

    def run(equation: Any, operands: list[Any]) -> list[jax.Array]:
        if _is_to_move(equation):
            return [_moved(equation.params, *operands)]
        return programs.run(_rewritten(equation), operands)

    return programs.evaluate(program, consts, args, run)


def _rewritten(equation: Any) -> Any:
    """Return the equation with the convolutions of its inner programs transposed."""
    if not any(map(_any_to_move, _inner(equation))):
        return equation

    def program(x: Any) -> Any:
        if not programs.is_program(x):
            return x
        closed = x if isinstance(x, ClosedJaxpr) else ClosedJaxpr(x, ())

        def evaluate(*args: Any) -> list[jax.Array]:
            return _evaluate(closed.jaxpr, closed.consts, args)

        new = jax.make_jaxpr(evaluate)(*closed.in_avals)
        return new if isinstance(x, ClosedJaxpr) else new.jaxpr

    params = {
        name: tuple(map(program, value)) if isinstance(value, tuple) else program(value)
        for name, value in equation.params.items()
    }
    return equation.replace(params=params)


def _moved(params: dict[str, Any], lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Convolve, in the layout NHWC, HWIO → NHWC if the platform is a CPU."""
    rest = dict(params)
    numbers = rest.pop("dimension_numbers")
    favourite = _channels_last(lhs.ndim)

    def plain(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(lhs, rhs, dimension_numbers=numbers, **rest)

    def moved(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        lhs = _permuted(lhs, numbers.lhs_spec, favourite.lhs_spec)
        rhs = _permuted(rhs, numbers.rhs_spec, favourite.rhs_spec)
        out = jax.lax.conv_general_dilated(
            lhs, rhs, dimension_numbers=favourite, **rest
        )
        return _permuted(out, favourite.out_spec, numbers.out_spec)

    # The platform is known only when the program is lowered: a machine with a GPU also
    # has a CPU. Differentiating `platform_dependent` would store the residuals of every
    # branch, so derivatives are taken of the plain convolution.
    @jax.custom_jvp
    def convolve(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(lhs, rhs, cpu=moved, default=plain)

    def tangent(primals: tuple, tangents: tuple) -> tuple[jax.Array, Any]:
        (lhs, rhs), (dlhs, drhs) = primals, tangents
        known = [not isinstance(d, SymbolicZero) for d in tangents]
        out = convolve(lhs, rhs)
        terms = [plain(dlhs, rhs)] if known[0] else []
        terms += [plain(lhs, drhs)] if known[1] else []
        return out, sum(terms[1:], terms[0])

    convolve.defjvp(tangent, symbolic_zeros=True)
    return convolve(lhs, rhs)


def _channels_last(ndim: int) -> jax.lax.ConvDimensionNumbers:
    """Return the layout NHWC, HWIO → NHWC for `ndim` axes."""
    space = tuple(range(1, ndim - 1))
    inputs = (0, ndim - 1, *space)
    kernel = (ndim - 1, ndim - 2, *range(ndim - 2))
    return jax.lax.ConvDimensionNumbers(inputs, kernel, inputs)


def _permuted(x: jax.Array, spec: Sequence[int], wanted: Sequence[int]) -> jax.Array:
    """Transpose from one order of batch, feature and space to another."""
    return x.transpose([axis for _, axis in sorted(zip(wanted, spec, strict=True))])
