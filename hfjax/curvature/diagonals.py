"""Diagonals of curvature matrices, for preconditioners and damping matrices.

| function | diagonal of | cost, in gradients |
|---|---|---|
| `empirical_fisher` | Σᵢ wᵢ ∇Lᵢ ∇Lᵢᵀ / Σᵢ wᵢ | 1 |
| `ggn_rademacher` | G, estimated without bias | 1 for each probe |
| `ggn_exact` | G | 1 for each output of an example |

Each includes `weight_decay`. All are means over examples of squares of per-example
quantities, not squares of a mean. (M&S (2012) have sums; a mean is on the scale of G
and λ.) With structural damping, an update passes an objective whose loss includes
μ times the distance of the hidden states. The diagonals of G then include its
curvature, but that of the Fisher matrix does not, because the distance has no gradient.

For dense layers, in any notation, the gradient of an example is an outer product of the
layer's input and its back-propagated error. The sum of squares is then one matrix
product of squares (M&S (2012), algorithm 6). Other gradients (convolutions, recurrent
and shared weights) are formed for as many examples at a time as fit in 64 MiB, at many
times the cost.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from hfjax._core import options, sharding, sums
from hfjax._core.arguments import as_key, as_params
from hfjax._core.types import Batch, Params, Tree
from hfjax._tracing import compiled
from hfjax._tracing.convolutions import for_loops
from hfjax._tracing.linearize import noting_no_reverse
from hfjax.curvature import _case_gradients
from hfjax.curvature.probes import keys_of, probes
from hfjax.objectives import decay
from hfjax.objectives.cases import Cases
from hfjax.objectives.plain import Objective, check_objective, terms_of
from hfjax.objectives.terms import Term, total

Estimate: TypeAlias = Callable[..., Tree]
"""`(objective, params, batch) -> d`, or `(objective, params, batch, *, key) -> d`."""

DRAWS = 4
"""Probes for a whole batch that is one example, for each of `num_probes`.

The mean over many examples is nearly exact with one probe each. A single example has the
mean of k squares instead, with a relative standard deviation of √(2/k). On a small network
with batch normalisation, conjugate gradients took 31 iterations to 99% of the decrease of
M with k = 1, 28 with 8 and 26 with 32, where each further probe costs a gradient.
"""

_HELD_ENTRIES = 2**24
"""Entries of per-example gradients held at once: 64 MiB in float32."""


def empirical_fisher(objective: Objective, params: Params, batch: Batch) -> Params:
    """Compute the diagonal of the empirical Fisher matrix, Σᵢ wᵢ (∇Lᵢ)² / Σᵢ wᵢ.

    If positions have weights, ∇Lᵢ is the gradient of the mean over the positions of an
    example, and wᵢ the sum of their weights.

    Args:
      objective: its loss is differentiated for each example; weight decay is added.
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.

    Returns:
      A tree like `params`, in float32 or wider; not negative.

    Example:
      >>> import hfjax
      >>> f = hfjax.Objective(lambda p, x: x * p, hfjax.losses.squared_error())
      >>> batch = (jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [-1.0]]))
      >>> print(empirical_fisher(f, jnp.zeros(1), batch))  # mean of (−1)² and 2²
      [2.5]

    References:
      Martens & Sutskever (2012), section 11.3, algorithm 6; Martens (2010), 4.7.
    """

    def of_term(term: Term, params: Params, _: None) -> Params:
        instead = "`diagonals.ggn_rademacher`, as in `preconditioners.diagonal(…)`"
        term.need_examples("`diagonals.empirical_fisher`", instead)

        def case_gradient(params: Params, case: Cases, _: jax.Array) -> Params:
            return jax.grad(lambda params: term.losses_of(params, case)[0])(params)

        return _mean_of_squares(term, params, case_gradient)

    return _summed(of_term, objective, params, batch)


def ggn_rademacher(
    objective: Objective,
    params: Params,
    batch: Batch,
    *,
    key: jax.Array,
    num_probes: int = 1,
) -> Params:
    """Estimate diag(G) from random signs, without bias: the mean of (Jᵢᵀ Sᵢ vᵢ)².

    Sᵢ is a factor of the loss's Hessian, `Sᵢ Sᵢᵀ = L″ᵢ`, and `vᵢ` holds an independent
    random sign for every output of an example and every probe, so that E[vᵢvᵢᵀ] = I.
    The estimate of a positive entry may be 0.

    Args:
      objective: the objective that defines G; weight decay is added.
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.
      key: a typed key. The signs of an example depend only on this key and on the
        example's place in the batch, not on microbatches or devices.
      num_probes: the number of sign vectors per example to average over; each costs a
        gradient. With `Objective(whole_batch=True)`, where one vector is for the whole
        batch, there are four times as many.

    Returns:
      A tree like `params`, in float32 or wider; not negative.

    Raises:
      TypeError: if `num_probes` is not a plain integer.
      ValueError: if it is less than 1.

    Example:
      With one output per example, the estimate is exact, because signs square to 1:

      >>> import hfjax
      >>> f = hfjax.Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
      >>> batch = (jnp.array([[1.0, 0.0], [2.0, 4.0]]), jnp.zeros((2, 1)))
      >>> d = ggn_rademacher(f, jnp.zeros((2, 1)), batch, key=jax.random.key(0))
      >>> print(d[:, 0])
      [2.5 8. ]

    References:
      Martens & Sutskever (2012), section 11.4, algorithm 7; Chapelle & Erhan (2011);
      signs: Martens, Sutskever & Swersky (2012).
    """
    options.check_count("num_probes", num_probes, low=1)

    def of_term(term: Term, params: Params, key: jax.Array) -> Params:
        drawn = probes(term.means, term.cases, key)

        def case_gradient(params: Params, case: Cases, probe: jax.Array) -> Params:
            inputs, key = case.inputs
            case = case._replace(inputs=inputs)
            outputs, transpose, factor = _factored(term, params, case)
            return transpose(factor(drawn.signs(key[0], probe, outputs)))

        # Each example's key is part of its inputs, so that microbatches keep them together.
        cases = term.cases._replace(inputs=(term.cases.inputs, drawn.data))
        count = num_probes * (DRAWS if term.whole_batch else 1)
        keyed = term._replace(cases=cases)
        return _mean_of_squares(keyed, params, case_gradient, count, 1 / count)

    return _summed(of_term, objective, params, batch, key)


def ggn_exact(objective: Objective, params: Params, batch: Batch) -> Params:
    """Compute diag(G) exactly: the mean of Σₖ (Jᵢᵀ Sᵢ eₖ)² over the outputs k.

    This takes one back-propagation for each output of an example, where every unit at
    every time step counts, so use it for few outputs. Outputs whose column of Sᵢ is 0
    take none.

    Args:
      objective: the objective that defines G; weight decay is added.
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.

    Returns:
      A tree like `params`, in float32 or wider; not negative.

    Example:
      >>> import hfjax
      >>> f = hfjax.Objective(lambda p, x: x * p, hfjax.losses.squared_error())
      >>> batch = (jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.zeros((2, 2)))
      >>> print(ggn_exact(f, jnp.zeros(2), batch))  # mean of 1² and 3², of 2² and 0
      [5. 2.]

    References:
      Martens & Sutskever (2012), section 11.2.
    """

    def of_term(term: Term, params: Params, _: None) -> Params:
        columns = term.columns(params)

        def case_gradient(params: Params, case: Cases, index: jax.Array) -> Params:
            # The unit vector eₖ of a column k, with entries numbered over all leaves.
            column = jnp.asarray(columns, index.dtype)[index]
            outputs, transpose, factor = _factored(term, params, case)
            leaves, structure = jax.tree.flatten(outputs)
            units, at = [], 0
            for z in leaves:
                place = jnp.arange(at, at + z.size, dtype=index.dtype)
                units.append((place.reshape(z.shape) == column).astype(z.dtype))
                at += z.size
            return transpose(term.means.local(factor(structure.unflatten(units))))

        return _mean_of_squares(term, params, case_gradient, len(columns))

    return _summed(of_term, objective, params, batch)


def _summed(
    of_term: Callable[[Term, Params, Any], Params],
    objective: Objective,
    params: Params,
    batch: Batch,
    key: jax.Array | None = None,
) -> Params:
    """Sum the terms' diagonals, times cₖ, each with a key of its own."""
    check_objective(objective)

    def compute(params: Params, batch: Batch, key: jax.Array | None) -> Params:
        terms = terms_of(objective, batch)
        keys = [None] * len(terms) if key is None else keys_of(terms, key)
        pairs = zip(terms, keys, strict=True)
        return total(terms, [of_term(term, params, own) for term, own in pairs])

    key = None if key is None else as_key("key", key)
    return compiled.run(compute, as_params(params), batch, key)


def _factored(
    term: Term, params: Params, case: Cases
) -> tuple[Tree, Callable[[Tree], Params], Callable[[Tree], Tree]]:
    """Return the outputs of an example, v ↦ Jᵀv and v ↦ S v."""
    outputs, transpose = jax.vjp(
        lambda params: term.outputs(params, case.inputs), params
    )
    factor = term.loss.factor(outputs, case.targets)
    return outputs, lambda v: transpose(v)[0], factor


@noting_no_reverse()
def _mean_of_squares(
    term: Term,
    params: Params,
    case_gradient: Callable[[Params, Any, Any], Params],
    probes: int = 1,
    share: float = 1.0,
) -> Params:
    """Average Σ over probes of `share` · squares over the examples; add weight decay.

    `case_gradient` is `(params, case, probe) -> what is squared`, for one example with
    leading axes of one.
    """
    cases, means = sharding.alike(term.cases), term.means
    zero = jnp.zeros((), jnp.int32)
    local = means.local(sharding.gathered(params, cases))

    def gradient_of(probe: jax.Array) -> Callable[[tuple], Params]:
        def gradient(data: Batch) -> Params:
            inputs, targets = jax.tree.map(lambda leaf: leaf[None], data)
            return case_gradient(local, Cases(inputs, targets, jnp.ones(1)), probe)

        return gradient

    def sum_of_squares(cases: Cases) -> Tree:
        def one(probe: jax.Array) -> Tree:
            gradient = gradient_of(probe)
            return _case_gradients.sum_of_squares(gradient, cases[:2], cases.weights)

        if probes == 1:
            return one(zero)
        # One probe after the other, so that memory does not grow with their number.
        nothing = sharding.zeros(jax.eval_shape(one, zero))
        return sums.summed(for_loops(one), probes, means.local(nothing))

    held = _case_gradients.held_entries(gradient_of(zero), cases[:2])
    # Microbatches bound the memory for gradients that have to be formed.
    bounded = means.at_most(max(1, _HELD_ENTRIES // max(held, 1)))
    mean = sharding.like(bounded.mean(sum_of_squares, cases), params)
    return decay.raised(term.weight_decay, jax.tree.map(lambda x: share * x, mean))
