"""Runs that were stopped or killed go on where they were, and end as undisturbed ones."""

import functools
import itertools
import json
import os
import pathlib
import random
import subprocess
import sys
import time

import jax
import pytest

from benchmarks import first_order, optimizers
from benchmarks.harness import machine, race
from benchmarks.harness.checkpoint import Checkpoints, digest
from benchmarks.harness.history import Plan, read
from benchmarks.harness.machine import Taken
from benchmarks.harness.race import Course
from benchmarks.suites import images, problem, sequences
from benchmarks.suites.curves import curves

ROOT = pathlib.Path(__file__).parents[2]
UPDATES, STOPPED = 7, 4


@pytest.fixture
def as_users_run_it(monkeypatch):
    """Float32 and JAX's own defaults; an update is a second, a turn, and a checkpoint."""
    jax.config.update("jax_disable_most_optimizations", True)  # Compiling is the cost.
    monkeypatch.setattr(problem, "MINIBATCH", 8)  # An epoch has five of them.
    monkeypatch.setattr(first_order, "_STEP_SECONDS", 0.0)  # A step is an update.
    monkeypatch.setattr(Checkpoints, "_is_time", lambda self: True)
    monkeypatch.setattr(machine, "probe", lambda: 0.25)
    monkeypatch.setattr(machine, "CLOCKS", dict(machine.CLOCKS))
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def autoencoder():
    return images.reconstruction("Curves", curves(40), (784, 5), parts=4)


def addition():
    return sequences.drawn("addition", 30, 24)


def go(racer, params, folder, carries):
    """Run through checkpoints to the end, noting every carry's digest."""

    def step(carry):
        carry = racer.step(carry)
        carries[int(carry.updates)] = digest(carry)
        return carry

    plan = Plan("p", 0, "racer", None)
    course = Course(
        params=params,
        measure=lambda params, updates: (float(sum_of(params)), float(updates)),
        pause=0.0,
        seconds=float(UPDATES),
        turn=1.0,
        clock="wall",
        startup=Taken(),
        goal=-1.0,
        settings={},
        recorded={},
        folder=folder,
    )
    machine.CLOCKS["wall"] = functools.partial(next, itertools.count(0.0))
    race.go([(plan, lambda: racer._replace(step=step))], course, lambda _: None)
    return read(plan.file(folder)).run


def sum_of(params):
    return sum(abs(leaf).sum() for leaf in jax.tree.leaves(params))


class Stopped(BaseException):
    """What a kill is to a process."""


@pytest.mark.parametrize(
    ("build", "make"),
    [
        (optimizers.martens2010, autoencoder),
        (optimizers.adam, autoencoder),
        (optimizers.lbfgs, autoencoder),
        (optimizers.sutskever2011, addition),
    ],
    ids=["hf", "adam", "lbfgs", "recurrent"],
)
def test_a_stopped_racer_ends_as_an_undisturbed_one(
    build, make, as_users_run_it, tmp_path
):
    its = make()
    params = jax.jit(its.start)(jax.random.key(0))
    racer = build(its, params, 0)
    racer = racer if isinstance(racer, race.Racer) else racer(1e-2)
    racer = racer._replace(compiling=Taken())
    whole, stopped, rest = {}, {}, {}
    undisturbed = go(racer, params, tmp_path / "whole", whole)

    def dies(carry):
        if carry.updates == STOPPED:
            raise Stopped
        return racer.step(carry)

    with pytest.raises(Stopped):
        go(racer._replace(step=dies), params, tmp_path / "stopped", stopped)
    resumed = go(racer, params, tmp_path / "stopped", rest)
    assert list(whole) == list(range(1, UPDATES + 1))
    assert list(rest) == list(range(STOPPED + 1, UPDATES + 1))  # Nothing twice.
    assert stopped | rest == whole
    assert resumed == undisturbed
    assert [row.seconds for row in resumed.rows] == list(range(UPDATES + 1))


def launch(folder, words):
    """Start a process that keeps what it compiles, so that it starts again soon."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CHECKPOINT_FOLDER": str(folder),
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "MPLBACKEND": "agg",
    }
    return subprocess.Popen(
        [sys.executable, "-u", *words, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def lines_of(process):
    """Return the lines that a process prints, and its exit status."""
    lines = list(process.stdout)
    return lines, process.wait()


def is_writing(folder):
    folders = (name for _, names, _ in os.walk(folder) for name in names)
    return any(".orbax-checkpoint-tmp" in name for name in folders)


def kill_often(folder, words, kills):
    """Kill a process so many times, and then let it come to its end.

    A random time goes before each kill, which begins when the process trains. Every
    other kill waits for a half-written checkpoint.
    """
    moments, mid_write = random.Random(0), 0
    for kill in range(kills):
        with launch(folder, words) as process:
            trains = next((line for line in process.stdout if "update" in line), None)
            assert trains, "it ended before it was killed"
            time.sleep(moments.uniform(0, 0.3))
            end = time.monotonic() + 60
            while kill % 2 and not is_writing(folder) and time.monotonic() < end:
                assert process.poll() is None, "it ended before it was killed"
                time.sleep(0.001)
            process.kill()
        mid_write += is_writing(folder)
    with launch(folder, words) as process:
        lines, status = lines_of(process)
    assert status == 0
    return lines, mid_write


def rows_of(folder):
    """Return of each update what was measured after it, and what it did."""
    (file,) = (folder / "runs").glob("*.json")
    document = json.loads(file.read_text())
    assert document["finished"]
    run = document["run"]
    its = [(row["updates"], row["loss"], row["cg_iterations"]) for row in run["rows"]]
    assert [updates for updates, *_ in its] == list(range(len(its)))
    return list(zip(its[1:], run["scalars"], strict=True))


def test_a_command_that_was_killed_makes_the_same_updates(tmp_path):
    words = [str(pathlib.Path(__file__).parent / "killed_run.py")]
    with launch(tmp_path / "whole", words) as process:
        _, status = lines_of(process)
    assert status == 0
    _, mid_write = kill_often(tmp_path / "killed", words, kills=2)
    assert mid_write > 0
    whole, killed = (rows_of(tmp_path / name) for name in ("whole", "killed"))
    # The clock decides when a run ends, so one of the two may go farther.
    both = min(len(whole), len(killed))
    assert both > 10
    assert killed[:both] == whole[:both]


def test_the_notebook_of_checkpoints_survives_kills(tmp_path):
    words = ["notebooks/10_checkpoints.py"]
    with launch(tmp_path / "whole", words) as process:
        whole, status = lines_of(process)
    assert status == 0
    killed, _ = kill_often(tmp_path / "killed", words, kills=2)
    assert killed[-1] == whole[-1]
