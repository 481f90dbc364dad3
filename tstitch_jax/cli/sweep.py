"""``tstitch sweep``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from tstitch_jax.cli.text import load_config, table

if TYPE_CHECKING:
    from tstitch_jax.jobs.sweep import Estimate, SweepConfig


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _show(config: SweepConfig, estimates: list[Estimate]) -> None:
    """The points as a table, and what they take in all."""
    images = config.num * len(config.seeds)
    rows = [
        [each.point.series, str(each.point.x), each.plan, f"{each.cost:.3f}",
         f"{each.seconds:.3g} s", _duration(each.seconds * images)]
        for each in estimates
    ]  # fmt: skip
    print(table(["series", "x", "plan", "cost", "an image", f"{images} images"], rows))
    total = _duration(sum(each.seconds for each in estimates) * images)
    print(
        f"\n{len(rows)} points, {len(config.seeds)} seeds of {config.num} images: {total} of "
        "sampling"
        "\ncost: multiply-adds of an image, against the dearest point"
        "\ntimes: estimated from one measured step of each network; compiling, decoding of latents "
        "and measuring the images come on top"
    )


def sweep_command(arguments: argparse.Namespace) -> None:
    import jax

    from tstitch_jax.jobs.sweep import SweepConfig, estimate, sweep
    from tstitch_jax.models.devices import make_mesh

    config = load_config(arguments.config, SweepConfig)
    if arguments.reference:
        config = dataclasses.replace(config, reference=arguments.reference)
    mesh = make_mesh(devices=jax.local_devices())
    if arguments.dry_run:
        _show(config, estimate(config, mesh=mesh))
        return
    out = Path(arguments.out or f"runs/{Path(arguments.config).stem}")
    path = sweep(config, out, mesh=mesh)
    print(f"{len(config.points)} points: {path}, with charts beside it")
