"""Labelled grids of images, as people look at them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tstitch_jax.core.files import check_writable, whole_file

if TYPE_CHECKING:
    from PIL.Image import Image

INK, PAPER = (30, 30, 30), (255, 255, 255)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0 .. 255, rounded; values outside are clipped."""
    return np.rint((np.clip(np.asarray(images), -1, 1) + 1) * 127.5).astype(np.uint8)


def grid(
    images: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str = "",
    footer: str = "",
) -> Image:
    """A grid with a label left of each row and above each column.

    Args:
        images: float ``[R, K, H, W, C]`` in [-1, 1], with 1 or 3 channels.
        rows: R labels; a line break within one is kept.
        columns: K labels, turned where they are wider than the images.
        title: Above; as the footer, it is broken where it is wider than the images.
        footer: Below.
    """
    from PIL import Image, ImageDraw, ImageFont

    count, across, height, width, channels = images.shape
    zoom, gap = max(1, round(72 / height)), 3
    pixels = to_uint8(images).repeat(zoom, axis=2).repeat(zoom, axis=3)
    if channels == 1:
        pixels = pixels.repeat(3, axis=4)
    height, width = height * zoom, width * zoom
    font, large = ImageFont.load_default(14), ImageFont.load_default(18)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def size(text: str, font) -> tuple[int, int]:
        left, top, right, bottom = ruler.multiline_textbbox((0, 0), text, font=font)
        return int(right - left) + 2, int(bottom - top) + 8

    turned = any(size(c, font)[0] > width for c in columns)
    label_widths = [size(c, font)[0] for c in columns]
    left = max([size(r, font)[0] for r in rows], default=0) + 22
    right = left + across * (width + gap) + 8

    def broken(text: str, font) -> str:
        """Into lines that are no wider than the images, or than 300 pixels."""
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and size(longer, font)[0] + 20 > max(right, 300):
                lines.append(word)
            else:
                lines[-1] = longer
        return "\n".join(lines)

    title, footer = broken(title, large), broken(footer, font)
    head = (max(label_widths) if turned else 20) + 8
    top = (size(title, large)[1] + 12 if title else 6) + head
    total = max(right, size(title, large)[0] + 20, size(footer, font)[0] + 20)
    bottom = top + count * (height + gap)
    tail = size(footer, font)[1] + 14 if footer else 6
    canvas = Image.new("RGB", (total, bottom + tail), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((10, 8), title, INK, large)
    for j, text in enumerate(columns):
        x = left + j * (width + gap)
        if turned:
            label = Image.new("RGB", (head, 20), PAPER)
            ImageDraw.Draw(label).text((4, 1), text, INK, font)
            canvas.paste(label.rotate(90, expand=True), (x + width // 2 - 10, top - head))
        else:
            draw.text((x + (width - label_widths[j]) // 2, top - head + 4), text, INK, font)
    for i, text in enumerate(rows):
        y = top + i * (height + gap)
        draw.multiline_text((10, y + (height - size(text, font)[1]) // 2), text, INK, font)
        for j in range(across):
            canvas.paste(Image.fromarray(pixels[i, j]), (left + j * (width + gap), y))
    if footer:
        draw.multiline_text((10, bottom + 6), footer, INK, font)
    return canvas


def read_picture(path: str | os.PathLike[str], height: int, width: int) -> np.ndarray:
    """An image file as float32 ``[H, W, 3]`` in [-1, 1], scaled to cover that size and cut to it.

    Raises:
        ValueError: If it is no image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    except Exception as error:  # of a file that is damaged PIL raises many kinds
        raise ValueError(f"cannot read the image {path}: {error}") from None
    return np.asarray(fitted, np.float32) / 127.5 - 1


def check_png(path: str | os.PathLike[str]) -> Path:
    """Makes sure, before long work, that a PNG can be written there; makes its folder.

    Raises:
        ValueError: If it cannot.
    """
    file = Path(path)
    if file.suffix.lower() != ".png":
        raise ValueError(f"the picture must end in .png, got {file}")
    check_writable(file)
    return file


def write_png(image: Image, path: Path) -> None:
    """Writes the picture whole or not at all."""
    with whole_file(path) as stream:
        image.save(stream, format="PNG")
