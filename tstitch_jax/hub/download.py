"""Resumable downloads of public networks."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tstitch_jax.core.checks import first_line
from tstitch_jax.core.files import whole_file, write_text
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
    """Whether a public network has been downloaded and converted."""
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


class _Dropped(Exception):
    """The connection failed; the bytes before that are in the partial file."""


class _Refused(Exception):
    """The server does not send the file; a retry would not help."""


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _dropped(error: Exception) -> _Dropped:
    return _Dropped(str(getattr(error, "reason", error)) or type(error).__name__)


def _chunks(response: Any) -> Iterator[bytes]:
    from http.client import HTTPException

    try:
        while chunk := response.read(CHUNK):
            yield chunk
    except (OSError, HTTPException) as error:
        raise _dropped(error) from error


def _transfer(url: str, part: Path) -> None:
    """One attempt at the bytes that ``part`` lacks.

    A file beside it holds the address and the validator (a strong ETag or the time of the last
    change), without which the bytes are not resumed.
    """
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from tqdm import tqdm

    source = Path(f"{part}.source")
    have, headers = _size(part), {"User-Agent": "tstitch_jax"}
    address, _, validator = source.read_text().partition("\n") if source.exists() else ("", "", "")
    if have and validator and address == url:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code != 416 or "Range" not in headers:
            raise _Refused(f"the server answers {error.code} {error.reason}") from None
        part.unlink()  # not shorter than the file
        return _transfer(url, part)
    except (OSError, HTTPException) as error:
        raise _dropped(error) from error
    with response:
        if response.headers.get_content_type() == "text/html":
            raise _Refused(
                "the server sent a web page instead of the file, as Google Drive does after too "
                "many downloads in a day"
            )
        tag, changed = response.headers["ETag"], response.headers["Last-Modified"]
        current = (changed if not tag or tag.startswith("W/") else tag) or ""
        content = response.headers["Content-Range"] or ""
        if response.status != 206 or "Range" not in headers:
            have = 0
        elif current not in ("", validator) or not content.startswith(f"bytes {have}-"):
            part.unlink()  # another version of the file, or other bytes
            return _transfer(url, part)
        total = None if response.length is None else have + response.length
        try:
            with open(part, "ab" if have else "wb") as file:
                if not have:  # after the old bytes are gone
                    source.write_text(f"{url}\n{current}")
                with tqdm(
                    initial=have, total=total, desc=part.stem, unit="B", unit_scale=True,
                    unit_divisor=1024,
                ) as bar:  # fmt: skip
                    for chunk in _chunks(response):
                        file.write(chunk)
                        bar.update(len(chunk))
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write {part}: {error.strerror}; fix this and rerun, the download resumes",
            ) from error
    if total is not None and _size(part) < total:
        raise _Dropped(f"the connection closed after {_size(part)} of {total} bytes")


def _unpack(archive: Path, member: str, path: Path) -> None:
    """Extracts one file of an archive; raises ValueError if it is missing or damaged."""
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
            f"{archive} is not an archive with an intact {member}; delete it to download it again"
        ) from error


def _check_sha256(name: str, files: Sequence[Path]) -> None:
    """Compares downloaded files with the catalog's SHA-256, else with that of the first download.

    Raises:
        ValueError: If they differ.
    """
    from checkpoints_convert.readers import checksum

    digest, record = checksum(tuple(files)), Path(f"{network_folder(short_name(name))}.sha256")
    if expected := known(name).sha256:
        origin = "the catalog expects"
    elif record.exists():
        expected = record.read_text().strip()
        origin = f"the first download had (delete {record} to accept the change)"
    else:
        record.parent.mkdir(parents=True, exist_ok=True)
        return write_text(record, f"{digest}\n")
    if digest != expected:
        raise ValueError(
            f"the files of {name} have changed: {', '.join(file.name for file in files)} have "
            f"SHA-256 {digest}, {origin} {expected}"
        )


def _download_url(name: str) -> Path:
    from filelock import FileLock

    entry = known(name)
    path = cache_folder() / "downloads" / entry.files[0]
    whole = Path(f"{path}.zip") if entry.member else path
    part = Path(f"{whole}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            return path
        left = 0  # a server that never answered is not asked again
        while not whole.exists():
            before = _size(part)
            try:
                _transfer(entry.url, part)
                os.replace(part, whole)
                Path(f"{part}.source").unlink()
            except _Refused as error:
                raise _failure(name, error) from None
            except _Dropped as error:
                left = RETRIES if _size(part) > before else left - 1
                if left <= 0:
                    raise _failure(name, error) from None
                time.sleep(PAUSE * 2 ** (RETRIES - left))
        if entry.member:
            for file in path.parent.glob(f".{path.name}.*"):  # left by a killed process
                file.unlink()
            _unpack(whole, entry.member, path)
            whole.unlink()
        try:
            _check_sha256(name, [path])
        except ValueError:
            path.unlink()
            raise
    return path


def _files_of(repo: str, part: str) -> list[str]:
    """The files of a pipeline's part: weights, configuration, scheduler or tokenizer."""
    from huggingface_hub import hf_hub_download, list_repo_files

    from checkpoints_convert import CheckpointError
    from checkpoints_convert.readers import WEIGHTS, read_json
    from checkpoints_convert.unet import SUPPORTED

    there = set(list_repo_files(repo))
    weights = [f"{part}/{file}" for file in WEIGHTS if not file.endswith(".json")]
    found = next((file for file in weights if file in there), None)
    if found is None or f"{part}/config.json" not in there:
        raise CheckpointError(
            f"the repository {repo} has no weights in {part}, where a diffusers pipeline has them"
        )
    if part == "unet":
        # A small file, read before gigabytes of weights are downloaded.
        config = read_json(Path(hf_hub_download(repo, f"{part}/config.json")))
        later = config.get("use_linear_projection") or config.get("addition_embed_type")
        if later or config.get("in_channels", 4) != config.get("out_channels", 4):
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

    entry, logger = known(name), logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # its failure becomes one error
    try:
        files = entry.files or _files_of(entry.repo, entry.part)
        paths = [Path(hf_hub_download(entry.repo, file)) for file in files]
    except CheckpointError:
        raise
    except Exception as error:  # errors of the HTTP client differ between releases of the hub's
        if isinstance(error, OSError) and error.errno:  # of the disk
            raise
        raise _failure(name, first_line(error.__cause__ or error)) from None
    finally:
        logger.setLevel(level)
    _check_sha256(name, paths)
    return paths[0] if len(paths) == 1 else paths[0].parent


def download(name: str) -> Path:
    """Downloads the file of a public network, or the folder of its files if it has several.

    An interrupted download resumes. Files of the Hugging Face hub go into that client's cache,
    other files into ``cache_folder()``. Their SHA-256 is compared with the catalog's, or with the
    one that the first download recorded.

    Args:
        name: A name of ``PUBLIC``, or a pipeline on the hub; see ``public``.

    Raises:
        ValueError: If the name is unknown, the files have changed, or the server cannot be reached;
            the message then describes a manual download.
        OSError: If the disk is full; the downloaded bytes are kept.
    """
    return _download_url(name) if known(name).url else _download_repo(name)
