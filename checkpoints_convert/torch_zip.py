"""Files of ``torch.save``, read without torch and without running anything; its zip format.

This is the format since torch 1.6. ``torch_legacy`` reads older files.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from checkpoints_convert import torch_legacy
from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.torch_pickle import (
    COPY,
    LARGE,
    MAX_PICKLE,
    RESAVE,
    STORAGES,
    Storage,
    errors_of,
    unpickle,
)


def load(path: str | os.PathLike[str]) -> Any:
    """Reads a file that ``torch.save`` wrote.

    Args:
        path: The file.

    Returns:
        The file's object. Each tensor is a ``rules.Tensor``, whose ``read`` checks its storage and
        returns a read-only view of a map of the file, which must therefore not be changed while
        tensors are in use. An object that is neither a tensor nor plain data is an
        ``torch_pickle.Opaque``. Containers of a hostile file may contain themselves.

    Raises:
        CheckpointError: If the file does not exist, is damaged or unsafe, or has another format.
        OSError: If the file cannot be read.
    """
    path = Path(path)
    with errors_of(path):
        if not path.exists():
            raise CheckpointError("does not exist; check the path")
        if not path.is_file():
            raise CheckpointError("is not a file; name the checkpoint file itself")
        with open(path, "rb") as file:
            head = file.read(512)
            if head[257:262] == b"ustar":
                raise CheckpointError(
                    "is in the tar format of torch 0.1, which is not read; if you trust it, "
                    'load it with torch.load(path, map_location="cpu", weights_only=False) in '
                    "torch 1.6 or newer and save it again with torch.save"
                )
            legacy = torch_legacy.begins(head)
            if not legacy and not head.startswith(b"PK\x03\x04"):
                start = "begins with " + repr(head[:8]) if head else "is empty"
                raise CheckpointError(
                    f"is not a torch checkpoint: it {start}; check the path, or {COPY}"
                )
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if legacy:
                return torch_legacy.read(path, data)
            return _read(_records(path, data, file))


def _root(names: list[str]) -> str:
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(
            f"is a zip archive with {len(roots)} data.pkl, not a torch checkpoint with one; "
            f"check the path, or {RESAVE}"
        )
    if any(name.startswith((f"{roots[0]}constants.pkl", f"{roots[0]}code/")) for name in names):
        raise CheckpointError(
            "is a TorchScript program; re-save only its tensors: "
            "torch.save(torch.jit.load(path).state_dict(), new_path)"
        )
    return roots[0]


def _records(path: Path, data: mmap.mmap, file: BinaryIO) -> dict[str, Storage]:
    """The bytes of the archive's records by name, without the archive's root folder."""
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:  # of many types, OSError too: a position before the file's begin
        raise CheckpointError(f"is truncated or damaged: {error}; {COPY}") from error
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    root = _root([info.orig_filename for info in infos])
    records: dict[str, Storage] = {}
    end = 0
    for info in infos:
        name = info.orig_filename  # ``filename`` is a repaired one
        shown = repr(name[:100])
        if re.match(r"/|[A-Za-z]:", name) or re.search(r"[\\\0]", name) or ".." in name.split("/"):
            raise CheckpointError(f"holds {shown}, a path outside the archive; do not trust it")
        if name in records:
            raise CheckpointError(f"holds the record {shown} twice; {RESAVE}")
        if not end <= info.header_offset < archive.start_dir:
            raise CheckpointError(f"is damaged: the record {shown} overlaps another; {COPY}")
        signature, flags, method, name_size, extra_size = struct.unpack_from(
            "<4s2xHH16xHH", data, info.header_offset
        )
        if info.flag_bits & 1 or flags & 1:
            raise CheckpointError(f"holds the encrypted record {shown}; {RESAVE}")
        if info.compress_type or method:
            raise CheckpointError(f"holds the compressed record {shown}; {RESAVE}")
        encoded = name.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        name_at = info.header_offset + 30
        if signature != b"PK\x03\x04" or data[name_at : name_at + name_size] != encoded:
            raise CheckpointError(f"is damaged: the record {shown} has no header; {COPY}")
        start = name_at + name_size + extra_size
        end = start + info.file_size
        if info.compress_size != info.file_size or end > archive.start_dir:
            raise CheckpointError(f"is damaged: the record {shown} has a wrong size; {COPY}")
        values = Storage(path, data, np.dtype(np.uint8), start, info.file_size, name, info.CRC)
        records[name] = values
    return {name.removeprefix(root): record for name, record in records.items()}


def _read(records: dict[str, Storage]) -> Any:
    if byteorder := records.get("byteorder"):
        byteorder.check()
        if byteorder.data[byteorder.start : byteorder.start + min(byteorder.count, 7)] != b"little":
            raise CheckpointError("is not little-endian; re-save it on a little-endian machine")
    storages: dict[str, Storage] = {}

    def storage(identity: Any) -> Storage:
        match identity:
            case ("storage", type(name=kind), str(key), _, int(count)) if kind in STORAGES:
                dtype = STORAGES[kind]
            case _:
                raise CheckpointError(f"refers to a storage of an unknown kind; {RESAVE}")
        record = records.get(f"data/{key}")
        if record is None:
            raise CheckpointError(f"has no record of the storage {key[:100]!r}; {COPY}")
        if type(count) is not int or count * dtype.itemsize != record.count:
            raise CheckpointError(
                f"is damaged: the storage {key!r} has {record.count} bytes, not what {kind} of its "
                f"length has; {COPY}"
            )
        typed = dataclasses.replace(record, dtype=dtype, count=count, key=key)
        if storages.setdefault(key, typed).dtype != dtype:
            raise CheckpointError(f"is damaged: the storage {key!r} has two types; {COPY}")
        return storages[key]

    pickled = records["data.pkl"]
    if pickled.count > MAX_PICKLE:
        raise CheckpointError(LARGE)
    pickled.check()
    return unpickle(pickled.data, pickled.start, pickled.start + pickled.count, storage)[0]
