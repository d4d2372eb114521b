import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hfjax
from hfjax import preconditioners

OBJECTIVE = hfjax.Objective(
    lambda params, x: x @ params["w"], hfjax.losses.squared_error(), weight_decay=0.25
)
PARAMS = {"w": jnp.array([[1.0], [-2.0]])}


def make_batch():
    x, t = jax.random.normal(jax.random.key(0), (2, 6, 2))
    return x, t[:, :1]


def fisher():
    """Mean of squared per-case gradients (z − t) x of the linear model, plus decay."""
    x, t = (np.asarray(leaf) for leaf in make_batch())
    error = x @ np.asarray(PARAMS["w"]) - t
    return np.mean(np.square(error * x), axis=0)[:, None] + 0.25


@pytest.mark.parametrize("exponent", [0.0, 0.75, 1.0])
def test_diagonal_divides_by_the_power_of_the_damped_diagonal(exponent):
    scale = {"w": jnp.array([[1.0], [3.0]])}
    rule = preconditioners.diagonal(exponent=exponent, kappa=0.5, scale=scale)
    apply = rule.build(OBJECTIVE, PARAMS, make_batch(), jnp.float64(2.0), None)
    r = {"w": jnp.array([[5.0], [7.0]])}
    total = fisher() + 2.0 + 0.5 * np.asarray(scale["w"])
    np.testing.assert_allclose(
        apply(r)["w"], np.asarray(r["w"]) / total**exponent, rtol=1e-10
    )


def test_diagonal_takes_any_estimate():
    rule = preconditioners.diagonal(
        lambda objective, params, batch: {"w": jnp.array([[3.0], [8.0]])}, exponent=0.5
    )
    apply = rule.build(OBJECTIVE, PARAMS, make_batch(), jnp.float64(1.0), None)
    r = {"w": jnp.ones((2, 1))}
    np.testing.assert_allclose(apply(r)["w"], [[1 / 2], [1 / 3]], rtol=1e-12)


def test_parameter_of_which_nothing_is_known_is_left_be():
    rule = preconditioners.diagonal(
        lambda objective, params, batch: {"w": jnp.array([[0.0], [4.0]])}, exponent=0.5
    )
    apply = rule.build(OBJECTIVE, PARAMS, make_batch(), jnp.float64(0.0), None)
    r = {"w": jnp.ones((2, 1))}
    np.testing.assert_allclose(apply(r)["w"], [[1.0], [0.5]])


def test_residual_keeps_its_dtype():
    rule = preconditioners.diagonal()
    apply = rule.build(OBJECTIVE, PARAMS, make_batch(), jnp.float64(1.0), None)
    assert apply({"w": jnp.ones((2, 1), jnp.bfloat16)})["w"].dtype == jnp.bfloat16


def test_custom_builds_from_everything_it_may_need():
    def build(objective, params, batch, damping):
        assert objective is OBJECTIVE
        assert params is PARAMS
        assert len(batch) == 2
        return lambda r: jax.tree.map(lambda leaf: leaf / damping, r)

    rule = preconditioners.custom(build)
    apply = rule.build(OBJECTIVE, PARAMS, make_batch(), jnp.float64(4.0), None)
    np.testing.assert_array_equal(apply({"w": jnp.ones((2, 1))})["w"], 0.25)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: preconditioners.diagonal(exponent=2.0), ValueError, "`exponent`"),
        (lambda: preconditioners.diagonal(kappa=-1.0), ValueError, "`kappa` must be"),
        (lambda: preconditioners.custom(3), TypeError, "`build` must be callable"),
    ],
)
def test_bad_options_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
