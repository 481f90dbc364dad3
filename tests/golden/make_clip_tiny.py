"""Makes ``clip_tiny``: small random CLIP networks of transformers, and what they compute.

    pip install torch==2.14.1 transformers==5.24.0 tokenizers==0.23.3 safetensors==0.8.0
    pip install torchmetrics==1.9.0
    python tests/golden/make_clip_tiny.py

``text_encoder`` and ``tokenizer`` are folders as in a Stable Diffusion of diffusers, ``clip`` one
as of ``openai/clip-vit-*``, all as published: names begin with ``text_model.``, positions are
numbered by a tensor, weights are float16. ``expected.npz`` holds what float32 networks with these
weights compute, and the tokens of the recipe's texts; ``names.json`` the names and shapes of the
full-size networks.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torchmetrics.functional.multimodal import clip_score
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

sys.path.insert(0, str(Path(__file__).parents[1]))
import clip_recipe as recipe

OUT = Path(__file__).parent / "clip_tiny"
torch.manual_seed(0)


def random_weights(model):
    """Nothing stays at a special value such as 0 or 1, and all is exact in float16."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            scale = 0.1 if tensor.ndim < 2 else 0.7 / tensor[0].numel() ** 0.5
            scale = 0.5 if "embedding" in name and "patch" not in name else scale
            tensor.copy_((scale * torch.randn_like(tensor) + norm).half().float())
    return model.eval()


def watch(module, name, found):
    def keep(_module, _inputs, output):
        found[name] = (output[0] if isinstance(output, tuple) else output).detach().numpy()

    module.register_forward_hook(keep)


def write_tokenizer(folder):
    vocabulary, merges = recipe.vocabulary()
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = json.dumps(vocabulary, ensure_ascii=False)
    (folder / "vocab.json").write_text(text + "\n", encoding="utf-8")
    start, end = (
        dict(__type="AddedToken", content=token, lstrip=False, normalized=True, rstrip=False,
             single_word=False)
        for token in ("<|startoftext|>", "<|endoftext|>")
    )  # fmt: skip
    config = dict(bos_token=start, eos_token=end, unk_token=end, pad_token=end["content"])
    config |= dict(do_lower_case=True, model_max_length=77, tokenizer_class="CLIPTokenizer")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def save(model, folder, prefix=""):
    model.config.save_pretrained(folder)
    state = {prefix + name: tensor.half() for name, tensor in model.state_dict().items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


write_tokenizer(OUT / "tokenizer")
write_tokenizer(OUT / "clip")
tokenizer = CLIPTokenizer.from_pretrained(OUT / "tokenizer")
texts = recipe.texts()
ids = tokenizer(texts, padding="max_length", truncation=True, max_length=77)["input_ids"]
expected = {"ids": np.array(ids, np.int16)}
vocabulary = len(tokenizer)

text = dict(
    vocab_size=vocabulary,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    bos_token_id=vocabulary - 2,
    eos_token_id=vocabulary - 1,
    pad_token_id=vocabulary - 1,
)
encoder = random_weights(CLIPTextModel(CLIPTextConfig(**text, hidden_act="quick_gelu")))
save(encoder, OUT / "text_encoder", "text_model.")
rows = torch.tensor(ids[12:900:222])
with torch.no_grad():
    out = encoder(rows, output_hidden_states=True)
    expected["text/rows"] = rows.numpy()
    for i, hidden in enumerate(out.hidden_states):
        expected[f"text/hidden_{i}"] = hidden.numpy()
    expected["text/output"] = out.last_hidden_state.numpy()
    expected["text/penultimate"] = encoder.final_layer_norm(out.hidden_states[-2]).numpy()

clip = random_weights(
    CLIPModel(
        CLIPConfig(
            text_config=dict(text, hidden_act="gelu", num_hidden_layers=2),
            vision_config=dict(
                hidden_size=48,
                intermediate_size=80,
                num_hidden_layers=2,
                num_attention_heads=3,
                image_size=32,
                patch_size=8,
                hidden_act="gelu",
            ),
            projection_dim=24,
        )
    )
)
save(clip, OUT / "clip")
found = {}
watch(clip.vision_model.pre_layrnorm, "clip/image_tower/norm_in", found)
for tower, model in (("text", clip.text_model), ("image", clip.vision_model)):
    for i, layer in enumerate(model.encoder.layers):
        watch(layer, f"clip/{tower}_tower/block_{i}", found)
processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
for i, size in enumerate(recipe.IMAGE_SIZES):
    pictures = [Image.fromarray(image) for image in recipe.pixels_of(size)]
    prepared = torch.tensor(np.stack(processor(pictures)["pixel_values"]))
    expected[f"clip/prepared_{i}"] = prepared.permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        vectors = clip.get_image_features(pixel_values=prepared).pooler_output
    expected[f"clip/images_{i}"] = vectors.numpy()
    if i == 0:
        expected |= {name: value for name, value in found.items() if "image" in name}
with torch.no_grad():
    whole = clip(pixel_values=prepared, input_ids=rows)
expected |= {name: value for name, value in found.items() if "text" in name}
scale = clip.logit_scale.exp().item()
expected["clip/texts"] = clip.get_text_features(input_ids=rows).pooler_output.detach().numpy()
expected["clip/cosines"] = whole.logits_per_image.numpy() / scale  # of the last images


class Older(CLIPModel):
    """torchmetrics takes what earlier releases of transformers returned."""

    def get_image_features(self, *args, **kwargs):
        return super().get_image_features(*args, **kwargs).pooler_output

    def get_text_features(self, *args, **kwargs):
        return super().get_text_features(*args, **kwargs).pooler_output


def network():
    older = Older(clip.config)
    older.load_state_dict(clip.state_dict())
    return older.eval(), CLIPProcessor(processor, tokenizer)


pictures = [torch.tensor(image).permute(2, 0, 1) for image in recipe.pixels_of((64, 500))] * 2
expected["clip/scores"] = np.array(
    [clip_score(*pair, network).item() for pair in zip(pictures, recipe.PROMPTS, strict=True)]
)
expected["clip/score"] = clip_score(pictures[1:3], recipe.PROMPTS[1:3], network).item()
np.savez_compressed(OUT / "expected.npz", **expected)


def shapes(model, prefix=""):
    return {prefix + name: list(tensor.shape) for name, tensor in model.state_dict().items()}


large = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
with torch.device("meta"):
    names = {
        "sd_text_encoder": shapes(CLIPTextModel(CLIPTextConfig(**large)), "text_model."),
        "clip_vit_base_patch32": shapes(CLIPModel(CLIPConfig())),
        "clip_vit_large_patch14": shapes(
            CLIPModel(
                CLIPConfig(
                    text_config=large,
                    vision_config=dict(
                        hidden_size=1024,
                        intermediate_size=4096,
                        num_hidden_layers=24,
                        num_attention_heads=16,
                        patch_size=14,
                    ),
                    projection_dim=768,
                )
            )
        ),
    }
(OUT / "names.json").write_text(json.dumps(names, indent=0) + "\n")
