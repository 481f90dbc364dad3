"""LoRA files (Hu et al. 2021, arXiv:2106.09685), merged into a checkpoint before it is converted.

Each changes weights by ``weight * alpha / rank * up @ down``. Read are the names of kohya's scripts
(``lora_unet_down_blocks_0_....lora_down.weight``), of diffusers and PEFT
(``unet.down_blocks.0.....lora_A.weight``), and of older diffusers
(``down_blocks.0....processor.to_q_lora.down.weight``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert import readers
from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.rules import Tensor, grouped
from tstitch_jax.core.checks import check_number, shown

OWNERS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
}
"""What names begin with, and whose they are. Names with nothing before them are of a U-Net."""

LATER = ("lora_te2_", "text_encoder_2.")
"""What names of a LoRA of Stable Diffusion XL begin with."""

WHOLE = "base_model.model."
"""What PEFT puts before the names of whatever network it changed."""

FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors",
         "pytorch_lora_weights.bin")  # fmt: skip
"""The file of a folder of PEFT or of diffusers."""

_PART = re.compile(
    r"(.+?)(?:_lora\.|\.lora\.|\.lora_linear_layer\.|\.lora_)(down|up|mid|A|B)(?:\.\w+)?\.weight"
)
_ALPHA = re.compile(r"(.+?)(?:_lora|\.lora|\.lora_linear_layer)?\.alpha")

_OTHER_NAMES = (
    (r"_self_attn_to_out$", "_self_attn_out_proj"),
    (r"_self_attn_to_([qkv])$", r"_self_attn_\1_proj"),
    (r"_to_out$", "_to_out_0"),
)
"""Modules that older diffusers called otherwise."""


@dataclasses.dataclass
class Change:
    """How one module is changed.

    Attributes:
        parts: The tensors ``down`` ``[r, in, ...]`` and ``up`` ``[out, r, ...]``, and of some
            convolutions ``mid`` ``[r, r, height, width]`` between them.
        alpha: What the product is multiplied by, times the rank; None for the rank.
    """

    parts: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return self.parts["down"].shape[0]

    def delta(self, shape: tuple[int, ...]) -> np.ndarray:
        """What is added to a weight of that shape, float32."""
        parts = {name: np.asarray(part.read(), np.float32) for name, part in self.parts.items()}
        down, up = parts["down"], parts["up"]
        up = up.reshape(len(up), -1)
        if "mid" in parts:
            down = down.reshape(len(down), -1)
            product = np.einsum("oa,abkl,bi->oikl", up, parts["mid"], down, optimize=True)
        else:
            product = up @ down.reshape(len(down), -1)
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        return np.float32(scale) * product.reshape(shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether ``delta`` has that shape, for which nothing is read."""
        down, up = self.parts["down"].shape, self.parts["up"].shape
        mid = self.parts["mid"].shape if "mid" in self.parts else None
        rank = down[0] if down else 0
        made = (*up[:1], *down[1:]) if mid is None else (*up[:1], *down[1:2], *mid[2:])
        between = mid is None or (mid[:2] == (rank, rank) and len(mid) == 4)
        flat = math.prod(up[2:]) == 1 and (mid is None or math.prod(down[2:]) == 1)
        # A 1x1 convolution and a linear layer are the same.
        trim = [m[:2] if m[2:] == (1, 1) else m for m in (tuple(made), tuple(shape))]
        return len(up) > 1 and up[1] == rank > 0 and between and flat and trim[0] == trim[1]


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _split(module: str) -> tuple[str | None, str]:
    """Whose a module is (None: of whatever network), and its name with ``_`` for each point."""
    for prefix, owner in OWNERS.items():
        if module.startswith(prefix):
            return owner, _flat(module.removeprefix(prefix).replace(".processor.", "."))
    owner = None if module.startswith(WHOLE) else "unet"
    return owner, _flat(module.removeprefix(WHOLE).replace(".processor.", "."))


def _settings(path: Path) -> dict[str, Any]:
    """What PEFT and diffusers say of a file beside its tensors."""
    beside = path.parent / "adapter_config.json"
    if path.name.startswith("adapter_model.") and beside.is_file():
        return readers.read_json(beside)
    metadata = readers.metadata(path).get("lora_adapter_metadata", "{}")
    try:
        found = json.loads(metadata)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: lora_adapter_metadata is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path}: lora_adapter_metadata must be a JSON object, got {shown(found)}"
        )
    return found


def _said_alpha(settings: Mapping[str, Any], owner: str, module: str) -> float | None:
    """The alpha that settings name for a module; raises ValueError if they are damaged."""
    prefix = f"{owner}." if any(key.startswith(f"{owner}.") for key in settings) else ""
    name, patterns = f"{prefix}lora_alpha", settings.get(f"{prefix}alpha_pattern") or {}
    alpha = settings.get(name)
    if not isinstance(patterns, dict):
        raise ValueError(f"{prefix}alpha_pattern must be numbers by module, got {shown(patterns)}")
    for pattern, value in patterns.items():
        try:
            found = re.search(rf"(^|_){_flat(pattern)}$", module)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{prefix}alpha_pattern has {shown(pattern)}, which is no regular expression: "
                f"{error}"
            ) from None
        if found:
            name, alpha = f"{prefix}alpha_pattern of {shown(pattern)}", value
            break
    return None if alpha is None else check_number(name, alpha)


def read(path: Path, owner: str) -> tuple[dict[str, Change], Path]:
    """The changes of a LoRA file to one network, and the file.

    Args:
        path: The file, or PEFT's or diffusers' folder of one.
        owner: ``"unet"`` or ``"text_encoder"``; the changes to the other are passed over.

    Returns:
        Each module's change, by its name in diffusers with ``_`` for each point.

    Raises:
        CheckpointError: If it cannot be read, is of another kind, or changes nothing of the
            network; names every tensor that is not understood.
    """
    if path.is_dir():
        found = next((path / name for name in FILES if (path / name).is_file()), None)
        if found is None:
            raise CheckpointError(f"{path} has no LoRA: expected one of {', '.join(FILES)}")
        path = found
    tensors = readers.read(path).tensors
    later = [name for name in tensors if name.startswith(LATER)]
    if later:
        raise CheckpointError(
            f"{path} is a LoRA of Stable Diffusion XL ({grouped(later[:1])}); supported are those "
            "of Stable Diffusion 1"
        )
    settings = _settings(path)
    for name in ("use_dora", "use_rslora"):
        if any(value for key, value in settings.items() if key.split(".")[-1] == name):
            raise CheckpointError(f"{path} was made with {name}, which is not supported")
    changes: dict[str, Change] = {}
    unknown, others = [], 0
    for name, tensor in tensors.items():
        part, alpha = _PART.fullmatch(name), _ALPHA.fullmatch(name)
        match = part or alpha
        if match is None:
            unknown.append(name)
            continue
        whose, module = _split(match[1])
        if whose not in (None, owner):
            others += 1
            continue
        change = changes.setdefault(module, Change())
        if part is not None:
            change.parts[{"A": "down", "B": "up"}.get(part[2], part[2])] = tensor
        elif math.prod(tensor.shape) != 1:
            raise CheckpointError(f"{path}: {name} has shape {tensor.shape}, expected one number")
        else:
            change.alpha = float(np.asarray(tensor.read(), np.float32).reshape(()))
    if unknown:
        raise CheckpointError(
            f"{path} has tensors that are not of a LoRA: {grouped(sorted(unknown))}; supported are "
            "down, up, mid and alpha of linear layers and convolutions (not LoHa, LoKr or DoRA)"
        )
    if others and changes:
        warnings.warn(
            f"{path} changes another network too ({others} tensors); convert that with it as well",
            stacklevel=2,
        )
    if not changes:
        raise CheckpointError(
            f"{path} changes nothing of a {owner}" + (f", but {others} of others" if others else "")
        )
    broken = [name for name, change in changes.items() if not {"down", "up"} <= change.parts.keys()]
    if broken:
        raise CheckpointError(f"{path} lacks down or up of: {', '.join(sorted(broken)[:5])}")
    for module, change in changes.items():
        if change.alpha is None:
            try:
                change.alpha = _said_alpha(settings, owner, module)
            except ValueError as error:
                raise CheckpointError(f"the settings of {path} are damaged: {error}") from None
    return changes, path


def modules(names: Mapping[str, str]) -> dict[str, str]:
    """Tensors by the module that a LoRA names.

    Args:
        names: Each weight's name in diffusers, and its name in the checkpoint.
    """
    return {_flat(name.removesuffix(".weight")): tensor for name, tensor in names.items()}


def merge(
    tensors: Mapping[str, Tensor], path: Path, weight: float, owner: str, names: Mapping[str, str]
) -> tuple[dict[str, Tensor], Path]:
    """The tensors with a LoRA in them, which are read as they are used, and the file of it.

    Args:
        tensors: The checkpoint.
        path: As of ``read``.
        weight: How strongly; 1 as it was trained, 0 for not at all.
        owner: As of ``read``.
        names: The name in diffusers of each weight that may be changed, and the one in
            ``tensors``.

    Raises:
        CheckpointError: As ``read``; or if a change is of no weight of the network, or of one with
            another shape. All are named.
    """
    if not math.isfinite(weight):
        raise CheckpointError(f"the weight of {path.name} must be a number, got {weight}")
    changes, path = read(path, owner)
    known, merged = modules(names), dict(tensors)
    unknown, wrong = [], []
    for module, change in changes.items():
        for pattern, replacement in _OTHER_NAMES:
            if module not in known:
                module = re.sub(pattern, replacement, module)
        if module not in known:
            unknown.append(module)
            continue
        name = known[module]
        base = merged[name]
        if not change.fits(base.shape):
            shapes = " and ".join(str(part.shape) for part in change.parts.values())
            wrong.append(f"{module} {shapes} for {name} {base.shape}")
            continue
        merged[name] = Tensor(
            base.shape,
            np.dtype(np.float32),
            functools.partial(_read, base, change, weight),
            base.release,
        )
    problems = []
    if unknown:
        problems.append(f"it changes what the network does not have: {', '.join(sorted(unknown))}")
    if wrong:
        problems.append(f"wrong shape: {'; '.join(sorted(wrong))}")
    if problems:
        raise CheckpointError(f"{path} does not fit: {' | '.join(problems)}")
    return merged, path


def _read(base: Tensor, change: Change, weight: float) -> np.ndarray:
    value = np.asarray(base.read(), np.float32)
    return value + np.float32(weight) * change.delta(base.shape)
