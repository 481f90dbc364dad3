"""Makes ``diffusers_tiny``: small random networks of diffusers, and what they compute.

    pip install torch==2.13.0 diffusers==0.42.1 safetensors==0.8.0
    python tests/golden/make_diffusers_tiny.py

``dit`` and ``vae`` are folders as diffusers writes them, weights in float16; ``expected.npz`` holds
what float32 networks with these weights compute; ``names.json`` the names and shapes of the
full-size networks, and CompVis' name of each tensor of the autoencoders.
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

OUT = Path(__file__).parent / "diffusers_tiny"
torch.manual_seed(0)


def random_weights(model, scale):
    """Nothing stays at a special value such as 0 or 1, and all is exact in float16."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            norm = "norm" in name and name.endswith("weight") and tensor.ndim == 1
            tensor.copy_((scale * torch.randn_like(tensor) + norm).half().float())
    return model.eval()


def save(model, folder):
    model.half().save_pretrained(OUT / folder)
    # Loaded anew, since buffers such as the position code were rounded too.
    return type(model).from_pretrained(OUT / folder, torch_dtype=torch.float32).eval()


def nhwc(tensor):
    return tensor.detach().permute(0, 2, 3, 1).numpy()


def watch(module, name, found):
    module.register_forward_hook(lambda _m, _i, output: found.__setitem__(name, output.detach()))


def compvis_name(name, levels):
    """The name of a tensor of AutoencoderKL in CompVis' program."""
    parts = name.split(".")
    if parts[0] not in ("encoder", "decoder"):
        return name
    half, rest = parts[0], ".".join(parts[1:])
    for i in range(levels):
        rest = rest.replace(f"down_blocks.{i}.resnets", f"down.{i}.block")
        rest = rest.replace(f"down_blocks.{i}.downsamplers.0", f"down.{i}.downsample")
        if rest.startswith(f"up_blocks.{i}."):
            rest = rest.replace(f"up_blocks.{i}.resnets", f"up.{levels - 1 - i}.block")
            rest = rest.replace(f"up_blocks.{i}.upsamplers.0", f"up.{levels - 1 - i}.upsample")
            break
    rest = rest.replace("mid_block.resnets.0", "mid.block_1")
    rest = rest.replace("mid_block.resnets.1", "mid.block_2")
    attention = "mid_block.attentions.0."
    if rest.startswith(attention):
        rest = rest.replace(attention, "mid.attn_1.").replace("group_norm", "norm")
        rest = rest.replace("to_out.0", "proj_out").replace("to_", "")
    rest = rest.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    return f"{half}.{rest}"


def compvis_names(model):
    """Checked by diffusers' own conversion of that program's checkpoints."""
    state, levels = model.state_dict(), len(model.config.block_out_channels)
    names = {name: compvis_name(name, levels) for name in state}
    foreign = {
        names[name]: tensor[:, :, None, None]
        if "attentions" in name and tensor.ndim == 2
        else tensor
        for name, tensor in state.items()
    }
    back = convert_ldm_vae_checkpoint(foreign, dict(model.config))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name].reshape(state[name].shape), state[name]) for name in state)
    return names


expected = {}

dit = random_weights(
    DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ),
    0.1,
)
dit = save(dit, "dit")
found = {}
for i, block in enumerate(dit.transformer_blocks):
    watch(block, f"dit/block_{i}", found)
x = torch.randn(3, 4, 8, 8)
times, labels = torch.tensor([999, 501, 0]), torch.tensor([3, 10, 0])
with torch.no_grad():
    output = dit(x, timestep=times, class_labels=labels).sample
expected |= {"dit/x": nhwc(x), "dit/times": times.numpy(), "dit/labels": labels.numpy()}
expected |= {name: tensor.numpy() for name, tensor in found.items()}
expected["dit/output"] = nhwc(output)

vae = random_weights(
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        scaling_factor=0.5,
    ),
    0.06,
)
vae = save(vae, "vae")
found = {}
watch(vae.encoder.mid_block, "vae/encoder/middle", found)
watch(vae.decoder.mid_block, "vae/decoder/middle", found)
watch(vae.decoder.up_blocks[-1], "vae/decoder/level_0_resnet_1", found)
images, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
with torch.no_grad():
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.mean).sample
expected |= {name: nhwc(tensor) for name, tensor in found.items()}
expected |= {
    "vae/images": nhwc(images),
    "vae/noise": nhwc(noise),
    "vae/mean": nhwc(posterior.mean),
    "vae/sample": nhwc(posterior.mean + posterior.std * noise),
    "vae/decoded": nhwc(decoded),
}
np.savez(OUT / "expected.npz", **expected)


def shapes(model):
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


with torch.device("meta"):
    xl = DiTTransformer2DModel(num_embeds_ada_norm=1000, out_channels=8, sample_size=32)
full = AutoencoderKL(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    sample_size=256,
)
names = {
    "dit_xl_2_256": shapes(xl),
    "sd_vae": shapes(full),
    "sd_vae_compvis": compvis_names(full),
    "vae_compvis": compvis_names(vae),
}
(OUT / "names.json").write_text(json.dumps(names, indent=0) + "\n")
