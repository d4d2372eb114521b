"""The objective: a model, a loss and data, as one function of the parameters.

    f(θ) = Σᵢ wᵢ L(F(θ, xᵢ), tᵢ) / Σᵢ wᵢ + ½ weight_decay ‖θ‖²

One f, the same in the value, the gradient, the curvature and the reduction
ratio. This is the only room that knows about data and devices: case weights,
microbatches and sharded cases are all sums of numerators and denominators here,
divided once, so that padding and uneven shards change nothing.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hfjax import _compiled, _options, _tree, losses
from hfjax._arguments import ShapeError, as_params, noting_call
from hfjax._cases import Cases, as_cases, check_outputs, split, thinned, unfold
from hfjax._convolutions import for_loops
from hfjax._linearize import noting_no_reverse
from hfjax._means import AxisName, Means
from hfjax._types import Batch, NumberOrSchedule, Params, Tree


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
    weight_decay: NumberOrSchedule = 0.0
    microbatch_size: int | None = None
    linearize_once: bool = False
    axis_name: AxisName = None
    hidden_loss: losses.Loss | None = None

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
        _options.check_range("weight_decay", weight_decay, low=0.0)
        if microbatch_size is not None:
            _options.check_count("microbatch_size", microbatch_size, low=1)
        if hidden_loss is not None:
            hidden_loss = losses.as_loss("hidden_loss", hidden_loss)
        for name, option in (
            ("model_fn", model_fn),
            ("loss", losses.as_loss("loss", loss)),
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

    def without_decay(self) -> "Objective":
        """Return f without its weight decay.

        Returns:
          The objective.
        """
        return dataclasses.replace(self, weight_decay=0.0)

    def check_batch(self, batch: Batch, name: str = "batch") -> None:
        """Raise unless `batch` is one.

        Args:
          batch: `(inputs, targets)` or `(inputs, targets, weights)`.
          name: of the argument, for the error.
        """
        as_cases(batch, name)

    def thinned(self, batch: Batch, cases: int) -> Batch:
        """Return evenly spaced cases of a batch.

        Args:
          batch: `(inputs, targets)` or `(inputs, targets, weights)`.
          cases: at least so many, or all there are.

        Returns:
          A batch.
        """
        return thinned(batch, cases)

    def outputs(self, params: Params, inputs: Tree) -> Tree:
        """Run the model: F(θ, x), without hidden states.

        Args:
          params: θ.
          inputs: x of some cases.

        Returns:
          What the loss compares with the targets; every leaf leads with the cases.
        """
        if self.hidden_loss is None:
            outputs = self._model(params, inputs)
        else:
            outputs = self.outputs_and_hidden(params, inputs)[0]
        cases = [leaf.shape[0] for leaf in jax.tree.leaves(inputs)]
        if cases:  # Else the targets tell how many there are.
            check_outputs(outputs, cases[0])
        return outputs

    def outputs_and_hidden(self, params: Params, inputs: Tree) -> tuple[Tree, Tree]:
        """Run a model with hidden states.

        Args:
          params: θ.
          inputs: x of some cases.

        Returns:
          F(θ, x), and h(θ, x).

        Raises:
          ValueError: if `model_fn` does not return a pair.
        """
        pair = self._model(params, inputs)
        if not isinstance(pair, tuple) or len(pair) != 2:
            came = f"a tuple of {len(pair)}" if isinstance(pair, tuple) else type(pair)
            msg = f"With a `hidden_loss`, `model_fn` must return (outputs, hidden), got {came}."
            raise ValueError(msg)
        return pair

    def value(self, params: Params, batch: Batch) -> jax.Array:
        """Compute f(θ) on `batch`.

        Args:
          params: θ.
          batch: `(inputs, targets)` or `(inputs, targets, weights)`.

        Returns:
          A scalar in float32 or wider.
        """

        def value(params: Params, batch: Batch) -> jax.Array:
            mean = self.mean(lambda cases: self.weighted_loss(params, cases), batch)
            return self._penalised(mean, params)

        return _compiled.run(value, as_params(params), batch)

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
            local = self.local(params)
            with noting_no_reverse():
                value, gradient = self.mean(
                    lambda cases: jax.value_and_grad(self.weighted_loss)(local, cases),
                    batch,
                )
            gradient = self.decayed(gradient, params)
            return self._penalised(value, params), _tree.cast_like(gradient, params)

        return _compiled.run(both, as_params(params), batch)

    def case_values(self, params: Params, batch: Batch) -> jax.Array:
        """Compute L(F(θ, xᵢ), tᵢ) for each case: no weights, no weight decay.

        Args:
          params: θ.
          batch: `(inputs, targets)` or `(inputs, targets, weights)`.

        Returns:
          Shape `[cases]`, in the order of the batch; under `axis_name`, of this
          device's cases.
        """

        def values(params: Params, batch: Batch) -> jax.Array:
            cases = as_cases(batch)
            parts = split(cases, self.microbatch_size)
            if parts.count == 1:
                return self.losses_of(params, cases)
            losses_of = for_loops(self.losses_of)
            stacked = jax.lax.map(
                lambda k: losses_of(params, parts.take(k)), jnp.arange(parts.count)
            )
            return unfold(stacked, cases.weights.shape[0])

        return _compiled.run(values, as_params(params), batch)

    def mean(self, sum_over_cases: Callable[[Cases], Tree], batch: Batch) -> Tree:
        """Compute Σᵢ wᵢ qᵢ / Σᵢ wᵢ over microbatches and devices.

        Args:
          sum_over_cases: `cases -> Σᵢ wᵢ qᵢ` over those cases, a tree of arrays. It
            is run on one microbatch after another.
          batch: `(inputs, targets)` or `(inputs, targets, weights)`.

        Returns:
          The mean, in float32 or wider; 0 where all weights are 0.
        """
        return self.means.mean(sum_over_cases, batch)

    def accumulate(self, sum_over_cases: Callable[[Cases], Tree], cases: Cases) -> Tree:
        """Sum over the microbatches of these cases, in float32 or wider.

        Args:
          sum_over_cases: `cases -> Σᵢ wᵢ qᵢ` over those cases, a tree of arrays.
          cases: a batch, or one microbatch.

        Returns:
          The sums, of this device.
        """
        return self.means.accumulate(sum_over_cases, split(cases, self.microbatch_size))

    def forward(self, params: Params, cases: Cases) -> Tree:
        """Run the model on cases, microbatch by microbatch where that is to be kept.

        Args:
          params: θ.
          cases: a batch, or a microbatch.

        Returns:
          The outputs of all of them, in their order.
        """
        parts = split(cases, self.microbatch_size if self.linearize_once else None)
        total = cases.weights.shape[0]
        if parts.count == 1:
            outputs = self.outputs(params, cases.inputs)
        else:
            stacked = _tree.mapped(
                for_loops(lambda k: self.outputs(params, parts.take(k).inputs)),
                parts.count,
            )
            outputs = jax.tree.map(lambda z: unfold(z, total), stacked)
        check_outputs(outputs, total)
        return outputs

    def local(self, tree: Tree) -> Tree:
        """Mark a replicated tree as each device's own, to differentiate by it.

        Under `shard_map(check_vma=True)` a transpose with respect to replicated
        values inserts a sum over devices; a varying value's does not, and the sum is
        then `mean`'s to take, once, as without `check_vma`.

        Args:
          tree: replicated over `axis_name`, as parameters are.

        Returns:
          The same values; `tree` itself where there is no `axis_name`.
        """
        return self.means.local(tree)

    def with_microbatches(self, size: int) -> "Objective":
        """Return this objective with microbatches of at most `size` cases.

        Args:
          size: an upper bound; a smaller `microbatch_size` stays.

        Returns:
          An objective of the same f.
        """
        if self.microbatch_size is not None and self.microbatch_size <= size:
            return self
        return dataclasses.replace(self, microbatch_size=size)

    def losses_of(self, params: Params, cases: Cases) -> jax.Array:
        """Compute L(F(θ, xᵢ), tᵢ) of each of these cases.

        Args:
          params: θ.
          cases: a batch, or a microbatch.

        Returns:
          Shape `[cases]`, in float32 or wider.

        Raises:
          ShapeError: if the loss returns another shape; a `ValueError`.
        """
        outputs = self.forward(params, cases)
        with noting_call(
            "`loss(outputs, targets)`", outputs=outputs, targets=cases.targets
        ):
            values = self.loss.value(outputs, cases.targets)
        if values.shape != cases.weights.shape:
            msg = (
                f"`loss.value` must have shape {list(cases.weights.shape)}, a number for "
                f"each case, got {list(values.shape)}."
            )
            raise ShapeError(msg)
        return values.astype(_tree.wide(values.dtype))

    def weighted_loss(self, params: Params, cases: Cases) -> jax.Array:
        """Compute Σᵢ wᵢ L(F(θ, xᵢ), tᵢ) over these cases.

        Args:
          params: θ.
          cases: a batch, or a microbatch.

        Returns:
          A scalar, of this device.
        """
        values = self.losses_of(params, cases)
        return jnp.sum(cases.weights.astype(values.dtype) * values)

    def _model(self, params: Params, inputs: Tree) -> Tree:
        with noting_call("`model_fn(params, inputs)`", params=params, inputs=inputs):
            return self.model_fn(params, inputs)

    @property
    def means(self) -> Means:
        """How a batch is summed."""
        return Means(self.microbatch_size, self.axis_name)

    @property
    def decay(self) -> jax.Array | None:
        """The weight decay, `None` where it is known to be zero."""
        if callable(self.weight_decay):
            msg = (
                "`weight_decay` is a schedule: say when, as in "
                "`objective.at(state.count).value_and_grad(params, batch)`."
            )
            raise TypeError(msg)
        zero = _options.is_plain_number(self.weight_decay) and self.weight_decay == 0
        return None if zero else jnp.asarray(self.weight_decay)

    def _penalised(self, mean: jax.Array, params: Params) -> jax.Array:
        """Add ½β‖θ‖², in the wider of two dtypes."""
        dtype = _tree.widest(mean.dtype, _tree.scalar_dtype(params))
        mean, decay = mean.astype(dtype), self.decay
        if decay is None:
            return mean
        square = _tree.dot(params, params).astype(dtype)
        return mean + 0.5 * decay.astype(dtype) * square

    def decayed(self, tree: Tree, v: Tree) -> Tree:
        """Add the weight decay's part: `tree` + `weight_decay` · v.

        Args:
          tree: a product with v, or the gradient, without weight decay.
          v: like `tree`: the vector, or θ.

        Returns:
          The sum; `tree` itself where there is no weight decay.
        """
        decay = self.decay
        return tree if decay is None else _tree.axpy(decay, v, tree)
