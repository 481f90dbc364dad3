"""Checks of values that users give, and how errors show them."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def shown(value: Any) -> str:
    """A value in an error message: one line, not too long."""
    try:
        return " ".join(repr(value).split())[:80]
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"{type(value).__name__} of too many digits"


def first_line(error: BaseException) -> str:
    """What an error says, without the pages that some libraries add."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(text: str) -> str:
    """One line without control sequences, which names out of a file may hold."""
    return "".join(c if c.isprintable() else "?" for c in text)


def is_list(value: Any) -> bool:
    """Whether it is a sequence or an array with a length; a text is none."""
    arrays = isinstance(value, np.ndarray | jax.Array) and value.ndim > 0
    return arrays or (isinstance(value, Sequence) and not isinstance(value, str))


def as_array(value: Any) -> np.ndarray:
    """The array of a value; where NumPy makes none (of ragged lists, say) one without axes."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError):
        return np.empty((), object)


def is_whole(value: Any) -> bool:
    """Whether it is an integer of Python or NumPy; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_whole(name: str, value: Any, low: int = 0, high: int | None = None) -> int:
    """A whole number from ``low`` to ``high``."""
    if not is_whole(value) or value < low or (high is not None and value > high):
        bounds = f" of at least {low}" if high is None else f", {low} to {high}"
        raise ValueError(f"{name} must be a whole number{bounds}, got {shown(value)}")
    return int(value)


def check_seed(seed: Any) -> int:
    """A seed of ``jax.random.key``."""
    return check_whole("seed", seed, 0, 2**32 - 1)


def to_builtin(value: Any) -> Any:
    """An option as JSON holds it; functions by name, tracers as ``"traced"``."""
    if isinstance(value, Tracer):
        return "traced"
    if is_list(value):
        return [to_builtin(each) for each in value]
    if isinstance(value, dict):
        return {str(key): to_builtin(each) for key, each in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_builtin(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return value.item() if isinstance(value, np.generic | np.ndarray | jax.Array) else value


def as_json(value: Any) -> Any:
    """The ``default`` of ``json.dumps`` for settings: arrays and their numbers, and nothing else.

    Raises:
        TypeError: If it is something else.
    """
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return value.tolist()
    raise TypeError(f"settings are numbers, texts and lists, got {shown(value)}")


def check_number(
    name: str,
    value: Any,
    or_none: str = "",
    low: float | int = -math.inf,
    high: float | int = math.inf,
) -> float:
    """A finite number that float32 holds, from ``low`` to ``high``."""
    try:
        if isinstance(value, str | bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number{or_none}, got {shown(value)}") from None
    except OverflowError:  # an integer beyond float64
        number = math.inf
    if not abs(number) < float(np.finfo(np.float32).max):
        raise ValueError(f"{name} must be a finite number{or_none}, got {shown(value)}")
    if not low <= number <= high:
        bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be {bounds}, got {shown(value)}")
    return number


def unknown(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is not among ``known``; it says the near ones."""
    known, text = sorted(known), name if isinstance(name, str) else shown(name)
    near = difflib.get_close_matches(text, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
    return ValueError(f"unknown {kind} {shown(name)}; {hint}")


def check_name(kind: str, name: object, known: Iterable[str]) -> None:
    """Raises ValueError unless the name is among ``known``."""
    if not isinstance(name, str) or name not in known:
        raise unknown(kind, name, known)
