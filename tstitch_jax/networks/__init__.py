"""Architectures by name, and the named sizes of each."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tstitch_jax.networks import dit
from tstitch_jax.types import Params

ARCHITECTURES: dict[str, type[nn.Module]] = {"dit": dit.DiT}

SIZES: dict[str, dict[str, Any]] = {
    f"dit-{size}-{patch}": {**config, "patch": patch}
    for size, config in dit.SIZES.items()
    for patch in dit.PATCHES
}
"""The twelve published sizes: keyword arguments of ``DiT`` without its input and its classes."""


def dummy_inputs(module: Any, batch: int = 1) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inputs of the right shapes and dtypes: images, times, labels."""
    x = jnp.zeros((batch, *module.image_shape), jnp.float32)
    return x, jnp.zeros(batch, jnp.float32), jnp.zeros(batch, jnp.int32)


def init_params(module: nn.Module, key: jax.Array) -> Params:
    """Fresh parameters, a plain nested dict; under ``jax.eval_shape`` only their shapes."""
    return module.init(key, *dummy_inputs(module))["params"]


def count_params(params: Params) -> int:
    """Number of parameters; takes arrays or their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
