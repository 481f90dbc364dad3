"""Shared layers: every form for a platform is compared with its definition in float32."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative

from tstitch_jax.models import layers

PLATFORMS = ("tpu", "cpu", "default")


@pytest.fixture(params=PLATFORMS)
def platform(request, monkeypatch):
    """The form for each platform runs here."""

    def choose(*arguments, **forms):
        return forms.get(request.param, forms["default"])(*arguments)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    return request.param


def draw(*shapes, dtype=jnp.float32):
    return [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]


def plain_attention(q, k, v, causal):
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    if causal:
        logits = jnp.where(np.tri(*logits.shape[2:], dtype=bool), logits, -jnp.inf)
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits), v)


@pytest.mark.parametrize(
    ("limit", "piece"),
    [
        (10**6, "8,60,7"),
        (2 * 60 * 7, "2,60,7"),  # two of eight heads
        (60 * 7, "60,7"),
        (11 * 7, "10,7"),  # ten of a head's 60 queries
        (1, "1,7"),  # the smallest piece
    ],
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02)])
def test_attention(platform, monkeypatch, limit, piece, causal, long, dtype, error):
    monkeypatch.setattr(layers, "LOGITS", limit)
    monkeypatch.setattr(layers, "CACHED", limit)
    monkeypatch.setattr(layers, "LONG", 0 if long else 10**6)
    q, k, v = draw((2, 60, 4, 8), (2, 7, 4, 8), (2, 7, 4, 8), dtype=dtype)
    found = layers.attend(q, k, v, causal)
    assert found.dtype == dtype
    expected = plain_attention(*(x.astype(jnp.float32) for x in (q, k, v)), causal)
    assert relative(found.astype(jnp.float32), expected) < error
    program = str(jax.make_jaxpr(lambda *qkv: layers.attend(*qkv, causal))(q, k, v))
    # A single piece keeps batch and heads apart, except on CPUs and with a column of ones.
    together = platform == "cpu" or (platform == "tpu" and long)
    piece = "2,4,60,7" if limit == 10**6 and not together else piece
    assert set(re.findall(r"f32\[([\d,]*,7)\] = dot_general", program)) == {piece}


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention(platform, causal):
    x, kernel, bias = draw((2, 6, 32), (32, 96), (96,))
    module = layers.SelfAttention(4, jnp.float32, nn.initializers.zeros, causal)
    found = module.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    q, k, v = jnp.moveaxis((x @ kernel + bias).reshape(2, 6, 3, 4, 8), 2, 0)
    assert relative(found, plain_attention(q, k, v, causal).reshape(x.shape)) < 1e-5


class ProjectAndAttend(nn.Module):
    use_bias: bool

    @nn.compact
    def __call__(self, x, context):
        return layers.project_and_attend(x, context, 4, jnp.float32, self.use_bias)


@pytest.mark.parametrize("use_bias", [False, True])
def test_attention_to_a_context(use_bias):
    x, context = draw((2, 6, 32), (2, 5, 16))
    module = ProjectAndAttend(use_bias)
    params = module.init(jax.random.key(0), x, context)["params"]
    assert params["k"]["kernel"].shape == (16, 32)
    assert {name: set(p) for name, p in params.items()} == {
        name: {"kernel", "bias"} if use_bias or name == "out" else {"kernel"} for name in params
    }
    q, k, v = (
        (given @ params[name]["kernel"]).reshape(2, -1, 4, 8)
        for given, name in ((x, "q"), (context, "k"), (context, "v"))
    )
    expected = plain_attention(q, k, v, False).reshape(x.shape) @ params["out"]["kernel"]
    assert relative(module.apply({"params": params}, x, context), expected) < 1e-5


class FeedForward(nn.Module):
    gated: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        return layers.feed_forward(x, 16, nn.gelu, self.dtype, gated=self.gated)


@pytest.mark.parametrize("limit", [10**6, 4 * 32, 1])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02)])
def test_feed_forward(platform, monkeypatch, limit, gated, dtype, error):
    monkeypatch.setattr(layers, "CACHED", limit)
    (x,) = draw((2, 7, 8))
    module = FeedForward(gated, dtype)
    params = module.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: p + 0.1, params)
    h = x @ params["mlp_in"]["kernel"] + params["mlp_in"]["bias"]
    h = h[..., :16] * nn.gelu(h[..., 16:]) if gated else nn.gelu(h)
    expected = h @ params["mlp_out"]["kernel"] + params["mlp_out"]["bias"]
    found = module.apply({"params": params}, x)
    assert found.dtype == jnp.float32
    assert relative(found, expected) < error
    program = str(jax.make_jaxpr(module.apply)({"params": params}, x))
    results = 14 * 16 * (1 + gated)
    assert ("scan" in program) == (platform == "cpu" and limit < results)


@pytest.mark.parametrize("groups", [1, 4, 12])
def test_group_norm_is_that_of_flax(groups):
    x = 3 + draw((2, 5, 3, 12))[0]
    own, other = layers.GroupNorm(groups, 1e-5), nn.GroupNorm(groups, epsilon=1e-5)
    params = jax.tree.map(lambda p: p + 0.5, own.init(jax.random.key(0), x))
    assert jax.tree.structure(params) == jax.tree.structure(other.init(jax.random.key(0), x))
    assert relative(own.apply(params, x), other.apply(params, x)) < 1e-5
    assert own.apply(params, x.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("time", [None, (2, 6)])
@pytest.mark.parametrize("channels", [8, 12])
def test_residual_blocks_have_the_parameters_they_need(time, channels):
    x, *more = draw((2, 4, 6, 8), *([time] if time else []))
    module = layers.Resnet(channels, 4, jnp.float32)
    params = module.init(jax.random.key(0), x, *more)
    names = {"norm1", "conv1", "norm2", "conv2"}
    names |= {"time"} if time else set()
    names |= {"shortcut"} if channels != 8 else set()
    assert set(params["params"]) == names
    assert module.apply(params, x, *more).shape == (2, 4, 6, channels)
