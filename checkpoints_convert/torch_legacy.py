"""Torch's format from before 1.6: five pickles, then for each storage its length and raw values.

The place of a storage follows from the lengths and types of those before it, so it is known after
the pickles are read. The format has no checksums: damage to values is found here only in bools.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.torch_pickle import COPY, RESAVE, STORAGES, Storage, unpickle

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def begins(head: bytes) -> bool:
    """Whether a file's first bytes are those of this format."""
    binary = _MAGIC.to_bytes(10, "little") in head[:32]
    return binary or head.startswith(b"L%d" % _MAGIC)  # in pickle's protocol 1


def _no_storage(_: Any) -> Storage:
    raise CheckpointError(f"is damaged: it has a storage outside of its object; {COPY}")


def read(path: Path, data: mmap.mmap) -> Any:
    """Reads a mapped file of this format; see ``torch_zip.load``."""
    at, header = 0, []
    for _ in range(3):
        value, at = unpickle(data, at, len(data), _no_storage)
        header.append(value)
    match header:
        case [int(magic), int(protocol), {"little_endian": bool(little)}]:
            pass
        case _:
            raise CheckpointError(f"is damaged: it has no valid header; {COPY}")
    if (magic, protocol) != (_MAGIC, _PROTOCOL):
        raise CheckpointError(f"is damaged, or of an unknown version; {COPY}, or {RESAVE}")
    if not little:
        raise CheckpointError("is not little-endian; re-save it on a little-endian machine")
    storages = _Storages(path, data)
    value, at = unpickle(data, at, len(data), storages.get)
    keys, at = unpickle(data, at, len(data), _no_storage)
    storages.locate(keys, at)
    return value


class _Storages:
    """The storages of a file, and the views of them, by name."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._map = data
        self._storages: dict[str, Storage] = {}

    def get(self, identity: Any) -> Storage:
        """The storage of a persistent id. Its start is relative until ``locate`` is called."""
        match identity:
            case ("storage", type(name=kind), str(key), _, int(count), None) if kind in STORAGES:
                name, offset, length = key, 0, count
            case (
                "storage",
                type(name=kind),
                str(key),
                _,
                int(count),
                (str(name), int(offset), int(length)),
            ) if kind in STORAGES:
                pass
            case _:
                raise CheckpointError(f"refers to a storage of an unknown kind; {RESAVE}")
        dtype = STORAGES[kind]
        if not (
            all(type(n) is int for n in (count, offset, length))
            and 0 <= offset <= offset + length <= count
            and count * dtype.itemsize <= len(self._map)
        ):
            raise CheckpointError(
                f"is truncated or damaged: the storage {key[:100]!r} or a view of it reaches too "
                f"far; {COPY}"
            )
        for known, first, size in ((key, 0, count), (name, offset, length)):
            new = Storage(self._path, self._map, dtype, first * dtype.itemsize, size, key)
            if self._storages.setdefault(known, new) != new:
                raise CheckpointError(
                    f"is damaged: the storage {known[:100]!r} has two types or places; {COPY}"
                )
        return self._storages[name]

    def locate(self, keys: Any, at: int) -> None:
        """Sets where the values of each storage start; they fill the file from ``at`` on."""
        roots = {name for name, storage in self._storages.items() if storage.key == name}
        if (
            type(keys) is not list
            or any(type(key) is not str for key in keys)
            or sorted(keys) != sorted(roots)
        ):
            raise CheckpointError(f"is damaged: it lists other storages than it refers to; {COPY}")
        starts: dict[str, int] = {}
        for key in keys:
            root = self._storages[key]
            length = self._map[at : at + 8]
            stored = int.from_bytes(length, "little", signed=True)
            if len(length) == 8 and stored != root.count:
                raise CheckpointError(
                    f"is damaged: the storage {key[:100]!r} has the length {stored}, expected "
                    f"{root.count}; {COPY}"
                )
            starts[key] = at + 8
            at += 8 + root.count * root.dtype.itemsize
            if at > len(self._map):
                raise CheckpointError(
                    f"is truncated or damaged: the storage {key[:100]!r} reaches too far; {COPY}"
                )
        if at != len(self._map):
            raise CheckpointError(
                f"is damaged: {len(self._map) - at} bytes follow its last storage; {COPY}"
            )
        for storage in self._storages.values():
            storage.start += starts[storage.key]
