"""The rooms, and which way they may import one another."""

import ast
import pathlib

import hfjax

ROOMS = [
    "_types",
    "_options",
    "_sharding",
    "_packing",
    "_tree",
    "_programs",
    "_linearize",
    "_arguments",
    "_refusal",
    "_compiled",
    "_linalg",
    "_convolutions",
    "_coupling",
    "_outer",
    "_repair",
    "_case_axes",
    "_loss",
    "losses",
    "_cases",
    "_means",
    "_terms",
    "_objective",
    "objective",
    "structural",
    "_precision",
    "_products",
    "curvature",
    "_jacobian",
    "_correction",
    "_case_gradients",
    "_probes",
    "diagonals",
    "_uses",
    "_layer_reader",
    "_layers",
    "_layer_pass",
    "_merged_layers",
    "_blocks",
    "_factors",
    "_remembered",
    "_kronecker",
    "_layer_report",
    "_nystrom",
    "stopping",
    "iterates",
    "_solver",
    "_pcg_hooks",
    "_pcg",
    "_subspace",
    "_inverse",
    "cg",
    "damping_matrices",
    "backtracking",
    "_search",
    "_rule",
    "damping",
    "trust_region",
    "_bfgs",
    "krylov",
    "sample_space",
    "preconditioners",
    "linesearch",
    "state",
    "_system",
    "_fitting",
    "_judge",
    "transform",
    "recipes",
    "minibatching",
    "_eigenvalues",
    "spectrum",
    "initializers",
    "_setup",
    "_gradient_faults",
    "_finite_differences",
    "_faults",
    "verify",
    "scan",
    "_recurrent",
    "flax",
    "_cg_run",
    "_figures",
    "diagnostics",
]
"""Top to bottom: a room imports only from rooms above it."""

LEAVES = {
    "cg": {"objective", "curvature", "diagonals", "losses"},
    "_pcg": {"objective", "curvature", "diagonals", "losses"},
    "damping": {"objective", "curvature", "cg"},
    "linesearch": {"objective", "cg", "iterates"},
    "backtracking": {"objective", "cg"},
}
"""Rooms that must not know certain others, though these stand above them."""

PACKAGE = pathlib.Path(hfjax.__file__).parent


def imported_rooms(path):
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        rooms |= {n.split(".")[1] for n in names if n.startswith("hfjax.")}
    return rooms


def test_every_room_is_in_the_table():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == set(ROOMS)


def test_imports_run_one_way():
    for position, room in enumerate(ROOMS):
        known = imported_rooms(PACKAGE / f"{room}.py")
        assert known <= set(ROOMS[:position]), (room, known - set(ROOMS[:position]))


def test_leaves_do_not_know_each_other():
    for room, unknown in LEAVES.items():
        assert not imported_rooms(PACKAGE / f"{room}.py") & unknown


def test_only_jax_optax_and_numpy_are_needed_at_run_time():
    allowed = {"hfjax", "jax", "optax", "numpy", "matplotlib", "__future__", "flax"}
    standard = {"collections", "contextlib", "dataclasses", "enum", "functools"}
    standard |= {
        "inspect",
        "itertools",
        "math",
        "numbers",
        "operator",
        "time",
        "typing",
        "weakref",
    }
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                tops = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                tops = {node.module.split(".")[0]}
            else:
                continue
            assert tops <= allowed | standard, (path.name, tops)
            if "matplotlib" in tops:
                assert path.stem == "_figures"
            if "flax" in tops:
                assert path.stem in {"flax", "_recurrent"}


def test_one_room_compiles_and_nothing_is_printed_or_configured_in_the_library():
    for path in PACKAGE.glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"print", "jax.pmap"}, path.name
                assert name != "jax.jit" or path.stem == "_compiled", path.name
                assert not name.startswith("jax.config"), path.name
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                decorators = [ast.unparse(d) for d in node.decorator_list]
                assert not any("jit" in decorator for decorator in decorators)
