"""The Diffusion Transformer with adaLN-Zero (Peebles & Xie 2022, arXiv:2212.09748)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tstitch_jax.models.layers import (
    LOGITS,
    Dense,
    SelfAttention,
    embed,
    feed_forward,
    modulate,
    time_code,
)

SIZES = {
    "s": dict(width=384, depth=12, num_heads=6),
    "b": dict(width=768, depth=12, num_heads=12),
    "l": dict(width=1024, depth=24, num_heads=16),
    "xl": dict(width=1152, depth=28, num_heads=16),
}
"""Table 1 of the paper; each with a patch of 2, 4 or 8."""

PATCHES = (2, 4, 8)

FREQUENCIES = 256
"""Length of the sinusoidal code of the time, before its MLP."""

VARIANTS = ("dit", "sit", "diffusers")
"""What of the published programs the parameters do not show; see ``DiT.variant``."""

TOKENS_BY_WIDTH = 4096 * 1152
"""Activations of a layer above which a batch is better sampled from in pieces, for the same sake;
see ``DiT.rows``."""

_xavier = nn.initializers.xavier_uniform()
_normal = nn.initializers.normal(0.02)
_zeros = nn.initializers.zeros


def position_code(height: int, width: int, channels: int) -> np.ndarray:
    """Fixed 2-D sin-cos code of a grid of patches, float32 ``[height * width, channels]``.

    The first half of the channels codes the column, the second half the row; within a half, sines
    come first.

    Raises:
        ValueError: If ``channels`` is not a multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"position code needs a width that is a multiple of 4, got {channels}")
    quarter = channels // 4
    rates = 10_000.0 ** (-np.arange(quarter) / quarter)
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    angles = np.stack([columns.ravel(), rows.ravel()], axis=1)[:, :, None] * rates
    code = np.concatenate([np.sin(angles), np.cos(angles)], axis=2)
    return code.reshape(height * width, channels).astype(np.float32)


class Block(nn.Module):
    """One transformer block with adaLN-Zero conditioning."""

    num_heads: int
    mlp_ratio: float
    dtype: Any
    mlp_epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], c: Float[Array, "b d"]) -> Float[Array, "b n d"]:
        width = x.shape[-1]

        def dense(features, name, init=_xavier):
            return Dense(features, dtype=self.dtype, kernel_init=init, name=name)

        def add(x: jax.Array, gate: jax.Array, h: jax.Array) -> jax.Array:
            return (x.astype(jnp.float32) + gate[:, None] * h).astype(self.dtype)

        ada = dense(6 * width, "modulation", _zeros)(nn.silu(c))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(ada, 6, axis=-1)

        h = modulate(x, shift1, scale1, self.dtype)
        h = SelfAttention(self.num_heads, self.dtype, _xavier, name="qkv")(h)
        x = add(x, gate1, dense(width, "attention_out")(h))

        h = modulate(x, shift2, scale2, self.dtype, self.mlp_epsilon)
        hidden = round(self.mlp_ratio * width)
        return add(x, gate2, feed_forward(h, hidden, nn.gelu, self.dtype, kernel_init=_xavier))


class DiT(nn.Module):
    """A class-conditional Diffusion Transformer on NHWC images or latents.

    ``apply(params, x, time, labels)`` takes float32 ``[B, H, W, C]``, times ``[B]`` and int32
    labels ``[B]`` (``num_classes`` is the null class) and returns the raw output, float32
    ``[B, H, W, out]`` with ``out = 2 C`` where the variance is learned, else ``C``.

    Attributes:
        width, depth, num_heads, patch: The size; see ``SIZES``.
        image_shape: ``(H, W, C)`` of the input.
        num_classes: Number of classes without the null class.
        learned_variance: Whether the second half of the output channels codes the variance.
        mlp_ratio: Width of the MLP over ``width``.
        variant: ``"dit"``, as published. ``"sit"`` (Ma et al. 2024, arXiv:2401.08740): the code of
            ``1 - time``, since its time runs from noise to data. ``"diffusers"``, as that library
            trains it: each block embeds time and label by itself (the last layer takes the first
            block's), the time's code has a shift of 1, and the MLP's norm an epsilon of 1e-5.
        dtype: Compute dtype, float32 or bfloat16. Parameters, time embedding, normalisation
            statistics, softmax and the last projection are float32 in either.
    """

    width: int
    depth: int
    num_heads: int
    patch: int
    image_shape: tuple[int, int, int]
    num_classes: int
    learned_variance: bool = True
    mlp_ratio: float = 4.0
    variant: str = "dit"
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for name in ("width", "depth", "num_heads", "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        height, width, _ = self.image_shape
        if height % self.patch or width % self.patch:
            raise ValueError(f"patch {self.patch} does not divide images of {height}x{width}")
        if self.width % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide a width of {self.width}")
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {VARIANTS}, got {self.variant!r}")
        super().__post_init__()

    def inputs(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of the inputs: images, times, labels."""
        shapes = ((batch, *self.image_shape), (batch,), (batch,))
        dtypes = (jnp.float32, jnp.float32, jnp.int32)
        return tuple(map(jax.ShapeDtypeStruct, shapes, dtypes))

    @property
    def rows(self) -> int:
        """How many rows are best sampled at a time; a larger batch leaves a TPU's fast memory."""
        height, width, _ = self.image_shape
        tokens = height * width // self.patch**2
        by_logits = 2 * LOGITS // (self.num_heads * tokens**2)
        return max(1, min(TOKENS_BY_WIDTH // (tokens * self.width), by_logits))

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, " b"], labels: Int[Array, " b"]
    ) -> Float[Array, "b h w o"]:
        batch, height, width, channels = x.shape
        if (height, width, channels) != tuple(self.image_shape):
            raise ValueError(f"DiT built for {self.image_shape}, got images of {x.shape[1:]}")
        p, rows, columns = self.patch, height // self.patch, width // self.patch

        h = x.reshape(batch, rows, p, columns, p, channels).swapaxes(2, 3)
        h = h.reshape(batch, rows * columns, p * p * channels)
        h = Dense(self.width, dtype=self.dtype, kernel_init=_xavier, name="patch_in")(h)
        h = (h + position_code(rows, columns, self.width)).astype(self.dtype)

        foreign = self.variant == "diffusers"
        code = time_code(1 - time if self.variant == "sit" else time, FREQUENCIES, int(foreign))

        def condition(prefix: str) -> jax.Array:
            c = embed(code, self.width, f"{prefix}time", _normal)
            # The published programs keep this table in float32 too.
            return c + nn.Embed(
                self.num_classes + 1, self.width, embedding_init=_normal, name=f"{prefix}labels"
            )(labels)

        size = (self.num_heads, self.mlp_ratio, self.dtype, 1e-5 if foreign else 1e-6)
        cs = [condition(f"block_{i}_") for i in range(self.depth)] if foreign else [condition("")]
        c = cs[0]
        for i in range(self.depth):
            h = Block(*size, name=f"block_{i}")(h, cs[i] if foreign else c)

        ada = nn.Dense(2 * self.width, kernel_init=_zeros, name="modulation")(nn.silu(c))
        shift, scale = jnp.split(ada, 2, axis=-1)
        h = modulate(h, shift, scale, jnp.float32)
        out = channels * (2 if self.learned_variance else 1)
        h = nn.Dense(p * p * out, kernel_init=_zeros, name="patch_out")(h)
        h = h.reshape(batch, rows, columns, p, p, out).swapaxes(2, 3)
        return h.reshape(batch, height, width, out)
