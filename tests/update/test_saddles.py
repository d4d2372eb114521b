"""Negative curvature: with the Hessian itself, f falls on, and below the saddle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import quick_jit

import hfjax

NO_DATA = (jnp.zeros((1, 1)), jnp.zeros((1, 1)))


def objective_of(f):
    """Return f(θ) as an objective of one case, without data."""
    return hfjax.Objective(lambda p, x: f(p)[None] + 0 * x[:, 0], lambda z, t: z)


def monkey(p):
    """Lie flat and degenerate at 0, where all second derivatives vanish too."""
    x, y = p["x"], p["y"]
    return x**3 - 3 * x * y**2 + 0.25 * (x**2 + y**2) ** 2


def valley(p):
    """Have a strict saddle at 0 and minima of −1/4 at y = ±1."""
    return 0.5 * p["x"] ** 2 - 0.5 * p["y"] ** 2 + 0.25 * p["y"] ** 4


RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((20, 4)))
T = X @ jnp.asarray(RNG.standard_normal((4, 3)))
LINEAR = hfjax.Objective(
    lambda p, x: x @ p["first"] @ p["second"], hfjax.losses.squared_error()
)


def linear_params(size):
    rng = np.random.default_rng(1)
    return {
        "first": jnp.asarray(size * rng.standard_normal((4, 3))),
        "second": jnp.asarray(size * rng.standard_normal((3, 3))),
    }


PLACES = {
    # Objective, parameters, data, f at the saddle, the least f.
    "monkey": (
        objective_of(monkey),
        {"x": jnp.asarray(1e-3), "y": jnp.asarray(-2e-3)},
        NO_DATA,
        0.0,
        -27 / 4,
    ),
    "valley": (
        objective_of(valley),
        {"x": jnp.asarray(0.5), "y": jnp.asarray(1e-6)},
        NO_DATA,
        0.0,
        -0.25,
    ),
    "two_linear_layers": (
        LINEAR,
        linear_params(1e-3),
        (X, T),
        float(0.5 * np.mean(np.sum(np.square(T), axis=1))),
        0.0,
    ),
}

WAYS = {
    "damped": {"damping": hfjax.damping.searched(init=0.1)},
    "trust_region": {
        "damping": hfjax.trust_region.radius(init=0.1),
        "solver": hfjax.trust_region.steihaug_toint(),
        "preconditioner": None,
    },
    "elliptical_trust_region": {
        "damping": hfjax.trust_region.radius(init=0.1),
        "solver": hfjax.trust_region.steihaug_toint(),
        "preconditioner": hfjax.preconditioners.diagonal(kappa=1e-3),
    },
    "krylov": {
        "damping": hfjax.damping.constant(0.0),
        "solver": hfjax.krylov.subspace_descent(dimension=4),
        "backtracking": None,
        "preconditioner": None,
    },
}


@functools.cache
def training(place, way):
    objective, _, data, _, _ = PLACES[place]
    tx = hfjax.hessian_free(objective, curvature=hfjax.curvature.hessian, **WAYS[way])

    def step(carry, _):
        params, state = carry
        grads = objective.value_and_grad(params, data)[1]
        updates, state = tx.update(grads, state, params, batch=data)
        params = jax.tree.map(jnp.add, params, updates)
        finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((params, state))]
        return (params, state), (
            objective.value(params, data),
            jnp.all(jnp.stack(finite)),
            state.info.accepted,
        )

    def train(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=50)

    return quick_jit(train)


@pytest.mark.parametrize(
    ("place", "way"),
    [
        ("monkey", "damped"),
        ("monkey", "trust_region"),
        ("monkey", "krylov"),
        ("valley", "damped"),
        ("valley", "trust_region"),
        ("valley", "elliptical_trust_region"),
        ("two_linear_layers", "damped"),
        ("two_linear_layers", "trust_region"),
        ("two_linear_layers", "krylov"),
    ],
)
def test_f_never_rises_and_ends_below_the_saddle(place, way):
    objective, params, data, saddle, least = PLACES[place]
    _, (values, finite, accepted) = training(place, way)(params)
    values = np.concatenate([[objective.value(params, data)], values])
    assert np.all(finite)
    assert np.all(np.diff(values) <= 1e-15 * np.abs(values[1:]))
    assert np.any(accepted)
    assert values[-1] < saddle - 0.5 * (saddle - least)
    assert values[-1] >= least - 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("way", ["damped", "trust_region"])
def test_at_the_saddle_itself_nothing_moves_and_nothing_breaks(way):
    # The gradient is zero, and HF is a method of gradients.
    for place in ("valley", "two_linear_layers"):
        _, params, _, saddle, _ = PLACES[place]
        zero = jax.tree.map(jnp.zeros_like, params)
        with jax.debug_nans(True):
            (end, state), (values, finite, accepted) = training(place, way)(zero)
        assert np.all(finite)
        assert not np.any(accepted)
        for leaf in jax.tree.leaves(end):
            np.testing.assert_array_equal(leaf, 0)
        np.testing.assert_allclose(values, saddle)
        assert state.info.rejection == hfjax.Rejection.ZERO_GRADIENT
        assert state.damping == pytest.approx(0.1)


@pytest.mark.slow
def test_no_nan_arises_on_the_way():
    with jax.debug_nans(True):
        for way in ("damped", "trust_region", "elliptical_trust_region"):
            _, params, _, _, _ = PLACES["valley"]
            training("valley", way)(params)
