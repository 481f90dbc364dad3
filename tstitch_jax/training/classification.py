"""What a classifier is trained and judged by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from tstitch_jax.core.types import Key
from tstitch_jax.models.types import FeatureNetwork
from tstitch_jax.training.data import Images

CHUNK = 500
"""Images that are classified at a time."""


def augment(
    key: Key, images: Float[Array, "b h w c"], shift: int, flip: float
) -> Float[Array, "b h w c"]:
    """Moves each image by up to ``shift`` pixels, and mirrors it with probability ``flip``.

    Images are in [-1, 1]; what comes in at an edge is black.
    """
    shift_key, flip_key = jax.random.split(key)
    batch, *shape = images.shape
    around = [(0, 0), (shift, shift), (shift, shift), (0, 0)]
    padded = jnp.pad(images, around, constant_values=-1)
    corners = jax.random.randint(shift_key, (batch, 2), 0, 2 * shift + 1)
    corners = jnp.pad(corners, ((0, 0), (0, 1)))
    moved = jax.vmap(lambda x, corner: jax.lax.dynamic_slice(x, corner, shape))(padded, corners)
    mirrored = jax.random.bernoulli(flip_key, flip, (batch, 1, 1, 1))
    return jnp.where(mirrored, moved[:, :, ::-1], moved)


def make_classifier_loss(
    apply: Callable[..., Any], *, shift: int, flip: float, label_smoothing: float
) -> Callable[[Any, Key, Float[Array, "b h w c"], Int[Array, " b"]], Float[Array, ""]]:
    """The training loss ``(params, key, images, labels) -> scalar``, images in [-1, 1].

    Mean cross entropy of augmented images (see ``augment``) to ``1 - label_smoothing`` of their
    label and ``label_smoothing`` of all classes alike.
    """

    def loss(
        params: Any, key: Key, images: Float[Array, "b h w c"], labels: Int[Array, " b"]
    ) -> Float[Array, ""]:
        pixels = 127.5 * (augment(key, images, shift, flip) + 1)
        logits = apply(params, pixels).logits
        wanted = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[1]), label_smoothing)
        return optax.softmax_cross_entropy(logits, wanted).mean()

    return loss


def accuracy(network: FeatureNetwork, images: Images) -> float:
    """The share of images whose likeliest class is their label."""
    extract = jax.jit(lambda model, pixels: model(pixels).logits)
    right = 0
    for start in range(0, len(images), CHUNK):
        x, y = images.read(list(range(start, min(start + CHUNK, len(images)))))
        logits = np.asarray(extract(network.model, jnp.asarray(x)))
        right += int((logits.argmax(1) == y).sum())
    return right / len(images)
