"""What MkDocs makes while it builds the guide, besides the pages of this folder.

The tutorials are the notebooks of ``colab/``, of which those that need no download are run here.
The command line's reference is its help. The changelog and the benchmarks lie elsewhere. Formulas
of docstrings become MathML, which browsers draw without a script.
"""

from __future__ import annotations

import base64
import re
import runpy
import tempfile
import xml.etree.ElementTree as etree
from pathlib import Path
from typing import Any

import griffe
import latex2mathml.converter
import markdown
from markdown.inlinepatterns import InlineProcessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
COLAB = runpy.run_path(str(ROOT / "colab" / "run.py"))

RUN: dict[str, dict[str, Any]] = {
    "quickstart": dict(steps=20, repeats=1),
    "your_own_denoiser": dict(points=1000),
}
"""Notebooks that are run, and with what; the others need networks or data from elsewhere."""

ELSEWHERE = {"benchmarks.md": "benchmarks/README.md", "changelog.md": "CHANGELOG.md"}


def _element(formula: str, display: str) -> etree.Element:
    """A formula as MathML."""
    markup = latex2mathml.converter.convert(" ".join(formula.split()), display=display)
    return etree.fromstring(re.sub(r' xmlns="[^"]*"', "", markup))  # which HTML does without


class _Math(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> Any:
        kind, formula = m.groups()
        display = "block" if kind == "displaymath" else "inline"
        return _element(formula, display), m.start(0), m.end(0)


class _Dollars(InlineProcessor):
    """Formulas as GitHub takes them, between one dollar or two."""

    def handleMatch(self, m: re.Match[str], data: str) -> Any:
        display = "block" if m.group(1) == "$$" else "inline"
        return _element(m.group(2), display), m.start(0), m.end(0)


class Formulas(markdown.Extension):
    """Formulas in Markdown: ``:math:`` and ``:displaymath:`` roles, or between dollars."""

    def extendMarkdown(self, md: Any) -> None:
        pattern = _Math(r":(math|displaymath):`([^`]+)`", md)
        md.inlinePatterns.register(pattern, "math", 200)  # before code
        dollars = _Dollars(r"(\$\$?)(?!\s)([^$]+?)(?<!\s)\1", md)
        md.inlinePatterns.register(dollars, "dollars", 185)  # after code, before escapes


class Docstrings(griffe.Extension):
    """Brings what docstrings have and Markdown has not, formulas and doctests, into its form."""

    def on_instance(self, *, obj: griffe.Object, **more: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(
            r"\.\. math::\n((?:    .*\n)+)",
            lambda m: f":displaymath:`{' '.join(m.group(1).split())}`\n",
            obj.docstring.value + "\n",
        )
        doctest = r"(?m)^>>> .*(?:\n.+)*"
        obj.docstring.value = re.sub(doctest, lambda m: f"```pycon\n{m.group(0)}\n```", text)


def tutorial(name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as a page, and the pictures in it."""
    if name in RUN:
        with tempfile.TemporaryDirectory() as folder:
            notebook = COLAB["execute"](name, Path(folder), RUN[name])
        said = ", ".join(f"`{key} = {value}`" for key, value in RUN[name].items())
        note = f"    What is shown below was made while this page was built, on a CPU, with {said}."
    else:
        notebook = COLAB["read"](name)
        note = (
            "    It needs files from elsewhere, so this page has been built without its pictures."
        )
    parts, pictures = [], {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            linked = r"[`\1.ipynb`](\1.md)"
            parts.append(re.sub(r"`(\w+)\.ipynb`", linked, cell.source))
            if len(parts) == 1:
                file = f"colab/{name}.ipynb"
                parts.append(f'!!! note "A notebook: `{file}`"\n{note}')
            continue
        if "injected-parameters" in cell.metadata.get("tags", ()):
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.get("outputs", ()):
            if output.get("name") == "stdout":
                parts.append(f"```text\n{output.text.rstrip()}\n```")
            picture = output.get("data", {}).get("image/png")
            if picture:
                file = f"{name}_{len(pictures) + 1}.png"
                pictures[file] = base64.b64decode(picture)
                parts.append(f"![What the cell draws]({file})")
    return "\n\n".join(parts), pictures


def command_line() -> str:
    """The help of the program and of each command."""
    from tstitch_jax.cli import make_parser

    parser = make_parser()
    (commands,) = (a for a in parser._actions if a.dest == "command")
    every = {"tstitch": parser} | {
        f"tstitch {k}": v for k, v in dict(commands.choices or {}).items()
    }
    parts = ["# Command line"]
    for name, each in every.items():
        parts.append(f"## {name}\n\n```text\n{each.format_help().rstrip()}\n```")
    return "\n\n".join(parts)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.markdown_extensions.append(Formulas())  # pyright: ignore[reportArgumentType]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    def add(path: str, content: str | bytes) -> None:
        files.append(File.generated(config, path, content=content))

    for path, source in ELSEWHERE.items():
        add(path, (ROOT / source).read_text())
    add("reference/command_line.md", command_line())
    for name in COLAB["NAMES"]:
        page, pictures = tutorial(name)
        add(f"tutorials/{name}.md", page)
        for file, content in pictures.items():
            add(f"tutorials/{file}", content)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    for path, source in ELSEWHERE.items():
        markdown = markdown.replace(f"](../{source})", f"]({path})")
    return markdown
