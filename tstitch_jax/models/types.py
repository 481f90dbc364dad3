"""Networks of every kind: a pytree with the parameters, and a card."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tstitch_jax.core.denoisers import in_chunks
from tstitch_jax.core.types import Params, Schedule, record, static
from tstitch_jax.models.autoencoder import at_once
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


@record
class Coder:
    """An autoencoder's module with its parameters."""

    params: Params
    module: Any = static()
    scale: float = static()

    def _check(self, name: str, x: jax.Array, channels: int, multiple: int) -> None:
        if not (
            x.ndim == 4
            and x.shape[3] == channels
            and not (x.shape[1] % multiple or x.shape[2] % multiple)
            and jnp.issubdtype(x.dtype, jnp.floating)
        ):
            sides = f", H and W multiples of {multiple}" if multiple > 1 else ""
            raise ValueError(
                f"{name} must be floats [B, H, W, {channels}]{sides}, got {x.dtype} {x.shape}"
            )

    def encode(self, images: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Latents, float32 ``[B, H/f, W/f, D]``, of images, float32 ``[B, H, W, C]`` in [-1, 1].

        With ``noise``, float32 of the latents' shape, a sample of the posterior, else its mean.
        """
        module = self.module

        def code(images: jax.Array, *noise: jax.Array) -> jax.Array:
            mean, std = module.apply({"params": self.params}, images, method="moments")
            return self.scale * (mean + std * noise[0] if noise else mean)

        self._check("images", images, module.image_shape[2], module.factor)
        batch, height, width = images.shape[:3]
        expected = (batch, height // module.factor, width // module.factor, module.latent_channels)
        if noise is not None and noise.shape != expected:
            raise ValueError(f"noise must be {expected} like the latents, got {noise.shape}")
        more = () if noise is None else (noise,)
        return in_chunks(code, at_once(height * width), images, *more)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images, float32 ``[B, H, W, C]``, not clipped, of latents."""
        module = self.module

        def code(latents: jax.Array) -> jax.Array:
            return module.apply({"params": self.params}, latents / self.scale, method="decode")

        self._check("latents", latents, module.latent_channels, 1)
        pixels = latents.shape[1] * latents.shape[2] * module.factor**2
        return in_chunks(code, at_once(pixels), latents)


@record
class TextModel:
    """A text encoder's module with its parameters."""

    params: Params
    module: Any = static()

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Contexts, float32 ``[B, T, D]``, of tokens, int32 ``[B, T]``."""
        return self.module.apply({"params": self.params}, jnp.asarray(ids, jnp.int32))


@record
class FeatureModel:
    """A feature network's module with its parameters."""

    params: Params
    module: Any = static()

    def __call__(self, pixels: jax.Array) -> Features:
        """Features of ``[B, H, W, C]`` with values from 0 to 255, uint8 or float32."""
        method = "images" if self.takes_texts else "__call__"
        pixels = jnp.asarray(pixels, jnp.float32)
        return self.module.apply({"params": self.params}, pixels, method=method)

    @property
    def takes_texts(self) -> bool:
        """Whether it also maps texts into the space of the pooled features."""
        return hasattr(self.module, "texts")

    def embed(self, ids: jax.Array) -> jax.Array:
        """Vectors, float32 ``[B, D]``, of the tokens of texts, int32 ``[B, T]``."""
        ids = jnp.asarray(ids, jnp.int32)
        return self.module.apply({"params": self.params}, ids, method="texts")


Owner = TypeVar("Owner", bound="_Owner")


class _Owner:
    """An object that owns a pytree with parameters, and shows itself by its card."""

    card: Any
    _tree: ClassVar[str]

    @property
    def tree(self) -> Any:
        """The pytree that holds its arrays."""
        return getattr(self, self._tree)

    @property
    def params(self) -> Params:
        """Its parameters, a nested dict."""
        return self.tree.params

    def with_params(self: Owner, params: Params) -> Owner:
        """The same network with other parameters of the same shapes, and no checksum."""
        tree = dataclasses.replace(self.tree, params=params)
        card = dataclasses.replace(self.card, checksum="")
        return dataclasses.replace(self, card=card, **{self._tree: tree})  # pyright: ignore

    def __repr__(self) -> str:
        card, kind = self.card, type(self).__name__
        return f"{kind}({card.name!r}, {card.architecture}, {card.num_params:,} parameters)"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Network(_Owner):
    """A denoiser with its card: what ``load`` returns.

    Attributes:
        denoiser: The denoiser, a pytree with the parameters.
        card: Its description.
        schedule: The forward process it was trained on.
        rows: How many rows a TPU's fast memory holds the activations of, above which ``sample``
            lets it work in pieces; None for any number. Guidance needs two rows an image.
        multiple: What divides the height and width of its inputs; None where it takes those of its
            card alone.
    """

    _tree = "denoiser"
    denoiser: Any
    card: Card
    schedule: Schedule
    rows: int | None = None
    multiple: int | None = None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Autoencoder(_Owner):
    """The way from images to latents and back.

    Attributes:
        coder: Has ``encode`` and ``decode``; a pytree with the parameters.
        card: Its description.
        factor: How many times smaller latents are than images.
        channels: The latents' channels.
    """

    _tree = "coder"
    coder: Any
    card: AutoencoderCard
    factor: int
    channels: int

    def encode(self, images: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """As ``coder.encode``."""
        return self.coder.encode(images, noise)

    def decode(self, latents: jax.Array) -> jax.Array:
        """As ``coder.decode``."""
        return self.coder.decode(latents)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureNetwork(_Owner):
    """A network whose features images are compared in.

    Attributes:
        model: ``model(pixels)`` are the features of images, ``model.embed(ids)`` the vectors of
            texts if ``model.takes_texts``; a pytree with the parameters.
        card: Its description.
        dtype: Its compute dtype, ``"float32"`` or ``"bfloat16"``.
        tokenizer: Makes the tokens of texts; None without texts.
    """

    _tree = "model"
    model: Any
    card: FeatureCard
    dtype: str = "float32"
    tokenizer: Tokenizer | None = None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TextEncoder(_Owner):
    """The way from texts to contexts that a denoiser is conditioned on.

    Attributes:
        model: ``model(encoder.tokenizer.encode(texts))`` are the contexts of texts; a pytree with
            the parameters.
        card: Its description.
        tokens: T, the length of a text.
        width: D, the width of a context.
        tokenizer: Makes the tokens of texts; None where they come from elsewhere.
    """

    _tree = "model"
    model: Any
    card: TextEncoderCard
    tokens: int
    width: int
    tokenizer: Tokenizer | None = None
