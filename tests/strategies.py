"""Strategies of the property tests: numbers of any size, spectra, systems, networks.

Compiling dominates: shapes and structures come from small pools, each with one compiled
function; values, spectra, scales and weights are drawn, and shrink towards zeros, ones
and the identity. Entries are eighths, so that small sums of them are exact.
"""

from typing import NamedTuple

import jax
import numpy as np
from hypothesis import strategies as st

UNKNOWNS = 6
"""Of the linear systems."""

eighths = st.integers(-32, 32).map(lambda k: k / 8)


def scales(low: int, high: int):
    """Draw a power of ten; 1 is the simplest."""
    return st.integers(low, high).map(lambda power: 10.0**power)


def arrays(*shape, elements=eighths):
    size = int(np.prod(shape))
    values = st.lists(elements, min_size=size, max_size=size)
    return values.map(lambda drawn: np.array(drawn, float).reshape(shape))


def nonzero(*shape):
    return arrays(*shape).filter(np.any)


def wild(low: int = -37, high: int = 37):
    """Draw a number of float32, of any size."""
    digits = st.integers(-9, 9)
    return st.builds(lambda digit, scale: digit * scale, digits, scales(low, high))


nonfinite = st.sampled_from([np.nan, np.inf, -np.inf])


def _rotations(size):
    rng = np.random.default_rng(0)
    turned = [np.linalg.qr(rng.standard_normal((size, size)))[0] for _ in range(3)]
    return [np.eye(size), *turned]


ROTATIONS = _rotations(UNKNOWNS)


class System(NamedTuple):
    """A x = b with A symmetric, `[n, n]`, in float64."""

    a: np.ndarray
    b: np.ndarray

    def cast(self, dtype):
        """Round to `dtype`, which leaves A symmetric."""
        return System(self.a.astype(dtype), self.b.astype(dtype))

    @property
    def wide(self):
        return System(self.a.astype(np.float64), self.b.astype(np.float64))

    @property
    def condition(self):
        return np.linalg.cond(self.wide.a)

    def model(self, x):
        """Return M(x) = ½xᵀA x − bᵀx."""
        a, b = self.wide
        return 0.5 * x @ a @ x - b @ x

    def size(self, x):
        """Return the size of what M(x) is the sum of."""
        a, b = self.wide
        length = np.linalg.norm(x)
        return np.linalg.norm(a, 2) * length**2 + np.linalg.norm(b) * length


def spectra(digits: float):
    """Draw positive eigenvalues between 10^-digits and 1: any, geometric or clustered."""
    share = st.integers(0, 16).map(lambda k: k / 16)
    exponents = st.one_of(
        st.lists(share, min_size=UNKNOWNS, max_size=UNKNOWNS),
        st.just(list(np.linspace(0, 1, UNKNOWNS))),
        st.lists(
            st.sampled_from([0, 1e-9, 1e-3, 0.5, 1]),
            min_size=UNKNOWNS,
            max_size=UNKNOWNS,
        ),
    )
    return exponents.map(lambda shares: 10.0 ** (-digits * np.array(shares)))


def systems(eigenvalues, right_hand_sides=None):
    """Draw A with such eigenvalues in some basis, and b in that basis."""

    def build(values, basis, b):
        a = (basis * values) @ basis.T
        return System((a + a.T) / 2, basis @ b)

    b = nonzero(UNKNOWNS) if right_hand_sides is None else right_hand_sides
    return st.builds(build, eigenvalues, st.sampled_from(ROTATIONS), b)


def signed_spectra(low: int, high: int, *, zeros: bool):
    """Draw eigenvalues of both signs and any size."""
    value = st.builds(
        lambda sign, scale: sign * scale,
        st.sampled_from([1.0, 1.0, -1.0, 0.0] if zeros else [1.0, 1.0, -1.0]),
        scales(low, high),
    )
    return arrays(UNKNOWNS, elements=value)


def like(shapes, elements=eighths):
    """Draw a tree of float64 arrays of these shapes."""
    leaves, structure = jax.tree.flatten(shapes, is_leaf=is_shape)
    return st.tuples(*(arrays(*shape, elements=elements) for shape in leaves)).map(
        lambda drawn: structure.unflatten(list(drawn))
    )


def is_shape(node):
    return isinstance(node, tuple) and all(isinstance(size, int) for size in node)
