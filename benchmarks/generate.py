"""The command line from outside: start, kept programs, memory, by the process's own figures.

    python benchmarks/generate.py

Each line is a fresh process: wall time and peak memory. The cache of programs is empty at first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time


def run(cache: str, *arguments: str) -> tuple[float, float]:
    """Seconds and peak gigabytes of a command."""
    environment = os.environ | {"TSTITCH_CACHE": cache, "JAX_PLATFORMS": "cpu"}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "tstitch_jax.cli", *arguments], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, arguments
    return time.perf_counter() - start, usage.ru_maxrss / 1e6


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache, options = f"{folder}/cache", ("--fractions", "0.4", "0.6")
        for turn in ("first", "second", "third"):
            took, _ = run(cache, "generate", *options, "--num", "1", "--batch", "1",
                          "--out", f"{folder}/{turn}")  # fmt: skip
            print(f"one image, {turn} run: {took:.1f} s", flush=True)
        for turn in ("first", "second"):
            took, _ = run(cache, "sample", "--steps", "10", *options, "--out", f"{folder}/a.png")
            print(f"tstitch sample, ten steps, {turn} run: {took:.1f} s", flush=True)
        small = ("--networks", "fashion-s", "--steps", "2", "--batch", "16")
        for number in ("16", "160", "1600", "16000"):
            took, peak = run(
                cache, "generate", *small, "--num", number, "--out", f"{folder}/{number}"
            )
            print(f"{number} images: {took:.1f} s, peak {peak:.3f} GB", flush=True)
        for dtype in ("float32", "bfloat16"):
            took, peak = run(cache, "generate", *options, "--dtype", dtype, "--num", "64",
                             "--out", f"{folder}/{dtype}")  # fmt: skip
            print(f"64 images in {dtype}: {took:.1f} s, peak {peak:.3f} GB", flush=True)


if __name__ == "__main__":
    main()
