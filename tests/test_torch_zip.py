"""Torch's zip format: every layout, and files that are damaged or hostile.

Some of it is of the format from before, too, whose own tests are in ``test_torch_legacy.py``.
"""

import contextlib
import io
import mmap
import os
import pickle
import struct
import sys
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

from checkpoints_convert import CheckpointError
from checkpoints_convert.torch_pickle import Opaque
from checkpoints_convert.torch_zip import load, release

GOLDEN = Path(__file__).parent / "golden" / "torch_zip"
WHOLE = (GOLDEN / "tensors_2.pt").read_bytes()
with np.load(GOLDEN / "expected.npz") as npz:
    EXPECTED = dict(npz)


def map_of(array: Any) -> Any:
    while isinstance(array, np.ndarray | memoryview):
        array = array.base if isinstance(array, np.ndarray) else array.obj
    return array


def load_bytes(data: bytes) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.pt").write_bytes(data)
        return load(Path(folder) / "x.pt")


def golden(name: str, kind: str) -> Path:
    """Of a protocol, such as ``2`` or ``legacy 2``."""
    *legacy, protocol = kind.split()
    return GOLDEN / f"{'_'.join([*legacy, name, protocol])}.pt"


def bits(tensors: dict[str, np.ndarray]) -> dict[str, tuple[Any, ...]]:
    return {k: (v.dtype, v.shape, v.strides, v.tobytes()) for k, v in tensors.items()}


@pytest.mark.parametrize("kind", ["2", "4", "5", "legacy 1", "legacy 2", "legacy 4"])
def test_tensors(kind):
    tensors = load(golden("tensors", kind))
    assert sorted(tensors) == sorted(name for name in EXPECTED if "/" not in name)
    for name, tensor in tensors.items():
        expected = EXPECTED[name]
        dtype = getattr(ml_dtypes, name) if name in ("bfloat16", "float8_e4m3fn") else None
        assert tensor.dtype == (dtype or expected.dtype)
        assert tensor.shape == expected.shape
        np.testing.assert_array_equal(tensor.astype(expected.dtype), expected)
        assert isinstance(map_of(tensor), mmap.mmap)
        assert not tensor.flags.writeable
    assert np.shares_memory(tensors["base"], tensors["transposed"])
    assert np.shares_memory(tensors["base"], tensors["sliced"])
    assert tensors["transposed"].strides == tensors["base"].strides[::-1]
    assert tensors["expanded"].strides == (4, 0)


@pytest.mark.parametrize("kind", ["2", "4", "5", "legacy 2", "legacy 4"])
def test_training_checkpoint(kind):
    loaded = load(str(golden("training", kind)))
    for part in ("model", "ema"):
        assert type(loaded[part]) is OrderedDict
        assert list(loaded[part]) == ["weight", "bias"]
        for name, tensor in loaded[part].items():
            np.testing.assert_array_equal(tensor, EXPECTED[f"{part}/{name}"])
    assert loaded["opt"]["param_groups"][0]["lr"] == 0.125
    for index, state in loaded["opt"]["state"].items():
        assert state["step"] == 1
        np.testing.assert_array_equal(state["exp_avg"], EXPECTED[f"exp_avg/{index}"])
    assert loaded["args"] == Opaque("argparse.Namespace")
    assert loaded["best"] == Opaque("numpy._core.multiarray.scalar")
    assert loaded["dtype"] == Opaque("torch.float32")
    assert loaded["shape"] == (2, 3)
    assert type(loaded["shape"]) is tuple
    assert loaded["epoch"] == 3
    plain = [None, True, {1, 2}, frozenset({"a"}), b"\xff\x00", bytearray(b"ab"), 1 + 2j, 2**70]
    assert loaded["plain"] == plain
    assert list(map(type, loaded["plain"])) == list(map(type, plain))


def test_release():
    tensor = load(GOLDEN / "tensors_2.pt")["base"]
    release(tensor)
    np.testing.assert_array_equal(tensor, EXPECTED["base"])
    release(np.zeros(3))
    written = np.frombuffer(mmap.mmap(-1, 4096), np.uint8)
    written[:] = 7
    release(written)  # would be zeros, were it let go of
    assert (written == 7).all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensors_are_resident_only_while_used(tmp_path):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE

    count = 2**23
    pickled = dump(tensor(numel=count, size=(count,)))
    array = load(archive(tmp_path, pickled, storage=bytes(4 * count)))
    before = resident()
    assert array.sum() == 0
    used = resident()
    release(array)
    after = resident()
    assert used - before > 3 * count
    assert used - after > 3 * count


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
        load_bytes(b"")
    tar = r"in the tar format of torch 0\.1, which is not read; .* weights_only=False\), new_path\)"
    with pytest.raises(CheckpointError, match=tar):
        load_bytes(bytes(257) + b"ustar" + bytes(512))
    with pytest.raises(CheckpointError, match="is truncated or damaged"):
        load_bytes(WHOLE[:-1])


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
    def read(value: Any, storage: bytes = bytes(16)) -> Any:
        return load(archive(tmp_path, b"\x80\x02" + dump(value), storage))

    numbers = np.arange(4, dtype=np.float32)
    np.testing.assert_array_equal(read(tensor(), numbers.tobytes()), numbers)
    np.testing.assert_array_equal(read(tensor(1, (3,)), numbers.tobytes()), numbers[1:])
    assert read(tensor(2**40, (0, 3), (3, 1))).shape == (0, 3)
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
    # A huge index costs nothing, as the memo is a dict.
    assert read(b"K\x05r\xff\xff\xff\xff0j\xff\xff\xff\xff") == 5
    assert read(Call("datetime.date", ("x",))) == Opaque("datetime.date")
    counts = Call("collections.defaultdict", (Ref("builtins.int"),))
    assert read(dump(counts) + b"(K\x01K\x02u") == Opaque(counts.name)
    assert read(dump(Call("collections.deque", ())) + b"(K\x01e}b") == Opaque("collections.deque")
    assert read(dump(Ref("argparse.Namespace")) + b")}\x92") == Opaque("argparse.Namespace")
    assert read(Call("builtins.slice", (1, None, 2))) == slice(1, None, 2)
    assert read(b"K\x012(K\x021(K\x03K\x04000") == 1  # DUP, POP and POP_MARK


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
    "stack_global of no text": (b"K\x01K\x02\x93", "names something without text"),
    "eval": (Call("builtins.eval", ("open('marker', 'w')",)), r"holds builtins\.eval"),
    "python 2's eval": (Call("__builtin__.eval", ("1",)), r"holds builtins\.eval"),
    "getattr": (Call("builtins.getattr", (Ref("os"), "system")), r"holds builtins\.getattr"),
    "a dotted name": (dump("torch") + dump("os.system") + b"\x93", r"holds torch\.os\.system"),
    "hub": (Call("torch.hub.load", ("x/y",)), r"holds torch\.hub\.load"),
    "numpy.load": (Call("numpy.load", ("x",)), r"holds numpy\.load"),
    "load_from_bytes": (Call("torch.storage._load_from_bytes", ("x",)), "_load_from_bytes"),
    "a long name": (dump("a\nb" * 10**5) + dump("c") + b"\x93", "which is not data"),
    "inst": (b"(" + dump("touch marker") + b"ios\nsystem\n", "opcode INST"),
    "obj": (b"(" + dump(Ref("os.system")) + dump("touch marker") + b"o", r"os\.system"),
    "ext": (b"\x82\x01", "opcode EXT1"),
    "next_buffer": (b"\x97", "opcode NEXT_BUFFER"),
    "persid": (b"Pstorage\n", "opcode PERSID"),
    "binbytes8": (b"\x8e" + struct.pack("<Q", 2**60), "is damaged"),
    "bytearray8": (b"\x96" + struct.pack("<Q", 2**60), "is damaged"),
    "frame": (b"\x95" + struct.pack("<Q", 2**60), "is damaged"),
    "long4": (b"\x8b" + struct.pack("<i", -1), "is damaged"),
    "a long decimal": (b"I" + b"9" * 10**5 + b"\n", "is damaged"),
    "memo": (b"j\xff\xff\xff\xff", "is damaged"),
    "deep key": (b"})" + b"\x85" * 10**5 + b"K\x01s", "has a key of tuple"),
    "deep member": (b"\x8f()" + b"\x85" * 10**5 + b"\x90", "has a key of tuple"),
    "long key": (b"}(" + b"N" * 65 + b"tK\x01s", "has a key of 65 parts"),
    "list key": (b"}]K\x01s", "has a key of list"),
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
        b"("
        + b"K\x01" * 10**4
        + b"lq\x00\x85q\x01"
        + (dump(Ref("builtins.list")) + b"h\x01R") * 99,
        "copies more than it holds",
    ),
    "bytearray of a size": (Call("builtins.bytearray", (2**40,)), "unknown arguments"),
    "call of a number": (b"K\x01)R", "calls a int"),
    "attributes": (b"]}b", "plain data have attributes"),
    "append to a number": (b"K\x01K\x02a", "adds to a int"),
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
    "huge stride of one": (tensor(size=(1,), stride=(HUGE,)), "is damaged"),
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


@pytest.mark.parametrize(("pickled", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles(pickled, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = dump(pickled)
    path = archive(tmp_path, data, storage=bytes(range(16)))
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    took, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took < 5
    assert peak < 2**20 + 200 * len(data)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600
    assert os.listdir(tmp_path) == ["x.pt"]


def test_huge_pickle(tmp_path):
    with pytest.raises(CheckpointError, match="67108865 bytes beside its tensors"):
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
        load(path)


def rezipped(method: int) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return target.getvalue()


def test_zipped_again():
    # Without torch's padding, thus unaligned too.
    loaded = load_bytes(rezipped(zipfile.ZIP_STORED))
    assert bits(loaded) == bits(load(GOLDEN / "tensors_2.pt"))
    assert not all(tensor.flags.aligned for tensor in loaded.values())
    with pytest.raises(CheckpointError, match="compressed record"):
        load_bytes(rezipped(zipfile.ZIP_DEFLATED))


@given(st.integers(0, len(WHOLE) - 1))
def test_truncation(length):
    with pytest.raises(CheckpointError):
        load_bytes(WHOLE[:length])


BITS = bits(load(GOLDEN / "tensors_2.pt"))


@settings(max_examples=500)
@given(st.integers(0, 8 * len(WHOLE) - 1))
def test_bit_flips(position):
    data = bytearray(WHOLE)
    data[position // 8] ^= 1 << position % 8
    try:
        loaded = load_bytes(bytes(data))
    except CheckpointError:
        return
    assert bits(loaded) == BITS


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
    assert load(path)[-1] == 2**21 - 1
    data = path.read_bytes()
    assert zlib.crc32(storage).to_bytes(4, "little") in data
    path.write_bytes(data.replace(storage, storage[:-1] + b"\0"))
    with pytest.raises(CheckpointError, match="damaged record"):
        load(path)
