"""The script for accelerators runs on any machine, and loses nothing that fails."""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.micro import accelerator
from benchmarks.micro.accelerator import Step
from benchmarks.micro.cost_problems import PROBLEMS
from benchmarks.optimizers import ADAM_RATES


def test_speeds_are_flops_by_seconds(monkeypatch):
    monkeypatch.setattr(accelerator, "_least", lambda fn, x: fn(x).size * 1e-6)
    monkeypatch.setattr(accelerator, "_TRIPS", 4)
    monkeypatch.setattr(accelerator, "_FACTORS", (5,))
    found = accelerator.speeds(10)
    # 2,000 operations in 100 entries' seconds, each a millionth.
    assert found["float64, precision highest"] == "2e-05 Tflops per second"
    assert len([name for name in found if "precision" in name]) == 4
    assert found["an iteration of one small kernel"] == "4 µs"
    assert found["Cholesky factor, 5"] == found["eigh, 5"] == "0.025 ms"


def test_what_fails_or_has_no_time_is_told_and_the_rest_goes_on(
    tmp_path, monkeypatch, capsys
):
    def steps(small, data_dir, seconds):
        yield Step("refused", ["costs", "--only", "adam"])
        yield Step(
            "speeds", ["accelerator", "--speeds", "--small"], lambda d: d["speeds"]
        )
        monkeypatch.setattr(accelerator.time, "monotonic", lambda: 1e12)
        yield Step("late", ["costs"])

    monkeypatch.setattr(accelerator, "steps", steps)
    assert main(["accelerator", "--out", str(tmp_path / "new")]) == 0
    rows = json.loads((tmp_path / "new" / "accelerator.json").read_text())["rows"]
    refused, fine, late = rows
    assert "no set-up of this problem has 'adam'" in refused["why"]
    assert "Tflops" in fine["found"]["float32, precision highest"]
    assert late["why"] == "the time was over"
    printed = capsys.readouterr().out
    assert "no set-up" in printed.replace("\N{NO-BREAK SPACE}", " ")


def test_a_command_that_takes_too_long_is_stopped(tmp_path):
    row = accelerator.taken(Step("slow", ["product"]), tmp_path, 0.5)
    assert row["why"].startswith("stopped after")
    assert row["seconds"] < 30


@pytest.mark.parametrize("small", [False, True])
def test_its_commands_are_those_that_there_are(small, tmp_path, monkeypatch):
    (tmp_path / "mnist.npz").write_bytes(b"")
    found = list(accelerator.steps(small, str(tmp_path), 600.0))
    assert [step.words[0] for step in found].count("compare") == 2
    training = [step.words[-1] for step in found if step.words[0] == "compare"]
    # hfjax, Adam with each of its rates, and three equations: a third of ten minutes.
    runs = (1 + len(ADAM_RATES)) * int(training[0]) + 3 * int(training[1])
    assert runs == pytest.approx(200, abs=5)
    assert ("mnist" in [word for step in found for word in step.words]) != small
    # Each is understood: a parser that refuses it would end with 2.
    for step in found:
        with pytest.raises(SystemExit) as ended:
            main([*step.words, "--help"])
        assert ended.value.code == 0


def test_set_ups_are_compiled_for_a_gpu_that_is_described_and_a_bad_one_is_told(
    tmp_path, capsys
):
    steps = list(accelerator.compilations("gpu.txt", small=False))
    problems = [step.words[step.words.index("--problem") + 1] for step in steps]
    assert set(problems) < set(PROBLEMS)
    assert all(step.words[step.words.index("--gpu") + 1] == "gpu.txt" for step in steps)
    # There is no such file: the command says so, and the table says it.
    missing = str(tmp_path / "none.txt")
    words = ["--small", "--compile-only", missing, "--out", str(tmp_path / "new")]
    assert main(["accelerator", *words]) == 0
    (row,) = json.loads((tmp_path / "new" / "accelerator.json").read_text())["rows"]
    assert "none.txt" in row["why"]
    assert "compiled-readme" in capsys.readouterr().out


def test_what_a_compiled_set_up_tells_is_in_the_table():
    row = {
        "name": "default",
        "places": {"once": 87, "pcg.run": 31, "line": 9},
        "kinds": {"fusion": 122, "custom-call": 5},
        "kernels": 127,
        "temporary_bytes": 2_500_000,
        "xla_seconds": 3.04,
        "origins": [["once", "_judge.report", 19], ["pcg.run", "pcg._step", 6]],
    }
    told = accelerator._of_programs({"rows": [row]})
    assert told["default"] == "87 once, 31 in CG, 127 in all, 5 calls, 2.5 MB, 3.0 s"
    assert told["most of them"] == "_judge.report 19 (once), pcg._step 6 (pcg.run)"
