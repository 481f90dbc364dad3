"""Targets to predictions, and guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gaussian_denoiser, relative, tiny_network
from hypothesis import given, strategies as st

import tstitch_jax as ts
from tstitch_jax import match_snr
from tstitch_jax.core.prediction import TARGETS, make_target, predict


@given(
    target=st.sampled_from(TARGETS),
    angle=st.floats(0.05, 1.5),
    scale=st.floats(0.5, 2.0),
    seed=st.integers(0, 1000),
)
def test_targets_invert(target, angle, scale, seed):
    """Also off the variance-preserving circle."""
    generator = np.random.default_rng(seed)
    x0, eps = (jnp.asarray(generator.standard_normal((2, 3, 3, 1)), jnp.float32) for _ in range(2))
    alpha, sigma = jnp.float32(scale * np.cos(angle)), jnp.float32(scale * np.sin(angle))
    output = make_target(target, x0, eps, alpha, sigma)
    found = predict(target, output, alpha * x0 + sigma * eps, alpha, sigma)
    np.testing.assert_allclose(found.x0, x0, atol=2e-4)
    np.testing.assert_allclose(found.eps, eps, atol=2e-4)


def test_unknown_target():
    with pytest.raises(ValueError, match="unknown target 'epsilon'; did you mean 'eps'"):
        ts.as_denoiser(lambda *a: a[1], "epsilon")


@pytest.fixture(scope="module")
def setting():
    network = tiny_network()
    knots = ts.make_knots(network.schedule, 10)
    knot = jax.tree.map(lambda leaf: jnp.asarray(leaf[4]), knots)
    keys = ts.image_keys(jax.random.key(0), jnp.arange(3))
    return network, knot, ts.draw_noise(keys, 0, (8, 8, 4)), jnp.array([1, 5, 9])


def halves(setting):
    network, knot, x, labels = setting
    given = network.denoiser(network.params, x, knot, labels)
    nothing = network.denoiser(network.params, x, knot, jnp.full(3, 10))
    return given, nothing


def test_guidance_is_its_definition(setting):
    network, knot, x, labels = setting
    given, nothing = halves(setting)
    found = ts.cfg(network.denoiser, 3.0, 10)(network.params, x, knot, labels)
    assert relative(found.eps, nothing.eps + 3 * (given.eps - nothing.eps)) < 1e-5
    assert relative(found.variance, given.variance) < 1e-5
    assert relative(knot.alpha * found.x0 + knot.sigma * found.eps, x) < 1e-5


def test_guided_channels(setting):
    network, knot, x, labels = setting
    given, _ = halves(setting)
    everything = ts.cfg(network.denoiser, 3.0, 10)(network.params, x, knot, labels)
    some = ts.cfg(network.denoiser, 3.0, 10, channels=3)(network.params, x, knot, labels)
    assert relative(some.eps[..., :3], everything.eps[..., :3]) < 1e-5
    assert relative(some.eps[..., 3:], given.eps[..., 3:]) < 1e-5
    with pytest.raises(ValueError, match="1 to 4, got 5"):
        ts.cfg(network.denoiser, 3.0, 10, channels=5)(network.params, x, knot, labels)


def test_scale_per_step(setting):
    network, knot, x, labels = setting
    scales = jnp.arange(10, dtype=jnp.float32)  # the knot is step 4
    found = ts.cfg(network.denoiser, scales, 10)(network.params, x, knot, labels)
    expected = ts.cfg(network.denoiser, 4.0, 10)(network.params, x, knot, labels)
    assert relative(found.eps, expected.eps) < 1e-5
    with pytest.raises(ValueError, match=r"shape \(10,\), got \(9,\)"):
        ts.cfg(network.denoiser, scales[:9], 10)(network.params, x, knot, labels)


def test_guidance_and_stitching_in_either_order(setting):
    network, knot, x, labels = setting
    other = tiny_network(1)
    plan = ts.Plan.from_list([0, 1] * 5, 2)
    pair, params = [network.denoiser, other.denoiser], (network.params, other.params)
    outside = ts.cfg(ts.stitch(pair, plan), 2.0, 10)
    inside = ts.stitch([ts.cfg(d, 2.0, 10) for d in pair], plan)
    a, b = (d(params, x, knot, labels) for d in (outside, inside))
    assert relative(a.x0, b.x0) < 1e-5
    with pytest.raises(ValueError, match="the plan has 4 steps, the knots have 10"):
        ts.stitch(pair, ts.Plan.from_counts([2, 2]))(params, x, knot, labels)
    with pytest.raises(ValueError, match="2 networks, got 1 denoisers"):
        ts.stitch(pair[:1], plan)
    with pytest.raises(ValueError, match="2 networks stitched, got 1"):
        outside(params[:1], x, knot, labels)


def test_variance_can_be_left_out(setting):
    network, knot, x, labels = setting
    assert ts.without_variance(network.denoiser)(network.params, x, knot, labels).variance is None
    plain = tiny_network(learned_variance=False)
    with pytest.raises(ValueError, match="needs a network that learned its variance"):
        ts.run(
            plain.denoiser,
            ts.ddpm("learned"),
            ts.make_knots(plain.schedule, 3),
            x,
            params=plain.params,
            cond=labels,
            keys=ts.image_keys(jax.random.key(0), jnp.arange(3)),
        )
    # A pair of which one has none samples with the fixed variance.
    images = ts.sample(
        jax.random.key(0), [network, plain], labels=[1], fractions=[0.5, 0.5], steps=4,
        solver="ddpm", decode=False,
    )  # fmt: skip
    assert np.isfinite(images).all()


def test_rescaled_guidance(setting):
    """Lin et al. 2024, equations 14 to 16, on v, in NumPy."""
    network, knot, x, labels = setting
    given, nothing = halves(setting)
    a, s = float(knot.alpha), float(knot.sigma)

    def v(prediction):
        return a * np.asarray(prediction.eps) - s * np.asarray(prediction.x0)

    guided = v(nothing) + 4 * (v(given) - v(nothing))
    factor = v(given).std(axis=(1, 2, 3)) / guided.std(axis=(1, 2, 3))
    expected = guided * (0.7 * factor + 0.3)[:, None, None, None]
    found = ts.cfg(network.denoiser, 4.0, 10, rescale=0.7)(network.params, x, knot, labels)
    assert relative(v(found), expected) < 1e-4
    assert relative(knot.alpha * found.x0 + knot.sigma * found.eps, x) < 1e-5
    assert relative(found.variance, given.variance) < 1e-5
    some = ts.cfg(network.denoiser, 4.0, 10, channels=3, rescale=0.7)
    found = some(network.params, x, knot, labels)
    assert relative(found.x0[..., 3:], given.x0[..., 3:]) < 1e-5
    factor = v(given)[..., :3].std(axis=(1, 2, 3)) / guided[..., :3].std(axis=(1, 2, 3))
    expected = guided[..., :3] * (0.7 * factor + 0.3)[:, None, None, None]
    assert relative(v(found)[..., :3], expected) < 1e-4
    same = ts.cfg(network.denoiser, 1.0, 10, rescale=1.0)(network.params, x, knot, labels)
    assert relative(same.x0, given.x0) < 1e-4
    with pytest.raises(ValueError, match=r"rescale must be between 0 and 1, got 2"):
        ts.cfg(network.denoiser, 1.0, 10, rescale=2.0)


def test_autoguidance_is_its_definition(setting):
    network, knot, x, labels = setting
    weak = tiny_network(1)
    strong_said = network.denoiser(network.params, x, knot, labels)
    weak_said = weak.denoiser(weak.params, x, knot, labels)
    params = (network.params, weak.params)
    found = ts.autoguide(network.denoiser, weak.denoiser, 2.5)(params, x, knot, labels)
    expected = jax.tree.map(lambda w, s: w + 2.5 * (s - w), weak_said, strong_said)
    assert relative(found.x0, expected.x0) < 1e-5
    assert relative(found.eps, expected.eps) < 1e-5
    assert relative(found.variance, strong_said.variance) < 1e-5
    some = ts.autoguide(network.denoiser, weak.denoiser, 2.5, channels=1)(params, x, knot, labels)
    assert relative(some.eps[..., :1], expected.eps[..., :1]) < 1e-5
    assert relative(some.eps[..., 1:], strong_said.eps[..., 1:]) < 1e-5


def count_calls(denoiser_of, scales):
    """How many images a denoiser is asked for over a run, by what it does at run time."""
    asked = []

    def spy(params, x, knot, cond, /):
        jax.debug.callback(lambda size=x.shape[0]: asked.append(size))
        return ts.Prediction(jnp.zeros_like(x), x)

    knots = ts.make_knots(ts.make_schedule("linear"), len(scales))
    x, cond = jnp.ones((3, 1, 1, 1)), jnp.zeros(3, jnp.int32)
    denoiser, params = denoiser_of(spy, jnp.asarray(scales, jnp.float32))
    jax.block_until_ready(
        jax.jit(lambda x: ts.run(denoiser, ts.ddim(), knots, x, params=params, cond=cond))(x)
    )
    jax.effects_barrier()
    return asked


def test_outside_the_interval_nothing_more_is_computed():
    scales = [1, 1, 3, 3, 0.5, 1]
    asked = count_calls(lambda spy, s: (ts.cfg(spy, s, 10), None), scales)
    assert sorted(asked) == [3, 3, 3, 6, 6, 6]
    asked = count_calls(lambda spy, s: (ts.autoguide(spy, spy, s), (None, None)), scales)
    assert asked == [3] * 9
    # Both at once: the weak network is never guided itself.
    asked = count_calls(
        lambda spy, s: (ts.autoguide(ts.cfg(spy, s, 10), spy, s), (None, None)), scales
    )
    assert sorted(asked) == [3] * 6 + [6] * 3


def test_the_interval_is_of_noise_levels():
    schedule = ts.make_schedule("linear")
    knots = ts.make_knots(schedule, 50)
    levels = knots.sigma[:-1] / knots.alpha[:-1]
    found = ts.guidance_interval(2.0, knots, 0.3, 1.5)
    np.testing.assert_array_equal(found, np.where((levels > 0.3) & (levels <= 1.5), 2, 1))
    assert found.dtype == np.float32
    # Of a flow pure noise belongs to the interval that has no upper end, and to no other.
    flow = ts.make_knots(ts.make_schedule("flow"), 4)
    np.testing.assert_array_equal(
        ts.guidance_interval(2.0, flow, 0.0, float("inf")), np.full(4, 2, np.float32)
    )
    np.testing.assert_array_equal(ts.guidance_interval(2.0, flow, 0.5, 1e9), [1, 2, 2, 1])
    # A level of the knots, as float32 or exact, is one.
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
    network, knot, x, labels = setting
    scales = jnp.ones((2, 10), jnp.float32)

    def guided(scale):
        return ts.cfg(network.denoiser, scale, 10)(network.params, x, knot, labels).x0

    with pytest.raises(ValueError, match="cannot be mapped by vmap"):
        jax.vmap(guided)(scales)


def test_a_scale_for_each_network_by_the_plan(setting):
    """Guidance around the stitched denoiser, with a scale looked up by the plan."""
    network, knot, x, labels = setting
    other = tiny_network(1)
    plan = ts.Plan.from_counts([5, 5])
    scales = jnp.array([2.0, 5.0])[plan.networks]
    stitched = ts.stitch([network.denoiser, other.denoiser], plan)
    params = (network.params, other.params)
    found = ts.cfg(stitched, scales, 10)(params, x, knot, labels)  # the knot is step 4
    expected = ts.cfg(network.denoiser, 2.0, 10)(network.params, x, knot, labels)
    assert relative(found.x0, expected.x0) < 1e-5


@given(angle=st.floats(0.02, 1.55), name=st.sampled_from(["linear", "cosine", "flow"]))
def test_the_same_knowledge_at_equal_snr(angle, name):
    """An exact denoiser says the same of data, whichever process it is asked in."""
    schedule = ts.make_schedule(name)
    level = np.array([np.tan(angle), 0.5])
    alpha = 2 / np.sqrt(1 + level**2)  # a process of another scale
    index = np.arange(2, dtype=np.int32)
    knots = ts.Knots(index, index, index, alpha, level * alpha, steps=1)
    own = match_snr(knots, schedule)
    x = jnp.linspace(-2, 2, 9, dtype=jnp.float32).reshape(9, 1, 1, 1)
    knot = jax.tree.map(lambda v: jnp.asarray(v[0], jnp.float32 if v.dtype == float else None),
                        knots)  # fmt: skip
    exact = gaussian_denoiser(0.3, 0.5)
    direct = exact(1.0, x, knot, None)
    found = ts.at_equal_snr(exact, own)(1.0, x, knot, None)
    low, high = (schedule.sigma[i] / schedule.alpha[i] if schedule.alpha[i] else np.inf
                 for i in (0, -1))  # fmt: skip
    if low < level[0] < high:
        assert own.sigma[0] / own.alpha[0] == pytest.approx(level[0], rel=1e-4)
        assert relative(found.x0, direct.x0) < 1e-3
        assert relative(found.eps, direct.eps) < 1e-3
    assert np.isfinite(found.x0).all()


def test_a_matched_grid_of_another_length_is_refused(setting):
    network, knot, x, labels = setting
    own = match_snr(ts.make_knots(network.schedule, 9), ts.make_schedule("cosine"))
    with pytest.raises(ValueError, match="matched grid has 9 steps, the knots 10"):
        ts.at_equal_snr(network.denoiser, own)(network.params, x, knot, labels)


def test_conditioning_of_its_own(setting):
    network, knot, x, labels = setting
    found = ts.with_cond(network.denoiser, lambda cond: cond["labels"])(
        network.params, x, knot, {"labels": labels, "text": None}
    )
    np.testing.assert_array_equal(found.x0, network.denoiser(network.params, x, knot, labels).x0)
