"""The condition of several networks, from what a call of the sampler is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tstitch_jax.core.checks import is_list, shown
from tstitch_jax.core.types import Condition
from tstitch_jax.models.conditioning import Conditioner, ConditionRequest, check_texts


def _per_network(name: str, value: Any, count: int, single: bool) -> list[Any]:
    """One value for each network, from one for all or a list."""
    if single or not is_list(value):
        return [value] * count
    if len(value) != count:
        raise ValueError(
            f"{name} must be given once for all networks that take it, or as a list with one entry "
            f"for each of the {count}, got {len(value)}"
        )
    return list(value)


def _one_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | jax.Array) and np.ndim(value) == 3


def _one_list(labels: Any) -> bool:
    """Whether these are labels for all networks, not a list of such lists."""
    return not is_list(labels) or not len(labels) or not is_list(labels[0])


def make_condition(
    names: Sequence[str],
    conditioners: Sequence[Conditioner],
    guided: Sequence[bool],
    *,
    labels: Any = None,
    prompts: Any = None,
    cond: Any = None,
    negative: Any = None,
    text_encoder: Any = None,
) -> Condition:
    """A condition whose halves are tuples with an entry for each network.

    Labels go to the networks that take labels, prompts or contexts to the others. Each encoder
    encodes a text once.

    Args:
        names: The networks' names, for errors.
        conditioners: Their conditioners.
        guided: Which of them need the null half.
        labels, prompts, cond, negative: As in a call of the sampler.
        text_encoder: One for all networks that take prompts, or a list with one for each.

    Raises:
        ValueError: If something is missing, superfluous, or does not fit a network.
    """
    kinds = [conditioner.takes for conditioner in conditioners]
    if wrong := [kind for kind in kinds if kind not in ("labels", "prompts")]:
        raise ValueError(f"a conditioner takes 'labels' or 'prompts', got {shown(wrong[0])}")
    by_label = [k for k, kind in enumerate(kinds) if kind == "labels"]
    by_text = [k for k, kind in enumerate(kinds) if kind == "prompts"]
    requests: dict[int, ConditionRequest] = {}
    if by_label:
        if labels is None:
            raise ValueError(f"{names[by_label[0]]} is conditioned on classes; give labels")
        single = _one_list(labels)
        counts = {k: conditioners[k].example(1).null.item() for k in by_label} if single else {}
        for k, count in counts.items():
            if count != counts[by_label[0]]:
                raise ValueError(
                    f"{names[by_label[0]]} and {names[k]} cannot share labels: their number of "
                    f"classes differs, {counts[by_label[0]]} and {count}; give a list of labels "
                    "for each network"
                )
        cards = [getattr(conditioners[k], "card", None) for k in by_label]
        known = {card.class_names for card in cards if card is not None and card.class_names}
        if single and len(known) > 1 and not all(isinstance(each, str) for each in labels):
            raise ValueError(
                f"the classes of {' and '.join(names[k] for k in by_label)} have different names; "
                "give class names, or a list of labels for each network"
            )
        for k, each in zip(
            by_label, _per_network("labels", labels, len(by_label), single), strict=True
        ):
            requests[k] = ConditionRequest(labels=each)
    elif labels is not None:
        raise ValueError(f"{names[0]} does not take labels; give prompts")
    if by_text:
        if (cond is None) == (prompts is None):
            raise ValueError(
                f"{names[by_text[0]]} is conditioned on texts; give prompts, or the encoded texts "
                "as cond" + ", not both" * (cond is not None)
            )
        count = len(by_text)
        if prompts is None:
            values = zip(
                _per_network("cond", cond, count, _one_array(cond)),
                _per_network("negative", negative, count, _one_array(negative)),
                strict=True,
            )
            made = [ConditionRequest(cond=each, negative=other) for each, other in values]
        else:
            texts, encoded = check_texts("prompts", prompts), {}
            made = [
                ConditionRequest(prompts=texts, negative=negative, encoder=encoder, encoded=encoded)
                for encoder in _per_network("text_encoder", text_encoder, count, False)
            ]
        requests |= zip(by_text, made, strict=True)
    elif any(each is not None for each in (cond, prompts, negative, text_encoder)):
        raise ValueError(
            f"{names[0]} is conditioned on classes; leave out prompts, cond, negative and "
            "text_encoder"
        )
    conditions = [each.encode(requests[k], guided[k]) for k, each in enumerate(conditioners)]
    counts = dict.fromkeys(len(jax.tree.leaves(each.given)[0]) for each in conditions)
    if len(counts) > 1:
        raise ValueError(
            "every network needs labels or texts for the same images, got "
            f"{' and '.join(map(str, counts))}"
        )
    return Condition(tuple(each.given for each in conditions), tuple(e.null for e in conditions))


def check_condition(cond: Condition, guided: Sequence[bool]) -> Condition:
    """A condition made elsewhere, with halves that are tuples of an entry per network.

    Raises:
        ValueError: If it does not fit the number of networks, lacks a null half where one is
            guided, or is for different numbers of images.
    """
    count = len(guided)
    given, null = ((half,) if count == 1 and not isinstance(half, tuple) else half for half in cond)
    null = (None,) * count if null is None else null
    halves = (given, null)
    if any(not isinstance(half, tuple) or len(half) != count for half in halves):
        raise ValueError(
            f"a condition for {count} networks has halves that are tuples of {count} entries"
        )
    if any(scaled and entry is None for scaled, entry in zip(guided, null, strict=True)):
        raise ValueError(
            "guidance needs the null half of the condition; give it, or turn guidance off"
        )
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(halves)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(f"a condition has one leading batch axis, got sizes {sorted(sizes)}")
    unguided = [entry if scaled else None for scaled, entry in zip(guided, null, strict=True)]
    return Condition(given, tuple(unguided))
