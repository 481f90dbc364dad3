"""The short way: what it returns, and every error before anything is compiled."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from helpers import random_params, tiny_network

import tstitch_jax as ts
from tstitch_jax import checkpoint, pipeline
from tstitch_jax.networks import SIZES, dit, param_shapes
from tstitch_jax.networks.autoencoder import KLAutoencoder

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def pair():
    return [tiny_network(0, name="a"), tiny_network(1, name="b", width=48, num_heads=3)]


def request(pair, **changes):
    options = dict(labels=[1, 2], fractions=[0.5, 0.5], steps=4, decode=False)
    return ts.sample(KEY, changes.pop("networks", pair), **{**options, **changes})


def test_returns_what_it_says(pair):
    x = request(pair)
    assert x.shape == (2, 8, 8, 4)
    assert x.dtype == jnp.float32
    x0, trajectory = request(pair, return_trajectory=True)
    assert trajectory.shape == (4, 2, 8, 8, 4)
    np.testing.assert_array_equal(trajectory[-1], x0)
    np.testing.assert_allclose(x0, x, rtol=1e-5, atol=1e-5 * float(jnp.abs(x).max()))


def test_images_are_clipped_and_trajectories_are_not():
    network = tiny_network(image_shape=(8, 8, 1), guidance_channels=None)
    images, trajectory = ts.sample(KEY, [network], labels=[0, 1], steps=4, return_trajectory=True)
    assert float(jnp.abs(images).max()) <= 1 < float(jnp.abs(trajectory[-1]).max())
    np.testing.assert_array_equal(images, trajectory[-1].clip(-1, 1))


def test_a_plan_instead_of_fractions(pair):
    plan = ts.Plan.from_counts([2, 2])
    np.testing.assert_array_equal(request(pair, fractions=None, plan=plan), request(pair))


def test_guidance_choices(pair):
    network = pair[0]
    default = request([network], fractions=None)
    np.testing.assert_array_equal(request([network], fractions=None, cfg_channels=3), default)
    assert not np.allclose(request([network], fractions=None, cfg_channels=4), default)
    # Scale 1 is the conditional prediction, as is no guidance.
    one, none = (request([network], fractions=None, cfg_scale=s) for s in (1.0, None))
    np.testing.assert_allclose(one, none, rtol=1e-4, atol=1e-4 * float(jnp.abs(none).max()))


def test_given_noise_is_the_start(pair):
    noise = np.random.default_rng(0).standard_normal((2, 8, 8, 4))  # float64, as NumPy makes it
    drawn, given = request(pair), request(pair, noise=noise)
    assert not np.allclose(drawn, given)
    keys = ts.image_keys(KEY, jnp.arange(2))
    same = request(pair, noise=ts.draw_noise(keys, 0, (8, 8, 4)))
    np.testing.assert_allclose(same, drawn, rtol=1e-5, atol=1e-5 * float(jnp.abs(drawn).max()))


@pytest.fixture(scope="module")
def autoencoder():
    card = ts.AutoencoderCard(
        name="coder",
        architecture="autoencoder",
        config={"widths": [8, 16], "layers": 1, "latent_channels": 4, "groups": 4},
        image_shape=(16, 16, 3),
        scaling_factor=0.5,
    )
    return ts.make_autoencoder(card, jax.tree.map(lambda p: 10 * p, random_params(card)))


def test_latents_are_decoded_in_the_same_executable(pair, autoencoder):
    latents = request(pair)
    images, trajectory = request(pair, decode=True, autoencoder=autoencoder, return_trajectory=True)
    assert images.shape == (2, 16, 16, 3)
    np.testing.assert_allclose(trajectory[-1], latents, rtol=1e-4, atol=1e-4)
    decoded = autoencoder.decode(autoencoder.params, trajectory[-1])
    assert float(jnp.abs(decoded).max()) > 1  # so that clipping is seen
    np.testing.assert_allclose(images, jnp.clip(decoded, -1, 1), atol=1e-4)
    sampling = pipeline.prepare(
        KEY, pair, labels=[1, 2], fractions=[0.5, 0.5], steps=4, autoencoder=autoencoder
    )
    np.testing.assert_allclose(sampling.compile()(*sampling.dynamic), images, atol=1e-5)
    # Given, but not wanted.
    same = request(pair, autoencoder=autoencoder)
    np.testing.assert_array_equal(same, latents)


@pytest.mark.parametrize("side", [32, 64])
def test_full_size_networks_by_shape(pair, autoencoder, side):
    """DiT-S/2, DiT-XL/2 and Stable Diffusion's autoencoder in the place of the small ones."""
    sampling = pipeline.prepare(
        KEY, pair, labels=[1, 2], fractions=[0.5, 0.5], steps=4, autoencoder=autoencoder
    )
    modules = [
        dit.DiT(**SIZES[f"dit-{size}-2"], image_shape=(side, side, 4), num_classes=1000)
        for size in ("s", "xl")
    ]
    coder = KLAutoencoder((128, 256, 512, 512), 2, 4, (256, 256, 3))
    dynamic = list(sampling.dynamic)
    dynamic[1] = tuple(param_shapes(module) for module in modules)
    dynamic[-1] = param_shapes(coder)
    static = sampling.static | dict(
        denoisers=tuple(checkpoint._denoiser(module, "eps", True) for module in modules),
        null=1000,
        shape=(side, side, 4),
        decoder=checkpoint._coders(coder, 0.18215)[1],
    )
    images = jax.eval_shape(functools.partial(pipeline._sample, **static), *dynamic)
    assert images.shape == (2, 8 * side, 8 * side, 3)
    assert images.dtype == jnp.float32


def test_an_autoencoder_of_other_latents_is_refused(autoencoder):
    network = tiny_network(image_shape=(8, 8, 3), guidance_channels=None)
    with pytest.raises(ValueError, match=r"tiny makes 3 channels, .* coder takes latents of 4"):
        ts.sample(KEY, [network], labels=[0], steps=2, autoencoder=autoencoder)


def other(**changes):
    return tiny_network(2, name="other", **changes)


BAD = [
    (dict(fractions=[0.5, 0.6]), "must sum to 1, got 0.5, 0.6"),
    (dict(fractions=[-0.5, 1.5]), "between 0 and 1, got -0.5, 1.5"),
    (dict(fractions=[0.2, 0.3, 0.5]), "2 networks need 2 fractions, got 0.2, 0.3, 0.5"),
    (dict(fractions=None), "give fractions or a plan for the 2 networks"),
    (dict(plan=ts.Plan.from_counts([2, 2])), "fractions or a plan, not both"),
    (dict(fractions=None, plan=ts.Plan.from_counts([2, 3])), "plan has 5 steps, the sampler 4"),
    (dict(fractions=None, plan=ts.Plan.from_counts([4])), "plan is for 1 networks, got 2"),
    (dict(labels=[1, 10]), "labels must be 0 to 9, got 10"),
    (dict(labels=[-1]), "labels must be 0 to 9, got -1"),
    (dict(labels=[]), "labels must be a list of whole numbers"),
    (dict(labels=np.array([0.5])), "labels must be a list of whole numbers"),
    (dict(steps=0), "at least 1, got 0"),
    (dict(steps=1001), "at most the 1000 training times, got 1001"),
    (dict(solver="dimm"), "unknown solver 'dimm'; did you mean 'ddim'"),
    (dict(solver="ddpm", eta=0.5), "eta belongs to the solver 'ddim'"),
    (dict(eta=2.0), "eta must be between 0 and 1, got 2"),
    (dict(eta=float("nan")), "eta must be between 0 and 1, got nan"),
    (dict(cfg_scale=float("nan")), "cfg_scale must be a finite number or None, got nan"),
    (dict(cfg_channels=5), "cfg_channels must be 1 to 4, got 5"),
    (dict(cfg_channels=0), "cfg_channels must be 1 to 4, got 0"),
    (dict(noise=np.zeros((3, 8, 8, 4))), r"noise must be \(2, 8, 8, 4\), one per label"),
    (
        dict(decode=True, networks="latents"),
        r"latents of 4 channels, not images; give autoencoder=ts.load\('sd-vae-ft-ema'\), or",
    ),
    (dict(decode=True, autoencoder="sd-vae-ft-ema"), "'sd-vae-ft-ema' is no autoencoder; give one"),
    (dict(networks="autoencoders"), "their autoencoder differs, one and two"),
    (dict(eta=np.float32(2)), "eta must be between 0 and 1, got 2"),
    (dict(eta=None), "eta must be a number, got None"),
    (dict(cfg_scale=1e39), "cfg_scale must be a finite number"),
    (dict(plan=[0, 0, 1, 1], fractions=None), "plan must be a ts.Plan, got .0, 0, 1, 1."),
    (
        dict(plan=ts.Plan(np.array([0, 1, 7, 1], np.int32), 2), fractions=None),
        "holds numbers 0 to 1, got 0 to 7",
    ),
    (dict(networks=["fashion-s"]), "networks must be a list of what ts.load returns"),
    (dict(networks=[]), "give at least one network"),
    (dict(networks="shape"), "a and other cannot be stitched: their image shape differs"),
    (dict(networks="classes"), "a and other .* number of classes differs, 10 and 7"),
    (dict(networks="schedule"), "a and other .* noise schedule differs, .*linear.*cosine"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input(pair, changes, message, monkeypatch):
    monkeypatch.setattr(pipeline, "_sample", None)  # nothing may be compiled
    second = {
        "shape": lambda: other(image_shape=(8, 8, 3)),
        "classes": lambda: other(num_classes=7),
        "schedule": lambda: other(schedule={"name": "cosine"}),
        "latents": lambda: other(autoencoder="sd-vae-ft-ema"),
        "autoencoders": lambda: other(autoencoder="two"),
    }
    if isinstance(changes.get("networks"), str):
        first = other(autoencoder="one") if changes["networks"] == "autoencoders" else pair[0]
        changes = {**changes, "networks": [first, second[changes["networks"]]()]}
    # As users call it, without the tests' own checks of types.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message) as caught:
        request(pair, **changes)
    assert "\n" not in str(caught.value)
