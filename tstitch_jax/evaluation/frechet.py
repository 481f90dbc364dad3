"""Fréchet distance of two Gaussians (FID of Inception features; Heusel et al. 2017)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float64

EPS = float(np.finfo(np.float64).eps)

ROUNDINGS = 16 * EPS
"""How far off a covariance, a mean or a product is taken to be, against its Frobenius norm."""


class FrechetDistance(NamedTuple):
    """
    Attributes:
        distance: The squared distance, as FID is given.
        error: A bound of its numerical error, not of what other images would have given.
    """

    distance: float
    error: float


def _factor(
    covariance: Float64[np.ndarray, "d d"], which: str
) -> tuple[Float64[np.ndarray, "r d"], float]:
    """``L`` with ``L^T L`` the covariance, r being its rank, and how far off that is at most.

    Cholesky with pivots, in blocks (Higham 2002, Accuracy and Stability, section 10.3), which ends
    where no variance is left above rounding. What L is off by, in Frobenius norm, is what is left
    then, and a few roundings.
    """
    left, variances = covariance.copy(), covariance.diagonal().copy()
    least = len(covariance) * EPS * variances.max()
    factor, rank, start = np.zeros_like(covariance), 0, -1
    while start < rank:
        start = rank
        while rank < min(start + 128, len(covariance)):
            pivot = variances.argmax()
            if variances[pivot] <= least:
                break
            row = left[pivot] - factor[start:rank, pivot] @ factor[start:rank]
            factor[rank] = row / np.sqrt(variances[pivot])
            variances -= factor[rank] ** 2
            variances[pivot] = 0
            rank += 1
        left -= factor[start:rank].T @ factor[start:rank]
    norm, missed = float(np.linalg.norm(covariance)), float(np.linalg.norm(left))
    if missed > 1e-3 * norm:
        raise ValueError(f"the {which} covariance has directions of negative variance")
    return factor[:rank], missed + ROUNDINGS * norm


def _moved(squares: Float64[np.ndarray, " r"], by: float) -> float:
    """The most by which the sum of their roots changes if each moves by so much."""
    return float((np.sqrt(np.maximum(squares, by)) - np.sqrt(np.maximum(squares - by, 0))).sum())


def _gaussian(mean: ArrayLike, covariance: ArrayLike, which: str) -> tuple[np.ndarray, np.ndarray]:
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    if mean.ndim != 1 or not mean.size or covariance.shape != (mean.size, mean.size):
        raise ValueError(
            f"the {which} mean and covariance must be [D] and [D, D], got {mean.shape} and "
            f"{covariance.shape}"
        )
    if not np.isfinite(mean).all() or not np.isfinite(covariance).all():
        raise ValueError(f"the {which} mean or covariance holds numbers that are not finite")
    if np.abs(covariance - covariance.T).max() > 1e-6 * np.abs(covariance).max():
        raise ValueError(f"the {which} covariance is not symmetric")
    return mean, (covariance + covariance.T) / 2


def frechet_distance(
    mean1: ArrayLike, covariance1: ArrayLike, mean2: ArrayLike, covariance2: ArrayLike
) -> FrechetDistance:
    r"""Fréchet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, equation 6).

    :math:`|m_1 - m_2|^2 + \mathrm{tr}(C_1 + C_2 - 2 (C_1 C_2)^{1/2})`, where the last trace is the
    sum of the singular values of :math:`L_1 L_2^T` with :math:`C_i = L_i^T L_i`. So no root is ever
    complex, and what rounding left where a covariance has no variance (fewer images than features)
    is never taken a root of.

    The error is the lesser of two bounds, each with C off by what L leaves and a few roundings. One
    moves every squared singular value by the most that it can move (Weyl); the other bounds the
    roots' change by the trace norm of the covariances' (Powers & Størmer 1970, lemma 4.1), which is
    the sharper one where variances vanish.

    Args:
        mean1: ``[d]``.
        covariance1: ``[d, d]``; of fewer than d + 1 images it is singular, which is no harm.
        mean2: As the first.
        covariance2: As the first.

    Returns:
        The distance and its error; both exactly 0 for equal arguments.

    Raises:
        ValueError: If shapes misfit, a number or the distance is not finite, or a covariance is
            none.

    >>> frechet_distance(np.zeros(1), np.eye(1), np.ones(1), 4 * np.eye(1)).distance
    2.0
    """
    mean1, covariance1 = _gaussian(mean1, covariance1, "first")
    mean2, covariance2 = _gaussian(mean2, covariance2, "second")
    if mean1.shape != mean2.shape:
        raise ValueError(
            f"the means must be of as many features, got {mean1.size} and {mean2.size}"
        )
    if np.array_equal(mean1, mean2) and np.array_equal(covariance1, covariance2):
        return FrechetDistance(0.0, 0.0)
    factor1, off1 = _factor(covariance1, "first")
    factor2, off2 = _factor(covariance2, "second")
    product = factor1 @ factor2.T
    if product.shape[0] > product.shape[1]:
        product = product.T
    squares = np.maximum(np.linalg.eigvalsh(product @ product.T), 0)
    shift = mean1 - mean2
    traces = covariance1.trace() + covariance2.trace()
    distance = shift @ shift + traces - 2 * np.sqrt(squares).sum()

    size, norm = len(mean1), np.linalg.norm
    rounding = ROUNDINGS * float(norm(product)) ** 2
    most = rounding + float(off1 * norm(covariance2) + off2 * norm(covariance1))
    weyl = _moved(np.pad(squares, (size - len(squares), 0)), most)
    changed = off1 * covariance2.trace(), off2 * covariance1.trace()
    powers_stormer = _moved(squares, rounding) + np.sqrt(np.sqrt(size) * np.array(changed)).sum()
    means = ROUNDINGS * (norm(mean1) + norm(mean2))
    error = 2 * min(weyl, powers_stormer) + ROUNDINGS * traces + means * (means + 2 * norm(shift))
    if not np.isfinite(distance):
        raise ValueError("the means or covariances are too large for a distance")
    return FrechetDistance(max(float(distance), 0.0), float(error))
