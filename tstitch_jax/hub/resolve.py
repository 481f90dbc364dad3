"""Networks by name: embedded, public ones downloaded and converted once, or a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from tstitch_jax.core.checks import unknown
from tstitch_jax.hub.catalog import PUBLIC, known, public, short_name
from tstitch_jax.hub.download import download, network_folder
from tstitch_jax.models import store

EMBEDDED = Path(__file__).parents[1] / "embedded"
"""Folder of the networks that come with the package."""


def fetch(name: str) -> Path:
    """The folder of a public network in the cache; the first time downloads and converts it.

    Raises:
        ValueError: As ``download``, or if the file cannot be converted.
        OSError: If the disk is full.
    """
    from filelock import FileLock

    if (network_folder(name) / "card.json").exists():
        return network_folder(name)
    name = short_name(name)
    entry, out = known(name), network_folder(name)
    card = out / "card.json"
    if card.exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.parent / f".{out.name}.lock"):
        if card.exists():  # another process was faster
            return out
        from checkpoints_convert import convert

        source = download(name)
        try:
            convert(
                source,
                out,
                family=entry.family,
                name=name,
                source_name=entry.source,
                text_encoder=entry.text_encoder,
                license=entry.license,
                data=entry.data,
            )
        except ValueError as error:
            if entry.repo:  # the hub's client checked its size
                raise
            raise ValueError(f"{error}; delete {source} to download {name} again") from error
        if entry.url:  # the rest is in the cache of the hub's client
            source.unlink()
    return out


def embedded_names() -> list[str]:
    """Names of the networks that come with the package."""
    return sorted(card.parent.name for card in EMBEDDED.glob("*/card.json"))


def find(name: str | os.PathLike[str]) -> Path:
    """The folder of an embedded network, of a path, or of a public network, in this order.

    A name with a slash is that of a repository on the hub, unless a folder here begins so.

    Raises:
        ValueError: If there is none of them (says the near names), or a public network cannot be
            downloaded or converted.
        OSError: If the disk is full.
    """
    text = str(name)
    for embedded in (text, f"{text}-features"):
        if embedded in embedded_names():
            return EMBEDDED / embedded
    if Path(name).is_dir():
        return Path(name)
    if text in PUBLIC:
        return fetch(text)
    if Path(name).is_file():
        raise ValueError(f"{name} is a file; tstitch convert {name} OUT makes a network folder")
    # What begins with the name of a folder that is here is a path that is wrong.
    if public(text) is not None and not Path(Path(text).parts[0]).is_dir():
        return fetch(text)
    if os.sep in text:
        raise ValueError(f"no network folder at {name}")
    raise unknown("network", name, [*embedded_names(), *PUBLIC])


def load(
    name: str | os.PathLike[str], dtype: Any = jnp.float32, *, mesh: Mesh | None = None
) -> Any:
    """Loads a network onto the default device, or onto a mesh of them.

    Args:
        name: An embedded name such as ``"fashion-s"`` (``"fashion"`` for the feature network), a
            public name such as ``"dit-xl-2-256"``, or that of a pipeline on the Hugging Face hub
            such as ``"CompVis/stable-diffusion-v1-4"`` (see ``public``), downloaded and converted
            the first time; or the path of a network folder.
        dtype: What the network computes in, float32 or bfloat16; see ``make_network``.
        mesh: From ``ts.make_mesh``; see ``ts.shard``. No device then holds more than its part.

    Returns:
        A ``Network``; an ``Autoencoder``, a ``TextEncoder`` or a ``FeatureNetwork`` where the name
        is of one.

    Raises:
        ValueError: If there is no such network, it cannot be downloaded, or its folder is damaged.
        OSError: If the disk is full.
    """
    return store.load(find(name), dtype, mesh=mesh)
