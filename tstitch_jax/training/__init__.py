"""Training a denoiser: data, loss, and a loop that resumes."""

from tstitch_jax.training.loop import TrainConfig, train

__all__ = ["TrainConfig", "train"]
