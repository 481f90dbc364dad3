"""The reference has every public name, and every example in a docstring is run."""

import doctest
import importlib
import inspect
import re
import runpy
from pathlib import Path

import pytest

import checkpoints_convert
import tstitch_jax as ts
import tstitch_jax.training
from tstitch_jax import evaluation
from tstitch_jax.core import solvers

ROOT = Path(__file__).parents[1]
REFERENCE = {
    name: page.name
    for page in sorted((ROOT / "docs" / "reference").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
}
PUBLIC = [
    f"{module.__name__}.{name}"
    for module in (ts, solvers, evaluation, checkpoints_convert, tstitch_jax.training)
    for name in module.__all__
    if not inspect.ismodule(getattr(module, name))
]
PACKAGES = ("tstitch_jax", "checkpoints_convert")
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.name != "__main__.py"
]


def find(name):
    """The object of a dotted name."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError:
        return getattr(find(module), attribute)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_reference_has_every_public_name(name):
    wanted = find(name)
    listed = [entry for entry in REFERENCE if find(entry) is wanted]
    assert listed, f"{name} is in no page of docs/reference"
    assert len(listed) == 1, f"{name} is there as {' and '.join(listed)}"


@pytest.mark.parametrize("name", REFERENCE)
def test_what_the_reference_lists_is_documented(name):
    # Of a function in a module of its name, mkdocstrings takes the module.
    path = ROOT / name.replace(".", "/")
    assert not path.is_dir(), f"{name} is a module"
    assert not path.with_suffix(".py").exists(), f"{name} is a module"
    value = find(name)
    if inspect.isfunction(value) or inspect.isclass(value):
        text = inspect.getdoc(value) or ""
        # A dataclass without a docstring gets its signature as one.
        assert text, name
        assert not text.startswith(f"{value.__name__}("), name
    else:  # a constant, which has its text below it
        own = name.rpartition(".")[2]
        sources = [path.read_text() for each in PACKAGES for path in (ROOT / each).rglob("*.py")]
        below = re.compile(rf'^{own}(: [^=]+)? = [^"]*(?:"[^"\n]+"[^"]*)*?\n"""', re.MULTILINE)
        assert any(map(below.search, sources)), f"{name} has no text below it"


def test_every_example_of_a_docstring_is_run():
    """As doctest finds them, which does not look into what a decorator hides."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in MODULES:
        module = importlib.import_module(name)
        examples = {
            example.source
            for test in finder.find(module, name)
            for example in test.examples
            if test.filename and Path(test.filename).name == Path(module.__file__).name
        }
        text = Path(module.__file__).read_text()
        written = re.findall(r"^\s*>>> (.*)$", text, re.MULTILINE)
        found = "\n".join(examples)
        for line in written:
            assert line in found, f"{name}: {line!r} is not run"
        assert "```" not in text, f"{name}: an example must be one for doctest"


def test_pages_are_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs')}\n" in navigation, page


def test_the_tables_of_results_are_those_of_the_files():
    """They are written by ``docs/make_results.py``, never by hand."""
    text = (ROOT / "docs" / "results.md").read_text()
    assert runpy.run_path(str(ROOT / "docs" / "make_results.py"))["page"](text) == text
    assert text.count("<!-- end -->") == len(re.findall(r"<!-- (?!end)\w+ -->", text)) >= 5
