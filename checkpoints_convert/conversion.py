"""From a foreign checkpoint to a network folder."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath
from flax.traverse_util import unflatten_dict
from tqdm import tqdm

from checkpoints_convert import autoencoder, clip, dit, inception, lora, readers, rules, unet
from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.family import Conversion
from checkpoints_convert.rules import Tensor
from tstitch_jax.core.checks import unknown
from tstitch_jax.models.build import (
    TAKE_TEXTS,
    check_card,
    complete,
    fit_tokenizer,
    flatten,
    module_of,
)
from tstitch_jax.models.cards import BaseCard, Card
from tstitch_jax.models.families import param_shapes
from tstitch_jax.models.store import check_place, check_space, fill_folder, replace_folder
from tstitch_jax.models.tokenizer import read_tokenizer


class Layout(NamedTuple):
    """A way to name the tensors of a network.

    Attributes:
        name: What it is called in messages.
        families: The families that use it, the first one if none is given.
        names: What all its tensors' names match.
        convert: ``(family, tensors, config, num_heads) -> Conversion``.
    """

    name: str
    families: tuple[str, ...]
    names: str
    convert: Callable[[str, Mapping[str, Tensor], Mapping[str, Any], int | None], Conversion]


LAYOUTS = (
    Layout(
        "the published DiT and SiT",
        ("dit", "sit"),
        r"pos_embed|(x_embedder|t_embedder|y_embedder|final_layer|blocks\.\d+)\.\w.*",
        dit.published,
    ),
    Layout(
        "diffusers' DiT",
        ("dit",),
        r"(pos_embed\.proj|proj_out_[12]|transformer_blocks\.\d+)\.\w.*",
        dit.diffusers,
    ),
    Layout(
        "diffusers' U-Net",
        ("unet",),
        r"(down_blocks|up_blocks|mid_block|time_embedding|conv_norm_out)\..*",
        unet.diffusers,
    ),
    Layout(
        "CompVis' latent diffusion",
        ("unet",),
        r"(model\.)?diffusion_model\.(input_blocks|middle_block|output_blocks)\..*",
        unet.compvis,
    ),
    Layout(
        "diffusers' autoencoder",
        ("autoencoder",),
        r"(en|de)coder\.(down_blocks|up_blocks|mid_block|conv_norm_out)\..*",
        autoencoder.diffusers,
    ),
    Layout(
        "CompVis' autoencoder",
        ("autoencoder",),
        r"(first_stage_model\.)?(en|de)coder\.(down|up|mid|norm_out)\..*",
        autoencoder.compvis,
    ),
    Layout(
        "pytorch-fid's Inception",
        ("inception",),
        r"(Conv2d_\d\w|Mixed_\d\w)\..*|fc\.(weight|bias)",
        inception.published,
    ),
    Layout(
        "CLIP's text tower",
        ("text_encoder",),
        clip.TEXT,
        clip.text_encoder,
    ),
    Layout(
        "CLIP",
        ("clip",),
        rf"{clip.TEXT}|(vision_model|visual_projection|text_projection)\..*|logit_scale",
        clip.whole,
    ),
    Layout(
        "OpenCLIP's text tower, of Stable Diffusion 2 and XL",
        ("text_encoder",),
        r"(cond_stage_model|conditioner\.embedders\.\d)\.(model\.)?transformer\.resblocks\..*"
        r"|cond_stage_model\.model\..*",
        clip.refuse,
    ),
)

FAMILIES = ("dit", "sit", "unet", "autoencoder", "text_encoder", "clip", "inception")
"""Kinds of networks that ``convert`` knows."""

PARTS = {"unet": "unet", "autoencoder": "vae", "text_encoder": "text_encoder"}
"""Where a pipeline's folder of diffusers keeps the network of a family."""


def _layout(source: Path, tensors: Mapping[str, Tensor], family: str | None) -> tuple[Layout, str]:
    """The layout whose names fit most tensors, and the family.

    A whole checkpoint holds networks of several families, so a family that is given goes first.
    """
    fits = [sum(bool(re.fullmatch(each.names, n)) for n in tensors) for each in LAYOUTS]
    own = [n if family in each.families else 0 for n, each in zip(fits, LAYOUTS, strict=True)]
    best = LAYOUTS[own.index(max(own)) if any(own) else fits.index(max(fits))]
    if not max(fits):
        raise CheckpointError(
            f"no known network has tensors such as {', '.join(sorted(tensors)[:3])}; known: "
            + ", ".join(each.name for each in LAYOUTS)
        )
    if family is None:
        if "sit" in best.families and re.search(r"(?i)(?<![a-z])sit(?![a-z])", source.name):
            raise CheckpointError(
                "DiT and SiT have the same tensors, and the name says SiT; "
                "give --family sit or --family dit"
            )
        return best, best.families[0]
    if family not in best.families:
        raise CheckpointError(
            f"the tensors are those of {best.name} (--family {' or '.join(best.families)}), "
            f"not of {family}"
        )
    return best, family


def _tokenizer(source: Path, given: str | os.PathLike[str] | None) -> dict[str, bytes]:
    """The files of a checkpoint's tokenizer: the given one, its own, or the one beside it."""
    if given is not None:
        return read_tokenizer(Path(given))
    own = (source if source.is_dir() else source.parent).absolute()
    places = (own, own.parent / "tokenizer") if own.name else (own,)
    for place in places:
        try:
            return read_tokenizer(place)
        except ValueError:
            continue
    raise CheckpointError(
        f"there is no tokenizer in {' or '.join(map(str, places))}; give the folder of one (vocab."
        "json and merges.txt, or tokenizer.json) with --tokenizer, such as the folder tokenizer of "
        "CompVis/stable-diffusion-v1-4 on the Hugging Face hub"
    )


def _merged(
    conversion: Conversion,
    kind: str,
    tensors: Mapping[str, Tensor],
    loras: Sequence[tuple[str | os.PathLike[str], float]],
) -> tuple[Mapping[str, Tensor], list[Path]]:
    """The tensors with the LoRA files in them, and these files."""
    if loras and not conversion.lora_names:
        raise CheckpointError(f"LoRA files change text encoders and U-Nets, not {kind} networks")
    files = []
    for path, weight in loras:
        tensors, file = lora.merge(tensors, Path(path), weight, kind, conversion.lora_names)
        files.append(file)
    return tensors, files


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    family: str | None = None,
    num_heads: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    loras: Sequence[tuple[str | os.PathLike[str], float]] = (),
    name: str | None = None,
    source_name: str | None = None,
    text_encoder: str = "",
    license: str = "",
    data: str = "",
    force: bool = False,
) -> BaseCard:
    """Converts a checkpoint to a network folder that ``tstitch_jax.load`` takes.

    Args:
        source: A torch file (``.pt``, ``.pth``, ``.ckpt``, ``.bin``), a ``.safetensors`` file, an
            index of several (``*.index.json``), the folder of a network of diffusers or
            transformers, or, with a family, that of a whole pipeline. Nothing in it is run.
        out: The folder to write. It is whole or absent afterwards.
        family: One of ``FAMILIES``; told from the tensors' names otherwise, where a SiT, which has
            a DiT's names, counts as a DiT, and a checkpoint of several networks as its largest.
        num_heads: Number of attention heads, where the network is of no published size.
        tokenizer: The folder of a text encoder's tokenizer; by default the checkpoint's own, or
            ``tokenizer`` beside it.
        loras: LoRA files for a U-Net or a text encoder, each with the weight that it is merged
            with; 1 is as it was trained.
        name: The network's name; that of ``out`` by default.
        source_name: Where the checkpoint comes from; its file name by default.
        text_encoder: The name of what makes a U-Net's contexts, where it is not the usual one.
        license, data: What the card says of them.
        force: Whether to replace a network folder that is there.

    Returns:
        The card that was written.

    Raises:
        CheckpointError: If the checkpoint cannot be read, or is no network that is known here;
            lists every missing, superfluous and misshapen tensor.
        ValueError: If there is something else at ``out``, or the family is unknown.
        OSError: If it cannot be written.
    """
    source, out = Path(source), epath.Path(out)
    if family is not None and family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    check_place(out)
    if (out / "card.json").exists() and not force:
        raise CheckpointError(f"{out} exists; --force replaces it")
    inside = source / PARTS.get(family or "", "")
    place = inside if (inside / "config.json").is_file() else source
    found = readers.read(place)

    def build(folder: epath.Path) -> BaseCard:
        layout, kind = _layout(source, found.tensors, family)
        if num_heads is not None and kind == "autoencoder":
            raise CheckpointError("an autoencoder has one attention head; leave out --num-heads")
        conversion = layout.convert(kind, found.tensors, found.config, num_heads)
        if isinstance(conversion.card, Card):
            check_card(conversion.card)
        module = module_of(conversion.card)
        files: dict[str, bytes] | None = None
        settings: dict[str, Any] = {}
        if conversion.card.architecture in TAKE_TEXTS:
            files = _tokenizer(place, tokenizer)
            settings = dict(tokenizer_checksum=fit_tokenizer(files, module)[1])
        elif tokenizer is not None:
            raise CheckpointError(f"the network of {layout.name} has no tokenizer; leave it out")
        if text_encoder and getattr(conversion.card, "context", None) is not None:
            settings["text_encoder"] = text_encoder
        expected = {k: tuple(v.shape) for k, v in flatten(param_shapes(module)).items()}
        rules.check(conversion.rules, found.tensors, expected, conversion.ignored)
        conversion.check()
        tensors, read = _merged(conversion, kind, found.tensors, loras)
        size = 4 * sum(map(math.prod, expected.values()))
        bar = tqdm(total=size, desc="converting", unit="B", unit_scale=True, disable=None)
        check_space(folder, size)  # before the work
        with bar:
            params = rules.fill(conversion.rules, tensors, bar.update)
            source_checksum = readers.checksum((*found.files, *read))
        tree = unflatten_dict(params, sep="/")
        card = dataclasses.replace(
            conversion.card,
            name=name or out.absolute().name,
            source=" + ".join(
                [source.name if source_name is None else source_name]
                + [f"{weight:g} {file.name}" for file, (_, weight) in zip(read, loras, strict=True)]
            ),
            source_checksum=source_checksum,
            license=license,
            data=data,
            **settings,
        )
        card = complete(card, module, tree)
        fill_folder(folder, card, tree, files)
        return card

    try:
        return replace_folder(out, build)
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{source}: {error}") from error
