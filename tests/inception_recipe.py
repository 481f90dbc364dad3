"""Weights and images that the Inception network is tested with; NumPy alone, as its goldens'
script runs where this project is not installed."""

import numpy as np

SIZES = [(97, 61), (32, 32), (28, 28), (256, 256), (299, 299), (333, 512), (1, 2), (300, 298)]
"""Heights and widths that are resized; the features are those of the first."""


def pixels_of(size) -> np.ndarray:
    """Two images, smooth with noise, uint8 ``[2, H, W, 3]``."""
    height, width = size
    rng = np.random.default_rng((height, width))
    rows, columns = np.linspace(0, 1, height), np.linspace(0, 1, width)
    wave = np.sin(7 * rows[:, None, None] + 5 * columns[:, None] + np.arange(3))
    noise = rng.standard_normal((2, height, width, 3))
    return np.clip(128 + 80 * wave + 30 * noise, 0, 255).astype(np.uint8)


def weights(names) -> dict[str, np.ndarray]:
    """A value for each of the tensors, whose shapes are given; activations neither grow nor die."""
    rng, values = np.random.default_rng(0), {}
    for name, shape in sorted(names.items()):
        noise = rng.standard_normal(shape)
        if name.endswith("num_batches_tracked"):
            values[name] = np.zeros((), np.int64)
            continue
        if name.endswith("running_var"):
            noise = np.exp(0.2 * noise)
        elif name.endswith("bn.weight"):
            noise = 1 + 0.1 * noise
        elif len(shape) == 1:
            noise = 0.1 * noise
        else:
            noise *= (2 / np.prod(shape[1:])) ** 0.5
        values[name] = noise.astype(np.float32)
    return values


def some(values) -> np.ndarray:
    """At most 500 of the values, evenly spread."""
    flat = np.asarray(values).reshape(-1)
    return flat[np.linspace(0, flat.size - 1, min(500, flat.size)).astype(int)]
