"""Networks of their cards and parameters."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tstitch_jax.core.checks import shown, unknown
from tstitch_jax.core.prediction import as_denoiser, check_target, in_chunks
from tstitch_jax.core.schedules import make_schedule
from tstitch_jax.core.types import Cond, Denoiser, Params, Schedule
from tstitch_jax.models.autoencoder import at_once
from tstitch_jax.models.cards import AutoencoderCard, BaseCard, Card, FeatureCard, TextEncoderCard
from tstitch_jax.models.convolution import FORMS, forms_of
from tstitch_jax.models.families import (
    ARCHITECTURES,
    compute_dtypes,
    count_params,
    module_macs,
    param_shapes,
)
from tstitch_jax.models.tokenizer import make_tokenizer
from tstitch_jax.models.types import (
    Autoencoder,
    FeatureNetwork,
    Features,
    Network,
    Precomputed,
    TextEncoder,
    Tokenizer,
)

C = TypeVar("C", bound=BaseCard)


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


def module_of(card: BaseCard, dtype: Any = jnp.float32) -> Any:
    """The Flax module that a card describes, computing in ``dtype``.

    Raises:
        ValueError: If the architecture is unknown or does not take the configuration.
    """
    if card.architecture not in ARCHITECTURES:
        raise unknown("architecture", card.architecture, ARCHITECTURES)
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
        return ARCHITECTURES[card.architecture](
            **{k: tuple(v) if isinstance(v, list) else v for k, v in card.config.items()},
            **more,
            dtype=dtype,
        )
    except TypeError as error:
        raise ValueError(f"{card.architecture} cannot be built: {error}") from None


@functools.cache
def _denoiser(module: nn.Module, target: str, learned_variance: bool) -> Denoiser:
    # Cached, so that loading a network twice gives the same function, which jit knows again.
    def apply(params: Params, x: jax.Array, time: jax.Array, cond: Cond) -> jax.Array:
        variables = {"params": params}
        if isinstance(params, Precomputed):
            variables = {"params": params.params, FORMS: params.forms}
        return module.apply(variables, x, time, cond)  # pyright: ignore

    return as_denoiser(apply, target, learned_variance)


@functools.cache
def _precompute(module: nn.Module) -> Callable[[Params, Any, Any], Any]:
    # Cached as denoisers are.
    @functools.cache
    def wanted(shape: tuple[int, ...], cond: jax.ShapeDtypeStruct) -> Any:
        given = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, shape[:1]))
        apply = functools.partial(module.apply, mutable=[FORMS])
        _, made = jax.eval_shape(apply, {"params": param_shapes(module)}, *given, cond)
        return made.get(FORMS, {})

    def precompute(params: Params, x: Any, cond: Any) -> Any:
        return forms_of(params, wanted(x.shape, jax.ShapeDtypeStruct(cond.shape, cond.dtype)))

    return precompute


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


def _fit(card: C, params: Params, dtype: Any) -> tuple[Any, Params, C]:
    """The module of a card, its parameters as it holds them, and the card completed."""
    try:
        # Always the same object of equal ones, since a module is known again by it.
        dtype = {jnp.dtype(d): d for d in (jnp.float32, jnp.bfloat16)}[jnp.dtype(dtype)]
    except (TypeError, KeyError):
        raise ValueError(f"dtype must be float32 or bfloat16, got {shown(dtype)}") from None
    module = module_of(card, dtype)
    check_params(module, params)
    params = jax.tree.map(lambda leaf: _cast(leaf, jnp.float32), params)
    card = complete(card, module, params)
    # What the module casts in every pass anyway is cast once: the same numbers in less memory.
    return module, jax.tree.map(_cast, params, compute_dtypes(module)), card


def _network(card: Card, params: Params, dtype: Any) -> Network:
    schedule = check_card(card)
    module, params, card = _fit(card, params, dtype)
    denoiser = _denoiser(module, card.target, card.learned_variance)
    has_forms = card.architecture == "unet" and module.dtype == jnp.float32
    return Network(
        denoiser, params, card, schedule,
        rows=getattr(module, "rows", None),
        multiple=getattr(module, "multiple", None),
        precompute=_precompute(module) if has_forms else None,
    )  # fmt: skip


def _autoencoder(card: AutoencoderCard, params: Params, dtype: Any) -> Autoencoder:
    if not card.scaling_factor > 0:
        raise ValueError(f"scaling_factor must be positive, got {card.scaling_factor}")
    module, params, card = _fit(card, params, dtype)
    coders = _coders(module, card.scaling_factor)
    return Autoencoder(*coders, params, card, module.factor, module.latent_channels)


@functools.cache
def _extractor(module: nn.Module, method: str) -> Callable[[Params, jax.Array], Features]:
    # Cached as denoisers are.
    def extract(params: Params, pixels: jax.Array) -> Features:
        pixels = jnp.asarray(pixels, jnp.float32)
        return module.apply({"params": params}, pixels, method=method)  # pyright: ignore

    return extract


def _feature_network(card: FeatureCard, params: Params, dtype: Any) -> FeatureNetwork:
    check_classes(card)
    module, params, card = _fit(card, params, dtype)
    return FeatureNetwork(_extractor(module, "__call__"), params, card, str(jnp.dtype(dtype)))


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


@functools.cache
def _encoder(module: nn.Module, method: str) -> Callable[[Params, jax.Array], jax.Array]:
    # Cached as denoisers are.
    def encode(params: Params, ids: jax.Array) -> jax.Array:
        ids = jnp.asarray(ids, jnp.int32)
        return module.apply({"params": params}, ids, method=method)  # pyright: ignore

    return encode


def _text_encoder(
    card: TextEncoderCard, params: Params, dtype: Any, files: Mapping[str, bytes] | None = None
) -> TextEncoder:
    module, params, card = _fit(card, params, dtype)
    tokenizer, digest = (None, "") if files is None else fit_tokenizer(files, module)
    card = dataclasses.replace(card, tokenizer_checksum=digest)
    encode = _encoder(module, "__call__")
    return TextEncoder(encode, params, card, module.tokens, module.width, tokenizer)


def _clip(
    card: FeatureCard, params: Params, dtype: Any, files: Mapping[str, bytes] | None = None
) -> FeatureNetwork:
    module, params, card = _fit(card, params, dtype)
    tokenizer, digest = (None, "") if files is None else fit_tokenizer(files, module)
    return FeatureNetwork(
        _extractor(module, "images"),
        params,
        dataclasses.replace(card, tokenizer_checksum=digest),
        str(jnp.dtype(dtype)),
        _encoder(module, "texts"),
        tokenizer,
    )


def make_network(card: Card, params: Params, dtype: Any = jnp.float32) -> Network:
    """A network of its card and parameters; fills in the card's sizes and checksum.

    Args:
        card: What the network is.
        params: Its parameters, a nested dict of float arrays; or their shapes
            (``jax.ShapeDtypeStruct``), to compile for a network that is not there.
        dtype: What it computes in, float32 or bfloat16. The network then holds the parameters that
            are only used so in that dtype, the others in float32.

    Raises:
        ValueError: If card and parameters do not fit; lists every missing, extra and misshapen one.
    """
    return _network(card, _on_device(params), dtype)


@functools.cache
def _coders(module: Any, scale: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
    # Cached for the same reason.
    depth, multiple = module.image_shape[2], module.factor

    def check(what: str, x: jax.Array, channels: int, multiple: int) -> None:
        if not (
            x.ndim == 4
            and x.shape[3] == channels
            and not (x.shape[1] % multiple or x.shape[2] % multiple)
            and jnp.issubdtype(x.dtype, jnp.floating)
        ):
            sides = f", H and W multiples of {multiple}" if multiple > 1 else ""
            raise ValueError(
                f"{what} must be floats [B, H, W, {channels}]{sides}, got {x.dtype} {x.shape}"
            )

    def encode(params: Params, images: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        def one(images: jax.Array, *noise: jax.Array) -> jax.Array:
            mean, std = module.apply({"params": params}, images, method="moments")
            return scale * (mean + std * noise[0] if noise else mean)

        check("images", images, depth, multiple)
        batch, height, width = images.shape[:3]
        expected = (batch, height // multiple, width // multiple, module.latent_channels)
        if noise is not None and noise.shape != expected:
            raise ValueError(f"noise must be {expected} like the latents, got {noise.shape}")
        more = () if noise is None else (noise,)
        return in_chunks(one, at_once(height * width), images, *more)

    def decode(params: Params, latents: jax.Array) -> jax.Array:
        def one(latents: jax.Array) -> jax.Array:
            return module.apply({"params": params}, latents / scale, method="decode")

        check("latents", latents, module.latent_channels, 1)
        pixels = latents.shape[1] * latents.shape[2] * multiple**2
        return in_chunks(one, at_once(pixels), latents)

    return encode, decode


def make_autoencoder(
    card: AutoencoderCard, params: Params, dtype: Any = jnp.float32
) -> Autoencoder:
    """An autoencoder of its card and parameters, as ``make_network`` makes a network."""
    return _autoencoder(card, _on_device(params), dtype)


def make_feature_network(
    card: FeatureCard,
    params: Params,
    dtype: Any = jnp.float32,
    *,
    tokenizer: Mapping[str, bytes] | None = None,
) -> FeatureNetwork:
    """A feature network of its card and parameters, as ``make_network`` makes a network.

    One that knows texts may be given the files of its tokenizer, as ``make_text_encoder`` is.
    """
    if card.architecture == "clip":
        return _clip(card, _on_device(params), dtype, tokenizer)
    return _feature_network(card, _on_device(params), dtype)


def make_text_encoder(
    card: TextEncoderCard,
    params: Params,
    dtype: Any = jnp.float32,
    *,
    tokenizer: Mapping[str, bytes] | None = None,
) -> TextEncoder:
    """A text encoder of its card and parameters, as ``make_network`` makes a network.

    Args:
        card, params, dtype: As of ``make_network``.
        tokenizer: The files of its tokenizer by name, as another encoder's ``tokenizer.files`` has
            them; None where ``encode`` is given ids from elsewhere.

    Raises:
        ValueError: Also if the tokenizer is damaged or of another vocabulary.
    """
    return _text_encoder(card, _on_device(params), dtype, tokenizer)


DENOISER = (Card, _network)


KINDS_OF_CARD: dict[str, tuple[Any, Callable[..., Any]]] = {
    "autoencoder": (AutoencoderCard, _autoencoder),
    "inception": (FeatureCard, _feature_network),
    "classifier": (FeatureCard, _feature_network),
    "clip": (FeatureCard, _clip),
    "clip_text": (TextEncoderCard, _text_encoder),
}
"""The card of an architecture, and what makes the network of it."""


TAKE_TEXTS = ("clip", "clip_text")
"""Architectures whose folders have a tokenizer."""
