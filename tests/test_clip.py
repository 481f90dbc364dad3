"""CLIP's towers, text encoders and their conversion, against transformers."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_recipe import IMAGE_SIZES, pixels_of, texts
from helpers import GOLDEN, relative
from safetensors.numpy import load_file, save_file

import tstitch_jax as ts
from checkpoints_convert import CheckpointError, conversion, convert, rules
from checkpoints_convert.rules import Tensor
from tstitch_jax.models import store
from tstitch_jax.models.build import flatten, module_of
from tstitch_jax.models.clip import CLIP, TextTower, prepare
from tstitch_jax.models.measure import count_params, param_shapes

TINY = GOLDEN / "clip_tiny"
LIMIT = 2e-5
with np.load(TINY / "expected.npz") as npz:
    EXPECTED = dict(npz)
NAMES = json.loads((TINY / "names.json").read_text())
IDS = jnp.asarray(EXPECTED["text/rows"], jnp.int32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Both networks, converted."""
    out = tmp_path_factory.mktemp("clip")
    convert(TINY / "text_encoder", out / "text", name="text")
    convert(TINY / "clip", out / "clip", name="clip")
    return out


@pytest.fixture(scope="module")
def encoder(folders):
    return ts.load(folders / "text")


@pytest.fixture(scope="module")
def clip(folders):
    return ts.load(folders / "clip")


def layers_of(network, *inputs, method=None):
    output, state = module_of(network.card).apply(
        {"params": network.params}, *inputs, method=method, capture_intermediates=True
    )
    return output, state["intermediates"]


# By value


def test_text_encoder(encoder):
    _, layers = layers_of(encoder, IDS)
    for i in range(3):
        found = layers[f"block_{i}"]["__call__"][0]
        assert relative(found, EXPECTED[f"text/hidden_{i + 1}"]) < LIMIT
    context = encoder.model(IDS)
    assert context.shape == (len(IDS), 77, 32)
    assert relative(context, EXPECTED["text/output"]) < LIMIT
    assert (encoder.tokens, encoder.width) == (77, 32)


def test_the_penultimate_block(encoder):
    card = dataclasses.replace(encoder.card, config={**encoder.card.config, "skip": 1})
    other = ts.make_network(card, encoder.params, tokenizer=encoder.tokenizer.files)
    assert relative(other.model(IDS), EXPECTED["text/penultimate"]) < LIMIT
    # What is left out costs nothing in a program.
    text = jax.jit(lambda model, ids: model(ids)).lower(other.model, IDS).compile().as_text()
    assert "block_1" in text
    assert "block_2" not in text
    with pytest.raises(ValueError, match="skip must be 0 to 2, got 3"):
        module_of(dataclasses.replace(card, config={**card.config, "skip": 3}))


def test_texts_to_contexts(encoder):
    rows = texts()[12:900:222]
    with pytest.warns(UserWarning, match=r"cut to 75; left out: '") as caught:
        ids = encoder.tokenizer.encode(rows)
    assert len(caught) == 1
    np.testing.assert_array_equal(ids, IDS)


def test_tokens_do_not_see_those_after_them(encoder):
    changed = IDS.at[:, 5].set(7)
    one, other = (encoder.model(ids) for ids in (IDS, changed))
    np.testing.assert_array_equal(one[:, :5], other[:, :5])
    assert (jnp.abs(one - other)[:, 5:].max((0, 2)) > 1e-4).all()


def test_image_tower(clip):
    prepared = jnp.asarray(EXPECTED["clip/prepared_0"])
    module = module_of(clip.card)
    output, layers = layers_of(clip, prepared, method=lambda m, x: m.image_out(m.image_tower(x)))
    for name in ("norm_in", "block_0", "block_1"):
        found = layers["image_tower"][name]["__call__"][0]
        assert relative(found, EXPECTED[f"clip/image_tower/{name}"]) < LIMIT
    assert relative(output, EXPECTED["clip/images_0"]) < LIMIT
    assert module.image_shape == (32, 32, 3)


def test_text_tower_of_clip(clip):
    output, layers = layers_of(clip, IDS, method="texts")
    for i in range(2):
        found = layers["text_tower"][f"block_{i}"]["__call__"][0]
        assert relative(found, EXPECTED[f"clip/text_tower/block_{i}"]) < LIMIT
    assert relative(output, EXPECTED["clip/texts"]) < LIMIT
    assert relative(clip.model.embed(IDS), EXPECTED["clip/texts"]) < LIMIT


@pytest.mark.parametrize("i", range(len(IMAGE_SIZES)), ids=[f"{h}x{w}" for h, w in IMAGE_SIZES])
def test_images_as_pillow_prepares_them(clip, i):
    pixels = pixels_of(IMAGE_SIZES[i])
    found = jax.jit(lambda x: prepare(x, 32))(jnp.asarray(pixels, jnp.float32))
    np.testing.assert_allclose(found, EXPECTED[f"clip/prepared_{i}"], atol=1e-5, rtol=0)
    features = clip.model(jnp.asarray(pixels))
    assert features.logits is None
    assert relative(features.pool, EXPECTED[f"clip/images_{i}"]) < LIMIT


def test_cosines(clip):
    def unit(x):
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)

    images = clip.model(jnp.asarray(pixels_of(IMAGE_SIZES[-1]))).pool
    found = unit(images) @ unit(clip.model.embed(IDS)).T
    assert relative(found, EXPECTED["clip/cosines"]) < LIMIT


def test_bfloat16_is_close(folders, encoder, clip):
    half = ts.load(folders / "text", jnp.bfloat16)
    context = half.model(IDS)
    assert context.dtype == jnp.float32
    assert 0 < relative(context, EXPECTED["text/output"]) < 0.05
    kept = {leaf.dtype.name for leaf in jax.tree.leaves(half.params)}
    assert kept == {"float32", "bfloat16"}
    assert half.params["table"]["embedding"].dtype == jnp.bfloat16
    assert half.params["norm_out"]["scale"].dtype == jnp.float32
    half = ts.load(folders / "clip", jnp.bfloat16)
    pool = half.model(jnp.asarray(pixels_of(IMAGE_SIZES[0]))).pool
    assert half.dtype == "bfloat16"
    assert pool.dtype == jnp.float32
    assert 0 < relative(pool, EXPECTED["clip/images_0"]) < 0.05


# By shape


def check_shapes(shapes, family, config, extra=()):
    def unread():
        raise AssertionError("read")

    names = {**shapes, **{name: [1] for name in extra}}
    tensors = {n: Tensor(tuple(s), np.dtype(np.float16), unread) for n, s in names.items()}
    layout, family = conversion._layout(Path("x.safetensors"), tensors, family)
    found = layout.convert(family, tensors, config, None)
    expected = {k: v.shape for k, v in flatten(param_shapes(module_of(found.card))).items()}
    rules.check(found.rules, tensors, expected, found.ignored)
    return found.card


TEXT_L = dict(
    vocabulary=49408, tokens=77, width=768, depth=12, num_heads=12, mlp_width=3072,
    activation="quick_gelu",
)  # fmt: skip


@pytest.mark.parametrize("within", ["", "cond_stage_model.transformer."])
def test_stable_diffusion(within):
    shapes = {within + name: shape for name, shape in NAMES["sd_text_encoder"].items()}
    others = ["model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.bias"]
    config = {} if within else {"num_attention_heads": 12, "hidden_act": "quick_gelu"}
    card = check_shapes(shapes, "text_encoder", config, others if within else ())
    assert card.config == TEXT_L
    module = module_of(card)
    params = param_shapes(module)
    assert count_params(params) == 123_060_480
    output = jax.eval_shape(lambda p, x: module.apply({"params": p}, x), params, *module.inputs(2))
    assert (output.shape, output.dtype) == ((2, 77, 768), jnp.float32)


@pytest.mark.parametrize(
    ("name", "count", "side", "config", "sizes"),
    [
        (
            "clip_vit_base_patch32", 151_277_312, 224, {},
            dict(text=dict(width=512, depth=12, num_heads=8, mlp_width=2048),
                 image=dict(width=768, depth=12, num_heads=12, mlp_width=3072, patch=32),
                 features=512),
        ),
        (
            "clip_vit_large_patch14", 427_616_512, 224,
            {"text_config_dict": {"num_attention_heads": 12},
             "vision_config": {"num_attention_heads": 16, "patch_size": 14}},
            dict(text=dict(width=768, depth=12, num_heads=12, mlp_width=3072),
                 image=dict(width=1024, depth=24, num_heads=16, mlp_width=4096, patch=14),
                 features=768),
        ),
    ],
)  # fmt: skip
def test_published_sizes(name, count, side, config, sizes):
    config = {"model_type": "clip", "text_config": {"hidden_act": "quick_gelu"}, **config}
    config = {"vision_config": {"hidden_act": "quick_gelu"}, **config}
    card = check_shapes(NAMES[name], None, config)
    assert card.image_shape == (side, side, 3)
    for tower in ("text", "image"):
        assert card.config[tower].items() >= sizes[tower].items()
        assert card.config[tower]["activation"] == "quick_gelu"
    assert card.config["features"] == sizes["features"]
    module = module_of(card)
    params = param_shapes(module)
    # All but the scale of the logits.
    assert count_params(params) == count
    outputs = jax.eval_shape(lambda p, *x: module.apply({"params": p}, *x), params,
                             *module.inputs(2))  # fmt: skip
    assert [out.shape for out in jax.tree.leaves(outputs)] == [(2, sizes["features"])] * 2


# Conversion and folders


def state_of(name):
    return load_file(TINY / name / "model.safetensors")


def test_cards(folders, encoder, clip):
    card = encoder.card
    assert (card.name, card.architecture) == ("text", "clip_text")
    assert card == store.read_card(folders / "text")
    assert card.num_params == count_params(encoder.params)
    assert (folders / "text" / "tokenizer" / "vocab.json").read_bytes() == (
        TINY / "tokenizer" / "vocab.json"
    ).read_bytes()
    assert clip.card.config["text"]["activation"] == "gelu"
    assert clip.card.num_classes == 0
    assert clip.card.tokenizer_checksum == card.tokenizer_checksum != ""


@pytest.mark.parametrize("layout", ["whole", "newer", "fp16", "given"])
def test_every_layout_is_the_same_network(layout, encoder, tmp_path):
    source, state, more = tmp_path / "sd" / "text_encoder", state_of("text_encoder"), {}
    shutil.copytree(TINY / "text_encoder", source)
    shutil.copytree(TINY / "tokenizer", tmp_path / "sd" / "tokenizer")
    if layout == "whole":
        state = {f"cond_stage_model.transformer.{name}": value for name, value in state.items()}
        state["model.diffusion_model.out.2.bias"] = np.ones(4, np.float32)
        source = tmp_path / "sd.safetensors"
        save_file(state, source)
        more = {"num_heads": 4, "family": "text_encoder", "tokenizer": TINY / "tokenizer"}
    elif layout == "newer":
        state = {name.removeprefix("text_model."): value for name, value in state.items()}
        del state["embeddings.position_ids"]
        save_file(state, source / "model.safetensors")
    elif layout == "fp16":
        (source / "model.safetensors").rename(source / "model.fp16.safetensors")
    else:
        shutil.rmtree(tmp_path / "sd" / "tokenizer")
        more = {"tokenizer": TINY / "tokenizer"}
    convert(source, tmp_path / "net", **more)
    found = ts.load(tmp_path / "net")
    assert found.card.config == encoder.card.config
    assert found.card.checksum == encoder.card.checksum
    assert found.card.tokenizer_checksum == encoder.card.tokenizer_checksum


def test_round_trip(encoder, clip, tmp_path):
    for network in (encoder, clip):
        ts.save(tmp_path / "net", network)
        loaded = ts.load(tmp_path / "net")
        assert loaded.card == network.card
        jax.tree.map(np.testing.assert_array_equal, loaded.params, network.params)
        assert loaded.tokenizer.files == network.tokenizer.files
        run = jax.jit(lambda model: jax.tree.leaves(model)[0])
        run(loaded.model)
        run(ts.load(tmp_path / "net").model)
        assert run._cache_size() == 1
        placed = ts.load(tmp_path / "net", mesh=ts.make_mesh())
        for other in (loaded, placed):
            assert jax.tree.structure(other.model) == jax.tree.structure(network.model)
    bare = ts.make_network(encoder.card, encoder.params)
    assert bare.tokenizer is None
    with pytest.raises(ValueError, match="text has no tokenizer, and its folder must"):
        ts.save(tmp_path / "other", bare)
    bare = ts.make_network(clip.card, clip.params)
    assert jax.tree.structure(bare.model) == jax.tree.structure(clip.model)
    with pytest.raises(ValueError, match="clip has no tokenizer"):
        ts.save(tmp_path / "other", bare)


def test_contexts_on_a_mesh_are_the_same(encoder):
    placed = ts.shard(encoder, ts.make_mesh(devices=jax.devices()[:2]))
    np.testing.assert_allclose(placed.model(IDS), encoder.model(IDS), atol=1e-5)


def test_damaged_tokenizers_of_folders(folders, tmp_path):
    out = tmp_path / "net"
    shutil.copytree(folders / "text", out)
    merges = out / "tokenizer" / "merges.txt"
    lines = merges.read_text().split("\n")
    merges.write_text("\n".join([*lines[:1], lines[2], lines[1], *lines[3:]]))
    with pytest.raises(ValueError, match="damaged: its tokenizer does not match the card"):
        ts.load(out)
    merges.unlink()
    with pytest.raises(ValueError, match=r"damaged: .*tokenizer has no tokenizer: expected vocab"):
        ts.load(out)


def test_shapes_alone_make_an_encoder():
    """To compile for one that is not there."""
    card = ts.TextEncoderCard(name="sd", architecture="clip_text", config=TEXT_L)
    encoder = ts.make_network(card, param_shapes(module_of(card)), jnp.bfloat16)
    assert encoder.card.num_params == 123_060_480
    assert encoder.params["block_0"]["qkv"]["kernel"].dtype == jnp.bfloat16
    assert encoder.card.macs == pytest.approx(77 * 12 * (12 * 768**2 + 2 * 77 * 768), rel=1e-3)


# What is refused


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(width=30), "4 heads do not divide a width of 30"),
        (dict(depth=0), "depth must be at least 1, got 0"),
        (dict(activation="relu"), "activation must be one of gelu, quick_gelu, got 'relu'"),
    ],
)
def test_sizes_that_cannot_be(changes, text):
    size = dict(vocabulary=9, width=32, depth=1, num_heads=4, mlp_width=64)
    with pytest.raises(ValueError, match=text):
        TextTower(**{**size, **changes})
    image = dict(width=32, depth=1, num_heads=4, mlp_width=64, patch=8)
    module = CLIP(size, {**image, **changes}, 8, (32, 32, 3))
    with pytest.raises(ValueError, match=text):
        param_shapes(module)


def test_other_inputs_are_refused(encoder, clip):
    with pytest.raises(ValueError, match=r"built for 77 tokens, got ids of \(1, 76\)"):
        encoder.model(jnp.zeros((1, 76), jnp.int32))
    with pytest.raises(ValueError, match=r"\[B, H, W, 3\], got \(1, 9, 9, 1\)"):
        clip.model(jnp.zeros((1, 9, 9, 1)))
    with pytest.raises(ValueError, match=r"image_shape must be \(S, S, 3\), got \(32, 24, 3\)"):
        CLIP({}, {}, 8, (32, 24, 3))
    size = dict(width=32, depth=1, num_heads=4, mlp_width=64, patch=7)
    with pytest.raises(ValueError, match="patch 7 does not divide a side of 32"):
        param_shapes(CLIP(dict(vocabulary=9, width=32, depth=1, num_heads=4, mlp_width=64), size,
                          8, (32, 32, 3)))  # fmt: skip


def test_a_missing_tokenizer_is_named(tmp_path):
    source = tmp_path / "text_encoder"
    shutil.copytree(TINY / "text_encoder", source)
    with pytest.raises(CheckpointError, match=r"no tokenizer in .*text_encoder or .*tokenizer; "
                                              r"give .* with --tokenizer"):  # fmt: skip
        convert(source, tmp_path / "net")
    with pytest.raises(CheckpointError, match="has no tokenizer: expected"):
        convert(source, tmp_path / "net", tokenizer=tmp_path)
    other = tmp_path / "other"
    shutil.copytree(TINY / "tokenizer", other)
    small = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    (other / "vocab.json").write_text(json.dumps(small))
    (other / "merges.txt").write_text("")
    with pytest.raises(CheckpointError, match="knows 2 tokens, the network 814; give"):
        convert(source, tmp_path / "net", tokenizer=other)
    with pytest.raises(CheckpointError, match="autoencoder has no tokenizer; leave it out"):
        convert(GOLDEN / "diffusers_tiny" / "vae", tmp_path / "net", tokenizer=other)
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(hidden_size=33), "hidden_size is 33, expected 32"),
        (dict(hidden_act="relu"), "hidden_act is 'relu', expected 'gelu' or 'quick_gelu'"),
        (dict(num_attention_heads=0), "num_attention_heads is 0, expected a whole number up to 32"),
        (dict(layer_norm_eps=1e-6), "layer_norm_eps is 1e-06, expected 1e-05"),
        (dict(model_type="t5"), "model_type is 't5', expected 'clip_text_model'"),
    ],
)
def test_other_configurations_are_refused(change, text, tmp_path):
    source = tmp_path / "text_encoder"
    shutil.copytree(TINY / "text_encoder", source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=text):
        convert(source, tmp_path / "net", tokenizer=TINY / "tokenizer")


def test_damaged_checkpoints_are_refused(tmp_path):
    source = tmp_path / "clip"
    shutil.copytree(TINY / "clip", source)
    state = state_of("clip")
    del state["vision_model.encoder.layers.1.mlp.fc2.bias"]
    state["text_model.final_layer_norm.weight"] = np.ones(3, np.float16)
    state["text_model.encoder.layers.0.adapter.weight"] = np.ones(3, np.float16)
    save_file(state, source / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        convert(source, tmp_path / "net")
    for text in ("missing: vision_model.encoder.layers.1.mlp.fc2.bias", "layers.0.adapter.weight",
                 "(3,) for text_tower/norm_out/scale (32,)"):  # fmt: skip
        assert text in str(error.value)
    with pytest.raises(CheckpointError, match="leave out --num-heads"):
        convert(TINY / "clip", tmp_path / "net", num_heads=4)
    with pytest.raises(CheckpointError, match="num_attention_heads is 4, --num-heads 2"):
        convert(TINY / "text_encoder", tmp_path / "net", num_heads=2)


@pytest.mark.parametrize(
    "name",
    ["cond_stage_model.model.transformer.resblocks.0.ln_1.weight",
     "conditioner.embedders.1.model.transformer.resblocks.0.ln_1.weight"],
)  # fmt: skip
def test_later_generations_are_named(name, tmp_path):
    state = {name: np.ones(4, np.float32), "model.diffusion_model.out.0.bias": np.ones(4, "f4")}
    save_file(state, tmp_path / "sd2.safetensors")
    with pytest.raises(CheckpointError, match="OpenCLIP's text tower, of Stable Diffusion 2 or XL"):
        convert(tmp_path / "sd2.safetensors", tmp_path / "net", family="text_encoder")


def test_heads_that_cannot_be_told(tmp_path):
    source = tmp_path / "sd.safetensors"
    state = state_of("text_encoder")
    save_file({f"cond_stage_model.transformer.{n}": v for n, v in state.items()}, source)
    with pytest.raises(CheckpointError, match=r"a width of 32 does not tell .*; give --num-heads"):
        convert(source, tmp_path / "net", tokenizer=TINY / "tokenizer")
