"""Types at the interfaces between modules: trees, products and value functions.

Parts of the library do not know each other. Conjugate gradients receive a `Matvec`, a line
search receives a `ValueFn`; only `hfjax.transform` puts everything together.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.typing import ArrayLike

Tree: TypeAlias = Any
"""A pytree of arrays; called `Params` if it has the structure of the parameters."""

Params: TypeAlias = Any
"""A pytree with the structure of the parameters: θ, a gradient, a step."""

Batch: TypeAlias = tuple[Any, ...]
"""`(inputs, targets)` or `(inputs, targets, weights)`; axis 0 of all leaves is examples.
The weights are `[cases]`, or `[cases, positions…]` where the loss has positions."""

Matvec: TypeAlias = Callable[[Tree], Tree]
"""`v -> A v` for a symmetric `A`; keeps the structure, shapes and dtypes of `v`."""

Preconditioner: TypeAlias = Callable[[Tree], Tree]
"""`r -> P⁻¹ r` for a symmetric positive definite `P`."""

ValueFn: TypeAlias = Callable[[Tree], jax.Array]
"""`x -> f(θ + x)`, a scalar; the parameters and the data are already bound."""

ValueAndGradFn: TypeAlias = Callable[[Tree], tuple[jax.Array, Tree]]
"""`x -> (f(θ + x), ∇f(θ + x))`, with the same bound."""

Schedule: TypeAlias = Callable[[jax.Array], ArrayLike]
"""Maps the number of updates so far to a number, as in Optax."""

Number: TypeAlias = ArrayLike
"""A Python number, or a scalar array, which may be traced."""

NumberOrSchedule: TypeAlias = ArrayLike | Schedule
"""A `Number`, or a `Schedule` that is evaluated at each update."""


class Approximate(NamedTuple):
    """A `Matvec` in lower precision, together with the accurate product.

    Attributes:
      product: `v -> A v`, approximately.
      exact: `v -> A v`, accurate, possibly more expensive, and called rarely.
    """

    product: Matvec
    exact: Matvec

    def __call__(self, v: Tree) -> Tree:
        """Return A v, approximately."""
        return self.product(v)


def exact_of(matvec: Matvec) -> Matvec:
    """Return the accurate product behind an `Approximate`; any other product unchanged."""
    return matvec.exact if isinstance(matvec, Approximate) else matvec
