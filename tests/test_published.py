"""Against the numbers of the published PyTorch program, on its own tiny random networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN, published_network, relative

import tstitch_jax as ts
from tstitch_jax.models.build import module_of

LIMIT = 2e-5
NAMES = ("small", "base", "large")


@pytest.fixture(scope="module")
def expected():
    with np.load(GOLDEN / "tstitch_tiny" / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def networks():
    return {name: published_network(name) for name in NAMES}


def nhwc(array):
    return jnp.asarray(np.moveaxis(array, -3, -1))


def condition(expected):
    labels = jnp.asarray(expected["labels"], jnp.int32)
    return ts.Condition(labels, jnp.full_like(labels, 10))


@pytest.mark.parametrize("name", NAMES)
def test_forward(name, networks, expected):
    network = networks[name]
    module = module_of(network.card)
    times, labels = expected["forward_t"], expected["labels"].astype(np.int32)
    output = module.apply(
        {"params": network.params},
        nhwc(expected["x_T"]),
        jnp.asarray(times, jnp.float32),
        jnp.asarray(labels),
    )
    assert relative(output, nhwc(expected[f"forward/{name}"])) < LIMIT


@pytest.mark.parametrize("name", NAMES)
def test_guided_forward(name, networks, expected):
    network = networks[name]
    knots = ts.make_knots(network.schedule, 1000)
    knot = jax.tree.map(lambda leaf: jnp.asarray(leaf[999 - 501]), knots)
    guided = ts.cfg(network.denoiser, float(expected["cfg_scale"]), channels=3)
    prediction = guided(nhwc(expected["x_T"]), knot, condition(expected))
    golden = nhwc(expected[f"forward_with_cfg_t501/{name}"])
    assert relative(prediction.eps, golden[..., :4]) < LIMIT
    assert relative(prediction.variance, (golden[..., 4:] + 1) / 2) < LIMIT


def trajectory(expected, networks, key, fractions):
    """x after each guided DDIM step of ``sample``."""
    stack = [networks[n] for n in (("small", "large") if len(fractions) == 2 else NAMES)]
    _, found = ts.sample(
        jax.random.key(0),
        stack,
        labels=expected["labels"].tolist(),
        fractions=fractions,
        steps=20,
        noise=nhwc(expected["x_T"]),
        decode=False,
        return_trajectory=True,
        cfg_scale=float(expected["cfg_scale"]) if "nocfg" not in key else None,
    )
    return found


@pytest.mark.parametrize(
    ("key", "ratio"),
    [(f"two/ddim/ratio{r}", r) for r in (0.0, 0.4, 0.5, 1.0)] + [("two/ddim_nocfg/ratio0.4", 0.4)],
)
def test_two_networks(key, ratio, networks, expected):
    found = trajectory(expected, networks, key, [ratio, 1 - ratio])
    assert relative(found, nhwc(expected[key])) < LIMIT


@pytest.mark.parametrize(
    ("key", "solver"),
    [
        ("two/ddpm/ratio0.4", ts.ddpm()),
        ("two/ddpm/ratio0.4", ts.ddpm("learned")),
        ("two/ddim_eta0.5/ratio0.4", ts.ddim(0.5)),
    ],
)
def test_two_networks_with_noise(key, solver, networks, expected):
    small, large = networks["small"], networks["large"]
    knots = ts.make_knots(small.schedule, 20)
    plan = ts.Plan.from_fractions([0.4, 0.6], knots, small.schedule)
    stitched = ts.stitch([small.denoiser, large.denoiser], plan)
    _, found = ts.run(
        ts.cfg(stitched, float(expected["cfg_scale"]), channels=3),
        solver,
        knots,
        nhwc(expected["x_T"]),
        cond=condition(expected),
        noise=nhwc(expected["noise_per_step"]),
        return_trajectory=True,
    )
    assert relative(found, nhwc(expected[key])) < LIMIT


@pytest.mark.parametrize("fractions", [[0.4, 0.2, 0.4], [0.3, 0.3, 0.4]])
def test_three_networks(fractions, networks, expected):
    key = "three/ddim/" + "-".join(map(str, fractions))
    found = trajectory(expected, networks, key, fractions)
    assert relative(found, nhwc(expected[key])) < LIMIT


def test_network_per_step(expected):
    schedule = ts.make_schedule("linear")
    knots = ts.make_knots(schedule, 20)
    np.testing.assert_array_equal(knots.time[:-1], expected["timesteps"])
    keys = [key for key in expected if "network_per_step" in key]
    assert len(keys) == 6
    for key in keys:
        golden = expected[key]
        spec = key.rsplit("/", 1)[1]
        if spec.startswith("ratio"):
            fractions = [float(spec.removeprefix("ratio")), 1 - float(spec.removeprefix("ratio"))]
        else:
            fractions = [float(f) for f in spec.split("-")]
        plan = ts.Plan.from_fractions(fractions, knots, schedule)
        np.testing.assert_array_equal(plan.networks, golden, err_msg=key)


def test_timestep_maps(expected):
    specs = [key.split("/")[1] for key in expected if key.startswith("timestep_map/")]
    assert len(specs) >= 10
    for spec in specs:
        kept = ts.respace(1000, spec)
        np.testing.assert_array_equal(kept, expected[f"timestep_map/{spec}"], err_msg=spec)


def test_respaced_tables(expected):
    schedule = ts.make_schedule("linear")
    kept = ts.respace(1000, 20)
    alpha_bar = schedule.alpha[kept] ** 2
    before = np.append(1.0, alpha_bar[:-1])
    betas = 1 - alpha_bar / before
    posterior = betas * (1 - before) / (1 - alpha_bar)
    posterior[0] = posterior[1]
    golden = {k.split("/")[1]: v for k, v in expected.items() if k.startswith("spaced20/")}
    np.testing.assert_allclose(alpha_bar, golden["alphas_cumprod"], rtol=1e-12)
    np.testing.assert_allclose(betas, golden["betas"], rtol=1e-9)
    np.testing.assert_allclose(
        np.log(posterior), golden["posterior_log_variance_clipped"], rtol=1e-9
    )
    # The solvers see float32 alpha and sigma, from which the betas follow.
    knots = ts.make_knots(schedule, 20)
    np.testing.assert_allclose(knots.alpha[-2::-1] ** 2, alpha_bar, rtol=3e-7)
    ratio = knots.alpha[:-1] / knots.alpha[1:]
    found = knots.sigma[:-1] ** 2 - (ratio * knots.sigma[1:]) ** 2
    np.testing.assert_allclose(found[::-1], betas, rtol=3e-6)
    assert knots.alpha[-1] == 1
    assert knots.sigma[-1] == 0
