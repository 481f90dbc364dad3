"""One of two real processes; run by test_generate.py: PORT INDEX FOLDER JOB."""

import os
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# As the tests that start it compile (conftest.py), but with two devices each.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)

import jax
import numpy as np
from helpers import tiny_network

import tstitch_jax as ts
from tstitch_jax.cli.devices import leave_hosts
from tstitch_jax.jobs.shards import Shards


def main(port: str, index: str, out: str, job: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    folder = Path(out)
    if job == "sample":
        mesh = ts.make_mesh()  # of all devices of both
        pair = [ts.shard(tiny_network(seed), mesh) for seed in (0, 1)]
        images = ts.sample(
            jax.random.key(0), pair, labels=list(range(7)), fractions=[0.5, 0.5], steps=4,
            solver="ddpm", decode=False,
        )  # fmt: skip
        for shard in images.addressable_shards:
            np.savez(folder / f"{index}-{shard.device.id}.npz", start=shard.index[0].start or 0,
                     images=shard.data)  # fmt: skip
    else:
        write = Shards.write

        def slowly(self, k, pixels):
            if job == f"die {index}" and k > 3:
                print("dying", flush=True)
                time.sleep(1000)  # to be killed
            if job == "fail" and index == "1" and k > 3:
                raise OSError(28, "No space left on device")
            write(self, k, pixels)

        Shards.write = slowly
        mesh = ts.make_mesh(devices=jax.local_devices())
        network = ts.shard(tiny_network(image_shape=(8, 8, 3), guidance_channels=None), mesh)
        sampler = ts.Sampler(network, steps=3)
        options = dict(num=15, batch=2, progress=False, host_timeout=4)
        if job == "disagree":
            for name, more in (("job", dict(seed=int(index))), ("job", dict(num=15 + int(index))),
                               (f"job {index}", {})):  # fmt: skip
                try:
                    ts.generate(folder / name, sampler, **(options | more))
                except OSError as error:
                    print(f"error: {error}", flush=True)
        else:
            try:
                ts.generate(folder / "job", sampler, **options)
            except OSError as error:
                print(f"error: {error}", flush=True)
                leave_hosts(2)
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
