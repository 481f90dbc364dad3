"""Checkpoints of any format as tensors by name."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  # gives NumPy the name bfloat16, which safetensors looks for
import numpy as np

from checkpoints_convert import torch_zip
from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.rules import Tensor

WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)
"""The weights of a diffusers folder, first found first taken."""

WRAPPERS = ("ema", "model", "state_dict")
"""Where training checkpoints keep the weights, the averaged ones first."""


class Checkpoint(NamedTuple):
    """What was read.

    Attributes:
        tensors: By name.
        config: What the ``config.json`` beside the weights says; empty without one.
        files: The files read.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    files: tuple[Path, ...]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or no JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _torch(path: Path) -> dict[str, Tensor]:
    state = torch_zip.load(path)
    for _ in range(3):  # wrappers may hold one another, as {"model": {"state_dict": ...}}
        if not isinstance(state, dict):
            break
        inner = [state[name] for name in WRAPPERS if isinstance(state.get(name), dict)]
        if not inner:
            break
        state = inner[0]
    if not isinstance(state, dict) or not state:
        raise CheckpointError(
            f"{path} holds {'an empty' if state == {} else 'no'} state dict of tensors; save "
            "model.state_dict(), by itself or under one of the names " + ", ".join(WRAPPERS)
        )
    others = [str(k) for k, v in state.items() if type(k) is not str or type(v) is not np.ndarray]
    if others:
        raise CheckpointError(
            f"{path}: not tensors with a name: {', '.join(sorted(others)[:10])}; save "
            "model.state_dict(), by itself or under one of the names " + ", ".join(WRAPPERS)
        )
    return {
        name: Tensor(
            array.shape,
            array.dtype,
            functools.partial(np.asarray, array),
            functools.partial(torch_zip.release, array),
        )
        for name, array in state.items()
    }


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {
                name: (tuple(s.get_shape()), _DTYPES[s.get_dtype()]) for name, s in slices.items()
            }
    except (SafetensorError, KeyError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged or not safetensors: {error}") from error

    def read(name: str) -> np.ndarray:
        with safe_open(path, "numpy") as file:
            return file.get_tensor(name)

    return {
        name: Tensor(shape, np.dtype(dtype), functools.partial(read, name))
        for name, (shape, dtype) in found.items()
    }


_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32",
    "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def _sharded(path: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    where = _read_json(path).get("weight_map")
    if not isinstance(where, dict) or not all(type(v) is str for v in where.values()):
        raise CheckpointError(f"{path} has no weight_map, which says the file of each tensor")
    shards = sorted(set(where.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{path} names a file outside its folder: {shard!r}")
        if not (path.parent / shard).is_file():
            raise CheckpointError(f"{path.parent / shard} is missing; {path.name} names it")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        found = _file(path.parent / shard)
        claimed = {name for name, file in where.items() if file == shard}
        if claimed != found.keys():
            names = ", ".join(sorted(claimed ^ found.keys())[:5])
            raise CheckpointError(f"{path.parent / shard} and {path.name} disagree on: {names}")
        tensors |= found
    return tensors, (path, *(path.parent / shard for shard in shards))


def _file(path: Path) -> dict[str, Tensor]:
    return _safetensors(path) if path.suffix == ".safetensors" else _torch(path)


def read(source: Path) -> Checkpoint:
    """Reads the names, shapes and dtypes of a checkpoint; values are read as they are used.

    Args:
        source: A torch file (``.pt``, ``.pth``, ``.ckpt``, ``.bin``), a ``.safetensors`` file, an
            index of several (``*.index.json``), or the folder of a diffusers network.

    Raises:
        CheckpointError: If it is none of these, damaged, or holds more than data.
    """
    if source.is_dir():
        weights = next((source / name for name in WEIGHTS if (source / name).is_file()), None)
        if weights is None:
            parts = [p for p in ("transformer", "vae") if (source / p / "config.json").is_file()]
            mend = (
                f"give one of its networks: {' or '.join(str(source / p) for p in parts)}"
                if parts
                else f"expected one of {', '.join(WEIGHTS)}"
            )
            raise CheckpointError(f"{source} is no folder of one network; {mend}")
    elif source.is_file():
        weights = source
    else:
        raise CheckpointError(f"{source} does not exist")
    if weights.suffix == ".json":
        tensors, files = _sharded(weights)
    else:
        tensors, files = _file(weights), (weights,)
    for prefix in ("module.", "_orig_mod."):  # what wrapped modules put before their names
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
    # A config.json belongs to the weights of a diffusers folder, not to any file beside it.
    config_file = weights.parent / "config.json"
    config: dict[str, Any] = {}
    if weights.name.startswith("diffusion_pytorch_model") and config_file.is_file():
        config, files = _read_json(config_file), (config_file, *files)
    return Checkpoint(tensors, config, files)


def checksum(files: tuple[Path, ...]) -> str:
    """SHA-256 of a file; of several, that of a text with one line ``"SHA-256  NAME"`` for each."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    if len(files) == 1:
        return digest(files[0])
    lines = sorted((path.name, digest(path)) for path in files)
    return hashlib.sha256("".join(f"{d}  {n}\n" for n, d in lines).encode()).hexdigest()
