"""What a sampler returns."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from tstitch_jax.report import pictures

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Samples:
    """The samples of one call of a ``Sampler``.

    Attributes:
        images: float32 ``[B, H, W, C]`` in [-1, 1]; None unless decoded.
        latents: float32 ``[B, H, W, C]``, the state that the last step leaves; None if decoded.
        trajectory: float32 ``[N, B, H, W, C]``, the state after each step; None unless kept.
        predictions: float32 ``[N, B, H, W, C]``, x0 as predicted in each step; None unless kept.
        names: The label or text of each image.
        settings: How they were sampled.
    """

    images: jax.Array | None
    latents: jax.Array | None
    trajectory: jax.Array | None
    predictions: jax.Array | None
    names: tuple[str, ...]
    settings: dict[str, Any]

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        parts = [
            f"{name} {list(value.shape)}"
            for name in ("images", "latents", "trajectory", "predictions")
            if (value := getattr(self, name)) is not None
        ]
        return f"Samples({', '.join(parts)}; {self.settings.get('plan', '')})"

    def pil(self) -> list[Image]:
        """The images as ``PIL.Image``, of mode ``"RGB"`` or ``"L"``.

        Raises:
            ValueError: If they were not decoded, or one is not finite.
        """
        from PIL import Image

        pixels = pictures.to_uint8(self._finite())
        return [Image.fromarray(each[..., 0] if each.shape[-1] == 1 else each) for each in pixels]

    def grid(self) -> Image:
        """All images in one picture, each below its label or text."""
        images = self._finite()
        count = len(images)
        columns = min(count, 8)
        rows = math.ceil(count / columns)
        if rows == 1:
            return pictures.grid(images[None], [""], list(self.names))
        filled = np.concatenate([images, np.ones((rows * columns - count, *images.shape[1:]))])
        # Labels stand above columns only, so an image of another row is found by its number.
        starts = [str(row * columns) for row in range(rows)]
        return pictures.grid(filled.reshape(rows, columns, *images.shape[1:]), starts, [])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the images as one PNG; an existing file is replaced.

        Raises:
            ValueError: If the path does not end in ``.png`` or cannot be written, the images were
                not decoded, or one is not finite.
        """
        picture = self.pil()[0] if len(self) == 1 else self.grid()
        pictures.write_png(picture, pictures.check_png(Path(path)))

    def _repr_png_(self) -> bytes | None:
        if self.images is None:
            return None
        stream = io.BytesIO()
        self.grid().save(stream, format="PNG")
        return stream.getvalue()

    def _finite(self) -> np.ndarray:
        if self.images is None:
            raise ValueError("there are no images: the samples were not decoded (decode=False)")
        images = np.asarray(self.images)
        if wrong := np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3))).tolist():
            raise ValueError(
                f"images {wrong[:5]} are not finite; try dtype float32, or a smaller guidance scale"
            )
        return images
