"""Check that the components of an optimizer fit together, when it is built.

If one component ignored another, or read a radius where the other means λ, every step
would be wrong without an error. So a mismatch is refused, and the message says what to
pass instead. User-supplied components declare what they need in the same attributes,
see `hfjax.cg.Solver` and `hfjax.damping.Damping`.
"""

import inspect
from typing import Any, NamedTuple

from hfjax._core import options
from hfjax._core.arguments import takes
from hfjax.curvature import Curvature, ggn
from hfjax.globalization.backtracking import Backtracking, early_stop
from hfjax.globalization.damping_matrices import identity
from hfjax.globalization.rule import Damping
from hfjax.objectives.objective import Objective
from hfjax.preconditioners import PreconditionerRule, kronecker
from hfjax.solvers.cg import conjugate_gradient
from hfjax.solvers.descent import Run, Solver
from hfjax.solvers.sample_space import where_small
from hfjax.update._drawn import is_divisible
from hfjax.update.sampling import SMALL, Sampling, growing

_SCALARS = ("damping", "fixed", "radius")


class Fitted(NamedTuple):
    """Components that fit together.

    Attributes:
      solver: the given solver, or what `"auto"` stands for.
      preconditioner: the rule that `solver` uses, or `None`.
      backtracking: the rule that chooses a step, unless `searching` replaces it.
      sampling: the rule for the cases of the curvature, or `None`.
      searching: the damping rule's search for λ, which needs a solver that can give the
        step for another λ; or `None`.
    """

    solver: Solver
    preconditioner: PreconditionerRule | None
    backtracking: Backtracking
    searching: Backtracking | None
    sampling: Sampling | None = None

    def rule_for(self, run: Run) -> Backtracking:
        """Return the search for λ if there is one and this run supports it."""
        # Known only after the run: `where_small` picks one of two solvers while tracing.
        if self.searching is None or run.at_damping is None:
            return self.backtracking
        return self.searching


def fitted(
    objective: Objective,
    damping: Damping,
    solver: Solver | str,
    preconditioner: PreconditionerRule | str | None,
    backtracking: Backtracking | str | None,
    curvature: Curvature,
    sampling: Sampling | str | None = None,
) -> Fitted:
    """Resolve `"auto"` and `None`, and return the components, or raise an error.

    The arguments are those of `hfjax.hessian_free`.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if two components do not fit, or a name is unknown.
    """
    if not isinstance(objective, Objective):
        msg = (
            "`objective` must be an `hfjax.Objective(model_fn, loss)`, got "
            f"{type(objective).__name__}."
        )
        raise TypeError(msg)
    check_part("damping", damping, Damping)
    if isinstance(backtracking, str):
        options.check_choice("backtracking", backtracking, ("auto",))
    else:
        check_part("backtracking", backtracking, Backtracking, none=True)
    if not isinstance(solver, str):
        check_part("solver", solver, Solver)
    if not isinstance(preconditioner, str):
        check_part("preconditioner", preconditioner, PreconditionerRule, none=True)
    check_curvature(objective, damping, curvature)

    # Exact solvers make G and D of the Jacobian.
    made = damping.matrix is identity() or _is_of_diagonal(damping)
    made |= damping.scalar == "radius" == getattr(solver, "scalar", None)
    chosen = _solver_of(solver, damping, plain=curvature is ggn and made)
    _check_scalars(chosen, damping)
    asks = chosen.reads == "products"
    if isinstance(preconditioner, str):
        options.check_choice("preconditioner", preconditioner, ("auto",))
        preconditioner = kronecker() if asks else None
    elif preconditioner is not None and not asks:
        msg = (
            "`preconditioner` was given, but `solver` never asks for one "
            "(`sample_space.cholesky()` solves exactly). Leave it out, or take "
            "`solver=hfjax.cg.conjugate_gradient()`."
        )
        raise ValueError(msg)
    divides = asks and curvature is ggn and damping.structural is None
    if isinstance(sampling, str):
        options.check_choice("sampling", sampling, ("auto",))
        usual = not isinstance(solver, str) and damping.matrix is identity()
        usual &= chosen.scalar == "damping"
        sampling = growing(least_work=SMALL) if divides and usual else None
    elif sampling is not None:
        check_part("sampling", sampling, Sampling)
        _check_sampling(objective, divides=divides)
    if isinstance(backtracking, str):
        return Fitted(
            chosen, preconditioner, early_stop(), damping.backtracking, sampling
        )
    return Fitted(
        chosen, preconditioner, backtracking or Backtracking(), None, sampling
    )


def _check_sampling(objective: Objective, *, divides: bool) -> None:
    """Raise an error unless the curvature can be computed from a part of the cases."""
    if not divides:
        msg = (
            "`sampling` was given, but it needs `curvature=hfjax.curvature.ggn`, a solver "
            "that multiplies (`cg.conjugate_gradient()`), and no structural damping. Leave "
            "it out, or pass a part of the data as `batch` and all of it as `eval_batch`."
        )
        raise ValueError(msg)
    if not is_divisible(objective):
        msg = (
            "`sampling` was given, but `objective` is a sum, or its loss is of a whole "
            "batch, which cannot be divided. Leave it out."
        )
        raise ValueError(msg)


def check_part(name: str, came: object, kind: type, *, none: bool = False) -> None:
    """Raise `TypeError` unless `came` is a `kind`, or `None` if `none` is true."""
    if isinstance(came, kind) or (none and came is None):
        return
    # The usual mistake is `damping=hfjax.damping.searched`, without parentheses.
    hint = ": call its function." if inspect.isroutine(came) else "."
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    msg = (
        f"`{name}` must be {article} `{kind.__name__}`{' or `None`' if none else ''}, "
        f"got {type(came).__name__}{hint}"
    )
    raise TypeError(msg)


def check_curvature(objective: Objective, damping: Damping, curvature: Any) -> None:
    """Raise an error unless B + μS can be built from these components.

    Raises:
      TypeError: if `curvature` is not a function.
      ValueError: if `damping` is structural, and another component does not support that.
    """
    if not callable(curvature):
        msg = (
            "`curvature` must be a function (objective, params, batch) -> (v -> B v), as "
            f"`hfjax.curvature.ggn`, got {curvature!r}."
        )
        raise TypeError(msg)
    if damping.structural is None:
        return
    if objective.hidden_loss is None:
        msg = (
            "`damping` is structural, but `objective` has no hidden states: "
            f"{objective._no_hidden}"
        )
        raise ValueError(msg)
    if not takes(curvature, "structural"):
        msg = (
            "`damping` is structural, but `curvature` does not take `structural=μ`. "
            "`hfjax.curvature.ggn` and `hfjax.curvature.hessian` do, and `with_precision` "
            "of these: take one of them, add the argument to your own function, or leave "
            "out `structural`."
        )
        raise ValueError(msg)


def _solver_of(solver: Solver | str, damping: Damping, *, plain: bool) -> Solver:
    """Return the solver, or raise an error if it cannot solve with B and D.

    `plain` says whether B is the Gauss-Newton matrix, and D the identity or made of the
    diagonal of B.
    """
    options.check_choice(
        "solver.reads", getattr(solver, "reads", "products"), ("products", "jacobian")
    )
    if isinstance(solver, str):
        options.check_choice("solver", solver, ("auto",))
        # `where_small` counts only the outputs of the loss. Structural damping adds rows
        # for the hidden states, which may be many more.
        small = plain and damping.structural is None
        otherwise = conjugate_gradient()
        return where_small(otherwise) if small else otherwise
    if solver.reads == "products" or plain:
        return solver
    came = "another `curvature`"
    if not (damping.matrix is identity() or _is_of_diagonal(damping)):
        came = "another damping matrix"
        if damping.scalar == "radius":
            came = "a trust-region radius: take `sample_space.trust_region()`"
    msg = (
        "`solver=sample_space.cholesky()` solves with G + λD: it needs "
        "`curvature=hfjax.curvature.ggn` and `damping` with "
        '`matrix="identity"`, or without structural damping `"curvature_diagonal"`, got '
        f'{came}. Take `cg.conjugate_gradient()`, or `"auto"`.'
    )
    raise ValueError(msg)


def _is_of_diagonal(damping: Damping) -> bool:
    """Return whether D is made of diag(G), which the Jacobian shows without its penalty."""
    made = getattr(damping.matrix, "of_diagonal", None)
    return made is not None and damping.structural is None


def _check_scalars(solver: Solver, damping: Damping) -> None:
    """Raise an error unless `damping` sets the scalar (λ or radius) `solver` reads."""
    options.check_choice("solver.scalar", solver.scalar, _SCALARS)
    options.check_choice("damping.scalar", damping.scalar, _SCALARS)
    if solver.scalar == "radius" != damping.scalar:
        msg = (
            "`solver` works in a trust region and reads a radius, but `damping` drives "
            "a damping λ (as the default, `damping.searched()`): λ would be taken for "
            "the radius, and be added to the curvature as well. Pass "
            "`damping=hfjax.trust_region.radius()`. (A rule of your own for a radius "
            'declares `scalar="radius"` and `matrix=None`.)'
        )
        raise ValueError(msg)
    if damping.scalar == "radius" != solver.scalar:
        msg = (
            "`damping` drives the radius of a trust region, but `solver` reads a "
            "damping λ: nothing would hold its steps back. Pass "
            "`damping=hfjax.damping.searched()` or `levenberg_marquardt()`, or "
            "`solver=hfjax.trust_region.steihaug_toint()`."
        )
        raise ValueError(msg)
    tied = damping.structural is not None and damping.structural.tied
    if damping.scalar == "radius" and (damping.matrix is not None or tied):
        msg = (
            "`damping` drives a radius, so that it must not scale a matrix too: give "
            "the rule `matrix=None`, and no structural damping that is tied to it."
        )
        raise ValueError(msg)
    # Such a solver minimises f over a whole subspace. The step is not the solution for
    # any particular λ, so ρ says nothing about the given λ, which would drift.
    if solver.scalar == "fixed" and damping.scalar != "fixed":
        msg = (
            "`solver` minimises f over all λ by itself (`krylov.subspace_descent()`), "
            "but `damping` adapts or searches for a λ (as the default, "
            "`damping.searched()`), which would drift. Pass "
            "`damping=hfjax.damping.constant(0.0)`. (A rule of your own that moves no λ "
            'declares `scalar="fixed"`.)'
        )
        raise ValueError(msg)
