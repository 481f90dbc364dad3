"""Networks that are conditioned on contexts and texts, through the high-level API."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from helpers import GOLDEN, Mixture, random_params, relative, tiny_network
from safetensors.numpy import save_file
from unet_recipe import noise, weight

import tstitch_jax as ts
from checkpoints_convert import convert
from tstitch_jax.models.cards import Card, TextEncoderCard
from tstitch_jax.models.conditioning import encode_texts
from tstitch_jax.models.types import Network, TextEncoder, Tokenizer
from tstitch_jax.sampling.checks import check_networks

KEY = jax.random.key(0)
GIVEN = json.loads((GOLDEN / "unet" / "names.json").read_text())
with np.load(GOLDEN / "unet" / "expected.npz") as npz:
    EXPECTED = dict(npz)


@pytest.fixture(scope="module")
def published_pair(tmp_path_factory):
    out, networks = tmp_path_factory.mktemp("pair"), []
    for name in ("bk", "sd"):
        source = out / name / "unet"
        source.mkdir(parents=True)
        state = {key: weight(key, shape) for key, shape in GIVEN[name]["shapes"].items()}
        save_file(state, source / "diffusion_pytorch_model.safetensors")
        (source / "config.json").write_text(json.dumps(GIVEN[name]["config"]))
        convert(source, out / f"{name}-network", name=name)
        networks.append(ts.load(out / f"{name}-network"))
    return networks


@pytest.mark.parametrize("solver", ["ddim", "pndm", "dpmpp"])
def test_trajectories_of_the_published_pipeline(solver, published_pair):
    """20 guided steps, the small network while (i + 1) / N <= 0.4."""
    steps = dict(steps=20, spacing="leading+1")
    if solver == "dpmpp":  # whose scheduler counts one time more
        steps = dict(steps=EXPECTED["dpmpp/times"].tolist())
    x, states = ts.sample(
        KEY,
        published_pair,
        cond=noise("pair/context", 2, 7, 24),
        negative=noise("pair/negative", 1, 7, 24),
        plan=ts.Plan.stable_diffusion(0.4, 20),
        **steps,
        solver=solver,
        cfg_scale=7.5,
        noise=noise("pair/x", 2, 8, 8, 4),
        decode=False,
        return_trajectory=True,
    )
    errors = [relative(*pair) for pair in zip(states, EXPECTED[f"{solver}/states"], strict=True)]
    assert max(errors) < 2e-5, errors
    np.testing.assert_array_equal(x, states[-1])


# The high-level API, with denoisers in closed form


@ts.record
class Contextual:
    """The denoiser of a ``Mixture`` around the mean of the context, times a scale."""

    scale: jax.Array

    def __call__(self, x, knot, cond):
        center = self.scale * cond.given.mean(axis=(1, 2))[:, None, None, None]
        shifted = Mixture(0.5)(x - center * knot.alpha, knot)
        return shifted._replace(x0=shifted.x0 + center)


@ts.record
class Table:
    """A text encoder that looks its tokens up."""

    table: jax.Array

    def __call__(self, ids):
        return self.table[ids]


def network_of(name="a", width=3, channels=4, multiple=4, scale=1.0):
    card = Card(
        name=name, architecture="unet", config={}, target="eps", learned_variance=False,
        schedule={"name": "scaled_linear"}, image_shape=(8, 8, channels), num_classes=0,
        context=(5, width), autoencoder="coder", text_encoder="words",
    )  # fmt: skip
    denoiser, schedule = Contextual(jnp.float32(scale)), ts.make_schedule("scaled_linear")
    return Network(denoiser, card, schedule, multiple=multiple)


def encoder_of(width=3, name="words", tokenizer=True):
    """Token t of a text is the number of its t-th letter, and its vector a row of a table."""

    def ids(texts):
        return np.array([[ord(c) % 60 for c in text[:5].ljust(5)] for text in texts], np.int32)

    table = np.random.default_rng(width).standard_normal((60, width))
    return TextEncoder(
        Table(jnp.asarray(table, "float32")),
        TextEncoderCard(name=name, architecture="clip_text", config={}), 5, width,
        Tokenizer(ids, {}, 60) if tokenizer else None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pair():
    return [network_of("a"), network_of("b", scale=2.0)]


TEXTS = ["a cat", "two dogs", "a cat"]


def draw(networks, **changes):
    options = dict(fractions=[0.5, 0.5][: len(networks)], steps=4, decode=False, cfg_scale=3.0)
    if len(networks) == 1:
        del options["fractions"]
    return ts.sample(KEY, networks, **options | changes)


def test_texts_are_contexts(pair):
    encoder = encoder_of()
    given, empty = encode_texts(encoder, TEXTS), encode_texts(encoder, [""])
    expected = draw(pair, cond=given, negative=empty)
    found = draw(pair, prompts=TEXTS, text_encoder=encoder)
    np.testing.assert_array_equal(found, expected)
    assert found.shape == (3, 8, 8, 4)
    negative = draw(pair, prompts=TEXTS, text_encoder=encoder, negative="blurred")
    assert relative(negative, expected) > 0.01
    each = draw(pair, prompts=TEXTS, text_encoder=encoder, negative=["", "blurred", "blurred"])
    np.testing.assert_array_equal(each[0], expected[0])
    np.testing.assert_array_equal(each[1:], negative[1:])
    # Image i depends on its key and its own text; a list for each network is as good.
    first = draw(pair, prompts=TEXTS[:1], text_encoder=[encoder, encoder])
    np.testing.assert_allclose(first[0], expected[0], atol=1e-5)
    plain = draw(pair, prompts=TEXTS, text_encoder=encoder, cfg_scale=None)
    np.testing.assert_array_equal(plain, draw(pair, cond=given, cfg_scale=None))


def test_one_program_for_all_texts_and_ratios(pair):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    options = dict(text_encoder=encoder_of(), steps=6)
    draw(pair, prompts=["x", "y"], **options)
    assert compiled
    compiled.clear()
    draw(pair, prompts=["z", "zz"], negative="no", fractions=[0.2, 0.8], cfg_scale=5.0, **options)
    assert not compiled


def test_each_stage_has_conditioning_of_its_own(pair):
    """Two text encoders of other widths, and classes before texts."""
    wide = network_of("wide", width=7)
    encoders = [encoder_of(), encoder_of(7, "wider")]
    contexts = [encode_texts(encoder, TEXTS) for encoder in encoders]
    nulls = [encode_texts(encoder, [""]) for encoder in encoders]
    networks = [pair[0], wide]
    found = draw(networks, prompts=TEXTS, text_encoder=encoders)
    np.testing.assert_array_equal(found, draw(networks, cond=contexts, negative=nulls))
    knots = ts.make_knots(wide.schedule, 4)
    plan = ts.Plan.from_fractions([0.5, 0.5], knots, wide.schedule)
    denoisers = [ts.with_cond(ts.cfg(n.denoiser, 3.0), k) for k, n in enumerate(networks)]
    nulls = tuple(jnp.broadcast_to(null, (3, *null.shape[1:])) for null in nulls)
    expected = ts.run(
        ts.stitch(denoisers, plan), ts.ddim(), knots,
        ts.draw_noise(ts.image_keys(KEY, jnp.arange(3)), 0, (8, 8, 4)),
        cond=ts.Condition(tuple(contexts), nulls),
    )  # fmt: skip
    assert relative(found, expected) < 1e-5

    classes = tiny_network(guidance_channels=None)
    mixed = dict(labels=[1, 2, 3], prompts=TEXTS, text_encoder=encoders[0])
    found = draw([classes, pair[1]], **mixed)
    alone = draw([pair[1]], prompts=TEXTS, text_encoder=encoders[0])
    late = draw([classes, pair[1]], **mixed, fractions=[0.0, 1.0])
    assert relative(late, alone) < 1e-5
    assert relative(found, alone) > 0.1
    with pytest.raises(ValueError, match="texts for the same images, got 2 and 3"):
        draw([classes, pair[1]], **mixed | dict(labels=[1, 2]))


def test_other_sizes(pair):
    encoder = dict(prompts=TEXTS, text_encoder=encoder_of())
    assert draw(pair, **encoder, size=(12, 16)).shape == (3, 12, 16, 4)
    noise_ = np.random.default_rng(0).standard_normal((3, 12, 16, 4))
    found = draw(pair, **encoder, size=(12, 16), noise=noise_, start=0 * noise_, strength=1.0)
    assert relative(found, draw(pair, **encoder, size=(12, 16), noise=noise_)) < 1
    card = ts.AutoencoderCard(
        name="coder", architecture="autoencoder", image_shape=(16, 16, 3), scaling_factor=0.5,
        config={"widths": [8, 16], "layers": 1, "latent_channels": 4, "groups": 4},
    )  # fmt: skip
    coder = ts.make_network(card, random_params(card))
    images = draw(pair, **encoder, size=(24, 16), autoencoder=coder, decode=True)
    assert images.shape == (3, 24, 16, 3)
    # From an image of that size, through the same autoencoder
    start = np.random.default_rng(0).uniform(-1, 1, (3, 24, 16, 3)).astype(np.float32)
    start = dict(start=start, strength=0.5)
    again = draw(pair, **encoder, size=(24, 16), autoencoder=coder, decode=True, **start)
    assert again.shape == images.shape
    assert relative(again, images) > 1e-3
    for size, message in (
        ((12, 13), "multiples of 4 for a, got 12x13"),
        ((12,), "two whole numbers"),
        (12, "two whole numbers"),
        ((0, 8), "multiples of 4, above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(pair, **encoder, size=size)
    with pytest.raises(ValueError, match=r"multiples of 8, above 0, .* got \(24, 17\)"):
        draw(pair, **encoder, size=(24, 17), autoencoder=coder, decode=True)
    with pytest.raises(ValueError, match="tiny makes 8x8 alone, asked for 12x8"):
        draw([tiny_network()], labels=[1], size=(12, 8))


def test_bad_conditioning_is_refused(pair, monkeypatch):
    # As users call it, without the tests' own checks of types.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    encoder, classes = encoder_of(), tiny_network()
    context = np.zeros((2, 5, 3), np.float32)
    for networks, options, message in [
        (pair, {}, "a is conditioned on texts; give prompts, or the encoded texts as cond$"),
        (pair, dict(prompts=TEXTS, cond=context, text_encoder=encoder),
         "give prompts, or the encoded texts as cond, not both"),
        (pair, dict(labels=[1, 2]), "a does not take labels"),
        ([classes], dict(prompts=TEXTS, labels=[1]), "tiny is conditioned on classes; leave out"),
        ([classes], {}, "tiny is conditioned on classes; give labels"),
        (pair, dict(prompts="a cat", text_encoder=encoder),
         "prompts must be a list of texts, .* got 'a cat'"),
        (pair, dict(prompts=[], text_encoder=encoder), "prompts must be a list of texts"),
        (pair, dict(prompts=TEXTS), "unknown network 'words'"),
        (pair, dict(prompts=TEXTS, text_encoder=3), r"give text_encoder=ts.load\('words'\), got 3"),
        (pair, dict(prompts=TEXTS, text_encoder=encoder_of(7, "wider")),
         "a takes contexts of width 3, the text encoder wider makes them of 7"),
        (pair, dict(prompts=TEXTS, text_encoder=encoder_of(tokenizer=False)), "no tokenizer"),
        (pair, dict(prompts=TEXTS, text_encoder=[encoder] * 3), "text_encoder must be .* 2, got 3"),
        (pair, dict(prompts=TEXTS, text_encoder=encoder, negative=["", ""]), "one text or 3"),
        (pair, dict(prompts=TEXTS, text_encoder=encoder, negative=3), "negative must be a list"),
        (pair, dict(cond=context), "guidance needs the context of the empty text"),
        (pair, dict(cond=context, negative="no"), "texts go with prompts"),
        (pair, dict(cond=context, negative=context[:, :4]), r"like the context, \(2, 5, 3\)"),
        (pair, dict(cond=context[..., :2], negative=context),
         "a takes contexts of width 3, cond has them of 2"),
        (pair, dict(cond=[context] * 3, negative=context), "cond must be .* 2, got 3"),
        (pair, dict(cond=context[0, :2], negative=context), r"got float32 \(3,\)"),
        (pair, dict(cond=context + np.nan, negative=context), "not finite"),
        ([pair[0], network_of("three", channels=3)], dict(cond=context),
         "a and three cannot be stitched: their number of channels differs, 4 and 3"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            draw(networks, **options)


def test_a_text_encoder_is_no_denoiser(pair):
    with pytest.raises(ValueError, match="words is a text encoder, not a denoiser"):
        check_networks([pair[0], encoder_of()])


@pytest.fixture(scope="module")
def of_pixels():
    """A sampler of images, without an autoencoder."""
    three = [network_of("a", channels=3), network_of("b", channels=3, scale=2.0)]
    three = [
        dataclasses.replace(n, card=dataclasses.replace(n.card, autoencoder="")) for n in three
    ]
    options = dict(plan=[0.5, 0.5], steps=3, guidance=2.0)
    return ts.Sampler(three, text_encoder=encoder_of(), **options)


def test_many_images_of_texts(of_pixels, tmp_path):
    texts = ["a cat", "two dogs", "rain"]
    path = ts.generate(
        tmp_path / "out", of_pixels, num=7, prompts=texts, negative="x", batch=2, seed=3,
        progress=False,
    )  # fmt: skip
    with np.load(path) as stored:
        pixels, labels = stored["arr_0"], stored["arr_1"]
    np.testing.assert_array_equal(labels, [0, 1, 2, 0, 1, 2, 0])
    given = [texts[k] for k in labels]
    images = of_pixels(jax.random.key(3), prompts=given, negative="x").images
    expected = (np.asarray(images) + 1) * 127.5
    assert np.abs(pixels - expected).max() < 0.6
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (settings["prompts"], settings["negative"]) == (texts, "x")
    # A resumed job refuses other texts.
    more = dict(num=8, batch=2, seed=3, progress=False, negative="x")
    ts.generate(tmp_path / "out", of_pixels, prompts=texts, **more)
    with pytest.raises(ValueError, match="prompts"):
        ts.generate(tmp_path / "out", of_pixels, prompts=texts[:2], **more)
    with pytest.raises(ValueError, match="negative goes with prompts"):
        ts.generate(tmp_path / "no", of_pixels, **more)
    with pytest.raises(ValueError, match="negative must be one text"):
        ts.generate(tmp_path / "no", of_pixels, prompts=texts, **more | dict(negative=["x"]))
    with pytest.raises(ValueError, match="prompts are for networks that are all conditioned on"):
        ts.generate(tmp_path / "no", ts.Sampler(tiny_network()), prompts=texts, **more)
    assert not (tmp_path / "no").exists()


def test_where_to_switch_for_texts(pair):
    encoder = encoder_of()
    sampler = ts.Sampler(pair, steps=6, guidance=3.0, text_encoder=encoder)
    found = ts.calibrate(KEY, sampler, prompts=TEXTS, conditions=8)
    turns = [TEXTS[k % 3] for k in range(8)]
    given, empty = encode_texts(encoder, turns), encode_texts(encoder, [""])
    options = dict(cond=given, negative=empty, conditions=8)
    again = ts.calibrate(KEY, sampler, **options)
    np.testing.assert_allclose(found.steps_alone, again.steps_alone, rtol=1e-4)
    assert not {"context", "cond", "negative"} & again.settings.keys()
    assert found.steps_alone[0].min() > 0
    assert json.loads(found.to_json())["calibration"]["prompts"] == turns
    with pytest.raises(ValueError, match="a context for at least 4 conditions, got 3"):
        ts.calibrate(KEY, sampler, **options | dict(cond=given[:3]))
    with pytest.raises(ValueError, match="prompts must be a list of texts"):
        ts.calibrate(KEY, sampler, prompts=[], conditions=8)
    # At another size, where the time of a pass is measured, too.
    sized = ts.calibrate(KEY, sampler.replace(steps=2), size=(16, 8), **options)
    assert (sized.costs > 0).all()
    assert sized.settings["size"] == [16, 8]


def test_an_exported_sampler_takes_contexts(of_pixels, tmp_path):
    encoder = encoder_of()
    ts.export(tmp_path / "x.npz", of_pixels, prompts=TEXTS[:2], platforms=["cpu"])
    with np.load(tmp_path / "x.npz") as file:
        program = jax.export.deserialize(bytearray(file["program"]))
        weights = [file[name] for name in file.files if name.startswith("weight_")]
        arguments = json.loads(str(file["about"]))["arguments"]
        given = {name: file[name] for name in arguments}
    assert arguments == ["seed", "context", "negative", "plan", "scales"]
    expected = of_pixels(KEY, prompts=TEXTS[:2]).images
    assert relative(program.call(weights, *given.values()), expected) < 1e-5
    given["context"] = np.asarray(encode_texts(encoder, ["rain", "snow"]))
    given["negative"] = np.asarray(encode_texts(encoder, ["fog", "fog"]))
    expected = of_pixels(KEY, prompts=["rain", "snow"], negative="fog").images
    assert relative(program.call(weights, *given.values()), expected) < 1e-5
    nulls = [encode_texts(encoder, [text]) for text in ("", "fog")]
    own = dict(cond=given["context"], negative=nulls, platforms=["cpu"])
    with pytest.raises(ValueError, match="the same negative for all networks"):
        ts.export(tmp_path / "y.npz", of_pixels, **own)
    assert not (tmp_path / "y.npz").exists()
