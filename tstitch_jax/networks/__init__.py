"""Architectures by name, and the named sizes of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tstitch_jax.networks import autoencoder, dit
from tstitch_jax.types import Params

ARCHITECTURES: dict[str, type] = {"dit": dit.DiT, "autoencoder": autoencoder.KLAutoencoder}

SIZES: dict[str, dict[str, Any]] = {
    f"dit-{size}-{patch}": {**config, "patch": patch}
    for size, config in dit.SIZES.items()
    for patch in dit.PATCHES
}
"""The twelve published sizes: keyword arguments of ``DiT`` without its input and its classes."""


def init_params(module: Any, key: jax.Array) -> Params:
    """Fresh parameters, a plain nested dict; under ``jax.eval_shape`` only their shapes."""
    inputs = (jnp.zeros(shape.shape, shape.dtype) for shape in module.inputs())
    return module.init(key, *inputs)["params"]


def param_shapes(module: Any) -> Params:
    """Shapes and dtypes of the parameters."""
    return jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0))


def count_params(params: Params) -> int:
    """Number of parameters; takes arrays or their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def count_macs(function: Callable[..., Any], *arguments: Any) -> int:
    """Multiply-adds in the matrix products and convolutions of ``function``.

    The DiT paper calls them flops. Nothing is computed; the arguments may be shapes.
    """

    def count(jaxpr: Any) -> int:
        total = 0
        for equation in jaxpr.eqns:
            size = math.prod(equation.outvars[0].aval.shape)
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                shape = equation.invars[0].aval.shape
                total += size * math.prod(shape[axis] for axis in contracted)
            elif equation.primitive.name == "conv_general_dilated":
                kernel = equation.invars[1].aval
                features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
                total += size * math.prod(kernel.shape) // features
            for inner in equation.params.values():  # a call's own program, open or closed
                inner = getattr(inner, "jaxpr", inner)
                total += count(inner) if hasattr(inner, "eqns") else 0
        return total

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)
