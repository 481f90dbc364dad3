"""A network as a folder: ``card.json`` beside the parameters in Orbax's format."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tstitch_jax.networks import ARCHITECTURES, count_params, dit, init_params
from tstitch_jax.prediction import as_denoiser, check_target
from tstitch_jax.schedules import make_schedule, unknown
from tstitch_jax.types import Card, Denoiser, Network, Params, Schedule

EMBEDDED = Path(__file__).parent / "embedded"
"""Folder of the networks that come with the package."""


def _flatten(params: Params) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def checksum(params: Params) -> str:
    """SHA-256 over the names, shapes and float32 values of all parameters, in order of name."""
    digest = hashlib.sha256()
    for name, leaf in sorted(_flatten(params).items()):
        digest.update(f"{name} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf, dtype=np.float32).data)
    return digest.hexdigest()


def module_of(card: Card, dtype: Any = jnp.float32) -> nn.Module:
    """The Flax module that a card describes, computing in ``dtype``.

    Raises:
        ValueError: If the architecture is unknown or does not take the configuration.
    """
    if card.architecture not in ARCHITECTURES:
        raise unknown("architecture", card.architecture, ARCHITECTURES)
    try:
        return ARCHITECTURES[card.architecture](
            **card.config,
            image_shape=tuple(card.image_shape),
            num_classes=card.num_classes,
            learned_variance=card.learned_variance,
            dtype=dtype,
        )
    except TypeError as error:
        raise ValueError(f"{card.architecture} cannot be built: {error}") from None


@functools.cache
def _denoiser(module: nn.Module, target: str, learned_variance: bool) -> Denoiser:
    # Cached, so that loading a network twice gives the same function, which jit knows again.
    def apply(params: Params, x: jax.Array, time: jax.Array, labels: jax.Array) -> jax.Array:
        return module.apply({"params": params}, x, time, labels)  # pyright: ignore

    return as_denoiser(apply, target, learned_variance)


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
    if card.num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {card.num_classes}")
    if len(card.class_names) not in (0, card.num_classes):
        raise ValueError(f"{len(card.class_names)} names for {card.num_classes} classes")
    channels = card.guidance_channels
    if channels is not None and not 0 < channels <= card.image_shape[2]:
        raise ValueError(f"guidance_channels must be 1 to {card.image_shape[2]}, got {channels}")
    return schedule


def make_network(card: Card, params: Params, dtype: Any = jnp.float32) -> Network:
    """A network of its card and parameters; fills in the card's sizes and checksum.

    Args:
        card: What the network is.
        params: Its parameters, a nested dict of float arrays.
        dtype: What it computes in, float32 or bfloat16.

    Raises:
        ValueError: If card and parameters do not fit; lists every missing, extra and misshapen one.
    """
    schedule = check_card(card)
    module = module_of(card, dtype)
    expected = _flatten(jax.eval_shape(lambda k: init_params(module, k), jax.random.key(0)))
    found = _flatten(params)
    problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"extra {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} has shape {found[name].shape}, expected {expected[name].shape}"
        for name in sorted(expected.keys() & found.keys())
        if found[name].shape != expected[name].shape
    ]
    if problems:
        raise ValueError(f"parameters do not fit the card: {'; '.join(problems)}")
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    card = dataclasses.replace(
        card,
        num_params=count_params(params),
        macs=dit.macs(module) if isinstance(module, dit.DiT) else 0,
        checksum=checksum(params),
    )
    denoiser = _denoiser(module, card.target, card.learned_variance)
    return Network(denoiser, params, card, schedule)


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Runs ``write`` on a temporary folder beside ``path``, then puts it in ``path``'s place.

    Raises:
        OSError: If the place cannot be written; ``path`` is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        write(temporary)
        os.chmod(temporary, 0o755)  # mkdtemp makes it private
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.rename(path, old / path.name)
            try:
                os.rename(temporary, path)
            except OSError:
                os.rename(old / path.name, path)
                old.rmdir()
                raise
            shutil.rmtree(old)
        else:
            os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save(path: str | os.PathLike[str], network: Network, dtype: Any = np.float32) -> None:
    """Writes a network folder whole or not at all; an existing network folder is replaced.

    Args:
        path: The folder.
        network: What to write.
        dtype: What the parameters are stored in; ``np.float16`` halves the size, and the folder
            then holds the rounded network with that network's own checksum.

    Raises:
        ValueError: If there is something else in that place.
        OSError: If the folder cannot be written.
    """
    import orbax.checkpoint as ocp

    path = Path(path)
    if (
        path.exists()
        and not (path / "card.json").exists()
        and not (path.is_dir() and not any(path.iterdir()))
    ):
        raise ValueError(f"{path} exists and is not a network folder; choose another place")
    stored = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), network.params)
    card = dataclasses.replace(network.card, checksum=checksum(stored))

    def write(folder: Path) -> None:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(folder.absolute() / "params", stored)
        text = json.dumps(dataclasses.asdict(card), indent=2)
        (folder / "card.json").write_text(text + "\n")

    replace_folder(path, write)


_KINDS = {"str": str, "int": int, "bool": bool, "dict": dict, "tuple": tuple}


def _parse_card(fields: Any) -> Card:
    if not isinstance(fields, dict):
        raise ValueError(f"a card is a JSON object, got {type(fields).__name__}")
    known = {field.name: field for field in dataclasses.fields(Card)}
    needed = {k for k, f in known.items() if f.default is dataclasses.MISSING}
    wrong = [f"missing {name}" for name in sorted(needed - fields.keys())]
    wrong += [f"unknown {name}" for name in sorted(fields.keys() - known.keys())]
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k in known
    }
    for name, value in values.items():
        kind = str(known[name].type)  # such as "tuple[str, ...]" or "int | None"
        if value is None and kind.endswith("| None"):
            continue
        if type(value) is not _KINDS[re.split(r"\W", kind)[0]]:
            wrong.append(f"{name} is {value!r}")
    shape = values.get("image_shape")
    if not (
        type(shape) is tuple and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
    ):
        wrong.append(f"image_shape is {shape!r}")
    if not all(type(name) is str for name in values.get("class_names") or ()):
        wrong.append("class_names are not all texts")
    if wrong:
        raise ValueError("; ".join(wrong))
    return Card(**values)


def read_card(path: str | os.PathLike[str]) -> Card:
    """Reads the card of a network folder.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    file = Path(path) / "card.json"
    try:
        return _parse_card(json.loads(file.read_text()))
    except FileNotFoundError:
        raise ValueError(f"{path} is not a network folder: it has no card.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or not a card: {error}") from None


def embedded_names() -> list[str]:
    """Names of the networks that come with the package."""
    return sorted(card.parent.name for card in EMBEDDED.glob("*/card.json"))


def find(name: str | os.PathLike[str]) -> Path:
    """The folder of an embedded name or of a path.

    Raises:
        ValueError: If there is neither; says the near names.
    """
    if str(name) in embedded_names():
        return EMBEDDED / str(name)
    if Path(name).is_dir():
        return Path(name)
    if os.sep in str(name):
        raise ValueError(f"no network folder at {name}")
    raise unknown("network", name, embedded_names())


def load(name: str | os.PathLike[str], dtype: Any = jnp.float32) -> Network:
    """Loads a network onto the default device.

    Args:
        name: An embedded name such as ``"fashion-s"``, or the path of a network folder.
        dtype: What the network computes in, float32 or bfloat16; its parameters are float32.

    Raises:
        ValueError: If there is no such network, or its folder is damaged.
    """
    import orbax.checkpoint as ocp

    path = find(name)
    card = read_card(path)
    folder = path.absolute() / "params"
    if not folder.is_dir():
        raise ValueError(f"network folder {path} is damaged: it has no params")
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            found = checkpointer.metadata(folder)
            # Older releases of Orbax return the item's metadata itself.
            names = getattr(found, "item_metadata", found).tree
            arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
            params = checkpointer.restore(folder, restore_args=arguments)
    except Exception as error:  # Orbax and TensorStore raise many kinds for a file that is damaged.
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"network folder {path} is damaged: {first[:200]}") from error
    try:
        network = make_network(card, params, dtype)
    except Exception as error:  # numbers that no network can have fail in many places
        raise ValueError(f"network folder {path} is damaged: {error}") from error
    if card.checksum != network.card.checksum:
        raise ValueError(
            f"network folder {path} is damaged: the parameters' checksum is "
            f"{network.card.checksum[:12]}, its card says {card.checksum[:12] or 'nothing'}"
        )
    return network
