"""The whole batch as one example, for models and losses that mix the examples of a batch.

    f(θ) = Σᵢ wᵢ Lᵢ(F(θ, x₁, …, xₙ), t₁, …, tₙ) / Σᵢ wᵢ

Batch normalisation in training mode makes the outputs for an example depend on the other
examples, and a contrastive loss compares examples with one another. Every leaf of such a
batch gets a leading axis of length 1 here, so that its examples are positions of a single
example, and their weights are those of positions (`positions`). Value, gradient, curvature
and exact solutions are then computed as for any example, and nothing takes a part of it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from hfjax._core.types import Params, Tree
from hfjax.objectives.cases import Cases
from hfjax.objectives.positions import shared, weighted_cases
from hfjax.objectives.terms import Term

_CURES = {
    "microbatch_size": "leave it out; `jax.checkpoint` in the model saves memory",
    "axis_name": "shard the arrays of the batch, and compile with `jax.jit` alone",
    "hidden_loss": "hidden states belong to single cases; leave it out",
}


def check_whole_batch(*options: Any) -> None:
    """Raise if an option of an objective needs parts of a batch, or single examples.

    These are `microbatch_size`, `axis_name` and `hidden_loss`.
    """
    for (name, cure), value in zip(_CURES.items(), options, strict=True):
        if value is not None:
            msg = (
                f"`{name}` does not go with `whole_batch`, where the cases of a batch "
                f"depend on one another: {cure}."
            )
            raise ValueError(msg)


def as_one_case(term: Term, *, is_weighted: bool) -> Term:
    """Return a term whose only example is the whole batch, with the same f.

    `is_weighted` says whether the weights of the batch are the user's.
    """
    one, loss = _lifted(jax.tree.map(jnp.asarray, term.cases)), term.loss.whole
    if loss is not None and is_weighted:
        loss = loss.weighted
    if loss is not None:
        cases = shared(one)
    elif term.loss.weighted is not None:
        loss, cases = weighted_cases(term.loss, one)
    else:
        msg = (
            "`whole_batch` gives each case of the batch a weight, and this "
            "`hfjax.losses.Loss` has no `weighted`: write the loss by "
            "`hfjax.losses.from_function`."
        )
        raise ValueError(msg)

    def model_fn(params: Params, inputs: Tree) -> Tree:
        own = jax.tree.map(lambda x: jax.lax.squeeze(x, (0,)), inputs)
        return _lifted(jax.tree.map(jnp.asarray, term.model_fn(params, own)))

    return term._replace(model_fn=model_fn, loss=loss, cases=cases, whole_batch=True)


def weights_of_examples(cases: Cases) -> jax.Array:
    """Return wᵢ, `[examples]`, of a batch that is one example."""
    _, shares = cases.targets
    return cases.weights * jnp.sum(shares[0], axis=range(1, shares.ndim - 1))


def _lifted(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jax.lax.expand_dims(x, (0,)), tree)
