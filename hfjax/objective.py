"""Objectives: a model, a loss and data as one function f(θ), and weighted sums of them."""

from collections.abc import Sequence

from hfjax import _options
from hfjax._arguments import describe
from hfjax._objective import Objective as Objective
from hfjax._types import NumberOrSchedule
from hfjax._weighted_sum import WeightedSum


def weighted_sum(
    parts: Sequence[tuple[NumberOrSchedule, Objective]],
) -> WeightedSum:
    """Build f(θ) = Σₖ cₖ fₖ(θ), each fₖ with a model, a loss and a batch of its own.

    For a differential equation's interior, boundary and data, or for several tasks with
    the same parameters. It goes wherever an `Objective` goes: value, gradient, curvature
    (G = Σₖ cₖ Gₖ), preconditioners, and `hfjax.hessian_free` with one λ. A batch of it is
    the tuple of the terms' batches, of as many cases as each has:

        batch = ((interior, zeros), (boundary, values))

    Means are taken term by term: twice as many points of a term do not count twice.
    There is no structural damping of a sum.

    Args:
      parts: pairs (cₖ, fₖ), cₖ ≥ 0 a number or schedule (read by `at`); fₖ an
        `Objective`, or another sum.

    Returns:
      The objective. Its `case_values` are a tuple.

    Raises:
      TypeError: if `parts` are no such pairs.
      ValueError: if there are none, a plain cₖ is negative, or an fₖ has a
        `hidden_loss`; in use, if the batch is no tuple of as many batches.

    Example:
      u(x) = p x is to have the slope 2, on two points, and to be 1 at x = 1:

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
        _options.check_range(f"parts[{k}][0]", weight, low=0.0)
        if objective.hidden_loss is not None:
            msg = (
                f"`parts[{k}]` has a `hidden_loss`: there is no structural damping of a "
                "sum."
            )
            raise ValueError(msg)
    return WeightedSum([(weight, objective) for weight, objective in parts])
