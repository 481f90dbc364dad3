"""The folder of a job: one process works on it at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


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
