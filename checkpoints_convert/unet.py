"""Conditional U-Nets: diffusers' ``UNet2DConditionModel``, and CompVis' checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.family import (
    SCHEDULER,
    SIDE,
    Conversion,
    Layout,
    check_config,
    count,
    shape_of,
)
from checkpoints_convert.rules import Rule, Tensor, conv, layer, linear, norm_layer, same
from tstitch_jax.core.checks import shown
from tstitch_jax.core.schedules import make_schedule
from tstitch_jax.models import unet
from tstitch_jax.models.cards import Card

CONTEXT_LENGTH = 77
"""Tokens of the texts that these networks were trained with."""

STABLE_DIFFUSION = 768
"""Width of the contexts of Stable Diffusion 1.x, and of what was distilled or trained from it."""

TEXT_ENCODER = "sd-text-encoder"
"""The text encoder that these share."""

AUTOENCODERS = {"text": "sd-vae-ft-ema", 3: "vq-f4", 4: "vq-f8"}
"""Whose latents they denoise: Stable Diffusion's, or a class-conditional one's by its channels."""

SIDES = {"text": 64, 3: 64, 4: 32}
"""Of the latents, where the checkpoint does not say it."""

BETAS = {"text": [0.00085, 0.012], "classes": [0.0015, 0.0195]}
"""First and last beta of the schedule, where the checkpoint does not say them."""

IMAGENET = 1000
TARGETS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}

SUPPORTED = (
    "Stable Diffusion 1.x and networks like it, BK-SDM, and class-conditional latent diffusion"
)

WITHIN = "diffusion_model."
"""Where a whole latent diffusion checkpoint keeps its U-Net; before it comes ``model.``, unless
everything in the file begins so."""

CLASSES, TABLE = "cond_stage_model.embedding.weight", "alphas_cumprod"


class Names(NamedTuple):
    """The names of a layout's parts."""

    conv_in: str
    time_in: str
    time_out: str
    norm_out: str
    conv_out: str
    norm1: str
    conv1: str
    time: str
    norm2: str
    conv2: str
    shortcut: str


DIFFUSERS = Names(
    "conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_norm_out", "conv_out",
    "norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut",
)  # fmt: skip
COMPVIS = Names(
    "input_blocks.0.0", "time_embed.0", "time_embed.2", "out.0", "out.2",
    "in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3",
    "skip_connection",
)  # fmt: skip


class Sizes(NamedTuple):
    """What the tensors' names and shapes say, and in which layout."""

    widths: tuple[int, ...]
    layers: int
    attention: tuple[bool, ...]
    middle: bool
    compvis: bool
    prefix: str = ""


def _resnet(target: str, source: str, names: Names, changes_width: bool) -> Iterator[Rule]:
    for norm, own in (("norm1", names.norm1), ("norm2", names.norm2)):
        yield from norm_layer(f"{target}/{norm}", f"{source}.{own}")
    for convolution, own in (("conv1", names.conv1), ("conv2", names.conv2)):
        yield from layer(f"{target}/{convolution}", f"{source}.{own}", transform=conv)
    yield from layer(f"{target}/time", f"{source}.{names.time}")
    if changes_width:
        yield from layer(f"{target}/shortcut", f"{source}.{names.shortcut}")


def _transformer(target: str, source: str) -> Iterator[Rule]:
    """The same in both layouts."""
    block = f"{source}.transformer_blocks.0"
    yield from norm_layer(f"{target}/norm", f"{source}.norm")
    yield from layer(f"{target}/project_in", f"{source}.proj_in")
    yield from layer(f"{target}/project_out", f"{source}.proj_out")
    for i, (norm, attention) in enumerate((("self_norm", "self"), ("cross_norm", "cross")), 1):
        yield from norm_layer(f"{target}/{norm}", f"{block}.norm{i}")
        for x in "qkv":
            kernel = f"{target}/{attention}/{x}/kernel"
            yield Rule(kernel, (f"{block}.attn{i}.to_{x}.weight",), linear)
        yield from layer(f"{target}/{attention}/out", f"{block}.attn{i}.to_out.0")
    yield from norm_layer(f"{target}/mlp_norm", f"{block}.norm3")
    yield from layer(f"{target}/mlp_in", f"{block}.ff.net.0.proj")
    yield from layer(f"{target}/mlp_out", f"{block}.ff.net.2")


def _places(sizes: Sizes) -> Iterator[tuple[str, str]]:
    """Every block of the network, and where the layout keeps it."""
    last, layers, compvis = len(sizes.widths) - 1, sizes.layers, sizes.compvis
    for i, attention in enumerate(sizes.attention):
        for j in range(layers):
            n = 1 + i * (layers + 1) + j
            place = f"input_blocks.{n}" if compvis else f"down_blocks.{i}"
            yield f"down_{i}_resnet_{j}", f"{place}.0" if compvis else f"{place}.resnets.{j}"
            if attention:
                own = f"{place}.1" if compvis else f"{place}.attentions.{j}"
                yield f"down_{i}_transformer_{j}", own
        if i < last:
            own = f"input_blocks.{(i + 1) * (layers + 1)}.0.op"
            yield f"down_{i}_resize", own if compvis else f"down_blocks.{i}.downsamplers.0.conv"
    if sizes.middle:
        middle = ["middle_block.0", "middle_block.1", "middle_block.2"] if compvis else [
            "mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]  # fmt: skip
        ours = ("middle_resnet_0", "middle_transformer", "middle_resnet_1")
        yield from zip(ours, middle, strict=True)
    for r, i in enumerate(reversed(range(last + 1))):
        for j in range(layers + 1):
            place = f"output_blocks.{r * (layers + 1) + j}" if compvis else f"up_blocks.{r}"
            yield f"up_{i}_resnet_{j}", f"{place}.0" if compvis else f"{place}.resnets.{j}"
            if sizes.attention[i]:
                own = f"{place}.1" if compvis else f"{place}.attentions.{j}"
                yield f"up_{i}_transformer_{j}", own
        if i:
            n = (r + 1) * (layers + 1) - 1
            own = f"output_blocks.{n}.{1 + sizes.attention[i]}.conv"
            yield f"up_{i}_resize", own if compvis else f"up_blocks.{r}.upsamplers.0.conv"


def _rules(sizes: Sizes) -> Iterator[Rule]:
    names = COMPVIS if sizes.compvis else DIFFUSERS
    for target in ("conv_in", "conv_out"):
        yield from layer(target, sizes.prefix + getattr(names, target), transform=conv)
    for target in ("time_in", "time_out"):
        yield from layer(target, sizes.prefix + getattr(names, target))
    yield from norm_layer("norm_out", sizes.prefix + names.norm_out)
    before = sizes.widths[0]
    for target, place in _places(sizes):
        source = sizes.prefix + place
        if "transformer" in target:
            yield from _transformer(target, source)
        elif "resize" in target:
            yield from layer(target, source, transform=conv)
        else:
            kind, level, *_ = target.split("_")
            width = sizes.widths[-1 if kind == "middle" else int(level)]
            # On the way up what was skipped is joined on, so that the width always changes.
            yield from _resnet(target, source, names, kind == "up" or width != before)
            before = width


def _context_width(sizes: Sizes, tensors: Mapping[str, Tensor]) -> int:
    place = next((place for target, place in _places(sizes) if "transformer" in target), None)
    if place is None:
        raise CheckpointError(f"the U-Net attends to no context; supported are {SUPPORTED}")
    name = f"{sizes.prefix}{place}.transformer_blocks.0.attn2.to_k.weight"
    return shape_of(tensors, name, 2)[1]


def _refuse_others(tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Raises CheckpointError for the U-Nets of later programs."""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    later = r"(label_emb|add_embedding)\.|.*\.transformer_blocks\.1\."
    if any(re.match(later, name) for name in own) or any(
        name.startswith("conditioner.") for name in tensors
    ):
        which = "Stable Diffusion XL, or one like it"
    elif any(name.endswith(".proj_in.weight") and len(own[name].shape) == 2 for name in own):
        which = "Stable Diffusion 2, or one like it"
    else:
        return
    raise CheckpointError(f"this is the U-Net of {which}; supported are {SUPPORTED}")


def _labels(tensors: Mapping[str, Tensor]) -> tuple[int, Rule]:
    """The number of classes, and their embedding with a row for none.

    Networks that were trained without such a row have one of 1000. The published program guides
    them away from uniform numbers, drawn anew for every batch; here the row is one such draw.
    """
    rows = shape_of(tensors, CLASSES, 2)[0]

    def with_null(table: np.ndarray) -> np.ndarray:
        row = np.random.default_rng(0).random((1, table.shape[1]))
        return np.concatenate([table, row.astype(table.dtype)])

    lacks = rows == IMAGENET
    rule = Rule("labels/embedding", (CLASSES,), with_null if lacks else same)
    return rows if lacks else rows - 1, rule


def _schedule(scheduler: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The target and the schedule of a diffusers ``scheduler_config.json``, or what is usual."""
    check_config(
        scheduler,
        {
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000,
            "prediction_type": tuple(TARGETS),
            "rescale_betas_zero_snr": False,
            "trained_betas": None,
        },
        file="scheduler_config.json",
    )
    betas = [scheduler.get(name, usual) for name, usual in
             zip(("beta_start", "beta_end"), BETAS["text"], strict=True)]  # fmt: skip
    schedule = {"name": "scaled_linear"} | ({} if betas == BETAS["text"] else {"betas": betas})
    return TARGETS[scheduler.get("prediction_type", "epsilon")], schedule


def _per_level(name: str, value: Any, levels: int) -> tuple[int, ...]:
    numbers = [value] * levels if type(value) is int else value
    if (
        not isinstance(numbers, list)
        or len(numbers) != levels
        or not all(type(n) is int and n > 0 for n in numbers)
    ):
        raise CheckpointError(
            f"config.json: {name} is {shown(value)}, expected a whole number or {levels} of them"
        )
    return tuple(numbers)


def _conversion(
    sizes: Sizes,
    tensors: Mapping[str, Tensor],
    heads: tuple[tuple[int, ...], int],
    side: int | None,
    groups: int,
    target: str,
    schedule: dict[str, Any] | None,
) -> Conversion:
    """Of the network with these heads by level and in the middle."""
    names = COMPVIS if sizes.compvis else DIFFUSERS
    channels = shape_of(tensors, f"{sizes.prefix}{names.conv_in}.weight", 4)[1]
    outputs = shape_of(tensors, f"{sizes.prefix}{names.conv_out}.weight", 4)[0]
    if outputs not in (channels, 2 * channels):
        raise CheckpointError(
            f"the U-Net takes {channels} channels and gives {outputs} (is it for inpainting?); "
            f"supported are {SUPPORTED}"
        )
    width, classes = _context_width(sizes, tensors), CLASSES in tensors
    config: dict[str, Any] = {
        "widths": list(sizes.widths), "layers": sizes.layers, "heads": list(heads[0]),
        "middle_heads": heads[1], "groups": groups,
    }  # fmt: skip
    rules = list(_rules(sizes))
    ignored = [n for n in tensors if sizes.prefix and not n.startswith(sizes.prefix)]
    num_classes, kind = 0, "text"
    if classes:
        num_classes, rule = _labels(tensors)
        kind = channels
        config["label_width"] = width
        rules.append(rule)
        ignored.remove(CLASSES)
    if schedule is None:
        betas = BETAS["classes" if classes else "text"]
        schedule = {"name": "scaled_linear"} | ({"betas": betas} if classes else {})
    side = side or SIDES.get(kind, 64)
    card = Card(
        name="",
        architecture="unet",
        config=config,
        target=target,
        learned_variance=outputs == 2 * channels,
        schedule=schedule,
        image_shape=(side, side, channels),
        num_classes=num_classes,
        context=None if classes else (CONTEXT_LENGTH, width),
        autoencoder=AUTOENCODERS.get(kind, ""),
        text_encoder=TEXT_ENCODER if width == STABLE_DIFFUSION and not classes else "",
    )

    def check_schedule() -> None:
        if TABLE in tensors:
            found = np.asarray(tensors[TABLE].read(), np.float64)
            ours = make_schedule(**card.schedule).alpha ** 2
            if found.shape != ours.shape or not np.allclose(found, ours, rtol=1e-3, atol=1e-4):
                raise CheckpointError(
                    f"{TABLE} is not that of the schedule {card.schedule}, the only one known of "
                    "such networks"
                )

    theirs = {rule.target: rule.sources[0] for rule in
              _rules(sizes._replace(compvis=False, prefix=""))}  # fmt: skip
    lora_names = {
        theirs[rule.target]: rule.sources[0]
        for rule in rules
        if rule.target in theirs and rule.target.endswith("/kernel")
    }
    return Conversion(card, rules, tuple(ignored), check_schedule, lora_names)


def diffusers(
    family: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], heads: int | None
) -> Conversion:
    """The conversion of diffusers' ``UNet2DConditionModel``; its ``config.json`` is needed."""
    if not config:
        raise CheckpointError(
            "config.json is missing beside the weights; give the folder that holds both"
        )
    if heads is not None:
        raise CheckpointError("config.json says how many heads there are; leave out --num-heads")
    _refuse_others(tensors, "")
    levels = count(tensors, r"down_blocks\.(\d{1,6})\.")
    sizes = Sizes(
        tuple(
            shape_of(tensors, f"down_blocks.{i}.resnets.0.conv1.weight", 4)[0]
            for i in range(max(levels, 1))
        ),
        count(tensors, r"down_blocks\.0\.resnets\.(\d{1,6})\."),
        tuple(f"down_blocks.{i}.attentions.0.norm.weight" in tensors for i in range(levels)),
        "mid_block.attentions.0.norm.weight" in tensors,
        compvis=False,
    )

    def blocks(kind: str, attention: tuple[bool, ...]) -> list[str]:
        return [f"CrossAttn{kind}Block2D" if each else f"{kind}Block2D" for each in attention]

    check_config(
        config,
        {
            "_class_name": "UNet2DConditionModel",
            "act_fn": "silu",
            "addition_embed_type": None,
            "attention_type": "default",
            "block_out_channels": list(sizes.widths),
            "center_input_sample": False,
            "class_embed_type": None,
            "conv_in_kernel": 3,
            "conv_out_kernel": 3,
            "cross_attention_norm": None,
            "down_block_types": blocks("Down", sizes.attention),
            "downsample_padding": 1,
            "dual_cross_attention": False,
            "encoder_hid_dim": None,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "layers_per_block": (sizes.layers, [sizes.layers] * levels),
            "mid_block_scale_factor": 1,
            "mid_block_type": "UNetMidBlock2DCrossAttn" if sizes.middle else None,
            "norm_eps": 1e-5,
            "num_class_embeds": None,
            "only_cross_attention": False,
            "resnet_out_scale_factor": 1.0,
            "resnet_skip_time_act": False,
            "resnet_time_scale_shift": "default",
            "time_cond_proj_dim": None,
            "time_embedding_act_fn": None,
            "time_embedding_dim": None,
            "time_embedding_type": "positional",
            "timestep_post_act": None,
            "transformer_layers_per_block": (1, [1] * levels),
            "up_block_types": blocks("Up", sizes.attention[::-1]),
            "use_linear_projection": False,
        },
        {"sample_size": SIDE, "norm_num_groups": max(sizes.widths)},
    )
    # What this program calls the heads' width is their number, unless that is given too.
    key = "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"
    numbers = _per_level(key, config.get(key, 8), levels)
    by_level = tuple(n if a else 0 for n, a in zip(numbers, sizes.attention, strict=True))
    return _conversion(
        sizes,
        tensors,
        (by_level, numbers[-1] if sizes.middle else 0),
        config.get("sample_size", 64),
        config.get("norm_num_groups", 32),
        *_schedule(config.get(SCHEDULER, {})),
    )


def _compvis_sizes(tensors: Mapping[str, Tensor], prefix: str) -> Sizes:
    """Levels end where an input block only halves the resolution."""
    blocks = count(tensors, re.escape(prefix) + r"input_blocks\.(\d{1,6})\.")
    levels: list[list[int]] = [[]]
    for n in range(1, blocks):
        if f"{prefix}input_blocks.{n}.0.op.weight" in tensors:
            levels.append([])
        else:
            levels[-1].append(n)
    layers = {len(level) for level in levels}
    if len(layers) != 1 or not levels[0]:
        raise CheckpointError(
            f"the levels have {', '.join(str(len(level)) for level in levels)} residual blocks, "
            f"expected as many in each; supported are {SUPPORTED}"
        )
    firsts = [f"{prefix}input_blocks.{level[0]}" for level in levels]
    return Sizes(
        tuple(shape_of(tensors, f"{first}.0.in_layers.2.weight", 4)[0] for first in firsts),
        layers.pop(),
        tuple(f"{first}.1.norm.weight" in tensors for first in firsts),
        f"{prefix}middle_block.1.norm.weight" in tensors,
        compvis=True,
        prefix=prefix,
    )


def _heads(sizes: Sizes, given: int | None) -> tuple[tuple[int, ...], int]:
    """Of each level and in the middle: the given number, or that of the published size."""
    if given is not None:
        return tuple(given * a for a in sizes.attention), given * sizes.middle
    for size in unet.SIZES.values():
        same_levels = tuple(bool(n) for n in size["heads"]) == sizes.attention
        if (
            (size["widths"], size["layers"]) == (sizes.widths, sizes.layers)
            and same_levels
            and bool(size["middle_heads"]) == sizes.middle
        ):
            return size["heads"], size["middle_heads"]
    raise CheckpointError(
        f"the number of heads is not in the file, and widths {sizes.widths} with {sizes.layers} "
        "blocks a level are none of the published sizes; give --num-heads N"
    )


def compvis(
    family: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], heads: int | None
) -> Conversion:
    """The conversion of the U-Net in a whole checkpoint of CompVis' program.

    Everything else in it is left out: autoencoder, text encoder, a second, averaged copy of the
    weights (T-Stitch's published sampling takes the first), and the tables of the schedule. The
    embedding of classes, if there is one, belongs to the network.
    """
    prefix = WITHIN if any(name.startswith(WITHIN) for name in tensors) else f"model.{WITHIN}"
    _refuse_others(tensors, prefix)
    sizes = _compvis_sizes(tensors, prefix)
    return _conversion(sizes, tensors, _heads(sizes, heads), None, 32, "eps", None)


LAYOUTS = (
    Layout(
        "diffusers' U-Net",
        ("unet",),
        r"(down_blocks|up_blocks|mid_block|time_embedding|conv_norm_out)\..*",
        diffusers,
        part="unet",
    ),
    Layout(
        "CompVis' latent diffusion",
        ("unet",),
        r"(model\.)?diffusion_model\.(input_blocks|middle_block|output_blocks)\..*",
        compvis,
        part="unet",
    ),
)
