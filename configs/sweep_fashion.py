"""What the sweeps over the embedded networks share; sweep_fractions.py and its like add points."""

from __future__ import annotations

from collections.abc import Sequence

from tstitch_jax import Point, SweepConfig

PAIR = ["fashion-s", "fashion-xl"]


def make(points: Sequence[Point], x_label: str) -> SweepConfig:
    """A sweep over these points, each of 5,000 images with three seeds, against the test images."""
    return SweepConfig(
        points=points,
        x_label=x_label,
        reference="tfds:fashion_mnist:test",
        features="fashion-features",
        metrics=["fid", "is", "precision", "recall", "accuracy"],
        num=5000,
        seeds=[0, 1, 2],
        batch=50,
    )
