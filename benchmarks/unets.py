"""A step of a U-Net by this library and by diffusers, on the CPU: a guided image of 512 px.

    pip install torch diffusers accelerate
    python benchmarks/unets.py [--rounds 3] [--side 64] [--steps 20]

This library's is a step of the stitched sampler of BK-SDM-Tiny and Stable Diffusion 1, one
executable for both, whose plan is of the one or the other alone, and what it computes once before
the loop is part of it; diffusers' is a call of its U-Net with the same two rows, of which four
stand for a run. Both have random weights of the same shapes, float32, and as many threads as there
are cores; that they compute the same is tested (``tests/test_unet.py``). Runs alternate; figures
are medians.
"""

from __future__ import annotations

import argparse
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import published
import torch
from diffusers import UNet2DConditionModel

import tstitch_jax as ts
from tstitch_jax.models import unet

NAMES = ("bk-sdm-tiny", "sd-1")
CALLS = 4
"""Of diffusers' U-Net, which does the same in each."""


def theirs(name: str) -> UNet2DConditionModel:
    size = unet.SIZES[name]
    attention = [bool(heads) for heads in size["heads"]]

    def blocks(kind: str, of: list[bool]) -> list[str]:
        return [f"CrossAttn{kind}Block2D" if each else f"{kind}Block2D" for each in of]

    return UNet2DConditionModel(
        block_out_channels=size["widths"], layers_per_block=size["layers"], attention_head_dim=8,
        down_block_types=blocks("Down", attention), up_block_types=blocks("Up", attention[::-1]),
        mid_block_type="UNetMidBlock2DCrossAttn" if size["middle_heads"] else None,
        cross_attention_dim=768, sample_size=64,
    ).eval()  # fmt: skip


def main(rounds: int, side: int, steps: int) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_grad_enabled(False)
    rng = np.random.default_rng(0)

    def weights(shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(0.02 * rng.standard_normal(shape.shape, np.float32))

    networks = [
        published.make(published.text_to_image(name, 8 * side), leaf=weights) for name in NAMES
    ]
    context = rng.standard_normal((2, *published.CONTEXT), np.float32)
    latents = torch.tensor(rng.standard_normal((2, 4, side, side), np.float32))

    def ours_run(k: int) -> None:
        request = ts.Sampler(networks, plan=[1 - k, k], steps=steps).request(
            jax.random.key(0), cond=context[:1], negative=context[1:], decode=False
        )
        jax.block_until_ready(request.run())

    def their_run(network: UNet2DConditionModel) -> None:
        for _ in range(CALLS):
            network(latents, 501, torch.tensor(context))

    start = time.perf_counter()
    ours_run(0)
    print(f"the pair's sampler compiled and run in {time.perf_counter() - start:.0f} s", flush=True)
    for k, name in enumerate(NAMES):
        network = theirs(name)
        times: list[list[float]] = [[], []]
        their_run(network)  # warms up
        for _ in range(rounds):
            for own, run, what, count in zip(
                times, (ours_run, their_run), (k, network), (steps, CALLS), strict=True
            ):
                time.sleep(0.5)  # until the other's threads are at rest
                start = time.perf_counter()
                run(what)
                own.append((time.perf_counter() - start) / count)
        ratio = np.median(np.divide(*times))
        ours, other = map(np.median, times)
        print(
            f"{name}, {8 * side} px: {ours:.2f} s a step, diffusers {other:.2f} s, median of the "
            f"ratios {ratio:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    assert jnp.zeros(()).device.platform == "cpu", "set JAX_PLATFORMS=cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=64, help="of the latents")
    parser.add_argument("--steps", type=int, default=20, help="of our runs")
    given = parser.parse_args()
    main(given.rounds, given.side, given.steps)
