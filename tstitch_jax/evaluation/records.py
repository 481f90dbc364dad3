"""Labelled images of tensorflow-datasets, read by index; needs no TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Records:
    """A ``tfds.data_source`` with features ``image`` and ``label``."""

    def __init__(self, source) -> None:
        fields = set(source[0]) if len(source) else set()
        if not {"image", "label"} <= fields:
            raise ValueError(f"the data set needs image and label, it has {sorted(fields)}")
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """uint8 ``[B, H, W, C]`` and int32 ``[B]``."""
        records = self.source.__getitems__([int(i) for i in indices])
        images = np.stack([np.asarray(record["image"]) for record in records])
        return images, np.array([record["label"] for record in records], np.int32)


class NoSplit(ValueError):
    """The data set can be opened, but does not have that split."""


def open_records(name: str, split: str) -> Records:
    """A data set that tensorflow-datasets has prepared, or can download and prepare.

    Raises:
        NoSplit: If it lacks that split.
        ValueError: If it cannot be opened or holds something else.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise ValueError(
            "tfds: data needs tensorflow-datasets; pip install 'tstitch_jax[train]'"
        ) from None
    try:
        source = tfds.data_source(name, split=split)
    except Exception as error:  # a missing data set, network, or file: many unrelated types
        text = " ".join(str(error).split())
        if "No module named" in text:
            text = "preparing it for the first time needs tensorflow; pip install tensorflow"
        text = text.partition(" Available datasets:")[0]  # more than a thousand
        kind = NoSplit if text.startswith("Unknown split") else ValueError
        raise kind(f"cannot open tfds:{name}: {text[:200]}") from error
    return Records(source)
