"""Copies the published program's tiny networks and outputs into the goldens.

Run once:  python make_tstitch_tiny.py FOLDER
FOLDER holds ``small.pt``, ``base.pt``, ``large.pt`` (state dicts with the published DiT's keys,
the last one under ``"ema"``, as torch wrote them) and ``expected.npz`` (that program's outputs for
them, NCHW; see ``tests/test_published.py``).
"""

import shutil
import sys
from pathlib import Path

import numpy as np

source, target = Path(sys.argv[1]), Path(__file__).parent / "tstitch_tiny"
target.mkdir(exist_ok=True)
for name in ("small", "base", "large"):
    shutil.copyfile(source / f"{name}.pt", target / f"{name}.pt")
with np.load(source / "expected.npz") as expected:
    np.savez_compressed(target / "expected.npz", **expected)
