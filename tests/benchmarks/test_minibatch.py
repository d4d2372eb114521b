"""The suite of minibatches: who sees which examples, and the tables by their number."""

import dataclasses
import hashlib
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import benchmarks.suites
from benchmarks import cli, peers
from benchmarks.__main__ import main
from benchmarks.harness.history import Plan, Row, Run, RunFile
from benchmarks.harness.race import Carry
from benchmarks.suites import classifier, minibatch, minibatch_networks, mnist

KINDS = ("digits", "cnn", "text", "addition")
TRAINING, TEST = 60, 40


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """Float32 and JAX's own defaults."""
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def _small(monkeypatch):
    """Few digits, of which those for the test are white, and a short text."""
    rng = np.random.default_rng(0)
    cases = {"train": TRAINING, "test": TEST}
    pixels = {"train": rng.random((TRAINING, 784)) / 2, "test": np.ones((TEST, 784))}
    monkeypatch.setattr(
        mnist, "images", lambda _, part="train": pixels[part].astype(np.float32)
    )
    monkeypatch.setattr(
        mnist, "labels", lambda _, part="train": np.arange(cases[part]) % 10
    )
    monkeypatch.setattr(minibatch, "_CHARACTERS", 5_000)
    monkeypatch.setattr(minibatch, "WINDOWS", 16)
    for name, number in {"_CHUNK": 20, "_TEXT_CHUNK": 8, "_MEASURED": 40}.items():
        monkeypatch.setattr(minibatch, name, number)


def built(name):
    return minibatch.SUITE.problems[name].build("")


def carry_at(updates):
    return Carry((), (), jnp.int32(updates))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("_small")
def test_all_optimizers_get_the_same_batches_which_differ_between_updates(kind):
    problem = built(f"{kind}-64")
    data = problem.data(3)
    batches = [problem.batch(data, carry_at(n))[0] for n in (0, 1)]
    for n, batch in enumerate(batches):
        theirs, kept = problem.minibatches.draw(
            data, carry_at(n), jax.random.key(n + 50)
        )
        jax.tree.map(np.testing.assert_array_equal, batch, theirs)
        assert kept is None
        assert {len(leaf) for leaf in jax.tree.leaves(batch)} == {64}
    first, second = (np.asarray(jax.tree.leaves(batch)[0]) for batch in batches)
    assert np.any(first != second)
    other, _ = problem.batch(problem.data(4), carry_at(0))
    assert np.any(first != np.asarray(jax.tree.leaves(other)[0]))


@pytest.mark.usefixtures("_small")
def test_digits_are_drawn_from_the_training_ones_and_judged_by_the_others():
    examples = minibatch.read_digits("")
    images, labels = examples.held_out
    assert np.all(images == 1)
    np.testing.assert_array_equal(labels, np.arange(TEST) % 10)
    np.testing.assert_array_equal(examples.measured[0], examples.training[0][:40])
    problem = built("digits-256")
    training, seen = np.asarray(examples.training[0]), set()
    for n in range(4):
        pixels, digits = map(np.asarray, problem.batch(problem.data(0), carry_at(n))[0])
        for image, digit in zip(pixels, digits, strict=True):
            (place,) = np.flatnonzero(np.all(training == image, axis=1))
            assert digit == place % 10
            seen.add(int(place))
    assert seen == set(range(TRAINING))


@pytest.mark.usefixtures("_small")
def test_windows_of_text_come_from_parts_that_do_not_meet(monkeypatch):
    monkeypatch.setattr(minibatch, "library", lambda: b"a" * 900 + b"z" * 100)
    a, z = minibatch.encoded(b"az")
    examples, problem = minibatch.read_text(), built("text-64")
    assert all(np.all(x == z) for x in examples.held_out)
    drawn = problem.batch(problem.data(0), carry_at(0))[0]
    for inputs, targets in (examples.measured, drawn):
        assert np.all(inputs == a)
        assert np.all(targets == a)
    assert len(examples.training) == 900


def test_a_window_may_begin_at_every_place_and_asks_for_the_next_symbol():
    symbols = jnp.arange(67, dtype=jnp.uint8)
    inputs, targets = minibatch._windows_of(symbols, jax.random.key(0), 50)
    assert set(inputs[:, 0].tolist()) == {0, 1, 2}
    np.testing.assert_array_equal(targets, inputs + 1)
    inputs, targets = minibatch.spread_windows(symbols)
    assert (int(inputs[0, 0]), int(targets[-1, -1])) == (0, 66)


def test_symbols_are_those_that_can_be_printed_and_the_newline():
    codes = minibatch.encoded(" ~\t\r\né\x00A".encode())
    np.testing.assert_array_equal(codes, [0, 94, 95, ord("A") - 32])
    source = minibatch.library()
    assert b"class OrderedDict" not in source[:1000]
    symbols = minibatch.encoded(source)
    assert len(symbols) > 2_000_000
    assert set(np.unique(symbols)) <= set(range(minibatch.SYMBOLS))


@pytest.mark.parametrize(
    ("kind", "least", "most", "chance"),
    [
        ("digits", 89_610, 89_610, None),
        ("cnn", 60_000, 110_000, math.log(10)),
        ("text", 1_000_000, 3_000_000, math.log(minibatch.SYMBOLS)),
        ("addition", 10_400, 10_400, None),
    ],
)
@pytest.mark.usefixtures("_small")
def test_a_start_is_about_as_good_as_chance(kind, least, most, chance):
    problem = built(f"{kind}-64")
    params = problem.start(jax.random.key(0))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert least <= size <= most
    f, value = problem.measurer(params, 0)(params, 0)
    if chance is not None:
        assert 0.9 < f / chance < 1.4
    if kind == "text":
        assert 0.9 < value / chance < 1.4
    else:
        assert 0.7 < value <= 1
    milestones = list(problem.summary.milestones.values())
    assert milestones == sorted(milestones, reverse=True)
    assert milestones[0] < value
    assert problem.summary.goal == -math.inf


@pytest.mark.usefixtures("_small")
def test_f_is_of_training_digits_and_the_value_counts_wrong_test_digits():
    problem = built("digits-64")
    params = problem.start(jax.random.key(0))
    f, value = problem.measurer(params, 0)(params, 0)
    examples = minibatch.read_digits("")

    def logits(x):
        x = np.asarray(x, np.float64)
        for layer in params[:-1]:
            x = np.tanh(x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"]))
        return x @ np.asarray(params[-1]["kernel"]) + np.asarray(params[-1]["bias"])

    z, labels = logits(examples.measured[0]), np.asarray(examples.measured[1])
    losses = np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), labels]
    assert f == pytest.approx(losses.mean(), rel=1e-5)
    guesses = logits(examples.held_out[0]).argmax(axis=1)
    assert value == pytest.approx(np.mean(guesses != np.arange(TEST) % 10))


@pytest.mark.usefixtures("_small")
def test_text_is_measured_in_nats_a_symbol():
    problem, examples = built("text-64"), minibatch.read_text()
    params = problem.start(jax.random.key(0))
    found = problem.measurer(params, 0)(params, 0)
    for number, (inputs, targets) in zip(
        found, (examples.measured, examples.held_out), strict=True
    ):
        logits = problem.objective.model_fn(params, inputs)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
        assert number == pytest.approx(float(jnp.mean(losses)), rel=1e-5)
        value = problem.objective.value(params, (inputs, targets))
        assert number == pytest.approx(float(value), rel=1e-5)


@pytest.mark.usefixtures("_small")
def test_other_packages_are_given_what_they_can_solve():
    assert peers.unfit_for_kfac(built("digits-64")) is None
    assert "blocks" in peers.unfit_for_kfac(built("cnn-64"))
    assert "blocks" in peers.unfit_for_kfac(built("addition-64"))
    assert "stay the same" in peers.unfit_for_somax(built("digits-64"))


@pytest.mark.filterwarnings("ignore")  # Other packages have theirs.
@pytest.mark.usefixtures("_small")
def test_kfac_draws_its_examples_and_others_for_its_burn_in():
    pytest.importorskip("kfac_jax")
    original, drawn = built("digits-64"), []

    def redraw(data, carry):
        jax.debug.callback(lambda n: drawn.append(int(n)), carry.updates)
        return original.redraw(data, carry)

    problem = dataclasses.replace(original, redraw=redraw)
    params = problem.start(jax.random.key(0))
    racer = peers.kfac(problem, params, 0)
    jax.effects_barrier()
    drawn.clear()
    carry = racer.init(params)
    for _ in range(3):
        carry = racer.step(carry)
    jax.effects_barrier()
    assert sorted(drawn) == [-5, -4, -3, -2, -1, 0, 0, 1, 2]
    assert int(carry.updates) == 3


@pytest.fixture
def arrays_of_a_file(tmp_path, monkeypatch):
    """A small file that counts as MNIST's."""
    rng = np.random.default_rng(0)
    cases, arrays = {"train": 6, "test": 4}, {}
    for part, count in cases.items():
        arrays[f"x_{part}"] = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        arrays[f"y_{part}"] = rng.integers(10, size=count, dtype=np.uint8)
    digests = {k: hashlib.sha256(x.tobytes()).hexdigest() for k, x in arrays.items()}
    np.savez(tmp_path / "mnist.npz", **arrays)
    monkeypatch.setattr(mnist, "_CASES", cases)
    monkeypatch.setattr(mnist, "_SHA256", digests)
    return arrays


def test_test_digits_are_read_beside_the_training_ones(arrays_of_a_file, tmp_path):
    for part, options in (("train", ()), ("train", ("train",)), ("test", ("test",))):
        pixels = arrays_of_a_file[f"x_{part}"].reshape(-1, 784) / 255
        images = mnist.images(tmp_path, *options)
        np.testing.assert_allclose(images, pixels, rtol=1e-6)
        labels = mnist.labels(tmp_path, *options)
        np.testing.assert_array_equal(labels, arrays_of_a_file[f"y_{part}"])


def test_test_digits_that_are_not_those_of_mnist_are_an_error(tmp_path):
    zeros = np.zeros((10_000, 28, 28), np.uint8)
    np.savez(tmp_path / "mnist.npz", x_test=zeros, y_test=zeros[:60, 0, 0])
    with pytest.raises(ValueError, match=r"values of x_test have sha256"):
        mnist.images(tmp_path, "test")
    with pytest.raises(ValueError, match=r"y_test is uint8\[60\], not uint8\[10000\]"):
        mnist.labels(tmp_path, "test")


def test_digits_are_skipped_where_mnist_is_not(tmp_path, capsys):
    words = ("--problem", "digits-64,cnn-64", "--data-dir", str(tmp_path))
    assert main(["compare", "--suite", "minibatch", *words]) == 2
    message = capsys.readouterr().err
    assert "nothing is left to run: digits-64: no " in message
    assert "; cnn-64: no " in message


def test_without_flax_the_suite_says_what_to_install(monkeypatch):
    name = minibatch_networks.__name__
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(benchmarks.suites, name.rpartition(".")[2])
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(cli.RefusedError, match=r"pip install 'hfjax\[flax\]'"):
        built("text-64")


@pytest.mark.usefixtures("_small")
def test_the_command_trains_and_its_runs_become_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classifier, "SIZES", (784, 5, 10))
    words = ("--problem", "digits-64", "--optimizers", "adam,lbfgs")
    # A file that is never read: the digits are made up.
    (tmp_path / "mnist.npz").write_bytes(b"")
    folder = ("--data-dir", str(tmp_path), "--out", str(tmp_path))
    command = ["compare", "--suite", "minibatch", *words, *folder, "--seconds", "0.1"]
    jax.config.update("jax_disable_most_optimizations", True)  # Compiling is the cost.
    try:
        assert main(command) == 0
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    capsys.readouterr()
    assert main(["batches", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| batch | adam | lbfgs |") == 4
    assert printed.count("\n| 64 | ") == 4


def ended(folder, problem, optimizer, rate, *rows, suite="minibatch", seed=0):
    """Make up a run: `rows` are (seconds, updates, f, value)."""
    its = [Row(s, n, 0, f, value, 1.0) for s, n, f, value in rows]
    plan = Plan(problem, seed, optimizer, rate)
    RunFile(plan, {"suite": suite}, True, Run(its)).save(folder)


def test_the_tables_of_batches_have_the_numbers_of_a_hand_computation(tmp_path, capsys):
    adam = ((0, 0, 8.0, 0.9), (2, 200, 4.0, 0.3), (4, 400, 5.0, 0.4))
    ended(tmp_path, "digits-64", "adam", 0.01, *adam)
    ended(tmp_path, "digits-64", "adam", 0.001, (0, 0, 8.0, 0.9), (4, 800, 1.0, 0.5))
    ended(tmp_path, "digits-64", "hfjax", None, (0, 0, 8.0, 0.9), (5, 10, 1.0, 0.2))
    ended(tmp_path, "digits-1024", "hfjax", None, (0, 0, 8.0, 0.9), (5, 5, 2.0, 0.1))
    diverged = (1, 10, math.nan, math.nan)
    ended(tmp_path, "digits-1024", "lbfgs", None, (0, 0, 8.0, 0.9), diverged)
    ended(tmp_path, "text-256", "hfjax", None, (0, 0, 8.0, 5.0), (5, 5, 2.0, 3.0))
    ended(tmp_path, "digits", "hfjax", None, adam[0], suite="classifier")
    assert main(["batches", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("## Classifier of MNIST's digits") == 4
    assert printed.count("## Transformer") == 4
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    head = "| batch | hfjax | adam | lbfgs |"
    # Adam's update takes 0.01 s; in 4 s it has the gradients of 25,600 examples, in
    # 5 s of 32,000. ln 2 and ln 8 by these, in millions, are 27.1 and 65.
    assert [line for line in lines if "---" not in line][:12] == [
        head,
        "| 64 | **0.2** | 0.3 | – |",
        "| 1,024 | **0.1** | – | 0.9 |",
        head,
        "| 64 | **1** | 5 | – |",
        "| 1,024 | **2** | – | – |",
        head,
        "| 64 | 50 | **1** | – |",
        "| 1,024 | – | – | – |",
        head,
        "| 64 | **65** | 27.1 | – |",
        "| 1,024 | – | – | – |",
    ]
    assert "| 256 | **3** |" in lines


def test_a_folder_without_such_runs_is_refused(tmp_path, capsys):
    assert main(["batches", "--out", str(tmp_path)]) == 2
    assert "no runs of --suite minibatch" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x.json").write_text("{}")
    assert main(["batches", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "does not hold a run" in message
    assert message.count("\n") == 1
