"""One step of a U-Net by this library and by diffusers, on the CPU: a guided image of 512 px.

    pip install torch diffusers accelerate
    python benchmarks/unets.py [bk-sdm-tiny | sd-1 ...] [--rounds 5] [--side 64]

Both have random weights of the same shapes, float32, two rows of latents, and as many threads as
there are cores; that they compute the same is tested (``tests/test_unet.py``). Runs alternate;
figures are medians.
"""

from __future__ import annotations

import argparse
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import UNet2DConditionModel

from tstitch_jax.networks import param_shapes, unet


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


def main(name: str, rounds: int, side: int) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_grad_enabled(False)
    module = unet.UNet(**unet.SIZES[name], image_shape=(64, 64, 4), context=(77, 768))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(0.02 * rng.standard_normal(s.shape, np.float32)), param_shapes(module)
    )
    apply, network = jax.jit(module.apply), theirs(name)
    x = rng.standard_normal((2, side, side, 4), np.float32)
    context = rng.standard_normal((2, 77, 768), np.float32)
    given = jnp.asarray(x), jnp.full(2, 501.0), jnp.asarray(context)
    taken = torch.tensor(x).permute(0, 3, 1, 2).contiguous(), torch.tensor(context)

    def ours_step() -> None:
        jax.block_until_ready(apply({"params": params}, *given))

    def their_step() -> None:
        network(taken[0], 501, taken[1])

    start = time.perf_counter()
    ours_step()
    compiled = time.perf_counter() - start
    times = {ours_step: [], their_step: []}
    for turn in range(rounds + 1):
        for run in times:
            time.sleep(0.5)  # until the other's threads are at rest
            start = time.perf_counter()
            run()
            if turn:  # the first round warms up
                times[run].append(time.perf_counter() - start)
    ours, other = (np.median(times[run]) for run in times)
    ratio = np.median(np.array(times[ours_step]) / np.array(times[their_step]))
    print(
        f"{name}, {8 * side} px: {ours:.2f} s a step, diffusers {other:.2f} s, median of the "
        f"ratios {ratio:.2f}; first step with compilation {compiled:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    assert jnp.zeros(()).device.platform == "cpu", "set JAX_PLATFORMS=cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["bk-sdm-tiny", "sd-1"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=64, help="of the latents")
    given = parser.parse_args()
    for each in given.names:
        main(each, given.rounds, given.side)
