"""A Sphinx extension that reads docstrings and signatures of hfjax from the source.

Docstrings are in Google style with a little Markdown: pipe tables, and formulas and code in
indented blocks. Signatures come from the source, so a default is shown as `ggn`, not as
`<function ggn at 0x…>`, and a type as `NumberOrSchedule`, not as the union it stands for.

`tests/project/test_documentation.py` uses these functions to find what is public. The names
whose documentation it tests are therefore exactly the names that the site shows.
"""

import ast
import enum
import functools
import importlib.util
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(importlib.util.find_spec("hfjax").origin).parent


def public_modules() -> list[Path]:
    """List the files of the public modules: what `hfjax` re-exports, and `flax.py`."""
    found = {PACKAGE / "flax.py"}
    for path in re_exported(PACKAGE / "__init__.py"):
        # A package re-exports the public names of its main modules.
        found |= re_exported(path) if path.stem == "__init__" else {path}
    return sorted(found)


def re_exported(path: Path) -> set[Path]:
    """List the files of what a file re-exports by `from … import X as X`."""
    return {
        file_of(node.module or "", alias.name)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }


def file_of(module: str, name: str) -> Path:
    """Return the file of a name in a module: of the submodule, or of the module."""
    folder = PACKAGE.parent.joinpath(*module.split("."))
    below, beside = folder / f"{name}.py", folder.with_suffix(".py")
    files = (below, folder / name / "__init__.py", beside, folder / "__init__.py")
    return next(path for path in files if path.exists())


def dotted(path: Path) -> str:
    """Return the name by which a file is imported."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def public_module(path: Path) -> str:
    """Return the name under which `hfjax` exports a module: `cg`, `losses`."""
    package = path.parent / "__init__.py"
    exported = package in re_exported(PACKAGE / "__init__.py")
    is_part = exported and path in re_exported(package)
    return path.parent.name if is_part else path.stem


def public_names(path: Path) -> list[str]:
    """List the public names of a module: its own, and those it re-exports."""
    names = []
    for node in statements(ast.parse(path.read_text()).body):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.append(name)
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.append(name)
            case ast.Assign(targets=[ast.Name(id=name)]):
                names.append(name)
            case ast.ImportFrom(names=imported):
                names += [a.name for a in imported if a.asname == a.name]
    return [name for name in names if not name.startswith("_")]


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Walk through statements, including those under a condition."""
    for node in body:
        if isinstance(node, ast.If):
            yield from statements(node.body)
        else:
            yield node


def to_rst(lines: list[str]) -> list[str]:
    """Turn the Markdown of a docstring into reStructuredText, paragraph by paragraph."""
    rst: list[str] = []
    for blank, group in itertools.groupby(lines, key=lambda line: not line.strip()):
        paragraph = list(group)
        first = paragraph[0]
        if blank:
            rst += paragraph
        elif not is_prose(first):
            # In a module's docstring, doctests are indented by four, as formulas are.
            rst += dedented(paragraph) if first.startswith("    ") else paragraph
        elif first.startswith("    "):
            rst += [f".. code-block:: {language(paragraph)}", "", *paragraph]
        elif paragraph[1:] and paragraph[1].startswith("|-"):
            rst += table(paragraph)
        else:
            prose = list(itertools.takewhile(is_prose, paragraph))
            rst += escaped("\n".join(prose)).split("\n") + paragraph[len(prose) :]
    return rst


def is_prose(line: str) -> bool:
    """Return whether a line does not start a doctest."""
    return not line.lstrip().startswith(">>>")


def table(rows: list[str]) -> list[str]:
    """Turn a pipe table into a `list-table`."""
    rst = [".. list-table::", "   :header-rows: 1", ""]
    for row in rows[:1] + rows[2:]:
        cells = [escaped(cell.strip()) for cell in row.strip().strip("|").split("|")]
        rst += [f"   {'  -' if k else '* -'} {cell}" for k, cell in enumerate(cells)]
    return rst


def escaped(text: str) -> str:
    """Escape |λ|, x* and "f.", which are not markup; separate ⌈`x`⌉, which has some."""
    text = re.sub(r"(^ *|: )([A-Za-z])\.$", r"\1\2\\.", text, flags=re.MULTILINE)
    parts = re.split(r"(`[^`]*`)", text)
    for k in range(0, len(parts), 2):
        part = re.sub(r"(?<!\*)\*(?!\*)|\|", r"\\\g<0>", parts[k])
        # Code needs a space beside other text; an escaped one is not shown.
        if k > 0:
            part = re.sub(r"^(?=[^\s.,;:!?)\]'/-])", r"\\ ", part)
        if k + 1 < len(parts):
            part = re.sub(r"(?<=[^\s(\['/-])$", r"\\ ", part)
        parts[k] = part
    return "".join(parts)


def language(block: list[str]) -> str:
    """Return the language of an indented block: "python", or "none" for formulas."""
    try:
        ast.parse("\n".join(dedented(block)))
    except SyntaxError:
        return "none"
    return "python"


def dedented(block: list[str]) -> list[str]:
    """Move a block to the margin."""
    return textwrap.dedent("\n".join(block)).split("\n")


def signature(obj: Any) -> tuple[str, str]:
    """Read the signature of a function, NamedTuple or dataclass from its source."""
    node = ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]
    if isinstance(node, ast.ClassDef):
        written = [n for n in node.body if getattr(n, "name", "") == "__init__"]
        node = written[0] if written else constructor(node)
    assert isinstance(node, ast.FunctionDef)
    node = Linked().visit(node)
    arguments = re.sub(r"^(self|cls)(, )?", "", ast.unparse(node.args))
    returns = "" if node.returns is None else ast.unparse(node.returns)
    return f"({arguments})", "" if returns == "None" else returns


def constructor(node: ast.ClassDef) -> ast.stmt:
    """Build the `__init__` that a class gets from its fields."""
    fields = [ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign)]
    return ast.parse(f"def __init__(self, {', '.join(fields)}): ...").body[0]


class Linked(ast.NodeTransformer):
    """Replace each name in annotations by its full path, so that Sphinx can link it."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = self.linked(node.annotation)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.visit(node.args)
        node.returns = self.linked(node.returns)
        return node

    def linked(self, annotation: ast.expr | None) -> ast.expr | None:
        if annotation is None:
            return None
        text = re.sub(r"'([A-Z]\w+)'", r"\1", ast.unparse(annotation))
        text = re.sub(r"(?<![\w.])\w+", lambda m: homes().get(m[0], m[0]), text)
        return ast.parse(text, mode="eval").body


@functools.cache
def homes() -> dict[str, str]:
    """Return the full path of each public type; `~` hides the module in the text."""
    return {
        name: f"~{dotted(path)}.{name}"
        for path in (PACKAGE / "_core" / "types.py", *public_modules())
        for name in public_names(path)
        if name[0].isupper()
    }


def offer_public_names(app: Any) -> None:
    """Set `__all__`, by which autodoc decides what is public."""
    for path in (PACKAGE / "_core" / "types.py", *public_modules()):
        importlib.import_module(dotted(path)).__all__ = public_names(path)


def read_docstring(
    app: Any, what: str, name: str, obj: Any, _: Any, lines: list
) -> None:
    """Convert the docstring to reStructuredText, which napoleon then reads."""
    lines[:] = to_rst(lines)


def read_signature(app: Any, what: str, name: str, obj: Any, *_: Any) -> tuple | None:
    """Return the signature as it is written in the source."""
    try:
        return signature(obj)
    except (OSError, TypeError, AssertionError):  # An alias has none.
        return None


def is_field(app: Any, what: str, name: str, obj: Any, *_: Any) -> bool | None:
    """Skip the fields of a class, because its docstring lists them as attributes."""
    ours = (getattr(obj, "__module__", None) or "").startswith("hfjax")
    shown = ours or isinstance(obj, property | enum.Enum)
    return True if what == "class" and not shown else None


def write_front_door(app: Any, error: Exception | None) -> None:
    """Write an `index.html` that redirects to the first page of the site."""
    if error is None and app.builder.name == "html":
        page = f"{app.config.root_doc}.html"
        refresh = f'<meta http-equiv="refresh" content="0; url={page}">'
        door = f'<!doctype html>{refresh}<a href="{page}">{app.config.project}</a>\n'
        (Path(app.outdir) / "index.html").write_text(door)


def setup(app: Any) -> dict[str, bool]:
    """Register the extension with Sphinx."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("builder-inited", offer_public_names)
    # This must run before napoleon, which reads the sections.
    app.connect("autodoc-process-docstring", read_docstring, priority=400)
    app.connect("autodoc-process-signature", read_signature)
    app.connect("autodoc-skip-member", is_field)
    app.connect("build-finished", write_front_door)
    return {"parallel_read_safe": True}
