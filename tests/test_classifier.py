"""The classifier, its training, and the embedded one."""

import csv
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, relative

import tstitch_jax as ts
from tstitch_jax.hub import resolve
from tstitch_jax.models import build
from tstitch_jax.models.cards import FeatureCard
from tstitch_jax.models.classifier import Classifier
from tstitch_jax.models.measure import count_params
from tstitch_jax.models.types import Features
from tstitch_jax.training import ClassifierConfig, train
from tstitch_jax.training.classification import accuracy, augment, make_classifier_loss
from tstitch_jax.training.data import ArrayImages, NoSplit, open_images


def tiny_card(**changes) -> FeatureCard:
    card = FeatureCard(
        name="corners",
        architecture="classifier",
        config={"widths": [8, 16], "blocks": [1, 0]},
        image_shape=(8, 10, 1),
        num_classes=4,
    )
    return dataclasses.replace(card, **changes)


@functools.cache
def tiny_network(dtype=jnp.float32):
    return build.make_network(tiny_card(), random_params(tiny_card()), dtype)


def extract(network, pixels):
    return jax.jit(lambda model, x: model(x))(network.model, jnp.asarray(pixels))


PIXELS = np.random.default_rng(1).integers(0, 256, (8, 8, 10, 1), dtype=np.uint8)


def make_data(count=64, seed=0):
    """Noise with a bright square in one of the four corners, which is the class."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    images = generator.integers(0, 60, (count, 8, 10), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = 4 * (label // 2), 5 * (label % 2)
        image[row : row + 4, column : column + 5] += 150
    return ArrayImages(images, labels)


def make_config(**changes) -> ClassifierConfig:
    options = dict(steps=60, batch=16, learning_rate=1e-2, warmup=5, cooldown=30, save_every=20)
    card = tiny_card(**changes.pop("card", {}))
    return ClassifierConfig(
        card=card, **{"data": "none.npz", "ema": 0.9, "flip": 0.0, "shift": 1, **options, **changes}
    )


def test_features():
    exact, rounded = tiny_network(), tiny_network(jnp.bfloat16)
    features, close = extract(exact, PIXELS), extract(rounded, PIXELS)
    for found in (features, close):
        assert isinstance(found, Features)
        assert found.pool.shape == (8, 16)
        assert found.logits.shape == (8, 4)
        assert found.spatial is None
        assert found.pool.dtype == found.logits.dtype == jnp.float32
    assert 0 < relative(close.pool, features.pool) < 0.03
    assert relative(close.logits, features.logits) < 0.03
    # What a kernel is cast to anyway it is held in; norms and the last layer are float32.
    held = {name: leaf.dtype for name, leaf in build.flatten(rounded.params).items()}
    assert held["level_0_resnet_0/conv1/kernel"] == jnp.bfloat16
    assert held["level_0_resnet_0/norm1/scale"] == held["logits/kernel"] == jnp.float32
    alone = extract(exact, PIXELS[:1])  # does not depend on its batch
    np.testing.assert_allclose(alone.pool, features.pool[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 8, 9, 1), (2, 8, 10, 3), (2, 10, 8, 1)])
def test_other_images_are_refused(shape):
    network = tiny_network()
    with pytest.raises(ValueError, match=r"Classifier built for \(8, 10, 1\), got images of"):
        network.model(jnp.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(widths=(8, 12)), r"8 groups do not divide widths of \(8, 12\)"),
        (dict(widths=()), "do not divide widths"),
        (dict(groups=0), "groups must be at least 1, got 0"),
        (dict(blocks=(1,)), r"one number for each of \(8, 16\), got \(1,\)"),
        (dict(blocks=(1, -1)), "one number for each"),
    ],
)
def test_bad_sizes(changes, message):
    sizes = dict(widths=(8, 16), blocks=(1, 1), num_classes=4, image_shape=(8, 8, 1))
    with pytest.raises(ValueError, match=message):
        Classifier(**{**sizes, **changes})


def test_augment():
    """What comes out is a part of the image on black, mirrored as often as is said."""
    image = jnp.arange(1.0, 21).reshape(1, 4, 5, 1)
    images = jnp.tile(image, (400, 1, 1, 1))
    around = np.pad(np.asarray(image[0, :, :, 0]), 1, constant_values=-1)
    windows = [around[i : i + 4, j : j + 5] for i in range(3) for j in range(3)]
    found = np.asarray(augment(jax.random.key(0), images, 1, 0.25))[..., 0]
    seen, mirrored = set(), 0
    for moved in found:
        (match,) = [
            (i, flipped)
            for i, window in enumerate(windows)
            for flipped in (False, True)
            if np.array_equal(moved, window[:, ::-1] if flipped else window)
        ]
        seen.add(match[0])
        mirrored += match[1]
    assert seen == set(range(9))
    assert abs(mirrored / 400 - 0.25) < 0.08
    np.testing.assert_array_equal(augment(jax.random.key(0), images, 0, 0.0), images)


def test_loss_is_the_cross_entropy():
    """At the wanted probabilities it is their entropy; the images arrive as pixels again."""
    seen = []

    def apply(params, pixels):
        seen.append(pixels)
        return Features(jnp.zeros((2, 1)), params)

    loss = make_classifier_loss(apply, shift=0, flip=0.0, label_smoothing=0.2)
    wanted = np.array([[0.85, 0.05, 0.05, 0.05], [0.05, 0.05, 0.85, 0.05]], np.float32)
    images = jnp.array([-1.0, 1.0]).reshape(2, 1, 1, 1)
    value = loss(jnp.log(wanted), jax.random.key(0), images, jnp.array([0, 2]))
    assert float(value) == pytest.approx(-(wanted[0] * np.log(wanted[0])).sum(), rel=1e-5)
    assert seen[0].ravel().tolist() == [0.0, 255.0]


def test_accuracy():
    data = make_data(1203)  # chunks that do not come out even
    network = tiny_network()
    params = jax.tree.map(jnp.zeros_like, network.params)
    params["logits"]["bias"] = jnp.array([0.0, 0.0, 1.0, 0.0])
    assert accuracy(network.with_params(params), data) == (data.labels == 2).mean()


def log_of(out):
    with open(out / "log.csv", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.usefixtures("standard_promotion")
def test_training_ends_with_every_image_right(tmp_path):
    data, held_out = make_data(), make_data(32, seed=1)
    splits = {"train": data, "test": held_out}
    arrays = {f"x_{name}": split.images for name, split in splits.items()}
    arrays |= {f"y_{name}": split.labels for name, split in splits.items()}
    np.savez(tmp_path / "data.npz", **arrays)
    seen = []
    network = train(
        make_config(data=str(tmp_path / "data.npz")),
        tmp_path / "run",
        preview=lambda network, path: seen.append(network.card.name),
        progress=False,
    )
    assert accuracy(network, held_out) == 1
    rows = log_of(tmp_path / "run")
    assert [(row["step"], bool(row["accuracy"])) for row in rows] == [
        ("20", True), ("40", True), ("50", False), ("60", True)
    ]  # fmt: skip
    assert float(rows[-1]["accuracy"]) == 1
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert seen == 3 * ["corners"]
    loaded = ts.load(tmp_path / "run" / "network")
    assert loaded.card == network.card
    assert loaded.card.num_params == count_params(loaded.params)
    assert accuracy(loaded, held_out) == 1


class Broken(ArrayImages):
    """Fails at its 35th batch, as a disk may; the first image alone is no batch."""

    batches = 0

    def read(self, indices):
        self.batches += len(indices) > 1
        if self.batches == 35:
            raise OSError("gone")
        return super().read(indices)


@pytest.mark.usefixtures("standard_promotion")
def test_an_interrupted_run_ends_as_an_unbroken_one(tmp_path):
    data = make_data()
    config = make_config(flip=0.5)
    with pytest.raises(OSError, match="gone"):
        train(config, tmp_path / "broken", images=Broken(data.images, data.labels), progress=False)
    for name in ("broken", "whole"):
        train(config, tmp_path / name, images=data, held_out=data, progress=False)
    # The first checkpoint of the broken run had no test split.
    assert log_of(tmp_path / "broken")[0]["accuracy"] == ""
    found, expected = (
        jax.tree.leaves(ts.load(tmp_path / name / "network").params) for name in ("broken", "whole")
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert log_of(tmp_path / "broken")[1:] == log_of(tmp_path / "whole")[1:]


def test_a_split_that_is_not_there(tmp_path):
    data = make_data()
    np.savez(tmp_path / "data.npz", x_train=data.images, y_train=data.labels)
    assert len(open_images(str(tmp_path / "data.npz"))) == 64
    with pytest.raises(NoSplit, match="needs the arrays x_test and y_test; it has x_train, y_tr"):
        open_images(str(tmp_path / "data.npz"), "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(shift=-1), "shift must be a whole number, 0 to 4294967295, got -1"),
        (dict(flip=2.0), "flip must be a number from 0 to 1, got 2.0"),
        (dict(label_smoothing=-0.1), "label_smoothing must be a number from 0 to 1, got -0.1"),
        (dict(card=dict(num_classes=3)), "has labels 0 to 3, the network takes 0 to 2"),
        (dict(card=dict(class_names=("one",))), "1 names for 4 classes"),
        (dict(card=dict(architecture="inception")), "cannot train the architecture 'inception'"),
        (dict(card=dict(image_shape=(8, 8, 1))), r"holds uint8 images of \(8, 10, 1\)"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(make_config(**changes), tmp_path / "run", images=make_data(), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_test_split_that_does_not_fit(tmp_path):
    held_out = ArrayImages(np.zeros((4, 9, 9), np.uint8), np.arange(4))
    with pytest.raises(ValueError, match=r"images of \(9, 9, 1\)"):
        train(make_config(), tmp_path, images=make_data(), held_out=held_out, progress=False)


def test_settings_are_those_of_the_kind():
    with pytest.raises(TypeError, match="label_dropout"):
        make_config(label_dropout=0.1)


def test_the_embedded_network_tells_garments_apart():
    """Drawn by hand: trousers and a bag, as Fashion-MNIST shows them."""
    network = ts.load("fashion-features")
    assert "fashion-features" in resolve.embedded_names()
    assert network.card.image_shape == (28, 28, 1)
    trousers = np.zeros((28, 28, 1), np.uint8)
    trousers[1:8, 9:19] = 180
    trousers[8:27, 9:13] = trousers[8:27, 15:19] = 180
    bag = np.zeros((28, 28, 1), np.uint8)
    bag[11:26, 3:25] = 160
    bag[4:6, 9:19] = bag[4:11, 9:11] = bag[4:11, 17:19] = 160
    features = extract(network, np.stack([trousers, bag]))
    names = [network.card.class_names[k] for k in features.logits.argmax(1)]
    assert names == ["Trouser", "Bag"]
    size = sum(
        f.stat().st_size for f in resolve.resolve("fashion-features").rglob("*") if f.is_file()
    )
    assert size < 1.5e6
