"""What solvers and guidance add to the time of the network.

    python benchmarks/solvers.py steps       # time per step of each solver, against DDIM
    python benchmarks/solvers.py interval    # guidance in a share of the steps, against all of them

DiT-S/2 at 256 px with random weights; everything in one run, interleaved; the figures are medians.
"""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import tstitch_jax as ts
from tstitch_jax.models import dit
from tstitch_jax.models.families import SIZES, param_shapes

STEPS = 10


def network():
    """DiT-S/2's denoiser, and weights that do not vanish."""
    module = dit.DiT(**SIZES["dit-s-2"], image_shape=(32, 32, 4), num_classes=1000)
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(0.02 * generator.standard_normal(s.shape), jnp.float32),
        param_shapes(module),
    )

    def apply(params, x, t, y):
        return module.apply({"params": params}, x, t, y)

    return ts.as_denoiser(apply, "eps", True), params


def interleaved(runs, repeats):
    """Median seconds of each, and the median of its ratios to the first in the same round."""
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


def arguments(images):
    keys = ts.image_keys(jax.random.key(0), jnp.arange(images))
    return keys, ts.draw_noise(keys, 0, (32, 32, 4)), jnp.arange(images, dtype=jnp.int32)


def steps() -> None:
    denoiser, params = network()
    keys, x, labels = arguments(2)
    knots = ts.make_knots(ts.make_schedule("linear"), STEPS)
    names = "ddim dpmpp dpmpp_3 unipc unipc_3 dpmpp_sde ddpm euler_ancestral lcm sde pndm heun"
    solvers = {name: ts.make_solver(name) for name in names.split()}

    def compiled(solver):
        run = jax.jit(
            lambda params, x, keys: ts.run(
                denoiser, solver, knots, x, params=params, cond=labels, keys=keys
            )
        )
        return lambda: run(params, x, keys)

    runs = {name: compiled(solver) for name, solver in solvers.items()}
    for name, (seconds, ratio) in interleaved(runs, repeats=9).items():
        print(f"{name}: {seconds / STEPS * 1e3:.1f} ms a step, {ratio:.3f} of ddim")


def interval() -> None:
    denoiser, params = network()
    keys, x, labels = arguments(4)
    knots = ts.make_knots(ts.make_schedule("linear"), STEPS)

    @jax.jit
    def sample(params, x, scales):
        guided = ts.cfg(denoiser, scales, 1000, channels=3)
        return ts.run(guided, ts.ddim(), knots, x, params=params, cond=labels, keys=keys)

    @jax.jit
    def whole(params, x, scale):
        guided = ts.cfg(denoiser, scale, 1000, channels=3)
        return ts.run(guided, ts.ddim(), knots, x, params=params, cond=labels, keys=keys)

    def masked(count):
        first = (STEPS - count) // 2
        scales = np.ones(STEPS, np.float32)
        scales[first : first + count] = 1.5
        return lambda: sample(params, x, scales)

    runs = {"everywhere, one scale": lambda: whole(params, x, np.float32(1.5))}
    runs |= {count: masked(count) for count in (10, 8, 6, 4, 2, 0)}
    for name, (seconds, ratio) in interleaved(runs, repeats=9).items():
        expected = (1 + (name if isinstance(name, int) else STEPS) / STEPS) / 2
        print(f"{name} of {STEPS} steps guided: {seconds:.2f} s, {ratio:.3f} of all, "
              f"expected {expected:.2f}, quotient {ratio / expected:.3f}")  # fmt: skip


if __name__ == "__main__":
    {"steps": steps, "interval": interval}[sys.argv[1]]()
