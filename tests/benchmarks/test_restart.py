"""Runs that were killed go on where they were, and end as if they had not been."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

import hfjax
from benchmarks import autoencoder, batches, data, network, race, racers, restart
from benchmarks import rnn_training as training
from benchmarks.__main__ import main
from benchmarks.checkpoint import Checkpoints, digest
from benchmarks.history import Row, Run
from benchmarks.race import Limits
from benchmarks.rnn_training import Sizes

SETTINGS = {"cases": 40, "rate": 0.1, "layers": (784, 5)}
UPDATES, STOPPED = 7, 4


@pytest.fixture
def as_users_run_it(monkeypatch):
    """Float32 and JAX's own defaults; a row and a checkpoint after every step."""
    jax.config.update("jax_disable_most_optimizations", True)  # Compiling is the cost.
    monkeypatch.setattr(race, "_PAUSE", 0.0)
    monkeypatch.setattr(Checkpoints, "_is_time", lambda self: True)
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def start():
    images = jnp.asarray(data.curves(40, 1).train)
    init, model_fn = network.autoencoder((784, 5))
    loss = hfjax.losses.sigmoid_cross_entropy()
    objective = hfjax.Objective(model_fn, loss, weight_decay=1e-5)
    return objective, (images, images), init(jax.random.key(0))


@functools.cache
def hf():
    objective, batch, params = start()
    return racers.hf(objective, batch, params, curvature_batches=4), params


def adam():
    objective, batch, params = start()
    adam = racers.first_order("adam", optax.adam, objective, batch, params)
    return adam(1e-2), params


@functools.cache
def lbfgs():
    objective, batch, params = start()
    return racers.lbfgs(objective, batch, params), params


def recurrent_hf():
    problem = training.build("addition", 30, seed=0)
    sizes = Sizes(gradient=24, curvature=12)
    racer = training.hf(problem, sizes=sizes, structural=0.03, max_iterations=5)
    return racer, problem.params


def measure(moment, params):
    norm = float(optax.tree.norm(params))
    return Row(*moment, norm, norm, norm)


def go(racer, params, updates, folder, carries):
    """Run through checkpoints up to so many updates, noting every carry's digest."""
    run = Run("racer", racer.family, 0.0)

    def step(carry):
        carry = racer.step(carry)
        carries[int(carry.updates)] = digest(carry)
        return carry

    with Checkpoints(folder, SETTINGS, Row) as checkpoints:
        race.race_on(
            lambda: racer._replace(step=step),
            params,
            measure,
            Limits(updates=updates),
            run,
            lambda seconds: None,
            checkpoints,
        )
    return run


def test_seconds_are_those_of_the_clock_that_is_given():
    ticks = iter(range(100))
    racer = racers.Racer(
        "racer",
        "hf",
        init=lambda params: racers.Carry(params, None, racers.zero_updates()),
        step=lambda carry: carry._replace(updates=carry.updates + 1),
        read=lambda carry: {"cg_iterations": 0},
        compile_seconds=0.0,
    )
    run = Run("racer", "hf", 0.0)
    # Two readings a step, one apart: a second each.
    race.race(
        racer,
        {"w": jnp.ones(2)},
        measure,
        Limits(seconds=3.0),
        run,
        lambda seconds: None,
        clock=lambda: float(next(ticks)),
    )
    assert [row.seconds for row in run.rows] == [0.0, 1.0, 2.0, 3.0]


class Stopped(BaseException):
    """What a kill is to a process."""


@pytest.mark.parametrize(
    "build", [hf, adam, lbfgs, recurrent_hf], ids=["hf", "adam", "lbfgs", "recurrent"]
)
def test_a_stopped_racer_ends_as_an_undisturbed_one(
    build, as_users_run_it, tmp_path, monkeypatch
):
    monkeypatch.setattr(batches, "MINIBATCH", 8)  # An epoch has five of them.
    monkeypatch.setattr(racers, "_STEP_SECONDS", 0.0)  # A step is an update.
    racer, params = build()
    whole, stopped, rest = {}, {}, {}
    undisturbed = go(racer, params, UPDATES, tmp_path / "whole", whole)

    def dies(carry):
        if carry.updates == STOPPED:
            raise Stopped
        return racer.step(carry)

    with pytest.raises(Stopped):
        go(racer._replace(step=dies), params, UPDATES, tmp_path / "stopped", stopped)
    resumed = go(racer, params, UPDATES, tmp_path / "stopped", rest)
    assert list(rest) == list(range(STOPPED + 1, UPDATES + 1))  # Nothing twice.
    assert stopped | rest == whole
    assert digest(resumed.params) == digest(undisturbed.params)
    assert resumed.scalars == undisturbed.scalars
    for row, other in zip(resumed.rows, undisturbed.rows, strict=True):
        assert row._replace(seconds=0.0) == other._replace(seconds=0.0)
    seconds = [row.seconds for row in resumed.rows]
    assert seconds == sorted(seconds)
    assert resumed.seconds == seconds[-1] > 0

    def must_not_be_built():
        pytest.fail("what has ended was compiled again")

    again = Run("racer", racer.family, 0.0)
    with Checkpoints(tmp_path / "stopped", SETTINGS, Row) as checkpoints:
        race.race_on(
            must_not_be_built, params, None, Limits(), again, None, checkpoints
        )
    assert again.rows == resumed.rows
    assert digest(again.params) == digest(resumed.params)


TINY = ("autoencoder", "--cases", "40", "--layers", "784,5", "--curvature-batches", "4")


def history(folder):
    return json.loads((folder / "history.json").read_text())


def test_the_same_command_goes_on_and_another_is_refused(
    as_users_run_it, tmp_path, monkeypatch, capsys
):
    compiled, rival_compiled = hf()[0], lbfgs()[0]
    monkeypatch.setattr(racers, "hf", lambda *_, **__: compiled)
    monkeypatch.setattr(racers, "lbfgs", lambda *_, **__: rival_compiled)
    monkeypatch.setattr(autoencoder.report, "draw", lambda *_: [])
    options = ("--optimizers", "hf,lbfgs", "--updates", "3")
    command = [*TINY, *options, "--out", str(tmp_path)]

    def interrupted(self, run, seconds, **_):
        if (run.name, run.last.updates) in stops:
            raise KeyboardInterrupt

    monkeypatch.setattr(autoencoder.Live, "show", interrupted)
    stops = {("hf", 3)}
    assert main(command) == 130
    assert "The same command goes on from here" in capsys.readouterr().out
    first = history(tmp_path)["runs"][0]["rows"]
    stops = {("lbfgs", 2)}
    assert main(command) == 130
    hf_run, rival = history(tmp_path)["runs"]
    assert hf_run["rows"][:3] == first[:3]  # Seconds too: they were not run again.
    assert main([*command, "--seed", "1"]) == 2
    message = capsys.readouterr().err
    assert "with seed 0, not 1: choose another --out" in message
    assert message.count("\n") == 1
    assert len(history(tmp_path)["runs"]) == 2
    stops = set()
    assert main(command) == 0
    ended = history(tmp_path)["runs"]
    assert ended[0] == hf_run
    assert ended[1]["rows"][:2] == rival["rows"][:2]
    assert not (tmp_path / "checkpoints").exists()
    assert main([*command, "--seed", "1", "--optimizers", "hf"]) == 0


PROGRAM = """
import pathlib, shutil, sys, time
folder = pathlib.Path(sys.argv[1])
count = folder / "count"
done = int(count.read_text()) if count.exists() else 0
part = folder / "3.orbax-checkpoint-tmp"
shutil.rmtree(part, ignore_errors=True)
print("compiling", flush=True)
while True:
    print("update", done, flush=True)
    if done == 40:
        break
    time.sleep(0.02)
    done += 1
    if done % 2 == 0:
        part.mkdir()
        time.sleep(0.08)
        part.rmdir()
        count.write_text(str(done))
"""


def test_kills_are_counted_and_half_of_them_hit_a_write(tmp_path):
    def start():
        command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    kills = restart.kill_often(start, tmp_path, kills=6, mean_life=0.05, seed=0)
    assert kills.kills == 6
    assert 3 <= kills.mid_write <= 6
    assert kills.redone > 0
    assert (tmp_path / "count").read_text() == "40"


def test_a_program_that_fails_is_no_kill(tmp_path):
    def start():
        command = [sys.executable, "-c", "print('update 0'); raise SystemExit(3)"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    with pytest.raises(RuntimeError, match="status 3"):
        restart.kill_often(start, tmp_path, kills=0, mean_life=0.0, seed=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"params": {"x": jnp.float32(1 + 2**-23)}}, ["parameters"]),
        ({"rows": [Row(9.0, 1, 2, 3.0, 4.0, 5.0)]}, []),
        ({"rows": [Row(0.0, 1, 2, 3.5, 4.0, 5.0)]}, ["history"]),
        (
            {"scalars": [{"all": "a", "cases": [2, 1]}]},
            ["order of the data", "history"],
        ),
    ],
)
def test_runs_are_compared_bit_for_bit_but_for_seconds(change, words):
    run = Run("hf", "hf", 0.0)
    run.rows, run.params = [Row(0.0, 1, 2, 3.0, 4.0, 5.0)], {"x": jnp.float32(1)}
    run.scalars = [{"all": "a", "cases": [1, 2]}]
    other = Run("hf", "hf", 7.0)
    vars(other).update({**vars(run), **change})
    assert restart.differences(run, other) == words
