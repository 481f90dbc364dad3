"""Solvers, one file each; ``make_solver`` finds one by name."""

from __future__ import annotations

from collections.abc import Callable

import jax

from tstitch_jax.schedules import unknown
from tstitch_jax.solvers.ddim import ddim
from tstitch_jax.solvers.ddpm import ddpm
from tstitch_jax.types import Solver

SOLVERS: dict[str, Callable[..., Solver]] = {"ddim": ddim, "ddpm": ddpm}


def make_solver(name: str, *, eta: float | jax.Array = 0.0) -> Solver:
    """The solver of a name; ``eta`` is DDIM's, and must stay 0 for any other.

    Raises:
        ValueError: If the name is unknown, or eta is given to a solver that has none.
    """
    if name not in SOLVERS:
        raise unknown("solver", name, SOLVERS)
    if name == "ddim":
        return ddim(eta)
    if not (isinstance(eta, int | float) and eta == 0):
        raise ValueError(f"eta belongs to the solver 'ddim'; {name!r} has none")
    return SOLVERS[name]()


__all__ = ["SOLVERS", "ddim", "ddpm", "make_solver"]
