"""Solvers, one file each; ``make_solver`` finds one by name."""

from __future__ import annotations

from collections.abc import Callable

import jax

from tstitch_jax.core.checks import check_name
from tstitch_jax.core.solvers.ddim import ddim
from tstitch_jax.core.solvers.ddpm import ddpm
from tstitch_jax.core.solvers.dpmpp import dpmpp, dpmpp_sde
from tstitch_jax.core.solvers.euler import euler, euler_ancestral
from tstitch_jax.core.solvers.heun import flow_heun, heun
from tstitch_jax.core.solvers.lcm import lcm
from tstitch_jax.core.solvers.pndm import pndm
from tstitch_jax.core.solvers.sde import sde
from tstitch_jax.core.solvers.unipc import unipc
from tstitch_jax.core.types import Solver

SOLVERS: dict[str, Callable[..., Solver]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "dpmpp": dpmpp,
    "dpmpp_3": lambda: dpmpp(3),
    "dpmpp_sde": dpmpp_sde,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "flow_heun": flow_heun,
    "heun": heun,
    "lcm": lcm,
    "pndm": pndm,
    "sde": sde,
    "unipc": unipc,
    "unipc_3": lambda: unipc(3),
}
"""By name, with their defaults; ``ts.dpmpp(order=1)`` and the like make any other."""


def make_solver(name: str, *, eta: float | jax.Array | None = None) -> Solver:
    """The solver of a name.

    Args:
        name: One of ``SOLVERS``.
        eta: Noise of ``"ddim"`` (0 unless given) and of ``"euler_ancestral"`` (1 unless given); no
            other solver takes any but 0.

    Raises:
        ValueError: If the name is unknown, or eta is given to a solver that has none.
    """
    check_name("solver", name, SOLVERS)
    if name in ("ddim", "euler_ancestral"):
        return SOLVERS[name]() if eta is None else SOLVERS[name](eta)
    if not (eta is None or (isinstance(eta, int | float) and eta == 0)):
        raise ValueError(
            f"eta belongs to the solvers 'ddim' and 'euler_ancestral'; {name!r} has none"
        )
    return SOLVERS[name]()


__all__ = [
    "SOLVERS", "ddim", "ddpm", "dpmpp", "dpmpp_sde", "euler", "euler_ancestral", "flow_heun",
    "heun", "lcm", "make_solver", "pndm", "sde", "unipc",
]  # fmt: skip
