"""CLIP as transformers names it: both towers, or that of texts, alone or in Stable Diffusion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.family import Conversion, Layout, check_config, count, shape_of
from checkpoints_convert.rules import Rule, Tensor, layer, linear, norm_layer, patches, same
from tstitch_jax.core.checks import shown
from tstitch_jax.models.cards import FeatureCard, TextEncoderCard
from tstitch_jax.models.clip import ACTIVATIONS

WITHIN = "cond_stage_model.transformer."
"""Where a whole Stable Diffusion checkpoint keeps its text tower."""

TEXT = (
    r"(cond_stage_model\.transformer\.)?(text_model\.)?"
    r"(embeddings\.(token|position)_embedding|encoder\.layers\.\d+|final_layer_norm)\.\w.*"
)
"""What the names of a text tower's tensors match."""

HEAD = 64
"""Width of an attention head in all published networks."""


def _blocks(target: str, source: str, depth: int) -> Iterator[Rule]:
    for i in range(depth):
        ours, theirs = f"{target}block_{i}", f"{source}encoder.layers.{i}"
        yield from norm_layer(f"{ours}/norm1", f"{theirs}.layer_norm1")
        yield from layer(f"{ours}/qkv", *(f"{theirs}.self_attn.{n}_proj" for n in "qkv"))
        yield from layer(f"{ours}/attention_out", f"{theirs}.self_attn.out_proj")
        yield from norm_layer(f"{ours}/norm2", f"{theirs}.layer_norm2")
        yield from layer(f"{ours}/mlp_in", f"{theirs}.mlp.fc1")
        yield from layer(f"{ours}/mlp_out", f"{theirs}.mlp.fc2")


def _size(
    tensors: Mapping[str, Tensor], root: str, config: Mapping[str, Any], heads: int | None,
    expected: Mapping[str, Any], standard: int,
) -> dict[str, Any]:  # fmt: skip
    """The configuration that both towers have.

    Args:
        tensors: The checkpoint.
        root: What the tower's names begin with.
        config: What is said of it; empty if nothing is.
        heads: Number of attention heads, if it is given.
        expected: What else must be said of it, if anything is.
        standard: Number of heads that a configuration means which does not say it.
    """
    depth = count(tensors, root.replace(".", r"\.") + r"encoder\.layers\.(\d{1,6})\.")
    if not depth:
        raise CheckpointError(f"missing: {root}encoder.layers.*, the blocks")
    mlp, width = shape_of(tensors, f"{root}encoder.layers.0.mlp.fc1.weight", 2)
    expected = {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": depth,
        "layer_norm_eps": 1e-5,
        "hidden_act": tuple(ACTIVATIONS),
    } | dict(expected)
    check_config(config, expected, {"num_attention_heads": width})
    said = config.get("num_attention_heads", standard) if config else None
    if heads is not None and said is not None and heads != said:
        raise CheckpointError(f"config.json: num_attention_heads is {said}, --num-heads {heads}")
    if heads is None and said is None and width % HEAD:
        raise CheckpointError(
            f"a width of {width} does not tell the number of attention heads; give --num-heads"
        )
    return {
        "width": width,
        "depth": depth,
        "num_heads": heads or said or width // HEAD,
        "mlp_width": mlp,
        "activation": config.get("hidden_act", "quick_gelu"),
    }


def _text(
    tensors: Mapping[str, Tensor], root: str, config: Mapping[str, Any], heads: int | None
) -> dict[str, Any]:
    """The configuration of a text tower."""
    vocabulary, _ = shape_of(tensors, f"{root}embeddings.token_embedding.weight", 2)
    tokens, _ = shape_of(tensors, f"{root}embeddings.position_embedding.weight", 2)
    expected = {"vocab_size": vocabulary, "max_position_embeddings": tokens}
    size = _size(tensors, root, config, heads, expected, 8)
    return {"vocabulary": vocabulary, "tokens": tokens, **size}


def _text_rules(target: str, root: str, depth: int) -> Iterator[Rule]:
    yield Rule(f"{target}table/embedding", (f"{root}embeddings.token_embedding.weight",), same)
    yield Rule(f"{target}positions", (f"{root}embeddings.position_embedding.weight",), same)
    yield from _blocks(target, root, depth)
    yield from norm_layer(f"{target}norm_out", f"{root}final_layer_norm")


def _image(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The configuration of the image tower, and the side of its images."""
    root = "vision_model."
    kernel = shape_of(tensors, f"{root}embeddings.patch_embedding.weight", 4)
    places, _ = shape_of(tensors, f"{root}embeddings.position_embedding.weight", 2)
    patch, rows = kernel[2], math.isqrt(max(places - 1, 0))
    if rows**2 + 1 != places or kernel[1:] != (3, patch, patch):
        raise CheckpointError(
            f"wrong shape: {places} positions and patches of {kernel[1:]}, expected one more than "
            "a square number, and (3, P, P)"
        )
    expected = {"image_size": rows * patch, "patch_size": patch, "num_channels": 3}
    return {"patch": patch, **_size(tensors, root, config, None, expected, 12)}, rows * patch


def _image_rules(target: str, depth: int) -> Iterator[Rule]:
    root = "vision_model."
    yield Rule(f"{target}whole", (f"{root}embeddings.class_embedding",), same)
    kernel = f"{root}embeddings.patch_embedding.weight"
    yield Rule(f"{target}patch_in/kernel", (kernel,), patches)
    yield Rule(f"{target}positions", (f"{root}embeddings.position_embedding.weight",), same)
    yield from norm_layer(f"{target}norm_in", f"{root}pre_layrnorm")
    yield from _blocks(target, root, depth)
    yield from norm_layer(f"{target}norm_out", f"{root}post_layernorm")


def text_encoder(
    family: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], heads: int | None
) -> Conversion:
    """The conversion of a text tower: of transformers' ``CLIPTextModel``, or within a checkpoint.

    Newer files leave ``text_model.`` out of the names. The positions' numbers, which older ones
    hold, are those of a count, and those of merged checkpoints are often damaged: left out.
    """
    within = WITHIN if any(name.startswith(WITHIN) for name in tensors) else ""
    inner = f"{within}text_model."
    root = inner if any(name.startswith(inner) for name in tensors) else within
    ignored = [n for n in tensors if within and not n.startswith(within)]
    check_config(config, {"model_type": "clip_text_model"})
    size = _text(tensors, root, config, heads)
    card = TextEncoderCard(name="", architecture="clip_text", config=size)
    ignored.append(f"{root}embeddings.position_ids")
    # LoRA files name them with and without what newer files leave out.
    names = {
        before + name.removeprefix(root): name
        for name in tensors
        if name.startswith(root) and name.endswith(".weight")
        for before in ("", "text_model.")
    }
    made = list(_text_rules("", root, size["depth"]))
    return Conversion(card, made, tuple(ignored), lora_names=names)


def whole(
    family: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], heads: int | None
) -> Conversion:
    """The conversion of transformers' ``CLIPModel``, such as ``openai/clip-vit-base-patch32``.

    The scale of its logits, which plays no part in the vectors, is left out.
    """
    if heads is not None:
        raise CheckpointError("the heads of both towers are told by config.json; leave out "
                              "--num-heads")  # fmt: skip
    check_config(config, {"model_type": "clip"})

    def part(name: str) -> Mapping[str, Any]:
        said: dict[str, Any] = {}
        # Older files have a second one, which is the one that is meant.
        for key in (name, f"{name}_dict"):
            found = config.get(key) or {}
            if not isinstance(found, dict):
                raise CheckpointError(f"config.json: {key} is {shown(found)}, expected an object")
            said |= found
        return said

    text = _text(tensors, "text_model.", part("text_config"), None)
    image, side = _image(tensors, part("vision_config"))
    features, _ = shape_of(tensors, "text_projection.weight", 2)
    card = FeatureCard(
        name="",
        architecture="clip",
        config={"text": text, "image": image, "features": features},
        image_shape=(side, side, 3),
        num_classes=0,
    )
    rules = [*_text_rules("text_tower/", "text_model.", text["depth"]),
             *_image_rules("image_tower/", image["depth"]),
             Rule("text_out/kernel", ("text_projection.weight",), linear),
             Rule("image_out/kernel", ("visual_projection.weight",), linear)]  # fmt: skip
    towers = ("text_model", "vision_model")
    ignored = ("logit_scale", *(f"{tower}.embeddings.position_ids" for tower in towers))
    return Conversion(card, rules, ignored)


def refuse(
    family: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], heads: int | None
) -> NoReturn:
    """Raises CheckpointError: the text towers of later generations have another layout."""
    raise CheckpointError(
        "this is OpenCLIP's text tower, of Stable Diffusion 2 or XL; the text towers of Stable "
        "Diffusion 1 (CLIP ViT-L/14) are converted, and those in folders of transformers"
    )


TEXTS = (
    Layout("CLIP's text tower", ("text_encoder",), TEXT, text_encoder, part="text_encoder"),
    Layout(
        "OpenCLIP's text tower, of Stable Diffusion 2 and XL",
        ("text_encoder",),
        r"(cond_stage_model|conditioner\.embedders\.\d)\.(model\.)?transformer\.resblocks\..*"
        r"|cond_stage_model\.model\..*",
        refuse,
        part="text_encoder",
    ),
)

WHOLE = (
    Layout(
        "CLIP",
        ("clip",),
        rf"{TEXT}|(vision_model|visual_projection|text_projection)\..*|logit_scale",
        whole,
    ),
)
