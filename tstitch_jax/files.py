"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What an ``.npz`` file that is cut, encrypted or no archive fails with."""


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def check_writable(path: Path) -> None:
    """Makes sure, before long work, that a file can be written there; makes its folder.

    Raises:
        ValueError: If it cannot.
    """
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _temporary(path).touch()
        _temporary(path).unlink()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def held_folder(folder: Path, marker: str) -> Iterator[None]:
    """Makes a folder, or takes one that has the file ``marker``, for this process alone.

    Raises:
        ValueError: If there is something else in that place, or another process works on it.
        OSError: If it cannot be written.
    """
    import filelock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if others and not (folder / marker).exists():
            raise ValueError(
                f"{folder} holds other things ({others[0]}) and no {marker}; choose another folder"
            )
        held = filelock.FileLock(folder / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(
            f"another process works on {folder}; wait for it, or choose another folder"
        ) from None
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{folder} is not a folder; choose another place") from None
    except OSError as error:
        reason = error.strerror or error
        raise OSError(error.errno, f"cannot write {folder}: {reason}") from error
    with held:
        yield


def remove_unfinished(folder: Path) -> None:
    """Removes what a killed process had not finished writing there, from a folder that is ours."""
    for left in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file, open for writing, that appears under its name when it is complete.

    Raises:
        OSError: If it cannot be written; what was in its place is then as it was.
    """
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8, whole or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    with whole_file(path) as stream:
        stream.write(text.encode())
