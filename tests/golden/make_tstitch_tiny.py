"""Copies the published program's tiny networks and outputs into the goldens, as plain ``.npz``.

Needs torch; run once:  python make_tstitch_tiny.py FOLDER
FOLDER holds ``small.pt``, ``base.pt``, ``large.pt`` (state dicts with the published DiT's keys)
and ``expected.npz`` (that program's outputs for them, NCHW; see ``tests/test_published.py``).
"""

import sys
from pathlib import Path

import numpy as np
import torch

source, target = Path(sys.argv[1]), Path(__file__).parent / "tstitch_tiny"
target.mkdir(exist_ok=True)
for name in ("small", "base", "large"):
    state = torch.load(source / f"{name}.pt", map_location="cpu", weights_only=True)
    state = state.get("ema", state)
    np.savez(target / f"{name}.npz", **{key: value.numpy() for key, value in state.items()})
with np.load(source / "expected.npz") as expected:
    np.savez_compressed(target / "expected.npz", **expected)
