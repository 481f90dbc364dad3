"""What a family of checkpoints has to say: a card and rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.rules import Rule, Tensor
from tstitch_jax.core.checks import shown
from tstitch_jax.models.cards import BaseCard


class Conversion(NamedTuple):
    """How a checkpoint becomes a network.

    Attributes:
        card: The card, as far as the checkpoint tells.
        rules: One for each parameter.
        ignored: Names of the tensors that are left out on purpose.
        check: Raises CheckpointError if what is left out is not what it should be.
        lora_names: Of a network that LoRA files are made for: the name in diffusers of each weight
            that one may change, and its name in the checkpoint.
    """

    card: BaseCard
    rules: list[Rule]
    ignored: tuple[str, ...] = ()
    check: Callable[[], None] = lambda: None
    lora_names: Mapping[str, str] = {}


class Layout(NamedTuple):
    """A way to name the tensors of a network.

    Attributes:
        name: Its name in messages.
        families: The families that use it, the first one if none is given.
        names: A regular expression that the names of all its tensors match.
        convert: ``(family, tensors, config, num_heads) -> Conversion``.
        part: The folder of such a network in a pipeline of diffusers; empty for none.
    """

    name: str
    families: tuple[str, ...]
    names: str
    convert: Callable[[str, Mapping[str, Tensor], Mapping[str, Any], int | None], Conversion]
    part: str = ""


def shape_of(tensors: Mapping[str, Tensor], name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that sizes are read from; raises CheckpointError without it."""
    if name not in tensors:
        raise CheckpointError(f"missing: {name}, from which the network's size is read")
    shape = tensors[name].shape
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"wrong shape: {name} is {shape}, expected {rank} sizes above 0")
    return shape


SCHEDULER = "scheduler"
"""Where a configuration keeps that of the pipeline's scheduler, which no network's own has."""

SIDE = 4096
"""The largest side of an image or of latents that a configuration may ask for."""


def check_config(
    config: Mapping[str, Any],
    expected: Mapping[str, Any],
    whole: Mapping[str, int] | None = None,
    file: str = "config.json",
) -> None:
    """Compares what a ``config.json`` says with what it must say; what it leaves out is fine.

    Args:
        config: Its fields.
        expected: Their values, or tuples of the values allowed.
        whole: Fields that must be whole numbers from 1 to the given one.
        file: What errors call it.

    Raises:
        CheckpointError: Lists every field that differs.
    """
    wrong = []
    for key, value in expected.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if key in config and config[key] not in allowed:
            choice = " or ".join(map(repr, allowed))
            wrong.append(f"{key} is {shown(config[key])}, expected {choice}")
    for key, most in (whole or {}).items():
        if key in config and not (type(config[key]) is int and 1 <= config[key] <= most):
            wrong.append(f"{key} is {shown(config[key])}, expected a whole number up to {most}")
    if wrong:
        raise CheckpointError(f"{file}: {'; '.join(wrong)}")


def count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number in the names that begin with ``pattern``; 0 for none."""
    found = (re.match(pattern, name) for name in tensors)
    number = 1 + max((int(m[1]) for m in found if m), default=-1)
    if number > len(tensors):
        raise CheckpointError(f"there are {number - 1} layers by name, but {len(tensors)} tensors")
    return number
