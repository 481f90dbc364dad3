"""One table of contracts for every solver; orders of convergence; diffusers' trajectories."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from helpers import (
    GOLDEN,
    correlated_denoiser,
    gaussian_denoiser,
    labelled_denoiser,
    loop,
    mixture_denoiser,
    relative,
    tiny_card,
    tiny_network,
)

import tstitch_jax as ts
from tstitch_jax.core.types import Knots
from tstitch_jax.models.build import make_network

SOLVERS = {
    "ddim": lambda: ts.ddim(),
    "ddim eta 1": lambda: ts.ddim(1.0),
    "ddpm small": lambda: ts.ddpm("small"),
    "ddpm large": lambda: ts.ddpm("large"),
    "ddpm learned": lambda: ts.ddpm("learned"),
    "dpmpp 1": lambda: ts.dpmpp(1),
    "dpmpp 2": lambda: ts.dpmpp(2),
    "dpmpp 3": lambda: ts.dpmpp(3),
    "dpmpp 3 exact": lambda: ts.dpmpp(3, exact=True),
    "dpmpp_sde 1": lambda: ts.dpmpp_sde(1),
    "dpmpp_sde 2": lambda: ts.dpmpp_sde(2),
    "flow_heun": lambda: ts.flow_heun(),
    "heun": lambda: ts.heun(),
    "lcm": lambda: ts.lcm(),
    "pndm": lambda: ts.pndm(),
    "sde": lambda: ts.sde(),
    "unipc 1": lambda: ts.unipc(1),
    "unipc 2": lambda: ts.unipc(2),
    "unipc 3": lambda: ts.unipc(3),
}
VARIANTS = {
    "ddim eta 0.5": lambda: ts.ddim(0.5),
    "sde constant": lambda: ts.sde("constant", 0.5),
    "sde decreasing": lambda: ts.sde("decreasing"),
    "sde increasing-decreasing": lambda: ts.sde("increasing-decreasing"),
}
"""The same code with other coefficients: only what they draw is compared."""
DETERMINISTIC = {
    "ddim", "dpmpp 1", "dpmpp 2", "dpmpp 3", "dpmpp 3 exact", "flow_heun", "heun", "pndm",
    "unipc 1", "unipc 2", "unipc 3",
}  # fmt: skip
SHAPE = (8, 8, 4)


SCHEDULE = ts.make_schedule("linear")
ZERO = ts.make_schedule("linear", zero_snr=True)
"""Begins in pure noise."""
MEANS = (0.7, 0.4, -0.2)
"""Parameters of three closed-form networks."""
COND = jnp.array([3, 7])


def start(batch=2):
    keys = ts.image_keys(jax.random.key(1), jnp.arange(batch))
    return keys, ts.draw_noise(keys, 0, SHAPE)


@functools.cache
def half_network():
    return make_network(tiny_card(depth=1), tiny_network(depth=1).params, jnp.bfloat16)


@pytest.mark.parametrize("name", SOLVERS)
class TestEverySolver:
    def test_kept_as_one_object(self, name):
        """So that jit, given the solver as static data, knows it again."""
        assert SOLVERS[name]() == SOLVERS[name]()
        assert SOLVERS[name]().stochastic == (name not in DETERMINISTIC)

    def test_compiled_loop_is_the_plain_loop(self, name):
        solver, (keys, x) = SOLVERS[name](), start()
        knots = ts.make_knots(SCHEDULE, 6)
        plan = ts.Plan.from_list([0, 1, 0, 2, 2, 1], 3)
        scales = jnp.array([2, 3, 1, 2, 1, 4], jnp.float32)
        denoiser = ts.cfg(ts.stitch([labelled_denoiser] * 3, plan), scales, 10, channels=3)
        options = dict(params=MEANS, cond=COND, keys=keys)
        x0, found = jax.jit(
            lambda x: ts.run(denoiser, solver, knots, x, return_trajectory=True, **options)
        )(x)
        expected = loop(denoiser, solver, knots, x, **options)
        assert found.shape == (6, *x.shape)
        assert found.dtype == x0.dtype == jnp.float32
        assert relative(found, expected) < 2e-5
        np.testing.assert_array_equal(x0, found[-1])

    @pytest.mark.usefixtures("standard_promotion")
    def test_the_carry_is_stable(self, name):
        """State and x keep shapes and dtypes, with a network that computes in bfloat16."""
        network = half_network()
        solver, (keys, x) = SOLVERS[name](), start()
        knots = ts.make_knots(SCHEDULE, 3)
        here, there = (jax.tree.map(lambda v, i=i: jnp.asarray(v[i]), knots) for i in (0, 1))

        def denoise(x, knot):
            return network.denoiser(network.params, x, knot, COND)

        state = solver.init(x)
        noise = x if solver.stochastic else None
        after = jax.eval_shape(
            lambda x, state: solver.step(denoise, x, state, here, there, noise), x, state
        )
        spec = jax.tree.map(lambda v: (v.shape, v.dtype), after)
        assert spec == jax.tree.map(lambda v: (v.shape, v.dtype), (x, state))
        options = dict(params=network.params, cond=COND, keys=keys)
        low = jax.eval_shape(lambda x: ts.run(network.denoiser, solver, knots, x, **options), x)
        assert (low.shape, low.dtype) == (x.shape, jnp.float32)

    def test_one_compilation_over_plans_and_scales(self, name):
        solver, (keys, x) = SOLVERS[name](), start()
        knots, traces = ts.make_knots(SCHEDULE, 4), []

        @jax.jit
        def sample(plan, scale, keys):
            traces.append(1)
            denoiser = ts.cfg(ts.stitch([labelled_denoiser] * 2, plan), scale, 10)
            return ts.run(denoiser, solver, knots, x, params=MEANS[:2], cond=COND, keys=keys)

        plans = [ts.Plan.from_list(steps, 2) for steps in ([0, 0, 0, 1], [1, 0, 1, 0])]
        first, second = (sample(plan, np.float32(2), keys) for plan in plans)
        third = sample(plans[0], np.float32(3), keys)
        assert relative(second, first) > 1e-4
        assert relative(third, first) > 1e-4
        # Noise comes from the keys alone, and a solver without noise does not look at them.
        np.testing.assert_array_equal(first, sample(plans[0], np.float32(2), keys))
        others = ts.image_keys(jax.random.key(2), jnp.arange(2))
        changed = sample(plans[0], np.float32(2), others)
        assert np.array_equal(first, changed) == (not solver.stochastic)
        assert len(traces) == 1

    def test_a_switch_at_every_step(self, name):
        """Between equal networks it changes nothing; between others, both ways, all is finite."""
        solver, (keys, x) = SOLVERS[name](), start()
        knots = ts.make_knots(SCHEDULE, 7)
        options = dict(cond=COND, keys=keys)

        @jax.jit
        def single(x):
            return ts.run(labelled_denoiser, solver, knots, x, params=0.7, **options)

        @jax.jit
        def stitched(plan, params):
            denoiser = ts.stitch([labelled_denoiser] * 2, plan)
            return ts.run(denoiser, solver, knots, x, params=params, **options)

        alone = stitched(ts.Plan.from_switches([7], 7), (0.7, 0.7))
        # pndm extrapolates over noise levels that fall 25 times, and rounding with them.
        assert relative(alone, single(x)) < (1e-4 if name == "pndm" else 1e-5)
        for switch in range(7):
            plan = ts.Plan.from_switches([switch], 7)
            assert relative(stitched(plan, (0.7, 0.7)), alone) < 1e-5
            for either in (plan, plan.reversed()):
                assert np.isfinite(stitched(either, MEANS[:2])).all()

    def test_no_noise_level_is_lost_to_rounding(self, name):
        """Grids of few and many steps, also from pure noise: finite."""
        solver, denoiser = SOLVERS[name](), gaussian_denoiser(0.3, 0.5, variance=0.5)
        x = ts.draw_noise(ts.image_keys(jax.random.key(0), jnp.arange(2)), 0, (2, 2, 1))

        @jax.jit
        def draw(knots):
            noise = jnp.broadcast_to(x, (knots.steps, *x.shape)) if solver.stochastic else None
            options = dict(params=1.0, noise=noise, return_trajectory=True)
            return ts.run(denoiser, solver, knots, x, **options)[1]

        for schedule in (*map(ts.make_schedule, ("linear", "cosine", "flow")), ZERO):
            for steps in (1, 3, 60):
                found = draw(ts.make_knots(schedule, steps))
                assert np.isfinite(found).all(), (schedule.name, schedule is ZERO, steps)


@pytest.mark.parametrize("name", sorted(SOLVERS.keys() - DETERMINISTIC))
def test_given_noise_is_the_drawn_noise(name):
    solver, (keys, x) = SOLVERS[name](), start()
    knots = ts.make_knots(SCHEDULE, 4)
    noise = jnp.stack([ts.draw_noise(keys, i + 1, SHAPE) for i in range(4)])
    options = dict(params=0.7, cond=COND)
    drawn = ts.run(labelled_denoiser, solver, knots, x, keys=keys, **options)
    given = ts.run(labelled_denoiser, solver, knots, x, noise=noise, **options)
    assert relative(given, drawn) < 1e-5
    with pytest.raises(ValueError, match="either keys or noise"):
        ts.run(labelled_denoiser, solver, knots, x, **options)
    with pytest.raises(ValueError, match="noise for 3 steps"):
        ts.run(labelled_denoiser, solver, knots, x, noise=noise[:3], **options)


@functools.cache
def many_normals():
    return np.random.default_rng(0).standard_normal((250, 20_000, 1, 1, 2), np.float32)


# A posterior mean is no sample of a consistency network: lcm has a test of its own.
@pytest.mark.parametrize("name", sorted({*SOLVERS, *VARIANTS} - {"lcm"}))
def test_moments_of_a_gaussian(name):
    """With the exact denoiser and many steps, samples have the data's mean and covariance."""
    make = (SOLVERS | VARIANTS)[name]
    count, mean = 20_000, np.array([0.3, -0.2], np.float32)
    cov = np.array([[0.25, 0.12], [0.12, 0.16]], np.float32)
    knots = ts.make_knots(ts.make_schedule("linear"), 250)
    keys = ts.image_keys(jax.random.key(5), jnp.arange(count))
    x = ts.draw_noise(keys, 0, (1, 1, 2))
    denoiser, solver = correlated_denoiser(mean, cov, variance=0.5), make()
    # Drawing it from the keys takes most of the time; so it is done with one solver.
    given = solver.stochastic and name != "ddpm small"
    drawn = dict(noise=many_normals()) if given else dict(keys=keys)

    @jax.jit
    def draw(x, drawn):
        return ts.run(denoiser, solver, knots, x, params=None, **drawn)

    samples = draw(x, drawn)[:, 0, 0]
    # Five standard errors, and the bias of 250 steps, which "ddpm large" has most of.
    error = np.sqrt(np.diag(cov) / count)
    assert (np.abs(samples.mean(axis=0) - mean) < 5 * error + 0.005).all()
    spread = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / count)
    bias = 0.015 if name == "ddpm large" else 0.006
    assert (np.abs(np.cov(samples.T) - cov) < 5 * spread + bias).all()


def test_gradients_are_finite():
    """Through a whole trajectory, by the parameters; no branch that is not taken spoils them."""
    x = jnp.linspace(-2, 2, 8).reshape(8, 1, 1, 1)
    keys, flow = ts.image_keys(jax.random.key(0), jnp.arange(8)), ts.make_schedule("flow")
    for name, make in SOLVERS.items():
        solver = make()
        denoiser, knots = gaussian_denoiser(0.3, 0.5, variance=0.5), ts.make_knots(flow, 6)

        def total(params, solver=solver, denoiser=denoiser, knots=knots):
            return ts.run(denoiser, solver, knots, x, params=params, keys=keys).sum()

        assert np.isfinite(jax.jit(jax.grad(total))(1.0)), name


@pytest.mark.parametrize("name", sorted(DETERMINISTIC))
def test_one_step_starts_at_the_noise(name):
    knots = ts.make_knots(ts.make_schedule("linear"), 1)
    x = jnp.linspace(-2, 2, 8).reshape(8, 1, 1, 1)
    found = ts.run(gaussian_denoiser(0.3, 0.5), SOLVERS[name](), knots, x, params=1.0)
    assert float(jnp.abs(found - 0.3).max()) < 0.01  # of pure noise only the mean is known


def even_grid(steps, low=-5.0, high=2.5):
    """Equal steps of log(alpha / sigma), in float64, ending before the clean data.

    The last step to clean data is of order 1 by design, and would hide what the method does.
    """
    ratio = np.exp(-np.linspace(low, high, steps + 1))
    alpha = 1 / np.sqrt(1 + ratio**2)
    index = np.arange(steps + 1, dtype=np.int32)
    return Knots(index, index, index * 1.0, alpha, ratio * alpha, steps=steps)


ORDERS = {
    "ddim": 1, "dpmpp 1": 1, "dpmpp 2": 2, "dpmpp 3": 2, "dpmpp 3 exact": 3, "heun": 2,
    "flow_heun": 2, "pndm": 2, "unipc 1": 2, "unipc 2": 3, "unipc 3": 3,
}  # fmt: skip


@pytest.mark.parametrize("data", ["gaussian", "mixture"])
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name, data):
    """To the exact solution of the probability-flow ODE."""
    steps = (64, 128, 256) if ORDERS[name] < 3 else (256, 512)
    with float64():
        x = jnp.linspace(-2, 2, 65).reshape(-1, 1, 1, 1)
        if data == "gaussian":
            denoiser = gaussian_denoiser(0.3, 0.5)
            first, last = (
                (float(g.alpha[i]), float(g.sigma[i]))
                for g, i in ((even_grid(2), 0), (even_grid(2), -1))
            )
            # Along the ODE, (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2) stays what it was.
            scale = np.hypot(last[0] * 0.5, last[1]) / np.hypot(first[0] * 0.5, first[1])
            exact = last[0] * 0.3 + scale * (x - first[0] * 0.3)
        else:
            denoiser = mixture_denoiser()
            exact = transported(x, even_grid(2))
        errors = [
            float(
                jnp.abs(
                    ts.run(denoiser, SOLVERS[name](), even_grid(n), x, params=1.0) - exact
                ).mean()
            )
            for n in steps
        ]
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(orders - ORDERS[name]) < 0.2), (errors, orders)


@contextlib.contextmanager
def float64():
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def transported(x, knots, mean=0.7, std=0.25):
    """Where the ODE takes x from the first to the last point, for ``mixture_denoiser``'s data.

    In one dimension the ODE keeps quantiles: the distribution functions at both ends agree.
    """
    (a, s), (b, r) = ((float(knots.alpha[i]), float(knots.sigma[i])) for i in (0, -1))

    def distribution(x, alpha, sigma):
        width = np.hypot(alpha * std, sigma)
        cdf = jax.scipy.stats.norm.cdf
        return (cdf((x - alpha * mean) / width) + cdf((x + alpha * mean) / width)) / 2

    wanted = distribution(x, a, s)
    low, high = jnp.full_like(x, -9), jnp.full_like(x, 9)
    for _ in range(60):  # bisection
        middle = (low + high) / 2
        below = distribution(middle, b, r) < wanted
        low, high = jnp.where(below, middle, low), jnp.where(below, high, middle)
    return (low + high) / 2


GOLDENS = {
    "ddim": ts.ddim(),
    "ddpm": ts.ddpm("small"),
    "ddpm_large": ts.ddpm("large"),
    "euler": ts.euler(),
    "euler_ancestral": ts.euler_ancestral(),
    "heun": ts.heun(),
    "pndm": ts.pndm(),
    "lcm": ts.lcm(),
    "flow_euler": ts.euler(),
    "flow_heun": ts.flow_heun(),
    **{f"dpmpp_{p}_{n}": ts.dpmpp(p) for p in (1, 2, 3) for n in (10, 20)},
    **{f"unipc_{p}_{n}": ts.unipc(p) for p in (1, 2, 3) for n in (10, 20)},
    **{f"dpmpp_sde_{p}_{n}": ts.dpmpp_sde(p) for p in (1, 2) for n in (10, 20)},
}


@pytest.mark.parametrize("name", GOLDENS)
def test_against_diffusers(name):
    """Each step's state, from diffusers' scheduler with the same denoiser and noise."""
    with np.load(GOLDEN / "schedulers.npz") as arrays:
        times, expected = arrays[f"{name}/times"], arrays[f"{name}/x"]
        x, noise = arrays["x"], arrays["noise"]
    schedule = ts.make_schedule("flow" if name.startswith("flow") else "linear")
    knots = ts.make_knots(schedule, times / 1000 if schedule.name == "flow" else times)
    solver = GOLDENS[name]
    _, found = ts.run(
        mixture_denoiser(),
        solver,
        knots,
        jnp.asarray(x, jnp.float32),
        params=None,
        noise=jnp.asarray(noise[: len(times)], jnp.float32) if solver.stochastic else None,
        return_trajectory=True,
    )
    assert len(expected) == len(times)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert relative(ours, theirs) < 1e-5, step


def test_lcm_samples_what_its_network_maps_to():
    """With the map of a consistency network known, its samples are the data's."""
    count, mean, std = 20_000, 0.3, 0.5
    knots = ts.make_knots(ts.make_schedule("linear"), 4, "lcm")

    def consistent(params, x, knot, cond, /):
        # Where the ODE ends: the standardised value stays what it is.
        width = jnp.hypot(knot.alpha * std, knot.sigma)
        x0 = mean + std * (x - knot.alpha * mean) / width
        return ts.Prediction(x0, (x - knot.alpha * x0) / knot.sigma)

    keys = ts.image_keys(jax.random.key(0), jnp.arange(count))
    x = ts.draw_noise(keys, 0, (1, 1, 1))
    samples = ts.run(consistent, ts.lcm(), knots, x, params=None, keys=keys)
    assert abs(float(samples.mean()) - mean) < 5 * std / count**0.5 + 0.002
    assert abs(float(samples.std()) - std) < 5 * std / (2 * count) ** 0.5 + 0.002


def test_names():
    assert set(ts.SOLVERS) >= {
        "ddim", "ddpm", "dpmpp", "unipc", "euler", "heun", "euler_ancestral", "pndm", "lcm", "sde",
        "flow_heun",
    }  # fmt: skip
    for name in ts.SOLVERS:
        assert ts.make_solver(name) == ts.make_solver(name)
        assert ts.make_solver(name, eta=0.0) is not None
    assert ts.make_solver("dpmpp_3") == ts.dpmpp(3)
    # Equal arguments, however given.
    assert ts.dpmpp() == ts.dpmpp(2) == ts.dpmpp(order=2) == ts.make_solver("dpmpp")
    assert ts.ddpm() == ts.ddpm("auto") == ts.make_solver("ddpm")
    assert ts.ddim(np.float32(0.5)) == ts.ddim(0.5)
    assert ts.dpmpp(np.int64(3)) == ts.dpmpp(3)
    # The same method under the names of three papers.
    assert ts.euler() == ts.ddim()
    assert ts.euler_ancestral() == ts.ddim(1.0)
    assert ts.make_solver("euler_ancestral", eta=0.5) == ts.ddim(0.5)
    assert not ts.make_solver("euler_ancestral", eta=0.0).stochastic


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ts.make_solver("dpm"), "unknown solver 'dpm'; did you mean 'ddpm' or 'dpmpp'"),
        (lambda: ts.make_solver("heun", eta=0.5), "eta belongs to the solvers 'ddim' and"),
        (lambda: ts.make_solver("ddim", eta=1.5), "eta must be between 0 and 1, got 1.5"),
        (lambda: ts.dpmpp(4), "dpmpp has order 1, 2 or 3, got 4"),
        (lambda: ts.dpmpp(2, exact=True), "exact is a form of order 3, got order 2"),
        (lambda: ts.dpmpp_sde(3), "dpmpp_sde has order 1 or 2, got 3"),
        (lambda: ts.unipc(0), "unipc has order 1, 2 or 3, got 0"),
        (lambda: ts.sde("sigmoid"), "unknown diffusion 'sigmoid'; did you mean 'sigma'"),
        (lambda: ts.sde("sigma", -1.0), "scale of the diffusion must be at least 0, got -1"),
        (lambda: ts.ddpm("tiny"), "unknown variance 'tiny'"),
        (lambda: ts.ddim(np.float32(3)), "eta must be between 0 and 1, got np.float32"),
        (lambda: ts.ddim("much"), "eta must be a number, got 'much'"),
        (lambda: ts.ddim(10**400), "eta must be a finite number, got 1000"),
        (lambda: ts.sde("sigma", 10**400), "diffusion must be a finite number, got 1000"),
        (lambda: ts.make_solver(["ddim"]), r"unknown solver \['ddim'\]; did you mean 'ddim'"),
        (lambda: ts.dpmpp(True), "dpmpp has order 1, 2 or 3, got True"),
        (lambda: ts.dpmpp(3.0), "dpmpp has order 1, 2 or 3, got 3.0"),
        (lambda: ts.dpmpp([3]), "dpmpp cannot take"),
        (lambda: ts.lcm(float("nan")), "sigma_data must be a finite number, got nan"),
        (lambda: ts.lcm(0.0), "sigma_data must be at least 1e-09, got 0.0"),
        (
            lambda: ts.sde("sigma", float("inf")),
            "the diffusion must be a finite number, got inf",
        ),
    ],
)
def test_bad_options(make, message, monkeypatch):
    # As users call it, without the tests' own checks of types.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        make()


def test_gradients_by_the_grid_and_eta():
    """Noise that vanishes in the last step has a derivative; so has all of it, at eta = 1."""
    x = jnp.linspace(-2, 2, 8).reshape(8, 1, 1, 1)
    keys, knots = ts.image_keys(jax.random.key(0), jnp.arange(8)), ts.make_knots(SCHEDULE, 4)
    denoiser = gaussian_denoiser(0.3, 0.5)

    def total(alpha, eta):
        grid = dataclasses.replace(knots, alpha=alpha)
        solvers = [ts.ddim(eta), ts.ddpm("small"), ts.sde(), ts.dpmpp_sde()]
        return sum(ts.run(denoiser, s, grid, x, params=1.0, keys=keys).sum() for s in solvers)

    slope = jax.jit(jax.grad(total, (0, 1)))
    for eta in (0.0, 0.5, 1.0):
        slopes = slope(jnp.asarray(knots.alpha), jnp.float32(eta))
        assert all(np.isfinite(slope).all() for slope in slopes)


def test_a_learned_variance_that_is_not_there():
    knots, x = ts.make_knots(SCHEDULE, 3), jnp.zeros((1, 1, 1, 1))
    options = dict(params=None, noise=jnp.zeros((3, 1, 1, 1, 1)))
    with pytest.raises(ValueError, match="variance='learned' needs a network that learned its"):
        ts.run(mixture_denoiser(), ts.ddpm("learned"), knots, x, **options)
