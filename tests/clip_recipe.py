"""Texts and images that CLIP is tested with, and a small vocabulary; NumPy alone, as its goldens'
script runs where this project is not installed."""

import itertools

import numpy as np

IMAGE_SIZES = [(40, 56), (31, 20), (32, 32), (300, 199), (1, 2), (64, 500)]
"""Heights and widths of images that are brought to the image tower's size."""

CORPUS = """
a photograph of an astronaut riding a horse on the moon, highly detailed, 4k
a painting of a small house beside the sea in the evening, in the style of the old masters
the portrait of a woman with red hair and blue eyes, sharp focus, studio light, 85mm
an oil painting of a fox in the snow; trending, beautiful, intricate, elegant
two dogs and three cats are playing in the garden behind the house where they're living
it's raining in the city at night, neon lights are shining on the streets, the car's parked
a bowl of fruit on a wooden table, still life, soft light from the window on the left
mountains and a river under a cloudy sky, landscape photograph, wide angle, high resolution
don't, won't, can't, i've, i'll, i'd, we're, that's: the contractions of the language
an illustration of a robot reading a book in a library, digital art, by a famous artist
"""
"""What the vocabulary's merges are learned from."""

MERGES = 300


PROMPTS = ["a fox in the snow", "It's raining at 12 o'clock!", "", "mountains, wide angle"]
"""Texts that images are scored with."""


def byte_characters() -> list[str]:
    """A printable character for each byte, in the order of CLIP's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    characters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}
    return [characters[b] for b in (*printable, *rest)]


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens with their numbers, and the merges, of byte pair encoding (Sennrich et al. 2016)."""
    words: dict[tuple[str, ...], int] = {}
    for word in CORPUS.split():
        pieces = (*word[:-1], word[-1] + "</w>")
        words[pieces] = words.get(pieces, 0) + 1
    merges: list[tuple[str, str]] = []
    while len(merges) < MERGES:
        pairs: dict[tuple[str, str], int] = {}
        for pieces, times in words.items():
            for pair in itertools.pairwise(pieces):
                pairs[pair] = pairs.get(pair, 0) + times
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged: dict[tuple[str, ...], int] = {}
        for pieces, times in words.items():
            done: list[str] = []
            for piece in pieces:
                if done and (done[-1], piece) == best:
                    done[-1] += piece
                else:
                    done.append(piece)
            merged[tuple(done)] = merged.get(tuple(done), 0) + times
        words = merged
    characters = byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def texts() -> list[str]:
    """1,000 texts, most of them odd."""
    rng = np.random.default_rng(0)
    words = CORPUS.split()
    ranges = [
        (0x20, 0x7F), (0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700),
        (0x900, 0x980), (0xE00, 0xE80), (0x1100, 0x1200), (0x1E00, 0x2000), (0x2000, 0x2070),
        (0x2100, 0x2200), (0x3000, 0x3100), (0x4E00, 0x5000), (0xAC00, 0xAD00), (0xFB00, 0xFB50),
        (0xFF00, 0xFFF0), (0x1D400, 0x1D500), (0x1F300, 0x1F650), (0x00, 0x20),
    ]  # fmt: skip
    odd = [
        "'s", "'T", "'re", "'VE", "\u2019s", "<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>",
        "</w>", "\u0130stanbul", "STRASSE", "stra\u00dfe", "\u01c5", "\ufb01ne", "e\u0301",
        "\u00e9", "A\u030a", "\u212b", "\u03a3\u03a3", "\u1e9e", "12345", "1st", "3.14", "\u00bd",
        "\u0664",
        "a_b", "x-y", "...", "!!!", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u200b",
        "\u200d", "\ufeff", "\u0085", "\u2028", "\x00", "\x1f", "\x7f", "&amp;", "<b>", "((a:1.2))",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f",
        "\U0001f44d\U0001f3fd", "\u0e01\u0e33", "\u1112\u1161\u11ab", "\ud55c", "\u00ad",
    ]  # fmt: skip
    found = ["", " ", "  \n\t ", "a", "A", " a photograph ", *odd, "a " * 80, "x" * 400]
    while len(found) < 1000:
        parts = []
        for _ in range(int(rng.integers(1, 14 if len(found) % 10 else 70))):
            kind = rng.integers(4)
            if kind == 0:
                low, high = ranges[rng.integers(len(ranges))]
                parts.append("".join(map(chr, rng.integers(low, high, rng.integers(1, 8)))))
            elif kind == 1:
                parts.append(odd[rng.integers(len(odd))])
            else:
                word = words[rng.integers(len(words))]
                parts.append((word, word.upper(), word.title())[rng.integers(3)])
            parts.append(("", " ", "  ", ", ")[rng.integers(4)])
        found.append("".join(parts))
    return found


def pixels_of(size) -> np.ndarray:
    """Two images, smooth with noise and hard edges, uint8 ``[2, H, W, 3]``."""
    height, width = size
    rng = np.random.default_rng((height, width))
    rows, columns = np.linspace(0, 1, height), np.linspace(0, 1, width)
    wave = np.sin(9 * rows[:, None, None] + 6 * columns[:, None] + np.arange(3))
    noise = rng.standard_normal((2, height, width, 3))
    edge = 120 * (rows[:, None, None] > 0.5)
    return np.clip(90 + 80 * wave + edge + 40 * noise, 0, 255).astype(np.uint8)


def some(values, count=2000) -> np.ndarray:
    """At most ``count`` of the values, evenly spread."""
    flat = np.asarray(values).reshape(-1)
    return flat[np.linspace(0, flat.size - 1, min(count, flat.size)).astype(int)]
