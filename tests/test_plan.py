"""Plans: exact counts, properties, and what they refuse."""

import contextlib
import json
from fractions import Fraction

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, strategies as st

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
        ([float("nan"), 1.0], "must be a finite number, got nan"),
        ([], "give some fractions, got none"),
    ],
)
def test_bad_fractions(fractions, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_fractions(fractions, make_knots(LINEAR, 10), LINEAR)


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("steps", [4, 20, 50, 100])
def test_published_rules(fraction, steps):
    for spacing in ("respaced", "leading", "leading+1", "trailing"):
        knots = make_knots(LINEAR, steps, spacing)
        times = knots.time[:-1].astype(int)
        dit = Plan.dit(fraction, knots, LINEAR)
        # In exact arithmetic, which the comparison with a tolerance stands for
        f = Fraction(str(fraction))
        expected = [0 if Fraction(int(t), 1000) >= 1 - f else 1 for t in times]
        np.testing.assert_array_equal(dit.networks, expected)
        ldm = Plan.ldm(fraction, knots, LINEAR)
        expected = [0 if f == 1 or Fraction(int(t), 1000) > 1 - f else 1 for t in times]
        np.testing.assert_array_equal(ldm.networks, expected)
        assert dit.num_networks == ldm.num_networks == 2
    expected = [0 if Fraction(i + 1, steps) <= f else 1 for i in range(steps)]
    np.testing.assert_array_equal(Plan.stable_diffusion(fraction, steps).networks, expected)
    expected = [0 if f > 0 and (f == 1 or Fraction(i, steps) <= f) else 1 for i in range(steps)]
    np.testing.assert_array_equal(Plan.lcm(fraction, steps).networks, expected)


def test_published_counts():
    """Figures that the rules give, so that an error in both spellings above would show."""
    knots = make_knots(LINEAR, 50, "leading+1")  # 981, 961, ..., 1
    assert Plan.ldm(0.5, knots, LINEAR).counts() == (25, 25)  # 501 is above 500
    assert Plan.ldm(0.0, knots, LINEAR).counts() == (0, 50)
    assert Plan.ldm(1.0, knots, LINEAR).counts() == (50, 0)
    assert Plan.ldm(0.5, make_knots(LINEAR, 50, "leading"), LINEAR).counts() == (24, 26)
    assert Plan.dit(0.5, make_knots(LINEAR, 50, "leading"), LINEAR).counts() == (25, 25)
    assert Plan.stable_diffusion(0.4, 50).counts() == (20, 30)
    assert Plan.stable_diffusion(0.39, 50).counts() == (19, 31)
    assert Plan.lcm(0.5, 4).counts() == (3, 1)
    assert Plan.lcm(0.25, 4).counts() == (2, 2)
    assert Plan.lcm(0.01, 4).counts() == (1, 3)
    assert Plan.lcm(0.0, 4).counts() == (0, 4)
    assert Plan.lcm(1.0, 4).counts() == (4, 0)


def test_by_time_snr_and_step():
    knots = make_knots(LINEAR, 10)  # 999, 888, ..., 111, 0
    assert Plan.from_times([500], knots).counts() == (5, 5)
    assert Plan.from_times([888], knots).counts() == (2, 8)  # at least
    assert Plan.from_times([700, 200], knots).counts() == (3, 5, 2)
    assert Plan.from_times([2000, 200], knots).counts() == (0, 8, 2)
    assert Plan.from_times([np.inf, -np.inf], knots).counts() == (0, 10, 0)
    odd = make_knots(LINEAR, [999, 500.3, 100.1, 0.3])  # none of which float32 holds
    assert Plan.from_times([500.3, 100.1], odd).counts() == (2, 1, 1)
    snr = (knots.alpha[:-1] / knots.sigma[:-1]) ** 2
    assert Plan.from_snr([float(snr[3])], knots).counts() == (4, 6)  # at most
    assert Plan.from_snr([float(snr[3]) * 0.99, 1e9], knots).counts() == (3, 7, 0)
    # A ratio means the same noise on another schedule.
    flow = make_schedule("flow")
    seen = make_knots(flow, 100)
    plan = Plan.from_snr([1.0], seen)
    assert plan.counts() == (51, 49)  # t from 1 to 0.5
    assert Plan.from_times([], knots).counts() == (10,)
    assert Plan.from_switches([2, 2, 5], steps=9).counts() == (2, 0, 3, 4)


def test_other_orders():
    assert Plan.interleaved([1, 1], 5).networks.tolist() == [0, 1, 0, 1, 0]
    assert Plan.interleaved([1, 2], 5).networks.tolist() == [0, 1, 1, 0, 1]
    plan = Plan.from_counts([2, 3]).reversed()
    assert plan.describe(["small", "large"]) == "large x 3, small x 2"
    first, again = (Plan.decreasing(400, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.networks, again.networks)
    assert (first.networks != Plan.decreasing(400, seed=4).networks).any()
    early, late = first.networks[:200], first.networks[200:]
    assert 0.15 < early.mean() < 0.35  # a quarter of the first half
    assert 0.65 < late.mean() < 0.85
    assert Plan.decreasing(10, 0, first=1.0, last=1.0).counts() == (10, 0)
    assert Plan.decreasing(10, 0, first=0.0, last=0.0).counts() == (0, 10)
    plan = Plan.from_list([0, 1, 1, 0], 2).last_steps(3)
    assert plan.networks.tolist() == [1, 1, 0]


def test_cost_and_speedup():
    plan = Plan.from_counts([40, 60])
    assert plan.speedup([1, 10]) == pytest.approx(1000 / 640)
    assert plan.reversed().speedup([1, 10]) == plan.speedup([1, 10])
    assert Plan.from_counts([0, 7]).speedup([1.0, 10.0]) == 1
    with pytest.raises(ValueError, match="costs must be above 0"):
        plan.speedup([0.0, 0.0])


plans = st.integers(1, 4).flatmap(
    lambda k: st.lists(st.integers(0, k - 1), min_size=1, max_size=60).map(
        lambda networks: Plan.from_list(networks, k)
    )
)


@given(plans)
def test_json_round_trip(plan):
    back = Plan.from_json(plan.to_json())
    np.testing.assert_array_equal(back.networks, plan.networks)
    assert back.num_networks == plan.num_networks
    assert back.networks.dtype == np.int32
    counts = plan.counts()
    assert sum(counts) == plan.steps
    assert plan.cost(range(1, plan.num_networks + 1)) == sum(
        (k + 1) * n for k, n in enumerate(counts)
    )
    np.testing.assert_array_equal(plan.reversed().reversed().networks, plan.networks)


def test_files(tmp_path):
    file = tmp_path / "plan.json"
    Plan.from_counts([3, 4]).save(file)
    assert Plan.load(file).counts() == (3, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"cannot read the plan .*plan.json"):
        Plan.load(file)
    assert Plan.from_json(Plan.from_list([0, 1], np.int64(2)).to_json()).num_networks == 2
    with pytest.raises(OSError, match=r"cannot write .*plan.json: No such file"):
        Plan.from_counts([1]).save(tmp_path / "nowhere" / "plan.json")
    with pytest.raises(ValueError, match=r"cannot read the plan .*nothing.json: .*No such file"):
        Plan.load(tmp_path / "nothing.json")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["num_networks", "runs", "x"]), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_any_json_is_a_plan_or_one_error(data):
    with contextlib.suppress(ValueError):
        assert Plan.from_json(json.dumps(data)).steps >= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a plan is JSON such as"),
        ("[" * 100_000, "a plan is JSON such as"),
        ("{}", "a plan is JSON such as"),
        ('{"num_networks": 2, "runs": []}', "whole numbers"),
        ('{"num_networks": 2, "runs": [[0, 0]]}', "a plan is JSON such as"),
        ('{"num_networks": 2, "runs": [[2, 1]]}', "holds numbers 0 to 1, got 2 to 2"),
        ('{"num_networks": true, "runs": [[0, 1]]}', "a plan is JSON such as"),
        ('{"num_networks": 2, "runs": [[0, 9e9]]}', "a plan is JSON such as"),
        ('{"num_networks": 2, "runs": [[0, 1000001]]}', "at most 1000000 steps"),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda k: Plan.from_times([1, 2], k), "times to switch at must not rise, got"),
        (lambda k: Plan.from_times(["a"], k), "times to switch at must be a list of numbers"),
        (lambda k: Plan.from_times([float("nan")], k), "must be a list of numbers"),
        (lambda k: Plan.from_snr([2, 1], k), "ratios to switch at must not fall"),
        (lambda k: Plan.from_switches([3, 2], 10), "that do not fall, 0 to 10, got"),
        (lambda k: Plan.from_switches([11], 10), "that do not fall, 0 to 10, got"),
        (lambda k: Plan.from_switches([0.5], 10), "switches must be whole numbers"),
        (lambda k: Plan.interleaved([0, 0], 10), "not all 0"),
        (lambda k: Plan.from_times([1], None), "a plan by times needs the knots, got None"),
        (lambda k: Plan.from_snr([1.0], LINEAR), "a plan by ratios needs the knots, got Schedule"),
        (lambda k: Plan.from_times([[1], [2, 3]], k), "must be a list of numbers, got .*3"),
        (lambda k: Plan.from_list([[1], [2, 3]], 4), "a plan is a list of whole numbers"),
        (
            lambda k: Plan.from_list([0], 10**400),
            "num_networks must be a whole number, 1 to 2147483647, got 1.{79}$",
        ),
        (lambda k: Plan.from_list([0], 10**5000), "a whole number, .*, got int of too many digits"),
        (lambda k: Plan.from_counts([[1], [2, 3]]), "counts must be whole numbers"),
        (lambda k: Plan.from_counts([10**6, 10**6]), "at most 1000000 steps"),
        (lambda k: Plan.from_switches([[1], [2, 3]], 10), "switches must be whole numbers"),
        (
            lambda k: Plan.interleaved([1, 1], 0),
            "steps must be a whole number, 1 to 1000000, got 0",
        ),
        (lambda k: Plan.decreasing(2**31 - 1, 0), "1 to 1000000, got 2147483647"),
        (lambda k: Plan.decreasing(10, 0, first=1.5), "first probability must be between 0 and 1"),
        (lambda k: Plan.decreasing(4, 0, "a", 0), "first probability must be a number, got 'a'"),
        (lambda k: Plan.dit(1.5, k, LINEAR), "fraction must be between 0 and 1, got 1.5"),
        (lambda k: Plan.dit(10**400, k, LINEAR), "fraction must be a finite number, got 1000"),
        (
            lambda k: Plan.from_fractions([10**400, 0], k, LINEAR),
            "fractions must be a finite number, got 1000",
        ),
        (lambda k: Plan.ldm(float("nan"), k, LINEAR), "must be a finite number, got nan"),
        (lambda k: Plan.stable_diffusion(-0.1, 10), "between 0 and 1, got -0.1"),
        (
            lambda k: Plan.stable_diffusion(0.1, 0),
            "steps must be a whole number, 1 to 1000000, got 0",
        ),
        (lambda k: Plan.lcm(2.0, 10), "between 0 and 1, got 2"),
        (lambda k: Plan.dit("0.5", k, LINEAR), "fraction must be a number, got '0.5'"),
        (lambda k: Plan.lcm(None, 10), "fraction must be a number, got None"),
        (
            lambda k: Plan.from_list([0, 1], 2.0),
            "num_networks must be a whole number, 1 to 2147483647, got 2.0",
        ),
        (lambda k: Plan.from_counts([10**13]), "at most 1000000 steps"),
        (lambda k: Plan.from_switches([20], "50"), "steps must be a whole number"),
        (lambda k: Plan.decreasing(5, "a"), "seed must be a whole number of at least 0, got 'a'"),
        (lambda k: Plan.from_fractions([1.0], LINEAR, k), "needs the knots and the schedule"),
        (
            lambda k: Plan.from_fractions([1.0], k, make_schedule("flow")),
            "knots start at time 999, but the schedule 'flow' ends at 1",
        ),
        (lambda k: Plan.from_fractions("10", k, LINEAR), "fractions must be a list of numbers"),
        (lambda k: Plan.from_json(None), "a plan is JSON such as"),
        (lambda k: Plan.from_counts([2, 2]).cost(5), "as many costs, finite numbers, got 5"),
        (lambda k: Plan.from_counts([2, 2]).cost([float("nan"), 1]), "as many costs"),
        (lambda k: Plan.from_counts([2, 2]).cost([[1], [2, 3]]), "as many costs"),
        (lambda k: Plan.from_counts([2, 2]).describe(["a"]), "2 networks need as many names"),
        (lambda k: Plan.from_counts([2, 2]).describe(5), "2 networks need as many names, got 5"),
        (lambda k: Plan.from_counts([2, 2]).save(""), "path must name a file to write the plan to"),
        (
            lambda k: Plan.from_counts([2, 2]).last_steps(2.5),
            "last steps must be a whole number, 1 to 4, got 2.5",
        ),
        (
            lambda k: Plan.from_counts([2, 2]).last_steps(5),
            "last steps must be a whole number, 1 to 4, got 5",
        ),
    ],
)
def test_bad_constructors(make, message, monkeypatch):
    # As users call it, without the tests' own checks of types.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        make(make_knots(LINEAR, 10))


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


def test_many_runs_are_told_by_their_counts():
    plan = Plan.interleaved([1, 2], 9)
    assert plan.describe(["a", "b"], most=4) == "a x 3, b x 6 in 6 runs"
    assert plan.describe(["a", "b"], most=6) == plan.describe(["a", "b"])
    assert plan.describe(most=1) == "0 x 3, 1 x 6 in 6 runs"


def test_a_plan_shows_itself():
    plan = Plan.from_counts([8, 12])
    assert repr(plan) == "Plan(0 x 8, 1 x 12)"
    assert len(repr(Plan.from_list([0, 1] * 500, 2))) < 80
    html = plan._repr_html_()
    assert html.count("<div") == html.count("</div>") == 3
    assert "flex:8" in html
    assert "0 x 12" not in html
    assert "2 networks" in repr(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, plan)))
