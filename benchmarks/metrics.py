"""What the measures of image quality cost at the published size: Inception's 2048 features.

    python benchmarks/metrics.py            # each measure in a process of its own
    python benchmarks/metrics.py manifold   # one of them, in this process

Features are half of a normal distribution, as rectified and pooled ones are. Times are medians, and
peaks are those of the whole process, features and interpreter included.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import numpy as np

from tstitch_jax.evaluation.frechet import frechet_distance
from tstitch_jax.evaluation.inception_score import InceptionScore
from tstitch_jax.evaluation.kernel import kernel_distance
from tstitch_jax.evaluation.manifold import nearest, precision_recall
from tstitch_jax.evaluation.statistics import Moments

SIZE, COUNT = 2048, 10_000


def features(seed: int, count: int = COUNT, size: int = SIZE) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((count, size), np.float32)
    return np.maximum(values + np.float32(0.1 * seed), 0)


def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = Moments()
    found.add(rows)
    return found.mean, found.covariance


def report(name: str, run, repeats: int = 5) -> None:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    shown = result if name.startswith(("Frechet", "kernel", "precision")) else ""
    print(
        f"{name}: median {np.median(times):.2f} s, least {min(times):.2f} s, peak {peak:.2f} GB "
        f"{shown}",
        flush=True,
    )


def frechet() -> None:
    first = moments(features(0))
    for count in (COUNT, 1000):
        second = moments(features(1, count))
        report(f"Frechet distance, {COUNT} and {count} images",
               lambda second=second: frechet_distance(*first, *second))  # fmt: skip
    few = moments(features(0, 1000))
    report("Frechet distance, 1000 and 1000 images", lambda: frechet_distance(*few, *second))


def manifold() -> None:
    x, y = features(0), features(1)
    report(f"precision and recall, {COUNT} and {COUNT} images", lambda: precision_recall(x, y), 3)
    report("nearest neighbours", lambda: nearest(x, y), 3)


def kernel() -> None:
    x, y = features(0), features(1)
    report(f"kernel distance, {COUNT} and {COUNT} images", lambda: kernel_distance(x, y), 3)


def streamed() -> None:
    x, logits = features(0), features(1, size=1008)
    report(f"mean and covariance, {COUNT} images", lambda: moments(x), 3)

    def score():
        found = InceptionScore()
        found.add(logits)
        return found.result()

    report(f"Inception Score, {COUNT} images", score, 3)


if __name__ == "__main__":
    parts = {"frechet": frechet, "manifold": manifold, "kernel": kernel, "streamed": streamed}
    if len(sys.argv) > 1:
        parts[sys.argv[1]]()
    else:
        for name in parts:
            subprocess.run([sys.executable, __file__, name], check=True)
