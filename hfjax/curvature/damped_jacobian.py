"""(J̃ᵀJ̃ + β + λ) δ = −∇f for any λ: three forms, of which `hfjax.sample_space` takes one.

β is the weight decay, a number or one for each parameter. With momentum φ, the right-hand
side is −∇f + λφ. The two Cholesky forms factor a square of J̃ for each λ. A square has only half
of the digits: in its rounding, ε · trace, singular values of J̃ below √ε of the largest are
lost. The third form decomposes J̃ itself, once for all λ.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from hfjax._core import sharding, trees
from hfjax._core.types import Tree
from hfjax._tracing import linalg
from hfjax.curvature.jacobian import Jacobian

_ROUNDING = 100
"""−∇f − J̃ᵀc counts as 0 below this many ε of its terms."""
_TALL = 1.5
"""With so many times as many rows as columns, a triangle is decomposed."""
_LOST = 10
"""Singular values below so many ε of the largest are its rounding, and count as 0."""
_HALVINGS = 60
"""From any λ to another one, which differ by hundreds of powers of ten, to rounding."""


class Problem(NamedTuple):
    """What is solved, but for λ.

    Attributes:
      jacobian: J̃ and the residuals r̃.
      decay: the least weight decay.
      excess: how much higher the decay of each parameter is; `None` is 0.
      b: −∇f.
      before: φ; `None` is 0.
    """

    jacobian: Jacobian
    decay: jax.Array
    excess: Tree | None
    b: Tree
    before: Tree | None

    @property
    def dtype(self) -> jnp.dtype:
        """Return the widest dtype of J̃ and b."""
        return trees.widest(self.jacobian.dtype, trees.scalar_dtype(self.b))

    def in_one(self, tree: Tree) -> Tree:
        """Return a tree with all leaves in the widest dtype, as one vector needs them."""
        return jax.tree.map(lambda x: x.astype(self.dtype), tree)

    def sides(self) -> tuple[jax.Array, Tree]:
        """Return c and d, so that J̃ᵀc + d is the right-hand side for δ − φ."""
        # Residuals have the dtype of the outputs, rows that of the parameters.
        jacobian, before = self.jacobian, self.before
        within = -jacobian.residuals.astype(jacobian.dtype)
        # d is not 0 if ∇f is of other data than J̃, or has a part from weight decay. If it
        # is only rounding, it is set to 0, because the step contains d / μ.
        spanned = trees.cast_like(jacobian.transpose(within), self.b)
        beyond = jax.tree.map(jnp.subtract, self.b, spanned)
        eps = jnp.finfo(within.dtype).eps
        size = trees.norm(self.b) + trees.norm(spanned)
        seen = trees.norm(beyond) > _ROUNDING * eps * size
        beyond = jax.tree.map(lambda x: jnp.where(seen, x, 0), beyond)
        # For δ − φ, the right-hand side loses (J̃ᵀJ̃ + weight decay) φ.
        if before is not None:
            within -= jacobian.product(before).astype(within.dtype)
            beyond = trees.axpy(-self.decay, before, beyond)
            if self.excess is not None:
                excess = times(self.excess, before)
                beyond = jax.tree.map(jnp.subtract, beyond, excess)
        return within, beyond


class Form(NamedTuple):
    """How the problem is solved, for any λ.

    Attributes:
      factor: λ ↦ a decomposition, or what else the other two need for this λ.
      step: a decomposition ↦ δ − φ.
      inverse: a decomposition and u ↦ (J̃ᵀJ̃ + β + λ)⁻¹J̃ᵀu.
      trace: that of J̃ᵀJ̃, which tells whether all of it is finite.
    """

    factor: Callable[[jax.Array], Tree]
    step: Callable[[Tree], Tree]
    inverse: Callable[[Tree, jax.Array], Tree]
    trace: jax.Array


def times(numbers: Tree, vectors: Tree) -> Tree:
    """Multiply a vector, or a stack of them, entry by entry."""

    def leaf(number: jax.Array, x: jax.Array) -> jax.Array:
        number = number.astype(x.dtype)
        return (number if x.ndim == number.ndim else number[None]) * x

    return jax.tree.map(leaf, numbers, vectors)


def over(vectors: Tree, numbers: Tree) -> Tree:
    """Divide a vector, or a stack of them, entry by entry."""
    return times(jax.tree.map(lambda x: 1 / x, numbers), vectors)


def in_samples(problem: Problem) -> Form:
    """Solve with a Cholesky factor of J̃W⁻¹J̃ᵀ + μI."""
    jacobian, decay, excess, *_ = problem
    within, beyond = problem.sides()  # c and d in the notation of `hfjax.sample_space`
    along = jacobian.product(beyond)
    matrix = jacobian.of_samples()

    def weigh(mu: jax.Array, vectors: Tree) -> Tree:
        """Apply W⁻¹, for μ > 0."""
        if excess is None:
            return vectors
        like = jax.tree.map(mu.astype, [x.dtype for x in jax.tree.leaves(excess)])
        inverse = [
            m / (m + x) for m, x in zip(like, jax.tree.leaves(excess), strict=True)
        ]
        return times(jax.tree.unflatten(jax.tree.structure(excess), inverse), vectors)

    def factor(damping: jax.Array) -> tuple[jax.Array, jax.Array]:
        scaled, mu = matrix, damping + decay
        if excess is not None:
            # W depends on λ, and so does the matrix, which is computed again for each.
            mu = jnp.maximum(mu.astype(matrix.dtype), linalg.least_damping(matrix))
            scaled = jacobian.of_samples(functools.partial(weigh, mu))
        return linalg.damped_cholesky(scaled, mu)

    def inverse(factored: tuple[jax.Array, jax.Array], u: jax.Array) -> Tree:
        factor, mu = factored
        solved = jacobian.transpose(linalg.cho_solve(factor, u.astype(matrix.dtype)))
        return weigh(mu, sharding.like(trees.cast_like(solved, beyond), beyond))

    def step(factored: tuple[jax.Array, jax.Array]) -> Tree:
        mu, along_d = factored[1], along
        if excess is not None:
            along_d = jacobian.product(weigh(mu, beyond))
        within_samples = inverse(factored, within - along_d / mu)
        return trees.axpy(1 / mu, weigh(mu, beyond), within_samples)

    return Form(factor, step, inverse, jnp.trace(matrix))


def in_parameters(problem: Problem) -> Form:
    """Solve with a Cholesky factor of J̃ᵀJ̃; the parameters, which are few, form one vector."""
    jacobian, decay, excess, b, before = problem
    in_one = problem.in_one
    matrix = jacobian.of_parameters().astype(problem.dtype)
    if excess is not None:
        matrix += jnp.diag(ravel_pytree(in_one(excess))[0])
    rhs, unravel = ravel_pytree(in_one(b))
    if before is not None:
        phi = ravel_pytree(in_one(before))[0]
        rhs -= jnp.matmul(matrix, phi, precision=trees.EXACT) + decay * phi

    def factor(damping: jax.Array) -> jax.Array:
        return linalg.damped_cholesky(matrix, damping + decay)[0]

    def solved(factor: jax.Array, rhs: jax.Array) -> Tree:
        found = unravel(linalg.cho_solve(factor, rhs).astype(rhs.dtype))
        return trees.cast_like(found, b)

    def inverse(factor: jax.Array, u: jax.Array) -> Tree:
        return solved(factor, ravel_pytree(in_one(jacobian.transpose(u)))[0])

    return Form(factor, lambda factor: solved(factor, rhs), inverse, jnp.trace(matrix))


def rows_decomposed(problem: Problem) -> int:
    """Count the rows of what `by_singular_values` decomposes."""
    more = 0 if problem.excess is None else optax.tree.size(problem.b)
    return len(problem.jacobian.residuals) + more


class Spectrum(NamedTuple):
    """J̃ = U S Vᵀ, and the right-hand side in its terms.

    Attributes:
      left: U without the rows of weight decay, in factors.
      values: S.
      basis: V, as rows like those of J̃.
      sides: S Uᵀc + Vᵀd, the right-hand side along V.
      rest: what of d is not along V; `None` if V spans everything.
      decay: the least weight decay.
    """

    left: Sequence[jax.Array]
    values: jax.Array
    basis: Jacobian
    sides: jax.Array
    rest: Tree | None
    decay: jax.Array

    def along(self, u: jax.Array) -> jax.Array:
        """Return Uᵀu."""
        found = u.astype(self.values.dtype)
        for factor in self.left:
            found = jnp.matmul(found, factor, precision=trees.EXACT)
        return found

    def mu(self, damping: jax.Array) -> jax.Array:
        """Return λ + β, but at least the square of what rounding leaves of a 0 in S."""
        limits = jnp.finfo(self.values.dtype)
        rounding = _LOST * limits.eps * self.values[0]
        mu = (damping + self.decay).astype(self.values.dtype)
        return jnp.maximum(mu, jnp.square(rounding) + limits.tiny)

    def length(self, mu: jax.Array) -> jax.Array:
        """Return ‖δ − φ‖."""
        along = jnp.linalg.norm(self.sides / (jnp.square(self.values) + mu))
        if self.rest is None:
            return along
        return jnp.hypot(along, trees.norm(self.rest).astype(along.dtype) / mu)

    def damping_within(self, radius: jax.Array) -> jax.Array:
        """Return the least λ for which ‖δ − φ‖ is at most `radius`, to a tenth of it."""
        # Bisection, of the logarithm: length falls from `low` to `high`.
        size = jnp.linalg.norm(self.sides)
        if self.rest is not None:
            size = jnp.hypot(size, trees.norm(self.rest).astype(size.dtype))
        low = self.mu(jnp.zeros((), self.values.dtype))
        high = jnp.maximum(size / radius.astype(size.dtype), low)

        def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple:
            low, high = ends
            middle = jnp.sqrt(low) * jnp.sqrt(high)
            longer = self.length(middle) > radius
            return jnp.where(longer, middle, low), jnp.where(longer, high, middle)

        inside = self.length(low) <= 1.1 * radius
        _, high = jax.lax.fori_loop(0, _HALVINGS, halve, (low, high))
        return jnp.where(inside, low, high) - self.decay.astype(low.dtype)


def decomposed(problem: Problem, needed: jax.Array | None = None) -> Spectrum:
    """Compute the singular values of J̃, or something of their shape if not `needed`.

    Weight decay above the least of all adds rows to J̃, with its roots.
    """
    jacobian, decay, excess, b, _ = problem
    within, beyond = problem.sides()
    rows = jacobian.matrix().astype(problem.dtype)
    _, unravel = ravel_pytree(problem.in_one(b))
    count = len(rows)
    if excess is not None:
        roots = jnp.sqrt(ravel_pytree(problem.in_one(excess))[0])
        rows = jnp.concatenate([rows, jnp.diag(roots)])
    most, is_tall = min(rows.shape), len(rows) > _TALL * rows.shape[1]

    def decompose(rows: jax.Array) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        # LAPACK is many times slower on numbers whose squares underflow.
        tiny = jnp.max(jnp.abs(rows)) * jnp.finfo(rows.dtype).eps ** 3
        rows, left = jnp.where(jnp.abs(rows) < tiny, 0, rows), []
        if is_tall:
            q, rows = linalg.qr(rows)
            left = [q]
        u, values, right = linalg.svd(rows)
        left.append(u)
        return [left[0][:count], *left[1:]], values, right

    def nothing(rows: jax.Array) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        square = [rows[:most]] * is_tall
        parts = [rows[:count, :most], *square], rows[0, :most], rows[:most]
        return jax.tree.map(jnp.zeros_like, parts)

    if needed is None:
        left, values, right = decompose(rows)
    else:
        left, values, right = jax.lax.cond(needed, decompose, nothing, rows)
    floor = _LOST * jnp.finfo(values.dtype).eps * values[0]
    values = jnp.where(values > floor, values, 0)
    basis = jacobian._replace(rows=jax.vmap(unravel)(right))
    along = basis.product(beyond).astype(values.dtype)
    rest = None
    if most < rows.shape[1]:
        spanned = trees.cast_like(basis.transpose(along), beyond)
        rest = jax.tree.map(jnp.subtract, beyond, spanned)
    found = Spectrum(left, values, basis, along, rest, decay)
    return found._replace(sides=values * found.along(within) + along)


def by_singular_values(problem: Problem, spectrum: Spectrum) -> Form:
    """Solve with J̃ = U S Vᵀ, for μ down to the square of the rounding of J̃.

    (J̃ᵀJ̃ + μI)⁻¹J̃ᵀu = V (S² + μ)⁻¹S Uᵀu, with products as long as those with J̃. (The
    formula V = J̃ᵀUS⁻¹ would take no memory, but has lost the digits that this is about.)
    """
    _, values, basis, sides, rest, *_ = spectrum

    def combined(coefficients: jax.Array) -> Tree:
        found = trees.cast_like(basis.transpose(coefficients), problem.b)
        return sharding.like(found, problem.b)

    def inverse(mu: jax.Array, u: jax.Array) -> Tree:
        return combined(spectrum.along(u) * values / (jnp.square(values) + mu))

    def step(mu: jax.Array) -> Tree:
        found = combined(sides / (jnp.square(values) + mu))
        return found if rest is None else trees.axpy(1 / mu, rest, found)

    return Form(spectrum.mu, step, inverse, jnp.sum(jnp.square(values)))


def either(first: jax.Array, form: Form, otherwise: Form) -> Form:
    """Return the form that takes `form` if `first` is true, else `otherwise`."""

    def factor(damping: jax.Array) -> tuple[Tree, Tree]:
        shapes = jax.eval_shape(otherwise.factor, damping)
        other = functools.partial(jax.lax.cond, first, lambda _: sharding.zeros(shapes))
        return form.factor(damping), other(otherwise.factor, damping)

    def step(factors: tuple[Tree, Tree]) -> Tree:
        own, other = factors
        return jax.lax.cond(
            first, lambda: form.step(own), lambda: otherwise.step(other)
        )

    def inverse(factors: tuple[Tree, Tree], u: jax.Array) -> Tree:
        own, other = factors
        return jax.lax.cond(
            first, lambda: form.inverse(own, u), lambda: otherwise.inverse(other, u)
        )

    return Form(factor, step, inverse, otherwise.trace)
