"""CLIP score: how well images fit the texts that they were made of."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float64

from tstitch_jax.evaluation.features import UNIT
from tstitch_jax.models.types import FeatureModel, FeatureNetwork


class Score(NamedTuple):
    """
    Attributes:
        mean: The score.
        error: Standard error of the mean over the images; 0 of a single one.
    """

    mean: float
    error: float


def _unit(vectors: ArrayLike) -> Float64[np.ndarray, "n d"]:
    wide = np.asarray(vectors, np.float64)
    # The network's norms make no zero vector of an image or a text; if one did, its score is 0.
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), np.finfo(np.float64).tiny)


class ClipScore:
    r"""Mean of :math:`100 \max(\cos(v, c), 0)` over the images, of their vectors and their texts'.

    Hessel et al. 2021 (arXiv:2104.08718), equation 1, with 100 in place of their 2.5, as it is
    mostly reported. (torchmetrics cuts the mean at 0 and not each cosine, which is the same where
    none is negative, and loses the end of texts that are too long.) In float64; the same to the
    bit however the images are cut into pieces.

    >>> score = ClipScore(np.array([[1.0, 0.0], [0.0, 2.0]]))
    >>> score.add(np.array([[3.0, 0.0], [0.0, -1.0]]))
    >>> score.result().mean
    50.0
    """

    def __init__(self, texts: ArrayLike) -> None:
        """
        Args:
            texts: ``[N, D]``, the vector of each image's text, in the images' order.
        """
        self._texts = _unit(texts)
        self._scores: list[np.ndarray] = []
        self._count = 0

    def add(self, images: ArrayLike) -> None:
        """Adds the vectors ``[B, D]`` of the next images.

        Raises:
            ValueError: If there are more images than texts.
        """
        images = _unit(images)
        if self._count + len(images) > len(self._texts):
            raise ValueError(
                f"{self._count + len(images)} images for {len(self._texts)} texts; give one an "
                "image"
            )
        texts = self._texts[self._count : self._count + len(images)]
        self._scores.append(100 * np.maximum((images * texts).sum(axis=1), 0))
        self._count += len(images)

    def result(self) -> Score:
        """The score of all images added; there must be one."""
        scores = np.concatenate(self._scores)
        error = scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
        return Score(float(scores.mean()), float(error))


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file, one for each image.

    Raises:
        ValueError: If it cannot be read, is no UTF-8 or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read the prompts in {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompts in {path} are no UTF-8: {error}") from None
    # Not splitlines, for which there are more ends of lines than that.
    lines = text.removeprefix("\ufeff").removesuffix("\n").split("\n")
    if lines == [""]:
        raise ValueError(f"{path} has no prompts; write one on each line, in the images' order")
    return [line.removesuffix("\r") for line in lines]


@jax.jit
def _embed(model: FeatureModel, ids: jax.Array) -> jax.Array:
    # Full float32, also where a device has faster products.
    with jax.default_matmul_precision("highest"):
        return model.embed(ids)


def embed_texts(network: FeatureNetwork, texts: Sequence[str]) -> tuple[np.ndarray, int]:
    """The vectors of texts, float32 ``[N, D]``, and how many texts were cut as too long.

    The values do not depend on what other texts there are.

    Raises:
        ValueError: If the network knows no texts, or one is no UTF-8.
    """
    if network.tokenizer is None:
        raise ValueError(f"{network.card.name} knows no texts")
    places = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = network.tokenizer.encode(list(places))
    found = []
    for start in range(0, len(ids), UNIT):  # always so many, since other programs round otherwise
        piece = ids[start : start + UNIT]
        filled = np.concatenate([piece, np.repeat(piece[-1:], UNIT - len(piece), axis=0)])
        found.append(np.asarray(_embed(network.model, filled))[: len(piece)])
    vectors = np.concatenate(found)
    return vectors[[places[text] for text in texts]], len(caught)
