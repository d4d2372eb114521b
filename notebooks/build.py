"""Execute the scripts beside this one into notebooks: `python notebooks/build.py`."""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import jupytext
import nbclient
import nbformat

HERE = Path(__file__).parent


def main() -> None:
    """Write a notebook for every script, with what its cells print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for them")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at a time")
    known = sorted({path.stem for path in HERE.glob("*.py")} - {Path(__file__).stem})
    parser.add_argument("names", nargs="*", help=f"of {', '.join(known)}; default: all")
    args = parser.parse_args()
    if unknown := set(args.names) - set(known):
        parser.error(f"there is no {', '.join(sorted(unknown))} among {known}")
    args.out.mkdir(parents=True, exist_ok=True)
    names = args.names or known
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(build, names, [args.out] * len(names)):
            pass  # Raises what a cell has raised.


def build(name: str, folder: Path) -> None:
    """Execute one script into a notebook.

    Args:
      name: of the script, without its suffix.
      folder: that gets the notebook.
    """
    # Pictures go into the notebook, whatever backend the shell asks matplotlib for.
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    notebook = jupytext.read(HERE / f"{name}.py")
    client = nbclient.NotebookClient(
        notebook, kernel_name="python3", record_timing=False, coalesce_streams=True
    )
    client.execute(cwd=str(HERE.parent))
    # Only what the script and its output decide: else every build is a change.
    notebook.metadata.pop("language_info", None)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
    nbformat.write(notebook, folder / f"{name}.ipynb")


if __name__ == "__main__":
    main()
