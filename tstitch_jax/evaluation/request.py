"""What can be measured of which sets: everything that is refused before long work begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from tstitch_jax.core.checks import check_whole, is_list, shown
from tstitch_jax.evaluation.features import check_images
from tstitch_jax.evaluation.report import METRICS
from tstitch_jax.evaluation.sources import Source
from tstitch_jax.models.types import FeatureNetwork, Features

NEIGHBOURS = 3
"""The k of precision and recall."""

_LEAST = {
    "fid": 2, "sfid": 2, "kid": 2, "fid_infinity": 50,
    "precision": NEIGHBOURS + 1, "recall": NEIGHBOURS + 1,
}  # fmt: skip
"""Images without which a measure has no value."""

_OF_SAMPLES = ("is", "accuracy", "clip_score")
"""Measures without a reference."""

_MOMENTS = {"fid": "mu", "fid_infinity": "mu", "sfid": "mu_s"}
"""The statistics that take the place of a reference's images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Sets, a network, and the measures that can be had of them.

    Attributes:
        samples, reference: The sets.
        network: The feature network.
        metrics: The measures.
        num: How many samples.
        shapes: Of the features of one image.
        prompts: A text for each sample, or None.
    """

    samples: Source
    reference: Source | None
    network: FeatureNetwork
    metrics: list[str]
    num: int
    shapes: Features
    prompts: Sequence[str] | None = None

    def of_reference(self) -> set[str]:
        """The measures that need the reference's images."""
        known = {} if self.reference is None else self.reference.statistics
        needed = {m for m in self.metrics if m not in _OF_SAMPLES}
        return {m for m in needed if _MOMENTS.get(m) not in known}


def _lacks(
    metric: str, samples: Source, reference: Source | None, network: FeatureNetwork, spatial: bool,
    prompts: Sequence[str] | None,
) -> Iterator[str]:  # fmt: skip
    """Why a measure cannot be had."""
    card, labels = network.card, samples.labels
    if metric in ("is", "accuracy") and not card.num_classes:
        yield f"{card.name} knows no classes"
    elif metric == "accuracy":
        if labels is None:
            yield f"{samples.name} has no labels (arr_1)"
        elif not card.class_names:
            yield f"{card.name} does not know the classes of the labels"
        elif labels.max() >= card.num_classes or labels.min() < 0:
            yield f"the labels are {labels.min()} to {labels.max()}, {card.name} has " + str(
                card.num_classes
            )
    elif metric == "clip_score":
        if network.tokenizer is None:
            yield f"{card.name} knows no texts, as clip-vit-large-patch14 does"
        elif prompts is None:
            yield "there are no prompts"
    elif metric != "is":
        if metric == "sfid" and not spatial:
            yield f"{card.name} has no spatial features"
        if reference is None:
            yield "there is no REFERENCE"
        elif not reference.count and _MOMENTS.get(metric) not in reference.statistics:
            lack = {"sfid": "no mu_s and sigma_s"}.get(metric, "statistics only, no images (arr_0)")
            yield f"{reference.name} has {lack}"


def _check_statistics(reference: Source, network: FeatureNetwork, shapes: Features) -> None:
    """Raises ValueError if a reference's statistics are of other features."""
    made_with = reference.statistics.get("features", "")
    if made_with and made_with != network.card.checksum:
        raise ValueError(
            f"the statistics in {reference.name} are of another feature network (checksum "
            f"{made_with[:12]}) than {network.card.name} ({network.card.checksum[:12]})"
        )
    for name, features in (("mu", shapes.pool), ("mu_s", shapes.spatial)):
        found = reference.statistics.get(name)
        if found is not None and features is not None and len(found) != features.shape[1]:
            raise ValueError(
                f"{name} in {reference.name} is of {len(found)} features, those of "
                f"{network.card.name} are {features.shape[1]}; give the features that it was made "
                "with"
            )


def check_features(network: Any) -> None:
    """Raises ValueError unless it is a feature network."""
    if not isinstance(network, FeatureNetwork):
        raise ValueError(
            'features must be a feature network such as ts.load("inception"), got ' + shown(network)
        )


def check_request(
    samples: Source, reference: Source | None, network: FeatureNetwork,
    metrics: Sequence[str] | None, num: int | None, prompts: Sequence[str] | None = None,
) -> Request:  # fmt: skip
    """What is to be measured.

    Args:
        samples, reference: The sets.
        network: The feature network.
        metrics: The measures; None for all that can be had, without ``"fid_infinity"``.
        num: How many of the samples; None for all.
        prompts: The text of each sample, for the CLIP score; or None.

    Raises:
        ValueError: If a set does not suit the network, or a measure cannot be had.
    """
    check_features(network)
    if not samples.count:
        raise ValueError(f"{samples.name} has statistics only; the samples must be images")
    if num is not None and check_whole("num", num, 1) > samples.count:
        raise ValueError(f"{samples.name} has {samples.count} images, fewer than the {num} wanted")
    if prompts is not None and (not is_list(prompts) or len(prompts) != samples.count):
        raise ValueError(
            f"prompts must be one for each of the {samples.count} images of {samples.name}, in "
            f"their order, got {len(prompts) if is_list(prompts) else shown(prompts)}"
        )
    if metrics is not None and not is_list(metrics):
        raise ValueError(f"metrics must be a list of measures, got {shown(metrics)}")
    num = samples.count if num is None else int(num)
    sets = [(samples.name, num)]
    if reference is not None and reference.count:
        sets.append((reference.name, reference.count))
        check_images(network, reference.shape, reference.name)
    shapes = check_images(network, samples.shape, samples.name)
    if reference is not None:
        _check_statistics(reference, network, shapes)

    lacks = {
        m: list(_lacks(m, samples, reference, network, shapes.spatial is not None, prompts))
        for m in METRICS
    }
    for metric in METRICS:
        least = _LEAST.get(metric, 1)
        lacks[metric] += [
            f"it needs at least {least} images, there are {count} in {name}"
            for name, count in sets
            if count < least
        ]
    for metric in () if metrics is None else metrics:
        if metric not in METRICS:
            raise ValueError(f"unknown measure {shown(metric)}; choose from {', '.join(METRICS)}")
        if lacks[metric]:
            raise ValueError(f"{metric} cannot be measured: {lacks[metric][0]}")
    if prompts is not None and lacks["clip_score"]:
        raise ValueError(f"prompts are of no use here: {lacks['clip_score'][0]}")
    default = [m for m in METRICS if not lacks[m] and m != "fid_infinity"]
    chosen = default if metrics is None else [m for m in METRICS if m in metrics]
    return Request(
        samples=samples, reference=reference, network=network, metrics=chosen, num=num,
        shapes=shapes, prompts=prompts,
    )  # fmt: skip
