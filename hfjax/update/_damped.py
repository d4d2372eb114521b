"""A = B + λD + μS, as products with packed vectors."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hfjax._core import trees
from hfjax._core.arguments import as_product
from hfjax._core.packing import Packing
from hfjax._core.types import Approximate, Matvec, Tree, exact_of
from hfjax.curvature import ggn
from hfjax.curvature.structural import hidden_distance
from hfjax.globalization.damping_matrices import identity
from hfjax.globalization.rule import Damping
from hfjax.update._drawn import Drawn
from hfjax.update.point import Point


def damping_of(
    point: Point,
    drawn: Drawn,
    rule: Damping,
    mu: jax.Array | None,
    matvec: Matvec,
    packed: Packing,
) -> tuple[Matvec, Tree, list[tuple[jax.Array, Matvec]]]:
    """Add λD to `matvec`, which is B, or B + μS with structural damping.

    Also return the diagonal of λD, for P, which is a scalar 0 if there is none; and the
    terms of A − B, as pairs: λ and D, μ and S.
    """
    _, params, _, _, _, scalar, _, key, *_ = point
    objective, batch, *_ = drawn

    def of_vectors(name: str, product: Matvec, matrix: str = "A @ v") -> Matvec:
        return of_packed(packed, as_product(name, product, matrix=matrix))

    total = product = of_vectors("matvec", matvec)
    penalties: list[tuple[jax.Array, Matvec]] = []
    diagonal: Tree = jnp.zeros((), scalar.dtype)
    if rule.matrix is not None:
        matrix = rule.matrix.build(
            objective, params, batch, matvec, jax.random.fold_in(key, 1)
        )
        times_d = matrix.matvec
        if matrix.matvec is matvec:
            times_d = product
        elif rule.matrix is not identity():
            times_d = of_vectors("matrix", matrix.matvec, "D @ v")
        total = damped(product, scalar, times_d)
        penalties.append((scalar, times_d))
        if matrix.diagonal is not None:
            d = matrix.diagonal
            diagonal = jax.tree.map(lambda d: scalar.astype(d.dtype) * d, d)
    # S alone is needed only for an M without damping.
    if mu is not None and rule.ratio.model == "undamped":
        distance = ggn(hidden_distance(objective), params, batch)
        penalties.append((mu, of_vectors("matvec", distance)))
    return total, diagonal, penalties


def root_of(rule: Damping, packed: Packing) -> Callable[[Tree], Tree] | None:
    """Return packed diag(G) ↦ packed √D, if D is made of that alone."""
    made = None if rule.matrix is None else rule.matrix.of_diagonal
    if made is None:
        return None
    return lambda d: jax.tree.map(jnp.sqrt, packed.pack(made(packed.unpack(d))))


def of_packed(packed: Packing, product: Matvec) -> Matvec:
    """Return the same product for packed vectors."""
    if isinstance(product, Approximate):
        return Approximate(*(of_packed(packed, each) for each in product))

    def of_vector(v: Tree) -> Tree:
        tree = packed.unpack(v)
        return packed.pack(trees.cast_like(product(tree), tree))

    return of_vector


def damped(matvec: Matvec, damping: jax.Array, matrix: Matvec | None = None) -> Matvec:
    """Return v ↦ B v + λ D v; `matrix=None` stands for D = I."""

    def product(v: Tree) -> Tree:
        d_v = v if matrix is None else matrix(v)
        return trees.axpy(jnp.asarray(damping), d_v, matvec(v))

    if not isinstance(matvec, Approximate):
        return product
    exact = damped(matvec.exact, damping, None if matrix is None else exact_of(matrix))
    return Approximate(product, exact)
