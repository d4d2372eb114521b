"""What a rule for λ, or for a radius, is: the search of an update."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import options
from hfjax._core.types import Number, NumberOrSchedule
from hfjax.globalization.backtracking import Backtracking
from hfjax.globalization.damping_matrices import DampingMatrix, identity


class ReductionRatio(NamedTuple):
    """What ρ is the ratio of; implementations disagree.

    Attributes:
      model: `"undamped"`, M with B alone (report, equation 10; Martens' program), or
        `"damped"`, with A (section 8.5: "will give similar results").
      step: δ as `"chosen"` by backtracking (Martens' program), the `"last"` iterate
        of CG, or as `"taken"`, after the line search.
      data: that f is measured on: `"batch"`, the curvature data (Martens' program),
        or `"eval_batch"`.
      expected: the share of M(δ) that f is expected to fall by, which ρ is divided
        by: 1, or with data other than the curvature batch about that batch's share
        of all training data (section 12.2: aim for "a more modest reduction").
    """

    model: str = "undamped"
    step: str = "chosen"
    data: str = "batch"
    expected: Number = 1.0


class Structural(NamedTuple):
    """How strong structural damping is.

    Attributes:
      strength: μ, or μ / λ if tied; a number or schedule.
      tied: whether μ = strength · λ, so that both adapt.
    """

    strength: NumberOrSchedule
    tied: bool

    def at(self, damping: jax.Array, count: jax.Array) -> jax.Array:
        """Return μ of an update.

        Args:
          damping: its λ.
          count: updates so far.

        Returns:
          μ, a scalar.
        """
        strength = options.read(self.strength, count).astype(damping.dtype)
        return strength * damping if self.tied else strength


class Verdict(NamedTuple):
    """What came of an update's step: the evidence that a rule adapts its number by.

    Attributes:
      ratio: ρ; −∞ of a rejected step, and 1 of a step too small to be seen in f.
      accepted: whether the step was taken.
      seen: whether f can show the step: its fall is more than rounding.
      has_part: whether λ, or the radius, had a part in the step.
      on_boundary: whether a trust region held the step back.
    """

    ratio: jax.Array
    accepted: jax.Array | bool = True
    seen: jax.Array | bool = True
    has_part: jax.Array | bool = True
    on_boundary: jax.Array | bool = False


class Damping(NamedTuple):
    """A rule for λ, or for the radius of a trust region: a search, in optimistix's words.

    Attributes:
      init: `() -> λ` before the first update.
      current: `(λ, count) -> λ` that this update uses, given the state's.
      update: `(λ, verdict, found) -> λ` for the next update; `found` is the λ that
        backtracking found, if it looked for one, else `None`.
      ratio: what ρ is the ratio of.
      matrix: D; `None` is A = B + μS, where the number is read by the solver alone.
      structural: μ, or `None`.
      backtracking: the rule of backtracking that it wants, where the solver can tell the
        steps for other λ; `None` is `early_stop()`.
      scalar: what it drives: a `"damping"` λ; a λ that is `"fixed"`, so that nothing that
        came of a step moves it; or the `"radius"` of a trust region.
        `hfjax.hessian_free` compares it with the solver's.
    """

    init: Callable[[], jax.Array]
    current: Callable[[jax.Array, jax.Array], jax.Array]
    update: Callable[..., jax.Array]
    ratio: ReductionRatio
    matrix: DampingMatrix | None = identity()
    structural: Structural | None = None
    backtracking: Backtracking | None = None
    scalar: str = "damping"


def if_told(verdict: Verdict, adapted: jax.Array, now: jax.Array) -> jax.Array:
    """Return the adapted number; as it is now where the step tells nothing of it.

    If f cannot show the step, and λ did not limit it either, λ stays: at a minimum it would
    fall for ever, and be of no use for the next data.
    """
    told = jnp.asarray(verdict.seen) | verdict.has_part
    return jnp.where(told, adapted, now)
