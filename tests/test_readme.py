"""What the README shows is run."""

import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import GOLDEN, random_params, tiny_network

import tstitch_jax as ts
from checkpoints_convert import convert
from tstitch_jax import cli

ROOT = Path(__file__).parents[1]
README, GUIDE, SCALE, MEASURES, SWEEPS = (
    (ROOT / name).read_text()
    for name in (
        "README.md",
        "docs/sampling.md",
        "docs/scale.md",
        "docs/evaluation.md",
        "docs/sweep.md",
    )
)  # fmt: skip


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def public_networks(tmp_path, monkeypatch):
    """Tiny networks in the cache, as if the public ones had been fetched."""
    monkeypatch.setenv("TSTITCH_CACHE", str(tmp_path))
    for seed, name in enumerate(("dit-s-2-256", "dit-xl-2-256")):
        card = dict(name=name, num_classes=1000, autoencoder="sd-vae-ft-ema")
        ts.save(tmp_path / "networks" / name, tiny_network(seed, **card))
    convert(GOLDEN / "diffusers_tiny" / "vae", tmp_path / "networks" / "sd-vae-ft-ema")
    words = tmp_path / "networks" / "sd-text-encoder"
    width = convert(GOLDEN / "clip_tiny" / "text_encoder", words).config["width"]
    for name in ("bk-sdm-tiny", "CompVis--stable-diffusion-v1-4"):
        card = ts.Card(
            name=name, architecture="unet", target="eps", learned_variance=False,
            config={"widths": [4, 8], "layers": 1, "heads": [0, 2], "middle_heads": 0, "groups": 4},
            schedule={"name": "scaled_linear"}, image_shape=(8, 8, 4), num_classes=0,
            context=(77, width), autoencoder="sd-vae-ft-ema",
        )  # fmt: skip
        ts.save(tmp_path / "networks" / name, ts.make_network(card, random_params(card)))


def test_python(public_networks):
    names = {}
    shapes = []
    for block in blocks("python"):
        with jax.numpy_dtype_promotion("standard"):  # as users have it
            exec(block, names)
        images = np.asarray(names["images"])
        assert np.isfinite(images).all()
        shapes.append(images.shape)
    assert shapes == [(4, 28, 28, 1), (1, 28, 28, 1), *[(4, 28, 28, 1)] * 2, *[(2, 16, 16, 3)] * 2]


def test_the_guide(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ts.load("fashion-s")  # for both, as it compiles quickly
    monkeypatch.setattr(ts, "load", lambda name: small)
    names = {}
    with jax.numpy_dtype_promotion("standard"):
        for block in blocks("python", GUIDE):
            exec(block, names)
            if "images" in names:
                assert names["images"].shape == (4, 28, 28, 1)
                assert float(np.std(names["images"])) > 0.3  # garments on black
    assert "small x 4, large x 6" in capsys.readouterr().out
    assert names["xs"].shape == names["x0s"].shape == (10, 4, 28, 28, 1)
    assert names["again"].shape == (4, 28, 28, 1)
    for name in ts.SOLVERS:
        assert f"`{name}`" in GUIDE
    for name in ts.SPACINGS:
        assert f"`{name}`" in GUIDE


def test_the_guide_to_scale(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TSTITCH_CACHE", str(tmp_path))
    load = ts.load
    monkeypatch.setattr(ts, "load", lambda name, *a, **k: load("fashion-s", *a, **k))
    (export,) = (line for line in blocks("sh", SCALE) if "export" in line)
    assert cli.main(shlex.split(export)[1:]) == 0
    names, shapes = {}, []
    with jax.numpy_dtype_promotion("standard"):
        for block in blocks("python", SCALE):
            exec(block, names)
            if "images" in names:
                shapes.append(names["images"].shape)
                assert float(np.std(names["images"])) > 0.3
    assert shapes == [(3, 28, 28, 1), (8, 2, 28, 28, 1), (2, 28, 28, 1)]


def test_the_guide_to_measures():
    names = {}
    with jax.numpy_dtype_promotion("standard"):
        for block in blocks("python", MEASURES):
            exec(block, names)
    result = names["result"]
    assert result.samples["num"] == 20
    assert result.metrics["fd_fashion-features"] > 0
    for name in ("frechet_distance", "precision_recall", "Moments", "nearest", "InceptionScore"):
        assert hasattr(ts.evaluation, name)


COMMANDS = [
    shlex.split(line, comments=True)
    for text in (README, SCALE, MEASURES, SWEEPS)
    for block in blocks("sh", text)
    for line in block.splitlines()
    if line.startswith("tstitch")
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_are_ones_that_there_are(command):
    arguments = cli.make_parser().parse_args(command[1:])
    assert callable(arguments.run)


def test_the_two_commands_and_the_links():
    assert "make demo" in README
    assert "make test" in README
    for folder, text in (
        (ROOT, README),
        *((ROOT / "docs", text) for text in (GUIDE, SCALE, MEASURES, SWEEPS)),
    ):
        for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
            assert (folder / link).exists(), link
