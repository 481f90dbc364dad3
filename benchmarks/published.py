"""The published networks for the benchmarks: as shapes, or with numbers that were never trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import tstitch_jax as ts
from tstitch_jax.models import unet
from tstitch_jax.models.build import module_of
from tstitch_jax.models.measure import SIZES, param_shapes


def dit(name: str, size: int = 256) -> ts.Card:
    """The card of a published DiT, such as ``"dit-xl-2"``, for images of that size."""
    return ts.Card(
        name=name,
        architecture="dit",
        config=SIZES[name],
        target="eps",
        learned_variance=True,
        schedule={"name": "linear"},
        image_shape=(size // 8, size // 8, 4),
        num_classes=1000,
        guidance_channels=3,
    )


def text_to_image(name: str, size: int = 512) -> ts.Card:
    """The card of a U-Net of Stable Diffusion's kind, such as ``"sd-1"``, for such images."""
    return ts.Card(
        name=name,
        architecture="unet",
        config=unet.SIZES[name],
        target="eps",
        learned_variance=False,
        schedule={"name": "scaled_linear"},
        image_shape=(size // 8, size // 8, 4),
        num_classes=0,
        context=CONTEXT,
    )


CONTEXT = 77, 768
"""Tokens of a text, and their width."""

TEXT_ENCODER = ts.TextEncoderCard(
    name="sd-text-encoder",
    architecture="clip_text",
    config={"vocabulary": 49408, "width": 768, "depth": 12, "num_heads": 12, "mlp_width": 3072},
)
"""Of Stable Diffusion."""

AUTOENCODER = ts.AutoencoderCard(
    name="sd-vae",
    architecture="autoencoder",
    config={"widths": [128, 256, 512, 512], "layers": 2, "latent_channels": 4},
    image_shape=(256, 256, 3),
    scaling_factor=0.18215,
)
"""Of Stable Diffusion."""


def make(
    card: Any, dtype: Any = jnp.float32, leaf: Callable[[Any], Any] = lambda shape: shape
) -> Any:
    """What a card describes, its parameters as ``leaf`` makes them of a shape."""
    params = jax.tree.map(leaf, param_shapes(module_of(card)))
    kinds = {ts.Card: ts.make_network, ts.TextEncoderCard: ts.make_network}
    return kinds.get(type(card), ts.make_network)(card, params, dtype)
