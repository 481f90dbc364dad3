"""Diffusion Transformers: the published DiT and SiT, and diffusers' DiT."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.family import SIDE, Conversion, Layout, check_config, count, shape_of
from checkpoints_convert.rules import Rule, Tensor, layer, patches, same
from tstitch_jax.models import dit
from tstitch_jax.models.cards import Card

AUTOENCODER = "sd-vae-ft-ema"
"""The published networks' latents are this one's."""


def _published(depth: int) -> Iterator[Rule]:
    yield from layer("patch_in", "x_embedder.proj", transform=patches)
    yield from layer("time_in", "t_embedder.mlp.0")
    yield from layer("time_out", "t_embedder.mlp.2")
    yield Rule("labels/embedding", ("y_embedder.embedding_table.weight",), same)
    for i in range(depth):
        yield from layer(f"block_{i}/modulation", f"blocks.{i}.adaLN_modulation.1")
        yield from layer(f"block_{i}/qkv", f"blocks.{i}.attn.qkv")
        yield from layer(f"block_{i}/attention_out", f"blocks.{i}.attn.proj")
        yield from layer(f"block_{i}/mlp_in", f"blocks.{i}.mlp.fc1")
        yield from layer(f"block_{i}/mlp_out", f"blocks.{i}.mlp.fc2")
    yield from layer("modulation", "final_layer.adaLN_modulation.1")
    yield from layer("patch_out", "final_layer.linear")


def _velocity(patch: int, channels: int) -> Iterator[Rule]:
    """SiT's last layer: without the half of a learned variance, which is never used, and negated,
    since it says x0 - eps and this library's flow target is eps - x0."""

    def half(weight: np.ndarray) -> np.ndarray:
        rows = weight.reshape(patch**2, -1, *weight.shape[1:])[:, :channels]
        return -rows.reshape(-1, *weight.shape[1:]).T

    yield from (Rule(rule.target, rule.sources, half)
                for rule in layer("patch_out", "final_layer.linear"))  # fmt: skip


EMBEDDERS = {
    "time_in": "timestep_embedder.linear_1",
    "time_out": "timestep_embedder.linear_2",
}
TABLE = "class_embedder.embedding_table.weight"


def _diffusers(depth: int, shared: bool) -> Iterator[Rule]:
    """With one embedder for all blocks, the first one's, or one for each."""
    yield from layer("patch_in", "pos_embed.proj", transform=patches)
    for i in range(1 if shared else depth):
        prefix = "" if shared else f"block_{i}_"
        source = f"transformer_blocks.{i}.norm1.emb"
        for target, name in EMBEDDERS.items():
            yield from layer(f"{prefix}{target}", f"{source}.{name}")
        yield Rule(f"{prefix}labels/embedding", (f"{source}.{TABLE}",), same)
    for i in range(depth):
        source = f"transformer_blocks.{i}"
        yield from layer(f"block_{i}/modulation", f"{source}.norm1.linear")
        yield from layer(f"block_{i}/qkv", *(f"{source}.attn1.to_{x}" for x in "qkv"))
        yield from layer(f"block_{i}/attention_out", f"{source}.attn1.to_out.0")
        yield from layer(f"block_{i}/mlp_in", f"{source}.ff.net.0.proj")
        yield from layer(f"block_{i}/mlp_out", f"{source}.ff.net.2")
    yield from layer("modulation", "proj_out_1")
    yield from layer("patch_out", "proj_out_2")


def _heads(width: int, depth: int, given: int | None) -> int:
    if given is not None:
        if given < 1 or width % given:
            raise CheckpointError(f"{given} heads do not divide the width of {width}")
        return given
    for size in dit.SIZES.values():
        if (size["width"], size["depth"]) == (width, depth):
            return size["num_heads"]
    raise CheckpointError(
        f"the number of heads is not in the file, and width {width} with depth {depth} is none of "
        "the published sizes; give --num-heads N"
    )


def _card(
    family: str,
    config: dict[str, Any],
    patch_shape: tuple[int, ...],
    side: int,
    classes: int,
    outputs: int,
) -> Card:
    """The card, of the shape of the patch projection's weight and the count of its outputs."""
    channels, patch = patch_shape[1], patch_shape[2]
    kinds = (channels, 2 * channels)
    if outputs % patch**2 or outputs // patch**2 not in kinds:
        raise CheckpointError(
            f"the last layer has {outputs} outputs; {patch}x{patch} patches of {channels} channels "
            f"need {' or '.join(str(k * patch**2) for k in kinds)}"
        )
    flow = family == "sit"
    return Card(
        name="",
        architecture="dit",
        config=config,
        target="flow" if flow else "eps",
        learned_variance=not flow and outputs == 2 * channels * patch**2,
        schedule={"name": "flow" if flow else "linear"},
        image_shape=(side, side, channels),
        num_classes=classes,
        # What the published samplers of both guide, "for exact reproducibility".
        guidance_channels=3 if channels == 4 else None,
        autoencoder=AUTOENCODER if channels == 4 else "",
    )


def published(
    family: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], heads: int | None
) -> Conversion:
    """The conversion of the published programs' keys; ``family`` is ``"dit"`` or ``"sit"``."""
    patch_shape = shape_of(tensors, "x_embedder.proj.weight", 4)
    width, channels, patch = patch_shape[:3]
    depth = count(tensors, r"blocks\.(\d{1,6})\.")
    positions = shape_of(tensors, "pos_embed", 3)
    grid = math.isqrt(positions[1])
    if grid**2 != positions[1]:
        raise CheckpointError(f"pos_embed has {positions[1]} places, which is no square")
    outputs = shape_of(tensors, "final_layer.linear.weight", 2)[0]
    card = _card(
        family,
        {
            "width": width,
            "depth": depth,
            "num_heads": _heads(width, depth, heads),
            "patch": patch,
            "mlp_ratio": shape_of(tensors, "blocks.0.mlp.fc1.weight", 2)[0] / width,
            "variant": family,
        },
        patch_shape,
        grid * patch,
        shape_of(tensors, "y_embedder.embedding_table.weight", 2)[0] - 1,
        outputs,
    )
    rules = list(_published(depth))
    if family == "sit":
        rules[-2:] = _velocity(patch, channels)

    def check_positions() -> None:
        given = tensors["pos_embed"]
        found = np.asarray(given.read(), np.float32)
        code = dit.position_code(grid, grid, width) if width % 4 == 0 else np.empty(0)
        rounding = max(1e-4, float(ml_dtypes.finfo(given.dtype).eps))
        if found.shape[1:] != code.shape or not np.allclose(found[0], code, atol=rounding):
            raise CheckpointError(
                "pos_embed is not the fixed code of sines and cosines, the only one known here"
            )

    return Conversion(card, rules, ("pos_embed",), check_positions)


def diffusers(
    family: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], heads: int | None
) -> Conversion:
    """The conversion of diffusers' ``DiTTransformer2DModel``; its ``config.json`` is needed."""
    if not config:
        raise CheckpointError(
            "config.json is missing beside the weights; give the folder that holds both"
        )
    patch_shape = shape_of(tensors, "pos_embed.proj.weight", 4)
    width, _, patch = patch_shape[:3]
    depth = count(tensors, r"transformer_blocks\.(\d{1,6})\.")
    check_config(
        config,
        {
            "_class_name": ("DiTTransformer2DModel", "Transformer2DModel"),
            "norm_type": "ada_norm_zero",
            "activation_fn": "gelu-approximate",
            "norm_eps": 1e-5,
            "norm_elementwise_affine": False,
            "attention_bias": True,
            "num_layers": depth,
            "patch_size": patch,
            "in_channels": patch_shape[1],
        },
        {"sample_size": SIDE, "num_attention_heads": width},
    )
    said = config.get("num_attention_heads")
    if heads is not None and said not in (None, heads):
        raise CheckpointError(f"config.json says {said} heads, not {heads}; leave out --num-heads")
    side = config.get("sample_size", 0)
    if not side or side % patch:
        raise CheckpointError(f"config.json: sample_size is {side}, expected a multiple of {patch}")
    embedders = [
        name
        for i in range(depth)
        for name in tensors
        if name.startswith(f"transformer_blocks.{i}.norm1.emb.")
    ]
    # Of a single block there is nothing to compare: it is read as diffusers computes it.
    shared = depth > 1 and all(_equal(tensors, name) for name in embedders)
    card = _card(
        family,
        {
            "width": width,
            "depth": depth,
            "num_heads": _heads(width, depth, heads or said),
            "patch": patch,
            "mlp_ratio": shape_of(tensors, "transformer_blocks.0.ff.net.0.proj.weight", 2)[0]
            / width,
            "variant": "dit" if shared else "diffusers",
        },
        patch_shape,
        side,
        shape_of(tensors, f"transformer_blocks.0.norm1.emb.{TABLE}", 2)[0] - 1,
        shape_of(tensors, "proj_out_2.weight", 2)[0],
    )
    copies = [n for n in embedders if not n.startswith("transformer_blocks.0.")] if shared else []
    return Conversion(card, list(_diffusers(depth, shared)), tuple(copies))


def _equal(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether a block's embedder is that of the first block.

    It is where published weights were brought to this layout, since there all blocks share one;
    networks trained in this layout grow one for each block.
    """
    _, _, rest = name.split(".", 2)
    first = tensors.get(f"transformer_blocks.0.{rest}")
    if first is None or first.shape != tensors[name].shape:
        return False
    return np.array_equal(first.read(), tensors[name].read())


LAYOUTS = (
    Layout(
        "the published DiT and SiT",
        ("dit", "sit"),
        r"pos_embed|(x_embedder|t_embedder|y_embedder|final_layer|blocks\.\d+)\.\w.*",
        published,
    ),
    Layout(
        "diffusers' DiT",
        ("dit",),
        r"(pos_embed\.proj|proj_out_[12]|transformer_blocks\.\d+)\.\w.*",
        diffusers,
    ),
)
