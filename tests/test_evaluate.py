"""Samples against a reference: sources, the pass over them, results, and the command."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from PIL import Image

import tstitch_jax as ts
from tstitch_jax import cli
from tstitch_jax.evaluation import Evaluation, evaluate, frechet_distance, open_source
from tstitch_jax.evaluation.features import Extractor
from tstitch_jax.evaluation.sources import from_array
from tstitch_jax.models.cards import FeatureCard
from tstitch_jax.models.types import FeatureModel, FeatureNetwork, Features

SIDE, CLASSES = 6, 3


class Directions:
    """A stand-in for a module: random directions of the pixels, with a spatial part."""

    def apply(self, variables, pixels, method):
        params = variables["params"]
        if pixels.size != len(pixels) * len(params["pool"]):
            raise ValueError(f"takes {len(params['pool'])} numbers an image, got {pixels.shape}")
        x = pixels / 128 - 1
        pool = jnp.tanh(x.reshape(len(x), -1) @ params["pool"])
        return Features(pool, pool @ params["logits"], x[:, ::2, ::2, 0].reshape(len(x), -1))


class NotFinite(Directions):
    def apply(self, variables, pixels, method):
        features = super().apply(variables, pixels, method)
        return features._replace(pool=jnp.full_like(features.pool, jnp.nan))


@pytest.fixture(scope="module")
def network():
    rng = np.random.default_rng(0)
    params = {
        "pool": rng.standard_normal((SIDE * SIDE * 3, 12)) / 8,
        "logits": rng.standard_normal((12, CLASSES)),
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    card = FeatureCard(
        name="inception", architecture="classifier", config={}, image_shape=(SIDE, SIDE, 3),
        num_classes=CLASSES, class_names=("a", "b", "c"), checksum="c" * 64,
    )  # fmt: skip
    return FeatureNetwork(FeatureModel(params, Directions()), card)


def images(num, seed=0, shape=(SIDE, SIDE, 3), low=0):
    return np.random.default_rng(seed).integers(low, 256, (num, *shape)).astype(np.uint8)


def direct(network, pixels):
    return jax.tree.map(np.asarray, network.model(jnp.asarray(pixels)))


@pytest.fixture(scope="module")
def sets():
    return images(90), images(70, seed=1, low=40)


@pytest.fixture(scope="module")
def measured(network, sets):
    return evaluate(*sets, features=network, progress=False)


def test_values_are_those_of_the_definitions(network, sets, measured):
    ours, theirs = (direct(network, each) for each in sets)
    for key, name in (("fid", "pool"), ("sfid", "spatial")):
        a, b = (np.asarray(getattr(each, name), np.float64) for each in (ours, theirs))
        expected = frechet_distance(
            a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)
        ).distance
        assert measured.metrics[key] == pytest.approx(expected, rel=1e-5)
    p = np.asarray(jax.nn.softmax(ours.logits), np.float64)
    kl = (p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()
    assert measured.metrics["is"] == pytest.approx(np.exp(kl), rel=1e-5)

    def radii(x):
        distances = np.linalg.norm(x[:, None] - x[None], axis=-1)
        return np.sort(distances, axis=1)[:, 3]

    a, b = (np.asarray(each.pool, np.float64) for each in (ours, theirs))
    between = np.linalg.norm(a[:, None] - b[None], axis=-1)
    assert measured.metrics["precision"] == (between <= radii(b)).any(1).mean()
    assert measured.metrics["recall"] == (between <= radii(a)[:, None]).any(0).mean()


def test_everything_that_can_be_had_is_measured(measured, network):
    assert list(measured.metrics) == ["fid", "sfid", "kid", "is", "precision", "recall"]
    assert measured.samples["num"] == 90
    assert measured.reference["num"] == 70
    assert measured.features["checksum"] == network.card.checksum
    assert any("FID of 90 images" in note for note in measured.notes)


def test_a_set_against_itself(network, sets):
    found = evaluate(sets[0], sets[0], features=network, progress=False)
    assert found.metrics["fid"] == found.metrics["sfid"] == 0
    assert found.metrics["precision"] == found.metrics["recall"] == 1
    assert "samples and reference are the same images" in found.notes


@pytest.mark.parametrize("devices", [None, 1, 2, 8])
@pytest.mark.parametrize("batch", [1, 50, 96])
def test_features_do_not_depend_on_batches_and_devices(network, sets, devices, batch):
    placed = network
    if devices is not None:
        placed = ts.shard(network, ts.make_mesh(devices=jax.devices()[:devices]))
    found = Extractor(placed, batch)(sets[0])
    expected = Extractor(network)(sets[0])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_values_do_not_depend_on_blocks(network, sets, measured, monkeypatch):
    # Of whole units, as blocks always are: a row's last bit may depend on its place in a product.
    monkeypatch.setattr("tstitch_jax.evaluation.features.BLOCK", 32)
    found = evaluate(*sets, features=network, batch=3, progress=False)
    assert found.metrics == measured.metrics


def test_padding_is_cut_off(network, sets):
    few = Extractor(network)(sets[0][:5])
    assert len(few.pool) == 5
    np.testing.assert_array_equal(few.pool, Extractor(network)(sets[0]).pool[:5])


def test_statistics_take_the_place_of_images(network, sets, measured, tmp_path):
    path = tmp_path / "deep" / "reference.npz"
    evaluate(sets[1], features=network, statistics=path, metrics=[], progress=False)
    with np.load(path) as stored:
        assert set(stored.files) == {
            "mu", "sigma", "mu_s", "sigma_s", "num", "features", "dtype",
        }  # fmt: skip
        assert stored["sigma"].dtype == np.float64
        np.testing.assert_allclose(
            stored["mu"], direct(network, sets[1]).pool.astype(np.float64).mean(0), rtol=1e-5
        )
    found = evaluate(sets[0], path, features=network, progress=False)
    for key in ("fid", "sfid", "is"):
        assert found.metrics[key] == measured.metrics[key]
    assert set(found.metrics) == {"fid", "sfid", "is"}
    assert found.reference["num"] == 70
    with pytest.raises(ValueError, match=r"precision cannot be measured: .* no images \(arr_0\)"):
        evaluate(sets[0], path, features=network, metrics=["precision"])


def test_published_reference_files(network, sets, measured, tmp_path):
    """Statistics of a whole set beside some of its images: the distance goes by the former."""
    theirs = direct(network, sets[1]).pool.astype(np.float64)
    path = tmp_path / "reference.npz"
    np.savez(path, arr_0=sets[1], mu=theirs.mean(0) + 1, sigma=np.cov(theirs, rowvar=False))
    found = evaluate(sets[0], path, features=network, progress=False)
    assert found.metrics["fid"] > measured.metrics["fid"] + 5
    assert found.metrics["precision"] == measured.metrics["precision"]
    assert found.metrics["sfid"] == measured.metrics["sfid"]  # which it has no statistics of
    found = evaluate(sets[0], path, features=network, metrics=["fid"], progress=False)
    assert not any("statistics only" in note for note in found.notes)
    np.savez(path, mu=theirs.mean(0), sigma=np.cov(theirs, rowvar=False))
    found = evaluate(sets[0], path, features=network, metrics=["fid"], progress=False)
    assert any("statistics only" in note for note in found.notes)


def test_statistics_of_other_features_are_refused(network, sets, tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ValueError, match="is of 5 features, those of inception are 12"):
        evaluate(sets[0], tmp_path / "a.npz", features=network)
    np.savez(tmp_path / "b.npz", mu=np.zeros(12), sigma=np.eye(12), num=9, features="d" * 64)
    with pytest.raises(ValueError, match="another feature network"):
        evaluate(sets[0], tmp_path / "b.npz", features=network)


def test_accuracy_and_the_names_of_other_features(network, sets):
    labels = direct(network, sets[0]).logits.argmax(-1)
    labels[:9] = (labels[:9] + 1) % CLASSES
    own = dataclasses.replace(network, card=dataclasses.replace(network.card, name="mine"))
    samples = from_array("samples", sets[0], labels)
    found = evaluate(samples, sets[1], features=own, progress=False)
    assert found.metrics["accuracy_mine"] == 0.9
    assert "fid" not in found.metrics
    assert found.metrics["fd_mine"] > 0
    assert not any("FID" in note for note in found.notes)


def test_the_distance_of_unlimited_images(network):
    """Two sets of one distribution: the bias of few is seen, and taken away."""
    ours, theirs = images(2000), images(20_000, seed=1)
    found = evaluate(
        ours, theirs, features=network, metrics=["fid", "fid_infinity"], progress=False
    )
    assert found.metrics["fid"] > 0
    assert abs(found.metrics["fid_infinity"]) < 0.5 * found.metrics["fid"]
    assert found.errors["fid_infinity"] > 0


def test_json_tells_two_results_apart(measured, tmp_path):
    measured.save(tmp_path / "a.json")
    stored = json.loads((tmp_path / "a.json").read_text())
    assert Evaluation(**stored).metrics == measured.metrics
    assert len(stored["samples"]["sha256"]) == 64
    assert stored["samples"]["sha256"] != stored["reference"]["sha256"]


def test_first_samples_only(network, sets):
    found = evaluate(*sets, features=network, num=40, progress=False)
    expected = evaluate(sets[0][:40], sets[1], features=network, progress=False)
    assert found.metrics == expected.metrics
    assert found.samples["num"] == 40


def test_a_killed_job_goes_on(network, sets, measured, tmp_path, monkeypatch):
    calls, monkeypatched = [], Extractor.__call__

    def counting(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return monkeypatched(self, pixels)

    monkeypatch.setattr("tstitch_jax.evaluation.features.BLOCK", 32)
    monkeypatch.setattr(Extractor, "__call__", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*sets, features=network, cache=tmp_path, progress=False)
    kept = list(tmp_path.iterdir())
    assert len(kept) == 2
    kept[0].write_bytes(kept[0].read_bytes()[:100])  # one of them is damaged
    found = evaluate(*sets, features=network, cache=tmp_path, progress=False)
    assert sum(calls[3:]) == 90 + 70 - 32
    assert found.metrics == measured.metrics
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------ sources


def write_folder(path, pixels):
    path.mkdir()
    for i, each in enumerate(pixels):
        Image.fromarray(each.squeeze()).save(path / f"{i:03d}.png")


def read_all(source, size=4):
    return np.concatenate(list(source.read(size)))


def test_an_archive_is_read_piece_by_piece(tmp_path):
    pixels, labels = images(11), np.arange(11)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", arr_0=pixels, arr_1=labels)
        source = open_source(tmp_path / "a.npz")
        assert [len(batch) for batch in source.read(4)] == [4, 4, 3]
        np.testing.assert_array_equal(read_all(source), pixels)
        np.testing.assert_array_equal(source.labels, labels)


def test_a_named_array_with_its_labels(tmp_path):
    grey = images(5, shape=(SIDE, SIDE))
    np.savez(tmp_path / "a.npz", x_test=grey, y_test=np.arange(5), x_train=grey)
    source = open_source(f"{tmp_path}/a.npz:x_test")
    assert source.shape == (SIDE, SIDE, 1)
    np.testing.assert_array_equal(read_all(source)[..., 0], grey)
    np.testing.assert_array_equal(source.labels, np.arange(5))
    with pytest.raises(ValueError, match=r"no array arr_0 .*; name one: .*a\.npz:x_t"):
        open_source(tmp_path / "a.npz")


@pytest.mark.parametrize("grey", [True, False])
def test_a_folder_of_images(tmp_path, grey):
    pixels = images(7, shape=(SIDE, SIDE, 1) if grey else (SIDE, SIDE, 3))
    write_folder(tmp_path / "a", pixels)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    source = open_source(tmp_path / "a")
    assert (source.count, source.shape) == (7, pixels.shape[1:])
    np.testing.assert_array_equal(read_all(source), pixels)


def test_broken_images_are_named_or_skipped(tmp_path, network):
    write_folder(tmp_path / "a", images(9))
    whole = (tmp_path / "a" / "004.png").read_bytes()
    for damage in (whole[:-20], b"no image", whole[:60] + b"\0\0\0" + whole[63:]):
        (tmp_path / "a" / "004.png").write_bytes(damage)
        with pytest.raises(ValueError, match=r"004\.png is broken: .*--skip-broken"):
            read_all(open_source(tmp_path / "a"))
        source = open_source(tmp_path / "a", skip_broken=True)
        for _ in range(2):  # they are counted once, however often the folder is read
            assert len(read_all(source)) == 8
            assert [os.path.basename(name) for name in source.skipped] == ["004.png"]
    found = evaluate(tmp_path / "a", images(9), features=network, skip_broken=True, progress=False)
    assert found.samples["num"] == 8
    assert any("1 broken" in note for note in found.notes)


def test_tensorflow_datasets(monkeypatch):
    class Data:
        def __len__(self):
            return 5

        def __getitem__(self, i):
            return {"image": images(5)[i], "label": i}

        def __getitems__(self, indices):
            return [self[i] for i in indices]

    import tensorflow_datasets as tfds

    asked = []
    monkeypatch.setattr(tfds, "data_source", lambda name, split: asked.append(split) or Data())
    np.testing.assert_array_equal(read_all(open_source("tfds:mine:test")), images(5))
    open_source("tfds:mine")
    assert asked == ["test", "train"]


def npz(**arrays):
    return lambda path: np.savez(path / "a.npz", **arrays)


def folder(*pixels):
    def write(path):
        (path / "a.npz").mkdir()
        for i, each in enumerate(pixels):
            Image.fromarray(each).save(path / "a.npz" / f"{i}.png")

    return write


GOOD = images(8)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "nothing at .*; give an .npz file, a folder"),
        (lambda path: (path / "a.npz").mkdir(), "has no images"),
        (lambda path: (path / "a.npz").write_bytes(b"x"), "cannot read .* as .npz"),
        (npz(arr_0=GOOD.astype(np.float32)), "must be uint8 with values from 0 to 255, got float"),
        (npz(arr_0=GOOD[..., :2]), r"must be images .*, got \[8, 6, 6, 2\]"),
        (npz(arr_0=GOOD[:0]), r"got \[0, 6, 6, 3\]"),
        (npz(arr_0=GOOD[0, 0]), r"got \[6, 3\]"),
        (npz(other=GOOD), "no array arr_0 of images, nor mu and sigma; it has other"),
        (npz(mu=np.zeros(3)), "no array arr_0|only one of mu and sigma"),
        (npz(mu=np.zeros(3), sigma=np.eye(4)), r"must be \[D\] and \[D, D\], got \[3\]"),
        (npz(mu=np.full(3, np.nan), sigma=np.eye(3)), "NaN or infinite"),
        (npz(mu=np.zeros(3), sigma=np.triu(np.ones((3, 3)))), "sigma is no covariance"),
        (npz(mu=np.zeros(3), sigma=-np.eye(3)), "sigma is no covariance"),
        (npz(mu=np.zeros(3, complex), sigma=np.eye(3)), "mu must be real numbers, got complex"),
        (npz(mu=np.zeros(3), sigma=np.eye(3), features=np.array(3)), "features must be what"),
        (npz(mu=np.zeros(3), sigma=np.eye(3), num=np.array("many")), "num must be what"),
        (npz(arr_0=GOOD, arr_1=np.arange(5)), r"arr_1 of .* must be 8 whole numbers, .* \[5\]"),
        (
            lambda path: np.save(path / "a", GOOD) or (path / "a.npy").rename(path / "a.npz"),
            "cannot",
        ),
        (npz(arr_0=np.array([{}], object)), r"must be images .*, got \[1\]"),
        (folder(GOOD[0], images(1, shape=(7, 6, 3))[0]), "differ in size: .* is 6x6, .* is 6x7"),
        (folder(np.dstack([GOOD[0], GOOD[0, ..., :1]])), "pixels of mode RGBA"),
        (folder(GOOD[0, ..., 0].astype(np.uint16)), "pixels of mode I"),
    ],
)
def test_bad_sets_are_refused(tmp_path, write, message):
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_all(open_source(tmp_path / "a.npz"))


def test_a_cut_archive_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=GOOD)
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    raw[300] ^= 255  # a pixel, which the archive's checksum covers
    (tmp_path / "a.npz").write_bytes(raw)
    with pytest.raises(ValueError, match="cannot read arr_0"):
        read_all(open_source(tmp_path / "a.npz"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(metrics=["fud"]), "unknown measure 'fud'; choose from fid"),
        (dict(metrics=5), "metrics must be a list of measures, got 5"),
        (dict(prompts=5), "prompts must be one for each of the 90 images .* got 5"),
        (dict(samples=5), "images must be a path, tfds:NAME or a NumPy array, got 5"),
        (dict(features="inception"), "features must be a feature network .* got 'inception'"),
        (dict(metrics=["accuracy"]), r"has no labels \(arr_1\)"),
        (dict(reference=None, metrics=["fid"]), "there is no REFERENCE"),
        (dict(num=0), "num must be a whole number of at least 1"),
        (dict(num=99), "has 90 images, fewer than the 99 wanted"),
        (dict(batch=0), "batch must be"),
        (
            dict(samples=images(3), metrics=["precision"]),
            "precision cannot be measured: it needs at least 4 images, there are 3 in the array",
        ),
        (dict(reference=images(1), metrics=["fid"]), "it needs at least 2 images"),
        (dict(samples=images(1), statistics="a.npz"), "statistics need at least 2 images"),
        (dict(statistics="a.json"), "the file of statistics must end in .npz"),
        (dict(metrics=[]), "nothing to measure"),
        (dict(samples=images(9) // 200), "samples has no value above 1 in its first 9 images"),
        (dict(reference=images(9) // 200), "reference has no value above 1"),
        (dict(samples=images(9, shape=(5, 5, 3))), "inception does not take the array of samples"),
        (dict(picture="a.jpg"), "must end in .png"),
        (dict(picture="a.png", reference=None), "needs a REFERENCE with images"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_read(
    network, sets, monkeypatch, changes, message
):
    monkeypatch.setattr(Extractor, "__call__", lambda *_: pytest.fail("it has begun"))
    # As users call it, without the tests' own checks of types.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    arguments = dict(samples=sets[0], reference=sets[1], features=network) | changes
    with pytest.raises(ValueError, match=message):
        evaluate(arguments.pop("samples"), arguments.pop("reference"), **arguments)


def test_few_images_leave_out_what_needs_more(network, sets):
    found = evaluate(images(3), sets[1], features=network, progress=False)
    assert list(found.metrics) == ["fid", "sfid", "kid", "is"]


def test_a_reference_is_gone_through_once(network, sets, monkeypatch):
    calls, called = [], Extractor.__call__

    def counting(self, pixels):
        calls.append(len(pixels))
        return called(self, pixels)

    monkeypatch.setattr(Extractor, "__call__", counting)
    reference = from_array("reference", sets[1])
    first, second = (
        evaluate(sets[0], reference, features=network, progress=False) for _ in range(2)
    )
    assert calls == [90, 70, 90]
    assert first.metrics == second.metrics


def test_sorted_samples_are_told_of(network, sets):
    for labels, told in (
        (np.arange(90) // 30, True), (np.arange(90), False), (np.zeros(90, int), False),
        (np.arange(90) % 30, False), (None, False),
    ):  # fmt: skip
        each = from_array("samples", sets[0], labels)
        found = evaluate(each, features=network, metrics=["is"], progress=False)
        assert any("sorted by class" in note for note in found.notes) == told


def test_an_array_is_not_measured_by_the_statistics_beside_it(network, sets, tmp_path):
    theirs = direct(network, sets[1]).pool.astype(np.float64)
    path = tmp_path / "two.npz"
    np.savez(
        path, arr_0=sets[1], arr_2=sets[0], mu=theirs.mean(0), sigma=np.cov(theirs, rowvar=False)
    )
    found = evaluate(sets[0], f"{path}:arr_2", features=network, metrics=["fid"], progress=False)
    assert found.metrics["fid"] == 0


def test_an_output_is_never_an_input(network, sets, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=sets[0])
    before = (tmp_path / "a.npz").read_bytes()
    with pytest.raises(ValueError, match=r"holds .* itself; choose another file"):
        evaluate(tmp_path / "a.npz", features=network, statistics=tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == before


def test_damage_behind_the_first_samples_is_not_seen(network, sets, tmp_path):
    write_folder(tmp_path / "a", images(300))
    broken = tmp_path / "a" / "290.png"
    broken.write_bytes(broken.read_bytes()[:60] + b"\0\0\0" + broken.read_bytes()[63:])
    found = evaluate(tmp_path / "a", sets[1], features=network, num=256, progress=False)
    assert found.samples["num"] == 256
    with pytest.raises(ValueError, match=r"290\.png is broken"):
        evaluate(tmp_path / "a", sets[1], features=network, progress=False)


def test_bytes_behind_the_end_of_a_png(tmp_path):
    write_folder(tmp_path / "a", images(2))
    with (tmp_path / "a" / "000.png").open("ab") as stream:
        stream.write(b"more")
    assert len(read_all(open_source(tmp_path / "a"))) == 2


def test_a_cache_that_cannot_be_written_stops_nothing(network, sets, measured, tmp_path):
    (tmp_path / "file").write_text("")
    found = evaluate(*sets, features=network, cache=tmp_path / "file" / "a", progress=False)
    assert found.metrics == measured.metrics


def test_features_that_are_not_finite_are_refused(sets):
    card = FeatureCard(
        name="x", architecture="classifier", config={}, image_shape=(SIDE, SIDE, 3), num_classes=3
    )
    params = {"pool": jnp.zeros((SIDE * SIDE * 3, 12)), "logits": jnp.zeros((12, 3))}
    network = FeatureNetwork(FeatureModel(params, NotFinite()), card)
    with pytest.raises(ValueError, match="not finite; with bfloat16 try float32"):
        evaluate(*sets, features=network, progress=False)


def test_colour_is_refused_by_a_network_of_grey_images(network, sets):
    card = dataclasses.replace(network.card, image_shape=(SIDE, SIDE, 1))
    params = dict(network.params, pool=network.params["pool"][:36])
    grey = dataclasses.replace(network.with_params(params), card=card)
    with pytest.raises(ValueError, match="is in colour"):
        evaluate(*sets, features=grey, progress=False)
    same = np.repeat(sets[0][..., :1], 3, axis=3)
    three = evaluate(same, same[:50, ..., :1], features=grey, progress=False)
    one = evaluate(same[..., :1], same[:50], features=grey, progress=False)
    assert three.metrics == one.metrics


# ------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated") / "samples"
    ts.generate(folder, ts.Sampler("fashion-s", steps=4), num=20, progress=False)
    return folder


@pytest.fixture
def garments(generated, tmp_path, monkeypatch):
    """A generated folder and a file of real garments, as users have them."""
    monkeypatch.setenv("TSTITCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(generated, "samples")
    np.savez("real.npz", x_test=images(30, shape=(28, 28)), y_test=np.arange(30) % 10)
    return tmp_path


def run(command):
    return cli.main(command.split())


def test_the_command(garments, capsys):
    assert run(
        "evaluate samples real.npz:x_test --features fashion --out deep/r.json --picture p.png"
    ) == 0  # fmt: skip
    shown = capsys.readouterr().out
    for text in ("Frechet distance (fashion-features)", "accuracy on the labels", "20 images",
                 "real.npz:x_test", "written: deep/r.json"):  # fmt: skip
        assert text in shown
    assert "FID" not in shown
    stored = json.loads((garments / "deep" / "r.json").read_text())
    assert stored["samples"]["settings"]["networks"] == ["fashion-s"]
    assert stored["samples"]["settings"]["seed"] == 0
    assert stored["features"]["name"] == "fashion-features"
    assert 0.4 < stored["metrics"]["accuracy_fashion-features"] <= 1
    assert Image.open(garments / "p.png").size[0] > 400
    assert list((garments / "cache" / "features").iterdir()) == []


def test_the_command_makes_and_takes_statistics(garments, capsys):
    evaluate_ = "evaluate samples --features fashion"
    assert run(f"{evaluate_} --save-statistics own.npz --metrics is") == 0
    assert run("evaluate samples own.npz --features fashion") == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("Frechet"))
    assert line.split()[3] == "0"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("evaluate nothing real.npz", "nothing at nothing"),
        ("evaluate samples real.npz:x_test --features fashion-s", "is no feature network"),
        ("evaluate samples real.npz:x_test --features fashon", "unknown network 'fashon'"),
        ("evaluate samples real.npz:x_test --features fashion --metrics fud", "unknown measure"),
        ("evaluate samples --features fashion --metrics fid", "there is no REFERENCE"),
        ("evaluate samples real.npz --features fashion", "name one: real.npz:x_test"),
        ("evaluate samples real.npz:x_test --features fashion --out real.npz/a", "cannot write"),
        ("evaluate samples real.npz:x_test --features fashion --batch 0", "at least 1"),
        ("evaluate samples real.npz:x_test --features fashion --num 21", "fewer than the 21"),
        (
            "sample --networks fashion-features --out a.png",
            "is not a denoiser but classifier",
        ),
    ],
)
def test_bad_input_is_one_line(garments, capsys, command, message):
    try:
        status = run(command)
    except SystemExit as end:  # argparse's own
        status = end.code
    assert status == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_an_unfinished_folder_is_refused(garments, capsys):
    (garments / "samples" / "samples.npz").unlink()
    assert run("evaluate samples real.npz:x_test --features fashion") == 2
    assert "a job of tstitch generate that is not through (run it again)" in capsys.readouterr().err
