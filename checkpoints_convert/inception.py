"""The Inception network of the FID, as pytorch-fid publishes it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.family import Conversion, Layout, shape_of
from checkpoints_convert.rules import Rule, Tensor, conv, linear, same
from tstitch_jax.models.build import flatten, module_of
from tstitch_jax.models.cards import FeatureCard
from tstitch_jax.models.measure import param_shapes

IGNORED = r"fc\.bias|.*\.num_batches_tracked|AuxLogits\..*"
"""The Inception Score is published without the bias; the others play no part in the features."""

_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def _source(layer: str) -> str:
    """The published name of a layer: ``mixed_5b/branch1x1`` is ``Mixed_5b.branch1x1``."""
    block, name = layer.split("/")
    if block != "stem":
        return f"{block.capitalize()}.{name}"
    # Stem layers are named after their kernels, too.
    return f"Conv2d_{name}_{'1x1' if name == '3b' else '3x3'}"


def _rules(names: Mapping[str, Any]) -> Iterator[Rule]:
    for name in names:
        if name == "logits":
            yield Rule(name, ("fc.weight",), linear)
            continue
        layer, kind = name.rsplit("/", 1)
        if kind == "kernel":
            yield Rule(name, (f"{_source(layer)}.conv.weight",), conv)
        else:
            yield Rule(name, (f"{_source(layer)}.bn.{_NORM[kind]}",), same)


def published(
    family: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], heads: int | None
) -> Conversion:
    """The conversion of ``pt_inception-2015-12-05-6726825d.pth``."""
    if heads is not None:
        raise CheckpointError("an inception network has no attention heads; leave out --num-heads")
    classes, _ = shape_of(tensors, "fc.weight", 2)
    card = FeatureCard(
        name="",
        architecture="inception",
        config={},
        image_shape=(299, 299, 3),
        num_classes=classes,
    )
    names = flatten(param_shapes(module_of(card)))
    ignored = tuple(name for name in tensors if re.fullmatch(IGNORED, name))
    return Conversion(card, list(_rules(names)), ignored)


LAYOUTS = (
    Layout(
        "pytorch-fid's Inception",
        ("inception",),
        r"(Conv2d_\d\w|Mixed_\d\w)\..*|fc\.(weight|bias)",
        published,
    ),
)
