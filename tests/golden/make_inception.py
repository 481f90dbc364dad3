"""Makes ``inception``: what pytorch-fid's network computes with weights of a recipe.

    pip install torch==2.14.1 torchvision pytorch-fid==0.3.0 tensorflow-cpu==2.21.0
    python tests/golden/make_inception.py

``names.json`` holds the tensors' names and shapes. Their values are those of
``tests/inception_recipe.py``, and are not stored. ``expected.npz`` holds what TensorFlow's
first bilinear resize makes of images of several sizes; and, of the resized images of the first
size, the three outputs and 500 values of each block's, at the places that ``np.linspace`` gives.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytorch_fid.inception
import tensorflow as tf
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from inception_recipe import SIZES, pixels_of, some, weights

OUT = Path(__file__).parent / "inception"


def resized(pixels, side=299):
    size = (side, side)
    return tf.compat.v1.image.resize_bilinear(pixels.astype(np.float32), size).numpy()


# The network of pytorch-fid without its published weights, which are not to be had here.
pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: {}
load = torch.nn.Module.load_state_dict
torch.nn.Module.load_state_dict = lambda self, *_, **__: None
net = pytorch_fid.inception.fid_inception_v3().eval()
torch.nn.Module.load_state_dict = load

names = {name: list(tensor.shape) for name, tensor in net.state_dict().items()}
(OUT / "names.json").write_text(json.dumps(names, indent=0) + "\n")
net.load_state_dict({name: torch.from_numpy(v) for name, v in weights(names).items()})

found = {}
for name, module in net.named_children():
    if name.startswith("Mixed"):
        module.register_forward_hook(lambda _m, _i, out, name=name: found.__setitem__(name, out))
net.Mixed_6d.branch1x1.register_forward_hook(lambda _m, _i, out: found.__setitem__("6d", out))
net.avgpool.register_forward_hook(lambda _m, _i, out: found.__setitem__("pool", out))

pixels = pixels_of(SIZES[0])
x = torch.from_numpy((resized(pixels) - 128) / 128).permute(0, 3, 1, 2)
with torch.no_grad():
    net(x)
    logits = found["pool"].flatten(1) @ net.fc.weight.T


def nhwc(tensor):
    return tensor.permute(0, 2, 3, 1).numpy()


expected = {
    "pool": found.pop("pool").flatten(1).numpy(),
    "logits": logits.numpy(),
    "spatial": nhwc(found.pop("6d"))[..., :7].reshape(len(pixels), -1),
}
expected |= {name.lower(): some(nhwc(tensor)) for name, tensor in found.items()}
expected |= {f"resized_{i}": some(resized(pixels_of(size))) for i, size in enumerate(SIZES)}
np.savez(OUT / "expected.npz", **expected)
