"""U-Nets against diffusers': layer by layer and whole, of every layout, and the published sizes."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from helpers import GOLDEN, random_params, relative, request_of
from safetensors.numpy import save_file
from unet_recipe import noise, weight

import tstitch_jax as ts
from checkpoints_convert import CheckpointError, conversion, convert, rules, unet as unet_conversion
from checkpoints_convert.rules import Tensor
from tstitch_jax.models import convolution, unet
from tstitch_jax.models.build import Prepared, flatten, make_network, module_of
from tstitch_jax.models.cards import Card
from tstitch_jax.models.measure import compute_dtypes, count_params, param_shapes

GIVEN = json.loads((GOLDEN / "unet" / "names.json").read_text())
LIMIT = 2e-5
TINY = ("sd", "bk", "uneven")
with np.load(GOLDEN / "unet" / "expected.npz") as npz:
    EXPECTED = dict(npz)

predict = jax.jit(lambda denoiser, x, knot, cond: denoiser(x, knot, ts.Condition(cond)))


def state_of(name: str) -> dict[str, np.ndarray]:
    return {key: weight(key, shape) for key, shape in GIVEN[name]["shapes"].items()}


def write_folder(name, folder, state=None, **changes):
    """As diffusers writes it."""
    folder.mkdir(parents=True)
    save_file(state or state_of(name), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(GIVEN[name]["config"] | changes))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny networks, converted from folders of diffusers."""
    out = tmp_path_factory.mktemp("unets")
    for name in TINY:
        convert(write_folder(name, out / "source" / name / "unet"), out / name)
    return out


@pytest.mark.parametrize("name", TINY)
def test_values(name, folders):
    network = ts.load(folders / name)
    module, width = module_of(network.card), network.card.context[1]
    inputs = (
        noise(f"{name}/x", 2, 8, 16, network.card.image_shape[2]),
        noise(f"{name}/context", 2, 7, width),
    )
    x, context = map(jnp.asarray, inputs)

    @jax.jit
    def run(params):
        times = jnp.array([981.0, 3.0])
        return module.apply({"params": params}, x, times, context, capture_intermediates=True)

    output, state = run(network.params)
    layers = {key for key in EXPECTED if key.startswith(f"{name}/")} - {f"{name}/output"}
    assert len(layers) > 7
    for key in layers:
        found = state["intermediates"][key.split("/")[1]]["__call__"][0]
        assert relative(found, EXPECTED[key]) < LIMIT, key
    assert relative(output, EXPECTED[f"{name}/output"]) < LIMIT


@pytest.mark.parametrize("name", unet.SIZES)
def test_published_sizes(name):
    size, given = unet.SIZES[name], GIVEN[name]
    labels = "label_width" in size
    side, channels = given["config"]["sample_size"], given["config"]["in_channels"]
    more = dict(num_classes=1000) if labels else dict(context=(77, 768))
    module = unet.UNet(**size, **more, image_shape=(side, side, channels))
    embedding = 1001 * size["label_width"] if labels else 0
    assert count_params(param_shapes(module)) == given["params"] + embedding


def test_the_paper_counts_alike():
    """In millions, as the papers and the published programs have them."""
    counts = {name: round(GIVEN[name]["params"] / 1e6) for name in unet.SIZES}
    assert counts == {
        "sd-1": 860, "bk-sdm-base": 579, "bk-sdm-small": 482, "bk-sdm-tiny": 323, "ldm-4": 401,
        "ldm": 395, "ldm-s": 25,
    }  # fmt: skip


def conversion_of(tensors, config, heads=None):
    """Everything before a value is read."""
    layout, family = conversion._layout(GOLDEN, tensors, None)
    found = layout.convert(family, tensors, config, heads)
    expected = {k: v.shape for k, v in flatten(param_shapes(module_of(found.card))).items()}
    rules.check(found.rules, tensors, expected, found.ignored)
    return found


def as_shapes(shapes):
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    return {name: Tensor(a.shape, a.dtype, lambda a=a: a) for name, a in zeros.items()}


@pytest.mark.parametrize("name", ["sd-1", "bk-sdm-tiny", "ldm"])
@pytest.mark.parametrize("compvis", [False, True])
def test_full_checkpoints_by_shape(name, compvis):
    given, size = GIVEN[name], unet.SIZES[name]
    shapes, config = given["shapes"], given["config"]
    if compvis:
        shapes = {f"model.diffusion_model.{given['compvis'][k]}": v for k, v in shapes.items()}
        shapes["first_stage_model.decoder.conv_in.bias"] = (512,)
        config = {}
        if "label_width" in size:
            shapes["cond_stage_model.embedding.weight"] = (1000, size["label_width"])
    card = conversion_of(as_shapes(shapes), config).card
    assert {k: card.config[k] for k in ("layers", "middle_heads")} == {
        k: size[k] for k in ("layers", "middle_heads")
    }
    assert (tuple(card.config["widths"]), tuple(card.config["heads"])) == (
        size["widths"],
        size["heads"],
    )
    labels = compvis and "label_width" in size
    assert card.num_classes == (1000 if labels else 0)
    assert card.image_shape == (32, 32, 4) if name == "ldm" else (64, 64, 4)
    if name != "ldm":
        assert (card.context, card.text_encoder) == ((77, 768), "sd-text-encoder")
    if labels:
        assert card.schedule == {"name": "scaled_linear", "betas": [0.0015, 0.0195]}
        assert card.autoencoder == "vq-f8"


@pytest.mark.full
def test_stable_diffusion_whole():
    """One pass of 860 million parameters, from the names of either layout's tensors."""
    given = GIVEN["sd-1"]
    tensors = {
        name: Tensor(tuple(s), np.dtype(np.float32), lambda name=name, s=s: weight(name, s))
        for name, s in given["shapes"].items()
    }
    found = conversion_of(tensors, given["config"])
    filled = rules.fill(found.rules, tensors, lambda _: None)
    params = unflatten_dict(filled, sep="/")
    module = module_of(found.card)
    x, context = noise("sd-1/x", 1, 16, 16, 4), noise("sd-1/context", 1, 77, 768)
    output = jax.jit(module.apply)(
        {"params": params}, jnp.asarray(x), jnp.array([501.0]), jnp.asarray(context)
    )
    assert relative(output, EXPECTED["sd-1/output"]) < 1e-4


# Other layouts


def compvis(name, state=None):
    """As CompVis' program saves it, with what else is in such a file."""
    state = state or state_of(name)
    found = {f"model.diffusion_model.{GIVEN[name]['compvis'][k]}": v for k, v in state.items()}
    found["first_stage_model.decoder.conv_in.bias"] = np.ones(3, np.float32)
    found["model_ema.diffusion_modeloutbias2"] = np.ones(3, np.float32)
    return found


def as_tensors(arrays):
    return {k: Tensor(v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()}


def params_of(arrays, heads=None):
    """Of a checkpoint's arrays, up to the module, which knows 32 groups alone."""
    lazy = as_tensors(arrays)
    layout, family = conversion._layout(GOLDEN, lazy, None)
    found = layout.convert(family, lazy, {}, heads)
    found.check()
    return rules.fill(found.rules, lazy, lambda _: None), found.card


@pytest.mark.parametrize("name", TINY)
def test_a_whole_checkpoint_has_the_same_parameters(name, folders):
    state = compvis(name)
    with pytest.raises(CheckpointError, match=r"none of the published sizes; give --num-heads N"):
        params_of(state)
    params, card = params_of(state, heads=2)
    expected = ts.load(folders / name)
    for key, value in flatten(expected.params).items():
        np.testing.assert_array_equal(params[key], value, err_msg=key)
    assert len(params) == len(flatten(expected.params))
    assert (card.context, card.image_shape) == (
        expected.card.context,
        (64, 64, card.image_shape[2]),
    )
    # Half precision, without what all names begin with
    half = {k.removeprefix("model."): v.astype(np.float16) for k, v in state.items()
            if k.startswith("model.")}  # fmt: skip
    params, _ = params_of(half, heads=2)
    for key, value in flatten(expected.params).items():
        np.testing.assert_array_equal(params[key], value, err_msg=key)


def class_conditional(rows):
    state = compvis("uneven")
    state["cond_stage_model.embedding.weight"] = weight("classes", (rows, 12))
    state["alphas_cumprod"] = (
        ts.make_schedule("scaled_linear", betas=[0.0015, 0.0195]).alpha ** 2
    ).astype(np.float32)
    return state


@pytest.mark.parametrize("rows", [1000, 1001])
def test_classes_are_a_part_of_the_network(rows):
    state = class_conditional(rows)
    params, card = params_of(state, heads=2)
    assert (card.num_classes, card.context) == (1000, None)
    assert (card.autoencoder, card.text_encoder) == ("vq-f4", "")
    assert card.config["label_width"] == 12
    table = state["cond_stage_model.embedding.weight"]
    np.testing.assert_array_equal(params["labels/embedding"][:rows], table)
    # Where there is no row for no class, there are uniform numbers, as the published program draws.
    assert params["labels/embedding"].shape == (1001, 12)
    if rows == 1000:
        null = np.asarray(params["labels/embedding"][1000])
        assert 0 <= null.min() < 0.3 < 0.7 < null.max() < 1
    state["alphas_cumprod"] = np.linspace(1, 0.1, 1000, dtype=np.float32)
    with pytest.raises(CheckpointError, match="alphas_cumprod is not that of the schedule"):
        params_of(state, heads=2)


def test_the_vector_of_a_class_is_the_context(folders):
    params, card = params_of(class_conditional(1001), heads=2)
    card = dataclasses.replace(card, config=card.config | {"groups": 4}, image_shape=(8, 8, 3))
    network = make_network(card, unflatten_dict(params, sep="/"))
    plain = ts.load(folders / "uneven")
    plain = make_network(
        dataclasses.replace(plain.card, config=network.card.config | {"label_width": 0}),
        plain.params,
    )
    knot = jax.tree.map(lambda v: jnp.asarray(v[3]), ts.make_knots(network.schedule, 10))
    x, labels = jnp.asarray(noise("x", 2, 8, 8, 3)), jnp.array([7, 1000])
    found = predict(network.denoiser, x, knot, labels)
    context = params["labels/embedding"][labels][:, None]
    expected = predict(plain.denoiser, x, knot, context)
    assert relative(found.eps, expected.eps) < 1e-5


def test_torch_files(folders, tmp_path):
    """A folder whose weights are a .bin in float16, beside the pipeline's scheduler."""
    source = tmp_path / "pipeline"
    (source / "unet").mkdir(parents=True)
    (source / "scheduler").mkdir()
    shutil.copy(GOLDEN / "unet" / "bk.bin", source / "unet" / "diffusion_pytorch_model.bin")
    (source / "unet" / "config.json").write_text(json.dumps(GIVEN["bk"]["config"]))
    file = source / "scheduler" / "scheduler_config.json"
    scheduler = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear",
                 "beta_start": 0.00085, "beta_end": 0.012, "skip_prk_steps": True}  # fmt: skip
    file.write_text(json.dumps(scheduler))
    convert(source, tmp_path / "a", family="unet")
    expected = ts.load(folders / "bk")
    jax.tree.map(np.testing.assert_array_equal, ts.load(tmp_path / "a").params, expected.params)
    assert ts.load(tmp_path / "a").card.schedule == {"name": "scaled_linear"}
    file.write_text(json.dumps(scheduler | {"prediction_type": "v_prediction", "beta_end": 0.01}))
    card = convert(source / "unet", tmp_path / "b")
    assert card.target == "v"
    assert card.schedule == {"name": "scaled_linear", "betas": [0.00085, 0.01]}
    file.write_text(json.dumps(scheduler | {"beta_schedule": "squaredcos_cap_v2"}))
    with pytest.raises(CheckpointError, match=r"scheduler_config.json: beta_schedule is 'squared"):
        convert(source / "unet", tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"give one of its networks: .*unet"):
        convert(source, tmp_path / "c")


def test_lora_is_merged_whatever_the_layout(folders, tmp_path):
    """kohya names modules as diffusers does, also of a checkpoint of CompVis."""
    module = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    down, up = weight("down", (2, 24)), weight("up", (16, 2))
    lora = {f"lora_unet_{module}.lora_down.weight": down, f"lora_unet_{module}.lora_up.weight": up,
            f"lora_unet_{module}.alpha": np.ones(1, np.float32)}  # fmt: skip
    save_file(lora, tmp_path / "style.safetensors")
    target = "down_0_transformer_0/cross/k/kernel"
    plain = flatten(ts.load(folders / "bk").params)
    folder = write_folder("bk", tmp_path / "unet")
    convert(folder, tmp_path / "net", loras=[(tmp_path / "style.safetensors", 0.5)])
    found = flatten(ts.load(tmp_path / "net").params)
    expected = plain[target] + 0.5 * 1.0 / 2 * (up @ down).T
    assert relative(found[target], expected) < 1e-5
    assert all(np.array_equal(found[key], plain[key]) for key in plain if key != target)
    names = unet_conversion.compvis("unet", as_tensors(compvis("bk")), {}, 2).lora_names
    given = GIVEN["bk"]["compvis"]
    assert len(names) > 50
    assert all(v == f"model.diffusion_model.{given[k]}" for k, v in names.items())


# Bad input


def test_later_programs_are_refused_by_name(tmp_path):
    sd2 = state_of("sd")
    for name in list(sd2):
        if name.endswith("proj_in.weight"):
            sd2[name] = sd2[name][:, :, 0, 0]
    deep = state_of("bk")
    deep |= {name.replace("blocks.0.", "blocks.1."): value for name, value in deep.items()
             if "transformer_blocks.0" in name}  # fmt: skip
    xl = compvis("bk") | {"model.diffusion_model.label_emb.0.0.weight": np.ones((3, 3))}
    other = compvis("bk") | {"conditioner.embedders.0.x.weight": np.ones((3, 3))}
    for number, (state, which) in enumerate(
        ((sd2, "2"), (compvis("sd", sd2), "2"), (deep, "XL"), (xl, "XL"), (other, "XL"))
    ):
        folder = tmp_path / str(number)
        message = rf"U-Net of Stable Diffusion {which}, .* supported are Stable Diffusion 1.x"
        state = {name: np.ascontiguousarray(value) for name, value in state.items()}
        if any(name.startswith("model.") for name in state):
            folder.mkdir()
            save_file(state, folder / "model.safetensors")
            source = folder / "model.safetensors"
        else:
            source = write_folder("sd" if which == "2" else "bk", folder / "unet", state)
        with pytest.raises(CheckpointError, match=message):
            convert(source, tmp_path / "net")
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(use_linear_projection=True), "use_linear_projection is True"),
        (dict(layers_per_block=3), "layers_per_block is 3, expected 1"),
        (dict(class_embed_type="timestep"), "class_embed_type is 'timestep'"),
        (dict(attention_head_dim=[2]), r"attention_head_dim is \[2\], expected .* or 2 of them"),
        (dict(attention_head_dim=5), "5 heads do not divide a width of 16"),
        (dict(sample_size=7), "multiples of 2, got 7x7"),
        (dict(mid_block_type="UNetMidBlock2DCrossAttn"), "mid_block_type is"),
    ],
)
def test_another_configuration_is_refused(changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        convert(write_folder("bk", tmp_path / "unet", **changes), tmp_path / "net")


def test_a_damaged_checkpoint_is_refused(tmp_path):
    state = state_of("bk")
    del state["down_blocks.1.resnets.0.time_emb_proj.bias"]
    state["up_blocks.0.resnets.0.conv1.weight"] = np.ones((3, 3, 3, 3), np.float32)
    state["control.weight"] = np.ones(3, np.float32)
    with pytest.raises(CheckpointError) as error:
        convert(write_folder("bk", tmp_path / "unet", state), tmp_path / "net")
    for text in ("missing: down_blocks.1.resnets.0.time_emb_proj.bias", "not expected: control",
                 "for up_1_resnet_0/conv1/kernel"):  # fmt: skip
        assert text in str(error.value)
    inpainting = compvis("bk")
    name = "model.diffusion_model.input_blocks.0.0.weight"
    inpainting[name] = np.ones((16, 9, 3, 3), np.float32)
    with pytest.raises(CheckpointError, match=r"takes 9 channels and gives 4 \(is it for inpaint"):
        params_of(inpainting, heads=2)
    levels = {n: v for n, v in compvis("sd").items() if "input_blocks.3.0.op" not in n}
    with pytest.raises(CheckpointError, match=r"levels have 5, 2 residual blocks"):
        params_of(levels, heads=2)


def test_what_does_not_fit_is_refused(folders):
    network = ts.load(folders / "sd")
    knot = jax.tree.map(lambda v: jnp.asarray(v[3]), ts.make_knots(network.schedule, 10))

    def ask(x, context):
        return network.denoiser(jnp.zeros(x), knot, ts.Condition(jnp.zeros(context)))

    with pytest.raises(
        ValueError, match=r"4 channels, height and width multiples of 4, got \(8, 6"
    ):
        ask((1, 8, 6, 4), (1, 7, 24))
    with pytest.raises(ValueError, match=r"contexts \[B, L, 24\], got \(1, 7, 23\)"):
        ask((1, 8, 8, 4), (1, 7, 23))
    card = network.card
    for changes, message in (
        (dict(context=None), "num_classes must be at least 1"),
        (dict(num_classes=3), r"without classes, got \(77, 24\) and 3 classes"),
        (dict(context=(77, 0)), "a length and a width above 0"),
        (dict(config=card.config | {"heads": [4, 4]}), "heads need a number for each"),
        (dict(config=card.config | {"label_width": 3}), "takes labels .* or a context, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_network(dataclasses.replace(card, **changes), network.params)


# Half precision


def test_bfloat16_is_close(folders, standard_promotion):
    network = ts.load(folders / "bk")
    half = ts.load(folders / "bk", jnp.bfloat16)
    knot = jax.tree.map(lambda v: jnp.asarray(v[3]), ts.make_knots(network.schedule, 10))
    inputs = jnp.asarray(noise("x", 2, 8, 8, 4)), knot, jnp.asarray(noise("c", 2, 7, 24))
    full, found = (predict(n.denoiser, *inputs).eps for n in (network, half))
    assert found.dtype == jnp.float32
    assert 0 < relative(found, full) < 0.05
    held = {name for name, value in flatten(half.params).items() if value.dtype == jnp.float32}
    assert held == {
        name
        for name in flatten(half.params)
        if "norm" in name
        or name.startswith(("time_", "conv_out"))
        or re.search("mlp_(in|out)/bias", name)  # biases are added to products in float32
    }


def test_most_of_the_largest_is_held_in_bfloat16(standard_promotion):
    module = unet.UNet(
        **unet.SIZES["sd-1"], image_shape=(64, 64, 4), context=(77, 768), dtype=jnp.bfloat16
    )
    shapes = param_shapes(module)
    dtypes = compute_dtypes(module)
    half = [s.size for s, d in zip(*map(jax.tree.leaves, (shapes, dtypes)), strict=True)
            if d == jnp.bfloat16]  # fmt: skip
    assert sum(half) > 0.99 * count_params(shapes)


# What is computed of the parameters alone, before the loop


@pytest.fixture
def pair(monkeypatch):
    """Two U-Nets, small as they are with kernels that are computed before a loop."""
    for name, value in (("CHANNELS", 12), ("ROWS", 0), ("PRECOMPUTED", range(16, 65))):
        monkeypatch.setattr(convolution, name, value)
    cards = [
        Card(
            name="pre", architecture="unet", target="eps", learned_variance=False,
            config={"widths": [width], "layers": 1, "heads": [0], "middle_heads": 0, "groups": 4},
            schedule={"name": "scaled_linear"}, image_shape=(8, 8, 3), num_classes=0,
            context=(7, 16),
        )
        for width in (12, 24)
    ]  # fmt: skip
    return [make_network(card, random_params(card)) for card in cards]


GUIDED = dict(cfg_scale=2.0, negative=np.zeros((1, 7, 16), np.float32))
AUTO = dict(cfg_scale=None, auto_scale=2.0)


def request(pair, fractions, length=7, **options):
    return request_of(
        jax.random.key(0), pair, cond=noise("c", 2, length, 16), fractions=fractions, steps=5,
        decode=False, **options or GUIDED,
    )  # fmt: skip


def unprepared(asked):
    """The same request, compiled for no platform in particular."""
    return asked.replace(platform=None)


def samples(asked, callback=None):
    return asked.run(callback)[0]


def test_kernels_are_computed_before_the_loop(pair):
    for fractions, options in (
        ([0.4, 0.6], {}), ([1.0, 0.0], {}), ([0.0, 1.0], {}), ([0.4, 0.6], AUTO)
    ):  # fmt: skip
        asked = request(pair, fractions, **options)
        assert relative(samples(asked), samples(unprepared(asked))) < 1e-5


def test_kernels_are_computed_before_steps_that_are_called(pair):
    asked = request(pair, [0.4, 0.6])
    assert relative(samples(asked, lambda step: None), samples(unprepared(asked))) < 1e-5


def kernels_in_the_loop(asked):
    """How many of the sixteen matrices of a kernel the steps compute."""
    program = jax.make_jaxpr(asked.function)(asked.inputs).jaxpr
    for equation in program.eqns:
        if equation.primitive.name == "shard_map":  # what each device of a mesh does
            program = equation.params["jaxpr"]
    loops = [e for e in program.eqns if e.primitive.name == "scan" and e.params["length"] == 5]
    assert len(loops) == 1
    return len(re.findall(r"f32\[24,24\] = div", str(loops[0].params["jaxpr"])))


def are_prepared(asked):
    """Whether the kernels of each network are there before the loop."""
    params = [ready.denoiser.params for ready in asked.prepared().inputs.denoisers]
    return [isinstance(own, Prepared) and len(jax.tree.leaves(own.forms)) > 0 for own in params]


@pytest.mark.parametrize("options", [{}, AUTO])
def test_no_step_computes_them(pair, options):
    asked = request(pair, [0.4, 0.6], **options)
    assert kernels_in_the_loop(unprepared(asked)) > 0
    assert kernels_in_the_loop(asked) == 0
    assert are_prepared(asked) == [True, True]
    assert are_prepared(unprepared(asked)) == [False, False]


@pytest.mark.parametrize(
    ("platforms", "found"), [(["cpu"], True), (["cuda"], False), (["cpu", "tpu"], False)]
)
def test_exported_programs_have_them_for_cpus_alone(pair, tmp_path, platforms, found):
    sampler = ts.Sampler(pair, plan=[0.4, 0.6], steps=5, guidance=None)
    ts.export(
        tmp_path / "a.npz", sampler, cond=noise("c", 2, 7, 16), decode=False, platforms=platforms
    )
    with np.load(tmp_path / "a.npz") as saved:
        program = jax.export.deserialize(bytearray(saved["program"].tobytes())).mlir_module()
    before = program[program.index("@main") :].split("stablehlo.while")[0]
    assert bool(re.search(r"stablehlo\.divide.*tensor<24x24xf32>", before)) == found


def test_each_device_of_a_mesh_computes_them(pair):
    asked = request([ts.shard(network, ts.make_mesh()) for network in pair], [0.4, 0.6])
    assert kernels_in_the_loop(asked) == 0
    assert relative(samples(asked), samples(request(pair, [0.4, 0.6]))) < 1e-5


def test_a_batch_too_large_for_the_form_has_none(pair, monkeypatch):
    """A guided network receives two rows for each image."""
    monkeypatch.setattr(convolution, "VALUES", 3 * 64 * 24)  # three rows of 24 channels
    # Of shapes that no other test has traced.
    options = GUIDED | dict(negative=np.zeros((1, 6, 16), np.float32))
    asked = request(pair, [0.4, 0.6], length=6, **options)
    assert kernels_in_the_loop(asked) == 0
    assert are_prepared(asked) == [True, False]


def test_on_shapes_and_within_jit_there_is_nothing_to_compute(pair):
    shapes = [network.with_params(jax.eval_shape(lambda p: p, network.params)) for network in pair]
    assert request(shapes, [0.4, 0.6]).config.platform is None

    @jax.jit
    def sampled(params):
        networks = [network.with_params(own) for network, own in zip(pair, params, strict=True)]
        asked = request(networks, [0.4, 0.6])
        assert asked.config.platform is None
        return asked.function(asked.inputs)[0]

    found = sampled([network.params for network in pair])
    assert relative(found, samples(request(pair, [0.4, 0.6]))) < 1e-5
