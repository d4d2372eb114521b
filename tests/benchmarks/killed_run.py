"""The comparison that `test_restart` kills: a tiny one, with a checkpoint after each turn.

python tests/benchmarks/killed_run.py FOLDER
"""

import sys

from benchmarks.__main__ import main
from benchmarks.harness.checkpoint import Checkpoints
from benchmarks.suites import images
from benchmarks.suites.curves import curves
from benchmarks.suites.problem import Kind


def tiny(data_dir):
    return images.reconstruction("Curves", curves(60), (784, 30, 6))


if __name__ == "__main__":
    Checkpoints._is_time = lambda self: True
    images.SUITE.problems["tiny"] = Kind("a tiny autoencoder", tiny)
    words = ["--problem", "tiny", "--optimizers", "martens2010", "--seconds", "4"]
    command = ["compare", "--suite", "images", "--turn", "0.2", *words]
    sys.exit(main([*command, "--out", sys.argv[1]]))
