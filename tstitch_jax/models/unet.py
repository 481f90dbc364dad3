"""The conditional U-Net of latent diffusion (Rombach et al. 2022, arXiv:2112.10752), NHWC."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tstitch_jax.models.convolution import Conv
from tstitch_jax.models.dit import time_code

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

LOGITS = 2**24
"""Attention of more logits than this goes in pieces, one after another, which bounds its memory and
keeps the logits of a piece in a TPU's fast memory."""

CACHED = 2**22
"""The same on CPUs, whose caches are smaller; and of values and gates in a gated unit."""


class Norm(nn.Module):
    """Group norm, statistics in float32 whatever the compute dtype; returns float32.

    Means are taken by channel first and by group of these, so that an image need not be laid out
    anew for groups of few channels.
    """

    groups: int
    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        batch, _, _, width = x.shape
        scale = self.param("scale", nn.initializers.ones, (width,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        x = x.astype(jnp.float32)

        def mean(values: jax.Array) -> Float[Array, "b c"]:
            by_group = values.mean(axis=(1, 2)).reshape(batch, self.groups, -1).mean(axis=2)
            return jnp.repeat(by_group, width // self.groups, axis=1)

        x = x - mean(x)[:, None, None]
        factor = jax.lax.rsqrt(mean(jnp.square(x)) + self.epsilon) * scale
        return x * factor[:, None, None] + bias


def _norm(x: jax.Array, groups: int, epsilon: float, name: str) -> jax.Array:
    return Norm(groups, epsilon, name=name)(x)


class Resnet(nn.Module):
    """Two normalised convolutions with a skip connection; the time comes in between them."""

    channels: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], time: Float[Array, "b t"]) -> jax.Array:
        h = nn.silu(_norm(x, self.groups, 1e-5, "norm1"))
        h = Conv(self.channels, (3, 3), dtype=self.dtype, name="conv1")(h)
        h = h + nn.Dense(self.channels, dtype=self.dtype, name="time")(nn.silu(time))[:, None, None]
        h = nn.silu(_norm(h, self.groups, 1e-5, "norm2"))
        h = Conv(self.channels, (3, 3), dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, dtype=self.dtype, name="shortcut")(x)
        return x + h


def _pieces(count: int, of_one: int, limit: int) -> int:
    """Into how many equal parts to divide ``count`` for one of at most ``limit``, or as may be."""
    parts = (p for p in range(1, count + 1) if count % p == 0)
    return next((p for p in parts if of_one * (count // p) <= limit), count)


def attend(
    q: Float[Array, "b h n d"], k: Float[Array, "b h m d"], v: Float[Array, "b h m d"]
) -> Float[Array, "b h n d"]:
    """``softmax(q k^T / sqrt(d)) v``, softmax in float32.

    At most ``LOGITS`` logits at a time, ``CACHED`` on CPUs: some heads, or some queries of one.
    """
    *_, queries, size = q.shape
    keys = k.shape[2]

    def piece(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        logits = jnp.einsum("hnd,hmd->hnm", q, k, preferred_element_type=jnp.float32)
        logits = logits / math.sqrt(size)
        weights = jnp.exp(logits - logits.max(-1, keepdims=True))
        h = jnp.einsum(
            "hnm,hmd->hnd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        total = weights.sum(-1, keepdims=True) if v.shape[-1] == size else h[..., size:]
        # The results are divided, being fewer than the weights.
        return (h[..., :size] / total).astype(v.dtype)

    def on_tpu(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        # A column of ones, for which its units have room, lets the product sum the weights, too;
        # that takes most of the time if it is a pass of its own.
        ones = jnp.ones((*v.shape[:-1], 1), v.dtype)
        return in_pieces(q, k, jnp.concatenate([v, ones], axis=-1), LOGITS)

    def in_pieces(q: jax.Array, k: jax.Array, v: jax.Array, limit: int) -> jax.Array:
        heads = q.shape[0] * q.shape[1]
        groups = _pieces(heads, queries * keys, limit)
        parts = _pieces(queries, heads // groups * keys, limit)

        def group(of: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            q, k, v = of
            split = q.reshape(-1, parts, queries // parts, size).swapaxes(0, 1)
            done = _each(lambda q: piece(q, k, v), split)
            return done.swapaxes(0, 1).reshape(q.shape)

        split = tuple(x.reshape(groups, heads // groups, *x.shape[2:]) for x in (q, k, v))
        return _each(group, split).reshape(q.shape)

    return jax.lax.platform_dependent(
        q, k, v,
        tpu=on_tpu,
        cpu=functools.partial(in_pieces, limit=CACHED),
        default=functools.partial(in_pieces, limit=LOGITS),
    )  # fmt: skip


def _each(function: Callable[[Any], jax.Array], parts: Any) -> jax.Array:
    """One after another; a single one without a loop."""
    if len(jax.tree.leaves(parts)[0]) == 1:
        return function(jax.tree.map(lambda x: x[0], parts))[None]
    return jax.lax.map(function, parts)


class Attention(nn.Module):
    """Attention of the tokens to a context, or to themselves."""

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], context: Float[Array, "b m d"]) -> jax.Array:
        width = x.shape[-1]

        def heads(of: jax.Array, name: str) -> jax.Array:
            h = nn.Dense(width, use_bias=False, dtype=self.dtype, name=name)(of)
            return h.reshape(*h.shape[:2], self.num_heads, -1).swapaxes(1, 2)

        h = attend(heads(x, "q"), heads(context, "k"), heads(context, "v"))
        return nn.Dense(width, dtype=self.dtype, name="out")(h.swapaxes(1, 2).reshape(x.shape))


class Weights(nn.Module):
    """The parameters of ``nn.Dense``, in the compute dtype."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Float[Array, "i o"], Float[Array, " o"]]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (inputs, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return jnp.asarray(kernel, self.dtype), jnp.asarray(bias, self.dtype)


def gated_unit(
    h: Float[Array, "b n c"],
    kernel_in: Float[Array, "c e"],
    bias_in: Float[Array, " e"],
    kernel_out: Float[Array, "d c"],
    bias_out: Float[Array, " c"],
) -> Float[Array, "b n c"]:
    """GEGLU (Shazeer 2020, arXiv:2002.05202).

    On CPUs at most ``CACHED`` values and gates at a time.
    """

    def unit(h: jax.Array, *weights: jax.Array) -> jax.Array:
        kernel_in, bias_in, kernel_out, bias_out = weights
        value, gate = jnp.split(h @ kernel_in + bias_in, 2, axis=-1)
        return (value * nn.gelu(gate, approximate=False)) @ kernel_out + bias_out

    def in_pieces(h: jax.Array, *weights: jax.Array) -> jax.Array:
        tokens = h.shape[0] * h.shape[1]
        parts = _pieces(tokens, weights[0].shape[1], CACHED)
        split = h.reshape(parts, tokens // parts, -1)
        return _each(lambda piece: unit(piece, *weights), split).reshape(h.shape)

    return jax.lax.platform_dependent(
        h, kernel_in, bias_in, kernel_out, bias_out, cpu=in_pieces, default=unit
    )


class Transformer(nn.Module):
    """All pixels attend to each other, then to the context; then a gated linear unit by pixel."""

    num_heads: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], context: Float[Array, "b m d"]) -> jax.Array:
        width = x.shape[-1]

        def norm(h: jax.Array, name: str) -> jax.Array:
            return nn.LayerNorm(1e-5, use_fast_variance=False, name=name)(h.astype(jnp.float32))

        def dense(features: int, name: str, h: jax.Array) -> jax.Array:
            return nn.Dense(features, dtype=self.dtype, name=name)(h)

        h = _norm(x, self.groups, 1e-6, "norm").reshape(x.shape[0], -1, width)
        h = dense(width, "project_in", h)
        own = norm(h, "self_norm")
        h = h + Attention(self.num_heads, self.dtype, name="self")(own, own)
        own = norm(h, "cross_norm")
        h = h + Attention(self.num_heads, self.dtype, name="cross")(own, context)
        weights = (
            *Weights(8 * width, self.dtype, name="mlp_in")(width),
            *Weights(width, self.dtype, name="mlp_out")(4 * width),
        )
        h = h + gated_unit(norm(h, "mlp_norm").astype(self.dtype), *weights)
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

        emb = nn.Dense(4 * self.widths[0], name="time_in")(time_code(time, length=self.widths[0]))
        emb = nn.Dense(4 * self.widths[0], name="time_out")(nn.silu(emb))

        def resnet(h: jax.Array, width: int, name: str) -> jax.Array:
            return Resnet(width, self.groups, self.dtype, name=name)(h, emb)

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
        h = nn.silu(_norm(h, self.groups, 1e-5, "norm_out"))
        return Conv(channels * (2 if self.learned_variance else 1), (3, 3), name="conv_out")(h)
