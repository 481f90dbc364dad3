"""The registry of architectures: one ``Family`` each."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from tstitch_jax.core.checks import shown, unknown
from tstitch_jax.models.cards import AutoencoderCard, BaseCard, Card, FeatureCard, TextEncoderCard
from tstitch_jax.models.conditioning import Conditioner, Labels, Texts


def labels_or_texts(card: Card) -> Conditioner:
    """Class labels, or texts if the card has a context."""
    return Labels(card) if card.context is None else Texts(card)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture, and everything that the library has to know of it.

    Dotted names such as ``"package.module:name"`` are imported at the first use.

    Attributes:
        name: Its name in cards (``Card.architecture``).
        module: Dotted name of the Flax module. The module is a dataclass of the card's ``config``,
            ``image_shape``, ``num_classes``, ``learned_variance``, ``context`` (as far as its card
            has them) and ``dtype``; it has ``inputs(batch) -> shapes`` and, for a denoiser,
            ``apply(params, x, time, cond) -> output``.
        card: The kind of its cards.
        layouts: Dotted name of a sequence of ``checkpoints_convert.Layout``: the checkpoints that
            ``convert`` makes its networks of; empty for none.
        conditioner: From a denoiser's card to its conditioner.
    """

    name: str
    module: str
    card: type[BaseCard] = Card
    layouts: str = ""
    conditioner: Callable[[Any], Conditioner] = labels_or_texts


FAMILIES: dict[str, Family] = {}
"""The known families by name; ``register`` adds one."""


def register(family: Family) -> None:
    """Adds a family, so that its networks load, convert and sample by their cards.

    Raises:
        ValueError: If another family has the name.
    """
    if not isinstance(family, Family):
        raise ValueError(f"register takes a ts.Family, got {shown(family)}")
    if FAMILIES.setdefault(family.name, family) != family:
        raise ValueError(f"there is another family named {family.name!r}; choose another name")


def family_of(card: BaseCard) -> Family:
    """The family of a card.

    Raises:
        ValueError: If the architecture is unknown.
    """
    if card.architecture not in FAMILIES:
        hint = " (ts.register adds the family of another package)"
        raise ValueError(f"{unknown('architecture', card.architecture, FAMILIES)}{hint}")
    return FAMILIES[card.architecture]


def conditioner_of(card: Card) -> Conditioner:
    """The conditioner of a denoiser's card; class labels or texts if its family is unknown."""
    family = FAMILIES.get(card.architecture)
    return (labels_or_texts if family is None else family.conditioner)(card)


def imported(name: str) -> Any:
    """The object of a dotted name ``"package.module:name"``."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


_MODELS, _CONVERT = "tstitch_jax.models", "checkpoints_convert"

for _family in (
    Family(name="dit", module=f"{_MODELS}.dit:DiT", layouts=f"{_CONVERT}.dit:LAYOUTS"),
    Family(name="unet", module=f"{_MODELS}.unet:UNet", layouts=f"{_CONVERT}.unet:LAYOUTS"),
    Family(
        name="autoencoder", module=f"{_MODELS}.autoencoder:LatentAutoencoder",
        card=AutoencoderCard, layouts=f"{_CONVERT}.autoencoder:LAYOUTS",
    ),
    Family(
        name="inception", module=f"{_MODELS}.inception:Inception",
        card=FeatureCard, layouts=f"{_CONVERT}.inception:LAYOUTS",
    ),
    Family(name="classifier", module=f"{_MODELS}.classifier:Classifier", card=FeatureCard),
    # Before CLIP, whose layout also fits a text tower alone.
    Family(
        name="clip_text", module=f"{_MODELS}.clip:TextTower",
        card=TextEncoderCard, layouts=f"{_CONVERT}.clip:TEXTS",
    ),
    Family(
        name="clip", module=f"{_MODELS}.clip:CLIP",
        card=FeatureCard, layouts=f"{_CONVERT}.clip:WHOLE",
    ),
):  # fmt: skip
    register(_family)
