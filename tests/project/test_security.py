"""What SECURITY.md says: the library computes, and does nothing else."""

import ast
import builtins
import contextlib
import os
import pathlib
import pickle
import sys

import jax.numpy as jnp
import pytest
from reference import quick_jit

import hfjax
from benchmarks.suites import mnist

pytestmark = pytest.mark.every

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(pathlib.Path(hfjax.__file__).parent.glob("**/*.py"))
TEXT = (ROOT / "SECURITY.md").read_text()

UNPICKLING = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FETCHING = {
    *("asyncio", "ftplib", "http", "httpx", "requests", "smtplib", "socket"),
    *("socketserver", "ssl", "urllib", "urllib3", "webbrowser", "xmlrpc"),
}
STARTING = {"multiprocessing", "os", "pty", "subprocess", "sys", "threading"}
LOADING = {"cffi", "code", "codeop", "ctypes", "imp", "importlib", "pkgutil", "runpy"}
WRITING = {"io", "pathlib", "shutil", "sqlite3", "tempfile", "zipfile"}
BANNED = UNPICKLING | FETCHING | STARTING | LOADING | WRITING

BUILTINS = {"__import__", "breakpoint", "compile", "eval", "exec", "input", "open"}
METHODS = {
    # NumPy's and JAX's, of matplotlib figures, paths and files.
    *("fromfile", "load", "loadtxt", "memmap", "save", "savetxt", "savez", "tofile"),
    *("savez_compressed", "savefig", "open", "read_bytes", "read_text", "unlink"),
    *("mkdir", "write", "write_bytes", "write_text", "writelines"),
    # Ways back to Python from a compiled program, and into it from bytes.
    *("io_callback", "pure_callback", "callback", "deserialize", "import_module"),
}

ON_REQUEST = {
    # Runs write where they are told to, by Orbax and matplotlib, and look for packages
    # that may be installed. `PathLike` is what `os` is for in `fit`.
    "training/fit.py": {"os"},
    "training/_checkpoint.py": {"os", "pathlib", "save"},
    "training/_loop.py": {"save"},
    "training/_progress.py": {"importlib", "sys"},
    "inspection/live.py": {
        *("io", "mkdir", "os", "pathlib", "savefig", "sys", "write_bytes")
    },
}
"""What some modules do beside computing, as SECURITY.md says."""


def faults(text):
    """Yield what a module does beside computing."""
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "."]
        yield from {name.split(".")[0] for name in names} & BANNED
        if isinstance(node, ast.Name):  # Also where it is not called but handed on.
            yield from {node.id} & (BUILTINS | {"__builtins__", "builtins"})
        if isinstance(node, ast.Attribute):
            yield from {node.attr} & (METHODS | {"__builtins__", "__globals__"})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_module_unpickles_executes_fetches_starts_and_writes_nothing_unasked(path):
    name = path.relative_to(FILES[0].parent).as_posix()
    assert set(faults(path.read_text())) == ON_REQUEST.get(name, set())


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from urllib.request import urlopen",
        "def f():\n    import subprocess as s",
        "import importlib.util",
        "from ctypes import *",
        "eval('1')",
        "run = exec",
        "open('file')",
        "__import__('socket')",
        "jnp.load('file')",
        "figure.savefig('file')",
        "jax.experimental.io_callback(f, None)",
    ],
)
def test_each_of_these_would_be_found(text):
    assert list(faults(text))


def test_all_modules_are_looked_at():
    assert {"transform", "cg", "objective", "diagnostics"} <= {f.stem for f in FILES}
    assert all(hasattr(builtins, name) for name in BUILTINS)


class Watch:
    """What Python reports of dangerous operations, while it is on; for good there."""

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self._hear)

    def _hear(self, event, arguments):
        # Python itself keeps what it has compiled of the modules that are imported.
        if not self.on or any("__pycache__" in str(x) for x in arguments):
            return
        started = ("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system")
        loud = ("pickle.", "socket.", "subprocess.", "urllib.")
        changed = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if writes or event.startswith(started + loud + changed):
            self.seen.append(event)

    @contextlib.contextmanager
    def listening(self):
        self.seen, self.on = [], True
        try:
            yield self.seen
        finally:
            self.on = False


WATCH = Watch()


class Named:
    """Something that is unpickled by its name."""


def test_an_update_does_nothing_that_python_would_report(tmp_path):
    objective = hfjax.Objective(
        lambda params, x: jnp.tanh(x @ params), hfjax.losses.squared_error()
    )
    tx = hfjax.hessian_free(objective)
    params, batch = jnp.ones((2, 1)), (jnp.ones((3, 2)), jnp.zeros((3, 1)))
    grads = objective.value_and_grad(params, batch)[1]
    # What JAX loads for its first factorisation is not the update's doing.
    jnp.linalg.solve(jnp.linalg.cholesky(jnp.eye(2)), jnp.ones(2))
    with WATCH.listening() as seen:
        _, state = quick_jit(tx.update)(grads, tx.init(params), params, batch=batch)
        hfjax.diagnostics.scalars(state)
    assert state.info.accepted
    assert not seen
    with WATCH.listening() as seen:
        (tmp_path / "file").write_bytes(pickle.dumps(Named()))
        pickle.loads((tmp_path / "file").read_bytes())
    assert seen == ["open", "pickle.find_class"]


def test_one_file_of_the_benchmarks_fetches_and_none_unpickles():
    fetching = set()
    for path in (ROOT / "benchmarks").rglob("*.py"):
        found = set(faults(path.read_text()))
        assert not found & (UNPICKLING | {"eval", "exec", "__import__"}), path.name
        fetching |= {path.name} if found & FETCHING else set()
    # A report shows its picture in a browser, if it is asked to.
    assert fetching == {"mnist.py", "report.py"}


def test_security_names_what_is_fetched_and_how_it_is_verified():
    assert mnist.URL.startswith("https://")
    assert mnist.URL.split("/")[2] in TEXT
    source = (ROOT / "benchmarks" / "suites" / "mnist.py").read_text()
    assert "allow_pickle=False" in source
    assert "--download" in TEXT
    assert "SHA-256" in TEXT
