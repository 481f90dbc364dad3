"""The notebooks, cell by cell, with small settings and without a network."""

import dataclasses
import gzip
import os
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import UNOPTIMISED
from helpers import GOLDEN, random_params, write_text_pair
from test_hub import server  # noqa: F401  # a fixture

import tstitch_jax as ts
from checkpoints_convert import convert
from tstitch_jax.hub import catalog

ROOT = Path(__file__).parents[1]
COLAB = runpy.run_path(str(ROOT / "colab" / "run.py"))
NAMES = COLAB["NAMES"]
ADDRESS = re.search(r'url="https://github.com/(.+)"', (ROOT / "setup.py").read_text()).group(1)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """What a kernel finds: an empty cache, one device, and neither torch nor TensorFlow."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("torch", "tensorflow"):
        (blocked / f"{name}.py").write_text("raise ImportError('not needed')\n")
    path = [str(blocked), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("TSTITCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XLA_FLAGS", UNOPTIMISED)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own, which shows figures
    return tmp_path


def run(name, folder, **parameters):
    """The text that the notebook printed, and how many pictures it drew."""
    parameters = COLAB["SMALL"][name] | parameters
    notebook = COLAB["execute"](name, folder / "work", parameters, timeout=300)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    return text, sum("image/png" in output.get("data", {}) for output in outputs)


def test_quickstart(offline):
    text, drawn = run("quickstart", offline, fraction=0.3)
    assert drawn == 5
    assert "fashion-s x 3, fashion-xl x 7" in text
    early, late = map(float, re.search(r"first fifth: (.+), last fifth: (.+)", text).groups())
    assert early < late / 2
    speedup = float(re.search(r"(.+) times fewer multiply-adds", text).group(1))
    assert 1.3 < speedup < 1.5


def test_imagenet(offline, server, monkeypatch):  # noqa: F811
    """The published names, whose files are tiny here; the autoencoder's come from a hub."""
    downloads = offline / "cache" / "downloads"
    downloads.mkdir(parents=True)
    for name, golden in (("dit-s-2-256", "small"), ("dit-xl-2-256", "large")):
        shutil.copy(
            GOLDEN / "tstitch_tiny" / f"{golden}.pt", downloads / catalog.PUBLIC[name].files[0]
        )
    entry, golden = catalog.PUBLIC["sd-vae-ft-ema"], GOLDEN / "diffusers_tiny" / "vae"
    server.files = {
        f"/{entry.repo}/resolve/main/{file}": (golden / file).read_bytes() for file in entry.files
    }
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(offline / "hf"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    heads = {"dit-s-2-256": 2, "dit-xl-2-256": 4}
    text, drawn = run("imagenet_dit", offline, num_heads=heads)
    assert drawn == 3
    assert "CC-BY-NC-4.0" in text
    assert "(2, 16, 16, 3)" in text
    assert "chosen: " in text
    assert "['dit-s-2-256', 'dit-xl-2-256']" in text
    assert ts.Plan.load(offline / "work" / "plan.json").steps == 3
    assert (offline / "work" / "fractions.png").exists()
    assert any(request.startswith("HEAD") for request in server.seen if request)


def test_stable_diffusion(offline):
    """Tiny networks of its kind, whose cards name the text encoder and the autoencoder."""
    folders = write_text_pair(offline)
    convert(GOLDEN / "diffusers_tiny" / "vae", offline / "coder")
    convert(GOLDEN / "clip_tiny" / "clip", offline / "clip")
    for seed, name in enumerate(("small", "large")):
        card = dataclasses.replace(
            ts.load(folders["a"]).card, name=name, image_shape=(8, 8, 4),
            autoencoder=str(offline / "coder"),
        )  # fmt: skip
        ts.save(offline / name, ts.make_network(card, random_params(card, seed)))
    pair = dict(small=str(offline / "small"), large=str(offline / "large"))
    text, drawn = run("stable_diffusion", offline, scorer=str(offline / "clip"), **pair)
    assert drawn == 3
    assert "multiply-adds" in text
    scores = re.findall(r"(0|0\.4|1) by .+small: CLIP score (\d+\.\d+) ±", text)
    assert [fraction for fraction, _ in scores] == ["0", "0.4", "1"]
    assert "chosen: " in text
    assert ts.Plan.load(offline / "work" / "plan.json").steps == 5


def test_your_own_denoiser(offline, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"{UNOPTIMISED} --xla_force_host_platform_device_count=2")
    text, drawn = run("your_own_denoiser", offline)
    assert drawn == 1
    assert set(re.findall(r"compilations: (\d+)", text)) == {"1"}
    shares = [int(share) for share in re.findall(r"(\d+)% near", text)]
    early, by_name, interleaved, late, network = shares
    assert early == by_name > 85
    assert network > 85
    assert late < interleaved < early
    assert re.findall(r"on (\d+) devices", text) == ["2", "2"]
    assert all(float(off) < 1e-5 for off in re.findall(r"off by at most (\S+)", text))
    ddim, own = (float(order) for order in re.findall(r"order (\S+)", text))
    assert abs(ddim - 1) < 0.1
    assert abs(own - 2) < 0.15


def test_fid(offline):
    """Its reference comes from a folder here, as its authors publish it: idx files, compressed."""
    generator = np.random.default_rng(0)
    for name, header, body in (
        ("t10k-images-idx3-ubyte", 16, generator.integers(0, 256, (24, 28, 28))),
        ("t10k-labels-idx1-ubyte", 8, np.arange(24) % 10),
    ):
        content = bytes(header) + body.astype(np.uint8).tobytes()
        (offline / f"{name}.gz").write_bytes(gzip.compress(content))
    text, drawn = run("fid", offline, data=offline.as_uri())
    assert drawn == 3
    assert "(24, 28, 28)" in text
    assert re.search(r"fd_fashion-features +\d", text)
    rows = [line.split() for line in text.splitlines() if re.match(r"[01] ", line)]
    assert [row[0] for row in rows] == ["0", "1"]
    assert "yes" in [row[-1] for row in rows]
    assert (offline / "work" / "sweep" / "results.csv").exists()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed(name):
    """Cells that Colab can open and install from, with parameters, and without outputs."""
    notebook = COLAB["read"](name)
    for tag in ("install", "parameters"):
        COLAB["tagged"](notebook, tag)
    first, everything = notebook.cells[0].source, (ROOT / "colab" / f"{name}.ipynb").read_text()
    at = f"https://colab.research.google.com/github/{ADDRESS}/blob/main/colab/{name}.ipynb"
    assert f"]({at})" in first
    assert f"git+https://github.com/{ADDRESS}" in everything
    for cell in notebook.cells:
        assert not cell.get("outputs"), f"{name} was saved with outputs"
        assert cell.get("execution_count") is None
    for other in re.findall(r"`(\w+)\.ipynb`", everything):
        assert other in NAMES


def test_one_address():
    """The repository's address is said in setup.py, and is the same wherever it is needed."""
    pages = (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "mkdocs.yml")
    found = {
        address
        for file in (*pages, *(ROOT / "colab").glob("*.ipynb"))
        for address in re.findall(r"github(?:\.com)?/([\w-]+/tstitch_jax)", file.read_text())
    }
    assert found == {ADDRESS}
