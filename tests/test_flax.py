"""In Flax loops, as the README says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import quick_jit

import hfjax

nnx = pytest.importorskip("flax.nnx")


def make_problem():
    model = nnx.Sequential(
        nnx.Linear(2, 5, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(5, 1, rngs=nnx.Rngs(1))
    )
    graph, params = nnx.split(model, nnx.Param)
    objective = hfjax.Objective(
        lambda params, x: nnx.merge(graph, params)(x), hfjax.losses.squared_error()
    )
    x = jax.random.uniform(jax.random.key(0), (30, 2))
    return model, params, objective, (x, jnp.sin(3 * x[:, :1]))


def test_nnx_optimizer_hands_the_batch_on():
    model, params, objective, batch = make_problem()
    tx = hfjax.hessian_free(objective, preconditioner=None)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        params = nnx.state(model, nnx.Param)
        value, grads = objective.value_and_grad(params, batch)
        optimizer.update(model, grads, batch=batch)
        return value

    with jax.numpy_rank_promotion("allow"):  # Flax adds its biases so.
        _, grads = objective.value_and_grad(params, batch)
        updates, _ = quick_jit(tx.update)(grads, tx.init(params), params, batch=batch)
        expected = objective.value(optax.apply_updates(params, updates), batch)
        # These change the model, and `params` with it, in place.
        values = [step(model, optimizer) for _ in range(3)]
    assert values[2] < values[1] < values[0]
    np.testing.assert_allclose(values[1], expected, rtol=1e-5)
