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
    Gaussian,
    Labelled,
    Mixture,
    closed_network,
    correlated,
    loop,
    relative,
    tiny_card,
    tiny_network,
)

import tstitch_jax as ts
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
"""The same code with other coefficients; only their samples are compared."""
DETERMINISTIC = {
    "ddim", "dpmpp 1", "dpmpp 2", "dpmpp 3", "dpmpp 3 exact", "flow_heun", "heun", "pndm",
    "unipc 1", "unipc 2", "unipc 3",
}  # fmt: skip
SHAPE = (8, 8, 4)

SCHEDULE = ts.make_schedule("linear")
ZERO = ts.make_schedule("linear", zero_snr=True)
"""Starts in pure noise."""
MEANS = (0.7, 0.4, -0.2)
"""Parameters of three closed-form networks."""
COND = ts.Condition(jnp.array([3, 7]), jnp.array([10, 10]))


def start(batch=2):
    keys = ts.image_keys(jax.random.key(1), jnp.arange(batch))
    return keys, ts.draw_noise(keys, 0, SHAPE)


def networks(*means):
    return [Labelled(jnp.float32(mean)) for mean in means]


def same(first, second):
    """Whether two solvers are equal: in structure, which holds their configuration, and leaves."""
    (leaves, tree), (others, other_tree) = map(jax.tree.flatten, (first, second))
    return tree == other_tree and leaves == others


@functools.cache
def half_network():
    return make_network(tiny_card(depth=1), tiny_network(depth=1).params, jnp.bfloat16)


@pytest.mark.parametrize("name", SOLVERS)
class TestEverySolver:
    def test_the_record_is_a_pytree(self, name):
        """Numbers are leaves, so other numbers compile nothing; all else is in the structure."""
        solver = SOLVERS[name]()
        leaves, tree = jax.tree.flatten(solver)
        assert all(isinstance(leaf, np.float32) for leaf in leaves)
        assert same(solver, SOLVERS[name]())
        assert hash(tree) == hash(jax.tree.structure(SOLVERS[name]()))
        assert same(tree.unflatten(leaves), solver)
        assert solver.name in ts.SOLVERS
        assert solver.stochastic == (name not in DETERMINISTIC)
        (keys, x), knots, traces = start(), ts.make_knots(SCHEDULE, 3), []

        @jax.jit
        def sample(solver):
            traces.append(1)
            return ts.run(Labelled(0.7), solver, knots, x, cond=COND, keys=keys)

        first = sample(solver)
        np.testing.assert_array_equal(sample(SOLVERS[name]()), first)
        if leaves:
            other = tree.unflatten([*leaves[:-1], np.float32(0)])
            assert relative(sample(other), first) > 1e-3
        assert len(traces) == 1

    def test_evaluations_are_counted(self, name):
        """By a plain Python loop, also from pure noise and from the middle of a grid."""
        solver = SOLVERS[name]()
        flow, linear = (ts.make_knots(ts.make_schedule(n), 3) for n in ("flow", "linear"))
        grids = [flow, linear, ts.last_steps(linear, 2), ts.make_knots(ZERO, 3)]
        grids.append(ts.make_knots(ts.make_schedule("cosine"), 1))
        for knots in grids:
            calls = []

            def count(x, knot, cond, calls=calls):
                calls.append(int(knot.step))
                return Gaussian(0.3, 0.5, variance=0.5)(x, knot)

            x = jnp.ones((1, 1, 1, 1))
            with jax.disable_jit():
                loop(count, solver, knots, x, noise=jnp.zeros((knots.steps, *x.shape)))
            found = solver.evaluations(knots)
            assert found.shape == (knots.steps,)
            np.testing.assert_array_equal(found, np.bincount(calls, minlength=knots.steps))

    def test_compiled_loop_is_the_plain_loop(self, name):
        solver, (keys, x) = SOLVERS[name](), start()
        knots = ts.make_knots(SCHEDULE, 6)
        plan = ts.Plan.from_list([0, 1, 0, 2, 2, 1], 3)
        scales = jnp.array([2, 3, 1, 2, 1, 4], jnp.float32)
        denoiser = ts.cfg(ts.stitch(networks(*MEANS), plan), scales, channels=3)
        options = dict(cond=COND, keys=keys)
        x0, found = jax.jit(ts.run, static_argnames="return_trajectory")(
            denoiser, solver, knots, x, return_trajectory=True, **options
        )
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
            return network.denoiser(x, knot, COND)

        state = solver.init(x)
        noise = x if solver.stochastic else None
        after = jax.eval_shape(
            lambda x, state: solver.step(denoise, x, state, here, there, noise), x, state
        )
        spec = jax.tree.map(lambda v: (v.shape, v.dtype), after)
        assert spec == jax.tree.map(lambda v: (v.shape, v.dtype), (x, state))
        options = dict(cond=COND, keys=keys)
        low = jax.eval_shape(
            functools.partial(ts.run, **options), network.denoiser, solver, knots, x
        )
        assert (low.shape, low.dtype) == (x.shape, jnp.float32)

    def test_one_compilation_over_plans_and_scales(self, name):
        solver, (keys, x) = SOLVERS[name](), start()
        knots, traces = ts.make_knots(SCHEDULE, 4), []

        @jax.jit
        def sample(denoiser, keys):
            traces.append(1)
            return ts.run(denoiser, solver, knots, x, cond=COND, keys=keys)

        def guided(scale, assignment, means=MEANS[:2]):
            return ts.cfg(ts.stitch(networks(*means), ts.Plan.from_list(assignment, 2)), scale)

        first = sample(guided(2, [0, 0, 0, 1]), keys)
        for other in (
            guided(2, [1, 0, 1, 0]), guided(3.5, [0, 0, 0, 1]), guided(2, [0, 0, 0, 1], MEANS[1:]),
        ):  # fmt: skip
            assert relative(sample(other, keys), first) > 1e-4
        # Noise comes from the keys alone, which solvers without noise do not use.
        np.testing.assert_array_equal(first, sample(guided(2, [0, 0, 0, 1]), keys))
        others = ts.image_keys(jax.random.key(2), jnp.arange(2))
        changed = sample(guided(2, [0, 0, 0, 1]), others)
        assert np.array_equal(first, changed) == (not solver.stochastic)
        assert len(traces) == 1

    def test_a_switch_at_every_step(self, name):
        """Between equal networks it has no effect; between others, both ways, values are finite."""
        solver, (keys, x) = SOLVERS[name](), start()
        knots = ts.make_knots(SCHEDULE, 7)

        @jax.jit
        def sample(denoiser):
            return ts.run(denoiser, solver, knots, x, cond=COND, keys=keys)

        equal, others = networks(0.7, 0.7), networks(*MEANS[:2])
        alone = sample(ts.stitch(equal, ts.Plan.from_switches([7], 7)))
        # pndm extrapolates over noise levels that fall 25 times, and rounding with them.
        assert relative(alone, sample(equal[0])) < (1e-4 if name == "pndm" else 1e-5)
        for switch in range(7):
            plan = ts.Plan.from_switches([switch], 7)
            assert relative(sample(ts.stitch(equal, plan)), alone) < 1e-5
            for either in (plan, plan.reversed()):
                assert np.isfinite(sample(ts.stitch(others, either))).all()

    def test_no_noise_level_is_lost_to_rounding(self, name):
        """Samples are finite on grids of few and many steps, also from pure noise."""
        solver, denoiser = SOLVERS[name](), Gaussian(0.3, 0.5, variance=0.5)
        x = ts.draw_noise(ts.image_keys(jax.random.key(0), jnp.arange(2)), 0, (2, 2, 1))

        @jax.jit
        def draw(knots):
            noise = jnp.broadcast_to(x, (knots.steps, *x.shape)) if solver.stochastic else None
            return ts.run(denoiser, solver, knots, x, noise=noise, return_trajectory=True)[1]

        for schedule in (*map(ts.make_schedule, ("linear", "cosine", "flow")), ZERO):
            for steps in (1, 3, 60):
                found = draw(ts.make_knots(schedule, steps))
                assert np.isfinite(found).all(), (schedule.name, schedule is ZERO, steps)


@pytest.mark.parametrize("name", sorted(SOLVERS.keys() - DETERMINISTIC))
def test_given_noise_is_the_drawn_noise(name):
    solver, (keys, x) = SOLVERS[name](), start()
    knots = ts.make_knots(SCHEDULE, 4)
    noise = jnp.stack([ts.draw_noise(keys, i + 1, SHAPE) for i in range(4)])
    sample = functools.partial(ts.run, Labelled(0.7), solver, knots, x, cond=COND)
    assert relative(sample(noise=noise), sample(keys=keys)) < 1e-5
    for both in (dict(), dict(keys=keys, noise=noise)):
        with pytest.raises(ValueError, match="either keys or noise"):
            sample(**both)
    with pytest.raises(ValueError, match="noise for 3 steps"):
        sample(noise=noise[:3])


@functools.cache
def many_normals():
    return np.random.default_rng(0).standard_normal((250, 20_000, 1, 1, 2), np.float32)


# The Gaussian's denoiser is not a consistency network, so lcm has a test of its own.
@pytest.mark.parametrize("name", sorted({*SOLVERS, *VARIANTS} - {"lcm"}))
def test_moments_of_a_gaussian(name):
    """With the exact denoiser and many steps, samples have the data's mean and covariance."""
    make = (SOLVERS | VARIANTS)[name]
    count, mean = 20_000, np.array([0.3, -0.2], np.float32)
    cov = np.array([[0.25, 0.12], [0.12, 0.16]], np.float32)
    knots = ts.make_knots(ts.make_schedule("linear"), 250)
    keys = ts.image_keys(jax.random.key(5), jnp.arange(count))
    x = ts.draw_noise(keys, 0, (1, 1, 2))
    denoiser, solver = correlated(mean, cov, variance=0.5), make()
    # Drawing noise from the keys takes most of the time, so one solver does it.
    given = solver.stochastic and name != "ddpm small"
    drawn = dict(noise=many_normals()) if given else dict(keys=keys)

    @jax.jit
    def draw(x, drawn):
        return ts.run(denoiser, solver, knots, x, **drawn)

    samples = draw(x, drawn)[:, 0, 0]
    # Five standard errors, and the bias of 250 steps, which is largest for "ddpm large".
    error = np.sqrt(np.diag(cov) / count)
    assert (np.abs(samples.mean(axis=0) - mean) < 5 * error + 0.005).all()
    spread = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / count)
    bias = 0.015 if name == "ddpm large" else 0.006
    assert (np.abs(np.cov(samples.T) - cov) < 5 * spread + bias).all()


def test_gradients_are_finite():
    """Through a whole trajectory, by the denoiser; branches not taken do not spoil them."""
    x, denoiser = jnp.linspace(-2, 2, 8).reshape(8, 1, 1, 1), Gaussian(0.3, 0.5, variance=0.5)
    keys, flow = ts.image_keys(jax.random.key(0), jnp.arange(8)), ts.make_schedule("flow")
    knots = ts.make_knots(flow, 6)

    @jax.jit
    @jax.grad
    def slope(denoiser, solver):
        return ts.run(denoiser, solver, knots, x, keys=keys).sum()

    for name, make in SOLVERS.items():
        assert np.isfinite(slope(denoiser, make()).mean), name


@pytest.mark.parametrize("name", sorted(DETERMINISTIC))
def test_one_step_starts_at_the_noise(name):
    knots = ts.make_knots(ts.make_schedule("linear"), 1)
    x = jnp.linspace(-2, 2, 8).reshape(8, 1, 1, 1)
    found = ts.run(Gaussian(0.3, 0.5), SOLVERS[name](), knots, x)
    assert float(jnp.abs(found - 0.3).max()) < 0.01  # pure noise says nothing but the mean


def even_grid(steps, low=-5.0, high=2.5):
    """Equal steps of log(alpha / sigma), in float64, ending before the clean data.

    The last step to clean data is of order 1 by design, and would hide the method's order.
    """
    ratio = np.exp(-np.linspace(low, high, steps + 1))
    alpha = 1 / np.sqrt(1 + ratio**2)
    index = np.arange(steps + 1, dtype=np.int32)
    return ts.Knots(index, index, index * 1.0, alpha, ratio * alpha, steps=steps)


ORDERS = {
    "ddim": 1, "dpmpp 1": 1, "dpmpp 2": 2, "dpmpp 3": 2, "dpmpp 3 exact": 3, "heun": 2,
    "flow_heun": 2, "pndm": 2, "unipc 1": 2, "unipc 2": 3, "unipc 3": 3,
}  # fmt: skip


@pytest.mark.parametrize("data", ["gaussian", "mixture"])
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name, data):
    """Towards the exact solution of the probability-flow ODE."""
    steps = (64, 128, 256) if ORDERS[name] < 3 else (256, 512)
    with float64():
        x = jnp.linspace(-2, 2, 65).reshape(-1, 1, 1, 1)
        if data == "gaussian":
            denoiser = Gaussian(0.3, 0.5)
            first, last = (
                (float(g.alpha[i]), float(g.sigma[i]))
                for g, i in ((even_grid(2), 0), (even_grid(2), -1))
            )
            # Along the ODE, (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2) is constant.
            scale = np.hypot(last[0] * 0.5, last[1]) / np.hypot(first[0] * 0.5, first[1])
            exact = last[0] * 0.3 + scale * (x - first[0] * 0.3)
        else:
            denoiser = Mixture()
            exact = transported(x, even_grid(2))
        found = [ts.run(denoiser, SOLVERS[name](), even_grid(n), x) for n in steps]
        errors = [float(jnp.abs(each - exact).mean()) for each in found]
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
    """Where the ODE takes x from the first to the last point, for ``Mixture``'s data.

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
    """The state after each step of diffusers' scheduler, with the same denoiser and noise."""
    with np.load(GOLDEN / "schedulers.npz") as arrays:
        times, expected = arrays[f"{name}/times"], arrays[f"{name}/x"]
        x, noise = arrays["x"], arrays["noise"]
    schedule = ts.make_schedule("flow" if name.startswith("flow") else "linear")
    knots = ts.make_knots(schedule, times / 1000 if schedule.name == "flow" else times)
    solver = GOLDENS[name]
    _, found = ts.run(
        Mixture(),
        solver,
        knots,
        jnp.asarray(x, jnp.float32),
        noise=jnp.asarray(noise[: len(times)], jnp.float32) if solver.stochastic else None,
        return_trajectory=True,
    )
    assert len(expected) == len(times)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert relative(ours, theirs) < 1e-5, step


def test_lcm_samples_the_data():
    """With the exact map of a consistency network, its samples have the data's moments."""
    count, mean, std = 20_000, 0.3, 0.5
    knots = ts.make_knots(ts.make_schedule("linear"), 4, "lcm")

    def consistent(x, knot, cond, /):
        # The end of the ODE, along which the standardized value is constant.
        width = jnp.hypot(knot.alpha * std, knot.sigma)
        x0 = mean + std * (x - knot.alpha * mean) / width
        return ts.Prediction(x0, (x - knot.alpha * x0) / knot.sigma)

    keys = ts.image_keys(jax.random.key(0), jnp.arange(count))
    x = ts.draw_noise(keys, 0, (1, 1, 1))
    samples = ts.run(consistent, ts.lcm(), knots, x, keys=keys)
    assert abs(float(samples.mean()) - mean) < 5 * std / count**0.5 + 0.002
    assert abs(float(samples.std()) - std) < 5 * std / (2 * count) ** 0.5 + 0.002


@ts.record
class Damped(ts.Solver):
    """DDIM that damps one of its two terms."""

    name = "damped"
    damping: float = 0.0
    term: str = ts.static(default="eps")

    def step(self, denoise, x, state, knot, next_knot, noise):
        x0, eps, _ = denoise(x, knot)
        terms = {"x0": next_knot.alpha * x0, "eps": next_knot.sigma * eps}
        terms[self.term] = (1 - self.damping) * terms[self.term]
        return terms["x0"] + terms["eps"], state


def test_a_user_defined_solver():
    """The loop and ``sample`` take it like any other, and its numbers are data."""
    knots, (_, x) = ts.make_knots(SCHEDULE, 4), start()
    traces = []

    @jax.jit
    def sample(solver):
        traces.append(1)
        return ts.run(Labelled(0.7), solver, knots, x, cond=COND)

    expected = sample(ts.ddim())
    assert relative(sample(Damped()), expected) < 1e-5
    assert relative(sample(Damped(0.5)), expected) > 1e-2
    assert len(traces) == 2
    assert relative(sample(Damped(0.5, "x0")), expected) > 1e-2
    assert len(traces) == 3
    np.testing.assert_array_equal(Damped().evaluations(knots), 1)
    images = [
        ts.sample(jax.random.key(1), [closed_network(0.7)], labels=[3, 7], steps=4, solver=solver,
                  decode=False)
        for solver in (Damped(), "ddim")
    ]  # fmt: skip
    assert relative(*images) < 1e-5


def test_names(monkeypatch):
    # As in a user's program, which has no run-time checks of types.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    assert set(ts.SOLVERS) >= {
        "ddim", "ddpm", "dpmpp", "unipc", "euler", "heun", "euler_ancestral", "pndm", "lcm", "sde",
        "flow_heun",
    }  # fmt: skip
    for name in ts.SOLVERS:
        assert same(ts.make_solver(name), ts.SOLVERS[name]())
        # No solver rejects an eta of 0.
        assert ts.make_solver(name, eta=0.0).name == ts.make_solver(name).name
    # Equal arguments, in whichever form.
    for first, second in (
        (ts.make_solver("dpmpp_3"), ts.dpmpp(3)),
        (ts.make_solver("dpmpp"), ts.dpmpp(2)),
        (ts.dpmpp(), ts.dpmpp(order=2)),
        (ts.dpmpp(np.int64(3)), ts.dpmpp(3)),
        (ts.make_solver("ddpm"), ts.ddpm("auto")),
        (ts.ddim(np.float32(0.5)), ts.ddim(0.5)),
        (ts.ddim(1), ts.ddim(1.0)),
        # The same method under the names of three papers.
        (ts.euler(), ts.ddim()),
        (ts.euler_ancestral(), ts.ddim(1.0)),
        (ts.make_solver("euler_ancestral", eta=0.5), ts.ddim(0.5)),
    ):
        assert same(first, second)
    # Another configuration is another structure; another number is not.
    for first, second in (
        (ts.dpmpp(2), ts.dpmpp(3)),
        (ts.dpmpp(3), ts.dpmpp(3, exact=True)),
        (ts.dpmpp(2), ts.dpmpp_sde(2)),
        (ts.ddpm("small"), ts.ddpm("large")),
        (ts.sde(), ts.sde("constant")),
        (ts.ddim(), ts.ddim(0.5)),
    ):
        assert jax.tree.structure(first) != jax.tree.structure(second)
    for first, second in (
        (ts.ddim(0.5), ts.ddim(1.0)), (ts.sde(), ts.sde(scale=0.5)), (ts.lcm(), ts.lcm(0.4, 9)),
    ):  # fmt: skip
        assert not same(first, second)
        assert jax.tree.structure(first) == jax.tree.structure(second)
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
        (lambda: ts.dpmpp([3]), r"dpmpp has order 1, 2 or 3, got \[3\]"),
        (lambda: ts.lcm(float("nan")), "sigma_data must be a finite number, got nan"),
        (lambda: ts.lcm(0.0), "sigma_data must be at least 1e-09, got 0.0"),
        (
            lambda: ts.sde("sigma", float("inf")),
            "the diffusion must be a finite number, got inf",
        ),
    ],
)
def test_bad_options(make, message, monkeypatch):
    # As in a user's program, which has no run-time checks of types.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        make()


def test_gradients_by_the_grid_and_eta():
    """Noise that vanishes, as in the last step or at eta = 0 and 1, has finite derivatives."""
    x = jnp.linspace(-2, 2, 8).reshape(8, 1, 1, 1)
    keys, knots = ts.image_keys(jax.random.key(0), jnp.arange(8)), ts.make_knots(SCHEDULE, 4)
    denoiser = Gaussian(0.3, 0.5)

    def total(alpha, eta):
        grid = dataclasses.replace(knots, alpha=alpha)
        solvers = [ts.ddim(eta), ts.ddpm("small"), ts.sde(), ts.dpmpp_sde()]
        return sum(ts.run(denoiser, s, grid, x, keys=keys).sum() for s in solvers)

    slope = jax.jit(jax.grad(total, (0, 1)))
    for eta in (0.0, 0.5, 1.0):
        slopes = slope(jnp.asarray(knots.alpha), jnp.float32(eta))
        assert all(np.isfinite(slope).all() for slope in slopes)


def test_a_learned_variance_that_is_not_there():
    knots, x = ts.make_knots(SCHEDULE, 3), jnp.zeros((1, 1, 1, 1))
    noise = jnp.zeros((3, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="variance='learned' needs a network that learned its"):
        ts.run(Mixture(), ts.ddpm("learned"), knots, x, noise=noise)
