"""The CLIP score: its definition, against torchmetrics, through evaluate and the command."""

import dataclasses
import json

import numpy as np
import pytest
from clip_recipe import PROMPTS, pixels_of, texts
from helpers import GOLDEN
from PIL import Image

import tstitch_jax as ts
from checkpoints_convert import convert
from tstitch_jax import cli
from tstitch_jax.evaluation import ClipScore, embed_texts, read_prompts
from tstitch_jax.evaluation.sources import from_array
from tstitch_jax.hub import resolve

TINY = GOLDEN / "clip_tiny"
with np.load(TINY / "expected.npz") as npz:
    EXPECTED = dict(npz)
KEY = "clip_score_clip"
IMAGES = np.concatenate([pixels_of((64, 500))] * 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("clip")
    convert(TINY / "clip", out / "clip")
    return out / "clip"


@pytest.fixture(scope="module")
def clip(folder):
    return ts.load(folder)


def test_definition():
    rng = np.random.default_rng(0)
    images, prompts = rng.standard_normal((2, 30, 5))
    cosines = [
        i @ t / np.sqrt((i @ i) * (t @ t)) for i, t in zip(images, prompts, strict=True)
    ]  # fmt: skip
    each = np.array([100 * max(c, 0) for c in cosines])
    assert 5 < (each == 0).sum() < 25
    score = ClipScore(prompts)
    for start in range(0, 30, 7):
        score.add(images[start : start + 7])
    found = score.result()
    assert found.mean == pytest.approx(each.mean(), rel=1e-12)
    assert found.error == pytest.approx(each.std(ddof=1) / 30**0.5, rel=1e-12)
    whole = ClipScore(prompts)
    whole.add(images)
    assert whole.result() == found
    with pytest.raises(ValueError, match="31 images for 30 texts; give one an image"):
        whole.add(images[:1])
    single = ClipScore(prompts[:1])
    single.add(prompts[:1])
    assert single.result() == (pytest.approx(100), 0.0)


@pytest.mark.parametrize("i", range(4))
def test_images_against_torchmetrics(clip, i):
    images = IMAGES[i : i + 1]
    found = ts.evaluate(images, features=clip, prompts=PROMPTS[i : i + 1], progress=False)
    assert found.metrics == {KEY: pytest.approx(EXPECTED["clip/scores"][i], rel=2e-5, abs=1e-5)}


def test_a_set_against_torchmetrics(clip):
    found = ts.evaluate(IMAGES[1:3], features=clip, prompts=PROMPTS[1:3], progress=False)
    assert found.metrics == {KEY: pytest.approx(EXPECTED["clip/score"], rel=2e-5)}
    assert found.errors[KEY] > 0
    assert len(found.settings["prompts"]) == 64
    other = ts.evaluate(IMAGES[1:3], features=clip, prompts=PROMPTS[2:], progress=False)
    assert other.settings["prompts"] != found.settings["prompts"]
    assert other.metrics != found.metrics


def test_cosines_against_transformers(clip):
    """Also of a text that is cut, whose end torchmetrics loses."""
    prompts = texts()[12:900:222]
    found = ts.evaluate(IMAGES, features=clip, prompts=prompts, progress=False)
    each = [EXPECTED["clip/cosines"][i % 2, i] for i in range(4)]
    assert found.metrics == {KEY: pytest.approx(100 * np.maximum(each, 0).mean(), rel=2e-5)}
    assert any("1 prompts were too long" in note for note in found.notes)


def test_texts_do_not_depend_on_others(clip):
    many = [f"{i} foxes" for i in range(70)]
    vectors, cut = embed_texts(clip, many)
    assert (vectors.shape, cut) == ((70, 24), 0)
    chosen = [69, 3, 3, 40]
    again, _ = embed_texts(clip, [many[i] for i in chosen])
    np.testing.assert_array_equal(again, vectors[chosen])
    assert len(np.unique(vectors, axis=0)) == 70


def test_long_prompts_are_told_of(clip):
    prompts = ["a fox " * 60, "a fox"]
    found = ts.evaluate(IMAGES[:2], features=clip, prompts=prompts, progress=False)
    assert "1 prompts were too long for clip, which saw their beginning only" in found.notes
    found = ts.evaluate(IMAGES[:2], features=clip, prompts=["a", "b"], progress=False)
    assert not any("too long" in note for note in found.notes)


def test_distances_in_its_features(clip):
    """They need a reference and no prompts; what needs classes is not to be had."""
    rng = np.random.default_rng(0)
    sets = rng.integers(0, 256, (2, 40, 8, 8, 3)).astype(np.uint8)
    found = ts.evaluate(*sets, features=clip, progress=False)
    assert set(found.metrics) == {f"{k}_clip" for k in ("fd", "kd", "precision", "recall")}
    found = ts.evaluate(*sets, features=clip, prompts=["a fox"] * 40, num=10, progress=False)
    assert KEY in found.metrics
    assert found.samples["num"] == 10
    for metric in ("is", "accuracy"):
        with pytest.raises(ValueError, match=f"{metric} cannot be measured: clip knows no classes"):
            ts.evaluate(*sets, features=clip, metrics=[metric], progress=False)


def test_values_do_not_depend_on_devices(clip):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (70, 8, 8, 3)).astype(np.uint8)
    prompts = [f"{i} foxes" for i in range(70)]
    one = ts.evaluate(images, features=clip, prompts=prompts, progress=False)
    placed = ts.shard(clip, ts.make_mesh())
    assert ts.evaluate(images, features=placed, prompts=prompts, progress=False).metrics == (
        one.metrics
    )


def test_refused(clip):
    def run(**changes):
        given = dict(features=clip, prompts=PROMPTS[:2], progress=False)
        return ts.evaluate(IMAGES[:2], **{**given, **changes})

    text = "prompts must be one for each of the 2 images of the array of samples"
    with pytest.raises(ValueError, match=f"{text}, in their order, got 3"):
        run(prompts=PROMPTS[:3])
    with pytest.raises(ValueError, match=f"{text}, in their order, got 'ab'"):
        run(prompts="ab")
    with pytest.raises(ValueError, match="clip_score cannot be measured: there are no prompts"):
        run(prompts=None, metrics=["clip_score"])
    bare = dataclasses.replace(clip, tokenizer=None)
    with pytest.raises(ValueError, match="prompts are of no use here: clip knows no texts"):
        run(features=bare)
    with pytest.raises(ValueError, match="clip knows no texts"):
        embed_texts(bare, ["a"])


def test_broken_images_would_shift_the_prompts(clip):
    source = from_array("images", IMAGES)
    broken = dataclasses.replace(source, skipped=["2.png"])
    with pytest.raises(ValueError, match=r"2\.png is broken: without it the prompts are not those"):
        ts.evaluate(broken, features=clip, prompts=PROMPTS, progress=False)


def test_files_of_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa fox\r\n\n b\u2028c \n".encode())
    assert read_prompts(file) == ["a fox", "", " b\u2028c "]
    file.write_text("a\nb")
    assert read_prompts(file) == ["a", "b"]
    file.write_text("")
    with pytest.raises(ValueError, match=r"prompts\.txt has no prompts; write one on each line"):
        read_prompts(file)
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="are no UTF-8"):
        read_prompts(file)
    with pytest.raises(ValueError, match=r"cannot read the prompts in .*nowhere"):
        read_prompts(tmp_path / "nowhere")


def test_on_the_command_line(folder, clip, tmp_path, capsys, monkeypatch):
    for i, image in enumerate(IMAGES):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.json"
    prompts.write_text("".join(f"fox {i}\n" for i in range(4)))
    arguments = ["evaluate", str(tmp_path / "images"), "--prompts", str(prompts)]
    monkeypatch.setenv("TSTITCH_CACHE", str(tmp_path / "cache"))
    assert cli.main([*arguments, "--features", str(folder), "--out", str(out)]) == 0
    expected = ts.evaluate(
        IMAGES, features=clip, prompts=[f"fox {i}" for i in range(4)], progress=False
    )
    assert json.loads(out.read_text())["metrics"] == expected.metrics
    assert "CLIP score (clip)" in capsys.readouterr().out

    # Without --features it is the published network, of which the tiny one takes the place.
    asked = []
    load = resolve.load
    monkeypatch.setattr(
        resolve, "load", lambda n, *a, **k: asked.append(n) or load(folder, *a, **k)
    )
    assert cli.main(arguments) == 0
    assert asked == ["clip-vit-large-patch14"]
    prompts.write_text("fox\n")
    assert cli.main(arguments) == 2
    assert "prompts.txt has 1 lines, " in capsys.readouterr().err
    assert asked == ["clip-vit-large-patch14"]  # nothing was downloaded for that
