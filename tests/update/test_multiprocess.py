"""Several processes, as on several hosts: the same numbers, and no end without a word."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import multiprocess_run
import numpy as np
import pytest
from jax.sharding import AxisType

from examples import multihost

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
PATIENCE = 30  # seconds of silence, after which JAX takes a process for lost
LIMIT = 200  # seconds that a busy machine may take to start and to compile


class Processes:
    """Processes of one run, whose words go into files; none outlives the context."""

    def __init__(self, folder, commands, **environment):
        folder.mkdir()
        self._folder = folder
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",  # Compiling is the cost.
            **environment,
        }
        self.all = []
        for i, command in enumerate(commands):
            with (
                self._file(i, "out").open("w") as out,
                self._file(i, "err").open("w") as err,
            ):
                started = subprocess.Popen(
                    [sys.executable, *command],
                    cwd=ROOT,
                    env=environment,
                    stdout=out,
                    stderr=err,
                )
            self.all.append(started)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.all:
            process.kill()
            process.wait()

    def _file(self, i, kind):
        return self._folder / f"{i}.{kind}"

    def said(self, i, kind="out"):
        return self._file(i, kind).read_text()

    def wait(self, seconds=LIMIT):
        """Wait for all of them to end; return their exit statuses."""
        end = time.monotonic() + seconds
        return [process.wait(end - time.monotonic()) for process in self.all]

    def last_line(self, i):
        """Return a process's last words, which come a moment after its end."""
        end = time.monotonic() + 10
        while "ended before" not in self.said(i, "err") and time.monotonic() < end:
            time.sleep(0.01)
        return self.said(i, "err").splitlines()[-1]

    def wait_for(self, words):
        """Wait until process 0 has printed these words."""
        end = time.monotonic() + LIMIT
        while words not in self.said(0):
            assert time.monotonic() < end
            assert self.all[0].poll() is None, self.said(0, "err")
            time.sleep(0.01)


def free_port():
    with socket.socket() as server:
        server.bind(("", 0))
        return f"localhost:{server.getsockname()[1]}"


@pytest.fixture(scope="module")
def one_device():
    return multiprocess_run.train(*jax.device_put(multiprocess_run.problem()))


@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_processes_change_nothing(processes, devices, one_device, tmp_path):
    port = free_port()
    files = [tmp_path / f"{i}.npz" for i in range(processes)]
    commands = [
        ["tests/multiprocess_run.py", port, str(processes), str(i), str(file)]
        for i, file in enumerate(files)
    ]
    folder = tmp_path / "said"
    environment = {"JAX_ENABLE_X64": "1", "JAX_NUM_CPU_DEVICES": str(devices)}
    with Processes(folder, commands, **environment) as run:
        assert run.wait() == [0] * processes, run.said(0, "err")
    first, *others = [dict(np.load(file)) for file in files]
    values, params = one_device
    assert values[-1] < 0.1 * values[0]
    np.testing.assert_allclose(first["values"], values, rtol=1e-12)
    error = np.linalg.norm(first["params"] - params)
    assert error < 1e-12 * np.linalg.norm(params)
    for other in others:
        for name, bits in other.items():
            np.testing.assert_array_equal(bits, first[name])


# Below, the script itself; of the two cases of the second device one is padding.
UPDATES = 12
TINY = (
    "--cases 3 --layers 8,16,1 --max-iterations 3 --save-every 2 --fsdp "
    f"--updates {UPDATES}"
).split()


def launch(folder, out):
    """Start the script in two processes of one device each."""
    common = ["examples/multihost.py", *TINY, "--out", str(out)]
    common += ["--coordinator", free_port(), "--processes", "2"]
    common += ["--patience", str(PATIENCE), "--process-id"]
    commands = [[*common, str(i)] for i in range(2)]
    return Processes(folder, commands, JAX_NUM_CPU_DEVICES="1")


def rows(printed):
    """Return what was printed of each update, by its number, without the seconds."""
    pattern = r"^update (\d+): (f .* CG iterations), [\d.]+ s$"
    found = re.findall(pattern, printed, re.MULTILINE)
    return {int(update): row for update, row in found}


def newest(out):
    """Return the number of the newest checkpoint; a kill may have left half of one."""
    names = [folder.name for folder in (out / "checkpoints").iterdir()]
    return max(int(name) for name in names if name.isdecimal())


def ended(out, capsys):
    """Restore parameters and state of a run that has ended, on four devices here."""
    with jax.enable_x64(False):
        carry = multihost.train(multihost.arguments(TINY), out)
    said = capsys.readouterr().out
    assert said.endswith(f"Going on after update {UPDATES}\n")
    kernel = carry["params"][0]["kernel"]
    assert 4 * kernel.addressable_data(0).size == kernel.size
    return jax.device_get(carry)


def test_a_run_that_loses_a_process_ends_and_the_same_command_goes_on(tmp_path, capsys):
    with launch(tmp_path / "uninterrupted", tmp_path / "whole") as run:
        assert run.wait() == [0, 0], run.said(0, "err")
    assert "2 processes, 2 devices (cpu), mesh {'cases': 2}" in run.said(0)
    assert "update" not in run.said(1)
    assert "ended before" not in run.said(0, "err") + run.said(1, "err")
    expected = rows(run.said(0))
    assert list(expected) == list(range(1, UPDATES + 1))
    out, begin = tmp_path / "out", 0
    for lost in (1, 0):
        with launch(tmp_path / f"{lost} is lost", out) as run:
            run.wait_for(f"update {begin + 3}:")
            run.all[lost].kill()
            statuses = run.wait(PATIENCE + 10)
        assert statuses[lost] == -signal.SIGKILL
        assert statuses[1 - lost] != 0
        assert run.last_line(1 - lost) == (
            f"multihost.py: process {1 - lost} of 2 ended before its "
            "time: it failed, or another process was lost. The same command on all "
            f"hosts goes on from the newest checkpoint in {out}."
        )
        done = rows(run.said(0))
        assert list(done) == list(range(begin + 1, max(done) + 1))
        assert done.items() <= expected.items()
        assert begin + 2 <= newest(out) <= max(done) < UPDATES
        begin = newest(out)
    with launch(tmp_path / "none is lost", out) as run:
        assert run.wait() == [0, 0], run.said(0, "err")
    done = rows(run.said(0))
    assert list(done) == list(range(begin + 1, UPDATES + 1))
    assert done.items() <= expected.items()
    undisturbed, carry = (ended(folder, capsys) for folder in (tmp_path / "whole", out))
    jax.tree.map(np.testing.assert_array_equal, carry, undisturbed)  # The same bits.


def test_last_words_stand_on_a_line_of_their_own_whatever_broke_off_before(tmp_path):
    script = (
        "import os, sys\n"
        "from examples.multihost import LastWords\n"
        "LastWords('a run').change('it ended before its time')\n"
        "sys.stderr.write('a line that breaks')\n"
        "sys.stderr.flush()\n"
        "os.abort()\n"
    )
    with Processes(tmp_path / "said", [["-c", script]]) as run:
        assert run.wait() == [-signal.SIGABRT]
        assert run.last_line(0) == "a run: it ended before its time"
    assert run.said(0, "err").startswith("a line that breaks\n")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--processes 2", "give all of --coordinator, --processes and --process-id"),
        ("--coordinator a --processes 2 --process-id 0", "must be HOST:PORT, got 'a'"),
        (
            "--coordinator a:1 --processes 2 --process-id 2",
            "--process-id must be from 0 to 1, got 2",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused_in_one_line(given, words, capfd):
    assert multihost.main(given.split()) == 2
    message = capfd.readouterr().err
    assert message.startswith("multihost.py: ")
    assert words in message
    assert message.count("\n") == 1


def test_every_device_has_its_share_of_the_same_examples():
    mesh = jax.make_mesh((4,), ("cases",), axis_types=(AxisType.Auto,))
    rows, weights = multihost.share_out(250, (3, 5, 2), mesh)
    blocks = [multihost.examples_from(100 * b, 100 * b + 100, (3, 2)) for b in range(3)]
    np.testing.assert_array_equal(rows[:250], np.concatenate(blocks)[:250])
    np.testing.assert_array_equal(rows[250:], 0)
    np.testing.assert_array_equal(weights, np.arange(252) < 250)
    assert multihost.share_out(1, (3, 2), mesh)[0].shape == (4, 5)
    assert len(np.unique(rows[:250], axis=0)) == 250


def test_a_folder_of_a_run_with_other_options_is_refused(tmp_path):
    multihost._open(tmp_path, {"cases": 4, "layers": (3, 2)})
    multihost._open(tmp_path, {"cases": 4, "layers": (3, 2)})
    with pytest.raises(ValueError, match="of a run with cases 4, not 3"):
        multihost._open(tmp_path, {"cases": 3, "layers": (3, 2)})
