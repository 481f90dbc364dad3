"""What networks are conditioned on: labels, or contexts such as encoded texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tstitch_jax.core.checks import is_list, shown
from tstitch_jax.core.types import Condition
from tstitch_jax.models.cards import Card
from tstitch_jax.models.types import TextEncoder
from tstitch_jax.sampling.checks import parse_labels

_encode = jax.jit(lambda model, ids: model(ids))


def check_texts(name: str, texts: Any) -> list[str]:
    """Texts as a list; raises ValueError unless there are some."""
    if not is_list(texts) or not len(texts) or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"{name} must be a list of texts, one an image, got {shown(texts)}")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} holds a text that is no UTF-8: {shown(text)}") from None
    return list(texts)


def encode_texts(encoder: TextEncoder, texts: Sequence[str]) -> jax.Array:
    """The contexts of texts, float32 ``[B, L, D]``."""
    assert encoder.tokenizer is not None
    ids = jnp.asarray(encoder.tokenizer.encode(list(texts)), jnp.int32)
    return _encode(encoder.model, ids)


def check_encoders(text_encoder: Any, cards: Sequence[Card]) -> list[TextEncoder]:
    """A text encoder for each network that takes contexts, from one for all or a list.

    Raises:
        ValueError: If one is none, has no tokenizer, or makes contexts of another width.
    """
    encoders = list(text_encoder) if is_list(text_encoder) else [text_encoder] * len(cards)
    if len(encoders) != len(cards):
        raise ValueError(
            f"give one text encoder, or one for each of the {len(cards)} networks that take a "
            f"context, got {len(encoders)}"
        )
    for encoder, card in zip(encoders, cards, strict=True):
        if not isinstance(encoder, TextEncoder):
            name = card.text_encoder or "sd-text-encoder"
            raise ValueError(
                f"{card.name} takes texts as a text encoder makes contexts of them; give "
                f"text_encoder=ts.load({name!r}), got {shown(encoder)}"
            )
        if encoder.tokenizer is None:
            raise ValueError(f"the text encoder {encoder.card.name} has no tokenizer; give context")
        _check_width(card, encoder.width, f"the text encoder {encoder.card.name} makes them")
    return encoders


def _check_width(card: Card, width: int, made: str) -> None:
    assert card.context is not None
    if width != card.context[1]:
        raise ValueError(
            f"{card.name} takes contexts of width {card.context[1]}, {made} of {width}; where "
            "networks differ in it, give one for each"
        )


def _of_texts(
    texts: list[str], negative: Any, encoders: list[TextEncoder], guided: Sequence[bool]
) -> list[Condition]:
    negative = "" if negative is None else negative
    nothing = [negative] if isinstance(negative, str) else check_texts("negative", negative)
    if len(nothing) not in (1, len(texts)):
        raise ValueError(
            f"negative must be one text or {len(texts)}, one an image, got {len(nothing)}"
        )
    made: dict[int, list[jax.Array]] = {}
    found = []
    for encoder, scaled in zip(encoders, guided, strict=True):
        if id(encoder) not in made:
            made[id(encoder)] = [encode_texts(encoder, each) for each in (texts, nothing)]
        given, null = made[id(encoder)]
        null = jnp.broadcast_to(null, given.shape) if scaled else None
        found.append(Condition(given, null))
    return found


def _contexts(name: str, value: Any, cards: Sequence[Card]) -> list[np.ndarray]:
    """Checked arrays for each network, from one for all or a list of them."""
    single = np.ndim(value) if isinstance(value, np.ndarray | jax.Array) else 0
    values = list(value) if is_list(value) and single != 3 else [value] * len(cards)
    if len(values) != len(cards):
        raise ValueError(
            f"{name} must be one array for all, or one for each of the {len(cards)} networks that "
            f"take a context, got {len(values)}"
        )
    found = []
    for each, card in zip(values, cards, strict=True):
        array: Any = np.asarray(each) if isinstance(each, np.ndarray | jax.Array) else np.empty(0)
        if array.ndim != 3 or 0 in array.shape or not jnp.issubdtype(array.dtype, jnp.floating):
            kind = f"{array.dtype} {array.shape}" if array.size else shown(each)
            raise ValueError(f"{name} must be an array of floats [B, L, D], got {kind}")
        _check_width(card, array.shape[2], f"{name} has them")
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds numbers that are not finite")
        found.append(array)
    return found


def _of_contexts(
    cards: Sequence[Card], context: Any, negative: Any, guided: Sequence[bool]
) -> list[Condition]:
    givens = _contexts("context", context, cards)
    if negative is None:
        if any(guided):
            raise ValueError(
                "guidance needs the context of no text too; give negative=, or cfg_scale=None"
            )
        return [Condition(given, None) for given in givens]
    if isinstance(negative, str):
        raise ValueError("negative must be a context where one is given; texts go with prompts")
    found = []
    nulls = _contexts("negative", negative, cards)
    for given, null, scaled in zip(givens, nulls, guided, strict=True):
        if null.shape[1] != given.shape[1] or len(null) not in (1, len(given)):
            raise ValueError(
                f"negative must be like the context, {given.shape}, or the same for all images, "
                f"got {null.shape}"
            )
        found.append(Condition(given, np.broadcast_to(null, given.shape) if scaled else None))
    return found


def make_conditions(
    cards: Sequence[Card],
    guided: Sequence[bool],
    *,
    labels: Any = None,
    context: Any = None,
    prompts: Any = None,
    negative: Any = None,
    text_encoder: Any = None,
) -> tuple[Condition, ...]:
    """What each network is conditioned on, of what ``sample`` takes.

    Labels go to the networks that have classes, contexts or encoded prompts to the others.

    Args:
        cards: Of the networks.
        guided: Whether each is guided.
        labels, context, prompts, negative, text_encoder: As ``sample`` takes them.

    Raises:
        ValueError: If something is missing, too much, or does not fit a network.
    """
    classes = [k for k, card in enumerate(cards) if card.context is None]
    others = [k for k, card in enumerate(cards) if card.context is not None]
    found: dict[int, Condition] = {}
    if classes:
        if labels is None:
            raise ValueError(f"{cards[classes[0]].name} is conditioned on classes; give labels")
        own = [cards[k] for k in classes]
        for k, card, given in zip(classes, own, parse_labels(labels, own), strict=True):
            null = np.full(given.shape, card.num_classes, np.int32) if guided[k] else None
            found[k] = Condition(given, null)
    elif labels is not None:
        raise ValueError(
            f"{cards[0].name} has no classes that labels could be of; give prompts or a context"
        )
    if others:
        own, scaled = [cards[k] for k in others], [guided[k] for k in others]
        if (context is None) == (prompts is None):
            raise ValueError(
                f"{own[0].name} is conditioned on a context, such as an encoded text; give "
                "prompts and a text_encoder, or a context" + ", not both" * (context is not None)
            )
        if prompts is None:
            if text_encoder is not None:
                raise ValueError("a text_encoder goes with prompts, not with a context")
            made = _of_contexts(own, context, negative, scaled)
        else:
            texts = check_texts("prompts", prompts)
            made = _of_texts(texts, negative, check_encoders(text_encoder, own), scaled)
        found |= zip(others, made, strict=True)
    elif any(each is not None for each in (context, prompts, negative, text_encoder)):
        raise ValueError(
            f"{cards[0].name} is conditioned on classes; leave out context, prompts, negative and "
            "text_encoder"
        )
    counts = {len(condition.given) for condition in found.values()}
    if len(counts) > 1:
        raise ValueError(
            "every network needs labels or contexts for the same images, got "
            f"{' and '.join(map(str, sorted(counts)))}"
        )
    return tuple(found[k] for k in range(len(cards)))
