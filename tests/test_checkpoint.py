"""Network folders: round trips, damage, and the embedded networks."""

import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, tiny_card, tiny_network

import tstitch_jax as ts
from tstitch_jax.hub import resolve
from tstitch_jax.models import store


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "net"
    ts.save(folder, tiny_network())
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "net")


def check_one_executable(*networks):
    """A function compiled for one of these denoisers serves all of them."""
    run = jax.jit(lambda denoiser: jax.tree.leaves(denoiser)[0])
    for network in networks:
        run(network.denoiser)
    assert run._cache_size() == 1


def test_round_trip(folder):
    network, loaded = tiny_network(), ts.load(folder)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(network.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, network.params)
    assert loaded.card == network.card
    assert loaded.schedule == network.schedule
    assert loaded.card.num_params == sum(x.size for x in jax.tree.leaves(network.params))
    assert sorted(os.listdir(folder)) == ["card.json", "params"]
    assert jax.tree.structure(loaded.denoiser) == jax.tree.structure(network.denoiser)
    check_one_executable(loaded, ts.load(str(folder)))


def test_half_precision_is_the_rounded_network(tmp_path):
    network = tiny_network()
    ts.save(tmp_path / "half", network, np.float16)
    loaded = ts.load(tmp_path / "half")
    assert loaded.card.checksum != network.card.checksum

    def check(found, full):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.float32(np.float16(full)))

    jax.tree.map(check, loaded.params, network.params)


def test_parameters_larger_than_what_is_in_flight(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "IN_FLIGHT", 1000)
    ts.save(tmp_path / "net", tiny_network())
    assert ts.load(tmp_path / "net").card.checksum == tiny_network().card.checksum


def test_saving_replaces_whole(folder):
    ts.save(folder, tiny_network(seed=1))
    assert ts.load(folder).card.checksum == tiny_network(seed=1).card.checksum
    assert os.listdir(folder.parent) == ["net"]


def test_a_failed_save_leaves_the_old_one(folder, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(OSError, match="No space"):
        ts.save(folder, tiny_network(seed=1))
    monkeypatch.undo()
    assert ts.load(folder).card.checksum == tiny_network().card.checksum
    assert os.listdir(folder.parent) == ["net"]


def test_saving_never_replaces_anything_else(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "precious.txt").write_text("years of work")
    with pytest.raises(ValueError, match="exists and is not a network folder"):
        ts.save(tmp_path / "runs", tiny_network())
    with pytest.raises(ValueError, match="exists and is not a network folder"):
        ts.save(tmp_path / "runs" / "precious.txt", tiny_network())
    assert (tmp_path / "runs" / "precious.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    ts.save(tmp_path / "empty", tiny_network())
    ts.load(tmp_path / "empty")


def test_a_failed_rename_puts_the_old_one_back(folder, monkeypatch):
    rename = os.rename

    def fail(source, target):
        if str(target) == str(folder) and str(source).endswith(".new"):
            raise OSError("the disk went away")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="went away"):
        ts.save(folder, tiny_network(seed=1))
    monkeypatch.undo()
    assert ts.load(folder).card.checksum == tiny_network().card.checksum
    assert os.listdir(folder.parent) == ["net"]


def test_the_next_save_removes_what_a_killed_process_left(folder):
    script = (
        "import os, signal, sys\n"
        "from tstitch_jax.models import store\n"
        "def write(new):\n"
        "    (new / 'half').write_text('')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "store.replace_folder(sys.argv[1], write)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(folder)])
    assert killed.returncode == -signal.SIGKILL
    assert ts.load(folder).card.checksum == tiny_network().card.checksum
    ts.save(folder, tiny_network(seed=1))
    assert ts.load(folder).card.checksum == tiny_network(seed=1).card.checksum
    assert os.listdir(folder.parent) == ["net"]


def test_a_process_killed_between_the_renames_loses_nothing(folder, monkeypatch):
    folder.rename(folder.with_name(".net.old"))

    def fail(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", fail)
        with pytest.raises(OSError, match="No space"):
            ts.save(folder, tiny_network(seed=1))
    assert ts.load(folder).card.checksum == tiny_network().card.checksum
    assert os.listdir(folder.parent) == ["net"]


def test_a_full_disk_is_one_error(folder, monkeypatch):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"cannot write 0 MB in .*: No space left on device; free"):
        ts.save(folder, tiny_network(seed=1))
    assert ts.load(folder).card.checksum == tiny_network().card.checksum
    assert os.listdir(folder.parent) == ["net"]


def test_restored_onto_a_mesh(folder):
    network, mesh = tiny_network(), ts.make_mesh(model=2)
    loaded, moved = ts.load(folder, mesh=mesh), ts.shard(network, mesh)
    assert loaded.card == network.card

    def check(found, expected):
        assert found.sharding == expected.sharding
        np.testing.assert_array_equal(found, expected)

    jax.tree.map(check, loaded.params, moved.params)


def test_the_format_of_a_folder(folder):
    card = json.loads((folder / "card.json").read_text())
    assert card.pop("format") == store.FORMAT == 2
    (folder / "card.json").write_text(json.dumps(card))  # as 0.12 wrote it
    assert ts.load(folder).card == tiny_network().card
    edit_card(folder, format=3, surprise=1)
    with pytest.raises(ValueError, match=r"has format 3, .* reads up to 2; upgrade") as caught:
        ts.load(folder)
    assert "damaged" not in str(caught.value)


def edit_card(folder, **changes):
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, **changes}))


def flip_largest(folder):
    file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "card.json").unlink(), "not a network folder: it has no card.json"),
        (lambda f: (f / "card.json").write_text("{"), "card.json is damaged or not a card"),
        (lambda f: (f / "card.json").write_text("[]"), "card.json is damaged or not a card"),
        (lambda f: edit_card(f, surprise=1), "not a card: unknown surprise"),
        (lambda f: edit_card(f, image_shape=5), "not a card: image_shape is 5"),
        (lambda f: edit_card(f, num_classes=-1), "num_classes is -1: Expected `int` >= 0"),
        (lambda f: edit_card(f, num_classes=0), "num_classes must be at least 1, got 0"),
        (lambda f: edit_card(f, num_classes=10**30), "num_classes is 1000.*<= "),
        (lambda f: edit_card(f, class_names=["a"]), "1 names for 10 classes"),
        (lambda f: edit_card(f, class_names=[1, 2]), r"class_names is \[1, 2\]: Expected `str`"),
        (lambda f: edit_card(f, learned_variance=1), "learned_variance is 1: Expected `bool`"),
        (lambda f: edit_card(f, num_params=-5), "num_params is -5: Expected `int` >= 0"),
        (lambda f: edit_card(f, format="two"), "damaged or not a card: Expected `int`"),
        (lambda f: edit_card(f, guidance_channels=0), "guidance_channels must be 1 to 4, got 0"),
        (lambda f: (f / "card.json").write_text("[" * 100_000), "card.json is damaged"),
        (
            lambda f: (f / "card.json").write_text('{"config": ' + "[" * 100_000),
            "card.json is damaged",
        ),
        (
            lambda f: edit_card(f, config={"width": 32, "depth": 2, "num_heads": 0, "patch": 2}),
            "num_heads must be at least 1, got 0",
        ),
        (lambda f: edit_card(f, num_classes="ten"), "not a card: num_classes is 'ten'"),
        (lambda f: edit_card(f, image_shape=[8, 8]), "not a card: image_shape is .8, 8."),
        (lambda f: shutil.rmtree(f / "params"), "is damaged: it has no params"),
        (lambda f: (f / "params" / "_METADATA").unlink(), "is damaged"),
        (lambda f: (f / "params" / "manifest.ocdbt").write_bytes(b""), "is damaged"),
        (flip_largest, "is damaged"),
        (lambda f: edit_card(f, checksum="0" * 64), "checksum is .*, its card says 000000000000"),
        (lambda f: edit_card(f, target="noise"), "unknown target 'noise'"),
        (lambda f: edit_card(f, architecture="dot"), "unknown architecture 'dot'; did you mean"),
        (lambda f: edit_card(f, config={"depth": 2}), "dit cannot be built"),
        (lambda f: edit_card(f, schedule={"name": "linear", "steps": 3}), "is damaged"),
        (
            lambda f: edit_card(f, config={"width": 32, "depth": 3, "num_heads": 2, "patch": 2}),
            "missing block_2/attention_out/bias; .*missing block_2/qkv/kernel",
        ),
    ],
)
def test_damage_is_one_clear_error(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        ts.load(folder)
    assert str(folder) in str(caught.value)


def test_every_problem_of_a_card_is_listed(folder):
    card = json.loads((folder / "card.json").read_text())
    del card["target"]
    card |= {"surprise": 1, "macs": "many", "image_shape": [0, 8, 4]}
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="not a card: ") as caught:
        ts.load(folder)
    for problem in ("missing target", "unknown surprise", "macs is 'many'", "image_shape is [0, 8"):
        assert problem in str(caught.value)


def test_every_misfit_is_listed():
    card = tiny_card()
    params = random_params(card)
    params["block_0"]["qkv"]["kernel"] = params["block_0"]["qkv"]["kernel"][:-1]
    params["extra"] = np.zeros(3, np.float32)
    del params["labels"]
    message = (
        "missing labels/embedding; extra extra; block_0/qkv/kernel has shape .31, 96., expected .32"
    )
    with pytest.raises(ValueError, match=message):
        ts.make_network(card, params)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float16, "nonsense", None])
def test_other_dtypes_are_refused(folder, dtype):
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16, got"):
        ts.load(folder, dtype)


def test_a_dtype_by_name_is_the_same(folder):
    check_one_executable(ts.load(folder, "bfloat16"), ts.load(folder, jnp.bfloat16))


def test_a_folder_beside_the_network_is_told(folder, tmp_path):
    folder.rename(tmp_path / "network")
    with pytest.raises(ValueError, match=r"it has no card.json; did you mean .*network"):
        ts.load(tmp_path)
    (tmp_path / "dit").mkdir()
    (tmp_path / "dit" / "config.json").touch()
    with pytest.raises(ValueError, match=r"convert it by tstitch convert .* OUT"):
        ts.load(tmp_path / "dit")
    with pytest.raises(ValueError, match=r"is a file; tstitch convert .* makes a network folder"):
        ts.load(tmp_path / "dit" / "config.json")


def test_embedded_networks():
    assert resolve.embedded_names() == ["fashion-b", "fashion-features", "fashion-s", "fashion-xl"]
    networks = small, middle, large = [ts.load(f"fashion-{size}") for size in ("s", "b", "xl")]
    assert large.card.macs > 4 * middle.card.macs > 10 * small.card.macs
    for network in networks:
        assert network.card.license == "Apache-2.0"
        assert len(network.card.class_names) == network.card.num_classes == 10
        assert network.card.num_params == sum(x.size for x in jax.tree.leaves(network.params))
    size = sum(f.stat().st_size for f in resolve.EMBEDDED.rglob("*") if f.is_file())
    assert size < 20e6
