import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax import backtracking
from hfjax.iterates import Kept


def scripted(values):
    """Kept iterates whose only entry is their slot, and f that reads `values`."""
    evaluated = []
    slots = len(values)
    kept = Kept(
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


VALUES = [2.0, 1.0, 1.5, 2.7, 2.4, 2.6, 3.0, 7.3]
"""Descending from the end to slot 4, the early stop; the lowest is slot 1."""


def test_early_stop_takes_the_first_iterate_whose_predecessor_is_no_better():
    value_fn, kept, evaluated = scripted(VALUES)
    choice = backtracking.early_stop().choose(value_fn, kept)
    jax.effects_barrier()
    assert (choice.iteration, choice.value) == (50, np.float32(2.4))
    assert choice.step["x"] == 4
    assert choice.last_value == np.float32(7.3)
    assert evaluated == [7, 6, 5, 4, 3]


def test_full_search_takes_the_lowest_of_all():
    value_fn, kept, evaluated = scripted(VALUES)
    choice = backtracking.full_search().choose(value_fn, kept)
    jax.effects_barrier()
    assert (choice.iteration, choice.value) == (20, 1.0)
    assert sorted(evaluated) == list(range(8))


def test_equal_values_keep_the_later_iterate():
    for rule in (backtracking.early_stop(), backtracking.full_search()):
        value_fn, kept, _ = scripted([1.0, 1.0, 1.0])
        assert rule.choose(value_fn, kept).iteration == 30


@pytest.mark.parametrize(
    "rule", [backtracking.early_stop(), backtracking.full_search()]
)
def test_values_that_are_not_finite_are_walked_past(rule):
    value_fn, kept, _ = scripted([1.0, 2.0, np.nan, np.inf, -np.inf, np.nan])
    choice = rule.choose(value_fn, kept)
    assert choice.value == 1.0
    assert choice.last_value == np.inf


def test_none_finite_leaves_the_last_at_infinity():
    value_fn, kept, _ = scripted([np.nan, np.inf])
    choice = backtracking.early_stop().choose(value_fn, kept)
    assert (choice.iteration, choice.value) == (20, np.inf)


def test_last_evaluates_the_last_only():
    value_fn, kept, evaluated = scripted(VALUES)
    choice = backtracking.last().choose(value_fn, kept)
    jax.effects_barrier()
    assert (choice.iteration, choice.value) == (80, np.float32(7.3))
    assert evaluated == [7]


@pytest.mark.parametrize(
    "rule", [backtracking.early_stop(), backtracking.full_search()]
)
def test_empty_slots_are_not_looked_at(rule):
    value_fn, kept, evaluated = scripted([3.0, 2.0, 0.0, 0.0])
    kept = kept._replace(iterations=jnp.array([5, 7, -1, -1]))
    choice = rule.choose(value_fn, kept)
    jax.effects_barrier()
    assert choice.iteration == 7
    assert set(evaluated) <= {0, 1}
