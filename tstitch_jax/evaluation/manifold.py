"""Precision and recall of samples, and their nearest neighbours, by distances of features."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from tstitch_jax.evaluation.statistics import CHUNK, check_pair, chunks

NOISE = 32 * float(np.finfo(np.float32).eps)
"""Squared distances below this share of both squared norms are rounding, and count as 0."""


class PrecisionRecall(NamedTuple):
    """
    Attributes:
        precision: Share of samples that are within the reference's manifold.
        recall: Share of the reference that is within the samples' manifold.
    """

    precision: float
    recall: float


class _Chunk(NamedTuple):
    """``CHUNK`` rows of a set of features; rows beyond its end have an infinite norm.

    Attributes:
        rows: float32 ``[c, d]``.
        norms: float32 ``[c]``, their squared norms.
    """

    rows: jax.Array
    norms: jax.Array


def _place(features: Float[np.ndarray, "n d"], centre: np.ndarray) -> list[_Chunk]:
    placed = []
    for rows in chunks(features, centre):
        norms = np.einsum("cd,cd->c", rows, rows, dtype=np.float64)
        norms[len(features) - len(placed) * CHUNK :] = np.inf
        placed.append(_Chunk(jnp.asarray(rows), jnp.asarray(norms.astype(np.float32))))
    return placed


def _squares(a: _Chunk, b: _Chunk) -> Float32[Array, "c c"]:
    """Squared distances; infinite beyond either end."""
    norms = a.norms[:, None] + b.norms
    products = jnp.matmul(a.rows, b.rows.T, precision=jax.lax.Precision.HIGHEST)
    squares = norms - 2 * products
    return jnp.where(squares < NOISE * norms, 0, squares)


@functools.partial(jax.jit, static_argnames="k")
def _closest(
    a: _Chunk, b: _Chunk, same: Bool[Array, ""], k: int
) -> tuple[Float32[Array, "c k"], Int32[Array, "c k"]]:
    """Squared distances and places of each row's k nearest in b; not itself if b is the same."""
    squares = jnp.where(same & jnp.eye(CHUNK, dtype=bool), jnp.inf, _squares(a, b))
    nearest, places = jax.lax.top_k(-squares, k)
    return -nearest, places


@jax.jit
def _covered(
    a: _Chunk, b: _Chunk, radii_a: Float32[Array, " c"], radii_b: Float32[Array, " c"]
) -> tuple[Bool[Array, " c"], Bool[Array, " c"]]:
    """Which rows of a are within the radius of a row of b, and the other way round."""
    squares = _squares(a, b)
    real = jnp.isfinite(squares)
    return (
        ((squares <= radii_b) & real).any(axis=1),
        ((squares <= radii_a[:, None]) & real).any(axis=0),
    )


def _radii(placed: list[_Chunk], k: int) -> list[Float32[np.ndarray, " c"]]:
    """Squared distance of each point to the k-th nearest other one of its set."""
    radii = []
    for i, one in enumerate(placed):
        found = [_closest(one, other, jnp.asarray(i == j), k)[0] for j, other in enumerate(placed)]
        radii.append(np.sort(np.concatenate(found, axis=1), axis=1)[:, k - 1])
    return radii


def precision_recall(reference: ArrayLike, samples: ArrayLike, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991, section 2).

    A set's manifold is the union of balls about its points, each reaching, boundary included, to
    the k-th nearest other point of the set. In float32 about the reference's mean, by products of
    1024 by 1024 points at once; points nearer to one another than these resolve (0.2% of the
    root of the sum of their squared distances from the mean) count as equal.

    Args:
        reference: Features, float32 or float64 ``[n, d]``.
        samples: Features ``[m, d]``.
        k: At least 1, and fewer than there are points in either set.

    Raises:
        ValueError: If there are fewer than k + 1 of either, d differs, or a row is not finite.
    """
    if not 1 <= k <= CHUNK:
        raise ValueError(f"k must be 1 to {CHUNK}, got {k}")
    x, y = check_pair(("reference", reference), ("samples", samples), k + 1)
    centre = x.mean(axis=0, dtype=np.float64)
    a, b = _place(x, centre), _place(y, centre)
    radii_a, radii_b = _radii(a, k), _radii(b, k)
    in_b, in_a = np.zeros(len(a) * CHUNK, bool), np.zeros(len(b) * CHUNK, bool)
    for i, one in enumerate(a):
        for j, other in enumerate(b):
            here, there = (slice(n * CHUNK, (n + 1) * CHUNK) for n in (i, j))
            rows, columns = _covered(one, other, radii_a[i], radii_b[j])
            in_b[here] |= np.asarray(rows)
            in_a[there] |= np.asarray(columns)
    return PrecisionRecall(float(in_a[: len(y)].mean()), float(in_b[: len(x)].mean()))


def nearest(
    reference: ArrayLike, samples: ArrayLike
) -> tuple[Float32[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """Distance of each sample to its nearest point of the reference, and which that is.

    Of equally near ones the first. Computed, and raises, as ``precision_recall``.

    Args:
        reference: Features, float32 or float64 ``[n, d]``.
        samples: Features ``[m, d]``.
    """
    x, y = check_pair(("reference", reference), ("samples", samples), 1)
    centre = x.mean(axis=0, dtype=np.float64)
    a = _place(x, centre)
    squares, places = [], []
    for one in _place(y, centre):
        found = [_closest(one, other, jnp.asarray(False), 1) for other in a]
        values = np.concatenate([np.asarray(value) for value, _ in found], axis=1)
        chunk = values.argmin(axis=1)
        rows = np.arange(CHUNK)
        squares.append(values[rows, chunk])
        inside = np.concatenate([np.asarray(place) for _, place in found], axis=1)[rows, chunk]
        places.append(chunk * CHUNK + inside)
    found = np.concatenate(squares)[: len(y)], np.concatenate(places)[: len(y)]
    return np.sqrt(found[0]), found[1]
