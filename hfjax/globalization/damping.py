"""Damping: A = B + λD + μS, and how λ and μ are chosen.

D is a matrix of `hfjax.damping_matrices`, by default I, and λ is on the scale of the
curvature of f, a mean over examples. S is for structural damping: the Gauss-Newton matrix
of the mean distance between hidden states, `Objective(hidden_loss=…)`, with strength μ.

The Levenberg-Marquardt rule measures how well the quadratic model predicts f,

    ρ = (f(θ + δ) − f(θ)) / M(δ),    M(δ) = ∇fᵀδ + ½δᵀB δ,

and raises or lowers λ. `searched` instead looks for the λ with the lowest f, and
`hfjax.trust_region.radius` adapts the radius of a trust region.
"""

from typing import Any

import jax
import jax.numpy as jnp

from hfjax._core import options
from hfjax._core.types import Number, NumberOrSchedule
from hfjax.globalization import damping_matrices
from hfjax.globalization._search import search_damping
from hfjax.globalization.damping_matrices import Builder, DampingMatrix
from hfjax.globalization.rule import Damping as Damping
from hfjax.globalization.rule import ReductionRatio as ReductionRatio
from hfjax.globalization.rule import Structural, if_evidence
from hfjax.globalization.rule import Verdict as Verdict

_RAISED_TO = 1e18
"""The largest λ to raise to: 1/λ is then below the rounding of any usual step."""
_SET_TO = 1e30
"""The largest λ that a user may set, for losses of that scale; λ‖p‖² is then finite."""
_NAMED = {
    "identity": damping_matrices.identity,
    "curvature_diagonal": damping_matrices.diagonal,
    "curvature": damping_matrices.curvature,
}
"""The matrices that `matrix=` takes by name, with their default options."""


def constant(
    value: NumberOrSchedule,
    *,
    matrix: str | DampingMatrix | Builder = "identity",
    structural: NumberOrSchedule | None = None,
    tied: bool = True,
) -> Damping:
    """Damp with a given λ: A = B + λD + μS.

    Args:
      value: λ ≥ 0. A schedule or an array (from `optax.inject_hyperparams`, for instance)
        is read in every update. A plain number is the first `damping` of the state, and
        stays until the user sets another one there.
      matrix: D, as in `levenberg_marquardt`.
      structural: as in `levenberg_marquardt`.
      tied: as in `levenberg_marquardt`.

    Returns:
      The rule.

    Raises:
      TypeError: if `matrix` has the wrong type.
      ValueError: if a plain number is negative, if a name is unknown, or if `structural`
        is tied to a λ of 0.
    """
    options.check_range("value", value, low=0.0)
    settable = options.is_plain_number(value)
    if settable and value == 0 and tied and structural is not None:
        msg = (
            "`structural` is tied to λ, and λ is 0: nothing would be damped. Pass "
            "`tied=False`, so that `structural` is μ itself, or a λ above 0."
        )
        raise ValueError(msg)

    # An array made at construction would initialise JAX's backends.
    def first() -> jax.Array:
        return options.read(value, jnp.zeros((), jnp.int32))

    def current(state: jax.Array, count: jax.Array) -> jax.Array:
        if not settable:
            return options.read(value, count)
        # A user can set λ to anything in the state, and NaN would stay forever.
        return jnp.where(jnp.isfinite(state), state, first().astype(state.dtype))

    return Damping(
        init=first,
        current=current,
        update=lambda state, verdict, found=None: state,
        ratio=ReductionRatio(),
        matrix=_matrix_of(matrix),
        structural=_structural(structural, tied),
        scalar="fixed",
    )


def levenberg_marquardt(
    init: Number = 1.0,
    *,
    decrease: Number = 2 / 3,
    increase: Number = 3 / 2,
    lower: Number = 1 / 4,
    upper: Number = 3 / 4,
    minimum: Number = 0.0,
    ratio: ReductionRatio = ReductionRatio(),
    matrix: str | DampingMatrix | Builder = "identity",
    structural: NumberOrSchedule | None = None,
    tied: bool = True,
) -> Damping:
    """Adapt λ in A = B + λD + μS to how well the model predicts f.

    λ ← `decrease` · λ if ρ > `upper`; λ ← `increase` · λ if ρ < `lower`, or if ρ is NaN
    or the update was rejected. λ is raised to 1e18 at most; a user may set it to 1e30. If
    the predicted change is below the rounding error of f, ρ is taken to be 1, even if the
    step was rejected; λ then stays if damping did not limit the step.

    Args:
      init: first λ > 0, on the scale of the curvature of f, a mean over examples.
      decrease: factor in (0, 1].
      increase: factor ≥ 1.
      lower: threshold for ρ.
      upper: threshold for ρ.
      minimum: floor of λ.
      ratio: how to measure ρ.
      matrix: D, one of `hfjax.damping_matrices`; `"identity"`, `"curvature_diagonal"` or
        `"curvature"`; or a function as for `damping_matrices.custom`.
      structural: strength ≥ 0 of structural damping, a number or schedule; needs
        `Objective(hidden_loss=…)`. `None` is without.
      tied: whether `structural` is μ / λ, so that μ adapts with λ, or μ itself.

    Returns:
      The rule.

    Raises:
      TypeError: if `matrix` has the wrong type.
      ValueError: if a plain number is out of range, or a name is unknown.

    Example:
      >>> rule, verdicts = levenberg_marquardt(init=9.0), map(Verdict, (0.8, 0.5, 0.2))
      >>> print([float(rule.update(rule.init(), verdict)) for verdict in verdicts])
      [6.0, 9.0, 13.5]

    References:
      Martens & Sutskever (2012), sections 8.1 (D = I), 8.4 (S) and 8.5, equation 10 (ρ).
    """
    options.check_range("init", init, low=0.0, open_low=True)
    options.check_range("decrease", decrease, low=0.0, high=1.0, open_low=True)
    options.check_range("increase", increase, low=1.0)
    options.check_range("lower", lower)
    # Arrays may be traced, so only plain numbers are compared.
    if isinstance(lower, float | int) and isinstance(upper, float | int):
        options.check_range("upper", upper, low=lower)
    options.check_range("minimum", minimum, low=0.0)
    options.check_choice("ratio.model", ratio.model, ("undamped", "damped"))
    options.check_choice("ratio.step", ratio.step, ("chosen", "last", "taken"))
    options.check_choice("ratio.data", ratio.data, ("batch", "eval_batch"))
    options.check_range("ratio.expected", ratio.expected, low=0.0, open_low=True)

    def update(damping: jax.Array, verdict: Verdict, _: Any = None) -> jax.Array:
        ratio = jnp.asarray(verdict.ratio)
        # Written so that a ratio of NaN raises λ: both comparisons are false then.
        more, less = (options.like(x, damping) for x in (increase, decrease))
        low, high = (options.like(x, ratio) for x in (lower, upper))
        grown = jnp.where(ratio >= low, damping, damping * more)
        adapted = jnp.where(ratio > high, damping * less, grown)
        return if_evidence(verdict, _limited(adapted, damping, minimum), damping)

    def current(damping: jax.Array, _: jax.Array) -> jax.Array:
        # A user can set λ to anything in the state, and NaN would stay forever.
        first = options.like(init, damping)
        known = jnp.where(jnp.isfinite(damping), damping, first)
        return jnp.clip(known, 0, _SET_TO)

    return Damping(
        init=lambda: jnp.asarray(init),
        current=current,
        update=update,
        ratio=ratio,
        matrix=_matrix_of(matrix),
        structural=_structural(structural, tied),
    )


def searched(
    init: Number = 1.0,
    *,
    factor: Number = 4.0,
    tolerance: Number = 0.01,
    lower: Number | None = None,
    longest: Number | str | None = "auto",
    sacrifice: Number = 0.0,
    max_tries: int = 8,
    cases: int | None = 2000,
    minimum: Number = 0.0,
    matrix: str | DampingMatrix | Builder = "identity",
    structural: NumberOrSchedule | None = None,
    tied: bool = True,
) -> Damping:
    """Search for the best λ in every update, by evaluating f.

    After a run with λ, the step for λ · `factor`^p is cheap: it takes a small system in
    the subspace of the run of conjugate gradients, or one more factorisation by
    `hfjax.sample_space`. f is evaluated at its end for p = 0, then 1, 2, … as long as f
    gets lower, or else −1, −2, …. The last step that was better is taken, and its λ is
    used for the next update. (`sacrifice`, `lower` and `longest` say what is better.) So a
    λ that is wrong by orders of magnitude costs evaluations of f, not updates. If λ makes
    no difference, the larger one is taken; with momentum λ then stays, because the step
    tends to the last one, not to 0, as λ → ∞.

    λ is adapted by ρ, as in `levenberg_marquardt`, if the solver does not provide these
    steps, if another rule is passed as `backtracking`, or if the step is rejected or too
    small to be seen in f.

    Args:
      init: first λ > 0; it may be wrong by orders of magnitude.
      factor: ratio > 1 of one λ to the next.
      tolerance: fraction of the decrease of f below which λ makes no difference, where
        `sacrifice` is 0.
      lower: least share of the decrease predicted by M, as in `levenberg_marquardt`. λ is
        raised until f falls by this share, and no lower λ is taken where f falls by less,
        even if f is lowest there. Try 1/4 if the first updates have a ρ below 0.1 and
        later ones gain little, as with low-rank adapters. `None` compares f alone.
      longest: take the longest step along which f falls by at least this share of what M
        predicts, however low f is at the end of shorter ones: in a narrow valley longer
        steps get further. `None` compares f;
        `"auto"` is 0.5 for `hfjax.sample_space` without `lower`, else `None`.
      sacrifice: share of the decrease of f that a longer step may give up: a lower λ is
        taken if f is above the lowest by at most this share of the decrease, and a higher
        one only if f falls by more than this share below it. The lowest f of each update
        does not make the lowest f of a run: with 0.5 some transformers and a recurrent
        network got further, but the last digits of an autoencoder took longer. It has no
        effect with `longest` or momentum, or while B is of other cases than f: of a part
        of them (`sampling`), or with an `eval_batch`.
      max_tries: the most evaluations of f.
      cases: as in `hfjax.backtracking.early_stop`. If there are fewer than twice as many
        examples, f is evaluated on all of them.
      minimum: as in `levenberg_marquardt`.
      matrix: D, as in `levenberg_marquardt`. A search needs D = I or, with
        `hfjax.sample_space`, `"curvature_diagonal"`: classical Levenberg-Marquardt steps,
        for parameters of very different scales.
      structural: as in `levenberg_marquardt`; μ stays the same during a search.
      tied: as in `levenberg_marquardt`.

    Returns:
      The rule.

    Raises:
      TypeError: if a count is not a Python integer, or `matrix` has the wrong type.
      ValueError: if an option is out of range, or a name is unknown.

    Example:
      λ = 100 is far too much for f = ½(x − 2)², and one run finds that out:

      >>> import hfjax
      >>> f = hfjax.Objective(lambda p, x: p * x, hfjax.losses.squared_error())
      >>> tx = hfjax.hessian_free(f, damping=searched(init=100.0))
      >>> batch, p = (jnp.ones((1, 1)), jnp.full((1, 1), 2.0)), jnp.zeros(1)
      >>> grads = f.value_and_grad(p, batch)[1]
      >>> updates, state = tx.update(grads, tx.init(p), p, batch=batch)
      >>> print(f"{updates[0]:.2f} {state.damping:.3f}")  # 2 / (1 + λ), λ = 100 / 4⁵
      1.82 0.098
    """
    options.check_range("factor", factor, low=1.0, open_low=True)
    options.check_range("tolerance", tolerance, low=0.0, high=1.0)
    options.check_range("lower", lower, low=0.0, high=1.0)
    if isinstance(longest, str):
        options.check_choice("longest", longest, ("auto",))
    else:
        options.check_range("longest", longest, low=0.0, high=1.0, open_low=True)
        if longest is not None and lower is not None:
            msg = "Pass `lower` or `longest`: one asks for the lowest f, one does not."
            raise ValueError(msg)
    options.check_range("sacrifice", sacrifice, low=0.0, high=1.0)
    options.check_count("max_tries", max_tries, low=1)
    if cases is not None:
        options.check_count("cases", cases, low=1)
    by_ratio = levenberg_marquardt(
        init, minimum=minimum, matrix=matrix, structural=structural, tied=tied
    )

    def update(
        damping: jax.Array, verdict: Verdict, found: jax.Array | None = None
    ) -> jax.Array:
        adapted = by_ratio.update(damping, verdict)
        if found is None:
            return adapted
        found = _limited(found, damping, minimum)
        # If f cannot show the step, a search that compares M may stand still, for instance
        # because M is 0. λ may then still fall as ρ says.
        found = jnp.where(verdict.seen, found, jnp.minimum(found, adapted))
        return jnp.where(verdict.accepted, found, adapted)

    search = search_damping(
        factor, tolerance, lower, longest, sacrifice, max_tries, cases
    )
    return by_ratio._replace(update=update, backtracking=search)


def _limited(found: jax.Array, damping: jax.Array, minimum: Number) -> jax.Array:
    # From zero, a factor would never raise λ again.
    lowest = jnp.maximum(options.like(minimum, damping), jnp.finfo(damping.dtype).tiny)
    # A λ that the user has set beyond the limit is not lowered to it.
    highest = jnp.maximum(damping, _RAISED_TO)
    return jnp.clip(found, lowest, highest).astype(damping.dtype)


def _matrix_of(matrix: str | DampingMatrix | Builder) -> DampingMatrix:
    """Return the matrix that an option means: by name, built, or user-supplied."""
    if isinstance(matrix, DampingMatrix):
        return matrix
    made = damping_matrices.reparameterization, damping_matrices.custom
    if matrix in _NAMED.values() or matrix in made:
        name = getattr(matrix, "__name__", matrix)
        msg = f"`matrix` is the function `{name}`: call it, as in `{name}(…)`."
        raise TypeError(msg)
    if isinstance(matrix, str):
        options.check_choice("matrix", matrix, tuple(_NAMED))
        return _NAMED[matrix]()
    return damping_matrices.custom(matrix)


def _structural(strength: NumberOrSchedule | None, tied: bool) -> Structural | None:
    options.check_range("structural", strength, low=0.0)
    return None if strength is None else Structural(strength, tied)
