"""The same job by this library and by PyTorch: DiT-S/2, then DiT-XL/2, guided, on the CPU.

    pip install torch diffusers accelerate
    python benchmarks/against_pytorch.py [images] [rounds]

PyTorch runs diffusers' ``DiTTransformer2DModel`` in a loop of its own, with as many threads as
there are cores; both have the same random weights (converted by this library), noise, labels and
plan, float32, 256 px, ten DDIM steps, and no decoder. Runs alternate; figures are medians.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import DiTTransformer2DModel

import tstitch_jax as ts
from checkpoints_convert import convert
from tstitch_jax.models.measure import SIZES

STEPS, SCALE, FRACTIONS = 10, 4.0, (0.0, 0.4, 1.0)


def torch_network(name: str) -> DiTTransformer2DModel:
    size = SIZES[name]
    torch.manual_seed(len(name))
    return DiTTransformer2DModel(
        num_attention_heads=size["num_heads"],
        attention_head_dim=size["width"] // size["num_heads"],
        in_channels=4, out_channels=8, num_layers=size["depth"], sample_size=32, patch_size=2,
        num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
    ).eval()  # fmt: skip


@torch.no_grad()
def torch_sample(networks, plan, knots, labels, noise) -> torch.Tensor:
    """DDIM with guidance of the first three channels, as DiT is sampled; NCHW."""
    x = noise
    both = torch.cat([labels, torch.full_like(labels, 1000)])
    for i, network in enumerate(plan):
        times = torch.full((2 * len(x),), int(knots.time[i]))
        output = networks[network](
            torch.cat([x, x]), timestep=times, class_labels=both
        ).sample[:, :4]  # fmt: skip
        given, nothing = output.chunk(2)
        guided = nothing[:, :3] + SCALE * (given[:, :3] - nothing[:, :3])
        eps = torch.cat([guided, given[:, 3:]], dim=1)
        alpha, alpha_next = map(float, knots.alpha[i : i + 2])
        sigma, sigma_next = map(float, knots.sigma[i : i + 2])
        x0 = (x - sigma * eps) / alpha
        x = alpha_next * x0 + sigma_next * eps
    return x


def main(images: int = 1, rounds: int = 5) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    theirs = [torch_network(name) for name in ("dit-s-2", "dit-xl-2")]
    ours = []
    for network in theirs:
        with tempfile.TemporaryDirectory() as folder:
            network.save_pretrained(f"{folder}/theirs")
            convert(f"{folder}/theirs", f"{folder}/ours")
            ours.append(ts.load(f"{folder}/ours"))
    labels = np.arange(images)
    noise = np.random.default_rng(0).standard_normal((images, 32, 32, 4)).astype(np.float32)
    knots = ts.make_knots(ours[1].schedule, STEPS)
    for fraction in FRACTIONS:
        plan = ts.Plan.from_fractions([fraction, 1 - fraction], knots, ours[1].schedule)

        def jax_run(plan=plan):
            return np.asarray(
                ts.sample(
                    jax.random.key(0), ours, labels=labels, plan=plan, steps=STEPS, noise=noise,
                    cfg_scale=SCALE, cfg_channels=3, decode=False,
                )
            )  # fmt: skip

        def torch_run(plan=plan):
            latents = torch_sample(
                theirs, plan.networks, knots, torch.tensor(labels),
                torch.tensor(noise).permute(0, 3, 1, 2),
            )  # fmt: skip
            return latents.permute(0, 2, 3, 1).numpy()

        results, times = {}, {jax_run: [], torch_run: []}
        for turn in range(rounds + 1):
            for run in times:
                time.sleep(0.5)  # until the other's threads are at rest
                start = time.perf_counter()
                results[run] = run()
                if turn:  # the first round compiles and warms up
                    times[run].append(time.perf_counter() - start)
        one, other = results[jax_run], results[torch_run]
        error = np.abs(one - other).max() / np.abs(other).max()
        mine, his = (np.median(times[run]) for run in (jax_run, torch_run))
        ratio = np.median(np.array(times[jax_run]) / np.array(times[torch_run]))
        print(
            f"{images} images, fraction {fraction:g}: {mine:.2f} s, PyTorch {his:.2f} s, "
            f"median of the ratios {ratio:.2f}; largest difference / largest value {error:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    assert jnp.zeros(()).device.platform == "cpu", "set JAX_PLATFORMS=cpu"
    main(*map(int, sys.argv[1:]))
