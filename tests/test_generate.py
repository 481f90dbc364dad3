"""Many images: stopped anywhere, the folder ends the same to the byte."""

import dataclasses
import inspect
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from conftest import UNOPTIMISED
from helpers import tiny_network
from PIL import Image

import tstitch_jax as ts
from tstitch_jax import cli
from tstitch_jax.jobs.hosts import Hosts
from tstitch_jax.jobs.shards import Shards
from tstitch_jax.sampling.sampler import make_sampler


@pytest.fixture(scope="module")
def network():
    return tiny_network(image_shape=(8, 8, 3), guidance_channels=None)


def generate(out, *networks, **options):
    """``ts.generate`` with options of both a sampler and a job."""
    options = dict(num=15, batch=2, steps=3, progress=False) | options
    job = {k: options.pop(k) for k in inspect.signature(ts.generate).parameters if k in options}
    return ts.generate(out, make_sampler(networks, **options), **job)


@pytest.fixture(scope="module")
def unbroken(network, tmp_path_factory):
    return generate(tmp_path_factory.mktemp("unbroken") / "job", network)


def encrypted(archive):
    """The archive with the mark of an encrypted file in its directory."""
    entry = archive.index(b"PK\x01\x02")
    return archive[: entry + 8] + b"\x01" + archive[entry + 9 :]


def same(path, expected):
    return path.read_bytes() == expected.read_bytes()


def test_the_file_is_what_evaluation_tools_take(network, tmp_path):
    path = generate(tmp_path / "job", network, num=7, labels=[3, 1], png=True, seed=5)
    assert path == tmp_path / "job" / "samples.npz"
    stored = np.load(path)
    assert stored.files == ["arr_0", "arr_1"]
    pixels = stored["arr_0"]
    assert pixels.shape == (7, 8, 8, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(stored["arr_1"], [3, 1, 3, 1, 3, 1, 3])
    images = ts.sample(jax.random.key(5), [network], labels=stored["arr_1"].tolist(), steps=3)
    expected = np.asarray(images + 1) * 127.5
    assert np.abs(pixels - expected).max() < 0.51
    names = sorted(p.name for p in (tmp_path / "job" / "png").iterdir())
    assert names == [f"{i:07d}.png" for i in range(7)]
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "job" / "png" / names[6])), pixels[6]
    )


def test_grey_images_become_three_channels(tmp_path):
    grey = tiny_network(image_shape=(8, 8, 1), guidance_channels=None)
    pixels = np.load(generate(tmp_path / "job", grey, num=3))["arr_0"]
    assert pixels.shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


@pytest.mark.parametrize("devices", [1, 3])
def test_devices_do_not_matter(network, unbroken, tmp_path, devices):
    mesh = ts.make_mesh(devices=jax.devices()[:devices])
    assert same(generate(tmp_path / "job", ts.shard(network, mesh)), unbroken)


def test_parameters_over_a_model_axis(network, unbroken, tmp_path):
    there = ts.shard(network, ts.make_mesh(2, jax.devices()[:4]))
    found = np.load(generate(tmp_path / "job", there))["arr_0"].astype(int)
    assert np.abs(found - np.load(unbroken)["arr_0"]).max() <= 1
    with pytest.raises(ValueError, match=r"model devices was 2, is 1"):
        generate(tmp_path / "job", network)


@pytest.fixture
def written(monkeypatch):
    """The shards that are written, in order; ``limit`` of them, then Ctrl-C."""
    write, seen = Shards.write, []

    def counted(self, k, pixels):
        if len(seen) == seen_limit[0]:
            raise KeyboardInterrupt
        write(self, k, pixels)
        seen.append(k)

    seen_limit = [None]
    monkeypatch.setattr(Shards, "write", counted)
    return seen, seen_limit


def test_a_stopped_run_goes_on(network, unbroken, tmp_path, written):
    seen, limit = written
    limit[0] = 3
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "job", network)
    assert not (tmp_path / "job" / "samples.npz").exists()
    limit[0] = None
    two = ts.shard(network, ts.make_mesh(devices=jax.devices()[:2]))  # other devices now
    assert same(generate(tmp_path / "job", two), unbroken)
    assert sorted(seen) == list(range(8))  # nothing lost, nothing made twice
    # once more: nothing is made
    assert same(generate(tmp_path / "job", network), unbroken)
    assert len(seen) == 8


def test_more_images_later(network, unbroken, tmp_path, written):
    seen, _ = written
    generate(tmp_path / "job", network, num=5)
    assert same(generate(tmp_path / "job", network), unbroken)
    assert sorted(seen) == list(range(8))


def flip(file):
    data = bytearray(file.read_bytes())
    data[data.find(np.load(file)["images"].tobytes()) + 100] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "empty": lambda file: file.write_bytes(b""),
    "a bit": flip,
    "another's": lambda file: shutil.copy(file.with_name("0000004.npz"), file),
    "gone": lambda file: file.unlink(),
    "other images": lambda file: np.savez(file, images=np.zeros((2, 8, 8, 3), np.uint8),
                                          checksum=np.array("0")),
    "a pickle": lambda file: np.savez(file, images=np.array([{}]), checksum=np.array("0")),
}  # fmt: skip


def test_damaged_shards_are_made_again(network, unbroken, tmp_path, written):
    shutil.copytree(unbroken.parent, tmp_path / "job")
    seen, _ = written
    for k, damage in enumerate(DAMAGES.values()):
        damage(tmp_path / "job" / "shards" / f"{k if k != 4 else 7:07d}.npz")
    unfinished = tmp_path / "job" / "shards" / ".0000001.npz.1.tmp"
    unfinished.write_bytes(b"half")
    assert same(generate(tmp_path / "job", network), unbroken)
    assert sorted(seen) == [0, 1, 2, 3, 5, 6, 7]
    assert not unfinished.exists()
    first = tmp_path / "job" / "shards" / "0000000.npz"
    first.write_bytes(encrypted(first.read_bytes()))
    assert same(generate(tmp_path / "job", network), unbroken)
    assert seen.count(0) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(seed=1), "seed was 0, is 1"),
        (dict(steps=4), r"plan was .0, 0, 0., is .*; times had 4 entries, has 5"),
        (dict(batch=3), "batch was 2, is 3"),
        (dict(labels=[1, 2]), r"labels had 10 entries, has 2"),
        (dict(cfg_scale=None), r"guidance was \[1.5\], is \[null\]"),
        (dict(cfg_rescale=0.5), "rescale was 0.0, is 0.5"),
        (dict(cfg_interval=(0.1, 5)), r"interval was null, is \[0.1, 5.0\]"),
        (dict(cfg_channels=2), r"channels\[0\] was null, is 2|channels was \[null\], is \[2\]"),
        (dict(solver="ddpm"), "solver.* was .*, is "),
        (dict(eta=0.5), "(solver|eta).* was .*, is "),
    ],
)
def test_other_settings_are_refused(network, unbroken, change, message):
    before = sorted(p.stat().st_mtime_ns for p in unbroken.parent.rglob("*.*"))
    with pytest.raises(ValueError, match=f"holds images of other settings: .*{message}"):
        generate(unbroken.parent, network, **change)
    assert before == sorted(p.stat().st_mtime_ns for p in unbroken.parent.rglob("*.*"))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (dict(solver="ddim", eta=1.0), dict(solver="ddim", eta=0.5)),
        (dict(solver="dpmpp"), dict(solver="dpmpp_3")),
    ],
)
def test_options_of_a_solver_are_settings(network, tmp_path, first, second):
    generate(tmp_path / "job", network, num=1, **first)
    with pytest.raises(ValueError, match="holds images of other settings: solver"):
        generate(tmp_path / "job", network, num=1, **second)


@pytest.mark.parametrize("number", [3, 5])
def test_jobs_of_other_releases_are_refused(network, unbroken, tmp_path, number):
    (tmp_path / "settings.json").write_text(json.dumps({"format": number, "seed": 0}))
    message = rf"begun by another release \(format {number}, this one writes 4\)"
    with pytest.raises(ValueError, match=rf"{tmp_path} was {message}.*; choose another folder"):
        generate(tmp_path, network)


def test_names_of_classes_are_labels(network, unbroken):
    card = dataclasses.replace(network.card, class_names=tuple("abcdefghij"))
    named = ts.make_network(card, network.params)
    assert same(generate(unbroken.parent, named, labels=[*"abcde", *range(5, 10)]), unbroken)


def test_other_weights_are_refused(unbroken):
    other = tiny_network(1, image_shape=(8, 8, 3), guidance_channels=None)
    with pytest.raises(ValueError, match=r"cards\[0\] checksum was .*, is "):
        generate(unbroken.parent, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(target="v"), 'target was "eps", is "v"'),
        (dict(guidance_channels=2), "guidance_channels was null, is 2"),
        (dict(consistency=True), "consistency was false, is true"),
        (dict(config_variant="sit"), 'config variant was null, is "sit"'),
        (dict(schedule={"name": "cosine"}), 'schedule name was "linear", is "cosine"'),
    ],
)
def test_an_edited_card_is_refused(network, unbroken, change, message):
    card = network.card
    if "config_variant" in change:
        change = dict(config=card.config | {"variant": change["config_variant"]})
    edited = ts.make_network(dataclasses.replace(card, **change), network.params)
    with pytest.raises(ValueError, match=rf"cards\[0\] {message}"):
        generate(unbroken.parent, edited)
    described = dataclasses.replace(card, source="elsewhere", license="mine", data="others")
    assert same(generate(unbroken.parent, ts.make_network(described, network.params)), unbroken)


def test_another_jax_is_refused(network, unbroken, monkeypatch):
    with (
        jax.default_matmul_precision("tensorfloat32"),
        pytest.raises(ValueError, match=r'matmul precision was "highest", is "tensorfloat32"'),
    ):
        generate(unbroken.parent, network)
    monkeypatch.setattr(jax, "__version__", "0.1")
    with pytest.raises(ValueError, match=r'jax was "[\d.]+", is "0\.1"'):
        generate(unbroken.parent, network)


def test_pngs_are_those_of_the_file(network, tmp_path):
    """Whatever lies there: damaged ones are made again, those of more images are removed."""
    path = generate(tmp_path / "job", network, num=7, png=True)
    pixels, folder = np.load(path)["arr_0"], path.parent / "png"
    for i, damage in ((1, b""), (2, (folder / "0000003.png").read_bytes()), (4, b"\x89PNG")):
        (folder / f"{i:07d}.png").write_bytes(damage)
    (folder / "0000000.png").unlink()
    others = ("mine.png", "00000005.png", "0000009.txt")
    for name in others:
        (folder / name).write_bytes(b"")
    kept = (folder / "0000003.png").stat().st_mtime_ns
    generate(tmp_path / "job", network, num=5, png=True)
    assert {p.name for p in folder.iterdir()} == {*others, *(f"{i:07d}.png" for i in range(5))}
    for i in range(5):
        np.testing.assert_array_equal(Image.open(folder / f"{i:07d}.png"), pixels[i])
    assert (folder / "0000003.png").stat().st_mtime_ns == kept


def test_places_that_are_refused(network, unbroken, tmp_path):
    hold = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        "print(1, flush=True); sys.stdin.read()"
    )
    lock = str(unbroken.parent / ".lock")
    with subprocess.Popen([sys.executable, "-c", hold, lock], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match=r"another process works on"):
            generate(unbroken.parent, network)
        process.kill()
    assert same(generate(unbroken.parent, network), unbroken)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds other things \(thesis.txt\)"):
        generate(tmp_path / "mine", network)
    with pytest.raises(ValueError, match=r"is not a folder"):
        generate(tmp_path / "mine" / "thesis.txt", network)
    with pytest.raises(OSError, match=r"cannot write /proc/tstitch"):
        generate("/proc/tstitch", network)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for text in ("{", "[]", '"a"'):
        (damaged / "settings.json").write_text(text)
        with pytest.raises(ValueError, match=r"settings.json is damaged"):
            generate(damaged, network)


def test_a_full_disk_loses_nothing(network, unbroken, tmp_path):
    job = tmp_path / "job"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for size, what in ((700, r"0000000\.npz"), (2500, r"samples\.npz")):
            generate_settings = job / "settings.json"
            if not generate_settings.exists():
                shutil.copytree(unbroken.parent, job, ignore=shutil.ignore_patterns("*.npz"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            with pytest.raises(OSError, match=rf"cannot write .*{what}: File too large"):
                generate(job, network)
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert not list(job.rglob("*.tmp"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert not (job / "samples.npz").exists()
    assert same(generate(job, network), unbroken)


def test_bad_input(network, tmp_path, monkeypatch):
    out = tmp_path / "job"
    for change, message in (
        (dict(num=0), r"num must be a whole number of at least 1, got 0"),
        (dict(batch=0), r"batch must be .*, 1 to 65536, got 0"),
        (dict(seed=-1), r"seed must be .* got -1"),
        (dict(seed=2**32), r"seed must be a whole number, 0 to 4294967295, got 4294967296"),
        (dict(batch=10**12), r"batch must be a whole number, 1 to 65536, got 1000000000000"),
        (dict(labels=[11]), r"labels must be 0 to 9, got 11"),
        (dict(labels=[]), r"labels must be a list"),
        (dict(labels=[[0, 1]]), r"labels must be one list of class labels for all networks, got"),
        (dict(negative="x"), r"negative goes with prompts"),
        (dict(steps=0), r"0"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(out, network, **change)
    with pytest.raises(ValueError, match=r"makes latents of 4 channels"):
        generate(out, tiny_network())
    few = tiny_network(image_shape=(8, 8, 3), guidance_channels=None, name="few", num_classes=5)
    with pytest.raises(ValueError, match=r"few and .* cannot share labels"):
        generate(out, few, network, fractions=[0.5, 0.5])
    # As users call it, without the tests' own checks of types.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"sampler must be a ts\.Sampler, got \[Network"):
        ts.generate(out, [network], num=2)
    assert not out.exists()


def test_images_that_are_not_finite_are_not_kept(tmp_path):
    network = tiny_network(image_shape=(8, 8, 3), guidance_channels=None)
    broken = network.with_params(
        jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), network.params)
    )
    with pytest.raises(FloatingPointError, match=r"image 0 is not finite"):
        generate(tmp_path / "job", broken)
    assert not list((tmp_path / "job" / "shards").iterdir())


COMMAND = ["generate", "--networks", "fashion-s", "--num", "40", "--batch", "4", "--steps", "10"]


def command(*arguments):
    """The real program, in a process of one device."""
    environment = os.environ | {"XLA_FLAGS": UNOPTIMISED, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    return subprocess.Popen(
        [sys.executable, "-m", "tstitch_jax.cli", *arguments], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_killed_at_any_moment(tmp_path, monkeypatch, capsys):
    """The real program, kill -9, and the same command again."""
    monkeypatch.setenv("TSTITCH_CACHE", str(tmp_path / "cache"))
    assert cli.main([*COMMAND, "--out", str(tmp_path / "unbroken")]) == 0
    assert "40 images" in capsys.readouterr().out
    job = tmp_path / "job"
    for wanted in (1, 4):
        process = command(*COMMAND, "--out", str(job))
        while process.poll() is None and len(list(job.glob("shards/*.npz"))) < wanted:
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL  # it was at work
    assert cli.main([*COMMAND, "--out", str(job)]) == 0
    assert same(job / "samples.npz", tmp_path / "unbroken" / "samples.npz")


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def two_hosts(folder, job):
    port = free_port()
    script = Path(__file__).with_name("two_hosts.py")
    environment = os.environ | {"PYTHONPATH": f"{script.parent}:{script.parents[1]}"}
    return [
        subprocess.Popen(
            [sys.executable, str(script), port, str(i), str(folder), job], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in (0, 1)
    ]  # fmt: skip


def test_hosts_that_come_before_the_folder_find_each_other(tmp_path, monkeypatch):
    own, entered = threading.local(), []
    monkeypatch.setattr(jax, "process_index", lambda: own.index)
    monkeypatch.setattr(jax, "process_count", lambda: 3)

    def host(index):
        own.index = index
        hosts = Hosts(tmp_path / "hosts", "run", timeout=60)
        if index == 0:  # which makes the folder
            time.sleep(0.3)
        with hosts:
            entered.append(index)

    threads = [threading.Thread(target=host, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entered) == [0, 1, 2]


def test_two_hosts_sample_as_one(tmp_path):
    for process in two_hosts(tmp_path, "sample"):
        assert "done" in process.communicate(timeout=200)[0]
    pair = [tiny_network(seed) for seed in (0, 1)]
    expected = ts.sample(
        jax.random.key(0), pair, labels=list(range(7)), fractions=[0.5, 0.5], steps=4,
        solver="ddpm", decode=False,
    )  # fmt: skip
    found = np.full(expected.shape, np.nan, np.float32)
    for file in tmp_path.glob("*.npz"):
        stored = np.load(file)
        part = stored["images"]
        found[int(stored["start"]) : int(stored["start"]) + len(part)] = part
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * float(abs(expected).max()))


def test_two_hosts_generate_as_one(tmp_path, unbroken, network):
    """One is killed: the other says so and stops. Both again: the end is the same."""
    for dying in (0, 1):
        shutil.rmtree(tmp_path / "job", ignore_errors=True)
        hosts = two_hosts(tmp_path, f"die {dying}")
        for line in hosts[dying].stdout:
            if "dying" in line:
                break
        hosts[dying].kill()
        said = hosts[1 - dying].communicate(timeout=60)[0]
        if dying:
            assert "error: host 1 has given no sign of life for 4 s; what is done is kept" in said
            assert hosts[0].returncode == 2
        else:  # the runtime ends the other
            assert "JAX distributed service" in said or "host 0 has given no sign" in said
            assert hosts[1].returncode != 0
    first, second = two_hosts(tmp_path, "fail")
    said = [process.communicate(timeout=200)[0] for process in (first, second)]
    assert "No space left on device" in said[1]
    assert "error: host 1 failed: [Errno 28] No space left on device" in said[0]
    assert not (tmp_path / "job" / "samples.npz").exists()
    for process in two_hosts(tmp_path, "generate"):
        assert "done" in process.communicate(timeout=200)[0]
    assert same(tmp_path / "job" / "samples.npz", unbroken)
    assert not (tmp_path / "job" / ".hosts").exists()
    settings = json.loads((tmp_path / "job" / "settings.json").read_text())
    assert settings["networks"] == ["tiny"]


def test_hosts_that_do_not_agree(tmp_path):
    """They stop before they compile, all with the same words."""
    for i, process in enumerate(two_hosts(tmp_path, "disagree")):
        said = process.communicate(timeout=60)[0]
        assert "error: the settings differ from host 0 to host 1: seed was 0, is 1; run the" in said
        assert (
            "error: the settings differ from host 0 to host 1: num was 15, is 16; run the" in said
        )
        assert f"/job {i} is not one folder that hosts {i} and {1 - i} both see; give" in said
        assert "done" in said
    assert [p.name for p in tmp_path.iterdir()] == ["job 0"]


def test_a_host_that_has_gone_is_no_damage(tmp_path, network, monkeypatch, capsys):
    import orbax.checkpoint as ocp

    def gone(*_):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo context initialization failed\nmore")

    ts.save(tmp_path / "tiny", network)
    monkeypatch.setattr(ocp.PyTreeCheckpointer, "metadata", gone)
    with pytest.raises(jax.errors.JaxRuntimeError, match="UNKNOWN: Gloo"):
        ts.load(tmp_path / "tiny")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    job = ["generate", "--networks", str(tmp_path / "tiny"), "--num", "1"]
    assert cli.main([*job, "--out", str(tmp_path / "job")]) == 2
    assert "another host has failed, see what it says: UNKNOWN: Gloo" in capsys.readouterr().err


def test_hosts_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TSTITCH_CACHE", str(tmp_path / "cache"))
    job = [*COMMAND[:3], "--num", "7", "--batch", "2", "--steps", "2", "--out"]
    assert cli.main([*job, str(tmp_path / "one")]) == 0
    where = ["--coordinator", f"localhost:{free_port()}", "--num-hosts", "2"]
    where += ["--host-timeout", "30"]
    hosts = [command(*job, str(tmp_path / "two"), *where, "--host", str(i)) for i in (0, 1)]
    for process in hosts:
        said = process.communicate(timeout=100)[1]
        assert process.returncode == 0, said
    assert same(tmp_path / "two" / "samples.npz", tmp_path / "one" / "samples.npz")
    capsys.readouterr()
    for more, message in (
        (["--host", "0"], "--coordinator, --num-hosts and --host go together"),
        (["--distributed", "--host", "0"], "give --distributed, or --coordinator"),
        (["--coordinator", "a:1", "--num-hosts", "2", "--host", "2"], "below --num-hosts 2, got 2"),
        (["--model-devices", "3"], "divides the number of devices, 8, got 3"),
        (["--fractions", "1", "--fractions", "1"], "give --fractions or --plan once"),
    ):
        assert cli.main([*COMMAND, "--out", str(tmp_path / "job"), *more]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "job").exists()
