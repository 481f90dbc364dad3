"""A folder of generated images that can be stopped at any moment: settings, shards, one file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tstitch_jax.core.files import DAMAGED, whole_file, write_text
from tstitch_jax.jobs.folder import held_folder, remove_unfinished

SETTINGS, SAMPLES = "settings.json", "samples.npz"


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What two settings, as JSON holds them, say otherwise, briefly."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        names = dict.fromkeys([*new, *old])
        inner = [differences(old.get(n), new.get(n), f"{name} {n}".lstrip()) for n in names]
        return [said for each in inner for said in each]
    if isinstance(old, list) and isinstance(new, list):
        if max(len(old), len(new)) > 4 and len(old) != len(new):
            return [f"{name} had {len(old)} entries, has {len(new)}"]
        if len(old) == len(new) and (len(old) > 4 or isinstance(old[0], dict)):
            first = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
            return differences(old[first], new[first], f"{name}[{first}]")
    return [f"{name} was {json.dumps(old):.60}, is {json.dumps(new):.60}"]


class Shards:
    """Batches of images in files of their own, each written whole and with a checksum.

    Shard k holds the images ``[k * batch, (k + 1) * batch)``, uint8 ``[batch, H, W, C]``.

    Attributes:
        folder: Where they are.
        batch: Images of a shard.
        shape: ``(H, W, C)`` of an image.
        settings: What determines each image.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], batch: int, shape: tuple[int, ...]
    ) -> None:
        """Nothing is read or written yet.

        Args:
            folder: Where they are, or will be.
            settings: What determines each image, as JSON holds it.
            batch: Images of a shard.
            shape: ``(H, W, C)`` of an image.
        """
        self.folder, self.batch, self.shape = folder, batch, shape
        self.settings = json.loads(json.dumps(settings))
        text = json.dumps(self.settings, sort_keys=True)
        self._digest = hashlib.sha256(text.encode()).hexdigest()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Makes the folder, or accepts one that was begun with the same settings, for us alone.

        Raises:
            ValueError: If there is something else in that place, the settings differ, or another
                process works on it.
            OSError: If the folder cannot be written.
        """
        file = self.folder / SETTINGS
        with held_folder(self.folder, SETTINGS):
            if file.exists():
                self._compare(file)
            else:
                write_text(file, json.dumps(self.settings, indent=1) + "\n")
            (self.folder / "shards").mkdir(exist_ok=True)
            remove_unfinished(self.folder)
            yield

    def _compare(self, file: Path) -> None:
        """Raises ValueError if the folder's settings are not these; the error names differences."""
        try:
            old = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}); choose another folder") from None
        if not isinstance(old, dict):
            raise ValueError(f"{file} is damaged (no settings); choose another folder")
        found, own = (json.dumps(each.get("format")) for each in (old, self.settings))
        if found != own:
            raise ValueError(
                f"{self.folder} was begun by another release (format {found:.20}, this one writes "
                f"{own}), whose jobs cannot be resumed; choose another folder"
            )
        if said := differences(old, self.settings):
            raise ValueError(
                f"{self.folder} holds images of other settings: {'; '.join(said)}; "
                "choose another folder"
            )

    def _file(self, k: int) -> Path:
        return self.folder / "shards" / f"{k:07d}.npz"

    def _checksum(self, k: int, pixels: np.ndarray) -> str:
        digest = hashlib.sha256(f"{self._digest} {k} {pixels.dtype} {pixels.shape}".encode())
        digest.update(np.ascontiguousarray(pixels).data)
        return digest.hexdigest()

    def write(self, k: int, pixels: np.ndarray) -> None:
        """Writes shard k, whole or not at all; raises OSError if that fails."""
        with whole_file(self._file(k)) as stream:
            np.savez(stream, images=pixels, checksum=np.array(self._checksum(k, pixels)))

    def read(self, k: int) -> np.ndarray | None:
        """The images of shard k; None if it is not there, damaged, or of other settings."""
        try:
            with np.load(self._file(k), allow_pickle=False) as stored:
                pixels, checksum = stored["images"], str(stored["checksum"])
        except DAMAGED:
            return None
        fits = pixels.dtype == np.uint8 and pixels.shape == (self.batch, *self.shape)
        return pixels if fits and checksum == self._checksum(k, pixels) else None

    def needed(self, num: int) -> range:
        """The shards of the first ``num`` images."""
        return range(-(-num // self.batch))

    def join(
        self,
        num: int,
        labels: np.ndarray,
        png: bool,
        watch: Callable[[Iterable[int]], Iterable[int]] = lambda shards: shards,
    ) -> Path:
        """Joins the first ``num`` images to one file, and on demand to PNGs.

        ``samples.npz`` holds ``arr_0``, uint8 ``[num, H, W, 3]``, and ``arr_1``, int64 ``[num]``,
        their labels: the layout of Dhariwal & Nichol 2021. The same images give the same bytes.

        Args:
            num: How many.
            labels: Of each, ``[num]``.
            png: Whether to write ``png/0000000.png``, ... too, where they are not there yet or do
                not hold these pixels; those of more images than ``num`` are removed.
            watch: Goes through the shards, to show progress.

        Raises:
            ValueError: If a shard is missing or damaged.
            OSError: If a file cannot be written.
        """
        height, width, _ = self.shape
        pictures = self.folder / "png"
        if png:
            pictures.mkdir(exist_ok=True)
            for old in pictures.iterdir():
                if re.fullmatch(r"\d{7}\.png", old.name) and int(old.stem) >= num:
                    old.unlink()

        def holds(file: Path, pixels: np.ndarray) -> bool:
            from PIL import Image

            try:
                with Image.open(file, formats=["png"]) as image:
                    return np.array_equal(np.asarray(image), pixels)
            except Exception:  # of a file that is damaged PIL raises many kinds
                return False

        def picture(i: int, pixels: np.ndarray) -> None:
            from PIL import Image

            file = pictures / f"{i:07d}.png"
            if not holds(file, pixels):
                with whole_file(file) as stream:
                    Image.fromarray(pixels).save(stream, format="png")

        path = self.folder / SAMPLES
        with (
            whole_file(path) as stream,
            zipfile.ZipFile(stream, "w") as archive,
            ThreadPoolExecutor() as pool,
        ):

            def entry(name: str) -> zipfile.ZipInfo:
                return zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))

            with archive.open(entry("arr_0"), "w", force_zip64=True) as array:
                header = dict(descr="|u1", fortran_order=False, shape=(num, height, width, 3))
                np.lib.format.write_array_header_1_0(array, header)
                for k in watch(self.needed(num)):
                    pixels = self.read(k)
                    if pixels is None:
                        raise ValueError(f"{self._file(k)} is missing or damaged; run again")
                    first = k * self.batch
                    rgb = np.broadcast_to(pixels, (*pixels.shape[:3], 3))[: num - first]
                    array.write(np.ascontiguousarray(rgb).data)
                    if png:
                        list(pool.map(picture, range(first, first + len(rgb)), rgb))
            with archive.open(entry("arr_1"), "w") as array:
                np.lib.format.write_array(array, labels.astype(np.int64), version=(1, 0))
        return path
