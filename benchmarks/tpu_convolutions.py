"""3 x 3 convolutions of a U-Net on a TPU, in the forms that there are to choose from: estimates.

    python benchmarks/tpu_convolutions.py [--topology v5e:2x2] [--target 0.95]

Needs libtpu, but no TPU; see tpu_aot.py. bfloat16, each between a nonlinearity and a sum as in a
residual block; the time to compile is CPU time. ``--target`` is libtpu's
``xla_jf_convolution_performance_target``.
"""

from __future__ import annotations

import argparse
import os
import time

if __name__ == "__main__":
    os.environ.update(
        JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )  # fmt: skip

import jax
import jax.numpy as jnp
import tpu_aot
from flax import linen as nn
from unet_parts import direct

from tstitch_jax.models import convolution

SHAPES = [
    (2, 64, 320, 320),
    (2, 64, 640, 320),
    (2, 32, 640, 640),
    (2, 16, 1280, 1280),
    (2, 16, 2560, 1280),
    (2, 8, 1280, 1280),
    (4, 8, 1280, 1280),
    (4, 64, 320, 320),
    (4, 64, 960, 320),
    (7, 64, 320, 320),
    (8, 64, 320, 320),
    (8, 32, 640, 640),
    (2, 128, 320, 320),
    (2, 64, 192, 192),
    (1, 128, 512, 512),
    (1, 512, 128, 128),
]
"""Rows, side, channels in and out: of Stable Diffusion, one of LDM-4, and two of a decoder."""


def fixed(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``convolution.shifted`` with places that the compiler knows."""
    _, height, width, _ = x.shape
    bordered = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    places = [(i, j) for i in range(3) for j in range(3)]
    return sum(
        jnp.matmul(
            bordered[:, i : i + height, j : j + width],
            kernel[i, j],
            preferred_element_type=jnp.float32,
        )
        for i, j in places
    ).astype(x.dtype)


def looped(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The products of ``convolution.shifted`` in a loop, of which one is compiled."""
    bordered = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernels = kernel.reshape(9, *kernel.shape[2:])

    def add(place: jax.Array, total: jax.Array) -> jax.Array:
        shifted = jax.lax.dynamic_slice(bordered, (0, place // 3, place % 3, 0), x.shape)
        return total + jnp.matmul(shifted, kernels[place], preferred_element_type=jnp.float32)

    total = jnp.zeros((*x.shape[:3], kernel.shape[3]))
    return jax.lax.fori_loop(0, 9, add, total).astype(x.dtype)


def at_once(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """One product with the nine places of the kernel, whose results are shifted and summed."""
    _, height, width, _ = x.shape
    found = jnp.einsum("bhwc,ijcd->ijbhwd", x, kernel, preferred_element_type=jnp.float32)
    found = jnp.pad(found, ((0, 0),) * 3 + ((1, 1), (1, 1), (0, 0)))
    places = [(i, j) for i in range(3) for j in range(3)]
    return sum(found[i, j, :, i : i + height, j : j + width] for i, j in places).astype(x.dtype)


FORMS = {
    "direct": direct,
    "surroundings": convolution.surroundings,
    "fixed": fixed,
    "shifted": convolution.shifted,
    "looped": looped,
    "at once": at_once,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--target", default="1")
    given = parser.parse_args()
    chip = tpu_aot.CHIPS[given.topology.split(":")[0]]
    place = jax.sharding.SingleDeviceSharding(tpu_aot.devices_of(given.topology)[0])
    for batch, side, channels, features in SHAPES:
        here, there = (batch, side, side, channels), (batch, side, side, features)
        arguments = [
            jax.ShapeDtypeStruct(here, jnp.float32, sharding=place),
            jax.ShapeDtypeStruct((3, 3, channels, features), jnp.bfloat16, sharding=place),
            jax.ShapeDtypeStruct(there, jnp.float32, sharding=place),
        ]
        ideal = 2 * 9 * batch * side**2 * channels * features / chip.flops
        for name, form in FORMS.items():

            def part(x, kernel, rest, form=form):
                return rest + form(nn.silu(x).astype(jnp.bfloat16), kernel)

            lowered = jax.jit(part).lower(*arguments)
            start = time.process_time()
            compiled = lowered.compile(
                compiler_options={"xla_jf_convolution_performance_target": given.target}
            )
            seconds = time.process_time() - start
            program = tpu_aot.Program(compiled.as_text())
            cycles = sum(n * each.cycles for n, each in program.walk(program.entry, switch=True))
            took = cycles / chip.clock
            print(
                f"{batch} x {side} px, {channels} to {features}, {name}: {cycles / 1e3:.0f} k "
                f"cycles, {ideal / took:.0%} of the roofline, compiled in {seconds:.1f} s (CPU)",
                flush=True,
            )


if __name__ == "__main__":
    main()
