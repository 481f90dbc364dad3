"""The conditional U-Net of latent diffusion (Rombach et al. 2022, arXiv:2112.10752), NHWC."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tstitch_jax.models.convolution import Conv
from tstitch_jax.models.layers import (
    GroupNorm,
    Resnet,
    embed,
    feed_forward,
    layer_norm,
    project_and_attend,
    time_code,
)

SIZES: dict[str, dict[str, Any]] = {
    "sd-1": dict(widths=(320, 640, 1280, 1280), layers=2, heads=(8, 8, 8, 0), middle_heads=8),
    "bk-sdm-base": dict(
        widths=(320, 640, 1280, 1280), layers=1, heads=(8, 8, 8, 0), middle_heads=8
    ),
    "bk-sdm-small": dict(
        widths=(320, 640, 1280, 1280), layers=1, heads=(8, 8, 8, 0), middle_heads=0
    ),
    "bk-sdm-tiny": dict(widths=(320, 640, 1280), layers=1, heads=(8, 8, 8), middle_heads=0),
    "ldm-4": dict(
        widths=(192, 384, 576, 960), layers=2, heads=(0, 1, 1, 1), middle_heads=1, label_width=512
    ),
    "ldm": dict(
        widths=(256, 512, 1024), layers=2, heads=(8, 16, 32), middle_heads=32, label_width=512
    ),
    "ldm-s": dict(
        widths=(64, 128, 256), layers=2, heads=(2, 4, 8), middle_heads=8, label_width=256
    ),
}
"""Keyword arguments of ``UNet`` without its input and what it is conditioned on: Stable Diffusion
1.x; BK-SDM (Kim et al. 2023, arXiv:2305.15798); the class-conditional LDM-4 of latent diffusion
(``cin256-v2``); LDM and LDM-S as the T-Stitch paper trains them, on latents of a factor of 8."""


class Attention(nn.Module):
    """Attention of tokens to a context, with its projections."""

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], context: Float[Array, "b m d"]) -> jax.Array:
        return project_and_attend(x, context, self.num_heads, self.dtype)


class Transformer(nn.Module):
    """All pixels attend to each other, then to the context; then a gated linear unit by pixel."""

    num_heads: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], context: Float[Array, "b m d"]) -> jax.Array:
        width = x.shape[-1]

        def dense(features: int, name: str, h: jax.Array) -> jax.Array:
            return nn.Dense(features, dtype=self.dtype, name=name)(h)

        h = GroupNorm(self.groups, 1e-6, name="norm")(x).reshape(x.shape[0], -1, width)
        h = dense(width, "project_in", h)
        own = layer_norm(h, "self_norm")
        h = h + Attention(self.num_heads, self.dtype, name="self")(own, own)
        own = layer_norm(h, "cross_norm")
        h = h + Attention(self.num_heads, self.dtype, name="cross")(own, context)
        gelu = functools.partial(nn.gelu, approximate=False)
        own = feed_forward(layer_norm(h, "mlp_norm"), 4 * width, gelu, self.dtype, gated=True)
        h = h + own.astype(self.dtype)
        return x + dense(width, "project_out", h).reshape(x.shape)


class UNet(nn.Module):
    """A conditional U-Net on NHWC latents of any size that ``multiple`` divides.

    ``apply(params, x, time, cond)`` takes float32 ``[B, H, W, C]``, times ``[B]`` and what it is
    conditioned on: a context, float32 ``[B, L, D]`` with ``D = context[1]`` and any length L; or,
    where it has classes, int32 labels ``[B]`` (``num_classes`` is the null class), whose embedding
    is a context of length 1. It returns the raw output, float32 ``[B, H, W, out]`` with
    ``out = 2 C`` where the variance is learned, else ``C``.

    Attributes:
        widths: Channels by level, each level at half the resolution of the one before.
        layers: Residual blocks by level on the way down; there is one more on the way up.
        heads: Attention heads by level; 0 where a level has no transformers.
        middle_heads: Those of the block in the middle; 0 where there is no such block.
        image_shape: ``(H, W, C)`` of the inputs it was trained on.
        num_classes: Number of classes without the null class; 0 where a context is given.
        context: ``(L, D)``, length and width of the context it was trained with; None with classes.
        label_width: Width of the classes' embedding; 0 without classes.
        learned_variance: Whether the second half of the output channels codes the variance.
        groups: Groups of each normalisation.
        dtype: Compute dtype, float32 or bfloat16. Parameters, time embedding, normalisation
            statistics, softmax and the last layer are float32 in either.
    """

    widths: tuple[int, ...]
    layers: int
    heads: tuple[int, ...]
    middle_heads: int
    image_shape: tuple[int, int, int]
    num_classes: int = 0
    context: tuple[int, int] | None = None
    label_width: int = 0
    learned_variance: bool = False
    groups: int = 32
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for name in ("layers", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.widths or min(self.widths) < 1 or any(w % self.groups for w in self.widths):
            raise ValueError(f"{self.groups} groups do not divide widths of {self.widths}")
        if len(self.heads) != len(self.widths):
            raise ValueError(f"heads need a number for each of {self.widths}, got {self.heads}")
        pairs = [*zip(self.widths, self.heads, strict=True), (self.widths[-1], self.middle_heads)]
        for width, heads in pairs:
            if heads < 0 or (heads and width % heads):
                raise ValueError(f"{heads} heads do not divide a width of {width}")
        if (self.context is None) != (self.num_classes > 0) or (
            (self.label_width > 0) != (self.num_classes > 0)
        ):
            raise ValueError(
                "a U-Net takes labels (num_classes and label_width) or a context, got "
                f"{self.num_classes} classes, label_width {self.label_width}, {self.context}"
            )
        height, width, _ = self.image_shape
        if height % self.multiple or width % self.multiple:
            raise ValueError(
                f"{len(self.widths)} levels need sizes that are multiples of {self.multiple}, "
                f"got {height}x{width}"
            )
        super().__post_init__()

    @property
    def multiple(self) -> int:
        """What divides the height and the width of an input."""
        return 2 ** (len(self.widths) - 1)

    def inputs(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of the inputs: latents, times, context or labels."""
        shape = jax.ShapeDtypeStruct
        return (
            shape((batch, *self.image_shape), jnp.float32),
            shape((batch,), jnp.float32),
            shape((batch,), jnp.int32)
            if self.context is None
            else shape((batch, *self.context), jnp.float32),
        )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        time: Float[Array, " b"],
        cond: Float[Array, "b l d"] | Int[Array, " b"],
    ) -> Float[Array, "b h w o"]:
        _, height, width, channels = x.shape
        if height % self.multiple or width % self.multiple or channels != self.image_shape[2]:
            raise ValueError(
                f"the U-Net takes {self.image_shape[2]} channels, height and width multiples of "
                f"{self.multiple}, got {x.shape[1:]}"
            )
        if self.context is None:
            # The published programs keep this table in float32 too.
            labels = nn.Embed(self.num_classes + 1, self.label_width, name="labels")
            context = labels(cond)[:, None]
        elif cond.ndim == 3 and cond.shape[2] == self.context[1]:
            context = cond
        else:
            raise ValueError(
                f"the U-Net takes contexts [B, L, {self.context[1]}], got {cond.shape}"
            )

        emb = embed(time_code(time, self.widths[0]), 4 * self.widths[0], "time")

        def resnet(h: jax.Array, width: int, name: str) -> jax.Array:
            return Resnet(width, self.groups, self.dtype, 1e-5, name=name)(h, emb)

        def transformer(h: jax.Array, heads: int, name: str) -> jax.Array:
            return Transformer(heads, self.groups, self.dtype, name=name)(h, context)

        h = Conv(self.widths[0], (3, 3), dtype=self.dtype, name="conv_in")(x)
        skips, last = [h], len(self.widths) - 1
        for i, (width, heads) in enumerate(zip(self.widths, self.heads, strict=True)):
            for j in range(self.layers):
                h = resnet(h, width, f"down_{i}_resnet_{j}")
                if heads:
                    h = transformer(h, heads, f"down_{i}_transformer_{j}")
                skips.append(h)
            if i < last:
                pad = ((1, 1), (1, 1))
                h = Conv(width, (3, 3), 2, pad, dtype=self.dtype, name=f"down_{i}_resize")(h)
                skips.append(h)
        if self.middle_heads:
            h = resnet(h, self.widths[-1], "middle_resnet_0")
            h = transformer(h, self.middle_heads, "middle_transformer")
            h = resnet(h, self.widths[-1], "middle_resnet_1")
        for i in reversed(range(len(self.widths))):
            for j in range(self.layers + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = resnet(h, self.widths[i], f"up_{i}_resnet_{j}")
                if self.heads[i]:
                    h = transformer(h, self.heads[i], f"up_{i}_transformer_{j}")
            if i:
                h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)
                conv = Conv(self.widths[i], (3, 3), dtype=self.dtype, name=f"up_{i}_resize")
                h = conv(h)
        h = nn.silu(GroupNorm(self.groups, 1e-5, name="norm_out")(h))
        return Conv(channels * (2 if self.learned_variance else 1), (3, 3), name="conv_out")(h)
