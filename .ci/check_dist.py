"""Check what the wheel and the source distribution contain: `check_dist.py DIST [TAG]`.

DIST is a folder with one of each, as `python -m build` or `uv build` leaves it. With a
tag, such as `v0.1.0`, both must be of that version.
"""

import re
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
FOLDERS = (
    ".ci",
    ".github",
    "benchmarks",
    "docs",
    "examples",
    "hfjax",
    "notebooks",
    "tests",
)
FILES = (
    *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile"),
    *("PKG-INFO", "README.md", "SECURITY.md", "pyproject.toml"),
)
MADE = "__pycache__", "_build", ".ipynb_checkpoints", ".pytest_cache", ".ruff_cache"


def in_checkout(*folders: str) -> set[str]:
    """Return the files of these folders, without what tools leave there."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if path.is_file() and not set(MADE) & set(path.relative_to(ROOT).parts)
    }


def faults_of_wheel(names: Iterable[str]) -> list[str]:
    """Say what is missing from a wheel, and what should not be in it.

    Args:
      names: the files in the wheel.

    Returns:
      A sentence for each fault.
    """
    names = set(names)
    metadata = {n for n in names if re.match(r"[^/]+\.dist-info/", n)}
    faults = [f"The wheel lacks {n}." for n in in_checkout("hfjax") - names]
    if "hfjax/py.typed" not in names:
        faults.append("The wheel lacks hfjax/py.typed.")
    if not any(re.fullmatch(r"[^/]+/licenses/LICENSE", n) for n in metadata):
        faults.append("The wheel lacks the licence.")
    beside = {n for n in names - metadata if not n.startswith("hfjax/")}
    beside |= {n for n in names if PurePosixPath(n).name.startswith("test_")}
    return faults + [f"The wheel should not have {n}." for n in beside]


def faults_of_sdist(names: Iterable[str]) -> list[str]:
    """Say what is missing from a source distribution.

    Args:
      names: the files in it, each below the one folder that it unpacks to.

    Returns:
      A sentence for each fault.
    """
    inside = {name.partition("/")[2] for name in names}
    missing = (in_checkout(*FOLDERS) | set(FILES)) - inside
    return [f"The source distribution lacks {name}." for name in missing]


def faults(dist: Path, tag: str | None = None) -> list[str]:
    """Say what is wrong with the two files of a folder.

    Args:
      dist: the folder.
      tag: the version that both should have; None is any.

    Returns:
      A sentence for each fault, sorted.
    """
    wheels, sdists = sorted(dist.glob("*.whl")), sorted(dist.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        return [
            f"{dist} has {len(wheels)} wheels and {len(sdists)} sdists, not 1 of each."
        ]
    with zipfile.ZipFile(wheels[0]) as wheel:
        found = faults_of_wheel(wheel.namelist())
    with tarfile.open(sdists[0]) as sdist:
        found += faults_of_sdist(m.name for m in sdist.getmembers() if m.isfile())
    if tag is not None:
        name = f"hfjax-{tag.removeprefix('v')}"
        expected = f"{name}-py3-none-any.whl", f"{name}.tar.gz"
        for path, wanted in zip((wheels[0], sdists[0]), expected, strict=True):
            if path.name != wanted:
                found.append(f"{path.name} should be {wanted}: see hfjax.__version__.")
    return sorted(found)


if __name__ == "__main__":
    found = faults(Path(sys.argv[1]), *sys.argv[2:])
    print(
        "\n".join(found) or f"{sys.argv[1]}: wheel and source distribution are whole."
    )
    sys.exit(bool(found))
