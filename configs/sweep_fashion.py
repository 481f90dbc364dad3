"""What the sweeps over the embedded networks share; sweep_fractions.py and its like add points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tstitch_jax import Point, SweepConfig

PAIR = ["fashion-s", "fashion-xl"]

OPTIONS: dict[str, Any] = dict(steps=10, spacing="trailing", solver="dpmpp")
"""Ten steps are what thousands of images a point cost on a CPU without taking days."""


def make(points: Sequence[Point], x_label: str, **changes: Any) -> SweepConfig:
    """A sweep over these points, each of 5,000 images, against images that were held out.

    These are not tensorflow-datasets' test images, some of which the embedded networks were trained
    on, but those of ``configs/fetch_fashion_mnist.py --split embedded``. More seeds may be added
    later.
    """
    return SweepConfig(
        **dict(
            points=points,
            x_label=x_label,
            reference="tfds:fashion_mnist:test",
            features="fashion-features",
            metrics=["fid", "is", "precision", "recall", "accuracy"],
            num=5000,
            seeds=[0],
            batch=25,
        )
        | changes
    )
