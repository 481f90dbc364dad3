"""Layers shared by the networks: attention, norms, feed-forward, residual blocks, embeddings.

Softmax, norm statistics and embeddings of the time are float32 in every compute dtype. Functions
that create parameters, such as ``feed_forward``, add them to the module that calls them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tstitch_jax.models.convolution import Conv

LOGITS = 2**24
"""Attention with more logits than this is computed in pieces, one after another. This bounds the
memory and keeps the logits of a piece in a TPU's fast memory."""

CACHED = 2**22
"""The same limit on CPUs, whose caches are smaller; also the limit of hidden values in a
feed-forward layer on CPUs."""

LONG = 1024
"""With more keys than this, a TPU is faster if a product sums the weights of the softmax."""

_lecun = nn.initializers.lecun_normal()

product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
"""Products are float32 and cast after the bias and the nonlinearity. TPUs accumulate in float32
anyway, and CPUs multiply in bfloat16 only for a float32 result."""


def _operands(*args: Any, dtype: Any = None, inexact: bool = True) -> list[jax.Array | None]:
    x, kernel, bias = args
    return [jnp.asarray(x, dtype), jnp.asarray(kernel, dtype), jnp.asarray(bias, jnp.float32)]


Dense = functools.partial(nn.Dense, dot_general=product, promote_dtype=_operands)
"""A dense layer that multiplies in its dtype and returns float32."""


class Weights(nn.Module):
    """The parameters of ``nn.Dense``: the kernel in the compute dtype, the bias in float32."""

    features: int
    dtype: Any
    kernel_init: Any = _lecun

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Float[Array, "i o"], Float[Array, " o"]]:
        kernel = self.param("kernel", self.kernel_init, (inputs, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return jnp.asarray(kernel, self.dtype), jnp.asarray(bias, jnp.float32)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


# Embeddings


def time_code(time: Float[Array, " b"], length: int, shift: int = 0) -> Float[Array, "b f"]:
    """Sinusoidal code of the time, cosines first, with periods from 2 pi to 20,000 pi; float32.

    With a shift of 1 the last period is exactly 20,000 pi; with 0 the period after the last is.
    """
    half = length // 2
    # A time of 1000 turns the last bit of a rate into 1e-4 of an angle. Rates are rounded as the
    # published programs round them, and on the host, since not every device has an exact exp.
    exponents = np.float32(-math.log(10_000)) * np.arange(half, dtype=np.float32)
    rates = np.exp((exponents / np.float32(half - shift)).astype(np.float64)).astype(np.float32)
    angles = time.astype(jnp.float32)[:, None] * rates
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def embed(
    code: Float[Array, "b f"], features: int, name: str, kernel_init: Any = _lecun
) -> Float[Array, "b {features}"]:
    """Embedding of a code by two dense layers in float32, ``{name}_in`` and ``{name}_out``."""
    h = nn.Dense(features, kernel_init=kernel_init, name=f"{name}_in")(code)
    return nn.Dense(features, kernel_init=kernel_init, name=f"{name}_out")(nn.silu(h))


# Norms


class GroupNorm(nn.Module):
    """Group norm over pixels; statistics in float32, returns float32.

    Means are taken by channel first, then by group, so that images need no other layout in memory
    for groups of few channels.
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


def layer_norm(
    x: Float[Array, "*b d"], name: str | None = None, epsilon: float = 1e-5
) -> Float[Array, "*b d"]:
    """Layer norm; statistics in float32, returns float32. Without a name it has no parameters."""
    # A norm without parameters computes both moments in one pass: a second pass makes a block of a
    # DiT 10% slower on TPUs.
    bare = name is None
    norm = nn.LayerNorm(
        epsilon, use_bias=not bare, use_scale=not bare, use_fast_variance=bare, name=name
    )
    return norm(x.astype(jnp.float32))


def modulate(
    x: Float[Array, "b n d"],
    shift: Float[Array, "b d"],
    scale: Float[Array, "b d"],
    dtype: Any,
    epsilon: float = 1e-6,
) -> Float[Array, "b n d"]:
    """Layer norm with a shift and a scale per image."""
    shift, scale = (a.astype(jnp.float32)[:, None] for a in (shift, scale))
    return (layer_norm(x, epsilon=epsilon) * (1 + scale) + shift).astype(dtype)


# Attention


def _parts(count: int, of_one: int, limit: int) -> int:
    """The fewest equal parts of ``count`` items that keep within the limit, else ``count``."""
    parts = (p for p in range(1, count + 1) if count % p == 0)
    return next((p for p in parts if of_one * (count // p) <= limit), count)


def _each(function: Callable[[Any], jax.Array], parts: Any) -> jax.Array:
    """The function of each part, one after another; without a loop if there is one part."""
    if len(jax.tree.leaves(parts)[0]) == 1:
        return function(jax.tree.map(lambda x: x[0], parts))[None]
    return jax.lax.map(function, parts)


def _softmax_product(
    q: Float[Array, "*b n d"],
    k: Float[Array, "*b d m"],
    v: Float[Array, "*b m d"],
    mask: Any,
    form: str = "weights",
) -> Float[Array, "*b n d"]:
    """One piece of ``attend``. The form says what is divided by the sums of the softmax.

    ``"weights"``: the weights, before the product with v. ``"results"``: the results, which are
    fewer. ``"column"``: the results, by sums that a column of ones in v adds to the product.
    """
    logits = _matmul(q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    if form == "weights":
        return _matmul(nn.softmax(logits).astype(v.dtype), v).astype(v.dtype)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    if form == "results":
        sums = weights.sum(-1, keepdims=True)
        return (_matmul(weights.astype(v.dtype), v) / sums).astype(v.dtype)
    ones = jnp.ones((*v.shape[:-1], 1), v.dtype)
    h = _matmul(weights.astype(v.dtype), jnp.concatenate([v, ones], axis=-1))
    return (h[..., :-1] / h[..., -1:]).astype(v.dtype)


def attend(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    causal: bool = False,
) -> Float[Array, "b n h d"]:
    """``softmax(q k^T / sqrt(d)) v`` by head; softmax in float32, products in the inputs' dtype.

    At most ``LOGITS`` logits are computed at a time, ``CACHED`` on CPUs: those of some heads, or of
    some queries of one head. If ``causal``, query i sees the keys 0 to i.
    """
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    mask = np.tri(queries, keys, dtype=bool) if causal else None

    def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, v = (x.swapaxes(1, 2) for x in (q, v))
        return _softmax_product(q, k.transpose(0, 2, 3, 1), v, mask).swapaxes(1, 2)

    # CPUs multiply in bfloat16 only matrices as they are written, with one batch axis.
    def in_pieces(q: jax.Array, k: jax.Array, v: jax.Array, limit: int, form: str) -> jax.Array:
        groups = _parts(batch * heads, queries * keys, limit)
        parts = _parts(queries, batch * heads // groups * keys, limit)
        q, v = (x.swapaxes(1, 2).reshape(groups, -1, x.shape[1], width) for x in (q, v))
        k = k.transpose(0, 2, 3, 1).reshape(groups, -1, width, keys)
        masks = None if mask is None else mask.reshape(parts, -1, keys)

        def group(of: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            q, k, v = of
            split = q.reshape(-1, parts, queries // parts, width).swapaxes(0, 1)
            done = _each(lambda p: _softmax_product(p[0], k, v, p[1], form), (split, masks))
            return done.swapaxes(0, 1).reshape(q.shape)

        h = _each(group, (q, k, v)).reshape(batch, heads, queries, width)
        return h.swapaxes(1, 2)

    # A single piece keeps batch and heads apart, over which a mesh may spread them.
    fits = batch * heads * queries * keys <= LOGITS
    form = functools.partial(in_pieces, limit=LOGITS, form="weights")
    tpu = functools.partial(in_pieces, limit=LOGITS, form="column") if keys > LONG else form
    return jax.lax.platform_dependent(
        q, k, v,
        tpu=whole if fits and keys <= LONG else tpu,
        cpu=functools.partial(in_pieces, limit=CACHED, form="results"),
        default=whole if fits else form,
    )  # fmt: skip


def project_and_attend(
    x: Float[Array, "b n c"],
    context: Float[Array, "b m d"],
    num_heads: int,
    dtype: Any,
    use_bias: bool = False,
) -> Float[Array, "b n c"]:
    """Attention of tokens to a context, with its projections ``q``, ``k``, ``v`` and ``out``."""
    width = x.shape[-1]

    def heads(of: jax.Array, name: str) -> Float[Array, "b n h d"]:
        h = nn.Dense(width, use_bias=use_bias, dtype=dtype, name=name)(of)
        return h.reshape(*h.shape[:2], num_heads, -1)

    h = attend(heads(x, "q"), heads(context, "k"), heads(context, "v"))
    return nn.Dense(width, dtype=dtype, name="out")(h.reshape(x.shape))


class SelfAttention(nn.Module):
    """Self-attention without its output projection; its kernel and bias are those of q, k and v."""

    num_heads: int
    dtype: Any
    kernel_init: Any
    causal: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        width = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (width, 3 * width))
        bias = self.param("bias", nn.initializers.zeros, (3 * width,))
        kernel, bias = jnp.asarray(kernel, self.dtype), jnp.asarray(bias, jnp.float32)

        def heads(h: jax.Array, count: int) -> Float[Array, "b n h d"]:
            return h.astype(self.dtype).reshape(*h.shape[:2], count, -1)

        def at_once(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
            qkv = jnp.split(_matmul(x, kernel) + bias, 3, axis=-1)
            q, k, v = (heads(h, self.num_heads) for h in qkv)
            return attend(q, k, v, self.causal).reshape(x.shape)

        # TPUs read a part of the kernel where it lies, but would copy parts of a product. So each
        # group of heads has products of its own, with features before tokens, where heads whose
        # width is no multiple of 128 need no padding.
        def on_tpu(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
            groups = _parts(self.num_heads, x.shape[0] * x.shape[1] ** 2, LOGITS)
            count = self.num_heads // groups

            def project(kernel: jax.Array, bias: jax.Array) -> Float[Array, "b n h d"]:
                h = jnp.einsum("bnd,df->bfn", x, kernel, preferred_element_type=jnp.float32)
                h = (h + bias[:, None]).astype(self.dtype)
                return h.reshape(len(x), count, -1, x.shape[1]).transpose(0, 3, 1, 2)

            parts = jnp.split(kernel, 3 * groups, axis=1), jnp.split(bias, 3 * groups)
            qkv = [project(*part) for part in zip(*parts, strict=True)]
            results = [attend(*qkv[g::groups], causal=self.causal) for g in range(groups)]
            features = [h.transpose(0, 2, 3, 1).reshape(len(x), -1, x.shape[1]) for h in results]
            return jnp.concatenate(features, axis=1).swapaxes(1, 2)

        return jax.lax.platform_dependent(
            x.astype(self.dtype), kernel, bias, tpu=on_tpu, default=at_once
        )


# Feed-forward layers and residual blocks


def feed_forward(
    x: Float[Array, "b n c"],
    hidden: int,
    activation: Callable[[jax.Array], jax.Array],
    dtype: Any,
    *,
    gated: bool = False,
    kernel_init: Any = _lecun,
) -> Float[Array, "b n c"]:
    """Two dense layers, ``mlp_in`` and ``mlp_out``, with an activation between; returns float32.

    A gated one (GEGLU: Shazeer 2020, arXiv:2002.05202) has as many gates as hidden values: the
    second half of the first layer's results, whose activations multiply the first half. On CPUs at
    most ``CACHED`` results of the first layer are computed at a time.
    """
    width, results = x.shape[-1], hidden * (2 if gated else 1)
    weights = (
        *Weights(results, dtype, kernel_init, name="mlp_in")(width),
        *Weights(width, dtype, kernel_init, name="mlp_out")(hidden),
    )

    def whole(x: jax.Array, *weights: jax.Array) -> jax.Array:
        kernel_in, bias_in, kernel_out, bias_out = weights
        h = _matmul(x, kernel_in) + bias_in
        value, gate = jnp.split(h, 2, axis=-1) if gated else (1, h)
        h = value * activation(gate)
        return _matmul(h.astype(dtype), kernel_out) + bias_out

    def in_pieces(x: jax.Array, *weights: jax.Array) -> jax.Array:
        tokens = x.shape[0] * x.shape[1]
        parts = _parts(tokens, results, CACHED)
        split = x.reshape(parts, tokens // parts, -1)
        return _each(lambda piece: whole(piece, *weights), split).reshape(x.shape)

    return jax.lax.platform_dependent(x.astype(dtype), *weights, cpu=in_pieces, default=whole)


class Resnet(nn.Module):
    """Two normalized convolutions with a skip connection and an optional embedding of the time."""

    channels: int
    groups: int
    dtype: Any
    epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b h w d"]:
        h = nn.silu(GroupNorm(self.groups, self.epsilon, name="norm1")(x))
        h = Conv(self.channels, (3, 3), dtype=self.dtype, name="conv1")(h)
        if time is not None:
            shift = nn.Dense(self.channels, dtype=self.dtype, name="time")(nn.silu(time))
            h = h + shift[:, None, None]
        h = nn.silu(GroupNorm(self.groups, self.epsilon, name="norm2")(h))
        h = Conv(self.channels, (3, 3), dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, dtype=self.dtype, name="shortcut")(x)
        return x + h
