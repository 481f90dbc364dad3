"""``tstitch networks``, ``convert`` and ``train``."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tstitch_jax.cli.text import count, load_config, table
from tstitch_jax.models.cards import BaseCard, Card

if TYPE_CHECKING:
    from tstitch_jax.models.types import Network


def networks_command(arguments: argparse.Namespace) -> None:
    from tstitch_jax.hub import catalog, download, resolve
    from tstitch_jax.models import store

    known: dict[str, BaseCard | catalog.CatalogEntry] = {
        name: store.read_card(resolve.resolve(name)) for name in resolve.embedded_names()
    }
    known |= catalog.PUBLIC
    rows = []
    for name, card in known.items():
        where = "here" if isinstance(card, BaseCard) or download.is_cached(name) else "download"
        classes = str(getattr(card, "num_classes", 0) or "-")
        shape = "x".join(map(str, getattr(card, "image_shape", ()))) or "text"
        rows.append(
            [name, count(card.num_params), count(card.macs), shape, classes, where,
             card.license, card.source, card.data]
        )  # fmt: skip
    header = ["network", "parameters", "FLOPs", "input", "classes", "where", "license", "source",
              "data"]  # fmt: skip
    print(table(header, rows))
    print(
        "\nFLOPs: multiply-adds of one forward pass of one input, as the DiT paper counts them."
        "\nWhat is not here is downloaded and converted when it is first used, into "
        f"{download.cache_folder()}."
    )


def _lora(values: list[str]) -> tuple[str, float]:
    """A file and its weight."""
    try:
        file, weight = values if len(values) > 1 else (*values, "1")
        return file, float(weight)
    except ValueError:
        raise ValueError(f"--lora takes FILE and WEIGHT, got {' '.join(values)}") from None


def convert_command(arguments: argparse.Namespace) -> None:
    from checkpoints_convert import convert

    loras = [_lora(values) for values in arguments.lora]
    card = convert(
        arguments.source,
        arguments.out,
        family=arguments.family,
        num_heads=arguments.num_heads,
        tokenizer=arguments.tokenizer,
        loras=loras,
        license=arguments.license,
        force=arguments.force,
    )
    config = ", ".join(f"{k} {v}" for k, v in card.config.items())
    print(f"{card.architecture}: {config}")
    if isinstance(card, Card):
        shape = "x".join(map(str, card.image_shape))
        of = f"{card.num_classes} classes"
        if card.context is not None:
            of = f"contexts of {card.text_encoder or 'width ' + str(card.context[1])}"
        print(
            f"{shape} inputs, {of}, target {card.target}, schedule "
            f"{card.schedule['name']}, guidance on {card.guidance_channels or 'all'} channels, "
            f"latents of {card.autoencoder or 'no autoencoder'}"
        )
        if card.config.get("variant") == "dit":
            print("A SiT has the same tensors: if it is one, give --family sit.")
    print(f"{count(card.num_params)} parameters, SHA-256 {card.source_checksum}\n{arguments.out}")


def _load_config(path: str) -> Any:
    """The ``config`` of a Python file."""
    from tstitch_jax.training import ClassifierConfig, TrainConfig

    return load_config(path, TrainConfig, ClassifierConfig)


def _preview(steps: int = 50, rows: int = 4) -> Callable[[Network, Path], None]:
    """A hook that draws a few images of each class."""

    def preview(network: Network, path: Path) -> None:
        import jax
        import numpy as np

        from tstitch_jax.report import pictures
        from tstitch_jax.sampling import sampler

        card = network.card
        if card.autoencoder or card.image_shape[2] not in (1, 3):
            return
        labels = list(range(min(card.num_classes, 10)))
        images = sampler.sample(jax.random.key(0), [network], labels=labels * rows, steps=steps)
        picture = pictures.grid(
            np.asarray(images).reshape(rows, len(labels), *card.image_shape),
            [""] * rows,
            [card.class_names[k] if card.class_names else str(k) for k in labels],
            title=f"{card.name}, {path.stem}",
        )
        pictures.write_png(picture, path)

    return preview


def train_command(arguments: argparse.Namespace) -> None:
    from tstitch_jax.training import train

    config = _load_config(arguments.config)
    changes = {k: getattr(arguments, k) for k in ("data", "steps") if getattr(arguments, k)}
    config = dataclasses.replace(config, **changes)
    out = arguments.out or f"runs/{config.card.name}"
    preview = _preview() if isinstance(config.card, Card) else None
    network = train(config, out, preview=preview)
    print(f"{network.card.name}: {count(network.card.num_params)} parameters in {out}/network")
