"""Kinds of command-line options, and a parser whose errors are one line."""

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn, TypeVar

from benchmarks.harness.history import write_json

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line on standard error, without the synopsis."""

    def error(self, message: str) -> NoReturn:
        """End the process with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


class RefusedError(Exception):
    """Why a command cannot run, in one line."""


def output_file(path: str) -> Path:
    """Create the file that a command will write: better to fail now than at its end.

    Raises:
      RefusedError: if it cannot be written.
    """
    found = Path(path)
    try:
        found.parent.mkdir(parents=True, exist_ok=True)
        write_json(found, {})
    except OSError as error:
        raise RefusedError(error) from error
    return found


def count(word: str, low: int = 1) -> int:
    """Read a whole number of at least 1, or of at least `low`."""
    if not word.isdecimal() or int(word) < low:
        msg = f"must be a whole number of at least {low}, got {word!r}"
        raise argparse.ArgumentTypeError(msg)
    return int(word)


def positive(word: str) -> float:
    """Read a number above 0."""
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        msg = f"must be a number above 0, got {word!r}"
        raise argparse.ArgumentTypeError(msg)
    return number


def seed(word: str) -> int:
    """Read a whole number of at least 0."""
    return count(word, low=0)


def among(known: Iterable[str], word: str) -> tuple[str, ...]:
    """Read some of the known names."""
    names, known = word.split(","), tuple(known)
    if not set(names) <= set(known):
        msg = f"must be among {','.join(known)}, got {word!r}"
        raise argparse.ArgumentTypeError(msg)
    return tuple(name for name in known if name in names)


def listed(read: Callable[[str], T], word: str) -> tuple[T, ...]:
    """Read several values."""
    return tuple(dict.fromkeys(read(part) for part in word.split(",")))
