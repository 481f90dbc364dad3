"""Every family of networks under one table of contracts; a new one is a few lines."""

import dataclasses
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params

import tstitch_jax as ts
from checkpoints_convert import convert, families
from checkpoints_convert.family import Conversion, Layout
from checkpoints_convert.rules import Rule, layer, same
from tstitch_jax.models.build import make_network, module_of
from tstitch_jax.models.families import FAMILIES, conditioner_of, family_of
from tstitch_jax.models.measure import param_shapes

pytestmark = pytest.mark.usefixtures("standard_promotion")

IMAGE = (8, 8, 4)
LABELED = dict(
    image_shape=IMAGE, target="eps", learned_variance=False, schedule={"name": "linear"},
    num_classes=10,
)  # fmt: skip
TEXTS = LABELED | dict(num_classes=0, context=(7, 12))
UNET = {"widths": [8, 16], "layers": 1, "heads": [0, 2], "middle_heads": 2, "groups": 4}

CARDS = {
    "dit": ts.Card(
        name="dit", architecture="dit", config=dict(width=32, depth=1, num_heads=2, patch=2),
        **LABELED,
    ),
    "dit, variance": ts.Card(
        name="dit", architecture="dit", config=dict(width=32, depth=1, num_heads=2, patch=2),
        **LABELED | dict(learned_variance=True),
    ),
    "unet": ts.Card(name="unet", architecture="unet", config=UNET, **TEXTS),
    "unet, labels": ts.Card(
        name="unet", architecture="unet", config=UNET | dict(label_width=8), **LABELED
    ),
}  # fmt: skip


def knot(network):
    knots = ts.make_knots(network.schedule, 4)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[1]), knots)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", CARDS)
def test_every_denoiser(name, dtype):
    """Shapes, dtypes and the conditioner's example fit together, in every compute dtype."""
    card = CARDS[name]
    network = make_network(card, random_params(card), dtype)
    cond = conditioner_of(card).example(3)
    x = jnp.zeros((3, *IMAGE))
    prediction = jax.eval_shape(network.denoiser, x, knot(network), cond)
    assert prediction.x0.shape == prediction.eps.shape == x.shape
    assert prediction.x0.dtype == prediction.eps.dtype == jnp.float32
    assert (prediction.variance is not None) == card.learned_variance
    assert jax.tree.structure(cond.given) == jax.tree.structure(cond.null)
    assert jax.tree.map(jnp.shape, cond.given) == jax.tree.map(jnp.shape, cond.null)
    guided = jax.eval_shape(ts.cfg(network.denoiser, 2.0), x, knot(network), cond)
    assert guided.x0.shape == x.shape


@pytest.mark.parametrize("name", CARDS)
def test_a_folder_holds_every_denoiser(name, tmp_path):
    """What is saved and loaded is the same network in the same executable."""
    card = CARDS[name]
    network = make_network(card, random_params(card))
    ts.save(tmp_path / "net", network)
    loaded = ts.load(tmp_path / "net")
    traces = []

    @jax.jit
    def predict(denoiser, x, at, cond):
        traces.append(1)
        return denoiser(x, at, cond)

    x = jax.random.normal(jax.random.key(0), (2, *IMAGE))
    cond = conditioner_of(card).example(2)
    first, second = (predict(n.denoiser, x, knot(n), cond) for n in (network, loaded))
    np.testing.assert_array_equal(first.x0, second.x0)
    assert len(traces) == 1
    assert loaded.card == dataclasses.replace(network.card, checksum=loaded.card.checksum)


def test_the_registry():
    for name, family in FAMILIES.items():
        assert family.name == name
    assert set(families()) >= {"dit", "sit", "unet", "autoencoder", "text_encoder", "clip"}
    with pytest.raises(ValueError, match="unknown architecture 'dat'; did you mean 'dit'"):
        family_of(dataclasses.replace(CARDS["dit"], architecture="dat"))
    with pytest.raises(ValueError, match="there is another family named 'dit'"):
        ts.register(ts.Family(name="dit", module="elsewhere:DiT"))


class Toy(nn.Module):
    """An architecture of another package: one matrix over the channels, and a shift by label."""

    image_shape: tuple[int, int, int]
    num_classes: int
    learned_variance: bool = False
    dtype: type = jnp.float32

    def inputs(self, batch=1):
        shapes = (batch, *self.image_shape), (batch,), (batch,)
        dtypes = jnp.float32, jnp.float32, jnp.int32
        return tuple(map(jax.ShapeDtypeStruct, shapes, dtypes))

    @nn.compact
    def __call__(self, x, time, labels):
        channels = self.image_shape[-1]
        shift = nn.Embed(self.num_classes + 1, channels, name="labels")(labels)
        return nn.Dense(channels, dtype=self.dtype, name="out")(x) + shift[:, None, None]


def convert_toy(family, tensors, config, heads):
    """Its checkpoints name the same two layers otherwise."""
    classes = tensors["classes.weight"].shape[0] - 1
    card = ts.Card(name="", architecture="toy", config={}, **LABELED | dict(num_classes=classes))
    rules = [*layer("out", "linear"), Rule("labels/embedding", ("classes.weight",), same)]
    return Conversion(card, rules)


LAYOUTS = (Layout("the toy's", ("toy",), r"(linear|classes)\..*", convert_toy),)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(sys.modules, "toy_package", sys.modules[__name__])
    family = ts.Family(name="toy", module="toy_package:Toy", layouts="toy_package:LAYOUTS")
    ts.register(family)
    yield family
    del FAMILIES["toy"]


def test_a_family_of_another_package(toy, tmp_path):
    """Registered by one line, it is converted, loaded, stitched and sampled like any other."""
    from safetensors.numpy import save_file

    generator = np.random.default_rng(0)
    shapes = {"linear.weight": (4, 4), "linear.bias": (4,), "classes.weight": (11, 4)}
    state = {k: 0.1 * generator.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    save_file(state, tmp_path / "toy.safetensors")
    card = convert(tmp_path / "toy.safetensors", tmp_path / "toy")
    assert (card.architecture, card.num_params) == ("toy", 64)
    network = ts.load(tmp_path / "toy")
    np.testing.assert_array_equal(network.params["out"]["kernel"], state["linear.weight"].T)
    assert set(param_shapes(module_of(card))) == {"labels", "out"}
    other = make_network(CARDS["dit"], random_params(CARDS["dit"]))
    sampler = ts.Sampler([network, other], plan=[0.5, 0.5], steps=4)
    samples = sampler(jax.random.key(0), labels=[1, 2], decode=False)
    assert np.isfinite(samples.latents).all()
