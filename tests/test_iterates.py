import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import quick_jit

from hfjax import cg, iterates

# ⌈5 · 1.3^j⌉ below 250.
GRID = [5, 7, 9, 11, 15, 19, 25, 32, 41, 54, 69, 90, 117, 152, 197]


def iterate(i):
    """Return an iterate that knows its number."""
    number = jnp.asarray(i, jnp.float32)
    return {"a": number * jnp.ones(2, jnp.float32), "b": [100.0 + number]}


@functools.partial(quick_jit, static_argnums=(0, 1, 3))
def offer(keep, max_iterations, last, value_fn=None):
    """Offer the iterates 1, 2, …, `last`, as a run of conjugate gradients would."""
    keeper = keep.build(max_iterations, value_fn)
    return jax.lax.fori_loop(
        1,
        last + 1,
        lambda i, kept: keeper.update(kept, i.astype(jnp.int32), iterate(i), i == last),
        keeper.init(iterate(0)),
    )


def assert_kept(kept, numbers):
    """Assert that slots hold these iterates, and −1 where they are empty."""
    np.testing.assert_array_equal(kept.iterations, numbers)
    for slot, number in enumerate(numbers):
        if number >= 0:
            np.testing.assert_array_equal(kept.iterates["a"][slot], number)
            np.testing.assert_array_equal(kept.iterates["b"][0][slot], 100 + number)


PLAIN_GRID = iterates.grid()


def test_grid_keeps_the_iterations_of_martens_program_and_the_last():
    assert_kept(offer(PLAIN_GRID, 250, 250), [*GRID, 250])


@pytest.mark.parametrize("last", [1, 4, 5, 6, 12, 54, 55, 197, 198, 249])
def test_a_run_that_ends_early_leaves_later_slots_empty(last):
    kept = [number for number in GRID if number < last] + [last]
    empty = [-1] * (16 - len(kept))
    assert_kept(offer(PLAIN_GRID, 250, last), kept + empty)


def test_before_the_first_iteration_the_start_is_kept():
    assert_kept(offer(PLAIN_GRID, 250, 0), [0] + [-1] * 15)


@pytest.mark.parametrize(
    ("first", "growth", "last", "numbers"),
    [
        (1, 1.0001, 6, [1, 2, 3, 4, 5, 6]),
        (2, 2.0, 20, [2, 4, 8, 16, 20]),
        (2, 2.0, 16, [2, 4, 8, 16]),
        (30, 1.5, 20, [20]),
        (1, 1.5, 1, [1]),
    ],
)
def test_grid_of_other_spacings(first, growth, last, numbers):
    assert_kept(offer(iterates.grid(first=first, growth=growth), last, last), numbers)


def test_iterates_kept_by_a_run_are_its_iterates():
    rng = np.random.default_rng(0)
    a = np.diag(np.geomspace(1e-2, 1, 30))
    b = jnp.asarray(rng.standard_normal(30))

    @functools.partial(quick_jit, static_argnums=0)
    def run(keep):
        return cg.solve(
            lambda v: a @ v, b, max_iterations=17, stopping=None, keep=keep
        ).kept

    every = run(iterates.grid(first=1, growth=1.0001))
    kept = run(iterates.grid())
    np.testing.assert_array_equal(kept.iterations, [5, 7, 9, 11, 15, 17])
    np.testing.assert_array_equal(every.iterations, np.arange(1, 18))
    np.testing.assert_allclose(
        kept.iterates, every.iterates[np.asarray(kept.iterations) - 1], rtol=1e-12
    )


def scripted(values):
    """Return f of an iterate by its number."""
    table = jnp.asarray(values)
    return lambda x: table[x["a"][0].astype(jnp.int32)]


def lowest(values, last):
    """Return the number of the best iterate on the grid; the later one of equals."""
    best, chosen = np.inf, 0
    for number in [*(n for n in GRID if n < last), last]:
        if values[number] <= best:
            best, chosen = values[number], number
    return chosen, best


@pytest.mark.parametrize(
    "script",
    [
        "falls",
        "rises",
        "valley",
        "off_grid",
        "ties",
        "nan",
        "inf",
        "all_nan",
        "close",
    ],
)
def test_best_is_the_lowest_of_the_grid(script):
    i = np.arange(61.0)
    values = {
        "falls": -i,
        "rises": i,
        "valley": (i - 26) ** 2,
        "off_grid": np.where(i == 33, -99, (i - 40) ** 2),
        "ties": np.where(i < 19, 3, 2),
        "nan": np.where((i == 25) | (i == 5) | (i == 60), np.nan, (i - 25) ** 2),
        "inf": np.where(i == 32, 7, np.inf),
        "all_nan": np.full(61, np.nan),
        "close": 1 + 1e-12 * (i - 26) ** 2,
    }[script]
    kept = offer(iterates.best(), 250, 60, scripted(values))
    number, value = lowest(values, 60)
    assert_kept(kept, [number])
    np.testing.assert_allclose(kept.values, [value], rtol=1e-6)


def test_best_asks_for_f_on_the_grid_only():
    asked = []

    def value_fn(x):
        jax.debug.callback(lambda number: asked.append(int(number)), x["a"][0])
        return x["a"][0]

    jax.block_until_ready(offer(iterates.best(), 250, 20, value_fn))
    jax.effects_barrier()
    assert sorted(asked) == [5, 7, 9, 11, 15, 19, 20]


def test_best_without_value_fn_is_refused():
    with pytest.raises(ValueError, match="needs `value_fn`"):
        cg.solve(lambda v: v, jnp.ones(2), keep=iterates.best())


@pytest.mark.parametrize("keep", [iterates.grid, iterates.best])
def test_bad_spacings_are_refused(keep):
    with pytest.raises(TypeError, match="`first` must be a Python integer"):
        keep(first=5.0)
    with pytest.raises(ValueError, match="`first` must be at least 1"):
        keep(first=0)
    with pytest.raises(ValueError, match=r"`growth` must be above 1\.0"):
        keep(growth=1.0)
