"""Convolutions in another order of sums are the same convolutions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative

from tstitch_jax.models import convolution
from tstitch_jax.models.measure import count_macs


def direct(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


@pytest.mark.parametrize(
    ("shape", "features"),
    [
        ((1, 2, 2, 1), 1),
        ((1, 2, 8, 3), 7),
        ((2, 6, 4, 9), 2),
        ((3, 8, 2, 5), 9),
        ((1, 10, 14, 8), 4),
    ],
)
def test_the_same_sums(shape, features):
    x, kernel = draw(*shape), draw(3, 3, shape[-1], features)
    expected = direct(x, kernel)
    assert relative(convolution.winograd(x, convolution.winograd_kernels(kernel)), expected) < 1e-5
    assert relative(convolution.surroundings(x, kernel), expected) < 1e-5
    assert relative(convolution.shifted(x, kernel), expected) < 1e-5


@pytest.mark.parametrize("form", [convolution.surroundings, convolution.shifted])
def test_any_size(form):
    x, kernel = draw(2, 5, 3, 4), draw(3, 3, 4, 6)
    assert relative(form(x, kernel), direct(x, kernel)) < 1e-5


def test_products_of_bfloat16_are_summed_in_float32():
    x, kernel = (g.astype(jnp.bfloat16) for g in (draw(2, 6, 4, 64), draw(3, 3, 64, 8)))
    found = convolution.shifted(x, kernel)
    assert found.dtype == jnp.bfloat16
    wide = direct(x.astype(jnp.float32), kernel.astype(jnp.float32))
    rounded = wide.astype(jnp.bfloat16).astype(jnp.float32)
    # They round differently only where they lie all but half way between two values.
    assert (found.astype(jnp.float32) == rounded).mean() > 0.99


WIDE = 256


@pytest.mark.parametrize(
    ("shape", "channels", "features", "form"),
    [
        ((1, 18, 16), WIDE, WIDE, "winograd"),
        ((2, 16, 8), WIDE, WIDE, "surroundings"),
        ((1, 17, 16), WIDE, WIDE, "direct"),
        ((1, 18, 16), WIDE, 8, "direct"),
        ((1, 18, 16), 8, WIDE, "direct"),
    ],
)
def test_which_form_is_taken(monkeypatch, shape, channels, features, form):
    def refuse(*given):
        raise AssertionError(given)

    for other in {"winograd", "surroundings"} - {form}:
        monkeypatch.setattr(convolution, other, refuse)
    x, kernel = draw(*shape, channels), draw(3, 3, channels, features)
    program = jax.jit(convolution.convolve).lower(x, kernel).as_text()
    assert ("stablehlo.convolution" in program) == (form == "direct")
    assert relative(jax.jit(convolution.convolve)(x, kernel), direct(x, kernel)) < 1e-5


@pytest.mark.parametrize(
    ("platform", "shape", "channels", "products"),
    [
        ("tpu", (2, 16, 16), WIDE, 9),
        ("tpu", (7, 15, 18), WIDE, 9),
        ("tpu", (1, 16, 16), WIDE, 0),
        ("tpu", (8, 16, 16), WIDE, 0),
        ("tpu", (2, 4, 3), WIDE, 9),
        ("tpu", (2, 16, 16), WIDE // 2, 0),
        ("cuda", (2, 16, 16), WIDE, 0),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_which_form_an_accelerator_takes(platform, shape, channels, products, dtype):
    x = jax.ShapeDtypeStruct((*shape, channels), dtype)
    kernel = jax.ShapeDtypeStruct((3, 3, channels, WIDE), dtype)
    exported = jax.export.export(jax.jit(convolution.convolve), platforms=[platform])(x, kernel)
    program = exported.mlir_module()
    assert program.count("stablehlo.dot_general") == products
    assert program.count("stablehlo.convolution") == (products == 0)


def test_other_kinds_are_direct():
    x, kernel = draw(1, 18, 16, WIDE), draw(3, 3, WIDE, WIDE)
    half = jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16)
    for arrays, options in (
        (half, {}),
        ((x, kernel), dict(stride=2)),
        ((x, kernel), dict(padding=((1, 1), (1, 1)))),
        ((jax.ShapeDtypeStruct((9, 256, 256, WIDE), jnp.float32), kernel), {}),
        ((x, kernel[:1, :2]), {}),
    ):
        program = str(jax.make_jaxpr(lambda *g, o=options: convolution.convolve(*g, **o))(*arrays))
        assert "conv_general_dilated" in program
        assert "cond" not in program


@pytest.mark.parametrize(
    ("kernel", "stride"), [((3, 3), 1), ((3, 3), 2), ((1, 1), 1), ((1, 7), 1), ((5, 2), 2)]
)
def test_without_padding(kernel, stride):
    x = jax.random.normal(jax.random.key(0), (2, 9, 12, 3))
    w = jax.random.normal(jax.random.key(1), (*kernel, 3, 5))
    direct = jax.lax.conv_general_dilated(
        x, w, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert relative(convolution.convolve(x, w, stride, "VALID"), direct) < 1e-5


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("stride", "padding"), [(1, "SAME"), (2, ((1, 1), (1, 1)))])
def test_the_module_is_that_of_flax(dtype, stride, padding):
    x, key = draw(2, 6, 8, 5), jax.random.key(0)
    own = convolution.Conv(7, (3, 3), stride, padding, dtype=dtype)
    other = nn.Conv(7, (3, 3), stride, padding, dtype=dtype)
    params = own.init(key, x)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, other.init(key, x)))
    found, expected = own.apply(params, x), other.apply(params, x)
    assert found.dtype == expected.dtype
    assert relative(found, expected) < 1e-5


def test_multiply_adds_are_those_of_the_direct_form():
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 18, 16, WIDE), (3, 3, WIDE, WIDE))]
    assert count_macs(convolution.convolve, *shapes) == 18 * 16 * 9 * WIDE**2
