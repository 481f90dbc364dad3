"""Sets of images and of statistics, as files and folders hold them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tstitch_jax.core.checks import as_array, shown
from tstitch_jax.core.files import DAMAGED
from tstitch_jax.evaluation.records import open_records

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""What counts as an image in a folder."""

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
"""Arrays of a reference file: mean and covariance of the pooled and of the spatial features."""

_MODES = {"1": 1, "L": 1, "P": 3, "RGB": 3, "CMYK": 3, "YCbCr": 3}
"""Pillow's modes that are turned into pixels of so many channels."""

_END_OF_PNG, _TAIL = b"IEND\xaeB`\x82", 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A set of images, of statistics, or of both.

    Attributes:
        name: What it was opened as.
        count: Number of images; 0 if there are none.
        shape: ``(H, W, C)`` of an image, C being 1 or 3.
        read: ``size -> batches``: all images in order, uint8 ``[size, H, W, C]`` at a time, the
            last fewer.
        labels: int64 ``[count]``, or None.
        statistics: Of ``STATISTICS`` those that there are, float64; ``num``, the number of images
            they are of, and ``features``, the checksum of the network, where the file says so.
        settings: How the images were made, as ``tstitch generate`` has it.
        skipped: Names of broken images that were left out; grows while they are read.
        path: The file or folder, or None.
        measured: What was found of it as a reference, so that it is not computed again.
    """

    name: str
    count: int = 0
    shape: tuple[int, ...] = ()
    read: Callable[[int], Iterator[np.ndarray]] = lambda size: iter(())
    labels: np.ndarray | None = None
    statistics: dict[str, Any] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    skipped: list[str] = dataclasses.field(default_factory=list)
    path: Path | None = None
    measured: dict[Any, Any] = dataclasses.field(default_factory=dict)


def _check_array(name: str, shape: tuple[int, ...], dtype: Any) -> None:
    """Raises ValueError unless an array is of images."""
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)) or 0 in shape:
        raise ValueError(
            f"{name} must be images [N, H, W], [N, H, W, 1] or [N, H, W, 3], got {list(shape)}"
        )
    if dtype != np.uint8:
        raise ValueError(f"{name} must be uint8 with values from 0 to 255, got {dtype}")


def _check_labels(name: str, labels: np.ndarray, count: int) -> None:
    """Raises ValueError unless there is a whole number for each image."""
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be {count} whole numbers, one an image, got {labels.dtype} "
            f"{list(labels.shape)}"
        )


def from_array(name: str, images: np.ndarray, labels: np.ndarray | None = None) -> Source:
    """Images in memory.

    Args:
        name: What errors and results call them.
        images: uint8 ``[N, H, W]`` or ``[N, H, W, C]``.
        labels: whole numbers ``[N]``, or None.

    Raises:
        ValueError: If they are something else.
    """
    images = as_array(images)
    _check_array(name, images.shape, images.dtype)
    images = images[..., None] if images.ndim == 3 else images
    if labels is not None:
        labels = as_array(labels)
        _check_labels(f"labels of {name}", labels, len(images))

    def read(size: int) -> Iterator[np.ndarray]:
        yield from (images[i : i + size] for i in range(0, len(images), size))

    return Source(
        name=name, count=len(images), shape=images.shape[1:], read=read,
        labels=None if labels is None else labels.astype(np.int64),
    )  # fmt: skip


@contextlib.contextmanager
def _member(path: Path, name: str) -> Iterator[tuple[Any, tuple[int, ...], np.dtype]]:
    """An array of an ``.npz``, open behind its header, with its shape and dtype."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, by_columns, dtype = read(stream)
        if by_columns and len(shape) > 1:
            raise ValueError(f"{name} is stored by columns; save it with np.ascontiguousarray")
        yield stream, shape, dtype


def _check_moments(path: Path, name: str, statistics: dict[str, Any]) -> None:
    """Raises ValueError unless the mean and the covariance are ones, or neither is there."""
    other = name.replace("mu", "sigma")
    mean, cov = statistics.get(name), statistics.get(other)
    if (mean is None) != (cov is None):
        raise ValueError(f"{path} has only one of {name} and {other}")
    if mean is None or cov is None:
        return
    if mean.ndim != 1 or not mean.size or cov.shape != 2 * mean.shape:
        raise ValueError(
            f"{path}: {name} and {other} must be [D] and [D, D], got {list(mean.shape)} and "
            f"{list(cov.shape)}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"{path}: {name} or {other} has NaN or infinite values")
    if np.abs(cov - cov.T).max() > 1e-6 * np.abs(cov).max() or cov.diagonal().min() < 0:
        raise ValueError(f"{path}: {other} is no covariance: not symmetric, or negative variances")


def _statistics(path: Path, stored: Any) -> dict[str, Any]:
    """Those of a file."""
    found: dict[str, Any] = {}
    for name in STATISTICS:
        if name in stored:
            value = stored[name]
            if value.dtype.kind not in "fiu":
                raise ValueError(f"{name} must be real numbers, got {value.dtype}")
            found[name] = np.asarray(value, np.float64)
    for name, kinds in (("num", "iu"), ("features", "U"), ("dtype", "U")):
        if found and name in stored:
            value = stored[name]
            if value.ndim or value.dtype.kind not in kinds:
                raise ValueError(
                    f"{name} must be what --save-statistics writes, got {shown(value)}"
                )
            found[name] = value.item()
    for name in ("mu", "mu_s"):
        _check_moments(path, name, found)
    return found


def _open_npz(path: Path, array: str) -> Source:
    """An archive: ``array`` with its labels, or ``arr_0`` and statistics."""
    key = array or "arr_0"
    of = "arr_1" if key == "arr_0" else key.replace("x_", "y_", 1)
    try:
        stored = np.load(path, allow_pickle=False)
        if isinstance(stored, np.ndarray):
            raise ValueError("it is a single array; save it with np.savez")
        with stored:
            names = stored.files
            statistics = _statistics(path, stored) if key == "arr_0" else {}
            labels = stored[of] if of in names and of != key else None
    except DAMAGED as error:
        text = "it is no archive" if "pickled" in str(error) else str(error)
        raise ValueError(
            text if text.startswith(str(path)) else f"cannot read {path} as .npz: {text}"
        ) from None
    if key not in names and (array or not {"mu", "sigma"} <= statistics.keys()):
        images = [name for name in names if name.startswith("x_")]
        hint = f"; name one: {path}:{images[0]}" if images else ""
        raise ValueError(
            f"{path} has no array {key}{'' if array else ' of images, nor mu and sigma'}; it has "
            f"{', '.join(names[:8]) or 'nothing'}{hint}"
        )
    name = f"{path}:{array}" if array else str(path)
    if key not in names:
        return Source(name=name, statistics=statistics, path=path)
    try:
        with _member(path, key) as (_, shape, dtype):
            pass
    except DAMAGED as error:
        raise ValueError(f"cannot read {key} of {path}: {error}") from None
    _check_array(f"{key} of {path}", shape, dtype)
    if labels is not None:
        _check_labels(f"{of} of {path}", labels, shape[0])

    def read(size: int) -> Iterator[np.ndarray]:
        inner = shape[1:] if len(shape) == 4 else (*shape[1:], 1)
        row = int(np.prod(inner))
        try:
            with _member(path, key) as (stream, _, _):
                for start in range(0, shape[0], size):
                    rows = min(size, shape[0] - start)
                    data = stream.read(rows * row)
                    if len(data) < rows * row:
                        raise EOFError("it is cut off")
                    batch = np.frombuffer(data, np.uint8).reshape(rows, *inner)
                    yield batch
        except DAMAGED as error:
            raise ValueError(f"cannot read {key} of {path}: {error}") from None

    return Source(
        name=name, count=shape[0], shape=(*shape[1:3], shape[3] if len(shape) == 4 else 1),
        read=read, labels=None if labels is None else labels.astype(np.int64),
        statistics=statistics, path=path,
    )  # fmt: skip


def _open_picture(file: Path) -> tuple[str, tuple[int, int]]:
    """Mode and ``(W, H)`` by the header; raises if it is broken as far as that can be told."""
    from PIL import Image

    with file.open("rb") as stream:
        with Image.open(stream) as picture:
            mode, size, kind = picture.mode, picture.size, picture.format
        if kind == "PNG":
            stream.seek(-min(_TAIL, file.stat().st_size), os.SEEK_END)
            if _END_OF_PNG not in stream.read():  # some programs write more behind it
                raise ValueError("it is cut off")
    return mode, size


def _pixels(file: Path, channels: int) -> np.ndarray:
    from PIL import Image

    with Image.open(file) as picture:
        return np.asarray(picture.convert("L" if channels == 1 else "RGB"))


def _open_folder(path: Path, skip_broken: bool) -> Source:
    files = sorted(
        file for file in path.rglob("*")
        if file.suffix.lower() in PICTURES and not file.name.startswith(".")
    )  # fmt: skip
    if not files:
        raise ValueError(
            f"{path} has no images ({', '.join(PICTURES)}) and is no folder of tstitch generate"
        )
    skipped: list[str] = []

    def broken(file: Path, error: Exception) -> None:
        if not skip_broken:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise ValueError(
                f"{file} is broken: {reason}; mend or remove it, or leave broken images out "
                "with --skip-broken"
            ) from None
        skipped.append(str(file))

    def tried(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:  # Pillow raises many kinds for a file that is damaged
            return error

    # Pillow lets the others run while it decodes.
    with ThreadPoolExecutor() as pool:
        heads = list(pool.map(lambda file: tried(_open_picture, file), files))
    good: list[Path] = []
    first: tuple[Path, tuple[int, int]] | None = None
    channels = 1
    for file, head in zip(files, heads, strict=True):
        if isinstance(head, Exception):
            broken(file, head)
            continue
        mode, size = head
        if mode not in _MODES:
            raise ValueError(
                f"{file} has pixels of mode {mode}; save it as 8-bit grey or RGB without "
                "transparency"
            )
        first = first or (file, size)
        if size != first[1]:
            raise ValueError(
                f"images differ in size: {first[0]} is {first[1][0]}x{first[1][1]}, {file} is "
                f"{size[0]}x{size[1]}; bring them to one size first"
            )
        channels = max(channels, _MODES[mode])
        good.append(file)
    if first is None:
        raise ValueError(f"{path} has no image that is not broken")
    before = list(skipped)

    def read(size: int) -> Iterator[np.ndarray]:
        skipped[:] = before
        shape = (first[1][1], first[1][0], channels)
        with ThreadPoolExecutor() as pool:
            kept: list[np.ndarray] = []
            # Pieces, so that what was decoded and not yet asked for stays little.
            for start in range(0, len(good), size):
                batch = good[start : start + size]
                found = pool.map(lambda file: tried(_pixels, file, channels), batch)
                for file, pixels in zip(batch, found, strict=True):
                    if isinstance(pixels, Exception):
                        broken(file, pixels)
                    else:
                        kept.append(pixels.reshape(shape))
                while len(kept) >= size:
                    yield np.stack(kept[:size])
                    del kept[:size]
            if kept:
                yield np.stack(kept)

    return Source(
        name=str(path), count=len(good), shape=(first[1][1], first[1][0], channels), read=read,
        skipped=skipped, path=path,
    )  # fmt: skip


def _open_generated(path: Path) -> Source:
    """The folder of a job of ``tstitch generate`` that is through."""
    if not (path / "samples.npz").is_file():
        raise ValueError(
            f"{path} has settings.json and no samples.npz: a job of tstitch generate that is not "
            "through (run it again), or no folder of images"
        )
    source = _open_npz(path / "samples.npz", "arr_0")
    try:
        settings = json.loads((path / "settings.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / 'settings.json'} is damaged: {error}") from None
    return dataclasses.replace(source, name=str(path), settings=settings)


def _open_records(name: str, split: str) -> Source:
    records = open_records(name, split)
    if not len(records):
        raise ValueError(f"tfds:{name}:{split} holds no images")
    first, _ = records.read([0])
    what = f"images of tfds:{name}"
    _check_array(what, first.shape, first.dtype)

    def read(size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(records), size):
            try:
                images, _ = records.read(range(start, min(start + size, len(records))))
            except ValueError as error:
                raise ValueError(f"{what} differ in size: {error}") from None
            yield images

    return Source(name=f"tfds:{name}:{split}", count=len(records), shape=first.shape[1:], read=read)


def open_source(spec: str | os.PathLike[str], *, skip_broken: bool = False) -> Source:
    """Opens a set of images or of statistics; nothing long is done yet.

    Args:
        spec: One of: an ``.npz`` file with ``arr_0`` (uint8 ``[N, H, W, 3]``), with its labels
            ``arr_1``, with ``mu``, ``sigma``, ``mu_s`` and ``sigma_s``, or several of these
            (Dhariwal & Nichol 2021); ``FILE.npz:NAME`` for another array of a file, and the labels
            ``y_test`` of ``x_test``; a folder of ``tstitch generate``; a folder of images, at any
            depth, in order of their paths; ``tfds:NAME`` or ``tfds:NAME:SPLIT`` (``train`` unless
            said) of tensorflow-datasets.
        skip_broken: Whether to leave out broken files of a folder instead of refusing them.

    Raises:
        ValueError: If there is no such set, it is empty, or it holds something else.
    """
    if not isinstance(spec, str | os.PathLike):
        raise ValueError(f"images must be a path, tfds:NAME or a NumPy array, got {shown(spec)}")
    text = os.fspath(spec)
    if text.startswith("tfds:"):
        name, _, split = text.removeprefix("tfds:").partition(":")
        return _open_records(name, split or "train")
    path, array = Path(text), ""
    file, dot, after = text.rpartition(".npz:")
    if dot and not path.exists():
        path, array = Path(f"{file}.npz"), after
        if not path.is_file() or not array:
            raise ValueError(f"{text} names an array of {path}, which is no file")
    if path.is_dir():
        if (path / "settings.json").is_file():
            return _open_generated(path)
        return _open_folder(path, skip_broken)
    if not path.is_file():
        raise ValueError(
            f"nothing at {path}; give an .npz file, a folder of images or of tstitch generate, or "
            "tfds:NAME"
        )
    if path.suffix.lower() != ".npz":
        raise ValueError(f"{path} is no .npz file; give one, or a folder of images")
    return _open_npz(path, array)
