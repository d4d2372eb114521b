"""The interface of a rule for λ, or for the radius of a trust region."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import options
from hfjax._core.types import Number, NumberOrSchedule
from hfjax.globalization.backtracking import Backtracking
from hfjax.globalization.damping_matrices import DampingMatrix, identity


class ReductionRatio(NamedTuple):
    """How to measure ρ, on which implementations disagree.

    Attributes:
      model: `"undamped"`, M with B alone, or `"damped"`, M with A.
      step: δ: the step `"chosen"` by backtracking, the `"last"` one of the run, or the
        one `"taken"`, after the line search.
      data: the data for f: `"batch"`, the curvature data, or `"eval_batch"`.
      expected: the fraction of M(δ) by which f is expected to change; ρ is divided by it.
        For data other than the curvature batch, use about that batch's share of all
        training data (Martens & Sutskever 2012, section 12.2).
    """

    model: str = "undamped"
    step: str = "chosen"
    data: str = "batch"
    expected: Number = 1.0


class Structural(NamedTuple):
    """How strong structural damping is: μ = strength · λ if tied, else μ = strength."""

    strength: NumberOrSchedule
    tied: bool

    def at(self, damping: jax.Array, count: jax.Array) -> jax.Array:
        """Return μ of an update."""
        strength = options.read(self.strength, count).astype(damping.dtype)
        return strength * damping if self.tied else strength


class Verdict(NamedTuple):
    """What came of a step: the evidence by which a rule adapts λ, or the radius.

    Attributes:
      ratio: ρ; −∞ for a rejected step, 1 for a step too small to be seen in f.
      accepted: whether the step was taken.
      seen: whether f can show the step: its change is more than rounding.
      has_part: whether λ, or the radius, had a part in the step.
      on_boundary: whether the boundary of a trust region limited the step.
    """

    ratio: jax.Array
    accepted: jax.Array | bool = True
    seen: jax.Array | bool = True
    has_part: jax.Array | bool = True
    on_boundary: jax.Array | bool = False


class Damping(NamedTuple):
    """A rule for λ, or for the radius of a trust region: optimistix calls it a search.

    Attributes:
      init: `() -> λ` before the first update.
      current: `(λ, count) -> λ` that this update uses, given the one in the state.
      update: `(λ, verdict, found) -> λ` for the next update; `found` is the λ that
        backtracking found, or `None` if it did not search for one.
      ratio: how to measure ρ.
      matrix: D; `None` if A = B + μS, and only the solver uses the number.
      structural: μ, or `None`.
      backtracking: the rule of backtracking for solvers that provide the steps for other
        λ; `None` is `early_stop()`.
      scalar: what the rule adapts: `"damping"`, λ; `"fixed"`, a λ that no step changes;
        or `"radius"`, the radius of a trust region. `hfjax.hessian_free` compares it with
        the solver.
    """

    init: Callable[[], jax.Array]
    current: Callable[[jax.Array, jax.Array], jax.Array]
    update: Callable[..., jax.Array]
    ratio: ReductionRatio
    matrix: DampingMatrix | None = identity()
    structural: Structural | None = None
    backtracking: Backtracking | None = None
    scalar: str = "damping"


def if_evidence(verdict: Verdict, adapted: jax.Array, now: jax.Array) -> jax.Array:
    """Return `adapted`, or `now` if the step is no evidence about λ."""
    # λ is unchanged if f cannot show the step and damping did not limit it. Otherwise λ
    # would decay to 0 at a minimum, and be useless for the next data.
    evidence = jnp.asarray(verdict.seen) | verdict.has_part
    return jnp.where(evidence, adapted, now)
