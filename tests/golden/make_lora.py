"""Makes ``lora``: LoRA files in three naming schemes, and what diffusers makes of two networks.

    pip install torch==2.14.1 diffusers==0.42.1 transformers==5.24.0 peft==0.21.2 safetensors==0.8.0
    python tests/golden/make_lora.py

``names.json`` holds the names and shapes of the weights of a small U-Net and text encoder, whose
values, by ``tests/lora_recipe.py``, are not stored. ``kohya.safetensors`` is as kohya's scripts
write it, ``peft.safetensors`` as ``save_lora_weights`` does, ``old.safetensors`` as older diffusers
did. ``expected.npz`` holds, of every weight that ``fuse_lora(lora_scale=0.7)`` changed, the sum
and up to 40 values of the change.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import transformers.integrations.peft
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from lora_recipe import some, weights

HERE = Path(__file__).parent
OUT = HERE / "lora"
OUT.mkdir(exist_ok=True)
WEIGHT = 0.7

# That release of transformers asks for a peft that was not out yet.
transformers.integrations.peft.MIN_PEFT_VERSION = "0.21.2"


def networks():
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        sample_size=8,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=814, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, bos_token_id=812, eos_token_id=813, pad_token_id=813,
        )
    )  # fmt: skip
    for name, model in (("unet", unet), ("text_encoder", text)):
        shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
        values = weights({f"{name}.{k}": shape for k, shape in shapes.items()})
        model.load_state_dict(
            {k.removeprefix(f"{name}."): torch.tensor(v) for k, v in values.items()}
        )
    return unet, text


def pipeline():
    unet, text = networks()
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "clip_tiny" / "tokenizer")
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def state_of(pipe):
    both = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    found = {f"{o}.{k}": v for o, m in both.items() for k, v in m.state_dict().items()}
    return {k.replace(".base_layer", ""): v.clone().numpy() for k, v in found.items()}


def randomize(model, seed):
    """LoRA starts with zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            if "lora_" in name:
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))


def lora_state(model, targets, seed, rank, alpha):
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    randomize(model, seed)
    return get_peft_model_state_dict(model)


UNET = r".*(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv_shortcut|time_emb_proj|downsamplers\.0\.conv|conv_in)"  # noqa: E501
TEXT = r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
ATTENTION = r".*attn[12]\.(to_q|to_k|to_v|to_out\.0)"

names = {k: list(v.shape) for k, v in state_of(pipeline()).items()}
(OUT / "names.json").write_text(json.dumps(names, indent=0) + "\n")
base = state_of(pipeline())
expected = {}


def fused(name, load):
    pipe = pipeline()
    load(pipe)
    pipe.fuse_lora(lora_scale=WEIGHT)
    pipe.unload_lora_weights()
    found = state_of(pipe)
    assert found.keys() == base.keys()
    count = 0
    for key, value in found.items():
        change = value.astype(np.float64) - base[key]
        if np.abs(change).max() > 0:
            expected[f"{name}/{key}"] = np.append(change.sum(), some(change)).astype(np.float32)
            count += 1
    print(name, count)


# PEFT's names, with an alpha in the file's metadata.
unet, text = networks()
unet_state = lora_state(unet, UNET, 1, 3, 6)
text_state = lora_state(text, TEXT, 2, 2, 1)
StableDiffusionPipeline.save_lora_weights(
    OUT, unet_lora_layers=unet_state, text_encoder_lora_layers=text_state,
    weight_name="peft.safetensors",
    unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    text_encoder_lora_adapter_metadata=text.peft_config["default"].to_dict(),
)  # fmt: skip
fused("peft", lambda pipe: pipe.load_lora_weights(OUT, weight_name="peft.safetensors"))

# kohya's names, with alphas as tensors.
unet, text = networks()
found = {}
for prefix, state, alpha in (
    ("lora_unet_", lora_state(unet, UNET, 3, 3, 3), 1.5),
    ("lora_te_text_model_", lora_state(text, TEXT, 4, 2, 2), 4.0),
):
    for key, value in state.items():
        module, half = re.fullmatch(r"(.+)\.lora_(A|B)\.weight", key).groups()
        name = prefix + module.replace(".", "_")
        found[f"{name}.lora_{dict(A='down', B='up')[half]}.weight"] = value.half().contiguous()
        found[f"{name}.alpha"] = torch.tensor(alpha)
save_file(found, OUT / "kohya.safetensors", {"ss_network_module": "networks.lora"})
fused("kohya", lambda pipe: pipe.load_lora_weights(OUT, weight_name="kohya.safetensors"))

# Names of the first training scripts of diffusers.
unet, text = networks()
found = {}
for key, value in lora_state(unet, ATTENTION, 5, 4, 4).items():
    module, half = re.fullmatch(r"(.+)\.lora_(A|B)\.weight", key).groups()
    module = re.sub(r"(attn\d)\.(to_\w+)(\.0)?$", r"\1.processor.\2", module)
    found[f"unet.{module}_lora.{dict(A='down', B='up')[half]}.weight"] = value.contiguous()
save_file(found, OUT / "old.safetensors", {"format": "pt"})
fused("old", lambda pipe: pipe.load_lora_weights(OUT, weight_name="old.safetensors"))

np.savez_compressed(OUT / "expected.npz", **expected)
for file in OUT.glob("*.safetensors"):
    file.chmod(0o644)
