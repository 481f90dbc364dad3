"""What the command line settles before it samples: compiled programs kept, several hosts."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tstitch_jax.core.checks import first_line


def keep_programs() -> None:
    """Keeps compiled programs for the next run, unless the user has said where or that it not be.

    In a folder for each kind of processor, as a program compiled for one may not run on another.
    """
    import jax

    from tstitch_jax.hub.download import cache_folder

    if jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kind = "".join(next((line for line in lines if line.startswith("flags")), ""))
    except OSError:
        kind = ""
    name = hashlib.sha256(kind.encode()).hexdigest()[:12]
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled" / name))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def join_hosts(arguments: argparse.Namespace) -> None:
    """Starts ``jax.distributed`` if asked for."""
    import jax

    by_hand = (arguments.coordinator, arguments.num_hosts, arguments.host)
    if arguments.distributed and any(value is not None for value in by_hand):
        raise ValueError("give --distributed, or --coordinator with --num-hosts and --host")
    if not arguments.distributed and all(value is None for value in by_hand):
        return
    if not arguments.distributed and None in by_hand:
        raise ValueError("--coordinator, --num-hosts and --host go together")
    if not arguments.distributed and arguments.host >= arguments.num_hosts:
        raise ValueError(
            f"--host must be below --num-hosts {arguments.num_hosts}, got {arguments.host}"
        )
    try:
        jax.distributed.initialize(*by_hand, initialization_timeout=arguments.host_timeout)
    except (RuntimeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(f"the hosts do not find each other: {first}") from error


@contextlib.contextmanager
def others_may_fail() -> Iterator[None]:
    """Makes one line of what JAX says of several hosts when one of them has gone."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        said = f"another host has failed, see what it says: {first_line(error)}"
        raise OSError(said) from error


def leave_hosts(status: int) -> None:
    """Ends a process that has failed, where others would be waited for, who may be dead."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
