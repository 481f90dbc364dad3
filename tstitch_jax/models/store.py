"""A network as a folder: ``card.json`` beside the parameters in Orbax's format."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tstitch_jax.core.checks import first_line
from tstitch_jax.core.types import Params
from tstitch_jax.models.build import DENOISER, KINDS_OF_CARD, TAKE_TEXTS, checksum
from tstitch_jax.models.cards import BaseCard
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
"""Bytes that are read or written at a time, unless one parameter is larger."""


TOKENIZER = "tokenizer"
"""Where a network folder keeps the files of its tokenizer."""


def replace_folder(path: Path, write: Callable[[Path], T]) -> T:
    """Runs ``write`` on a temporary folder beside ``path``, then puts it in ``path``'s place.

    Returns:
        What ``write`` returns.

    Raises:
        OSError: If the place cannot be written; ``path`` is then as it was.
    """
    shown, path = path, Path(os.path.realpath(path))  # a link goes on to point where it does
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
        raise OSError(error.errno, f"cannot write {shown}: {reason}") from error
    ours = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with _handled(_terminated, *[signal.SIGTERM] * ours):  # so that it, too, removes the folder
        try:
            result = write(temporary)
            os.chmod(temporary, 0o755)  # mkdtemp makes it private
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
                os.rename(path, old / path.name)
                try:
                    os.rename(temporary, path)
                finally:
                    if not path.exists():
                        os.rename(old / path.name, path)
                    shutil.rmtree(old)
            else:
                os.rename(temporary, path)
            return result
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_place(path: Path) -> None:
    """Raises ValueError if there is something in that place that is not a network folder."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{str(path)!r} is no UTF-8; choose another name") from None
    if (
        path.exists()
        and not (path / "card.json").exists()
        and not (path.is_dir() and not any(path.iterdir()))
    ):
        raise ValueError(f"{path} exists and is not a network folder; choose another place")


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Silences another library's logger, which says at length what the one error will say."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _no_echo() -> Iterator[None]:
    """When Orbax fails, its other threads call an event loop that is closed; that is not shown."""

    def show(problem: Any) -> None:
        if "Event loop is closed" not in str(problem.exc_value):
            hook(problem)

    hook, sys.unraisablehook = sys.unraisablehook, show
    try:
        with quiet("absl"), quiet("asyncio"):
            yield
    except Exception:
        time.sleep(0.2)  # for them to come
        raise
    finally:
        sys.unraisablehook = hook


@contextlib.contextmanager
def _handled(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """Signals go to ``handler`` within it, where Python allows that: in its main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds signals back, since Orbax's threads would go on writing into a removed folder."""
    caught: list[int] = []
    with _handled(lambda number, _: caught.append(number), signal.SIGINT, signal.SIGTERM):
        yield
    for number in caught[:1]:
        signal.raise_signal(number)


def _terminated(number: int, _: Any) -> None:
    sys.exit(128 + number)


def _in_flight(params: Params) -> int:
    """What Orbax is allowed, which refuses a parameter above it; takes arrays or their shapes."""
    # 8 bytes a number, since the stored dtype may be another one.
    return max([IN_FLIGHT, *(8 * math.prod(leaf.shape) for leaf in jax.tree.leaves(params))])


def fill_folder(
    folder: Path, card: BaseCard, params: Params, tokenizer: Mapping[str, bytes] | None = None
) -> None:
    """Writes a complete card, its parameters and a tokenizer's files into an empty folder.

    The parameters should be JAX arrays, since Orbax copies NumPy's before it writes them.

    Raises:
        OSError: If the folder cannot be written.
    """
    import orbax.checkpoint as ocp

    handler = ocp.BasePyTreeCheckpointHandler(save_concurrent_bytes=_in_flight(params))
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(handler_impl=handler))
    reason = ""
    with _uninterrupted(), _no_echo(), checkpointer:
        try:
            checkpointer.save(folder.absolute() / "params", params)
        except Exception as error:  # TensorStore's are ValueErrors, even if the disk is full
            reason = first_line(error)
        if reason:
            for _ in range(20):  # until no thread adds to the folder
                shutil.rmtree(folder, ignore_errors=True)
                time.sleep(0.1)
                if not folder.exists():
                    break
            with warnings.catch_warnings(action="ignore"):
                gc.collect()  # what the other threads failed with is told when it is collected
    if reason:
        raise OSError(f"cannot write the network: {reason[:300]}")
    if tokenizer is not None:
        (folder / TOKENIZER).mkdir()
        for name, data in tokenizer.items():
            (folder / TOKENIZER / name).write_bytes(data)
    text = json.dumps(dataclasses.asdict(card), indent=2)
    (folder / "card.json").write_text(text + "\n")


def save(
    path: str | os.PathLike[str],
    network: Network | Autoencoder | FeatureNetwork | TextEncoder,
    dtype: Any = np.float32,
) -> None:
    """Writes a network folder whole or not at all; an existing network folder is replaced.

    Args:
        path: The folder.
        network: What to write.
        dtype: What the parameters are stored in; ``np.float16`` halves the size, and the folder
            then holds the rounded network with that network's own checksum. So does that of a
            network that was loaded to compute in bfloat16.

    Raises:
        ValueError: If there is something else in that place, or the network takes texts and has no
            tokenizer.
        OSError: If the folder cannot be written.
    """
    check_place(Path(path))
    tokenizer: Tokenizer | None = getattr(network, "tokenizer", None)
    if tokenizer is None and network.card.architecture in TAKE_TEXTS:
        raise ValueError(
            f"{network.card.name} has no tokenizer, and its folder must; make it with tokenizer="
        )
    stored = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), network.params)
    card = dataclasses.replace(network.card, checksum=checksum(stored))
    files = None if tokenizer is None else tokenizer.files
    replace_folder(Path(path), lambda folder: fill_folder(folder, card, stored, files))


_KINDS = {"str": str, "int": int, "float": float, "bool": bool, "dict": dict, "tuple": tuple}


def _parse_card(fields: Any) -> BaseCard:
    if not isinstance(fields, dict):
        raise ValueError(f"a card is a JSON object, got {type(fields).__name__}")
    kind, _ = KINDS_OF_CARD.get(str(fields.get("architecture")), DENOISER)
    known = {field.name: field for field in dataclasses.fields(kind)}
    needed = {k for k, f in known.items() if f.default is dataclasses.MISSING}
    wrong = [f"missing {name}" for name in sorted(needed - fields.keys())]
    wrong += [f"unknown {name}" for name in sorted(fields.keys() - known.keys())]
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k in known
    }
    for name, value in values.items():
        declared = str(known[name].type)  # such as "tuple[str, ...]" or "int | None"
        if value is None and declared.endswith("| None"):
            continue
        if type(value) is not _KINDS[re.split(r"\W", declared)[0]]:
            wrong.append(f"{name} is {value!r}")
    shape = values.get("image_shape")
    if "image_shape" in known and not (
        type(shape) is tuple and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
    ):
        wrong.append(f"image_shape is {shape!r}")
    if not all(type(name) is str for name in values.get("class_names") or ()):
        wrong.append("class_names are not all texts")
    if wrong:
        raise ValueError("; ".join(wrong))
    return kind(**values)


def read_card(path: str | os.PathLike[str]) -> BaseCard:
    """Reads the card of a network folder.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    file = Path(path) / "card.json"
    try:
        return _parse_card(json.loads(file.read_text()))
    except FileNotFoundError:
        hint = ""
        if (Path(path) / "network" / "card.json").is_file():
            hint = f"; did you mean {Path(path) / 'network'}?"
        elif (Path(path) / "config.json").is_file():
            hint = f"; tstitch convert {path} OUT makes one of it"
        raise ValueError(f"{path} is not a network folder: it has no card.json{hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or not a card: {error}") from None


@contextlib.contextmanager
def _lean_malloc() -> Iterator[None]:
    """While it lasts, glibc returns large blocks to the system when they are freed.

    It else learns to keep blocks of up to 32 MiB, and the holes between the parameters that a load
    leaves behind come to a third of their size. What it would have learned is set at the end.
    """
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        yield
        return
    mallopt(mmap_threshold, 2**17)
    try:
        yield
    finally:
        mallopt(mmap_threshold, 2**25)
        mallopt(trim_threshold, 2**26)


def load(folder: str | os.PathLike[str], dtype: Any = jnp.float32, *, on_host: bool = False) -> Any:
    """Loads a network folder onto the default device.

    Args:
        folder: The folder.
        dtype: What the network computes in, float32 or bfloat16; see ``make_network``.
        on_host: Whether to leave the parameters on the host, as NumPy arrays.

    Returns:
        A ``Network``; an ``Autoencoder``, a ``TextEncoder`` or a ``FeatureNetwork`` where the
        folder holds one.

    Raises:
        ValueError: If there is no such network, or its folder is damaged.
    """
    import orbax.checkpoint as ocp

    path = Path(folder)
    card = read_card(path)
    stored = path.absolute() / "params"
    if not stored.is_dir():
        raise ValueError(f"network folder {path} is damaged: it has no params")
    files = None
    if card.architecture in TAKE_TEXTS:
        try:
            files = read_tokenizer(path / TOKENIZER)
        except ValueError as error:
            raise ValueError(f"network folder {path} is damaged: {error}") from None
    try:
        # Straight into place and little at a time: else memory holds the parameters twice.
        with _no_echo(), ocp.PyTreeCheckpointer() as reader:
            found: Any = reader.metadata(stored)
            # Older releases of Orbax return the item's metadata itself.
            names = getattr(found, "item_metadata", found).tree
        handler = ocp.BasePyTreeCheckpointHandler(restore_concurrent_bytes=_in_flight(names))
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(handler_impl=handler))
        with _lean_malloc(), _no_echo(), checkpointer:
            place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            wanted: dict[str, Any] = dict(dtype=np.dtype(np.float32))
            if on_host:
                argument = ocp.RestoreArgs(restore_type=np.ndarray, **wanted)
            else:
                argument = ocp.ArrayRestoreArgs(sharding=place, **wanted)
            params = checkpointer.restore(
                stored, restore_args=jax.tree.map(lambda _: argument, names)
            )
    except jax.errors.JaxRuntimeError:  # of memory, or of another host: not of the folder
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds for a file that is damaged.
        raise ValueError(f"network folder {path} is damaged: {first_line(error)[:200]}") from error
    try:
        _, make = KINDS_OF_CARD.get(card.architecture, DENOISER)
        more = dict(files=files) if files is not None else {}
        network = make(card, params, dtype, **more)
    except Exception as error:  # numbers that no network can have fail in many places
        raise ValueError(f"network folder {path} is damaged: {error}") from error
    if card.checksum != network.card.checksum:
        raise ValueError(
            f"network folder {path} is damaged: the parameters' checksum is "
            f"{network.card.checksum[:12]}, its card says {card.checksum[:12] or 'nothing'}"
        )
    if files is not None and card.tokenizer_checksum != network.card.tokenizer_checksum:  # pyright: ignore
        raise ValueError(
            f"network folder {path} is damaged: its tokenizer is not the one that its card says"
        )
    return network
