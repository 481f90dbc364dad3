"""Renaming rules as data, and the one engine that carries them out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from checkpoints_convert.errors import CheckpointError


class Tensor(NamedTuple):
    """A tensor of a checkpoint, read when it is needed.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        read: Gives its values.
        release: Says that they are not needed any more.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]
    release: Callable[[], None] = lambda: None


Transform = Callable[[np.ndarray], np.ndarray]


class Rule(NamedTuple):
    """Where a parameter comes from.

    Attributes:
        target: Its name in this library, such as ``"block_0/qkv/kernel"``.
        sources: The tensors that it is made of, one beside the other along the last axis.
        transform: From each tensor's layout to the parameter's.
    """

    target: str
    sources: tuple[str, ...]
    transform: Transform


def same(tensor: np.ndarray) -> np.ndarray:
    """As it is: biases, norms, tables."""
    return tensor


def linear(weight: np.ndarray) -> np.ndarray:
    """``[out, in]``, or a 1x1 convolution ``[out, in, 1, 1]``, to ``[in, out]``."""
    return (weight[:, :, 0, 0] if weight.shape[2:] == (1, 1) else weight).T


def conv(weight: np.ndarray) -> np.ndarray:
    """``[out, in, height, width]`` to ``[height, width, in, out]``."""
    return weight.transpose(2, 3, 1, 0)


def patches(weight: np.ndarray) -> np.ndarray:
    """A convolution whose stride is its size, as a product with flattened patches."""
    return conv(weight).reshape(-1, len(weight))


def layer(target: str, *sources: str, transform: Transform = linear) -> Iterator[Rule]:
    """The rules of a layer's weight and bias."""
    yield Rule(f"{target}/kernel", tuple(f"{s}.weight" for s in sources), transform)
    yield Rule(f"{target}/bias", tuple(f"{s}.bias" for s in sources), same)


def norm_layer(target: str, source: str) -> Iterator[Rule]:
    """The rules of a norm's scale and bias."""
    yield Rule(f"{target}/scale", (f"{source}.weight",), same)
    yield Rule(f"{target}/bias", (f"{source}.bias",), same)


def _made_shape(rule: Rule, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """The shape that a rule gives, without reading anything; None where it does not apply."""
    try:
        shapes = [
            rule.transform(np.broadcast_to(np.int8(0), tensors[s].shape)).shape
            for s in rule.sources
        ]
    except (ValueError, IndexError):
        return None
    if len({shape[:-1] for shape in shapes}) > 1 or not shapes[0]:
        return None
    return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))


def grouped(names: Iterable[str]) -> str:
    """Names in a few words: those that differ only in numbers are said once.

    >>> grouped(["a.0.w", "a.1.w", "a.2.w", "a.5.w", "b"])
    'a.*.w with * = 0-2 5; b'
    """
    groups: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for name in names:
        numbers = tuple(map(int, re.findall(r"(?<=[._])\d+(?=[._])", name)))
        groups[re.sub(r"(?<=[._])\d+(?=[._])", "*", name)].append(numbers)

    def text(pattern: str, found: list[tuple[int, ...]]) -> str:
        if len(found) == 1:
            for number in found[0]:
                pattern = pattern.replace("*", str(number), 1)
            return pattern
        if pattern.count("*") > 1:
            return f"{pattern} with * = " + " ".join(",".join(map(str, n)) for n in sorted(found))
        runs: list[list[int]] = []
        for (number,) in sorted(found):
            if runs and number == runs[-1][1] + 1:
                runs[-1][1] = number
            else:
                runs.append([number, number])
        return f"{pattern} with * = " + " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)

    return "; ".join(text(pattern, found) for pattern, found in groups.items())


def check(
    rules: Iterable[Rule],
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str] = (),
) -> None:
    """Compares rules, tensors and the wanted parameters, reading none.

    Args:
        rules: One for each parameter.
        tensors: The checkpoint.
        expected: The parameters' shapes.
        ignored: Tensors that are left out on purpose.

    Raises:
        CheckpointError: If a tensor is missing, is used by no rule, or has another shape or is not
            of floats; says all there is to say.
    """
    rules = list(rules)
    targets = [rule.target for rule in rules]
    assert sorted(targets) == sorted(expected), "rules and module differ"
    sources = [source for rule in rules for source in rule.sources]
    assert len(sources) == len(set(sources)), "two rules use one tensor"
    problems = []
    missing = [s for s in sources if s not in tensors]
    if missing:
        problems.append(f"missing: {grouped(missing)}")
    extra = tensors.keys() - set(sources) - set(ignored)
    if extra:
        problems.append(f"not expected: {grouped(sorted(extra))}")
    integers = [s for s in sources if s in tensors and not _is_float(tensors[s].dtype)]
    if integers:
        problems.append(f"not of floats: {grouped(integers)}")
    wrong = []
    for rule in rules:
        if not all(source in tensors for source in rule.sources):
            continue
        if _made_shape(rule, tensors) != expected[rule.target]:
            shapes = " + ".join(str(tensors[s].shape) for s in rule.sources)
            wrong.append(f"{' + '.join(rule.sources)} {shapes} for {rule.target} "
                         f"{expected[rule.target]}")  # fmt: skip
    if wrong:
        problems.append(f"wrong shape: {'; '.join(wrong)}")
    if problems:
        raise CheckpointError(" | ".join(problems))


def _is_float(dtype: np.dtype[Any]) -> bool:
    # bfloat16 and its like are not sub-dtypes of NumPy's floats.
    return dtype.kind in "f" or dtype.name.startswith(("bfloat", "float"))


def fill(
    rules: Iterable[Rule], tensors: Mapping[str, Tensor], progress: Callable[[int], Any]
) -> dict[str, jax.Array]:
    """The parameters by name, float32, of what ``check`` has passed.

    ``progress`` is told the bytes of each tensor read.

    Raises:
        CheckpointError: If a value is not finite; names every such tensor.
    """
    # Not on an accelerator, whose memory need not hold a network that is only rewritten.
    host = jax.local_devices(backend="cpu")[0]
    params, bad = {}, []
    for rule in rules:
        parts = []
        for source in rule.sources:
            tensor = tensors[source]
            # A copy, also where nothing changes: it stays when the file is let go.
            with np.errstate(over="ignore"):  # told of below
                part = np.array(rule.transform(tensor.read()), np.float32, order="C")
            tensor.release()
            if not np.isfinite(part).all():
                bad.append(source)
            parts.append(part)
            progress(part.nbytes)
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        params[rule.target] = jax.device_put(whole, host)
    if bad:
        raise CheckpointError(
            f"NaN or infinite values in: {grouped(bad)}; this checkpoint cannot make images"
        )
    return params
