"""LoRA files merged at conversion: against diffusers, against NumPy, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from helpers import GOLDEN
from lora_recipe import some, weights
from safetensors.numpy import load_file, save_file

import tstitch_jax as ts
from checkpoints_convert import CheckpointError, convert, lora
from checkpoints_convert.rules import Tensor
from tstitch_jax import cli

FOLDER = GOLDEN / "lora"
CLIP = GOLDEN / "clip_tiny"
SHAPES = json.loads((FOLDER / "names.json").read_text())
with np.load(FOLDER / "expected.npz") as npz:
    EXPECTED = dict(npz)


def tensors_of(values) -> dict[str, Tensor]:
    return {n: Tensor(v.shape, v.dtype, lambda v=v: v) for n, v in values.items()}


def names_of(values) -> dict[str, str]:
    return {name: name for name in values if name.endswith(".weight")}


def merged(values, changes, tmp_path, weight=1.0, owner="unet", metadata=None):
    """A checkpoint with a LoRA of these tensors in it."""
    save_file(changes, tmp_path / "lora.safetensors", metadata)
    found, path = lora.merge(
        tensors_of(values), tmp_path / "lora.safetensors", weight, owner, names_of(values)
    )
    assert path == tmp_path / "lora.safetensors"
    return {name: np.asarray(tensor.read()) for name, tensor in found.items()}


@pytest.mark.parametrize("owner", ["unet", "text_encoder"])
@pytest.mark.parametrize("name", ["peft", "kohya", "old"])
def test_against_diffusers(name, owner):
    prefix = f"{owner}."
    own = {n: shape for n, shape in SHAPES.items() if n.startswith(prefix)}
    base = {n.removeprefix(prefix): v for n, v in weights(own).items()}
    names = names_of(base)
    if owner == "text_encoder" and name == "old":
        with pytest.raises(CheckpointError, match="changes nothing of a text_encoder, but 48 of"):
            lora.merge(tensors_of(base), FOLDER / "old.safetensors", 0.7, owner, names)
        return
    if owner == "text_encoder":
        names |= {f"text_model.{n}": n for n in names}
    found, _ = lora.merge(tensors_of(base), FOLDER / f"{name}.safetensors", 0.7, owner, names)
    assert found.keys() == base.keys()
    count = 0
    for key, tensor in found.items():
        expected = EXPECTED.get(f"{name}/{prefix}{key}")
        if expected is None:
            np.testing.assert_array_equal(tensor.read(), base[key])
            continue
        change = tensor.read().astype(np.float64) - base[key]
        size = np.abs(expected[1:]).max()
        np.testing.assert_allclose(some(change), expected[1:], atol=2e-5 * max(size, 1))
        # Rounding of as many weights adds up.
        np.testing.assert_allclose(change.sum(), expected[0], atol=1e-6 * change.size + 1e-4)
        assert (tensor.shape, tensor.dtype) == (base[key].shape, np.float32)
        count += 1
    assert count == {"peft": 55, "kohya": 55, "old": 24}[name] if owner == "unet" else count == 12


def product(up, down, mid=None):
    """What a LoRA adds, entry by entry, by two layers after each other."""
    rank = len(down)
    down = down.reshape(rank, -1) if mid is not None else down
    out = np.zeros((len(up), *down.shape[1:], *(() if mid is None else mid.shape[2:])))
    for o in range(len(up)):
        for a in range(rank):
            for b in [a] if mid is None else range(rank):
                between = 1.0 if mid is None else mid[a, b]
                for i in range(down.shape[1]):
                    out[o, i] += up.reshape(len(up), rank)[o, a] * between * down[b, i]
    return out


@pytest.mark.parametrize(
    ("base", "down", "up", "mid"),
    [
        ((5, 7), (2, 7), (5, 2), None),
        ((5, 7, 1, 1), (2, 7, 1, 1), (5, 2, 1, 1), None),
        ((5, 7), (2, 7, 1, 1), (5, 2, 1, 1), None),
        ((5, 7, 1, 1), (2, 7), (5, 2), None),
        ((5, 7, 3, 3), (3, 7, 3, 3), (5, 3, 1, 1), None),
        ((5, 7, 3, 3), (3, 7, 1, 1), (5, 3, 1, 1), (3, 3, 3, 3)),
    ],
)
def test_against_numpy(base, down, up, mid, tmp_path):
    rng = np.random.default_rng(0)
    state = {"down_blocks.0.x.weight": rng.standard_normal(base).astype(np.float16)}
    shapes = {"lora_down": down, "lora_up": up} | ({} if mid is None else {"lora_mid": mid})
    changes = {
        f"lora_unet_down_blocks_0_x.{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    parts = {name.split(".")[1]: value for name, value in changes.items()}
    full = product(parts["lora_up"], parts["lora_down"], parts.get("lora_mid")).reshape(base)
    value = np.float64(state["down_blocks.0.x.weight"])
    found = merged(state, changes, tmp_path, 0.3)["down_blocks.0.x.weight"]
    np.testing.assert_allclose(found, value + 0.3 * full, rtol=1e-5, atol=1e-5)
    changes["lora_unet_down_blocks_0_x.alpha"] = np.array(5, np.float32)
    found = merged(state, changes, tmp_path, -0.3)["down_blocks.0.x.weight"]
    np.testing.assert_allclose(found, value - 0.3 * 5 / down[0] * full, rtol=1e-5, atol=1e-5)
    found = merged(state, changes, tmp_path, 0.0)["down_blocks.0.x.weight"]
    np.testing.assert_array_equal(found, value.astype(np.float32))


def pair(module, halves=("lora_A", "lora_B"), rank=2, wide=4, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"{module}.{halves[0]}.weight": rng.standard_normal((rank, wide)).astype(np.float32),
        f"{module}.{halves[1]}.weight": rng.standard_normal((wide, rank)).astype(np.float32),
    }


ATTENTION = "text_model.encoder.layers.0.self_attn."


@pytest.mark.parametrize(
    ("owner", "module", "halves", "ours"),
    [
        ("unet", "mid_block.attn1.processor.to_q_lora", "dots", "mid_block.attn1.to_q"),
        ("unet", "mid_block.attn1.processor.to_out_lora", "dots", "mid_block.attn1.to_out.0"),
        ("unet", "unet.mid_block.attn1.to_k.lora", "dots", "mid_block.attn1.to_k"),
        ("unet", "unet.mid_block.attn1.to_out.0.lora", "dots", "mid_block.attn1.to_out.0"),
        ("unet", "base_model.model.mid_block.attn1.to_q", "AB", "mid_block.attn1.to_q"),
        ("unet", "unet.mid_block.attn1.to_q", "named", "mid_block.attn1.to_q"),
        ("text_encoder", "base_model.model." + ATTENTION + "q_proj", "AB", ATTENTION + "q_proj"),
        ("text_encoder", "text_encoder." + ATTENTION + "to_k_lora", "dots", ATTENTION + "k_proj"),
        ("text_encoder", "text_encoder." + ATTENTION + "to_out_lora", "dots",
         ATTENTION + "out_proj"),
        ("text_encoder", "text_encoder." + ATTENTION + "v_proj.lora_linear_layer", "dots",
         ATTENTION + "v_proj"),
        ("text_encoder", "lora_te1_" + (ATTENTION + "q_proj").replace(".", "_"), "kohya",
         ATTENTION + "q_proj"),
    ],
)  # fmt: skip
def test_every_scheme_of_names(owner, module, halves, ours, tmp_path):
    halves = {"dots": ("down", "up"), "AB": ("lora_A", "lora_B"),
              "named": ("lora_A.default", "lora_B.default"),
              "kohya": ("lora_down", "lora_up")}[halves]  # fmt: skip
    parts = ("mid_block.attn1.to_q", "mid_block.attn1.to_k", "mid_block.attn1.to_out.0")
    if owner == "text_encoder":
        parts = [ATTENTION + name for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    state = {f"{name}.weight": np.ones((4, 4), np.float32) for name in parts}
    changes = pair(module, halves)
    down, up = changes.values()
    found = merged(state, changes, tmp_path, 0.5, owner)
    for name, value in found.items():
        expected = 1 + 0.5 * up @ down if name == f"{ours}.weight" else np.ones((4, 4))
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_settings_beside_a_file(tmp_path):
    state = {f"{n}.weight": np.zeros((4, 4), np.float32) for n in ("a.to_q", "a.to_k", "b.to_q")}
    changes = {k: v for n in ("a.to_q", "a.to_k", "b.to_q") for k, v in
               pair(f"base_model.model.{n}").items()}  # fmt: skip
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(changes, folder / "adapter_model.safetensors")
    settings = {"lora_alpha": 8, "r": 2, "alpha_pattern": {"a.to_k": 3}, "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    found, path = lora.merge(tensors_of(state), folder, 1.0, "unet", names_of(state))
    assert path == folder / "adapter_model.safetensors"
    down, up = list(changes.values())[:2]
    for name, alpha in (("a.to_q", 8), ("a.to_k", 3), ("b.to_q", 8)):
        np.testing.assert_allclose(found[f"{name}.weight"].read(), alpha / 2 * up @ down, rtol=1e-5)
    for name in ("use_dora", "use_rslora"):
        (folder / "adapter_config.json").write_text(json.dumps({**settings, name: True}))
        with pytest.raises(CheckpointError, match=f"was made with {name}"):
            lora.merge(tensors_of(state), folder, 1.0, "unet", names_of(state))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no LoRA: expected one of adapter_model"):
        lora.merge(tensors_of(state), folder, 1.0, "unet", names_of(state))


STATE = {"a.to_q.weight": np.ones((4, 4), np.float32)}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (pair("unet.a.to_v") | pair("unet.a.to_q"), "what the network does not have: a_to_v"),
        (pair("unet.a.to_q", wide=5), r"a_to_q \(2, 5\) and \(5, 2\) for a.to_q.weight \(4, 4\)"),
        ({"unet.a.to_q.lora_A.weight": np.ones((2, 4), "f4")}, "lacks down or up of: a_to_q"),
        (pair("unet.a.to_q") | {"lora_unet_a_to_q.hada_w1_a": np.ones((2, 2), "f4")},
         r"not of a LoRA: lora_unet_a_to_q\.hada_w1_a; supported"),
        (pair("unet.a.to_q") | {"unet.a.to_q.lora_magnitude_vector": np.ones(4, "f4")},
         "not of a LoRA: unet.a.to_q.lora_magnitude_vector"),
        (pair("unet.a.to_q") | {"lora_unet_a_to_q.dora_scale": np.ones(4, "f4")}, "dora_scale"),
        (pair("lora_te2_text_model_x"), "is a LoRA of Stable Diffusion XL"),
        (pair("text_encoder_2.text_model.x"), "is a LoRA of Stable Diffusion XL"),
        (pair("text_encoder.x"), "changes nothing of a unet, but 2 of others"),
        (pair("unet.a.to_q") | {"unet.a.to_q.alpha": np.ones(3, "f4")},
         r"alpha has shape \(3,\), expected one number"),
    ],
)  # fmt: skip
def test_refused(changes, text, tmp_path):
    with pytest.raises(CheckpointError, match=text):
        merged(STATE, changes, tmp_path)


def test_weights_and_metadata_that_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"weight of lora\.safetensors must be a number"):
        merged(STATE, pair("unet.a.to_q"), tmp_path, float("nan"))
    with pytest.raises(CheckpointError, match="lora_adapter_metadata is no JSON"):
        merged(STATE, pair("unet.a.to_q"), tmp_path, metadata={"lora_adapter_metadata": "{"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], r"must be a JSON object, got \[\]"),
        ({"unet.alpha_pattern": ["q_proj"]}, r"unet.alpha_pattern must be numbers by module, got"),
        ({"unet.alpha_pattern": {"(": 1}}, r"alpha_pattern has '\(', which is no regular express"),
        ({"unet.alpha_pattern": {"a{9999999999}": 1}}, r"has 'a.9999999999.', which is no regular"),
        (
            {"unet.alpha_pattern": {"to_q": "x"}},
            "alpha_pattern of 'to_q' must be a number, got 'x'",
        ),
        ({"unet.lora_alpha": [1]}, r"unet.lora_alpha must be a number, got \[1\]"),
        ({"unet.lora_alpha": 10**400}, "unet.lora_alpha must be a finite number, got 1000"),
    ],
)
def test_settings_that_are_damaged(settings, message, tmp_path):
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    with pytest.raises(CheckpointError, match=message):
        merged(STATE, pair("unet.a.to_q"), tmp_path, metadata=metadata)


# Through conversion


@pytest.fixture
def encoder(tmp_path):
    """A text encoder's folder, two LoRA files for it, and its state with both merged by hand."""
    shutil.copytree(CLIP / "text_encoder", tmp_path / "sd" / "text_encoder")
    shutil.copytree(CLIP / "tokenizer", tmp_path / "sd" / "tokenizer")
    state = load_file(CLIP / "text_encoder" / "model.safetensors")
    module = "text_model.encoder.layers.1.self_attn.q_proj"
    one = pair("text_encoder." + module, wide=32) | pair("unet.a.to_q")
    other = pair("lora_te_" + module.replace(".", "_"), ("lora_down", "lora_up"), 2, 32, seed=1)
    save_file(one, tmp_path / "one.safetensors")
    save_file(other, tmp_path / "other.safetensors")
    changed = state[f"{module}.weight"].astype(np.float32)
    for weight, parts in ((0.5, one), (-2.0, other)):
        down, up, *_ = parts.values()
        changed = changed + np.float32(weight) * (up @ down)
    state = {k: v if v.dtype == np.int64 else v.astype(np.float32) for k, v in state.items()}
    return tmp_path / "sd" / "text_encoder", {**state, f"{module}.weight": changed}


def test_conversion(encoder, tmp_path):
    source, state = encoder
    loras = [(tmp_path / "one.safetensors", 0.5), (tmp_path / "other.safetensors", -2.0)]
    card = convert(source, tmp_path / "net", loras=loras)
    assert card.source == "text_encoder + 0.5 one.safetensors + -2 other.safetensors"
    save_file(state, source / "model.safetensors")
    expected = convert(source, tmp_path / "expected")
    assert card.source_checksum != expected.source_checksum
    ours, theirs = ts.load(tmp_path / "net").params, ts.load(tmp_path / "expected").params
    kernel = ours["block_1"]["qkv"]["kernel"]
    np.testing.assert_allclose(kernel, theirs["block_1"]["qkv"]["kernel"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ours["block_0"]["qkv"]["kernel"],
                                  theirs["block_0"]["qkv"]["kernel"])  # fmt: skip

    # The same from a whole checkpoint, whose names have a prefix.
    state = load_file(CLIP / "text_encoder" / "model.safetensors")
    state = {f"cond_stage_model.transformer.{name}": value for name, value in state.items()}
    save_file(state, tmp_path / "whole.safetensors")
    found = convert(tmp_path / "whole.safetensors", tmp_path / "whole", family="text_encoder",
                    num_heads=4, tokenizer=CLIP / "tokenizer", loras=loras)  # fmt: skip
    assert found.checksum == card.checksum


def test_on_the_command_line(encoder, tmp_path, capsys):
    source, _ = encoder
    file = tmp_path / "one.safetensors"
    card = convert(source, tmp_path / "net", loras=[(file, 0.5)])
    arguments = ["convert", str(source), str(tmp_path / "other"), "--lora", str(file)]
    assert cli.main([*arguments, "0.5"]) == 0
    assert ts.load(tmp_path / "other").card.checksum == card.checksum
    assert cli.main([*arguments, "--force"]) == 0
    assert ts.load(tmp_path / "other").card.source.endswith(" + 1 one.safetensors")
    for more, text in (
        (["0.5x"], f"--lora takes FILE and WEIGHT, got {file} 0.5x"),
        (["1", "2"], f"--lora takes FILE and WEIGHT, got {file} 1 2"),
    ):
        assert cli.main([*arguments, *more]) == 2
        assert text in capsys.readouterr().err


def test_networks_that_have_none(tmp_path):
    with pytest.raises(CheckpointError, match="change text encoders and U-Nets, not autoencoder"):
        convert(GOLDEN / "diffusers_tiny" / "vae", tmp_path / "net",
                loras=[(FOLDER / "peft.safetensors", 1.0)])  # fmt: skip
