"""The sequences: each definition, read off the inputs by slow loops of plain Python."""

import functools
import itertools
from collections import Counter

import jax
import numpy as np
import pytest

from benchmarks import sequences
from benchmarks.rnn_tasks import TASKS

CASES = 2000
LENGTHS = (30, 50, 100)

# Where each mark may be, ends included.
OPERANDS = {
    ("addition", 30): [(1, 2), (3, 14)],
    ("addition", 50): [(1, 4), (5, 24)],
    ("addition", 100): [(1, 9), (10, 49)],
    ("xor", 30): [(1, 5), (9, 14)],
    ("xor", 50): [(1, 9), (15, 24)],
    ("xor", 100): [(2, 19), (30, 49)],
}
LETTERS = {
    ("temporal-order", 30): [(1, 3), (12, 15)],
    ("temporal-order", 50): [(1, 5), (20, 25)],
    ("temporal-order", 100): [(1, 10), (40, 50)],
    ("temporal-order-3", 30): [(1, 3), (9, 12), (15, 18)],
    ("temporal-order-3", 50): [(1, 5), (15, 20), (25, 30)],
    ("temporal-order-3", 100): [(1, 10), (30, 40), (50, 60)],
}


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """Benchmarks are an application: float32, and JAX's own defaults."""
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def draw(name, length, cases=CASES, seed=0):
    """Draw a batch as NumPy arrays."""
    (steps, lengths), targets = TASKS[name].generate(
        jax.random.key(seed), cases, length
    )
    assert steps.dtype == np.float32
    return np.asarray(steps), np.asarray(lengths), np.asarray(targets)


def by_case(name, length):
    """Yield of each case its own steps and its target; after them all must be zero."""
    steps, lengths, targets = draw(name, length)
    for case, (own, target) in enumerate(zip(lengths, targets, strict=True)):
        assert not steps[case, own:].any()
        yield steps[case, :own], target


def symbols_of(steps):
    """Read one-hot steps."""
    assert set(np.unique(steps)) <= {0.0, 1.0}
    assert (steps.sum(axis=1) == 1).all()
    return [list(step).index(1) for step in steps]


def ends(places):
    return [(min(column), max(column)) for column in zip(*places, strict=True)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["addition", "multiplication", "xor"])
def test_two_marked_values_make_the_target(name, length):
    operation = {
        "addition": lambda a, b: a + b,
        "multiplication": lambda a, b: a * b,
        "xor": lambda a, b: int(a) ^ int(b),
    }[name]
    places, values = [], []
    for steps, (target,) in by_case(name, length):
        marks = [t for t, (_, marker) in enumerate(steps) if marker == 1]
        assert len(marks) == 2
        first, second = (steps[t][0] for t in marks)
        assert target == pytest.approx(operation(first, second), abs=1e-6)
        minus = [t for t, (_, marker) in enumerate(steps) if marker == -1]
        assert minus == [0, len(steps) - 3]
        assert {marker for _, marker in steps} == {-1, 0, 1}
        places.append(marks)
        values.extend(steps[:, 0])
    ranges = OPERANDS["xor" if name == "xor" else "addition", length]
    assert ends(places) == ranges
    for column, (low, high) in zip(zip(*places, strict=True), ranges, strict=True):
        spread = (high - low + 1) / np.sqrt(12 * CASES)
        assert np.mean(column) == pytest.approx((low + high) / 2, abs=5 * spread)
    if name == "xor":
        assert set(values) == {0.0, 1.0}
    else:
        assert 0 <= min(values) < 0.001
        assert 0.999 < max(values) < 1
    assert np.mean(values) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["temporal-order", "temporal-order-3"])
def test_the_class_is_the_letters_in_their_order(name, length):
    places, classes, noise = [], Counter(), Counter()
    for steps, target in by_case(name, length):
        symbols = symbols_of(steps)
        assert symbols[0] == 7
        assert symbols[-1] == 6
        where = [t for t, symbol in enumerate(symbols) if symbol in (4, 5)]
        word = "".join("AB"[symbols[t] - 4] for t in where)
        words = ["".join(w) for w in itertools.product("AB", repeat=len(word))]
        assert words[target] == word
        rest = [s for t, s in enumerate(symbols[1:-1], 1) if t not in where]
        noise.update(rest)
        classes[word] += 1
        places.append(where)
    assert ends(places) == LETTERS[name, length]
    assert len(classes) == TASKS[name].outputs == 2 ** len(places[0])
    assert set(classes.values()) == {CASES // len(classes)}
    assert sorted(noise) == [0, 1, 2, 3]
    for count in noise.values():
        assert count == pytest.approx(noise.total() / 4, rel=0.05)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_permutation_asks_for_the_next_symbol_and_last_for_the_first(length):
    first, others = Counter(), Counter()
    for steps, target in by_case("permutation", length):
        symbols = symbols_of(steps)
        assert len(symbols) == length
        assert list(target) == [*symbols[1:], symbols[0]]
        first[symbols[0]] += 1
        others.update(symbols[1:])
    assert first == {0: CASES // 2, 1: CASES // 2}
    assert sorted(others) == list(range(2, 100))
    assert max(others.values()) < 1.3 * others.total() / 98


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("name", "symbols", "count"), [("memorisation-5", 2, 5), ("memorisation-20", 5, 10)]
)
def test_what_is_shown_first_is_to_be_said_last(name, symbols, count, length):
    blank, trigger = symbols, symbols + 1
    strings, shown = set(), Counter()
    for steps, target in by_case(name, length):
        read = symbols_of(steps)
        assert len(read) == length
        string = read[:count]
        blanks = [blank] * (length - 2 * count - 1)
        assert read == [*string, *blanks, trigger, *[blank] * count]
        assert list(target) == [blank] * (length - count) + string
        strings.add(tuple(string))
        shown.update(string)
    assert sorted(shown) == list(range(symbols))
    assert len(strings) > 0.9 * min(CASES, symbols**count)
    for number in shown.values():
        assert number == pytest.approx(shown.total() / symbols, rel=0.05)


def test_a_batch_of_all_five_bit_strings_has_each_once():
    task = TASKS["memorisation-5"]
    assert task.strings == 32
    steps, _, _ = draw("memorisation-5", 30, cases=task.strings)
    strings = [tuple(symbols_of(case)[:5]) for case in steps]
    assert strings == list(itertools.product((0, 1), repeat=5))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["addition", "temporal-order", "temporal-order-3"])
def test_lengths_are_uniform_from_length_to_a_tenth_more(name, length):
    steps, lengths, _ = draw(name, length)
    many = Counter(lengths.tolist())
    assert sorted(many) == list(range(length, length + length // 10))
    assert max(many.values()) < 1.5 * CASES / len(many)
    assert steps.shape[1] == sequences.longest(length) == max(many)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_says_the_shapes_of_its_sequences(name):
    task, (steps, lengths, targets) = TASKS[name], draw(name, 30)
    assert steps.shape == (CASES, lengths.max(), task.features)
    outputs = np.zeros((CASES, *targets.shape[1:], task.outputs), np.float32)
    if name in ("addition", "multiplication", "xor"):
        outputs = np.zeros_like(targets)
    assert task.loss.value(outputs, targets).shape == (CASES,)
    assert task.wrong(outputs, targets).shape == (CASES,)
    assert task.every_step == (targets.shape[1:] == (30,))
    assert task.target_steps(30) == (30 if task.every_step else 1)


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"memorisation-5"}))
def test_sequences_are_those_of_their_key(name):
    steps, other = draw(name, 30)[0], draw(name, 30, seed=1)[0]
    again = draw.__wrapped__(name, 30)[0]
    np.testing.assert_array_equal(steps, again)
    assert (steps != other).any(axis=(1, 2)).mean() > 0.9


def test_the_shortest_sequences_are_still_what_they_should_be():
    length = sequences.SHORTEST
    for name in ("addition", "multiplication", "xor"):
        for steps, _ in by_case(name, length):
            assert sorted(set(steps[:, 1])) == [-1, 0, 1]
            assert (steps[:, 1] == 1).sum() == (steps[:, 1] == -1).sum() == 2
    for name, letters in (("temporal-order", 2), ("temporal-order-3", 3)):
        for steps, _ in by_case(name, length):
            symbols = symbols_of(steps)
            assert sum(symbol in (4, 5) for symbol in symbols) == letters
            assert (symbols[0], symbols[-1]) == (7, 6)
    for name in ("memorisation-5", "memorisation-20"):
        symbols = TASKS[name].outputs - 1
        for steps, target in by_case(name, length):
            shown = [s for s in symbols_of(steps) if s < symbols]
            assert shown == [s for s in target if s < symbols]


@pytest.mark.parametrize("name", ["addition", "multiplication"])
def test_a_real_answer_may_be_off_by_4_hundredths(name):
    outputs = np.array([[0.539], [0.461], [0.541], [0.459], [np.nan]], np.float32)
    wrong = TASKS[name].wrong(outputs, np.full((5, 1), 0.5, np.float32))
    assert wrong.tolist() == [False, False, True, True, True]


def test_exclusive_or_is_judged_by_the_sign():
    outputs = np.array([[0.1], [-0.1], [0.1], [-0.1]], np.float32)
    targets = np.array([[1], [0], [0], [1]], np.float32)
    assert TASKS["xor"].wrong(outputs, targets).tolist() == [False, False, True, True]


def test_temporal_order_is_judged_by_the_largest_output():
    outputs = np.array([[0.0, 3.0, 1.0, 2.0], [5.0, 1.0, 2.0, 3.0]], np.float32)
    wrong = TASKS["temporal-order"].wrong(outputs, np.array([1, 3]))
    assert wrong.tolist() == [False, True]


def steps_right(pattern):
    """Make outputs of three classes that are right where the pattern has a one."""
    targets = np.zeros((1, len(pattern)), int)
    outputs = np.array([[[1.0, 0, 0] if right else [0, 1.0, 0] for right in pattern]])
    return outputs.astype(np.float32), targets


@pytest.mark.parametrize(
    ("name", "pattern", "wrong"),
    [
        ("permutation", [0, 0, 1], False),
        ("permutation", [1, 1, 0], True),
        ("memorisation-5", [1, 1, 1], False),
        ("memorisation-5", [0, 1, 1], True),
        ("memorisation-20", [1, 0, 1], True),
    ],
)
def test_a_permutation_is_judged_by_its_last_step_memory_by_all(name, pattern, wrong):
    assert TASKS[name].wrong(*steps_right(pattern)).tolist() == [wrong]
