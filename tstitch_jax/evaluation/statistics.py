"""Running mean and covariance of features; rows taken in fixed blocks, however they arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Float32, Float64

CHUNK = 1024
"""Rows that a device compares with as many others at once."""


def check_features(name: str, value: ArrayLike, first: int = 0) -> Float[np.ndarray, "n d"]:
    """Features on the host; raises ValueError unless they are finite float32 or float64 ``[n, d]``.

    The error calls the rows by their numbers, counted from ``first``.
    """
    array = np.asarray(value)
    if array.ndim != 2 or array.dtype not in (np.float32, np.float64) or not array.shape[1]:
        raise ValueError(
            f"{name} must be float32 or float64 [N, D], got {array.dtype} {array.shape}"
        )
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise ValueError(f"{name} of image {first + int(finite.argmin())} are not finite")
    return array


def check_pair(
    first: tuple[str, ArrayLike], second: tuple[str, ArrayLike], least: int
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "m d"]]:
    """Two named sets of features; raises ValueError unless they fit and have ``least`` rows."""
    one, other = check_features(*first), check_features(*second)
    for (name, _), features in ((first, one), (second, other)):
        if len(features) < least:
            raise ValueError(f"{name} must have at least {least} images, got {len(features)}")
    if one.shape[1] != other.shape[1]:
        raise ValueError(
            f"{first[0]} and {second[0]} must be features of one network, got {one.shape[1]} and "
            f"{other.shape[1]} a row"
        )
    return one, other


def chunks(
    features: Float[np.ndarray, "n d"], centre: Float64[np.ndarray, " d"] | float = 0.0
) -> Iterator[Float32[np.ndarray, "c d"]]:
    """The rows less ``centre``, ``CHUNK`` at a time; the last ones are filled with zeros."""
    for start in range(0, len(features), CHUNK):
        rows = (features[start : start + CHUNK] - centre).astype(np.float32)
        yield np.pad(rows, ((0, CHUNK - len(rows)), (0, 0)))


class Blocks:
    """Hands rows on in blocks of one size, so that no sum depends on the pieces they came in.

    Attributes:
        count: Rows so far.
    """

    def __init__(self, name: str, size: int, take: Callable[[np.ndarray], None]) -> None:
        """
        Args:
            name: What errors call the rows.
            size: Rows of a block.
            take: Given each block that is full, float64 ``[size, d]``, which is then written over.
        """
        self.count = 0
        self._name, self._size, self._take = name, size, take
        self._buffer = np.empty((size, 0))

    def add(self, rows: ArrayLike) -> None:
        """Takes more rows, ``[n, d]``, or none of them where it raises."""
        rows = check_features(self._name, rows, self.count)
        if not self.count:
            self._buffer = np.empty((self._size, rows.shape[1]))
        elif rows.shape[1] != self._buffer.shape[1]:
            raise ValueError(
                f"{self._name} must have {self._buffer.shape[1]} numbers a row, as those before, "
                f"got {rows.shape[1]}"
            )
        while len(rows):
            used = self.count % self._size
            piece = rows[: self._size - used]
            self._buffer[used : used + len(piece)] = piece
            self.count += len(piece)
            if self.count % self._size == 0:
                self._take(self._buffer)
            rows = rows[len(piece) :]

    @property
    def rest(self) -> Float64[np.ndarray, "n d"]:
        """The last rows, which fill no block."""
        return self._buffer[: self.count % self._size]


class Moments:
    """Mean and covariance of features that are given piece by piece and not kept.

    In float64, by blocks of 512 rows whose scatters are merged (Chan, Golub & LeVeque 1979), which
    cancels nothing; the same to the bit however the rows are cut into pieces.

    >>> moments = Moments()
    >>> moments.add(np.array([[1.0, 0.0], [3.0, 0.0]]))
    >>> moments.covariance.tolist()
    [[2.0, 0.0], [0.0, 0.0]]
    """

    def __init__(self) -> None:
        self._blocks = Blocks("features", 512, self._take)
        self._merged: tuple[int, np.ndarray, np.ndarray] | None = None

    def _with(self, block: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        """Count, mean and scatter (sum of the squares about the mean) with a block more."""
        own = block.mean(axis=0)
        centred = block - own
        scatter = centred.T @ centred  # the BLAS makes it symmetric
        if self._merged is None:
            return len(block), own, scatter
        count, mean, before = self._merged
        total = count + len(block)
        step = own - mean
        scatter += before
        scatter += np.outer(step, step) * (count * len(block) / total)
        return total, mean + step * (len(block) / total), scatter

    def _take(self, block: np.ndarray) -> None:
        self._merged = self._with(block)

    def _moments(self, least: int, what: str) -> tuple[int, np.ndarray, np.ndarray]:
        if self.count < least:
            raise ValueError(f"a {what} needs at least {least} images, got {self.count}")
        rest = self._blocks.rest
        return self._with(rest) if len(rest) or self._merged is None else self._merged

    def add(self, features: ArrayLike) -> None:
        """Takes the features of more images.

        Args:
            features: float32 or float64 ``[n, d]``.

        Raises:
            ValueError: If they are none, a row is not finite, or d is another than before; then
                none of them is taken.
        """
        self._blocks.add(features)

    @property
    def count(self) -> int:
        """Rows so far."""
        return self._blocks.count

    @property
    def mean(self) -> Float64[np.ndarray, " d"]:
        """The mean; raises ValueError before the first row."""
        return self._moments(1, "mean")[1]

    @property
    def covariance(self) -> Float64[np.ndarray, "d d"]:
        """Over N - 1, symmetric to the bit; raises ValueError before the second row."""
        count, _, scatter = self._moments(2, "covariance")
        return scatter / (count - 1)
