"""A Sphinx extension: docstrings and signatures of hfjax, read as they are written.

Docstrings are Google style with a little Markdown: pipe tables, and formulas and code in
indented blocks. Signatures come from the source, so that a default is `ggn` and not
`<function ggn at 0x…>`, and a type `NumberOrSchedule` and not the union it stands for.

`tests/project/test_documentation.py` takes from here what is public, so that a name which is
tested for its documentation is a name which the site shows, and the other way round.
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


def rooms() -> list[Path]:
    """List the files of the public modules: those that `hfjax` hands on, and Flax's."""
    found = {PACKAGE / "flax.py"}
    for path in handed_on(PACKAGE / "__init__.py"):
        # A package hands on what its main modules offer.
        found |= handed_on(path) if path.stem == "__init__" else {path}
    return sorted(found)


def handed_on(path: Path) -> set[Path]:
    """List the files of what a file hands on by `from … import X as X`."""
    return {
        file_of(node.module or "", alias.name)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }


def file_of(module: str, name: str) -> Path:
    """Return the file of what a module has under a name: a module's own, or its."""
    folder = PACKAGE.parent.joinpath(*module.split("."))
    below, beside = folder / f"{name}.py", folder.with_suffix(".py")
    files = (below, folder / name / "__init__.py", beside, folder / "__init__.py")
    return next(path for path in files if path.exists())


def dotted(path: Path) -> str:
    """Return the name by which a file is imported."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def room(path: Path) -> str:
    """Return the name under which `hfjax` hands a module on: `cg`, `losses`."""
    package = path.parent / "__init__.py"
    is_part = package in handed_on(PACKAGE / "__init__.py") and path in handed_on(
        package
    )
    return path.parent.name if is_part else path.stem


def public_names(path: Path) -> list[str]:
    """List what a room offers: its own names, and what it hands on by `import X as X`."""
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
    """Walk through statements, those under a condition too."""
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
            # Those of a module stand four spaces in, as its formulas do.
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
    """Return whether a line is none of a doctest."""
    return not line.lstrip().startswith(">>>")


def table(rows: list[str]) -> list[str]:
    """Turn a pipe table into a `list-table`."""
    rst = [".. list-table::", "   :header-rows: 1", ""]
    for row in rows[:1] + rows[2:]:
        cells = [escaped(cell.strip()) for cell in row.strip().strip("|").split("|")]
        rst += [f"   {'  -' if k else '* -'} {cell}" for k, cell in enumerate(cells)]
    return rst


def escaped(text: str) -> str:
    """Keep |λ|, x* and "f." from being read as markup, and ⌈`x`⌉ from not being so."""
    text = re.sub(r"(^ *|: )([A-Za-z])\.$", r"\1\2\\.", text, flags=re.MULTILINE)
    parts = re.split(r"(`[^`]*`)", text)
    for k in range(0, len(parts), 2):
        part = re.sub(r"(?<!\*)\*(?!\*)|\|", r"\\\g<0>", parts[k])
        # Code must stand apart from other text: a space that vanishes.
        if k > 0:
            part = re.sub(r"^(?=[^\s.,;:!?)\]'/-])", r"\\ ", part)
        if k + 1 < len(parts):
            part = re.sub(r"(?<=[^\s(\['/-])$", r"\\ ", part)
        parts[k] = part
    return "".join(parts)


def language(block: list[str]) -> str:
    """Return what an indented block is written in: Python, or formulas."""
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
    """Make the `__init__` that a class gets from its fields."""
    fields = [ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign)]
    return ast.parse(f"def __init__(self, {', '.join(fields)}): ...").body[0]


class Linked(ast.NodeTransformer):
    """Says of each name in an annotation where it is documented, for Sphinx to link."""

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
    """Return where the types are documented, by name; `~` hides the module's name."""
    return {
        name: f"~{dotted(path)}.{name}"
        for path in (PACKAGE / "_core" / "types.py", *rooms())
        for name in public_names(path)
        if name[0].isupper()
    }


def offer_public_names(app: Any) -> None:
    """Tell autodoc what is public: it takes the word of `__all__`."""
    for path in (PACKAGE / "_core" / "types.py", *rooms()):
        importlib.import_module(dotted(path)).__all__ = public_names(path)


def read_docstring(
    app: Any, what: str, name: str, obj: Any, _: Any, lines: list
) -> None:
    """Hand the docstring on to napoleon as reStructuredText."""
    lines[:] = to_rst(lines)


def read_signature(app: Any, what: str, name: str, obj: Any, *_: Any) -> tuple | None:
    """Give the signature as it is written."""
    try:
        return signature(obj)
    except (OSError, TypeError, AssertionError):  # It has none, as an alias.
        return None


def is_field(app: Any, what: str, name: str, obj: Any, *_: Any) -> bool | None:
    """Leave out the fields of a class: its docstring has them as attributes."""
    ours = (getattr(obj, "__module__", None) or "").startswith("hfjax")
    kept = ours or isinstance(obj, property | enum.Enum)
    return True if what == "class" and not kept else None


def write_front_door(app: Any, error: Exception | None) -> None:
    """Lead from the folder of the site to its first page."""
    if error is None and app.builder.name == "html":
        page = f"{app.config.root_doc}.html"
        refresh = f'<meta http-equiv="refresh" content="0; url={page}">'
        door = f'<!doctype html>{refresh}<a href="{page}">{app.config.project}</a>\n'
        (Path(app.outdir) / "index.html").write_text(door)


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("builder-inited", offer_public_names)
    # Before napoleon, which reads the sections.
    app.connect("autodoc-process-docstring", read_docstring, priority=400)
    app.connect("autodoc-process-signature", read_signature)
    app.connect("autodoc-skip-member", is_field)
    app.connect("build-finished", write_front_door)
    return {"parallel_read_safe": True}
