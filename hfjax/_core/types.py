"""The seams between modules: what a tree, a product and a value function are.

Leaves of the library never know each other. Conjugate gradients see a
`Matvec`, a line search sees a `ValueFn`; only `hfjax.transform` knows everybody.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.typing import ArrayLike

Tree: TypeAlias = Any
"""A pytree of arrays; `Params` where it has the structure of the parameters."""

Params: TypeAlias = Any
"""A pytree of the structure of the parameters: θ, a gradient, a step."""

Batch: TypeAlias = tuple[Any, ...]
"""`(inputs, targets)` or `(inputs, targets, weights)`; every leaf leads with the cases."""

Matvec: TypeAlias = Callable[[Tree], Tree]
"""`v -> A v` for a symmetric `A`; keeps the structure, shapes and dtypes of `v`."""

Preconditioner: TypeAlias = Callable[[Tree], Tree]
"""`r -> P⁻¹ r` for a symmetric positive definite `P`."""

ValueFn: TypeAlias = Callable[[Tree], jax.Array]
"""`x -> f(θ + x)`, a scalar; already closed over the parameters and the data."""

ValueAndGradFn: TypeAlias = Callable[[Tree], tuple[jax.Array, Tree]]
"""`x -> (f(θ + x), ∇f(θ + x))`, closed over the same."""

Schedule: TypeAlias = Callable[[jax.Array], ArrayLike]
"""Step count to number, as in Optax."""

Number: TypeAlias = ArrayLike
"""A Python number, or a scalar array, which may be traced."""

NumberOrSchedule: TypeAlias = ArrayLike | Schedule
"""A `Number`, or a `Schedule` that is read anew in each update."""


class Approximate(NamedTuple):
    """A `Matvec` in fewer digits, with the one that it stands for.

    Attributes:
      product: `v -> A v`, nearly.
      exact: `v -> A v`, which may cost more; called seldom.
    """

    product: Matvec
    exact: Matvec

    def __call__(self, v: Tree) -> Tree:
        """Return A v, nearly."""
        return self.product(v)


def exact_of(matvec: Matvec) -> Matvec:
    """Return what a product stands for: itself, if it is not `Approximate`."""
    return matvec.exact if isinstance(matvec, Approximate) else matvec
