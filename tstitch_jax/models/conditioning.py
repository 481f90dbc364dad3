"""Conditioners: how one network's conditioning is made of labels, texts or arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from tstitch_jax.core.checks import as_array, is_list, shown, unknown
from tstitch_jax.core.types import Condition
from tstitch_jax.models.cards import Card
from tstitch_jax.models.types import TextEncoder


@dataclasses.dataclass(frozen=True)
class ConditionRequest:
    """What one network is to be conditioned on, as a user gives it.

    Attributes:
        labels: Class labels of B images, as numbers or names.
        prompts: B texts.
        cond: The context itself, float32 ``[B, L, D]``, in place of texts.
        negative: What guidance leads away from: a text or B beside ``prompts`` (None is the empty
            text), a context for one image or B beside ``cond``.
        encoder: The text encoder, for ``prompts``.
        encoded: What encoders made of texts so far, shared by the requests of one call.
    """

    labels: Any = None
    prompts: Any = None
    cond: Any = None
    negative: Any = None
    encoder: Any = None
    encoded: dict[Any, jax.Array] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Conditioner(Protocol):
    """How the conditioning of one kind of network is made.

    Attributes:
        takes: ``"labels"`` or ``"prompts"``.
    """

    takes: ClassVar[str]

    def encode(self, request: ConditionRequest, guided: bool) -> Condition:
        """The condition of B images; without the null half unless ``guided``.

        Raises:
            ValueError: If the request does not fit the network.
        """
        ...

    def example(self, batch: int) -> Condition:
        """A condition of the right shapes and dtypes."""
        ...


@dataclasses.dataclass(frozen=True)
class Labels:
    """Conditions on class labels, int32 ``[B]``; the number of classes is the null label."""

    card: Card
    takes: ClassVar[str] = "labels"

    def encode(self, request: ConditionRequest, guided: bool) -> Condition:
        count, labels = self.card.num_classes, request.labels
        array = as_array(self._numbers(labels))
        if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                "labels must be a list of class numbers or names, one an image, "
                f"got {shown(labels)}"
            )
        if array.min() < 0 or array.max() >= count:
            wrong = [int(v) for v in array if not 0 <= v < count]
            wrong = ", ".join(map(str, wrong[:5]))
            raise ValueError(f"labels must be 0 to {count - 1}, got {wrong}")
        null = np.full(array.shape, count, np.int32) if guided else None
        return Condition(array.astype(np.int32), null)

    def _numbers(self, labels: Any) -> Any:
        """The labels with class names, in any case, replaced by their numbers."""
        if not is_list(labels) or not any(isinstance(each, str) for each in labels):
            return labels
        names, count = self.card.class_names, self.card.num_classes
        known = {name.lower(): i for i, name in enumerate(names)}
        for each in labels:
            if isinstance(each, str) and each.lower() not in known:
                raise unknown("label", each, names or [f"0 to {count - 1}"])
        return [known[each.lower()] if isinstance(each, str) else each for each in labels]

    def example(self, batch: int) -> Condition:
        count = self.card.num_classes
        labels = np.resize(np.arange(count, dtype=np.int32), batch)
        return Condition(labels, np.full_like(labels, count))


@dataclasses.dataclass(frozen=True)
class Texts:
    """Conditions on contexts, float32 ``[B, L, D]``, such as encoded texts."""

    card: Card
    takes: ClassVar[str] = "prompts"

    def encode(self, request: ConditionRequest, guided: bool) -> Condition:
        if request.cond is not None:
            return self._given(request, guided)
        encoder = check_encoder(request.encoder, self.card)
        negative = "" if request.negative is None else request.negative
        null = [negative] if isinstance(negative, str) else check_texts("negative", negative)
        if len(null) not in (1, len(request.prompts)):
            raise ValueError(
                f"negative must be one text or {len(request.prompts)}, one an image, "
                f"got {len(null)}"
            )

        def encoded(texts: Sequence[str]) -> jax.Array:
            key = id(encoder), tuple(texts)
            if key not in request.encoded:
                request.encoded[key] = encode_texts(encoder, texts)
            return request.encoded[key]

        given = encoded(request.prompts)
        return Condition(given, jnp.broadcast_to(encoded(null), given.shape) if guided else None)

    def _given(self, request: ConditionRequest, guided: bool) -> Condition:
        given, negative = self._context("cond", request.cond), request.negative
        if negative is None:
            if guided:
                raise ValueError(
                    "guidance needs the context of the empty text too; give negative=, or turn "
                    "guidance off (guidance=None, or cfg_scale=None in ts.sample)"
                )
            return Condition(given)
        if isinstance(negative, str):
            raise ValueError("negative must be a context where one is given; texts go with prompts")
        null = self._context("negative", negative)
        if null.shape[1] != given.shape[1] or len(null) not in (1, len(given)):
            raise ValueError(
                f"negative must be like the context, {given.shape}, or the same for all images, "
                f"got {null.shape}"
            )
        return Condition(given, np.broadcast_to(null, given.shape) if guided else None)

    def _context(self, name: str, value: Any) -> np.ndarray:
        array: Any = np.asarray(value) if isinstance(value, np.ndarray | jax.Array) else np.empty(0)
        if array.ndim != 3 or 0 in array.shape or not jnp.issubdtype(array.dtype, jnp.floating):
            kind = f"{array.dtype} {array.shape}" if array.size else shown(value)
            raise ValueError(f"{name} must be an array of floats [B, L, D], got {kind}")
        check_width(self.card, array.shape[2], f"{name} has them")
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds numbers that are not finite")
        return array

    def example(self, batch: int) -> Condition:
        assert self.card.context is not None
        zeros = np.zeros((batch, *self.card.context), np.float32)
        return Condition(zeros, zeros)


def check_texts(name: str, texts: Any) -> list[str]:
    """The texts as a list; raises ValueError unless there are some, all valid UTF-8."""
    if not is_list(texts) or not len(texts) or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"{name} must be a list of texts, one an image, got {shown(texts)}")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{name} holds a text that is not valid UTF-8: {shown(text)}"
            ) from None
    return list(texts)


_encode = jax.jit(lambda model, ids: model(ids))


def encode_texts(encoder: TextEncoder, texts: Sequence[str]) -> jax.Array:
    """The contexts of texts, float32 ``[B, L, D]``."""
    assert encoder.tokenizer is not None
    ids = jnp.asarray(encoder.tokenizer.encode(list(texts)), jnp.int32)
    return _encode(encoder.model, ids)


def check_width(card: Card, width: int, made: str) -> None:
    """Raises ValueError unless contexts of that width fit the network."""
    assert card.context is not None
    if width != card.context[1]:
        raise ValueError(
            f"{card.name} takes contexts of width {card.context[1]}, {made} of {width}; where "
            "networks differ in it, give one for each"
        )


def check_encoder(encoder: Any, card: Card) -> TextEncoder:
    """The text encoder; raises ValueError unless it makes contexts that fit the network."""
    if not isinstance(encoder, TextEncoder):
        name = card.text_encoder or "sd-text-encoder"
        raise ValueError(
            f"{card.name} takes encoded texts; give "
            f"text_encoder=ts.load({name!r}), got {shown(encoder)}"
        )
    if encoder.tokenizer is None:
        raise ValueError(f"the text encoder {encoder.card.name} has no tokenizer; give cond")
    check_width(card, encoder.width, f"the text encoder {encoder.card.name} makes them")
    return encoder
