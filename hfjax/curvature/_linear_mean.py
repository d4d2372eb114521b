"""Products with the mean of one matrix per example; linearisation takes place here.

The mean is over terms, microbatches and devices, as the objective has them, and
includes the weight decay.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp

from hfjax._core import trees
from hfjax._core.arguments import as_params, as_tangent, describe
from hfjax._core.types import Approximate, Batch, Matvec, Params, Tree
from hfjax._tracing import compiled
from hfjax._tracing.convolutions import for_loops
from hfjax._tracing.linearize import is_traceable, linearized
from hfjax.curvature._kept import kept
from hfjax.objectives.cases import Cases
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import terms_of
from hfjax.objectives.terms import Term, total

_Function = TypeVar("_Function", bound=Callable[..., Matvec])


def of_an_objective(make: _Function) -> _Function:
    """Make a curvature check its arguments, and compile calls outside of `jit` once."""
    signature = inspect.signature(make)

    @functools.wraps(make)
    def checked(*args: Any, **kwargs: Any) -> Matvec:
        # `optax.inject_hyperparams` takes a callable for a schedule: it passes a count.
        objective = args[0] if args else kwargs.get("objective")
        if (args or "objective" in kwargs) and not isinstance(objective, Objective):
            msg = (
                "`objective` must be an `hfjax.Objective`, got "
                f"{describe(objective)}. (`optax.inject_hyperparams` calls every callable "
                'as a schedule: give it `static_args="curvature"`.)'
            )
            raise TypeError(msg)
        given = signature.bind(*args, **kwargs)
        _, params, batch = given.args
        params = as_params(params)
        product = compiled.built(
            lambda params, batch: make(objective, params, batch, **given.kwargs),
            params,
            batch,
            like=params,
        )
        return _of_tangents(product, params)

    return cast(_Function, checked)


def _of_tangents(product: Matvec, params: Params) -> Matvec:
    """Make a product check its vector before it multiplies."""
    if isinstance(product, Approximate):
        return Approximate(*(_of_tangents(each, params) for each in product))
    once = compiled.once(product)
    return lambda v: once(as_tangent(v, params))


Product: TypeAlias = Callable[[Term, Params, Cases], Matvec]
"""`(term, params, cases) -> (v -> Σᵢ wᵢ Bᵢ v)`, for a term and some of its examples."""


def linear_mean(
    product: Product, objective: Objective, params: Params, batch: Batch
) -> Matvec:
    """Build v ↦ Σₖ cₖ (Σᵢ wᵢ Bᵢ v / Σᵢ wᵢ + weight_decay · v) with symmetric Bᵢ.

    Without microbatches, or with `linearize_once`, `product` is called once for each
    term, here, so that what it computes before v is known is computed once. Otherwise
    it is called on each microbatch in each product. Results have the dtypes of `v`.
    """
    terms = terms_of(objective, batch)
    products = [_mean_of_term(product, term, params) for term in terms]

    def matvec(v: Tree) -> Tree:
        return trees.cast_like(total(terms, [matvec(v) for matvec in products]), v)

    return matvec


def _mean_of_term(product: Product, term: Term, params: Params) -> Matvec:
    """Build the product of one term, in the dtypes of v."""
    means, cases = term.means, term.cases
    parts, local = means.parts(cases), means.local(params)

    def anew(number: jax.Array) -> Matvec:
        return product(term, local, parts.take(number))

    if parts.count == 1:
        # The product runs inside of a loop, that of conjugate gradients.
        whole, of_number = for_loops(product(term, local, cases)), anew
    else:
        whole, of_number = None, anew
        if term.linearize_once:
            number = jnp.zeros((), jnp.int32)
            # If J v does not exist, a user's rule may raise anything, again when v is there.
            if is_traceable(lambda k, v: anew(k)(v), number, local):
                of_number = kept(anew, parts, local, means)

    def matvec(v: Tree) -> Tree:
        tangent = means.local(trees.cast_like(v, params))
        if whole is not None:
            sums = trees.widen(whole(tangent))
        else:
            # The model itself runs in this loop, too, if it is linearised anew.
            run = for_loops(lambda k, v: of_number(k)(v))
            sums = means.summed(lambda k: run(k, tangent), parts)
        mean = means.divide(sums, cases.weights)
        return trees.cast_like(term.decayed(mean, v), v)

    return matvec


def gauss_newton(
    forward: Callable[[Params], Tree],
    hessian: Callable[[Tree], Matvec],
    params: Params,
    cases: Cases,
) -> Matvec:
    """Build v ↦ Σᵢ wᵢ Jᵢᵀ Hᵢ Jᵢ v; the model is linearised here.

    `forward` is `params -> z`, whose Jacobian is J, and `hessian` is `z -> (v -> H v)`,
    which acts on each example separately.
    """
    outputs, tangent, transpose = linearized(forward, params)
    curved = hessian(outputs)

    def weighted(x: jax.Array) -> jax.Array:
        return x * cases.weights.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)

    def product(v: Tree) -> Tree:
        found = jax.tree.map(weighted, curved(tangent(v)))
        return transpose(trees.cast_like(found, outputs))

    return product
