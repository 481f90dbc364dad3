"""Autoencoders: diffusers' ``AutoencoderKL``, two generations of it, and ``VQModel``; CompVis'."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.family import SIDE, Conversion, Layout, check_config, count, shape_of
from checkpoints_convert.rules import Rule, Tensor, conv, layer, norm_layer, same
from tstitch_jax.core.checks import shown
from tstitch_jax.models.cards import AutoencoderCard

SCALING_FACTOR = 0.18215
"""Of Stable Diffusion's autoencoder, where the checkpoint does not say it (Rombach et al. 2022)."""

CODEBOOK = "quantize.embedding.weight"
"""What a VQ autoencoder has beside. Without a ``config.json`` its latents are not scaled."""


class Names(NamedTuple):
    """The names of a layout; ``{i}`` is the level from full resolution, ``{r}`` from the lowest."""

    down: str
    downsample: str
    up: str
    upsample: str
    middle: tuple[str, str]
    attention: str
    down_attention: str
    up_attention: str
    projections: tuple[str, str, str, str, str]  # norm, query, key, value, out
    norm_out: str
    shortcut: str
    prefix: str = ""


DIFFUSERS = Names(
    down="down_blocks.{i}.resnets.{j}",
    downsample="down_blocks.{i}.downsamplers.0.conv",
    up="up_blocks.{r}.resnets.{j}",
    upsample="up_blocks.{r}.upsamplers.0.conv",
    middle=("mid_block.resnets.0", "mid_block.resnets.1"),
    attention="mid_block.attentions.0",
    down_attention="down_blocks.{i}.attentions.{j}",
    up_attention="up_blocks.{r}.attentions.{j}",
    projections=("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
    norm_out="conv_norm_out",
    shortcut="conv_shortcut",
)
OLDER = DIFFUSERS._replace(projections=("group_norm", "query", "key", "value", "proj_attn"))
COMPVIS = Names(
    down="down.{i}.block.{j}",
    downsample="down.{i}.downsample.conv",
    up="up.{i}.block.{j}",
    upsample="up.{i}.upsample.conv",
    middle=("mid.block_1", "mid.block_2"),
    attention="mid.attn_1",
    down_attention="down.{i}.attn.{j}",
    up_attention="up.{i}.attn.{j}",
    projections=("norm", "q", "k", "v", "proj_out"),
    norm_out="norm_out",
    shortcut="nin_shortcut",
)
STABLE_DIFFUSION = [128, 256, 512, 512]
"""The widths of the one autoencoder that is known without its ``config.json``."""

WITHIN = "first_stage_model."
"""Where a whole latent diffusion checkpoint keeps its autoencoder."""


def _resnet(target: str, source: str, names: Names, changes_width: bool) -> Iterator[Rule]:
    for i in (1, 2):
        yield from norm_layer(f"{target}/norm{i}", f"{source}.norm{i}")
        yield from layer(f"{target}/conv{i}", f"{source}.conv{i}", transform=conv)
    if changes_width:
        yield from layer(f"{target}/shortcut", f"{source}.{names.shortcut}")


def _attention(target: str, source: str, names: Names) -> Iterator[Rule]:
    yield from norm_layer(f"{target}/norm", f"{source}.{names.projections[0]}")
    for to, name in zip(("q", "k", "v", "out"), names.projections[1:], strict=True):
        yield from layer(f"{target}/{to}", f"{source}.{name}")


def _half(
    half: str, names: Names, widths: tuple[int, ...], layers: int, attention: tuple[int, ...]
) -> Iterator[Rule]:
    """The encoder's or the decoder's rules."""
    root, last = f"{names.prefix}{half}", len(widths) - 1
    yield from layer(f"{half}/conv_in", f"{root}.conv_in", transform=conv)
    for i, width in enumerate(widths):
        if half == "encoder":
            blocks, block, attend = layers, names.down, names.down_attention
            resize = names.downsample
            before, resized = widths[max(i - 1, 0)], "down" if i < last else ""
        else:
            blocks, block, attend = layers + 1, names.up, names.up_attention
            resize = names.upsample
            before, resized = widths[min(i + 1, last)], "up" if i else ""
        for j in range(blocks):
            source = f"{root}.{block.format(i=i, r=last - i, j=j)}"
            yield from _resnet(
                f"{half}/level_{i}_resnet_{j}", source, names, j == 0 and before != width
            )
            if i in attention:
                source = f"{root}.{attend.format(i=i, r=last - i, j=j)}"
                yield from _attention(f"{half}/level_{i}_attention_{j}", source, names)
        if resized:
            source = f"{root}.{resize.format(i=i, r=last - i)}"
            yield from layer(f"{half}/level_{i}_{resized}", source, transform=conv)
    for j, source in enumerate(names.middle):
        yield from _resnet(f"{half}/middle/resnet_{j}", f"{root}.{source}", names, False)
    yield from _attention(f"{half}/middle/attention", f"{root}.{names.attention}", names)
    yield from norm_layer(f"{half}/norm_out", f"{root}.{names.norm_out}")
    yield from layer(f"{half}/conv_out", f"{root}.conv_out", transform=conv)


def _convert(
    names: Names, tensors: Mapping[str, Tensor], config: Mapping[str, Any], ignored: tuple[str, ...]
) -> Conversion:
    root = f"{names.prefix}encoder."
    before = re.escape(root + names.down.split("{i}")[0])
    levels = count(tensors, before + r"(\d{1,6})\.")
    blocks = re.escape(root + names.down.split("{j}")[0].format(i=0))
    layers = count(tensors, blocks + r"(\d{1,6})\.")
    widths = tuple(
        shape_of(tensors, root + names.down.format(i=i, j=0) + ".conv1.weight", 4)[0]
        for i in range(max(levels, 1))
    )
    outputs = shape_of(tensors, f"{names.prefix}quant_conv.weight", 4)[0]
    table = f"{names.prefix}{CODEBOOK}"
    codebook = shape_of(tensors, table, 2)[0] if table in tensors else 0
    channels = outputs if codebook else outputs // 2
    norm = names.projections[0]
    attention = tuple(
        i
        for i in range(levels)
        if f"{root}{names.down_attention.format(i=i, j=0)}.{norm}.weight" in tensors
    )

    def blocks_of(kind: str, half: str) -> list[str]:
        return [f"{'Attn' * (i in attention)}{kind}{half}Block2D" for i in range(levels)]

    vq = {"num_vq_embeddings": codebook, "vq_embed_dim": (None, channels),
          "lookup_from_codebook": False, "norm_type": "group"} if codebook else {}  # fmt: skip
    colours = shape_of(tensors, f"{root}conv_in.weight", 4)[1]
    check_config(
        config,
        {
            "_class_name": "VQModel" if codebook else "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": list(widths),
            "down_block_types": blocks_of("Down", "Encoder"),
            "in_channels": colours,
            "latent_channels": channels,
            "latents_mean": None,
            "latents_std": None,
            "layers_per_block": layers,
            "mid_block_add_attention": True,
            "out_channels": colours,
            "shift_factor": None,
            "up_block_types": blocks_of("Up", "Decoder")[::-1],
            "use_post_quant_conv": True,
            "use_quant_conv": True,
            **vq,
        },
        {"sample_size": SIDE, "norm_num_groups": max(widths)},
    )
    usual = 1.0 if codebook and not config else SCALING_FACTOR
    side, scale = config.get("sample_size", 256), config.get("scaling_factor", usual)
    if side % 2 ** (len(widths) - 1):
        raise CheckpointError(
            f"config.json: sample_size is {side}, expected a multiple of {2 ** (len(widths) - 1)}"
        )
    if type(scale) not in (int, float) or not 1e-6 < scale < 1e6:
        raise CheckpointError(f"config.json: scaling_factor is {shown(scale)}, expected about 0.18")
    card = AutoencoderCard(
        name="",
        architecture="autoencoder",
        config={
            "widths": list(widths),
            "layers": layers,
            "latent_channels": channels,
            "groups": config.get("norm_num_groups", 32),
        }
        | ({"attention": list(attention)} if attention else {})
        | ({"codebook": codebook} if codebook else {}),
        image_shape=(side, side, colours),
        scaling_factor=float(scale),
    )
    rules = [
        rule
        for half in ("encoder", "decoder")
        for rule in _half(half, names, widths, layers, attention)
    ]
    if codebook:
        rules.append(Rule("quantize/vectors", (table,), same))
    rules += [*layer("quant", f"{names.prefix}quant_conv"),
              *layer("post_quant", f"{names.prefix}post_quant_conv")]  # fmt: skip
    return Conversion(card, rules, ignored)


def diffusers(
    family: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], heads: int | None
) -> Conversion:
    """The conversion of diffusers' ``AutoencoderKL``, with or without its ``config.json``, and of
    its ``VQModel``, which needs it."""
    older = f"encoder.{OLDER.attention}.query.weight" in tensors
    conversion = _convert(OLDER if older else DIFFUSERS, tensors, config, ())
    ours = conversion.card.config
    if not config and (ours["widths"] != STABLE_DIFFUSION or "codebook" in ours):
        raise CheckpointError(
            "config.json is missing beside the weights, and says how many groups the norms have; "
            "give the folder that holds both"
        )
    return conversion


def compvis(
    family: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], heads: int | None
) -> Conversion:
    """The conversion of CompVis' autoencoder, alone or in a whole latent diffusion checkpoint.

    The rest of the checkpoint, the discriminator and a second, averaged copy are left out.
    """
    prefix = WITHIN if any(name.startswith(WITHIN) for name in tensors) else ""
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")
    ours = tuple(prefix + part for part in parts)
    # Within a whole checkpoint everything else is; of a lone autoencoder only what is known.
    others = ("",) if prefix else ("loss.", "model_ema.")
    ignored = tuple(
        name for name in tensors if not name.startswith(ours) and name.startswith(others)
    )
    ignored += tuple(name for name in tensors if name.startswith(f"{prefix}loss."))
    return _convert(COMPVIS._replace(prefix=prefix), tensors, {}, ignored)


LAYOUTS = (
    Layout(
        "diffusers' autoencoder",
        ("autoencoder",),
        r"(en|de)coder\.(down_blocks|up_blocks|mid_block|conv_norm_out)\..*",
        diffusers,
        part="vae",
    ),
    Layout(
        "CompVis' autoencoder",
        ("autoencoder",),
        r"(first_stage_model\.)?(en|de)coder\.(down|up|mid|norm_out)\..*",
        compvis,
        part="vae",
    ),
)
