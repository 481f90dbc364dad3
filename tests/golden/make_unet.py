"""Makes ``unet``: what U-Nets and VQ autoencoders of diffusers compute, with weights of a recipe.

    pip install torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 safetensors==0.8.0
    python tests/golden/make_unet.py

``expected.npz`` holds outputs, channels last; ``names.json`` for each network the configuration
that diffusers writes, names and shapes of its tensors, and CompVis' name of each; ``bk.bin`` the
tensors of one network as torch saves them, in float16. Weights and inputs are those of
``tests/unet_recipe.py``.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
from unet_recipe import noise, weight

OUT = Path(__file__).parent / "unet"
OUT.mkdir(exist_ok=True)
CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def blocks(kind, *attention):
    names = [(CROSS if each else PLAIN).format(kind) for each in attention]
    return tuple(names if kind == "Down" else names[::-1])


def config(widths, layers, attention, heads, context, middle=True, groups=32, **more):
    return dict(
        block_out_channels=widths, layers_per_block=layers, attention_head_dim=heads,
        down_block_types=blocks("Down", *attention), up_block_types=blocks("Up", *attention),
        mid_block_type="UNetMidBlock2DCrossAttn" if middle else None,
        cross_attention_dim=context, norm_num_groups=groups, **more,
    )  # fmt: skip


TINY = {
    "sd": config((16, 32, 32), 2, (1, 1, 0), 4, 24, groups=4, sample_size=8),
    "bk": config((16, 32), 1, (1, 1), 2, 24, middle=False, groups=4, sample_size=8),
    "uneven": config(
        (8, 16, 32), 1, (0, 1, 1), (1, 2, 4), 12, groups=4, sample_size=8,
        in_channels=3, out_channels=3,
    ),
}  # fmt: skip
SD = config((320, 640, 1280, 1280), 2, (1, 1, 1, 0), 8, 768, sample_size=64)
FULL = {
    "sd-1": SD,
    "bk-sdm-base": SD | dict(layers_per_block=1),
    "bk-sdm-small": SD | dict(layers_per_block=1, mid_block_type=None),
    "bk-sdm-tiny": config((320, 640, 1280), 1, (1, 1, 1), 8, 768, middle=False, sample_size=64),
    "ldm-4": config((192, 384, 576, 960), 2, (0, 1, 1, 1), 1, 512, sample_size=64,
                    in_channels=3, out_channels=3),
    "ldm": config((256, 512, 1024), 2, (1, 1, 1), (8, 16, 32), 512, sample_size=32),
    "ldm-s": config((64, 128, 256), 2, (1, 1, 1), (2, 4, 8), 256, sample_size=32),
}  # fmt: skip


def compvis_name(name, config):
    """The name of a tensor of UNet2DConditionModel in CompVis' program."""
    layers = config["layers_per_block"]
    rest = name
    if match := re.match(r"down_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
        i, part, j, rest = int(match[1]), match[2], int(match[3]), match[4]
        if part == "downsamplers":
            j, rest = layers, rest.replace("conv.", "op.")
        place = {"resnets": 0, "attentions": 1, "downsamplers": 0}[part]
        block = f"input_blocks.{1 + i * (layers + 1) + j}.{place}."
    elif match := re.match(r"up_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
        i, part, j, rest = int(match[1]), match[2], int(match[3]), match[4]
        if part == "upsamplers":
            j = layers
        crossed = "CrossAttn" in config["up_block_types"][i]
        place = {"resnets": 0, "attentions": 1, "upsamplers": 1 + crossed}[part]
        block = f"output_blocks.{i * (layers + 1) + j}.{place}."
    elif match := re.match(r"mid_block\.(\w+)\.(\d+)\.(.*)", name):
        part, rest = match[1], match[3]
        block = f"middle_block.{1 if part == 'attentions' else 2 * int(match[2])}."
    else:
        block = ""
        for ours, theirs in {
            "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
            "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0",
            "conv_out": "out.2",
        }.items():  # fmt: skip
            rest = re.sub(rf"^{ours}\.", f"{theirs}.", rest)
    if match and part == "resnets":
        for ours, theirs in {
            "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
            "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
        }.items():  # fmt: skip
            rest = re.sub(rf"^{ours}\.", f"{theirs}.", rest)
    return block + rest


def compvis_names(model):
    """Checked by diffusers' own conversion of that program's checkpoints, where it can."""
    state, given = model.state_dict(), dict(model.config)
    names = {name: compvis_name(name, given) for name in state}
    assert len(set(names.values())) == len(names)
    if given["mid_block_type"] is not None:
        prefix = "model.diffusion_model."
        foreign = {prefix + names[name]: tensor for name, tensor in state.items()}
        back = convert_ldm_unet_checkpoint(foreign, given | dict(class_embed_type=None))
        assert back.keys() == state.keys()
        assert all(back[name] is state[name] for name in state)
    return names


def fill(model):
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(torch.from_numpy(weight(name, tuple(tensor.shape))))
    return model.eval()


def shapes(model):
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def nhwc(tensor):
    return np.ascontiguousarray(tensor.detach().permute(0, 2, 3, 1).numpy())


def watch(module, name, found):
    module.register_forward_hook(lambda _m, _i, output: found.__setitem__(
        name, (output if torch.is_tensor(output) else output[0]).detach()))  # fmt: skip


def nchw(array):
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def written(model):
    return json.loads(model.to_json_string())


expected, names = {}, {}
for name, given in TINY.items():
    unet = fill(UNet2DConditionModel(**given))
    names[name] = dict(config=written(unet), shapes=shapes(unet), compvis=compvis_names(unet))
    found = {}
    for kind, list_ in (("down", unet.down_blocks), ("up", unet.up_blocks)):
        for i, block in enumerate(list_):
            level = i if kind == "down" else len(list_) - 1 - i
            for j, resnet in enumerate(block.resnets):
                watch(resnet, f"{kind}_{level}_resnet_{j}", found)
            for j, transformer in enumerate(getattr(block, "attentions", [])):
                watch(transformer, f"{kind}_{level}_transformer_{j}", found)
    if unet.mid_block is not None:
        watch(unet.mid_block.attentions[0], "middle_transformer", found)
    x = noise(f"{name}/x", 2, 8, 16, unet.config.in_channels)
    context = noise(f"{name}/context", 2, 7, unet.config.cross_attention_dim)
    with torch.no_grad():
        output = unet(nchw(x), torch.tensor([981, 3]), torch.from_numpy(context)).sample
    expected[f"{name}/output"] = nhwc(output)
    expected |= {f"{name}/{key}": nhwc(value) for key, value in found.items()}
    if name == "bk":
        torch.save({k: v.half() for k, v in unet.state_dict().items()}, OUT / "bk.bin")

for name, given in FULL.items():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**given)
    count = sum(p.numel() for p in unet.parameters())
    names[name] = dict(config=written(unet), params=count)
    if name in ("sd-1", "bk-sdm-tiny", "ldm"):
        names[name] |= dict(shapes=shapes(unet), compvis=compvis_names(unet))
    print(name, f"{count:,}")

unet = UNet2DConditionModel(**SD)
fill(unet)
x, context = noise("sd-1/x", 1, 16, 16, 4), noise("sd-1/context", 1, 77, 768)
with torch.no_grad():
    output = unet(nchw(x), torch.tensor([501]), torch.from_numpy(context)).sample
expected["sd-1/output"] = nhwc(output)
del unet

VQ = dict(
    down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, sample_size=16,
    num_vq_embeddings=50, scaling_factor=1.0,
)  # fmt: skip
PLAIN_VQ = VQ | dict(down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=3,
                     up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=30)  # fmt: skip
FULL_VQ = {
    "vq-f8": dict(
        down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
        block_out_channels=(128, 256, 256, 512), layers_per_block=2, latent_channels=4,
        sample_size=256, num_vq_embeddings=16384, scaling_factor=1.0,
    ),
    "vq-f4": dict(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(128, 256, 512), layers_per_block=2, latent_channels=3,
        sample_size=256, num_vq_embeddings=8192, scaling_factor=1.0,
    ),
}  # fmt: skip


def compvis_vq_name(name, levels):
    """The name of a tensor of VQModel in CompVis' program."""
    half, _, rest = name.partition(".")
    if half not in ("encoder", "decoder"):
        return name
    for ours, theirs in {
        r"down_blocks\.(\d+)\.resnets": r"down.\1.block",
        r"down_blocks\.(\d+)\.attentions": r"down.\1.attn",
        r"down_blocks\.(\d+)\.downsamplers\.0": r"down.\1.downsample",
        r"up_blocks\.(\d+)\.resnets": r"up.\1.block",
        r"up_blocks\.(\d+)\.attentions": r"up.\1.attn",
        r"up_blocks\.(\d+)\.upsamplers\.0": r"up.\1.upsample",
        r"mid_block\.resnets\.0": "mid.block_1", r"mid_block\.resnets\.1": "mid.block_2",
        r"mid_block\.attentions\.0": "mid.attn_1", "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut", "group_norm": "norm", r"to_out\.0": "proj_out",
        r"to_([qkv])": r"\1",
    }.items():  # fmt: skip
        rest = re.sub(rf"(?:^|(?<=\.)){ours}(?=\.)", theirs, rest)
    rest = re.sub(r"^up\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", rest)
    return f"{half}.{rest}"


for name, given in (("vq", VQ), ("vq-plain", PLAIN_VQ)):
    vq = fill(VQModel(**given))
    found = {}
    for kind, list_ in (("encoder", vq.encoder.down_blocks), ("decoder", vq.decoder.up_blocks)):
        for i, block in enumerate(list_):
            level = i if kind == "encoder" else len(list_) - 1 - i
            for j, attention in enumerate(getattr(block, "attentions", [])):
                watch(attention, f"{kind}/level_{level}_attention_{j}", found)
    images = noise(f"{name}/images", 2, 16, 24, 3)
    latents = noise(f"{name}/latents", 2, 8, 12, given["latent_channels"])
    with torch.no_grad():
        encoded = vq.encode(nchw(images)).latents
        quantized = vq.quantize(nchw(latents))[0]
        decoded = vq.decode(nchw(latents)).sample
    names[name] = dict(
        config=written(vq), shapes=shapes(vq),
        compvis={key: compvis_vq_name(key, 2) for key in vq.state_dict()},
    )  # fmt: skip
    found |= {"encoded": encoded, "quantized": quantized, "decoded": decoded}
    expected |= {f"{name}/{key}": nhwc(value) for key, value in found.items()}
for name, given in FULL_VQ.items():
    with torch.device("meta"):
        vq = VQModel(**given)
    names[name] = dict(config=written(vq), shapes=shapes(vq),
                       params=sum(p.numel() for p in vq.parameters()))  # fmt: skip

# Whole trajectories of diffusers' pipeline: the small network, then the large one, by step.
STEPS, FRACTION, SCALE = 20, 0.4, 7.5
BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
SCHEDULERS = {
    "ddim": DDIMScheduler(**BETAS, steps_offset=1, clip_sample=False, set_alpha_to_one=True),
    "pndm": PNDMScheduler(**BETAS, steps_offset=1, skip_prk_steps=True, set_alpha_to_one=True),
    "dpmpp": DPMSolverMultistepScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
}
small, large = (fill(UNet2DConditionModel(**TINY[name])) for name in ("bk", "sd"))
for name, scheduler in SCHEDULERS.items():
    pipeline = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=small, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    states, times = [], []

    def keep(pipe, call, time, values, states=states, times=times, name=name):
        # Of PNDM the first step is two calls.
        step = call if name != "pndm" else max(call - 1, 0)
        if name != "pndm" or call != 0:
            states.append(values["latents"].clone())
        after = step + 1 if name != "pndm" or call else 0
        pipe.unet = small if (after + 1) / STEPS <= FRACTION else large
        times.append(int(time))
        return values

    pipeline(
        prompt_embeds=torch.from_numpy(noise("pair/context", 2, 7, 24)),
        negative_prompt_embeds=torch.from_numpy(noise("pair/negative", 1, 7, 24)).repeat(2, 1, 1),
        latents=nchw(noise("pair/x", 2, 8, 8, 4)), height=64, width=64, output_type="latent",
        num_inference_steps=STEPS, guidance_scale=SCALE, callback_on_step_end=keep,
    )  # fmt: skip
    assert len(states) == STEPS
    expected[f"{name}/times"] = np.array(times)
    expected[f"{name}/states"] = np.stack([nhwc(state) for state in states])

np.savez_compressed(OUT / "expected.npz", **expected)
(OUT / "names.json").write_text(json.dumps(names, separators=(",", ":")) + "\n")
