"""Foreign checkpoints to networks: every layout, by value where small and by shape where large."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import GOLDEN, PUBLISHED_HEADS, published_network, relative
from safetensors.numpy import load_file, save_file

import tstitch_jax as ts
from checkpoints_convert import CheckpointError, conversion, convert, readers, rules
from checkpoints_convert.rules import Tensor
from tstitch_jax.models.build import flatten, module_of
from tstitch_jax.models.measure import SIZES, param_shapes

DIFFUSERS = GOLDEN / "diffusers_tiny"
PUBLISHED = GOLDEN / "tstitch_tiny"
LIMIT = 2e-5
with np.load(DIFFUSERS / "expected.npz") as npz:
    EXPECTED = dict(npz)
NAMES = json.loads((DIFFUSERS / "names.json").read_text())


def state_of(name: str) -> dict[str, np.ndarray]:
    """The tensors of one of the published program's tiny networks."""
    tensors = readers.read(PUBLISHED / f"{name}.pt").tensors
    return {key: np.array(tensor.read()) for key, tensor in tensors.items()}


def layer_outputs(module, params, *inputs, method=None):
    output, state = module.apply(
        {"params": params}, *inputs, method=method, capture_intermediates=True
    )
    return output, state["intermediates"]


def same_params(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


# By value


def test_diffusers_dit(tmp_path):
    card = convert(DIFFUSERS / "dit", tmp_path / "net")
    network = ts.load(tmp_path / "net")
    assert network.card == card
    assert card.name == "net"
    assert (card.target, card.learned_variance, card.num_classes) == ("eps", True, 10)
    output, layers = layer_outputs(
        module_of(card),
        network.params,
        jnp.asarray(EXPECTED["dit/x"]),
        jnp.asarray(EXPECTED["dit/times"], jnp.float32),
        jnp.asarray(EXPECTED["dit/labels"], jnp.int32),
    )
    for i in range(2):
        assert relative(layers[f"block_{i}"]["__call__"][0], EXPECTED[f"dit/block_{i}"]) < LIMIT
    assert relative(output, EXPECTED["dit/output"]) < LIMIT


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "vae"
    convert(DIFFUSERS / "vae", folder)
    return ts.load(folder)


def test_autoencoder(autoencoder):
    params, module = autoencoder.params, module_of(autoencoder.card)
    images, noise = jnp.asarray(EXPECTED["vae/images"]), jnp.asarray(EXPECTED["vae/noise"])
    scale = autoencoder.card.scaling_factor
    assert scale == 0.5
    assert (autoencoder.factor, autoencoder.channels) == (2, 4)
    (mean, _), layers = layer_outputs(module, params, images, method="moments")
    middle = layers["encoder"]["middle"]["__call__"][0]
    assert relative(middle, EXPECTED["vae/encoder/middle"]) < LIMIT
    assert relative(mean, EXPECTED["vae/mean"]) < LIMIT
    latents = autoencoder.encode(images)
    assert relative(latents, scale * EXPECTED["vae/mean"]) < LIMIT
    sample = autoencoder.encode(images, noise)
    assert relative(sample, scale * EXPECTED["vae/sample"]) < LIMIT

    decoded, layers = layer_outputs(
        module, params, jnp.asarray(EXPECTED["vae/mean"]), method="decode"
    )
    for name in ("middle", "level_0_resnet_1"):
        found = layers["decoder"][name]["__call__"][0]
        assert relative(found, EXPECTED[f"vae/decoder/{name}"]) < LIMIT
    assert relative(decoded, EXPECTED["vae/decoded"]) < LIMIT
    decoded = autoencoder.decode(scale * jnp.asarray(EXPECTED["vae/mean"]))
    assert relative(decoded, EXPECTED["vae/decoded"]) < LIMIT


def test_large_batches_are_coded_in_chunks(autoencoder, monkeypatch):
    images = jax.random.normal(jax.random.key(0), (5, 8, 12, 3))
    noise = jax.random.normal(jax.random.key(1), (5, 4, 6, 4))
    encode, decode = autoencoder.encode, autoencoder.decode
    whole = encode(images, noise)
    image = decode(whole)
    monkeypatch.setattr("tstitch_jax.models.autoencoder.CHUNK_PIXELS", 2 * 8 * 12)
    assert "scan" in str(jax.make_jaxpr(decode)(whole))
    np.testing.assert_allclose(encode(images, noise), whole, atol=1e-5)
    np.testing.assert_allclose(decode(whole), image, atol=1e-5)


def test_odd_images_are_refused(autoencoder):
    encode, decode = autoencoder.encode, autoencoder.decode
    for images in (
        jnp.zeros((1, 8, 9, 3)),
        jnp.zeros((8, 8, 3)),
        jnp.zeros((1, 8, 8, 4)),
        jnp.zeros((1, 8, 8, 3), jnp.uint8),
    ):
        with pytest.raises(ValueError, match=r"images must be .* multiples of 2, got"):
            encode(images)
    with pytest.raises(ValueError, match=r"noise must be \(2, 4, 4, 4\) like the latents"):
        encode(jnp.zeros((2, 8, 8, 3)), jnp.zeros((1, 4, 4, 4)))
    with pytest.raises(ValueError, match=r"latents must be floats \[B, H, W, 4\], got float32"):
        decode(jnp.zeros((2, 8, 8, 3)))


def test_half_precision_keeps_near(autoencoder, tmp_path, standard_promotion):
    ts.save(tmp_path / "vae", autoencoder)
    half = ts.load(tmp_path / "vae", jnp.bfloat16)
    assert half.card.checksum == autoencoder.card.checksum
    latents = 0.5 * jnp.asarray(EXPECTED["vae/mean"])
    decoded = half.decode(latents)
    assert decoded.dtype == jnp.float32
    assert 0 < relative(decoded, EXPECTED["vae/decoded"]) < 0.05


def older_names(name):
    for new, old in {
        "to_q": "query",
        "to_k": "key",
        "to_v": "value",
        "to_out.0": "proj_attn",
    }.items():
        name = name.replace(f"attentions.0.{new}", f"attentions.0.{old}")
    return name


def compvis(state):
    """The same autoencoder as CompVis' program saves it; its projections are convolutions."""
    return {
        NAMES["vae_compvis"][name]: value[:, :, None, None]
        if "attentions" in name and value.ndim == 2
        else value
        for name, value in state.items()
    }


@pytest.mark.parametrize("layout", ["older", "compvis", "whole", "sharded"])
def test_every_layout_of_the_autoencoder_is_the_same_network(layout, autoencoder, tmp_path):
    state = load_file(DIFFUSERS / "vae" / "diffusion_pytorch_model.safetensors")
    config = json.loads((DIFFUSERS / "vae" / "config.json").read_text())
    source, scale = tmp_path / "source", 0.18215
    source.mkdir()
    if layout == "older":
        scale = 0.5
        state = {older_names(name): value for name, value in state.items()}
        save_file(state, source / "diffusion_pytorch_model.safetensors")
        (source / "config.json").write_text(json.dumps(config))
    elif layout == "sharded":
        del config["scaling_factor"]
        names = sorted(state)
        shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, part in shards.items():
            save_file({name: state[name] for name in part}, source / file)
        where = {name: file for file, part in shards.items() for name in part}
        index = source / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
        (source / "config.json").write_text(json.dumps(config))
    else:
        source, state = source / "model.safetensors", compvis(state)
        state["loss.logvar"] = np.zeros(())
        if layout == "whole":
            state = {f"first_stage_model.{name}": value for name, value in state.items()}
            state["model.diffusion_model.time_embed.0.weight"] = np.zeros((3, 3))
            state["encoder.of.something.else"] = np.zeros(1)
        save_file(state, source)
    convert(source, tmp_path / "net", family="autoencoder")
    network = ts.load(tmp_path / "net")
    same_params(network, autoencoder)
    assert network.card.scaling_factor == scale
    assert network.card.config == autoencoder.card.config


def diffusers_folder(folder: Path, name: str, **changes):
    """A published tiny network as diffusers lays it out, with one embedder for all blocks."""
    state, found = state_of(name), {}
    depth = 1 + max(int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)", key)))
    for part in ("weight", "bias"):
        found[f"pos_embed.proj.{part}"] = state[f"x_embedder.proj.{part}"]
        found[f"proj_out_1.{part}"] = state[f"final_layer.adaLN_modulation.1.{part}"]
        found[f"proj_out_2.{part}"] = state[f"final_layer.linear.{part}"]
        for i in range(depth):
            to, of = f"transformer_blocks.{i}", f"blocks.{i}"
            for linear, mlp in (("linear_1", 0), ("linear_2", 2)):
                key = f"{to}.norm1.emb.timestep_embedder.{linear}.{part}"
                found[key] = state[f"t_embedder.mlp.{mlp}.{part}"]
            found[f"{to}.norm1.linear.{part}"] = state[f"{of}.adaLN_modulation.1.{part}"]
            for x, value in zip("qkv", np.split(state[f"{of}.attn.qkv.{part}"], 3), strict=True):
                found[f"{to}.attn1.to_{x}.{part}"] = value
            found[f"{to}.attn1.to_out.0.{part}"] = state[f"{of}.attn.proj.{part}"]
            found[f"{to}.ff.net.0.proj.{part}"] = state[f"{of}.mlp.fc1.{part}"]
            found[f"{to}.ff.net.2.{part}"] = state[f"{of}.mlp.fc2.{part}"]
    for i in range(depth):
        table = f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"
        found[table] = state["y_embedder.embedding_table.weight"]
    folder.mkdir()
    found = {key: np.ascontiguousarray(value) for key, value in found.items()}
    save_file(found, folder / "diffusion_pytorch_model.safetensors")
    config = json.loads((DIFFUSERS / "dit" / "config.json").read_text())
    config |= {"num_layers": depth, "num_attention_heads": PUBLISHED_HEADS[name], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["small", "large"])
def test_either_layout_of_a_dit_is_the_same_network(name, tmp_path):
    convert(diffusers_folder(tmp_path / "source", name), tmp_path / name)
    network, published = ts.load(tmp_path / name), published_network(name)
    same_params(network, published)
    assert jax.tree.structure(network.denoiser) == jax.tree.structure(published.denoiser)
    assert network.card.checksum == published.card.checksum
    assert network.card.config == published.card.config


def test_sit(tmp_path):
    """SiT says x0 - eps at a time that runs from noise to data, and nothing of a variance."""
    convert(PUBLISHED / "small.pt", tmp_path / "sit", family="sit", num_heads=2)
    sit, dit = ts.load(tmp_path / "sit"), published_network("small")
    card = sit.card
    assert (card.target, card.schedule, card.learned_variance) == ("flow", {"name": "flow"}, False)
    x, labels = jax.random.normal(jax.random.key(0), (2, 8, 8, 4)), jnp.array([1, 10])
    knots = ts.make_knots(sit.schedule, 10)
    knot = jax.tree.map(lambda leaf: jnp.asarray(leaf[3]), knots)
    assert knot.time == knot.sigma == np.float32(0.7)
    raw = module_of(dit.card).apply({"params": dit.params}, x, jnp.full(2, 1 - knot.time), labels)
    velocity = raw[..., :4]
    prediction = sit.denoiser(x, knot, ts.Condition(labels))
    assert prediction.variance is None
    # x = (1 - s) eps + s x0 at SiT's own time s, and dx/ds = x0 - eps.
    own = 1 - knot.time
    assert relative(prediction.x0, x + (1 - own) * velocity) < LIMIT
    assert relative(prediction.eps, x - own * velocity) < LIMIT
    images = ts.sample(
        jax.random.key(0), [sit], labels=[0, 1], steps=4, decode=False, cfg_scale=1.5
    )
    assert np.isfinite(images).all()


def test_a_sit_is_sampled_as_published(tmp_path):
    """Euler's method over equal steps of SiT's own time, 0 to 1, without guidance."""
    convert(PUBLISHED / "small.pt", tmp_path / "sit", family="sit", num_heads=2)
    sit, dit = ts.load(tmp_path / "sit"), published_network("small")
    module, labels = module_of(dit.card), jnp.array([1, 2])
    noise = x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    for i in range(5):
        velocity = module.apply({"params": dit.params}, x, jnp.full(2, i / 5), labels)[..., :4]
        x = x + velocity / 5
    found = ts.sample(
        jax.random.key(0), [sit], labels=[1, 2], steps=5, cfg_scale=None, noise=noise, decode=False
    )
    assert relative(found, x) < LIMIT


def test_a_single_block_of_diffusers_is_not_guessed(tmp_path):
    shutil.copytree(DIFFUSERS / "dit", tmp_path / "source")
    file = tmp_path / "source" / "diffusion_pytorch_model.safetensors"
    state = {k: v for k, v in load_file(file).items() if not k.startswith("transformer_blocks.1.")}
    save_file(state, file)
    config = json.loads((tmp_path / "source" / "config.json").read_text()) | {"num_layers": 1}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    assert convert(tmp_path / "source", tmp_path / "net").config["variant"] == "diffusers"


def test_a_sit_without_the_useless_half(tmp_path):
    state = state_of("small")
    half = np.r_[0:4, 8:12, 16:20, 24:28]
    short = {k: v[half] if k.startswith("final_layer.linear") else v for k, v in state.items()}
    save_file(short, tmp_path / "short.safetensors")
    save_file(state, tmp_path / "long.safetensors")
    for name in ("short", "long"):
        convert(tmp_path / f"{name}.safetensors", tmp_path / name, family="sit", num_heads=2)
    same_params(ts.load(tmp_path / "short"), ts.load(tmp_path / "long"))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("prefix", ["", "module._orig_mod.", "_orig_mod.module.", "model."])
def test_other_dtypes_and_wrapped_names(dtype, prefix, tmp_path):
    state = {
        prefix + key: value.astype(np.dtype(dtype)) for key, value in state_of("small").items()
    }
    save_file(state, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "net", num_heads=2)
    expected = published_network("small").params["block_0"]["qkv"]["kernel"]
    found = ts.load(tmp_path / "net").params["block_0"]["qkv"]["kernel"]
    np.testing.assert_array_equal(found, np.asarray(expected).astype(dtype).astype(np.float32))


# Full sizes by shape


def published_shapes(width, depth, patch, side, outputs=8):
    """The tensors of a published DiT or SiT."""
    shapes = {
        "pos_embed": (1, (side // patch) ** 2, width),
        "x_embedder.proj.weight": (width, 4, patch, patch),
        "y_embedder.embedding_table.weight": (1001, width),
    }
    layers = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (patch**2 * outputs, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(depth):
        layers |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (4 * width, width),
            f"blocks.{i}.mlp.fc2": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
    shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
    biases = {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    return shapes | biases | {"x_embedder.proj.bias": (width,)}


def check_shapes(shapes, family, config=None):
    """What conversion does before it reads a value."""
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    tensors = {name: Tensor(a.shape, a.dtype, lambda a=a: a) for name, a in zeros.items()}
    layout, family = conversion._layout(Path("x.pt"), tensors, family)
    found = layout.convert(family, tensors, config or {}, None)
    expected = {k: v.shape for k, v in flatten(param_shapes(module_of(found.card))).items()}
    rules.check(found.rules, tensors, expected, found.ignored)
    return found.card


@pytest.mark.parametrize(
    ("name", "side", "family"),
    [
        *((name, 32, "dit") for name in SIZES),
        ("dit-xl-2", 64, "dit"),
        # Width and depth are read alike in all; the patch is not.
        *(
            (f"dit-s-{p}", *rest)
            for p in (2, 4, 8)
            for rest in ((32, "sit"), (64, "dit"), (64, "sit"))
        ),
    ],
)
def test_published_sizes(name, side, family):
    size = SIZES[name]
    shapes = published_shapes(size["width"], size["depth"], size["patch"], side)
    card = check_shapes(shapes, family)
    assert {k: card.config[k] for k in size} == size
    assert card.image_shape == (side, side, 4)
    assert card.num_classes == 1000
    assert card.guidance_channels == 3
    assert card.autoencoder == "sd-vae-ft-ema"
    assert card.learned_variance == (family == "dit")


def test_full_size_networks_of_diffusers():
    config = {"sample_size": 32, "num_attention_heads": 16}
    card = check_shapes(NAMES["dit_xl_2_256"], None, config)
    assert {k: card.config[k] for k in SIZES["dit-xl-2"]} == SIZES["dit-xl-2"]
    assert card.image_shape == (32, 32, 4)
    ours = {"widths": [128, 256, 512, 512], "layers": 2, "latent_channels": 4, "groups": 32}
    card = check_shapes(NAMES["sd_vae"], None)
    assert card.config == ours
    assert card.scaling_factor == 0.18215
    shapes = {older_names(name): shape for name, shape in NAMES["sd_vae"].items()}
    assert check_shapes(shapes, "autoencoder").config == ours
    for prefix in ("", "first_stage_model."):
        shapes = {
            prefix + NAMES["sd_vae_compvis"][name]: [*shape, 1, 1]
            if "attentions" in name and len(shape) == 2
            else shape
            for name, shape in NAMES["sd_vae"].items()
        }
        assert check_shapes(shapes, "autoencoder").config == ours


# What is written


def test_card(tmp_path):
    source = PUBLISHED / "large.pt"
    card = convert(source, tmp_path / "a" / "net", num_heads=4, license="MIT", data="noise")
    assert card.source == "large.pt"
    assert card.source_checksum == hashlib.sha256(source.read_bytes()).hexdigest()
    assert (card.license, card.data, card.name) == ("MIT", "noise", "net")
    assert card.guidance_channels == 3
    assert sorted(os.listdir(tmp_path / "a" / "net")) == ["card.json", "params"]
    assert ts.load(tmp_path / "a" / "net").card == card

    folder = DIFFUSERS / "vae"
    card = convert(folder, tmp_path / "vae")
    lines = "".join(
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("config.json", "diffusion_pytorch_model.safetensors")
    )
    assert card.source_checksum == hashlib.sha256(lines.encode()).hexdigest()


def test_an_existing_network_is_replaced_only_by_force(tmp_path):
    out = tmp_path / "net"
    convert(PUBLISHED / "small.pt", out, num_heads=2)
    with pytest.raises(CheckpointError, match="net exists; --force replaces it"):
        convert(PUBLISHED / "base.pt", out, num_heads=3)
    assert ts.load(out).card.source == "small.pt"
    convert(PUBLISHED / "base.pt", out, num_heads=3, force=True)
    assert ts.load(out).card.source == "base.pt"
    with pytest.raises(CheckpointError):
        convert(DIFFUSERS / "names.json", out, force=True)
    assert ts.load(out).card.source == "base.pt"
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x").touch()
    with pytest.raises(ValueError, match="is not a network folder"):
        convert(PUBLISHED / "base.pt", tmp_path / "precious", num_heads=3, force=True)
    assert os.listdir(tmp_path / "precious") == ["x"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(OSError, match=r"cannot write 0 MB in .*: No space left on device"):
            convert(PUBLISHED / "small.pt", tmp_path / "net", num_heads=2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", full)
    with pytest.raises(OSError, match=r"cannot write the network: .*No space"):
        convert(PUBLISHED / "small.pt", tmp_path / "net", num_heads=2)
    assert os.listdir(tmp_path) == []


def convert_in_a_process(code: str, out: Path) -> tuple[int, list[str]]:
    """Exit status and lines of ``tstitch convert``, after some code in its process."""
    code = f"import os, sys; from tstitch_jax import cli; {code}; sys.exit(cli.main(sys.argv[1:]))"
    arguments = ["convert", str(PUBLISHED / "large.pt"), str(out), "--num-heads", "4"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    return done.returncode, done.stderr.splitlines()


def test_a_write_that_really_fails_leaves_no_network(tmp_path):
    """The process may write files of at most 300 kB."""
    status, lines = convert_in_a_process(
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000,) * 2)",
        tmp_path / "net",
    )
    assert status == 2, lines
    # Threads of Orbax print tracebacks, too.
    said = [line for line in lines if "tstitch: error: cannot write the network: " in line]
    assert len(said) == 1, lines
    assert not (tmp_path / "net").exists()
    convert(PUBLISHED / "small.pt", tmp_path / "net", num_heads=2)
    assert os.listdir(tmp_path) == ["net"]


def test_ctrl_c_while_writing_leaves_no_network(tmp_path):
    status, lines = convert_in_a_process(
        "import signal, orbax.checkpoint as ocp; save = ocp.Checkpointer.save; "
        # Whoever runs the tests in the background may have it ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "ocp.Checkpointer.save = lambda *a: (os.kill(os.getpid(), signal.SIGINT), save(*a))",
        tmp_path / "net",
    )
    assert status == 130, lines
    assert lines == ["tstitch: stopped"]
    assert not (tmp_path / "net").exists()


def test_out_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    for _ in range(2):
        convert(PUBLISHED / "small.pt", tmp_path / "link", num_heads=2, force=True)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "real" / "card.json").exists()
        assert ts.load(tmp_path / "link").card.name == "link"


# Bad input


def published_file(edit, tmp_path, name="x.safetensors"):
    state = state_of("small")
    edit(state)
    save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, tmp_path / name)
    return tmp_path / name


def drop(*names):
    return lambda state: [state.pop(name) for name in names]


def change(**changes):
    def edit(state):
        for name, function in changes.items():
            name = name.replace("__", ".")
            state[name] = function(state[name])

    return edit


def poke(value):
    def edit(array):
        array = array.copy()
        array.flat[3] = value
        return array

    return edit


@pytest.mark.parametrize(
    ("edit", "options", "message"),
    [
        (drop(), dict(num_heads=None), "width 32 with depth 2 is none of the published sizes; "
         "give --num-heads N"),
        (drop(), dict(num_heads=5), "5 heads do not divide the width of 32"),
        (drop(), dict(family="autoencoder"), "the tensors are those of the published DiT and SiT "
         r"\(--family dit or sit\), not of autoencoder"),
        (drop(), dict(family="dot"), "unknown family 'dot'; did you mean 'dit'"),
        (drop("blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias", "t_embedder.mlp.0.bias"), {},
         r"missing: t_embedder\.mlp\.0\.bias; blocks\.\*\.attn\.qkv\.bias with \* = 0-1$"),
        (drop("x_embedder.proj.weight"), {}, "missing: x_embedder.proj.weight, from which"),
        (drop("pos_embed"), {}, "missing: pos_embed, from which the network's size is read"),
        (lambda s: s.update({"blocks.1.extra": s["pos_embed"], "y": s["pos_embed"]}), {},
         r"not expected: blocks\.1\.extra; y$"),
        (change(blocks__0__mlp__fc2__weight=lambda a: a[:, 1:]), {},
         r"wrong shape: blocks\.0\.mlp\.fc2\.weight \(32, 127\) for block_0/mlp_out/kernel "
         r"\(128, 32\)"),
        (change(blocks__0__mlp__fc2__bias=lambda a: a.astype(np.int32)), {},
         "not of floats: blocks.0.mlp.fc2.bias"),
        (change(blocks__0__mlp__fc2__bias=poke(np.nan), final_layer__linear__bias=poke(np.inf)), {},
         r"NaN or infinite values in: blocks\.0\.mlp\.fc2\.bias; final_layer\.linear\.bias; "),
        (change(blocks__0__mlp__fc2__bias=lambda a: a.astype(np.float64) + 1e300), {},
         "NaN or infinite values in: blocks.0.mlp.fc2.bias"),
        (
            change(y_embedder__embedding_table__weight=lambda a: a[:1]),
            {},
            "num_classes must be at least 1, got 0",
        ),
        (change(pos_embed=poke(5)), {}, "pos_embed is not the fixed code"),
        (change(pos_embed=lambda a: a[:, :15]), {}, "pos_embed has 15 places, which is no square"),
        (change(pos_embed=lambda a: a[0]), {}, r"pos_embed is \(16, 32\), expected 3 sizes"),
        (change(final_layer__linear__weight=lambda a: a[:12]), {},
         "the last layer has 12 outputs; 2x2 patches of 4 channels need 16 or 32"),
        (lambda s: s.update({"blocks.77.attn.qkv.bias": s["pos_embed"]}), {},
         "there are 77 layers by name"),
        (lambda s: (s.clear(), s.update(a=np.zeros(1))), {}, "no known network has tensors such"),
        (lambda s: s.clear(), {}, "holds no tensors"),
    ],
)  # fmt: skip
def test_bad_networks(edit, options, message, tmp_path):
    source = published_file(edit, tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        convert(source, tmp_path / "net", **{"num_heads": 2, **options})
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("name", ["config.json says 2 heads, not 4", "has one attention head"])
def test_a_number_of_heads_that_cannot_be(name, tmp_path):
    with pytest.raises(CheckpointError, match=name):
        convert(DIFFUSERS / ("dit" if "says" in name else "vae"), tmp_path / "net", num_heads=4)


@pytest.mark.parametrize("name", ["SiT-S-2-256.pt.safetensors", "my_sit.safetensors"])
def test_a_name_that_says_sit_asks(name, tmp_path):
    source = published_file(drop(), tmp_path, name)
    with pytest.raises(CheckpointError, match="give --family sit or --family dit"):
        convert(source, tmp_path / "net", num_heads=2)
    convert(source, tmp_path / "net", num_heads=2, family="sit")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(norm_type="layer_norm"), "norm_type is 'layer_norm', expected 'ada_norm_zero'"),
        (dict(num_layers=28), "num_layers is 28, expected 2"),
        (dict(sample_size=7), "sample_size is 7, expected a multiple of 2"),
        (dict(sample_size="8"), "sample_size is '8'"),
        (dict(num_attention_heads=5), "5 heads do not divide"),
        (dict(num_attention_heads="2"), "num_attention_heads is '2', expected a whole number"),
        (dict(num_attention_heads=2.0), "num_attention_heads is 2.0, expected a whole number"),
        (dict(sample_size=40000), "sample_size is 40000, expected a whole number up to 4096"),
        (
            dict(_class_name="PixArt", in_channels=9),
            "_class_name is 'PixArt'.*in_channels is 9",
        ),
    ],
)
def test_bad_configurations(changes, message, tmp_path):
    folder = diffusers_folder(tmp_path / "source", "small", **changes)
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "net")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(shift_factor=0.1), "shift_factor is 0.1, expected None"),
        (dict(use_quant_conv=False), "use_quant_conv is False, expected True"),
        (dict(scaling_factor=0), "scaling_factor is 0, expected about 0.18"),
        (dict(scaling_factor=10**400), "scaling_factor is 1000.*, expected about 0.18"),
        (dict(scaling_factor=1e-46), "scaling_factor is 1e-46"),
        (dict(sample_size=60000), "sample_size is 60000, expected a whole number up to 4096"),
        (dict(sample_size=33), "sample_size is 33, expected a multiple of 2"),
        (dict(_class_name="VQModel"), "_class_name is 'VQModel', expected 'AutoencoderKL'"),
        (dict(norm_num_groups=5), "5 groups do not divide"),
        (dict(block_out_channels=[32, 65]), r"block_out_channels is \[32, 65\], expected"),
    ],
)
def test_bad_autoencoder_configurations(changes, message, tmp_path):
    shutil.copytree(DIFFUSERS / "vae", tmp_path / "source")
    config = json.loads((DIFFUSERS / "vae" / "config.json").read_text()) | changes
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "source", tmp_path / "net")


def test_bad_sources(tmp_path):
    def check(source, message):
        with pytest.raises(CheckpointError, match=message):
            convert(source, tmp_path / "net")
        assert not (tmp_path / "net").exists()

    check(tmp_path / "nothing.pt", "nothing.pt does not exist")
    (tmp_path / "empty").mkdir()
    check(tmp_path / "empty", "is no folder of one network; expected one of diffusion_pytorch_")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "card.json").touch()
    check(tmp_path / "done", "is a network folder already")
    (tmp_path / "pipe" / "vae").mkdir(parents=True)
    (tmp_path / "pipe" / "vae" / "config.json").write_text("{}")
    check(tmp_path / "pipe", "give one of its networks: .*pipe/vae")
    (tmp_path / "x.safetensors").write_bytes(b"\x10" + bytes(7) + b"{not json at all")
    check(tmp_path / "x.safetensors", "is damaged or not safetensors")
    check("/dev/zero", "/dev/zero is neither a file nor a folder")
    save_file({}, tmp_path / "none.sft")
    check(tmp_path / "none.sft", "holds no tensors")
    save_file({"a": np.zeros(3, ml_dtypes.float8_e4m3fn)}, tmp_path / "eight.safetensors")
    check(tmp_path / "eight.safetensors", "holds tensors stored as F8_E4M3, which are not read")
    check(GOLDEN / "torch_zip" / "tensors_2.pt", "no known network has tensors such as")
    whole = (DIFFUSERS / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:-1])
    check(tmp_path / "x.safetensors", "is damaged or not safetensors")

    index = tmp_path / "y.safetensors.index.json"
    for text, message in (
        ("{", "is damaged or no JSON"),
        ("[]", "must hold a JSON object, got list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "names a file outside its folder"),
        ('{"weight_map": {"a": ""}}', "names a file outside its folder"),
        ('{"weight_map": {"a": ".."}}', "names a file outside its folder"),
        ('{"weight_map": {"a": "z.safetensors"}}', "z.safetensors is missing; .* names it"),
        ('{"weight_map": {"a": "x.safetensors"}}', "disagree on: a, decoder.conv_in.bias"),
    ):
        index.write_text(text)
        (tmp_path / "x.safetensors").write_bytes(whole)
        check(index, message)

    shutil.copytree(DIFFUSERS / "dit", tmp_path / "dit")
    (tmp_path / "dit" / "config.json").write_text("[")
    check(tmp_path / "dit", "config.json is damaged or no JSON")
    (tmp_path / "dit" / "config.json").unlink()
    check(tmp_path / "dit", "config.json is missing beside the weights")
    lone = DIFFUSERS / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(lone, tmp_path / "lone.safetensors")
    check(tmp_path / "lone.safetensors", "config.json is missing beside the weights, and says how")
    check(GOLDEN / "torch_zip" / "training_2.pt", "no known network has tensors such as bias")


def test_names_are_grouped():
    names = ["b.0.c.1.d", "b.0.c.2.d", "b.3.c.1.d", "e.7.f"]
    assert rules.grouped(names) == "b.*.c.*.d with * = 0,1 0,2 3,1; e.7.f"
