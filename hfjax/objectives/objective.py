"""Objectives: a model, a loss and data as one function f(θ), and weighted sums of them."""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hfjax._core import options
from hfjax._core.arguments import ShapeError, check_function, describe
from hfjax._core.types import Batch, Number, NumberOrSchedule, Params, Tree
from hfjax.objectives.balance import Balanced
from hfjax.objectives.balance import balanced as balanced
from hfjax.objectives.plain import Objective as Objective
from hfjax.objectives.terms import Term


def weighted_sum(
    parts: Sequence[tuple[NumberOrSchedule, Objective]], *, balance: Number = 0.0
) -> Objective:
    """Build f(θ) = Σₖ cₖ fₖ(θ), where each fₖ has its own model, loss and batch.

    Use it for the interior, boundary and data terms of a differential equation, or for
    several tasks that share parameters. It works wherever an `Objective` does: value,
    gradient, curvature (G = Σₖ cₖ Gₖ), preconditioners and `hfjax.hessian_free`, with a
    single λ. Its batch is the tuple of the terms' batches, which may differ in size:

        batch = ((interior, zeros), (boundary, values))

    A term may also be a `penalty`, which reads no data and whose batch is `()`. The mean
    is taken for each term separately, so the number of points of a term does not change
    its weight. Structural damping is not supported, and attributes of a single term, such
    as `model_fn` or `microbatch_size`, do not exist.

    If you do not know good weights, or the terms fall at different rates, let the terms be
    balanced: in each update the large ones lose weight and the small ones gain it, by at
    most a factor of 100 between two (`balanced` has the formula). The scales of the weights
    are in the state of the optimizer:

        f = weighted_sum([(1.0, interior), (1.0, boundary)], balance=0.05)
        now = f.at(state.count, state.scales)
        value, grads = now.value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)

    f is then another function in each update: do not compare its values between updates.
    Where weights of 1 do well, this may help or harm: of six runs on equations it lowered
    the error of three, by 2 to 12 times, and raised that of three, by up to 1.5 times.

    Args:
      parts: pairs (cₖ, fₖ); cₖ ≥ 0 is a number or a schedule (evaluated by `at`), and fₖ
        an `Objective` or another sum.
      balance: how far an update of `hfjax.hessian_free` balances the terms, from 0, not
        at all, to 1, all the way.

    Returns:
      The objective. Its `case_values` returns a tuple with one entry for each part.

    Raises:
      TypeError: if `parts` is not a list of such pairs.
      ValueError: if `parts` is empty, a plain cₖ is negative, an fₖ has a `hidden_loss`
        or is balanced itself; when evaluated, if the batch is not a tuple with one batch
        for each part.

    Example:
      Let u(x) = p x have slope 2 at two points, and be 1 at x = 1:

      >>> import hfjax, jax.numpy as jnp
      >>> squared_error = hfjax.losses.squared_error()
      >>> slope = Objective(lambda p, x: p + 0 * x, squared_error)
      >>> boundary = Objective(lambda p, x: p * x, squared_error)
      >>> f = weighted_sum([(1.0, slope), (3.0, boundary)])
      >>> batch = ((jnp.zeros(2), jnp.full(2, 2.0)), (jnp.ones(1), jnp.ones(1)))
      >>> value, grad = f.value_and_grad(jnp.zeros(()), batch)
      >>> print(value, grad)  # ½·2² + 3 · ½·1², −2 − 3 · 1
      3.5 -5.0
      >>> print(hfjax.curvature.ggn(f, jnp.zeros(()), batch)(jnp.ones(())))
      4.0

    References:
      Dangel, Müller & Zeinhofer (2024), "Kronecker-factored approximate curvature for
      physics-informed neural networks", section 2.
    """
    if not isinstance(parts, list | tuple):
        msg = f"`parts` must be a list of pairs (c, objective), got {describe(parts)}."
        raise TypeError(msg)
    if not parts:
        msg = "`parts` is empty: a sum of no objectives has nothing to minimise."
        raise ValueError(msg)
    for k, part in enumerate(parts):
        if not isinstance(part, tuple | list) or len(part) != 2:
            msg = f"`parts[{k}]` must be a pair (c, objective), got {describe(part)}."
            raise TypeError(msg)
        weight, objective = part
        if not isinstance(objective, Objective):
            msg = (
                f"`parts[{k}]` must be a pair (c, `hfjax.Objective`), got "
                f"{describe(objective)} in second place."
            )
            raise TypeError(msg)
        options.check_range(f"parts[{k}][0]", weight, low=0.0)
        if objective.hidden_loss is not None:
            msg = (
                f"`parts[{k}]` has a `hidden_loss`: there is no structural damping of a "
                "sum."
            )
            raise ValueError(msg)
        if getattr(objective, "balance", 0):
            msg = f"`parts[{k}]` is balanced itself: balance the outermost sum alone."
            raise ValueError(msg)
    options.check_range("balance", balance, low=0.0, high=1.0)
    if balance:
        parts = [(Balanced(weight), objective) for weight, objective in parts]
    return _Sum(parts, balance)


def penalty(fn: Callable[[Params], jax.Array]) -> Objective:
    """Build a term that reads the parameters and no data, to add to a `weighted_sum`.

        f = weighted_sum([(1.0, data), (1e-3, penalty(fn))]);    batch = ((x, t), ())

    Its batch is `()`. Its G is ∇²`fn`, so `fn` should be convex, and its diagonal damps the
    Kronecker factors of the layers that it reads. |θ| has no curvature: G is 0, and the
    model knows only its slope. √(θ² + ε²) is a smooth form, with curvature 1/ε at 0. For
    ½ β ‖θ‖² use `Objective(weight_decay=…)`, which costs nothing and may differ from layer
    to layer.

    Preconditioners and diagonals are exact if `fn` sums over entries, or over groups of
    entries as a group lasso does; see `hfjax.losses.from_function`. A penalty on outputs
    that are not linear in the parameters, such as ‖WᵀW − I‖², is an `Objective` whose model
    ignores its inputs, for one example.

    Args:
      fn: `params -> scalar`.

    Returns:
      The objective.

    Raises:
      TypeError: if `fn` is not callable.
      ValueError: when evaluated, if `fn` does not return a scalar.

    Example:
      A group lasso with a single group, ‖θ‖: its Hessian is (I − θθᵀ/‖θ‖²) / ‖θ‖.

      >>> import hfjax, jax.numpy as jnp
      >>> f = penalty(lambda p: jnp.sqrt(jnp.sum(p**2)))
      >>> p = jnp.array([3.0, 4.0])
      >>> value, grad = f.value_and_grad(p, ())
      >>> print(value, grad, hfjax.curvature.ggn(f, p, ())(jnp.array([4.0, -3.0])))
      5.0 [0.6 0.8] [ 0.8 -0.6]
    """
    check_function("fn", fn, "params -> scalar")

    # The outputs of the one example are the parameters, and `fn` is their loss. So L″ is
    # ∇²fn, and every part of the library finds what it finds for any loss.
    def outputs(params: Params, inputs: jax.Array) -> Params:
        count = inputs.shape[0]
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), params)

    def value(outputs: Params, _: Tree) -> jax.Array:
        values = jax.vmap(fn)(outputs)
        if jnp.ndim(values) != 1:
            msg = f"`fn` must return a scalar, got {describe(values[0])}."
            raise ShapeError(msg)
        return values

    return Objective(outputs, value)


class _Sum(Objective):
    """Σₖ cₖ fₖ(θ) of `weighted_sum`; `parts` are the pairs (cₖ, fₖ)."""

    parts: tuple[tuple[NumberOrSchedule, Objective], ...]
    balance: Number
    hidden_loss: None

    _no_hidden = (
        "a weighted sum has none, even if its terms do. Leave out `structural`, or put "
        "the terms into one `Objective`."
    )

    # `Objective` is a frozen dataclass, whose constructor would want a model and a loss.
    def __init__(
        self,
        parts: Sequence[tuple[NumberOrSchedule, Objective]],
        balance: Number = 0.0,
    ) -> None:
        parts = tuple((c, part) for c, part in parts)
        vars(self).update(parts=parts, balance=balance, hidden_loss=None)

    def __getattr__(self, name: str) -> Any:
        if name == "axis_name":
            axes = {part.axis_name for _, part in self.parts} - {None}
            return next(iter(axes), None)
        fields = {field.name for field in dataclasses.fields(Objective)}
        why = ": its parts have." if name in fields else "."
        msg = f"A weighted sum has no `{name}`{why}"
        raise AttributeError(msg)

    def __repr__(self) -> str:
        return f"weighted_sum({list(self.parts)!r})"

    def at(self, count: jax.Array | int, scales: Tree = None) -> "_Sum":
        """Return f at an update, with the values of any schedules, times `scales`."""
        now = jnp.asarray(count)
        weights = [c for c, _ in self.parts]
        if scales is not None:
            scales = jnp.asarray(scales)
            if scales.shape != (len(weights),):
                msg = (
                    f"`scales` must be {len(weights)} numbers, one for each part, got "
                    f"shape {scales.shape}."
                )
                raise ValueError(msg)
            weights = [c.weight if isinstance(c, Balanced) else c for c in weights]
        weights = [options.read(c, now) if callable(c) else c for c in weights]
        if scales is not None:
            pairs = zip(scales, weights, strict=True)
            weights = [s * options.like(c, s) for s, c in pairs]
        parts = [part.at(count) for _, part in self.parts]
        return _Sum(list(zip(weights, parts, strict=True)), self.balance)

    def case_values(self, params: Params, batch: Batch) -> tuple:
        """Compute each part's `case_values`, as a tuple because their sizes differ."""
        self._terms(batch)  # Raises unless `batch` fits.
        return tuple(
            part.case_values(params, own)
            for (_, part), own in zip(self.parts, batch, strict=True)
        )

    def _terms(self, batch: Batch, name: str = "batch") -> tuple[Term, ...]:
        if not isinstance(batch, tuple | list) or len(batch) != len(self.parts):
            came = type(batch).__name__
            came += f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
            msg = (
                f"`{name}` of a weighted sum must be a tuple of its terms' "
                f"{len(self.parts)} batches, each (inputs, targets) or (inputs, "
                f"targets, weights), or () for a penalty, got {came}."
            )
            raise ValueError(msg)
        # A part that is itself a sum has several terms, and its weights multiply theirs.
        return tuple(
            term._replace(coefficients=(c, *term.coefficients))
            for k, ((c, part), own) in enumerate(zip(self.parts, batch, strict=True))
            for term in part._terms(own, f"{name}[{k}]")
        )

    def _each(self, change: Callable[[Objective], Objective]) -> "_Sum":
        parts = [(c, part._each(change)) for c, part in self.parts]
        return _Sum(parts, self.balance)

    def _subsample(self, batch: Batch, cases: int) -> Batch:
        fewer = tuple(
            part._subsample(own, cases)
            for (_, part), own in zip(self.parts, batch, strict=True)
        )
        return batch if all(map(operator.is_, fewer, batch)) else fewer
