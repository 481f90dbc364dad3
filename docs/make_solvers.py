"""Draws ``docs/solvers.png``: solvers at few steps, from the same noise.

    python docs/make_solvers.py

The embedded pair, stitched at 0.4; a minute on two cores.
"""

from pathlib import Path

import jax
import numpy as np

import tstitch_jax as ts
from tstitch_jax.report import pictures

ROWS = [
    ("ddim, 100", dict(steps=100)),
    ("ddim, 10", dict(steps=10, spacing="trailing")),
    ("dpmpp, 10", dict(steps=10, spacing="trailing", solver="dpmpp")),
    ("unipc, 10", dict(steps=10, spacing="trailing", solver="unipc")),
    ("heun, 10", dict(steps=10, spacing="trailing", solver="heun")),
    ("pndm, 20", dict(steps=20, spacing="leading+1", solver="pndm")),
    ("ddpm, 100", dict(steps=100, solver="ddpm")),
    ("sde, 100", dict(steps=100, solver="sde")),
]


def main() -> None:
    networks = [ts.load("fashion-s"), ts.load("fashion-xl")]
    card = networks[1].card
    labels = list(range(card.num_classes))
    rows = [
        ts.sample(jax.random.key(0), networks, labels=labels, fractions=[0.4, 0.6], **options)
        for _, options in ROWS
    ]
    picture = pictures.grid(
        np.stack(rows),
        [name for name, _ in ROWS],
        card.class_names,
        title="fashion-s for the first 0.4, then fashion-xl",
        footer="Solver and number of steps; guidance 1.5, seed 0.",
    )
    pictures.write_png(picture, Path(__file__).parent / "solvers.png")


if __name__ == "__main__":
    main()
