"""L″ of one example as a diagonal and an outer product in each block of coupled outputs.

    L″ = diag(a) + b cᵀ

This form can be read off the program of v ↦ L″v if the outputs of a block are coupled
through a single sum over them, as in every softmax cross-entropy. Then a is the
coefficient from each entry of v to the same entry of L″v, cᵀv is the sum, and b
multiplies it. The square root of such a matrix has a closed form.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hfjax._core import trees
from hfjax._tracing import programs
from hfjax.losses import _coupling

_SUMS_OF_OPERANDS = frozenset({"add", "add_any", "sub"})


class Unreadable(Exception):  # noqa: N818 (nothing is wrong: L″ is just no such matrix)
    """L″ is not known to be a diagonal and one outer product in each block."""


class Outer(NamedTuple):
    """a, b and c of diag(a) + b cᵀ for one example, each of shape `[outputs]`."""

    diagonal: jax.Array
    left: jax.Array
    right: jax.Array


def read(program: Any, args: Sequence[jax.Array], numbers: np.ndarray) -> Outer:
    """Read a, b and c off the program of L″ for one example, or raise `Unreadable`.

    `program` and `numbers` are the results of `_coupling.trace` and `_coupling.blocks`;
    `args` are the leaves of the outputs and targets.
    """
    walk = _Outer(numbers, [])
    shapes = [x.shape for x in program.out_avals]
    entries = _coupling.numbered(shapes)
    dtype = trees.widest(*(x.dtype for x in program.out_avals))
    given = [
        _Form({0: _Part(jnp.ones(entry.shape, out.dtype), entry)})
        for entry, out in zip(entries, program.out_avals, strict=True)
    ]
    # What depends only on outputs and targets is computed; what depends on v is read.
    results = walk.program(program.jaxpr, program.consts, [*args, *given])
    count = len(numbers)
    diagonal, left, right = (jnp.zeros(count, dtype) for _ in range(3))
    for entry, result in zip(entries, results, strict=True):
        if not isinstance(result, _Form):
            continue
        for source, (factor, places) in result.parts.items():
            # Entry i of L″v may hold entry i of v, and the sum over its own block.
            wanted = entry if source == 0 else numbers[entry]
            if not np.array_equal(places, wanted):
                raise Unreadable
            if source == 0:
                diagonal = _added(diagonal, factor, entry)
            else:
                left = _added(left, factor, entry)
    for factor, places in walk.sums:
        right = _added(right, factor, places)
    return Outer(diagonal, left, right)


def root(parts: Outer) -> Callable[[jax.Array], jax.Array]:
    """Build x ↦ S x for x `[cases, blocks, K]`, with S Sᵀ = diag(a) + b cᵀ per example.

    L″ is symmetric, so b cᵀ = σ u uᵀ with σ = ±1. With w = u / √a,

        L″ = √a (I + σ w wᵀ) √a,        S = √a (I + (√(1 + σ‖w‖²) − 1) w wᵀ / ‖w‖²).

    Negative a or 1 + σ‖w‖² count as 0. If the loss is a function of the sum alone, such
    as ½(Σz)², then a is 0 where u is not. Let e be that part of u, scaled to length 1.
    For σ = 1

        S = √a + u eᵀ,        S Sᵀ = a + u uᵀ, since √a e = 0.
    """
    a, b, c = parts
    # By symmetry b is proportional to c within a block, so |u| is their geometric mean. It
    # is in range even if one of them is close to overflow and the other to underflow.
    u = jnp.sign(c) * jnp.sqrt(jnp.abs(b)) * jnp.sqrt(jnp.abs(c))
    sign = jnp.sign(jnp.sum(jnp.sign(b) * jnp.sign(c), axis=-1, keepdims=True))
    roots = jnp.sqrt(jnp.maximum(a, 0))
    # Here √a is negligible beside u: its contribution is within the rounding of u uᵀ.
    alone = roots <= jnp.finfo(u.dtype).eps * jnp.abs(u)
    bare = jnp.where(alone & (sign > 0), u, 0)
    height = jnp.linalg.norm(bare, axis=-1, keepdims=True)
    e = bare / jnp.where(height > 0, height, 1)
    w = jnp.where(alone, 0, u / jnp.where(alone, 1, roots))
    size = jnp.sum(w * w, axis=-1, keepdims=True)
    # For softmax, 1 + σ‖w‖² is exactly 0. Rounding leaves about ε, and √ε is not small.
    along_w = 1 + sign * size
    seen = along_w > a.shape[-1] * jnp.finfo(w.dtype).eps
    stretch = jnp.sqrt(jnp.where(seen, along_w, 0)) - 1
    share = stretch / jnp.where(size > 0, size, 1)

    def product(x: jax.Array) -> jax.Array:
        # Both forms cost two dot products per block, and no matrix is ever formed.
        along = jnp.sum(w * x, axis=-1, keepdims=True)
        along_e = jnp.sum(e * x, axis=-1, keepdims=True)
        stretched = roots * (x + share * along * w)
        return jnp.where(height > 0, roots * x + along_e * u, stretched)

    return product


def _added(total: jax.Array, factor: jax.Array, places: np.ndarray) -> jax.Array:
    """Add entries to those of a vector, without a scatter if they are all of it."""
    flat = factor.reshape(-1).astype(total.dtype)
    if np.array_equal(places.ravel(), np.arange(total.size)):
        return total + flat
    return total.at[places.ravel()].add(flat)


class _Part(NamedTuple):
    """`factor` times entries of a vector; `places` numbers the entry for each place."""

    factor: jax.Array
    places: np.ndarray


class _Form(NamedTuple):
    """A value that depends on v: a sum of parts, 0 of v itself, 1 of the sums cᵀv."""

    parts: dict[int, _Part]


class _Outer(NamedTuple):
    """Evaluates a program on forms; `sums` collects the parts that are summed to cᵀv."""

    numbers: np.ndarray
    sums: list[_Part]

    def program(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]
    ) -> list[Any]:
        equations = _coupling.needed(jaxpr)
        return programs.evaluate(jaxpr, consts, args, self.equation, equations)

    def equation(self, equation: Any, operands: list[Any]) -> list[Any]:
        if not any(isinstance(x, _Form) for x in operands):
            return programs.run(equation, operands)
        inner = programs.inner(equation)
        if inner is not None and equation.primitive.name != "scan":
            consts = getattr(equation.params["jaxpr"], "consts", ())
            return self.program(inner, consts, operands)
        sources = dict.fromkeys(
            source for x in operands if isinstance(x, _Form) for source in x.parts
        )
        # The program is linear in v, so it acts on each part by itself, and results add
        # up.
        found: dict[int, _Part] = {}
        for source in sources:
            kind, part = self._applied(equation, operands, source)
            if kind in found:
                factor, places = found[kind]
                if not np.array_equal(places, part.places):
                    raise Unreadable
                part = _Part(factor + part.factor, places)
            found[kind] = part
        return [_Form(found)]

    def _applied(
        self, equation: Any, operands: list[Any], source: int
    ) -> tuple[int, _Part]:
        """Apply an equation to the parts of its operands that come from one source."""
        name, params = equation.primitive.name, equation.params
        shape = equation.outvars[0].aval.shape
        forms = [x if isinstance(x, _Form) else _Form({}) for x in operands]
        parts = [form.parts.get(source) for form in forms]
        places = [part.places for part in parts if part is not None]
        if name == "reduce_sum":
            (part,) = parts
            assert part is not None
            return self._sum(part, params["axes"], shape, source)
        # A product or quotient of two values that depend on v would not be linear.
        if name in _coupling.ARITHMETIC and not (
            name in ("mul", "div") and len(places) > 1
        ):
            after: list[Any] = [np.broadcast_to(x, shape) for x in places]
        elif len(operands) == 1:
            after = [_coupling.moved(name, params, places[0], shape)]
        else:
            raise Unreadable
        if any(x is None or not np.array_equal(x, after[0]) for x in after):
            raise Unreadable

        def input_of(atom: Any, x: Any, part: _Part | None) -> Any:
            if part is not None:
                return part.factor
            # A constant added to something linear in v can only be 0.
            is_zero = isinstance(x, _Form) or name in _SUMS_OF_OPERANDS
            return jnp.zeros(atom.aval.shape, atom.aval.dtype) if is_zero else x

        inputs = map(input_of, equation.invars, operands, parts)
        (factor,) = programs.run(equation, [*inputs])
        return source, _Part(factor, after[0])

    def _sum(
        self, part: _Part, axes: Sequence[int], shape: tuple[int, ...], source: int
    ) -> tuple[int, _Part]:
        factor, places = part
        groups = self.numbers[places] if source == 0 else places
        first = np.max(groups, axis=tuple(axes), keepdims=True)
        if not np.array_equal(np.broadcast_to(first, groups.shape), groups):
            raise Unreadable  # A sum across several blocks.
        # Where one entry is added up repeatedly, it is enough to sum its factors.
        same = np.max(places, axis=tuple(axes), keepdims=True)
        if np.array_equal(np.broadcast_to(same, places.shape), places):
            summed = jnp.sum(factor, axis=tuple(axes))
            return source, _Part(summed, same.reshape(shape))
        if any(np.any(np.isin(first, self.numbers[s.places])) for s in self.sums):
            raise Unreadable  # A second sum over the same outputs.
        if len(np.unique(first)) < first.size:
            raise Unreadable  # Two different sums over the same block.
        # From here on the sums are a source of their own, one entry for each block.
        self.sums.append(part)
        return 1, _Part(jnp.ones(shape, factor.dtype), first.reshape(shape))
