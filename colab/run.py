"""Runs the notebooks without a browser, as the tests and the guide do.

    python colab/run.py quickstart              # as on Colab, into runs/colab/quickstart.ipynb
    python colab/run.py quickstart fid --small  # with the tests' settings

Needs nbclient and ipykernel (``pip install -e '.[test]'``).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent

NAMES = ("quickstart", "imagenet_dit", "stable_diffusion", "your_own_denoiser", "fid")
"""In the order in which they are read."""

SMALL: dict[str, dict[str, Any]] = {
    "quickstart": dict(steps=10, repeats=1, fractions=[0.0, 0.5, 1.0]),
    "imagenet_dit": dict(labels=[1, 2], fractions=[0.0, 0.4, 1.0], steps=3, conditions=4),
    "stable_diffusion": dict(
        prompts=["a cat", "two dogs"], fractions=[0.0, 0.4, 1.0], steps=5, seed=1
    ),
    "your_own_denoiser": dict(points=160, steps=20),
    "fid": dict(num=20, seeds=[0], fractions=[0.0, 1.0], steps=2, batch=10),
}
"""Parameters with which each takes seconds on a CPU."""


def read(name: str) -> Any:
    """The notebook of that name."""
    return nbformat.read(HERE / f"{name}.ipynb", as_version=4)


def tagged(notebook: Any, tag: str) -> int:
    """The place of the one cell with that tag."""
    (place,) = (i for i, c in enumerate(notebook.cells) if tag in c.metadata.get("tags", ()))
    return place


def execute(
    name: str, folder: Path, parameters: dict[str, Any] | None = None, timeout: float | None = None
) -> Any:
    """The executed notebook; raises ``nbclient.exceptions.CellExecutionError`` if a cell fails.

    Args:
        name: Of ``NAMES``.
        folder: Where it runs, and leaves its files.
        parameters: Instead of those of its cell ``parameters``, in a cell of their own below it.
        timeout: Seconds for a cell.
    """
    notebook = read(name)
    if parameters:
        known = notebook.cells[tagged(notebook, "parameters")].source
        for each in parameters:
            if f"{each} = " not in known:
                raise ValueError(f"{name} has no parameter {each}")
        source = "\n".join(f"{each} = {value!r}" for each, value in parameters.items())
        cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["injected-parameters"]})
        notebook.cells.insert(tagged(notebook, "parameters") + 1, cell)
    folder.mkdir(parents=True, exist_ok=True)
    resources = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, timeout=timeout, resources=resources).execute()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--small", action="store_true", help="with the tests' settings")
    arguments = parser.parse_args()
    for name in arguments.names:
        folder = HERE.parent / "runs" / "colab"
        notebook = execute(name, folder, SMALL[name] if arguments.small else None)
        nbformat.write(notebook, folder / f"{name}.ipynb")
        print(folder / f"{name}.ipynb")


if __name__ == "__main__":
    main()
