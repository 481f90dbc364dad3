"""The pickles of ``torch.save``, read with the standard library's unpickler and without torch.

The unpickler is restricted: it builds containers, numbers, text and tensors. Other permitted names
become ``Opaque`` stand-ins, all remaining names raise an error, and nothing in a file can run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import mmap
import pickle
import pickletools
import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, ClassVar, cast

import ml_dtypes  # noqa: F401  # gives NumPy the names of its types
import numpy as np

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.rules import Tensor

MAX_PICKLE = 2**26
"""Upper limit on the bytes of one pickle."""

RESAVE = "re-save it with torch.save in torch 1.6 or newer"
COPY = "copy or download it again"
LARGE = (
    f"holds more than {MAX_PICKLE} bytes beside its tensors; re-save only the tensors: "
    "torch.save(model.state_dict(), path)"
)

_MAX_EXPANDED = 2**26
_MAX_OPCODES = 5 * 10**6
_MAX_NAMES = 1000
_MAX_KEY, _MAX_KEYS = 2**10, 2**20  # costs of one key and of all keys
_COMPUTED = 2**8  # cost of a key that is the result of a call
_CHUNK = 2**22

STORAGES = {
    f"torch.{name}Storage": np.dtype(dtype)
    for name, dtype in {
        "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
        "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
        "Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
        "Untyped": "uint8", "storage.Untyped": "uint8",
    }.items()
}  # fmt: skip
_EIGHT_BITS = ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
_DTYPES = {  # types without a storage class
    f"torch.{name}": np.dtype(name)
    for name in ("uint16", "uint32", "uint64", *(f"float8_{kind}" for kind in _EIGHT_BITS))
}

# Names whose calls are carried out, by ``_Unpickler.build``. Slices are not among them: assigning
# to a slice lets a list double with each opcode.
_BUILT = re.compile(
    r"torch\._utils\._rebuild_(tensor(_v[23])?|parameter(_with_state)?)"
    r"|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.Size|collections\.OrderedDict|_codecs\.encode"
    r"|builtins\.(set|frozenset|complex|bytes|bytearray)"
)
_NAMED = re.compile(
    r"torch\.(bool|(b?float|complex|q?u?int)\d+\w*|device|Tensor|(storage\.)?\w+Storage)"
    r"|torch\.nn\.parameter\.(Parameter|Buffer)"
    r"|numpy\.(ndarray|dtype)"
    r"|numpy\._?core\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer)"
    r"|builtins\.(object|bool|int|float|str|list|tuple|dict|slice)"
    r"|copyreg\.(_reconstructor|__newobj__)"
    r"|argparse\.Namespace|collections\.(defaultdict|Counter|deque)|typing\.Any"
    r"|pathlib\.(_local\.)?\w*Path"
    r"|(omegaconf|pytorch_lightning|lightning|lightning_fabric|torch\.optim|datetime)\.[\w.]+",
    re.ASCII,
)
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}

# The operands that are hashed, of each opcode that has some.
_KEYS = {
    "SETITEM": slice(1, 2),
    "SETITEMS": slice(0, None, 2),
    "DICT": slice(0, None, 2),
    "ADDITEMS": slice(None),
    "FROZENSET": slice(None),
}
# Opcodes that torch.save does not write: they call a name directly, or refer outside of the pickle.
_REFUSED = {
    "INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER",
}  # fmt: skip


@contextlib.contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Turns every error except an OSError into a CheckpointError that names the file."""
    try:
        yield
    except OSError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    except Exception as error:  # damaged pickles and archives raise errors of many types
        message = " ".join(f"{type(error).__name__}: {str(error)[:200]}".split())
        raise CheckpointError(f"{path} is damaged ({message}); {COPY}, or {RESAVE}") from error


class Inert:
    """Base class of the objects that a pickle may hold but not change."""

    __slots__ = ()

    def ignore(self, *_: Any) -> None:
        """Ignores an attribute or item that the pickle would set."""

    __setstate__ = ignore


class Opaque(Inert):
    """Stand-in for a class, or for an object of it, that is not built.

    Each name is a subclass, because pickles create objects from types. A stand-in ignores all
    arguments, attributes and items.

    Attributes:
        name: The full name, such as ``"argparse.Namespace"``.
    """

    __slots__ = ()
    name: ClassVar[str]

    def __new__(cls, *_: Any, **__: Any) -> Opaque:
        return super().__new__(cls)

    append = extend = add = __setitem__ = Inert.ignore


@dataclasses.dataclass
class Storage(Inert):
    """Consecutive values of one type in a mapped file.

    Attributes:
        path: The file, for error messages.
        data: The map of the file.
        dtype: The type of the values.
        start: The offset of the first value, in bytes.
        count: The number of values.
        key: The name of the storage.
        crc: The CRC-32 of the values, or None if the format has no checksums.
    """

    path: Path
    data: mmap.mmap
    dtype: np.dtype
    start: int
    count: int
    key: str
    crc: int | None = None
    checked: bool = False

    def check(self) -> None:
        """Raises CheckpointError if the values are damaged."""
        crc, stop = 0, self.start + self.count * self.dtype.itemsize
        for at in range(self.start, stop, _CHUNK):
            chunk = self.data[at : min(at + _CHUNK, stop)]
            crc = zlib.crc32(chunk, crc)
            if self.dtype == np.bool_ and chunk.translate(None, b"\0\1"):
                raise CheckpointError(
                    f"has bool values other than 0 and 1 in the storage {self.key[:100]!r}; "
                    "re-save clones of its tensors"
                )
        if self.crc not in (None, crc):
            raise CheckpointError(
                f"has a damaged record: its CRC-32 is {crc:08x}, expected {self.crc:08x}; {COPY}, "
                "or re-save it after torch.serialization.set_crc32_options(True) if torch was told "
                "not to write checksums"
            )
        self.checked = True

    def read(
        self, dtype: np.dtype, shape: tuple[int, ...], offset: int, strides: tuple[int, ...]
    ) -> np.ndarray:
        """Returns a read-only view of the map. The storage is checked at its first use.

        Args:
            dtype: The type of the tensor, which can differ from the storage's.
            shape: The shape of the tensor.
            offset: The offset of the first value in the storage, in bytes.
            strides: The strides, in bytes.
        """
        with errors_of(self.path):
            if not self.checked:
                self.check()
            return np.ndarray(shape, dtype, self.data, self.start + offset, strides)

    def release(self) -> None:
        """Frees the memory of the map's pages that were read; they are read again if needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.data.madvise(mmap.MADV_DONTNEED)


class _StateDict(OrderedDict[Any, Any], Inert):
    __setstate__ = Inert.ignore  # attributes such as the ``_metadata`` of a module


@dataclasses.dataclass(eq=False)
class _Stream:
    """Part of a mapped file, from which a pickle is read without a copy of the whole part."""

    data: mmap.mmap
    at: int
    end: int

    def __post_init__(self) -> None:
        self.limit = self.at + MAX_PICKLE

    def read(self, size: int, /) -> bytes:
        start, self.at = self.at, self.at + size
        if self.at > self.end:
            raise CheckpointError(f"is truncated or damaged: a pickle in it does not end; {COPY}")
        if self.at > self.limit:
            raise CheckpointError(LARGE)
        return self.data[start : self.at]

    def readline(self) -> bytes:
        end = min(self.end, self.limit)
        newline = self.data.find(b"\n", self.at, end)
        return self.read((end if newline < 0 else newline) + 1 - self.at)

    def tell(self) -> int:
        return self.at


def _scan(stream: _Stream) -> None:
    """Bounds the time and the memory of unpickling, and moves the stream to the pickle's end.

    Lengths must lie in the stream, and memo indices must not exceed the number of opcodes, since
    the unpickler allocates as many slots. For each value on the stack, the cost of hashing it is
    tracked: each use as a key reads large integers and nested tuples again, and computed values can
    be made to collide. Opcodes must not cross the end of a frame, where the unpickler would read
    other opcodes than this function.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    frame_end = spent = 0
    operations: Iterator[tuple[Any, Any, Any]] = pickletools.genops(cast("IO[bytes]", stream))
    for count, (opcode, arg, position) in enumerate(operations):
        name, before = opcode.name, opcode.stack_before
        if count >= _MAX_OPCODES:
            raise CheckpointError(f"has more than {_MAX_OPCODES} pickle opcodes; {RESAVE}")
        if name in _REFUSED:
            raise CheckpointError(f"uses the pickle opcode {name}; {RESAVE}")
        if position < frame_end and (name == "FRAME" or stream.tell() > frame_end):
            raise CheckpointError(f"is damaged: its pickle has a wrong frame; {COPY}")
        if pickletools.markobject in before or (name == "POP" and marks[-1:] == [len(stack)]):
            first = marks.pop()
        else:
            first = len(stack) - len(before)
            if first < (marks[-1] if marks else 0):
                raise CheckpointError(f"is damaged: its pickle uses an empty stack; {COPY}")
        operands = stack[first:]
        del stack[first:]
        keys = operands[_KEYS[name]] if name in _KEYS else []
        spent += sum(keys)
        if max(keys, default=0) > _MAX_KEY or spent > _MAX_KEYS:
            raise CheckpointError(f"has keys that are too large or too many; {RESAVE}")
        match name:
            case "MARK":
                marks.append(first)
            case "FRAME":
                frame_end = stream.tell() + arg
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                stack += operands
                index = len(memo) if arg is None else arg
                if index > count:  # writers number values from 0 or 1 on
                    raise CheckpointError(f"is damaged: it has the memo index {index}; {COPY}")
                memo[index] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(min(1 + len(operands) + sum(operands), _MAX_KEY + 1))
            case "DUP":
                stack += operands * 2
            case _ if name not in ("APPENDS", "SETITEMS", "ADDITEMS"):  # these leave their target
                cost = _COMPUTED if before else 0
                if type(arg) is int and abs(arg) >= 2**63:
                    cost = _MAX_KEY + 1
                stack += [cost] * len(opcode.stack_after)


def unpickle(
    data: mmap.mmap, start: int, end: int, storage: Callable[[Any], Storage]
) -> tuple[Any, int]:
    """Reads one pickle.

    Args:
        data: A mapped file.
        start: The offset of the pickle.
        end: The offset that the pickle may not exceed.
        storage: Returns the storage of a persistent id.

    Returns:
        The object and the offset of the pickle's end. Containers of a hostile pickle may contain
        themselves.

    Raises:
        CheckpointError: If the pickle contains anything other than data, or needs too many
            resources.
        Exception: Of many types, if the pickle is damaged.
    """
    stream = _Stream(data, start, end)
    _scan(stream)
    return _Unpickler(_Stream(data, start, stream.at), storage).load(), stream.at


class _Builder(Inert):
    """A name whose calls are carried out; unlike a function, a pickle cannot change it."""

    __slots__ = ("build", "name")

    def __init__(self, build: Callable[[str, tuple[Any, ...]], Any], name: str) -> None:
        self.build = build
        self.name = name

    def __call__(self, *args: Any) -> Any:
        return self.build(self.name, args)


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: _Stream, storage: Callable[[Any], Storage]) -> None:
        super().__init__(cast("IO[bytes]", stream), encoding="latin1")  # of texts of Python 2
        self._file_size = len(stream.data)
        self._to_copy = stream.end - stream.at
        self._storage = storage
        self._names: dict[str, _Builder | type[Opaque]] = {}

    def persistent_load(self, pid: Any) -> Storage:
        return self._storage(pid)

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{_PYTHON_2.get(module_name, module_name)}.{global_name}"
        if name in self._names:
            return self._names[name]
        if len(self._names) >= _MAX_NAMES:
            raise CheckpointError(f"refers to more than {_MAX_NAMES} classes; {RESAVE}")
        if _BUILT.fullmatch(name):
            self._names[name] = _Builder(self.build, name)
        elif _NAMED.fullmatch(name):
            self._names[name] = type(name, (Opaque,), {"__slots__": (), "name": name})
        else:
            shown = name if re.fullmatch(r"[\w.]{1,100}", name, re.ASCII) else repr(name[:100])
            raise CheckpointError(
                f"holds {shown}, which is not data; do not load it unless you trust it, or re-save "
                "only the tensors: torch.save(model.state_dict(), path)"
            )
        return self._names[name]

    def build(self, name: str, args: tuple[Any, ...]) -> Any:
        """What the call of a name in ``_BUILT`` returns."""
        plain = ([], [None], [{}])
        match name.rpartition(".")[2], args:
            case (
                "_rebuild_tensor" | "_rebuild_tensor_v2",
                (storage, offset, size, stride, *rest),
            ) if rest[2:] in plain:
                return self._tensor(storage, offset, size, stride, None)
            case (
                "_rebuild_tensor_v3",
                (storage, offset, size, stride, _, _, type(name=kind), *rest),
            ) if kind in _DTYPES and rest in plain:
                return self._tensor(storage, offset, size, stride, _DTYPES[kind])
            case "_rebuild_parameter" | "_rebuild_parameter_with_state", (Tensor() as tensor, *_):
                return tensor
            case "_rebuild_from_type_v2", (_Builder(name=inner), _, tuple(inner_args), _) if (
                inner.startswith("torch._utils.")  # not itself again, nested without end
            ):
                return self.build(inner, inner_args)
            case "Size", (tuple(size),) if len(size) <= 64 and all(type(n) is int for n in size):
                return tuple(self._copied(size))
            case "set" | "frozenset" as kind, () | (list(),):
                members = self._hashable(args[0] if args else [])
                return set(members) if kind == "set" else frozenset(members)
            case "OrderedDict", () | (list(),):
                pairs = [(key, value) for key, value in self._copied(args[0] if args else [])]
                self._hashable([key for key, _ in pairs])
                return _StateDict(pairs)
            case "bytes" | "bytearray" as kind, ():
                return b"" if kind == "bytes" else bytearray()
            case "bytearray", (bytes(data),):
                return bytearray(self._copied(data))
            case ("encode", (str(text), "latin1")) | ("bytearray", (str(text), "latin-1")):
                data = self._copied(text).encode("latin1")
                return data if name == "_codecs.encode" else bytearray(data)
            case "complex", (float(real), float(imaginary)):
                return complex(real, imaginary)
        raise CheckpointError(
            f"calls {name} with unknown arguments (a conjugated, negated or otherwise special "
            "tensor?); re-save plain tensors: x.resolve_conj().resolve_neg()"
        )

    def _tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, dtype: np.dtype | None
    ) -> Tensor:
        if not (
            isinstance(storage, Storage)
            and type(size) is type(stride) is tuple
            and len(size) == len(stride) <= 64
            and all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride))
        ):
            raise CheckpointError(f"is damaged: it has a tensor of no valid layout; {COPY}")
        dtype = storage.dtype if dtype is None else dtype
        reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
        if 0 in size:
            offset, stride = 0, (0,) * len(size)
        elif reach * dtype.itemsize > storage.count * storage.dtype.itemsize:
            raise CheckpointError(f"is damaged: a tensor reaches beyond its storage; {COPY}")
        if math.prod(n or 1 for n in size) * dtype.itemsize > max(self._file_size, _MAX_EXPANDED):
            raise CheckpointError(
                "holds an expanded tensor far larger than the file; re-save it without the "
                "expanded dimensions"
            )
        # The stride of a dimension of size 1 is not used, and can be too large for NumPy.
        steps = [step if n > 1 else 1 for n, step in zip(size, stride, strict=True)]
        strides = tuple(step * dtype.itemsize for step in steps)
        read = functools.partial(storage.read, dtype, size, offset * dtype.itemsize, strides)
        return Tensor(size, dtype, read, storage.release)

    def _copied(self, items: Any) -> Any:
        # Else a short pickle could copy the same large object over and over.
        self._to_copy -= len(items)
        if self._to_copy < 0:
            raise CheckpointError(f"copies more than it holds; {RESAVE}")
        return items

    def _hashable(self, items: list[Any]) -> list[Any]:
        # As in _scan, but of a list, whose items it does not track.
        for item in self._copied(items):
            for part in self._copied(item) if type(item) is tuple else (item,):
                if type(part) not in (bool, int, float, str, bytes, type(None)) or (
                    type(part) is int and abs(part) >= 2**63
                ):
                    raise CheckpointError(f"has a key of {type(part).__name__}; {RESAVE}")
        return items
