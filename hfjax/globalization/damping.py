"""Damping: A = B + λD + μS, and how λ and μ are chosen.

D is a matrix of `hfjax.damping_matrices`, by default I; λ stands on the scale of the
mean objective's curvature (Martens' program adds it to G divided by the number of
cases). S, with structural damping (report, section 8.4), is the Gauss-Newton matrix of
the hidden states' mean distance, `Objective(hidden_loss=…)`; μ is its strength.

The Levenberg-Marquardt rule (report,
section 8.5, equation 10) watches how well the quadratic model predicts,

    ρ = (f(θ + δ) − f(θ)) / M(δ),    M(δ) = ∇fᵀδ + ½δᵀB δ,

and raises λ where ρ < `lower`, lowers it where ρ > `upper`. `searched` looks for the λ
with which f is lowest instead. `radius` is the same rule for a trust region.
"""

import jax
import jax.numpy as jnp

from hfjax._core import options
from hfjax._core.types import (
    Number,
    NumberOrSchedule,
)
from hfjax.globalization import damping_matrices
from hfjax.globalization._search import search_damping
from hfjax.globalization.damping_matrices import Builder, DampingMatrix
from hfjax.globalization.rule import Damping as Damping
from hfjax.globalization.rule import ReductionRatio as ReductionRatio
from hfjax.globalization.rule import Structural, if_told
from hfjax.globalization.rule import Verdict as Verdict

_RAISED_TO = 1e18
"""λ is raised no higher: 1/λ is then below the rounding of steps of any usual scale."""
_SET_TO = 1e30
"""What a caller may set λ to, for a loss of such a scale: λ‖p‖² is finite in float32."""
_NAMED = {
    "identity": damping_matrices.identity,
    "curvature_diagonal": damping_matrices.diagonal,
    "curvature": damping_matrices.curvature,
}
"""What `matrix=` takes by name, with every default."""


def constant(
    value: NumberOrSchedule,
    *,
    matrix: str | DampingMatrix | Builder = "identity",
    structural: NumberOrSchedule | None = None,
    tied: bool = True,
) -> Damping:
    """Damp with a given λ: A = B + λD + μS.

    Args:
      value: λ ≥ 0. A schedule or an array (as `optax.inject_hyperparams` passes) is
        read anew in each update. A plain number is where the state's `damping`
        starts, and stays until the caller sets it there.
      matrix: D, as in `levenberg_marquardt`.
      structural: μ, as in `levenberg_marquardt`.
      tied: as in `levenberg_marquardt`.

    Returns:
      The rule.

    Raises:
      TypeError: if `matrix` is nothing of the kind.
      ValueError: if a plain number is negative, if a name is not known, or if
        `structural` is tied to a λ of 0.

    References:
      Martens & Sutskever (2012), section 8.1 (Tikhonov damping).
    """
    options.check_range("value", value, low=0.0)
    settable = options.is_plain_number(value)
    if settable and value == 0 and tied and structural is not None:
        msg = (
            "`structural` is tied to λ, and λ is 0: nothing would be damped. Pass "
            "`tied=False`, so that `structural` is μ itself, or a λ above 0."
        )
        raise ValueError(msg)

    def first() -> jax.Array:  # No array here: JAX may not have begun.
        return options.read(value, jnp.zeros((), jnp.int32))

    def current(state: jax.Array, count: jax.Array) -> jax.Array:
        if not settable:
            return options.read(value, count)
        # A caller may have set it to anything, and NaN would stay for ever.
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
    """Adapt λ in A = B + λD + μS to how well the model predicts.

    λ ← `decrease` · λ if ρ > `upper`; λ ← `increase` · λ if ρ < `lower`, or if ρ is
    NaN or the update was rejected. At the thresholds λ stays. It is raised to 1e18 at
    most; a caller may set it to 1e30.

    Of a step too small to be seen in f, ρ is 1, rejected or not; and λ stays where it has
    no part in such a step.

    Args:
      init: first λ > 0, on the scale of the mean objective's curvature. 1 is a
        heuristic (Martens' program: 45, for losses summed over 784 outputs).
      decrease: factor in (0, 1] (report, section 8.5).
      increase: factor ≥ 1 (ibid.).
      lower: threshold (ibid.).
      upper: threshold (ibid.).
      minimum: floor of λ. None by default: Martens' run on CURVES ended at 1.9e-18.
      ratio: what ρ is the ratio of.
      matrix: D, one of `hfjax.damping_matrices`; by name `"identity"`,
        `"curvature_diagonal"` or `"curvature"`; or the caller's `(objective, params,
        batch) -> (v -> D v, its diagonal)`.
      structural: μ ≥ 0, a number or schedule; needs `Objective(hidden_loss=…)`.
        `None` is without (Martens & Sutskever 2011 used 0.03, tied).
      tied: whether `structural` is μ / λ, so that λ's rule scales both, as in their
        program; else μ itself.

    Returns:
      The rule.

    Raises:
      TypeError: if `matrix` is nothing of the kind.
      ValueError: if a plain number is out of range, or a name is not known.

    Example:
      >>> rule, verdicts = levenberg_marquardt(init=9.0), map(Verdict, (0.8, 0.5, 0.2))
      >>> print([float(rule.update(rule.init(), verdict)) for verdict in verdicts])
      [6.0, 9.0, 13.5]
    """
    options.check_range("init", init, low=0.0, open_low=True)
    options.check_range("decrease", decrease, low=0.0, high=1.0, open_low=True)
    options.check_range("increase", increase, low=1.0)
    options.check_range("lower", lower)
    if isinstance(lower, float | int) and isinstance(upper, float | int):
        options.check_range("upper", upper, low=lower)
    options.check_range("minimum", minimum, low=0.0)
    options.check_choice("ratio.model", ratio.model, ("undamped", "damped"))
    options.check_choice("ratio.step", ratio.step, ("chosen", "last", "taken"))
    options.check_choice("ratio.data", ratio.data, ("batch", "eval_batch"))
    options.check_range("ratio.expected", ratio.expected, low=0.0, open_low=True)

    def update(
        damping: jax.Array, verdict: Verdict, found: jax.Array | None = None
    ) -> jax.Array:
        del found
        ratio = jnp.asarray(verdict.ratio)
        # Written so that NaN raises: both comparisons are false.
        more, less = (options.like(x, damping) for x in (increase, decrease))
        low, high = (options.like(x, ratio) for x in (lower, upper))
        grown = jnp.where(ratio >= low, damping, damping * more)
        adapted = jnp.where(ratio > high, damping * less, grown)
        return if_told(verdict, _limited(adapted, damping, minimum), damping)

    def current(damping: jax.Array, count: jax.Array) -> jax.Array:
        del count
        # A caller may have set it to anything, and NaN would stay for ever.
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
    max_tries: int = 8,
    cases: int | None = 2000,
    minimum: Number = 0.0,
    structural: NumberOrSchedule | None = None,
    tied: bool = True,
) -> Damping:
    """Look for the λ with which f is lowest, in every update.

    The solver tells the step for λ · `factor`^p: conjugate gradients over the subspace
    that their kept iterates span, which costs no product, `hfjax.sample_space` by one more
    factorisation. f is evaluated at the step for p = 0, then 1, 2, … while it gets lower,
    or else −1, −2, …; the last that was better is taken, and its λ is that of the next
    update. So a λ that is wrong by orders of magnitude costs evaluations of f, not
    updates. Of two λ whose f differ by less than `tolerance` of the gain it takes the
    higher one: where λ makes no difference it does not fall. (With momentum it stays:
    there a high λ does not mean a short step, but the last one again.)

    Where the solver cannot tell, where another rule of `backtracking` is passed, and for a
    step that is rejected or too small to be seen in f, λ is adapted by ρ as in
    `levenberg_marquardt`.

    Args:
      init: first λ > 0; it may be off by orders of magnitude (1: heuristic).
      factor: between one λ and the next, above 1 (4: measured,
        `benchmarks/results/step6.md`; heuristic).
      tolerance: share of f's gain (0.01: heuristic).
      max_tries: evaluations of f, at most (8: a factor of 4⁷ up, 4⁶ down; heuristic).
      cases: as in `hfjax.backtracking.early_stop`; with fewer than twice as many, f is
        evaluated on all of them (2,000: as `preconditioners.kronecker`; λ of a quarter,
        500, led as far in as many iterations, `benchmarks/results/step6.md`).
      minimum: as in `levenberg_marquardt`.
      structural: as in `levenberg_marquardt`; in a search μ stays as it was in the run.
      tied: as in `levenberg_marquardt`.

    Returns:
      The rule; D is I.

    Raises:
      TypeError: if a count is no Python integer.
      ValueError: if an option is out of range.

    Example:
      λ = 100 is far too much for f = ½(x − 2)²; one run finds that out:

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
    options.check_count("max_tries", max_tries, low=1)
    if cases is not None:
        options.check_count("cases", cases, low=1)
    by_ratio = levenberg_marquardt(
        init, minimum=minimum, structural=structural, tied=tied
    )

    def update(
        damping: jax.Array, verdict: Verdict, found: jax.Array | None = None
    ) -> jax.Array:
        adapted = by_ratio.update(damping, verdict)
        if found is None:
            return adapted
        found = _limited(found, damping, minimum)
        # M may have vanished, and a search on it stand still.
        found = jnp.where(verdict.seen, found, jnp.minimum(found, adapted))
        return jnp.where(verdict.accepted, found, adapted)

    return by_ratio._replace(
        update=update,
        backtracking=search_damping(factor, tolerance, max_tries, cases),
    )


def _limited(found: jax.Array, damping: jax.Array, minimum: Number) -> jax.Array:
    # Zero would never rise again.
    lowest = jnp.maximum(options.like(minimum, damping), jnp.finfo(damping.dtype).tiny)
    # Where a caller has set it higher.
    highest = jnp.maximum(damping, _RAISED_TO)
    return jnp.clip(found, lowest, highest).astype(damping.dtype)


def _matrix_of(matrix: str | DampingMatrix | Builder) -> DampingMatrix:
    """Return the matrix that an option means: by name, built, or the caller's."""
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
