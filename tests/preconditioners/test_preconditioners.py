import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.flatten_util import ravel_pytree
from problems import HIDDEN
from reference import quick_jit

import hfjax
from hfjax import diagonals, preconditioners
from hfjax.curvature.structural import with_structural_loss

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


@pytest.mark.parametrize(
    ("estimate", "structural"),
    [
        (diagonals.empirical_fisher, 2.0),
        (diagonals.ggn_exact, 2.0),
        (functools.partial(diagonals.ggn_rademacher, num_probes=4000), 0.0),
    ],
)
def test_diagonal_contains_each_entry_of_the_damping_matrix(estimate, structural):
    problem = HIDDEN[2]
    theta, unravel = ravel_pytree(problem.params)
    damping, scale = jnp.linspace(0.1, 3.0, theta.size), jnp.cos(theta) + 2
    rule = preconditioners.diagonal(
        estimate, exponent=0.6, kappa=0.2, scale=unravel(scale)
    )
    objective = with_structural_loss(problem.objective(), structural)

    @quick_jit
    def apply(r, key):
        build = rule.build
        p = build(objective, problem.params, problem.batch, unravel(damping), key)
        return p(r)

    key = jax.random.key(0)
    ours = ravel_pytree(apply(unravel(jnp.ones_like(theta)), key))[0]
    if estimate is diagonals.empirical_fisher:
        # The distance of hidden states has no gradient: μ is not in it.
        d = reference.empirical_fisher(problem)
    else:
        full = reference.ggn(problem) + structural * reference.structural(problem)
        d = np.diag(full)
    truth = (d + damping + 0.2 * scale) ** -0.6
    # A probe is off by √2 of a case at most: here by 5 times that over √4000.
    random = structural == 0
    np.testing.assert_allclose(ours, truth, rtol=0.12 if random else 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimate", "draws"),
    [
        (diagonals.ggn_exact, False),
        (diagonals.ggn_rademacher, True),
        (functools.partial(diagonals.ggn_rademacher, num_probes=2), True),
    ],
)
def test_only_a_random_estimate_depends_on_the_key(estimate, draws):
    problem = HIDDEN[2]
    rule, r = preconditioners.diagonal(estimate), problem.params
    given = (problem.objective(), problem.params, problem.batch, jnp.float64(1.0))
    one, other = (
        ravel_pytree(rule.build(*given, jax.random.key(k))(r))[0] for k in (0, 1)
    )
    assert np.any(one != other) == draws


@pytest.mark.slow
def test_the_key_of_an_update_is_new_in_the_next():
    keys = []

    def build(objective, params, batch, damping, key):
        jax.debug.callback(lambda k: keys.append(k.tolist()), jax.random.key_data(key))
        return lambda r: r

    rule = preconditioners.custom(build)
    tx = hfjax.hessian_free(OBJECTIVE, preconditioner=rule)
    update, batch = quick_jit(tx.update), make_batch()
    grads, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        _, state = update(grads, state, PARAMS, batch=batch)
    jax.effects_barrier()
    assert len(set(map(tuple, keys))) == 3
