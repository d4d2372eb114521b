"""How the recurrent networks are trained: by Hessian-free, and by Adam.

Every update sees sequences never seen before. The numbers are those of Sutskever's
program (2011), but for what a small machine must save: see `Sizes`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import hfjax
from benchmarks.history import Moment
from benchmarks.race import Measure
from benchmarks.racers import Carry, Racer, compile_ahead, small_updates, zero_updates
from benchmarks.rnn_history import Row
from benchmarks.rnn_network import RecurrentNetwork, Weights, recurrent_network
from benchmarks.rnn_tasks import TASKS, Task
from benchmarks.sequences import Batch

TEST_CASES = 10_000
_TEST_PART = 1_000

_WEIGHT_DECAY = 2e-5
_DAMPING = 0.01
_WARM_START = 0.95
_MINIBATCH = 100  # Sutskever et al. (2013), for these problems
_CLIP = 1.0  # heuristic; Pascanu et al. (2013) clip at 1 to 6


class Sizes(NamedTuple):
    """How many sequences an update of HF takes; in his program 10,000 and 1,000.

    Attributes:
      gradient: for the gradient: all that are drawn.
      curvature: of those, for the curvature; and as many others of those to choose the
        iterate and for the line search.
    """

    gradient: int
    curvature: int


class Problem(NamedTuple):
    """What all racers are given.

    Attributes:
      task: to be learned.
      length: fewest steps of a sequence.
      network: the model.
      objective: f, of one term for each step with a target, averaged over sequences.
      params: where all start.
      train_key: of the sequences to learn from.
      test_key: of those to be tested on.
    """

    task: Task
    length: int
    network: RecurrentNetwork
    objective: hfjax.Objective
    params: Weights
    train_key: jax.Array
    test_key: jax.Array

    def draw(self, key: jax.Array, cases: int) -> Batch:
        """Draw sequences; if there are only so many, all of them."""
        return self.task.generate(key, self.task.strings or cases, self.length)

    def sizes(self, sizes: Sizes) -> Sizes:
        """Return how many sequences there really are in batches of such sizes."""
        strings = self.task.strings
        return sizes if strings is None else Sizes(strings, strings)


def build(name: str, length: int, seed: int) -> Problem:
    """Build a problem.

    Args:
      name: of the task.
      length: fewest steps of a sequence.
      seed: of start and sequences.

    Returns:
      The problem.
    """
    task = TASKS[name]
    network = recurrent_network(task)
    start_key, train_key, test_key = jax.random.split(jax.random.key(seed), 3)
    # His loss is a mean over target steps, ours their sum: so is the weight decay's.
    weight_decay = _WEIGHT_DECAY * task.target_steps(length)
    return Problem(
        task=task,
        length=length,
        network=network,
        objective=hfjax.Objective(
            network.model_fn, task.loss, weight_decay=weight_decay
        ),
        params=jax.jit(network.init)(start_key),
        train_key=train_key,
        test_key=test_key,
    )


def hf(
    problem: Problem, *, sizes: Sizes, structural: float, max_iterations: int
) -> Racer:
    """Build Hessian-free as Sutskever's program has it.

    No preconditioner; ρ by the damped model; any decrease ends the line search.

    Args:
      problem: to solve.
      sizes: of the batches.
      structural: μ of structural damping, tied to λ; 0 for none.
      max_iterations: of conjugate gradients in an update.

    Returns:
      The racer; a step is an update.
    """
    objective, damping = problem.objective, {}
    if structural:
        damping["structural"] = structural
        objective = hfjax.Objective(
            problem.network.with_hidden,
            objective.loss,
            hidden_loss=hfjax.losses.squared_error(),
            weight_decay=objective.weight_decay,
        )
    tx = hfjax.hessian_free(
        objective,
        damping=hfjax.damping.levenberg_marquardt(
            init=initial_damping(problem),
            ratio=hfjax.damping.ReductionRatio(model="damped"),
            **damping,
        ),
        solver=hfjax.cg.conjugate_gradient(
            max_iterations=max_iterations,
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
    # In parts as large as the curvature's: it is then not cut up itself.
    gradient = dataclasses.replace(problem.objective, microbatch_size=sizes.curvature)

    def step(carry: Carry) -> Carry:
        key = jax.random.fold_in(problem.train_key, carry.updates)
        everything, batch, eval_batch = batches(problem, key, sizes)
        _, grads = gradient.value_and_grad(carry.params, everything)
        updates, state = tx.update(
            grads, carry.state, carry.params, batch=batch, eval_batch=eval_batch
        )
        params: Any = optax.apply_updates(carry.params, updates)
        return Carry(params, state, carry.updates + 1)

    def init(params: Weights) -> Carry:
        return Carry(params, tx.init(params), zero_updates())

    compiled, seconds = compile_ahead(step, init(problem.params))
    return Racer(
        name="hf",
        family="hf",
        init=init,
        step=compiled,
        read=lambda carry: hfjax.diagnostics.scalars(carry.state),
        compile_seconds=seconds,
    )


def batches(
    problem: Problem, key: jax.Array, sizes: Sizes
) -> tuple[Batch, Batch, Batch | None]:
    """Draw what an update of HF takes.

    Curvature and evaluation data are among the gradient's, as in his program: a step is
    not one for data that the gradient does not know, and ρ on those is noise.

    Args:
      problem: to draw for.
      key: of the random numbers.
      sizes: of the batches.

    Returns:
      The data of the gradient, of the curvature, and of the evaluation, `None` where
      those are the curvature's.
    """
    everything = problem.draw(key, sizes.gradient)

    def part(start: int) -> Batch:
        end = start + sizes.curvature
        return jax.tree.map(lambda leaf: leaf[start:end], everything)

    whole = problem.task.strings is not None
    return everything, part(0), None if whole else part(sizes.curvature)


def initial_damping(problem: Problem) -> float:
    """Return λ before the first update: Sutskever's, on the scale of our loss.

    Args:
      problem: to solve.
    """
    steps = problem.task.target_steps(problem.length)
    return _DAMPING * problem.task.damping(problem.length) * steps


def adam(problem: Problem) -> Callable[[float], Racer]:
    """Build Adam on minibatches of 100, its gradients clipped to a norm of 1.

    Args:
      problem: to solve.

    Returns:
      `learning_rate -> racer`, compiled once for all rates; a step is as many
      updates as take about a quarter of a second.
    """

    def optimizer(rate: Any) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(_CLIP), optax.adam(rate))

    def update(carry: Carry, rate: Any) -> Carry:
        key = jax.random.fold_in(problem.train_key, carry.updates)
        batch = problem.draw(key, _MINIBATCH)
        _, grads = problem.objective.value_and_grad(carry.params, batch)
        updates, state = optimizer(rate).update(grads, carry.state, carry.params)
        params: Any = optax.apply_updates(carry.params, updates)
        return Carry(params, state, carry.updates + 1)

    def init(params: Weights) -> Carry:
        return Carry(params, optimizer(0.0).init(params), zero_updates())

    return small_updates("adam", init, update, init(problem.params))


def sequences_of(problem: Problem, family: str, sizes: Sizes) -> int:
    """Return how many sequences an update draws.

    Args:
      problem: that is solved.
      family: of the racer.
      sizes: of the batches of HF.
    """
    return sizes.gradient if family == "hf" else problem.task.strings or _MINIBATCH


def measurer(problem: Problem, params: Weights) -> Callable[[int], Measure[Row]]:
    """Build what measures parameters on 10,000 sequences, others each time.

    Args:
      problem: that is solved.
      params: to compile for.

    Returns:
      `sequences -> measure`, given how many an update draws; compiled once.
    """
    parts = 1 if problem.task.strings else TEST_CASES // _TEST_PART

    def part(params: Weights, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs, targets = problem.draw(key, _TEST_PART)
        outputs = problem.network.model_fn(params, inputs)
        wrong = problem.task.wrong(outputs, targets)
        values = problem.objective.loss.value(outputs, targets)
        return jnp.mean(values), jnp.mean(wrong.astype(jnp.float32))

    def measure(params: Weights, updates: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(jax.random.fold_in(problem.test_key, updates), parts)
        losses, wrong = jax.lax.map(lambda key: part(params, key), keys)
        return jnp.mean(losses), jnp.mean(wrong)

    compiled, _ = compile_ahead(measure, params, zero_updates())

    def of(sequences: int) -> Measure[Row]:
        def on_host(moment: Moment, params: Weights) -> Row:
            updates = zero_updates() + moment.updates
            loss, wrong = jax.device_get(compiled(params, updates))
            drawn = moment.updates * sequences
            return Row(*moment, drawn, float(loss), float(wrong))

        return on_host

    return of
