"""Torch's zip format: every layout, and files that are damaged or hostile.

Some tests also read the older format, whose own tests are in ``test_torch_legacy.py``.
"""

import contextlib
import io
import mmap
import os
import pickle
import struct
import tempfile
import time
import tracemalloc
import warnings
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from checkpoints_convert import CheckpointError, readers
from checkpoints_convert.rules import Tensor
from checkpoints_convert.torch_zip import load

GOLDEN = Path(__file__).parent / "golden" / "torch_zip"
WHOLE = (GOLDEN / "tensors_2.pt").read_bytes()
with np.load(GOLDEN / "expected.npz") as npz:
    EXPECTED = dict(npz)


def tensors_in(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    """All tensors in a value, which may contain itself."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, list | tuple | dict) or id(value) in seen:
        return []
    seen.add(id(value))
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in tensors_in(item, seen)]


def read_all(path: Path) -> Any:
    """Loads a file and reads each tensor, whose storage is checked only then."""
    loaded = load(path)
    for tensor in tensors_in(loaded):
        array = tensor.read()
        assert (array.dtype, array.shape) == (tensor.dtype, tensor.shape)
        assert isinstance(array.base, mmap.mmap)
        assert not array.flags.writeable
        assert array.tobytes() is not None
    return loaded


def read_bytes(data: bytes) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.pt").write_bytes(data)
        return read_all(Path(folder) / "x.pt")


def golden(name: str, kind: str) -> Path:
    """The file of a kind, such as ``2`` or ``legacy 2``: format and protocol."""
    *legacy, protocol = kind.split()
    return GOLDEN / f"{'_'.join([*legacy, name, protocol])}.pt"


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    arrays = {name: tensor.read() for name, tensor in tensors.items()}
    return {k: (v.dtype, v.shape, v.strides, v.tobytes()) for k, v in arrays.items()}


@pytest.mark.parametrize("kind", ["2", "4", "5", "legacy 1", "legacy 2", "legacy 4"])
def test_tensors(kind):
    tensors = {name: t.read() for name, t in read_all(golden("tensors", kind)).items()}
    assert sorted(tensors) == sorted(name for name in EXPECTED if "/" not in name)
    for name, tensor in tensors.items():
        expected = EXPECTED[name]
        dtype = getattr(ml_dtypes, name) if name in ("bfloat16", "float8_e4m3fn") else None
        assert tensor.dtype == (dtype or expected.dtype)
        assert tensor.shape == expected.shape
        np.testing.assert_array_equal(tensor.astype(expected.dtype), expected)
    assert np.shares_memory(tensors["base"], tensors["transposed"])
    assert np.shares_memory(tensors["base"], tensors["sliced"])
    assert tensors["transposed"].strides == tensors["base"].strides[::-1]
    assert tensors["expanded"].strides == (4, 0)


@pytest.mark.parametrize("kind", ["2", "4", "5", "legacy 2", "legacy 4"])
def test_training_checkpoint(kind):
    loaded = load(str(golden("training", kind)))
    for part in ("model", "ema"):
        assert isinstance(loaded[part], OrderedDict)
        assert list(loaded[part]) == ["weight", "bias"]
        for name, tensor in loaded[part].items():
            np.testing.assert_array_equal(tensor.read(), EXPECTED[f"{part}/{name}"])
    assert loaded["opt"]["param_groups"][0]["lr"] == 0.125
    for index, state in loaded["opt"]["state"].items():
        assert state["step"].read() == 1
        np.testing.assert_array_equal(state["exp_avg"].read(), EXPECTED[f"exp_avg/{index}"])
    assert loaded["args"].name == "argparse.Namespace"
    assert loaded["best"].name == "numpy._core.multiarray.scalar"
    assert loaded["dtype"].name == "torch.float32"
    assert loaded["shape"] == (2, 3)
    assert type(loaded["shape"]) is tuple
    assert loaded["epoch"] == 3
    plain = [None, True, {1, 2}, frozenset({"a"}), b"\xff\x00", bytearray(b"ab"), 1 + 2j, 2**70]
    assert loaded["plain"] == plain
    assert list(map(type, loaded["plain"])) == list(map(type, plain))


@pytest.mark.parametrize("kind", ["2", "legacy 2"])
def test_release(kind):
    tensor = load(golden("tensors", kind))["base"]
    for _ in range(2):
        np.testing.assert_array_equal(tensor.read(), EXPECTED["base"])
        tensor.release()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("script.pt", r"is a TorchScript program; re-save only its tensors"),
        ("conjugated.pt", r"conjugated.*re-save plain tensors: x\.resolve_conj\(\)"),
        ("expected.npz", r"is a zip archive with 0 data\.pkl"),
        ("make_torch_zip.py", r"is not a torch checkpoint: it begins with"),
        ("missing.pt", r"does not exist; check the path"),
        (".", r"is not a file"),
    ],
)
def test_other_files(name, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load(GOLDEN / name)
    assert str(caught.value).startswith(str(GOLDEN / name))
    assert "\n" not in str(caught.value)


def test_other_formats():
    with pytest.raises(CheckpointError, match="is not a torch checkpoint: it is empty"):
        read_bytes(b"")
    tar = r"in the tar format of torch 0\.1, which is not read; .* save it again with torch\.save"
    with pytest.raises(CheckpointError, match=tar):
        read_bytes(bytes(257) + b"ustar" + bytes(512))
    with pytest.raises(CheckpointError, match="is truncated or damaged"):
        read_bytes(WHOLE[:-1])


# Hostile files: pickles assembled by hand, in an otherwise valid archive.


@dataclass
class Ref:
    name: str


@dataclass
class Call:
    name: str
    args: Any
    opcode: bytes = b"R"


@dataclass
class Storage:
    key: Any = "0"
    numel: Any = 4
    kind: Any = "torch.FloatStorage"


def dump(value: Any, *view: Any) -> bytes:
    match value:
        case bytes():
            return value  # opcodes as they are
        case Ref(name):
            module, _, name = name.rpartition(".")
            return f"c{module}\n{name}\n".encode()
        case Call(name, args, opcode):
            return dump(Ref(name)) + dump(args, *view) + opcode
        case Storage(key, numel, kind):
            return dump(("storage", Ref(kind), key, "cpu", numel, *view)) + b"Q"
        case tuple():
            return b"(" + b"".join(dump(item, *view) for item in value) + b"t"
        case dict():
            return (
                b"}(" + dump(tuple(x for item in value.items() for x in item), *view)[1:-1] + b"u"
            )
    return pickle.dumps(value, 2)[2:-1]


def tensor(offset: Any = 0, size: Any = (4,), stride: Any = (1,), **storage: Any) -> Call:
    args = (Storage(**storage), offset, size, stride, False, None)
    return Call("torch._utils._rebuild_tensor_v2", args)


def v3(dtype: str, **storage: Any) -> Call:
    args = (Storage(**storage), 0, (2,), (1,), False, None, Ref(dtype))
    return Call("torch._utils._rebuild_tensor_v3", args)


def archive(
    folder: Path,
    pickled: bytes,
    storage: bytes = bytes(16),
    extra: tuple[tuple[str, bytes], ...] = (),
    method: int = zipfile.ZIP_STORED,
) -> Path:
    path = folder / "x.pt"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as file:
        warnings.simplefilter("ignore")  # of duplicate names
        for name, data in (("a/data.pkl", pickled + b"."), ("a/data/0", storage), *extra):
            file.writestr(name, data)
    return path


def test_hand_made_pickles_are_read(tmp_path):
    def load_value(value: Any, storage: bytes = bytes(16)) -> Any:
        return load(archive(tmp_path, b"\x80\x02" + dump(value), storage))

    def read(value: Any, storage: bytes = bytes(16)) -> Any:
        return load_value(value, storage).read()

    numbers = np.arange(4, dtype=np.float32)
    np.testing.assert_array_equal(read(tensor(), numbers.tobytes()), numbers)
    np.testing.assert_array_equal(read(tensor(1, (3,)), numbers.tobytes()), numbers[1:])
    assert read(tensor(2**40, (0, 3), (3, 1))).shape == (0, 3)
    assert read(tensor(size=(1,), stride=(HUGE,))).shape == (1,)  # a stride that is not used
    untyped = {"kind": "torch.storage.UntypedStorage", "numel": 4}
    loaded = read(v3("torch.uint16", **untyped), b"\1\0\2\0")
    np.testing.assert_array_equal(loaded, np.array([1, 2], np.uint16))
    inner, kind = tensor(), Ref("torch.nn.parameter.Parameter")
    wrapped = (Ref(inner.name), kind, inner.args, {})
    assert read(Call("torch._tensor._rebuild_from_type_v2", wrapped)).shape == (4,)
    parameter = (tensor(), True, None)
    assert read(Call("torch._utils._rebuild_parameter", parameter)).shape == (4,)
    parameter = (*parameter, {})
    assert read(Call("torch._utils._rebuild_parameter_with_state", parameter)).shape == (4,)
    assert load_value(b"K\x012(K\x021(K\x03K\x04000") == 1  # DUP, POP and POP_MARK
    pairs = Call("collections.OrderedDict", ([["a", 1], ["b", 2]],))  # as Python 2 wrote it
    assert list(load_value(pairs).items()) == [("a", 1), ("b", 2)]


@pytest.mark.parametrize(
    ("name", "pickled"),
    [
        ("datetime.date", Call("datetime.date", ("x",))),
        ("builtins.slice", Call("builtins.slice", (1, None, 2))),
        (
            "collections.defaultdict",
            dump(Call("collections.defaultdict", (Ref("builtins.int"),))) + b"(K\x01K\x02u",
        ),
        ("collections.deque", dump(Call("collections.deque", ())) + b"(K\x01e}b"),
        ("argparse.Namespace", dump(Ref("argparse.Namespace")) + b")}\x92"),
    ],
)
def test_other_objects_are_only_named(name, pickled, tmp_path):
    assert load(archive(tmp_path, dump(pickled))).name == name


STATE = {"a": tensor()}


@pytest.mark.parametrize(
    "value",
    [
        STATE,
        {"ema": STATE, "model": {"b": tensor()}},
        {"ema": {"decay": 0.9, "updates": 3}, "model": STATE, "opt": {}},
        {"model": {"state_dict": STATE}},
    ],
)
def test_training_checkpoints_are_unwrapped(value, tmp_path):
    assert list(readers.read(archive(tmp_path, dump(value))).tensors) == ["a"]


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        {"ema": {}},
        {"opt": STATE},
        {"a": tensor(), "b": 3},
        b"}q\0" + dump("model") + b"h\0s",
    ],
)
def test_other_contents_are_refused(value, tmp_path):
    with pytest.raises(CheckpointError, match="no state dict"):
        readers.read(archive(tmp_path, dump(value)))


TOUCH = ("touch marker",)
HUGE = 2**62
HOSTILE: dict[str, tuple[Any, str]] = {
    "reduce": (Call("os.system", TOUCH), r"holds os\.system, which is not data"),
    "newobj": (Call("posix.system", TOUCH, b"\x81"), r"holds posix\.system, which is not data"),
    "newobj_ex": (
        dump(Ref("subprocess.Popen")) + dump(TOUCH) + b"}\x92",
        r"holds subprocess\.Popen, ",
    ),
    "stack_global": (
        dump("os") + dump("system") + b"\x93" + dump(TOUCH) + b"R",
        r"holds os\.system, which is not data.*torch\.save\(model\.state_dict\(\), path\)",
    ),
    "stack_global of no text": (b"K\x01K\x02\x93", "is damaged"),
    "eval": (Call("builtins.eval", ("open('marker', 'w')",)), r"holds builtins\.eval"),
    "python 2's eval": (Call("__builtin__.eval", ("1",)), r"holds builtins\.eval"),
    "getattr": (Call("builtins.getattr", (Ref("os"), "system")), r"holds builtins\.getattr"),
    "a dotted name": (dump("torch") + dump("os.system") + b"\x93", r"holds torch\.os\.system"),
    "hub": (Call("torch.hub.load", ("x/y",)), r"holds torch\.hub\.load"),
    "numpy.load": (Call("numpy.load", ("x",)), r"holds numpy\.load"),
    "load_from_bytes": (Call("torch.storage._load_from_bytes", ("x",)), "_load_from_bytes"),
    "a long name": (dump("a\nb" * 10**5) + dump("c") + b"\x93", "which is not data"),
    "inst": (b"(" + dump("touch marker") + b"ios\nsystem\n", "opcode INST"),
    "obj": (b"(" + dump(Ref("os.system")) + dump("touch marker") + b"o", "opcode OBJ|holds os"),
    "ext": (b"\x82\x01", "opcode EXT1"),
    "next_buffer": (b"\x97", "opcode NEXT_BUFFER"),
    "persid": (b"Pstorage\n", "opcode PERSID"),
    "binbytes8": (b"\x8e" + struct.pack("<Q", 2**60), "does not end"),
    "bytearray8": (b"\x96" + struct.pack("<Q", 2**60), "does not end"),
    "frame": (b"\x95" + struct.pack("<Q", 2**60) + b"N", "does not end"),
    "frames that hide opcodes": (
        b"\x95" + struct.pack("<Q", 4) + b"NX\0\0" + b"\0\0" + b"r\xff\xff\xff\x7f",
        "wrong frame",
    ),
    "frame in a frame": (
        b"\x95" + struct.pack("<Q", 10) + b"\x95" + bytes(8) + b"N",
        "wrong frame",
    ),
    "a huge memo index": (b"Nr\xff\xff\xff\xff", "the memo index 4294967295"),
    "a huge decimal memo index": (b"Np99999999\n", "the memo index 99999999"),
    "nested pairs as key": (b"}N" + b"2\x86" * 100 + b"K\x01s", "keys that are too large"),
    "keys that collide": (
        b"}("
        + b"".join(
            b"\x8a\x10" + (k * (2**61 - 1) << 3).to_bytes(16, "little") + b"N"
            for k in range(1, 9000)
        )
        + b"u",
        "keys that are too large or too many",
    ),
    "a list that doubles": (
        dump([1]) + b"q\0" + (dump(Call("builtins.slice", (0, 0, None))) + b"h\0s") * 40,
        "is damaged",
    ),
    "colliding complex numbers": (
        dump(Ref("builtins.complex"))
        + b"q\x000}("
        + b"".join(
            b"h\0G" + struct.pack(">d", -1000003.0 * k) + b"G" + struct.pack(">d", k) + b"\x86RN"
            for k in range(5000)
        )
        + b"u",
        "keys that are too large or too many",
    ),
    "names without end": (
        b"".join(b"cdatetime\nx%d\n0" % k for k in range(2000)) + b"N",
        "more than 1000 classes",
    ),
    "long4": (b"\x8b" + struct.pack("<i", -1), "is damaged"),
    "a long decimal": (b"I" + b"9" * 10**5 + b"\n", "is damaged"),
    "memo": (b"j\xff\xff\xff\xff", "is damaged"),
    "deep key": (b"})" + b"\x85" * 10**5 + b"K\x01s", "keys that are too large"),
    "deep member": (b"\x8f()" + b"\x85" * 10**5 + b"\x90", "keys that are too large"),
    "long key": (b"}(" + b"N" * 2**10 + b"tK\x01s", "keys that are too large"),
    "list key": (b"}]K\x01s", "is damaged"),
    "deep wrapped call": (
        dump(Ref("torch._tensor._rebuild_from_type_v2"))
        + b"q\x00"
        + b"(h\x00N" * 5000
        + b")"
        + b"}t" * 5000
        + b"R",
        "unknown arguments",
    ),
    "copies": (
        b"(" + b"K\x01" * 10**4 + b"lq\x00\x85q\x01" + (dump(Ref("builtins.set")) + b"h\x01R") * 99,
        "copies more than it holds",
    ),
    "bytearray of a size": (Call("builtins.bytearray", (2**40,)), "unknown arguments"),
    "call of a number": (b"K\x01)R", "is damaged"),
    "attributes": (b"]}b", "is damaged"),
    "append to a number": (b"K\x01K\x02a", "is damaged"),
    "no stop": (b"", "is damaged"),
    "empty stack": (b"0", "is damaged"),
    "no mark": (b"t", "is damaged"),
    "odd items": (b"}(K\x01u", "is damaged"),
    "size": (tensor(size=(HUGE,)), "beyond its storage"),
    "sizes": (tensor(size=(HUGE,) * 60, stride=(0,) * 60), "expanded"),
    "expanded": (tensor(size=(2**40,), stride=(0,)), "expanded tensor far larger"),
    "65 dimensions": (tensor(size=(1,) * 65, stride=(1,) * 65), "no valid layout"),
    "long integers": (tensor(size=(2**9999,), stride=(2**9999,)), "no valid layout"),
    "negative size": (tensor(size=(-1,)), "no valid layout"),
    "negative stride": (tensor(offset=3, stride=(-1,)), "no valid layout"),
    "negative offset": (tensor(offset=-1), "no valid layout"),
    "huge stride": (tensor(size=(2,), stride=(HUGE,)), "beyond its storage"),
    "offset": (tensor(offset=1), "beyond its storage"),
    "bool size": (tensor(size=(True,)), "no valid layout"),
    "float size": (tensor(size=(4.0,)), "no valid layout"),
    "lengths": (tensor(size=(2, 2)), "no valid layout"),
    "size of a number": (tensor(size=4), "no valid layout"),
    "numel": (tensor(numel=5), "the storage '0' has 16 bytes, not"),
    "negative numel": (tensor(numel=-4), "the storage '0' has 16 bytes, not"),
    "key": (tensor(key="../../../etc/passwd"), "no record of the storage '../../../etc/passwd'"),
    "number as key": (tensor(key=0), "storage of an unknown kind"),
    "storage kind": (tensor(kind="torch.QInt8Storage"), "storage of an unknown kind"),
    "bools": (tensor(kind="torch.BoolStorage", numel=16), "bool values other than 0 and 1"),
    "two types": (
        (tensor(), tensor(kind="torch.IntStorage")),
        "the storage '0' has two types",
    ),
    "unknown dtype": (v3("torch.bool", kind="torch.UntypedStorage", numel=16), "unknown arguments"),
    "no storage": (Call("torch._utils._rebuild_tensor", (1, 0, (4,), (1,))), "no valid layout"),
    "no arguments": (Call("torch._utils._rebuild_tensor_v2", ()), "unknown arguments"),
}


def check_refused(path: Path, message: str) -> None:
    """Checks that a file ends in one clear error, soon, in little memory, without side effects."""
    size, others = path.stat().st_size, os.listdir()
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(CheckpointError, match=message) as caught:
        read_all(path)
    took, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took < 10
    assert peak < 2**23 + 200 * size
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600
    assert os.listdir() == others


@pytest.mark.parametrize(("pickled", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles(pickled, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_refused(archive(tmp_path, dump(pickled), storage=bytes(range(16))), message)


def test_huge_pickle(tmp_path):
    with pytest.raises(CheckpointError, match="more than 67108864 bytes beside its tensors"):
        load(archive(tmp_path, bytes(2**26)))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("../x", b""), "'../x', a path outside the archive"),
        (("a/data/../../../x", b""), "a path outside the archive"),
        (("/etc/x", b""), "a path outside the archive"),
        (("C:/x", b""), "a path outside the archive"),
        (("a\\x", b""), "a path outside the archive"),
        (("a/data/0", b"other"), "the record 'a/data/0' twice"),
        (("b/data.pkl", b"N."), "with 2 data.pkl"),
        (("a/byteorder", b"big"), "not little-endian"),
        (("a/constants.pkl", b""), "TorchScript"),
    ],
)
def test_hostile_archives(extra, message, tmp_path):
    path = archive(tmp_path, dump(tensor()), extra=(extra,))
    with pytest.raises(CheckpointError, match=message):
        load(path)
    assert os.listdir(tmp_path) == ["x.pt"]


def test_compressed_records_are_not_unpacked(tmp_path):
    bomb = archive(tmp_path, dump(tensor()), bytes(2**24), method=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"compressed record 'a/data\.pkl'; re-save"):
        load(bomb)


def edited(data: bytes, signature: bytes, offset: int, new: bytes) -> bytes:
    start = data.rindex(signature) + offset
    return data[:start] + new + data[start + len(new) :]


@pytest.mark.parametrize(
    ("signature", "offset", "new", "message"),
    [
        (b"PK\1\2", 8, b"\1", "encrypted record 'a/data/0'"),
        (b"PK\3\4", 6, b"\1", "encrypted record 'a/data/0'"),
        (b"PK\3\4", 8, b"\x08", "compressed record 'a/data/0'"),
        (b"PK\1\2", 16, bytes(4), "damaged record: .* told not to write checksums"),
        (b"PK\1\2", 20, struct.pack("<II", 17, 17), "the record 'a/data/0' has a wrong size"),
        (b"PK\1\2", 20, struct.pack("<II", 12, 12), "the storage '0' has 12 bytes"),
        (b"PK\1\2", 42, bytes(4), "overlaps another"),
        (b"PK\1\2", 42, b"\xf0\xff\xff\xff", "overlaps another"),
        (b"PK\1\2", 46, b"b", "the record 'b/data/0' has no header"),
        (b"PK\3\4", 30, b"b", "the record 'a/data/0' has no header"),
        (b"PK\3\4", 0, b"XX", "the record 'a/data/0' has no header"),
    ],
)
def test_damaged_headers(signature, offset, new, message, tmp_path):
    path = archive(tmp_path, dump(tensor()), struct.pack("<4f", 1, 2, 3, 4))
    path.write_bytes(edited(path.read_bytes(), signature, offset, new))
    with pytest.raises(CheckpointError, match=message):
        read_all(path)


def rezipped(method: int) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return target.getvalue()


def test_zipped_again():
    # Without torch's padding, thus unaligned too.
    loaded = read_bytes(rezipped(zipfile.ZIP_STORED))
    assert bits(loaded) == bits(load(GOLDEN / "tensors_2.pt"))
    assert not all(tensor.read().flags.aligned for tensor in loaded.values())
    with pytest.raises(CheckpointError, match="compressed record"):
        read_bytes(rezipped(zipfile.ZIP_DEFLATED))


@given(st.integers(0, len(WHOLE) - 1))
def test_truncation(length):
    with pytest.raises(CheckpointError):
        read_bytes(WHOLE[:length])


BITS = bits(load(GOLDEN / "tensors_2.pt"))


@settings(max_examples=500)
@given(st.integers(0, 8 * len(WHOLE) - 1))
def test_bit_flips(position):
    data = bytearray(WHOLE)
    data[position // 8] ^= 1 << position % 8
    try:
        loaded = read_bytes(bytes(data))
    except CheckpointError:
        return
    assert bits(loaded) == BITS


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """Data with a few bytes flipped, exchanged, replaced or cut out."""
    array = bytearray(data)
    for _ in range(random.integers(1, 4)):
        first, second = random.integers(len(array), size=2)
        match random.integers(4):
            case 0:
                array[first] ^= 1 << random.integers(8)
            case 1:
                array[first], array[second] = array[second], array[first]
            case 2:
                array[first] = random.integers(256)
            case 3:
                del array[first : first + second % 9 if second % 2 else None]
                array += b"." * (not array)
    return bytes(array)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.pt")), ids=lambda path: path.stem)
def test_damaged_files_give_data_or_the_one_error(path, tmp_path):
    random = np.random.default_rng(0)
    whole = path.read_bytes()
    for _ in range(50):
        with contextlib.suppress(CheckpointError):
            read_bytes(damaged(whole, random))
    if zipfile.is_zipfile(path):  # the pickle too, with a valid checksum
        with zipfile.ZipFile(path) as file:
            root = file.namelist()[0].partition("/")[0]
            records = {name.removeprefix(f"{root}/"): file.read(name) for name in file.namelist()}
        for _ in range(50):
            pickled = damaged(records["data.pkl"], random)
            extra = tuple((f"a/{name}", data) for name, data in records.items() if "/" in name)
            with contextlib.suppress(CheckpointError):
                read_all(archive(tmp_path, pickled, records.get("data/0", b""), extra[1:]))


OPCODES = [
    bytes([code]) for code in b"()]}\x8f\x90\x91.012NIKKMaeulsdtbhqRcQ\x81\x92\x93\x85\x86\x88\x94"
]
PIECES = [*OPCODES, dump(tensor()), dump(Ref("builtins.set")), dump(Ref("torch.Size")), dump("x")]


@settings(max_examples=500)
@given(st.binary() | st.lists(st.sampled_from(PIECES)).map(b"".join))
def test_any_pickle_gives_data_or_the_one_error(pickled):
    with tempfile.TemporaryDirectory() as folder:
        path = archive(Path(folder), pickled)
        with contextlib.suppress(CheckpointError):
            load(path)


KEYS = st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.text() | st.binary()
PLAIN = st.recursive(
    KEYS
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.binary().map(bytearray)
    | st.sets(KEYS)
    | st.frozensets(KEYS),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(KEYS | st.tuples(KEYS, KEYS), inner)
        | st.dictionaries(KEYS, inner).map(OrderedDict)
    ),
    max_leaves=10,
)


@given(PLAIN, st.integers(0, 5))
def test_plain_data(value, protocol):
    pickled = pickle.dumps(value, protocol)[:-1]
    with tempfile.TemporaryDirectory() as folder:
        assert load(archive(Path(folder), pickled)) == value


def test_checksum_of_a_large_record(tmp_path):
    storage = np.arange(2**21, dtype=np.float32).tobytes()  # of more than one chunk
    pickled = dump(tensor(numel=2**21, size=(2**21,)))
    path = archive(tmp_path, pickled, storage)
    assert load(path).read()[-1] == 2**21 - 1
    data = path.read_bytes()
    assert zlib.crc32(storage).to_bytes(4, "little") in data
    path.write_bytes(data.replace(storage, storage[:-1] + b"\0"))
    with pytest.raises(CheckpointError, match="damaged record") as caught:
        load(path).read()
    assert str(caught.value).startswith(str(path))
