import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
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
    buffer = keep.build(max_iterations, value_fn)
    return jax.lax.fori_loop(
        1,
        last + 1,
        lambda i, kept: buffer.update(kept, i.astype(jnp.int32), iterate(i), i == last),
        buffer.init(iterate(0)),
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


@pytest.mark.parametrize("slots", [2, 3, 8])
def test_of_three_in_succession_the_one_with_the_closest_neighbours_goes(slots):
    rule, numbers = iterates.at_most(slots), []
    for last in range(1, 61):
        numbers.append(last)
        if len(numbers) > slots:
            triples = zip(numbers, numbers[1:], numbers[2:], strict=False)
            numbers.remove(min(triples, key=lambda ijk: ijk[2] / ijk[0])[1])
        if last in (1, 2, 7, 9, 20, 60):
            kept = offer(rule, 60, last)
            age = np.argsort(np.where(kept.iterations < 0, 999, kept.iterations))
            by_age = jax.tree.map(lambda leaf, age=age: leaf[age], kept)
            assert_kept(by_age, numbers + [-1] * (slots - len(numbers)))
            np.testing.assert_array_equal(iterates.by_age(kept.iterations), age)


def test_a_run_that_is_shorter_than_the_slots_has_no_slots_to_spare():
    assert_kept(offer(iterates.at_most(8), 3, 3), [1, 2, 3])
    assert_kept(offer(iterates.at_most(8), 0, 0), [0])


@pytest.mark.parametrize(("slots", "error"), [(1, ValueError), (2.0, TypeError)])
def test_too_few_slots_are_refused(slots, error):
    with pytest.raises(error, match="`slots`"):
        iterates.at_most(slots)


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
    ["falls", "rises", "valley", "off_grid", "ties", "nan", "inf", "all_nan", "close"],
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


@pytest.mark.parametrize(
    ("interval", "maximum", "last", "numbers"),
    [
        (1, 4, 4, [1, 2, 3, 4]),
        (3, 10, 10, [3, 6, 9, 10]),
        (3, 9, 9, [3, 6, 9]),
        (3, 10, 7, [3, 6, 7, -1]),
        (3, 10, 6, [3, 6, -1, -1]),
        (20, 10, 5, [5]),
        (3, 10, 0, [0, -1, -1, -1]),
    ],
)
def test_every_keeps_multiples_and_the_last(interval, maximum, last, numbers):
    assert_kept(offer(iterates.every(interval), maximum, last), numbers)


@pytest.mark.parametrize("last", [9, 11, 12])
def test_best_of_another_spacing_is_the_lowest_of_it_and_the_last(last):
    for values in (np.arange(13.0), -np.arange(13.0), (np.arange(13.0) - 7) ** 2):
        kept = offer(iterates.best(first=4, growth=2.0), 12, last, scripted(values))
        numbers = [4, 8, last]
        number = min(reversed(numbers), key=lambda i, values=values: values[i])
        assert_kept(kept, [number])
        np.testing.assert_allclose(kept.values, [values[number]])


# What `guarded` watches, on a run whose iterates NumPy knows.

GUARD_N = 12
GUARD_D = np.geomspace(0.05, 1, GUARD_N)
GUARD_B = np.cos(np.arange(GUARD_N))
GUARD_X, _ = reference.pcg(np.diag(GUARD_D), GUARD_B, iterations=GUARD_N)


@functools.partial(quick_jit, static_argnums=(0, 2))
def guarded_run(keep, script, maximum=GUARD_N):
    """Run; f is read from the script, by the length that iterates grow in."""
    lengths = jnp.asarray(np.linalg.norm(GUARD_X, axis=1))

    def value_fn(x):
        near = jnp.argmin(jnp.abs(lengths - jnp.sqrt(jnp.sum(x**2))))
        return script[near]

    return cg.solve(
        lambda v: GUARD_D * v,
        jnp.asarray(GUARD_B),
        max_iterations=maximum,
        stopping=None,
        keep=keep,
        value_fn=value_fn,
    )


def guard_ends(script, interval, tolerance):
    """Return where a run is to end, by the words of its docstring."""
    for i in range(interval, GUARD_N, interval):
        seen = [script[k] for k in range(interval, i + 1, interval)]
        if not np.isfinite(script[i]):
            return i
        if i == interval:
            continue
        significant = tolerance * (max(seen) - min(seen))
        if script[i] > script[i - interval] + significant:
            return i
    return GUARD_N


NUMBERS = np.arange(GUARD_N + 1.0)
GUARD_SCRIPTS = {
    "falls": -NUMBERS,
    "rises": NUMBERS,
    "valley": (NUMBERS - 6) ** 2,
    "slightly": np.where(NUMBERS < 6, -NUMBERS, -6 + 0.001 * NUMBERS),
    "creeps": np.where(NUMBERS < 4, -2.5 * NUMBERS, 0.5 * NUMBERS - 12),
    "between": np.where(
        NUMBERS % 2 == 0, -NUMBERS, 100
    ),  # Which an interval of 2 never sees.
    "flat": 0 * NUMBERS,
    "nan": np.where(NUMBERS == 8, np.nan, -NUMBERS),
    "inf": np.where(NUMBERS == 8, np.inf, -NUMBERS),
    "nan_at_once": np.where(NUMBERS == 2, np.nan, -NUMBERS),
    "all_nan": np.nan * NUMBERS,
}
GUARDS = {
    (interval, tolerance): iterates.guarded(interval, tolerance=tolerance)
    for interval, tolerance in ((1, 0.01), (2, 0.01), (2, 0.3), (4, 0.0))
}


@pytest.mark.parametrize("script", GUARD_SCRIPTS)
@pytest.mark.parametrize("guard", GUARDS, ids=str)
def test_a_guarded_run_ends_once_f_is_significantly_worse(guard, script):
    values = GUARD_SCRIPTS[script]
    interval, tolerance = guard
    run = guarded_run(GUARDS[guard], values)
    end = guard_ends(values, interval, tolerance)
    assert run.num_iterations == end
    if end < GUARD_N:
        assert run.reason == cg.Reason.OBJECTIVE_ROSE
    numbers = [*range(interval, end, interval), end]
    kept = np.asarray(run.kept.iterations)
    np.testing.assert_array_equal(kept[: len(numbers)], numbers)
    assert np.all(kept[len(numbers) :] == -1)
    np.testing.assert_allclose(
        run.kept.iterates[: len(numbers)], GUARD_X[numbers], rtol=1e-6, atol=1e-6
    )
    seen = np.asarray(run.kept.values)[: len(numbers)]
    finite = np.isfinite(values[numbers])
    np.testing.assert_allclose(seen[finite], values[numbers][finite])
    # The next run starts at the lowest f; one that is no number is not low.
    if np.any(finite):
        carry = cg.conjugate_gradient(keep=GUARDS[guard], warm_start_from="best").carry
        best = numbers[int(np.nanargmin(np.where(finite, values[numbers], np.nan)))]
        carried = carry(cg.as_run(run), jnp.zeros(GUARD_N))
        np.testing.assert_allclose(carried, GUARD_X[best], rtol=1e-6, atol=1e-6)


def test_a_guarded_run_asks_for_f_at_multiples_and_the_last_only():
    asked = []

    def value_fn(x):
        jax.debug.callback(lambda number: asked.append(int(number)), x["a"][0])
        return x["a"][0]

    jax.block_until_ready(offer(iterates.guarded(3), 20, 11, value_fn))
    jax.effects_barrier()
    assert sorted(asked) == [3, 6, 9, 11]


def test_bad_options_of_guarded_and_every_are_refused():
    for keep in (iterates.every, iterates.guarded):
        with pytest.raises(ValueError, match="`interval` must be at least 1"):
            keep(0)
        with pytest.raises(TypeError, match="`interval` must be a Python integer"):
            keep(2.0)
    with pytest.raises(ValueError, match="`tolerance` must be at least 0"):
        iterates.guarded(tolerance=-1.0)
    with pytest.raises(ValueError, match="`data` must be one of 'batch', 'eval_batch'"):
        iterates.guarded(data="all")
    with pytest.raises(ValueError, match="needs `value_fn`"):
        cg.solve(lambda v: v, jnp.ones(2), keep=iterates.guarded())
