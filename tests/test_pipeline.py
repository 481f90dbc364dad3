"""High-level sampling: what ``ts.sample`` returns, and every error before anything is compiled."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from helpers import (
    closed_network,
    random_params,
    relative,
    request_of,
    tiny_card,
    tiny_network,
)

import tstitch_jax as ts
from tstitch_jax.models import build
from tstitch_jax.models.measure import SIZES, param_shapes
from tstitch_jax.sampling.program import SampleRequest

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def pair():
    return [closed_network(0.7, name="a"), closed_network(0.4, 0.5, name="b")]


@pytest.fixture(scope="module")
def transformers():
    return [tiny_network(0, name="a"), tiny_network(1, name="b", width=48, num_heads=3)]


def request(pair, **changes):
    options = dict(labels=[1, 2], fractions=[0.5, 0.5], steps=4, decode=False)
    key, networks = changes.pop("key", KEY), changes.pop("networks", pair)
    return ts.sample(key, networks, **{**options, **changes})


def test_shapes_and_dtypes(transformers):
    x = request(transformers)
    assert x.shape == (2, 8, 8, 4)
    assert x.dtype == jnp.float32
    x0, trajectory = request(transformers, return_trajectory=True)
    assert trajectory.shape == (4, 2, 8, 8, 4)
    np.testing.assert_array_equal(trajectory[-1], x0)
    np.testing.assert_allclose(x0, x, rtol=1e-5, atol=1e-5 * float(jnp.abs(x).max()))


def test_images_are_clipped_and_trajectories_are_not():
    network = tiny_network(image_shape=(8, 8, 1), guidance_channels=None)
    images, trajectory = ts.sample(KEY, [network], labels=[0, 1], steps=4, return_trajectory=True)
    assert float(jnp.abs(images).max()) <= 1 < float(jnp.abs(trajectory[-1]).max())
    np.testing.assert_array_equal(images, trajectory[-1].clip(-1, 1))


def test_a_plan_instead_of_fractions(pair):
    plan = ts.Plan.from_counts([2, 2])
    np.testing.assert_array_equal(request(pair, fractions=None, plan=plan), request(pair))


def test_guidance_choices(pair):
    network = pair[0]
    default = request([network], fractions=None)
    np.testing.assert_array_equal(request([network], fractions=None, cfg_channels=3), default)
    assert not np.allclose(request([network], fractions=None, cfg_channels=4), default)
    # Scale 1 is the conditional prediction, as is no guidance.
    one, none = (request([network], fractions=None, cfg_scale=s) for s in (1.0, None))
    np.testing.assert_allclose(one, none, rtol=1e-4, atol=1e-4 * float(jnp.abs(none).max()))


def test_given_noise_is_the_start(pair):
    noise = np.random.default_rng(0).standard_normal((2, 8, 8, 4))  # float64, as NumPy makes it
    drawn, given = request(pair), request(pair, noise=noise)
    assert not np.allclose(drawn, given)
    keys = ts.image_keys(KEY, jnp.arange(2))
    same = request(pair, noise=ts.draw_noise(keys, 0, (8, 8, 4)))
    np.testing.assert_allclose(same, drawn, rtol=1e-5, atol=1e-5 * float(jnp.abs(drawn).max()))


@pytest.fixture(scope="module")
def autoencoder():
    card = ts.AutoencoderCard(
        name="coder",
        architecture="autoencoder",
        config={"widths": [8, 16], "layers": 1, "latent_channels": 4, "groups": 4},
        image_shape=(16, 16, 3),
        scaling_factor=0.5,
    )
    return ts.make_network(card, jax.tree.map(lambda p: 10 * p, random_params(card)))


def test_latents_are_decoded_in_the_same_executable(pair, autoencoder):
    latents = request(pair)
    images, trajectory = request(pair, decode=True, autoencoder=autoencoder, return_trajectory=True)
    assert images.shape == (2, 16, 16, 3)
    np.testing.assert_allclose(trajectory[-1], latents, rtol=1e-4, atol=1e-4)
    decoded = autoencoder.decode(trajectory[-1])
    assert float(jnp.abs(decoded).max()) > 1  # so that clipping is seen
    np.testing.assert_allclose(images, jnp.clip(decoded, -1, 1), atol=1e-4)
    asked = request_of(
        KEY, pair, labels=[1, 2], fractions=[0.5, 0.5], steps=4, autoencoder=autoencoder
    )
    (same,) = asked.compile()(asked.inputs)
    np.testing.assert_allclose(same, images, atol=1e-5)
    # An autoencoder that is not used changes nothing.
    same = request(pair, autoencoder=autoencoder)
    np.testing.assert_array_equal(same, latents)


def shapes(card, dtype=jnp.float32):
    return ts.make_network(card, param_shapes(build.module_of(card)), dtype)


@pytest.mark.parametrize(("side", "large"), [(32, "dit-xl-2"), (64, "dit-s-4")])
def test_full_size_networks_by_shape(side, large):
    """DiTs and Stable Diffusion's autoencoder."""
    networks = [
        shapes(tiny_card(name, image_shape=(side, side, 4), num_classes=1000, config=SIZES[name]))
        for name in ("dit-s-2", large)
    ]
    if large == "dit-xl-2":
        assert networks[1].card.num_params + 256 * 1152 == 675_129_632
    assert not networks[1].card.checksum
    coder = ts.AutoencoderCard(
        name="sd-vae", architecture="autoencoder", image_shape=(256, 256, 3),
        config={"widths": [128, 256, 512, 512], "layers": 2, "latent_channels": 4},
        scaling_factor=0.18215,
    )  # fmt: skip
    asked = request_of(
        KEY, networks, labels=[1, 2], fractions=[0.5, 0.5], steps=4, autoencoder=shapes(coder)
    )
    (images,) = jax.eval_shape(asked.function, asked.inputs)
    assert images.shape == (2, 8 * side, 8 * side, 3)
    assert images.dtype == jnp.float32


def test_an_autoencoder_of_other_latents_is_refused(autoencoder):
    network = tiny_network(image_shape=(8, 8, 3), guidance_channels=None)
    with pytest.raises(ValueError, match=r"tiny makes 3 channels, .* coder takes latents of 4"):
        ts.sample(KEY, [network], labels=[0], steps=2, autoencoder=autoencoder)


@pytest.mark.parametrize("solver", ["ddim", "unipc", "sde", ts.dpmpp(order=3)])
def test_any_solver_spacing_and_target(pair, solver):
    for spacing in ("trailing", "linspace"):
        x = request(pair, solver=solver, spacing=spacing)
        assert np.isfinite(x).all()
        again = request(pair, solver=solver, steps=[999, 700, 300, 40])
        assert not np.allclose(x, again)


def test_given_times_are_the_spacing(pair):
    expected = request(pair, spacing="trailing")
    np.testing.assert_array_equal(request(pair, steps=[999, 749, 499, 249]), expected)
    np.testing.assert_array_equal(request(pair, steps=np.array([999, 749, 499, 249])), expected)


def test_predictions_and_trajectory(pair):
    x, xs, predictions = request(
        pair, steps=6, return_trajectory=True, return_predictions=True, cfg_scale=None
    )
    assert xs.shape == predictions.shape == (6, 2, 8, 8, 4)
    np.testing.assert_array_equal(xs[-1], x)
    # The last step of DDIM returns what was predicted there; earlier ones do not.
    np.testing.assert_allclose(predictions[-1], x, rtol=1e-5, atol=1e-5)
    assert relative(predictions[0], xs[0]) > 0.1
    _, only = request(pair, steps=6, return_predictions=True, cfg_scale=None)
    np.testing.assert_allclose(only, predictions, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "unipc", "heun"])
def test_a_callback_sees_the_steps_of_the_compiled_loop(pair, solver):
    options = dict(solver=solver, steps=5, return_trajectory=True, return_predictions=True)
    expected = request(pair, **options)
    seen = []
    found = request(pair, callback=seen.append, **options)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours, theirs) < 1e-5
    assert [step.index for step in seen] == list(range(5))
    np.testing.assert_array_equal(jnp.stack([step.x for step in seen]), found[1])
    np.testing.assert_array_equal(jnp.stack([step.x0 for step in seen]), found[2])


def test_a_callback_compiles_once(pair):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    options = dict(callback=lambda step: None, eta=0.3, steps=7)
    request(pair, **options)
    assert compiled
    compiled.clear()
    request(pair, **options, cfg_scale=3.0)
    request(pair, **{**options, "fractions": [0.1, 0.9]}, labels=[4, 5])
    assert not compiled


def test_start_from_an_image(transformers, autoencoder):
    image = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    noise = np.random.default_rng(1).standard_normal((2, 8, 8, 4)).astype(np.float32)
    options = dict(steps=10, noise=noise, cfg_scale=None, return_trajectory=True)
    _, whole = request(transformers, start=image, strength=1.0, **options)
    assert len(whole) == 10
    _, half = request(transformers, start=image, strength=0.5, fractions=[0.7, 0.3], **{**options})
    assert len(half) == 5
    # The same by hand: five more steps from the noised image, the switch where it would be.
    schedule = transformers[0].schedule
    knots = ts.make_knots(schedule, 10)
    plan = ts.Plan.from_fractions([0.7, 0.3], knots, schedule)
    assert plan.last_steps(5).counts() == (2, 3)
    denoiser = ts.stitch([n.denoiser for n in transformers], plan.last_steps(5))
    _, expected = ts.run(
        denoiser,
        ts.ddim(),
        ts.last_steps(knots, 5),
        knots.alpha[5] * image + knots.sigma[5] * jnp.asarray(noise),
        cond=jnp.array([1, 2]),
        return_trajectory=True,
    )
    assert relative(half, expected) < 1e-5
    # A little strength returns nearly the image, with an autoencoder nearly what it codes.
    network = transformers[0]
    network = network.with_params(jax.tree.map(jnp.zeros_like, network.params))
    little = request([network], fractions=None, start=image, strength=0.01, steps=100)
    assert relative(little, image) < 0.05
    pictures = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    coded = dict(autoencoder=autoencoder, decode=True, fractions=None, steps=100)
    found = request([network], start=pictures, strength=0.01, **coded)
    latents = autoencoder.encode(jnp.asarray(pictures))
    expected = jnp.clip(autoencoder.decode(latents), -1, 1)
    assert relative(found, expected) < 0.1


def test_labels_for_each_network(pair):
    same = request(pair, labels=[[1, 2], [1, 2]])
    np.testing.assert_array_equal(same, request(pair))
    fewer = closed_network(0.4, 0.5, name="b", num_classes=7)
    found = request([pair[0], fewer], labels=[[8, 9], [5, 6]])
    knots = ts.make_knots(fewer.schedule, 4)
    plan = ts.Plan.from_fractions([0.5, 0.5], knots, fewer.schedule)
    denoisers = [
        ts.with_cond(ts.cfg(n.denoiser, 1.5, 3), k) for k, n in enumerate([pair[0], fewer])
    ]
    expected = ts.run(
        ts.stitch(denoisers, plan),
        ts.ddim(),
        knots,
        ts.draw_noise(ts.image_keys(KEY, jnp.arange(2)), 0, (8, 8, 4)),
        cond=ts.Condition(
            (jnp.array([8, 9]), jnp.array([5, 6])), (jnp.array([10, 10]), jnp.array([7, 7]))
        ),
    )
    assert relative(found, expected) < 1e-5


def test_a_scale_for_each_network_and_step(pair):
    one = request(pair, cfg_scale=[2.0, 3.0])
    assert relative(request(pair, cfg_scale=[[2.0] * 4, [3.0] * 4]), one) < 1e-5
    mixed = request(pair, cfg_scale=[[2.0, 2.0, 9.0, 9.0], [9.0, 9.0, 3.0, 3.0]])
    assert relative(mixed, one) < 1e-5
    free = request(pair, cfg_scale=[None, 3.0])
    assert relative(request(pair, cfg_scale=[1.0, 3.0]), free) < 1e-5
    assert relative(one, free) > 1e-3


def test_guidance_in_an_interval(pair):
    network = pair[0]
    knots = ts.make_knots(network.schedule, 4)
    levels = knots.sigma[:-1] / knots.alpha[:-1]
    low, high = float(levels[2]) * 0.99, float(levels[1]) * 1.01  # steps 1 and 2
    found = request([network], fractions=None, cfg_interval=(low, high), cfg_scale=3.0)
    expected = request([network], fractions=None, cfg_scale=[[1.0, 3.0, 3.0, 1.0]])
    np.testing.assert_array_equal(found, expected)
    everywhere = request([network], fractions=None, cfg_interval=(0, np.inf), cfg_scale=3.0)
    assert relative(everywhere, request([network], fractions=None, cfg_scale=3.0)) < 1e-5
    assert relative(found, everywhere) > 1e-3


def test_autoguidance(pair):
    found = request(pair, cfg_scale=None, auto_scale=2.5)
    knots = ts.make_knots(pair[0].schedule, 4)
    plan = ts.Plan.from_fractions([0.5, 0.5], knots, pair[0].schedule)
    small, large = pair
    denoiser = ts.stitch(
        [small.denoiser, ts.autoguide(large.denoiser, small.denoiser, 2.5, channels=3)], plan
    )
    expected = ts.run(
        denoiser,
        ts.ddim(),
        knots,
        ts.draw_noise(ts.image_keys(KEY, jnp.arange(2)), 0, (8, 8, 4)),
        cond=jnp.array([1, 2]),
    )
    assert relative(found, expected) < 1e-5
    one, none = (request(pair, cfg_scale=None, auto_scale=s) for s in (1.0, None))
    assert relative(one, none) < 1e-5


def test_across_families(transformers):
    """A flow before a variance-preserving network: each at its own time and scale."""
    flow = tiny_network(
        3, name="sit", schedule={"name": "flow"}, target="flow", learned_variance=False
    )
    found = request([flow, transformers[0]], cfg_scale=None)
    schedule = transformers[0].schedule
    knots = ts.make_knots(schedule, 4)
    x = ts.draw_noise(ts.image_keys(KEY, jnp.arange(2)), 0, (8, 8, 4))
    cond = ts.Condition(jnp.array([1, 2]))
    for i in range(4):  # by hand, from the definitions
        a, s = float(knots.alpha[i]), float(knots.sigma[i])
        if i < 2:
            t = s / (a + s)
            knot = ts.Knots(
                jnp.int32(i), jnp.int32(i), jnp.float32(t), jnp.float32(1 - t), jnp.float32(t), 4
            )
            prediction = flow.denoiser(x / (a + s), knot, cond)
        else:
            knot = jax.tree.map(lambda v, i=i: jnp.asarray(v[i]), knots)
            prediction = transformers[0].denoiser(x, knot, cond)
        x = knots.alpha[i + 1] * prediction.x0 + knots.sigma[i + 1] * prediction.eps
    assert relative(found, x) < 1e-5
    # And the other way round, from the flow's pure noise, where the other network has none.
    assert np.isfinite(request([transformers[0], flow])).all()
    # Also with two evaluations a step, the second at the far end of the step.
    assert relative(request([flow, transformers[0]], solver="heun"), found) > 1e-3


def other(**changes):
    return tiny_network(2, name="other", **changes)


BAD = [
    (dict(fractions=[0.5, 0.6]), "must sum to 1, got 0.5, 0.6"),
    (dict(fractions=[-0.5, 1.5]), "between 0 and 1, got -0.5, 1.5"),
    (dict(fractions=[0.2, 0.3, 0.5]), "2 networks need 2 fractions, got 0.2, 0.3, 0.5"),
    (dict(fractions=None), "give a plan or fractions for the 2 networks"),
    (dict(plan=ts.Plan.from_counts([2, 2])), "fractions or a plan, not both"),
    (dict(fractions=None, plan=ts.Plan.from_counts([2, 3])), "plan has 5 steps, the sampler 4"),
    (dict(fractions=None, plan=ts.Plan.from_counts([4])), "plan is for 1 networks, got 2"),
    (dict(labels=[1, 10]), "labels must be 0 to 9, got 10"),
    (dict(labels=[-1]), "labels must be 0 to 9, got -1"),
    (dict(labels=[]), "labels must be a list of class numbers"),
    (dict(labels=np.array([0.5])), "labels must be a list of class numbers"),
    (dict(steps=0), "at least 1, got 0"),
    (dict(steps=1001), "at most the 1000 training times, got 1001"),
    (dict(solver="dimm"), "unknown solver 'dimm'; did you mean 'ddim'"),
    (dict(solver="ddpm", eta=0.5), "eta belongs to the solvers 'ddim' and 'euler_ancestral'"),
    (dict(eta=2.0), "eta must be between 0 and 1, got 2"),
    (dict(eta=float("nan")), "eta must be a finite number, got nan"),
    (dict(cfg_scale=float("nan")), "guidance scale must be a finite number or None, got nan"),
    (dict(cfg_channels=5), "guided channels must be 1 to 4, .* got 5"),
    (dict(cfg_channels=0), "guided channels must be 1 to 4, .* got 0"),
    (dict(noise=np.zeros((3, 8, 8, 4))), r"noise must be \(2, 8, 8, 4\), one an image"),
    (
        dict(decode=True),
        r"b makes latents of 4 channels, .*; give autoencoder=ts.load\('sd-vae-ft-ema'\), or",
    ),
    (dict(decode=True, networks="latents"), "names the autoencoder nowhere; .*: unknown network"),
    (
        dict(decode=True, autoencoder="fashion-s"),
        "fashion-s.* is not an autoencoder",
    ),
    (dict(decode=True, autoencoder="fashoin-s"), "unknown network 'fashoin-s'; did you mean"),
    (dict(networks="autoencoders"), "their autoencoder differs, one and two"),
    (dict(eta=np.float32(2)), "eta must be between 0 and 1, got 2"),
    (dict(eta="much"), "eta must be a number, got 'much'"),
    (dict(solver=ts.ddim(), eta=0.5), "eta goes with a solver's name; give it to ddim itself"),
    (dict(solver="lcm"), "'lcm' needs consistency networks, and the card of a does not say"),
    (dict(spacing="karras", networks="flow"), "'karras' needs a finite noise level .* 'flow'"),
    (dict(spacing="karas"), "unknown spacing 'karas'; did you mean 'karras'"),
    (dict(spacing="karras", steps="ddim4"), "'karras' needs a plain number of steps, got 'ddim4'"),
    (dict(spacing="karras", steps=[9, 8, 7, 6]), "a list of times or the spacing 'karras', not"),
    (dict(steps=[9, 8, 8, 6]), "times must fall, .* but 8 is followed by 8"),
    (dict(steps=[1000, 8, 7, 6]), "times of the schedule 'linear' must be 0 to 999, got 6 to 1000"),
    (dict(steps=[9.0, float("nan")]), "times of the schedule 'linear' must be 0 to 999, got nan"),
    (dict(steps=[]), "times must be a list of numbers"),
    (dict(steps=50.0), "steps must be a whole number or a list of times, got 50.0"),
    (dict(steps=None), "steps must be a whole number or a list of times, got None"),
    (dict(spacing="leading+1", steps=1000), "starts at time 1000, after the last of the 1000"),
    (dict(key=np.zeros(2)), "key must be one key from jax.random.key, got array"),
    (dict(key=jax.random.split(KEY, 3)), "key must be one key from jax.random.key, got Array"),
    (dict(callback=5), "callback must be a function of a step, got 5"),
    (dict(solver=["ddim"]), "unknown solver .'ddim'."),
    (dict(noise=np.full((2, 8, 8, 4), np.nan)), "noise holds numbers that are not finite"),
    (dict(noise="much"), r"noise must be an array of numbers \(2, 8, 8, 4\), one an image"),
    (dict(cfg_interval="12"), "interval must be two noise levels, 0 <= low < high, got '12'"),
    (dict(cfg_rescale=0.5, cfg_scale=None), "rescale changes guidance, but there is none"),
    (dict(cfg_scale=True), "guidance scale must be a number or None, got True"),
    (
        dict(labels=np.zeros((2, 2, 2), int)),
        "labels must be a list of class numbers or names, one",
    ),
    (dict(solver="heun", eta=np.float32(0.5)), "eta belongs to the solvers"),
    (dict(cfg_scale=[1.0, 2.0, 3.0]), "one entry for each of the 2 networks, got 3 entries"),
    (dict(cfg_scale=[1.0, [2.0, 3.0]]), "guidance scale per step needs 4 numbers, got 2"),
    (dict(cfg_scale="much"), "guidance scale must be a number or None, got 'much'"),
    (dict(cfg_rescale=1.5), "rescale of guidance must be between 0 and 1, got 1.5"),
    (dict(cfg_interval=(2.0, 1.0)), r"levels, 0 <= low < high, got \(2.0, 1.0\)"),
    (dict(cfg_interval=3.0), "interval must be two noise levels, 0 <= low < high, got 3.0"),
    (dict(cfg_interval=(1, 2), cfg_scale=None), "the interval limits guidance, but there is none"),
    (dict(cfg_interval=(1, 2), cfg_scale=[[1, 2, 3, 4], 2]), "per step or an interval, not both"),
    (dict(auto_scale=2.0, networks="alone"), "first network guide the later ones, but there is"),
    (dict(auto_scale=float("inf")), "the scale of autoguidance must be a finite number, got inf"),
    (dict(start=np.zeros((2, 8, 8, 4))), "start and strength go together"),
    (dict(strength=0.5), "start and strength go together"),
    (dict(start=np.zeros((2, 8, 8, 4), np.uint8), strength=0.5), "start must be floats, images in"),
    (dict(start=np.zeros((2, 8, 8, 3)), strength=0.5), r"start must be \(2, 8, 8, 4\), one image"),
    (dict(start=np.zeros((2, 8, 8, 4)), strength=0.0), "above 0, at most 1, got 0"),
    (dict(start=np.full((2, 8, 8, 4), np.nan), strength=0.5), "start holds numbers that are not"),
    (dict(labels=[[1, 2]]), "labels must be given once for all networks .* each of the 2, got 1"),
    (dict(labels=[[1, 2], [3]]), "labels or texts for the same images, got 2 and 1"),
    (dict(labels=[[1, 2], [3, 10]]), "labels must be 0 to 9, got 10"),
    (dict(labels=7), "labels must be a list of class numbers or names, one an image, got 7"),
    (dict(cfg_scale=1e39), "guidance scale must be a finite number"),
    (dict(plan=[0, 0, 1, 1], fractions=None), "plan must be a ts.Plan, got .0, 0, 1, 1."),
    (
        dict(plan=ts.Plan(np.array([0, 1, 7, 1], np.int32), 2), fractions=None),
        "holds numbers 0 to 1, got 0 to 7",
    ),
    (dict(networks=[5]), "networks must be a list of names, paths or what ts.load returns"),
    (dict(networks=["fashoin-s"]), "unknown network 'fashoin-s'; did you mean"),
    (dict(networks=[]), "give at least one network"),
    (dict(networks="shape"), "a and other cannot be stitched: their image shape differs"),
    (dict(networks="classes"), "a and other .* number of classes differs, 10 and 7; give a list"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input(pair, changes, message, monkeypatch):
    monkeypatch.setattr(SampleRequest, "run", None)  # nothing may be compiled
    second = {
        "shape": lambda: other(image_shape=(8, 8, 3)),
        "classes": lambda: other(num_classes=7),
        "flow": lambda: other(schedule={"name": "flow"}, target="flow"),
        "latents": lambda: other(autoencoder="nowhere"),
        "autoencoders": lambda: other(autoencoder="two"),
    }
    if isinstance(changes.get("networks"), str):
        first = other(autoencoder="one") if changes["networks"] == "autoencoders" else pair[0]
        networks = [first, second[changes["networks"]]()] if changes["networks"] in second else pair
        if changes["networks"] == "alone":
            networks, changes = pair[:1], {**changes, "fractions": None}
        changes = {**changes, "networks": networks}
    # As users call it, without the tests' own checks of types.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message) as caught:
        request(pair, **changes)
    assert "\n" not in str(caught.value)
