"""Networks by name: embedded, in a folder, or public (downloaded and converted on first use)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from tstitch_jax.core.checks import shown, unknown
from tstitch_jax.hub.catalog import PUBLIC, known, public, short_name
from tstitch_jax.hub.download import download, network_folder
from tstitch_jax.models import store
from tstitch_jax.models.cards import BaseCard

EMBEDDED = Path(__file__).parents[1] / "embedded"
"""Folder of the networks in the package."""


def ensure_converted(name: str) -> Path:
    """The cached folder of a public network, which the first call downloads and converts.

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
        if card.exists():  # converted by another process meanwhile
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
            Path(f"{out}.sha256").unlink(missing_ok=True)  # the file may be the wrong one
            if entry.repo:  # complete: the hub's client checks sizes
                raise
            raise ValueError(f"{error}; delete {source} to download {name} again") from error
        if entry.url:  # other files are in the cache of the hub's client
            source.unlink()
    return out


def embedded_names() -> list[str]:
    """Names of the networks in the package."""
    return sorted(card.parent.name for card in EMBEDDED.glob("*/card.json"))


def resolve(name: str | os.PathLike[str]) -> Path | epath.Path:
    """The folder of an embedded network, of a path, or of a public network, in this order.

    A name with a slash is a repository on the hub, unless its first part is a local folder.

    Raises:
        ValueError: If there is no such network (the error suggests similar names), or a public
            network cannot be downloaded or converted.
        OSError: If the disk is full.
    """
    if not isinstance(name, str | os.PathLike):
        raise ValueError(f"a network is loaded by name or path, got {shown(name)}")
    text = str(name)
    if not text:
        raise ValueError("the name of a network is empty")
    for embedded in (text, f"{text}-features"):
        if embedded in embedded_names():
            return EMBEDDED / embedded
    path = epath.Path(name)
    if path.is_dir():
        return path
    if text in PUBLIC:
        return ensure_converted(text)
    if path.exists():
        raise ValueError(f"{name} is a file; tstitch convert {name} OUT makes a network folder")
    # A name whose first part is a local folder is a wrong path.
    if public(text) is not None and not Path(Path(text).parts[0]).is_dir():
        return ensure_converted(text)
    if os.sep in text:
        raise ValueError(f"no network folder at {name}")
    raise unknown("network", name, [*embedded_names(), *PUBLIC])


def local_card(name: str | os.PathLike[str]) -> BaseCard | None:
    """The card of a network that is on this machine; None of one that would be downloaded.

    Raises:
        ValueError: If there is no network of that name.
    """
    text = str(name)
    if text not in embedded_names() and not Path(name).is_dir():
        entry = public(text)
        if entry is not None:
            folders = (network_folder(each) for each in (text, short_name(text)))
            folder = next((each for each in folders if (each / "card.json").exists()), None)
            return None if folder is None else store.read_card(folder)
    return store.read_card(resolve(name))


def load(
    name: str | os.PathLike[str], dtype: Any = jnp.float32, *, mesh: Mesh | None = None
) -> Any:
    """Loads a network onto the default device, or onto a mesh of devices.

    Args:
        name: An embedded name such as ``"fashion-s"`` (``"fashion"`` for the feature network), a
            public name such as ``"dit-xl-2-256"``, or a pipeline on the Hugging Face hub such as
            ``"CompVis/stable-diffusion-v1-4"`` (see ``public``), which the first call downloads and
            converts; or the path of a network folder, also ``gs://...`` with the package ``gcsfs``.
        dtype: The compute dtype, float32 or bfloat16; see ``make_network``.
        mesh: From ``ts.make_mesh``; see ``ts.shard``. Each device then holds only its part.

    Returns:
        A ``Network``, ``Autoencoder``, ``TextEncoder`` or ``FeatureNetwork``.

    Raises:
        ValueError: If there is no such network, it cannot be downloaded, or its folder is damaged.
        OSError: If the disk is full.
    """
    return store.load(resolve(name), dtype, mesh=mesh)
