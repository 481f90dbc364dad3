"""What conversion, loading and importing cost, with a DiT-XL/2 of random weights (2.7 GB).

    python benchmarks/conversion.py             # everything below; in a folder under /tmp
    python benchmarks/conversion.py import      # time of import tstitch_jax, and of a bare jax

Each step runs in a process of its own, whose peak memory (resident, pages of the file included) is
that of the step alone; times are by the wall.
"""

from __future__ import annotations

import io
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np


def write_checkpoint(path: Path) -> None:
    """A file as ``torch.save({"ema": state_dict}, path)`` writes it, without torch."""
    from tstitch_jax.models import dit

    width, depth = dit.SIZES["xl"]["width"], dit.SIZES["xl"]["depth"]
    layers = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (32, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "x_embedder.proj": (width, 4, 2, 2),
    }
    for i in range(depth):
        layers |= {f"blocks.{i}.attn.qkv": (3 * width, width),
                   f"blocks.{i}.attn.proj": (width, width),
                   f"blocks.{i}.mlp.fc1": (4 * width, width),
                   f"blocks.{i}.mlp.fc2": (width, 4 * width),
                   f"blocks.{i}.adaLN_modulation.1": (6 * width, width)}  # fmt: skip
    shapes = {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    shapes |= {"y_embedder.embedding_table.weight": (1001, width), "pos_embed": (1, 256, width)}

    # In the text protocol a global is its name, so that the file needs no torch to be written.
    out = io.StringIO()
    out.write("(dS'ema'\n(d")
    for number, (name, shape) in enumerate(shapes.items()):
        strides, step = [], 1
        for size in reversed(shape):
            strides.insert(0, step)
            step *= size
        sizes, steps = ("".join(f"I{n}\n" for n in x) for x in (shape, strides))
        out.write(f"S'{name}'\nctorch._utils\n_rebuild_tensor_v2\n")
        out.write(f"((S'storage'\nctorch\nFloatStorage\nS'{number}'\nS'cpu'\nI{step}\nt")
        out.write("Q")  # BINPERSID
        out.write(f"I0\n({sizes}t({steps}tI00\nNtRs")
    out.write("s.")
    generator = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("net/data.pkl", out.getvalue())
        for number, (name, shape) in enumerate(shapes.items()):
            if name == "pos_embed":
                values = dit.position_code(16, 16, width)
            else:
                values = generator.standard_normal(shape, np.float32)
                values *= 0.02
            with archive.open(f"net/data/{number}", "w", force_zip64=True) as record:
                record.write(values.tobytes())


STEPS = {
    "convert": "from checkpoints_convert import convert; convert('{file}', '{out}')",
    "load": "import tstitch_jax as ts; network = ts.load('{out}')",
}
REPORT = """
import resource, time, sys
start = time.perf_counter()
{code}
took = time.perf_counter() - start
print(took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def run(code: str) -> tuple[float, float]:
    """Seconds and peak bytes of some code in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", REPORT.format(code=code)], capture_output=True, text=True, check=True
    )
    seconds, peak = result.stdout.split()
    return float(seconds), float(peak)


def imports(repeats: int = 7) -> None:
    """Time of the import, whole process, alternating with that of jax."""
    times: dict[str, list[float]] = {"jax": [], "jax, flax.linen": [], "tstitch_jax": []}
    for _ in range(repeats):
        for name in times:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {name}"], check=True)
            times[name].append(time.perf_counter() - start)
    for name, taken in times.items():
        print(f"import {name}: {statistics.median(taken):.2f} s")


def main() -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        file, out = folder / "DiT-XL-2-256x256.pt", folder / "net"
        write_checkpoint(file)
        size = file.stat().st_size
        print(f"file: {size / 1e9:.2f} GB")
        _, floor = run("import tstitch_jax")
        for name, code in STEPS.items():
            seconds, peak = run(code.format(file=file, out=out))
            print(
                f"{name}: {seconds:.1f} s, peak {peak / 1e9:.2f} GB = {peak / size:.2f} of the "
                f"file; without interpreter and libraries {(peak - floor) / size:.2f}"
            )
    finally:
        shutil.rmtree(folder)
    imports()


if __name__ == "__main__":
    imports() if sys.argv[1:] == ["import"] else main()
