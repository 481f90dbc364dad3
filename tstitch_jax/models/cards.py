"""Cards: what there is to know of a network besides its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, get_type_hints

import msgspec

from tstitch_jax.core.checks import shown

C = TypeVar("C", bound="BaseCard")

Total = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 2)]  # labels are int32
Size = Annotated[int, msgspec.Meta(ge=1, le=2**20)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseCard:
    """What there is to know of any network besides its parameters; ``card.json`` in its folder.

    Attributes:
        name: Its short name.
        architecture: The registered name of the Flax module, e.g. ``"dit"``.
        config: The keyword arguments of that module.
        num_params: Number of parameters.
        macs: Multiply-adds of one forward pass of one image.
        source: Where it comes from: a file, a hub, or the command that trained it.
        source_checksum: SHA-256 of the file it was converted from, hexadecimal; of several files,
            that of the text with one line ``"SHA-256  NAME"`` for each, in order of name.
        data: What it was trained on.
        license: The license of the weights.
        checksum: SHA-256 of the parameters, hexadecimal.
    """

    name: str
    architecture: str
    config: dict[str, Any]
    num_params: Total = 0
    macs: Total = 0
    source: str = ""
    source_checksum: str = ""
    data: str = ""
    license: str = ""
    checksum: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card(BaseCard):
    """The card of a network that denoises images, or the latents of an autoencoder.

    Attributes:
        image_shape: ``(H, W, C)`` of its input.
        target: What its output is: ``"eps"``, ``"v"``, ``"x0"`` or ``"flow"``.
        learned_variance: Whether a second half of the output channels holds the variance.
        schedule: The arguments of ``make_schedule``.
        num_classes: Number of classes; the null label of guidance is this number itself. 0 for a
            network that is conditioned on a context.
        context: ``(L, D)``, length and width of the contexts that it is conditioned on, such as
            encoded texts; None with classes.
        class_names: Their names, or empty.
        guidance_channels: How many of the first channels guidance acts on by default; None for all.
        autoencoder: The name of the autoencoder whose latents it denoises; empty for images.
        text_encoder: The name of the text encoder that makes its contexts; empty without one.
        consistency: Whether it was distilled to a consistency network, whose x0 is a sample.
    """

    image_shape: tuple[Size, Size, Size]
    target: str
    learned_variance: bool
    schedule: dict[str, Any]
    num_classes: Count
    context: tuple[Size, Size] | None = None
    class_names: tuple[str, ...] = ()
    guidance_channels: int | None = None
    autoencoder: str = ""
    text_encoder: str = ""
    consistency: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderCard(BaseCard):
    """The card of an autoencoder.

    Attributes:
        image_shape: ``(H, W, C)`` of the images it was trained on.
        scaling_factor: What the encoder's output is multiplied by to give latents.
    """

    image_shape: tuple[Size, Size, Size]
    scaling_factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureCard(BaseCard):
    """The card of a network whose features images are compared in, with each other or with texts.

    Attributes:
        image_shape: ``(H, W, C)`` of the images it was trained on.
        num_classes: Number of its classes; 0 of one that knows texts instead.
        class_names: Their names, or empty.
        tokenizer_checksum: As of ``TextEncoderCard``; empty of one that knows no texts.
    """

    image_shape: tuple[Size, Size, Size]
    num_classes: Count
    class_names: tuple[str, ...] = ()
    tokenizer_checksum: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoderCard(BaseCard):
    """The card of a network that makes contexts of texts, for others to be conditioned on.

    Attributes:
        tokenizer_checksum: SHA-256 of the text with one line ``"SHA-256  NAME"`` for each file of
            its tokenizer, in order of name.
    """

    tokenizer_checksum: str = ""


def parse_card(kind: type[C], fields: Mapping[str, Any]) -> C:
    """A card of the given kind from the fields of a JSON object.

    Raises:
        ValueError: If fields are missing, unknown or have wrong values; lists all of them.
    """
    types = get_type_hints(kind, include_extras=True)
    required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    problems = [f"missing {name}" for name in sorted(required - fields.keys())]
    problems += [f"unknown {name}" for name in sorted(fields.keys() - types.keys())]
    values = {}
    for name in fields.keys() & types.keys():
        try:
            values[name] = msgspec.convert(fields[name], types[name])
        except msgspec.ValidationError as error:
            problems.append(f"{name} is {shown(fields[name])}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return kind(**values)
