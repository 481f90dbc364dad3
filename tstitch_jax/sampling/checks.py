"""Checks of what is given to a sampler: each raises ValueError, before anything is compiled."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tstitch_jax.core.checks import as_array, check_number, is_list, shown
from tstitch_jax.models.cards import Card
from tstitch_jax.models.types import Autoencoder, FeatureNetwork, Network, TextEncoder

MAX_BATCH = 2**16
"""Upper limit on images per device."""


_MOST_PIXELS = 2**16
"""Of a side of an image."""


def check_networks(networks: Sequence[Any]) -> None:
    """Raises ValueError unless the networks can share one trajectory; says which two clash."""
    for each in networks if isinstance(networks, Sequence) else ():
        if isinstance(each, Autoencoder):
            raise ValueError(
                f"{each.card.name} is an autoencoder, not a denoiser; give it as the autoencoder"
            )
        if isinstance(each, TextEncoder):
            raise ValueError(
                f"{each.card.name} is a text encoder, not a denoiser; give it as the text_encoder"
            )
        if isinstance(each, FeatureNetwork):
            raise ValueError(f"{each.card.name} is a feature network, not a denoiser")
    if not isinstance(networks, Sequence) or not all(isinstance(n, Network) for n in networks):
        raise ValueError(
            "networks must be a list of names, paths or what ts.load returns, "
            f"got {shown(networks)}"
        )
    if not networks:
        raise ValueError("give at least one network")
    first = networks[0].card
    for network in networks[1:]:
        other = network.card
        shapes: Any = ("image shape", first.image_shape, other.image_shape)
        if networks[0].multiple and network.multiple:  # any size will do
            shapes = ("number of channels", first.image_shape[2], other.image_shape[2])
        for what, a, b in (
            shapes,
            ("autoencoder", first.autoencoder, other.autoencoder),
        ):
            if a != b and not (what == "autoencoder" and "" in (a, b)):
                raise ValueError(
                    f"{first.name} and {other.name} cannot be stitched: "
                    f"their {what} differs, {a} and {b}"
                )


def check_size(size: Any, networks: Sequence[Network], factor: int) -> tuple[int, int, int]:
    """The shape ``(H, W, C)`` of x, of the size of what is returned, ``factor`` times as large."""
    shape = networks[-1].card.image_shape
    if size is not None:
        try:
            height, width = (operator.index(n) for n in size)
        except (TypeError, ValueError):
            raise ValueError(
                f"size must be two whole numbers, height and width, got {shown(size)}"
            ) from None
        fit = all(0 < n <= _MOST_PIXELS and n % factor == 0 for n in (height, width))
        if not fit:
            raise ValueError(
                f"size must be two multiples of {factor * (networks[-1].multiple or 1)}, above 0, "
                f"at most {_MOST_PIXELS}, got {shown(size)}"
            )
        shape = (height // factor, width // factor, shape[2])
    for network in networks:
        own = network.card.image_shape
        if network.multiple is None and shape != own:
            raise ValueError(
                f"{network.card.name} makes {own[0] * factor}x{own[1] * factor} alone, asked for "
                f"{shape[0] * factor}x{shape[1] * factor}"
            )
        if network.multiple and (shape[0] % network.multiple or shape[1] % network.multiple):
            raise ValueError(
                f"size must be two multiples of {network.multiple * factor} for "
                f"{network.card.name}, got {shape[0] * factor}x{shape[1] * factor}"
            )
    return shape


def class_names(labels: Any, cards: Sequence[Card]) -> tuple[str, ...]:
    """The names of labels, one an image, as far as the cards have any."""
    names = next((card.class_names for card in cards if card.class_names), ())
    return tuple(
        each if isinstance(each, str) else names[each] if names else str(each) for each in labels
    )


def check_autoencoder(network: Network, autoencoder: Autoencoder | None) -> None:
    """Raises ValueError unless what the network makes can be turned into images."""
    card = network.card
    if autoencoder is not None and not isinstance(autoencoder, Autoencoder):
        raise ValueError(
            f"{shown(autoencoder)} is not an autoencoder; give a name or what ts.load returns"
        )
    if autoencoder is None:
        if card.autoencoder or card.image_shape[2] not in (1, 3):
            name = card.autoencoder or "sd-vae-ft-ema"
            raise ValueError(
                f"{card.name} makes latents of {card.image_shape[2]} channels, not images; "
                f"give autoencoder=ts.load({name!r}), or decode=False for the latents"
            )
    elif autoencoder.channels != card.image_shape[2]:
        raise ValueError(
            f"{card.name} makes {card.image_shape[2]} channels, the autoencoder "
            f"{autoencoder.card.name} takes latents of {autoencoder.channels}"
        )


def check_images(name: str, value: Any, shape: tuple[int, ...], what: str) -> jax.Array:
    """A float32 array of that shape without NaN."""
    array = as_array(value)
    if array.dtype.kind not in "iuf" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be an array of numbers {shape}, {what}, got {shown(value)}")
    if array.shape != shape:
        raise ValueError(f"{name} must be {shape}, {what}, got {array.shape}")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds numbers that are not finite")
    return jnp.asarray(array)


def check_key(key: Any) -> None:
    """Raises ValueError unless it is one key, typed or of the older kind."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if typed and str(jax.random.key_impl(key)) not in ("fry", "threefry2x32"):
        raise ValueError(
            f"key must be of the kind threefry2x32, got {jax.random.key_impl(key)}, whose numbers "
            "for one image depend on the batch; give jax.random.key(seed, impl='threefry2x32')"
        )
    older = isinstance(key, jax.Array) and (key.shape, key.dtype) == ((2,), jnp.uint32)
    if not older and not (typed and key.ndim == 0):
        raise ValueError(f"key must be one key from jax.random.key, got {shown(key)}")


def check_scales(cfg_scale: Any, networks: int, steps: int) -> list[Any]:
    """Of each network None, a number, or an array of a number per step."""
    if is_list(cfg_scale):
        if len(cfg_scale) != networks:
            raise ValueError(
                f"the guidance scale must be one number or None for all, or a list with one entry "
                f"for each of the {networks} networks, got {len(cfg_scale)} entries"
            )
        scales = list(cfg_scale)
    else:
        scales = [cfg_scale] * networks
    checked = []
    for scale in scales:
        if is_list(scale):
            if len(scale) != steps:
                raise ValueError(
                    f"a guidance scale per step needs {steps} numbers, got {len(scale)}"
                )
            numbers = [check_number("the guidance scale", value) for value in scale]
            checked.append(np.array(numbers, np.float32))
        else:
            checked.append(
                None if scale is None else check_number("the guidance scale", scale, " or None")
            )
    return checked


def check_start(
    start: Any, strength: Any, steps: int, shape: tuple[int, ...], encoder: Autoencoder | None
) -> tuple[Any, int]:
    """The start as an array, and how many of the last steps it leaves."""
    if (start is None) != (strength is None):
        raise ValueError("start and strength go together: an image and how far to change it")
    if start is None:
        return None, steps
    strength = check_number("strength", strength)
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0, at most 1, got {strength:g}")
    if encoder is not None:
        factor = encoder.factor
        shape = (shape[0], shape[1] * factor, shape[2] * factor, encoder.card.image_shape[2])
    if as_array(start).dtype.kind in "iu":
        raise ValueError("start must be floats, images in [-1, 1], got whole numbers (of pixels?)")
    start = check_images("start", start, shape, "one image each")
    if (largest := float(jnp.abs(start).max())) > 30:  # no latents are
        raise ValueError(f"start must be images in [-1, 1], got values of {largest:g} (of pixels?)")
    return start, max(1, int(steps * strength + 1e-6))
