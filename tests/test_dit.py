"""The Diffusion Transformer: published sizes by shape, small ones by value."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, relative, tiny_card

from tstitch_jax.core.grids import make_knots
from tstitch_jax.core.types import Condition
from tstitch_jax.models import dit
from tstitch_jax.models.build import make_network, module_of
from tstitch_jax.models.measure import (
    SIZES,
    compute_dtypes,
    count_params,
    init_params,
    module_macs,
    param_shapes,
)

# Parameters in millions and Gflops at 256 px: Peebles & Xie 2022, tables 1 and 4 and appendix B.
PUBLISHED = {
    "dit-s-2": (33, 6.06), "dit-s-4": (33, 1.41), "dit-s-8": (33, 0.36),
    "dit-b-2": (130, 23.01), "dit-b-4": (130, 5.56), "dit-b-8": (131, 1.42),
    "dit-l-2": (458, 80.71), "dit-l-4": (458, 19.70), "dit-l-8": (459, 5.01),
    "dit-xl-2": (675, 118.64), "dit-xl-4": (675, 29.05), "dit-xl-8": (676, 7.39),
}  # fmt: skip


def published(name, size=256):
    return dit.DiT(**SIZES[name], image_shape=(size // 8, size // 8, 4), num_classes=1000)


def test_published_names():
    assert set(SIZES) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    module = published(name)
    millions, gflops = PUBLISHED[name]
    assert count_params(param_shapes(module)) / 1e6 == pytest.approx(millions, abs=0.6)
    assert module_macs(module) / 1e9 == pytest.approx(gflops, rel=0.01)


@pytest.mark.parametrize("size", [256, 512])
@pytest.mark.parametrize("name", ["dit-s-8", "dit-xl-2"])
def test_published_shapes(name, size):
    module = published(name, size)
    output = jax.eval_shape(
        lambda p, *inputs: module.apply({"params": p}, *inputs),
        param_shapes(module), *module.inputs(2),
    )  # fmt: skip
    assert output.shape == (2, size // 8, size // 8, 8)
    assert output.dtype == jnp.float32


def test_exact_count_of_the_largest():
    """The published file holds these and a fixed position code of 256 x 1152."""
    params = param_shapes(published("dit-xl-2"))
    assert count_params(params) + 256 * 1152 == 675_129_632


def apply(card, x, dtype=jnp.float32, seed=0):
    time, labels = jnp.array([10.0, 500.0]), jnp.array([0, 10])
    return module_of(card, dtype).apply({"params": random_params(card, seed)}, x, time, labels)


def images(*shape):
    return jax.random.normal(jax.random.key(0), (2, *shape))


@pytest.mark.parametrize(
    ("shape", "patch", "learned"),
    [((8, 8, 4), 2, True), ((12, 8, 3), 4, False), ((28, 28, 1), 4, False), ((8, 16, 1), 8, True)],
)
def test_any_input(shape, patch, learned):
    card = tiny_card(image_shape=shape, learned_variance=learned)
    card.config["patch"] = patch
    output = apply(card, images(*shape))
    assert output.shape == (2, *shape[:2], shape[2] * (1 + learned))
    assert np.isfinite(output).all()


def test_patches_lie_where_they_came_from():
    """With blocks that do nothing, a change of a pixel reaches its own patch and no other."""
    card = tiny_card(depth=1)
    params = random_params(card)
    params["block_0"] = jax.tree.map(np.zeros_like, params["block_0"])
    module = module_of(card)
    x = images(8, 8, 4)
    inputs = jnp.array([10.0, 500.0]), jnp.array([0, 10])
    change = module.apply({"params": params}, x.at[:, 5, 2].add(1.0), *inputs) - module.apply(
        {"params": params}, x, *inputs
    )
    touched = np.abs(np.asarray(change)).max(axis=(0, 3)) > 1e-6
    expected = np.zeros((8, 8), bool)
    expected[4:6, 2:4] = True
    np.testing.assert_array_equal(touched, expected)


def test_weights_are_held_in_the_compute_dtype(standard_promotion):
    card = tiny_card()
    params = random_params(card)
    network = make_network(card, params, jnp.bfloat16)
    names = {jax.tree_util.keystr(k, simple=True, separator="/"): str(v.dtype)
             for k, v in jax.tree_util.tree_leaves_with_path(network.params)}  # fmt: skip
    inside = ("block_", "patch_in")
    assert {n for n, d in names.items() if d == "bfloat16"} == {
        n for n in names if n.startswith(inside) and n.endswith("kernel")
    }
    # The same bits as if they were cast in every pass.
    knot = jax.tree.map(lambda v: jnp.asarray(v[3]), make_knots(network.schedule, 10))
    arguments = images(8, 8, 4), knot, Condition(jnp.array([0, 10]))
    whole = network.with_params(params).denoiser(*arguments)
    np.testing.assert_array_equal(network.denoiser(*arguments).eps, whole.eps)
    # and the card is that of the parameters as they were given
    assert network.card.checksum == make_network(card, params).card.checksum


def test_most_of_the_largest_is_held_in_bfloat16(standard_promotion):
    module = dit.DiT(
        **SIZES["dit-xl-2"], image_shape=(32, 32, 4), num_classes=1000, dtype=jnp.bfloat16
    )
    shapes = param_shapes(module)
    dtypes = compute_dtypes(module)
    half = [s.size for s, d in zip(*map(jax.tree.leaves, (shapes, dtypes)), strict=True)
            if d == jnp.bfloat16]  # fmt: skip
    assert sum(half) > 0.99 * count_params(shapes)


def test_bfloat16_is_close_and_returns_float32():
    card = tiny_card()
    full = apply(card, images(8, 8, 4))
    half = apply(card, images(8, 8, 4), jnp.bfloat16)
    assert half.dtype == jnp.float32
    assert 0 < relative(half, full) < 0.03


def products(jaxpr):
    """The dtypes of each product's operands and result."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(str(v.aval.dtype) for v in (*equation.invars, *equation.outvars))
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            yield from products(inner) if hasattr(inner, "eqns") else ()


def test_products_of_bfloat16_are_float32():
    """Which CPUs need to multiply in bfloat16, instead of in float32 after a cast."""
    module = module_of(tiny_card(), jnp.bfloat16)
    params = init_params(module, jax.random.key(0))
    found = collections.Counter(products(jax.make_jaxpr(module.apply)(
        {"params": params}, *module.inputs(2)
    ).jaxpr))  # fmt: skip
    # In a block: the modulation; q, k and v, at once and (on TPUs) apart, each followed by two
    # products of attention in three forms; two of the MLP in two; the output of attention. And the
    # patches.
    in_block = 1 + (1 + 3 * 2) + (3 + 3 * 2) + 2 * 2 + 1
    assert found["bfloat16", "bfloat16", "float32"] == module.depth * in_block + 1
    # The time's two layers, the last modulation and the last layer.
    assert found == found & collections.Counter(
        {("bfloat16", "bfloat16", "float32"): 10**6, ("float32",) * 3: 4}
    )


def test_a_fresh_network_is_adaln_zero():
    """Zero gates and a zero last layer: a fresh network returns zeros."""
    module = module_of(tiny_card())
    params = init_params(module, jax.random.key(0))
    x, time, labels = (jnp.ones(shape.shape, shape.dtype) for shape in module.inputs(2))
    np.testing.assert_array_equal(module.apply({"params": params}, x, time, labels), 0)
    assert relative(jnp.std(params["block_0"]["qkv"]["kernel"]), np.sqrt(2 / (32 + 96))) < 0.1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"built for \(8, 8, 4\), got images of \(8, 8, 3\)"):
        apply(tiny_card(), images(8, 8, 3))
    with pytest.raises(ValueError, match="multiple of 4, got 30"):
        dit.position_code(4, 4, 30)
    for changes, message in [
        (dict(patch=3), "patch 3 does not divide"),
        (dict(num_heads=5), "5 heads do not divide"),
    ]:
        card = tiny_card()
        card.config.update(changes)
        with pytest.raises(ValueError, match=message):
            module_of(card)
