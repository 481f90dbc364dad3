"""Networks by name: embedded, public ones downloaded and converted once, or a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from tstitch_jax import checkpoint, parallel
from tstitch_jax.files import whole_file
from tstitch_jax.schedules import unknown

EMBEDDED = Path(__file__).parent / "embedded"
"""Folder of the networks that come with the package."""

CHUNK = 2**20
TIMEOUT = 30.0
RETRIES = 4
"""Attempts in a row that bring nothing before a download is given up."""
PAUSE = 1.0
"""Seconds before the first retry; each further one waits twice as long."""


@dataclasses.dataclass(frozen=True)
class Public:
    """A public network: where its files are, and what its card will say.

    Attributes:
        family: Whose layout the files have: ``"dit"``, ``"sit"``, ``"unet"``, ``"autoencoder"``,
            ``"inception"``, ``"text_encoder"`` or ``"clip"``.
        files: Names of its files; none where they are those of ``part``.
        source, license, num_params, macs, data, image_shape, num_classes: As in the card; some have
            no classes (0), and one that takes texts has no image shape.
        url: Address of the one file, or of an archive that holds it, or empty.
        member: What the file is called in the archive, or empty.
        repo: Repository on the Hugging Face hub that holds the files, or empty.
        part: The folder of a pipeline of diffusers that the repository holds, or empty. Its files
            are asked for, as repositories have the weights in one format or another.
        text_encoder: The name of what makes a network's contexts, where it is not the usual one.
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


_DRIVE = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"

_FROM_AUTHORS: dict[str, Any] = dict(
    source="T-Stitch authors, Google Drive", license="NVIDIA Source Code License (non-commercial)"
)
_CAPTIONED = "400M images of the internet with their texts"


def _dit(size: str, pixels: int, num_params: int, macs: int, drive: str = "") -> Public:
    """A DiT of 2 x 2 patches: of its own authors, or, on Google Drive, of the T-Stitch paper's."""
    file = f"DiT-{size}-2-{pixels}{'' if drive else f'x{pixels}'}.pt"
    place = "dl.fbaipublicfiles.com/DiT"
    origin: dict[str, Any] = dict(source=place, license="CC-BY-NC-4.0")
    return Public(
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
) -> Public:
    """A network of a repository on the Hugging Face hub."""
    return Public(
        family=family,
        repo=repo,
        source=f"huggingface.co/{repo}",
        license=license,
        num_params=num_params,
        macs=macs,
        **more,
    )


def _sit(size: str, num_params: int, macs: int) -> Public:
    repo, files = "nyu-visionx/SiT-collections", (f"SiT-{size}-2-256.pt",)
    return _on_hub(repo, "sit", num_params, macs, "MIT", files=files)


def _text_to_image(repo: str, num_params: int, macs: int, data: str) -> Public:
    """A U-Net of Stable Diffusion 1's kind, of a pipeline."""
    more: dict[str, Any] = dict(part="unet", data=data, image_shape=(64, 64, 4), num_classes=0)
    return _on_hub(repo, "unet", num_params, macs, "CreativeML OpenRAIL-M", files=(), **more)


def _class_to_image(drive: str, file: str, num_params: int, macs: int) -> Public:
    """A U-Net of the T-Stitch paper's, on latents of VQ-f8."""
    return Public(
        family="unet",
        files=(file,),
        url=_DRIVE.format(drive),
        num_params=num_params,
        macs=macs,
        **_FROM_AUTHORS,
    )


def _vae(repo: str) -> Public:
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


def _vq(name: str, num_params: int, macs: int) -> Public:
    """A VQ autoencoder of the latent diffusion paper's."""
    return Public(
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


def _clip(repo: str, num_params: int, macs: int) -> Public:
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

PUBLIC: dict[str, Public] = {
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
    "inception": Public(
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


def public(name: str) -> Public | None:
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
    return Public(
        family=_PARTS[part], files=(), repo=repo, part=part, source=f"huggingface.co/{repo}",
        license=f"see huggingface.co/{repo}", num_params=0, macs=0, data="", image_shape=(),
        num_classes=0, text_encoder=f"{repo}/text_encoder",
    )  # fmt: skip


def _known(name: str) -> Public:
    entry = public(name)
    if entry is None:
        raise unknown("public network", name, PUBLIC)
    return entry


def cache_folder() -> Path:
    """``$TSTITCH_CACHE``, or ``tstitch_jax`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("TSTITCH_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tstitch_jax"


def _short(name: str) -> str:
    """The name in ``PUBLIC`` of what also goes by that of its repository, which is kept once."""
    entry = public(name)
    return next((key for key, each in PUBLIC.items() if each is entry), name)


def _network_folder(name: str) -> Path:
    return cache_folder() / "networks" / name.replace("/", "--")


def is_cached(name: str) -> bool:
    """Whether a public network was downloaded and converted."""
    return any((_network_folder(each) / "card.json").exists() for each in (name, _short(name)))


def _failure(name: str, reason: object) -> ValueError:
    """The error of a download, with the way around it."""
    entry = _known(name)
    if entry.url:
        inside = f"{entry.member} in " if entry.member else ""
        urls = [inside + shlex.quote(entry.url)]
    elif entry.part:
        beside = {"unet": "unet and scheduler", "text_encoder": "text_encoder and tokenizer"}
        folders = beside.get(entry.part, entry.part)
        urls = [f"the folders {folders} of https://huggingface.co/{entry.repo}"]
    else:
        from huggingface_hub import hf_hub_url

        urls = [hf_hub_url(entry.repo, file) for file in entry.files]
    single = len(entry.files) == 1
    files = f"{_network_folder(name).name}-files"  # not the name itself, which would be found
    what, place = (entry.files[0], "as") if single else (files, "into a folder")
    out = shlex.quote(str(_network_folder(name)))
    absent = "" if name in PUBLIC else f"there is no folder {name}, and "
    return ValueError(
        f"{absent}cannot download {name}: {str(reason).rstrip('. ')}. Save {' and '.join(urls)} "
        f"{place} {what} by other means and run: tstitch convert {what} {out} --family "
        f'{entry.family}, then ts.load("{name}") finds it'
    )


class _Dropped(Exception):
    """The connection failed; what came before it did is in the partial file."""


class _Refused(Exception):
    """The server's answer is not the file; asking again would not help."""


@contextlib.contextmanager
def _network_errors() -> Iterator[None]:
    # Told apart from errors of the disk, which are OSErrors too.
    import http.client
    import urllib.error

    try:
        yield
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error))
        raise _Dropped(reason or type(error).__name__) from error


def _validator(headers: Any) -> str | None:
    """What changes with the file's bytes; a weak ETag need not."""
    tag = headers["ETag"]
    return tag if tag and not tag.startswith("W/") else headers["Last-Modified"]


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _read_state(file: Path, url: str) -> tuple[str, int]:
    """Validator and whole size of a download of ``url`` that can go on; size 0 if none can."""
    try:
        state = json.loads(file.read_text())
        return (str(state["validator"]), int(state["total"])) if state["url"] == url else ("", 0)
    except (OSError, ValueError, KeyError, TypeError):
        return "", 0


def _transfer(url: str, part: Path) -> None:
    """One attempt at the bytes that ``part`` still lacks."""
    import urllib.error
    import urllib.request

    from tqdm import tqdm

    state_file = Path(f"{part}.json")
    validator, whole = _read_state(state_file, url)
    have = _size(part)
    if 0 < have == whole:
        return
    request = urllib.request.Request(url, headers={"User-Agent": "tstitch_jax"})
    resuming = 0 < have < whole
    if resuming:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", validator)
    try:
        with _network_errors():
            response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if resuming and error.code == 416:
            part.unlink()
            return _transfer(url, part)
        raise _Refused(f"the server answers {error.code} {error.reason}") from None
    with response:
        if response.headers.get_content_type() == "text/html":
            raise _Refused(
                "the server sent a web page instead of the file, as Google does for a day when too "
                "many have asked for it"
            )
        now = _validator(response.headers)
        if resuming and response.status == 206:
            asked = f"bytes {have}-{whole - 1}/{whole}"
            if response.headers["Content-Range"] != asked or now not in (None, validator):
                part.unlink()  # another version of the file, or other bytes of it
                return _transfer(url, part)
        else:
            have = 0
        total = None if response.length is None else have + response.length
        try:
            with open(part, "ab" if have else "wb") as file:
                if not have:  # not before, since it must never speak of an older file's bytes
                    state = {"url": url, "validator": now, "total": total}
                    state_file.write_text(json.dumps(state if now and total else {}))
                with tqdm(
                    initial=have, total=total, desc=part.stem, unit="B", unit_scale=True,
                    unit_divisor=1024,
                ) as bar:  # fmt: skip
                    while True:
                        with _network_errors():
                            chunk = response.read(CHUNK)
                        if not chunk:
                            break
                        file.write(chunk)
                        bar.update(len(chunk))
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write {part}: {error.strerror}; mend that and run it again, it goes on "
                "from there",
            ) from error
    if total is not None and _size(part) < total:
        raise _Dropped(f"the connection closed after {_size(part)} of {total} bytes")


def _unpack(archive: Path, member: str, path: Path) -> None:
    """One file of an archive; raises ValueError if it is not in there, or damaged."""
    import zipfile
    import zlib

    try:
        with (
            zipfile.ZipFile(archive) as files,
            files.open(member) as source,
            whole_file(path) as stream,
        ):
            shutil.copyfileobj(source, stream, CHUNK)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{archive} is no archive with {member} whole in it; delete it to download it again"
        ) from error


def _download_url(name: str) -> Path:
    from filelock import FileLock

    entry = _known(name)
    path = cache_folder() / "downloads" / entry.files[0]
    whole = Path(f"{path}.zip") if entry.member else path
    part = Path(f"{whole}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        left = 0  # a server that never answered is not asked again
        while not path.exists() and not whole.exists():
            before = _size(part)
            try:
                _transfer(entry.url, part)
                os.replace(part, whole)
                Path(f"{part}.json").unlink(missing_ok=True)
            except _Refused as error:
                raise _failure(name, error) from None
            except _Dropped as error:
                left = RETRIES if _size(part) > before else left - 1
                if left <= 0:
                    raise _failure(name, error) from None
                time.sleep(PAUSE * 2 ** (RETRIES - left))
        if not path.exists():
            for left in path.parent.glob(f".{path.name}.*"):  # of a killed process
                left.unlink()
            _unpack(whole, entry.member, path)
        if entry.member:
            whole.unlink(missing_ok=True)
    return path


def _files_of(repo: str, part: str) -> list[str]:
    """The files of a part of a pipeline: weights, configuration, scheduler or tokenizer."""
    from huggingface_hub import hf_hub_download, list_repo_files

    from checkpoints_convert import CheckpointError
    from checkpoints_convert.readers import WEIGHTS, read_json
    from checkpoints_convert.unet import SUPPORTED

    there = set(list_repo_files(repo))
    weights = [f"{part}/{file}" for file in WEIGHTS if not file.endswith(".json")]
    found = next((file for file in weights if file in there), None)
    if found is None or f"{part}/config.json" not in there:
        raise CheckpointError(
            f"the repository {repo} has no weights in {part}, as a pipeline of diffusers has"
        )
    if part == "unet":
        # Said in a small file, before gigabytes of weights are fetched.
        said = read_json(Path(hf_hub_download(repo, f"{part}/config.json")))
        later = said.get("use_linear_projection") or said.get("addition_embed_type")
        if later or said.get("in_channels", 4) != said.get("out_channels", 4):
            raise CheckpointError(
                f"{repo} is of Stable Diffusion 2, XL or later, or for inpainting; supported are "
                f"{SUPPORTED}"
            )
    beside = {
        "unet": ("scheduler/scheduler_config.json",),
        "text_encoder": ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer.json",
                         "tokenizer/tokenizer_config.json"),
    }  # fmt: skip
    more = [file for file in beside.get(part, ()) if file in there]
    return [f"{part}/config.json", found, *more]


def _download_repo(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    from checkpoints_convert import CheckpointError

    entry = _known(name)
    try:
        with checkpoint.quiet("huggingface_hub"):
            files = entry.files or _files_of(entry.repo, entry.part)
            paths = [Path(hf_hub_download(entry.repo, file)) for file in files]
    except CheckpointError:
        raise
    except Exception as error:  # of the HTTP client too, which differs between the hub's releases
        if isinstance(error, OSError) and error.errno:  # the disk's
            raise
        lines = str(error.__cause__ or error).strip().splitlines()
        raise _failure(name, lines[0] if lines else type(error).__name__) from None
    return paths[0] if len(paths) == 1 else paths[0].parent


def download(name: str) -> Path:
    """Downloads a public network's file, or the folder of its files where it has several.

    A download that was cut off goes on where it stopped. Files of the Hugging Face hub are in that
    client's own cache, others in ``cache_folder()``.

    Args:
        name: One of ``PUBLIC``.

    Raises:
        ValueError: If there is no such network, or it cannot be reached; says how to go on by hand.
        OSError: If the disk is full; what has come is kept.
    """
    return _download_url(name) if _known(name).url else _download_repo(name)


def fetch(name: str) -> Path:
    """The folder of a public network in the cache; the first time downloads and converts it.

    Raises:
        ValueError: As ``download``, or if the file cannot be converted.
        OSError: If the disk is full.
    """
    from filelock import FileLock

    if (_network_folder(name) / "card.json").exists():
        return _network_folder(name)
    name = _short(name)
    entry, out = _known(name), _network_folder(name)
    card = out / "card.json"
    if card.exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.parent / f".{out.name}.lock"):
        if card.exists():  # another process was faster
            return out
        from checkpoints_convert import convert

        source = download(name)
        try:
            convert(
                source,
                out,
                family=entry.family,
                name=name,
                source_name=entry.source,
                text_encoder=entry.text_encoder,
                license=entry.license,
                data=entry.data,
            )
        except ValueError as error:
            if entry.repo:  # the hub's client checked its size
                raise
            raise ValueError(f"{error}; delete {source} to download {name} again") from error
        if entry.url:  # the rest is in the cache of the hub's client
            source.unlink()
    return out


def embedded_names() -> list[str]:
    """Names of the networks that come with the package."""
    return sorted(card.parent.name for card in EMBEDDED.glob("*/card.json"))


def find(name: str | os.PathLike[str]) -> Path:
    """The folder of an embedded network, of a path, or of a public network, in this order.

    A name with a slash is that of a repository on the hub, unless a folder here begins so.

    Raises:
        ValueError: If there is none of them (says the near names), or a public network cannot be
            downloaded or converted.
        OSError: If the disk is full.
    """
    text = str(name)
    for embedded in (text, f"{text}-features"):
        if embedded in embedded_names():
            return EMBEDDED / embedded
    if Path(name).is_dir():
        return Path(name)
    if text in PUBLIC:
        return fetch(text)
    if Path(name).is_file():
        raise ValueError(f"{name} is a file; tstitch convert {name} OUT makes a network folder")
    # What begins with the name of a folder that is here is a path that is wrong.
    if public(text) is not None and not Path(Path(text).parts[0]).is_dir():
        return fetch(text)
    if os.sep in text:
        raise ValueError(f"no network folder at {name}")
    raise unknown("network", name, [*embedded_names(), *PUBLIC])


def load(
    name: str | os.PathLike[str], dtype: Any = jnp.float32, *, mesh: Mesh | None = None
) -> Any:
    """Loads a network onto the default device, or onto a mesh of them.

    Args:
        name: An embedded name such as ``"fashion-s"`` (``"fashion"`` for the feature network), a
            public name such as ``"dit-xl-2-256"``, or that of a pipeline on the Hugging Face hub
            such as ``"CompVis/stable-diffusion-v1-4"`` (see ``public``), downloaded and converted
            the first time; or the path of a network folder.
        dtype: What the network computes in, float32 or bfloat16; see ``make_network``.
        mesh: From ``ts.make_mesh``; see ``ts.shard``. No device then holds more than its part.

    Returns:
        A ``Network``; an ``Autoencoder``, a ``TextEncoder`` or a ``FeatureNetwork`` where the name
        is of one.

    Raises:
        ValueError: If there is no such network, it cannot be downloaded, or its folder is damaged.
        OSError: If the disk is full.
    """
    if mesh is None:
        return checkpoint.load(find(name), dtype)
    return parallel.shard(checkpoint.load(find(name), dtype, on_host=True), mesh)
