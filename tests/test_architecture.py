"""The direction of imports, and what importing the package costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tstitch_jax"
CONVERT = ROOT / "checkpoints_convert"

# A module may import from a lower rank only; modules of one rank do not know each other.
RANKS = {
    "types": 0,
    "checks": 1,
    "schedules": 2,
    "networks": 1,
    "tokenizer": 2,
    "pictures": 1,
    "charts": 1,
    "files": 0,
    "records": 1,
    "shards": 1,
    "hosts": 1,
    "prediction": 3,
    "plan": 2,
    "guidance": 4,
    "solvers": 3,
    "stitch": 3,
    "checkpoint": 4,
    "evaluation": 3,
    "sampler": 4,
    "checkpoints_convert": 5,
    "parallel": 5,
    "conditioning": 5,
    "hub": 6,
    "training": 7,
    "pipeline": 6,
    "generation": 7,
    "exporting": 7,
    "costs": 7,
    "calibration": 8,
    "sweep": 8,
    "__init__": 9,
    "cli": 10,
}
CORE = {
    "types", "checks", "schedules", "prediction", "plan", "guidance", "solvers", "stitch",
    "sampler",
}  # fmt: skip
CORE_MAY_IMPORT = {"jax", "numpy", "jaxtyping"}


def module_of(path: Path) -> str:
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
            if node.module == "tstitch_jax":
                yield from (f"tstitch_jax.{alias.name}" for alias in node.names)
            else:
                yield node.module


FILES = sorted([*PACKAGE.rglob("*.py"), *CONVERT.rglob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path):
    here = module_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == CONVERT.name:
            there = CONVERT.name
        elif parts[0] == "tstitch_jax":
            there = parts[1] if len(parts) > 1 and parts[1] in RANKS else "__init__"
        else:
            if here in CORE:
                assert parts[0] in CORE_MAY_IMPORT | set(sys.stdlib_module_names)
            continue
        if there != here:
            assert RANKS[there] < RANKS[here], f"{here} imports {there}"


def test_three_concepts_do_not_know_each_other():
    for here, others in {
        "solvers": {"stitch", "sampler", "networks", "plan"},
        "stitch": {"solvers", "sampler", "networks"},
        "sampler": {"solvers", "stitch", "networks", "plan"},
    }.items():
        for path in FILES:
            if module_of(path) == here:
                known = {name.split(".")[1] for name in imports(path) if "tstitch_jax." in name}
                assert not known & others, f"{path} imports {known & others}"


def test_one_scan_and_one_place_that_branches():
    def users(*primitives):
        for path in FILES:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr in primitives:
                    yield module_of(path)

    assert list(users("scan", "while_loop", "fori_loop")) == ["sampler"]
    assert set(users("switch")) == {"stitch"}
    # Of the solvers two leave an evaluation out; networks are chosen in one place.
    assert set(users("cond")) == {"stitch", "solvers"}


def test_import_is_light():
    code = (
        "import sys, tstitch_jax; heavy = {'torch', 'tensorflow', 'orbax', 'matplotlib', 'optax', "
        "'tensorflow_datasets', 'PIL', 'safetensors', 'huggingface_hub', 'tokenizers', "
        "'checkpoints_convert'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
