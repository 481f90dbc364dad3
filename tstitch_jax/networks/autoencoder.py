"""The KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752), NHWC."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

CHUNK_PIXELS = 256 * 256
"""Larger batches of images are coded in pieces of so many pixels (or one image), one after another,
which bounds the memory of the wide layers at full resolution, and a TPU's compile time."""


def _norm(x: jax.Array, groups: int, name: str) -> jax.Array:
    """Group norm in float32, whatever the compute dtype."""
    norm = nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, name=name)
    return norm(x.astype(jnp.float32))


class Resnet(nn.Module):
    """Two normalised convolutions with a skip connection."""

    channels: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        h = nn.silu(_norm(x, self.groups, "norm1"))
        h = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv1")(h)
        h = nn.silu(_norm(h, self.groups, "norm2"))
        h = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, dtype=self.dtype, name="shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Self-attention over all pixels, with one head."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        batch, height, width, channels = x.shape
        h = _norm(x, self.groups, "norm").reshape(batch, height * width, 1, channels)
        q, k, v = (nn.Dense(channels, dtype=self.dtype, name=n)(h) for n in ("q", "k", "v"))
        # Its logits and softmax are float32 whatever the inputs' dtype.
        h = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        return x + nn.Dense(channels, dtype=self.dtype, name="out")(h)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = Resnet(x.shape[-1], self.groups, self.dtype, name="resnet_0")(x)
        x = Attention(self.groups, self.dtype, name="attention")(x)
        return Resnet(x.shape[-1], self.groups, self.dtype, name="resnet_1")(x)


class Encoder(nn.Module):
    """Images to the moments of the latents; level 0 is the full resolution."""

    widths: tuple[int, ...]
    layers: int
    groups: int
    out: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b k l d"]:
        x = nn.Conv(self.widths[0], (3, 3), dtype=self.dtype, name="conv_in")(x)
        for i, width in enumerate(self.widths):
            for j in range(self.layers):
                x = Resnet(width, self.groups, self.dtype, name=f"level_{i}_resnet_{j}")(x)
            if i + 1 < len(self.widths):
                # The published networks pad at the bottom and on the right only.
                pad = ((0, 1), (0, 1))
                x = nn.Conv(width, (3, 3), 2, pad, dtype=self.dtype, name=f"level_{i}_down")(x)
        x = Middle(self.groups, self.dtype, name="middle")(x)
        x = nn.silu(_norm(x, self.groups, "norm_out"))
        return nn.Conv(self.out, (3, 3), name="conv_out")(x)


class Decoder(nn.Module):
    """Latents to images, from the last level to level 0."""

    widths: tuple[int, ...]
    layers: int
    groups: int
    out: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b k l d"]) -> Float[Array, "b h w c"]:
        x = nn.Conv(self.widths[-1], (3, 3), dtype=self.dtype, name="conv_in")(x)
        x = Middle(self.groups, self.dtype, name="middle")(x)
        for i in reversed(range(len(self.widths))):
            width = self.widths[i]
            for j in range(self.layers + 1):
                x = Resnet(width, self.groups, self.dtype, name=f"level_{i}_resnet_{j}")(x)
            if i:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = nn.Conv(width, (3, 3), dtype=self.dtype, name=f"level_{i}_up")(x)
        x = nn.silu(_norm(x, self.groups, "norm_out"))
        return nn.Conv(self.out, (3, 3), name="conv_out")(x)


class KLAutoencoder(nn.Module):
    """The autoencoder of latent diffusion models; any image size that its factor divides.

    ``apply`` with ``method="moments"`` takes images, float32 ``[B, H, W, C]``, to the posterior's
    mean and standard deviation, each float32 ``[B, H/f, W/f, D]``; with ``method="decode"`` it
    takes such latents to images. Neither knows the scaling factor.

    Attributes:
        widths: Channels by level, each level at half the resolution of the one before.
        layers: Residual blocks by level of the encoder; the decoder has one more.
        latent_channels: D.
        groups: Groups of each normalisation.
        image_shape: ``(H, W, C)`` of the images it was trained on.
        dtype: Compute dtype, float32 or bfloat16. Parameters, normalisation statistics, softmax
            and the last layers are float32 in either.
    """

    widths: tuple[int, ...]
    layers: int
    latent_channels: int
    image_shape: tuple[int, int, int]
    groups: int = 32
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for name in ("layers", "latent_channels", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.widths or min(self.widths) < 1 or any(w % self.groups for w in self.widths):
            raise ValueError(f"{self.groups} groups do not divide widths of {self.widths}")
        super().__post_init__()

    def setup(self) -> None:
        sizes = (tuple(self.widths), self.layers, self.groups)
        self.encoder = Encoder(*sizes, 2 * self.latent_channels, self.dtype)
        self.quant = nn.Dense(2 * self.latent_channels)
        self.post_quant = nn.Dense(self.latent_channels)
        self.decoder = Decoder(*sizes, self.image_shape[-1], self.dtype)

    @property
    def factor(self) -> int:
        """How many times smaller latents are than images."""
        return 2 ** (len(self.widths) - 1)

    def inputs(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct]:
        """Shape and dtype of the input."""
        return (jax.ShapeDtypeStruct((batch, *self.image_shape), jnp.float32),)

    def moments(
        self, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b k l d"], Float[Array, "b k l d"]]:
        """Mean and standard deviation of the latents' posterior."""
        mean, log_variance = jnp.split(self.quant(self.encoder(images)), 2, axis=-1)
        return mean, jnp.exp(jnp.clip(log_variance, -30, 20) / 2)

    def decode(self, latents: Float[Array, "b k l d"]) -> Float[Array, "b h w c"]:
        """Images of latents."""
        return self.decoder(self.post_quant(latents))

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.decode(self.moments(images)[0])


def at_once(pixels: int) -> int:
    """How many images of so many pixels are coded at a time."""
    return max(1, CHUNK_PIXELS // pixels)
