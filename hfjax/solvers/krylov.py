"""Krylov subspace descent: minimise f itself over the space that CG would search.

The K-dimensional space of P⁻¹b, (P⁻¹A) P⁻¹b, … and the previous step contains the
solution of every damped system (B + λI) x = b that K − 1 iterations of conjugate
gradients from 0 reach, whatever λ is. So no λ is needed: f is minimised in this space,
first over λ, then by BFGS. This takes memory for K copies of the parameters, and some
tens of gradients.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import options, sharding, trees
from hfjax._core.arguments import as_product, as_vector
from hfjax._core.refusal import without_derivative
from hfjax._core.types import Matvec, Number, Preconditioner, Tree
from hfjax._tracing import compiled, linalg
from hfjax.solvers import _bfgs
from hfjax.solvers.descent import Reason, Run, RunStats, Solver, Step, System
from hfjax.solvers.pcg import as_preconditioner

_TIKHONOV = tuple(10.0**power for power in range(-6, 4))
"""The λ to try first, besides 0, relative to the largest curvature in the subspace."""


class Basis(NamedTuple):
    """An orthonormal basis of a subspace.

    Attributes:
      vectors: V, a tree like b with a leading axis of K; zeros if the space is smaller.
      matrix: VᵀA V, shape `[K, K]`.
    """

    vectors: Tree
    matrix: jax.Array


def basis(
    matvec: Matvec,
    b: Tree,
    dimension: int,
    /,
    *,
    preconditioner: Preconditioner | None = None,
    direction: Tree | None = None,
    fill: Callable[[jax.Array], Tree] | None = None,
) -> Basis:
    """Build an orthonormal basis of the Krylov space, and A in it, with K products.

    The result has no derivative, just as that of `hfjax.cg.solve`.

    Args:
      matvec: `v -> A v`, symmetric.
      b: the right-hand side, like the parameters; integers are converted to floats.
      dimension: K, a Python integer.
      preconditioner: `r -> P⁻¹ r`; `None` is the identity.
      direction: the vector to end the basis with, instead of the last Krylov vector.
      fill: `k -> v`, a vector to continue with if the space is exhausted before the k-th
        vector; `None` fills up with zeros.

    Returns:
      The basis.

    Raises:
      TypeError: if `dimension` is not a Python integer, or another argument has the wrong
        type.
      ValueError: if `dimension` is less than 1, or if `direction` or a product is not a
        tree like `b`.

    Example:
      >>> d = jnp.array([1.0, 2.0, 4.0])
      >>> v, a = basis(lambda v: d * v, jnp.ones(3), 3)
      >>> print(jnp.linalg.eigvalsh(a).round(4))  # the basis spans the whole space
      [1. 2. 4.]
    """
    options.check_count("dimension", dimension, low=1)
    matvec, b = as_product("matvec", matvec), as_vector("b", b)
    if direction is not None:
        direction = as_vector("direction", direction, like=b, whose="`b`")
        direction = trees.cast_like(direction, b)
    precondition = as_preconditioner(preconditioner) or (lambda r: r)

    def built(b: Tree, direction: Tree | None) -> Basis:
        empty = jax.tree.map(
            lambda x: jnp.broadcast_to(x[None], (dimension, *x.shape)),
            sharding.zeros_like(b),
        )

        def add(k: jax.Array, carry: tuple[Basis, Tree]) -> tuple[Basis, Tree]:
            # The short recurrence of Lanczos would lose orthogonality to rounding, so
            # every vector is orthogonalised against all before it.
            (vectors, matrix), candidate = carry
            v = _orthonormal(candidate, vectors)
            if fill is not None:
                go_on = fill
                v = jax.lax.cond(
                    trees.norm(v) > 0,
                    lambda: v,
                    lambda: _orthonormal(go_on(k), vectors),
                )
            vectors = trees.with_row(vectors, k, v)
            product = matvec(v)
            matrix = matrix.at[:, k].set(trees.coordinates(vectors, product))
            following = trees.cast_like(precondition(product), v)
            if direction is not None:  # It replaces the last candidate.
                following = trees.select(k == dimension - 2, direction, following)
            return Basis(vectors, matrix), following

        first = trees.cast_like(precondition(b), b)
        if direction is not None and dimension == 1:
            first = direction
        matrix = jnp.zeros((dimension, dimension), trees.scalar_dtype(b))
        start = (Basis(empty, matrix), first)
        (vectors, matrix), _ = jax.lax.fori_loop(0, dimension, add, start)
        # Column k was computed when only the vectors up to k were known.
        upper = jnp.triu(matrix)
        return Basis(vectors, upper + jnp.triu(upper, 1).T)

    found = compiled.run(built, b, direction)
    return without_derivative("A basis of a Krylov space", found)


def subspace_descent(
    *, dimension: int = 20, max_iterations: int = 30, floor: Number = 1e-4
) -> Solver:
    """Solve for the direction by minimising f over a Krylov space and the last step.

    f is evaluated on the evaluation data, so pass an `eval_batch` of its own to `update`,
    as Vinyals & Povey do. The best of the damped steps over a grid of λ, from 1e-6 to 1e3
    of the largest curvature, is the start of BFGS, which never makes f higher. Use this
    solver with `damping=hfjax.damping.constant(0.0)`. A rule that adapts λ is refused,
    because a step that minimises f does not belong to any particular λ.

    Args:
      dimension: K, including the last step.
      max_iterations: the most iterations of BFGS, with one or two gradients each.
      floor: curvatures in the subspace count by their absolute value, and as at least
        this fraction of the largest.

    Returns:
      The solver. Its updates report `cg_reason` MAX_ITERATIONS and `cg_iterations` K.

    Raises:
      TypeError: if a count is not a Python integer.
      ValueError: if an option is out of range.

    References:
      Vinyals & Povey (2012); Martens & Sutskever (2012), section 8.1.
    """
    options.check_count("dimension", dimension, low=2)
    options.check_count("max_iterations", max_iterations, low=1)
    options.check_range("floor", floor, low=0.0, high=1.0, open_low=True)

    def solve(system: System, direction: Tree) -> Run:
        size = trees.magnitude(system.b)
        size = jnp.where(jnp.isfinite(size), size, 1)
        b = trees.scale(1 / size, system.b)
        inverse = system.preconditioner()
        built = basis(
            system.matvec, b, dimension, preconditioner=inverse, direction=direction
        )
        slope = trees.coordinates(built.vectors, b)
        # If a product is not finite, all vectors become 0 and so does the step.
        finite = jnp.all(jnp.isfinite(built.matrix)) & jnp.all(jnp.isfinite(slope))
        matrix = jnp.where(finite, built.matrix, jnp.eye(dimension, dtype=slope.dtype))
        slope = size * jnp.where(finite, slope, 0)
        nothing = sharding.zeros_like(built.vectors)
        vectors = trees.select(finite, built.vectors, nothing)

        value = _within(system, vectors)
        weights = _minimise(value, matrix, slope, floor, max_iterations)
        x = trees.combination(weights, vectors)
        curved = jnp.matmul(matrix, weights, precision=trees.EXACT)
        model = jnp.sum(weights * (0.5 * curved - slope))
        reason = jnp.where(finite, Reason.MAX_ITERATIONS, Reason.NONFINITE)
        iteration = jnp.asarray(dimension, jnp.int32)
        models = jnp.zeros(dimension + 1, slope.dtype).at[-1].set(model)
        stats = RunStats(iteration, reason.astype(jnp.int32), models)
        step = Step(x, model, iteration)
        return Run(without_derivative("A descent in a Krylov space", step), stats)

    return Solver(lambda direction, count: direction, solve, scalar="fixed")


def _within(system: System, vectors: Tree) -> Callable[[jax.Array], jax.Array]:
    """Return a ↦ f(θ + V a), whose derivative costs one gradient of f."""

    # Defined by hand, so that the gradient is the objective's own, taken in microbatches
    # and over devices.
    @jax.custom_vjp
    def value(weights: jax.Array) -> jax.Array:
        f = system.value(trees.combination(weights, vectors))
        return trees.finite_or_inf(f).astype(weights.dtype)

    def forward(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        f, gradient = system.value_and_grad(trees.combination(weights, vectors))
        f = trees.finite_or_inf(f).astype(weights.dtype)
        return f, trees.coordinates(vectors, gradient).astype(weights.dtype)

    value.defvjp(forward, lambda gradient, cotangent: (cotangent * gradient,))
    return value


def _minimise(
    value: Callable[[jax.Array], jax.Array],
    matrix: jax.Array,
    slope: jax.Array,
    floor: Number,
    max_iterations: int,
) -> jax.Array:
    """Minimise f over the subspace, over λ and then by BFGS; return the coordinates."""
    curvatures, rotation = linalg.eigh(matrix)
    largest = jnp.max(jnp.abs(curvatures))
    largest = jnp.where(largest > 0, largest, 1)
    lowest = options.like(floor, largest) * largest
    curvatures = jnp.maximum(jnp.abs(curvatures), lowest)
    rotate = functools.partial(jnp.matmul, rotation, precision=trees.EXACT)
    rotated = jnp.matmul(rotation.T, slope, precision=trees.EXACT)

    damping = largest * jnp.asarray((0.0, *_TIKHONOV), slope.dtype)
    steps = rotated[None] / (curvatures[None] + damping[:, None])
    values = jax.lax.map(lambda step: value(rotate(step)), steps)
    best = jnp.argmin(jnp.where(jnp.isnan(values), jnp.inf, values))

    # BFGS works in coordinates c in which the curvature is I and the first gradient has
    # length 1.
    root = jnp.sqrt(curvatures)
    unit = jnp.sqrt(jnp.sum(jnp.square(rotated / root)))
    unit = jnp.where(unit > 0, unit, 1)

    def to_weights(c: jax.Array) -> jax.Array:
        return rotate(unit * c / root)

    def scaled(c: jax.Array) -> jax.Array:
        return (value(to_weights(c)) - values[best]) / unit**2

    start = steps[best] * root / unit
    return to_weights(_bfgs.minimise(scaled, start, max_iterations))


def _orthonormal(candidate: Tree, vectors: Tree) -> Tree:
    """Return the part of `candidate` orthogonal to `vectors`, of length 1 or 0."""
    before = trees.norm(candidate)
    v = trees.scale(1 / jnp.where(before > 0, before, 1), candidate)
    for _ in range(2):  # "Twice is enough" (Kahan; Parlett 1998, section 6.9).
        along = trees.combination(trees.coordinates(vectors, v), vectors)
        v = trees.axpy(-jnp.ones(()), along, v)
    after = trees.norm(v)
    # The rest is noise if its size is that of the rounding.
    new = after > 100 * jnp.finfo(after.dtype).eps
    return trees.scale(jnp.where(new, 1 / jnp.where(new, after, 1), 0), v)
