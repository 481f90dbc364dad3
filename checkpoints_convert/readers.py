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
from checkpoints_convert.family import SCHEDULER
from checkpoints_convert.rules import Tensor

WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.fp16.safetensors",
    "pytorch_model.fp16.bin",
)
"""The weights of a folder of diffusers or transformers, first found first taken."""

PREFIXES = ("module.", "_orig_mod.", "model.")

WRAPPERS = ("ema", "model", "state_dict")
"""Where training checkpoints keep the weights, the averaged ones first."""


class Checkpoint(NamedTuple):
    """What was read.

    Attributes:
        tensors: By name.
        config: What the ``config.json`` beside the weights says; empty without one. Where the
            network lies in a pipeline's folder, also that of its scheduler (``SCHEDULER``).
        files: The files read.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    files: tuple[Path, ...]


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; raises CheckpointError if it holds none."""
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or no JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(type(k) is str and type(v) is Tensor for k, v in value.items())
    )


def _unwrap(value: Any, depth: int = 3) -> dict[str, Tensor] | None:
    """The first state dict: the averaged weights of a training checkpoint, or what there is."""
    if _is_state(value) or not isinstance(value, dict) or not depth:
        return value if _is_state(value) else None
    found = (_unwrap(value.get(name), depth - 1) for name in WRAPPERS)
    return next((state for state in found if state), None)


def _torch(path: Path) -> dict[str, Tensor]:
    whole = torch_zip.load(path)
    state = _unwrap(whole)
    if state is None:
        mend = f"save model.state_dict(), by itself or under one of: {', '.join(WRAPPERS)}"
        if not isinstance(whole, dict):
            raise CheckpointError(f"{path} holds a {type(whole).__name__}, no state dict; {mend}")
        others = [str(k) for k, v in whole.items() if type(v) is not Tensor]
        raise CheckpointError(
            f"{path} holds no state dict of tensors alone, but {', '.join(others[:5]) or 'nothing'}"
            f"; {mend}"
        )
    return dict(state)


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged or not safetensors: {error}") from error
    unread = sorted({dtype for _, dtype in found.values()} - _DTYPES.keys())
    if unread:
        raise CheckpointError(
            f"{path} holds tensors stored as {', '.join(unread)}, which are not read; save them "
            "as float32, float16 or bfloat16"
        )

    def read(name: str) -> np.ndarray:
        with safe_open(path, "numpy") as file:
            return file.get_tensor(name)

    return {
        name: Tensor(shape, np.dtype(_DTYPES[dtype]), functools.partial(read, name))
        for name, (shape, dtype) in found.items()
    }


def metadata(path: Path) -> dict[str, str]:
    """What a ``.safetensors`` file, which was read, says beside its tensors; empty of another."""
    from safetensors import safe_open

    with path.open("rb") as file:
        if file.read(9)[8:] != b"{":
            return {}
    with safe_open(path, "numpy") as file:
        return file.metadata() or {}


_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32",
    "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def _sharded(path: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not all(type(v) is str for v in where.values()):
        raise CheckpointError(
            f"{path} has no weight_map, which says the file of each tensor; give the folder, the "
            "weights, or their *.index.json"
        )
    shards = sorted(set(where.values()))
    for shard in shards:
        if Path(shard).name != shard or shard in ("", ".", ".."):
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
    with path.open("rb") as file:
        head = file.read(9)
    # The length of a header of JSON, then it: names are not to be relied on.
    if head[8:] == b"{" or (path.suffix == ".safetensors" and not head.startswith(b"PK")):
        return _safetensors(path)
    return _torch(path)


def read(source: Path) -> Checkpoint:
    """Reads the names, shapes and dtypes of a checkpoint; values are read as they are used.

    Args:
        source: A torch file (``.pt``, ``.pth``, ``.ckpt``, ``.bin``), a ``.safetensors`` file, an
            index of several (``*.index.json``), or the folder of a network of diffusers or
            transformers.

    Raises:
        CheckpointError: If it is none of these, damaged, or holds more than data.
    """
    if source.is_dir():
        weights = next((source / name for name in WEIGHTS if (source / name).is_file()), None)
        if (source / "card.json").is_file():
            raise CheckpointError(
                f"{source} is a network folder already; ts.load takes it as it is"
            )
        if weights is None:
            parts = sorted(p.parent.name for p in source.glob("*/config.json"))
            mend = (
                f"give one of its networks: {' or '.join(str(source / p) for p in parts)}"
                if parts
                else f"expected one of {', '.join(WEIGHTS)}"
            )
            raise CheckpointError(f"{source} is no folder of one network; {mend}")
    elif source.is_file():
        weights = source
    else:
        fault = "is neither a file nor a folder" if source.exists() else "does not exist"
        raise CheckpointError(f"{source} {fault}")
    if weights.suffix == ".json":
        tensors, files = _sharded(weights)
    else:
        tensors, files = _file(weights), (weights,)
    if not tensors:
        raise CheckpointError(f"{weights} holds no tensors")
    # What wrappers of modules put before their names, in any order.
    while prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in tensors)), ""):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    # A config.json belongs to the weights of such a folder, not to any file beside it.
    config_file = weights.parent / "config.json"
    config: dict[str, Any] = {}
    if weights.name in WEIGHTS and config_file.is_file():
        config, files = read_json(config_file), (config_file, *files)
        folder = weights.absolute().parent
        scheduler = folder.parent / SCHEDULER / "scheduler_config.json"
        if folder.name == "unet" and scheduler.is_file():
            config[SCHEDULER], files = read_json(scheduler), (*files, scheduler)
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
