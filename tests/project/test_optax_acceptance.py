"""What Optax asks of an optimizer that is contributed to it, asked of this one.

Unknown extra arguments and compilation are in `test_contract.py`, accumulation in
`test_optax_wrappers.py`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from reference import assert_close

import hfjax
from hfjax.curvature import Curvature, ggn, hessian


class Target(NamedTuple):
    """A function of the parameters alone, as an objective of one case.

    Attributes:
      start: θ at first.
      minimum: where f is 0.
      objective: f.
      value_fn: f written out.
      updates: that lead from the one to the other.
      curvature: B.
    """

    start: Any
    minimum: Any
    objective: hfjax.Objective
    value_fn: Callable
    updates: int
    curvature: Curvature = ggn


BATCH = (jnp.zeros(1, jnp.float32), jnp.zeros(1, jnp.float32))


def sum_of_squares(residuals):
    """Make the residuals the outputs, so that G is twice their JᵀJ."""

    def model_fn(params, x):
        return jax.tree.map(lambda r: r[None], residuals(params))

    def loss(outputs, targets):
        squares = jax.tree.map(optax.losses.squared_error, outputs)
        rows = [leaf.reshape(1, -1) for leaf in jax.tree.leaves(squares)]
        return jnp.concatenate(rows, axis=1)

    return hfjax.Objective(model_fn, loss)


def any_function(fn):
    """Make the value of `fn` the only output, and the loss that output itself."""
    return hfjax.Objective(
        lambda params, x: fn(params)[None], lambda outputs, targets: outputs
    )


def quadratic(start, minimum):
    def residuals(params):
        return jax.tree.map(jnp.subtract, params, minimum)

    def value_fn(params):
        return optax.tree.norm(residuals(params), squared=True)

    return Target(start, minimum, sum_of_squares(residuals), value_fn, updates=10)


def valley(params):
    x, y = params
    return [1 - x, 10 * (y - x**2)]


def rosenbrock(params):
    x, y = params
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def f32(*rows):
    return jnp.asarray(rows, jnp.float32)


MATRIX = f32([3.0, -2.0], [1.0, 4.0])
MIXED = (f32(1.0, -1.0, 2.0), f32([1.0, 0.0], [-1.0, 1.0]))
ENDS = f32(0.0, 0.0), f32(1.0, 1.0)
TARGETS = {
    "parabola": quadratic(f32(-1.0, 10.0, 1.0), f32(1.0, -1.0, 1.0)),
    "matrix": quadratic(0 * MATRIX, MATRIX),
    "mixed_tree": quadratic(jax.tree.map(jnp.zeros_like, MIXED), MIXED),
    "rosenbrock_as_squares": Target(*ENDS, sum_of_squares(valley), rosenbrock, 20),
    # G of it is 0.
    "rosenbrock_as_any_function": Target(
        *ENDS, any_function(rosenbrock), rosenbrock, 20, hessian
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_it_converges_on_the_functions_that_optax_tries(name):
    target = TARGETS[name]
    objective = target.objective
    tx = hfjax.hessian_free(objective, curvature=target.curvature)
    elsewhere = jax.tree.map(lambda leaf: jnp.cos(3 * leaf) + 0.3, target.start)
    for params in (target.start, elsewhere):
        value = objective.value(params, BATCH)
        np.testing.assert_allclose(value, target.value_fn(params), rtol=1e-5)
    (params, _), (info, _) = training.trained(
        objective, tx, target.start, BATCH, target.updates
    )
    assert_close(params, target.minimum, atol=1e-6)
    assert np.all(info.value_after <= info.value_before)


# A smaller optimizer will do for the rest.
PARABOLA = TARGETS["parabola"]
PARAMS = PARABOLA.start
GRADS = PARABOLA.objective.value_and_grad(PARAMS, BATCH)[1]
OPTIONS = {
    "preconditioner": None,
    "solver": hfjax.cg.conjugate_gradient(max_iterations=4),
}
MAKE = functools.partial(hfjax.hessian_free, PARABOLA.objective, **OPTIONS)


def updated(tx):
    return training.one_update(PARABOLA.objective, tx, PARAMS, BATCH, grads=GRADS)


@functools.cache
def reference_update():
    return updated(MAKE(learning_rate=0.7, damping=hfjax.damping.constant(0.5)))


def assert_equal(tree, truth):
    assert jax.tree.structure(tree) == jax.tree.structure(truth)
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(truth), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_map_params_finds_what_is_like_the_parameters_and_leaves_the_rest():
    _, state = reference_update()
    assert state.direction[0] != 0
    tx = MAKE(damping=hfjax.damping.constant(0.5))
    assert_equal(optax.tree.map_params(tx, lambda leaf: leaf, state), state)
    doubled = optax.tree.map_params(tx, lambda leaf: 2 * leaf, state)
    assert_equal(doubled, state._replace(direction=2 * state.direction))


def test_injected_hyperparameters_change_neither_updates_nor_state():
    @functools.partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)
    def make(learning_rate, damping):
        damping = hfjax.damping.constant(damping)
        return MAKE(learning_rate=learning_rate, damping=damping)

    updates, state = updated(make(0.7, 0.5))
    assert_equal((updates, state.inner_state), reference_update())


def test_schedules_that_are_constant_are_the_numbers():
    constant = optax.constant_schedule
    damping = hfjax.damping.constant(constant(0.5))
    tx = MAKE(learning_rate=constant(0.7), damping=damping)
    assert_equal(updated(tx), reference_update())


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_state_and_updates_keep_shape_and_dtype_under_cond(dtype):
    # `cond` refuses, while it is traced, branches of other types.
    tx, params = MAKE(), PARAMS.astype(dtype)
    wrong = jnp.bfloat16 if dtype == jnp.float16 else jnp.float16
    batch = jax.tree.map(lambda leaf: leaf.astype(dtype), BATCH)

    def step(params, state, chosen):
        value, grads = PARABOLA.objective.value_and_grad(params, batch)
        extra = {"batch": batch, "value": value.astype(wrong)}
        return jax.lax.cond(
            chosen,
            lambda: tx.update(grads, state, params, **extra),
            lambda: (params, state),
        )

    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(step, params, state, True)
    assert (updates.dtype, updates.shape) == (params.dtype, params.shape)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (old.dtype, old.shape) == (new.dtype, new.shape)


@pytest.mark.slow
def test_parameters_in_float16_reach_the_minimum_too():
    # The only dtype that `test_contract.py` does not train in.
    tx, params = MAKE(), PARAMS.astype(jnp.float16)
    batch = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), BATCH)
    step, traces = training.counted(
        functools.partial(training.train_step, PARABOLA.objective, tx)
    )
    state = tx.init(params)
    for _ in range(10):
        params, state = step(params, state, batch)
    assert len(traces) == 1
    assert params.dtype == jnp.float16
    eps = float(jnp.finfo(jnp.float16).eps)
    np.testing.assert_allclose(params, PARABOLA.minimum, atol=eps)
