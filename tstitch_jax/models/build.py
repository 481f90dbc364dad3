"""Networks of their cards and parameters."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tstitch_jax.core.checks import shown
from tstitch_jax.core.denoisers import as_denoiser
from tstitch_jax.core.prediction import check_target
from tstitch_jax.core.schedules import make_schedule
from tstitch_jax.core.types import Condition, Params, Schedule
from tstitch_jax.models.cards import AutoencoderCard, BaseCard, Card, FeatureCard, TextEncoderCard
from tstitch_jax.models.convolution import FORMS, forms_of
from tstitch_jax.models.families import family_of, imported
from tstitch_jax.models.measure import compute_dtypes, count_params, module_macs, param_shapes
from tstitch_jax.models.tokenizer import make_tokenizer
from tstitch_jax.models.types import (
    Autoencoder,
    Coder,
    FeatureModel,
    FeatureNetwork,
    Network,
    TextEncoder,
    TextModel,
    Tokenizer,
)
from tstitch_jax.models.unet import UNet

C = TypeVar("C", bound=BaseCard)
K = TypeVar("K", FeatureCard, TextEncoderCard)

Files = Mapping[str, bytes] | None
"""The files of a tokenizer by name."""


def flatten(params: Params) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def checksum(params: Params) -> str:
    """SHA-256 over the names, shapes and float32 values of all parameters, in order of name."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flatten(params).items()):
        digest.update(f"{name} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf, dtype=np.float32).data)
    return digest.hexdigest()


def _hashable(value: Any) -> Any:
    """A value of a card's configuration as a module's field, with tuples in place of lists."""
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def module_of(card: BaseCard, dtype: Any = jnp.float32) -> Any:
    """The Flax module that a card describes, computing in ``dtype``.

    Raises:
        ValueError: If the architecture is unknown or does not take the configuration.
    """
    make = imported(family_of(card).module)
    more: dict[str, Any] = {}
    if isinstance(card, Card):
        more = dict(num_classes=card.num_classes, learned_variance=card.learned_variance)
        if card.context is not None:
            more["context"] = tuple(card.context)
    elif isinstance(card, FeatureCard) and card.num_classes:
        more = dict(num_classes=card.num_classes)
    if isinstance(card, (Card, AutoencoderCard, FeatureCard)):
        more["image_shape"] = tuple(card.image_shape)
    try:
        return make(
            **{k: _hashable(v) for k, v in card.config.items()},
            **more,
            dtype=dtype,
        )
    except TypeError as error:
        raise ValueError(f"{card.architecture} cannot be built: {error}") from None


class Prepared(NamedTuple):
    """A network's parameters, and what was computed of them alone before the loop."""

    params: Params
    forms: Any


@dataclasses.dataclass(frozen=True)
class FlaxApply:
    """A Flax module as a function of its parameters and inputs; equal modules make equal ones."""

    module: nn.Module

    def __call__(self, params: Params, *inputs: Any) -> jax.Array:
        variables = {"params": params}
        if isinstance(params, Prepared):
            variables = {"params": params.params, FORMS: params.forms}
        return self.module.apply(variables, *inputs)  # pyright: ignore[reportReturnType]

    def prepare(
        self, params: Params, shape: tuple[int, ...], cond: Condition, platform: str | None
    ) -> Params:
        """Transforms the kernels of convolutions, which a loop on a CPU would do in every step."""
        module: Any = self.module
        if platform != "cpu" or not isinstance(module, UNet) or module.dtype != jnp.float32:
            return params
        x, rows = jax.ShapeDtypeStruct(shape, jnp.float32), shape[0]
        inputs = jax.tree.map(
            lambda v: jax.ShapeDtypeStruct((rows, *v.shape[1:]), v.dtype), cond.given
        )
        apply = functools.partial(module.apply, mutable=[FORMS])
        time = jax.ShapeDtypeStruct((rows,), jnp.float32)
        _, made = jax.eval_shape(apply, {"params": param_shapes(module)}, x, time, inputs)
        forms = forms_of(params, made.get(FORMS, {}))
        return Prepared(params, forms) if jax.tree.leaves(forms) else params


def check_classes(card: Card | FeatureCard) -> None:
    """Raises ValueError if the card's classes and their names, or its context, do not fit."""
    context = card.context if isinstance(card, Card) else None
    if context is not None:
        whole = len(context) == 2 and all(type(n) is int and n > 0 for n in context)
        if card.num_classes or not whole:
            raise ValueError(
                "a context is a length and a width above 0, without classes, got "
                f"{context} and {card.num_classes} classes"
            )
    elif card.num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {card.num_classes}")
    if len(card.class_names) not in (0, card.num_classes):
        raise ValueError(f"{len(card.class_names)} names for {card.num_classes} classes")


def check_card(card: Card) -> Schedule:
    """The schedule of a card.

    Raises:
        ValueError: If the card is of no network that could be trained or sampled.
    """
    check_target(card.target)
    try:
        schedule = make_schedule(**card.schedule)
    except TypeError as error:
        raise ValueError(f"the card's schedule is not one: {error}") from None
    if card.target == "eps" and schedule.alpha.min() == 0:
        raise ValueError(
            f"an eps network cannot say x0 where the schedule {schedule.name!r} has "
            "no signal; train it for 'flow' or 'v'"
        )
    check_classes(card)
    channels = card.guidance_channels
    if channels is not None and not 0 < channels <= card.image_shape[2]:
        raise ValueError(f"guidance_channels must be 1 to {card.image_shape[2]}, got {channels}")
    return schedule


def check_params(module: Any, params: Params) -> None:
    """Compares the whole tree with what the module has.

    Raises:
        ValueError: If they do not fit; lists every missing, extra and misshapen parameter.
    """
    expected, found = flatten(param_shapes(module)), flatten(params)
    problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"extra {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} has shape {found[name].shape}, expected {expected[name].shape}"
        for name in sorted(expected.keys() & found.keys())
        if found[name].shape != expected[name].shape
    ]
    if problems:
        raise ValueError(f"parameters do not fit the card: {'; '.join(problems)}")


def complete(card: C, module: Any, params: Params) -> C:
    """The card with the number of parameters, the multiply-adds and the checksum filled in.

    Of parameters that are shapes there is no checksum.
    """
    shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    found = "" if shapes else checksum(params)
    return dataclasses.replace(
        card, num_params=count_params(params), macs=module_macs(module), checksum=found
    )


def _cast(leaf: Any, dtype: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
    return leaf.astype(dtype) if isinstance(leaf, np.ndarray) else jnp.asarray(leaf, dtype)


def _on_device(params: Params) -> Params:
    shape = jax.ShapeDtypeStruct
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, shape) else jnp.asarray(leaf), params)


def parse_dtype(dtype: Any) -> Any:
    """``jnp.float32`` or ``jnp.bfloat16``, always the same object, as modules are compared by it.

    Raises:
        ValueError: If it is another dtype.
    """
    try:
        return {jnp.dtype(d): d for d in (jnp.float32, jnp.bfloat16)}[jnp.dtype(dtype)]
    except (TypeError, KeyError):
        raise ValueError(f"dtype must be float32 or bfloat16, got {shown(dtype)}") from None


def _fit(card: C, params: Params, dtype: Any) -> tuple[Any, Params, C]:
    """The module of a card, its parameters as it holds them, and the card completed."""
    module = module_of(card, parse_dtype(dtype))
    check_params(module, params)
    params = jax.tree.map(lambda leaf: _cast(leaf, jnp.float32), params)
    card = complete(card, module, params)
    # What the module casts in every pass anyway is cast once: the same numbers in less memory.
    return module, jax.tree.map(_cast, params, compute_dtypes(module)), card


def _network(card: Card, params: Params, dtype: Any) -> Network:
    schedule = check_card(card)
    module, params, card = _fit(card, params, dtype)
    denoiser = as_denoiser(FlaxApply(module), params, card.target, card.learned_variance)
    rows, multiple = (getattr(module, name, None) for name in ("rows", "multiple"))
    return Network(denoiser, card, schedule, rows, multiple)


def outline(card: BaseCard, dtype: Any = jnp.float32) -> Network:
    """The network of a card without parameters, for checks that need none.

    Raises:
        ValueError: If the card is not of a network that can be sampled.
    """
    if not isinstance(card, Card):
        given = {AutoencoderCard: "autoencoder", TextEncoderCard: "text_encoder"}.get(type(card))
        hint = f"give it as {given}" if given else "give a denoiser"
        raise ValueError(f"{card.name} is not a denoiser but {card.architecture}; {hint}")
    module = module_of(card, parse_dtype(dtype))
    rows, multiple = (getattr(module, name, None) for name in ("rows", "multiple"))
    return Network(None, card, check_card(card), rows, multiple)


def _autoencoder(card: AutoencoderCard, params: Params, dtype: Any) -> Autoencoder:
    if not card.scaling_factor > 0:
        raise ValueError(f"scaling_factor must be positive, got {card.scaling_factor}")
    module, params, card = _fit(card, params, dtype)
    coder = Coder(params, module, card.scaling_factor)
    return Autoencoder(coder, card, module.factor, module.latent_channels)


def fit_tokenizer(files: Mapping[str, bytes], module: Any) -> tuple[Tokenizer, str]:
    """The tokenizer of a module that takes texts, and the checksum of its files.

    Raises:
        ValueError: If it is damaged, or of another vocabulary.
    """
    tokenizer = make_tokenizer(files, module.tokens)
    if tokenizer.size != module.vocabulary:
        raise ValueError(
            f"the tokenizer knows {tokenizer.size} tokens, the network {module.vocabulary}; give "
            "the tokenizer that it was trained with"
        )
    lines = (f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    return tokenizer, hashlib.sha256("".join(lines).encode()).hexdigest()


def _tokenized(card: K, files: Mapping[str, bytes] | None, module: Any) -> tuple[K, Any]:
    """The card with the checksum of a tokenizer's files, and the tokenizer, if there is one."""
    tokenizer, digest = (None, "") if files is None else fit_tokenizer(files, module)
    return dataclasses.replace(card, tokenizer_checksum=digest), tokenizer


def _text_encoder(
    card: TextEncoderCard, params: Params, dtype: Any, files: Mapping[str, bytes] | None
) -> TextEncoder:
    module, params, card = _fit(card, params, dtype)
    card, tokenizer = _tokenized(card, files, module)
    return TextEncoder(TextModel(params, module), card, module.tokens, module.width, tokenizer)


def _feature_network(
    card: FeatureCard, params: Params, dtype: Any, files: Mapping[str, bytes] | None
) -> FeatureNetwork:
    if not takes_texts(card):
        check_classes(card)
    module, params, card = _fit(card, params, dtype)
    tokenizer = None
    if takes_texts(card):
        card, tokenizer = _tokenized(card, files, module)
    return FeatureNetwork(FeatureModel(params, module), card, str(jnp.dtype(dtype)), tokenizer)


def takes_texts(card: BaseCard) -> bool:
    """Whether the network of a card reads tokens, so that its folder holds a tokenizer."""
    return hasattr(module_of(card), "vocabulary")


def build(
    card: BaseCard, params: Params, dtype: Any, tokenizer: Mapping[str, bytes] | None = None
) -> Any:
    """The network of a card and of parameters that stay where they are; see ``make_network``."""
    if isinstance(card, AutoencoderCard):
        return _autoencoder(card, params, dtype)
    if isinstance(card, TextEncoderCard):
        return _text_encoder(card, params, dtype, tokenizer)
    if isinstance(card, FeatureCard):
        return _feature_network(card, params, dtype, tokenizer)
    assert isinstance(card, Card)
    return _network(card, params, dtype)


@overload
def make_network(card: Card, params: Params, dtype: Any = ...) -> Network: ...
@overload
def make_network(card: AutoencoderCard, params: Params, dtype: Any = ...) -> Autoencoder: ...
@overload
def make_network(
    card: TextEncoderCard, params: Params, dtype: Any = ..., *, tokenizer: Files = ...
) -> TextEncoder: ...
@overload
def make_network(
    card: FeatureCard, params: Params, dtype: Any = ..., *, tokenizer: Files = ...
) -> FeatureNetwork: ...
def make_network(
    card: BaseCard, params: Params, dtype: Any = jnp.float32, *, tokenizer: Files = None
) -> Any:
    """The network of a card and parameters; fills in the card's sizes and checksum.

    Args:
        card: What the network is. Its class decides what is returned.
        params: Its parameters, a nested dict of float arrays; or their shapes
            (``jax.ShapeDtypeStruct``), to compile for a network that is not there.
        dtype: The compute dtype, float32 or bfloat16. The network then holds the parameters that
            are only used so in that dtype, the others in float32.
        tokenizer: Of a network that reads texts, the files of its tokenizer by name, as another
            one's ``tokenizer.files`` has them; None if its tokens come from elsewhere.

    Raises:
        ValueError: If card and parameters do not fit (the error lists every missing, extra and
            misshapen parameter), or the tokenizer is damaged or has another vocabulary.
    """
    return build(card, _on_device(params), dtype, tokenizer)
