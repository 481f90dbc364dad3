"""Torch's format from before 1.6: hand-made files, and files that are damaged or hostile.

``test_torch_zip.py`` reads the files of this format that torch wrote.
"""

import contextlib
import mmap
import os
import pickle
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from test_torch_zip import (
    EXPECTED,
    GOLDEN,
    HOSTILE,
    PIECES,
    PLAIN,
    Call,
    Ref,
    archive,
    bits,
    check_refused,
    dump,
    read_bytes,
    tensor,
)

from checkpoints_convert import CheckpointError, readers
from checkpoints_convert.torch_zip import load

WHOLE = (GOLDEN / "legacy_tensors_2.pt").read_bytes()
TENSORS = bits(load(GOLDEN / "legacy_tensors_2.pt"))
MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}


def stored(values: bytes, itemsize: int = 4) -> bytes:
    return struct.pack("<q", len(values) // itemsize) + values


def legacy(
    pickled: bytes,
    *,
    header: tuple[Any, ...] = (MAGIC, 1001, SYSTEM),
    keys: Any = ("0",),
    data: bytes = stored(bytes(16)),
) -> bytes:
    begin = b"".join(pickle.dumps(part, 2) for part in header)
    end = pickle.dumps(list(keys) if type(keys) is tuple else keys, 2)
    return begin + b"\x80\x02" + pickled + b"." + end + data


def test_a_state_dict_by_name():
    checkpoint = readers.read(GOLDEN / "legacy.pt")
    assert list(checkpoint.tensors) == ["x"]
    np.testing.assert_array_equal(checkpoint.tensors["x"].read(), EXPECTED["base"])


def test_views_of_storages():
    loaded = {name: view.read() for name, view in load(GOLDEN / "legacy_views.pt").items()}
    np.testing.assert_array_equal(loaded["base"], EXPECTED["base"])
    np.testing.assert_array_equal(loaded["part"], EXPECTED["base"].ravel()[7:13].reshape(2, 3))
    np.testing.assert_array_equal(loaded["transposed"], loaded["part"].T)
    assert np.shares_memory(loaded["base"], loaded["part"])


def test_hand_made_files_are_read():
    values = [np.arange(4, dtype=np.float32), np.array([7, 8], np.int64), np.zeros(0, np.float64)]
    pickled = dump(
        (
            tensor(1, (3,)),
            tensor(0, (2,), key="1", numel=2, kind="torch.LongStorage"),
            tensor(0, (0, 3), (3, 1), key="empty", numel=0, kind="torch.DoubleStorage"),
        ),
        None,
    )
    # In any order of the file's own.
    data = b"".join(stored(v.tobytes(), v.itemsize) for v in reversed(values))
    loaded = read_bytes(legacy(pickled, keys=("empty", "1", "0"), data=data))
    np.testing.assert_array_equal(loaded[0].read(), values[0][1:])
    np.testing.assert_array_equal(loaded[1].read(), values[1])
    assert loaded[2].shape == (0, 3)
    assert [array.dtype for array in loaded] == [array.dtype for array in values]
    assert read_bytes(legacy(b"K\x07", keys=(), data=b"")) == 7
    # Python 2 wrote texts as bytes.
    pickled = dump(tensor(), None).replace(dump("storage"), b"U\x07storage")
    pickled = pickled.replace(dump("0"), b"U\x010")
    assert b"U\x07storage" in pickled
    assert read_bytes(legacy(pickled)).shape == (4,)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_tensors_are_resident_only_while_used(kind, tmp_path):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE

    count = 2**23
    value, path = tensor(numel=count, size=(count,)), tmp_path / "x.pt"
    if kind == "zip":
        archive(tmp_path, dump(value), bytes(4 * count))
    else:
        path.write_bytes(legacy(dump(value, None), data=stored(bytes(4 * count))))
    tracemalloc.start()
    empty = resident()
    loaded = load(path)
    before = resident()
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert loaded.read().sum() == 0
    used = resident()
    loaded.release()
    after = resident()
    assert before - empty < count
    assert used - before > 3 * count
    assert used - after > 3 * count


# These are refused by other checks than in the zip format.
OTHERS = {
    "numel": "the storage '0' has the length 4, expected 5",
    "negative numel": "the storage '0' or a view of it reaches too far",
    "key": "lists other storages than it refers to",
    "two types": "the storage '0' has two types or places",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickled, message = HOSTILE[name]
    data = legacy(dump(pickled, None), data=stored(bytes(range(16)), 1 if name == "bools" else 4))
    (tmp_path / "x.pt").write_bytes(data)
    check_refused(tmp_path / "x.pt", OTHERS.get(name, message))


@pytest.mark.parametrize("place", range(5))
def test_no_pickle_runs_anything(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = [pickle.dumps(part, 2) for part in (MAGIC, 1001, SYSTEM, {}, [])]
    parts[place] = parts[place][:-1] + dump(Call("os.system", ("touch marker",))) + b"."
    with pytest.raises(CheckpointError, match=r"holds os\.system, which is not data"):
        read_bytes(b"".join(parts))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (("v", 0, 5), "reaches too far"),
        (("v", 4, 1), "reaches too far"),
        (("v", -1, 2), "reaches too far"),
        (("v", 1, -1), "reaches too far"),
        (("v", 2**70, 2**70), "reaches too far"),
        (("v", True, 1), "reaches too far"),
        (("v", 2, 2), "a tensor reaches beyond its storage"),
        (("0", 1, 3), "two types or places"),
        (("v", 0), "a storage of an unknown kind"),
        (("v", 0, 4, 0), "a storage of an unknown kind"),
        ((0, 0, 4), "a storage of an unknown kind"),
        (("v", 0, 4.0), "a storage of an unknown kind"),
        ("v04", "a storage of an unknown kind"),
    ],
)
def test_hostile_views(view, message):
    assert read_bytes(legacy(dump(tensor(), ("v", 0, 4)))).shape == (4,)
    with pytest.raises(CheckpointError, match=message):
        read_bytes(legacy(dump(tensor(), view)))


def test_hostile_views_of_one_name():
    both = b"(" + dump(tensor(size=(1,)), ("v", 0, 2)) + dump(tensor(size=(1,)), ("v", 2, 2)) + b"t"
    with pytest.raises(CheckpointError, match="the storage 'v' has two types or places"):
        read_bytes(legacy(both))


TWO = dump((tensor(), tensor(key="1")), None)
FILE: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"header": (MAGIC, 1002, SYSTEM)}, "damaged, or of an unknown version"),
    "magic": ({"header": ([MAGIC], 1001, SYSTEM)}, "no valid header"),
    "system": ({"header": (MAGIC, 1001, {})}, "no valid header"),
    "system's type": ({"header": (MAGIC, 1001, {"little_endian": 1})}, "no valid header"),
    "big-endian": ({"header": (MAGIC, 1001, {"little_endian": False})}, "not little-endian"),
    "no keys": ({"keys": ()}, "lists other storages"),
    "keys of another type": ({"keys": {"0": 1}}, "lists other storages"),
    "number as key": ({"keys": (0,)}, "lists other storages"),
    "a key more": ({"keys": ("0", "1")}, "lists other storages"),
    "a key twice": ({"keys": ("0", "0"), "data": stored(bytes(16)) * 2}, "lists other storages"),
    "nothing": ({"data": b""}, "the storage '0' reaches too far"),
    "half a length": ({"data": bytes(4)}, "the storage '0' reaches too far"),
    "a shorter one": ({"data": stored(bytes(12))}, "has the length 3, expected 4"),
    "cut": ({"data": stored(bytes(16))[:-1]}, "the storage '0' reaches too far"),
    "length": ({"data": struct.pack("<q", 3) + bytes(16)}, "has the length 3, expected 4"),
    "negative": ({"data": struct.pack("<q", -4) + bytes(16)}, "has the length -4, expected 4"),
    "garbage": ({"data": stored(bytes(16)) + b"x"}, "1 bytes follow its last storage"),
    "a second file": ({"data": stored(bytes(16)) + legacy(b"N")}, "bytes follow its last storage"),
    "one for two": ({"pickled": TWO, "keys": ("0", "1")}, "the storage '1' reaches too far"),
}


@pytest.mark.parametrize(("parts", "message"), FILE.values(), ids=FILE)
def test_hostile_files(parts, message):
    pickled = {"pickled": dump(tensor(), None)}
    with pytest.raises(CheckpointError, match=message) as caught:
        read_bytes(legacy(**pickled | parts))
    assert "\n" not in str(caught.value)


def test_storages_outside_of_the_object():
    identity = dump(("storage", Ref("torch.FloatStorage"), "0", "cpu", 4, None)) + b"Q."
    data = legacy(dump(tensor(), None))
    end = data.rindex(b"\x80\x02]")
    with pytest.raises(CheckpointError, match="a storage outside of its object"):
        read_bytes(data[:end] + identity)


def test_far_storages_cost_nothing(tmp_path):
    path = tmp_path / "x.pt"
    pickled = dump(tensor(numel=2**30, size=(2**30,)), None)
    path.write_bytes(legacy(pickled, data=struct.pack("<q", 2**30)))
    with pytest.raises(CheckpointError, match="the storage '0' or a view of it reaches too far"):
        load(path)
    with path.open("r+b") as file:
        file.truncate(2**33)  # a file of holes
    with pytest.raises(CheckpointError, match="bytes follow its last storage"):
        load(path)


@pytest.mark.parametrize("text", [b"X" + struct.pack("<I", 2**26), b"S'"])
def test_huge_pickle(text, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(legacy(text)[: legacy(text).index(text) + len(text)])
    with path.open("r+b") as file:
        file.truncate(2**27)
    with pytest.raises(CheckpointError, match="more than 67108864 bytes beside its tensors"):
        load(path)


@given(st.integers(0, len(WHOLE) - 1))
def test_truncation(length):
    with pytest.raises(CheckpointError):
        read_bytes(WHOLE[:length])


def test_bit_flips_in_values_change_values_alone():
    # There are no checksums, so they are not noticed.
    changed = bits(read_bytes(WHOLE[:-1] + bytes([WHOLE[-1] ^ 1])))
    differing = [name for name in TENSORS if changed[name] != TENSORS[name]]
    assert differing
    for name in differing:
        assert changed[name][:3] == TENSORS[name][:3]


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@settings(max_examples=500)
@given(st.lists(st.integers(0, 8 * len(WHOLE) - 1), min_size=1, max_size=3))
def test_bit_flips(positions):
    data = bytearray(WHOLE)
    for position in positions:
        data[position // 8] ^= 1 << position % 8
    with contextlib.suppress(CheckpointError):
        read_bytes(bytes(data))


@settings(max_examples=500)
@given(
    st.binary() | st.lists(st.sampled_from([*PIECES, dump(tensor(), None)])).map(b"".join),
    st.sampled_from([(), ("0",)]),
)
def test_any_pickle_gives_data_or_the_one_error(pickled, keys):
    data = stored(bytes(16)) if keys else b""
    with contextlib.suppress(CheckpointError):
        read_bytes(legacy(pickled, keys=keys, data=data))


@given(PLAIN, st.integers(2, 5))
def test_plain_data(value, protocol):
    pickled = pickle.dumps(value, protocol)[2:-1]
    assert read_bytes(legacy(pickled, keys=(), data=b"")) == value


@settings(max_examples=300)
@given(
    st.sampled_from([4, 2, 0]),
    st.integers(0, 2**63 - 1) | st.integers(0, 8),
    st.binary(max_size=40),
)
def test_any_storages_give_data_or_the_one_error(numel, length, values):
    data = struct.pack("<Q", length) + values
    pickled = dump(tensor(size=(numel,), numel=numel), None)
    try:
        loaded = read_bytes(legacy(pickled, data=data))
    except CheckpointError:
        assert (length, len(values)) != (numel, 4 * numel)
    else:
        assert loaded.read().tobytes() == values
