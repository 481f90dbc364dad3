"""The Diffusion Transformer with adaLN-Zero (Peebles & Xie 2022, arXiv:2212.09748)."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

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

_xavier = nn.initializers.xavier_uniform()
_normal = nn.initializers.normal(0.02)
_zeros = nn.initializers.zeros


def time_code(time: Float[Array, " b"]) -> Float[Array, "b f"]:
    """Sinusoidal code of the time, cosines first, with periods from 2 pi to 20,000 pi; float32."""
    half = FREQUENCIES // 2
    rates = jnp.exp(-math.log(10_000) / half * jnp.arange(half, dtype=jnp.float32))
    angles = time.astype(jnp.float32)[:, None] * rates
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


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


def modulate(
    x: Float[Array, "b n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"], dtype: Any
) -> Float[Array, "b n d"]:
    """Layer norm (statistics in float32) with a shift and scale per image."""
    x, shift, scale = (a.astype(jnp.float32) for a in (x, shift[:, None], scale[:, None]))
    x = nn.LayerNorm(1e-6, use_bias=False, use_scale=False)(x)
    return (x * (1 + scale) + shift).astype(dtype)


class Block(nn.Module):
    """One transformer block with adaLN-Zero conditioning."""

    num_heads: int
    mlp_ratio: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], c: Float[Array, "b d"]) -> Float[Array, "b n d"]:
        width = x.shape[-1]

        def dense(features, name, init=_xavier):
            return nn.Dense(features, dtype=self.dtype, kernel_init=init, name=name)

        ada = dense(6 * width, "modulation", _zeros)(nn.silu(c))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(ada, 6, axis=-1)

        h = modulate(x, shift1, scale1, self.dtype)
        qkv = dense(3 * width, "qkv")(h)
        q, k, v = jnp.moveaxis(
            qkv.reshape(*h.shape[:2], 3, self.num_heads, width // self.num_heads), 2, 0
        )
        # Its logits and softmax are float32 whatever the inputs' dtype.
        h = jax.nn.dot_product_attention(q, k, v).reshape(h.shape)
        x = x + gate1[:, None] * dense(width, "attention_out")(h)

        h = modulate(x, shift2, scale2, self.dtype)
        h = nn.gelu(dense(round(self.mlp_ratio * width), "mlp_in")(h), approximate=True)
        return x + gate2[:, None] * dense(width, "mlp_out")(h)


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
        super().__post_init__()

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
        h = nn.Dense(self.width, dtype=self.dtype, kernel_init=_xavier, name="patch_in")(h)
        h = h + position_code(rows, columns, self.width).astype(self.dtype)

        c = nn.Dense(self.width, kernel_init=_normal, name="time_in")(time_code(time))
        c = nn.Dense(self.width, kernel_init=_normal, name="time_out")(nn.silu(c))
        # The published programs keep this table in float32 too.
        c = c + nn.Embed(self.num_classes + 1, self.width, embedding_init=_normal, name="labels")(
            labels
        )
        for i in range(self.depth):
            h = Block(self.num_heads, self.mlp_ratio, self.dtype, name=f"block_{i}")(h, c)

        ada = nn.Dense(2 * self.width, kernel_init=_zeros, name="modulation")(nn.silu(c))
        shift, scale = jnp.split(ada, 2, axis=-1)
        h = modulate(h, shift, scale, jnp.float32)
        out = channels * (2 if self.learned_variance else 1)
        h = nn.Dense(p * p * out, kernel_init=_zeros, name="patch_out")(h)
        h = h.reshape(batch, rows, columns, p, p, out).swapaxes(2, 3)
        return h.reshape(batch, height, width, out)


def macs(module: DiT) -> int:
    """Multiply-adds of one forward pass of one image (what the paper counts as flops)."""
    height, width, channels = module.image_shape
    d, tokens = module.width, (height // module.patch) * (width // module.patch)
    out = channels * (2 if module.learned_variance else 1)
    block = tokens * d * d * (4 + 2 * module.mlp_ratio) + 2 * tokens**2 * d + 6 * d * d
    ends = tokens * module.patch**2 * d * (channels + out) + d * (FREQUENCIES + 3 * d)
    return round(module.depth * block + ends)
