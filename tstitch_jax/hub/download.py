"""Downloads of public networks, which resume where they were cut off."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tstitch_jax.core.files import whole_file
from tstitch_jax.hub.catalog import PUBLIC, known, short_name

CHUNK = 2**20


TIMEOUT = 30.0


RETRIES = 4
"""Attempts in a row that bring nothing before a download is given up."""


PAUSE = 1.0
"""Seconds before the first retry; each further one waits twice as long."""


def cache_folder() -> Path:
    """``$TSTITCH_CACHE``, or ``tstitch_jax`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("TSTITCH_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tstitch_jax"


def network_folder(name: str) -> Path:
    return cache_folder() / "networks" / name.replace("/", "--")


def is_cached(name: str) -> bool:
    """Whether a public network was downloaded and converted."""
    return any((network_folder(each) / "card.json").exists() for each in (name, short_name(name)))


def _failure(name: str, reason: object) -> ValueError:
    """The error of a download, with the way around it."""
    entry = known(name)
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
    files = f"{network_folder(name).name}-files"  # not the name itself, which would be found
    what, place = (entry.files[0], "as") if single else (files, "into a folder")
    out = shlex.quote(str(network_folder(name)))
    absent = "" if name in PUBLIC else f"there is no folder {name}, and "
    return ValueError(
        f"{absent}cannot download {name}: {str(reason).rstrip('. ')}. Save {' and '.join(urls)} "
        f"{place} {what} by other means and run: tstitch convert {what} {out} --family "
        f'{entry.family}, then ts.load("{name}") finds it'
    )


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Silences the logger of a library whose failure becomes one error."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


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

    entry = known(name)
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

    entry = known(name)
    try:
        with quiet("huggingface_hub"):
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
    return _download_url(name) if known(name).url else _download_repo(name)
