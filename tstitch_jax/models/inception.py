"""The Inception network of the Frechet inception distance (Heusel et al. 2017, arXiv:1706.08500).

InceptionV3 (Szegedy et al. 2016, arXiv:1512.00567) as the graph of 2015-12-05 has it, with which
the published distances were measured. It differs from later ones: it resizes without half-pixel
centres, average pools do not count the padding, the last block has a maximum pool, and there are
1008 classes.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tstitch_jax.models.convolution import convolve
from tstitch_jax.models.types import Features

SIDE = 299
"""Height and width that images are resized to."""

SPATIAL = 7
"""Channels of block 6d that are the spatial features (Nash et al. 2021, arXiv:2103.03841)."""


def resize(pixels: Float[Array, "b h w c"], height: int, width: int) -> Float[Array, "b k l c"]:
    """Bilinear, as TensorFlow 1 does it: corners at corners on one side only, no antialiasing.

    Row i of the output lies at ``i * h / height`` of the input, whose last row goes on beyond it.
    """
    for axis, size in ((1, height), (2, width)):
        old = pixels.shape[axis]
        if old == size:
            continue
        place = np.arange(size, dtype=np.float32) * (np.float32(old) / np.float32(size))
        low = place.astype(np.int32)
        share = (place - low).astype(np.float32)
        share = share.reshape(-1, *(1,) * (3 - axis))
        first = jnp.take(pixels, low, axis=axis)
        second = jnp.take(pixels, np.minimum(low + 1, old - 1), axis=axis)
        pixels = first + (second - first) * share
    return pixels


def average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The mean over 3x3, at the edge over as many as there are."""
    for axis in (1, 2):
        size = x.shape[axis]
        around = [(1, 1) if i == axis else (0, 0) for i in range(4)]
        padded = jnp.pad(x, around)
        before, here, after = (
            jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(3)
        )
        x = before + here + after
    count = [
        np.minimum(np.arange(n) + 2, n) - np.maximum(np.arange(n) - 1, 0) for n in x.shape[1:3]
    ]
    return x / np.multiply.outer(*count)[:, :, None].astype(x.dtype)


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b k l c"]:
    return nn.max_pool(x, (3, 3), (2, 2))


class Normed(nn.Module):
    """Kernel and bias of a convolution with the batch norm after it, whose statistics are fixed."""

    features: int
    size: tuple[int, int]

    @nn.compact
    def __call__(
        self, channels: int
    ) -> tuple[Float[Array, "i j {channels} d"], Float[Array, " d"]]:
        shape = (*self.size, channels, self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        scale, bias, mean, variance = (
            self.param(name, start, (self.features,))
            for name, start in (("scale", ones), ("bias", zeros), ("mean", zeros), ("var", ones))
        )
        factor = scale * jax.lax.rsqrt(variance + 1e-3)
        return kernel * factor, bias - mean * factor


class Block(nn.Module):
    """What the blocks share: convolutions by name, each with its norm and a ReLU."""

    dtype: Any

    def conv(
        self, name: str, x: jax.Array, features: int, size: tuple[int, int],
        stride: int = 1, padding: str = "SAME",
    ) -> jax.Array:  # fmt: skip
        kernel, bias = Normed(features, size, name=name)(x.shape[-1])
        y = convolve(x.astype(self.dtype), kernel.astype(self.dtype), stride, padding)
        return nn.relu(y + bias.astype(self.dtype))

    def heads(self, x: jax.Array, *, pool: int = 0, **features: int) -> list[jax.Array]:
        """The 1x1 convolutions that a block begins with, by name, as one product.

        With ``pool`` there is another, ``branch_pool``, of so many features, on the average of its
        neighbours; the product comes first, as it makes the pooled array the smaller one.
        """
        if pool:
            features["branch_pool"] = pool
        parts = [Normed(n, (1, 1), name=name)(x.shape[-1]) for name, n in features.items()]
        kernel = jnp.concatenate([kernel[0, 0] for kernel, _ in parts], axis=-1)
        whole = x.astype(self.dtype) @ kernel.astype(self.dtype)
        split = jnp.split(whole, np.cumsum(list(features.values()))[:-1].tolist(), axis=-1)
        if pool:
            split[-1] = average_pool(split[-1])
        return [nn.relu(y + b.astype(self.dtype)) for y, (_, b) in zip(split, parts, strict=True)]


class MixedA(Block):
    """Blocks 5b, 5c and 5d, at 35x35."""

    pool: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        a, b, c, d = self.heads(x, branch1x1=64, branch5x5_1=48, branch3x3dbl_1=64, pool=self.pool)
        b = self.conv("branch5x5_2", b, 64, (5, 5))
        c = self.conv("branch3x3dbl_2", c, 96, (3, 3))
        c = self.conv("branch3x3dbl_3", c, 96, (3, 3))
        return jnp.concatenate([a, b, c, d], axis=-1)


class MixedB(Block):
    """Block 6a, from 35x35 to 17x17."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b k l d"]:
        a = self.conv("branch3x3", x, 384, (3, 3), 2, "VALID")
        (b,) = self.heads(x, branch3x3dbl_1=64)
        b = self.conv("branch3x3dbl_2", b, 96, (3, 3))
        b = self.conv("branch3x3dbl_3", b, 96, (3, 3), 2, "VALID")
        return jnp.concatenate([a, b, max_pool(x)], axis=-1)


class MixedC(Block):
    """Blocks 6b to 6e, at 17x17; ``width`` is that of the inner layers."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        n = self.width
        a, b, c, d = self.heads(x, branch1x1=192, branch7x7_1=n, branch7x7dbl_1=n, pool=192)
        b = self.conv("branch7x7_2", b, n, (1, 7))
        b = self.conv("branch7x7_3", b, 192, (7, 1))
        for i, features, size in ((2, n, (7, 1)), (3, n, (1, 7)), (4, n, (7, 1)), (5, 192, (1, 7))):
            c = self.conv(f"branch7x7dbl_{i}", c, features, size)
        return jnp.concatenate([a, b, c, d], axis=-1)


class MixedD(Block):
    """Block 7a, from 17x17 to 8x8."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b k l d"]:
        a, b = self.heads(x, branch3x3_1=192, branch7x7x3_1=192)
        a = self.conv("branch3x3_2", a, 320, (3, 3), 2, "VALID")
        b = self.conv("branch7x7x3_2", b, 192, (1, 7))
        b = self.conv("branch7x7x3_3", b, 192, (7, 1))
        b = self.conv("branch7x7x3_4", b, 192, (3, 3), 2, "VALID")
        return jnp.concatenate([a, b, max_pool(x)], axis=-1)


class MixedE(Block):
    """Blocks 7b and 7c, at 8x8; the latter, the last one, pools by the maximum."""

    last: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        features = dict(branch1x1=320, branch3x3_1=384, branch3x3dbl_1=448)
        if self.last:
            a, b, c = self.heads(x, **features)
            pooled = nn.max_pool(x, (3, 3), (1, 1), "SAME")
            d = self.conv("branch_pool", pooled, 192, (1, 1))
        else:
            a, b, c, d = self.heads(x, **features, pool=192)
        b = [self.conv(f"branch3x3_2{i}", b, 384, size) for i, size in _WIDE_AND_HIGH]
        c = self.conv("branch3x3dbl_2", c, 384, (3, 3))
        c = [self.conv(f"branch3x3dbl_3{i}", c, 384, size) for i, size in _WIDE_AND_HIGH]
        return jnp.concatenate([a, *b, *c, d], axis=-1)


_WIDE_AND_HIGH = (("a", (1, 3)), ("b", (3, 1)))


class Stem(Block):
    """The layers before the blocks, from 299x299 to 35x35."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b k l d"]:
        x = self.conv("1a", x, 32, (3, 3), 2, "VALID")
        x = self.conv("2a", x, 32, (3, 3), 1, "VALID")
        x = self.conv("2b", x, 64, (3, 3))
        x = self.conv("3b", max_pool(x), 80, (1, 1))
        x = self.conv("4a", x, 192, (3, 3), 1, "VALID")
        return max_pool(x)


class Inception(nn.Module):
    """Images of any size to ``Features``: 2048 pooled, 7 x 17 x 17 spatial, and logits.

    Takes float32 ``[B, H, W, 3]`` with values from 0 to 255. The logits have no bias, as the
    Inception Score is published with.

    Attributes:
        num_classes: 1008 in the published network.
        image_shape: ``(H, W, 3)`` of the images it was trained on.
        dtype: Compute dtype, float32 or bfloat16. Parameters, pooled features and logits are
            float32 in either.
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    dtype: Any = jnp.float32

    def inputs(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct]:
        """Shape and dtype of the input."""
        return (jax.ShapeDtypeStruct((batch, *self.image_shape), jnp.float32),)

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w c"]) -> Features:
        if pixels.ndim != 4 or pixels.shape[3] != 3:
            raise ValueError(f"pixels must be [B, H, W, 3], got {pixels.shape}")
        x = (resize(pixels, SIDE, SIDE) - 128) / 128
        x = Stem(self.dtype, name="stem")(x)
        for name, pool in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = MixedA(self.dtype, pool, name=f"mixed_{name}")(x)
        x = MixedB(self.dtype, name="mixed_6a")(x)
        spatial = x
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x = MixedC(self.dtype, width, name=f"mixed_{name}")(x)
            spatial = x[..., :SPATIAL] if name == "6d" else spatial
        x = MixedD(self.dtype, name="mixed_7a")(x)
        for name in ("7b", "7c"):
            x = MixedE(self.dtype, name == "7c", name=f"mixed_{name}")(x)
        pool = x.astype(jnp.float32).mean((1, 2))
        shape = (pool.shape[-1], self.num_classes)
        kernel = self.param("logits", nn.initializers.lecun_normal(), shape)
        batch = len(pixels)
        return Features(pool, pool @ kernel, spatial.reshape(batch, -1).astype(jnp.float32))
