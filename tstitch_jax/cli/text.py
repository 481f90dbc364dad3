"""What the commands share: arguments as text, tables, and configurations."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def count(value: float | int) -> str:
    for unit in ("", "K", "M", "G"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * w for w in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def scale(text: str) -> float | None:
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or none, got {text!r}") from None


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        digits = text.removeprefix("-").isdecimal()
        if not digits or int(text) < low or (high is not None and int(text) > high):
            bounds = f"at least {low}" if high is None else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"must be a whole number, {bounds}, got {text!r}")
        return int(text)

    return parse


def load_config(path: str, *kinds: type) -> Any:
    """The ``config`` of a Python file; raises ValueError unless it is of one of these kinds."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(
            f"no configuration at {path}; give a Python file such as those in configs/"
        )
    sys.path.insert(0, str(file.parent))  # configurations may share a file beside them
    try:
        config = runpy.run_path(path).get("config")
    except (Exception, SystemExit) as error:  # whatever the user's own file raises
        raise ValueError(f"{path} fails: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(file.parent))
    if not isinstance(config, kinds):
        first, *others = (kind.__name__ for kind in kinds)
        nor = "".join(f", nor a {name}" for name in others)
        raise ValueError(f"{path} has no {first} named config{nor}")
    return config
