"""J by columns and by rows, for losses that couple outputs and for those that do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, quick_jit

import hfjax
from hfjax.curvature.jacobian import jacobian
from hfjax.losses.loss import are_disjoint

F64 = jnp.float64
CASES, UNITS = 3, 4
X = jax.random.normal(jax.random.key(0), (CASES, 2), F64)
PARAMS = {"a": jnp.array([0.3, -0.5], F64), "b": jnp.asarray(0.7, F64), "none": X[:0]}
SHARES = jax.nn.softmax(jax.random.normal(jax.random.key(1), (CASES, UNITS), F64))
WEIGHTS = jnp.array([1.0, 0.0, 2.5], F64)


def model_fn(params, x):
    waves = jnp.arange(1.0, UNITS + 1, dtype=x.dtype)
    return jnp.sin(params["b"] * waves[None] + (x @ params["a"])[:, None])


class Ways(hfjax.Objective):
    """An objective whose J is computed in a given way."""

    def __init__(self, loss, mode, model_fn=model_fn):
        super().__init__(model_fn, loss)
        vars(self).update(mode=mode)

    def _terms(self, batch, name="batch"):
        return tuple(t._replace(mode=self.mode) for t in super()._terms(batch, name))


LOSSES = {
    "squared_error": hfjax.losses.squared_error(),
    "softmax": hfjax.losses.softmax_cross_entropy(),
    "logistic": hfjax.losses.sigmoid_cross_entropy(),
    "function": hfjax.losses.from_function(lambda z, t: jnp.cosh(z - t)),
}


@pytest.mark.every
@pytest.mark.parametrize("name", LOSSES)
def test_rows_and_columns_are_the_same_jacobian(name):
    batch = (X, SHARES, WEIGHTS)

    @quick_jit
    def found(params, step):
        both = [Ways(LOSSES[name], mode) for mode in ("forward", "reverse")]
        parts = [jacobian(f, params, batch) for f in both]
        gradient = both[0].value_and_grad(params, batch)[1]
        product = hfjax.curvature.ggn(both[0], params, batch)(step)
        there = [part.residuals_at(step) for part in parts]
        ours = parts[0].transpose(parts[0].residuals)
        curved = parts[0].transpose(parts[0].product(step))
        known = [part[:2] for part in parts]
        return known, there, (gradient, product), (ours, curved)

    step = jax.tree.map(lambda x: 0.1 + 0 * x, PARAMS)
    (forward, reverse), there, truth, ours = found(PARAMS, step)
    assert_close(forward, reverse, rtol=1e-12, atol=1e-14)
    assert_close(*there, rtol=1e-12, atol=1e-14)
    # J̃ᵀr̃ and J̃ᵀJ̃v are known without J̃.
    assert_close(ours, truth, rtol=1e-10, atol=1e-13)


def test_only_losses_without_coupled_outputs_have_disjoint_columns():
    one = (jnp.ones((1, 5), F64), jnp.full((1, 5), 0.2, F64), range(5))
    known = {name: are_disjoint(loss, *one) for name, loss in LOSSES.items()}
    assert known.pop("softmax") is False
    assert all(known.values())


def with_loop(params, x):
    """Compute a power by a loop whose length is not known beforehand."""

    def going(carry):
        return carry[0] < x.shape[1] + 0 * carry[1][0, 0]

    def step(carry):
        return carry[0] + 1, carry[1] * (params["b"] + x @ params["a"])[:, None]

    start = (jnp.zeros((), F64), jnp.ones((len(x), UNITS), F64))
    return jax.lax.while_loop(going, step, start)[1]


def test_few_parameters_go_forward_and_many_or_those_without_a_tangent_backward():
    @jax.custom_vjp
    def backward_only(x):
        return jnp.sin(x)

    backward_only.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))

    def rows(model, mode="auto", **options):
        f = Ways(hfjax.losses.squared_error(), mode, model)
        batch = (X, SHARES[:, : options.get("units", UNITS)])
        return quick_jit(lambda p: jacobian(f, p, batch).rows)(PARAMS)

    found = rows(with_loop)  # 3 parameters, 4 outputs of an example.
    power = PARAMS["b"] + X @ PARAMS["a"]
    slope = np.repeat(2 * power, UNITS) / np.sqrt(CASES)  # f is a mean.
    assert_close(found["b"], slope, rtol=1e-12)
    assert_close(found["a"], slope[:, None] * np.repeat(X, UNITS, axis=0), rtol=1e-12)
    with pytest.raises(ValueError, match=r"[Rr]everse-mode"):
        rows(with_loop, "reverse")
    with pytest.raises(ValueError, match=r"[Rr]everse-mode"):
        rows(lambda p, x: with_loop(p, x)[:, :3], units=3)

    def backward(p, x):
        return backward_only(x @ p["a"])[:, None] * jnp.ones((1, UNITS)) * p["b"]

    def plain(p, x):
        return jnp.sin(x @ p["a"])[:, None] * jnp.ones((1, UNITS)) * p["b"]

    assert_close(rows(backward), rows(plain), rtol=1e-12)
