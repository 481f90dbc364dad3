"""Trajectory stitching of diffusion models (T-Stitch, Pan et al. 2024, arXiv:2402.14167)."""

from tstitch_jax.checkpoint import make_autoencoder, make_network, save
from tstitch_jax.guidance import cfg
from tstitch_jax.hub import load
from tstitch_jax.pipeline import sample
from tstitch_jax.plan import Plan
from tstitch_jax.prediction import as_denoiser, without_variance
from tstitch_jax.sampler import draw_noise, image_keys, run
from tstitch_jax.schedules import make_knots, make_schedule, respace
from tstitch_jax.solvers import SOLVERS, ddim, ddpm, make_solver
from tstitch_jax.stitch import stitch
from tstitch_jax.types import (
    Autoencoder,
    AutoencoderCard,
    Card,
    Denoiser,
    Knots,
    Network,
    Prediction,
    Schedule,
    Solver,
)

__version__ = "0.2.0"

__all__ = [
    "SOLVERS",
    "Autoencoder",
    "AutoencoderCard",
    "Card",
    "Denoiser",
    "Knots",
    "Network",
    "Plan",
    "Prediction",
    "Schedule",
    "Solver",
    "as_denoiser",
    "cfg",
    "ddim",
    "ddpm",
    "draw_noise",
    "image_keys",
    "load",
    "make_autoencoder",
    "make_knots",
    "make_network",
    "make_schedule",
    "make_solver",
    "respace",
    "run",
    "sample",
    "save",
    "stitch",
    "without_variance",
]
