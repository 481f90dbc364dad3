"""Calibration: closed forms, known answers, the search against brute force, and the command."""

import dataclasses
import functools
import inspect
import itertools
import json

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy.fft import dct

import tstitch_jax as ts
from tstitch_jax import cli
from tstitch_jax.jobs import calibrate as calibration
from tstitch_jax.models.cards import Card
from tstitch_jax.models.types import Network
from tstitch_jax.sampling.sampler import make_sampler

pytestmark = pytest.mark.usefixtures("standard_promotion")

SHAPE, STEPS = (8, 6, 2), 12
MAPS = [dct(np.eye(size, dtype=np.float32), axis=0, norm="ortho") for size in SHAPE[:2]]
"""Cosine transforms of the two axes."""

RADIUS = np.hypot(*np.meshgrid(np.arange(8) / 8, np.arange(6) / 6, indexing="ij"))
BANDS = np.float32(np.minimum(3 * RADIUS // 1, 2) == np.arange(3)[:, None, None])
"""The band of each coefficient, one-hot ``[S, H, W]``."""

ROUNDING = (2 / 255) ** 2 / 12
"""The variance of the rounding to pixels."""


def transform(x):
    return np.einsum("uh,...hwc,vw->...uvc", MAPS[0], x, MAPS[1])


POWER = np.float32(
    np.einsum("suv,sc->uvc", BANDS, 2.0 ** -np.arange(3)[:, None] * np.array([1.0, 0.3]))
)
MEAN = np.float32(transform(np.linspace(-1, 1, 96).reshape(SHAPE)))


def same(x0, x, knot):
    return x0


@ts.record
class Spectral:
    """The exact denoiser of images that are Gaussian, independent by frequency; or a changed one.

    ``change`` is ``(x0, x, knot) -> x0`` in frequencies, the prediction instead of the exact one.
    """

    power: jax.Array
    mean: jax.Array
    change: object = ts.static(default=same)

    def __call__(self, x, knot, cond):
        seen = jnp.einsum("uh,bhwc,vw->buvc", MAPS[0], x, MAPS[1], precision="highest")
        slope = knot.alpha * self.power / (knot.alpha**2 * self.power + knot.sigma**2)
        # Without a class another mean is expected, so that guidance makes a difference.
        middle = self.mean + 0.1 * (cond.given == 3)[:, None, None, None]
        x0 = self.change(middle + slope * (seen - knot.alpha * middle), seen, knot)
        x0 = jnp.einsum("uh,buvc,vw->bhwc", MAPS[0], x0, MAPS[1], precision="highest")
        return ts.Prediction(x0, (x - knot.alpha * x0) / knot.sigma)


def gaussian(name, change=same, *, macs=100, schedule="cosine"):
    """A network of a ``Spectral`` denoiser: its name, its change, its cost, its forward process."""
    card = Card(
        name=name, architecture="none", config={}, image_shape=SHAPE, macs=macs, target="x0",
        learned_variance=False, schedule={"name": schedule}, num_classes=3,
    )  # fmt: skip
    denoiser = Spectral(jnp.asarray(POWER), jnp.asarray(MEAN), change)
    return Network(denoiser, card, ts.make_schedule(schedule))


def calibrate(networks, *, seed=0, **options):
    """``ts.calibrate`` with options of both a sampler and a calibration."""
    options = dict(steps=STEPS, costs="macs", conditions=24, cfg_scale=None) | options
    own = {k: options.pop(k) for k in inspect.signature(ts.calibrate).parameters if k in options}
    return ts.calibrate(jax.random.key(seed), make_sampler(networks, **options), **own)


def measured(networks, plan, **options):
    """The damage of a plan: samples with it and without it, from the same noise."""
    options = dict(steps=STEPS, cfg_scale=None, decode=False) | options
    labels = [k % 3 for k in range(24)]

    def draw(plan):
        images = ts.sample(jax.random.key(0), networks, labels=labels, plan=plan, **options)
        return transform(np.asarray(images, np.float64))

    alone = draw(ts.Plan.from_list([len(networks) - 1] * STEPS, len(networks)))
    variance = np.einsum("suv,uvc->sc", BANDS, alone.var(axis=0, ddof=1))
    variance = variance / BANDS.sum((1, 2))[:, None] + ROUNDING
    unit = np.einsum("suv,sc->uvc", BANDS, variance)
    return np.mean(np.square(draw(plan) - alone) / unit)


@functools.cache
def shifted(size):
    """Says a clean image that is wrong by a fixed pattern, more so in the fine bands."""
    pattern = size * np.random.default_rng(0).standard_normal(SHAPE) / (1 + np.hypot(
        *np.meshgrid(np.arange(8), np.arange(6), indexing="ij"))[..., None])  # fmt: skip
    return lambda x0, x, knot: x0 + jnp.asarray(pattern, jnp.float32)


@functools.cache
def sloped(size):
    """Trusts what it sees too much."""
    return lambda x0, x, knot: x0 + size * knot.alpha * (x - knot.alpha * x0)


PLANS = (
    [0] * 4 + [2] * 8, [0] * 12, [0] * 3 + [1] * 5 + [2] * 4, [2] * 8 + [0] * 4,
    [0, 2, 1, 2] * 3, [2] * 6 + [1] + [2] * 5,
)  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(spacing="trailing"),
        dict(cfg_scale=2.0),
        dict(cfg_scale=3.0, cfg_interval=(0.2, 2.0)),
        dict(cfg_scale=[None, 1.5, 2.0]),
        dict(auto_scale=1.5),
    ],
    ids=str,
)
def test_the_damage_of_gaussian_networks_is_exact(options):
    networks = [
        gaussian("a", shifted(0.2), macs=1), gaussian("b", sloped(0.004), macs=10),
        gaussian("c"),
    ]  # fmt: skip
    calibrated = calibrate(networks, **options)
    for plan in PLANS:
        found = calibrated.predict(ts.Plan.from_list(plan, 3))
        true = measured(networks, ts.Plan.from_list(plan, 3), **options)
        assert true > 1e-8
        np.testing.assert_allclose(found.damage, true, rtol=0.01, err_msg=str(plan))
        if not options:
            assert found.speedup == pytest.approx(1200 / sum([1, 10, 100][k] for k in plan))


def test_schedules_and_guidance_of_others_are_followed():
    """A network of another forward process, exact but for its shift, is asked where it is right."""
    networks = [gaussian("a", shifted(0.2), schedule="linear", macs=1), gaussian("c")]
    plan = ts.Plan.from_list([1] * 3 + [0] * 5 + [1] * 4, 2)
    found = calibrate(networks).predict(plan)
    np.testing.assert_allclose(found.damage, measured(networks, plan), rtol=0.01)


def test_two_copies_do_no_damage():
    found = calibrate([gaussian("a", macs=5), gaussian("b")])
    assert found.damage < 1e-9
    assert found.fractions == (1, 0)
    assert found.speedup == 20
    np.testing.assert_allclose(found.cosine, 1, atol=1e-5)
    assert found.warnings == ()
    planned = calibrate([gaussian("a", macs=5), gaussian("b")], fractions=[0.5, 0.5])
    assert planned.fractions == (1, 0)  # the sampler's own plan is ignored


def test_noise_is_never_chosen():
    noise = gaussian("noise", lambda x0, x, knot: 3 * jnp.sin(1e4 * x), macs=1)
    found = calibrate([noise, gaussian("large")], tolerance=100.0)
    assert found.fractions == (0, 1)
    assert [c.plan.counts() for c in found.front] == [(0, STEPS)]
    assert any("noise does more damage than a linear filter in every step" in w
               for w in found.warnings)  # fmt: skip


@pytest.mark.parametrize("right", [1, 5, 9])
@pytest.mark.parametrize("free", [False, True])
def test_a_network_right_until_a_time_is_switched_there(right, free):
    def change(x0, x, knot):
        return jnp.where(knot.index < right, x0, jnp.sin(1e4 * x))

    found = calibrate([gaussian("a", change, macs=1), gaussian("b")], free=free, tolerance=0.001)
    assert found.plan.runs() == [(0, right), (1, STEPS - right)]
    assert any(f"in {STEPS - right} of {STEPS} steps" in w for w in found.warnings)


def test_three_networks_each_right_in_its_part():
    def until(right):
        return lambda x0, x, knot: jnp.where(knot.index < right, x0, 2 * jnp.cos(1e4 * x))

    networks = [gaussian("a", until(3), macs=1), gaussian("b", until(8), macs=10), gaussian("c")]
    found = calibrate(networks, tolerance=0)
    assert found.plan.runs() == [(0, 3), (1, 5), (2, 4)]


def test_budget_and_tolerance():
    networks = [gaussian("a", shifted(0.05), macs=10), gaussian("b")]
    everything = calibrate(networks)
    damages = [c.damage for c in everything.front]
    speedups = [c.speedup for c in everything.front]
    assert damages == sorted(damages, reverse=True)
    assert speedups == sorted(speedups, reverse=True)
    assert len(damages) == STEPS + 1
    assert damages[-1] == 0
    assert speedups[-1] == 1
    half = calibrate(networks, budget=2.0)
    assert half.speedup >= 2
    quicker = [c for c in half.front if c.speedup >= 2]
    assert half.damage == min(c.damage for c in quicker)
    limited = calibrate(networks, tolerance=damages[3])
    assert limited.damage == pytest.approx(damages[3])
    assert limited.plan.runs() == everything.front[3].plan.runs()
    assert calibrate(networks, tolerance=0).fractions == (0, 1)
    with pytest.raises(ValueError, match="no plan is 11 times as quick as b alone; the quickest"):
        calibrate(networks, budget=11)


def test_measured_seconds_and_one_program():
    traced = []

    def counted(x0, x, knot):
        traced.append(x0)
        return x0 + 0.1

    networks = [gaussian("a", counted), gaussian("b")]
    found = calibrate(networks, costs="seconds")
    assert (found.costs > 0).all()
    programs = len(traced)
    assert programs > 0
    calibrate(networks, seed=7, costs="seconds", labels=[1, 2], budget=1.0)
    assert len(traced) == programs


@st.composite
def problems(draw, steps=6):
    count = draw(st.integers(2, 3))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = (count - 1) * steps
    costs = np.sort(generator.random(count))[:, None] * np.ones(steps) + 0.1
    allowed = generator.random((count, steps)) < 0.9
    allowed[-1] = True
    return generator, size, costs, allowed


def brute_force(gram, costs, allowed, free):
    """The least damage at each cost, over all plans."""
    count, steps = costs.shape
    best = {}
    for plan in itertools.product(range(count), repeat=steps):
        if not free and list(plan) != sorted(plan):
            continue
        if not all(allowed[k, i] for i, k in enumerate(plan)):
            continue
        entries = [k * steps + i for i, k in enumerate(plan) if k < count - 1]
        counts = tuple(np.bincount(plan, minlength=count))
        damage = gram[np.ix_(entries, entries)].sum()
        best[counts] = min(best.get(counts, np.inf), damage)
    return best


def found_by_search(gram, costs, allowed, free):
    count, steps = costs.shape
    found = {}
    for plan in calibration._search(gram, allowed, free):
        entries = [k * steps + i for i, k in enumerate(plan) if k < count - 1]
        counts = tuple(np.bincount(plan, minlength=count))
        assert counts not in found
        found[counts] = gram[np.ix_(entries, entries)].sum()
    return found


def test_noisy_predictions_of_eps_are_no_harm_where_there_is_only_noise():
    """Its x0 is far off there, and a linear filter's is not; but next to nothing comes of it."""

    def wrong(size, frequency):
        def change(x0, x, knot):
            return x0 - knot.sigma / knot.alpha * size * jnp.sin(frequency * x)

        return change

    networks = [
        gaussian("a", wrong(0.01, 3), macs=1, schedule="linear"),
        gaussian("b", wrong(0.005, 5), schedule="linear"),
    ]
    found = calibrate(networks)
    assert found.plan.counts() == (STEPS, 0)
    assert found.steps_alone[0, 0] > found.linear[0]
    assert found.warnings == ()
    np.testing.assert_allclose(found.damage, measured(networks, found.plan), rtol=0.2)


@given(problem=problems())
@settings(max_examples=25, deadline=None)
def test_the_search_loses_nothing_where_switches_are_final(problem):
    generator, size, costs, allowed = problem
    errors = generator.standard_normal((size, 8))
    gram = errors @ errors.T
    expected = brute_force(gram, costs, allowed, False)
    found = found_by_search(gram, costs, allowed, False)
    assert found.keys() == expected.keys()
    for counts, damage in expected.items():
        assert found[counts] == pytest.approx(damage, abs=1e-9)


@given(problem=problems())
@settings(max_examples=15, deadline=None)
def test_the_search_among_free_plans_where_errors_are_independent(problem):
    generator, size, costs, allowed = problem
    gram = np.diag(generator.random(size))
    expected = brute_force(gram, costs, allowed, True)
    found = found_by_search(gram, costs, allowed, True)
    assert found.keys() == expected.keys()
    for counts, damage in expected.items():
        assert found[counts] == pytest.approx(damage, abs=1e-9)


def test_long_plans_of_many_networks_are_looked_through_in_blocks():
    count, steps = 4, 250
    gram = np.eye((count - 1) * steps)
    plans = calibration._search(gram, np.ones((count, steps), bool), False)
    assert 1000 < len(plans) <= calibration._STATES
    assert all(len(plan) == steps and plan == sorted(plan) for plan in plans)


def test_a_saved_calibration_is_a_plan(tmp_path):
    networks = [gaussian("a", shifted(0.2), macs=10), gaussian("b")]
    found = calibrate(networks)
    found.save(tmp_path / "plan.json")
    plan = ts.Plan.load(tmp_path / "plan.json")
    np.testing.assert_array_equal(plan.networks, found.plan.networks)
    about = json.loads((tmp_path / "plan.json").read_text())["calibration"]
    assert about["networks"] == ["a", "b"]
    assert about["tolerance"] == calibration.TOLERANCE
    assert len(about["front"]) == len(found.front)
    assert about["guidance"] == [None, None]
    assert len(about["times"]) == STEPS + 1
    images = ts.sample(
        jax.random.key(0), networks, labels=[0], steps=STEPS, plan=plan, cfg_scale=None,
        decode=False,
    )  # fmt: skip
    assert np.isfinite(images).all()


def replaced(network, **changes):
    return dataclasses.replace(network, card=dataclasses.replace(network.card, **changes))


def test_what_speaks_against_stitching():
    large = gaussian("large")

    def warned(network, other=large):
        return " / ".join(calibrate([network, other]).warnings)

    small = gaussian("small", shifted(0.02), macs=10)
    assert warned(small) == ""
    other = warned(replaced(small, data="cats"), replaced(large, data="dogs"))
    assert "small was trained on cats, large on dogs" in other
    scaled = gaussian("small", lambda x0, x, knot: 0.5 * x0, macs=10)
    assert "small makes images 0.5 times as large as large: are their latents" in warned(scaled)
    assert "small costs no less than large" in warned(replaced(small, macs=100))


def test_a_wrong_schedule_is_noticed():
    right = ts.load("fashion-s")
    wrong = dataclasses.replace(right, schedule=ts.make_schedule("linear"))
    warnings = calibrate([wrong, right], steps=6, conditions=6, cfg_scale=1.5).warnings
    assert any("does more damage than a linear filter" in each for each in warnings)


@pytest.mark.parametrize(
    ("networks", "options", "message"),
    [
        (1, {}, "at least two"),
        (2, dict(tolerance=-1), "tolerance must be at least 0, got -1"),
        (2, dict(tolerance=float("nan")), "tolerance must be a finite number, got nan"),
        (2, dict(budget=0.5), "the budget is a speed-up of at least 1"),
        (2, dict(budget=2, tolerance=0.1), "a tolerance or a budget, not both"),
        (2, dict(costs="hours"), "costs must be seconds or macs, got 'hours'"),
        (2, dict(conditions=3), "conditions must be a whole number of at least 4, got 3"),
        (2, dict(labels=[5]), "labels must be 0 to 2, got 5"),
        (2, dict(labels=[]), "labels must be a list of class numbers or names"),
        (2, dict(labels=[[0, 1], [0, 1, 2]]), "labels or texts for the same images, got 2 and 3"),
        (
            2,
            dict(labels=[[], []]),
            r"labels must be a list of class numbers .*, got \[\]",
        ),
        (2, dict(budget=101), "no plan is 101 times as quick as b alone; the quickest is 1.00"),
        (2, dict(solver="dmid"), "unknown solver 'dmid'"),
        (2, dict(steps=0), "steps"),
    ],
)
def test_bad_input(networks, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate([gaussian("a"), gaussian("b")][:networks], **options)


def test_other_bad_input(monkeypatch):
    networks = [gaussian("a"), gaussian("b")]
    with pytest.raises(ValueError, match="plans of 12 steps by 2 networks, got"):
        calibrate(networks).predict(ts.Plan.from_counts([3, 3]))
    with pytest.raises(ValueError, match="says nothing of multiply-adds; take costs='seconds'"):
        calibrate([gaussian("a", macs=0), gaussian("b")])
    distilled = [replaced(network, consistency=True) for network in networks]
    with pytest.raises(ValueError, match="with the solver 'lcm' no error outlives a step"):
        calibrate(distilled, solver="lcm")
    broken = gaussian("a", lambda x0, x, knot: x0 / 0)
    with pytest.raises(FloatingPointError, match="not finite"):
        calibrate([broken, gaussian("b")])
    # As users call it, without the tests' own checks of types.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"sampler must be a ts\.Sampler, got \[Network"):
        ts.calibrate(jax.random.key(0), networks)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = "--steps 6 --conditions 4 --costs macs"
    assert cli.main(f"calibrate {options} --picture a.png --budget 1.5x".split()) == 0
    said = capsys.readouterr().out
    assert "-> " in said
    assert "plan: plan.json (--plan plan.json), picture: a.png" in said
    assert Image.open("a.png").size[0] > 1000
    plan = ts.Plan.load("plan.json")
    assert plan.steps == 6
    assert plan.counts()[0] >= 2
    assert f"chosen: {plan.describe(['fashion-s', 'fashion-xl'])}, " in said
    assert (
        cli.main(
            ["sample", "--steps", "6", "--plan", "plan.json", "--labels", "0", "--out", "b.png"]
        )
        == 0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tolerance lots", "must be a number or per cent, got 'lots'"),
        ("--budget fast", "must be a factor such as 1.5x, got 'fast'"),
        ("--budget 99x --costs macs --steps 4 --conditions 4", "no plan is 99 times as quick as"),
        ("--networks fashion-xl", "at least two"),
        ("--conditions 1", "at least 4, got '1'"),
        ("--out .", "it is a folder"),
        ("--tolerance 5", "must be a share or per cent; is 5% meant?"),
        ("--picture a.jpg", "a.jpg"),
        ("--out a.png --picture a.png", "--out and --picture are one file; give two"),
    ],
)
def test_bad_commands(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(["calibrate", *arguments.split()])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
