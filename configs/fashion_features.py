"""The embedded classifier, in whose features images are compared: 483K parameters.

Command:  tstitch train configs/fashion_features.py --out runs/fashion_features
Data:     tensorflow-datasets' fashion_mnist; or --data FILE.npz with x_train and y_train, and with
          x_test and y_test to log the accuracy on
Cost:     768,000 images, about 15 minutes on 2 CPU cores (900 images/s)
Expected: a loss of 0.64 at the end; an accuracy of 0.93 on images that were held out
"""

from fashion import DATA, FACTS

from tstitch_jax.models.cards import FeatureCard
from tstitch_jax.training import ClassifierConfig

config = ClassifierConfig(
    card=FeatureCard(
        name="fashion-features",
        architecture="classifier",
        config={"widths": [32, 64, 128], "blocks": [1, 1, 1]},
        source="tstitch train configs/fashion_features.py",
        **FACTS,
    ),
    data=DATA,
    steps=12_000,
    batch=64,
    learning_rate=4e-3,
    warmup=300,
    cooldown=11_700,
    weight_decay=0.05,
    ema=0.998,
    shift=1,
    save_every=1000,
    stored_dtype="float16",
)
