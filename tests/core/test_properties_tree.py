"""Sums over trees of any numbers, against float64 sums without rounding."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from reference import quick_jit
from strategies import arrays, eighths, nonfinite, scales

from hfjax._core import trees as _tree

F16, BF16, F32, F64 = (
    np.dtype(dtype) for dtype in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)
)
STRUCTURES = {
    "single": {"a": ((3,), F32), "b": [((), F32)]},
    "half": [((2, 2), BF16), ((), F16), ((0,), F32)],
    "mixed": (((3,), F64), {"c": ((2,), F32), "d": ((0, 2), BF16)}),
    "double": ((4,), F64),
    "empty": [((0,), BF16)],
}
EXPONENTS = {F16: 3, BF16: 36, F32: 36, F64: 300}
"""Powers of ten that a dtype holds, with a number below 10 before them."""


def is_leaf(node):
    return isinstance(node, tuple) and isinstance(node[-1], np.dtype)


def trees(name, share=1.0):
    """Draw a tree; each leaf, and each entry, has a scale of its own."""
    leaves, structure = jax.tree.flatten(STRUCTURES[name], is_leaf=is_leaf)

    def leaf(shape, dtype):
        most = int(EXPONENTS[dtype] * share)
        entries = st.builds(lambda x, s: x * s, eighths, scales(-3, 0))
        return st.builds(
            lambda values, scale: (values * scale).astype(dtype),
            arrays(*shape, elements=entries),
            st.one_of(scales(-most, most), st.just(0.0)),
        ).map(functools.partial(flushed, dtype=dtype))

    return st.tuples(*(leaf(*kind) for kind in leaves)).map(
        lambda drawn: structure.unflatten(list(drawn))
    )


def flushed(values, dtype):
    """XLA has no subnormal numbers."""
    tiny = jnp.finfo(dtype).tiny
    return np.where(np.abs(values) < tiny, np.zeros_like(values), values)


def pairs(share=1.0):
    return st.sampled_from(list(STRUCTURES)).flatmap(
        lambda name: st.tuples(st.just(name), trees(name, share), trees(name, share))
    )


@functools.cache
def measure(name):
    def everything(x, y, a):
        size = _tree.magnitude(x)
        unit = _tree.scale(1 / size, _tree.widen(x))
        axpy = _tree.axpy(a, x, y)
        return _tree.dot(x, y), _tree.norm(x), axpy, size, unit

    compiled = quick_jit(everything)
    return lambda x, y=None, a=1.0: jax.device_get(
        compiled(x, x if y is None else y, jnp.asarray(a))
    )


def sums_in(leaf):
    return jnp.finfo(_tree.wide(leaf.dtype))


def entries(tree):
    return [float(x) for leaf in jax.tree.leaves(tree) for x in np.ravel(leaf)]


@given(pairs(share=0.5))
def test_a_dot_is_the_sum_of_products_to_rounding(drawn):
    name, x, y = drawn
    result = measure(name)(x, y)[0]
    truth, slack = [], 0.0
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        terms = [float(s) * float(t) for s, t in zip(a.flat, b.flat, strict=True)]
        truth += terms
        info = sums_in(a)
        # A rounding for each product and each sum; of what underflows, all.
        slack += (a.size + 1) * float(info.eps) * math.fsum(map(abs, terms))
        slack += a.size * float(info.tiny)
    final = float(jnp.finfo(result.dtype).eps) * math.fsum(map(abs, truth))
    slack += len(jax.tree.leaves(x)) * final
    assert abs(float(result) - math.fsum(truth)) <= slack
    assert result.dtype == (F64 if name in ("mixed", "double") else F32)


TINY = (np.array([1e-39, 0, 0]), {"c": np.zeros(2, F32), "d": np.zeros((0, 2), BF16)})


@given(pairs())
@example(("mixed", TINY, TINY))
def test_a_norm_neither_overflows_nor_vanishes(drawn):
    name, x, _ = drawn
    result = measure(name)(x)[1]
    truth = math.hypot(*entries(x))
    coarsest = max(float(sums_in(leaf).eps) for leaf in jax.tree.leaves(x))
    # Of each square and sum, halved by the root, and of the root and its factor.
    assert abs(float(result) - truth) <= (len(entries(x)) / 2 + 3) * coarsest * truth


@given(pairs(), st.integers(0, 99), nonfinite)
def test_an_entry_that_is_not_finite_shows_in_norm_and_magnitude(drawn, place, bad):
    name, x, _ = drawn
    leaves, structure = jax.tree.flatten(x)
    for leaf in leaves[place % len(leaves) :]:
        if leaf.size:
            leaf.flat[place % leaf.size] = bad
            _, norm, _, size, _ = measure(name)(structure.unflatten(leaves))
            assert not np.isfinite(norm)
            assert not np.isfinite(size)
            break


@given(pairs())
def test_a_magnitude_is_a_power_of_two_near_the_largest_entry(drawn):
    name, x, _ = drawn
    _, _, _, size, unit = measure(name)(x)
    largest = max(map(abs, entries(x)), default=0.0)
    if largest == 0:
        assert size == 1
        return
    assert np.frexp(size)[0] == 0.5
    # Its reciprocal is a float of every leaf's dtype.
    least = max(float(sums_in(leaf).tiny) for leaf in jax.tree.leaves(x))
    assert 0.25 <= max(largest, least) / float(size) <= 4
    for leaf, scaled in zip(jax.tree.leaves(x), jax.tree.leaves(unit), strict=True):
        truth = leaf.astype(F64) / float(size)
        kept = np.abs(truth) >= float(sums_in(leaf).tiny)
        info = sums_in(leaf)
        if float(info.tiny) <= 1 / float(size) <= float(info.max):
            np.testing.assert_array_equal(scaled[kept], truth[kept])


@given(pairs(), eighths, scales(-30, 30))
def test_axpy_is_right_to_the_rounding_of_its_result(drawn, digits, scale):
    name, x, y = drawn
    results = jax.tree.leaves(measure(name)(x, y, digits * scale)[2])
    for result, a, b in zip(
        results, jax.tree.leaves(x), jax.tree.leaves(y), strict=True
    ):
        assert result.dtype == b.dtype
        info, own = sums_in(b), jnp.finfo(b.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            factor = np.float64(np.asarray(digits * scale, info.dtype))
            moved, base = factor * a.astype(F64), b.astype(F64)
            truth, size = moved + base, np.abs(moved) + np.abs(base)
            held = (size < float(info.max) / 2) & (np.abs(truth) < float(own.max) / 2)
        error = np.abs(result.astype(F64)[held] - truth[held])
        slack = 2 * float(info.eps) * size + 0.5 * float(own.eps) * np.abs(truth)
        assert np.all(error <= slack[held] + 2 * float(own.tiny) + float(info.tiny))
