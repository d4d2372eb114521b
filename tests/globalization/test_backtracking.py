import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import quick_jit

import hfjax
from hfjax import backtracking
from hfjax.globalization.backtracking import Before
from hfjax.objectives.plain import terms_of
from hfjax.objectives.terms import value_on_part
from hfjax.solvers.cg import Run, RunStats, Step
from hfjax.solvers.iterates import Iterates


def run_of(kept):
    """Return a run that kept these iterates, with M = −1 at each."""
    count = jnp.sum(kept.iterations >= 0)
    last = jax.tree.map(lambda leaf: leaf[count - 1], kept.iterates)
    number = kept.iterations[count - 1]
    models = -jnp.ones(101)
    stats = RunStats(number, jnp.int32(hfjax.cg.Reason.MAX_ITERATIONS), models)
    return Run(Step(last, models[-1], number), stats, kept)


def scripted(values):
    """Kept iterates whose only entry is their slot, and f that reads `values`."""
    evaluated = []
    slots = len(values)
    kept = Iterates(
        {"x": jnp.arange(slots, dtype=jnp.float32)},
        jnp.arange(1, slots + 1, dtype=jnp.int32) * 10,
        jnp.full(slots, jnp.inf, jnp.float32),
    )
    table = jnp.asarray(values, jnp.float32)

    def value_fn(step):
        slot = step["x"].astype(jnp.int32)
        jax.debug.callback(lambda slot: evaluated.append(int(slot)), slot)
        return table[slot]

    return value_fn, kept, evaluated


BEFORE = Before(jnp.float32(9.0), jnp.float32(0.0), jnp.float32(1.0))
VALUES = [2.0, 1.0, 1.5, 2.7, 2.4, 2.6, 3.0, 7.3]
"""Descending from the end to slot 4, the early stop; the lowest is slot 1."""


def test_early_stop_takes_the_first_iterate_whose_predecessor_is_no_better():
    value_fn, kept, evaluated = scripted(VALUES)
    choice = backtracking.early_stop().choose(run_of(kept), value_fn, BEFORE)
    jax.effects_barrier()
    assert (choice.step.iteration, choice.value) == (50, np.float32(2.4))
    assert choice.step.direction["x"] == 4
    assert choice.last_value == np.float32(7.3)
    assert evaluated == [7, 6, 5, 4, 3]


def test_full_search_takes_the_lowest_of_all():
    value_fn, kept, evaluated = scripted(VALUES)
    choice = backtracking.full_search().choose(run_of(kept), value_fn, BEFORE)
    jax.effects_barrier()
    assert (choice.step.iteration, choice.value) == (20, 1.0)
    assert sorted(evaluated) == list(range(8))


def test_slots_in_another_order_are_walked_from_the_newest_to_the_oldest():
    value_fn, kept, evaluated = scripted([*VALUES, 0.0])
    order = np.array([3, 0, 5, 7, 1, 2, 4, 6])
    shuffled = jax.tree.map(lambda x: x[np.append(order, 8)], kept)
    shuffled = shuffled._replace(iterations=shuffled.iterations.at[8].set(-1))
    choice = backtracking.early_stop().choose(run_of(shuffled), value_fn, BEFORE)
    jax.effects_barrier()
    assert evaluated == [7, 6, 5, 4, 3]
    assert (choice.step.iteration, choice.value) == (50, np.float32(2.4))
    assert choice.step.direction["x"] == 4
    assert choice.last_value == np.float32(7.3)


def test_equal_values_keep_the_later_iterate():
    for rule in (backtracking.early_stop(), backtracking.full_search()):
        value_fn, kept, _ = scripted([1.0, 1.0, 1.0])
        assert rule.choose(run_of(kept), value_fn, BEFORE).step.iteration == 30


@pytest.mark.parametrize(
    "rule", [backtracking.early_stop(), backtracking.full_search()]
)
def test_values_that_are_not_finite_are_walked_past(rule):
    value_fn, kept, _ = scripted([1.0, 2.0, np.nan, np.inf, -np.inf, np.nan])
    choice = rule.choose(run_of(kept), value_fn, BEFORE)
    assert choice.value == 1.0
    assert choice.last_value == np.inf


def test_none_finite_leaves_the_last_at_infinity():
    value_fn, kept, _ = scripted([np.nan, np.inf])
    choice = backtracking.early_stop().choose(run_of(kept), value_fn, BEFORE)
    assert (choice.step.iteration, choice.value) == (20, np.inf)


def test_a_rule_that_is_left_out_evaluates_the_last_only():
    value_fn, kept, evaluated = scripted(VALUES)
    choice = backtracking.Backtracking().choose(run_of(kept), value_fn, BEFORE)
    jax.effects_barrier()
    assert (choice.step.iteration, choice.value) == (80, np.float32(7.3))
    assert evaluated == [7]


@pytest.mark.parametrize(
    "rule", [backtracking.early_stop(), backtracking.full_search()]
)
def test_empty_slots_are_not_looked_at(rule):
    value_fn, kept, evaluated = scripted([3.0, 2.0, 0.0, 0.0])
    kept = kept._replace(iterations=jnp.array([5, 7, -1, -1]))
    choice = rule.choose(run_of(kept), value_fn, BEFORE)
    jax.effects_barrier()
    assert choice.step.iteration == 7
    assert set(evaluated) <= {0, 1}


def scripted_solver(steps):
    """Return a solver that keeps these iterates, whatever it is asked."""
    steps = jnp.asarray(steps)
    count = len(steps)
    numbers = jnp.arange(1, count + 1, dtype=jnp.int32)
    # An update's vectors are packed: a tuple of arrays.
    kept = Iterates((steps,), numbers, jnp.full(count, jnp.inf))
    run = run_of(kept)
    return hfjax.cg.Solver(
        start=lambda direction, count: None, solve=lambda system, x0: run
    )


STEPS = np.array([[0.5], [5.5], [4.9], [5.6], [4.0], [4.5], [7.0]])


def ten_cases():
    """Return targets and weights, none alike."""
    rng = np.random.default_rng(0)
    return rng.uniform(1, 9, 10), rng.uniform(0.5, 2, 10)


def mean(step, chosen=slice(None)):
    """Return f of a step δ from 0, the mean of ½(δ − tᵢ)² over some of the ten cases."""
    t, weights = ten_cases()
    return np.average(0.5 * (step - t[chosen]) ** 2, weights=weights[chosen])


def choosing(rule, model_fn=lambda p, x: x * p[None], **options):
    """Return an update among the scripted steps, and its arguments."""
    t, weights = ten_cases()
    tx = hfjax.hessian_free(
        hfjax.Objective(model_fn, hfjax.losses.squared_error()),
        solver=scripted_solver(STEPS),
        preconditioner=None,
        backtracking=rule,
        line_search=None,
        **options,
    )
    batch = (jnp.ones((10, 1)), jnp.asarray(t)[:, None], jnp.asarray(weights))
    params = jnp.zeros(1)
    return tx.update, (-jnp.ones(1), tx.init(params), params), {"batch": batch}


@pytest.mark.parametrize(
    ("cases", "stride"), [(None, 1), (10, 1), (6, 1), (5, 2), (4, 2), (3, 3), (1, 10)]
)
@pytest.mark.parametrize("rule", [backtracking.early_stop, backtracking.full_search])
def test_a_part_of_the_cases_chooses_and_all_of_them_judge(rule, cases, stride):
    update, args, data = choosing(rule(cases=cases))
    updates, state = quick_jit(update)(*args, **data)
    part = slice(None, None, stride)
    values = [mean(step[0], part) for step in STEPS]
    slot = len(STEPS) - 1
    for k in range(len(STEPS) - 2, -1, -1):
        if values[k] < values[slot]:
            slot = k
        elif rule is backtracking.early_stop:
            break
    assert state.info.chosen_iteration == slot + 1
    np.testing.assert_allclose(updates, STEPS[slot])
    np.testing.assert_allclose(state.info.value_after, mean(STEPS[slot][0]), rtol=1e-12)
    np.testing.assert_allclose(state.info.value_before, mean(0.0), rtol=1e-12)


def test_ratio_of_the_last_iterate_is_that_on_all_cases():
    ratio = hfjax.damping.ReductionRatio(model="damped", step="last")
    rule = hfjax.damping.levenberg_marquardt(ratio=ratio)
    update, args, data = choosing(backtracking.full_search(cases=3), damping=rule)
    _, state = quick_jit(update)(*args, **data)
    truth = mean(0.0) - mean(STEPS[-1][0])  # M is −1.
    assert abs(truth - (mean(0.0) - mean(STEPS[-1][0], slice(None, None, 3)))) > 0.1
    np.testing.assert_allclose(state.info.reduction_ratio, truth, rtol=1e-9)


def runs_on(program, cases):
    """Count how often a program takes the sinh of so many cases, within it too."""
    total = 0
    for equation in getattr(program, "jaxpr", program).eqns:
        shape = equation.outvars[0].aval.shape
        total += equation.primitive.name == "sinh" and shape[0] == cases
        inside = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        )
        total += sum(runs_on(part, cases) for part in inside if hasattr(part, "eqns"))
    return total


def test_of_all_cases_f_is_asked_where_it_is_read():
    # f(θ), whole and on the part, which XLA computes once, and f along the chosen step; at
    # the last one only if ρ is to judge that. B is one pass more.
    def passes(cases, step="chosen"):
        def model_fn(p, x):
            return jax.lax.sinh(x * p[None])

        ratio = hfjax.damping.ReductionRatio(step=step)
        rule = hfjax.damping.levenberg_marquardt(ratio=ratio)
        update, args, data = choosing(
            backtracking.early_stop(cases=cases), model_fn, damping=rule
        )
        program = jax.make_jaxpr(lambda *args: update(*args, **data))(*args)
        return runs_on(program, 10)

    assert passes(3) == passes(3, "last") - 1
    assert passes(3) == passes(None) + 1  # The walk is on three cases.


def test_f_of_the_start_on_a_part_costs_no_pass_of_its_own():
    batch = (jnp.linspace(-1.0, 1.0, 10)[:, None], jnp.zeros((10, 1)))
    f = hfjax.Objective(lambda p, x: jnp.tanh(x * p), hfjax.losses.squared_error())

    def both(p):
        whole, some = (terms_of(f, data) for data in (batch, f._subsample(batch, 3)))
        return f.value(p, batch), value_on_part(whole, some, p, 3)

    program = quick_jit(both).lower(jnp.ones((1, 1))).compile()
    assert program.as_text().count(" tanh(") == 1
    value, part = program(jnp.ones((1, 1)))
    squares = np.tanh(np.asarray(batch[0])) ** 2 / 2
    np.testing.assert_allclose([value, part], [squares.mean(), squares[::3].mean()])


def test_too_few_cases_for_a_part_change_nothing():
    programs = set()
    for cases in (None, 6, 10, 2000):
        update, args, data = choosing(backtracking.early_stop(cases=cases))
        programs.add(jax.jit(update).lower(*args, **data).as_text())
    assert len(programs) == 1


def test_the_part_and_the_whole_choose_differently_in_that_test():
    t, weights = ten_cases()
    means = {np.average(t[::k], weights=weights[::k]).round(1) for k in (1, 2, 3, 10)}
    assert len(means) == 4


def test_bad_numbers_of_cases_are_refused():
    for rule in (backtracking.early_stop, backtracking.full_search):
        with pytest.raises(ValueError, match="`cases` must be at least 1"):
            rule(cases=0)
        with pytest.raises(TypeError, match="`cases` must be a Python integer"):
            rule(cases=2.0)
