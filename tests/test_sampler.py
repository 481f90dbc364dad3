"""The compiled loop: its results, its compilations and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Gaussian, relative, request_of, tiny_network

import tstitch_jax as ts
from tstitch_jax.core.prediction import make_target

SHAPE = (8, 8, 4)


@pytest.fixture(scope="module")
def networks():
    return [tiny_network(seed, name=f"n{seed}") for seed in range(3)]


def start(batch):
    keys = ts.image_keys(jax.random.key(1), jnp.arange(batch))
    return keys, ts.draw_noise(keys, 0, SHAPE)


@pytest.mark.parametrize("target", ["v", "x0", "flow", "eps"])
def test_targets_agree(target):
    """Networks that predict the same in different targets sample the same images."""
    knots = ts.make_knots(ts.make_schedule("linear"), 10)

    def apply(exact, x, time, cond):
        index = jnp.argmin(jnp.abs(knots.time[:-1] - time[0]))
        knot = jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], knots)
        x0, eps, _ = exact(x, knot)
        return make_target(target, x0, eps, knot.alpha, knot.sigma)

    exact, (_, x) = Gaussian(jnp.float32(0.3), 0.5), start(2)
    found = ts.run(ts.as_denoiser(apply, exact, target), ts.ddim(), knots, x)
    assert relative(found, ts.run(exact, ts.ddim(), knots, x)) < 1e-4


def count_eqns(jaxpr, name):
    """Number of uses of a primitive in a jaxpr, at any depth, except in choices by platform."""
    total, by_platform = 0, set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "platform_index" or by_platform & set(map(id, eqn.invars)):
            by_platform |= set(map(id, eqn.outvars))
        else:
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
    request = request_of(
        jax.random.key(0),
        networks[:2],
        labels=[1, 2],
        fractions=[0.5, 0.5],
        steps=7,
        solver=solver,
        decode=False,
    )
    jaxpr = jax.make_jaxpr(request.function)(request.inputs)
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
    for result in results:  # each change has an effect
        assert relative(result, first) > 1e-3
    again = sample(0, [1, 2, 3], [0.2, 0.3, 0.5], 1.5)
    np.testing.assert_array_equal(again, first)


def test_a_mapped_plan_is_refused(networks):
    knots = ts.make_knots(networks[0].schedule, 4)
    pair, (_, x) = [network.denoiser for network in networks[:2]], start(1)

    @jax.jit
    def sample(assignment, x):
        denoiser = ts.stitch(pair, ts.Plan(assignment, 2))
        return ts.run(denoiser, ts.ddim(), knots, x, cond=jnp.array([1]))

    assignments = jnp.array([[0, 0, 1, 1], [0, 1, 1, 1]], jnp.int32)
    with pytest.raises(ValueError, match="cannot be mapped by vmap"):
        jax.vmap(sample, (0, None))(assignments, x)
    # Other arguments may be mapped, and one branch runs as before.
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
