"""The suite of sequences: definitions, read off the inputs by slow loops; the command."""

import functools
import itertools
import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.harness.race import Carry
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.suites import problem, sequences, tasks
from benchmarks.suites.tasks import TASKS

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
    assert steps.shape[1] == tasks.longest(length) == max(many)


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
    length = tasks.SHORTEST
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


def by_hand(params, steps):
    """Run one sequence through the network in float64: states and outputs."""
    params = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    h, hidden = params["start"], []
    for x in steps:
        h = np.tanh(h @ params["recurrent"] + x @ params["input"])
        hidden.append(h)
    return np.stack(hidden), np.stack(hidden) @ params["output"]


@pytest.mark.parametrize("name", ["addition", "memorisation-5"])
def test_the_network_reads_each_sequence_to_its_own_end(name):
    task = TASKS[name]
    network = sequences.recurrent_network(task, units=20)
    params = network.init(jax.random.key(0))
    inputs, _ = task.generate(jax.random.key(1), 6, 30)
    beyond = jnp.arange(inputs.steps.shape[1]) >= inputs.lengths[:, None]
    noisy = inputs._replace(steps=inputs.steps + 9.0 * beyond[:, :, None])
    outputs, hidden = network.with_hidden(params, noisy)
    assert outputs.dtype == np.float32
    np.testing.assert_array_equal(network.model_fn(params, inputs), outputs)
    for case, own in enumerate(inputs.lengths):
        states, answers = by_hand(params, inputs.steps[case, :own])
        answer = answers if task.every_step else answers[-1]
        np.testing.assert_allclose(outputs[case], answer, atol=1e-5)
        np.testing.assert_allclose(hidden[case, :own], states, atol=1e-5)
        assert not hidden[case, own:].any()
    assert task.every_step or len(set(inputs.lengths.tolist())) > 1


def test_a_unit_starts_with_fifteen_weights_and_small_ones_from_the_inputs():
    network = sequences.recurrent_network(TASKS["permutation"])
    params = network.init(jax.random.key(0))
    for name, scale in (("recurrent", 1.0), ("output", 1.0), ("input", 0.25)):
        kernel = np.asarray(params[name])
        assert kernel.shape == (100, 100)
        assert ((kernel != 0).sum(axis=0) == 15).all()
        deviation = kernel[kernel != 0].std() * 15**0.5
        assert deviation == pytest.approx(scale, rel=0.1)
    start = np.asarray(params["start"])
    assert start.shape == (100,)
    assert start.std() * 15**0.5 == pytest.approx(1.0, rel=0.25)
    assert sum(leaf.size for leaf in params.values()) == 30_100


@pytest.mark.parametrize(
    ("name", "outputs", "steps"),
    [("temporal-order", 8, 1), ("memorisation-5", 2 * 5 * 30, 30)],
)
def test_the_start_is_sutskevers_on_the_scale_of_our_loss(name, outputs, steps):
    # His loss is a mean over target steps, ours a sum: λ and weight decay grow with it.
    task = sequences.drawn(name, 30)
    for objective in (task.objective, task.hidden):
        assert objective.weight_decay == pytest.approx(2e-5 * steps)
    assert task.damping == pytest.approx(0.01 * outputs * steps)


def test_an_update_of_hf_takes_curvature_and_evaluation_from_the_gradients_data():
    addition = sequences.drawn("addition", 30, 24)
    key = addition.data(3)
    for updates in (0, 5):
        everything, _ = addition.batch(key, Carry(None, None, jnp.int32(updates)))
        drawn = jax.random.fold_in(key, updates)
        inputs, targets = TASKS["addition"].generate(drawn, 24, 30)
        handed = problem.guarded(addition.parts)(everything, jnp.int32(updates))
        own = 6 * (updates % 4)
        other = 6 * ((updates + 1) % 4)
        for part, where in zip(
            handed,
            [slice(0, 24), slice(own, own + 6), slice(other, other + 6)],
            strict=True,
        ):
            np.testing.assert_array_equal(part[0].steps, inputs.steps[where])
            np.testing.assert_array_equal(part[0].lengths, inputs.lengths[where])
            np.testing.assert_array_equal(part[1], targets[where])


def test_five_bits_are_learned_from_all_strings_at_once():
    bits = sequences.drawn("memorisation-5", 30)
    assert bits.parts == 1
    (inputs, _), _ = bits.batch(bits.data(0), Carry(None, None, jnp.int32(0)))
    assert len(np.unique(np.asarray(inputs.steps), axis=0)) == len(inputs.steps) == 32


def test_measuring_counts_wrong_answers_on_other_sequences_each_time(monkeypatch):
    monkeypatch.setattr(sequences, "TEST_CASES", 200)
    monkeypatch.setattr(sequences, "_TEST_PART", 100)
    addition = sequences.drawn("addition", 30)
    start, _, test_key = jax.random.split(jax.random.key(4), 3)
    params = addition.start(jax.random.key(4))
    network = sequences.recurrent_network(TASKS["addition"])
    jax.tree.map(np.testing.assert_array_equal, params, network.init(start))
    measure = addition.measurer(params, 4)
    loss, value = measure(params, 2)
    keys = jax.random.split(jax.random.fold_in(test_key, 2), 2)
    wrong, losses = [], []
    for key in keys:
        inputs, targets = TASKS["addition"].generate(key, 100, 30)
        for case, own in enumerate(inputs.lengths):
            _, answers = by_hand(params, inputs.steps[case, :own])
            error = answers[-1, 0] - targets[case, 0]
            wrong.append(abs(error) > 0.04)
            losses.append(0.5 * error**2)
    assert value == pytest.approx(np.mean(wrong))
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert measure(params, 3)[0] != loss


def test_the_best_constant_answers_the_additions_as_its_milestone_says():
    fixed = sequences.SUITE.problems["addition-30-fixed"].build("")
    targets = np.asarray(fixed.data(0)[1], np.float64)
    assert targets.var() / 2 == pytest.approx(0.083, rel=0.03)
    assert fixed.summary.milestones["0.08"] < targets.var() / 2


def test_the_command_trains_until_the_answers_are_right(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sequences, "TEST_CASES", 20)
    monkeypatch.setattr(sequences, "_TEST_PART", 20)
    tiny = problem.Kind("tiny", lambda data_dir: sequences.drawn("addition", 30, 12))
    monkeypatch.setitem(sequences.SUITE.problems, "tiny", tiny)
    names = ["sutskever2011", "sutskever2011-without", "adam"]
    words = ("--problem", "tiny", "--optimizers", ",".join([*names, "kfac"]))
    command = ["compare", "--suite", "sequences", *words, "--seconds", "0.2"]
    jax.config.update("jax_disable_most_optimizations", True)  # Compiling is the cost.
    try:
        assert main([*command, "--out", str(tmp_path)]) == 0
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    (found,) = json.loads((tmp_path / "compare.json").read_text())["problems"]
    assert [line["optimizer"] for line in found["lines"]] == names
    runs = {run["optimizer"]: run["rows"] for run in found["runs"]}
    ours, without, adam = (runs[name] for name in names)
    assert all(0 <= row["value"] <= 1 for row in adam)
    # The same start, but other updates.
    assert ours[0]["loss"] == without[0]["loss"] == adam[0]["loss"]
    assert ours[1]["loss"] != without[1]["loss"]
    assert found["goal"] == 0.01
    assert "fraction of wrong answers" in capsys.readouterr().out
    assert "recurrent" in OPTIMIZERS["sutskever2011"].unfit(sequences.fixed(20))
