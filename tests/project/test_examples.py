"""The short scripts of examples/ run as users run them, and train."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LINES = r"^f (\S+) [\s\S]*^f (\S+) "  # The first and the last update.
SCRIPTS = {
    "nnx_finetune.py --seconds 0.1": r"hfjax: f from (\S+) to (\S+) in",
    "nnx_finetune.py --adapters --seconds 0.1": r"hfjax: f from (\S+) to (\S+) in",
    "linen_batchnorm_cnn.py --updates 3": LINES,
    "equinox_fno.py --updates 3": r"^f from (\S+) to (\S+) in 3 updates",
}


@pytest.mark.slow
@pytest.mark.every
@pytest.mark.parametrize("command", SCRIPTS)
def test_a_script_to_copy_is_short_and_lowers_f(command):
    name, *words = command.split()
    script = ROOT / "examples" / name
    assert len(script.read_text().splitlines()) <= 80
    # The loss is what counts, and compiling is the cost.
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_ENABLE_X64": "0"}
    run = subprocess.run(
        [sys.executable, "-W", "error", script, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **flags},
        capture_output=True,
        check=False,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    ((first, last),) = re.findall(SCRIPTS[command], run.stdout, re.MULTILINE)
    assert float(last) < float(first)
