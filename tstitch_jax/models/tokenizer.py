"""CLIP's byte pair encoding of texts, from the vocabulary that a checkpoint brings.

Radford et al. 2021, arXiv:2103.00020; Sennrich et al. 2016, arXiv:1508.07909.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from tstitch_jax.core.checks import shown
from tstitch_jax.models.types import Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"

PAIR = ("vocab.json", "merges.txt")
WHOLE = "tokenizer.json"
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
"""The files of a tokenizer: the pair or the whole one, and what may say how texts are filled up."""

WORD_END = "</w>"
"""What the last token of a word ends with."""

_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
"""What is a word: a contraction's end, letters, one digit, or other characters side by side."""


def read_tokenizer(folder: Path | epath.Path) -> dict[str, bytes]:
    """The files of a tokenizer by name.

    Raises:
        ValueError: If the folder holds none.
        OSError: If one cannot be read.
    """
    found = {
        name: (folder / name).read_bytes()
        for name in (*PAIR, WHOLE, *SETTINGS)
        if (folder / name).exists()
    }
    if found.keys() >= set(PAIR):
        found.pop(WHOLE, None)
    elif WHOLE in found:
        found = {name: text for name, text in found.items() if name not in PAIR}
    else:
        raise ValueError(
            f"{folder} has no tokenizer: expected {' and '.join(PAIR)}, or {WHOLE}, such as the "
            "folder tokenizer of a Stable Diffusion holds"
        )
    return found


def _json(name: str, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged or no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must hold a JSON object, got {type(value).__name__}")
    return value


def _from_whole(text: bytes) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """Vocabulary and merges of a ``tokenizer.json``, which must be one like CLIP's."""
    whole = _json(WHOLE, text)
    model = whole.get("model")
    if (
        not isinstance(model, dict)
        or model.get("type", "BPE") != "BPE"
        or model.get("end_of_word_suffix") != WORD_END
        or not isinstance(model.get("vocab"), dict)
        or not isinstance(model.get("merges"), list)
    ):
        raise ValueError(f"{WHOLE} is of another kind of tokenizer than CLIP's")
    added = whole.get("added_tokens") or []
    try:
        more = {token["content"]: token["id"] for token in added}
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{WHOLE} is damaged: {error!r}") from None
    return model["vocab"] | more, merges


def _from_pair(files: Mapping[str, bytes]) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    vocabulary, merges = PAIR
    try:
        lines = files[merges].decode().replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{merges} is damaged: {error}") from None
    # Only the first line can be a comment: "#" is a token, too.
    lines = lines[1:] if lines and lines[0].startswith("#version") else lines
    return _json(vocabulary, files[vocabulary]), [tuple(line.split(" ")) for line in lines if line]


def _padding(files: Mapping[str, bytes]) -> str:
    """The token that texts are filled up with: the end, unless the files name another."""
    for name in SETTINGS:
        token = _json(name, files[name]).get("pad_token") if name in files else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return END


def _machine(vocabulary: dict[str, int], merges: list[tuple[str, ...]]) -> Any:
    """The ``tokenizers`` library's program for one text, without start, end and filling."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer as Machine,
        models,
        normalizers,
        pre_tokenizers,
    )

    try:
        model = models.BPE(
            vocab=vocabulary,
            merges=merges,  # pyright: ignore[reportArgumentType]
            continuing_subword_prefix="",
            end_of_word_suffix=WORD_END,
            unk_token=END,
        )
    except Exception as error:  # the library raises bare ones
        raise ValueError(f"the merges do not fit the vocabulary: {error}") from None
    machine = Machine(model)
    machine.normalizer = normalizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    machine.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # Written out in a text, in lower case, they mean themselves.
    machine.add_special_tokens([AddedToken(each, normalized=False) for each in (START, END)])
    return machine


def make_tokenizer(files: Mapping[str, bytes], tokens: int) -> Tokenizer:
    """The tokenizer of the files that ``read_tokenizer`` gives.

    Args:
        files: Their contents by name.
        tokens: T, the length of a text with its start and its end.

    Raises:
        ValueError: If they are damaged, or of no tokenizer like CLIP's.
    """
    vocabulary, merges = _from_whole(files[WHOLE]) if WHOLE in files else _from_pair(files)
    numbers = sorted(n for n in vocabulary.values() if type(n) is int)
    if numbers != list(range(len(vocabulary))):
        raise ValueError("the tokenizer's vocabulary must number its tokens from 0, each once")
    bad = next((m for m in merges if len(m) != 2 or not all(type(x) is str for x in m)), None)
    if bad is not None:
        raise ValueError(f"the tokenizer's merges must be pairs, got {shown(bad)}")
    padding = _padding(files)
    for token in (START, END, padding):
        if token not in vocabulary:
            raise ValueError(f"the tokenizer's vocabulary has no {token}")
    machine = _machine(vocabulary, merges)
    return Tokenizer(
        _encoder(machine, tokens, *(vocabulary[t] for t in (START, END, padding))),
        dict(files),
        len(vocabulary),
    )


def _encoder(
    machine: Any, tokens: int, start: int, end: int, padding: int
) -> Callable[[Sequence[str]], np.ndarray]:
    def encode(texts: Sequence[Any]) -> np.ndarray:
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"texts must be a list of texts, got {shown(texts)}")
        rows = np.full((len(texts), tokens), padding, np.int32)
        for row, text in zip(rows, texts, strict=True):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError(f"a text is no UTF-8: {shown(text)}") from None
            found = machine.encode(text, add_special_tokens=False)
            ids, room = found.ids, tokens - 2
            if len(ids) > room:
                rest = text[found.offsets[room][0] :]
                warnings.warn(
                    f"a text of {len(ids)} tokens is cut to {room}; left out: {rest!r}",
                    stacklevel=2,
                )
            ids = [start, *ids[:room], end]
            row[: len(ids)] = ids
        return rows

    return encode
