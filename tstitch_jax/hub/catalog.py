"""Public networks by name: where their files are, and the fields of their cards."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from tstitch_jax.core.checks import unknown


@dataclasses.dataclass(frozen=True)
class CatalogEntry:
    """A public network: where its files are, and the fields of its card.

    Attributes:
        family: The layout of the files: ``"dit"``, ``"sit"``, ``"unet"``, ``"autoencoder"``,
            ``"inception"``, ``"text_encoder"`` or ``"clip"``.
        files: Names of the files; empty if they are those of ``part``.
        source, license, num_params, macs, data, image_shape, num_classes: As in the card. Networks
            without classes have 0, and text encoders have no image shape.
        url: Address of the one file, or of an archive that holds it, or empty.
        member: Name of the file in the archive, or empty.
        repo: Repository on the Hugging Face hub that holds the files, or empty.
        part: Folder of a diffusers pipeline in the repository, or empty. The repository is asked
            for its files, since the format of the weights differs.
        text_encoder: Name of the network's text encoder, if not the usual one.
        sha256: SHA-256 of the file (in an archive, of ``member``), or empty if none is published;
            of several files, as ``source_checksum`` in the card.
    """

    family: str
    files: tuple[str, ...]
    source: str
    license: str
    num_params: int
    macs: int
    data: str = "ImageNet 256"
    image_shape: tuple[int, ...] = (32, 32, 4)
    num_classes: int = 1000
    url: str = ""
    member: str = ""
    repo: str = ""
    part: str = ""
    text_encoder: str = ""
    sha256: str = ""


_DRIVE = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"


_FROM_AUTHORS: dict[str, Any] = dict(
    source="T-Stitch authors, Google Drive", license="NVIDIA Source Code License (non-commercial)"
)


_CAPTIONED = "400M images of the internet with their texts"


def _dit(size: str, pixels: int, num_params: int, macs: int, drive: str = "") -> CatalogEntry:
    """A DiT of 2 x 2 patches: of its own authors, or, on Google Drive, of the T-Stitch paper's."""
    file = f"DiT-{size}-2-{pixels}{'' if drive else f'x{pixels}'}.pt"
    place = "dl.fbaipublicfiles.com/DiT"
    origin: dict[str, Any] = dict(source=place, license="CC-BY-NC-4.0")
    return CatalogEntry(
        family="dit",
        files=(file,),
        url=_DRIVE.format(drive) if drive else f"https://{place}/models/{file}",
        num_params=num_params,
        macs=macs,
        data=f"ImageNet {pixels}",
        image_shape=(pixels // 8, pixels // 8, 4),
        **(_FROM_AUTHORS if drive else origin),
    )


def _on_hub(
    repo: str, family: str, num_params: int, macs: int, license: str, **more: Any
) -> CatalogEntry:
    """A network of a repository on the Hugging Face hub."""
    return CatalogEntry(
        family=family,
        repo=repo,
        source=f"huggingface.co/{repo}",
        license=license,
        num_params=num_params,
        macs=macs,
        **more,
    )


def _sit(size: str, num_params: int, macs: int) -> CatalogEntry:
    repo, files = "nyu-visionx/SiT-collections", (f"SiT-{size}-2-256.pt",)
    return _on_hub(repo, "sit", num_params, macs, "MIT", files=files)


def _text_to_image(repo: str, num_params: int, macs: int, data: str) -> CatalogEntry:
    """A U-Net of Stable Diffusion 1's kind, of a pipeline."""
    more: dict[str, Any] = dict(part="unet", data=data, image_shape=(64, 64, 4), num_classes=0)
    return _on_hub(repo, "unet", num_params, macs, "CreativeML OpenRAIL-M", files=(), **more)


def _class_to_image(drive: str, file: str, num_params: int, macs: int) -> CatalogEntry:
    """A U-Net of the T-Stitch paper's, on latents of VQ-f8."""
    return CatalogEntry(
        family="unet",
        files=(file,),
        url=_DRIVE.format(drive),
        num_params=num_params,
        macs=macs,
        **_FROM_AUTHORS,
    )


def _vae(repo: str) -> CatalogEntry:
    """Stable Diffusion's autoencoder, with another decoder."""
    return _on_hub(
        repo,
        "autoencoder",
        83_653_863,
        447_454_724_096,
        "MIT",
        files=("config.json", "diffusion_pytorch_model.safetensors"),
        data="OpenImages, LAION-Aesthetics, LAION-Humans",
        image_shape=(256, 256, 3),
        num_classes=0,
    )


def _vq(name: str, num_params: int, macs: int) -> CatalogEntry:
    """A VQ autoencoder of the latent diffusion paper's."""
    return CatalogEntry(
        family="autoencoder",
        files=(f"{name}.ckpt",),
        url=f"https://ommer-lab.com/files/latent-diffusion/{name}.zip",
        member="model.ckpt",
        source="github.com/CompVis/latent-diffusion",
        license="MIT",
        num_params=num_params,
        macs=macs,
        data="OpenImages",
        image_shape=(256, 256, 3),
        num_classes=0,
    )


def _clip(repo: str, num_params: int, macs: int) -> CatalogEntry:
    tokenizer = ("vocab.json", "merges.txt", "tokenizer_config.json")
    return _on_hub(
        repo,
        "clip",
        num_params,
        macs,
        "MIT",
        files=("config.json", "pytorch_model.bin", *tokenizer),
        data=_CAPTIONED,
        image_shape=(224, 224, 3),
        num_classes=0,
    )


_SD = "CompVis/stable-diffusion-v1-4"


PUBLIC: dict[str, CatalogEntry] = {
    "dit-xl-2-256": _dit("XL", 256, 674_834_720, 118_621_421_568),
    "dit-xl-2-512": _dit("XL", 512, 674_834_720, 524_538_298_368),
    "dit-s-2-256": _dit("S", 256, 32_865_056, 6_055_673_856, "1YOSNrFbP36vHlPQPBosqZKbPLokymRuO"),
    "dit-b-2-256": _dit("B", 256, 130_315_808, 23_005_102_080, "1HTqZSYXh6LJGLooko4LPFsCuwL2Wjg6r"),
    "sit-s-2-256": _sit("S", 32_858_896, 6_054_100_992),
    "sit-b-2-256": _sit("B", 130_303_504, 23_001_956_352),
    "sit-l-2-256": _sit("L", 457_824_272, 80_693_428_224),
    "sit-xl-2-256": _sit("XL", 674_816_272, 118_616_702_976),
    "sd-vae-ft-ema": _vae("stabilityai/sd-vae-ft-ema"),
    "sd-vae-ft-mse": _vae("stabilityai/sd-vae-ft-mse"),
    "inception": CatalogEntry(
        family="inception",
        files=("pt_inception-2015-12-05-6726825d.pth",),
        url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        source="github.com/mseitzer/pytorch-fid",
        license="Apache-2.0",
        num_params=23_884_384,
        macs=5_713_232_480,
        data="ImageNet 2012",
        image_shape=(299, 299, 3),
        num_classes=1008,
    ),
    "sd-1-4": _text_to_image(_SD, 859_520_964, 401_636_720_640, "LAION-2B(en)"),
    "sd-1-5": _text_to_image(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", 859_520_964, 401_636_720_640, "LAION-2B(en)"
    ),
    "bk-sdm-base": _text_to_image(
        "nota-ai/bk-sdm-base", 579_384_964, 261_496_995_840, "LAION-Aesthetics V2 6.5+"
    ),
    "bk-sdm-small": _text_to_image(
        "nota-ai/bk-sdm-small", 482_346_884, 255_447_203_840, "LAION-Aesthetics V2 6.5+"
    ),
    "bk-sdm-tiny": _text_to_image(
        "nota-ai/bk-sdm-tiny", 323_384_964, 242_754_519_040, "LAION-Aesthetics V2 6.5+"
    ),
    "ldm-s": _class_to_image(
        "1HgKfkIHr14O8HjIf-RCw8cLEdsbn2h9h", "ldm_s.ckpt", 25_642_948, 4_145_643_520
    ),
    "ldm": _class_to_image(
        "1YRnLZuR8xIS9GgtU7a_sTTH5G2KkJk7s", "ldm.ckpt", 395_496_708, 57_038_602_240
    ),
    "vq-f4": _vq("vq-f4", 55_322_782, 508_009_979_904),
    "vq-f8": _vq("vq-f8", 67_717_295, 349_322_641_408),
    "sd-text-encoder": _on_hub(
        _SD,
        "text_encoder",
        123_060_480,
        6_649_251_840,
        "CreativeML OpenRAIL-M",
        files=(
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "tokenizer/vocab.json",
            "tokenizer/merges.txt",
            "tokenizer/tokenizer_config.json",
        ),
        data=_CAPTIONED,
        image_shape=(),
        num_classes=0,
    ),
    "clip-vit-base-patch32": _clip("openai/clip-vit-base-patch32", 151_277_312, 7_388_581_888),
    "clip-vit-large-patch14": _clip("openai/clip-vit-large-patch14", 427_616_512, 87_662_610_432),
}
"""The public networks that ``load`` knows, by name."""


_PARTS = {"unet": "unet", "vae": "autoencoder", "text_encoder": "text_encoder"}
"""Of a pipeline of diffusers, and whose layout each has."""


def public(name: str) -> CatalogEntry | None:
    """The public network of a name of ``PUBLIC``, or of a pipeline on the Hugging Face hub.

    ``"owner/repository"`` is its U-Net; ``"owner/repository/vae"`` and ``".../text_encoder"`` are
    its other networks. Of these neither size nor license is known before they are there.
    """
    if name in PUBLIC:
        return PUBLIC[name]
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*?)(?:/(unet|vae|text_encoder))?", name)
    if match is None:
        return None
    repo, part = match[1], match[2] or "unet"
    for entry in PUBLIC.values():
        if (entry.repo, entry.part) == (repo, part):
            return entry
    return CatalogEntry(
        family=_PARTS[part], files=(), repo=repo, part=part, source=f"huggingface.co/{repo}",
        license=f"see huggingface.co/{repo}", num_params=0, macs=0, data="", image_shape=(),
        num_classes=0, text_encoder=f"{repo}/text_encoder",
    )  # fmt: skip


def known(name: str) -> CatalogEntry:
    entry = public(name)
    if entry is None:
        raise unknown("public network", name, PUBLIC)
    return entry


def short_name(name: str) -> str:
    """The name in ``PUBLIC`` of what also goes by that of its repository, which is kept once."""
    entry = public(name)
    return next((key for key, each in PUBLIC.items() if each is entry), name)
