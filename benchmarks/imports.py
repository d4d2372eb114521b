"""What `import hfjax` costs beyond `import jax`.

Fresh processes in turn, seconds of the processor (a busy machine does not count), the
median of each.
"""

import argparse
import os
import statistics
import subprocess
import sys

STATEMENTS = ("import jax", "import jax, optax", "import hfjax")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
      parser: to declare them to.
    """
    parser.add_argument("--rounds", type=int, default=9, help="processes of each")


def run(options: argparse.Namespace) -> int:
    """Measure and print the medians, and what is beyond the first.

    Args:
      options: of `add_arguments`.

    Returns:
      The exit status, 0.
    """
    seconds: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    for number in range(options.rounds + 1):  # The first one warms the disk's cache.
        for statement, measured in seconds.items():
            measured += [processor_seconds(statement)][: number > 0]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    base = medians[STATEMENTS[0]]
    for name, median in medians.items():
        print(f"{name:<20} {median:5.2f} s   {median - base:+.2f} s")
    return 0


def processor_seconds(statement: str) -> float:
    """Return the seconds of processor that a fresh Python takes for a statement.

    Args:
      statement: of Python.
    """
    before = os.times()
    subprocess.run([sys.executable, "-c", statement], check=True)
    after = os.times()
    children = after.children_user + after.children_system
    return children - before.children_user - before.children_system
