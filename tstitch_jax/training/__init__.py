"""Training a denoiser or a classifier: data, losses, and a loop that resumes."""

from tstitch_jax.training.loop import ClassifierConfig, TrainConfig, train

__all__ = ["ClassifierConfig", "TrainConfig", "train"]
