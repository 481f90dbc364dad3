"""Plans: exact counts, properties, and what they refuse."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tstitch_jax import Plan, make_knots, make_schedule

LINEAR = make_schedule("linear")


@pytest.mark.parametrize(
    ("fractions", "steps", "counts"),
    [
        ([0.4, 0.6], 20, (8, 12)),
        ([0.5, 0.5], 100, (50, 50)),
        ([0.1, 0.9], 50, (5, 45)),
        ([0.0, 1.0], 50, (0, 50)),
        ([1.0, 0.0], 50, (50, 0)),
        ([0.1, 0.2, 0.7], 1000, (100, 200, 700)),  # 0.1 + 0.2 is 0.3
        ([0.3, 0.7], 1000, (300, 700)),
        ([0.4, 0.0, 0.6], 20, (8, 0, 12)),
        ([1.0], 7, (7,)),
    ],
)
def test_counts(fractions, steps, counts):
    plan = Plan.from_fractions(fractions, make_knots(LINEAR, steps), LINEAR)
    assert plan.counts() == counts
    assert plan.networks.dtype == np.int32
    assert [k for k, _ in plan.runs()] == [k for k, n in enumerate(counts) if n]


@pytest.mark.parametrize("steps", [4, 20, 1000])
def test_fractions_of_a_flow(steps):
    flow = make_schedule("flow")
    for first in (0.0, 0.25, 0.5, 1.0):
        plan = Plan.from_fractions([first, 1 - first], make_knots(flow, steps), flow)
        assert plan.counts()[0] == int(first * steps)


@given(
    parts=st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any),
    steps=st.integers(1, 120),
)
def test_fractions_give_a_falling_plan_of_the_right_length(parts, steps):
    fractions = [p / sum(parts) for p in parts]
    plan = Plan.from_fractions(fractions, make_knots(LINEAR, steps), LINEAR)
    assert plan.steps == sum(plan.counts()) == steps
    assert (np.diff(plan.networks) >= 0).all()
    bounds = np.cumsum([0.0, *fractions])
    for k, count in enumerate(plan.counts()):
        # Rounded times lie at most one step off, at either end of a part.
        assert abs(count - steps * (bounds[k + 1] - bounds[k])) <= 2
        assert count == 0 or fractions[k] > 0
    assert plan.cost([1.0] * len(fractions)) == steps


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any))
def test_counts_round_trip(counts):
    plan = Plan.from_counts(counts)
    assert plan.counts() == tuple(counts)
    assert plan.describe() == ", ".join(f"{k} x {n}" for k, n in enumerate(counts) if n)


def test_more_of_the_small_network_never_costs_more():
    knots = make_knots(LINEAR, 37)
    costs = [
        Plan.from_fractions([f, 1 - f], knots, LINEAR).cost([1.0, 10.0])
        for f in np.linspace(0, 1, 41).tolist()
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == 370
    assert costs[-1] == 37


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ([0.5, 0.6], "must sum to 1, got 0.5, 0.6"),
        ([-0.5, 1.5], "between 0 and 1"),
        ([float("nan"), 1.0], "between 0 and 1"),
        ([], "give some fractions, got none"),
    ],
)
def test_bad_fractions(fractions, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_fractions(fractions, make_knots(LINEAR, 10), LINEAR)


def test_bad_plans():
    with pytest.raises(ValueError, match="holds numbers 0 to 1, got 0 to 2"):
        Plan.from_list([0, 2], 2)
    with pytest.raises(ValueError, match="holds numbers 0 to 1, got -1 to 1"):
        Plan.from_list([-1, 1], 2)
    with pytest.raises(ValueError, match="whole numbers"):
        Plan.from_list([], 2)
    with pytest.raises(ValueError, match="whole numbers, at least 0, not all 0"):
        Plan.from_counts([0, 0])
    with pytest.raises(ValueError, match="as many costs"):
        Plan.from_counts([1, 1]).cost([1.0])
