"""What the runs on Fashion-MNIST share; fashion_s.py and its like add a size."""

from __future__ import annotations

from typing import Any

from tstitch_jax.models.cards import Card
from tstitch_jax.training import TrainConfig

DATA = "tfds:fashion_mnist"

FACTS: dict[str, Any] = dict(
    image_shape=(28, 28, 1),
    num_classes=10,
    class_names=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    data="Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, MIT license): 60,000 of the 70,000 images, "
    "see docs/architecture.md",
    license="Apache-2.0",
)
"""What any card says of the data."""


def make(name: str, size: dict[str, Any], file: str = "", **training: Any) -> TrainConfig:
    """A run, described in ``file``, that trains a network ``name`` of that size."""
    card = Card(
        name=name,
        architecture="dit",
        config={**size, "patch": 4},
        target="v",
        learned_variance=False,
        schedule={"name": "cosine"},
        source=f"tstitch train configs/{file or name.replace('-', '_')}.py",
        **FACTS,
    )
    shared = dict(warmup=300, save_every=1000, stored_dtype="float16")
    return TrainConfig(card=card, data=DATA, **shared | training)


def make_further(name: str, times: tuple[float, float]) -> TrainConfig:
    """A run that trains fashion-b on, at these times."""
    return make(
        name,
        {"width": 112, "depth": 4, "num_heads": 2},
        init="fashion-b",
        times=times,
        steps=1200,
        batch=128,
        learning_rate=8e-4,
        warmup=100,
        cooldown=900,
        ema=0.998,
        min_snr=None,
        seed=2,
    )
