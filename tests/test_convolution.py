"""Convolutions in another order of sums are the same convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative

from tstitch_jax.networks import convolution, count_macs


def direct(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def convolve(x, kernel, strides=(1, 1), padding="SAME", **options):
    return convolution.convolve(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
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
    assert relative(convolution.winograd(x, kernel), expected) < 3e-6
    assert relative(convolution.surroundings(x, kernel), expected) < 3e-6


def test_surroundings_take_any_size():
    x, kernel = draw(2, 5, 3, 4), draw(3, 3, 4, 6)
    assert relative(convolution.surroundings(x, kernel), direct(x, kernel)) < 3e-6


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
    program = jax.jit(convolve).lower(x, kernel).as_text()
    assert ("stablehlo.convolution" in program) == (form == "direct")
    assert relative(jax.jit(convolve)(x, kernel), direct(x, kernel)) < 5e-6


def test_other_platforms_and_kinds_are_direct():
    x, kernel = draw(1, 18, 16, WIDE), draw(3, 3, WIDE, WIDE)
    exported = jax.export.export(jax.jit(convolve), platforms=["tpu"])(x, kernel)
    assert exported.mlir_module().count("stablehlo.convolution") == 1
    assert "stablehlo.dot_general" not in exported.mlir_module()
    half = jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16)
    for arrays, options in (
        (half, {}),
        ((x, kernel), dict(strides=(2, 2), padding=[(1, 1), (1, 1)])),
        ((x, kernel), dict(rhs_dilation=(2, 2))),
        ((x, kernel[:, :, : WIDE // 2]), dict(feature_group_count=2)),
        ((jax.ShapeDtypeStruct((9, 256, 256, WIDE), jnp.float32), kernel), {}),
        ((x, kernel[:1, :1]), {}),
    ):
        program = str(jax.make_jaxpr(lambda *g, o=options: convolve(*g, **o))(*arrays))
        assert "conv_general_dilated" in program
        assert "cond" not in program


def test_what_lax_refuses_is_refused():
    with pytest.raises(ValueError, match="transposed convolution"):
        convolve(draw(1, 18, 16, WIDE), draw(3, 3, WIDE, WIDE), lhs_dilation=(2, 1))


def test_multiply_adds_are_those_of_the_direct_form():
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 18, 16, WIDE), (3, 3, WIDE, WIDE))]
    assert count_macs(convolve, *shapes) == 18 * 16 * 9 * WIDE**2
