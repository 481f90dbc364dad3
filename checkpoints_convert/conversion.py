"""From a foreign checkpoint to a network folder."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from flax.traverse_util import unflatten_dict
from tqdm import tqdm

from checkpoints_convert import lora, readers, rules
from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.family import Conversion, Layout
from checkpoints_convert.rules import Tensor
from tstitch_jax.core.checks import unknown
from tstitch_jax.models.build import (
    check_card,
    complete,
    fit_tokenizer,
    flatten,
    module_of,
    takes_texts,
)
from tstitch_jax.models.cards import BaseCard, Card
from tstitch_jax.models.families import FAMILIES, imported
from tstitch_jax.models.measure import param_shapes
from tstitch_jax.models.store import check_place, check_space, fill_folder, replace_folder
from tstitch_jax.models.tokenizer import read_tokenizer


def layouts() -> list[Layout]:
    """The layouts of all registered families."""
    own = (family.layouts for family in FAMILIES.values() if family.layouts)
    return [layout for name in own for layout in imported(name)]


def families() -> dict[str, str]:
    """The kinds of networks that ``convert`` knows, and the part of a pipeline that holds each."""
    return {name: layout.part for layout in layouts() for name in layout.families}


def _layout(source: Path, tensors: Mapping[str, Tensor], family: str | None) -> tuple[Layout, str]:
    """The layout whose names fit most tensors, and the family.

    A whole checkpoint holds networks of several families, so a family that is given goes first.
    """
    known = layouts()
    fits = [sum(bool(re.fullmatch(each.names, n)) for n in tensors) for each in known]
    own = [n if family in each.families else 0 for n, each in zip(fits, known, strict=True)]
    best = known[own.index(max(own)) if any(own) else fits.index(max(fits))]
    if not max(fits):
        raise CheckpointError(
            f"no known network has tensors such as {', '.join(sorted(tensors)[:3])}; known: "
            + ", ".join(each.name for each in known)
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
        family: A kind of network, such as ``"dit"`` (see ``families``); unless given it follows
            from the tensors' names, where a SiT, which has a DiT's names, counts as a DiT, and a
            checkpoint of several networks as its largest.
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
            lists every missing, unexpected and misshapen tensor.
        ValueError: If there is something else at ``out``, or the family is unknown.
        OSError: If it cannot be written.
    """
    source, out = Path(source), epath.Path(out)
    parts = families()
    if family is not None and family not in parts:
        raise unknown("family", family, parts)
    check_place(out)
    if (out / "card.json").exists() and not force:
        raise CheckpointError(f"{out} exists; --force replaces it")
    inside = source / parts.get(family or "", "")
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
        if takes_texts(conversion.card):
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
            name=name or os.path.basename(os.path.abspath(os.fspath(out))),
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
