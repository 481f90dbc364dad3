"""Files of ``torch.save``, read without torch and without running anything; its zip format.

That is the format since torch 1.6. Older files go to ``torch_legacy``.
"""

from __future__ import annotations

import dataclasses
import io
import mmap
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from checkpoints_convert import torch_legacy
from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.torch_pickle import (
    COPY,
    MAX_PICKLE,
    RESAVE,
    STORAGES,
    Machine,
    Opaque,
    check_bools,
    chunks,
)


@dataclasses.dataclass(frozen=True, slots=True)
class _Record:
    offset: int
    size: int
    crc: int


_ANY_ERROR = (
    zipfile.BadZipFile,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,  # and NotImplementedError, RecursionError
    TypeError,
    ValueError,  # and UnicodeError
    struct.error,
    zlib.error,
    Warning,  # of an odd escape sequence, where warnings are errors
)


def load(path: str | os.PathLike[str]) -> Any:
    """Reads what ``torch.save`` wrote.

    Args:
        path: The file.

    Returns:
        Its object. Tensors are read-only arrays that are views of a map of the file, which must
        therefore not be changed while they live; what is neither a tensor nor plain data is an
        ``Opaque``. A hostile file's containers may hold themselves.

    Raises:
        CheckpointError: If there is no such file, or it is damaged, unsafe, or of another format.
        OSError: If the file cannot be read.
    """
    try:
        if not Path(path).exists():
            raise CheckpointError("does not exist; check the path")
        if not Path(path).is_file():
            raise CheckpointError("is not a file; name the checkpoint file itself")
        with open(path, "rb") as file:
            return _reader(file).read()
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    except _ANY_ERROR as error:
        found = " ".join(f"{type(error).__name__}: {str(error)[:200]}".split())
        raise CheckpointError(f"{path} is damaged ({found}); {COPY}, or {RESAVE}") from error


def release(array: np.ndarray) -> None:
    """Lets go of the memory of a checkpoint's pages that were used; they are read again if needed.

    Args:
        array: Any array of ``load``: the pages of the whole file go. Others are left alone.
    """
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    # Only what cannot have been written comes back the same.
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") and memoryview(base).readonly:
        base.madvise(mmap.MADV_DONTNEED)


def _reader(file: BinaryIO) -> _Reader | torch_legacy.Reader:
    head = file.read(512)
    if torch_legacy.begins(head):
        return torch_legacy.Reader(file)
    if head[257:262] == b"ustar":
        raise CheckpointError(
            "is in the tar format of torch 0.1, which is not read; if you trust it, re-save it in "
            'torch 1.6 or newer: torch.save(torch.load(path, map_location="cpu", '
            "weights_only=False), new_path)"
        )
    if not head.startswith(b"PK\x03\x04"):
        found = "begins with " + repr(head[:8]) if head else "is empty"
        raise CheckpointError(f"is not a torch checkpoint: it {found}; check the path, or {COPY}")
    return _Reader(file)


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


def _records(file: BinaryIO) -> tuple[str, dict[str, _Record]]:
    """The archive's root and its records by name; they are plain and do not overlap."""
    try:
        archive = zipfile.ZipFile(file)
    except (*_ANY_ERROR, OSError) as error:  # OSError: sought before the file's begin
        raise CheckpointError(f"is truncated or damaged: {error}; {COPY}") from error
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    root = _root([info.orig_filename for info in infos])
    records: dict[str, _Record] = {}
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
        file.seek(info.header_offset)
        signature, _, flags, method, _, name_size, extra_size = struct.unpack(
            "<4sHHH16sHH", file.read(30)
        )
        if info.flag_bits & 1 or flags & 1:
            raise CheckpointError(f"holds the encrypted record {shown}; {RESAVE}")
        if info.compress_type or method:
            raise CheckpointError(f"holds the compressed record {shown}; {RESAVE}")
        encoded = name.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        if signature != b"PK\x03\x04" or file.read(name_size) != encoded:
            raise CheckpointError(f"is damaged: the record {shown} has no header; {COPY}")
        start = info.header_offset + 30 + name_size + extra_size
        end = start + info.file_size
        if info.compress_size != info.file_size or end > archive.start_dir:
            raise CheckpointError(f"is damaged: the record {shown} has a wrong size; {COPY}")
        records[name] = _Record(start, info.file_size, info.CRC)
    return root, records


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._root, self._records = _records(file)
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._storages: dict[str, np.ndarray] = {}

    def read(self) -> Any:
        byteorder = self._records.get(f"{self._root}byteorder")
        if byteorder and self._bytes(byteorder) != b"little":
            raise CheckpointError("is not little-endian; re-save it on a little-endian machine")
        data = self._bytes(self._records[f"{self._root}data.pkl"])
        return Machine(io.BytesIO(data), len(self._map), self._storage).run()

    def _chunks(self, record: _Record) -> Iterator[bytes]:
        crc = 0
        for chunk in chunks(self._file, record.offset, record.size):
            crc = zlib.crc32(chunk, crc)
            yield chunk
        if crc != record.crc:
            raise CheckpointError(
                f"has a damaged record: its CRC-32 is {crc:08x}, expected {record.crc:08x}; {COPY}"
                ", or re-save it after torch.serialization.set_crc32_options(True) if torch was "
                "told not to write checksums"
            )

    def _bytes(self, record: _Record) -> bytes:
        if record.size > MAX_PICKLE:
            raise CheckpointError(
                f"holds {record.size} bytes beside its tensors, at most {MAX_PICKLE} are read; "
                "re-save only the tensors: torch.save(model.state_dict(), path)"
            )
        return b"".join(self._chunks(record))

    def _storage(self, identity: Any) -> np.ndarray:
        match identity:
            case ("storage", Opaque(name), str(key), _, int(count)) if name in STORAGES:
                dtype = np.dtype(STORAGES[name])
            case _:
                raise CheckpointError(f"refers to a storage of an unknown kind; {RESAVE}")
        record = self._records.get(f"{self._root}data/{key}")
        if record is None:
            raise CheckpointError(f"has no record of the storage {key[:100]!r}; {COPY}")
        if type(count) is not int or count * dtype.itemsize != record.size:
            raise CheckpointError(
                f"is damaged: the storage {key!r} has {record.size} bytes, not what {name} of its "
                f"length has; {COPY}"
            )
        if key not in self._storages:
            for chunk in self._chunks(record):
                if dtype == np.bool_:
                    check_bools(chunk, key)
            self._storages[key] = np.frombuffer(self._map, dtype, count, record.offset)
        if self._storages[key].dtype != dtype:
            raise CheckpointError(f"is damaged: the storage {key!r} has two types; {COPY}")
        return self._storages[key]
