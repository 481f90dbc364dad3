"""Measures of image quality: samples against a reference, in a network's features."""

from tstitch_jax.evaluation.clip_score import ClipScore, embed_texts, read_prompts
from tstitch_jax.evaluation.frechet import frechet_distance
from tstitch_jax.evaluation.inception_score import InceptionScore
from tstitch_jax.evaluation.infinity import distance_at_infinity
from tstitch_jax.evaluation.kernel import kernel_distance
from tstitch_jax.evaluation.manifold import nearest, precision_recall
from tstitch_jax.evaluation.measure import evaluate
from tstitch_jax.evaluation.report import METRICS, Evaluation, metric_key, metric_name
from tstitch_jax.evaluation.sources import Source, open_source
from tstitch_jax.evaluation.statistics import Moments

__all__ = [
    "METRICS",
    "ClipScore",
    "Evaluation",
    "InceptionScore",
    "Moments",
    "Source",
    "distance_at_infinity",
    "embed_texts",
    "evaluate",
    "frechet_distance",
    "kernel_distance",
    "metric_key",
    "metric_name",
    "nearest",
    "open_source",
    "precision_recall",
    "read_prompts",
]
