"""What stitching costs: time of a stitched run, compile time, memory.

    python benchmarks/stitching.py steps      # time of a run against the sum of its steps
    python benchmarks/stitching.py loops      # one scan with a switch against two loops without
    python benchmarks/stitching.py dtypes     # float32 against bfloat16
    python benchmarks/stitching.py compile    # DiT-S/2 + DiT-XL/2, by number of steps
    python benchmarks/stitching.py noise      # compiling the draw of noise, by its shape
    python benchmarks/stitching.py memory     # peak memory of that pair, against its parameters

Each prints ratios of things measured in one run, interleaved; the figures are medians.
"""

from __future__ import annotations

import functools
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import published

import tstitch_jax as ts
from tstitch_jax.sampling.program import SampleRequest


def steps() -> None:
    """The embedded pair, ten guided images: one network alone gives its time per step."""
    networks = [ts.load(name) for name in ("fashion-s", "fashion-xl")]
    count, repeats = 50, 15

    def request(plan: ts.Plan) -> SampleRequest:
        sampler = ts.Sampler(networks, plan=plan, steps=count)
        return sampler.request(jax.random.key(0), labels=list(range(10)))

    plans = {f: ts.Plan.from_counts([round(f * count), count - round(f * count)])
             for f in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)}  # fmt: skip
    plans["interleaved"] = ts.Plan.from_list([0, 1] * (count // 2), 2)
    execute = request(plans[0.0]).compile()
    times = {name: [] for name in plans}
    for _ in range(repeats):
        for name, plan in plans.items():
            inputs = request(plan).inputs
            start = time.perf_counter()
            jax.block_until_ready(execute(inputs))
            times[name].append(time.perf_counter() - start)
    median = {name: float(np.median(t[1:])) for name, t in times.items()}
    per_step = [median[1.0] / count, median[0.0] / count]
    print(f"per step: {per_step[0] * 1e3:.2f} ms, {per_step[1] * 1e3:.2f} ms, "
          f"ratio {per_step[1] / per_step[0]:.1f} (in multiply-adds "
          f"{networks[1].card.macs / networks[0].card.macs:.1f})")  # fmt: skip
    for name, plan in plans.items():
        print(f"{name}: {median[name]:.3f} s, over the sum of its steps "
              f"{median[name] / plan.cost(per_step):.3f}")  # fmt: skip


def loops() -> None:
    """The one scan with its switch, against two loops with traced bounds and no switch."""
    networks = [ts.load(name) for name in ("fashion-s", "fashion-xl")]
    count, images = 50, 10
    solver, knots = ts.ddim(), jax.tree.map(jnp.asarray, ts.make_knots(networks[1].schedule, count))
    denoisers = [ts.cfg(n.denoiser, 1.5) for n in networks]
    labels = jnp.arange(images)
    cond = ts.Condition(labels, jnp.full_like(labels, 10))
    x = ts.draw_noise(ts.image_keys(jax.random.key(0), labels), 0, (28, 28, 1))

    @jax.jit
    def one_scan(denoisers, plan, x):
        return ts.run(ts.stitch(denoisers, ts.Plan(plan, 2)), solver, knots, x, cond=cond)

    @jax.jit
    def two_loops(denoisers, plan, x):
        def step(k):
            def body(i, x):
                here, there = (jax.tree.map(lambda v, j=j: v[j], knots) for j in (i, i + 1))

                def denoise(x, knot):
                    return denoisers[k](x, knot, cond)

                return solver.step(denoise, x, solver.init(x), here, there, None)[0]

            return body

        switch = jnp.sum(plan == 0)
        return jax.lax.fori_loop(switch, count, step(1), jax.lax.fori_loop(0, switch, step(0), x))

    for first in (0, 20, 50):
        plan = jnp.asarray(ts.Plan.from_counts([first, count - first]).networks)
        times = {one_scan: [], two_loops: []}
        for _ in range(8):
            for function in times:
                start = time.perf_counter()
                result = jax.block_until_ready(function(denoisers, plan, x))
                times[function].append(time.perf_counter() - start)
        error = float(abs(result - one_scan(denoisers, plan, x)).max())
        ratio = np.median(np.array(times[two_loops][1:]) / np.array(times[one_scan][1:]))
        print(f"{first} of {count} steps small: one scan {np.median(times[one_scan][1:]):.3f} s, "
              f"two loops / one scan {ratio:.3f}, difference {error:.0e}")  # fmt: skip


def dtypes() -> None:
    """The embedded networks, each alone; 25 guided images in ten steps of DPM-Solver++."""
    for name in ("fashion-s", "fashion-b", "fashion-xl"):
        programs = {}
        for dtype in (jnp.float32, jnp.bfloat16):
            sampler = ts.Sampler(name, steps=10, solver="dpmpp", spacing="trailing", dtype=dtype)
            request = sampler.request(jax.random.key(0), labels=[i % 10 for i in range(25)])
            programs[jnp.dtype(dtype).name] = request.compile(), request.inputs
        times, images = {dtype: [] for dtype in programs}, {}
        for _ in range(8):
            for dtype, (program, inputs) in programs.items():
                start = time.perf_counter()
                images[dtype] = np.asarray(program(inputs)[0], np.float32)
                times[dtype].append(time.perf_counter() - start)
        full, half = (np.array(own[1:]) for own in times.values())
        error = np.abs(images["float32"] - images["bfloat16"]).mean()
        print(f"{name}: float32 {np.median(full):.3f} s, bfloat16 {np.median(half):.3f} s, "
              f"median of the ratios {np.median(full / half):.2f}, mean difference of a pixel "
              f"{error:.4f} of 2", flush=True)  # fmt: skip


def published_pair(count: int, leaf=lambda shape: shape) -> SampleRequest:
    """DiT-S/2 and DiT-XL/2 at 256 px, one guided image, asked for latents."""
    networks = [published.make(published.dit(name), leaf=leaf) for name in ("dit-s-2", "dit-xl-2")]
    sampler = ts.Sampler(networks, plan=[0.4, 0.6], steps=count)
    return sampler.request(jax.random.key(0), labels=[0], decode=False)


def compile_time() -> None:
    for count in (100, 10, 50, 250, 1000):
        request = published_pair(count)
        start = time.perf_counter()
        program = request.lower()
        middle = time.perf_counter()
        memory = program.compile().memory_analysis()
        print(
            f"{count} steps: trace {middle - start:.1f} s, "
            f"compile {time.perf_counter() - middle:.1f} s; "
            f"temporaries {memory.temp_size_in_bytes / 1e6:.0f} MB, "
            f"arguments {memory.argument_size_in_bytes / 1e6:.0f} MB",
            flush=True,
        )


def noise() -> None:
    """Compiling the draw of noise: flat, as the library does it, and with each image's shape."""

    def shaped(keys, stream, shape):
        streams = jax.vmap(jax.random.fold_in, (0, None))(keys, stream)
        return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(streams)

    keys = ts.image_keys(jax.random.key(0), jnp.arange(4))
    for shape in ((28, 28, 1), (32, 32, 4), (64, 64, 4), (32, 32, 3)):
        times: list[list[float]] = [[], []]
        drawn = []
        for stream in range(5):  # each another program
            for draw, taken in zip((ts.draw_noise, shaped), times, strict=True):
                function = functools.partial(draw, stream=stream, shape=shape)
                lowered = jax.jit(function).lower(keys)
                start = time.process_time()
                execute = lowered.compile()
                taken.append(time.process_time() - start)
                drawn.append(np.asarray(execute(keys)))
        flat, other = (float(np.median(taken)) for taken in times)
        same = all((x == y).all() for x, y in zip(drawn[::2], drawn[1::2], strict=True))
        print(
            f"{shape}: {flat:.2f} s of CPU time, shaped {other:.2f} s, ratio {flat / other:.2f}; "
            f"the same numbers: {same}",
            flush=True,
        )


def memory() -> None:
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = peak()
    # Written once, so that every page is really there.
    request = published_pair(4, lambda s: jnp.full(s.shape, 0.01, s.dtype))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(request.inputs.denoisers))
    loaded = peak()
    jax.block_until_ready(request.compile()(request.inputs))
    print(
        f"parameters {size / 1e9:.2f} GB; peak over them: before {before / size:.2f}, "
        f"with parameters {loaded / size:.2f}, after compiling and sampling {peak() / size:.2f} "
        f"({peak() / 1e9:.2f} GB; without the interpreter and libraries "
        f"{(peak() - before) / size:.2f})"
    )


if __name__ == "__main__":
    kinds = dict(steps=steps, loops=loops, dtypes=dtypes, compile=compile_time, noise=noise,
                 memory=memory)  # fmt: skip
    kinds[sys.argv[1]]()
