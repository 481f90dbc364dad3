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
