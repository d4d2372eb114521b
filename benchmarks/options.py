"""Kinds of command-line options, and a parser whose errors are one line."""

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn, TypeVar

from benchmarks.data import PIXELS

T = TypeVar("T")

OPTIMIZERS = ("hf", "adam", "lbfgs")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line on standard error, without the synopsis."""

    def error(self, message: str) -> NoReturn:
        """End the process with status 2.

        Args:
          message: what was wrong.
        """
        self.exit(2, f"{self.prog}: {message}\n")


def refuse(command: str, error: Exception) -> int:
    """Say in one line why a command cannot run.

    Args:
      command: its name.
      error: what was wrong.

    Returns:
      The exit status 2.
    """
    print(f"python -m benchmarks {command}: {error}", file=sys.stderr)
    return 2


def count(word: str) -> int:
    """Read a whole number of at least 1.

    Args:
      word: as the user typed it.

    Returns:
      The number.
    """
    if not word.isdecimal() or int(word) < 1:
        msg = f"must be a whole number of at least 1, got {word!r}"
        raise argparse.ArgumentTypeError(msg)
    return int(word)


def positive(word: str) -> float:
    """Read a number above 0.

    Args:
      word: as the user typed it.

    Returns:
      The number.
    """
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        msg = f"must be a number above 0, got {word!r}"
        raise argparse.ArgumentTypeError(msg)
    return number


def layers(word: str) -> tuple[int, ...]:
    """Read sizes from the pixels to the code.

    Args:
      word: as the user typed it, with commas.

    Returns:
      The sizes.
    """
    sizes = tuple(count(size) for size in word.split(","))
    if len(sizes) < 2 or sizes[0] != PIXELS:
        msg = f"must be {PIXELS} pixels and then layers, as 784,30,5; got {word!r}"
        raise argparse.ArgumentTypeError(msg)
    return sizes


def optimizers(word: str) -> tuple[str, ...]:
    """Read names of optimizers.

    Args:
      word: as the user typed it, with commas.

    Returns:
      The names, in the order of `OPTIMIZERS`.
    """
    return among(OPTIMIZERS, word)


def among(known: Iterable[str], word: str) -> tuple[str, ...]:
    """Read some of the names that there are.

    Args:
      known: the names.
      word: as the user typed it, with commas.

    Returns:
      Those that were typed, in the order of `known`.
    """
    names, known = word.split(","), tuple(known)
    if not set(names) <= set(known):
        msg = f"must be among {','.join(known)}, got {word!r}"
        raise argparse.ArgumentTypeError(msg)
    return tuple(name for name in known if name in names)


def listed(read: Callable[[str], T], word: str) -> tuple[T, ...]:
    """Read several values.

    Args:
      read: reads one.
      word: as the user typed it, with commas.

    Returns:
      The values, each once.
    """
    return tuple(dict.fromkeys(read(part) for part in word.split(",")))


def not_negative(word: str) -> float:
    """Read a number of at least 0.

    Args:
      word: as the user typed it.

    Returns:
      The number.
    """
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        msg = f"must be a number of at least 0, got {word!r}"
        raise argparse.ArgumentTypeError(msg)
    return number
