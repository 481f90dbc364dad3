"""Torch's format from before 1.6: five pickles, then for each storage its length and raw values.

Where a storage lies follows from the lengths and types of those before it, so the object's pickle
is interpreted twice: first for them, then for the tensors. The format has no checksums: damage to
the values of tensors is not noticed here, other than to those of bools.
"""

from __future__ import annotations

import mmap
from typing import Any, BinaryIO, NamedTuple

import numpy as np

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

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def begins(head: bytes) -> bool:
    """Whether a file's first bytes are those of this format."""
    binary = _MAGIC.to_bytes(10, "little") in head[:32]
    return binary or head.startswith(b"L%d" % _MAGIC)  # in pickle's protocol 1


class _Part(NamedTuple):
    """A storage, or a part of one."""

    root: str
    offset: int
    numel: int
    dtype: np.dtype


class _Stream:
    """A file as pickles are read from it: not beyond its end, nor beyond what may be read."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        file.seek(start)
        self._file = file
        self._at = start
        self._size = size

    def _limit(self, wanted: int) -> int:
        if self._at + wanted > self._size:
            raise CheckpointError(f"is truncated or damaged: a pickle in it does not end; {COPY}")
        if self._at + wanted > MAX_PICKLE:
            raise CheckpointError(
                f"holds more than {MAX_PICKLE} bytes beside its tensors; re-save only the tensors: "
                "torch.save(model.state_dict(), path)"
            )
        return wanted

    def read(self, size: int, /) -> bytes:
        self._at += self._limit(size)
        return self._file.read(size)

    def readline(self) -> bytes:
        line = self._file.readline(MAX_PICKLE)
        self._at += self._limit(len(line))
        return line

    def tell(self) -> int:
        return self._at


def _no_storage(identity: Any) -> np.ndarray:
    raise CheckpointError(f"is damaged: it has a storage outside of its object; {COPY}")


class Reader:
    """Reads one file.

    Args:
        file: It, at any position.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._parts: dict[str, _Part] = {}
        self._starts: dict[str, int] = {}

    def read(self) -> Any:
        """Its object; see ``torch_zip.load``."""
        size = len(self._map)
        stream = _Stream(self._file, 0, size)
        header = [Machine(stream, size, _no_storage).run() for _ in range(3)]
        match header:
            case [int(magic), int(protocol), {"little_endian": bool(little)}]:
                pass
            case _:
                raise CheckpointError(f"is damaged: it has no valid header; {COPY}")
        if (magic, protocol) != (_MAGIC, _PROTOCOL):
            raise CheckpointError(f"is damaged, or of an unknown version; {COPY}, or {RESAVE}")
        if not little:
            raise CheckpointError("is not little-endian; re-save it on a little-endian machine")
        start = stream.tell()
        Machine(stream, size, self._storage).run()
        keys = Machine(stream, size, _no_storage).run()
        self._starts = self._locate(keys, stream.tell())
        return Machine(_Stream(self._file, start, size), size, self._storage).run()

    def _locate(self, keys: Any, at: int) -> dict[str, int]:
        """Where each storage's values begin; they fill the file from ``at`` to its end."""
        roots = {key: part for key, part in self._parts.items() if part.root == key}
        if (
            type(keys) is not list
            or any(type(key) is not str for key in keys)
            or sorted(keys) != sorted(roots)
        ):
            raise CheckpointError(f"is damaged: it lists other storages than it refers to; {COPY}")
        starts: dict[str, int] = {}
        for key in keys:
            _, _, numel, dtype = roots[key]
            self._file.seek(at)
            length = self._file.read(8)
            found = int.from_bytes(length, "little", signed=True)
            if len(length) == 8 and found != numel:
                raise CheckpointError(
                    f"is damaged: the storage {key[:100]!r} has the length {found}, expected "
                    f"{numel}; {COPY}"
                )
            starts[key] = at + 8
            at += 8 + numel * dtype.itemsize
            if at > len(self._map):
                raise CheckpointError(
                    f"is truncated or damaged: the storage {key[:100]!r} reaches too far; {COPY}"
                )
            if dtype == np.bool_:
                for chunk in chunks(self._file, starts[key], numel):
                    check_bools(chunk, key)
        if at != len(self._map):
            raise CheckpointError(
                f"is damaged: {len(self._map) - at} bytes follow its last storage; {COPY}"
            )
        return starts

    def _storage(self, identity: Any) -> np.ndarray:
        match identity:
            case ("storage", Opaque(kind), str(key), _, int(numel), None) if kind in STORAGES:
                name, offset, length = key, 0, numel
            case (
                "storage",
                Opaque(kind),
                str(key),
                _,
                int(numel),
                (str(name), int(offset), int(length)),
            ) if kind in STORAGES:
                pass
            case _:
                raise CheckpointError(f"refers to a storage of an unknown kind; {RESAVE}")
        whole = _Part(key, 0, numel, np.dtype(STORAGES[kind]))
        if not (
            all(type(n) is int for n in (numel, offset, length))
            and 0 <= offset <= offset + length <= numel
            and numel * whole.dtype.itemsize <= len(self._map)
        ):
            raise CheckpointError(
                f"is truncated or damaged: the storage {key[:100]!r} or a view of it reaches too "
                f"far; {COPY}"
            )
        part = whole._replace(offset=offset, numel=length)
        for known, new in ((key, whole), (name, part)):
            if self._parts.setdefault(known, new) != new:
                raise CheckpointError(
                    f"is damaged: the storage {known[:100]!r} has two types or places; {COPY}"
                )
        # In the first of the two runs a stand-in: as many values from the file's begin.
        array = np.frombuffer(self._map, whole.dtype, numel, self._starts.get(key, 0))
        return array[offset : offset + length]
