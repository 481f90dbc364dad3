"""Schedules, respacing and knots."""

import contextlib

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from helpers import GOLDEN, tiny_card
from hypothesis import given, strategies as st

from tstitch_jax import SPACINGS, last_steps, make_knots, make_schedule, match_snr, respace
from tstitch_jax.models.build import check_card

LINEAR = make_schedule("linear")
NAMES = ["linear", "scaled_linear", "cosine"]


@pytest.mark.parametrize("steps", [100, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_variance_preserving(name, steps):
    schedule = make_schedule(name, steps)
    np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1, rtol=1e-12)
    assert (np.diff(schedule.alpha) < 0).all()
    assert schedule.num_train_steps == steps
    assert schedule.alpha.dtype == np.float64


def test_known_values():
    assert make_schedule("linear").alpha[-1] ** 2 == pytest.approx(4.0358297e-05, rel=1e-7)
    # Stable Diffusion's last cumulative alpha.
    assert make_schedule("scaled_linear").alpha[-1] ** 2 == pytest.approx(0.00466009, rel=1e-5)
    cosine = make_schedule("cosine")
    t = 500
    expected = (np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2) / (
        np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    )
    assert cosine.alpha[t - 1] ** 2 == pytest.approx(expected, rel=1e-9)


def test_flow():
    flow = make_schedule("flow", 100)
    np.testing.assert_allclose(flow.alpha + flow.sigma, 1)
    np.testing.assert_array_equal(flow.sigma, flow.times)
    assert flow.times[-1] == 1
    np.testing.assert_array_equal(make_knots(flow, 4).time, [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_array_equal(make_knots(flow, "4").alpha, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(make_knots(flow, "2,2").time, [1, 0.51, 0.5, 0.01, 0], rtol=1e-6)


def test_equality_is_of_the_process():
    assert make_schedule("linear") == make_schedule("linear")
    assert make_schedule("linear") != make_schedule("linear", 500)
    assert make_schedule("linear") != make_schedule("cosine")


@given(st.integers(21, 2000), st.data())
def test_respaced_times(total, data):
    sections = data.draw(st.integers(1, 4))
    counts = [data.draw(st.integers(1, total // sections)) for _ in range(sections)]
    kept = respace(total, ",".join(map(str, counts)))
    assert len(kept) == sum(counts)
    assert (np.diff(kept) > 0).all()
    assert kept[0] == (total - 1 if counts == [1] else 0)
    assert kept[-1] < total
    if sections == 1:
        assert kept[-1] == total - 1


@given(st.text(max_size=12))
def test_any_text_is_a_spec_or_one_error(text):
    with contextlib.suppress(ValueError):
        assert 1 <= len(respace(1000, text)) <= 1000


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (0, "at least 1, got 0"),
        (-3, "at least 1"),
        (1001, "at most the 1000 training times, got 1001"),
        ("ten", "must be a number like 50"),
        ("10,0", "at least 1"),
        ("600,1", "section 1 of '600,1' holds 500 times"),
        ("ddim51", "no whole stride .* give '51'"),
        ("2.5", "must be a number"),
    ],
)
def test_bad_steps(spec, message):
    with pytest.raises(ValueError, match=message):
        respace(1000, spec)


@pytest.mark.parametrize("name", [*NAMES, "flow"])
def test_knots(name):
    schedule = make_schedule(name)
    knots = make_knots(schedule, 50)
    assert knots.steps == 50
    for leaf in (knots.index, knots.time, knots.alpha, knots.sigma):
        assert leaf.shape == (51,)
    assert (np.diff(knots.time[:-1]) < 0).all()
    assert (np.diff(knots.alpha) > 0).all()
    assert (knots.alpha[-1], knots.sigma[-1]) == (1, 0)
    assert knots.alpha.dtype == np.float32
    np.testing.assert_array_equal(knots.index, np.arange(51))


def test_unknown_schedule_says_the_near_one():
    with pytest.raises(ValueError, match="unknown schedule 'linaer'; did you mean 'linear'"):
        make_schedule("linaer")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: make_schedule("linear", 3),
            "num_train_steps must be a whole number, 21 to 1048576, got 3",
        ),
        (
            lambda: make_schedule("linear", 10**400),
            "must be a whole number, 21 to 1048576, got 1000",
        ),
        (lambda: make_schedule(["linear"]), r"unknown schedule \['linear'\]; did you mean"),
        (lambda: make_schedule("linear", betas=[[1e-4], [1e-4, 0.02]]), "betas are a first and a"),
        (lambda: respace(1000, "9" * 5000), "a number like 50, sections .* got '9{79}$"),
        (lambda: respace(1000, 10**400), "at most the 1000 training times, got 10{79}$"),
        (lambda: respace(1000, 10**5000), "got int of too many digits"),
        (lambda: make_knots("linear", 4), "schedule must be what ts.make_schedule returns, got"),
        (lambda: make_knots(LINEAR, 4, ["lcm"]), r"unknown spacing \['lcm'\]; did you mean 'lcm'"),
        (lambda: make_knots(LINEAR, [[1], [2, 3]]), "must be a whole number or a list of times"),
        (lambda: make_knots(LINEAR, 5.0), "must be a whole number or a list of times, got 5.0"),
        (lambda: make_knots(LINEAR, "9" * 5000, "karras"), "a plain number of steps, got '999"),
        (lambda: make_knots(LINEAR, 10**400, "karras"), "at most the 1000 .* got 10{79}$"),
        (lambda: make_knots(make_schedule("flow"), 10**5000), "got int of too many digits"),
    ],
)
def test_bad_input(make, message, monkeypatch):
    # As users call it, without the tests' own checks of types.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        make()


def test_arrays_of_any_kind():
    for betas in (np.array([1e-4, 0.02]), (1e-4, 0.02)):
        assert make_schedule("linear", betas=betas) == LINEAR
    for times in (np.array([900, 10]), jnp.array([900.0, 10.0])):
        np.testing.assert_array_equal(make_knots(LINEAR, times).time, [900, 10, 0])


@pytest.fixture(scope="module")
def diffusers():
    with np.load(GOLDEN / "schedulers.npz") as arrays:
        return {k: v for k, v in arrays.items() if k.startswith(("spacing", "zero"))}


@pytest.mark.parametrize("name", ["leading", "leading+1", "trailing", "lcm"])
def test_spacings_by_time(name, diffusers):
    expected = diffusers[f"spacing/{name}"]
    knots = make_knots(LINEAR, len(expected), name)
    np.testing.assert_array_equal(knots.time[:-1], expected)
    kept = expected.astype(int)
    np.testing.assert_array_equal(knots.alpha[:-1], LINEAR.alpha[kept].astype(np.float32))


@pytest.mark.parametrize("name", ["linspace", "karras", "exponential"])
def test_spacings_by_noise_level(name, diffusers):
    knots = make_knots(LINEAR, 10, name)
    levels = knots.sigma[:-1] / knots.alpha[:-1]
    np.testing.assert_allclose(levels, diffusers[f"spacing/{name}"], rtol=1e-4)
    # Between training times diffusers goes by the logarithm of the level, here it is the angle.
    np.testing.assert_allclose(knots.time[:-1], diffusers[f"spacing/{name}/times"], atol=0.02)
    np.testing.assert_allclose(knots.alpha**2 + knots.sigma**2, 1, rtol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", [*NAMES, "flow"])
def test_every_spacing(name, spacing):
    schedule = make_schedule(name)
    if name == "flow" and spacing in ("karras", "exponential"):
        with pytest.raises(ValueError, match=r"needs a finite noise level .* 'flow' ends in pure"):
            make_knots(schedule, 5, spacing)
        return
    for steps in (1, 2, 7, "20", 50):
        knots = make_knots(schedule, steps, spacing)
        assert knots.steps == int(steps)
        assert (np.diff(knots.time[:-1]) < 0).all()
        assert (np.diff(knots.sigma / (knots.alpha + knots.sigma)) < 0).all()
        assert (knots.time[-1], knots.alpha[-1], knots.sigma[-1]) == (0, 1, 0)
        low, high = schedule.times[[0, -1]]
        assert (knots.time[:-1] >= min(low, high / int(steps))).all()
        assert (knots.time[:-1] <= high).all()


@given(st.sampled_from(SPACINGS), st.integers(1, 1000))
def test_every_number_of_steps(spacing, steps):
    with contextlib.suppress(ValueError):
        knots = make_knots(LINEAR, steps, spacing)
        assert knots.steps == steps
        assert (np.diff(knots.time[:-1]) < 0).all()
        assert np.isfinite(knots.alpha).all()


def test_given_times():
    knots = make_knots(LINEAR, [999, 500.5, 20])
    np.testing.assert_array_equal(knots.time, [999, 500.5, 20, 0])
    assert LINEAR.alpha[501] < knots.alpha[1] < LINEAR.alpha[500]
    np.testing.assert_allclose(knots.alpha**2 + knots.sigma**2, 1, rtol=1e-6)
    flow = make_knots(make_schedule("flow"), (1.0, 0.25))
    np.testing.assert_array_equal(flow.sigma, [1, 0.25, 0])


def test_times_that_float32_cannot_tell_apart():
    with pytest.raises(ValueError, match="by enough to tell in float32"):
        make_knots(LINEAR, [1.0000001, 1.0, 0.5])


def test_zero_terminal_snr(diffusers):
    """Lin et al. 2024, algorithm 1, as diffusers computes it."""
    schedule = make_schedule("linear", zero_snr=True)
    np.testing.assert_allclose(schedule.alpha**2, diffusers["zero_snr/alphas_cumprod"], atol=1e-6)
    assert schedule.alpha[-1] == 0
    assert schedule.sigma[-1] == 1
    assert schedule.alpha[0] == pytest.approx(LINEAR.alpha[0], rel=1e-12)
    assert schedule != LINEAR
    knots = make_knots(schedule, 10)
    assert knots.alpha[0] == 0
    assert np.isfinite(knots.time).all()
    with pytest.raises(ValueError, match="'flow' ends at 0 already"):
        make_schedule("flow", zero_snr=True)
    with pytest.raises(ValueError, match="eps network cannot say x0 where the schedule 'linear'"):
        check_card(tiny_card(schedule={"name": "linear", "zero_snr": True}))


def test_matched_grids():
    flow = make_schedule("flow")
    knots = make_knots(LINEAR, 25)
    there = match_snr(knots, flow)
    np.testing.assert_allclose(
        there.sigma[:-1] / there.alpha[:-1], knots.sigma[:-1] / knots.alpha[:-1], rtol=1e-4
    )
    np.testing.assert_allclose(there.time, there.sigma, atol=1e-7)
    back = match_snr(there, LINEAR)
    np.testing.assert_allclose(back.time, knots.time, atol=0.02)
    assert (there.alpha[-1], there.sigma[-1], there.time[-1]) == (1, 0, 0)
    # Pure noise, which the other process has not: its own noisiest point.
    noisy = match_snr(make_knots(flow, 4), LINEAR)
    assert noisy.time[0] == 999
    np.testing.assert_allclose(noisy.sigma[0], LINEAR.sigma[-1])


def test_last_steps():
    knots = make_knots(LINEAR, 10)
    tail = last_steps(knots, 3)
    np.testing.assert_array_equal(tail.time, knots.time[-4:])
    np.testing.assert_array_equal(tail.index, [0, 1, 2, 3])
    assert tail.steps == 3
    for count in (0, 11):
        with pytest.raises(ValueError, match=f"last steps must be 1 to 10, got {count}"):
            last_steps(knots, count)
