"""The Frechet distance of unlimited samples, from those of fewer (Chong & Forsyth 2020)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from tstitch_jax.evaluation.frechet import frechet_distance
from tstitch_jax.evaluation.statistics import Moments

POINTS = 10
"""Numbers of samples that the line is drawn through, from a fifth of them to all."""


def distance_at_infinity(
    samples: Float[np.ndarray, "n d"], mean: Float[np.ndarray, " d"], cov: Float[np.ndarray, "d d"]
) -> tuple[float, float]:
    """Where the distance goes as the number of samples grows, and the standard error of that.

    The distance of n samples is biased by a term in 1/n (Chong & Forsyth 2020, arXiv:1911.07023,
    equation 7). A line through the distances of random subsets, against 1/n, is followed to 0.
    The reference's own bias stays.

    Args:
        samples: Features.
        mean, cov: Of the reference.

    Raises:
        ValueError: If there are fewer than 50 samples.
    """
    count = len(samples)
    if count < 50:
        raise ValueError(f"fid_infinity needs at least 50 samples, got {count}")
    generator = np.random.default_rng(0)
    sizes = np.linspace(count // 5, count, POINTS).astype(int)
    distances = []
    for size in sizes:
        moments = Moments()
        # In order, so that all samples are summed as they are for the distance itself.
        moments.add(samples[np.sort(generator.permutation(count)[:size])])
        distances.append(frechet_distance(moments.mean, moments.covariance, mean, cov)[0])
    line = np.stack([np.ones(POINTS), 1 / sizes], axis=1)
    fit, *_ = np.linalg.lstsq(line, np.array(distances), rcond=None)
    rest = np.array(distances) - line @ fit
    spread = rest @ rest / (POINTS - 2) * np.linalg.inv(line.T @ line)
    return float(fit[0]), float(np.sqrt(spread[0, 0]))
