"""The compiled loop against the plain one, and one table of contracts for every solver."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gaussian_denoiser, loop, relative, tiny_network

import tstitch_jax as ts
from tstitch_jax.pipeline import _sample

SOLVERS = {
    "ddim": lambda: ts.ddim(),
    "ddim eta 0.5": lambda: ts.ddim(0.5),
    "ddim eta 1": lambda: ts.ddim(1.0),
    "ddpm small": lambda: ts.ddpm("small"),
    "ddpm large": lambda: ts.ddpm("large"),
    "ddpm learned": lambda: ts.ddpm("learned"),
}
SHAPE = (8, 8, 4)


@pytest.fixture(scope="module")
def networks():
    return [tiny_network(seed, name=f"n{seed}") for seed in range(3)]


def start(batch):
    keys = ts.image_keys(jax.random.key(1), jnp.arange(batch))
    return keys, ts.draw_noise(keys, 0, SHAPE)


@pytest.mark.parametrize("name", SOLVERS)
class TestEverySolver:
    def test_compiled_loop_is_the_plain_loop(self, name, networks):
        solver, keys_x = SOLVERS[name](), start(2)
        knots = ts.make_knots(networks[0].schedule, 6)
        plan = ts.Plan.from_list([0, 1, 0, 2, 2, 1], 3)
        denoiser = ts.cfg(ts.stitch([n.denoiser for n in networks], plan), 2.0, 10, channels=3)
        options = dict(
            params=tuple(n.params for n in networks), cond=jnp.array([3, 7]), keys=keys_x[0]
        )
        x0, found = jax.jit(
            lambda x: ts.run(denoiser, solver, knots, x, return_trajectory=True, **options)
        )(keys_x[1])
        expected = loop(denoiser, solver, knots, keys_x[1], **options)
        assert found.shape == (6, 2, *SHAPE)
        assert found.dtype == x0.dtype == jnp.float32
        assert relative(found, expected) < 2e-5
        np.testing.assert_array_equal(x0, found[-1])

    def test_given_noise_is_the_drawn_noise(self, name, networks):
        solver, (keys, x) = SOLVERS[name](), start(2)
        assert solver.stochastic == (name != "ddim")
        if not solver.stochastic:
            return
        network, knots = networks[0], ts.make_knots(networks[0].schedule, 4)
        noise = jnp.stack([ts.draw_noise(keys, i + 1, SHAPE) for i in range(4)])
        options = dict(params=network.params, cond=jnp.array([1, 2]))
        drawn = ts.run(network.denoiser, solver, knots, x, keys=keys, **options)
        given = ts.run(network.denoiser, solver, knots, x, noise=noise, **options)
        assert relative(given, drawn) < 1e-6
        with pytest.raises(ValueError, match="either keys or noise"):
            ts.run(network.denoiser, solver, knots, x, **options)
        with pytest.raises(ValueError, match="noise for 3 steps"):
            ts.run(network.denoiser, solver, knots, x, noise=noise[:3], **options)

    @pytest.mark.parametrize("count", [2, 3])
    def test_a_switch_between_equal_networks_changes_nothing(self, name, count, networks):
        solver, (keys, x) = SOLVERS[name](), start(2)
        network, knots = networks[0], ts.make_knots(networks[0].schedule, 5)
        options = dict(cond=jnp.array([1, 2]), keys=keys)
        alone = ts.run(network.denoiser, solver, knots, x, params=network.params, **options)

        @jax.jit
        def stitched(plan):
            denoiser = ts.stitch([network.denoiser] * count, plan)
            return ts.run(denoiser, solver, knots, x, params=(network.params,) * count, **options)

        for switch in range(6):
            plan = ts.Plan.from_list([0] * switch + [count - 1] * (5 - switch), count)
            assert relative(stitched(plan), alone) < 1e-6

    def test_moments_of_a_gaussian(self, name):
        """With the exact denoiser and many steps, samples have the data's mean and deviation."""
        mean, std, count = 0.3, 0.5, 20_000
        knots = ts.make_knots(ts.make_schedule("linear"), 250)
        keys = ts.image_keys(jax.random.key(5), jnp.arange(count))
        x = ts.draw_noise(keys, 0, (1, 1, 1))
        denoiser = gaussian_denoiser(mean, std, variance=0.5)
        samples = jax.jit(
            lambda x: ts.run(
                denoiser,
                SOLVERS[name](),
                knots,
                x,
                params=1.0,
                keys=keys,
            )
        )(x)
        # Five standard errors, and the bias of 250 steps, which "large" has most of.
        assert abs(float(samples.mean()) - mean) < 5 * std / count**0.5 + 0.005
        assert abs(float(samples.std()) - std) < 5 * std / (2 * count) ** 0.5 + 0.015


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine", "flow"])
def test_no_noise_level_is_lost_to_rounding(schedule):
    """Every grid of 1 to 60 steps, with the most noise: finite, also where alpha is 0."""
    schedule = ts.make_schedule(schedule)
    keys = ts.image_keys(jax.random.key(0), jnp.arange(2))
    x = ts.draw_noise(keys, 0, (2, 2, 1))

    @jax.jit
    def step(x, knot, after, noise):
        def denoise(x, knot):
            return gaussian_denoiser(0.3, 0.5)(1.0, x, knot, None)

        return [s.step(denoise, x, (), knot, after, noise)[0] for s in (ts.ddim(1.0), ts.ddpm())]

    for steps in range(1, 61):
        knots = ts.make_knots(schedule, steps)
        for i in {0, 1, steps // 2, steps - 1} & set(range(steps)):
            pair = [jax.tree.map(lambda v, j=j: jnp.asarray(v[j]), knots) for j in (i, i + 1)]
            # One executable for all: the number of steps plays no part in a step.
            pair = [dataclasses.replace(k, steps=1) for k in pair]
            for found in step(x, *pair, x):
                assert np.isfinite(found).all(), (steps, i)


def test_one_step_starts_at_the_noise():
    knots = ts.make_knots(ts.make_schedule("linear"), 1)
    x = jnp.linspace(-2, 2, 8).reshape(8, 1, 1, 1)
    found = ts.run(gaussian_denoiser(0.3, 0.5), ts.ddim(), knots, x, params=1.0)
    assert float(jnp.abs(found - 0.3).max()) < 0.01  # of pure noise only the mean is known


def test_ddim_converges_with_order_one():
    """To the exact solution of the probability-flow ODE of a Gaussian."""
    mean, std = 0.3, 0.5
    schedule = ts.make_schedule("cosine", 4096)
    x = jnp.linspace(-2, 2, 64).reshape(64, 1, 1, 1)
    errors = []
    for steps in (32, 64, 128, 256):
        knots = ts.make_knots(schedule, steps)
        found = ts.run(gaussian_denoiser(mean, std), ts.ddim(), knots, x, params=1.0)
        first = float(knots.alpha[0]), float(knots.sigma[0])
        # Along the ODE, (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2) stays what it was.
        exact = mean + std * (x - first[0] * mean) / np.hypot(first[0] * std, first[1])
        errors.append(float(jnp.abs(found - exact).max()))
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(orders - 1) < 0.2), (errors, orders)


@pytest.mark.parametrize("target", ["v", "x0", "flow", "eps"])
def test_targets_agree(target):
    """A network of any target samples the same images from the same knowledge."""
    knots = ts.make_knots(ts.make_schedule("linear"), 10)
    exact = gaussian_denoiser(0.3, 0.5)

    def apply(params, x, time, cond):
        index = jnp.argmin(jnp.abs(knots.time[:-1] - time[0]))
        knot = jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], knots)
        x0, eps, _ = exact(params, x, knot, cond)
        from tstitch_jax.prediction import make_target

        return make_target(target, x0, eps, knot.alpha, knot.sigma)

    _, x = start(2)
    found = ts.run(ts.as_denoiser(apply, target), ts.ddim(), knots, x, params=1.0)
    assert relative(found, ts.run(exact, ts.ddim(), knots, x, params=1.0)) < 1e-4


def count_eqns(jaxpr, name):
    """How often a primitive stands in a jaxpr, at any depth."""
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive.name == name
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += count_eqns(inner, name)
    return total


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_one_scan_with_one_cond(solver, networks):
    request = ts.pipeline.prepare(
        jax.random.key(0),
        networks[:2],
        labels=[1, 2],
        fractions=[0.5, 0.5],
        steps=7,
        solver=solver,
        decode=False,
    )
    jaxpr = jax.make_jaxpr(lambda *a: _sample.__wrapped__(*a, **request.static))(*request.dynamic)
    assert count_eqns(jaxpr.jaxpr, "scan") == 1
    assert count_eqns(jaxpr.jaxpr, "cond") == 1
    assert count_eqns(jaxpr.jaxpr, "while") == 0


def test_one_compile_for_all_data(networks):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )

    def sample(seed, labels, fractions, scale):
        return ts.sample(
            jax.random.key(seed),
            networks,
            labels=labels,
            fractions=fractions,
            cfg_scale=scale,
            steps=9,
            decode=False,
        ).block_until_ready()

    first = sample(0, [1, 2, 3], [0.2, 0.3, 0.5], 1.5)
    assert compiled, "the listener hears compilations"
    compiled.clear()
    results = [
        sample(0, [1, 2, 3], [0.0, 0.0, 1.0], 1.5),
        sample(0, [1, 2, 3], [0.1, 0.8, 0.1], 1.5),
        sample(7, [1, 2, 3], [0.2, 0.3, 0.5], 1.5),
        sample(0, [0, 9, 3], [0.2, 0.3, 0.5], 1.5),
        sample(0, [1, 2, 3], [0.2, 0.3, 0.5], 1.0),
        sample(0, [1, 2, 3], [0.2, 0.3, 0.5], 4.0),
    ]
    assert not compiled
    for result in results:  # each of them matters
        assert relative(result, first) > 1e-3
    again = sample(0, [1, 2, 3], [0.2, 0.3, 0.5], 1.5)
    np.testing.assert_array_equal(again, first)


def test_a_mapped_plan_is_refused(networks):
    knots = ts.make_knots(networks[0].schedule, 4)
    _, x = start(1)
    params = tuple(n.params for n in networks[:2])

    @jax.jit
    def sample(assignment, x):
        denoiser = ts.stitch([n.denoiser for n in networks[:2]], ts.Plan(assignment, 2))
        return ts.run(denoiser, ts.ddim(), knots, x, params=params, cond=jnp.array([1]))

    assignments = jnp.array([[0, 0, 1, 1], [0, 1, 1, 1]], jnp.int32)
    with pytest.raises(ValueError, match="cannot be mapped by vmap"):
        jax.vmap(sample, (0, None))(assignments, x)
    # Mapping anything but the plan is fine, and keeps the switch a switch.
    stack = jnp.stack([x, 2 * x])
    mapped = jax.vmap(sample, (None, 0))(assignments[0], stack)
    assert relative(mapped[1], sample(assignments[0], 2 * x)) < 1e-5
    jaxpr = jax.make_jaxpr(jax.vmap(sample, (None, 0)))(assignments[0], stack)
    assert count_eqns(jaxpr.jaxpr, "cond") == 1


@pytest.mark.parametrize(("solver", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
def test_an_image_depends_on_seed_and_index_alone(solver, eta, networks):
    def sample(count):
        return ts.sample(
            jax.random.key(3),
            networks[:2],
            labels=[4] * count,
            fractions=[0.5, 0.5],
            steps=5,
            solver=solver,
            eta=eta,
            decode=False,
        )

    many = sample(5)
    for count in (1, 2, 3):
        assert relative(sample(count), many[:count]) < 1e-5
    assert relative(many[0], many[1]) > 0.1  # not the same noise for all


def test_the_sampler_runs_on_every_device_under_pmap(networks):
    """The pieces compose with a user's own pmap; eight devices, one image each."""
    knots = ts.make_knots(networks[0].schedule, 4)
    params = tuple(n.params for n in networks[:2])
    keys, x = start(8)
    cond = jnp.arange(8, dtype=jnp.int32)

    def sample(x, cond, keys, networks_of_steps):
        denoiser = ts.stitch([n.denoiser for n in networks[:2]], ts.Plan(networks_of_steps, 2))
        return ts.run(denoiser, ts.ddpm(), knots, x, params=params, cond=cond, keys=keys)

    assignment = jnp.array([0, 0, 1, 1], jnp.int32)
    whole = jax.jit(sample)(x, cond, keys, assignment)
    split = jax.pmap(sample, in_axes=(0, 0, 0, None))(
        x[:, None], cond[:, None], keys[:, None], assignment
    )
    assert relative(split[:, 0], whole) < 1e-5
