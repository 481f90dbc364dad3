"""Scanned against unrolled layers: which should ``models/dit.py`` use?

    python benchmarks/layers.py cpu                 # times this machine
    python benchmarks/layers.py tpu [v5e:2x2]       # the TPU compiler's estimate; needs libtpu

Both variants run the same block with the same weights; the scanned one holds them stacked.
"""

from __future__ import annotations

import os
import re
import sys
import time

if __name__ == "__main__" and sys.argv[1:2] == ["tpu"]:
    os.environ.update(
        JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )  # fmt: skip

import jax
import jax.numpy as jnp
import numpy as np

from tstitch_jax.models import dit
from tstitch_jax.models.measure import SIZES


def make(name: str, batch: int, dtype, scanned: bool):
    """A function of all blocks, and the shapes of its arguments."""
    size = SIZES[name]
    block = dit.Block(size["num_heads"], 4.0, dtype, 1e-6)
    x = jax.ShapeDtypeStruct((batch, 256, size["width"]), dtype)
    c = jax.ShapeDtypeStruct((batch, size["width"]), jnp.float32)
    one = jax.eval_shape(block.init, jax.random.key(0), x, c)["params"]
    depth = size["depth"]

    def loop(params, x, c):
        for p in params:
            x = block.apply({"params": p}, x, c)
        return x

    def scan(params, x, c):
        return jax.lax.scan(lambda x, p: (block.apply({"params": p}, x, c), None), x, params)[0]

    if not scanned:
        return loop, ([one] * depth, x, c)
    stacked = jax.tree.map(lambda s: jax.ShapeDtypeStruct((depth, *s.shape), s.dtype), one)
    return scan, (stacked, x, c)


def on_this_machine() -> None:
    for name, batch in (("dit-s-2", 2), ("dit-s-2", 8), ("dit-xl-2", 2)):
        ready = {}
        for scanned in (False, True):
            function, shapes = make(name, batch, jnp.float32, scanned)
            generator = np.random.default_rng(0)
            arguments = jax.tree.map(
                lambda s, g=generator: jnp.asarray(
                    0.02 * g.standard_normal(s.shape, dtype=np.float32)
                ),
                shapes,
            )
            start = time.perf_counter()
            compiled = jax.jit(function).lower(*arguments).compile()
            ready[scanned] = compiled, arguments, time.perf_counter() - start
        times = {False: [], True: []}
        for _ in range(7):
            for scanned, (compiled, arguments, _) in ready.items():
                start = time.perf_counter()
                jax.block_until_ready(compiled(*arguments))
                times[scanned].append(time.perf_counter() - start)
        loop, scan = (float(np.median(times[s][1:])) for s in (False, True))
        print(
            f"{name} batch {batch}: unrolled {loop:.3f} s, scanned {scan:.3f} s, "
            f"scanned/unrolled {scan / loop:.2f}; compile {ready[False][2]:.1f} s, "
            f"{ready[True][2]:.1f} s; temporaries "
            f"{ready[False][0].memory_analysis().temp_size_in_bytes / 1e6:.0f} MB, "
            f"{ready[True][0].memory_analysis().temp_size_in_bytes / 1e6:.0f} MB",
            flush=True,
        )


def cycles(hlo: str, depth: int) -> int:
    """Sum of ``estimated_cycles``, those of the loop over layers as often as it runs."""
    bodies = set(re.findall(r"body=%?([\w.-]+)", hlo))
    total = 0
    for computation in re.split(r"\n(?=[%\w])", hlo):
        name = re.match(r"(?:ENTRY )?%?([\w.-]+)", computation)
        found = sum(int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', computation))
        total += found * (depth if name and name[1] in bodies else 1)
    return total


def by_the_tpu_compiler(topology: str) -> None:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    one_chip = jax.sharding.SingleDeviceSharding(devices[0])
    for name, batch in (("dit-s-2", 16), ("dit-xl-2", 16)):
        found = {}
        for scanned in (False, True):
            function, shapes = make(name, batch, jnp.bfloat16, scanned)
            start = time.perf_counter()
            lowered = jax.jit(function, in_shardings=one_chip, out_shardings=one_chip).lower(
                *shapes
            )
            text = lowered.compile().as_text()
            found[scanned] = cycles(text, SIZES[name]["depth"]), time.perf_counter() - start
        (loop, loop_time), (scan, scan_time) = found[False], found[True]
        print(
            f"{name} batch {batch} bfloat16, {topology}: unrolled {loop / 1e6:.2f} M cycles, "
            f"scanned {scan / 1e6:.2f} M, scanned/unrolled {scan / loop:.2f}; "
            f"compile {loop_time:.0f} s, {scan_time:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["tpu"]:
        by_the_tpu_compiler(next((a for a in sys.argv[2:] if ":" in a), "v5e:2x2"))
    else:
        on_this_machine()
