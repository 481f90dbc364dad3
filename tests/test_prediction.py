"""Targets to predictions, and guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative, tiny_network
from hypothesis import given
from hypothesis import strategies as st

import tstitch_jax as ts
from tstitch_jax.prediction import TARGETS, make_target, predict


@given(
    target=st.sampled_from(TARGETS),
    angle=st.floats(0.05, 1.5),
    scale=st.floats(0.5, 2.0),
    seed=st.integers(0, 1000),
)
def test_targets_invert(target, angle, scale, seed):
    """Also off the variance-preserving circle."""
    generator = np.random.default_rng(seed)
    x0, eps = (jnp.asarray(generator.standard_normal((2, 3, 3, 1)), jnp.float32) for _ in range(2))
    alpha, sigma = jnp.float32(scale * np.cos(angle)), jnp.float32(scale * np.sin(angle))
    output = make_target(target, x0, eps, alpha, sigma)
    found = predict(target, output, alpha * x0 + sigma * eps, alpha, sigma)
    np.testing.assert_allclose(found.x0, x0, atol=2e-4)
    np.testing.assert_allclose(found.eps, eps, atol=2e-4)


def test_unknown_target():
    with pytest.raises(ValueError, match="unknown target 'epsilon'; did you mean 'eps'"):
        ts.as_denoiser(lambda *a: a[1], "epsilon")


@pytest.fixture(scope="module")
def setting():
    network = tiny_network()
    knots = ts.make_knots(network.schedule, 10)
    knot = jax.tree.map(lambda leaf: jnp.asarray(leaf[4]), knots)
    keys = ts.image_keys(jax.random.key(0), jnp.arange(3))
    return network, knot, ts.draw_noise(keys, 0, (8, 8, 4)), jnp.array([1, 5, 9])


def halves(setting):
    network, knot, x, labels = setting
    given = network.denoiser(network.params, x, knot, labels)
    nothing = network.denoiser(network.params, x, knot, jnp.full(3, 10))
    return given, nothing


def test_guidance_is_its_definition(setting):
    network, knot, x, labels = setting
    given, nothing = halves(setting)
    found = ts.cfg(network.denoiser, 3.0, 10)(network.params, x, knot, labels)
    assert relative(found.eps, nothing.eps + 3 * (given.eps - nothing.eps)) < 1e-5
    assert relative(found.variance, given.variance) < 1e-5
    assert relative(knot.alpha * found.x0 + knot.sigma * found.eps, x) < 1e-5


def test_guided_channels(setting):
    network, knot, x, labels = setting
    given, _ = halves(setting)
    everything = ts.cfg(network.denoiser, 3.0, 10)(network.params, x, knot, labels)
    some = ts.cfg(network.denoiser, 3.0, 10, channels=3)(network.params, x, knot, labels)
    assert relative(some.eps[..., :3], everything.eps[..., :3]) < 1e-6
    assert relative(some.eps[..., 3:], given.eps[..., 3:]) < 1e-5
    with pytest.raises(ValueError, match="1 to 4, got 5"):
        ts.cfg(network.denoiser, 3.0, 10, channels=5)(network.params, x, knot, labels)


def test_scale_per_step(setting):
    network, knot, x, labels = setting
    scales = jnp.arange(10, dtype=jnp.float32)  # the knot is step 4
    found = ts.cfg(network.denoiser, scales, 10)(network.params, x, knot, labels)
    expected = ts.cfg(network.denoiser, 4.0, 10)(network.params, x, knot, labels)
    assert relative(found.eps, expected.eps) < 1e-5
    with pytest.raises(ValueError, match=r"shape \(10,\), got \(9,\)"):
        ts.cfg(network.denoiser, scales[:9], 10)(network.params, x, knot, labels)


def test_guidance_and_stitching_in_either_order(setting):
    network, knot, x, labels = setting
    other = tiny_network(1)
    plan = ts.Plan.from_list([0, 1] * 5, 2)
    pair, params = [network.denoiser, other.denoiser], (network.params, other.params)
    outside = ts.cfg(ts.stitch(pair, plan), 2.0, 10)
    inside = ts.stitch([ts.cfg(d, 2.0, 10) for d in pair], plan)
    a, b = (d(params, x, knot, labels) for d in (outside, inside))
    assert relative(a.x0, b.x0) < 1e-6
    with pytest.raises(ValueError, match="the plan has 4 steps, the knots have 10"):
        ts.stitch(pair, ts.Plan.from_counts([2, 2]))(params, x, knot, labels)
    with pytest.raises(ValueError, match="2 networks, got 1 denoisers"):
        ts.stitch(pair[:1], plan)
    with pytest.raises(ValueError, match="2 networks stitched, got 1"):
        outside(params[:1], x, knot, labels)


def test_variance_can_be_left_out(setting):
    network, knot, x, labels = setting
    assert ts.without_variance(network.denoiser)(network.params, x, knot, labels).variance is None
    plain = tiny_network(learned_variance=False)
    with pytest.raises(ValueError, match="needs a network that learned its variance"):
        ts.run(
            plain.denoiser,
            ts.ddpm("learned"),
            ts.make_knots(plain.schedule, 3),
            x,
            params=plain.params,
            cond=labels,
            keys=ts.image_keys(jax.random.key(0), jnp.arange(3)),
        )
    # A pair of which one has none samples with the fixed variance.
    images = ts.sample(
        jax.random.key(0), [network, plain], labels=[1], fractions=[0.5, 0.5], steps=4,
        solver="ddpm", decode=False,
    )  # fmt: skip
    assert np.isfinite(images).all()
