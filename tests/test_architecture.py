"""The direction of imports, and what importing the package costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tstitch_jax"
CONVERT = ROOT / "checkpoints_convert"

# A folder imports from itself and from folders before it.
ORDER = (
    "core", "report", "models", "checkpoints_convert", "hub", "evaluation", "sampling", "jobs",
    "training", "__init__", "cli",
)  # fmt: skip
CORE_MAY_IMPORT = {"jax", "numpy", "jaxtyping", "tstitch_jax"}


def folder_of(path: Path) -> str:
    if CONVERT in path.parents:
        return CONVERT.name
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path):
    """Absolute names of everything a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = sorted([*PACKAGE.rglob("*.py"), *CONVERT.rglob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    here = folder_of(path)
    for name in imports(path):
        parts = name.split(".")
        if here == "core":
            assert parts[0] in CORE_MAY_IMPORT | set(sys.stdlib_module_names)
        if parts[0] == CONVERT.name:
            there = CONVERT.name
        elif parts[0] == PACKAGE.name:
            there = parts[1] if len(parts) > 1 and parts[1] in ORDER else "__init__"
        else:
            continue
        if there != here:
            assert ORDER.index(there) < ORDER.index(here), f"{here} imports {name}"


def test_solvers_stitching_and_the_loop_do_not_know_each_other():
    core = PACKAGE / "core"
    for files, others in (
        (core.glob("solvers/*.py"), {"denoisers", "loop", "guidance", "plan"}),
        ([core / "denoisers.py", core / "guidance.py"], {"solvers", "loop"}),
        ([core / "loop.py"], {"solvers", "guidance", "plan"}),
    ):
        for path in files:
            known = {name.split(".")[2] for name in imports(path) if "tstitch_jax." in name}
            assert not known & others, f"{path} imports {known & others}"


def test_one_scan_and_one_place_that_branches():
    def users(*primitives):
        for path in FILES:
            for node in ast.walk(ast.parse(path.read_text())):
                of_lax = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "jax.lax"
                if of_lax and node.attr in primitives:
                    yield "/".join(path.relative_to(ROOT).with_suffix("").parts[1:3])

    assert list(users("scan", "while_loop", "fori_loop")) == ["core/loop"]
    assert set(users("switch")) == {"core/denoisers"}
    # Two of the solvers leave an evaluation out; networks are chosen in one place.
    assert set(users("cond")) == {"core/denoisers", "core/solvers"}


def test_import_is_light():
    code = (
        "import sys, tstitch_jax; heavy = {'torch', 'tensorflow', 'orbax', 'matplotlib', 'optax', "
        "'tensorflow_datasets', 'PIL', 'safetensors', 'huggingface_hub', 'tokenizers', "
        "'checkpoints_convert'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
