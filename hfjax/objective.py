"""The objective: a model, a loss and data, as one function of the parameters.

    f(θ) = Σᵢ wᵢ L(F(θ, xᵢ), tᵢ) / Σᵢ wᵢ + ½ weight_decay ‖θ‖²

One f, the same in the value, the gradient, the curvature and the reduction
ratio. This is the only room that knows about data and devices: case weights,
microbatches and sharded cases are all sums of numerators and denominators here,
divided once, so that padding and uneven shards change nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from hfjax import _options, _tree, losses
from hfjax._cases import Cases, Microbatches, as_cases, check_outputs, split
from hfjax._types import Matvec, Number, Params, Tree

AxisName: TypeAlias = Any
"""A mesh axis name, or a tuple of them."""


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
        all parameters, biases too, as in Martens' program.
      microbatch_size: most cases that are run through the model at once, or `None`
        for all. Bounds activation memory; costs one more forward pass in each
        curvature product, which is then linearised anew for each microbatch.
      axis_name: name(s) of the mapped axis that shards the cases, under
        `shard_map`, `pmap` or `vmap(axis_name=…)`. Not needed under `jit` with
        sharded arrays.

    Raises:
      TypeError: if `model_fn` or `loss` is not callable.
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
    weight_decay: Number = 0.0
    microbatch_size: int | None = None
    axis_name: AxisName = None

    def __init__(
        self,
        model_fn: Callable[[Params, Tree], Tree],
        loss: losses.Loss | Callable[[Tree, Tree], jax.Array],
        *,
        weight_decay: Number = 0.0,
        microbatch_size: int | None = None,
        axis_name: AxisName = None,
    ) -> None:
        if not callable(model_fn):
            msg = (
                "`model_fn` must be a callable (params, inputs) -> outputs, got "
                f"{type(model_fn).__name__}. For a Flax module pass its pure form."
            )
            raise TypeError(msg)
        if not isinstance(loss, losses.Loss):
            if not callable(loss):
                msg = (
                    "`loss` must be an `hfjax.losses.Loss` or a callable (outputs, "
                    f"targets) -> values per case, got {type(loss).__name__}."
                )
                raise TypeError(msg)
            loss = losses.from_function(loss)
        _options.check_range("weight_decay", weight_decay, low=0.0)
        if microbatch_size is not None:
            _options.check_count("microbatch_size", microbatch_size, low=1)
        for name, option in (
            ("model_fn", model_fn),
            ("loss", loss),
            ("weight_decay", weight_decay),
            ("microbatch_size", microbatch_size),
            ("axis_name", axis_name),
        ):
            object.__setattr__(self, name, option)

    def value(self, params: Params, batch: tuple) -> jax.Array:
        """Compute f(θ) on `batch`.

        Args:
          params: θ.
          batch: `(inputs, targets)` or `(inputs, targets, weights)`.

        Returns:
          A scalar in float32 or wider.
        """
        mean = self.mean(lambda cases: self._weighted_loss(params, cases), batch)
        return mean + self._penalty(params)

    def value_and_grad(self, params: Params, batch: tuple) -> tuple[jax.Array, Params]:
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
        local = self.local(params)
        value, gradient = self.mean(
            lambda cases: jax.value_and_grad(self._weighted_loss)(local, cases), batch
        )
        gradient = self._decayed(gradient, params)
        return value + self._penalty(params), _tree.cast_like(gradient, params)

    def case_values(self, params: Params, batch: tuple) -> jax.Array:
        """Compute L(F(θ, xᵢ), tᵢ) for each case: no weights, no weight decay.

        Args:
          params: θ.
          batch: `(inputs, targets)` or `(inputs, targets, weights)`.

        Returns:
          Shape `[cases]`, in the order of the batch; under `axis_name`, of this
          device's cases.
        """
        cases = as_cases(batch)
        parts = split(cases, self.microbatch_size)
        if parts.count == 1:
            return self._losses(params, cases)
        _, values = jax.lax.scan(
            lambda carry, k: (carry, self._losses(params, parts.take(k))),
            None,
            jnp.arange(parts.count),
        )
        return values.T.reshape(-1)[: cases.weights.shape[0]]

    def mean(self, sum_over_cases: Callable[[Cases], Tree], batch: tuple) -> Tree:
        """Compute Σᵢ wᵢ qᵢ / Σᵢ wᵢ over microbatches and devices.

        Args:
          sum_over_cases: `cases -> Σᵢ wᵢ qᵢ` over those cases, a tree of arrays. It
            is run on one microbatch after another.
          batch: `(inputs, targets)` or `(inputs, targets, weights)`.

        Returns:
          The mean, in float32 or wider; 0 where all weights are 0.
        """
        cases = as_cases(batch)
        sums = self._accumulate(sum_over_cases, split(cases, self.microbatch_size))
        return _divide(self._over_devices(sums), self._total_weight(cases))

    def linear_mean(
        self, term: Callable[[Params, Cases], Matvec], params: Params, batch: tuple
    ) -> Matvec:
        """Build v ↦ Σᵢ wᵢ Bᵢ v / Σᵢ wᵢ + weight_decay · v for symmetric Bᵢ of each case.

        Args:
          term: `(params, cases) -> (v -> Σᵢ wᵢ Bᵢ v)`. Without microbatches it is
            called once, here: what it computes outside the product is computed
            once. With them it is called inside the product, on each microbatch.
          params: θ.
          batch: `(inputs, targets)` or `(inputs, targets, weights)`.

        Returns:
          The product, with the dtypes of `v`.
        """
        cases = as_cases(batch)
        local = self.local(params)
        parts, weight = split(cases, self.microbatch_size), self._total_weight(cases)
        whole = term(local, cases) if parts.count == 1 else None

        def matvec(v: Tree) -> Tree:
            tangent = self.local(_tree.cast_like(v, params))
            if whole is not None:
                sums = _tree.widen(whole(tangent))
            else:
                sums = self._accumulate(lambda part: term(local, part)(tangent), parts)
            mean = _divide(self._over_devices(sums), weight)
            return _tree.cast_like(self._decayed(mean, v), v)

        return matvec

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
        if self.axis_name is None:
            return tree
        names = (
            self.axis_name if isinstance(self.axis_name, tuple) else (self.axis_name,)
        )
        # Under `vmap(axis_name=…)` there is no such mesh axis, and nothing to mark.
        manual = jax.sharding.get_abstract_mesh().manual_axes

        def leaf(x: jax.Array) -> jax.Array:
            varying = jax.typeof(x).manual_axis_type.varying
            missing = tuple(n for n in names if n in manual and n not in varying)
            return jax.lax.pcast(x, missing, to="varying") if missing else x

        return jax.tree.map(leaf, tree)

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

    def _losses(self, params: Params, cases: Cases) -> jax.Array:
        outputs = self.model_fn(params, cases.inputs)
        check_outputs(outputs, cases.weights.shape[0])
        values = self.loss.value(outputs, cases.targets)
        return values.astype(_tree.wide(values.dtype))

    def _weighted_loss(self, params: Params, cases: Cases) -> jax.Array:
        values = self._losses(params, cases)
        return jnp.sum(cases.weights.astype(values.dtype) * values)

    @property
    def _decays(self) -> bool:
        return not (
            _options.is_plain_number(self.weight_decay) and self.weight_decay == 0
        )

    def _penalty(self, params: Params) -> jax.Array:
        if not self._decays:
            return jnp.zeros((), _tree.scalar_dtype(params))
        return 0.5 * jnp.asarray(self.weight_decay) * _tree.dot(params, params)

    def _decayed(self, tree: Tree, v: Tree) -> Tree:
        """Return `tree` + weight_decay · v."""
        return (
            _tree.axpy(jnp.asarray(self.weight_decay), v, tree)
            if self._decays
            else tree
        )

    def _accumulate(
        self, sum_over_cases: Callable[[Cases], Tree], parts: Microbatches
    ) -> Tree:
        if parts.count == 1:
            return _tree.widen(sum_over_cases(parts.cases))

        def step(total: Tree, k: jax.Array) -> tuple[Tree, None]:
            part = _tree.widen(sum_over_cases(parts.take(k)))
            return jax.tree.map(jnp.add, total, part), None

        shapes = jax.eval_shape(lambda: sum_over_cases(parts.take(0)))
        zeros = jax.tree.map(
            lambda shape: jnp.zeros(shape.shape, _tree.wide(shape.dtype)), shapes
        )
        return jax.lax.scan(step, self.local(zeros), jnp.arange(parts.count))[0]

    def _over_devices(self, sums: Tree) -> Tree:
        return sums if self.axis_name is None else jax.lax.psum(sums, self.axis_name)

    def _total_weight(self, cases: Cases) -> jax.Array:
        weight = self._over_devices(jnp.sum(cases.weights))
        return jnp.where(weight == 0, 1, weight)


def _divide(sums: Tree, weight: jax.Array) -> Tree:
    return jax.tree.map(lambda x: x / weight.astype(x.dtype), sums)
