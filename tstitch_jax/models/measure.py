"""What follows from a Flax module alone: shapes, multiply-adds, and dtypes of its parameters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tstitch_jax.core.types import Params
from tstitch_jax.models import dit

SIZES: dict[str, dict[str, Any]] = {
    f"dit-{size}-{patch}": {**config, "patch": patch}
    for size, config in dit.SIZES.items()
    for patch in dit.PATCHES
}
"""The twelve published sizes: keyword arguments of ``DiT`` without its input and its classes. Those
of U-Nets are ``unet.SIZES``."""


def init_params(module: Any, key: jax.Array) -> Params:
    """Fresh parameters, a plain nested dict; under ``jax.eval_shape`` only their shapes."""
    inputs = (jnp.zeros(shape.shape, shape.dtype) for shape in module.inputs())
    return module.init(key, *inputs)["params"]


@functools.cache
def _shapes(module: Any) -> tuple[list[jax.ShapeDtypeStruct], Any]:
    # Cached, as what else a module alone decides: tracing a large network takes seconds. Without
    # the sharding, which is that of the mesh that is set.
    shapes = jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0))
    leaves, tree = jax.tree.flatten(shapes)
    return [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves], tree


def param_shapes(module: Any) -> Params:
    """Shapes and dtypes of the parameters."""
    leaves, tree = _shapes(module)
    return jax.tree.unflatten(tree, leaves)


def count_params(params: Params) -> int:
    """Number of parameters; takes arrays or their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _count(jaxpr: Any) -> int:
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
            repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
            total += repeats * _count(inner) if hasattr(inner, "eqns") else 0
        # Of a choice one branch runs; by platform, the default is the network as published.
        branches = equation.params.get("branches", ())
        if equation.params.get("branches_platforms"):
            branches = branches[-1:]
        total += max((_count(branch.jaxpr) for branch in branches), default=0)
    return total


def count_macs(function: Callable[..., Any], *arguments: Any) -> int:
    """Multiply-adds in the matrix products and convolutions of ``function``.

    The DiT paper calls them flops. Nothing is computed; the arguments may be shapes.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _only_cast(variable: Any, jaxpr: Any, dtype: Any) -> bool:
    """Whether a variable is used, and in nothing but casts to the dtype."""
    used = False
    for equation in jaxpr.eqns:
        for position, operand in enumerate(equation.invars):
            if operand is not variable:
                continue
            inner = getattr(equation.params.get("jaxpr"), "jaxpr", None)
            if equation.primitive.name == "convert_element_type":
                if equation.params["new_dtype"] != dtype:
                    return False
            elif inner is None or not _only_cast(inner.invars[position], inner, dtype):
                return False
            used = True
    return used and all(variable is not out for out in jaxpr.outvars)


@functools.cache
def _one_pass(module: Any) -> tuple[int, list[bool]]:
    """Its multiply-adds, and of each parameter whether it is only cast to the compute dtype."""
    leaves, tree = _shapes(module)
    program = jax.make_jaxpr(lambda p, *x: module.apply({"params": p}, *x))(
        jax.tree.unflatten(tree, leaves), *module.inputs()
    )
    variables = program.jaxpr.invars[: len(leaves)]
    return _count(program.jaxpr), [_only_cast(v, program.jaxpr, module.dtype) for v in variables]


def module_macs(module: Any) -> int:
    """Multiply-adds of one forward pass of one input, as ``count_macs`` has them."""
    return _one_pass(module)[0]


def compute_dtypes(module: Any) -> Params:
    """In what dtype each parameter may be held, so that the module's numbers stay the same.

    That is the module's compute dtype where the parameter is only ever cast to it, else the one
    that the module makes it in. Nothing is computed.
    """
    leaves, tree = _shapes(module)
    dtypes = [
        jnp.dtype(module.dtype) if cast else leaf.dtype
        for cast, leaf in zip(_one_pass(module)[1], leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, dtypes)
