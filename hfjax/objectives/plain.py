"""Objectives: what users call, and what other modules ask of them.

One f, the same in the value, the gradient, the curvature and the reduction ratio. A plain
objective has one term, a weighted sum one of each of its parts; nothing else tells them
apart.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hfjax import losses
from hfjax._core import options, trees
from hfjax._core.arguments import as_params, noting_call
from hfjax._core.types import Batch, NumberOrSchedule, Params, Tree
from hfjax._tracing import compiled
from hfjax.objectives import cases as _cases
from hfjax.objectives.cases import as_cases
from hfjax.objectives.means import AxisName, Means
from hfjax.objectives.terms import Term, total


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Objective:
    """A training objective f(θ), in its value, gradient and curvature.

    Attributes:
      model_fn: `(params, inputs) -> outputs`, case by case: a case's outputs depend
        on no other case (batch normalisation in evaluation mode; one key per case
        in `inputs` for a random model).
      loss: an `hfjax.losses.Loss`, or a callable `(outputs, targets) -> array` whose
        leading axis is cases (further axes are summed).
      weight_decay: coefficient β ≥ 0 of ½β‖θ‖², on the scale of the mean loss; on
        all parameters, biases too, as in Martens' program. A schedule (report,
        section 13: on at first, off near the end) is read by `at`.
      microbatch_size: most cases that are run through the model at once, or `None`
        for all. Bounds activation memory; costs one more forward pass in each
        curvature product, which is then linearised anew for each microbatch. On a mesh
        of `Explicit` axes it has a case of every device, at least.
      linearize_once: keep every microbatch's linearisation instead (report, section
        7.1, activity caching): products cost no forward pass, and hold the
        activations of the whole batch, but the intermediate results of one
        microbatch only.
      axis_name: name(s) of the mapped axis that shards the cases, under
        `shard_map`, `pmap` or `vmap(axis_name=…)`. Not needed under `jit` with
        sharded arrays.
      hidden_loss: for structural damping (report, section 8.4): `model_fn` then
        returns `(outputs, hidden)`, and this is d(h; h(θ)), the distance of hidden
        states, of which only the curvature is used: f does not contain it.
        `squared_error` takes the units' values, `sigmoid_cross_entropy` the logits
        of logistic units; or any callable `(hidden, reference) -> array`. Summed
        over units and time, as losses are.

    Raises:
      TypeError: if `model_fn`, `loss` or `hidden_loss` is not callable.
      ValueError: if `weight_decay` or `microbatch_size` is out of range.

    Example:
      A batch is `(inputs, targets)`, or `(inputs, targets, weights)`:

      >>> import hfjax
      >>> f = Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
      >>> x, t = jnp.eye(2), jnp.array([[2.0], [4.0]])
      >>> print(f.value(jnp.zeros((2, 1)), (x, t)))  # (½·2² + ½·4²) / 2
      5.0
      >>> print(f.value(jnp.zeros((2, 1)), (x, t, jnp.array([1.0, 0.0]))))
      2.0
    """

    model_fn: Callable[[Params, Tree], Tree]
    loss: losses.Loss
    _: dataclasses.KW_ONLY
    weight_decay: NumberOrSchedule
    microbatch_size: int | None
    linearize_once: bool
    axis_name: AxisName
    hidden_loss: losses.Loss | None

    def __init__(
        self,
        model_fn: Callable[[Params, Tree], Tree],
        loss: losses.Loss | Callable[[Tree, Tree], jax.Array],
        *,
        weight_decay: NumberOrSchedule = 0.0,
        microbatch_size: int | None = None,
        linearize_once: bool = False,
        axis_name: AxisName = None,
        hidden_loss: losses.Loss | Callable[[Tree, Tree], jax.Array] | None = None,
    ) -> None:
        if not callable(model_fn):
            msg = (
                "`model_fn` must be a callable (params, inputs) -> outputs, got "
                f"{type(model_fn).__name__}. For a Flax module pass its pure form."
            )
            raise TypeError(msg)
        options.check_range("weight_decay", weight_decay, low=0.0)
        if microbatch_size is not None:
            options.check_count("microbatch_size", microbatch_size, low=1)
        if hidden_loss is not None:
            hidden_loss = _as_loss("hidden_loss", hidden_loss)
        for name, option in (
            ("model_fn", model_fn),
            ("loss", _as_loss("loss", loss)),
            ("weight_decay", weight_decay),
            ("microbatch_size", microbatch_size),
            ("linearize_once", linearize_once),
            ("axis_name", axis_name),
            ("hidden_loss", hidden_loss),
        ):
            object.__setattr__(self, name, option)

    def at(self, count: jax.Array | int) -> "Objective":
        """Return f as it is at an update, where the weight decay is a schedule.

        Args:
          count: updates so far, `state.count`.

        Returns:
          The objective with that number as weight decay; itself if it is one already.

        Example:
          >>> import hfjax, optax
          >>> f = Objective(
          ...     lambda p, x: x * p,
          ...     hfjax.losses.squared_error(),
          ...     weight_decay=optax.piecewise_constant_schedule(0.5, {100: 0.0}),
          ... )
          >>> print(f.at(0).weight_decay, f.at(100).weight_decay)
          0.5 0.0
        """
        if not callable(self.weight_decay):
            return self
        decay = jnp.asarray(self.weight_decay(jnp.asarray(count)))
        return dataclasses.replace(self, weight_decay=decay)

    def value(self, params: Params, batch: Batch) -> jax.Array:
        """Compute f(θ) on `batch`.

        Args:
          params: θ.
          batch: `(inputs, targets)` or `(inputs, targets, weights)`.

        Returns:
          A scalar in float32 or wider.
        """

        def value(params: Params, batch: Batch) -> jax.Array:
            terms = self._terms(batch)
            return total(terms, [term.value(params) for term in terms])

        return compiled.run(value, as_params(params), batch)

    def value_and_grad(self, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        """Compute f(θ) and ∇f(θ) on `batch`.

        Under `shard_map` use this rather than `jax.grad`: with `check_vma=True` a
        gradient with respect to replicated parameters is already summed over the
        devices, here it is the mean either way.

        Args:
          params: θ.
          batch: `(inputs, targets)` or `(inputs, targets, weights)`.

        Returns:
          The value, and the gradient with the structure and dtypes of `params`.
        """

        def both(params: Params, batch: Batch) -> tuple[jax.Array, Params]:
            terms = self._terms(batch)
            found = [term.value_and_grad(params) for term in terms]
            value, gradient = total(terms, found)
            return value, trees.cast_like(gradient, params)

        return compiled.run(both, as_params(params), batch)

    def case_values(self, params: Params, batch: Batch) -> Tree:
        """Compute L(F(θ, xᵢ), tᵢ) for each case: no weights, no weight decay.

        Args:
          params: θ.
          batch: `(inputs, targets)` or `(inputs, targets, weights)`.

        Returns:
          Shape `[cases]`, in the order of the batch; under `axis_name`, of this
          device's cases. Of a weighted sum a tuple, one of each part.
        """

        def values(params: Params, batch: Batch) -> jax.Array:
            (term,) = self._terms(batch)
            return term.case_values(params)

        return compiled.run(values, as_params(params), batch)

    # What to do where structural damping finds no hidden states.
    _no_hidden = (
        "give it a `hidden_loss`, and a `model_fn` that returns (outputs, hidden)."
    )

    def _terms(self, batch: Batch, name: str = "batch") -> tuple[Term, ...]:
        """Take f apart; raise unless the batch is one of it, by its `name`."""
        return (
            Term(
                coefficients=(),
                model_fn=self._outputs,
                loss=self.loss,
                weight_decay=self.weight_decay,
                linearize_once=self.linearize_once,
                means=Means(self.microbatch_size, self.axis_name),
                cases=as_cases(batch, name),
            ),
        )

    def _run(self, params: Params, inputs: Tree) -> Tree:
        with noting_call("`model_fn(params, inputs)`", params=params, inputs=inputs):
            return self.model_fn(params, inputs)

    def _outputs(self, params: Params, inputs: Tree) -> Tree:
        if self.hidden_loss is None:
            return self._run(params, inputs)
        return outputs_and_hidden(self, params, inputs)[0]

    def _each(self, change: "Callable[[Objective], Objective]") -> "Objective":
        return change(self)

    def _subsample(self, batch: Batch, cases: int) -> Batch:
        return _cases.subsample(batch, cases)


def terms_of(
    objective: Objective, batch: Batch, name: str = "batch"
) -> tuple[Term, ...]:
    """Return an objective's terms: a plain one's only one; of a sum, those of all parts.

    Args:
      objective: any.
      batch: its batch, of a sum the tuple of its parts' batches.
      name: of the batch, for the error if it is none.

    Returns:
      The terms.
    """
    return objective._terms(batch, name)


def each(objective: Objective, change: Callable[[Objective], Objective]) -> Objective:
    """Change each plain objective that an objective consists of."""
    return objective._each(change)


def subsample(objective: Objective, batch: Batch, cases: int) -> Batch:
    """Return evenly spaced cases of a batch, of each term at least so many or all.

    The batch as it came, where no term has enough.
    """
    return objective._subsample(batch, cases)


def alone(term: Term) -> Objective:
    """Return fₖ as a plain objective; its batch is `term.cases`."""
    return Objective(
        term.model_fn,
        term.loss,
        weight_decay=term.weight_decay,
        microbatch_size=term.means.microbatch_size,
        linearize_once=term.linearize_once,
        axis_name=term.means.axis_name,
    )


def outputs_and_hidden(
    objective: Objective, params: Params, inputs: Tree
) -> tuple[Tree, Tree]:
    """Run a model with hidden states: F(θ, x) and h(θ, x)."""
    pair = objective._run(params, inputs)
    if not isinstance(pair, tuple) or len(pair) != 2:
        came = f"a tuple of {len(pair)}" if isinstance(pair, tuple) else type(pair)
        msg = f"With a `hidden_loss`, `model_fn` must return (outputs, hidden), got {came}."
        raise ValueError(msg)
    return pair


def _as_loss(
    name: str, loss: losses.Loss | Callable[[Tree, Tree], jax.Array]
) -> losses.Loss:
    """Take a loss as it is, and wrap any other callable; `name` is for the error."""
    if isinstance(loss, losses.Loss):
        return loss
    if not callable(loss):
        msg = (
            f"`{name}` must be an `hfjax.losses.Loss` or a callable (outputs, "
            f"targets) -> values per case, got {type(loss).__name__}."
        )
        raise TypeError(msg)
    return losses.from_function(loss)
