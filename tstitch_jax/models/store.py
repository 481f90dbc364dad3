"""A network as a folder: ``card.json`` beside the parameters in Orbax's format."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tstitch_jax.core.checks import first_line, shown, unknown
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
from tstitch_jax.models.tokenizer import make_tokenizer, read_tokenizer
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
T = TypeVar("T")

IN_FLIGHT = 2**27
"""Bytes that are read or written at a time, unless one parameter is larger."""


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


TOKENIZER = "tokenizer"
"""Where a network folder keeps the files of its tokenizer."""


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


def replace_folder(path: Path, write: Callable[[Path], T]) -> T:
    """Runs ``write`` on a temporary folder beside ``path``, then puts it in ``path``'s place.

    Returns:
        What ``write`` returns.

    Raises:
        OSError: If the place cannot be written; ``path`` is then as it was.
    """
    shown, path = path, Path(os.path.realpath(path))  # a link goes on to point where it does
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
        raise OSError(error.errno, f"cannot write {shown}: {reason}") from error
    ours = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with _handled(_terminated, *[signal.SIGTERM] * ours):  # so that it, too, removes the folder
        try:
            result = write(temporary)
            os.chmod(temporary, 0o755)  # mkdtemp makes it private
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
                os.rename(path, old / path.name)
                try:
                    os.rename(temporary, path)
                finally:
                    if not path.exists():
                        os.rename(old / path.name, path)
                    shutil.rmtree(old)
            else:
                os.rename(temporary, path)
            return result
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_place(path: Path) -> None:
    """Raises ValueError if there is something in that place that is not a network folder."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{str(path)!r} is no UTF-8; choose another name") from None
    if (
        path.exists()
        and not (path / "card.json").exists()
        and not (path.is_dir() and not any(path.iterdir()))
    ):
        raise ValueError(f"{path} exists and is not a network folder; choose another place")


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Silences another library's logger, which says at length what the one error will say."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _no_echo() -> Iterator[None]:
    """When Orbax fails, its other threads call an event loop that is closed; that is not shown."""

    def show(problem: Any) -> None:
        if "Event loop is closed" not in str(problem.exc_value):
            hook(problem)

    hook, sys.unraisablehook = sys.unraisablehook, show
    try:
        with quiet("absl"), quiet("asyncio"):
            yield
    except Exception:
        time.sleep(0.2)  # for them to come
        raise
    finally:
        sys.unraisablehook = hook


@contextlib.contextmanager
def _handled(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """Signals go to ``handler`` within it, where Python allows that: in its main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds signals back, since Orbax's threads would go on writing into a removed folder."""
    caught: list[int] = []
    with _handled(lambda number, _: caught.append(number), signal.SIGINT, signal.SIGTERM):
        yield
    for number in caught[:1]:
        signal.raise_signal(number)


def _terminated(number: int, _: Any) -> None:
    sys.exit(128 + number)


def _in_flight(params: Params) -> int:
    """What Orbax is allowed, which refuses a parameter above it; takes arrays or their shapes."""
    # 8 bytes a number, since the stored dtype may be another one.
    return max([IN_FLIGHT, *(8 * math.prod(leaf.shape) for leaf in jax.tree.leaves(params))])


def fill_folder(
    folder: Path, card: BaseCard, params: Params, tokenizer: Mapping[str, bytes] | None = None
) -> None:
    """Writes a complete card, its parameters and a tokenizer's files into an empty folder.

    The parameters should be JAX arrays, since Orbax copies NumPy's before it writes them.

    Raises:
        OSError: If the folder cannot be written.
    """
    import orbax.checkpoint as ocp

    handler = ocp.BasePyTreeCheckpointHandler(save_concurrent_bytes=_in_flight(params))
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(handler_impl=handler))
    reason = ""
    with _uninterrupted(), _no_echo(), checkpointer:
        try:
            checkpointer.save(folder.absolute() / "params", params)
        except Exception as error:  # TensorStore's are ValueErrors, even if the disk is full
            reason = first_line(error)
        if reason:
            for _ in range(20):  # until no thread adds to the folder
                shutil.rmtree(folder, ignore_errors=True)
                time.sleep(0.1)
                if not folder.exists():
                    break
            with warnings.catch_warnings(action="ignore"):
                gc.collect()  # what the other threads failed with is told when it is collected
    if reason:
        raise OSError(f"cannot write the network: {reason[:300]}")
    if tokenizer is not None:
        (folder / TOKENIZER).mkdir()
        for name, data in tokenizer.items():
            (folder / TOKENIZER / name).write_bytes(data)
    text = json.dumps(dataclasses.asdict(card), indent=2)
    (folder / "card.json").write_text(text + "\n")


def save(
    path: str | os.PathLike[str],
    network: Network | Autoencoder | FeatureNetwork | TextEncoder,
    dtype: Any = np.float32,
) -> None:
    """Writes a network folder whole or not at all; an existing network folder is replaced.

    Args:
        path: The folder.
        network: What to write.
        dtype: What the parameters are stored in; ``np.float16`` halves the size, and the folder
            then holds the rounded network with that network's own checksum. So does that of a
            network that was loaded to compute in bfloat16.

    Raises:
        ValueError: If there is something else in that place, or the network takes texts and has no
            tokenizer.
        OSError: If the folder cannot be written.
    """
    check_place(Path(path))
    tokenizer: Tokenizer | None = getattr(network, "tokenizer", None)
    if tokenizer is None and network.card.architecture in TAKE_TEXTS:
        raise ValueError(
            f"{network.card.name} has no tokenizer, and its folder must; make it with tokenizer="
        )
    stored = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), network.params)
    card = dataclasses.replace(network.card, checksum=checksum(stored))
    files = None if tokenizer is None else tokenizer.files
    replace_folder(Path(path), lambda folder: fill_folder(folder, card, stored, files))


_KINDS = {"str": str, "int": int, "float": float, "bool": bool, "dict": dict, "tuple": tuple}


_DENOISER = (Card, _network)
_KINDS_OF_CARD: dict[str, tuple[Any, Callable[..., Any]]] = {
    "autoencoder": (AutoencoderCard, _autoencoder),
    "inception": (FeatureCard, _feature_network),
    "classifier": (FeatureCard, _feature_network),
    "clip": (FeatureCard, _clip),
    "clip_text": (TextEncoderCard, _text_encoder),
}
"""The card of an architecture, and what makes the network of it."""

TAKE_TEXTS = ("clip", "clip_text")
"""Architectures whose folders have a tokenizer."""


def _parse_card(fields: Any) -> BaseCard:
    if not isinstance(fields, dict):
        raise ValueError(f"a card is a JSON object, got {type(fields).__name__}")
    kind, _ = _KINDS_OF_CARD.get(str(fields.get("architecture")), _DENOISER)
    known = {field.name: field for field in dataclasses.fields(kind)}
    needed = {k for k, f in known.items() if f.default is dataclasses.MISSING}
    wrong = [f"missing {name}" for name in sorted(needed - fields.keys())]
    wrong += [f"unknown {name}" for name in sorted(fields.keys() - known.keys())]
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k in known
    }
    for name, value in values.items():
        declared = str(known[name].type)  # such as "tuple[str, ...]" or "int | None"
        if value is None and declared.endswith("| None"):
            continue
        if type(value) is not _KINDS[re.split(r"\W", declared)[0]]:
            wrong.append(f"{name} is {value!r}")
    shape = values.get("image_shape")
    if "image_shape" in known and not (
        type(shape) is tuple and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
    ):
        wrong.append(f"image_shape is {shape!r}")
    if not all(type(name) is str for name in values.get("class_names") or ()):
        wrong.append("class_names are not all texts")
    if wrong:
        raise ValueError("; ".join(wrong))
    return kind(**values)


def read_card(path: str | os.PathLike[str]) -> BaseCard:
    """Reads the card of a network folder.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    file = Path(path) / "card.json"
    try:
        return _parse_card(json.loads(file.read_text()))
    except FileNotFoundError:
        hint = ""
        if (Path(path) / "network" / "card.json").is_file():
            hint = f"; did you mean {Path(path) / 'network'}?"
        elif (Path(path) / "config.json").is_file():
            hint = f"; tstitch convert {path} OUT makes one of it"
        raise ValueError(f"{path} is not a network folder: it has no card.json{hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or not a card: {error}") from None


@contextlib.contextmanager
def _lean_malloc() -> Iterator[None]:
    """While it lasts, glibc returns large blocks to the system when they are freed.

    It else learns to keep blocks of up to 32 MiB, and the holes between the parameters that a load
    leaves behind come to a third of their size. What it would have learned is set at the end.
    """
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        yield
        return
    mallopt(mmap_threshold, 2**17)
    try:
        yield
    finally:
        mallopt(mmap_threshold, 2**25)
        mallopt(trim_threshold, 2**26)


def load(folder: str | os.PathLike[str], dtype: Any = jnp.float32, *, on_host: bool = False) -> Any:
    """Loads a network folder onto the default device.

    Args:
        folder: The folder.
        dtype: What the network computes in, float32 or bfloat16; see ``make_network``.
        on_host: Whether to leave the parameters on the host, as NumPy arrays.

    Returns:
        A ``Network``; an ``Autoencoder``, a ``TextEncoder`` or a ``FeatureNetwork`` where the
        folder holds one.

    Raises:
        ValueError: If there is no such network, or its folder is damaged.
    """
    import orbax.checkpoint as ocp

    path = Path(folder)
    card = read_card(path)
    stored = path.absolute() / "params"
    if not stored.is_dir():
        raise ValueError(f"network folder {path} is damaged: it has no params")
    files = None
    if card.architecture in TAKE_TEXTS:
        try:
            files = read_tokenizer(path / TOKENIZER)
        except ValueError as error:
            raise ValueError(f"network folder {path} is damaged: {error}") from None
    try:
        # Straight into place and little at a time: else memory holds the parameters twice.
        with _no_echo(), ocp.PyTreeCheckpointer() as reader:
            found: Any = reader.metadata(stored)
            # Older releases of Orbax return the item's metadata itself.
            names = getattr(found, "item_metadata", found).tree
        handler = ocp.BasePyTreeCheckpointHandler(restore_concurrent_bytes=_in_flight(names))
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(handler_impl=handler))
        with _lean_malloc(), _no_echo(), checkpointer:
            place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            wanted: dict[str, Any] = dict(dtype=np.dtype(np.float32))
            if on_host:
                argument = ocp.RestoreArgs(restore_type=np.ndarray, **wanted)
            else:
                argument = ocp.ArrayRestoreArgs(sharding=place, **wanted)
            params = checkpointer.restore(
                stored, restore_args=jax.tree.map(lambda _: argument, names)
            )
    except jax.errors.JaxRuntimeError:  # of memory, or of another host: not of the folder
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds for a file that is damaged.
        raise ValueError(f"network folder {path} is damaged: {first_line(error)[:200]}") from error
    try:
        _, make = _KINDS_OF_CARD.get(card.architecture, _DENOISER)
        more = dict(files=files) if files is not None else {}
        network = make(card, params, dtype, **more)
    except Exception as error:  # numbers that no network can have fail in many places
        raise ValueError(f"network folder {path} is damaged: {error}") from error
    if card.checksum != network.card.checksum:
        raise ValueError(
            f"network folder {path} is damaged: the parameters' checksum is "
            f"{network.card.checksum[:12]}, its card says {card.checksum[:12] or 'nothing'}"
        )
    if files is not None and card.tokenizer_checksum != network.card.tokenizer_checksum:  # pyright: ignore
        raise ValueError(
            f"network folder {path} is damaged: its tokenizer is not the one that its card says"
        )
    return network
