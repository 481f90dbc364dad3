"""Schedules, respacing and knots."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tstitch_jax import make_knots, make_schedule, respace

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
    with pytest.raises(ValueError, match="at least 21, got 3"):
        make_schedule("linear", 3)
