"""Tests of a set-up for `hfjax.verify.check`: each returns a sentence, or `None`.

They run in Python on concrete arrays. `given` is the set-up in the user's precision,
`setup` the same in float64 if possible.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hfjax._core import trees
from hfjax._core.arguments import ShapeError
from hfjax._core.types import Batch, Params
from hfjax._tracing.linearize import is_traceable, noted
from hfjax.curvature import ggn
from hfjax.inspection._finite_differences import slopes
from hfjax.inspection._gradient_faults import Facts, explain
from hfjax.inspection._setup import (
    TINY,
    Setup,
    extreme_curvature,
    flat,
    relative,
    walk,
    waves,
)
from hfjax.losses.loss import PAIRS
from hfjax.update.point import rounding_noise
from hfjax.update.state import Rejection

_MOST_NOISE = 0.01
"""Largest tolerated relative rounding error of a gradient or product."""
_WRONG = 1e-3
"""Relative error above which a directional derivative is called wrong."""
_NEAR = 0.03
"""Relative changes of parameters that make losses of 0 larger than rounding."""
_CASES = 64
"""Number of examples whose L″ is searched for negative curvature."""


def bad_targets(setup: Setup) -> str | None:
    """Check that the targets are in the range that the loss requires."""
    inputs, targets, _ = setup.batch
    meant = setup.objective.loss.targets
    if meant is None:
        return None
    outputs = setup.outputs(setup.params, inputs)
    bad = np.flatnonzero(~np.asarray(meant.allowed(outputs, targets)))
    if not len(bad):
        return None
    return f"The targets of {_listed(bad)} are not {meant.words}, which this loss requires."


def not_finite(setup: Setup) -> str | None:
    """Check that all losses are finite."""
    bad = np.flatnonzero(~np.isfinite(setup.case_values()))
    if not len(bad):
        return None
    return (
        f"The loss of {_listed(bad)} is NaN or infinite; a case of weight 0 must be "
        "finite too."
    )


def random(setup: Setup) -> str | None:
    """Check that two identical calls return the same losses."""
    if not _differ(setup.case_values(), setup.case_values(), setup):
        return None
    return (
        "The model is random: two evaluations of f differ. Give it one key per case "
        "in `inputs`, so that all evaluations of an update see the same noise."
    )


def bound_to_a_number(setup: Setup) -> str | None:
    """Check that model and loss accept one example, and half of the batch."""
    cases = len(setup.batch[2])
    for number in sorted({1, (cases + 1) // 2} - {cases}):
        try:
            setup.case_values(slice(number))
        except ShapeError:
            raise
        except Exception as error:
            first = str(error).strip().split("\n")[0]
            return (
                f"The model or the loss runs on the {cases} cases of the batch, but fails "
                f"on {number} of them ({type(error).__name__}: {first}). It must run on "
                "any number of cases: do not hard-code the number, and do not combine "
                "different cases."
            )
    return None


def dependent(setup: Setup) -> str | None:
    """Check that an example's loss does not depend on the other examples or its place."""
    # Where the model fits exactly, losses are rounding. Then near θ they are not.
    near = setup._replace(params=setup.rounded(_NEAR))
    return _dependent(setup) and _dependent(near)


def _dependent(setup: Setup) -> str | None:
    whole = setup.case_values()
    half = (len(whole) + 1) // 2
    if len(whole) == 1:
        return None
    halves = [setup.case_values(slice(half)), setup.case_values(slice(half, None))]
    if _differ(np.concatenate(halves), whole, setup):
        return (
            "Cases depend on one another: their losses differ between half the batch "
            "and the whole batch. Is batch normalisation in training mode? Use the "
            "evaluation mode, or `Objective(…, whole_batch=True)`."
            if _outputs_differ(setup, half)
            else "The loss mixes cases: a case's loss differs between half the batch and "
            "the whole batch, though the model's outputs do not. Compute it from the "
            f"case's own outputs and targets. {PAIRS}"
        )
    if _differ(setup.case_values(slice(None, None, -1))[::-1], whole, setup):
        return (
            "A case's loss depends on its place in the batch: it changes if the order is "
            "reversed. Draw noise by case: put one key per case into `inputs`."
        )
    return None


def wrong_derivative(setup: Setup) -> str | None:
    """Check ∇f against slopes of f along one fixed direction near θ."""
    # Not at θ itself, because rectifiers may be at their kink there, for example if
    # biases are 0.
    at = walk(setup.params, waves(setup.params, 1.7), 1e-3)
    gradient = setup.gradient(at)
    if not np.all(np.isfinite(flat(gradient))):
        return (
            "The gradient of the objective holds NaN or infinity, though f is finite: "
            "look for a square root at 0, or a `where` of which one side is NaN."
        )
    # Leaves behind a `stop_gradient` change f but have no gradient: leave them out.
    direction = jax.tree.map(
        lambda g, v: v if np.any(g) else 0 * v,
        setup.data_gradient(at),
        waves(setup.params, 1.0),
    )
    terms = flat(gradient) * flat(direction)
    # A slope is wrong only if it differs by more than rounding can explain. Of the three
    # step sizes the best counts, as others may be spoilt by curvature or rounding.
    misses = []
    for slope, noise in slopes(setup.value, at, direction, setup.rounding):
        excess = abs(slope - np.sum(terms)) - noise
        misses.append((excess / max(np.linalg.norm(terms), noise, TINY), slope))
    miss, slope = min(misses, default=(0.0, 0.0))
    if miss > _WRONG:
        return (
            "The derivative of the model or the loss is not that of its values: along "
            f"one direction it is {np.sum(terms):.6g}, but finite differences give "
            f"{slope:.6g}. Look for a `custom_jvp` or `custom_vjp`, or a "
            "`stop_gradient` within a sum."
        )
    return None


def no_reverse_derivative(setup: Setup) -> str | None:
    """Check that the gradient exists."""
    return _lacking(setup.objective.value_and_grad, setup.params, setup.batch)


def no_forward_derivative(setup: Setup) -> str | None:
    """Check that Gauss-Newton vector products exist."""

    def product(params: Params, batch: Batch) -> Params:
        return ggn(setup.objective, params, batch)(params)

    return _lacking(product, setup.params, setup.batch)


def does_without(tx: Any, given: Setup, batch: Batch, grads: Params) -> bool:
    """Return whether `tx` can run even if Gauss-Newton vector products do not exist."""

    def update(grads: Params, params: Params, batch: Batch) -> Any:
        state = tx.init(params)
        return tx.update(grads, state, params, batch=batch, all_params=params)

    # Any error of `tx` is raised again when an update is run.
    return is_traceable(update, grads, given.params, batch)


def _lacking(run: Callable[..., Any], *args: Any) -> str | None:
    """Trace a function and return a sentence if a derivative does not exist."""
    try:
        jax.eval_shape(run, *args)
    except Exception as error:  # Other errors are raised when the same function is run.
        return noted(error)
    return None


def not_convex(setup: Setup) -> str | None:
    """Check L″ for negative curvature at the outputs of the first few examples."""
    chosen = np.flatnonzero(np.asarray(setup.batch[2]) > 0)[:_CASES]
    inputs, targets, _ = jax.tree.map(lambda leaf: leaf[chosen], setup.batch)
    with setup.precision():
        outputs = setup.outputs(setup.params, inputs)
        product = setup.objective.loss.hessian(outputs, targets)
        least, largest = extreme_curvature(product, outputs)
    bound = max(1e-6, 1e3 * setup.rounding)
    if not np.any(least < -bound * largest):
        return None
    worst = int(np.argmin(least))
    return (
        f"The loss is not convex in the outputs: L″ of case {chosen[worst]} has "
        f"the curvature {least[worst]:.3g}, so G is not positive semi-definite. "
        "Move the nonlinearity into the model, or use "
        '`losses.from_function(…, positive="clip")`.'
    )


def coarse_root(given: Setup) -> str | None:
    """Check that preconditioners and diagonals can use L″ without approximation."""
    inputs, targets, _ = jax.tree.map(lambda leaf: leaf[:1], given.batch)
    outputs = given.outputs(given.params, inputs)
    note = given.objective.loss.coarse(outputs, targets)
    if note is None:
        return None
    return (
        f"Preconditioners and diagonals are only approximate: {note}. Use a loss of "
        "`hfjax.losses` if there is one, or couple fewer outputs."
    )


def noisy(given: Setup, setup: Setup) -> str | None:
    """Compare gradient and product in the user's precision with those in float64."""
    # A key may draw another mask in float64, and the difference is then not rounding.
    leaves = jax.tree.leaves(given.batch[0])
    random = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    if given.rounding <= setup.rounding or any(random):
        return None
    exact = setup.gradient(setup.params)
    with setup.precision():
        curved = ggn(setup.objective, setup.params, setup.batch)(exact)
    # Both products are along the gradient, the first direction of CG.
    here = trees.cast_like(exact, given.params)
    product = ggn(given.objective, given.params, given.batch)(here)
    for name, rough, fine in (
        ("The gradient", given.gradient(given.params), exact),
        ("A product G v", product, curved),
    ):
        error = relative(flat(rough), flat(fine))
        if not error <= _MOST_NOISE:
            dtype = trees.scalar_dtype(given.params)
            return (
                f"{name} in {dtype} has a relative rounding error of {error:.2g}, more "
                f"than {_MOST_NOISE}. Rescale the problem, compute sums in a wider "
                "dtype, or use float64."
            )
    return None


def unlike_gradient(given: Setup, setup: Setup, grads: Params) -> str | None:
    """Check that `grads` is ∇f."""
    found = flat(grads)
    if not np.all(np.isfinite(found)):
        return (
            "`grads` holds NaN or infinity, but the gradient of the objective does not."
        )
    return explain(found, Facts.of(given, setup, grads))


def bad_transformation(
    tx: Any, given: Setup, batch: Batch, grads: Params, *, judge: bool
) -> str | None:
    """Check that `tx` is Hessian-free and, if `judge`, takes a step on this f."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        return (
            f"`tx` is a {type(tx).__name__}, not a gradient transformation: pass what "
            "`hfjax.hessian_free` returned."
        )
    state = tx.init(given.params)
    if not optax.tree.get_all_with_path(state, "rejection"):
        return (
            "`tx` is not a Hessian-free transformation: its state has no "
            "`HessianFreeInfo`. Use `hfjax.hessian_free`, or chain "
            "`hfjax.scale_by_hessian_free`."
        )
    if not judge:
        return None
    params = given.params
    _, state = tx.update(grads, state, params, batch=batch, all_params=params)

    def told(name: str) -> float:
        return float(optax.tree.get_all_with_path(state, name)[0][1])

    rejection = Rejection(int(told("rejection")))
    if rejection == Rejection.NONE and not told("accepted"):
        # Not run: a wrapper, such as `optax.MultiSteps`, collects gradients first.
        return None
    value = jnp.asarray(given.value(given.params), trees.scalar_dtype(given.params))
    noise = float(rounding_noise(value))
    before, predicted = told("value_before"), told("predicted_change")
    # After any other rejection, the predicted change is not meaningful.
    seen = (Rejection.NONE, Rejection.NO_DECREASE)
    if rejection != Rejection.NONFINITE_VALUE and abs(before - value) > 100 * noise:
        return (
            f"`tx` was built with another objective: its f is {before:.6g}, but that of "
            f"`objective` is {float(value):.6g}."
        )
    if abs(predicted) <= noise and rejection in seen:
        return (
            f"f is too coarse in {value.dtype}: the first update is predicted to change "
            f"it by {predicted:.2g}, but its rounding error is about {noise:.2g}. Use "
            "float64, or stop: this may be the optimum."
        )
    if rejection != Rejection.NONE:
        return (
            f"`tx` rejects its first update: {rejection.name}, see `hfjax.Rejection`."
        )
    return None


def _outputs_differ(setup: Setup, half: int) -> bool:
    """Return whether the outputs of the first examples depend on the remaining ones."""
    inputs = setup.batch[0]
    first = jax.tree.map(lambda leaf: leaf[:half], inputs)
    whole, alone = (setup.outputs(setup.params, x) for x in (inputs, first))
    return any(
        _differ(np.asarray(x), np.asarray(y[:half]), setup)
        for x, y in zip(jax.tree.leaves(alone), jax.tree.leaves(whole), strict=True)
        if x.size
    )


def _listed(cases: np.ndarray) -> str:
    some = ", ".join(map(str, cases[:5])) + (", …" if len(cases) > 5 else "")
    return f"{len(cases)} of the cases (case {some})"


def _differ(x: np.ndarray, y: np.ndarray, setup: Setup) -> bool:
    """Return whether two results differ by more than rounding in another order."""
    # `not <=`, so that NaN counts as a difference.
    bound = min(max(1e-6, 1e3 * setup.rounding), 0.1)
    return not np.max(np.abs(x - y)) <= bound * np.max(np.abs(y))
