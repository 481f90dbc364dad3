"""Network folders: ``card.json`` beside the parameters in Orbax's format."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from etils import epath
from jax.sharding import Mesh, SingleDeviceSharding

from tstitch_jax.core.checks import first_line
from tstitch_jax.core.types import Params
from tstitch_jax.models import devices
from tstitch_jax.models.build import build, checksum, parse_dtype, takes_texts
from tstitch_jax.models.cards import BaseCard, Card, parse_card
from tstitch_jax.models.families import FAMILIES, family_of
from tstitch_jax.models.tokenizer import read_tokenizer
from tstitch_jax.models.types import (
    Autoencoder,
    FeatureNetwork,
    Network,
    TextEncoder,
    Tokenizer,
)

T = TypeVar("T")

IN_FLIGHT = 2**27
"""Bytes that Orbax reads or writes at a time, unless one parameter is larger."""

FORMAT = 2
"""Version of the folders that ``save`` writes; 1 is that of 0.12, whose cards have no number."""

TOKENIZER = "tokenizer"
"""Subfolder of a network folder that holds the tokenizer's files."""


def _absolute(path: epath.PathLike) -> epath.Path:
    """The absolute path with links followed, so that replacing a folder keeps a link to it."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.realpath(text))


def replace_folder(path: epath.PathLike, write: Callable[[epath.Path], T]) -> T:
    """Runs ``write`` on a temporary folder beside ``path``, then renames that folder to ``path``.

    A process that is killed may leave the hidden temporary folder. The next call removes it.

    Returns:
        The result of ``write``.

    Raises:
        OSError: If the folder cannot be written. An existing folder at ``path`` then stays intact.
    """
    target = _absolute(path)
    new, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("new", "old"))
    try:
        new.rmtree(missing_ok=True)
        new.mkdir(parents=True)
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename}"
        raise OSError(error.errno, f"cannot write {path}: {reason}") from error
    try:
        result = write(new)
        if target.exists():
            old.rmtree(missing_ok=True)
            target.rename(old)
        new.rename(target)
    except BaseException:
        with contextlib.suppress(OSError):  # threads of Orbax may still write to it
            new.rmtree()
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    old.rmtree(missing_ok=True)
    return result


def check_place(path: epath.PathLike) -> None:
    """Raises ValueError if ``path`` holds anything but a network folder."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{str(path)!r} is not valid UTF-8; choose another name") from None
    place = epath.Path(path)
    if (
        place.exists()
        and not (place / "card.json").exists()
        and not (place.is_dir() and not any(place.iterdir()))
    ):
        raise ValueError(f"{path} exists and is not a network folder; choose another place")


def check_space(folder: epath.Path, size: int) -> None:
    """Raises OSError unless the disk of ``folder`` has ``size`` bytes left; buckets always do."""
    if "://" not in str(folder) and shutil.disk_usage(folder).free < size:
        raise OSError(
            errno.ENOSPC,
            f"cannot write {size / 1e6:.0f} MB in {folder.parent}: {os.strerror(errno.ENOSPC)}; "
            "free some space or choose another folder",
        )


def _checkpointer(params: Params) -> Any:
    """Orbax's checkpointer with bounded memory for these parameters or shapes."""
    import orbax.checkpoint as ocp

    # Orbax refuses a parameter above the bound; 8 bytes per value cover every stored dtype.
    limit = max([IN_FLIGHT, *(8 * math.prod(leaf.shape) for leaf in jax.tree.leaves(params))])
    handler = ocp.BasePyTreeCheckpointHandler(
        save_concurrent_bytes=limit, restore_concurrent_bytes=limit
    )
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(handler_impl=handler))


def fill_folder(
    folder: epath.Path, card: BaseCard, params: Params, tokenizer: Mapping[str, bytes] | None = None
) -> None:
    """Writes a complete card, its parameters and a tokenizer's files into an empty folder.

    Raises:
        OSError: If the folder cannot be written.
    """
    check_space(folder, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
    try:
        with _checkpointer(params) as checkpointer:
            checkpointer.save(folder / "params", params)
    except Exception as error:  # TensorStore raises ValueError for a full disk
        raise OSError(f"cannot write the network: {first_line(error)[:300]}") from error
    if tokenizer is not None:
        (folder / TOKENIZER).mkdir()
        for name, data in tokenizer.items():
            (folder / TOKENIZER / name).write_bytes(data)
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(card)}, indent=2)
    (folder / "card.json").write_text(text + "\n")


def save(
    path: epath.PathLike,
    network: Network | Autoencoder | FeatureNetwork | TextEncoder,
    dtype: Any = np.float32,
) -> None:
    """Writes a network folder completely or not at all; replaces an existing network folder.

    Args:
        path: The folder; ``gs://`` paths need the package ``gcsfs``.
        network: The network to write.
        dtype: The dtype of the stored parameters. ``np.float16`` halves the size; the folder then
            holds the rounded parameters and their checksum, as does the folder of a network that
            was loaded in bfloat16.

    Raises:
        ValueError: If ``path`` holds something else, or the network takes texts and has no
            tokenizer.
        OSError: If the folder cannot be written.
    """
    check_place(path)
    tokenizer: Tokenizer | None = getattr(network, "tokenizer", None)
    if tokenizer is None and takes_texts(network.card):
        raise ValueError(
            f"{network.card.name} has no tokenizer, and its folder must; make it with tokenizer="
        )
    # By NumPy, since XLA converts to float16 only with the instructions for it.
    stored = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), network.params)
    card = dataclasses.replace(network.card, checksum=checksum(stored))
    files = None if tokenizer is None else tokenizer.files
    replace_folder(path, lambda folder: fill_folder(folder, card, stored, files))


def read_card(path: epath.PathLike) -> BaseCard:
    """Reads the card of a network folder.

    Raises:
        ValueError: If the folder has no card, or the card is damaged or of a newer format.
    """
    place = epath.Path(path)
    file = place / "card.json"
    try:
        fields = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
        number = msgspec.convert(fields.pop("format", 1), int)
        if number <= FORMAT:
            family = FAMILIES.get(str(fields.get("architecture")))
            return parse_card(Card if family is None else family.card, fields)
    except FileNotFoundError:
        hint = ""
        if (place / "network" / "card.json").exists():
            hint = f"; did you mean {place / 'network'}?"
        elif (place / "config.json").exists():
            hint = f"; convert it by tstitch convert {path} OUT"
        raise ValueError(f"{path} is not a network folder: it has no card.json{hint}") from None
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise ValueError(f"{file} is damaged or not a card: {error}") from None
    raise ValueError(
        f"{file} has format {number}, and this version reads up to {FORMAT}; upgrade tstitch_jax"
    )


def load(folder: epath.PathLike, dtype: Any = jnp.float32, *, mesh: Mesh | None = None) -> Any:
    """Loads a network folder onto the default device, or onto a mesh of devices.

    Args:
        folder: The folder; ``gs://`` paths need the package ``gcsfs``.
        dtype: The compute dtype, float32 or bfloat16; see ``make_network``.
        mesh: From ``ts.make_mesh``; see ``ts.shard``.

    Returns:
        A ``Network``, ``Autoencoder``, ``TextEncoder`` or ``FeatureNetwork``, by the card.

    Raises:
        ValueError: If ``folder`` is not a network folder, or is damaged.
    """
    import orbax.checkpoint as ocp

    path = _absolute(folder)
    card = read_card(folder)
    parse_dtype(dtype)
    try:
        family_of(card)
    except ValueError as error:
        raise ValueError(f"{path / 'card.json'}: {error}") from None
    damaged = f"network folder {folder} is damaged"
    stored = path / "params"
    if not stored.is_dir():
        raise ValueError(f"{damaged}: it has no params")
    tokenizer = None
    if (path / TOKENIZER).is_dir():
        try:
            tokenizer = read_tokenizer(path / TOKENIZER)
        except ValueError as error:
            raise ValueError(f"{damaged}: {error}") from None
    sharding = SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else None
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            target = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=sharding),
                checkpointer.metadata(stored).item_metadata.tree,
            )
        # Several hosts restore NumPy arrays, since each of them verifies all values.
        if mesh is not None and jax.process_count() == 1:
            target = devices.shard_params(target, mesh, copies=not isinstance(card, Card))
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        with _checkpointer(target) as checkpointer:
            params = checkpointer.restore(stored, target, restore_args=arguments)
    except jax.errors.JaxRuntimeError:  # out of memory, or another host; the folder is not at fault
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
        raise ValueError(f"{damaged}: {first_line(error)[:200]}") from error
    try:
        network = build(card, params, dtype, tokenizer)
    except Exception as error:  # impossible sizes fail in many places
        raise ValueError(f"{damaged}: {error}") from error
    if card.checksum != network.card.checksum:
        raise ValueError(
            f"{damaged}: the parameters' checksum is {network.card.checksum[:12]}, its card says "
            f"{card.checksum[:12] or 'nothing'}"
        )
    if getattr(card, "tokenizer_checksum", "") and tokenizer is None:
        raise ValueError(f"{damaged}: it has no tokenizer")
    if tokenizer is not None and card.tokenizer_checksum != network.card.tokenizer_checksum:  # pyright: ignore
        raise ValueError(f"{damaged}: its tokenizer does not match the card's checksum")
    return network if mesh is None else devices.shard(network, mesh)
