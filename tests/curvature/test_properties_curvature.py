"""Products and diagonals of small networks, as matrices, against dense ones in NumPy."""

import functools
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from reference import matrix_of, quick_jit
from strategies import arrays, eighths, like

import hfjax
from hfjax import curvature, diagonals

CASES = 5
EPS = float(np.finfo(np.float64).eps)


class Network(NamedTuple):
    """A model; shapes of its parameters, of the inputs and outputs of a case."""

    model_fn: Callable
    loss: str
    params: object
    inputs: tuple
    outputs: tuple


class Draw(NamedTuple):
    """A network's parameters and data, its weight decay, and a vector."""

    params: object
    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    decay: float
    v: object


def gated(params, x):
    return params["gain"] * (jnp.tanh(x @ params["in"]) @ params["out"][0])


CELL = {"in": (1, 2), "recurrent": (2, 2), "out": (2, 2)}
NETWORKS = {
    "squared": Network(
        problems.mlp, "squared_error", [((2, 2), (2,)), ((2, 2), (2,))], (2,), (2,)
    ),
    "sigmoid": Network(
        gated,
        "sigmoid_cross_entropy",
        {"in": (2, 2), "out": [(2, 2)], "gain": ()},
        (2,),
        (2,),
    ),
    "softmax": Network(
        problems.mlp, "softmax_cross_entropy", [((2, 3), (3,))], (2,), (3,)
    ),
    "labels": Network(
        problems.recurrent,
        "softmax_cross_entropy_with_integer_labels",
        CELL,
        (2, 1),
        (2, 2),
    ),
}
every_network = pytest.mark.parametrize("name", list(NETWORKS))


def draws(name):
    network = NETWORKS[name]
    weight = st.sampled_from([1.0, 0.0, 2.0, 0.5, 1e-6, 1e6])
    if network.loss.endswith("labels"):
        units = st.integers(0, network.outputs[-1] - 1)
        targets = arrays(CASES, *network.outputs[:-1], elements=units)
        targets = targets.map(lambda t: t.astype(np.int32))
    else:
        share = st.integers(0, 8).map(lambda k: k / 8)
        squared = network.loss == "squared_error"
        elements = eighths if squared else share
        targets = arrays(CASES, *network.outputs, elements=elements)
    halves = eighths.map(lambda x: x / 2)
    return st.builds(
        Draw,
        like(network.params, halves),
        arrays(CASES, *network.inputs, elements=halves),
        targets,
        arrays(CASES, elements=weight),
        st.sampled_from([0.0, 0.125, 3.0]),
        like(network.params),
    )


@functools.cache
def library(name, microbatch_size=None):
    """Return all that hfjax says of a draw, products as matrices."""
    network = NETWORKS[name]

    def everything(drawn):
        params, inputs, targets, weights, decay, v = drawn
        objective = hfjax.Objective(
            network.model_fn,
            getattr(hfjax.losses, network.loss)(),
            weight_decay=decay,
            microbatch_size=microbatch_size,
        )
        batch = (inputs, targets, weights)
        product = curvature.ggn(objective, params, batch)
        trees = {
            "gradient": objective.value_and_grad(params, batch)[1],
            "exact": diagonals.ggn_exact(objective, params, batch),
            "fisher_diagonal": diagonals.empirical_fisher(objective, params, batch),
            "product": product(v),
        }
        matrices = {
            "ggn": matrix_of(product, params),
            "hessian": matrix_of(curvature.hessian(objective, params, batch), params),
            "fisher": matrix_of(
                curvature.empirical_fisher(objective, params, batch), params
            ),
        }
        value = {"value": objective.value(params, batch)}
        return value | matrices | {k: ravel_pytree(x)[0] for k, x in trees.items()}

    compiled = quick_jit(everything)
    return lambda drawn: jax.device_get(compiled(drawn))


@functools.cache
def derivatives(name):
    """Return outputs `[cases, m]`, their Jacobians and their second derivatives."""
    network = NETWORKS[name]

    def everything(params, inputs):
        flat, unravel = ravel_pytree(params)

        def outputs(flat):
            return network.model_fn(unravel(flat), inputs).reshape(CASES, -1)

        first = jax.jacfwd(outputs)
        return outputs(flat), first(flat), jax.jacfwd(first)(flat)

    return quick_jit(everything)


def dense(name, drawn):
    """Return what `library` should, and how far rounding may take it."""
    z, j, bent = map(np.asarray, derivatives(name)(drawn.params, drawn.inputs))
    shaped = z.reshape(CASES, *NETWORKS[name].outputs)
    values, slopes, hessians = reference.output_loss(
        NETWORKS[name].loss, shaped, drawn.targets
    )
    theta, v = (ravel_pytree(tree)[0] for tree in (drawn.params, drawn.v))
    gradients = np.einsum("im,imn->in", slopes, j)
    ggns = np.einsum("iam,iab,ibn->imn", j, hessians, j)
    outer = np.einsum("im,in->imn", gradients, gradients)
    total, decay = np.sum(drawn.weights), drawn.decay

    def mean(cases):
        weighted = np.tensordot(drawn.weights, cases, axes=1)
        return weighted / (total if total else 1)

    identity = decay * np.eye(len(theta))
    ggn, fisher = mean(ggns) + identity, mean(outer) + identity
    truth = {
        "value": mean(values) + 0.5 * decay * theta @ theta,
        "gradient": mean(gradients) + decay * theta,
        "ggn": ggn,
        "hessian": ggn + mean(np.einsum("ia,iamn->imn", slopes, bent)),
        "fisher": fisher,
        "exact": np.diag(ggn),
        "fisher_diagonal": np.diag(fisher),
        "product": ggn @ v,
    }
    # tanh′ = 1 − tanh² has the rounding of 1: so 1 is added to what J and ∇²z are.
    sizes = [1 + np.max(np.abs(x)) for x in (j, slopes, bent, v, theta)]
    j, slopes, bent, v, theta = sizes
    size = (j * slopes) ** 2 + slopes * bent + decay
    return truth, 100 * EPS * size * (v + theta) ** 2


@every_network
@given(data=st.data())
def test_everything_is_what_the_dense_matrices_say(name, data):
    drawn = data.draw(draws(name))
    got, (truth, slack) = library(name)(drawn), dense(name, drawn)
    for key, value in truth.items():
        np.testing.assert_allclose(got[key], value, rtol=0, atol=slack, err_msg=key)


@every_network
@given(data=st.data())
def test_matrices_are_symmetric_and_but_the_hessian_not_negative(name, data):
    drawn = data.draw(draws(name))
    got, (_, slack) = library(name)(drawn), dense(name, drawn)
    for key in ("ggn", "hessian", "fisher"):
        np.testing.assert_allclose(got[key], got[key].T, rtol=0, atol=slack)
    for key in ("ggn", "fisher"):
        assert np.linalg.eigvalsh(got[key])[0] >= drawn.decay - len(got[key]) * slack
    assert np.all(got["exact"] >= 0)
    assert np.all(got["fisher_diagonal"] >= 0)


@every_network
@given(data=st.data())
def test_cases_of_no_weight_change_no_bit(name, data):
    drawn, other = data.draw(draws(name)), data.draw(draws(name))
    padded = drawn._replace(weights=drawn.weights * [1, 0, 1, 0, 1])

    def mixed(mine, theirs):
        mine = mine.copy()
        mine[[1, 3]] = 3 * theirs[[1, 3]] if mine.dtype == float else theirs[[1, 3]]
        return mine

    garbage = padded._replace(
        inputs=mixed(drawn.inputs, other.inputs),
        targets=mixed(drawn.targets, other.targets),
    )
    one, two = library(name)(padded), library(name)(garbage)
    for key in one:
        np.testing.assert_array_equal(two[key], one[key], err_msg=key)


@every_network
@given(data=st.data())
def test_a_case_of_weight_two_is_the_case_twice_in_any_order(name, data):
    drawn, order = data.draw(draws(name)), data.draw(st.permutations(range(CASES)))
    once = drawn._replace(weights=drawn.weights * [2, 1, 1, 1, 0])

    def take(places):
        return drawn._replace(
            inputs=drawn.inputs[places],
            targets=drawn.targets[places],
            weights=drawn.weights[places],
        )

    twice = take(np.array([0, 1, 2, 3, 0])[list(order)])
    one, two, slack = library(name)(once), library(name)(twice), dense(name, drawn)[1]
    for key in one:
        np.testing.assert_allclose(two[key], one[key], rtol=0, atol=slack, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["squared", "labels"])
@given(data=st.data())
def test_microbatches_change_rounding_only(name, data):
    drawn = data.draw(draws(name))
    one, two = library(name)(drawn), library(name, microbatch_size=2)(drawn)
    slack = dense(name, drawn)[1]
    for key in one:
        np.testing.assert_allclose(two[key], one[key], rtol=0, atol=slack, err_msg=key)


@functools.cache
def estimate():
    """Return the estimate of diag(G) for given signs of the three outputs."""
    network = NETWORKS["softmax"]

    def run(drawn, signs):
        objective = hfjax.Objective(
            network.model_fn,
            getattr(hfjax.losses, network.loss)(),
            weight_decay=drawn.decay,
        )

        def chosen(key, shape, dtype):
            return jnp.broadcast_to(signs.astype(dtype), shape)

        with mock.patch.object(jax.random, "rademacher", chosen):
            diagonal = diagonals.ggn_rademacher(
                objective, drawn.params, drawn[1:4], key=jax.random.key(0)
            )
        return ravel_pytree(diagonal)[0]

    return quick_jit(run)


@pytest.mark.slow
@given(draws("softmax"))
def test_the_mean_over_all_signs_is_the_diagonal_itself(drawn):
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 3)).reshape(3, -1).T
    mean = np.mean([estimate()(drawn, pattern[None]) for pattern in signs], axis=0)
    truth, slack = dense("softmax", drawn)
    np.testing.assert_allclose(mean, truth["exact"], rtol=0, atol=slack)
