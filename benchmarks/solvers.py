"""The time that solvers and guidance add to that of the network.

    python benchmarks/solvers.py steps       # time per step of each solver, against DDIM
    python benchmarks/solvers.py interval    # guidance in a share of the steps, against all of them

DiT-S/2 at 256 px with random weights. All variants run alternately in one process; the figures are
medians.
"""

from __future__ import annotations

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import tstitch_jax as ts
from tstitch_jax.models import dit
from tstitch_jax.models.build import FlaxApply
from tstitch_jax.models.measure import SIZES, param_shapes

STEPS = 10


def make_denoiser():
    """DiT-S/2's denoiser, with weights that do not vanish."""
    module = dit.DiT(**SIZES["dit-s-2"], image_shape=(32, 32, 4), num_classes=1000)
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(0.02 * generator.standard_normal(s.shape), jnp.float32),
        param_shapes(module),
    )
    return ts.as_denoiser(FlaxApply(module), params, "eps", learned_variance=True)


def interleaved(runs, repeats):
    """Median seconds of each run, and median ratio to the first one in the same round."""
    times = {name: [] for name in runs}
    for run in runs.values():  # compiles
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    first = np.array(next(iter(times.values())))
    return {n: (float(np.median(t)), float(np.median(np.array(t) / first)))
            for n, t in times.items()}  # fmt: skip


def sampler(images):
    """``sample(denoiser, solver)``, compiled once for each form of its arguments."""
    knots = ts.make_knots(ts.make_schedule("linear"), STEPS)
    keys = ts.image_keys(jax.random.key(0), jnp.arange(images))
    x, labels = ts.draw_noise(keys, 0, (32, 32, 4)), jnp.arange(images, dtype=jnp.int32)
    cond = ts.Condition(labels, jnp.full_like(labels, 1000))
    run = jax.jit(ts.run)
    return lambda denoiser, solver: run(denoiser, solver, knots, x, cond=cond, keys=keys)


def steps() -> None:
    denoiser, sample = make_denoiser(), sampler(images=2)
    names = "ddim dpmpp dpmpp_3 unipc unipc_3 dpmpp_sde ddpm euler_ancestral lcm sde pndm heun"
    runs = {
        name: functools.partial(sample, denoiser, ts.make_solver(name)) for name in names.split()
    }
    for name, (seconds, ratio) in interleaved(runs, repeats=9).items():
        print(f"{name}: {seconds / STEPS * 1e3:.1f} ms a step, {ratio:.3f} of ddim")


def interval() -> None:
    denoiser, sample = make_denoiser(), sampler(images=4)

    def guided(scale):
        return functools.partial(sample, ts.cfg(denoiser, scale, channels=3), ts.ddim())

    def masked(count):
        first = (STEPS - count) // 2
        scales = np.ones(STEPS, np.float32)
        scales[first : first + count] = 1.5
        return guided(scales)

    runs = {"everywhere, one scale": guided(1.5)}
    runs |= {count: masked(count) for count in (10, 8, 6, 4, 2, 0)}
    for name, (seconds, ratio) in interleaved(runs, repeats=9).items():
        expected = (1 + (name if isinstance(name, int) else STEPS) / STEPS) / 2
        print(f"{name} of {STEPS} steps guided: {seconds:.2f} s, {ratio:.3f} of all, "
              f"expected {expected:.2f}, quotient {ratio / expected:.3f}")  # fmt: skip


if __name__ == "__main__":
    {"steps": steps, "interval": interval}[sys.argv[1]]()
