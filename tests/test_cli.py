"""The command line as a user meets it."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from helpers import tiny_network, write_text_pair
from PIL import Image

import tstitch_jax as ts
from tstitch_jax import cli
from tstitch_jax.cli.text import load_config
from tstitch_jax.hub import resolve
from tstitch_jax.models import store
from tstitch_jax.report import pictures
from tstitch_jax.sampling.program import SampleRequest
from tstitch_jax.training import ClassifierConfig, TrainConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("networks")
    for seed, name in enumerate(("a", "b", "c")):
        changes = dict(image_shape=(8, 8, 3 if name == "c" else 1), guidance_channels=None)
        ts.save(root / name, tiny_network(seed, name=name, **changes))
    ts.save(root / "latent", tiny_network())
    return {path.name: str(path) for path in root.iterdir()}


def run(capsys, *arguments):
    try:
        status = cli.main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_whoever_reads_may_leave_or_have_no_more_than_ascii(tmp_path):
    command = [sys.executable, "-m", "tstitch_jax.cli"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    left, right = os.pipe()
    os.close(left)
    found = subprocess.run(
        [*command, "networks"], stdout=right, stderr=subprocess.PIPE, env=environment
    )
    os.close(right)
    assert (found.returncode, found.stderr) == (128 + signal.SIGPIPE, b"")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 30, 28, 28, 1), dtype=np.uint8)
    for name, each in zip("ab", pixels, strict=True):
        np.savez(tmp_path / name, arr_0=each)
    sets = [str(tmp_path / f"{name}.npz") for name in "ab"]
    found = subprocess.run(
        [*command, "evaluate", *sets, "--features", "fashion", "--metrics", "kid"],
        capture_output=True, env=environment,
    )  # fmt: skip
    assert found.returncode == 0
    assert re.search(rb"kernel distance .*\? \d", found.stdout)


def test_networks(capsys):
    status, out, _ = run(capsys, "networks")
    assert status == 0
    lines = out.splitlines()
    for title in ("parameters", "FLOPs", "source", "license"):
        assert title in lines[0]
    names = ["fashion-b", "fashion-features", "fashion-s", "fashion-xl"]
    assert [line.split()[0] for line in lines[2:6]] == names
    assert "256K" in lines[4]
    assert "Apache-2.0" in lines[5]
    assert any(re.match(r"dit-xl-2-256 .*675M .*119G .*download .*CC-BY-NC", x) for x in lines)
    assert "sd-vae-ft-ema" in out


PUBLISHED = ROOT / "tests" / "golden" / "tstitch_tiny"
VAE = ROOT / "tests" / "golden" / "diffusers_tiny" / "vae"


def test_convert_and_sample(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, heads in (("small", 2), ("large", 4)):
        status, out, _ = run(
            capsys, "convert", PUBLISHED / f"{name}.pt", name, "--num-heads", heads
        )
        assert status == 0
        assert f"num_heads {heads}" in out
        assert "target eps, schedule linear, guidance on 3 channels" in out
        assert "give --family sit" in out
    status, out, _ = run(capsys, "convert", VAE, "vae", "--license", "MIT")
    assert status == 0
    assert "SHA-256" in out
    assert store.read_card("vae").license == "MIT"
    arguments = ["sample", "--networks", "small", "large", "--steps", "2", "--labels", "0", "1"]
    status, _, _ = run(capsys, *arguments, "--autoencoder", "vae")
    assert status == 0
    with Image.open("samples.png") as picture:
        assert picture.size[0] > 2 * 16
    # As users call it, without the tests' own checks of types.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    status, _, err = run(capsys, *arguments, "--autoencoder", "small")
    assert status == 2
    assert "Network('small', dit, 51,168 parameters) is not an autoencoder" in err
    status, _, err = run(capsys, "sample", "--networks", "vae")
    assert status == 2
    assert "vae is not a denoiser but autoencoder; give it as autoencoder" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.pt", "net"], "nothing.pt does not exist"),
        ([PUBLISHED / "small.pt", "net"], "give --num-heads N"),
        (
            [PUBLISHED / "small.pt", "net", "--num-heads", "0"],
            "whole number, at least 1, got '0'",
        ),
        ([PUBLISHED / "small.pt", "net", "--num-heads", "x"], "must be a whole number, .* got 'x'"),
        (
            [PUBLISHED / "small.pt", "net", "--family", "unit"],
            "unknown family 'unit'; did you mean 'unet'",
        ),
        ([PUBLISHED / "small.pt", "."], "is not a network folder; choose another place"),
        ([PUBLISHED / "expected.npz", "net"], "compressed record|0 data.pkl"),
    ],
)
def test_bad_conversions(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    status, _, err = run(capsys, "convert", *arguments)
    assert status == 2
    assert re.search(message, err)
    assert len(err.splitlines()) == 1
    assert os.listdir(tmp_path) == ["something"]


def test_the_picture_without_arguments(capsys, tmp_path, monkeypatch):
    """The embedded pair: six rows, ten columns. Few steps, as only the defaults are in question."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.sampling, "REPEATS", 1)
    status, out, _ = run(capsys, "sample", "--steps", "5")
    assert status == 0
    rows = [line.split() for line in out.splitlines()[2:8]]
    assert [row[0] for row in rows] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert all(re.fullmatch(r"\d+\.\d\dx", row[-1]) for row in rows)
    assert rows[0][-1] == "1.00x"
    assert "fashion-s x 2, fashion-xl x 3" in out
    assert re.search(r"compilation: \d+\.\d s, once for all rows", out)
    with Image.open("samples.png") as picture:
        assert picture.width > 10 * 72
        assert picture.height > 6 * 72
        pixels = np.asarray(picture.convert("L"))
    # The cells lie at the right and bottom, each of 84 pixels and a gap of 3; all hold a garment.
    cells = pixels[-(6 * 87 + 40) : -40, -(10 * 87 + 8) : -8]
    for row in range(6):
        for column in range(10):
            cell = cells[row * 87 + 10 : row * 87 + 74, column * 87 + 10 : column * 87 + 74]
            assert cell.std() > 15


def test_fractions_labels_and_seed(capsys, tmp_path, folders, monkeypatch):
    monkeypatch.setattr(cli.sampling, "REPEATS", 1)
    out_file = tmp_path / "deep" / "grid.png"
    common = ["--networks", folders["a"], folders["b"], folders["a"], "--steps", "4"]
    status, out, _ = run(
        capsys, "sample", *common, "--fractions", "0.25", "0.25", "0.5", "--fractions", "0", "1",
        "0", "--labels", "7", "1", "--cfg-scale", "none", "--out", out_file,
    )  # fmt: skip
    assert status == 0
    assert "a x 1, b x 1, a x 2" in out
    assert "b x 4" in out
    assert out_file.is_file()
    assert [p.name for p in out_file.parent.iterdir()] == ["grid.png"]


def test_every_option_of_sampling(capsys, tmp_path, folders, monkeypatch):
    monkeypatch.setattr(cli.sampling, "REPEATS", 1)
    monkeypatch.chdir(tmp_path)
    ts.Plan.interleaved([1, 1], 4).save("turns.json")
    status, out, err = run(
        capsys, "sample", "--networks", folders["a"], folders["b"], "--plan", "turns.json",
        "--fractions", "0.5", "0.5", "--times", "999", "600", "300", "20", "--solver", "unipc",
        "--cfg-rescale", "0.5", "--cfg-interval", "0.1", "5", "--auto-scale", "1.5",
    )  # fmt: skip
    assert status == 0, err
    lines = out.splitlines()
    assert lines[2].split()[:1] == ["0.5"]
    assert lines[3].startswith("turns     a x 1, b x 1, a x 1, b x 1")
    status, out, _ = run(
        capsys, "sample", "--networks", folders["b"], "--steps", "3", "--spacing", "karras",
        "--solver", "euler_ancestral", "--eta", "0.5",
    )  # fmt: skip
    assert status == 0


def test_the_seed_reaches_the_noise(capsys, tmp_path, folders, monkeypatch):
    monkeypatch.setattr(cli.sampling, "REPEATS", 1)
    drawn = []
    monkeypatch.setattr(
        pictures, "grid", lambda images, *a, **k: drawn.append(images) or Image.new("L", (1, 1))
    )
    for seed in ("0", "0", "1"):
        run(capsys, "sample", "--networks", folders["a"], "--steps", "3", "--seed", seed,
            "--out", tmp_path / "x.png")  # fmt: skip
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 0.1


def test_one_network(capsys, tmp_path, folders, monkeypatch):
    monkeypatch.setattr(cli.sampling, "REPEATS", 1)
    status, out, _ = run(
        capsys, "sample", "--networks", folders["c"], "--steps", "3", "--solver", "ddpm",
        "--out", tmp_path / "one.png",
    )  # fmt: skip
    assert status == 0
    assert "c x 3" in out


BAD = [
    (["--fractions", "0.5", "0.6"], "must sum to 1, got 0.5, 0.6"),
    (["--fractions", "0.5"], "2 networks need 2 fractions, got 0.5"),
    (["--fractions", "half", "0.5"], "argument --fractions: must be a number, got 'half'"),
    (["--labels", "Bagg"], "unknown label 'Bagg'; did you mean 'Bag'?"),
    (["--labels", "10"], "labels must be 0 to 9, got 10"),
    (["--labels", "-1"], "labels must be 0 to 9, got -1"),
    (["--labels", "²"], "unknown label"),
    (["--cfg-scale", "much"], "must be a number or none, got 'much'"),
    (["--out", "x" * 249 + ".png"], "File name too long"),
    (["--steps", "0"], "at least 1, got '0'"),
    (["--steps", "1001"], "at most the 1000 training times"),
    (["--steps", "many"], "steps must be a number like 50"),
    (["--solver", "dimm"], "unknown solver 'dimm'; did you mean 'ddim' or"),
    (["--solver", "ddpm", "--eta", "1"], "eta belongs to the solvers 'ddim'"),
    (["--solver", "lcm"], "'lcm' needs consistency networks, and the card of fashion-"),
    (["--spacing", "trailling"], "unknown spacing 'trailling'; did you mean 'trailing'"),
    (["--times", "900", "3", "--steps", "7"], "give --steps or --times, not both"),
    (["--times", "500", "600"], "in float32, but 500 is followed by 600"),
    (
        ["--cfg-interval", "2", "1"],
        "interval must be two noise levels, 0 <= low < high",
    ),
    (["--plan", "nothing.json"], "cannot read the plan nothing.json"),
    (["--plan", "short.json"], "the plan has 3 steps, the sampler 50"),
    (["--cfg-scale", "nan"], "the guidance scale must be a finite number"),
    (["--networks", "fashion-s", "fashon-xl"], "did you mean 'fashion-xl'"),
    (["--networks", "latent"], "makes latents of 4 channels, not images"),
    (["--networks", "a", "c", "--fractions", "0.5", "0.5"], "their image shape differs"),
    (
        ["--networks", "fashion-s", "fashion-xl", "fashion-s"],
        "give --fractions or --plan for",
    ),
    (["--networks", "a", "fashion-s"], "cannot be stitched"),
    (["--out", "picture.jpg"], "must end in .png"),
    (["--out", "/proc/nothing/samples.png"], "cannot write /proc/nothing/samples.png"),
    (["--out", "folder.png"], "cannot write folder.png: it is a folder"),
    (["--seed", "-1"], "must be a whole number, 0 to 4294967295, got '-1'"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda v: v if "".join(v) is v else "")
def test_bad_input(capsys, tmp_path, folders, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    ts.Plan.from_counts([1, 2]).save("short.json")
    monkeypatch.setattr(SampleRequest, "lower", None)  # nothing may be compiled
    arguments = [folders.get(a, a) for a in arguments]
    status, out, err = run(capsys, "sample", *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("tstitch: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_damaged_folder(capsys, tmp_path, folders):
    shutil.copytree(folders["a"], tmp_path / "a")
    card = json.loads((tmp_path / "a" / "card.json").read_text())
    (tmp_path / "a" / "card.json").write_text(json.dumps({**card, "checksum": "0" * 64}))
    status, _, err = run(capsys, "sample", "--networks", tmp_path / "a")
    assert status == 2
    assert "is damaged: the parameters' checksum is" in err


CONFIG = """
from tstitch_jax.training import TrainConfig
from tstitch_jax.models.cards import Card

config = TrainConfig(
    card=Card(
        name="dots", architecture="dit", target="v", learned_variance=False,
        config=dict(width=32, depth=1, num_heads=1, patch=4), schedule={"name": "cosine"},
        image_shape=(8, 8, 1), num_classes=3,
    ),
    data="nowhere.npz", steps=40, batch=8, warmup=2, cooldown=2, save_every=20,
)
"""


@pytest.mark.usefixtures("standard_promotion")
def test_train(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dots.py").write_text(CONFIG)
    np.savez("data.npz", x_train=np.zeros((9, 8, 8), np.uint8), y_train=np.arange(9) % 3)
    status, out, err = run(
        capsys, "train", "dots.py", "--data", "data.npz", "--out", "run", "--steps", "30"
    )
    assert status == 0
    assert "dots: " in out
    assert "run/network" in out
    assert "img/s" in err
    assert ts.load("run/network").card.name == "dots"
    pictures_made = sorted(p.name for p in (tmp_path / "run").glob("*.png"))
    assert pictures_made == ["preview_000020.png", "preview_000030.png"]


KINDS = TrainConfig, ClassifierConfig


def test_the_projects_configurations_are_the_embedded_networks():
    for name in resolve.embedded_names():
        card = store.read_card(resolve.resolve(name))
        config = load_config(str(ROOT / card.source.removeprefix("tstitch train ")), *KINDS)
        first = ROOT / "configs" / f"{Path(config.init).parent.name}.py"
        if config.init:
            assert load_config(str(first), *KINDS).card.config == card.config
        # The embedded ones were trained on a copy of the data with another split.
        others = dict.fromkeys(("num_params", "macs", "checksum", "data"))
        told = ({**dataclasses.asdict(each), **others} for each in (config.card, card))
        assert next(told) == next(told)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (None, [], "no configuration at dots.py"),
        (CONFIG, [], "no data at nowhere.npz"),
        ("import nothing_at_all", [], "dots.py fails: ModuleNotFoundError"),
        ("raise SystemExit(0)", [], "dots.py fails: SystemExit: 0"),
        ("x = 1", [], "dots.py has no TrainConfig named config"),
        (CONFIG, ["--steps", "0"], "argument --steps: must be a whole number, at least 1, got '0'"),
    ],
)
def test_bad_train(capsys, tmp_path, monkeypatch, text, arguments, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "dots.py").write_text(text)
    status, _, err = run(capsys, "train", "dots.py", *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


LINES = {"sample": 34, "export": 33, "calibrate": 34, "generate": 41}
"""Of the help of commands with many options; all others fit a screen of 24."""


@pytest.mark.parametrize(
    "command",
    [
        "", "networks", "sample", "generate", "evaluate", "calibrate", "sweep", "export", "convert",
        "train",
    ],
)  # fmt: skip
def test_help_fits_a_screen_and_shows_an_example(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run(capsys, *command.split(), "--help")
    assert status == 0
    assert re.search(rf"^example: tstitch {command}", out, re.MULTILINE)
    lines = out.splitlines()
    assert len(lines) <= LINES.get(command, 24)
    assert max(map(len, lines)) <= 80
    # The example is one that there is.
    (example,) = (line for line in lines if line.startswith("example: "))
    assert cli.make_parser().parse_args(example.split()[2:]).run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND (see tstitch --help)"),
        (["smaple"], "unknown command 'smaple'; did you mean 'sample'? (see tstitch --help)"),
        (
            ["sample", "--fractoins", "0.4"],
            "unrecognized arguments: --fractoins 0.4; did you mean --fractions? "
            "(see tstitch sample --help)",
        ),
        (["sample", "--dtype", "float16"], "unknown dtype 'float16'; did you mean 'bfloat16'"),
        (["generate", "--num", "3", "--out", "x"], "give --fractions or --plan for the 2 networks"),
        (["networks", "all"], "unrecognized arguments: all (see tstitch networks --help)"),
        (["--completion", "fish"], "unknown completion 'fish'; did you mean 'zsh' or"),
        (["train", "nothing.py"], "no configuration at nothing.py; give a Python file"),
        (["evaluate", "tfds:nonsense:test", "x"], "Dataset nonsense not found."),
    ],
    ids=str,
)
def test_errors_say_what_to_do(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert not out
    assert err.startswith("tstitch: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert len(err) < 200


COMPLETE = """
source completion.bash
try() {
    COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
    _shtab_tstitch tstitch "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
    echo "${COMPREPLY[*]}"
}
"""


def test_completion(capsys, tmp_path):
    status, out, _ = run(capsys, "--completion", "bash")
    assert status == 0
    (tmp_path / "completion.bash").write_text(out)
    (tmp_path / "configs").mkdir()
    (tmp_path / "plan.json").touch()
    tries = {
        "tstitch s": "sample sweep",
        "tstitch sample --so": "--solver",
        "tstitch sample --solver dd": "ddim ddpm",
        "tstitch sample --networks fashion-s fas": "fashion-b fashion-s fashion-xl",
        "tstitch sample --plan pl": "plan.json",
        "tstitch train con": "configs",
        "tstitch evaluate a b --metrics f": "fid fid_infinity",
    }
    script = COMPLETE + "".join(f"try {words}\n" for words in tries)
    result = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.splitlines() == list(tries.values()), result.stderr
    for shell in ("zsh", "tcsh"):
        status, out, _ = run(capsys, "--completion", shell)
        assert status == 0
        assert "fashion-xl" in out


def test_installed_program():
    """The program itself: a status, one line, no traceback."""
    result = subprocess.run(
        [sys.executable, "-m", "tstitch_jax.cli", "sample", "--steps", "0"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == "tstitch: error: steps must be at least 1, got '0'\n"


def test_grid_places_every_image():
    images = np.linspace(-1, 1, 6).reshape(2, 3, 1, 1, 1) * np.ones((2, 3, 8, 8, 1))
    picture = np.asarray(pictures.grid(images, ["r", "s"], ["a", "b", "c"], title="t"))
    assert picture.shape[2] == 3
    for i, row in enumerate(pictures.to_uint8(images[:, :, 0, 0, 0])):
        for j, shade in enumerate(row):
            y, x = -6 - (2 - i) * 75 + 36, -8 - (3 - j) * 75 + 36
            assert (picture[y - 30 : y + 30, x - 30 : x + 30] == shade).all()


def test_texts_around_a_grid_are_broken_at_its_width():
    grids = [pictures.grid(np.zeros((1, 4, 8, 8, 1)), ["r"], [""] * 4, footer=f)
             for f in ("word", "word " * 40)]  # fmt: skip
    short, long = (image.size for image in grids)
    assert long[0] == short[0]
    assert long[1] > short[1] + 60
    assert np.asarray(grids[1])[:, -6:].min() == 255


def test_to_uint8():
    values = np.array([-2, -1, 0, 1, 3, 0.5])
    np.testing.assert_array_equal(pictures.to_uint8(values), [0, 0, 128, 255, 255, 191])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_text_pair(tmp_path_factory.mktemp("texts"))


def test_prompts(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.sampling, "REPEATS", 1)
    monkeypatch.setattr(resolve, "load", functools.cache(resolve.load))
    pair = ["--networks", texts["a"], texts["b"], "--fractions", "0.3", "0.7", "--steps", "3"]
    status, out, err = run(
        capsys, "sample", *pair, "--prompt", "a cat", "two dogs", "--prompt", "x", "--negative",
        "blurred", "--size", "12", "20",
    )  # fmt: skip
    assert status == 0, err
    assert "a x 1, b x 2" in out
    with Image.open("samples.png") as picture:
        assert picture.size[0] > 3 * 20
        picture.convert("L").save("start.png")
    status, _, err = run(
        capsys, "sample", *pair, "--prompt", "a cat", "--start", "start.png", "--strength", "0.7"
    )
    assert status == 0, err
    Path("texts.txt").write_text("\ufeffa cat\ntwo dogs\n")
    status, _, err = run(
        capsys, "generate", *pair, "--prompts", "texts.txt", "--num", 3, "--batch", 2, "--out", "o"
    )
    assert status == 0, err
    with np.load("o/samples.npz") as stored:
        assert stored["arr_0"].shape == (3, 16, 16, 3)
        assert stored["arr_1"].tolist() == [0, 1, 0]
    assert json.loads(Path("o/settings.json").read_text())["prompts"] == ["a cat", "two dogs"]
    for arguments, message in (
        ([], "a is conditioned on texts; give --prompt TEXT"),
        (["--labels", "1"], "a has no classes; give --prompt, not --labels"),
        (["--prompt", "x", "--prompts", "texts.txt"], "--prompt or --prompts, not both"),
        (["--prompts", "none.txt"], "cannot read the prompts in none.txt"),
        (["--prompt", "x", "--size", "12", "21"], "multiples of 2 for a, got 12x21"),
        (["--prompt", "x", "--text-encoder", texts["a"]], "needs|takes encoded texts"),
        (["--prompt", "x", "--start", "texts.txt", "--strength", "1"], "cannot read the image"),
        (["--prompt", "x", "--strength", "1"], "start and strength go together"),
    ):
        status, _, err = run(capsys, "sample", *pair, *arguments)
        assert status == 2
        assert re.search(message, err), err
    status, _, err = run(capsys, "sample", "--prompt", "a cat")
    assert status == 2
    assert "fashion-s is conditioned on classes; give --labels, not texts" in err
