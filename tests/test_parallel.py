"""Many devices: the same images on any mesh, and nothing that makes a device wait for another."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN, relative, request_of, tiny_network
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import tstitch_jax as ts
from checkpoints_convert import convert
from tstitch_jax.models import autoencoder as autoencoder_module
from tstitch_jax.models.devices import mesh_of

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from tpu_aot import COLLECTIVES

KEY = jax.random.key(3)
LABELS = [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.fixture(scope="module")
def pair():
    return [tiny_network(0), tiny_network(1, width=64, name="wide")]


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coder") / "vae"
    convert(GOLDEN / "diffusers_tiny" / "vae", folder)
    return ts.load(folder)


def sample(networks, labels=LABELS, **more):
    more = dict(fractions=[0.4, 0.6], steps=5, solver="ddpm") | more
    return ts.sample(KEY, networks, labels=labels, **more)


@pytest.fixture(scope="module")
def expected(pair, coder):
    return np.asarray(sample(pair, autoencoder=coder))


def on(mesh, *networks):
    return [ts.shard(network, mesh) for network in networks]


@pytest.mark.parametrize("model", [1, 2, 4])
def test_same_images_on_any_mesh(pair, coder, expected, model):
    *networks, there = on(ts.make_mesh(model), *pair, coder)
    found = sample(networks, autoencoder=there)
    assert len(found.sharding.device_set) == 8
    assert relative(found, expected) < 1e-5
    kernel = networks[1].params["block_0"]["mlp_in"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (64, 256 // model)
    kernel = networks[1].params["block_0"]["mlp_out"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (256 // model, 64)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_batches_that_do_not_divide(pair, expected, coder, count):
    *networks, there = on(ts.make_mesh(devices=jax.devices()[:4]), *pair, coder)
    found = sample(networks, LABELS[:count], autoencoder=there)
    assert found.shape[0] == count
    assert relative(found, expected[:count]) < 1e-5


def test_steps_of_a_batch_that_does_not_divide(pair):
    networks = on(ts.make_mesh(devices=jax.devices()[:4]), *pair)
    final, trajectory = sample(networks, LABELS[:3], decode=False, return_trajectory=True)
    assert trajectory.shape == (5, 3, 8, 8, 4)
    np.testing.assert_array_equal(trajectory[-1], final)
    seen = []
    sample(networks, LABELS[:3], decode=False, callback=lambda step: seen.append(step.x))
    assert relative(seen[-1], final) < 1e-5


def test_noise_and_start_are_spread(pair, coder):
    *networks, there = on(ts.make_mesh(devices=jax.devices()[:2]), *pair, coder)
    noise = jax.random.normal(jax.random.key(1), (3, 8, 8, 4))
    start = jax.random.uniform(jax.random.key(2), (3, 16, 16, 3), minval=-1)
    given = dict(noise=noise, start=start, strength=0.6, labels=[0, 1, 2])
    one, many = sample(pair, autoencoder=coder, **given), sample(
        networks, autoencoder=there, **given
    )  # fmt: skip
    assert relative(many, one) < 1e-5


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp"])
def test_no_collective_where_images_are_spread(pair, coder, solver, monkeypatch):
    """Also where the decoder works in pieces of the batch."""
    monkeypatch.setattr(autoencoder_module, "CHUNK_PIXELS", 16 * 16)
    *networks, there = on(ts.make_mesh(), *pair, coder)
    request = request_of(
        KEY, networks, labels=LABELS * 2, fractions=[0.4, 0.6], steps=5, solver=solver,
        cfg_rescale=0.5, cfg_interval=(0.1, 5.0), autoencoder=there,
    )  # fmt: skip
    text = request.compile().as_text()
    assert "while" in text
    assert not COLLECTIVES.search(text)


def test_collectives_of_a_split_network_are_found(pair):
    """The pattern does find what a split network needs."""
    split = on(ts.make_mesh(4), *pair)
    request = request_of(KEY, split, labels=[1, 2], fractions=[0.4, 0.6], steps=5, decode=False)
    assert COLLECTIVES.search(request.compile().as_text())


def pieces(pair):
    """The sampler as a research script writes it, from indices and labels."""
    schedule = pair[1].schedule
    knots = ts.make_knots(schedule, 5)
    plan = ts.Plan.from_fractions([0.4, 0.6], knots, schedule)
    both = ts.stitch([ts.cfg(n.denoiser, 1.5, 3) for n in pair], plan)

    def draw(denoiser, indices, labels):
        keys = ts.image_keys(KEY, indices)
        x = ts.draw_noise(keys, 0, (8, 8, 4))
        cond = ts.Condition(labels, jnp.full_like(labels, 10))
        return ts.run(denoiser, ts.ddpm(), knots, x, cond=cond, keys=keys)

    return draw, both


def test_pieces_under_pmap_shard_map_and_jit(pair):
    draw, denoiser = pieces(pair)
    indices, labels = jnp.arange(8, dtype=jnp.int32), jnp.asarray(LABELS, jnp.int32)
    expected = jax.jit(draw)(denoiser, indices, labels)
    assert relative(expected, sample(pair, decode=False)) < 1e-5

    mapped = jax.pmap(draw, in_axes=(None, 0, 0))(
        denoiser, indices.reshape(8, 1), labels.reshape(8, 1)
    )
    assert relative(mapped[:, 0], expected) < 1e-5

    mesh = ts.make_mesh()
    spread, everywhere = PartitionSpec("data"), PartitionSpec()
    mapped = jax.jit(
        jax.shard_map(draw, mesh=mesh, in_specs=(everywhere, spread, spread), out_specs=spread)
    )(denoiser, indices, labels)
    assert relative(mapped, expected) < 1e-5

    def place(spec):
        return NamedSharding(mesh, spec)

    spread = jax.jit(draw, in_shardings=(place(everywhere), place(spread), place(spread)))
    assert relative(spread(denoiser, indices, labels), expected) < 1e-5


def test_one_program_serves_every_plan_on_a_mesh(pair):
    networks = on(ts.make_mesh(devices=jax.devices()[:2]), *pair)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    for fraction in (0.0, 0.3, 1.0):
        sample(networks, [1, 2], fractions=[fraction, 1 - fraction], decode=False, steps=4)
        if not fraction:
            assert compiled
            compiled.clear()
    assert not compiled


def test_a_network_is_loaded_onto_a_mesh(standard_promotion):
    mesh = ts.make_mesh(model=2)
    for dtype in (jnp.float32, jnp.bfloat16):
        one, many = ts.load("fashion-s", dtype), ts.load("fashion-s", dtype, mesh=mesh)
        assert many.card == one.card
        for a, b in zip(*map(jax.tree.leaves, (one.params, many.params)), strict=True):
            assert a.dtype == b.dtype
            assert len(b.sharding.device_set) == 8
            np.testing.assert_array_equal(a, b)


def test_meshes_as_users_make_them(pair, expected, coder):
    devices = np.array(jax.devices())
    for mesh in (
        Mesh(devices, ("data",)),
        Mesh(devices.reshape(2, 4), ("model", "data")),
        jax.make_mesh((4, 2), ("data", "model"), (jax.sharding.AxisType.Explicit,) * 2),
    ):
        *networks, there = on(mesh, *pair, coder)
        found = sample(networks, autoencoder=there)
        assert relative(found, expected) < 1e-5
        assert mesh_of(*networks).shape["data"] == mesh.shape["data"]


def test_bad_input(pair):
    for wrong in (0, 3, 16):
        with pytest.raises(ValueError, match=r"divides the number of devices, 8, got"):
            ts.make_mesh(wrong)
    with pytest.raises(ValueError, match=r'needs an axis "data", .*, got \(.batch.,\)'):
        ts.shard(pair[0], Mesh(np.array(jax.devices()), ("batch",)))
    there = ts.shard(pair[0], ts.make_mesh())
    with pytest.raises(ValueError, match=r"tiny and wide lie on different devices; ts\.shard"):
        sample([there, pair[1]], decode=False)
