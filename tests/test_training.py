"""Training: losses by value, data, and runs that resume to the bit."""

import csv
import dataclasses
import functools
import io
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from filelock import FileLock
from helpers import tiny_card
from hypothesis import given, strategies as st

import tstitch_jax as ts
from tstitch_jax.training import TrainConfig, train
from tstitch_jax.training.data import ArrayImages, NoSplit, batch_indices, normalize, open_images
from tstitch_jax.training.loss import make_loss, variational_bound, weights
from tstitch_jax.training.state import make_optimizer

pytestmark = pytest.mark.usefixtures("standard_promotion")

ROOT = Path(__file__).parents[1]


def make_images(count=64):
    """Ten classes of bright squares, each in its own place."""
    generator = np.random.default_rng(0)
    labels = np.arange(count) % 10
    images = generator.integers(0, 40, (count, 8, 8), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * (label // 4) : 2 * (label // 4) + 3, 2 * (label % 4) : 2 * (label % 4) + 2] += 200
    return images, labels


def make_config(**changes) -> TrainConfig:
    card = tiny_card(
        "square", image_shape=(8, 8, 1), guidance_channels=None, **changes.pop("card", {})
    )
    options = dict(steps=100, batch=16, warmup=5, cooldown=10, save_every=50, ema=0.9, seed=3)
    return TrainConfig(card=card, **{"data": "none.npz", **options, **changes})


def losses(out):
    with open(out / "log.csv", newline="") as stream:
        return [float(row["loss"]) for row in csv.DictReader(stream)]


@pytest.mark.parametrize(
    "card",
    [
        dict(target="v", learned_variance=False, schedule={"name": "cosine"}),
        dict(target="eps", learned_variance=True),
        dict(target="flow", learned_variance=False, schedule={"name": "flow"}),
    ],
    ids=lambda card: card["target"],
)
def test_loss_falls_and_the_network_is_written(tmp_path, card):
    config = make_config(card=card, steps=300, learning_rate=3e-3)
    network = train(config, tmp_path, images=ArrayImages(*make_images()), progress=False)
    values = losses(tmp_path)
    assert len(values) == 6
    assert values[-1] < 0.7 * values[0]
    loaded = ts.load(tmp_path / "network")
    assert loaded.card == network.card
    images = ts.sample(jax.random.key(0), [loaded], labels=[1, 2], steps=10)
    assert np.isfinite(images).all()


def leaves(out):
    return jax.tree.leaves(ts.load(out / "network").params)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a run that nothing stopped, and the previews that it asked for."""
    folder, seen = tmp_path_factory.mktemp("unbroken"), []
    with jax.numpy_dtype_promotion("standard"):
        train(
            make_config(save_every=24),
            folder,
            images=ArrayImages(*make_images()),
            preview=lambda network, path: seen.append((network.card.name, path.name)),
            progress=False,
        )
    return folder, seen


@pytest.fixture
def ended(unbroken, tmp_path):
    """A copy of that folder, to be changed."""
    return shutil.copytree(unbroken[0], tmp_path / "ended")


def test_an_interrupted_run_ends_as_an_unbroken_one(tmp_path, unbroken):
    """Killed with SIGKILL in the middle, then run again: the same parameters to the bit."""
    script = textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        import jax
        jax.config.update("jax_default_matmul_precision", "highest")
        from test_training import make_config, make_images
        from tstitch_jax.training import train
        from tstitch_jax.training.data import ArrayImages

        class Killed(ArrayImages):
            reads = 0
            def read(self, indices):
                if len(indices) > 1:  # a batch, not the check of the data
                    self.reads += 1
                    if self.reads == 57:
                        os.kill(os.getpid(), signal.SIGKILL)
                return super().read(indices)

        images = Killed(*make_images())
        train(make_config(save_every=24), {str(tmp_path / "broken")!r}, images=images,
              progress=False)
    """)
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    kept = {path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()}
    assert kept & {"24", "48"}
    assert not (tmp_path / "broken" / "network").exists()

    config, images = make_config(save_every=24), ArrayImages(*make_images())
    train(config, tmp_path / "broken", images=images, progress=False)
    for found, expected in zip(leaves(tmp_path / "broken"), leaves(unbroken[0]), strict=True):
        np.testing.assert_array_equal(found, expected)
    logs = [(folder / "log.csv").read_text() for folder in (tmp_path / "broken", unbroken[0])]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_saves_first(tmp_path, unbroken, number):
    class Stopping(ArrayImages):
        def read(self, indices):
            if len(indices) > 1:  # a batch, not the check of the data
                self.reads += 1
                if self.reads == 57:
                    signal.raise_signal(number)
            return super().read(indices)

    config = make_config(save_every=40)
    data = Stopping(*make_images())
    data.reads = 0
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "a", images=data, progress=False)
    assert signal.getsignal(number) == before
    assert {"40", "57"} == {p.name for p in (tmp_path / "a" / "checkpoints").iterdir()}
    train(config, tmp_path / "a", images=data, progress=False)
    assert data.reads == config.steps
    for found, expected in zip(leaves(tmp_path / "a"), leaves(unbroken[0]), strict=True):
        np.testing.assert_array_equal(found, expected)
    with open(tmp_path / "a" / "log.csv", newline="") as stream:
        assert [row["step"] for row in csv.DictReader(stream)] == [
            "40", "50", "57", "80", "100"
        ]  # fmt: skip


def test_a_log_that_was_cut_before_its_header_begins_anew(tmp_path, unbroken):
    class Broken(ArrayImages):
        def read(self, indices):
            if len(indices) > 1:
                # What a kill in the first step leaves.
                header.append((tmp_path / "a" / "log.csv").read_text())
                raise OSError("no more")
            return super().read(indices)

    header, config = [], make_config(save_every=24)
    with pytest.raises(OSError, match="no more"):
        train(config, tmp_path / "a", images=Broken(*make_images()), progress=False)
    assert header[0].startswith("step,loss,")
    (tmp_path / "a" / "log.csv").write_text("")
    train(config, tmp_path / "a", images=ArrayImages(*make_images()), progress=False)
    assert (tmp_path / "a" / "log.csv").read_text() == (unbroken[0] / "log.csv").read_text()


def test_a_run_can_be_prolonged_but_not_changed(tmp_path):
    data = ArrayImages(*make_images())
    short = make_config(steps=60, save_every=20, cooldown=0)
    train(short, tmp_path / "a", images=data, progress=False)
    longer = dataclasses.replace(short, steps=100)
    train(longer, tmp_path / "a", images=data, progress=False)
    train(longer, tmp_path / "b", images=data, progress=False)
    for found, expected in zip(leaves(tmp_path / "a"), leaves(tmp_path / "b"), strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="100 steps can become 60 only before the cooldown"):
        train(short, tmp_path / "a", images=data, progress=False)
    other = dataclasses.replace(longer, learning_rate=1.0)
    with pytest.raises(ValueError, match=r"other settings: learning_rate was 0\.001, is 1\.0"):
        train(other, tmp_path / "a", images=data, progress=False)
    assert (tmp_path / "a" / "log.csv").read_text() == (tmp_path / "b" / "log.csv").read_text()
    (tmp_path / "a" / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match=r"settings\.json is missing or damaged"):
        train(longer, tmp_path / "a", images=data, progress=False)


def test_a_run_in_its_cooldown_cannot_be_prolonged(ended):
    longer = make_config(save_every=24, steps=120)
    with pytest.raises(ValueError, match="before the cooldown, which begins after 90"):
        train(longer, ended, images=ArrayImages(*make_images()), progress=False)


def test_a_run_starts_from_another_network(tmp_path, ended):
    data, first = ArrayImages(*make_images()), leaves(ended)
    config = make_config(
        init=str(ended / "network"), steps=20, learning_rate=1e-12, seed=7, save_every=10,
        cooldown=0,
    )  # fmt: skip
    again = train(config, tmp_path / "b", images=data, progress=False)
    for found, expected in zip(jax.tree.leaves(again.params), first, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    # What it started from is not needed to go on.
    shutil.rmtree(ended)
    longer = dataclasses.replace(config, steps=40)
    train(longer, tmp_path / "b", images=data, progress=False)
    with pytest.raises(ValueError, match="no network folder"):
        train(config, tmp_path / "c", images=data, progress=False)
    assert not (tmp_path / "c").exists()


def test_a_run_starts_from_no_other_kind_of_network(tmp_path):
    config = make_config(init="fashion-s")
    with pytest.raises(
        ValueError, match=r"square cannot start from fashion-s, which has config .*; target 'v' for"
    ):
        train(config, tmp_path / "c", images=ArrayImages(*make_images()), progress=False)
    assert not (tmp_path / "c").exists()


def test_settings_from_before_a_setting_existed(ended):
    data, config = ArrayImages(*make_images()), make_config(save_every=24)
    file = ended / "settings.json"
    settings = json.loads(file.read_text())
    assert settings["learning_rate"] == config.learning_rate
    assert settings["card"]["name"] == "square"
    del settings["init"], settings["times"]
    file.write_text(json.dumps(settings))
    train(config, ended, images=data, progress=False)
    settings["init"] = "elsewhere"
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="init was 'elsewhere', is ''"):
        train(config, ended, images=data, progress=False)


@pytest.mark.parametrize("times", [(0.0, 0.6), (0.6, 1.0), (0.25, 0.26)])
def test_only_the_times_asked_for_are_drawn(times):
    schedule = ts.make_schedule("cosine")
    low, high = (share * schedule.num_train_steps for share in times)

    def apply(params, x, t, labels):
        outside = (t < low) | (t >= high)
        return jnp.where(outside[:, None, None, None], jnp.nan, params * x)

    images, labels = jnp.zeros((4096, 1, 1, 1)), jnp.zeros((4096,), jnp.int32)
    options = dict(learned_variance=False, min_snr=None, label_dropout=0.1, null_label=10)
    own = make_loss(apply, schedule, "v", times=times, **options)
    assert np.isfinite(own(1.0, jax.random.key(0), images, labels))
    everywhere = make_loss(apply, schedule, "v", **options)
    assert np.isnan(everywhere(1.0, jax.random.key(0), images, labels))


def test_previews_are_asked_for_at_checkpoints(unbroken):
    """The last one too, whose step is no multiple of ``save_every``."""
    assert unbroken[1] == [("square", f"preview_{n:06d}.png") for n in (24, 48, 72, 96, 100)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=0), "steps must be a whole number, 1 to 4294967295, got 0"),
        (dict(batch=-1), "batch must be a whole number, 1 to 4294967295, got -1"),
        (dict(seed=2**32), "seed must be a whole number, 0 to 4294967295, got 4294967296"),
        (dict(data=Path("x.npz")), "data must be text, such as 'tfds:mnist', got PosixPath"),
        (dict(seed=-1), "seed must be a whole number, 0 to 4294967295, got -1"),
        (dict(label_dropout=5.0), "label_dropout must be a number from 0 to 1, got 5.0"),
        (dict(ema=float("nan")), "ema must be a number from 0 to 1, got nan"),
        (dict(min_snr=-1.0), "min_snr must be a number"),
        (dict(stored_dtype="float61"), "stored_dtype must be float32 or float16"),
        (dict(card=dict(num_classes=7)), "has labels 0 to 9, the network takes 0 to 6"),
        (dict(card=dict(schedule={"name": "flow"})), "an eps network cannot say x0"),
        (dict(card=dict(class_names=("one",))), "1 names for 10 classes"),
        (dict(times=(0.5, 0.5)), r"times must be 0 <= low < high <= 1, got \(0.5, 0.5\)"),
        (dict(times=0.5), "times must be two numbers from 0 to 1, got 0.5"),
        (dict(times=(0, 1e-4)), "are none of the schedule's 1000"),
        (dict(init="fashoin-s"), "unknown network 'fashoin-s'"),
        (dict(steps=10), "warmup 5 and cooldown 10 need at least as many steps, got 10"),
        (
            dict(card=dict(image_shape=(8, 8, 4))),
            r"holds uint8 images of \(8, 8, 1\)",
        ),
        (dict(data="nowhere.npz"), "no data at nowhere.npz; give an .npz file, or tfds:NAME"),
    ],
)
def test_bad_settings(tmp_path, monkeypatch, changes, message):
    # As users call it, without the tests' own checks of types.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    card = changes.pop("card", {})
    config = make_config(**changes)
    config = dataclasses.replace(config, card=dataclasses.replace(config.card, **card))
    images = None if "data" in changes else ArrayImages(*make_images())
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run", images=images, progress=False)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_refused(tmp_path):
    config = make_config(steps=20, save_every=20, warmup=0, cooldown=0)
    data = ArrayImages(*make_images())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").touch()
    with pytest.raises(ValueError, match=r"other holds other things \(notes\) and no settings"):
        train(config, tmp_path / "other", images=data, progress=False)
    (tmp_path / "job").mkdir()
    settings = tmp_path / "job" / "settings.json"
    settings.write_text('{"format": 3, "seed": 1}')
    with pytest.raises(ValueError, match=r"settings.json is not that of a training run"):
        train(config, tmp_path / "job", images=data, progress=False)
    assert settings.read_text() == '{"format": 3, "seed": 1}'
    (tmp_path / "run" / "network").mkdir(parents=True)
    (tmp_path / "run" / "network" / "notes").touch()
    with pytest.raises(ValueError, match="exists and is not a network folder"):
        train(config, tmp_path / "run", images=data, progress=False)
    (tmp_path / "held").mkdir()
    with (
        FileLock(tmp_path / "held" / ".lock"),
        pytest.raises(ValueError, match="another process works on"),
    ):
        train(config, tmp_path / "held", images=data, progress=False)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = make_config(learning_rate=1e30, clip=1e30, steps=50)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train(config, tmp_path, images=ArrayImages(*make_images()), progress=False)
    assert not (tmp_path / "network").exists()


@given(seed=st.integers(0, 99), batch=st.integers(1, 40), size=st.integers(1, 50))
def test_every_epoch_sees_every_image_once(seed, batch, size):
    steps = -(-3 * size // batch)
    order = np.concatenate([batch_indices(seed, i, batch, size) for i in range(steps)])
    for epoch in range(3):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_normalize():
    pixels = np.array([0, 127, 128, 255], np.uint8)
    np.testing.assert_allclose(normalize(pixels), [-1, -1 / 255, 1 / 255, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            dict(x_train=np.zeros((3, 8, 8), np.uint8)),
            "needs the arrays x_train and y_train; it has x_train$",
        ),
        (dict(x_train=np.zeros((3, 8, 8)), y_train=np.arange(3)), "must be uint8 .* got float64"),
        (dict(x_train=np.zeros((3, 8, 8), np.uint8), y_train=np.arange(2)), "3 whole numbers"),
    ],
)
def test_bad_data(tmp_path, arrays, message):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_images(str(tmp_path / "data.npz"))


@pytest.mark.parametrize("content", [b"nonsense", b"", b"PK\x03\x04 cut"])
def test_a_file_that_is_no_archive(tmp_path, content):
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*data\.npz as \.npz"):
        open_images(str(tmp_path / "data.npz"))


def test_tensorflow_datasets(tmp_path, monkeypatch):
    """A data set prepared on disk is read by ``tfds.data_source``, and TensorFlow stays out."""
    import tensorflow_datasets as tfds
    from PIL import Image

    images, labels = make_images(30)

    class TinySquares(tfds.core.GeneratorBasedBuilder):
        """Bright squares."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(30):
                png = io.BytesIO()
                Image.fromarray(images[i]).save(png, "PNG")
                png.seek(0)
                yield i, {"image": png, "label": int(labels[i])}

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    TinySquares(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    data_source = tfds.data_source
    source = data_source("tiny_squares", split="train", data_dir=tmp_path)
    monkeypatch.setattr(tfds, "data_source", lambda name, split: {"tiny_squares": source}[name])
    opened = open_images("tfds:tiny_squares")
    assert len(opened) == 30
    found, found_labels = opened.read(list(range(30)))
    assert found.dtype == np.uint8
    key = [image.tobytes() for image in images]
    order = [key.index(image.tobytes()) for image in found[..., 0]]
    assert sorted(order) == list(range(30))
    np.testing.assert_array_equal(found_labels, labels[order])
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match="cannot open tfds:nothing"):
        open_images("tfds:nothing")
    monkeypatch.setattr(tfds, "data_source", functools.partial(data_source, data_dir=tmp_path))
    with pytest.raises(NoSplit, match="cannot open tfds:tiny_squares: Unknown split 'test'"):
        open_images("tfds:tiny_squares", "test")


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_min_snr_weights(name, target):
    """The published forms (Hang et al. 2023, section 3.4)."""
    schedule = ts.make_schedule(name)
    snr = (schedule.alpha / schedule.sigma) ** 2
    kept = np.minimum(snr, 5.0)
    expected = {"x0": kept, "eps": kept / snr, "v": kept / (snr + 1)}[target]
    np.testing.assert_allclose(weights(schedule, target, 5.0), expected, rtol=1e-5)
    np.testing.assert_array_equal(weights(schedule, target, None), 1)


def test_flow_weights_are_finite_and_end_at_zero():
    found = weights(ts.make_schedule("flow"), "flow", 5.0)
    assert np.isfinite(found).all()
    assert found[-1] == 0


def test_loss_is_the_weighted_error():
    """A network that returns zeros pays the weighted square of the target."""
    schedule = ts.make_schedule("cosine")
    options = dict(learned_variance=False, label_dropout=0.0, null_label=10)
    images = jnp.full((4000, 1, 1, 1), 0.5)
    labels = jnp.zeros(4000, jnp.int32)
    for min_snr, expected in ((None, 1.0), (5.0, weights(schedule, "eps", 5.0).mean())):
        loss = make_loss(
            lambda p, x, t, y: jnp.zeros_like(x), schedule, "eps", min_snr=min_snr, **options
        )
        assert loss(None, jax.random.key(0), images, labels) == pytest.approx(expected, rel=0.1)


def test_labels_are_dropped_as_often_as_said():
    seen = []

    def apply(params, x, time, labels):
        seen.append(labels)
        return x

    options = dict(learned_variance=False, min_snr=None, null_label=10, label_dropout=0.25)
    loss = make_loss(apply, ts.make_schedule("linear"), "eps", **options)
    loss(None, jax.random.key(0), jnp.zeros((4000, 1, 1, 1)), jnp.full(4000, 3))
    share = float((seen[0] == 10).mean())
    assert abs(share - 0.25) < 0.03
    assert set(np.unique(seen[0]).tolist()) == {3, 10}


def test_variational_bound():
    """The divergence of two Gaussians, and the likelihood of a pixel, from their definitions."""
    schedule = ts.make_schedule("linear")
    one = jnp.ones((1, 1, 1, 1))

    def bound(t, x0, x, predicted, variance):
        before = (1.0, 0.0) if t == 0 else (schedule.alpha[t - 1], schedule.sigma[t - 1])
        at = (schedule.alpha[t], schedule.sigma[t])
        values = (x0, x, predicted, variance, *at, *before)
        args = [jnp.float32(v) * one for v in values]
        return float(variational_bound(*args, log_variance_floor=-9.21)[0])

    t, x0, x, predicted = 400, 0.3, 0.9, 0.1
    alpha_bar, before = schedule.alpha[t] ** 2, schedule.alpha[t - 1] ** 2
    beta = 1 - alpha_bar / before
    posterior = beta * (1 - before) / (1 - alpha_bar)

    def mean(value):
        return (
            np.sqrt(before) * beta * value + np.sqrt(1 - beta) * (1 - before) * x
        ) / (1 - alpha_bar)  # fmt: skip

    for share in (0.0, 0.4, 1.0):
        var = np.exp(share * np.log(beta) + (1 - share) * np.log(posterior))
        expected = 0.5 * (
            np.log(var / posterior) + (posterior + (mean(x0) - mean(predicted)) ** 2) / var - 1
        )
        assert bound(t, x0, x, predicted, share) == pytest.approx(expected / np.log(2), rel=2e-3)
    # A sure and right guess of a pixel costs next to nothing; a wrong one a lot.
    assert 0 <= bound(0, 0.0, 0.0, 0.0, 0.0) < 2
    assert bound(0, 0.5, 0.5, -0.5, 0.0) > 20


def test_the_bound_trains_the_variance_alone():
    schedule = ts.make_schedule("linear")
    options = dict(learned_variance=True, min_snr=None, null_label=10, label_dropout=0.0)
    x0, labels = jnp.full((8, 2, 2, 1), 0.5), jnp.zeros(8, jnp.int32)

    def output(p, x):
        return jnp.concatenate([p["mean"] * x, p["variance"] * jnp.ones_like(x)], axis=-1)

    def gradient(learned):
        apply = (lambda p, x, t, y: output(p, x)) if learned else (
            lambda p, x, t, y: output(p, x)[..., :1]
        )  # fmt: skip
        loss = make_loss(apply, schedule, "eps", **{**options, "learned_variance": learned})
        params = {"mean": jnp.float32(0.5), "variance": jnp.float32(0.1)}
        return jax.grad(loss)(params, jax.random.key(0), x0, labels)

    with_bound, without = gradient(True), gradient(False)
    np.testing.assert_allclose(with_bound["mean"], without["mean"], rtol=1e-5)
    assert with_bound["variance"] != 0
    assert without["variance"] == 0


def test_learning_rate():
    """Up, flat, down to zero, seen through the size of a step on a constant gradient."""
    optimizer = make_optimizer(0.1, steps=20, warmup=4, cooldown=5, weight_decay=0.0, clip=1.0)
    params = jnp.zeros(1)
    state, sizes = optimizer.init(params), []
    for _ in range(21):
        update, state = optimizer.update(jnp.ones(1), state, params)
        sizes.append(float(-update[0]))
    np.testing.assert_allclose(sizes[:5], [0, 0.025, 0.05, 0.075, 0.1], rtol=1e-3)
    np.testing.assert_allclose(sizes[4:16], 0.1, rtol=1e-3)
    np.testing.assert_allclose(sizes[15:], [0.1, 0.08, 0.06, 0.04, 0.02, 0], atol=1e-4)
