"""The steps of `hfjax.sample_space`: for any λ, or within a radius, and corrected.

All is done for √D δ in place of δ, so that D = I there.

The damped step δ = −(J̃ᵀJ̃ + μI)⁻¹(J̃ᵀr̃ + …) takes the residuals to be r̃ + J̃δ at its
end. The error of this linear model,

    m(δ) = r̃(θ + δ) − r̃ − J̃δ,

is found by one forward pass. The correction c is a fixed point of

    c ← −(J̃ᵀJ̃ + μI)⁻¹J̃ᵀ m(δ + c).

Without weight decay and momentum, it satisfies J̃ᵀr̃(θ + δ + c) + λ(δ + c) = 0. So δ + c
is the damped minimum of f itself and not that of its linear model, except that J̃ is
still the Jacobian at θ. The first c is half the geodesic acceleration, up to third
derivatives. An iteration costs a forward pass, two products with J̃ and two triangular
solves, which is little beside the computation of J̃J̃ᵀ.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hfjax._core import sharding, trees
from hfjax._core.refusal import without_derivative
from hfjax._core.types import Tree
from hfjax.curvature.damped_jacobian import (
    Form,
    Problem,
    by_singular_values,
    decomposed,
    either,
    in_parameters,
    in_samples,
    over,
    rows_decomposed,
    times,
)
from hfjax.curvature.jacobian import Jacobian
from hfjax.curvature.streamed_jacobian import StreamedJacobian
from hfjax.solvers.descent import Reason, Run, RunStats, Step, System

_ENOUGH = 0.1
"""The iteration ends when m changes by less than this fraction of the residuals left."""
_COARSE = 1000.0
"""J̃ is decomposed instead of its square if λ is below this many ε of the square's trace."""
_BENT = 0.375
"""In a trust region, a correction may have this share of the length of the step."""
_MOST_DECOMPOSED = 10**8
"""The most numbers of a J̃ that is decomposed, which takes some copies of it."""


def solved(
    system: System, before: Tree | None, space: str, corrections: int, stored: int
) -> Run:
    """Solve with the λ of the run, and return how to solve with others."""
    problem, root = _posed(system, before, stored)
    form = _form(problem, space, system.scalar)

    def at_damping(damping: jax.Array) -> Step:
        step = _step(problem, form, damping, corrections)
        square = trees.dot(step.direction, step.direction)
        penalty = (0.5 * system.scalar * square).astype(step.model.dtype)
        return _as_given(step._replace(model=step.model + penalty), root)

    # The step is not tested: if other λ are tried, the one for this λ is never used.
    last = at_damping(system.scalar)
    run = _run(problem, form, last, jnp.asarray(int(Reason.RESIDUAL_ZERO), jnp.int32))
    return run._replace(at_damping=at_damping, anchor=before)


def solved_within(system: System, corrections: int) -> Run:
    """Solve in the trust region, and take the corrected step or the one without."""
    problem, root = _posed(system, None, None)
    spectrum = decomposed(problem)
    damping = spectrum.damping_within(system.scalar)
    form = by_singular_values(problem, spectrum)
    step = _step(problem, form, damping, corrections)
    if step.correction is not None:
        lengths = map(trees.norm, (step.correction, step.direction))
        little = jnp.less_equal(next(lengths), _BENT * next(lengths))
        none = sharding.zeros_like(step.correction)
        bent = _as_given(step, root)
        straight = _as_given(step._replace(correction=none), root)
        values = (trees.finite_or_inf(system.value(x.at())) for x in (bent, straight))
        better = little & jnp.less_equal(*values)
        step = step._replace(correction=trees.select(better, step.correction, none))
    inside = damping <= spectrum.mu(jnp.zeros_like(damping)) - spectrum.decay
    reason = jnp.where(inside, Reason.RESIDUAL_ZERO, Reason.BOUNDARY)
    return _run(problem, form, _as_given(step, root), reason.astype(jnp.int32))


def _posed(
    system: System, before: Tree | None, stored: int | None
) -> tuple[Problem, Tree | None]:
    """Return the problem for √D δ in place of δ, and √D, which is `None` if D = I."""
    assert system.jacobian is not None, "every update provides it"
    jacobian, decays = system.jacobian(stored)
    root, b = _root(system, jacobian, decays), system.b
    if root is not None:
        jacobian, decays = _in_units(root, jacobian, decays)
        b = over(b, root)
        before = None if before is None else times(root, before)
    return Problem(jacobian, *_split(decays, trees.scalar_dtype(b)), b, before), root


def _step(problem: Problem, form: Form, damping: jax.Array, corrections: int) -> Step:
    """Return the step for a λ, in the problem's units, and M without λ."""
    jacobian, decay, excess, b, before = problem
    dtype, factor = trees.scalar_dtype(b), form.factor(damping)
    change = form.step(factor)
    step = change if before is None else trees.add(change, before)
    correction = None
    if corrections:
        inverse = functools.partial(form.inverse, factor)
        correction = corrected(jacobian, inverse, step, corrections)
    curved = jnp.sum(jnp.square(jacobian.product(step)))
    curved += decay * trees.dot(step, step)
    if excess is not None:
        curved += trees.dot(step, times(excess, step)).astype(curved.dtype)
    undamped = (0.5 * curved - trees.dot(b, step)).astype(dtype)
    return Step(step, undamped, jnp.ones((), jnp.int32), correction, undamped)


def _as_given(step: Step, root: Tree | None) -> Step:
    """Return a step in the units of the parameters."""
    if root is None:
        return step
    direction, correction = step.direction, step.correction
    if correction is not None:
        correction = over(correction, root)
    return step._replace(direction=over(direction, root), correction=correction)


def _run(problem: Problem, form: Form, last: Step, reason: jax.Array) -> Run:
    residuals = problem.jacobian.residuals
    finite = jnp.isfinite(form.trace) & jnp.isfinite(jnp.sum(residuals))
    reason = jnp.where(finite, reason, jnp.int32(Reason.NONFINITE))
    last = without_derivative("A corrected step", last)
    models = jnp.stack([jnp.zeros_like(last.model), last.model])
    return Run(last, RunStats(jnp.ones((), jnp.int32), reason, models))


def _root(system: System, jacobian: Jacobian, decays: Tree | None) -> Tree | None:
    """Return √D of a diagonal D, 1 for entries of 0, or `None` if D = I."""
    if system.root is None:
        return None
    d = jacobian.squares()
    if decays is not None:
        d = trees.damped(d, decays)
    return trees.ones_for_zeros(system.root(d))


def _in_units(
    root: Tree, jacobian: Jacobian, decays: Tree | None
) -> tuple[Jacobian, Tree | None]:
    """Return J̃ and the weight decay for √D δ in place of δ."""
    by_root = functools.partial(over, numbers=root)
    scaled = jacobian.after(by_root, by_root)
    if decays is None:
        return scaled, None
    decays = jax.tree.map(
        lambda decay, root: decay.astype(root.dtype) / jnp.square(root),
        jax.tree.broadcast(decays, root),
        root,
    )
    return scaled, decays


def _split(decays: Tree | None, dtype: jnp.dtype) -> tuple[jax.Array, Tree | None]:
    """Return the least weight decay, and the excess of each parameter's, if any."""
    if decays is None:
        return jnp.zeros((), dtype), None
    if jax.tree_util.all_leaves([decays]) and jnp.ndim(decays) == 0:
        return jnp.asarray(decays), None
    least = [jnp.min(x, initial=jnp.inf) for x in jax.tree.leaves(decays)]
    least = jnp.min(jnp.stack([x.astype(dtype) for x in least]))
    return least, jax.tree.map(lambda x: x - least.astype(x.dtype), decays)


def _form(problem: Problem, space: str, damping: jax.Array) -> Form:
    """Choose by the sizes, and by the λ that the search starts from."""
    rows, columns = len(problem.jacobian.residuals), optax.tree.size(problem.b)
    few = rows <= columns if space == "smaller" else space == "samples"
    square = (in_samples if few else in_parameters)(problem)
    # What lies on several devices by its type is not gathered into one matrix.
    spread = any(map(sharding.may_be_sharded, jax.tree.leaves(problem.b)))
    spread |= isinstance(problem.jacobian, StreamedJacobian)
    if spread or rows_decomposed(problem) * columns > _MOST_DECOMPOSED:
        return square
    coarse = _COARSE * jnp.finfo(problem.dtype).eps * square.trace
    needed = damping + problem.decay < coarse
    spectrum = decomposed(problem, needed)
    return either(needed, by_singular_values(problem, spectrum), square)


class _State(NamedTuple):
    correction: Tree  # c
    missed: jax.Array  # m(δ + c)
    change: jax.Array  # ‖Δm‖ in the last iteration
    tries: jax.Array
    going: jax.Array


def corrected(
    jacobian: Jacobian, inverse: Callable[[jax.Array], Tree], step: Tree, most: int
) -> Tree:
    """Iterate c as long as m changes less each time; c is 0 if the first iteration fails.

    `inverse` is u ↦ (J̃ᵀJ̃ + μI)⁻¹J̃ᵀu, and `most` bounds the number of iterations.
    """
    # f is not evaluated here. Whether it is lower at δ + c is for the search for λ and the
    # line search to find out.

    def iterate(state: _State) -> _State:
        correction = jax.tree.map(jnp.negative, inverse(state.missed))
        whole = trees.add(step, correction)
        left = jacobian.residuals_at(whole)
        linear = jacobian.product(whole).astype(left.dtype)
        missed = left - jacobian.residuals - linear
        missed = missed.astype(state.missed.dtype)
        change = jnp.linalg.norm(missed - state.missed)
        closer = change < state.change
        return _State(
            correction=trees.select(closer, correction, state.correction),
            missed=jnp.where(closer, missed, state.missed),
            change=change,
            tries=state.tries + 1,
            going=closer & (change > _ENOUGH * jnp.linalg.norm(left)),
        )

    nothing = sharding.zeros_like(jacobian.residuals)
    start = _State(
        correction=sharding.zeros_like(step),
        missed=nothing,
        change=jnp.full((), jnp.inf, nothing.dtype),
        tries=jnp.zeros((), jnp.int32),
        going=jnp.ones((), bool),
    )
    # The first iteration has c = 0 and only finds m(δ), hence `<=`.
    return jax.lax.while_loop(
        lambda state: state.going & (state.tries <= most), iterate, start
    ).correction
