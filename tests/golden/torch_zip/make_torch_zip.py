"""Writes the goldens of ``test_torch_zip.py`` and ``test_torch_legacy.py`` beside itself.

Run once, with torch:  python make_torch_zip.py

The legacy files differ from run to run, as their storages are named by addresses.
"""

import argparse
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent
FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "complex64")
INTS = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "int64")
torch.manual_seed(0)

tensors = {name: torch.tensor([-1.5, 0.0, 0.25, 6.0]).to(getattr(torch, name)) for name in FLOATS}
tensors |= {name: torch.tensor([0, 1, 2, 100], dtype=getattr(torch, name)) for name in INTS}
tensors["bool"] = torch.tensor([True, False, True])
base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
tensors |= {
    "scalar": torch.tensor(7.0),
    "empty": torch.zeros(0, 3),
    "base": base,
    "transposed": base.T,
    "sliced": base[1:, 1::2],
    "expanded": torch.tensor([1.0, 2.0])[:, None].expand(2, 5),
    "parameter": torch.nn.Parameter(torch.tensor([3.0, 4.0])),
}
for protocol in (2, 4, 5):
    torch.save(tensors, FOLDER / f"tensors_{protocol}.pt", pickle_protocol=protocol)

model = torch.nn.Linear(3, 2)
with torch.no_grad():
    model.weight.copy_(torch.arange(6).reshape(2, 3) / 8)
    model.bias.copy_(torch.tensor([0.5, -0.5]))
optimizer = torch.optim.Adam(model.parameters(), lr=0.125)
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
training = {
    "model": model.state_dict(),
    "ema": OrderedDict((k, v.clone() * 2) for k, v in model.state_dict().items()),
    "opt": optimizer.state_dict(),
    "args": argparse.Namespace(lr=0.125, data=Path("images")),
    "epoch": 3,
    "best": np.float64(0.5),
    "shape": torch.Size([2, 3]),
    "dtype": torch.float32,
    "plain": [None, True, {1, 2}, frozenset({"a"}), b"\xff\x00", bytearray(b"ab"), 1 + 2j, 2**70],
}
for protocol in (2, 4, 5):
    torch.save(training, FOLDER / f"training_{protocol}.pt", pickle_protocol=protocol)

expected = {
    name: (tensor.float() if name in ("bfloat16", "float8_e4m3fn") else tensor).detach().numpy()
    for name, tensor in tensors.items()
}
expected |= {f"model/{k}": v.numpy() for k, v in training["model"].items()}
expected |= {f"ema/{k}": v.numpy() for k, v in training["ema"].items()}
expected |= {f"exp_avg/{k}": v["exp_avg"].numpy() for k, v in training["opt"]["state"].items()}
np.savez_compressed(FOLDER / "expected.npz", **expected)

torch.save({"x": base}, FOLDER / "legacy.pt", _use_new_zipfile_serialization=False)
for name, value, protocols in (("tensors", tensors, (1, 2, 4)), ("training", training, (2, 4))):
    for protocol in protocols:
        torch.save(
            value,
            FOLDER / f"legacy_{name}_{protocol}.pt",
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=False,
        )


class Views(pickle.Pickler):
    """Names a storage that is a part of another as torch did while it had such."""

    def persistent_id(self, obj):
        if not isinstance(obj, torch.storage.TypedStorage):
            return None
        offset, size = (obj.data_ptr() - base.data_ptr()) // 4, len(obj)
        view = None if size == base.numel() else (f"view {offset}", offset, size)
        return "storage", torch.FloatStorage, "root", "cpu", base.numel(), view


part = torch.empty(0).set_(base.untyped_storage()[24:56], 1, (2, 3), (3, 1))
views = {"part": part, "base": base, "transposed": part.T}
system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
with open(FOLDER / "legacy_views.pt", "wb") as file:
    for value in (0x1950A86A20F9469CFC6C, 1001, system):
        pickle.dump(value, file, 2)
    Views(file, 2).dump(views)
    pickle.dump(["root"], file, 2)
    file.write(base.numel().to_bytes(8, "little") + base.numpy().tobytes())
loaded = torch.load(FOLDER / "legacy_views.pt")
assert all(torch.equal(loaded[name], view) for name, view in views.items())
torch.save({"x": torch.tensor([1 + 2j]).conj()}, FOLDER / "conjugated.pt")

script = torch.jit.ScriptModule()
script.define("def forward(self, x):\n    return x * 2\n")  # as text, so that no path is saved
torch.jit.save(script, FOLDER / "script.pt")
