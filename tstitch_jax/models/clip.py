"""CLIP's two transformers, of texts and of images (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Array, Float, Int

from tstitch_jax.models.layers import SelfAttention, feed_forward, layer_norm
from tstitch_jax.models.types import Features

TOKENS = 77
"""Length of a text in tokens, its start and its end among them."""

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""By colour, of the images that it was trained on, with values from 0 to 1."""

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}
"""The published networks have the second, later ones of the same layout the first."""

_normal = nn.initializers.normal(0.02)


class Block(nn.Module):
    """One transformer block, normalised before attention and MLP."""

    num_heads: int
    mlp_width: int
    activation: str
    causal: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        width = x.shape[-1]
        h = SelfAttention(self.num_heads, self.dtype, _normal, self.causal, name="qkv")(
            layer_norm(x, "norm1")
        )
        out = nn.Dense(width, dtype=self.dtype, kernel_init=_normal, name="attention_out")
        x = x + out(h)
        h = feed_forward(
            layer_norm(x, "norm2"), self.mlp_width, ACTIVATIONS[self.activation], self.dtype,
            kernel_init=_normal,
        )  # fmt: skip
        return x + h.astype(self.dtype)


def _check_size(module: Any, names: tuple[str, ...]) -> None:
    """Raises ValueError unless a transformer can have that size."""
    for name in ("width", "depth", "num_heads", "mlp_width", *names):
        if getattr(module, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(module, name)}")
    if module.width % module.num_heads:
        raise ValueError(f"{module.num_heads} heads do not divide a width of {module.width}")
    if module.activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(ACTIVATIONS)}, got {module.activation!r}"
        )


class TextTower(nn.Module):
    """Texts, as numbers of tokens, to a context for each token; no token sees those after it.

    ``apply(params, ids)`` takes int32 ``[B, T]`` and returns float32 ``[B, T, D]``, normalised.

    Attributes:
        vocabulary: How many tokens there are.
        width: D.
        depth, num_heads, mlp_width: The size.
        tokens: T.
        activation: Of ``ACTIVATIONS``.
        skip: How many of the last blocks are left out. 0: the last block's output; 1: the
            penultimate one's, as some networks of Stable Diffusion were trained ("clip skip 2").
        dtype: Compute dtype, float32 or bfloat16. Parameters, normalisation statistics, softmax
            and the output are float32 in either.
    """

    vocabulary: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    tokens: int = TOKENS
    activation: str = "quick_gelu"
    skip: int = 0
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        _check_size(self, ("vocabulary", "tokens"))
        if not 0 <= self.skip < self.depth:
            raise ValueError(f"skip must be 0 to {self.depth - 1}, got {self.skip}")
        super().__post_init__()

    def inputs(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct]:
        """Shape and dtype of the input."""
        return (jax.ShapeDtypeStruct((batch, self.tokens), jnp.int32),)

    @nn.compact
    def __call__(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        if ids.ndim != 2 or ids.shape[1] != self.tokens:
            raise ValueError(f"TextTower built for {self.tokens} tokens, got ids of {ids.shape}")
        table = nn.Embed(self.vocabulary, self.width, embedding_init=_normal, dtype=self.dtype,
                         name="table")  # fmt: skip
        places = self.param("positions", _normal, (self.tokens, self.width))
        h = found = table(ids) + jnp.asarray(places, self.dtype)
        for i in range(self.depth):
            h = Block(
                self.num_heads, self.mlp_width, self.activation, True, self.dtype,
                name=f"block_{i}",
            )(h)  # fmt: skip
            # Blocks after it keep their parameters; jit leaves their work out.
            found = h if i + 1 == self.depth - self.skip else found
        return layer_norm(found, "norm_out")


class ImageTower(nn.Module):
    """Normalised images of one size to one vector each, that of a token which sees all patches.

    ``apply(params, x)`` takes float32 ``[B, S, S, C]`` and returns float32 ``[B, D]``.

    Attributes:
        width: D.
        depth, num_heads, mlp_width, patch: The size.
        side, channels: S and C.
        activation: Of ``ACTIVATIONS``.
        dtype: As of ``TextTower``.
    """

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    patch: int
    side: int
    channels: int = 3
    activation: str = "quick_gelu"
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        _check_size(self, ("patch", "side", "channels"))
        if self.side % self.patch:
            raise ValueError(f"patch {self.patch} does not divide a side of {self.side}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "b s s c"]) -> Float[Array, "b d"]:
        batch, p, n = len(x), self.patch, self.side // self.patch
        x = x.reshape(batch, n, p, n, p, self.channels).swapaxes(2, 3)
        x = x.reshape(batch, n * n, p * p * self.channels)
        h = nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="patch_in")(x)
        whole = jnp.asarray(self.param("whole", _normal, (self.width,)), self.dtype)
        h = jnp.concatenate([jnp.broadcast_to(whole, (batch, 1, self.width)), h], axis=1)
        places = self.param("positions", _normal, (n * n + 1, self.width))
        h = layer_norm(h + jnp.asarray(places, self.dtype), "norm_in").astype(self.dtype)
        for i in range(self.depth):
            h = Block(
                self.num_heads, self.mlp_width, self.activation, False, self.dtype,
                name=f"block_{i}",
            )(h)  # fmt: skip
        return layer_norm(h[:, 0], "norm_out")


def _cubic(old: int, new: int) -> np.ndarray:
    """Weights ``[new, old]`` of a bicubic resize of one side, as Pillow has them.

    Keys' kernel (1981) with a of -1/2, wider by the factor of a reduction, so that nothing of the
    image is passed over; at the edges over what there is.
    """
    scale = old / new
    centres = (np.arange(new) + 0.5) * scale
    x = np.abs(np.arange(old) + 0.5 - centres[:, None]) / max(scale, 1.0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def prepare(pixels: Float[Array, "b h w c"], side: int) -> Float[Array, "b s s c"]:
    """Pixels from 0 to 255 as the image tower takes them.

    The shorter side becomes ``side``, by Pillow's bicubic resize, which rounds to whole values
    after each direction; of the longer one the middle is kept.
    """
    height, width = pixels.shape[1:3]
    short, long = min(height, width), max(height, width)
    other = side * long // short
    rows, columns = (side, other) if height <= width else (other, side)
    for name, old, new in (("bhwc,vw->bhvc", width, columns), ("bhwc,vh->bvwc", height, rows)):
        if old != new:
            pixels = jnp.einsum(name, pixels, _cubic(old, new), precision="highest")
            pixels = jnp.clip(jnp.floor(pixels + 0.5), 0, 255)
    top, left = (rows - side) // 2, (columns - side) // 2
    pixels = pixels[:, top : top + side, left : left + side]
    return (pixels / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)


class CLIP(nn.Module):
    """Images and texts to vectors of one space, in which those that belong together are near.

    ``apply`` with ``method="images"`` takes pixels, float32 ``[B, H, W, 3]`` with values from 0 to
    255 and of any size, with ``method="texts"`` int32 ``[B, T]``. Their vectors, those of
    images in ``Features``, are float32 ``[B, F]``, not normalised.

    Attributes:
        text, image: The arguments of ``TextTower``, and of ``ImageTower`` without its input.
        features: F.
        image_shape: ``(S, S, 3)`` that images are brought to.
        dtype: Compute dtype, float32 or bfloat16. Parameters, normalisation statistics, softmax
            and the last projections are float32 in either.
    """

    text: Mapping[str, Any]
    image: Mapping[str, Any]
    features: int
    image_shape: tuple[int, int, int]
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        height, width, channels = self.image_shape
        if height != width or channels != 3:
            raise ValueError(f"image_shape must be (S, S, 3), got {tuple(self.image_shape)}")
        if self.features < 1:
            raise ValueError(f"features must be at least 1, got {self.features}")
        for name in ("text", "image"):  # so that the module can be hashed, as others can
            object.__setattr__(self, name, FrozenDict(getattr(self, name)))
        super().__post_init__()

    def setup(self) -> None:
        self.text_tower = TextTower(**self.text, dtype=self.dtype)
        side = self.image_shape[0]
        self.image_tower = ImageTower(**self.image, side=side, dtype=self.dtype)
        self.text_out = nn.Dense(self.features, use_bias=False)
        self.image_out = nn.Dense(self.features, use_bias=False)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return self.text["vocabulary"]

    @property
    def tokens(self) -> int:
        """T."""
        return self.text.get("tokens", TOKENS)

    def inputs(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of the inputs: pixels, ids."""
        pixels = jax.ShapeDtypeStruct((batch, *self.image_shape), jnp.float32)
        return pixels, jax.ShapeDtypeStruct((batch, self.tokens), jnp.int32)

    def images(self, pixels: Float[Array, "b h w c"]) -> Features:
        """The vectors of images, as pooled features."""
        if pixels.ndim != 4 or pixels.shape[3] != 3:
            raise ValueError(f"pixels must be [B, H, W, 3], got {pixels.shape}")
        return Features(self.image_out(self.image_tower(prepare(pixels, self.image_shape[0]))))

    def texts(self, ids: Int[Array, "b t"]) -> Float[Array, "b f"]:
        """The vectors of texts, each that of its end: the first of the token with the last number,
        which has seen the whole text."""
        context = self.text_tower(ids)
        end = jnp.argmax(ids, axis=1)[:, None, None]
        return self.text_out(jnp.take_along_axis(context, end, axis=1)[:, 0])

    def __call__(
        self, pixels: Float[Array, "b h w c"], ids: Int[Array, "b t"]
    ) -> tuple[Features, Float[Array, "b f"]]:
        return self.images(pixels), self.texts(ids)
