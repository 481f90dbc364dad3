"""What stitching costs: time of a stitched run, compile time, memory.

    python benchmarks/stitching.py steps      # time of a run against the sum of its steps
    python benchmarks/stitching.py compile    # DiT-S/2 + DiT-XL/2, by number of steps
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

import tstitch_jax as ts
from tstitch_jax import pipeline
from tstitch_jax.networks import SIZES, dit, init_params


def steps() -> None:
    """The embedded pair, ten guided images: one network alone gives its time per step."""
    networks = [ts.load(name) for name in ("fashion-s", "fashion-xl")]

    def request(plan: ts.Plan) -> pipeline.Sampling:
        return pipeline.prepare(
            jax.random.key(0), networks, labels=list(range(10)), plan=plan, steps=plan.steps
        )

    count, repeats = 50, 15
    plans = {f: ts.Plan.from_counts([round(f * count), count - round(f * count)])
             for f in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)}  # fmt: skip
    plans["interleaved"] = ts.Plan.from_list([0, 1] * (count // 2), 2)
    execute = request(plans[0.0]).compile()
    times = {name: [] for name in plans}
    for _ in range(repeats):
        for name, plan in plans.items():
            dynamic = request(plan).dynamic
            start = time.perf_counter()
            jax.block_until_ready(execute(*dynamic))
            times[name].append(time.perf_counter() - start)
    median = {name: float(np.median(t[1:])) for name, t in times.items()}
    per_step = [median[1.0] / count, median[0.0] / count]
    print(f"per step: {per_step[0] * 1e3:.2f} ms, {per_step[1] * 1e3:.2f} ms, "
          f"ratio {per_step[1] / per_step[0]:.1f} (in multiply-adds "
          f"{networks[1].card.macs / networks[0].card.macs:.1f})")  # fmt: skip
    for name, plan in plans.items():
        print(f"{name}: {median[name]:.3f} s, over the sum of its steps "
              f"{median[name] / plan.cost(per_step):.3f}")  # fmt: skip


@functools.cache
def published_pair():
    """DiT-S/2 and DiT-XL/2 at 256 px as modules and denoisers."""
    modules = [
        dit.DiT(**SIZES[name], image_shape=(32, 32, 4), num_classes=1000)
        for name in ("dit-s-2", "dit-xl-2")
    ]

    def denoiser(module):
        return ts.as_denoiser(
            lambda params, x, t, y: module.apply({"params": params}, x, t, y), "eps", True
        )

    return modules, tuple(denoiser(module) for module in modules)


def lowered(params, count: int, images: int = 1):
    """The sampler of the published pair, and the arguments of one call."""
    _, denoisers = published_pair()
    schedule = ts.make_schedule("linear")
    knots = ts.make_knots(schedule, count)
    plan = ts.Plan.from_fractions([0.4, 0.6], knots, schedule)
    scale = np.float32(1.5)
    given = pipeline.Given(params, plan, (scale, scale), None, (None, None))
    labels = (np.zeros(images, np.int32),) * 2
    arguments = (jax.random.key(0), given, knots, labels, None, None, None, None)
    static = dict(
        denoiser=pipeline._assemble(denoisers, (1000, 1000), (3, 3), 0.0), solver=ts.ddim(),
        shape=(32, 32, 4), encoder=None, decoder=None, clip=False, return_trajectory=False,
        return_predictions=False,
    )  # fmt: skip
    return pipeline._sample.lower(*arguments, **static), arguments


def compile_time() -> None:
    modules, _ = published_pair()
    shapes = tuple(
        jax.eval_shape(functools.partial(init_params, m), jax.random.key(0)) for m in modules
    )
    for count in (100, 10, 50, 250, 1000):
        start = time.perf_counter()
        program, _ = lowered(shapes, count)
        middle = time.perf_counter()
        memory = program.compile().memory_analysis()
        print(
            f"{count} steps: trace {middle - start:.1f} s, "
            f"compile {time.perf_counter() - middle:.1f} s; "
            f"temporaries {memory.temp_size_in_bytes / 1e6:.0f} MB, "
            f"arguments {memory.argument_size_in_bytes / 1e6:.0f} MB",
            flush=True,
        )


def memory() -> None:
    modules, _ = published_pair()

    def zeros(module):
        shapes = jax.eval_shape(functools.partial(init_params, module), jax.random.key(0))
        # Written once, so that every page is really there.
        return jax.tree.map(lambda s: jnp.full(s.shape, 0.01, s.dtype), shapes)

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = peak()
    params = tuple(zeros(module) for module in modules)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    loaded = peak()
    program, arguments = lowered(params, 4)
    jax.block_until_ready(program.compile()(*arguments))
    print(
        f"parameters {size / 1e9:.2f} GB; peak over them: before {before / size:.2f}, "
        f"with parameters {loaded / size:.2f}, after compiling and sampling {peak() / size:.2f} "
        f"({peak() / 1e9:.2f} GB; without the interpreter and libraries "
        f"{(peak() - before) / size:.2f})"
    )


if __name__ == "__main__":
    {"steps": steps, "compile": compile_time, "memory": memory}[sys.argv[1]]()
