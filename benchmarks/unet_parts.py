"""Parts of a U-Net on the CPU, in the forms that there are to choose from.

    python benchmarks/unet_parts.py [--rounds 5]

float32; forms alternate within a round, figures are medians in milliseconds.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tstitch_jax.models import convolution, layers

CONVOLUTIONS = [
    (2, 64, 320, 320),
    (2, 64, 640, 320),
    (2, 32, 640, 640),
    (2, 32, 1280, 640),
    (2, 16, 1280, 1280),
    (2, 16, 2560, 1280),
    (2, 8, 1280, 1280),
    (2, 8, 2560, 1280),
    (1, 256, 128, 128),
]
"""Images, side, channels in and out: those of Stable Diffusion's U-Net, and one of a decoder."""


def direct(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def attention(limit: int) -> Callable[..., jax.Array]:
    def attend(*given: jax.Array) -> jax.Array:
        layers.CACHED = limit  # read when the program is traced
        return layers.attend(*given)

    return attend


class GatedUnit(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gelu = functools.partial(nn.gelu, approximate=False)
        return layers.feed_forward(x, 4 * x.shape[-1], gelu, jnp.float32, gated=True)


def compare(title: str, forms: dict[str, Callable[..., Any]], given: Any, rounds: int) -> None:
    compiled = {name: jax.jit(form).lower(*given).compile() for name, form in forms.items()}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds + 1):
        for name, program in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*given))
            times[name].append(1e3 * (time.perf_counter() - start))
    said = ", ".join(f"{n} {statistics.median(own[1:]):.0f} ms" for n, own in times.items())
    print(f"{title}: {said}", flush=True)


def gated(limit: int) -> Callable[..., jax.Array]:
    def unit(*given: Any) -> jax.Array:
        layers.CACHED = limit
        return GatedUnit().apply(*given)

    return unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds

    def draw(*shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(len(shape)), shape)

    given = [draw(2, 4096, 8, 40)] * 3
    forms = {f"2^{power} logits": attention(2**power) for power in (26, 24, 22, 20, 18)}
    compare("attention of 4096 pixels, 2 x 8 heads of 40", forms, given, rounds)
    for batch, side, channels, features in CONVOLUTIONS:
        x, kernel = draw(batch, side, side, channels), 0.01 * draw(3, 3, channels, features)
        given = [x, kernel, convolution.winograd_kernels(kernel)]
        forms = {
            "direct": lambda x, kernel, _: direct(x, kernel),
            "winograd": lambda x, kernel, _: convolution.winograd(
                x, convolution.winograd_kernels(kernel)
            ),
            "with its kernels at hand": lambda x, _, kernels: convolution.winograd(x, kernels),
        }
        if batch * side**2 <= 1024:
            forms["surroundings"] = lambda x, kernel, _: convolution.surroundings(x, kernel)
        compare(f"{batch} x {side} px, {channels} to {features} channels", forms, given, rounds)
    for side, width in ((64, 320), (32, 640), (16, 1280)):
        x = draw(2, side**2, width)
        params = GatedUnit().init(jax.random.key(0), x)
        forms = {f"{2**power} gates": gated(2**power) for power in (26, 23, 22, 21)}
        compare(f"gated unit, {side} px, {width}", forms, [params, x], rounds)


if __name__ == "__main__":
    main()
