"""Weights and inputs that the U-Nets and the VQ autoencoder are tested with; NumPy alone, as their
goldens' script runs where this project is not installed."""

import math
import zlib

import numpy as np

_POOL = np.random.default_rng(0).standard_normal(1_000_003).astype(np.float32)
"""Every tensor is cut out of these, which is quicker than to draw it."""


def weight(name: str, shape) -> np.ndarray:
    """A tensor's values, float32, exact in float16; activations neither grow nor die."""
    start, size = zlib.crc32(name.encode()) % len(_POOL), math.prod(shape)
    values = np.roll(_POOL, -start)[:size]
    if len(shape) == 1:
        norm = "norm" in name and name.endswith("weight")
        values = 0.1 * values + norm
    elif "quantize" not in name:
        values = values / np.float32(math.sqrt(math.prod(shape[1:])))
    return np.resize(values.astype(np.float16).astype(np.float32), size).reshape(shape)


def noise(name: str, *shape: int) -> np.ndarray:
    """Standard normal float32."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype("float32")
