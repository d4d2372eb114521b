"""The recipes of section 13, each update written out in NumPy, constant by constant."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import training
from jax.flatten_util import ravel_pytree
from problems import layers, mlp
from reference import flat, quick_jit

import hfjax
from hfjax import recipes
from hfjax.solvers.cg import Reason

DECAY = 1e-4
RNG = np.random.default_rng(3)
CODES = RNG.uniform(size=(30, 2))
X = 1 / (1 + np.exp(-4 * np.sin(3 * CODES @ RNG.standard_normal((2, 5)))))
ALL = (jnp.asarray(X), jnp.asarray(X))
PARAMS = layers(RNG, 5, 3, 5)
OBJECTIVE = hfjax.Objective(
    mlp, hfjax.losses.sigmoid_cross_entropy(), weight_decay=DECAY
)


def part(start, stop):
    return tuple(leaf[start:stop] for leaf in ALL)


BATCH, OTHER = part(0, 10), part(10, 30)


THETA, UNRAVEL = ravel_pytree(PARAMS)


@quick_jit
def jacobian(theta, x):
    return jax.jacfwd(lambda theta: mlp(UNRAVEL(theta), x))(theta)


class Dense(NamedTuple):
    gradient: np.ndarray
    ggn: np.ndarray
    fisher: np.ndarray


def dense(theta, data, decay=DECAY):
    """Write gradient, Gauss-Newton matrix and Fisher diagonal out."""
    x, t = data
    j = np.asarray(jacobian(theta, x))
    p = 1 / (1 + np.exp(-np.asarray(mlp(UNRAVEL(jnp.asarray(theta)), x))))
    gradients = np.einsum("ian,ia->in", j, p - np.asarray(t))
    ggn = np.einsum("iam,ia,ian->mn", j, p * (1 - p), j) / len(x)
    return Dense(
        gradients.mean(axis=0) + decay * np.asarray(theta),
        ggn + decay * np.eye(len(theta)),
        np.square(gradients).mean(axis=0) + decay,
    )


def value(theta, data):
    """Compute f of flat parameters, in NumPy."""
    x, t = (np.asarray(leaf) for leaf in data)
    sizes = np.cumsum([15, 3, 15, 5])
    # `ravel_pytree` of [(w, b), (w, b)].
    w1, b1, w2, b2 = np.split(theta, sizes[:-1])
    z = np.tanh(x @ w1.reshape(5, 3) + b1) @ w2.reshape(3, 5) + b2
    losses = np.logaddexp(0, z) - t * z
    return np.mean(np.sum(losses, axis=1)) + 0.5 * DECAY * np.sum(theta**2)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What an update of a recipe is to do."""

    iterations: int = 250
    guard: tuple | None = None  # Interval, tolerance.
    choice: str = "early"  # "early", "full" or "last".
    carry: str = "last"  # "last" or "best".
    decay: float = 0.95
    preconditioner_data: str = "batch"
    line_search: bool = True
    rate: float = 1.0


def ends(recipe, models, values, first):
    """Return where a run ends, and why: Martens' rule, the guard, or the limit."""
    for i in range(1, recipe.iterations + 1):
        k = max(10, math.ceil(i / 10))
        stalls = i > k and models[i] < 0
        if stalls and (models[i] - models[i - k]) / models[i] < 5e-4 * k:
            return i, Reason.STOPPING_RULE
        if i == recipe.iterations:
            return i, Reason.MAX_ITERATIONS
        if recipe.guard is not None and i % recipe.guard[0] == 0 and i > first:
            interval, tolerance = recipe.guard
            seen = values[interval : i + 1 : interval]
            spread = max(seen) - min(seen)
            if values[i] > values[i - interval] + tolerance * spread:
                return i, Reason.OBJECTIVE_ROSE
    raise AssertionError


def expected(recipe, params, direction, damping, grads_data, batch, other):
    """Do one update in NumPy."""
    theta, direction = flat(params), flat(direction)
    a = dense(theta, batch).ggn + damping * np.eye(len(theta))
    b = -dense(theta, grads_data).gradient
    data = batch if recipe.preconditioner_data == "batch" else other
    inverse = np.diag((dense(theta, data).fisher + damping) ** -0.75)

    for x0 in (recipe.decay * direction, np.zeros_like(b)):
        iterates, models = reference.pcg(a, b, x0, inverse, recipe.iterations)
        on_batch = [value(theta + x, batch) for x in iterates]
        first = 0 if recipe.guard is None else recipe.guard[0]
        end, reason = ends(recipe, models, on_batch, first)
        if models[end] < 0:
            break

    if recipe.guard is None:
        grid = {math.ceil(5 * 1.3**j) for j in range(30)}
    else:
        grid = set(range(recipe.guard[0], end, recipe.guard[0]))
    kept = [i for i in sorted(grid) if i < end] + [end]
    on_other = {i: value(theta + iterates[i], other) for i in kept}
    chosen = end
    for i in reversed(kept[:-1]):
        if recipe.choice == "last":
            break
        if on_other[i] < on_other[chosen]:
            chosen = i
        elif recipe.choice == "early":
            break
    best = min(kept, key=lambda i: on_batch[i])
    step, now = iterates[chosen], value(theta, other)
    alpha = recipe.rate
    if recipe.line_search:
        while value(theta + alpha * step, other) > now - 1e-2 * alpha * (b @ step):
            alpha *= 0.8

    undamped = -b @ step + 0.5 * step @ a @ step - 0.5 * damping * step @ step
    ratio = (value(theta + step, batch) - value(theta, batch)) / undamped
    factor = 2 / 3 if ratio > 3 / 4 else 3 / 2 if ratio < 1 / 4 else 1.0
    return {
        "iterations": end,
        "reason": reason,
        "chosen": chosen,
        "update": alpha * step,
        "direction": iterates[best if recipe.carry == "best" else end],
        "damping": factor * damping,
        "ratio": ratio,
        "value_after": value(theta + alpha * step, other),
    }


@functools.cache
def step_of(tx):
    @quick_jit
    def step(params, state, grads_data, batch, other):
        objective = OBJECTIVE.at(state.count)
        grads = objective.value_and_grad(params, grads_data)[1]
        return tx.update(grads, state, params, batch=batch, eval_batch=other)

    return step


def follow(tx, recipe, data, updates, damping):
    """Run updates, each beside its truth from the same state; return the truths."""
    params, state, truths = PARAMS, tx.init(PARAMS), []
    assert state.damping == 45
    state = state._replace(damping=jnp.asarray(damping))
    for count in range(updates):
        now = recipe(count) if callable(recipe) else recipe
        truth = expected(now, params, state.direction, float(state.damping), *data)
        step, state = step_of(tx)(params, state, *data)
        info = state.info
        assert info.accepted
        assert info.cg_iterations == truth["iterations"]
        assert Reason(int(info.cg_reason)) is truth["reason"]
        assert info.chosen_iteration == truth["chosen"]
        # Tens of iterations amplify rounding.
        for ours, name in ((step, "update"), (state.direction, "direction")):
            scale = np.max(np.abs(truth[name]))
            np.testing.assert_allclose(flat(ours), truth[name], atol=1e-5 * scale)
        np.testing.assert_allclose(state.damping, truth["damping"], rtol=1e-6)
        np.testing.assert_allclose(info.reduction_ratio, truth["ratio"], rtol=1e-4)
        np.testing.assert_allclose(info.value_after, truth["value_after"], rtol=1e-5)
        params = optax.apply_updates(params, step)
        truths.append(truth)
    return truths


# As they are: every default is in effect. Compiling takes seconds: shared.
MARTENS = recipes.martens2010(OBJECTIVE)
GUARDED = recipes.curvature_guarded(OBJECTIVE)
GUARDED_RECIPE = Recipe(guard=(10, 0.01), choice="full", carry="best", iterations=60)


def test_martens2010_is_his_program():
    recipe = Recipe(iterations=60, preconditioner_data="other")
    truths = follow(MARTENS, recipe, (ALL, BATCH, ALL), 3, damping=0.3)
    assert any(truth["chosen"] < truth["iterations"] for truth in truths)
    assert {truth["reason"] for truth in truths} == {Reason.STOPPING_RULE}


@pytest.mark.slow
def test_curvature_guarded_ends_and_starts_where_f_on_the_curvature_batch_says():
    truths = follow(GUARDED, GUARDED_RECIPE, (ALL, BATCH, OTHER), 3, damping=1e-2)
    assert Reason.OBJECTIVE_ROSE in {truth["reason"] for truth in truths}
    assert any(truth["chosen"] < truth["iterations"] for truth in truths)


@pytest.mark.slow
def test_momentum_like_takes_the_last_iterate_of_short_runs():
    rate = optax.linear_schedule(1.0, 0.5, 2)
    decay = optax.linear_schedule(0.5, 0.9, 2)
    tx = recipes.momentum_like(
        OBJECTIVE,
        max_iterations=9,
        learning_rate=rate,
        warm_start_decay=decay,
        limit=lambda count: 9.0 - 2 * count,
    )

    def recipe(count):
        return Recipe(
            iterations=9 - 2 * count,
            choice="last",
            decay=float(decay(count)),
            rate=float(rate(count)),
            line_search=False,
        )

    truths = follow(tx, recipe, (BATCH, BATCH, BATCH), 3, damping=0.1)
    assert [truth["iterations"] for truth in truths] == [9, 7, 5]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "most"),
    [("curvature_guarded", 250), ("momentum_like", 50), ("martens2010", 250)],
)
def test_a_run_that_does_not_stall_ends_at_the_limit(name, most):
    # A product that makes steady progress for ever, and an f that falls alike.
    objective = hfjax.Objective(
        lambda p, x: x @ p, hfjax.losses.squared_error(), weight_decay=0.0
    )
    tx = getattr(recipes, name)(objective, initial_damping=1e-12)
    batch = (jnp.diag(jnp.geomspace(1e20, 1.0, 300)), jnp.ones((300, 1)))
    _, state = training.one_update(objective, tx, jnp.zeros((300, 1)), batch)
    assert state.info.cg_iterations == most
    assert Reason(int(state.info.cg_reason)) is Reason.MAX_ITERATIONS


@pytest.mark.slow
def test_iterates_may_be_compared_on_a_part_of_the_other_data():
    # On the first of 20; the line search is on all of them. Every iterate is kept.
    tx = recipes.curvature_guarded(OBJECTIVE, interval=1, evaluated_cases=1)
    theta = np.asarray(THETA)
    thin = tuple(leaf[:1] for leaf in OTHER)
    recipe = dataclasses.replace(GUARDED_RECIPE, guard=(1, 0.01))
    for damping, reason in ((0.1, Reason.STOPPING_RULE), (0.01, Reason.OBJECTIVE_ROSE)):
        start = tx.init(PARAMS)._replace(damping=jnp.asarray(damping))
        updates, state = step_of(tx)(PARAMS, start, ALL, BATCH, OTHER)
        args = (PARAMS, start.direction, damping, ALL, BATCH)
        truth = expected(recipe, *args, thin)
        assert truth["reason"] is reason
        # What the part chooses, all of it would not, nor would an early stop.
        assert truth["chosen"] != expected(recipe, *args, OTHER)["chosen"]
        if reason is Reason.STOPPING_RULE:
            early = dataclasses.replace(recipe, choice="early")
            assert truth["chosen"] != expected(early, *args, thin)["chosen"]
        assert state.info.cg_iterations == truth["iterations"]
        assert state.info.chosen_iteration == truth["chosen"]
        before, after = theta, theta + flat(updates)
        assert state.info.accepted
        np.testing.assert_allclose(
            [state.info.value_before, state.info.value_after],
            [value(before, OTHER), value(after, OTHER)],
            rtol=1e-9,
        )


@pytest.mark.parametrize(
    ("tx", "other"), [(MARTENS, ALL), (GUARDED, OTHER)], ids=["martens2010", "guarded"]
)
def test_f_falls(tx, other):
    params, state = PARAMS, tx.init(PARAMS)._replace(damping=jnp.asarray(1.0))
    values = [float(OBJECTIVE.value(params, other))]
    for _ in range(12):
        step, state = step_of(tx)(params, state, ALL, BATCH, other)
        params = optax.apply_updates(params, step)
        values.append(float(state.info.value_after))
    assert np.all(np.diff(values) <= 0)
    np.testing.assert_allclose(values[-1], OBJECTIVE.value(params, other))
    x = np.asarray(other[0])
    entropy = -np.sum(x * np.log(x) + (1 - x) * np.log(1 - x), axis=1).mean()
    assert values[-1] - entropy < 0.5 * (values[0] - entropy)


@pytest.mark.slow
def test_weight_decay_is_turned_off_by_a_schedule():
    schedule = optax.piecewise_constant_schedule(0.3, {4: 0.0})
    scheduled = hfjax.Objective(mlp, OBJECTIVE.loss, weight_decay=schedule)
    tx = hfjax.recipes.momentum_like(scheduled, initial_damping=0.5)

    @quick_jit
    def step(params, state):
        grads = scheduled.at(state.count).value_and_grad(params, ALL)[1]
        return tx.update(grads, state, params, batch=ALL)

    for count, decay in ((0, 0.3), (4, 0.0)):
        state = tx.init(PARAMS)._replace(count=jnp.int32(count))
        updates, after = step(PARAMS, state)
        here = dense(THETA, ALL, decay)
        a = here.ggn + 0.5 * np.eye(len(THETA))
        inverse = np.diag((here.fisher + 0.5) ** -0.75)
        n = int(after.info.cg_iterations)
        iterates, _ = reference.pcg(a, -here.gradient, None, inverse, n)
        np.testing.assert_allclose(flat(updates), iterates[-1], rtol=1e-5, atol=1e-9)
        truth = value(np.asarray(THETA), ALL)
        truth += 0.5 * (decay - DECAY) * np.sum(np.square(THETA))
        np.testing.assert_allclose(after.info.value_before, truth, rtol=1e-12)
    with pytest.raises(TypeError, match=r"objective\.at\(state\.count\)"):
        scheduled.value(PARAMS, ALL)
    assert OBJECTIVE.at(0) is OBJECTIVE
