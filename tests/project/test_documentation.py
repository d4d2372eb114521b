"""What is public is documented, and what is documented is on a page of the site.

These tests only read files: nothing is imported from hfjax, compiled or built.
"""

import ast
import functools
import pathlib
import re
import runpy
import tokenize

import pytest

pytestmark = pytest.mark.every

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
SITE = runpy.run_path(str(DOCS / "docstrings.py"))
MODULES = SITE["public_modules"]()
public_module, dotted = SITE["public_module"], SITE["dotted"]
# A paper and the section (of some papers we do not know it), a published program, a
# measurement, or our choice.
SOURCE = re.compile(
    r"(M&S \(2012\)|Martens \(2010\)), (section|equation|algorithm) \d+(\.\d+)?"
    r"|(?!M&S|Martens \()[A-Z][^;,()]* \((19|20)\d\d\)(, section \d+(\.\d+)?)?"
    r"|(Martens'|Sutskever's) program|measured|our choice"
)
FIGURES = re.compile(r"\]\(\.\./benchmarks/results/\w+\.md\)")
FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)


class Entry:
    """A public name: where it is, its node in the source, and its docstring."""

    def __init__(self, path, name, node, doc, home):
        self.where = f"{public_module(path)}.{name}"
        self.node, self.doc, self.home = node, doc or "", home
        self.is_class = isinstance(node, ast.ClassDef)
        self.is_function = isinstance(node, ast.FunctionDef)
        names = [ast.unparse(d) for d in getattr(node, "decorator_list", [])]
        self.is_property = "property" in names
        self.is_enum = self.is_class and any(
            "Enum" in ast.unparse(base) for base in node.bases
        )

    def section(self, *titles):
        """Return the text of a section of the docstring, "" if there is none."""
        found = [
            re.search(rf"^{title}:\n((?:(?:  .*)?\n)+)", self.doc + "\n", re.MULTILINE)
            for title in titles
        ]
        return "".join(match[1] for match in found if match)

    def described(self):
        """Return what is said of each argument or field, by name."""
        entries = re.split(
            r"^  \*{0,2}(\w+): ", self.section("Args", "Attributes"), flags=re.MULTILINE
        )
        return dict(zip(entries[1::2], entries[2::2], strict=True))

    @property
    def function(self):
        """The function that is called: of a class its constructor, if it is written."""
        if self.is_function:
            return self.node
        written = [n for n in self.node.body if getattr(n, "name", "") == "__init__"]
        return written[0] if written else None

    def parameters(self):
        """Return the parameters, or the fields of a class, and their defaults."""
        if self.function is None:
            fields = [n for n in self.node.body if isinstance(n, ast.AnnAssign)]
            return {n.target.id: n.value for n in fields}
        args = self.function.args
        plain = [a.arg for a in args.posonlyargs + args.args]
        defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
        keywords = [a.arg for a in args.kwonlyargs]
        both = dict(zip(plain + keywords, defaults + args.kw_defaults, strict=True))
        extra = [a.arg for a in (args.vararg, args.kwarg) if a]
        return {k: v for k, v in both.items() if k != "self"} | dict.fromkeys(extra)

    def own_nodes(self):
        """Walk through the body, but not through functions within it."""
        pending = list(self.function.body) if self.function else []
        while pending:
            node = pending.pop()
            yield node
            if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
                pending += ast.iter_child_nodes(node)


@functools.cache
def definitions(path):
    """Return the top-level statements of a file by the name that each defines."""
    found, before = {}, None
    for node in SITE["statements"](ast.parse(path.read_text()).body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = (node, ast.get_docstring(node))
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            before = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            found[ast.unparse(before)] = (node, None)
        elif isinstance(node, ast.Expr) and before is not None:
            name = ast.unparse(before)
            found[name] = (found[name][0], node.value.value)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name] = (node, None)
        if not isinstance(node, ast.AnnAssign | ast.Assign):
            before = None
    return found


def resolved(path, name):
    """Follow `from hfjax.module import name as name` to where it is defined."""
    node, doc = definitions(path)[name]
    if isinstance(node, ast.ImportFrom):
        return resolved(SITE["file_of"](node.module, name), name)
    return node, doc, path


@functools.cache
def entries():
    """Return every public name of every module, and the methods of its classes."""
    found = []
    for path in MODULES:
        for name in SITE["public_names"](path):
            node, doc, home = resolved(path, name)
            found.append(Entry(path, name, node, doc, home))
            for method in getattr(node, "body", []) if found[-1].is_class else []:
                public = not getattr(method, "name", "_").startswith("_")
                if isinstance(method, ast.FunctionDef) and public:
                    doc = ast.get_docstring(method)
                    whole = f"{name}.{method.name}"
                    found.append(Entry(path, whole, method, doc, home))
    return found


def calls():
    """Return what is called with arguments: functions, methods, constructors."""
    return [
        entry
        for entry in entries()
        if (entry.is_function and not entry.is_property)
        or (entry.is_class and not entry.is_enum)
    ]


def test_every_public_name_has_a_docstring():
    assert len(entries()) > 100
    assert not [entry.where for entry in entries() if not entry.doc]


def test_what_the_package_exports_is_a_public_module_or_a_name_of_one():
    init = SITE["PACKAGE"] / "__init__.py"
    known = {public_module(path) for path in MODULES}
    known |= {entry.where.split(".", 1)[1] for entry in entries()}
    assert set(SITE["public_names"](init)) <= known


def test_every_public_module_is_in_the_table_of_the_reference():
    table = re.findall(r"^\| \[.*", (DOCS / "api/index.md").read_text(), re.MULTILINE)
    named = re.findall(r"\[`(\w+)`\]\(\1\.md\)", "\n".join(table))
    assert len(named) == len(set(named))
    assert {public_module(path) for path in MODULES} <= set(named)


def test_a_public_package_exports_what_its_modules_offer():
    packages = {path.parent for path in MODULES if public_module(path) != path.stem}
    assert {path.name for path in packages} == {
        "curvature",
        "losses",
        "preconditioners",
    }
    for folder in packages:
        offered = {
            name
            for path in MODULES
            if path.parent == folder and public_module(path) == folder.name
            for name in SITE["public_names"](path)
        }
        assert set(SITE["public_names"](folder / "__init__.py")) == offered


def test_every_reason_of_an_enumeration_is_explained():
    for entry in entries():
        if entry.is_enum:
            kinds = [type(node) for node in entry.node.body[1:]]
            assert kinds == [ast.Assign, ast.Expr] * (len(kinds) // 2), entry.where


def test_every_parameter_is_described_and_nothing_else():
    wrong = {
        entry.where: sorted(set(entry.parameters()) ^ set(entry.described()))
        for entry in calls()
        if set(entry.parameters()) != set(entry.described())
    }
    assert not wrong


def test_what_is_returned_is_described():
    assert not [
        entry.where
        for entry in calls()
        if entry.is_function
        and ast.unparse(entry.node.returns) != "None"
        and not entry.section("Returns")
    ]


def test_every_error_that_is_raised_is_described():
    for entry in calls():
        raised = {
            ast.unparse(node.exc.func)
            for node in entry.own_nodes()
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        }
        said = set(re.findall(r"^  (\w+): ", entry.section("Raises"), re.MULTILINE))
        assert raised <= said, entry.where


def defaults():
    """Return each default by `module.function(option)`, and whether it needs a row."""
    found = {}
    for entry in calls():
        for option, default in entry.parameters().items():
            if default is None:
                continue
            if isinstance(default, ast.Name) and default.id.startswith("_"):
                # The page gives the value of a private constant, not its name. (A private
                # function has none.)
                node = definitions(entry.home)[default.id][0]
                default = getattr(node, "value", default)
            numbers = any(
                type(node.value) in (int, float)
                for node in ast.walk(default)
                if isinstance(node, ast.Constant)
            )
            # Functions also need a row for a text, a name or a call. Fields of classes
            # do not, and None, True and False may have one.
            text = isinstance(default, ast.Constant) and isinstance(default.value, str)
            chosen = text or isinstance(default, ast.Name | ast.Attribute | ast.Call)
            needed = numbers or (entry.is_function and chosen)
            found[f"{entry.where}({option})"] = (ast.unparse(default), needed)
    return found


@functools.cache
def rows():
    """Return the rows of the page of defaults: options, default, source, reason."""
    found = []
    sections = re.split(r"^## ", (DOCS / "defaults.md").read_text(), flags=re.MULTILINE)
    for section in sections[1:]:
        module = re.match(r"`(\w+)`\n", section)
        table = re.findall(r"^\| (?!option |---)(.*) \|$", section, re.MULTILINE)
        assert bool(module) == bool(table), section.split("\n")[0]
        for line in table:
            options, default, source, reason = re.split(r"(?<= )\|", f"{line} ")
            names = options.strip().split(", ")
            assert all(re.fullmatch(r"`[\w.]+\(\w+\)`", name) for name in names), line
            where = [f"{module[1]}.{name[1:-1]}" for name in names]
            found.append((where, default.strip()[1:-1], source.strip(), reason.strip()))
    return found


def test_every_default_that_is_a_number_or_a_choice_has_a_row_with_its_value():
    in_code = defaults()
    on_page = [(option, row[1]) for row in rows() for option in row[0]]
    options = [option for option, _ in on_page]
    assert len(options) > 100
    twice = {option for option in options if options.count(option) > 1}
    assert not twice
    stale = set(options) - set(in_code)
    assert not stale
    missing = {name for name, (_, needed) in in_code.items() if needed} - set(options)
    assert not missing
    other = {
        option: (default, in_code[option][0])
        for option, default in on_page
        if ast.unparse(ast.parse(default, mode="eval")) != in_code[option][0]
    }
    assert not other


def test_every_default_has_a_source():
    for options, _, source, reason in rows():
        kinds = source.split("; ")
        assert all(SOURCE.fullmatch(kind) for kind in kinds), (options, source)
        assert "measured" not in kinds or FIGURES.search(reason), options
        assert "our choice" not in kinds or len(reason.split()) > 2, options


@pytest.mark.parametrize("path", MODULES, ids=public_module)
def test_every_public_module_has_an_example(path):
    module = ast.get_docstring(ast.parse(path.read_text()))
    docs = [e.doc for e in entries() if e.where.split(".")[0] == public_module(path)]
    assert any(">>>" in doc for doc in [module, *docs])


def test_markdown_of_docstrings_becomes_what_sphinx_reads():
    to_rst = SITE["to_rst"]
    assert to_rst(["| a | b |", "|---|---|", "| `x` | 1 |"])[2:6] == [
        "",
        "   * - a",
        "     - b",
        "   * - `x`",
    ]
    assert to_rst(["    f(θ) = ½ θ²"])[0] == ".. code-block:: none"
    assert to_rst(["    f(x) = g(y)"])[0] == ".. code-block:: none"
    assert to_rst(["    y = f(x)"])[0] == ".. code-block:: python"
    assert to_rst(["|λ| `a`^2, x*", "  >>> x * y"])[0] == r"\|λ\| `a`\ ^2, x\*"
    assert to_rst(["Example:", "  >>> x * y"]) == ["Example:", "  >>> x * y"]
    assert to_rst(["  objective: f."]) == [r"  objective: f\."]


def toctree(page):
    """Return the pages that a page's tables of contents lead to."""
    found = set()
    for block in re.findall(
        r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
    ):
        lines = [line for line in block.split("\n") if line and line[0] != ":"]
        for line in lines:
            target = re.sub(r".*<(.*)>", r"\1", line)
            paths = [
                path.resolve()
                for suffix in (".md", ".ipynb")
                for path in page.parent.glob(target + suffix)
            ]
            assert paths, f"{page.name} leads to {target}, which is no page"
            found |= set(paths)
    return found


@functools.cache
def pages():
    """Return every page that can be reached from the first one."""
    found, pending = set(), {DOCS / "index.md"}
    while pending:
        page = pending.pop()
        found.add(page)
        if page.suffix == ".md":
            pending |= toctree(page) - found
    return found


def test_every_page_is_reached_from_the_first():
    written = set(ROOT.glob("*.md")) | set(DOCS.glob("*.md")) | set(DOCS.glob("*/*.md"))
    written |= set(ROOT.glob("notebooks/*.ipynb"))
    written |= set(ROOT.glob("benchmarks/results/*.md"))
    written = {path for path in written if "_build" not in path.parts}
    assert not [str(p.relative_to(ROOT)) for p in written - pages()]


def test_every_public_module_has_a_page():
    for path in MODULES:
        page = DOCS / "api" / f"{public_module(path)}.md"
        assert page.exists(), (
            f"`{public_module(path)}` needs a page {page}, and a line in index.md"
        )
        assert f".. automodule:: {dotted(path)}\n" in page.read_text()
    known = {public_module(path) for path in MODULES} | {"index", "types"}
    assert {path.stem for path in DOCS.glob("api/*.md")} == known


def test_every_link_of_a_page_leads_somewhere():
    links = 0
    for page in pages():
        text = FENCE.sub("", page.read_text()) if page.suffix == ".md" else ""
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not re.match(r"https?:", target):
                links += 1
                path = page.parent / target.split("#")[0]
                assert path.exists(), f"{page.name} links to {target}"
    assert links > 30


def test_every_command_that_a_choice_stands_on_is_beside_its_figures():
    figures = "".join(p.read_text() for p in ROOT.glob("benchmarks/results/*.md"))
    figures = re.sub(r" \\\n *", " ", figures)
    cited = (DOCS / "choosing.md").read_text().split("## Figures")[1]
    commands = re.findall(r"`(python -m benchmarks [^`]+)`", cited)
    assert len(commands) > 5
    assert not [command for command in commands if command not in figures]


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    version = re.search(
        r'__version__ = "(.*)"', (SITE["PACKAGE"] / "__init__.py").read_text()
    )
    assert f"\nversion: {version[1]}\n" in citation


def test_pages_and_docstrings_speak_no_jargon_of_the_house():
    folders = ROOT / "docs", ROOT / "benchmarks", ROOT / "hfjax", ROOT / "examples"
    paths = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
    paths += [path for folder in folders for path in folder.rglob("*.md")]
    paths += [path for folder in folders for path in folder.rglob("*.py")]
    jargon = re.compile(r"\b(ibid|as it comes|not kept|rooms?|heuristic)\b", re.I)
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in paths
        if "_build" not in path.parts
        for match in jargon.finditer(path.read_text())
    }
    assert not found


def test_code_has_a_comment_for_every_twenty_five_lines():
    comments = code = 0
    for path in (ROOT / "hfjax").rglob("*.py"):
        with path.open("rb") as file:
            kinds = {}
            for token in tokenize.tokenize(file.readline):
                kinds.setdefault(token.start[0], set()).add(token.type)
        comments += sum(tokenize.COMMENT in each for each in kinds.values())
        code += sum(
            bool(each & {tokenize.NAME, tokenize.OP}) for each in kinds.values()
        )
    assert comments >= 0.04 * code


LISTS = {"index", "report_map", "defaults", "faults", "glossary", "stability"}
"""Pages that only list things, and have no example."""


def test_every_page_has_an_example():
    pages = [path for path in DOCS.glob("*.md") if path.stem not in LISTS]
    assert len(pages) > 12
    for page in pages:
        assert re.search(r"^ *```(python|console)\n", page.read_text(), re.M), page.name
