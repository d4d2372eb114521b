"""The packages, which way they import one another, and how large anything may be."""

import ast
import functools
import pathlib

import pytest

import hfjax

pytestmark = pytest.mark.every

PACKAGES = {
    "_core": [
        "types",
        "options",
        "sharding",
        "trees",
        "sums",
        "packing",
        "arguments",
        "refusal",
    ],
    "_tracing": [
        "programs",
        "linearize",
        "compiled",
        "linalg",
        "dealing",
        "convolutions",
        "_axes",
        "_made",
        "_products",
        "interpret",
        "_layer_reader",
        "layers",
    ],
    "losses": [
        "_softmax",
        "_coupling",
        "_outer",
        "_repair",
        "_case_axes",
        "positions",
        "loss",
        "matching",
        "likelihoods",
        "combined",
    ],
    "models": ["scan", "initializers", "recurrent"],
    "objectives": [
        "cases",
        "means",
        "positions",
        "decay",
        "terms",
        "whole_batch",
        "plain",
        "balance",
        "objective",
        "masking",
    ],
    "curvature": [
        "structural",
        "_precision",
        "_kept",
        "_linear_mean",
        "forms",
        "products",
        "jacobian",
        "streamed_jacobian",
        "damped_jacobian",
        "_case_gradients",
        "probes",
        "diagonals",
    ],
    "preconditioners": [
        "_layer_pass",
        "_remembered",
        "_merged_layers",
        "_blocks",
        "_factors",
        "_layer_report",
        "_inverses",
        "_kronecker",
        "_nystrom",
        "rules",
        "preconditioned",
    ],
    "solvers": [
        "stopping",
        "iterates",
        "descent",
        "pcg_hooks",
        "pcg",
        "_inverse",
        "_bfgs",
        "krylov",
        "_exact_steps",
        "sample_space",
        "_subspace",
        "cg",
    ],
    "globalization": [
        "damping_matrices",
        "backtracking",
        "_search",
        "rule",
        "damping",
        "trust_region",
        "linesearch",
    ],
    "update": [
        "state",
        "_bookkeeping",
        "point",
        "sampling",
        "_drawn",
        "_damped",
        "system",
        "fitting",
        "_judge",
        "transform",
        "recipes",
    ],
    "inspection": [
        "_eigenvalues",
        "spectrum",
        "_setup",
        "_gradient_faults",
        "_finite_differences",
        "_faults",
        "verify",
        "_cg_run",
        "_figures",
        "live",
        "diagnostics",
    ],
    "training": [
        "minibatching",
        "_progress",
        "_checkpoint",
        "_run",
        "_loop",
        "fit",
        "_residuals",
        "_factors",
        "_descent",
        "least_squares",
    ],
}
"""Bottom to top. A module imports from packages before its own, and from modules before it
in its own; a name with an underscore is for its own package alone."""

LEAVES = {
    "solvers.cg": {"objectives", "curvature", "losses"},
    "solvers.pcg": {"objectives", "curvature", "losses"},
    "globalization.damping": {"objectives", "curvature", "solvers"},
    "globalization.linesearch": {"objectives", "solvers"},
    "globalization.backtracking": {"objectives", "solvers.cg"},
}
"""Modules that must not know certain others, though these stand before them."""

SHORTEST, LONGEST, LONGEST_BODY = 60, 350, 60
MOST_MODULES, MOST_ENTRIES = 12, 15

FOLDER = pathlib.Path(hfjax.__file__).parent
FILES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): path
    for path in FOLDER.rglob("*.py")
}
MODULES = {name: path for name, path in FILES.items() if path.stem != "__init__"}


@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


def imported(path):
    """Return the modules of hfjax that a file imports, and packages it takes names of."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name for name in names if name.split(".")[0] == "hfjax"}
    return {known(name.removeprefix("hfjax").removeprefix(".")) for name in ours}


def known(name):
    """Return the module or package that a dotted name lies in; "" is hfjax itself."""
    while name and name not in MODULES and name not in PACKAGES:
        name = name.rpartition(".")[0]
    return name


def test_every_module_has_its_place():
    places = {f"{package}.{m}" for package, ms in PACKAGES.items() for m in ms}
    assert set(MODULES) == places | {"flax"}


def test_imports_run_one_way():
    before = set()
    for package, modules in PACKAGES.items():
        for module in modules:
            found = imported(FILES[f"{package}.{module}"])
            assert found <= before, (f"{package}.{module}", found - before)
            before.add(f"{package}.{module}")
        own = {f"{package}.{module}" for module in modules}
        assert imported(FILES[f"{package}.__init__"]) <= own, package
        before.add(package)
    assert imported(FILES["flax"]) <= before


def test_a_private_module_is_its_packages_own_and_no_other_is_private():
    outside = {
        other
        for name, path in FILES.items()
        for other in imported(path)
        if name.split(".")[0] != other.split(".")[0] or name.endswith("__init__")
    }
    for name in set(MODULES) - {"flax"}:
        is_private = name.split(".")[1].startswith("_")
        assert is_private == (name not in outside), name


def test_leaves_do_not_know_each_other():
    for name, unknown in LEAVES.items():
        found = imported(FILES[name])
        assert not {n for n in found if unknown & {n, n.split(".")[0]}}, name


def test_a_package_hands_on_no_name_that_is_a_modules():
    for package, modules in PACKAGES.items():
        nodes = parsed(FILES[f"{package}.__init__"]).body
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        names = {alias.asname for node in imports for alias in node.names}
        assert not names & set(modules), package


def test_the_folder_shows_the_packages_and_little_else():
    entries = {path.name for path in FOLDER.iterdir()} - {"__pycache__"}
    assert entries == set(PACKAGES) | {"__init__.py", "flax.py", "py.typed"}
    assert len(entries) <= MOST_ENTRIES


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_small_and_says_what_lives_there(package):
    assert len(PACKAGES[package]) <= MOST_MODULES
    doc = ast.get_docstring(parsed(FILES[f"{package}.__init__"]))
    assert doc
    assert len(doc.splitlines()) >= 4


def test_no_file_is_long_and_none_is_hardly_any():
    lines = {name: len(p.read_text().splitlines()) for name, p in MODULES.items()}
    wrong = {k: n for k, n in lines.items() if not SHORTEST <= n <= LONGEST}
    assert not wrong, wrong


def test_no_body_of_a_function_is_long():
    """Without its docstring; functions within it count."""
    long = {}
    for name, path in FILES.items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[ast.get_docstring(node) is not None :]
                lines = node.end_lineno - body[0].lineno + 1 if body else 0
                if lines > LONGEST_BODY:
                    long[f"{name}.{node.name}"] = lines
    assert not long, long


def test_only_jax_optax_and_numpy_are_needed_at_run_time():
    allowed = {"hfjax", "jax", "optax", "numpy", "__future__"}
    # Those that are not always installed, and the modules that import them when asked.
    where = {
        "matplotlib": {"inspection._figures"},
        "flax": {"flax", "models.recurrent"},
        "IPython": {"inspection.live"},
        "orbax": {"training._checkpoint"},
        "rich": {"training._progress"},
        "tqdm": {"training._progress"},
    }
    standard = {"collections", "contextlib", "dataclasses", "enum", "functools"}
    standard |= {
        "importlib",
        "inspect",
        "io",
        "itertools",
        "logging",
        "math",
        "numbers",
        "operator",
        "os",
        "pathlib",
        "sys",
        "time",
        "types",
        "typing",
        "warnings",
        "weakref",
    }
    for name, path in FILES.items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import):
                tops = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                tops = {node.module.split(".")[0]}
            else:
                continue
            own = {top for top, modules in where.items() if name in modules}
            assert tops <= allowed | standard | own, (name, tops)


def test_one_module_compiles_and_nothing_is_printed_or_configured_in_the_library():
    for file, path in FILES.items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"print", "jax.pmap"}, file
                assert name != "jax.jit" or file == "_tracing.compiled", file
                assert not name.startswith("jax.config"), file
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                decorators = [ast.unparse(d) for d in node.decorator_list]
                assert not any("jit" in decorator for decorator in decorators)
