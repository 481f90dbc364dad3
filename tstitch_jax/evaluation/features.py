"""Features of many images: on all devices, the same to the bit however many these are."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tstitch_jax.core.files import DAMAGED, whole_file
from tstitch_jax.models.types import FeatureModel, FeatureNetwork, Features

UNIT = 32
"""Images that a device computes at once. Always so many, since a program for another number rounds
otherwise; what is missing of the last ones is filled, and cut off."""

BLOCK = 256
"""Images whose features are kept together while a job is under way, or a multiple of it."""


@functools.partial(jax.jit, static_argnames="mesh")
def _extract(model: FeatureModel, pixels: jax.Array, *, mesh: Any) -> Features:
    def precise(model: FeatureModel, pixels: jax.Array) -> Features:
        # Full float32, also where a device has faster products.
        with jax.default_matmul_precision("highest"):
            return model(pixels)

    if mesh is None:
        return precise(model, pixels)
    data, everything = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(
        precise, mesh=mesh, in_specs=(everything, data), out_specs=data, check_vma=False
    )(model, pixels)


def check_images(network: FeatureNetwork, shape: tuple[int, ...], name: str) -> Features:
    """The shapes of the features of an image ``(H, W, C)``.

    Raises:
        ValueError: If the network does not take it.
    """
    # Whether three channels are a grey image is seen when they are read.
    pixels = jax.ShapeDtypeStruct((1, *shape[:2], network.card.image_shape[2]), jnp.uint8)
    try:
        return jax.eval_shape(network.model, pixels)
    except ValueError as error:
        raise ValueError(f"{network.card.name} does not take {name}: {error}") from None


def fit_channels(pixels: np.ndarray, channels: int, name: str) -> np.ndarray:
    """Grey images in three channels, or three equal channels as one."""
    if pixels.shape[3] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=3)
    if (pixels != pixels[..., :1]).any():
        raise ValueError(f"{name} is in colour, and the network was trained on grey images")
    return pixels[..., :1]


class Extractor:
    """Takes images to their features, UNIT at a time on each device of a network's mesh.

    Attributes:
        network: The network.
        block: Images that it is best given together.
    """

    def __init__(self, network: FeatureNetwork, batch: int = UNIT) -> None:
        """
        Args:
            network: On a device, or copied onto a mesh with an axis ``"data"``.
            batch: Images that a device is given ahead, in units of UNIT; no result depends on it.
        """
        leaf = jax.tree.leaves(network.params)[0]
        sharding = getattr(leaf, "sharding", None)
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        self.network, self._ahead = network, max(1, -(-batch // UNIT))
        self._devices = 1 if mesh is None else mesh.shape["data"]
        self._place = sharding if mesh is None else NamedSharding(mesh, PartitionSpec("data"))
        self._run = functools.partial(_extract, network.model, mesh=mesh)
        self.block = BLOCK * -(-UNIT * self._devices // BLOCK)

    def __call__(self, pixels: np.ndarray) -> Features:
        """Features, as NumPy arrays, of uint8 ``[N, H, W, C]``."""
        size, done, pending = UNIT * self._devices, [], deque()

        def collect() -> None:
            count, features = pending.popleft()
            done.append(jax.tree.map(lambda value: np.asarray(value)[:count], features))

        for start in range(0, len(pixels), size):
            piece = pixels[start : start + size]
            missing = [(0, size - len(piece))] + [(0, 0)] * 3
            placed = jax.device_put(np.pad(piece, missing), self._place)
            pending.append((len(piece), self._run(placed)))
            if len(pending) > self._ahead:
                collect()
        while pending:
            collect()
        return jax.tree.map(lambda *parts: np.concatenate(parts), *done)


class Kept:
    """Features of blocks in files, by what they are features of, so that a killed job goes on."""

    def __init__(self, folder: Path | None, network: FeatureNetwork) -> None:
        """
        Args:
            folder: Where; None keeps nothing.
            network: Whose features.
        """
        platform = next(iter(jax.tree.leaves(network.params)[0].devices())).platform
        made_by = f"{version('tstitch_jax')} {jax.__version__} {platform}"
        self._key = f"{network.card.checksum} {network.dtype} {made_by} "
        self._folder = folder
        self._used: list[Path] = []

    def _file(self, pixels: np.ndarray) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(f"{self._key}{pixels.shape}".encode())
        digest.update(np.ascontiguousarray(pixels).data)
        return self._folder / f"{digest.hexdigest()}.npz"

    def get(self, pixels: np.ndarray, compute: Callable[[np.ndarray], Features]) -> Features:
        """The features of a block, from its file or computed and then kept."""
        file = self._file(pixels)
        if file is None:
            return compute(pixels)
        self._used.append(file)
        try:
            with np.load(file, allow_pickle=False) as stored:
                return Features(**{name: stored[name] for name in stored.files})
        except (*DAMAGED, TypeError):
            features = compute(pixels)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(file) as stream:
                np.savez(stream, **{k: v for k, v in features._asdict().items() if v is not None})
        except OSError:  # a disk that is full stops the keeping, not the job
            self._folder = None
        return features

    def forget(self) -> None:
        """Removes the files of the blocks that were asked for."""
        for file in self._used:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
        self._used.clear()


def ahead(items: Iterable[Any]) -> Iterator[Any]:
    """The same items, the next one read while one is worked on."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, iterator, end)
            yield item
