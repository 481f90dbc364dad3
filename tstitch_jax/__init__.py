"""Trajectory stitching of diffusion models (T-Stitch, Pan et al. 2024, arXiv:2402.14167)."""

from tstitch_jax.calibration import Calibration, Choice, calibrate
from tstitch_jax.checkpoint import (
    make_autoencoder,
    make_feature_network,
    make_network,
    make_text_encoder,
    save,
)
from tstitch_jax.evaluation import Evaluation, evaluate
from tstitch_jax.exporting import export
from tstitch_jax.generation import generate
from tstitch_jax.guidance import autoguide, cfg, guidance_interval
from tstitch_jax.hub import load
from tstitch_jax.parallel import make_mesh, shard
from tstitch_jax.pipeline import sample
from tstitch_jax.plan import Plan
from tstitch_jax.prediction import as_denoiser, at_equal_snr, with_cond, without_variance
from tstitch_jax.sampler import Step, draw_noise, image_keys, iterate, run
from tstitch_jax.schedules import (
    SPACINGS,
    last_steps,
    make_knots,
    make_schedule,
    match_snr,
    respace,
)
from tstitch_jax.solvers import (
    SOLVERS,
    ddim,
    ddpm,
    dpmpp,
    dpmpp_sde,
    euler,
    euler_ancestral,
    flow_heun,
    heun,
    lcm,
    make_solver,
    pndm,
    sde,
    unipc,
)
from tstitch_jax.stitch import stitch
from tstitch_jax.sweep import Point, SweepConfig, sweep
from tstitch_jax.types import (
    Autoencoder,
    AutoencoderCard,
    Card,
    Denoiser,
    FeatureCard,
    FeatureNetwork,
    Features,
    Knots,
    Network,
    Prediction,
    Schedule,
    Solver,
    TextEncoder,
    TextEncoderCard,
    Tokenizer,
)

__version__ = "0.12.3"

__all__ = [
    "SOLVERS",
    "SPACINGS",
    "Autoencoder",
    "AutoencoderCard",
    "Calibration",
    "Card",
    "Choice",
    "Denoiser",
    "Evaluation",
    "FeatureCard",
    "FeatureNetwork",
    "Features",
    "Knots",
    "Network",
    "Plan",
    "Point",
    "Prediction",
    "Schedule",
    "Solver",
    "Step",
    "SweepConfig",
    "TextEncoder",
    "TextEncoderCard",
    "Tokenizer",
    "as_denoiser",
    "at_equal_snr",
    "autoguide",
    "calibrate",
    "cfg",
    "ddim",
    "ddpm",
    "dpmpp",
    "dpmpp_sde",
    "draw_noise",
    "euler",
    "euler_ancestral",
    "evaluate",
    "export",
    "flow_heun",
    "generate",
    "guidance_interval",
    "heun",
    "image_keys",
    "iterate",
    "last_steps",
    "lcm",
    "load",
    "make_autoencoder",
    "make_feature_network",
    "make_knots",
    "make_mesh",
    "make_network",
    "make_schedule",
    "make_solver",
    "make_text_encoder",
    "match_snr",
    "pndm",
    "respace",
    "run",
    "sample",
    "save",
    "sde",
    "shard",
    "stitch",
    "sweep",
    "unipc",
    "with_cond",
    "without_variance",
]
