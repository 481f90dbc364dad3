"""A small residual network that tells classes apart, and in whose features images are compared."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tstitch_jax.models.layers import GroupNorm, Resnet
from tstitch_jax.models.types import Features


class Classifier(nn.Module):
    """Images of one size to ``Features``: as many pooled as the last level is wide, and logits.

    Takes float32 ``[B, H, W, C]`` with values from 0 to 255. No image's features depend on the
    others of its batch.

    Attributes:
        widths: Channels by level, each level at half the resolution of the one before, the first
            at half the image's.
        blocks: Residual blocks by level.
        num_classes: Number of classes.
        image_shape: ``(H, W, C)`` of the input.
        groups: Groups of each normalisation.
        dtype: Compute dtype, float32 or bfloat16. Parameters, normalisation statistics, pooled
            features and logits are float32 in either.
    """

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    num_classes: int
    image_shape: tuple[int, int, int]
    groups: int = 8
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, got {self.groups}")
        if not self.widths or min(self.widths) < 1 or any(w % self.groups for w in self.widths):
            raise ValueError(f"{self.groups} groups do not divide widths of {self.widths}")
        if len(self.blocks) != len(self.widths) or min(self.blocks) < 0:
            raise ValueError(
                f"blocks must be one number for each of {self.widths}, got {self.blocks}"
            )
        super().__post_init__()

    def inputs(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct]:
        """Shape and dtype of the input."""
        return (jax.ShapeDtypeStruct((batch, *self.image_shape), jnp.float32),)

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w c"]) -> Features:
        if pixels.shape[1:] != tuple(self.image_shape):
            raise ValueError(
                f"Classifier built for {self.image_shape}, got images of {pixels.shape[1:]}"
            )
        x = pixels / 127.5 - 1
        for i, (width, blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
            x = nn.Conv(width, (3, 3), 2, dtype=self.dtype, name=f"level_{i}_down")(x)
            for j in range(blocks):
                x = Resnet(width, self.groups, self.dtype, name=f"level_{i}_resnet_{j}")(x)
        pool = nn.silu(GroupNorm(self.groups, 1e-6, name="norm_out")(x)).mean((1, 2))
        return Features(pool, nn.Dense(self.num_classes, name="logits")(pool))
