"""Line search and backtracking, against plain loops over what f answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from reference import quick_jit
from strategies import arrays, eighths, nonfinite, scales

from hfjax import backtracking, linesearch
from hfjax.globalization.backtracking import Before
from hfjax.solvers.cg import Run, RunStats, Step
from hfjax.solvers.iterates import Iterates

TRIES, SLOTS = 6, 6
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])

values = st.one_of(eighths, st.sampled_from([0.0, -0.125]), nonfinite)
tables = arrays(TRIES, elements=values)


@functools.cache
def armijo(known, dtype):
    """Search where f answers `table[k]` at the k-th α that the rule may try."""

    def run(table, value, slope, first, decrease, shrink):
        rule = linesearch.armijo(
            sufficient_decrease=decrease, shrink=shrink, max_tries=TRIES
        )

        def along(alpha):
            steps = jnp.round(jnp.log(alpha / first) / jnp.log(shrink))
            return table[steps.astype(jnp.int32)]

        return rule.search(along, value, slope, first, table[0] if known else None)

    compiled = quick_jit(run)
    return lambda *numbers: jax.device_get(
        compiled(*(np.asarray(number, dtype) for number in numbers))
    )


@every_dtype
@given(
    known=st.booleans(),
    table=tables,
    value=eighths,
    slope=st.one_of(eighths, scales(-6, 6).map(lambda size: -size), nonfinite),
    first=scales(-6, 6),
    decrease=st.integers(0, 8).map(lambda k: k / 8),
    shrink=st.integers(1, 7).map(lambda k: k / 8),
)
@example(True, np.array([-np.inf, -1, 0, 0, 0, 0]), 0.0, -1.0, 1.0, 0.5, 0.5)
def test_the_first_step_of_the_grid_that_lowers_f_enough_is_taken(
    dtype, known, table, value, slope, first, decrease, shrink
):
    found = armijo(known, dtype)(table, value, slope, first, decrease, shrink)
    alphas = [dtype(first)]
    for _ in range(TRIES - 1):
        alphas.append(alphas[-1] * dtype(shrink))
    alphas, eps = np.array(alphas), float(np.finfo(dtype).eps)
    downhill, finite = slope < 0, np.isfinite(table)
    with np.errstate(invalid="ignore"):
        change = decrease * alphas.astype(float) * slope
        slack = 4 * eps * (abs(value) + np.abs(change))
        surely = downhill & finite & (table <= value + change - slack)
        perhaps = downhill & finite & (table <= value + change + slack)
    if np.isneginf(slope):  # Promises more than there is.
        surely = perhaps = np.zeros(TRIES, bool)
    if not found.success:
        assert found.step_size == 0
        assert not np.any(surely)
        return
    (k,) = np.flatnonzero(alphas == found.step_size)
    assert perhaps[k]
    assert not np.any(surely[:k])
    assert found.value == dtype(table[k])


@functools.cache
def full_step():
    def run(value, at, slope, first):
        return linesearch.LineSearch().search(
            lambda alpha: at, value, slope, first, None
        )

    return quick_jit(run)


@given(value=eighths, at=values, slope=eighths, first=scales(-3, 3))
def test_without_a_search_the_first_step_is_taken_unless_f_rises(
    value, at, slope, first
):
    found = jax.device_get(full_step()(*np.float32([value, at, slope, first])))
    assert found.success == (np.isfinite(at) and at <= value)
    assert found.step_size == (np.float32(first) if found.success else 0)


@functools.cache
def chooser(full):
    rule = backtracking.full_search() if full else backtracking.early_stop()

    def run(table, count):
        slots = jnp.arange(SLOTS)
        used = slots < count
        # Iterates that are their slot, of numbers 3, 6, 9, …
        kept = Iterates(
            {"x": jnp.where(used, slots, -9.0).astype(jnp.float32)},
            jnp.where(used, 3 * (slots + 1), -1).astype(jnp.int32),
            jnp.full(SLOTS, jnp.inf, jnp.float32),
        )
        models, zero = jnp.zeros(3 * SLOTS + 1), jnp.zeros((), jnp.float32)
        last = Step({"x": zero}, zero, jnp.int32(0))
        given = Run(last, RunStats(jnp.int32(0), jnp.int32(0), models), kept)
        return rule.choose(
            given,
            lambda step: table[step["x"].astype(jnp.int32)],
            Before(zero, zero, zero),
        )

    return quick_jit(run)


def walk_back(table, *, full):
    """Walk from the last iterate to earlier ones, as sections 8.7 and 4.6 say.

    Returns the place of the first whose predecessor is no better, or of the best; the
    later one of equals. What is not finite is never better, nor stopped at.
    """
    if full:
        finite = [k for k in range(len(table)) if np.isfinite(table[k])]
        best = min((table[k] for k in finite), default=None)
        return max((k for k in finite if table[k] == best), default=len(table) - 1)
    here = len(table) - 1
    for k in range(len(table) - 2, -1, -1):
        if np.isfinite(table[here]):
            if not table[k] < table[here] or not np.isfinite(table[k]):
                break
            here = k
        elif np.isfinite(table[k]):
            here = k
    return here


@pytest.mark.parametrize("full", [False, True])
@given(table=arrays(SLOTS, elements=values), count=st.integers(1, SLOTS))
def test_backtracking_chooses_what_a_plain_loop_chooses(full, table, count):
    table = table.astype(np.float32)
    choice = jax.device_get(chooser(full)(table, count))
    place = walk_back(table[:count], full=full)
    value, last = (
        x if np.isfinite(x) else np.inf for x in (table[place], table[count - 1])
    )
    assert choice.step.direction["x"] == place
    assert choice.step.iteration == 3 * (place + 1)
    assert choice.value == value
    assert choice.last_value == last
