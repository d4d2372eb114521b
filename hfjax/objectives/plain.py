"""Objectives: the interface for users, and what other modules need from one.

Value, gradient, curvature and reduction ratio all refer to the same f. A plain objective
has a single term, a weighted sum has those of all its parts; nothing else distinguishes
them.
"""

import dataclasses
from collections.abc import Callable

import jax

from hfjax import losses
from hfjax._core import options, trees
from hfjax._core.arguments import as_params, describe, noting_call
from hfjax._core.types import Batch, Params, Tree
from hfjax._tracing import compiled
from hfjax.objectives import cases as _cases
from hfjax.objectives import decay
from hfjax.objectives.cases import as_cases
from hfjax.objectives.means import AxisName, Means
from hfjax.objectives.positions import weighted_cases, without_padding
from hfjax.objectives.terms import Term, total
from hfjax.objectives.whole_batch import as_one_case, check_whole_batch


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Objective:
    """A training objective f(θ), which provides its value, gradient and curvature.

        f(θ) = Σᵢ wᵢ L(F(θ, xᵢ), tᵢ) / Σᵢ wᵢ + ½ Σⱼ βⱼ θⱼ²

    F is `model_fn`, L the loss and β the weight decay. A batch is `(inputs, targets)`,
    with weights wᵢ = 1, or `(inputs, targets, weights)`.

    If the loss sums over positions of an example (tokens, pixels, outputs), they may have
    weights of shape `[cases, positions…]`. Then f is the mean over all positions, as for
    sequences of unequal lengths,

        f(θ) = Σᵢₚ wᵢₚ Lₚ(F(θ, xᵢ), tᵢ) / Σᵢₚ wᵢₚ + ½ β ‖θ‖²

    An example or a position of weight 0 may hold anything: a label of −100, or NaN.

    Attributes:
      model_fn: `(params, inputs) -> outputs`. The outputs for an example must not depend
        on other examples, unless `whole_batch` is set. Pass a random model one key per
        example in `inputs`.
      loss: an `hfjax.losses.Loss`, or a function `(outputs, targets) -> array` whose first
        axis indexes the examples; further axes are summed.
      weight_decay: β ≥ 0, on the scale of the mean loss. One number applies to all
        parameters, including biases. A tree prefix of the parameters has a number for
        each leaf or subtree: `jax.tree.map(lambda p: 1e-4 * (p.ndim > 1), params)` leaves
        out biases. A schedule, in place of any number, is evaluated by `at`.
      microbatch_size: the most examples to run through the model at once; `None` for all.
        This bounds the memory for activations. Each curvature-vector product then costs
        one more forward pass, because every microbatch is linearised anew. One whose weights
        are all 0 is passed over; with weights, therefore, only `value` has a reverse-mode
        derivative. On `Explicit` axes it has at least one example from each device.
      linearize_once: keep the linearisations of all microbatches. Products then need no
        forward pass; memory holds the activations of the whole batch, but the intermediate
        results of only one microbatch at a time.
      axis_name: name(s) of the mapped axis over which the examples are sharded, inside
        `shard_map`, `pmap` or `vmap(axis_name=…)`. Not needed for sharded arrays under
        `jit`.
      hidden_loss: for structural damping: d(h, h(θ)), a distance between hidden states,
        summed over units and time. `model_fn` must then return `(outputs, hidden)`. Use
        `squared_error` for activations, `sigmoid_cross_entropy` for the logits of logistic
        units, or any function `(hidden, reference) -> array`. Only its curvature is used;
        it is not part of f.
      whole_batch: let examples depend on one another: batch normalisation in training
        mode, or a contrastive loss. A function as `loss` gets the outputs and targets of
        the whole batch, compares them as it likes, and returns a value for each example or
        their mean. Everything is then computed on all of the batch at once, and counts it
        as one example: `case_values` has one value.

    Raises:
      TypeError: if `model_fn`, `loss` or `hidden_loss` is not callable.
      ValueError: if `weight_decay` or `microbatch_size` is out of range, or if an option
        does not go with `whole_batch`.

    Example:
      >>> import hfjax, jax.numpy as jnp
      >>> f = Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
      >>> x, t = jnp.eye(2), jnp.array([[2.0], [4.0]])
      >>> print(f.value(jnp.zeros((2, 1)), (x, t)))  # (½·2² + ½·4²) / 2
      5.0
      >>> print(f.value(jnp.zeros((2, 1)), (x, t, jnp.array([1.0, 0.0]))))
      2.0

      Sequences of 2 tokens and of 1, padded. All logits are 0, so f = log 2 for each:

      >>> loss = hfjax.losses.softmax_cross_entropy_with_integer_labels()
      >>> f = Objective(lambda p, x: x @ p, loss)
      >>> x, labels = jnp.ones((2, 2, 3)), jnp.array([[0, 1], [1, -100]])
      >>> print(f.value(jnp.zeros((3, 2)), (x, labels, labels != -100)).round(4))
      0.6931

    References:
      Martens & Sutskever (2012), section 7.1 (`linearize_once`) and 8.4 (`hidden_loss`).
    """

    model_fn: Callable[[Params, Tree], Tree]
    loss: losses.Loss
    _: dataclasses.KW_ONLY
    weight_decay: Tree
    microbatch_size: int | None
    linearize_once: bool
    axis_name: AxisName
    hidden_loss: losses.Loss | None
    whole_batch: bool

    def __init__(
        self,
        model_fn: Callable[[Params, Tree], Tree],
        loss: losses.Loss | Callable[[Tree, Tree], jax.Array],
        *,
        weight_decay: Tree = 0.0,
        microbatch_size: int | None = None,
        linearize_once: bool = False,
        axis_name: AxisName = None,
        hidden_loss: losses.Loss | Callable[[Tree, Tree], jax.Array] | None = None,
        whole_batch: bool = False,
    ) -> None:
        if not callable(model_fn):
            msg = (
                "`model_fn` must be a callable (params, inputs) -> outputs, got "
                f"{type(model_fn).__name__}. For a Flax module pass its pure form."
            )
            raise TypeError(msg)
        decay.check(weight_decay)
        if microbatch_size is not None:
            options.check_count("microbatch_size", microbatch_size, low=1)
        if hidden_loss is not None:
            hidden_loss = _as_loss("hidden_loss", hidden_loss)
        if whole_batch:
            check_whole_batch(microbatch_size, axis_name, hidden_loss)
        # A frozen dataclass cannot be assigned to.
        vars(self).update(
            model_fn=model_fn,
            loss=_as_loss("loss", loss),
            weight_decay=weight_decay,
            microbatch_size=microbatch_size,
            linearize_once=linearize_once,
            axis_name=axis_name,
            hidden_loss=hidden_loss,
            whole_batch=whole_batch,
        )

    def at(self, count: jax.Array | int, scales: Tree = None) -> "Objective":
        """Return f at an update, with the values of schedules of the weight decay.

        Args:
          count: the number of updates so far, `state.count`.
          scales: of the weights of a sum; `state.scales` for one that is balanced.

        Returns:
          An objective without schedules, whose weights are fixed.

        Raises:
          TypeError: if there are `scales`, and the objective is not a sum.

        Example:
          >>> import hfjax, optax
          >>> decay = optax.piecewise_constant_schedule(0.5, {100: 0.0})
          >>> loss = hfjax.losses.squared_error()
          >>> f = Objective(lambda p, x: x * p, loss, weight_decay=decay)
          >>> print(f.at(0).weight_decay, f.at(100).weight_decay)
          0.5 0.0
        """
        if scales is not None:
            msg = "`scales` are for a weighted sum, and this is a single objective."
            raise TypeError(msg)
        now = decay.at(self.weight_decay, count)
        if now is self.weight_decay:
            return self
        return dataclasses.replace(self, weight_decay=now)

    def value(self, params: Params, batch: Batch) -> jax.Array:
        """Compute f(θ) on a batch.

        Args:
          params: θ.
          batch: `(inputs, targets)` or `(inputs, targets, weights)`.

        Returns:
          A scalar in float32 or wider.
        """

        # `compiled.run` saves calls from outside of `jit` from compiling anew each time.
        def value(params: Params, batch: Batch) -> jax.Array:
            terms = self._terms(batch)
            return total(terms, [term.value(params) for term in terms])

        return compiled.run(value, as_params(params), batch)

    def value_and_grad(self, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        """Compute f(θ) and ∇f(θ) on a batch.

        Under `shard_map`, use this and not `jax.grad`: with `check_vma=True`, the latter
        sums gradients of replicated parameters over the devices. Here they are always the
        mean.

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
        """Compute the loss of each example, without weights and weight decay.

        Args:
          params: θ.
          batch: `(inputs, targets)` or `(inputs, targets, weights)`.

        Returns:
          Shape `[cases]`, in the order of the batch; under `axis_name`, for this device's
          examples. For a weighted sum, a tuple with one such array for each part. If
          positions have weights, the loss of an example is the mean over its positions.
        """

        def values(params: Params, batch: Batch) -> jax.Array:
            (term,) = self._terms(batch)
            cases = as_cases(batch)
            if cases.weights.ndim == 1 and not self.whole_batch:
                # Here an example of weight 0 has the loss of what it holds.
                term = term._replace(cases=cases)
            return term.case_values(params)

        return compiled.run(values, as_params(params), batch)

    # Advice for an error: structural damping needs hidden states, and there are none.
    _no_hidden = (
        "give it a `hidden_loss`, and a `model_fn` that returns (outputs, hidden)."
    )

    def _terms(self, batch: Batch, name: str = "batch") -> tuple[Term, ...]:
        """Return the terms of f on a batch, or raise; `name` is for the error."""
        cases = as_cases(batch, name)
        is_weighted = len(batch) > 2 and batch[2] is not None
        if is_weighted:
            compared = self.whole_batch and self.loss.whole is not None
            cases = without_padding(cases, compared=compared)
        term = Term(
            coefficients=(),
            model_fn=self._outputs,
            loss=self.loss,
            weight_decay=self.weight_decay,
            linearize_once=self.linearize_once,
            means=Means(self.microbatch_size, self.axis_name, skips=is_weighted),
            cases=cases,
            by_position=cases.weights.ndim > 1,
        )
        if self.whole_batch:
            return (as_one_case(term, is_weighted=is_weighted),)
        loss, cases = weighted_cases(self.loss, cases)
        return (term._replace(loss=loss, cases=cases),)

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
        if self.whole_batch:
            return batch
        return _cases.subsample(batch, cases, self.microbatch_size)


def check_objective(objective: object) -> None:
    """Raise a `TypeError` unless this is an objective."""
    if not isinstance(objective, Objective):
        msg = f"`objective` must be an `hfjax.Objective`, got {describe(objective)}."
        raise TypeError(msg)


def terms_of(
    objective: Objective, batch: Batch, name: str = "batch"
) -> tuple[Term, ...]:
    """Return the terms of an objective on a batch: one if it is plain, or its parts'.

    `name` is what the error calls the batch if it does not fit.
    """
    return objective._terms(batch, name)


def each(objective: Objective, change: Callable[[Objective], Objective]) -> Objective:
    """Apply a change to each plain objective that an objective consists of."""
    return objective._each(change)


def subsample(objective: Objective, batch: Batch, cases: int) -> Batch:
    """Return evenly spaced examples, at least `cases` for each term, or the same batch."""
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
    """Return a loss unchanged; wrap any other callable; `name` is for the error."""
    if isinstance(loss, losses.Loss):
        return loss
    if not callable(loss):
        msg = (
            f"`{name}` must be an `hfjax.losses.Loss` or a callable (outputs, "
            f"targets) -> values per case, got {type(loss).__name__}."
        )
        raise TypeError(msg)
    return losses.from_function(loss)
