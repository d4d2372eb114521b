"""Puts faults of one token into hfjax, one at a time, and sees whether a test fails.

    python -m tests.mutate --seed 0 --faults 40 --out faults.txt

A fault is another operator, comparison, constant or name (`min` for `max`), or two
arguments that change places. The same seed draws the same faults. Each is tried in a copy
of the repository, against the doctests of its module and the quick tests of its package,
and with `--thorough` against the slow ones and those of the whole update, too; a run without
faults first shows that these pass, and how long they take. A fault that no test notices is
one to write a test for, or changes nothing.
"""

import argparse
import ast
import io
import itertools
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = {"_core": "core", "_tracing": "tracing", "flax": "models/test_flax.py"}
FOLDERS |= {"training": "fitting"}
"""Tests of packages whose tests are not in the folder of the same name."""
UPDATE = ["tests/update/test_transform.py", "tests/update/test_contract.py"]
NOTHING_TO_RUN = 5
PATIENCE = 3, 60
"""A fault may take so many times what the tests do without one, and so many seconds."""

OTHERS = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "*", "@": "*"}
OTHERS |= {"**": "*", "&": "|", "|": "&", "^": "&", "and": "or", "or": "and"}
OTHERS |= {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
OTHERS |= {"is": "is not", "is not": "is", "in": "not in", "not in": "in"}
OTHERS |= {"not": "", "~": "", "min": "max", "max": "min"}
OTHERS |= {"minimum": "maximum", "maximum": "minimum"}
OTHERS |= {"argmin": "argmax", "argmax": "argmin"}
ORDERED = {"where": 3, "matmul": 2, "dot": 2, "outer": 2, "append": 2}
"""Functions of `jnp` with so many arguments, the last two of which may be swapped."""


class Fault(NamedTuple):
    """A replacement of `text[start:end]` in one file."""

    file: str
    line: int
    start: int
    end: int
    new: str

    def applied(self, text):
        return text[: self.start] + self.new + text[self.end :]

    def told(self, text):
        changed = self.applied(text).splitlines()[self.line - 1].strip()
        old = " ".join(text[self.start : self.end].split())
        new = " ".join(self.new.split()) or "nothing"
        return f"{self.file}:{self.line}: {old} → {new}, in: {changed}"


class Source:
    """A file, and where it may be changed, outside of annotations and messages."""

    def __init__(self, file, text):
        self.file, self.text = file, text
        self.lines = text.splitlines(keepends=True)
        self.starts = [0, *itertools.accumulate(map(len, self.lines))]
        self.tokens = [
            (self.starts[token.start[0] - 1] + token.start[1], token.string)
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type in {tokenize.OP, tokenize.NAME} and token.string not in "()"
        ]

    def span(self, node):
        """Return where a node begins and ends; `ast` counts the bytes of a line."""
        places = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
        for line, column in places:
            before = self.lines[line - 1].encode()[:column].decode()
            yield self.starts[line - 1] + len(before)

    def places(self):
        """Yield the faults that each place may have."""
        for node in within(ast.parse(self.text)):
            for start, end, others in self.changes(node):
                line = self.text.count("\n", 0, start) + 1
                if others:
                    yield [Fault(self.file, line, start, end, new) for new in others]

    def changes(self, node):
        match node:
            case ast.BinOp(left, _, right) | ast.AugAssign(left, _, right):
                yield from self.operators([left, right])
            case ast.Compare(left, _, sides):
                yield from self.operators([left, *sides])
            case ast.BoolOp(_, sides):
                yield from self.operators(sides)
            case ast.UnaryOp():
                start, _ = self.span(node)
                old = next(word for at, word in self.tokens if at == start)
                yield start, start + len(old), [OTHERS[old]]
            case ast.Constant(value):
                yield *self.span(node), [repr(other) for other in constants(value)]
            case ast.Name(name, ast.Load()) | ast.Attribute(_, name, ast.Load()):
                _, end = self.span(node)
                if name in OTHERS:
                    yield end - len(name), end, [OTHERS[name]]
            case ast.Call(ast.Attribute(ast.Name("jnp"), name), args):
                if len(args) == ORDERED.get(name):
                    (start, low), (high, end) = map(self.span, args[-2:])
                    swapped = self.text[high:end] + self.text[low:high]
                    yield start, end, [swapped + self.text[start:low]]

    def operators(self, sides):
        """Yield what stands between operands, and what may stand there instead."""
        for left, right in itertools.pairwise(sides):
            (_, low), (high, _) = self.span(left), self.span(right)
            tokens = [(at, word) for at, word in self.tokens if low <= at < high]
            start, end = tokens[0][0], tokens[-1][0] + len(tokens[-1][1])
            old = self.text[start:end]
            if old in OTHERS:
                yield start, end, [OTHERS[old]]
            else:  # It is += or its like.
                yield start, end, [OTHERS[old.removesuffix("=")] + "="]


def within(node):
    """Yield a node and those in it, but for annotations, messages and `strict=`."""
    match node:
        case ast.FunctionDef(_, args, body):
            nodes = [*args.defaults, *filter(None, args.kw_defaults), *body]
        case ast.AnnAssign():
            nodes = filter(None, [node.value])
        case ast.Raise() | ast.JoinedStr() | ast.Call(ast.Name("isinstance")):
            return
        case ast.Assign([ast.Name("msg")]) | ast.keyword("strict"):
            return
        case _:
            yield node
            nodes = ast.iter_child_nodes(node)
    for part in nodes:
        yield from within(part)


def constants(value):
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int) and value <= 100:
        return [value + 1, value - 1] if value else [1]
    if isinstance(value, float):
        return [2 * value, value / 2] if value else [1.0]
    return []


def places(package=None):
    """Return every place of hfjax, or of one package, with the faults it may have."""
    found = []
    for path in sorted((ROOT / "hfjax").rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        if path.stem != "__init__" and package in {None, package_of(file)}:
            found += Source(file, path.read_text()).places()
    return found


def package_of(file):
    """Return the name after hfjax: of a package, or flax."""
    return pathlib.PurePath(file).with_suffix("").parts[1]


def drawn(seed, count, found):
    """Return faults at random places, those of a file together."""
    rng = random.Random(seed)
    chosen = rng.sample(found, min(count, len(found)))
    return sorted(rng.choice(faults) for faults in chosen)


def tests_of(file, whole, *, thorough):
    """Return the arguments of each run of tests, the shortest first."""
    own = "tests/" + FOLDERS.get(package_of(file), package_of(file))
    runs = [[whole, own, "-m", "not slow"]]
    return [*runs, [own, "-m", "slow"], [*UPDATE, "-m", "not slow"]][
        : 3 if thorough else 1
    ]


def tried(folder, runs, processes, limit=None):
    """Run tests until one fails; return `passed`, `killed` or `timed out`, and words."""
    end = time.monotonic() + limit if limit else None
    for arguments in runs:
        left = end and end - time.monotonic()
        outcome, output = run(folder, arguments, processes, left)
        if outcome != "passed":
            break
    return outcome, output


def run(folder, arguments, processes, limit):
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", *arguments]
    if processes > 1:
        command += ["-n", str(processes), "--dist", "loadfile"]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(folder),
            # Compiling what no fault has changed is half of what the tests take.
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return "timed out", ""
    finally:
        if process.poll() is None:  # With the processes that tests have started.
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    passed = process.returncode in {0, NOTHING_TO_RUN}
    return "passed" if passed else "killed", output


def limit(folder, file, processes, *, thorough):
    """Return how long tests may take with a fault in a file, from those without one."""
    package, begun = package_of(file), time.monotonic()
    whole = file if package == "flax" else f"hfjax/{package}"
    outcome, output = tried(folder, tests_of(file, whole, thorough=thorough), processes)
    if outcome != "passed":
        msg = f"without a fault, tests of {package} fail:\n{output}"
        raise SystemExit(msg)
    return PATIENCE[0] * (time.monotonic() - begun) + PATIENCE[1]


def report(folder, faults, processes, *, thorough=False):
    """Yield the lines of the report, as faults are tried."""
    limits, told = {}, {"killed": [], "timed out": [], "survived": []}
    for fault in faults:
        package, path = package_of(fault.file), folder / fault.file
        text = path.read_text()
        if package not in limits:
            limits[package] = limit(folder, fault.file, processes, thorough=thorough)
            yield f"{package}: its tests pass; limit {limits[package]:.0f} s"
        path.write_text(fault.applied(text))
        tests = tests_of(fault.file, fault.file, thorough=thorough)
        outcome, _ = tried(folder, tests, processes, limits[package])
        path.write_text(text)
        outcome = "survived" if outcome == "passed" else outcome
        told[outcome].append(fault.told(text))
        yield f"{outcome}: {fault.told(text)}"
    counts = [f"{len(lines)} {outcome}" for outcome, lines in told.items()]
    yield f"{len(faults)} faults: {', '.join(counts)}; a fault that times out is killed"
    yield from told["survived"]


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.mutate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=40, help="how many")
    parser.add_argument("--package", help="the only one to have faults: solvers, say")
    parser.add_argument("--thorough", action="store_true", help="run more tests")
    parser.add_argument("--list", action="store_true", help="show faults, try none")
    parser.add_argument("--processes", type=int, default=1, help="that run the tests")
    parser.add_argument("--out", type=pathlib.Path, help="a file for the report, too")
    args = parser.parse_args()
    faults = drawn(args.seed, args.faults, places(args.package))
    if args.list:
        lines = [fault.told((ROOT / fault.file).read_text()) for fault in faults]
        print("\n".join(lines))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder, told = pathlib.Path(scratch), []
        left_out = shutil.ignore_patterns(".*", "runs", "dist", "_build")
        shutil.copytree(ROOT, folder, ignore=left_out, dirs_exist_ok=True)
        for line in report(folder, faults, args.processes, thorough=args.thorough):
            print(line, flush=True)
            told.append(line + "\n")
            if args.out:
                args.out.write_text("".join(told))


if __name__ == "__main__":
    main()
