"""The optimizers that are compared, by name: ours, Optax's, and other packages'.

To add one, write a function `(problem, params, seed) -> Racer` and a line in
`OPTIMIZERS`. Each is compiled before it runs, so that the time this takes is known.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import hfjax
from benchmarks import peers
from benchmarks.first_order import (
    ADAM_RATES,
    MUON_RATES,
    STOCHASTIC_RATES,
    adam,
    muon,
    stochastic,
)
from benchmarks.harness.machine import Taken, compile_ahead
from benchmarks.harness.race import Carry, Racer
from benchmarks.suites.problem import Hand, Problem, alone, everything, guarded

MOMENTUM = 0.5
"""Of SPRING (Goldshlager, Abrahamsen & Lin, 2024), as `solver="auto"` has it."""

BALANCE = 0.05
"""Of DSGNAR (Webb, Jerad & Cartis, 2026)."""

FLOAT32_UPDATES = 10

_SACRIFICE = 0.5
_STRUCTURAL = 0.03  # μ / λ in Sutskever's program
_WARM_START = 0.95  # likewise
_MAX_ITERATIONS = 100  # 300 in his program
_MOST_NUMBERS = 5 * 10**8  # of a Jacobian: 4 GB in float64

Build = Callable[[Problem, Any, int], Any]
"""`(problem, params, seed) -> racer`, or `-> (learning_rate -> racer)` for optimizers with
rates. The seed is for what the optimizer itself draws."""


class Optimizer(NamedTuple):
    """An optimizer that can be built.

    Attributes:
      title: its settings, in a few words.
      build: compiles it.
      rates: learning rates; each gets a run of its own, and the best counts.
      module: that must be installed.
      package: what installs the module.
      unfit: `problem -> why it cannot solve it`, `None` if it can.
    """

    title: str
    build: Build
    rates: tuple[float, ...] = ()
    module: str = "optax"
    package: str = "optax"
    unfit: Callable[[Problem], str | None] = lambda problem: None

    def missing(self) -> str | None:
        """Say what must be installed first, if anything must."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.package} is not installed: pip install 'hfjax[peers]'"
        return None


def default(problem: Problem, params: Any, seed: int, **options: Any) -> Racer:
    """Build `hfjax.hessian_free` with its defaults, but for `options`."""
    tx = hfjax.hessian_free(problem.objective, **{**problem.options, **options})
    return ours(tx, problem, params, seed, everything(problem.parts))


def cg(problem: Problem, params: Any, seed: int) -> Racer:
    """Build it with conjugate gradients, whatever the problem."""
    return default(problem, params, seed, solver=hfjax.cg.conjugate_gradient())


def grid(problem: Problem, params: Any, seed: int) -> Racer:
    """Build it with iterates that are kept on a grid, 21 of them."""
    keep = hfjax.iterates.grid(first=1)
    solver = hfjax.cg.conjugate_gradient(keep=keep)
    return default(problem, params, seed, solver=solver)


def whole(problem: Problem, params: Any, seed: int) -> Racer:
    """Build it with the curvature of all cases."""
    return default(problem, params, seed, sampling=None)


def sacrifice(problem: Problem, params: Any, seed: int) -> Racer:
    """Build it with longer steps than those to the lowest f of each update."""
    damping = hfjax.damping.searched(sacrifice=_SACRIFICE)
    return default(problem, params, seed, damping=damping)


def ratio(problem: Problem, params: Any, seed: int) -> Racer:
    """Build it with the λ that ρ of the last update says."""
    damping = hfjax.damping.levenberg_marquardt()
    return default(problem, params, seed, damping=damping)


def exact(problem: Problem, params: Any, seed: int, **options: Any) -> Racer:
    """Build it with steps that are solved for exactly, with momentum."""
    solver = hfjax.sample_space.cholesky(momentum=MOMENTUM, **options)
    return default(problem, params, seed, solver=solver)


def uncorrected(problem: Problem, params: Any, seed: int) -> Racer:
    """Build the same without corrections: damped Gauss-Newton steps."""
    return exact(problem, params, seed, corrections=0)


def balanced(problem: Problem, params: Any, seed: int) -> Racer:
    """Build `default` with terms that are balanced in the run."""
    f = hfjax.objective.weighted_sum(problem.objective.parts, balance=BALANCE)
    return default(dataclasses.replace(problem, objective=f), params, seed)


def float32_first(problem: Problem, params: Any, seed: int) -> Racer:
    """Build `default` with its first updates in float32."""
    redraw = problem.redraw
    narrow = jax.jit(functools.partial(_cast, jnp.float32))
    widen = jax.jit(functools.partial(_cast, jnp.float64))
    low = dataclasses.replace(
        problem,
        data=lambda seed: narrow(problem.data(seed)),
        redraw=redraw and (lambda data, carry: narrow(redraw(data, widen(carry)))),
        kept=narrow(problem.kept),
    )
    first, then = default(low, narrow(params), seed), default(problem, params, seed)

    def step(carry: Carry) -> Carry:
        if carry.updates < FLOAT32_UPDATES:
            return widen(first.step(narrow(carry)))
        return then.step(carry)

    taken = map(sum, zip(first.compiling, then.compiling, strict=True))
    return Racer(then.init, step, Taken(*taken), then.read)


def martens2010(problem: Problem, params: Any, seed: int) -> Racer:
    """Build Martens' program."""
    tx = hfjax.recipes.martens2010(problem.objective, initial_damping=problem.damping)
    return ours(tx, problem, params, seed, everything(problem.parts))


def curvature_guarded(problem: Problem, params: Any, seed: int) -> Racer:
    """Build the second recipe of M&S (2012): curvature on half of the cases at most."""
    tx = hfjax.recipes.curvature_guarded(
        problem.objective, initial_damping=problem.damping
    )
    return ours(tx, problem, params, seed, guarded(max(2, problem.parts)))


def momentum_like(problem: Problem, params: Any, seed: int) -> Racer:
    """Build their third recipe, on a quarter of each part for everything."""
    tx = hfjax.recipes.momentum_like(problem.objective, initial_damping=problem.damping)
    return ours(tx, problem, params, seed, alone(4 * problem.parts))


def sutskever2011(
    problem: Problem, params: Any, seed: int, *, structural: float = _STRUCTURAL
) -> Racer:
    """Build Sutskever's program: structural damping, no preconditioner, ρ by damped M."""
    damping: dict[str, Any] = {"structural": structural} if structural else {}
    objective: Any = problem.hidden if structural else problem.objective
    tx = hfjax.hessian_free(
        objective,
        damping=hfjax.damping.levenberg_marquardt(
            init=problem.damping,
            ratio=hfjax.damping.ReductionRatio(model="damped"),
            **damping,
        ),
        solver=hfjax.cg.conjugate_gradient(
            max_iterations=_MAX_ITERATIONS,
            stopping=hfjax.stopping.martens2010(),
            keep=hfjax.iterates.grid(),
            warm_start_decay=_WARM_START,
        ),
        preconditioner=None,
        backtracking=hfjax.backtracking.full_search(),
        line_search=hfjax.linesearch.armijo(
            sufficient_decrease=1e-6, shrink=0.8, max_tries=50
        ),
    )
    hand = everything(1) if problem.parts == 1 else guarded(problem.parts)
    return ours(tx, problem, params, seed, hand)


def without_structural_damping(problem: Problem, params: Any, seed: int) -> Racer:
    """Build Sutskever's program with μ = 0."""
    return sutskever2011(problem, params, seed, structural=0.0)


def lbfgs(problem: Problem, params: Any, seed: int) -> Racer:
    """Build `optax.lbfgs` on all examples: memory 10, zoom line search.

    Returns:
      The racer; a step is an update, its line search included.
    """
    tx, data = optax.lbfgs(), problem.data(seed)
    _, unravel = ravel_pytree(params)

    # On one long vector: the same numbers, and a fourth of the time to compile.
    def step(carry: Carry, data: Any) -> Carry:
        batch, kept = problem.batch(data, carry)

        def value_fn(vector: jax.Array) -> jax.Array:
            return problem.objective.value(unravel(vector), batch)

        vector, state = ravel_pytree(carry.params)[0], carry.state
        if problem.redraw is None:
            value, grad = optax.value_and_grad_from_state(value_fn)(vector, state=state)
        else:
            value, grad = jax.value_and_grad(value_fn)(vector)
        updates, state = tx.update(
            grad, state, vector, value=value, grad=grad, value_fn=value_fn
        )
        moved: Any = optax.apply_updates(vector, updates)
        return Carry(unravel(moved), state, carry.updates + 1, kept)

    def init(params: Any) -> Carry:
        state = tx.init(ravel_pytree(params)[0])
        return Carry(params, state, jnp.int32(0), problem.kept)

    compiled, taken = compile_ahead(step, init(params), data)
    return Racer(init, lambda carry: compiled(carry, data), taken)


def ours(
    tx: optax.GradientTransformationExtraArgs,
    problem: Problem,
    params: Any,
    seed: int,
    hand: Hand,
) -> Racer:
    """Build a racer from a set-up of Hessian-free; a step is an update."""
    data, objective = problem.data(seed), problem.objective

    def step(carry: Carry, data: Any) -> Carry:
        batch, kept = problem.batch(data, carry)
        handed = hand(batch, carry.updates)
        now = objective.at(carry.state.count, carry.state.scales)
        _, grads = now.value_and_grad(carry.params, handed.gradient)
        updates, state = tx.update(
            grads,
            carry.state,
            carry.params,
            batch=handed.curvature,
            eval_batch=handed.evaluation,
        )
        params: Any = optax.apply_updates(carry.params, updates)
        return Carry(params, state, carry.updates + 1, kept)

    def init(params: Any) -> Carry:
        return Carry(params, tx.init(params), jnp.int32(0), problem.kept)

    compiled, taken = compile_ahead(step, init(params), data)
    return Racer(
        init,
        lambda carry: compiled(carry, data),
        taken,
        lambda carry: hfjax.diagnostics.scalars(carry.state),
    )


def _not_exact(problem: Problem) -> str | None:
    """Say why a problem cannot be solved for exactly, if it cannot."""
    if not problem.rows:
        return "steps are solved for exactly in the suite of equations only"
    params = jax.eval_shape(problem.start, jax.random.key(0))
    numbers = problem.rows * sum(leaf.size for leaf in jax.tree.leaves(params))
    if numbers > _MOST_NUMBERS:
        return f"its Jacobian has {numbers:,} numbers, more than {_MOST_NUMBERS:,}"
    return None


def _not_cg(problem: Problem) -> str | None:
    return None if problem.options else "it is what hfjax does here by default"


def _cast(dtype: Any, tree: Any) -> Any:
    """Return a tree with its floats in this dtype; keys and counts stay as they are."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def _is_float32(problem: Problem) -> str | None:
    del problem
    is_wide = jnp.zeros(()).dtype == jnp.float64
    return None if is_wide else "everything is in float32"


def _no_terms(problem: Problem) -> str | None:
    return None if hasattr(problem.objective, "parts") else "its f has a single term"


def _steps_are_exact(problem: Problem) -> str | None:
    return "its steps are exact" if problem.options else None


def _no_hidden_states(problem: Problem) -> str | None:
    return None if problem.hidden else "it is for recurrent networks"


OPTIMIZERS = {
    "hfjax": Optimizer("hfjax.hessian_free with its defaults", default),
    "cg": Optimizer("the same with conjugate gradients", cg, unfit=_not_cg),
    "grid": Optimizer(
        "cg with keep=iterates.grid(first=1), which keeps 21 iterates", grid
    ),
    "whole": Optimizer(
        "hfjax with sampling=None: the curvature of all cases",
        whole,
        unfit=_steps_are_exact,
    ),
    "sacrifice": Optimizer(
        f"hfjax with damping=searched(sacrifice={_SACRIFICE:g}), for longer steps",
        sacrifice,
        unfit=_steps_are_exact,
    ),
    "ratio": Optimizer(
        "hfjax with damping=levenberg_marquardt(), the λ that ρ says",
        ratio,
        unfit=_steps_are_exact,
    ),
    "spring": Optimizer(
        f"the same with sample_space.cholesky(momentum={MOMENTUM:g})",
        exact,
        unfit=_not_exact,
    ),
    "uncorrected": Optimizer(
        "spring with corrections=0", uncorrected, unfit=_not_exact
    ),
    "balanced": Optimizer(
        f"hfjax with weighted_sum(…, balance={BALANCE:g})", balanced, unfit=_no_terms
    ),
    "float32_first": Optimizer(
        f"hfjax with the first {FLOAT32_UPDATES} updates in float32",
        float32_first,
        unfit=_is_float32,
    ),
    "martens2010": Optimizer("hfjax.recipes.martens2010", martens2010),
    "curvature_guarded": Optimizer(
        "hfjax.recipes.curvature_guarded", curvature_guarded
    ),
    "momentum_like": Optimizer(
        "hfjax.recipes.momentum_like, a quarter of the curvature's cases at a time",
        momentum_like,
    ),
    "stochastic": Optimizer(
        "hfjax.recipes.stochastic on minibatches", stochastic, STOCHASTIC_RATES
    ),
    "sutskever2011": Optimizer(
        f"Sutskever's program, structural damping μ = {_STRUCTURAL:g} λ",
        sutskever2011,
        unfit=_no_hidden_states,
    ),
    "sutskever2011-without": Optimizer(
        "the same without structural damping",
        without_structural_damping,
        unfit=_no_hidden_states,
    ),
    "adam": Optimizer("optax.adam on minibatches", adam, ADAM_RATES),
    "muon": Optimizer("optax.contrib.muon on minibatches", muon, MUON_RATES),
    "lbfgs": Optimizer("optax.lbfgs on all examples", lbfgs),
    "kfac": Optimizer(
        "kfac_jax.Optimizer as in its autoencoder example, on the update's examples",
        peers.kfac,
        module="kfac_jax",
        package="kfac-jax",
        unfit=peers.unfit_for_kfac,
    ),
    "kron": Optimizer(
        "rollfast.kron, PSGD with Kronecker factors, on minibatches",
        peers.kron,
        peers.KRON_RATES,
        module="rollfast",
        package="rollfast",
    ),
    "somax": Optimizer(
        "somax.sgn_ce or sgn_mse, Gauss-Newton by CG as in its README, on all examples",
        peers.somax,
        peers.SOMAX_RATES,
        module="somax",
        package="python-somax",
        unfit=peers.unfit_for_somax,
    ),
    "optimistix": Optimizer(
        "optimistix.LBFGS on all examples",
        peers.optimistix_lbfgs,
        module="optimistix",
        package="optimistix",
        unfit=peers.unfit_for_redrawn,
    ),
    "optimistix_lm": Optimizer(
        "optimistix.LevenbergMarquardt on all examples",
        peers.optimistix_lm,
        module="optimistix",
        package="optimistix",
        unfit=lambda problem: peers.unfit_for_lm(problem) or _not_exact(problem),
    ),
}
"""By the name on the command line. Optax has neither Shampoo nor SOAP."""
