"""The pickles of ``torch.save``, interpreted without torch and without running anything.

A small machine knows containers, numbers, texts and tensors. Other permitted things are named,
never built; all the rest is refused.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, BinaryIO, Protocol, cast

import ml_dtypes
import numpy as np

from checkpoints_convert.errors import CheckpointError


@dataclasses.dataclass(frozen=True, slots=True)
class Opaque:
    """Something that was not built: a class, or an object by the name of what makes it."""

    name: str


class Stream(Protocol):
    """What a pickle is read from."""

    def read(self, size: int, /) -> bytes: ...

    def readline(self) -> bytes: ...

    def tell(self) -> int: ...


MAX_PICKLE = 2**26
"""Bytes of a file that are read beside its tensors."""

RESAVE = "re-save it with torch.save in torch 1.6 or newer"
COPY = "copy or download it again"

_MAX_EXPANDED = 2**26
_MAX_OPCODES = 10**7
_CHUNK = 2**22

STORAGES: dict[str, Any] = {
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


def chunks(file: BinaryIO, start: int, size: int) -> Iterator[bytes]:
    """Bytes of a file; read, not mapped, so that no page becomes resident."""
    for offset in range(0, size, _CHUNK):
        file.seek(start + offset)
        yield file.read(min(_CHUNK, size - offset))


def check_bools(chunk: bytes, key: str) -> None:
    """Refuses what NumPy's bool cannot be."""
    if chunk.translate(None, b"\0\1"):
        raise CheckpointError(
            f"has bool values other than 0 and 1 in the storage {key[:100]!r}; re-save clones of "
            "its tensors"
        )


def _key(key: Any) -> Any:
    # Python's hash recurses into tuples and reads them whole each time; large ints collide at will.
    if type(key) is tuple and len(key) > 64:
        raise CheckpointError(f"has a key of {len(key)} parts; {RESAVE}")
    for part in key if type(key) is tuple else (key,):
        if not (
            part is None
            or type(part) in (bool, float, str, bytes, Opaque)
            or (type(part) is int and abs(part) < 2**63)
        ):
            raise CheckpointError(f"has a key of {type(part).__name__}; {RESAVE}")
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
        raise CheckpointError(f"is damaged: it adds to a {type(target).__name__}; {COPY}")


def _global(module: Any, name: Any) -> Opaque:
    if type(module) is not str or type(name) is not str:
        raise CheckpointError(f"is damaged: it names something without text; {COPY}")
    old = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2's, in protocols 0 to 2
    full = f"{old.get(module, module)}.{name}"
    if not _CALLED.fullmatch(full) and not _NAMED.fullmatch(full):
        shown = full if re.fullmatch(r"[\w.]{1,100}", full, re.ASCII) else repr(full[:100])
        raise CheckpointError(
            f"holds {shown}, which is not data; do not load it unless you trust it, or re-save "
            "only the tensors: torch.save(model.state_dict(), path)"
        )
    return Opaque(full)


class Machine:
    """Interprets one pickle.

    Args:
        stream: Where it begins.
        size: The file's size in bytes: no tensor may be far larger.
        storage: Gives the array of a persistent id.
    """

    def __init__(self, stream: Stream, size: int, storage: Callable[[Any], np.ndarray]) -> None:
        self._stream = stream
        self._size = size
        self._storage = storage
        self._spent = 0  # items that calls copied

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
            raise CheckpointError(f"is damaged: it has a tensor of no valid layout; {COPY}")
        data = storage.view(np.uint8)
        dtype = np.dtype(storage.dtype if dtype is None else dtype)
        count = math.prod(size)
        reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
        if count and reach * dtype.itemsize > data.size:
            raise CheckpointError(f"is damaged: a tensor reaches beyond its storage; {COPY}")
        if count * dtype.itemsize > max(self._size, _MAX_EXPANDED):
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
        self._spent += len(items)
        if self._spent > self._stream.tell():
            raise CheckpointError(f"copies more than it holds; {RESAVE}")
        return items

    def _call(self, function: Any, args: Any) -> Any:
        if type(function) is not Opaque or type(args) is not tuple:
            raise CheckpointError(f"is damaged: it calls a {type(function).__name__}; {COPY}")
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

    def run(self) -> Any:
        """Interprets the pickle up to its end, where the stream is left.

        Returns:
            Its object. What is neither a tensor nor plain data is an ``Opaque``. A hostile pickle's
            containers may hold themselves.

        Raises:
            CheckpointError: If it asks for what is not data.
            Exception: Of many types, if it is damaged.
        """
        stack: list[Any] = []
        marks: list[list[Any]] = []
        memo: dict[int, Any] = {}
        operations: Iterator[tuple[Any, Any, Any]] = pickletools.genops(
            cast("IO[bytes]", self._stream)
        )
        for count, (opcode, arg, _) in enumerate(operations):
            if count >= _MAX_OPCODES:
                raise CheckpointError(f"has more than {_MAX_OPCODES} pickle opcodes; {RESAVE}")
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
                        raise CheckpointError(f"is damaged: plain data have attributes; {COPY}")
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
                    raise CheckpointError(f"uses the pickle opcode {unknown}; {RESAVE}")
        raise CheckpointError(f"is damaged: its pickle does not stop; {COPY}")
