"""The real TPU compiler, which needs no TPU: the sampler for each kind of them.

Networks are small here; ``benchmarks/tpu_aot.py --check`` does the same with the published ones.
"""

import dataclasses
import re

import jax
import jax.export
import jax.numpy as jnp
import pytest
from helpers import GOLDEN, request_of, tiny_card, tiny_network
from test_parallel import COLLECTIVES
from tpu_aot import devices_of

import tstitch_jax as ts
from checkpoints_convert import convert
from tstitch_jax.models import build, store
from tstitch_jax.models.measure import param_shapes

pytest.importorskip("libtpu", reason="libtpu is for Linux on x86-64")


def shapes(card, mesh):
    shapes = param_shapes(build.module_of(card))
    return ts.shard(ts.make_network(card, shapes, jnp.bfloat16), mesh)


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coder") / "vae"
    convert(GOLDEN / "diffusers_tiny" / "vae", folder)
    return store.read_card(folder)


def prepare(topology, coder=None, model=1, **more):
    devices = devices_of(topology)
    mesh = ts.make_mesh(model, devices)
    pair = [shapes(tiny_card(name, width=width), mesh) for name, width in (("a", 128), ("b", 256))]
    return request_of(
        jax.random.key(0), pair, labels=[1] * (2 * len(devices)), fractions=[0.5, 0.5], steps=7,
        **(dict(autoencoder=shapes(coder, mesh)) if coder else dict(decode=False)), **more,
    )  # fmt: skip


OTHERS = ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2"]


@pytest.mark.parametrize(
    "topology", ["v5e:2x2", *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS)]
)
def test_it_compiles_without_collectives(topology, coder, standard_promotion):
    # Latents are decoded for the kind of TPU that most users have.
    request = prepare(topology, coder if topology == "v5e:2x2" else None)
    program = request.compile()
    text = program.as_text()
    assert not COLLECTIVES.search(text)
    assert "conditional(" in text
    # The plan is an argument, so that one program serves every ratio.
    assert re.search(r"s32\[7\]\S* parameter\(", text)
    memory = program.memory_analysis()
    params = jax.tree.leaves(request.inputs.denoisers)
    size = sum(v.size * v.dtype.itemsize for v in params)
    assert memory.argument_size_in_bytes < 1.5 * size + 2e6


def test_pieces_of_a_large_batch(standard_promotion, monkeypatch):
    """Networks work in pieces where a device has more rows than its fast memory holds."""
    monkeypatch.setattr("tstitch_jax.models.dit.TOKENS_BY_WIDTH", 2 * 16 * 256)
    text = prepare("v5e:2x2", solver="ddpm").compile().as_text()
    assert not COLLECTIVES.search(text)
    assert text.count(" while(") >= 2


def test_pieces_of_an_exported_sampler(standard_promotion):
    """The file that is written on a CPU brings the pieces to a TPU, and to it alone."""
    place = jax.sharding.SingleDeviceSharding(devices_of("v5e:2x2")[0])

    def loops(rows):
        network = dataclasses.replace(tiny_network(), rows=rows)
        request = request_of(jax.random.key(0), network, labels=[1, 2, 3], steps=2, decode=False)
        program = jax.export.export(jax.jit(request.function), platforms=["cpu", "tpu"])(
            request.inputs
        )
        given = jax.tree.map(
            lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place), program.in_avals
        )
        call = jax.jit(lambda *flat: program.call(*jax.tree.unflatten(program.in_tree, flat)[0]))
        lowered = call.lower(*given)
        return lowered.compile().as_text().count(" while(")

    assert loops(2) == loops(None) + 1


def test_a_model_axis(standard_promotion):
    assert COLLECTIVES.search(prepare("v5e:2x2", model=4).compile().as_text())
