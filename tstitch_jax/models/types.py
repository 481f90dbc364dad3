"""Networks of every kind, with their parameters and cards. Nothing here computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from tstitch_jax.core.types import Denoiser, Params, Schedule
from tstitch_jax.models.cards import AutoencoderCard, Card, FeatureCard, TextEncoderCard


class Features(NamedTuple):
    """What a feature network says of images; everything float32.

    Attributes:
        pool: ``[B, D]``, its last layer before the classifier, pooled over the image.
        logits: ``[B, K]``, of its classes, without a bias where the published measure has none;
            None without classes.
        spatial: ``[B, S]``, an inner layer's values at every place, flattened; None without one.
    """

    pool: Float[Array, "b d"]
    logits: Float[Array, "b k"] | None = None
    spatial: Float[Array, "b s"] | None = None


class Tokenizer(NamedTuple):
    """From texts to the numbers of tokens that a text encoder takes.

    Attributes:
        encode: ``texts -> ids``, NumPy int32 ``[B, T]``: start, text, end, and what fills it up. A
            text that is too long is cut, with a warning that says what is left out.
        files: The files it was made from, by name; they are kept in the folders of networks.
        size: How many tokens there are.
    """

    encode: Callable[[Sequence[str]], np.ndarray]
    files: Mapping[str, bytes]
    size: int


class Precomputed(NamedTuple):
    """A network's parameters, and what is computed of them alone (``Network.precompute``)."""

    params: Params
    forms: Any


class _Named:
    """A network that shows itself by its card."""

    card: Any

    def __repr__(self) -> str:
        card, kind = self.card, type(self).__name__
        return f"{kind}({card.name!r}, {card.architecture}, {card.num_params:,} parameters)"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Network(_Named):
    """A denoiser with its parameters and its card: what ``load`` returns.

    Attributes:
        denoiser: The denoiser.
        params: Its parameters.
        card: What it is.
        schedule: The forward process it was trained on.
        rows: How many rows a TPU's fast memory holds the activations of, above which ``sample``
            lets it work in pieces; None for any number. Guidance asks for two rows an image.
        multiple: What divides the height and width of its inputs; None where it takes those of its
            card alone.
        precompute: ``(params, x, cond) -> forms``, by the shapes of x and cond: what a loop on a
            CPU would compute of the parameters alone in every step. This denoiser takes it beside
            them, as ``Precomputed``; None where there is nothing, or with another denoiser.
    """

    denoiser: Denoiser
    params: Params
    card: Card
    schedule: Schedule
    rows: int | None = None
    multiple: int | None = None
    precompute: Callable[[Params, Any, Any], Any] | None = None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Autoencoder(_Named):
    """The way from images to latents and back, with its parameters and its card.

    Attributes:
        encode: ``(params, images, noise) -> latents``: float32 ``[B, H, W, C]`` in [-1, 1] to
            float32 ``[B, H/f, W/f, D]``. With ``noise``, float32 of the latents' shape, a sample
            of the posterior, with None its mean.
        decode: ``(params, latents) -> images``, not clipped.
        params: Its parameters, a nested dict.
        card: What it is.
        factor: ``f``, how many times smaller latents are than images.
        channels: ``D``, the latents' channels.
    """

    encode: Callable[[Params, jax.Array, jax.Array | None], jax.Array]
    decode: Callable[[Params, jax.Array], jax.Array]
    params: Params
    card: AutoencoderCard
    factor: int
    channels: int


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureNetwork(_Named):
    """A network whose features images are compared in, with its parameters and its card.

    Attributes:
        extract: ``(params, pixels) -> Features``; pixels are ``[B, H, W, C]`` with values from 0 to
            255, uint8 or float32.
        params: Its parameters, a nested dict.
        card: What it is.
        dtype: What it computes in, ``"float32"`` or ``"bfloat16"``.
        embed: ``(params, ids) -> vectors`` of texts, int32 ``[B, T]`` to float32 ``[B, D]``, in the
            space of the pooled features; None of a network that knows no texts.
        tokenizer: What makes ``ids`` of texts; None without ``embed``.
    """

    extract: Callable[[Params, jax.Array], Features]
    params: Params
    card: FeatureCard
    dtype: str = "float32"
    embed: Callable[[Params, jax.Array], jax.Array] | None = None
    tokenizer: Tokenizer | None = None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TextEncoder(_Named):
    """The way from texts to contexts that a denoiser is conditioned on.

    ``encoder.encode(encoder.params, encoder.tokenizer.encode(texts))`` is the context of texts.

    Attributes:
        encode: ``(params, ids) -> context``: int32 ``[B, T]`` to float32 ``[B, T, D]``.
        params: Its parameters, a nested dict.
        card: What it is.
        tokens: T, the length of a text.
        width: D.
        tokenizer: What makes ``ids`` of texts; None where they come from elsewhere.
    """

    encode: Callable[[Params, jax.Array], jax.Array]
    params: Params
    card: TextEncoderCard
    tokens: int
    width: int
    tokenizer: Tokenizer | None = None
