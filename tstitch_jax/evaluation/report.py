"""What was measured, under names that cannot be mistaken for one another."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tstitch_jax.core.files import write_text
from tstitch_jax.models.cards import FeatureCard

PUBLISHED_NUM = 50_000
"""Images of which published distances are."""

PUBLISHED = "6726825d"
"""How the SHA-256 of the published Inception network's file begins, as its name says."""

NAMES = {
    "fid": ("FID", "fd", "Frechet distance"),
    "sfid": ("sFID", "sfd", "spatial Frechet distance"),
    "fid_infinity": ("FID, unlimited images", "fd_infinity", "Frechet distance, unlimited images"),
    "kid": ("KID", "kd", "kernel distance"),
    "is": ("Inception Score", "score", "classifier score"),
    "precision": ("precision", "precision", "precision"),
    "recall": ("recall", "recall", "recall"),
    "accuracy": ("accuracy", "accuracy", "accuracy on the labels"),
    "clip_score": ("CLIP score", "clip_score", "CLIP score"),
}
"""Each measure: what it is called with the Inception network, and with any other its key in
results and its name, so that nobody takes the one for the other."""

METRICS = tuple(NAMES)
"""Names of the measures, as ``evaluate`` and ``SweepConfig`` take them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured, of what, and how.

    Attributes:
        metrics: The measures by key, as ``metric_key`` gives it.
        errors: Of some of them: the numerical error of distances, the standard error of the fitted
            distance, of the kernel distance and of the CLIP score, the standard deviation of the
            score over its splits.
        samples, reference: Name, number of images, SHA-256 over their pixels, settings, what was
            skipped.
        features: Name, checksum, source and dtype of the feature network.
        settings: The library's version, the platform, and constants of the measures.
        notes: What a reader should know before comparing the values.
    """

    metrics: dict[str, float]
    errors: dict[str, float]
    samples: dict[str, Any]
    reference: dict[str, Any] | None
    features: dict[str, Any]
    settings: dict[str, Any]
    notes: list[str] = dataclasses.field(default_factory=list)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything as JSON, whole or not at all."""
        text = json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"
        write_text(Path(path), text)


def metric_key(metric: str, features: str) -> str:
    """The key of a measure in results: ``"fid"`` is of the Inception network alone.

    >>> metric_key("fid", "inception"), metric_key("fid", "fashion-features")
    ('fid', 'fd_fashion-features')
    """
    return metric if features == "inception" else f"{NAMES[metric][1]}_{features}"


def metric_name(metric: str, features: str) -> str:
    """The name of a measure in tables."""
    published, _, other = NAMES[metric]
    return published if features == "inception" else f"{other} ({features})"


def notes(
    metrics: Sequence[str], samples: dict[str, Any], reference: dict[str, Any] | None,
    features: FeatureCard, size: int, cut: int = 0,
) -> Iterator[str]:  # fmt: skip
    """What to know before these values, of ``size`` features, are compared with others.

    ``cut`` is the number of prompts that were too long.
    """
    num = samples["num"]
    if features.architecture == "inception" and not features.source_checksum.startswith(PUBLISHED):
        yield (
            f"the weights of {features.name} are not of the published file, whose SHA-256 begins "
            f"with {PUBLISHED}: nothing here can be compared with published numbers"
        )
    if "fid" in metrics and features.name == "inception" and num < PUBLISHED_NUM:
        yield (
            f"this is the FID of {num} images, which is higher than that of {PUBLISHED_NUM}, the "
            "published number: compare it with those of as many only, or measure fid_infinity"
        )
    distances = {"fid", "sfid", "fid_infinity"} & set(metrics)
    for each in (samples, *([reference] if reference is not None else [])):
        if distances and 0 < each["num"] <= size:
            yield (
                f"{each['num']} images ({each['name']}) do not determine the covariance of {size} "
                "features; the Frechet distance says little"
            )
    if cut:
        yield f"{cut} prompts were too long for {features.name}, which saw their beginning only"
    if "is" in metrics and samples["sorted"]:
        yield "the samples are sorted by class, which makes the score of each split a low one"
    if reference is not None and not reference["image_shape"] and distances:
        yield (
            f"KID, precision and recall need the reference's images, {reference['name']} has "
            "statistics only"
        )
    if reference is not None:
        if reference["sha256"] and reference["sha256"] == samples["sha256"]:
            yield "samples and reference are the same images"
        (ours, theirs) = ("x".join(map(str, s["image_shape"][:2])) for s in (samples, reference))
        if theirs and ours != theirs:
            yield f"samples are {ours}, the reference {theirs}: the distance is also one of sizes"
    for each in (samples, reference or {}):
        skipped = each.get("skipped", ())
        if skipped:
            yield f"{len(skipped)} broken images of {each['name']} were left out: {skipped[0]}, ..."
