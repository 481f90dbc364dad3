"""Weights that LoRA files are merged into in tests; NumPy alone, as the goldens' script runs where
this project is not installed."""

import zlib

import numpy as np


def weights(shapes) -> dict[str, np.ndarray]:
    """A value for each name, which depends on the name alone."""
    return {
        name: np.random.default_rng(zlib.crc32(name.encode()))
        .standard_normal(shape)
        .astype(np.float32)
        for name, shape in shapes.items()
    }


def some(values) -> np.ndarray:
    """At most 40 of the values, evenly spread."""
    flat = np.asarray(values).reshape(-1)
    return flat[np.linspace(0, flat.size - 1, min(40, flat.size)).astype(int)]
