"""Losses made of losses: one for each part of the outputs, and multiples.

Closed forms are kept: the curvature of the result is made of the curvature of its parts,
block by block. A variational autoencoder, whose KL divergence reads no targets:

    >>> import hfjax, jax.numpy as jnp
    >>> losses = hfjax.losses
    >>> kl = losses.scaled(0.5, losses.gaussian_kl_divergence())
    >>> loss = losses.tree({"image": losses.sigmoid_cross_entropy(), "latent": kl})
    >>> latent = jnp.array([[2.0]]), jnp.zeros((1, 1))
    >>> outputs = {"image": jnp.zeros((1, 3)), "latent": latent}
    >>> targets = {"image": jnp.ones((1, 3)), "latent": None}
    >>> value = loss.value(outputs, targets)  # 3 log 2 + ½ · ½·2²
    >>> bool(jnp.allclose(value, 3 * jnp.log(2) + 1))
    True
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from hfjax._core import options, trees
from hfjax._core.arguments import describe, noting_call
from hfjax._core.types import Number, Tree
from hfjax.losses.loss import LinearMap, Loss, Targets, sum_to_cases
from hfjax.losses.matching import from_function

_Function: TypeAlias = Callable[[Tree, Tree], jax.Array]


def tree(losses: Tree) -> Loss:
    """Return the sum of losses that each read their own part of the outputs.

    `losses` is a tree: a dict, a tuple, a NamedTuple, or one within another. Outputs and
    targets must begin with the same tree. Each loss reads what stands at its place there,
    an array or another tree. Where a loss reads no targets, they may be `None`.

        L(z, t) = Σₖ Lₖ(zₖ, tₖ),    L″ = diag(L″₁, L″₂, …),    S = diag(S₁, S₂, …)

    Values, products, `predict`, `targets` and `coarse` are those of the parts, so a loss in
    closed form stays one. A weight is set by `scaled`. If the parts do not have the same
    examples, or if a weight follows a schedule, use `hfjax.objective.weighted_sum`.

    Args:
      losses: a tree of losses: each an `hfjax.losses.Loss` or, as in `hfjax.Objective`, a
        function `(outputs, targets) -> array` whose first axis indexes the examples.

    Returns:
      The loss.

    Raises:
      TypeError: if a leaf of `losses` is neither.
      ValueError: if there is no loss; when the loss is evaluated, if outputs or targets do
        not begin with the same tree.

    Example:
      Two heads of a model, with the labels of one and the numbers of the other:

      >>> import hfjax, jax.numpy as jnp, optax
      >>> loss = tree(
      ...     {
      ...         "class": hfjax.losses.softmax_cross_entropy_with_integer_labels(),
      ...         "box": optax.losses.huber_loss,
      ...     }
      ... )
      >>> outputs = {"class": jnp.zeros((1, 2)), "box": jnp.array([[0.5, 3.0]])}
      >>> targets = {"class": jnp.array([1]), "box": jnp.zeros((1, 2))}
      >>> product = loss.hessian(outputs, targets)(outputs)
      >>> print(product["box"])  # Huber's loss has no curvature beyond 1.
      [[0.5 0. ]]
    """
    found, structure = jax.tree_util.tree_flatten_with_path(losses, is_leaf=_is_leaf)
    if not found:
        msg = f"`losses` holds no loss, got {losses!r}."
        raise ValueError(msg)
    where = [jax.tree_util.keystr(path) for path, _ in found]
    parts = [
        _as_loss(f"losses{path}", part)
        for path, (_, part) in zip(where, found, strict=True)
    ]
    if jax.tree_util.treedef_is_leaf(structure):
        return parts[0]

    def twin(losses: list[Loss | None]) -> Loss | None:
        found = [part for part in losses if part is not None]
        if len(found) < len(losses):
            return None
        return _Tree(where, found, structure, by_position=True).loss()

    # Of parts whose examples do not mix, `weighted` is the loss of a whole batch as well.
    whole = None
    if any(part.whole for part in parts):
        whole = twin([part.whole or part.weighted for part in parts])
        given = twin([(part.whole or part).weighted for part in parts])
        whole = whole and dataclasses.replace(whole, weighted=given)
    return dataclasses.replace(
        _Tree(where, parts, structure).loss(),
        weighted=twin([part.weighted for part in parts]),
        whole=whole,
    )


def scaled(c: Number, loss: Loss | _Function) -> Loss:
    """Return c times a loss, with L″ times c and S times √c.

    In a tree of losses this weighs one against the others, as β does in a β-VAE.

    Args:
      c: a number ≥ 0, which may be traced. For a schedule use
        `hfjax.objective.weighted_sum`.
      loss: an `hfjax.losses.Loss`, or a function `(outputs, targets) -> array`.

    Returns:
      The loss; all else is that of `loss`.

    Raises:
      TypeError: if `c` is not a number or `loss` not a loss.
      ValueError: if `c` is a plain number below 0.

    Example:
      `optax.losses.squared_error` is ‖z − t‖², without the factor ½:

      >>> import hfjax, jax.numpy as jnp
      >>> twice = scaled(2.0, hfjax.losses.squared_error())
      >>> z, t = jnp.array([[3.0, 4.0]]), jnp.zeros((1, 2))
      >>> print(twice.value(z, t), twice.hessian(z, t)(z))
      [25.] [[6. 8.]]
    """
    if callable(c) or c is None:
        msg = (
            f"`c` must be a number, got {describe(c)}. A weight that follows a schedule "
            "is one of `hfjax.objective.weighted_sum`."
        )
        raise TypeError(msg)
    options.check_range("c", c, low=0.0)
    part = _as_loss("loss", loss)

    def value(outputs: Tree, targets: Tree) -> jax.Array:
        return trees.scale(jnp.asarray(c), part.value(outputs, targets))

    def times(
        power: float, build: Callable[[Tree, Tree], LinearMap]
    ) -> Callable[[Tree, Tree], LinearMap]:
        def product(outputs: Tree, targets: Tree) -> LinearMap:
            apply, a = build(outputs, targets), jnp.asarray(c, float) ** power
            return lambda v: trees.scale(a, apply(v))

        return product

    return dataclasses.replace(
        part,
        value=value,
        hessian=times(1.0, part.hessian),
        factor=times(0.5, part.factor),
        weighted=part.weighted and scaled(c, part.weighted),
        whole=part.whole and scaled(c, part.whole),
    )


class _Tree(NamedTuple):
    """Losses, the path of each, and the structure that they stand in.

    With `by_position`, targets are pairs (targets, weights), and all parts get the weights.
    """

    where: list[str]
    parts: list[Loss]
    structure: Any
    by_position: bool = False

    def loss(self) -> Loss:
        return Loss(
            self.value,
            functools.partial(self.product, lambda part: part.hessian),
            functools.partial(self.product, lambda part: part.factor),
            self.predict,
            self.targets(),
            self.coarse,
        )

    def value(self, outputs: Tree, targets: Tree) -> jax.Array:
        def of_part(part: Loss, z: Tree, t: Tree) -> jax.Array:
            return sum_to_cases(part.value(z, t), z, part.value)

        values = self.each(of_part, outputs, targets)
        dtype = trees.widest(*(x.dtype for x in values))
        return functools.reduce(jnp.add, [x.astype(dtype) for x in values])

    def product(
        self,
        build: Callable[[Loss], Callable[[Tree, Tree], LinearMap]],
        outputs: Tree,
        targets: Tree,
    ) -> LinearMap:
        maps = self.each(lambda part, z, t: build(part)(z, t), outputs, targets)

        def apply(v: Tree) -> Tree:
            pairs = zip(maps, self.structure.flatten_up_to(v), strict=True)
            return self.structure.unflatten([apply(x) for apply, x in pairs])

        return apply

    def predict(self, outputs: Tree) -> Tree:
        pairs = zip(self.parts, self.taken("outputs", outputs), strict=True)
        return self.structure.unflatten([part.predict(z) for part, z in pairs])

    def targets(self) -> Targets | None:
        meant = [part.targets for part in self.parts]
        words = [
            f"{each.words} at targets{path}"
            for path, each in zip(self.where, meant, strict=True)
            if each is not None
        ]

        def allowed(outputs: Tree, targets: Tree) -> jax.Array:
            def of_part(part: Loss, z: Tree, t: Tree) -> jax.Array | None:
                return None if part.targets is None else part.targets.allowed(z, t)

            found = self.each(of_part, outputs, targets)
            return functools.reduce(
                jnp.logical_and, [fits for fits in found if fits is not None]
            )

        return Targets(" and ".join(words), allowed) if words else None

    def coarse(self, outputs: Tree, targets: Tree) -> str | None:
        found = self.each(lambda part, z, t: part.coarse(z, t), outputs, targets)
        return next((clause for clause in found if clause is not None), None)

    def each(self, read: Callable, outputs: Tree, targets: Tree) -> list[Any]:
        """Call `read` with each loss and its part of the outputs and the targets."""
        targets, *weights = targets if self.by_position else (targets,)
        taken = self.taken("outputs", outputs), self.taken("targets", targets)
        found = []
        for path, part, z, t in zip(self.where, self.parts, *taken, strict=True):
            with noting_call(f"`losses{path}`", outputs=z, targets=t):
                found.append(read(part, z, (t, *weights) if weights else t))
        return found

    def taken(self, name: str, tree: Tree) -> list[Tree]:
        """Return the part of a tree for each loss; `name` is for the error."""
        try:
            return self.structure.flatten_up_to(tree)
        except ValueError as error:
            cure = {
                "outputs": "Let `model_fn` return a part for each loss, in the same "
                "dicts and tuples",
                "targets": "Give each loss its targets, in the same dicts and tuples, "
                "or `None` if it reads none",
            }[name]
            losses = self.structure.unflatten(self.parts)
            msg = (
                f"`{name}` must begin with the tree of the losses, {describe(losses)}, "
                f"got {describe(tree)}. {cure}."
            )
            raise ValueError(msg) from error


def _is_leaf(x: object) -> bool:
    # A function may be a tree itself, as Equinox's modules are; `None` is not a loss.
    return x is None or callable(x)


def _as_loss(name: str, loss: Loss | _Function) -> Loss:
    if isinstance(loss, Loss):
        return loss
    if not callable(loss):
        msg = (
            f"`{name}` must be an `hfjax.losses.Loss` or a function (outputs, targets) "
            f"-> values per case, got {describe(loss)}."
        )
        raise TypeError(msg)
    return from_function(loss)
