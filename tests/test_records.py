"""Denoisers, solvers and plans are pytrees: they pass through every transformation of JAX."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Labelled, closed_network, relative, tiny_network
from jax.sharding import PartitionSpec

import tstitch_jax as ts
from tstitch_jax.core.denoisers import prepare

SHAPE = (8, 8, 4)
KNOTS = ts.make_knots(ts.make_schedule("linear"), 4)
LABELS = jnp.array([3, 7])
COND = ts.Condition(LABELS, jnp.full_like(LABELS, 10))
KEYS = ts.image_keys(jax.random.key(0), jnp.arange(2))
X = ts.draw_noise(KEYS, 0, SHAPE)


@functools.cache
def networks():
    return tiny_network(0), tiny_network(1, name="other")


def nested(scale=2.0, weak_scale=1.5, switch=2, seeds=networks):
    """Stitched networks, guided, one of them also as the weak one of autoguidance."""
    small, large = (network.denoiser for network in seeds())
    guided = ts.autoguide(ts.cfg(large, scale), small, weak_scale)
    plan = ts.Plan.from_switches([switch], 4)
    return ts.stitch([ts.cfg(small, scale, channels=3, rescale=0.5), guided], plan)


def sample(denoiser, x=X, cond=COND, keys=KEYS, solver=None):
    return ts.run(denoiser, solver or ts.ddpm("small"), KNOTS, x, cond=cond, keys=keys)


def test_one_executable_for_numbers_plans_and_networks():
    traces = []

    @jax.jit
    def run(denoiser):
        traces.append(1)
        return sample(denoiser)

    first = run(nested())
    others = [
        nested(7), nested(7.5), nested(np.float32(7)), nested(jnp.float32(3), 1), nested(switch=1),
        nested(switch=4), nested(seeds=lambda: (tiny_network(2), tiny_network(3))),
    ]  # fmt: skip
    for other in others:
        assert relative(run(other), first) > 1e-4
    assert len(traces) == 1
    # A scale per step is another form, and so another executable.
    run(nested(np.array([1, 2, 3, 1])))
    assert len(traces) == 2
    text = run.lower(nested()).compile().as_text()
    assert "conditional" in text


def test_solvers_with_a_traced_number_share_an_executable():
    denoiser = Labelled(jnp.float32(0.7))
    traces = []

    @jax.jit
    def run(solver):
        traces.append(1)
        return sample(denoiser, solver=solver)

    results = [run(ts.ddim(eta)) for eta in (0.2, 0.5, np.float32(1))]
    assert len(traces) == 1
    assert relative(results[0], results[2]) > 1e-3


def test_structure():
    denoiser = nested()
    leaves, tree = jax.tree.flatten(denoiser)
    assert all(isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves)
    again = jax.tree.unflatten(tree, leaves)
    assert jax.tree.structure(again) == tree
    assert hash(tree) == hash(jax.tree.structure(nested(5, 6, 1)))
    # Anything may stand in a leaf's place.
    shapes = jax.tree.map(np.shape, denoiser)
    assert shapes.plan.networks == (4,)
    placed = jax.device_put(denoiser, jax.devices()[1])
    assert {d for leaf in jax.tree.leaves(placed) for d in leaf.devices()} == {jax.devices()[1]}
    assert "parameters" in repr(denoiser)
    assert len(repr(denoiser)) < 3000


def test_gradients_by_parameters():
    denoiser = networks()[0].denoiser

    def loss(params):
        return jnp.square(sample(dataclasses.replace(denoiser, params=params))).mean()

    slopes = jax.tree.leaves(jax.jit(jax.grad(loss))(denoiser.params))
    assert all(np.isfinite(slope).all() for slope in slopes)
    assert any(np.abs(slope).max() > 0 for slope in slopes)


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
def test_each_device_samples_its_own_images(how):
    denoiser, expected = nested(), jax.jit(sample)(nested())
    if how == "pmap":
        split = jax.tree.map(lambda v: v[:, None], (X, COND, KEYS))
        found = jax.pmap(sample, in_axes=(None, 0, 0, 0), devices=jax.devices()[:2])(
            denoiser, *split
        )
        found = found.reshape(X.shape)
    else:
        mesh = ts.make_mesh(devices=jax.devices()[:2])
        own, everything = PartitionSpec("data"), PartitionSpec()
        mapped = jax.shard_map(
            sample, mesh=mesh, in_specs=(everything, own, own, own), out_specs=own, check_vma=False
        )
        found = jax.jit(mapped)(denoiser, X, COND, KEYS)
    assert relative(found, expected) < 1e-5


def test_an_exported_function_takes_a_flat_list():
    leaves, tree = jax.tree.flatten(nested())

    def flat(leaves):
        return sample(jax.tree.unflatten(tree, leaves))

    program = jax.export.export(jax.jit(flat), platforms=["cpu"])(leaves)
    loaded = jax.export.deserialize(bytearray(program.serialize()))
    assert relative(loaded.call(leaves), jax.jit(sample)(nested())) < 1e-5


def test_vmap_of_a_plan_is_refused():
    def of(plan):
        return sample(ts.stitch([Labelled(0.7), Labelled(0.4)], plan))

    plans = ts.Plan(np.zeros((3, 4), np.int32), 2)
    with pytest.raises(ValueError, match="cannot be mapped by vmap"):
        jax.vmap(of)(plans)


def test_iterate_takes_plain_functions_and_records():
    def zeros(x, knot, cond):
        return ts.Prediction(jnp.zeros_like(x), x / knot.sigma)

    for denoiser in (zeros, nested()):
        *_, last = ts.iterate(denoiser, ts.ddim(), KNOTS, X, cond=COND)
        expected = ts.run(denoiser, ts.ddim(), KNOTS, X, cond=COND)
        np.testing.assert_allclose(last.x, expected, atol=1e-5)


@ts.record
class Doubles:
    """A denoiser that prepares what it would compute in every step, for one platform."""

    factor: float
    twice: jax.Array | None = None

    def __call__(self, x, knot, cond):
        shift = cond.given if self.twice is not None else 2 * cond.given
        scale = 2 * self.factor if self.twice is None else self.twice
        x0 = jnp.full_like(x, scale) + shift[:, None, None, None]
        return ts.Prediction(x0, (x - knot.alpha * x0) / knot.sigma)

    def prepare(self, shape, cond, platform):
        if platform != "cpu" or self.twice is not None:
            return self, cond
        doubled = jax.tree.map(lambda v: 2 * v, cond)
        return dataclasses.replace(self, twice=jnp.float32(2 * self.factor)), doubled


def test_preparing_passes_through_every_combinator():
    labels = jnp.array([0.1, 0.2])
    shared = ts.Condition((labels, labels), (jnp.zeros(2), jnp.zeros(2)))
    plan = ts.Plan.from_switches([2], 4)

    def make(a, b, part=None):
        pair = [a, b] if part is None else [ts.with_cond(a, 0), ts.with_cond(b, part)]
        return ts.cfg(ts.by_rows(ts.without_variance(ts.stitch(pair, plan)), 100), 2.0)

    a, b = Doubles(0.1), ts.at_equal_snr(Doubles(0.2), KNOTS)
    guided, plain = ts.autoguide(b, a, 1.5), ts.without_variance(Labelled(0.3))
    for denoiser, cond in (
        (make(a, b), ts.Condition(labels, jnp.zeros(2))),
        (make(a, guided), ts.Condition(labels, jnp.zeros(2))),
        (make(a, b, part=1), shared),
        (make(plain, b, part=1), ts.Condition((LABELS, labels), (LABELS, 0 * labels))),
    ):
        new, conditions = prepare(denoiser, (2, *SHAPE), cond, "cpu")
        assert len(jax.tree.leaves(new)) > len(jax.tree.leaves(denoiser))
        knot = jax.tree.map(lambda v: jnp.asarray(v[1]), KNOTS)
        found, expected = new(X, knot, conditions), denoiser(X, knot, cond)
        assert relative(found.x0, expected.x0) < 1e-5
        # Where the platform is unknown nothing changes.
        same, kept = prepare(denoiser, (2, *SHAPE), cond, None)
        assert jax.tree.structure((same, kept)) == jax.tree.structure((denoiser, cond))
        runs = [ts.run(denoiser, ts.ddim(), KNOTS, X, cond=cond, platform=p) for p in ("cpu", None)]
        assert relative(*runs) < 1e-5


def test_guidance_without_a_null_half_is_refused():
    with pytest.raises(ValueError, match="needs the null half of the condition"):
        sample(ts.cfg(Labelled(0.7), 2.0), cond=LABELS)


def test_a_closed_form_is_sampled_like_a_network():
    pair = [closed_network(0.7), closed_network(0.4, name="other")]
    images = ts.sample(
        jax.random.key(0), pair, labels=[3, 7], fractions=[0.5, 0.5], steps=4, decode=False,
        cfg_scale=2.0,
    )  # fmt: skip
    plan = ts.Plan.from_fractions([0.5, 0.5], KNOTS, pair[1].schedule)
    stages = [ts.cfg(network.denoiser, 2.0, channels=3) for network in pair]
    expected = ts.run(ts.stitch(stages, plan), ts.ddim(), KNOTS, X, cond=COND)
    assert relative(images, expected) < 1e-5


@ts.record
class Counts:
    """A denoiser whose preparation is not idempotent."""

    times: jax.Array

    def __call__(self, x, knot, cond):
        x0 = jnp.full_like(x, self.times)
        return ts.Prediction(x0, (x - knot.alpha * x0) / knot.sigma)

    def prepare(self, shape, cond, platform):
        return Counts(self.times + 1), cond


def test_every_way_prepares_once():
    networks = [
        dataclasses.replace(closed_network(0.7, name=name), denoiser=Counts(jnp.float32(0)))
        for name in "ab"
    ]
    expected = ts.run(networks[0].denoiser, ts.ddim(), KNOTS, X, cond=LABELS)
    np.testing.assert_allclose(expected, 1, atol=1e-5)
    sampler = ts.Sampler(
        networks, plan=[0.5, 0.5], steps=4, guidance=ts.Guidance(None, weak_scale=2.0)
    )
    for callback in (None, lambda step: None):
        samples = sampler(jax.random.key(0), labels=[3, 7], decode=False, callback=callback)
        np.testing.assert_allclose(samples.latents, 1, atol=1e-5)
