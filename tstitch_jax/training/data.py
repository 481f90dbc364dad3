"""Labelled images at random access: an ``.npz`` file, or a tensorflow-datasets source."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from tstitch_jax.evaluation.records import NoSplit, open_records


@runtime_checkable
class Images(Protocol):
    """Labelled uint8 images, read by index."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """uint8 ``[B, H, W, C]`` and int32 ``[B]``."""
        ...


class ArrayImages:
    """Images held in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(
                f"images must be uint8 [N, H, W, C], got {images.dtype} {images.shape}"
            )
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"labels must be {len(images)} whole numbers, got {labels.dtype} {labels.shape}"
            )
        self.images, self.labels = images, labels.astype(np.int32)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return self.images[indices], self.labels[indices]


def open_images(spec: str, split: str = "train") -> Images:
    """Opens a split of a data set.

    Args:
        spec: The path of an ``.npz`` with arrays ``x_train`` (uint8 ``[N, H, W]`` or
            ``[N, H, W, C]``) and ``y_train``, or ``tfds:NAME`` for a data set that
            tensorflow-datasets has prepared, or can download and prepare.
        split: ``"train"`` or ``"test"``, with which the names of the arrays end.

    Raises:
        NoSplit: If it lacks that split.
        ValueError: If it cannot be opened or holds something else.
    """
    if spec.startswith("tfds:"):
        return open_records(spec.removeprefix("tfds:"), split)
    if not os.path.isfile(spec):
        raise ValueError(f"no data at {spec}; give an .npz file, or tfds:NAME")
    needed = [f"x_{split}", f"y_{split}"]
    try:
        with np.load(spec) as arrays:
            names = arrays.files
            found = [arrays[name] for name in needed if name in names]
    except Exception as error:  # a file that is cut or no archive fails in many ways
        raise ValueError(f"cannot read {spec} as .npz: {error}") from None
    if len(found) < len(needed):
        raise NoSplit(
            f"{spec} needs the arrays {' and '.join(needed)}; "
            f"it has {', '.join(names[:8]) or 'nothing'}"
        )
    return ArrayImages(*found)


def batch_indices(seed: int, step: int, batch: int, size: int) -> np.ndarray:
    """Indices of a step's batch, int64 ``[batch]``: epochs in a fresh order each, without a state.

    A batch may end one epoch and begin the next.
    """
    positions = range(step * batch, (step + 1) * batch)
    return np.array([_order(seed, p // size, size)[p % size] for p in positions])


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def normalize(images: np.ndarray) -> np.ndarray:
    """uint8 to float32 in [-1, 1]."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)
