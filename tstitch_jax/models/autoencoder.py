"""The autoencoders of latent diffusion (Rombach et al. 2022, arXiv:2112.10752), NHWC."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tstitch_jax.models.convolution import Conv
from tstitch_jax.models.layers import GroupNorm, Resnet, project_and_attend

CHUNK_PIXELS = 256 * 256
"""Larger batches of images are coded in pieces of so many pixels (or one image), one after another,
which bounds the memory of the wide layers at full resolution, and a TPU's compile time."""


class PixelAttention(nn.Module):
    """Self-attention over all pixels of a normalized image, with a skip connection."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        h = GroupNorm(self.groups, 1e-6, name="norm")(x).reshape(len(x), -1, x.shape[-1])
        return x + project_and_attend(h, h, 1, self.dtype, use_bias=True).reshape(x.shape)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = Resnet(x.shape[-1], self.groups, self.dtype, name="resnet_0")(x)
        x = PixelAttention(self.groups, self.dtype, name="attention")(x)
        return Resnet(x.shape[-1], self.groups, self.dtype, name="resnet_1")(x)


class Encoder(nn.Module):
    """Images to the moments of the latents; level 0 is the full resolution."""

    widths: tuple[int, ...]
    layers: int
    attention: tuple[int, ...]
    groups: int
    out: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b k l d"]:
        x = Conv(self.widths[0], (3, 3), dtype=self.dtype, name="conv_in")(x)
        for i, width in enumerate(self.widths):
            for j in range(self.layers):
                x = Resnet(width, self.groups, self.dtype, name=f"level_{i}_resnet_{j}")(x)
                if i in self.attention:
                    x = PixelAttention(self.groups, self.dtype, name=f"level_{i}_attention_{j}")(x)
            if i + 1 < len(self.widths):
                # The published networks pad at the bottom and on the right only.
                pad = ((0, 1), (0, 1))
                x = Conv(width, (3, 3), 2, pad, dtype=self.dtype, name=f"level_{i}_down")(x)
        x = Middle(self.groups, self.dtype, name="middle")(x)
        x = nn.silu(GroupNorm(self.groups, 1e-6, name="norm_out")(x))
        return Conv(self.out, (3, 3), name="conv_out")(x)


class Decoder(nn.Module):
    """Latents to images, from the last level to level 0."""

    widths: tuple[int, ...]
    layers: int
    attention: tuple[int, ...]
    groups: int
    out: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b k l d"]) -> Float[Array, "b h w c"]:
        x = Conv(self.widths[-1], (3, 3), dtype=self.dtype, name="conv_in")(x)
        x = Middle(self.groups, self.dtype, name="middle")(x)
        for i in reversed(range(len(self.widths))):
            width = self.widths[i]
            for j in range(self.layers + 1):
                x = Resnet(width, self.groups, self.dtype, name=f"level_{i}_resnet_{j}")(x)
                if i in self.attention:
                    x = PixelAttention(self.groups, self.dtype, name=f"level_{i}_attention_{j}")(x)
            if i:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = Conv(width, (3, 3), dtype=self.dtype, name=f"level_{i}_up")(x)
        x = nn.silu(GroupNorm(self.groups, 1e-6, name="norm_out")(x))
        return Conv(self.out, (3, 3), name="conv_out")(x)


class Codebook(nn.Module):
    """Each latent replaced by the nearest of a set of vectors (van den Oord et al. 2017)."""

    size: int

    @nn.compact
    def __call__(self, latents: Float[Array, "b k l d"]) -> Float[Array, "b k l d"]:
        shape = (self.size, latents.shape[-1])
        vectors = self.param("vectors", nn.initializers.uniform(1.0), shape)
        # Without the square of the latent itself, which is the same for all; in full float32.
        products = jnp.einsum("bkld,nd->bkln", latents, vectors, precision="highest")
        distances = jnp.square(vectors).sum(axis=1) - 2 * products
        return vectors[jnp.argmin(distances, axis=-1)]


class LatentAutoencoder(nn.Module):
    """The autoencoder of latent diffusion models; any image size that its factor divides.

    ``apply`` with ``method="moments"`` takes images, float32 ``[B, H, W, C]``, to the posterior's
    mean and standard deviation, each float32 ``[B, H/f, W/f, D]``; with ``method="decode"`` it
    takes such latents to images. Neither knows the scaling factor.

    With a codebook (VQ) there is no posterior, and the deviation is 0. Latents are those before
    the nearest vectors are taken, which the decoder does: so latent diffusion is trained.

    Attributes:
        widths: Channels by level, each level at half the resolution of the one before.
        layers: Residual blocks by level of the encoder; the decoder has one more.
        latent_channels: D.
        groups: Groups of each normalisation.
        attention: Levels whose residual blocks are each followed by attention.
        codebook: Number of vectors that latents are replaced by; 0 for a KL autoencoder.
        image_shape: ``(H, W, C)`` of the images it was trained on.
        dtype: Compute dtype, float32 or bfloat16. Parameters, normalisation statistics, softmax,
            the codebook and the last layers are float32 in either.
    """

    widths: tuple[int, ...]
    layers: int
    latent_channels: int
    image_shape: tuple[int, int, int]
    groups: int = 32
    attention: tuple[int, ...] = ()
    codebook: int = 0
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for name in ("layers", "latent_channels", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.widths or min(self.widths) < 1 or any(w % self.groups for w in self.widths):
            raise ValueError(f"{self.groups} groups do not divide widths of {self.widths}")
        if self.codebook < 0 or not set(self.attention) <= set(range(len(self.widths))):
            raise ValueError(
                f"attention is at some of the levels 0 to {len(self.widths) - 1} and codebook at "
                f"least 0, got {self.attention} and {self.codebook}"
            )
        super().__post_init__()

    def setup(self) -> None:
        sizes = (tuple(self.widths), self.layers, tuple(self.attention), self.groups)
        moments = self.latent_channels * (1 if self.codebook else 2)
        self.encoder = Encoder(*sizes, moments, self.dtype)
        self.quant = nn.Dense(moments)
        if self.codebook:
            self.quantize = Codebook(self.codebook)
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
        found = self.quant(self.encoder(images))
        if self.codebook:
            return found, jnp.zeros_like(found)
        mean, log_variance = jnp.split(found, 2, axis=-1)
        return mean, jnp.exp(jnp.clip(log_variance, -30, 20) / 2)

    def decode(self, latents: Float[Array, "b k l d"]) -> Float[Array, "b h w c"]:
        """Images of latents."""
        if self.codebook:
            latents = self.quantize(latents)
        return self.decoder(self.post_quant(latents))

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.decode(self.moments(images)[0])


def at_once(pixels: int) -> int:
    """How many images of so many pixels are coded at a time."""
    return max(1, CHUNK_PIXELS // pixels)
