"""Features of the Inception network by this library and by PyTorch, on the CPU.

    pip install torch torchvision pytorch-fid
    python benchmarks/features.py [rounds]

Both run the same random weights on the same 299x299 images, 32 at a time, float32, PyTorch with as
many threads as there are cores. Runs alternate; figures are medians. Ours includes the resizing
(which has nothing to do here) and the sharding; PyTorch's stops at the pooled features.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time

import numpy as np
import pytorch_fid.inception
import torch
from safetensors.torch import save_file

import tstitch_jax as ts
from checkpoints_convert import convert
from tstitch_jax.evaluation.features import UNIT, Extractor


def torch_network() -> torch.nn.Module:
    """pytorch-fid's network with random weights in place of the published ones."""
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: {}
    load, torch.nn.Module.load_state_dict = torch.nn.Module.load_state_dict, lambda *_, **__: None
    torch.manual_seed(0)
    net = pytorch_fid.inception.fid_inception_v3().eval()
    torch.nn.Module.load_state_dict = load
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    net.fc = torch.nn.Linear(2048, 1008)
    return net


def main(rounds: int) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    net = torch_network()
    with tempfile.TemporaryDirectory() as folder:
        save_file(net.state_dict(), f"{folder}/weights.safetensors")
        convert(f"{folder}/weights.safetensors", f"{folder}/network")
        extract = Extractor(ts.load(f"{folder}/network"))
    found = {}
    net.avgpool.register_forward_hook(lambda _m, _i, out: found.__setitem__("pool", out))
    pixels = np.random.default_rng(0).integers(0, 256, (UNIT, 299, 299, 3)).astype(np.uint8)
    images = torch.from_numpy((pixels.astype(np.float32) - 128) / 128).permute(0, 3, 1, 2)
    images = images.contiguous()
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    ours = None
    for i in range(rounds + 1):
        start = time.perf_counter()
        ours = extract(pixels).pool
        middle = time.perf_counter()
        with torch.no_grad():
            net(images)
        end = time.perf_counter()
        if i:  # the first round warms up
            times["ours"].append(middle - start)
            times["torch"].append(end - middle)
    expected = found["pool"].flatten(1).numpy()
    difference = np.abs(ours - expected).max() / np.abs(expected).max()
    a, b = (statistics.median(values) / UNIT * 1e3 for values in times.values())
    ratio = statistics.median(x / y for x, y in zip(*times.values(), strict=True))
    print(f"this library {a:.1f} ms an image, PyTorch {b:.1f} ms, median of the ratios {ratio:.2f}")
    print(f"largest difference of the pooled features, relative: {difference:.1e}")


main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
