"""The terms of an objective, f = Σₖ cₖ fₖ, each with its own model, loss and examples.

A plain objective has a single term. Whatever is linear in f (value, gradient,
curvature-vector products, diagonals) is computed for each term and summed here.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hfjax import losses
from hfjax._core import sharding
from hfjax._core import trees as _tree
from hfjax._core.arguments import ShapeError, noting_call
from hfjax._core.types import Params, Tree
from hfjax._tracing.convolutions import for_loops
from hfjax._tracing.linearize import noting_no_reverse
from hfjax.losses.loss import columns
from hfjax.objectives import decay
from hfjax.objectives.cases import Cases, check_outputs, stride
from hfjax.objectives.means import Means


class Term(NamedTuple):
    """cₖ fₖ on a batch.

    Attributes:
      coefficients: numbers or schedules whose product is cₖ; empty for a plain objective.
      model_fn: `(params, inputs) -> outputs`, without hidden states.
      loss: the loss of the outputs.
      weight_decay: β, one or several. The term cannot be evaluated as long as there are
        schedules among them.
      linearize_once: whether to keep the linearisations of all microbatches.
      means: how to average over examples: microbatches and devices.
      cases: the batch of this term.
      by_position: whether each position of an example has its own weight; the targets
        then hold their shares in the example's.
      whole_batch: whether the only example is a whole batch, as `whole_batch` makes it.
      mode: how J̃ is computed where it is written out, as in `hfjax.least_squares`.
    """

    coefficients: tuple[Any, ...]
    model_fn: Callable[[Params, Tree], Tree]
    loss: losses.Loss
    weight_decay: Tree
    linearize_once: bool
    means: Means
    cases: Cases
    by_position: bool = False
    whole_batch: bool = False
    mode: str = "auto"

    @property
    def weight(self) -> Any:
        """cₖ; `None` for a plain objective, to avoid multiplying by 1."""
        if any(map(callable, self.coefficients)):
            msg = (
                "A weight of the sum is a schedule, or balanced: say when, as in "
                "`objective.at(state.count, state.scales).value_and_grad(…)`."
            )
            raise TypeError(msg)
        return math.prod(self.coefficients) if self.coefficients else None

    def need_examples(self, name: str, instead: str) -> None:
        """Raise if a matrix is made of gradients of single examples, and there are none."""
        if self.whole_batch:
            msg = (
                f"{name} is made of the gradients of single cases, and with `whole_batch` "
                f"the loss of a case depends on all of them: use {instead}."
            )
            raise ValueError(msg)

    def outputs(self, params: Params, inputs: Tree) -> Tree:
        """Run the model: F(θ, x), with axis 0 of every leaf indexing the examples."""
        outputs = self.model_fn(params, inputs)
        cases = [leaf.shape[0] for leaf in jax.tree.leaves(inputs)]
        if cases:  # A model without inputs is checked against the targets instead.
            check_outputs(outputs, cases[0])
        return outputs

    def columns(self, params: Params) -> Sequence[int]:
        """Return which columns of S are not 0, of one for each output of an example.

        Most losses have them all: units times steps, over all leaves.
        """
        inputs, targets = sharding.first_case(self.cases[:2])
        outputs = jax.eval_shape(self.outputs, params, inputs)  # Traced, not run.
        return columns(self.loss, outputs, targets)

    def forward(self, params: Params, cases: Cases) -> Tree:
        """Run the model on some examples, and check that there is an output for each."""
        outputs = self.outputs(params, cases.inputs)
        check_outputs(outputs, cases.weights.shape[0])
        return outputs

    def losses_of(self, params: Params, cases: Cases) -> jax.Array:
        """Compute L(F(θ, xᵢ), tᵢ) for each of these examples, in float32 or wider."""
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
        """Compute Σᵢ wᵢ L(F(θ, xᵢ), tᵢ) over these examples, on this device."""
        values = self.losses_of(params, cases)
        return jnp.sum(cases.weights.astype(values.dtype) * values)

    def value(self, params: Params) -> jax.Array:
        """Compute fₖ(θ)."""
        # Marked as varying here, not in each microbatch: the transpose of that is a sum
        # over the devices.
        loss = functools.partial(self.weighted_loss, self.means.local(params))
        mean = self.means.mean(loss, self.cases, reversible=True)
        return self._penalised(mean, params)

    def value_and_grad(self, params: Params) -> tuple[jax.Array, Params]:
        """Compute fₖ(θ) and ∇fₖ(θ), in float32 or wider."""
        # Each microbatch is differentiated by itself, so its activations are freed before
        # the next.
        local = self.means.local(params)
        with noting_no_reverse():
            both = functools.partial(jax.value_and_grad(self.weighted_loss), local)
            value, gradient = self.means.mean(both, self.cases)
        gradient = self.decayed(gradient, params)
        return self._penalised(value, params), gradient

    def case_values(self, params: Params) -> jax.Array:
        """Compute L(F(θ, xᵢ), tᵢ) for each example of the batch, in order."""
        parts = self.means.parts(self.cases)
        if parts.count == 1:
            return self.losses_of(params, self.cases)
        losses_of = for_loops(self.losses_of)
        stacked = jax.lax.map(
            lambda k: losses_of(params, parts.take(k)), jnp.arange(parts.count)
        )
        return parts.in_order(stacked)

    def decayed(self, tree: Tree, v: Tree) -> Tree:
        """Add β v, the part of the weight decay, to a curvature-vector product."""
        return decay.decayed(self.weight_decay, v, tree)

    def _penalised(self, mean: jax.Array, params: Params) -> jax.Array:
        """Add ½ Σ β θ², in the wider dtype of the two."""
        dtype = _tree.widest(mean.dtype, _tree.scalar_dtype(params))
        penalty = decay.half_square(self.weight_decay, params)
        mean = mean.astype(dtype)
        return mean if penalty is None else mean + penalty.astype(dtype)


def with_decays(terms: Sequence[Term], damping: Tree, params: Params) -> Tree:
    """Return λD + Σₖ cₖ βₖ; `damping` is λ or the diagonal of λD.

    A λ stays one number if each βₖ is one number.
    """
    decays = [(term.weight, term.weight_decay) for term in terms]
    return decay.raised_by_all(decays, damping, params)


def value_on_part(
    whole: Sequence[Term], parts: Sequence[Term], params: Params, cases: int
) -> jax.Array:
    """Compute f(θ) on `parts`, the terms of what `subsample` returns for `cases`."""

    def of_term(whole: Term, part: Term) -> jax.Array:
        if whole.means.microbatch_size is not None:
            return part.value(params)
        # The model runs on all examples at θ anyway, for the gradient. As the same program
        # with other weights this is computed once; on the part it would be another program.
        weights, every = whole.cases.weights, stride(whole.cases, cases)
        among = jnp.arange(len(weights)) % every == 0
        among = among.reshape(-1, *[1] * (weights.ndim - 1))
        own = whole.cases._replace(weights=jnp.where(among, weights, 0))
        return whole._replace(cases=own).value(params)

    values = [of_term(*both) for both in zip(whole, parts, strict=True)]
    return total(whole, values)


def total(terms: Sequence[Term], trees: Sequence[Tree]) -> Tree:
    """Return Σₖ cₖ treesₖ in float32 or wider; the only tree of a plain objective as it is.

    `trees` holds something linear in f, computed for each term.
    """
    weights = [term.weight for term in terms]
    if weights == [None]:
        return trees[0]

    def leaf(*leaves: jax.Array) -> jax.Array:
        dtype = _tree.widest(*(x.dtype for x in leaves))
        scaled = [
            jnp.asarray(weight, dtype) * x.astype(dtype)
            for weight, x in zip(weights, leaves, strict=True)
        ]
        return sum(scaled[1:], scaled[0])

    return jax.tree.map(leaf, *map(_tree.widen, trees))
