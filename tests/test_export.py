"""A sampler as a file: JAX alone draws from it what the library draws."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN, tiny_network

import tstitch_jax as ts
from checkpoints_convert import convert

KEY = jax.random.key(7)
OPTIONS = dict(steps=4, solver="ddpm", cfg_scale=[1.5, None])
HALVES = dict(plan=[0.5, 0.5], steps=4, solver="ddpm", guidance=[1.5, None])
"""The same as options of a sampler."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "vae"
    convert(GOLDEN / "diffusers_tiny" / "vae", folder)
    return [tiny_network(0), tiny_network(1, width=64)], ts.load(folder)


LOAD = """
import sys
import jax, jax.export
import numpy as np
file = np.load(sys.argv[1])
draw = jax.export.deserialize(bytearray(file["program"])).call
weights = [file[name] for name in file.files if name.startswith("weight_")]
arguments = {name: file[name] for name in ("seed", "labels", "plan", "scales")}
np.save(sys.argv[2], draw(weights, *arguments.values()))
arguments["plan"] = np.array([0, 1, 0, 1], np.int32)
arguments["seed"], arguments["scales"] = np.uint32(8), np.array([3], np.float32)
np.save(sys.argv[3], draw(weights, *arguments.values()))
assert not {"tstitch_jax", "flax", "orbax"} & set(sys.modules)
"""


def test_jax_alone_samples_the_same(parts, tmp_path):
    networks, coder = parts
    file = tmp_path / "sampler.npz"
    ts.export(file, ts.Sampler(networks, autoencoder=coder, **HALVES), labels=[1, 2], seed=7)
    outputs = [tmp_path / "a.npy", tmp_path / "b.npy"]
    subprocess.run([sys.executable, "-c", LOAD, file, *outputs], check=True)
    for output, key, more in (
        (outputs[0], KEY, dict(fractions=[0.5, 0.5])),
        (outputs[1], jax.random.key(8), dict(plan=ts.Plan.from_list([0, 1, 0, 1], 2),
                                             cfg_scale=[3.0, None])),
    ):  # fmt: skip
        images = ts.sample(key, networks, labels=[1, 2], autoencoder=coder, **(OPTIONS | more))
        np.testing.assert_allclose(np.load(output), images, atol=1e-5)
    about = json.loads(str(np.load(file)["about"]))
    assert about["platforms"] == ["cpu", "cuda", "tpu"]
    assert about["checksums"] == [network.card.checksum for network in networks]


def test_pieces_are_for_tpus_alone(parts, tmp_path):
    file = tmp_path / "sampler.npz"

    def export(rows, *platforms):
        networks = [dataclasses.replace(network, rows=rows) for network in parts[0]]
        sampler = ts.Sampler(networks, **HALVES)
        ts.export(file, sampler, labels=[1, 2, 3, 4, 5], decode=False, platforms=platforms)
        stored = np.load(file)
        program = jax.export.deserialize(bytearray(stored["program"]))
        return program, stored, program.mlir_module().count("stablehlo.while")

    for platforms, pieces in ((["cpu"], 0), (["tpu"], 2), (["cpu", "cuda", "tpu"], 2)):
        assert export(2, *platforms)[2] == export(None, *platforms)[2] + pieces
    every, stored, _ = export(2, "cpu", "cuda", "tpu")
    plain, *_ = export(None, "cpu")
    weights = [stored[name] for name in stored.files if name.startswith("weight_")]
    arguments = weights, *(stored[name] for name in ("seed", "labels", "plan", "scales"))
    compiled = [jax.jit(each.call).lower(*arguments).compile() for each in (plain, every)]
    assert len({each.as_text().count(" while(") for each in compiled}) == 1
    np.testing.assert_array_equal(*(each(*arguments) for each in compiled))


def test_bfloat16_and_no_guidance(tmp_path, standard_promotion):
    network = ts.load("fashion-s", jnp.bfloat16)
    file = tmp_path / "sampler.npz"
    sampler = ts.Sampler(network, steps=2, guidance=None)
    ts.export(file, sampler, labels=[3], platforms=["cuda"])
    stored = np.load(file)
    assert stored["scales"].shape == (0,)
    program = jax.export.deserialize(bytearray(stored["program"]))
    assert program.platforms == ("cuda",)
    assert "bf16" in program.mlir_module()
    assert Path(file).stat().st_size < sum(4 * v.size for v in jax.tree.leaves(network.params))
    ts.export(file, sampler, labels=[3], platforms=["cpu"])
    stored = np.load(file)
    weights = [stored[name] for name in stored.files if name.startswith("weight_")]
    draw = jax.export.deserialize(bytearray(stored["program"])).call
    found = draw(weights, *(stored[name] for name in ("seed", "labels", "plan", "scales")))
    expected = sampler(jax.random.key(0), labels=[3]).images
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bad_input(parts, tmp_path):
    networks, coder = parts
    file = tmp_path / "sampler.npz"
    sampler = ts.Sampler(networks, plan=[0.5, 0.5], steps=2)

    def export(sampler=sampler, **more):
        ts.export(file, sampler, **(dict(labels=[1]) | more))

    with pytest.raises(ValueError, match=r"some of cpu, cuda, rocm, tpu, got \['metal'\]"):
        export(platforms=["cpu", "metal"])
    with pytest.raises(ValueError, match="makes latents"):
        export()
    with pytest.raises(ValueError, match="labels must be 0 to 9, got 10"):
        export(sampler.replace(autoencoder=coder), labels=[10])
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=f"seed must be .* 0 to 4294967295, got {seed}"):
            export(seed=seed, decode=False)
    with pytest.raises(ValueError, match="the same labels, or the same contexts, for all networks"):
        export(labels=[[1], [2]], decode=False)
    there = [ts.shard(network, ts.make_mesh()) for network in networks]
    with pytest.raises(ValueError, match="not on a mesh"):
        export(sampler.replace(networks=there), decode=False)
    with pytest.raises(ValueError, match=r"cannot write /proc/sampler\.npz"):
        ts.export("/proc/sampler.npz", sampler, labels=[1], decode=False)
    assert not file.exists()
