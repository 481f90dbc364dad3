"""Targets to predictions, and guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Gaussian, relative, tiny_network
from hypothesis import given, strategies as st

import tstitch_jax as ts
from tstitch_jax.core.prediction import TARGETS, make_target, predict


@given(
    target=st.sampled_from(TARGETS),
    angle=st.floats(0.05, 1.5),
    scale=st.floats(0.5, 2.0),
    seed=st.integers(0, 1000),
)
def test_targets_invert(target, angle, scale, seed):
    """Also outside the variance-preserving circle."""
    generator = np.random.default_rng(seed)
    x0, eps = (jnp.asarray(generator.standard_normal((2, 3, 3, 1)), jnp.float32) for _ in range(2))
    alpha, sigma = jnp.float32(scale * np.cos(angle)), jnp.float32(scale * np.sin(angle))
    output = make_target(target, x0, eps, alpha, sigma)
    found = predict(target, output, alpha * x0 + sigma * eps, alpha, sigma)
    np.testing.assert_allclose(found.x0, x0, atol=2e-4)
    np.testing.assert_allclose(found.eps, eps, atol=2e-4)


def test_unknown_target():
    with pytest.raises(ValueError, match="unknown target 'epsilon'; did you mean 'eps'"):
        ts.as_denoiser(lambda *a: a[1], None, "epsilon")


@pytest.fixture(scope="module")
def setting():
    network = tiny_network()
    knots = ts.make_knots(network.schedule, 10)
    knot = jax.tree.map(lambda leaf: jnp.asarray(leaf[4]), knots)
    keys = ts.image_keys(jax.random.key(0), jnp.arange(3))
    cond = ts.Condition(jnp.array([1, 5, 9]), jnp.full(3, 10))
    return network.denoiser, knot, ts.draw_noise(keys, 0, (8, 8, 4)), cond


def halves(setting):
    """The conditional and the unconditional prediction, each evaluated alone."""
    denoiser, knot, x, cond = setting
    return denoiser(x, knot, cond), denoiser(x, knot, ts.Condition(cond.null))


def test_guidance_is_its_definition(setting):
    denoiser, knot, x, cond = setting
    given, nothing = halves(setting)
    found = ts.cfg(denoiser, 3.0)(x, knot, cond)
    assert relative(found.eps, nothing.eps + 3 * (given.eps - nothing.eps)) < 1e-5
    assert relative(found.variance, given.variance) < 1e-5
    assert relative(knot.alpha * found.x0 + knot.sigma * found.eps, x) < 1e-5


def test_guided_channels(setting):
    denoiser, knot, x, cond = setting
    given, _ = halves(setting)
    everything = ts.cfg(denoiser, 3.0)(x, knot, cond)
    some = ts.cfg(denoiser, 3.0, channels=3)(x, knot, cond)
    assert relative(some.eps[..., :3], everything.eps[..., :3]) < 1e-5
    assert relative(some.eps[..., 3:], given.eps[..., 3:]) < 1e-5
    with pytest.raises(ValueError, match="1 to 4, got 5"):
        ts.cfg(denoiser, 3.0, channels=5)(x, knot, cond)


def test_scale_per_step(setting):
    denoiser, knot, x, cond = setting
    scales = jnp.arange(10, dtype=jnp.float32)  # the knot is step 4
    found = ts.cfg(denoiser, scales)(x, knot, cond)
    expected = ts.cfg(denoiser, 4.0)(x, knot, cond)
    assert relative(found.eps, expected.eps) < 1e-5
    with pytest.raises(ValueError, match=r"shape \(10,\), got \(9,\)"):
        ts.cfg(denoiser, scales[:9])(x, knot, cond)


def test_guidance_and_stitching_in_either_order(setting):
    denoiser, knot, x, cond = setting
    plan = ts.Plan.from_list([0, 1] * 5, 2)
    pair = [denoiser, tiny_network(1).denoiser]
    outside = ts.cfg(ts.stitch(pair, plan), 2.0)
    inside = ts.stitch([ts.cfg(each, 2.0) for each in pair], plan)
    a, b = (each(x, knot, cond) for each in (outside, inside))
    assert relative(a.x0, b.x0) < 1e-5
    with pytest.raises(ValueError, match="the plan has 4 steps, the knots have 10"):
        ts.stitch(pair, ts.Plan.from_counts([2, 2]))(x, knot, cond)
    with pytest.raises(ValueError, match="2 networks, got 1 denoisers"):
        ts.stitch(pair[:1], plan)


def test_variance_can_be_left_out(setting):
    denoiser, knot, x, cond = setting
    assert ts.without_variance(denoiser)(x, knot, cond).variance is None
    network, plain = tiny_network(), tiny_network(learned_variance=False)
    with pytest.raises(ValueError, match="needs a network that learned its variance"):
        ts.run(
            plain.denoiser,
            ts.ddpm("learned"),
            ts.make_knots(plain.schedule, 3),
            x,
            cond=cond,
            keys=ts.image_keys(jax.random.key(0), jnp.arange(3)),
        )
    # If one of a pair has none, both sample with the fixed variance.
    images = ts.sample(
        jax.random.key(0), [network, plain], labels=[1], fractions=[0.5, 0.5], steps=4,
        solver="ddpm", decode=False,
    )  # fmt: skip
    assert np.isfinite(images).all()


def test_rescaled_guidance(setting):
    """Lin et al. 2024, equations 14 to 16, on v, in NumPy."""
    denoiser, knot, x, cond = setting
    given, nothing = halves(setting)
    a, s = float(knot.alpha), float(knot.sigma)

    def v(prediction):
        return a * np.asarray(prediction.eps) - s * np.asarray(prediction.x0)

    guided = v(nothing) + 4 * (v(given) - v(nothing))
    factor = v(given).std(axis=(1, 2, 3)) / guided.std(axis=(1, 2, 3))
    expected = guided * (0.7 * factor + 0.3)[:, None, None, None]
    found = ts.cfg(denoiser, 4.0, rescale=0.7)(x, knot, cond)
    assert relative(v(found), expected) < 1e-4
    assert relative(knot.alpha * found.x0 + knot.sigma * found.eps, x) < 1e-5
    assert relative(found.variance, given.variance) < 1e-5
    found = ts.cfg(denoiser, 4.0, channels=3, rescale=0.7)(x, knot, cond)
    assert relative(found.x0[..., 3:], given.x0[..., 3:]) < 1e-5
    factor = v(given)[..., :3].std(axis=(1, 2, 3)) / guided[..., :3].std(axis=(1, 2, 3))
    expected = guided[..., :3] * (0.7 * factor + 0.3)[:, None, None, None]
    assert relative(v(found)[..., :3], expected) < 1e-4
    same = ts.cfg(denoiser, 1.0, rescale=1.0)(x, knot, cond)
    assert relative(same.x0, given.x0) < 1e-4
    with pytest.raises(ValueError, match=r"rescale must be between 0 and 1, got 2"):
        ts.cfg(denoiser, 1.0, rescale=2.0)


def test_autoguidance_is_its_definition(setting):
    denoiser, knot, x, cond = setting
    weak = tiny_network(1).denoiser
    strong_prediction, weak_prediction = (each(x, knot, cond) for each in (denoiser, weak))
    found = ts.autoguide(denoiser, weak, 2.5)(x, knot, cond)
    expected = jax.tree.map(lambda w, s: w + 2.5 * (s - w), weak_prediction, strong_prediction)
    assert relative(found.x0, expected.x0) < 1e-5
    assert relative(found.eps, expected.eps) < 1e-5
    assert relative(found.variance, strong_prediction.variance) < 1e-5
    some = ts.autoguide(denoiser, weak, 2.5, channels=1)(x, knot, cond)
    assert relative(some.eps[..., :1], expected.eps[..., :1]) < 1e-5
    assert relative(some.eps[..., 1:], strong_prediction.eps[..., 1:]) < 1e-5


def batch_sizes(guide, scales):
    """The batch size of each evaluation of a denoiser in a guided run, as recorded at run time."""
    sizes = []

    def spy(x, knot, cond, /):
        jax.debug.callback(lambda size=x.shape[0]: sizes.append(size))
        return ts.Prediction(jnp.zeros_like(x), x)

    knots = ts.make_knots(ts.make_schedule("linear"), len(scales))
    x, labels = jnp.ones((3, 1, 1, 1)), jnp.zeros(3, jnp.int32)
    denoiser, cond = guide(spy, jnp.asarray(scales, jnp.float32)), ts.Condition(labels, labels)
    jax.block_until_ready(jax.jit(lambda x: ts.run(denoiser, ts.ddim(), knots, x, cond=cond))(x))
    jax.effects_barrier()
    return sorted(sizes)


def test_outside_the_interval_nothing_more_is_computed():
    scales = [1, 1, 3, 3, 0.5, 1]
    assert batch_sizes(ts.cfg, scales) == [3, 3, 3, 6, 6, 6]
    assert batch_sizes(lambda spy, s: ts.autoguide(spy, spy, s), scales) == [3] * 9
    # With both, the weak network is never guided itself.
    sizes = batch_sizes(lambda spy, s: ts.autoguide(ts.cfg(spy, s), spy, s), scales)
    assert sizes == [3] * 6 + [6] * 3


def test_the_interval_is_of_noise_levels():
    schedule = ts.make_schedule("linear")
    knots = ts.make_knots(schedule, 50)
    levels = knots.sigma[:-1] / knots.alpha[:-1]
    found = ts.guidance_interval(2.0, knots, 0.3, 1.5)
    np.testing.assert_array_equal(found, np.where((levels > 0.3) & (levels <= 1.5), 2, 1))
    assert found.dtype == np.float32
    # Pure noise, where a flow starts, lies only in an interval without an upper end.
    flow = ts.make_knots(ts.make_schedule("flow"), 4)
    np.testing.assert_array_equal(
        ts.guidance_interval(2.0, flow, 0.0, float("inf")), np.full(4, 2, np.float32)
    )
    np.testing.assert_array_equal(ts.guidance_interval(2.0, flow, 0.5, 1e9), [1, 2, 2, 1])
    # A bound that equals a knot's level holds, whether given in float32 or exactly.
    tenth = ts.make_knots(ts.make_schedule("flow"), 10)
    for k, exact in ((3, 7 / 3), (7, 3 / 7), (9, 1 / 9)):
        expected = np.arange(10) >= k
        found = ts.guidance_interval(2.0, tenth, 0.0, exact)
        np.testing.assert_array_equal(found > 1, expected)
        found = ts.guidance_interval(2.0, tenth, exact, float("inf"))
        np.testing.assert_array_equal(found > 1, ~expected)
    for k in range(1, 50):
        time = int(knots.time[k])
        exact = schedule.sigma[time] / schedule.alpha[time]
        scale = ts.guidance_interval(2.0, knots, 0.0, float(exact))
        np.testing.assert_array_equal(scale > 1, np.arange(50) >= k)
    nan = float("nan")
    for scale, low, high in ((2, 2, 1), (2, -1, 1), (2, nan, 1), (2, 1, nan), (nan, 1, 2)):
        with pytest.raises(ValueError, match="interval needs a scale and levels 0 <= low < high"):
            ts.guidance_interval(float(scale), knots, float(low), float(high))


def test_a_mapped_scale_per_step_is_refused(setting):
    denoiser, knot, x, cond = setting
    scales = jnp.ones((2, 10), jnp.float32)

    def guided(scale):
        return ts.cfg(denoiser, scale)(x, knot, cond).x0

    with pytest.raises(ValueError, match="cannot be mapped by vmap"):
        jax.vmap(guided)(scales)


def test_a_scale_for_each_network_by_the_plan(setting):
    """Guidance around the stitched denoiser, with a scale looked up by the plan."""
    denoiser, knot, x, cond = setting
    plan = ts.Plan.from_counts([5, 5])
    scales = jnp.array([2.0, 5.0])[plan.networks]
    stitched = ts.stitch([denoiser, tiny_network(1).denoiser], plan)
    found = ts.cfg(stitched, scales)(x, knot, cond)  # the knot is step 4
    expected = ts.cfg(denoiser, 2.0)(x, knot, cond)
    assert relative(found.x0, expected.x0) < 1e-5


@given(angle=st.floats(0.02, 1.55), name=st.sampled_from(["linear", "cosine", "flow"]))
def test_the_same_prediction_at_equal_snr(angle, name):
    """An exact denoiser predicts the same data in either forward process."""
    schedule = ts.make_schedule(name)
    level = np.array([np.tan(angle), 0.5])
    alpha = 2 / np.sqrt(1 + level**2)  # a process of another scale
    index = np.arange(2, dtype=np.int32)
    knots = ts.Knots(index, index, index, alpha, level * alpha, steps=1)
    grid = ts.match_snr(knots, schedule)
    x = jnp.linspace(-2, 2, 9, dtype=jnp.float32).reshape(9, 1, 1, 1)
    knot = jax.tree.map(lambda v: jnp.asarray(v[0], jnp.float32 if v.dtype == float else None),
                        knots)  # fmt: skip
    exact, cond = Gaussian(0.3, 0.5), ts.Condition(None)
    direct = exact(x, knot, cond)
    found = ts.at_equal_snr(exact, grid)(x, knot, cond)
    low, high = (schedule.sigma[i] / schedule.alpha[i] if schedule.alpha[i] else np.inf
                 for i in (0, -1))  # fmt: skip
    if low < level[0] < high:
        assert grid.sigma[0] / grid.alpha[0] == pytest.approx(level[0], rel=1e-4)
        assert relative(found.x0, direct.x0) < 1e-3
        assert relative(found.eps, direct.eps) < 1e-3
    assert np.isfinite(found.x0).all()


def test_a_matched_grid_of_another_length_is_refused(setting):
    denoiser, knot, x, cond = setting
    grid = ts.match_snr(ts.make_knots(ts.make_schedule("linear"), 9), ts.make_schedule("cosine"))
    with pytest.raises(ValueError, match="matched grid has 9 steps, the knots 10"):
        ts.at_equal_snr(denoiser, grid)(x, knot, cond)


@pytest.mark.parametrize("part", [1, "labels"])
def test_a_part_of_the_condition(part, setting):
    """The denoiser reads its part of both halves, with and without guidance."""
    denoiser, knot, x, cond = setting

    def shared(labels):
        return ({"text": None}, labels) if part == 1 else {"labels": labels, "text": None}

    parts = ts.Condition(shared(cond.given), shared(cond.null))
    own = ts.with_cond(denoiser, part)
    found, expected = own(x, knot, ts.Condition(parts.given)), denoiser(x, knot, cond)
    np.testing.assert_array_equal(found.x0, expected.x0)
    expected = ts.cfg(denoiser, 3.0)(x, knot, cond)
    for guided in (ts.cfg(own, 3.0), ts.with_cond(ts.cfg(denoiser, 3.0), part)):
        assert relative(guided(x, knot, parts).x0, expected.x0) < 1e-5
