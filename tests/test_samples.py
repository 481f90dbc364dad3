"""``Sampler`` and ``Samples``: checks, sharing, and how they show themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import closed_network, tiny_network
from PIL import Image

import tstitch_jax as ts
from tstitch_jax.hub import resolve
from tstitch_jax.sampling import program

KEY = jax.random.key(0)
ONE, NULL = np.array([1]), np.array([10])
NAMES = tuple(f"class {k}" for k in range(10))

pytestmark = pytest.mark.usefixtures("standard_promotion")


def images_of(mean=0.7, **changes):
    card = dict(image_shape=(8, 8, 1), guidance_channels=None, class_names=NAMES)
    return closed_network(mean, **card | changes)


@pytest.fixture
def sampler():
    pair = [images_of(), images_of(0.4, name="other")]
    return ts.Sampler(pair, plan=[0.5, 0.5], steps=6, guidance=2.0)


@pytest.fixture
def unloadable(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(resolve, "load", refuse)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(solver="dim"), "unknown solver 'dim'; did you mean 'ddim'"),
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(spacing="karas"), "unknown spacing 'karas'; did you mean 'karras'"),
        (dict(plan=[0.5, 0.6]), "fractions must sum to 1"),
        (dict(plan="half"), "plan must be a ts.Plan or fractions, got 'half'"),
        (dict(plan=ts.Plan.from_counts([3, 3])), "the plan has 6 steps, the sampler 10"),
        (dict(guidance="much"), "the guidance scale must be a number or None, got 'much'"),
        (dict(guidance=[1.5]), "got 1 entries"),
        (dict(guidance=ts.Guidance(2.0, rescale=2)), "rescale of guidance must be between 0 and 1"),
        (dict(guidance=ts.Guidance(2.0, interval=(5, "a"))), "must be two noise levels"),
        (dict(dtype="float8"), "dtype must be float32 or bfloat16, got 'float8'"),
        (dict(solver="lcm"), "needs consistency networks, and the card of fashion-s"),
    ],
)
def test_options_are_checked_without_loading_weights(options, message, unloadable):
    with pytest.raises(ValueError, match=message):
        ts.Sampler(["fashion-s", "fashion-xl"], **dict(plan=[0.4, 0.6], steps=10) | options)


def test_names_load_at_the_first_call(monkeypatch):
    loaded = []
    load = resolve.load
    monkeypatch.setattr(resolve, "load", lambda n, *a, **k: loaded.append(n) or load(n, *a, **k))
    sampler = ts.Sampler(["fashion-s", "fashion-xl"], plan=[0.4, 0.6], steps=4)
    assert repr(sampler) == "Sampler(fashion-s x 2, fashion-xl x 2; ddim, 4 steps)"
    assert loaded == []
    samples = sampler(KEY, labels=["Bag", "ankle boot", 2])
    assert loaded == ["fashion-s", "fashion-xl"]
    assert samples.images.shape == (3, 28, 28, 1)
    assert samples.names == ("Bag", "ankle boot", "Pullover")
    # Another plan, guidance scale or solver shares what is loaded.
    other = sampler.replace(plan=[0.8, 0.2], guidance=3.0)
    np.testing.assert_array_equal(sampler(KEY, labels=[8, 9, 2]).images, samples.images)
    assert np.abs(other(KEY, labels=[8, 9, 2]).images - samples.images).max() > 0.01
    assert loaded == ["fashion-s", "fashion-xl"]


def test_reloaded_networks_compile_nothing(tmp_path):
    for seed, name in enumerate(("a", "b")):
        ts.save(tmp_path / name, tiny_network(seed, name=name))
    folders = [tmp_path / "a", tmp_path / "b"]
    traces = []
    program_of = program.sample_program

    def counted(inputs, config):
        traces.append(1)
        return program_of(inputs, config)

    run = jax.jit(counted, static_argnames="config")
    results = []
    for changes in (dict(), dict(), dict(guidance=4), dict(plan=[0.25, 0.75])):
        options = dict(plan=[0.5, 0.5], steps=4, guidance=2.5) | changes
        request = ts.Sampler(folders, **options).request(KEY, labels=[1, 2], decode=False)
        results.append(run(request.inputs, config=request.config)[0])
    assert len(traces) == 1
    np.testing.assert_array_equal(results[0], results[1])
    assert np.abs(results[0] - results[2]).max() > 1e-3


def test_an_image_is_known_by_its_index(sampler):
    batch = sampler(KEY, labels=[0, 1, 2, 3])
    one = sampler(KEY, labels=[2], indices=[2])
    np.testing.assert_allclose(one.images[0], batch.images[2], atol=1e-5)
    with pytest.raises(ValueError, match="one for each of the 2 images"):
        sampler(KEY, labels=[0, 1], indices=[5])


def test_what_is_kept(sampler):
    plain = sampler(KEY, labels=[0, 1])
    assert plain.trajectory is plain.predictions is plain.latents is None
    samples = sampler(KEY, labels=[0, 1], keep=("predictions", "trajectory"))
    assert samples.trajectory.shape == samples.predictions.shape == (6, 2, 8, 8, 1)
    np.testing.assert_array_equal(samples.images, jnp.clip(samples.trajectory[-1], -1, 1))
    assert repr(samples).startswith("Samples(images [2, 8, 8, 1], trajectory [6, 2, 8, 8, 1]")
    with pytest.raises(ValueError, match="keep must be some of trajectory, predictions"):
        sampler(KEY, labels=[0], keep=["x"])


def test_a_condition_is_made_once_and_given_again(sampler):
    cond = sampler.condition(labels=["class 3", 1])
    np.testing.assert_array_equal(
        sampler(KEY, cond=cond).images, sampler(KEY, labels=[3, 1]).images
    )


@pytest.mark.parametrize("count", [1, 3, 11])
def test_pictures(sampler, count, tmp_path):
    samples = sampler(KEY, labels=np.arange(count) % 10)
    pictures = samples.pil()
    assert [picture.size for picture in pictures] == [(8, 8)] * count
    pixels = np.rint((np.asarray(samples.images[0, ..., 0]) + 1) * 127.5)
    np.testing.assert_array_equal(np.asarray(pictures[0]), pixels)
    samples.save(tmp_path / "samples.png")
    samples.save(tmp_path / "samples.png")  # replaced
    with Image.open(tmp_path / "samples.png") as image:
        assert image.size[0] >= 8 * min(count, 8)
    assert samples._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"the picture must end in \.png"):
        samples.save(tmp_path / "samples.jpg")


def test_pictures_that_cannot_be(sampler):
    samples = sampler(KEY, labels=[0, 1], decode=False)
    with pytest.raises(ValueError, match="the samples were not decoded"):
        samples.pil()
    images = sampler(KEY, labels=[0, 1]).images.at[1, 0, 0].set(np.nan)
    broken = dataclasses.replace(sampler(KEY, labels=[0, 1]), images=images)
    with pytest.raises(ValueError, match=r"images \[1\] are not finite"):
        broken.pil()


def test_plans(sampler):
    assert sampler.plan.counts() == (3, 3)
    again = sampler.replace(plan=ts.Plan.from_counts([1, 5]))
    assert again.settings()["plan"] == "tiny x 1, other x 5"
    single = ts.Sampler(images_of(), steps=3)
    assert single.plan.counts() == (3,)
    unplanned = ts.Sampler([images_of(), images_of(0.4)], steps=6)
    assert unplanned.plan is None
    with pytest.raises(ValueError, match="give a plan or fractions for the 2 networks"):
        unplanned(KEY, labels=[0])


def test_samplers_that_replace_share_what_loads_later():
    first = ts.Sampler("fashion-s", steps=2)
    second = first.replace(steps=3)
    assert second.networks[0] is first.networks[0]


@pytest.mark.parametrize(
    ("cond", "more", "message"),
    [
        (ts.Condition(ONE, NULL), {}, "halves that are tuples of 2 entries"),
        (ts.Condition((ONE, ONE)), {}, "guidance needs the null half"),
        (ts.Condition((np.array([1, 2]), ONE), (NULL, NULL)), {}, "one leading batch axis"),
        (ts.Condition((ONE, ONE), (NULL, NULL)), dict(labels=[1]), "is complete; leave out"),
    ],
)
def test_conditions_that_do_not_fit(sampler, cond, more, message):
    with pytest.raises(ValueError, match=message):
        sampler(KEY, cond=cond, **more)


def test_networks_whose_classes_have_other_names():
    pair = [images_of(), images_of(0.4, name="other", class_names=NAMES[::-1])]
    sampler = ts.Sampler(pair, plan=[0.5, 0.5], steps=2)
    with pytest.raises(ValueError, match="have different names; give class names"):
        sampler(KEY, labels=[1])
    given = sampler.condition(labels=["class 1"]).given
    assert [int(each[0]) for each in given] == [1, 8]


def test_keys_whose_numbers_depend_on_the_batch_are_refused(sampler):
    with pytest.raises(ValueError, match="key must be of the kind threefry2x32, got rbg"):
        sampler(jax.random.key(0, impl="rbg"), labels=[0])


def test_other_weights_have_no_checksum():
    network = tiny_network()
    changed = network.with_params(jax.tree.map(lambda v: 2 * v, network.params))
    assert network.card.checksum
    assert not changed.card.checksum
