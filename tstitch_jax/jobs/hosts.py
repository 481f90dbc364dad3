"""Several hosts at one job: who does what, who is alive, and who has failed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

BEAT = 1.0
"""Seconds between two signs of life."""

MEET = 10.0
"""Seconds that a folder may take to show one host what another wrote, just before."""


class HostError(OSError):
    """Another host has failed or died."""


def tell_all(text: str) -> list[str]:
    """What each host says, on every host; each waits until all have come here."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    data = text.encode()
    lengths = np.ravel(multihost_utils.process_allgather(np.array([len(data)], np.int32)))
    own = np.zeros(lengths.max(), np.uint8)
    own[: len(data)] = np.frombuffer(data, np.uint8)
    heard = np.asarray(multihost_utils.process_allgather(own), np.uint8)
    return [bytes(row[:n]).decode() for row, n in zip(heard, lengths, strict=True)]


class Hosts:
    """Signs of life of every host, in a folder that all of them see.

    Each host writes its own file over and over, from a thread of its own, and reads the others'.
    A host whose file does not change is dead. No device takes part, so that a dead host keeps
    nobody waiting in a collective. With one host nothing is written.

    Attributes:
        index, count: Which of how many hosts this is.
    """

    def __init__(self, folder: Path, run: str, timeout: float | int) -> None:
        """
        Args:
            folder: Where the files are.
            run: A text that all hosts of this run share, and no other run has.
            timeout: Seconds without a sign of life after which a host counts as dead.
        """
        self.index, self.count = jax.process_index(), jax.process_count()
        self._folder, self._run, self._timeout = folder, run, timeout
        self._state: dict[str, Any] = {
            "run": run,
            "beat": 0,
            "images": 0,
            "had": 0,
            "stage": "making",
        }
        self._seen = {i: (-1, time.monotonic()) for i in range(self.count)}
        self._others: dict[int, dict[str, Any]] = {}
        self._stop = threading.Event()
        self._write = threading.Lock()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Hosts:
        """Begins to give signs of life, and waits for those of all others.

        Raises:
            HostError: If they do not come: the hosts see different folders.
        """
        if self.count > 1:
            if self.index == 0:
                self._folder.mkdir(exist_ok=True)
            self._say()
            start, limit = time.monotonic(), min(MEET, self._timeout / 2)
            while missing := set(range(self.count)) - {self.index} - self.check().keys():
                if time.monotonic() - start > limit:
                    said = (
                        f"{self._folder.parent.absolute()} is not one folder that hosts "
                        f"{self.index} and {min(missing)} both see; give every host the same "
                        "folder, on a disk that they share"
                    )
                    self._say(stage=f"failed: {said}")
                    raise HostError(said)
                time.sleep(BEAT / 10)
                self._say()  # the first may have come before there was a folder
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Tells the others that this host is through, or why it failed.

        If all are through, host 0 removes the folder.
        """
        if self.count > 1:
            self._stop.set()
            self._thread.join()
            self._say(stage="done" if kind is None else f"failed: {error or kind.__name__}")
        if kind is None and self.index == 0:
            with contextlib.suppress(HostError):
                for _ in self.wait(range(self.count), "done"):
                    pass
                shutil.rmtree(self._folder, ignore_errors=True)

    def _say(self, **changes: Any) -> None:
        with self._write:
            self._state |= changes
            self._state["beat"] += 1
            file = self._folder / f"{self.index}.json"
            temporary = file.with_suffix(f".{os.getpid()}")
            try:
                temporary.write_text(json.dumps(self._state))
                os.replace(temporary, file)
            except OSError:  # a full disk is found by whoever writes images; this one may pass
                temporary.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            self._say()

    def report(self, **changes: Any) -> None:
        """Says how many ``images`` this host has, how many it ``had`` before, or its ``stage``."""
        if self.count > 1:
            self._say(**changes)

    def check(self) -> dict[int, dict[str, Any]]:
        """What the other hosts of this run have said, as they gave it to ``report``.

        Raises:
            HostError: If one has failed, or has given no sign of life for too long.
        """
        for i in set(range(self.count)) - {self.index}:
            with contextlib.suppress(OSError, ValueError):  # not there yet, or just replaced
                said = json.loads((self._folder / f"{i}.json").read_text())
                if said["run"] == self._run and said["beat"] != self._seen[i][0]:
                    self._others[i], self._seen[i] = said, (said["beat"], time.monotonic())
            stage = self._others.get(i, {}).get("stage", "")
            if stage.startswith("failed"):
                raise HostError(f"host {i} {stage}; what is done is kept")
            if stage != "done" and time.monotonic() - self._seen[i][1] > self._timeout:
                raise HostError(
                    f"host {i} has given no sign of life for {self._timeout:g} s; what is done is "
                    "kept: run the same again"
                )
        return self._others

    def wait(self, hosts: Iterable[int], stage: str) -> Iterator[dict[int, dict[str, Any]]]:
        """Yields what ``check`` returns, again and again, until these hosts are at this stage."""
        wanted = set(hosts) - {self.index}
        while not all(self.check().get(i, {}).get("stage") == stage for i in wanted):
            yield self._others
            time.sleep(BEAT / 2)
