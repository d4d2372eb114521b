"""Finds which outputs of an example a loss couples, from the program of its curvature.

The product v ↦ L″v of one example is a program that is linear in v. Following it entry by
entry shows which entries of v can reach which entries of L″v. Connected entries form a
block, and L″ is zero between blocks, whatever the numbers are: an elementwise loss has
blocks of one output, a softmax over the last axis one block for each position.

We know how arithmetic, sums, matrix products and operations that move entries treat
them. For any other operation (sorting, indexing by values, loops) every result is assumed
to depend on every entry, so blocks may come out too large but never too small.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal

from hfjax._tracing import programs

ARITHMETIC = frozenset(
    {"add", "add_any", "sub", "mul", "div", "neg", "select_n", "convert_element_type"}
    | {"copy", "copy_p", "reduce_precision", "real", "pvary", "pcast", "reshard"}
)
"""Operations that map entries at one place to the same place, if the shapes agree."""

_INDEPENDENT = -1


def trace(product: Callable[..., Any], outputs: Any, targets: Any) -> Any:
    """Trace the curvature of one example, with a leading axis of length one.

    `product` is `(outputs, targets) -> (v -> L″ v)`. The program takes the leaves of
    outputs, targets and v, and returns those of L″v.
    """
    curved = jax.make_jaxpr(lambda z, t, v: product(z, t)(v))
    return curved(outputs, targets, outputs)


def blocks(program: Any, shapes: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return the block of each output, shape `[outputs]`, in the order of v's leaves.

    `program` is the result of `trace`, and `shapes` are those of the leaves of v.
    """
    entries = numbered(shapes)
    walk, results = _followed(program, entries)
    count = sum(entry.size for entry in entries)
    # L″ᵢⱼ ≠ 0 couples outputs i and j: connect each result with the entry of v at its
    # place.
    for entry, result in zip(entries, results, strict=True):
        if result is not None:
            walk.connect(entry, result)
    return _connected(walk.edges, count)


def columns(program: Any, shapes: Sequence[tuple[int, ...]]) -> Sequence[int]:
    """Return which entries of v the result may depend on, in the order of v's leaves.

    The arguments are those of `blocks`. An entry is ignored only if a slice leaves it out.
    """
    count = sum(map(math.prod, shapes))
    if not programs.contains(program.jaxpr, "slice"):
        return range(count)
    walk, results = _followed(program, numbered(shapes))
    groups = _connected(walk.edges, count)
    seen = [x[x != _INDEPENDENT] for x in results if x is not None]
    used = np.isin(groups, groups[np.concatenate([np.zeros(0, int), *seen])])
    return np.flatnonzero(used).tolist()


def _followed(program: Any, entries: list[np.ndarray]) -> tuple["_Blocks", list[Any]]:
    """Follow numbered entries of v through a program; return the walk and the results."""
    jaxpr, walk = program.jaxpr, _Blocks([])
    known = len(jaxpr.invars) - len(entries)
    results = walk.program(jaxpr, [None] * known + entries)  # Fills `walk.edges`.
    return walk, results


class _Blocks(NamedTuple):
    """Follows v through a program; a value that does not depend on v is `None`.

    Any other is an array of entries: at each place it holds the number of one entry of v
    that the value depends on there (−1 for none); `edges` connect it with any others.
    """

    edges: list[tuple[np.ndarray, np.ndarray]]

    def connect(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Connect the entries at each place of two arrays; return one of each pair."""
        x, y = np.broadcast_arrays(x, y)
        both = (x != y) & (x != _INDEPENDENT) & (y != _INDEPENDENT)
        if np.any(both):
            self.edges.append((x[both], y[both]))
        return np.where(x == _INDEPENDENT, y, x)

    def merged(self, x: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        """Connect all entries along some axes, which are reduced to length one."""
        if not axes:
            return x
        first = np.max(x, axis=tuple(axes), keepdims=True, initial=_INDEPENDENT)
        self.connect(np.broadcast_to(first, x.shape), x)
        return first

    def program(self, jaxpr: Any, given: Sequence[Any]) -> list[Any]:
        """Follow entries through a program, from its arguments to its results."""
        found = dict(zip(jaxpr.invars, given, strict=True))

        def read(atom: Any) -> Any:
            return None if isinstance(atom, Literal) else found.get(atom)

        # Unused results, as derivative rules leave behind, must not couple anything.
        for equation in needed(jaxpr):
            operands = [read(atom) for atom in equation.invars]
            if any(x is not None for x in operands):
                results = self.equation(equation, operands)
                found.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, equation: Any, operands: list[Any]) -> list[Any]:
        """Follow entries through an equation."""
        name, params = equation.primitive.name, equation.params
        inner = programs.inner(equation)
        if inner is not None and name != "scan":
            return self.program(inner, operands)
        if name == "cond" and operands[0] is None:
            # Only one branch is taken, but it may be any of them: join their couplings.
            branches = [
                self.program(branch.jaxpr, operands[1:])
                for branch in params["branches"]
            ]
            return [self._either(results) for results in zip(*branches, strict=True)]
        results = self._known(equation, operands)
        if results is not None:
            return results
        # Unknown operation: each result may depend on every entry of every operand.
        every = np.concatenate([x.ravel() for x in operands if x is not None])
        one = self.merged(every, (0,))[0]
        return [np.full(out.aval.shape, one) for out in equation.outvars]

    def _either(self, results: Sequence[np.ndarray | None]) -> np.ndarray | None:
        found = [x for x in results if x is not None]
        return functools.reduce(self.connect, found) if found else None

    def _known(self, equation: Any, operands: list[Any]) -> list[np.ndarray] | None:
        name, params = equation.primitive.name, equation.params
        shape = equation.outvars[0].aval.shape
        dependent = [x for x in operands if x is not None]
        if name in ARITHMETIC:
            nothing = np.full(shape, _INDEPENDENT)
            return [functools.reduce(self.connect, dependent, nothing)]
        if name in ("concatenate", "stack"):
            filled = [
                np.full(atom.aval.shape, _INDEPENDENT) if x is None else x
                for atom, x in zip(equation.invars, operands, strict=True)
            ]
            if name == "stack":
                return [np.stack(filled, params["axis"])]
            return [np.concatenate(filled, params["dimension"])]
        if len(dependent) > 1:
            return None
        (x,) = dependent
        if name == "split":
            return np.split(x, np.cumsum(params["sizes"])[:-1], params["axis"])
        if name == "unstack":
            return list(np.moveaxis(x, params["axis"], 0))
        if name == "reduce_sum":
            return [self.merged(x, params["axes"]).reshape(shape)]
        if name == "cumsum":
            # The last partial sum couples them all.
            return [np.broadcast_to(self.merged(x, (params["axis"],)), shape)]
        if name == "dot_general":
            return [self._dot(params, x, int(operands[0] is None), shape)]
        found = moved(name, params, x, shape)
        return None if found is None else [found]

    def _dot(
        self, params: Any, x: np.ndarray, side: int, shape: tuple[int, ...]
    ) -> np.ndarray:
        # The result has axes [batch, free of the left, free of the right]. Entries do not
        # vary along the free axes of the other operand, so those are broadcast.
        (contracted, batch) = params["dimension_numbers"]
        summed, batched = contracted[side], batch[side]
        free = [n for n in range(x.ndim) if n not in (*summed, *batched)]
        x = self.merged(x, summed).transpose(*batched, *free, *summed)
        lengths = list(x.shape[: len(batched) + len(free)])
        place = len(batched) if side == 1 else len(lengths)
        lengths[place:place] = [1] * (len(shape) - len(lengths))
        return np.broadcast_to(x.reshape(lengths), shape)


def needed(jaxpr: Any) -> list[Any]:
    """Return the equations that the results of a program depend on, in order."""
    wanted = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if wanted & set(equation.outvars):
            kept.append(equation)
            wanted |= {x for x in equation.invars if not isinstance(x, Literal)}
    return kept[::-1]


def numbered(shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """Number the entries of several arrays consecutively."""
    entries, count = [], 0
    for shape in shapes:
        entries.append(count + np.arange(math.prod(shape)).reshape(shape))
        count += entries[-1].size
    return entries


def moved(
    name: str, params: Any, x: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray | None:
    """Move entries as a unary operation does; return `None` if it is unknown."""
    if name in ARITHMETIC:
        return np.broadcast_to(x, shape)
    if name in ("reshape", "squeeze", "expand_dims"):
        return x.reshape(shape)
    if name == "broadcast_in_dim":
        lengths = [1] * len(shape)
        for axis, length in zip(params["broadcast_dimensions"], x.shape, strict=True):
            lengths[axis] = length
        return np.broadcast_to(x.reshape(lengths), shape)
    if name == "transpose":
        return x.transpose(params["permutation"])
    if name == "rev":
        return np.flip(x, params["dimensions"])
    if name == "slice":
        strides = params["strides"] or [1] * x.ndim
        bounds = zip(
            params["start_indices"], params["limit_indices"], strides, strict=True
        )
        return x[tuple(slice(*bound) for bound in bounds)]
    if name == "pad":
        return _padded(x, params["padding_config"], shape)
    return None


def _padded(
    x: np.ndarray, widths: Sequence[tuple[int, int, int]], shape: tuple[int, ...]
) -> np.ndarray | None:
    if any(low < 0 or high < 0 for low, high, _ in widths):
        return None  # Negative padding crops, which is rare enough to leave unknown.
    padded = np.full(shape, _INDEPENDENT)
    places = [
        slice(low, low + (length - 1) * (inside + 1) + 1, inside + 1)
        for (low, _, inside), length in zip(widths, x.shape, strict=True)
    ]
    padded[tuple(places)] = x
    return padded


def _connected(edges: list[tuple[np.ndarray, np.ndarray]], count: int) -> np.ndarray:
    """Number the connected components of a graph on `count` entries, in order."""
    # Each round passes the smaller label across every edge, to its ends and to the entries
    # that label them, and then follows the labels one step, so long chains collapse fast.
    least = np.arange(count)
    if edges:
        x, y = (np.concatenate(ends) for ends in zip(*edges, strict=True))
        while True:
            low = np.minimum(least[x], least[y])
            new = least.copy()
            for end in (x, y):
                np.minimum.at(new, least[end], low)
                np.minimum.at(new, end, low)
            new = new[new]
            if np.array_equal(new, least):
                break
            least = new
    return np.unique(least, return_inverse=True)[1].reshape(-1)
