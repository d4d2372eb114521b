"""Diagonals of curvature matrices, for preconditioners and damping matrices.

| function | diagonal of | cost, in gradients |
|---|---|---|
| `empirical_fisher` | Σᵢ wᵢ ∇Lᵢ ∇Lᵢᵀ / Σᵢ wᵢ (report, section 11.3) | 1 |
| `ggn_rademacher` | G, unbiased (section 11.4) | 1 a probe |
| `ggn_exact` | G (section 11.2) | 1 an output of a case |

each plus `weight_decay`. All are means over cases of squares of per-case quantities
(ERRATA: a mean, so that they stand on the scale of G and λ); the square of the mean
gradient is another thing. With structural damping an update hands an estimate the
objective with μ times the hidden states' distance in its loss: those of G then have its
diagonal in them, the Fisher's has not, as the distance has no gradient.

Where what is squared is an outer product of layer input and back-propagated error
(dense layers, in any notation), the sum of squares is one matrix product of squares
(report, algorithm 6). Other gradients (convolutions, recurrent and shared weights) are
formed for as many cases at a time as fit in 64 MiB, at many times that cost.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from hfjax._core import options, sharding, trees
from hfjax._core.arguments import as_key, as_params, describe
from hfjax._core.types import Batch, Params, Tree
from hfjax._tracing import compiled
from hfjax._tracing.convolutions import for_loops
from hfjax._tracing.linearize import noting_no_reverse
from hfjax.curvature import _case_gradients
from hfjax.curvature.probes import probes
from hfjax.objectives.cases import Cases
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import terms_of
from hfjax.objectives.terms import Term, total

Estimate: TypeAlias = Callable[..., Tree]
"""`(objective, params, batch) -> d`, or `(objective, params, batch, *, key) -> d`."""

_HELD_ENTRIES = 2**24
"""Entries of per-case gradients held at once: 64 MiB in float32; heuristic."""


def empirical_fisher(objective: Objective, params: Params, batch: Batch) -> Params:
    """Compute the diagonal of the empirical Fisher matrix, Σᵢ wᵢ (∇Lᵢ)² / Σᵢ wᵢ.

    Args:
      objective: whose loss is differentiated case by case; weight decay is added to
        the diagonal, as it is to the curvature.
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

    def of_term(term: Term, params: Params, key: None) -> Params:
        del key

        def case_gradient(params: Params, case: Cases, probe: jax.Array) -> Params:
            del probe
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
    """Estimate diag(G) by random signs, without bias: the mean of (Jᵢᵀ Sᵢ vᵢ)².

    `Sᵢ Sᵢᵀ = L″ᵢ`, and `vᵢ` holds independent signs for every output of every case and
    probe, so that E[vᵢvᵢᵀ] = I. An entry may come out as zero that is not.

    Args:
      objective: whose G it is; weight decay is added.
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.
      key: a typed key. A case's signs depend on it and on the case's place in the
        batch alone, whatever the microbatches or the devices.
      num_probes: vectors per case that are averaged, at a gradient each (1: report,
        algorithm 7).

    Returns:
      A tree like `params`, in float32 or wider; not negative.

    Raises:
      TypeError: if `num_probes` is not a plain integer.
      ValueError: if it is less than 1.

    Example:
      With one output each, the signs square away:

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

        inputs = (term.cases.inputs, drawn.data)
        how_often = {"probes": num_probes, "share": 1 / num_probes}
        return _mean_of_squares(term, params, case_gradient, inputs=inputs, **how_often)

    return _summed(of_term, objective, params, batch, key)


def ggn_exact(objective: Objective, params: Params, batch: Batch) -> Params:
    """Compute diag(G) exactly: Σₖ (Jᵢᵀ Sᵢ eₖ)² over the outputs k of a case, averaged.

    One back-propagation for each output of a case, units and time steps alike: for
    few outputs.

    Args:
      objective: whose G it is; weight decay is added.
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

    def of_term(term: Term, params: Params, key: None) -> Params:
        del key

        def case_gradient(params: Params, case: Cases, index: jax.Array) -> Params:
            outputs, transpose, factor = _factored(term, params, case)
            leaves, structure = jax.tree.flatten(outputs)
            units, at = [], 0
            for z in leaves:
                place = jnp.arange(at, at + z.size, dtype=index.dtype)
                units.append((place.reshape(z.shape) == index).astype(z.dtype))
                at += z.size
            return transpose(term.means.local(factor(structure.unflatten(units))))

        count = term.outputs_per_case(params)
        return _mean_of_squares(term, params, case_gradient, probes=count)

    return _summed(of_term, objective, params, batch)


def _summed(
    of_term: Callable[[Term, Params, Any], Params],
    objective: Objective,
    params: Params,
    batch: Batch,
    key: jax.Array | None = None,
) -> Params:
    """Sum Σₖ cₖ of the terms' diagonals, each with a key of its own."""
    if not isinstance(objective, Objective):
        msg = f"`objective` must be an `hfjax.Objective`, got {describe(objective)}."
        raise TypeError(msg)

    def compute(params: Params, batch: Batch, key: jax.Array | None) -> Params:
        terms = terms_of(objective, batch)
        keys = [
            key if key is None or term.weight is None else jax.random.fold_in(key, k)
            for k, term in enumerate(terms)
        ]
        found = [
            of_term(term, params, own) for term, own in zip(terms, keys, strict=True)
        ]
        return total(terms, found)

    key = None if key is None else as_key("key", key)
    return compiled.run(compute, as_params(params), batch, key)


def _factored(
    term: Term, params: Params, case: Cases
) -> tuple[Tree, Callable[[Tree], Params], Callable[[Tree], Tree]]:
    """Return the outputs of a case, v ↦ Jᵀv and v ↦ S v."""
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
    *,
    inputs: Tree = None,
    probes: int = 1,
    share: float = 1.0,
) -> Params:
    """Compute the mean over cases of Σ over probes of `share` · squares; weight decay.

    Args:
      term: whose weights, microbatches and devices are to be respected.
      params: θ.
      case_gradient: `(params, case, probe) -> what is squared`, of one case, leading
        axes of one.
      inputs: of the cases, if they are not the term's.
      probes: how many squares a case has.
      share: of each.
    """
    cases, zero = term.cases, jnp.zeros((), jnp.int32)
    cases = cases if inputs is None else cases._replace(inputs=inputs)
    cases, means = sharding.alike(cases), term.means
    local = means.local(sharding.gathered(params, cases))

    def gradient_of(probe: jax.Array) -> Callable[[tuple], Params]:
        def gradient(data: Batch) -> Params:
            inputs, targets = jax.tree.map(lambda leaf: leaf[None], data)
            return case_gradient(local, Cases(inputs, targets, jnp.ones(1)), probe)

        return gradient

    def sum_of_squares(cases: Cases) -> Tree:
        data = (cases.inputs, cases.targets)

        def one(probe: jax.Array) -> Tree:
            gradient = gradient_of(probe)
            return _case_gradients.sum_of_squares(gradient, data, cases.weights)

        if probes == 1:
            return one(zero)
        nothing = sharding.zeros(jax.eval_shape(one, zero))
        return trees.summed(for_loops(one), probes, means.local(nothing))

    held = _case_gradients.held_entries(
        gradient_of(zero), (cases.inputs, cases.targets)
    )
    bounded = means.at_most(max(1, _HELD_ENTRIES // max(held, 1)))
    mean = sharding.like(bounded.mean(sum_of_squares, cases), params)
    decay = jnp.zeros(()) if term.decay is None else term.decay
    return jax.tree.map(lambda x: share * x + decay.astype(x.dtype), mean)
