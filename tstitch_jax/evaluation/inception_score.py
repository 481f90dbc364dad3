"""Inception Score, of logits that are given piece by piece (Salimans et al. 2016)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float64

from tstitch_jax.evaluation.statistics import Blocks

SPLIT = 5000
"""Images of a split, as in the evaluation of Dhariwal & Nichol 2021."""


class Score(NamedTuple):
    """
    Attributes:
        mean: The score, the mean over the splits.
        deviation: Standard deviation over the splits; 0 of a single one.
    """

    mean: float
    deviation: float


def _split_score(logits: Float64[np.ndarray, "n k"]) -> float:
    logs = logits - logits.max(axis=1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))
    shares = np.exp(logs)
    # A class that no image has a share of, to rounding, adds nothing.
    logs -= np.log(np.maximum(shares.mean(axis=0), np.finfo(np.float64).tiny))
    return float(np.exp((shares * logs).sum(axis=1).mean()))


class InceptionScore:
    r"""Mean over the splits of :math:`\exp E_x KL(p(y|x) \| p(y))` (arXiv:1606.03498, section 4).

    Splits are the images 0 to 4999, 5000 to 9999 and so on, in the order in which they come; the
    last may be shorter, and then biases the score low. In float64; the same to the bit however the
    images are cut into pieces.

    >>> score = InceptionScore()
    >>> score.add(1000 * np.eye(4))
    >>> round(score.result().mean, 6)
    4.0
    """

    def __init__(self) -> None:
        self._splits: list[float] = []
        self._blocks = Blocks(
            "logits", SPLIT, lambda logits: self._splits.append(_split_score(logits))
        )

    def add(self, logits: ArrayLike) -> None:
        """Takes the logits of more images.

        Args:
            logits: float32 or float64 ``[n, K]``.

        Raises:
            ValueError: If they are none, a row is not finite, or K is another than before; then
                none of them is taken.
        """
        self._blocks.add(logits)

    @property
    def count(self) -> int:
        """Images so far."""
        return self._blocks.count

    def result(self) -> Score:
        """The score of all images so far; raises ValueError if there are none."""
        if not self.count:
            raise ValueError("an Inception Score needs at least 1 image, got 0")
        rest = self._blocks.rest
        splits = self._splits + ([_split_score(rest)] if len(rest) else [])
        return Score(float(np.mean(splits)), float(np.std(splits)))
