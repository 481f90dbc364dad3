"""The VQ autoencoders of latent diffusion against diffusers', of either layout."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN, relative
from safetensors.numpy import save_file
from unet_recipe import noise, weight

import tstitch_jax as ts
from checkpoints_convert import CheckpointError, convert
from tstitch_jax.models.autoencoder import LatentAutoencoder
from tstitch_jax.models.build import module_of
from tstitch_jax.models.measure import count_params, param_shapes

GIVEN = json.loads((GOLDEN / "unet" / "names.json").read_text())
LIMIT = 2e-5
NAMES = ("vq", "vq-plain")
with np.load(GOLDEN / "unet" / "expected.npz") as npz:
    EXPECTED = dict(npz)


def state_of(name):
    return {key: weight(key, shape) for key, shape in GIVEN[name]["shapes"].items()}


def write(name, folder, **changes):
    folder.mkdir()
    save_file(state_of(name), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(GIVEN[name]["config"] | changes))
    return folder


@pytest.fixture(scope="module")
def coders(tmp_path_factory):
    out = tmp_path_factory.mktemp("vq")
    found = {}
    for name in NAMES:
        convert(write(name, out / f"{name}-source"), out / name)
        found[name] = ts.load(out / name)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_values(name, coders):
    coder, module = coders[name], module_of(coders[name].card)
    channels = coder.card.config["latent_channels"]
    images = jnp.asarray(noise(f"{name}/images", 2, 16, 24, 3))
    latents = jnp.asarray(noise(f"{name}/latents", 2, 8, 12, channels))
    assert (coder.factor, coder.channels, coder.card.scaling_factor) == (2, channels, 1.0)
    encoded = coder.encode(images)
    assert relative(encoded, EXPECTED[f"{name}/encoded"]) < LIMIT
    # There is no posterior to sample from.
    sampled = coder.encode(images, jnp.ones_like(latents))
    np.testing.assert_array_equal(sampled, encoded)

    @jax.jit
    def decode(params):
        kept = dict(method="decode", capture_intermediates=True)
        return module.apply({"params": params}, latents, **kept)

    decoded, state = decode(coder.params)
    quantized = state["intermediates"]["quantize"]["__call__"][0]
    assert relative(quantized, EXPECTED[f"{name}/quantized"]) < LIMIT
    assert len(np.unique(quantized.reshape(-1, channels), axis=0)) > 5
    layers = [key for key in EXPECTED if key.startswith(f"{name}/decoder/")]
    assert len(layers) == (2 if name == "vq" else 0)
    for key in layers:
        found = state["intermediates"]["decoder"][key.split("/")[-1]]["__call__"][0]
        assert relative(found, EXPECTED[key]) < LIMIT
    assert relative(decoded, EXPECTED[f"{name}/decoded"]) < LIMIT


@pytest.mark.parametrize("whole", [False, True])
def test_the_layout_of_compvis_is_the_same_network(whole, coders, tmp_path):
    state = {
        GIVEN["vq"]["compvis"][name]: value[:, :, None, None]
        if "attentions" in name and value.ndim == 2
        else value
        for name, value in state_of("vq").items()
    }
    if whole:
        state = {f"first_stage_model.{name}": value for name, value in state.items()}
        state["model.diffusion_model.time_embed.0.weight"] = np.zeros((3, 3), np.float32)
    else:
        state["loss.discriminator.main.0.weight"] = np.zeros((3, 3), np.float32)
    save_file(state, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "net", family="autoencoder")
    network = ts.load(tmp_path / "net")
    assert network.card.config == coders["vq"].card.config
    jax.tree.map(np.testing.assert_array_equal, network.params, coders["vq"].params)
    assert network.card.scaling_factor == 1.0


@pytest.mark.parametrize("name", ["vq-f4", "vq-f8"])
def test_published_sizes(name):
    config = GIVEN[name]["config"]
    module = LatentAutoencoder(
        tuple(config["block_out_channels"]), 2, config["latent_channels"], (256, 256, 3),
        attention=(3,) if name == "vq-f8" else (), codebook=config["num_vq_embeddings"],
    )  # fmt: skip
    assert count_params(param_shapes(module)) == GIVEN[name]["params"]
    assert module.factor == int(name[-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lookup_from_codebook=True), "lookup_from_codebook is True"),
        (dict(num_vq_embeddings=7), "num_vq_embeddings is 7, expected 50"),
        (dict(norm_type="spatial"), "norm_type is 'spatial'"),
        (dict(_class_name="AutoencoderKL"), "expected 'VQModel'"),
    ],
)
def test_another_configuration_is_refused(changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        convert(write("vq", tmp_path / "source", **changes), tmp_path / "net")
    assert not (tmp_path / "net").exists()
