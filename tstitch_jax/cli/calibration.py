"""``tstitch calibrate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tstitch_jax.cli.sampling import called_with, sampler_of
from tstitch_jax.cli.text import table
from tstitch_jax.core.checks import printable

if TYPE_CHECKING:
    from tstitch_jax.jobs.calibrate import Calibration, Choice

_SHOWN = 11
"""Rows of the table, spread over the front."""


def share(text: str) -> float:
    """A number such as ``0.01`` or ``1%``."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or per cent, got {text!r}") from None
    if value > 1 and not text.endswith("%"):
        raise argparse.ArgumentTypeError(f"must be a share or per cent; is {text}% meant?")
    return value


def factor(text: str) -> float:
    """A number such as ``1.5`` or ``1.5x``."""
    try:
        return float(text.removesuffix("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a factor such as 1.5x, got {text!r}") from None


def _rows(found: Calibration) -> list[Choice]:
    """The chosen plan, and others of the front spread over its speed-ups, cheapest last."""
    front = found.front[::-1]
    count = min(_SHOWN, len(front))
    kept = {round(i * (len(front) - 1) / max(1, count - 1)) for i in range(count)}
    return [choice for i, choice in enumerate(front) if i in kept or choice is found.chosen]


def _draw(found: Calibration, path: Path) -> None:
    from tstitch_jax.report import charts

    speedups, damages = ([getattr(c, n) for c in found.front] for n in ("speedup", "damage"))
    figure = charts.calibration(
        found.names[:-1], found.steps_alone[:-1], found.linear, speedups=speedups, damages=damages,
        chosen=found.front.index(found.chosen), tolerance=found.settings.get("tolerance"),
        title=f"{' + '.join(found.names)}: {found.plan.describe(found.names, most=4)}",
    )  # fmt: skip
    charts.write_chart(figure, path)


def calibrate_command(arguments: argparse.Namespace) -> None:
    import jax

    from tstitch_jax.core.files import check_writable
    from tstitch_jax.jobs.calibrate import calibrate
    from tstitch_jax.report.charts import check_matplotlib
    from tstitch_jax.report.pictures import check_png

    check_writable(Path(arguments.out))
    if arguments.picture:
        check_matplotlib()
        if check_png(arguments.picture).resolve() == Path(arguments.out).resolve():
            raise ValueError("--out and --picture are one file; give two")
    sampler = sampler_of(arguments)
    found = calibrate(
        jax.random.key(arguments.seed), sampler, tolerance=arguments.tolerance,
        budget=arguments.budget, free=arguments.free, conditions=arguments.conditions,
        costs=arguments.costs, **called_with(arguments, sampler, all_labels=True),
    )  # fmt: skip
    found.save(arguments.out)
    if arguments.picture:
        _draw(found, Path(arguments.picture))
    rows = [
        [
            "->" if choice is found.chosen else "", choice.plan.describe(found.names, most=4),
            f"{choice.damage:.2%}", f"{choice.error:.2%}", f"{choice.speedup:.2f}x",
        ]
        for choice in _rows(found)
    ]  # fmt: skip
    print(table(["", "plan", "damage", "error", "speed-up"], rows))
    print(
        "\ndamage: mean square of what is predicted to change in the result, against that of "
        f"{found.names[-1]} alone, relative to the result's variance; error: over the "
        f"{arguments.conditions} conditions"
    )
    for warning in found.warnings:
        print(f"warning: {printable(warning)}")
    print(f"chosen: {found.plan.describe(found.names, most=4)}, {found.speedup:.2f}x as quick")
    also = f", picture: {arguments.picture}" if arguments.picture else ""
    print(f"plan: {arguments.out} (--plan {arguments.out}){also}")
