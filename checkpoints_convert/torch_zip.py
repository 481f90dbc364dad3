"""Torch's zip format (``torch.save`` since 1.6), read without torch and without running anything.

The pickle in it is interpreted by a small machine that knows containers, numbers, texts and
tensors. Other permitted things are named, never built; all the rest is refused.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import pickletools
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from checkpoints_convert.errors import CheckpointError


@dataclasses.dataclass(frozen=True, slots=True)
class Opaque:
    """Something that was not built: a class, or an object by the name of what makes it."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Record:
    offset: int
    size: int
    crc: int


_MAX_PICKLE = 2**26
_MAX_EXPANDED = 2**26
_MAX_OPCODES = 10**7
_CHUNK = 2**22
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_RESAVE = "re-save it with torch.save in torch 1.6 or newer"
_COPY = "copy or download it again"
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

_STORAGES: dict[str, Any] = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
    "torch.ComplexFloatStorage": np.complex64,
    "torch.ComplexDoubleStorage": np.complex128,
    "torch.UntypedStorage": np.uint8,
    "torch.storage.UntypedStorage": np.uint8,
}
# The types without a storage class of their own.
_DTYPES: dict[str, Any] = {
    "torch.uint16": np.uint16,
    "torch.uint32": np.uint32,
    "torch.uint64": np.uint64,
    "torch.float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "torch.float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "torch.float8_e5m2": ml_dtypes.float8_e5m2,
    "torch.float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "torch.float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
}

_CALLED = re.compile(
    r"torch\._utils\._rebuild_(tensor(_v[23])?|parameter(_with_state)?)"
    r"|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.Size|collections\.OrderedDict|_codecs\.encode"
    r"|builtins\.(set|frozenset|list|tuple|dict|complex|bytes|bytearray|slice)"
)
_NAMED = re.compile(
    r"torch\.(bool|(b?float|complex|q?u?int)\d+\w*|device|Tensor|(storage\.)?\w+Storage)"
    r"|torch\.nn\.parameter\.(Parameter|Buffer)"
    r"|numpy\.(ndarray|dtype)"
    r"|numpy\._?core\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer)"
    r"|builtins\.(object|bool|int|float|str)|copyreg\.(_reconstructor|__newobj__)"
    r"|argparse\.Namespace|collections\.(defaultdict|Counter|deque)|typing\.Any"
    r"|pathlib\.(_local\.)?\w*Path"
    r"|(omegaconf|pytorch_lightning|lightning|lightning_fabric|torch\.optim|datetime)\.[\w.]+",
    re.ASCII,
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
            _check_format(file)
            return _Reader(file).read()
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    except _ANY_ERROR as error:
        found = " ".join(f"{type(error).__name__}: {str(error)[:200]}".split())
        raise CheckpointError(f"{path} is damaged ({found}); {_COPY}, or {_RESAVE}") from error


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


def _check_format(file: BinaryIO) -> None:
    head = file.read(512)
    if head.startswith(_LEGACY) or head[257:262] == b"ustar":
        raise CheckpointError(
            "is in torch's format from before 1.6; re-save it in torch 1.6 or newer: torch.save("
            'torch.load(path, map_location="cpu", weights_only=True), new_path)'
        )
    if not head.startswith(b"PK\x03\x04"):
        found = "begins with " + repr(head[:8]) if head else "is empty"
        raise CheckpointError(f"is not a torch checkpoint: it {found}; check the path, or {_COPY}")


def _root(names: list[str]) -> str:
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(
            f"is a zip archive with {len(roots)} data.pkl, not a torch checkpoint with one; "
            f"check the path, or {_RESAVE}"
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
        raise CheckpointError(f"is truncated or damaged: {error}; {_COPY}") from error
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
            raise CheckpointError(f"holds the record {shown} twice; {_RESAVE}")
        if not end <= info.header_offset < archive.start_dir:
            raise CheckpointError(f"is damaged: the record {shown} overlaps another; {_COPY}")
        file.seek(info.header_offset)
        signature, _, flags, method, _, name_size, extra_size = struct.unpack(
            "<4sHHH16sHH", file.read(30)
        )
        if info.flag_bits & 1 or flags & 1:
            raise CheckpointError(f"holds the encrypted record {shown}; {_RESAVE}")
        if info.compress_type or method:
            raise CheckpointError(f"holds the compressed record {shown}; {_RESAVE}")
        encoded = name.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        if signature != b"PK\x03\x04" or file.read(name_size) != encoded:
            raise CheckpointError(f"is damaged: the record {shown} has no header; {_COPY}")
        start = info.header_offset + 30 + name_size + extra_size
        end = start + info.file_size
        if info.compress_size != info.file_size or end > archive.start_dir:
            raise CheckpointError(f"is damaged: the record {shown} has a wrong size; {_COPY}")
        records[name] = _Record(start, info.file_size, info.CRC)
    return root, records


def _key(key: Any) -> Any:
    # Python's hash recurses into tuples and reads them whole each time; large ints collide at will.
    if type(key) is tuple and len(key) > 64:
        raise CheckpointError(f"has a key of {len(key)} parts; {_RESAVE}")
    for part in key if type(key) is tuple else (key,):
        if not (
            part is None
            or type(part) in (bool, float, str, bytes, Opaque)
            or (type(part) is int and abs(part) < 2**63)
        ):
            raise CheckpointError(f"has a key of {type(part).__name__}; {_RESAVE}")
    return key


def _insert(target: Any, items: Iterable[tuple[Any, Any]]) -> Any:
    for key, value in items:
        target[_key(key)] = value
    return target


def _add(target: Any, items: list[Any]) -> None:
    if type(target) is list:
        target.extend(items)
    elif type(target) is set:
        target.update(map(_key, items))
    elif isinstance(target, dict):
        _insert(target, zip(items[::2], items[1::2], strict=True))
    elif type(target) is not Opaque:
        raise CheckpointError(f"is damaged: it adds to a {type(target).__name__}; {_COPY}")


def _global(module: Any, name: Any) -> Opaque:
    if type(module) is not str or type(name) is not str:
        raise CheckpointError(f"is damaged: it names something without text; {_COPY}")
    old = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2's, in protocols 0 to 2
    full = f"{old.get(module, module)}.{name}"
    if not _CALLED.fullmatch(full) and not _NAMED.fullmatch(full):
        shown = full if re.fullmatch(r"[\w.]{1,100}", full, re.ASCII) else repr(full[:100])
        raise CheckpointError(
            f"holds {shown}, which is not data; do not load it unless you trust it, or re-save "
            "only the tensors: torch.save(model.state_dict(), path)"
        )
    return Opaque(full)


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._root, self._records = _records(file)
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._storages: dict[str, np.ndarray] = {}
        self._budget = 0  # of items that calls may copy

    def read(self) -> Any:
        byteorder = self._records.get(f"{self._root}byteorder")
        if byteorder and self._bytes(byteorder) != b"little":
            raise CheckpointError("is not little-endian; re-save it on a little-endian machine")
        data = self._bytes(self._records[f"{self._root}data.pkl"])
        self._budget = len(data)
        return self._run(data)

    def _chunks(self, record: _Record) -> Iterator[bytes]:
        # Read, not mapped, so that no page becomes resident.
        crc = 0
        for start in range(0, record.size, _CHUNK):
            self._file.seek(record.offset + start)
            chunk = self._file.read(min(_CHUNK, record.size - start))
            crc = zlib.crc32(chunk, crc)
            yield chunk
        if crc != record.crc:
            raise CheckpointError(
                f"has a damaged record: its CRC-32 is {crc:08x}, expected {record.crc:08x}; {_COPY}"
                ", or re-save it after torch.serialization.set_crc32_options(True) if torch was "
                "told not to write checksums"
            )

    def _bytes(self, record: _Record) -> bytes:
        if record.size > _MAX_PICKLE:
            raise CheckpointError(
                f"holds {record.size} bytes beside its tensors, at most {_MAX_PICKLE} are read; "
                "re-save only the tensors: torch.save(model.state_dict(), path)"
            )
        return b"".join(self._chunks(record))

    def _storage(self, identity: Any) -> np.ndarray:
        match identity:
            case ("storage", Opaque(name), str(key), _, int(count)) if name in _STORAGES:
                dtype = np.dtype(_STORAGES[name])
            case _:
                raise CheckpointError(f"refers to a storage of an unknown kind; {_RESAVE}")
        record = self._records.get(f"{self._root}data/{key}")
        if record is None:
            raise CheckpointError(f"has no record of the storage {key[:100]!r}; {_COPY}")
        if type(count) is not int or count * dtype.itemsize != record.size:
            raise CheckpointError(
                f"is damaged: the storage {key!r} has {record.size} bytes, not what {name} of its "
                f"length has; {_COPY}"
            )
        if key not in self._storages:
            for chunk in self._chunks(record):
                if dtype == np.bool_ and chunk.translate(None, b"\0\1"):
                    raise CheckpointError(
                        f"has bool values other than 0 and 1 in the storage {key!r}; re-save "
                        "clones of its tensors"
                    )
            self._storages[key] = np.frombuffer(self._map, dtype, count, record.offset)
        if self._storages[key].dtype != dtype:
            raise CheckpointError(f"is damaged: the storage {key!r} has two types; {_COPY}")
        return self._storages[key]

    def _tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, dtype: Any = None
    ) -> np.ndarray:
        if not (
            isinstance(storage, np.ndarray)
            and storage.ndim == 1
            and storage.flags.c_contiguous
            and type(size) is type(stride) is tuple
            and len(size) == len(stride) <= 64
            and all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride))
        ):
            raise CheckpointError(f"is damaged: it has a tensor of no valid layout; {_COPY}")
        data = storage.view(np.uint8)
        dtype = np.dtype(storage.dtype if dtype is None else dtype)
        count = math.prod(size)
        reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
        if count and reach * dtype.itemsize > data.size:
            raise CheckpointError(f"is damaged: a tensor reaches beyond its storage; {_COPY}")
        if count * dtype.itemsize > max(len(self._map), _MAX_EXPANDED):
            raise CheckpointError(
                "holds an expanded tensor far larger than the file; re-save it without the "
                "expanded dimensions"
            )
        if not count:
            return np.ndarray(size, dtype, data)
        steps = tuple(step * dtype.itemsize for step in stride)
        return np.ndarray(size, dtype, data, offset * dtype.itemsize, steps)

    def _spend(self, items: Any) -> Any:
        # Else a short pickle could copy the same large object over and over.
        self._budget -= len(items)
        if self._budget < 0:
            raise CheckpointError(f"copies more than it holds; {_RESAVE}")
        return items

    def _call(self, function: Any, args: Any) -> Any:
        if type(function) is not Opaque or type(args) is not tuple:
            raise CheckpointError(f"is damaged: it calls a {type(function).__name__}; {_COPY}")
        match function.name.rpartition(".")[2], args:
            case _ if not _CALLED.fullmatch(function.name):
                return Opaque(function.name)
            case "_rebuild_tensor", (storage, offset, size, stride):
                return self._tensor(storage, offset, size, stride)
            case "_rebuild_tensor_v2", (storage, offset, size, stride, _, _, *extra):
                if extra in ([], [None], [{}]):
                    return self._tensor(storage, offset, size, stride)
            case "_rebuild_tensor_v3", (storage, offset, size, stride, _, _, Opaque(name), *extra):
                if name in _DTYPES and extra in ([], [None], [{}]):
                    return self._tensor(storage, offset, size, stride, _DTYPES[name])
            case "_rebuild_parameter", (np.ndarray() as data, _, _):
                return data
            case "_rebuild_parameter_with_state", (np.ndarray() as data, _, _, _):
                return data
            case "_rebuild_from_type_v2", (Opaque(name) as inner, _, tuple(inner_args), _):
                # Not itself again, which could be nested without end.
                if name.startswith("torch._utils."):
                    return self._call(inner, inner_args)
            case ("list", ()) | ("list", (list() | tuple(),)):
                return list(*map(self._spend, args))
            case ("tuple" | "Size", ()) | ("tuple" | "Size", (list() | tuple(),)):
                return tuple(*map(self._spend, args))
            case ("set" | "frozenset" as kind, ()) | (
                "set" | "frozenset" as kind,
                (list() | tuple(),),
            ):
                members = map(_key, self._spend(args[0] if args else ()))
                return set(members) if kind == "set" else frozenset(members)
            case "dict" | "OrderedDict" as kind, () | (list() | tuple() | dict(),):
                items = self._spend(args[0] if args else ())
                pairs = items.items() if isinstance(items, dict) else items
                return _insert({} if kind == "dict" else OrderedDict(), pairs)
            case ("bytes", ()) | ("bytearray", ()):
                return b"" if function.name == "builtins.bytes" else bytearray()
            case "bytearray", (bytes(data),):
                return bytearray(self._spend(data))
            case "encode", (str(text), "latin1"):
                return self._spend(text).encode("latin1")
            case "bytearray", (str(text), "latin-1"):
                return bytearray(self._spend(text).encode("latin1"))
            case "complex", (float(real), float(imaginary)):
                return complex(real, imaginary)
            case "slice", (None | int(), None | int(), None | int()):
                return slice(*args)
        raise CheckpointError(
            f"calls {function.name} with unknown arguments (a conjugated, negated or otherwise "
            "special tensor?); re-save plain tensors: x.resolve_conj().resolve_neg()"
        )

    def _run(self, data: bytes) -> Any:
        stack: list[Any] = []
        marks: list[list[Any]] = []
        memo: dict[int, Any] = {}
        operations: Iterator[tuple[Any, Any, Any]] = pickletools.genops(data)
        for count, (opcode, arg, _) in enumerate(operations):
            if count >= _MAX_OPCODES:
                raise CheckpointError(f"has more than {_MAX_OPCODES} pickle opcodes; {_RESAVE}")
            match opcode.name:
                case "BINPUT" | "LONG_BINPUT" | "PUT":
                    memo[arg] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET" | "GET":
                    stack.append(memo[arg])
                case (
                    "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4"
                    | "STRING" | "BINSTRING" | "SHORT_BINSTRING"
                    | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8"
                    | "UNICODE" | "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8"
                    | "FLOAT" | "BINFLOAT"
                ):  # fmt: skip
                    stack.append(arg)
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(opcode.name == "NEWTRUE")
                case "EMPTY_TUPLE":
                    stack.append(())
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_SET":
                    stack.append(set())
                case "TUPLE1":
                    stack[-1:] = [(stack[-1],)]
                case "TUPLE2":
                    stack[-2:] = [(stack[-2], stack[-1])]
                case "TUPLE3":
                    stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
                case "MARK":
                    marks.append(stack)
                    stack = []
                case "TUPLE" | "LIST" | "DICT" | "FROZENSET" as kind:
                    items, stack = stack, marks.pop()
                    if kind == "DICT":
                        stack.append({})
                        _add(stack[-1], items)
                    elif kind == "FROZENSET":
                        stack.append(frozenset(map(_key, items)))
                    else:
                        stack.append(tuple(items) if kind == "TUPLE" else items)
                case "APPENDS" | "SETITEMS" | "ADDITEMS":
                    items, stack = stack, marks.pop()
                    _add(stack[-1], items)
                case "APPEND":
                    item = stack.pop()
                    _add(stack[-1], [item])
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _add(stack[-1], [key, value])
                case "GLOBAL":
                    stack.append(_global(*arg.split(" ", 1)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(_global(module, name))
                case "REDUCE" | "NEWOBJ":
                    args, function = stack.pop(), stack.pop()
                    stack.append(self._call(function, args))
                case "NEWOBJ_EX":
                    keywords, args, function = stack.pop(), stack.pop(), stack.pop()
                    stack.append(self._call(function, (args, keywords) if keywords else args))
                case "BUILD":  # attributes, such as a state dict's ``_metadata``, are left out
                    stack.pop()
                    if type(stack[-1]) not in (Opaque, OrderedDict):
                        raise CheckpointError(f"is damaged: plain data have attributes; {_COPY}")
                case "BINPERSID":
                    stack.append(self._storage(stack.pop()))
                case "POP" if stack:
                    stack.pop()
                case "POP" | "POP_MARK":
                    stack = marks.pop()
                case "DUP":
                    stack.append(stack[-1])
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case unknown:
                    raise CheckpointError(f"uses the pickle opcode {unknown}; {_RESAVE}")
        raise CheckpointError(f"is damaged: its pickle does not stop; {_COPY}")
