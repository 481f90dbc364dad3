"""The Inception network against pytorch-fid's, and its resize against TensorFlow's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN, relative
from inception_recipe import SIZES, pixels_of, some, weights
from safetensors.numpy import save_file

from checkpoints_convert import convert
from checkpoints_convert.errors import CheckpointError
from tstitch_jax.models import build, inception, store

NAMES = json.loads((GOLDEN / "inception" / "names.json").read_text())
BLOCKS = [f"mixed_{name}" for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a")]
BLOCKS += ["mixed_7b", "mixed_7c"]


@pytest.fixture(scope="module")
def expected():
    with np.load(GOLDEN / "inception" / "expected.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def tensors():
    return weights(NAMES)


@pytest.fixture(scope="module")
def folder(tensors, tmp_path_factory):
    """The published file's tensors, through conversion."""
    out = tmp_path_factory.mktemp("inception")
    save_file(tensors, out / "weights.safetensors")
    convert(out / "weights.safetensors", out / "network")
    (out / "weights.safetensors").unlink()
    return out / "network"


@pytest.fixture(scope="module")
def network(folder):
    return store.load(folder)


@pytest.fixture(scope="module")
def found(network):
    module = build.module_of(network.card)

    @jax.jit
    def run(params, x):
        return module.apply(
            {"params": params}, x, capture_intermediates=lambda m, _: m.name in BLOCKS
        )

    outputs, state = run(network.params, jnp.asarray(pixels_of(SIZES[0]), jnp.float32))
    blocks = {name: state["intermediates"][name]["__call__"][0] for name in BLOCKS}
    return {**outputs._asdict(), **{name: some(value) for name, value in blocks.items()}}


def test_card(network):
    card = network.card
    assert (card.architecture, card.num_classes) == ("inception", 1008)
    assert card.num_params == 23_884_384
    assert card.macs == pytest.approx(5.71e9, rel=0.01)  # as InceptionV3's are counted


@pytest.mark.parametrize("name", ["pool", "logits", "spatial", *BLOCKS])
def test_values(name, found, expected):
    assert relative(found[name], expected[name]) < 2e-5


def test_outputs_have_the_published_sizes(found):
    assert found["pool"].shape == (2, 2048)
    assert found["logits"].shape == (2, 1008)
    assert found["spatial"].shape == (2, 17 * 17 * 7)


@pytest.mark.parametrize("i", range(len(SIZES)), ids=[f"{h}x{w}" for h, w in SIZES])
def test_resize(i, expected):
    # TensorFlow's kernels multiply and add in one, which leaves a last bit of 255.
    resized = jax.jit(lambda x: inception.resize(x, 299, 299))(
        jnp.asarray(pixels_of(SIZES[i]), jnp.float32)
    )
    np.testing.assert_allclose(some(resized), expected[f"resized_{i}"], atol=1e-4, rtol=0)


def test_bfloat16_is_close(folder, found):
    network = store.load(folder, jnp.bfloat16)
    pixels = jnp.asarray(pixels_of(SIZES[0]))
    features = jax.jit(lambda model, x: model(x))(network.model, pixels)
    assert network.dtype == "bfloat16"
    assert all(value.dtype == jnp.float32 for value in features)
    assert 0 < relative(features.pool, found["pool"]) < 0.05


def test_other_channels_are_refused(network):
    with pytest.raises(ValueError, match=r"\[B, H, W, 3\], got \(1, 9, 9, 1\)"):
        network.model(jnp.zeros((1, 9, 9, 1)))


def test_damaged_checkpoints_are_refused(tensors, tmp_path):
    changed = dict(tensors)
    del changed["Mixed_6d.branch_pool.conv.weight"]
    changed["Mixed_5b.branch1x1.bn.weight"] = np.ones(3, np.float32)
    changed["Mixed_9z.branch1x1.bn.weight"] = np.ones(3, np.float32)
    save_file(changed, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError) as error:
        convert(tmp_path / "weights.safetensors", tmp_path / "out")
    for text in ("missing: Mixed_6d.branch_pool.conv.weight", "(3,) for mixed_5b/branch1x1/scale",
                 "not expected: Mixed_9z"):  # fmt: skip
        assert text in str(error.value)
    assert not (tmp_path / "out").exists()
