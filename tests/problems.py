"""Small problems, one for each thing that a model, a loss or a batch can be."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hfjax


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A model, a loss and data, in float64.

    Attributes:
      loss: the name of a constructor in `hfjax.losses`.
    """

    name: str
    params: Any
    model_fn: Callable
    loss: str
    batch: tuple
    weight_decay: float = 0.0

    @property
    def direction(self):
        """A direction to multiply with."""
        return jax.tree.map(lambda leaf: jnp.cos(7 * leaf), self.params)

    def objective(self, **options):
        loss = getattr(hfjax.losses, self.loss)()
        options = {"weight_decay": self.weight_decay, **options}
        return hfjax.Objective(self.model_fn, loss, **options)

    def __str__(self):
        return self.name


@dataclasses.dataclass(frozen=True, eq=False)
class Hidden(Problem):
    """A problem whose model shows its hidden states, too.

    Attributes:
      pair_fn: `(params, inputs) -> (outputs, hidden)`; `model_fn` leaves out the latter.
      distance: of hidden states: a constructor in `hfjax.losses`, or "bregman".
    """

    pair_fn: Callable = None
    distance: str = "squared_error"

    def objective(self, **options):
        plain = self.distance == "bregman"
        distance = bregman if plain else getattr(hfjax.losses, self.distance)()
        loss = getattr(hfjax.losses, self.loss)()
        options = {
            "weight_decay": self.weight_decay,
            "hidden_loss": distance,
            **options,
        }
        return hfjax.Objective(self.pair_fn, loss, **options)


def bregman(hidden, reference):
    """Return the divergence of cosh, of second derivative cosh h."""
    gap = jax.tree.map(
        lambda h, r: jnp.cosh(h) - jnp.cosh(r) - jnp.sinh(r) * (h - r),
        hidden,
        reference,
    )
    return sum(jnp.sum(x.reshape(len(x), -1), axis=1) for x in jax.tree.leaves(gap))


def mlp(params, x):
    *hidden, (w, b) = params
    for weights, bias in hidden:
        x = jnp.tanh(x @ weights + bias[None])
    return x @ w + b[None]


def layers(rng, *sizes, scale=0.8):
    return [
        (normal(rng, i, o, scale=scale), normal(rng, o, scale=0.3))
        for i, o in itertools.pairwise(sizes)
    ]


def normal(rng, *shape, scale=1.0):
    return jnp.asarray(scale * rng.standard_normal(shape))


def symmetric(rng, eigenvalues):
    """Return a dense matrix with these eigenvalues."""
    q, _ = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))
    return (q * eigenvalues) @ q.T


def two_heads(params, x):
    hidden = jnp.tanh(mlp(params["trunk"], x["image"]) * x["gain"][:, None])
    return {"left": hidden @ params["left"], "right": hidden @ params["right"]}


def convolution(params, x):
    dimensions = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        x, params["kernel"], (2, 2), "VALID", dimension_numbers=dimensions
    )
    x = jnp.tanh(x + params["bias"][None, None, None])
    return x.reshape(len(x), -1) @ params["head"]


def recurrent(params, x):
    def step(h, x):
        h = jnp.tanh(x @ params["in"] + h @ params["recurrent"])
        return h, h @ params["out"]

    h = jnp.zeros((len(x), len(params["recurrent"])), x.dtype)
    return jnp.swapaxes(jax.lax.scan(step, h, jnp.swapaxes(x, 0, 1))[1], 0, 1)


def frozen(params, x):
    return mlp([params["first"], jax.lax.stop_gradient(params["frozen"])], x)


def nested(params, x):
    first, second = params["encoder"]
    x = jnp.tanh(mlp([first, second["layer"]], x) * params["gain"])
    return params["gain"] * (x @ params["head"][0])


def soft_targets(rng, *shape):
    t = rng.uniform(0.05, 1.0, shape)
    return jnp.asarray(t / np.sum(t, axis=-1, keepdims=True))


def build() -> list[Problem]:
    rng = np.random.default_rng(0)
    x = normal(rng, 7, 3)
    weights = jnp.asarray([1.0, 0.0, 2.5, 0.3, 0.0, 1.0, 4.0])
    soft = soft_targets(rng, 7, 3)
    small = layers(rng, 3, 4, 3)
    labels = jnp.asarray([0, 2, 1, 1, 0, 2, 2])
    # Logits between −30 and 30 in each case, from the last layer's bias.
    wide = [*small[:-1], (small[-1][0], jnp.asarray([-30.0, 30.0, 0.0]))]
    heads = {
        "trunk": layers(rng, 3, 3),
        "left": normal(rng, 3, 2),
        "right": normal(rng, 3, 1),
    }
    both = {"left": normal(rng, 7, 2) > 0, "right": jnp.full((7, 1), 0.3)}
    kernels = {
        "kernel": normal(rng, 2, 2, 2, 2),
        "bias": normal(rng, 2, scale=0.3),
        "head": normal(rng, 8, 3, scale=0.5),
    }
    cell = {
        "in": normal(rng, 2, 3),
        "recurrent": normal(rng, 3, 3, scale=0.7),
        "out": normal(rng, 3, 2),
    }
    stopped = {"first": layers(rng, 3, 4)[0], "frozen": layers(rng, 4, 2)[0]}
    tree = {
        "encoder": [layers(rng, 3, 4)[0], {"layer": layers(rng, 4, 2)[0]}],
        "head": (normal(rng, 2, 2),),
        "gain": jnp.asarray(1.3),
    }
    deep = layers(rng, 3, 4, 3, 2)
    image, sequence = normal(rng, 5, 4, 4, 2), normal(rng, 5, 4, 2)
    gain = jnp.asarray(rng.uniform(0.5, 2.0, 7))

    squared, sigmoid = "squared_error", "sigmoid_cross_entropy"
    softmax = "softmax_cross_entropy"
    integer = "softmax_cross_entropy_with_integer_labels"
    t = normal(rng, 7, 2)
    return [
        Problem("mlp_squared_error", deep, mlp, squared, (x, t), 0.01),
        Problem("mlp_sigmoid", deep, mlp, sigmoid, (x, soft[:, :2], weights)),
        Problem("mlp_softmax", small, mlp, softmax, (x, jnp.eye(3)[labels]), 0.02),
        Problem("softmax_soft_targets", small, mlp, softmax, (x, soft, weights)),
        Problem(
            "softmax_masses",
            small,
            mlp,
            softmax,
            (x, 3 * soft[:, ::-1] * gain[:, None]),
        ),
        Problem("integer_labels", small, mlp, integer, (x, labels, weights), 0.02),
        Problem(
            "two_heads", heads, two_heads, sigmoid, ({"image": x, "gain": gain}, both)
        ),
        Problem("convolution", kernels, convolution, softmax, (image, soft[:5]), 0.03),
        Problem(
            "recurrent",
            cell,
            recurrent,
            softmax,
            (sequence, soft_targets(rng, 5, 4, 2)),
        ),
        Problem("frozen", stopped, frozen, squared, (x, t, weights), 0.05),
        Problem("wide_logits_sigmoid", wide, mlp, sigmoid, (x, soft)),
        Problem("wide_logits_softmax", wide, mlp, softmax, (x, soft)),
        Problem("nested", tree, nested, squared, (x, t, weights), 0.01),
    ]


PROBLEMS = build()
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


def named(name: str) -> Problem:
    return next(problem for problem in PROBLEMS if problem.name == name)


def states(params, x, *, logistic):
    """Run a recurrent network; return outputs and hidden units, logistic ones' logits."""

    def step(h, x):
        z = x @ params["in"] + h @ params["recurrent"]
        h = jax.nn.sigmoid(z) if logistic else jnp.tanh(z)
        return h, (h @ params["out"], z if logistic else h)

    # As varying over devices as the states that follow.
    h = 0 * (x[:, 0] @ params["in"])
    pair = jax.lax.scan(step, h, jnp.swapaxes(x, 0, 1))[1]
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), pair)


def both_layers(params, x):
    (w, a), (u, b), (out, c) = params
    first = jnp.tanh(x @ w + a[None])
    second = jnp.tanh(first @ u + b[None])
    return second @ out + c[None], {"first": first, "second": second}


def hidden_problem(name: str, pair_fn: Callable, distance: str, *rest) -> Hidden:
    def model_fn(params, x):
        return pair_fn(params, x)[0]

    params, loss, batch, weight_decay = rest
    return Hidden(name, params, model_fn, loss, batch, weight_decay, pair_fn, distance)


def with_hidden(cases: int = 5) -> list[Hidden]:
    """Return problems with hidden states: of tanh units, of logistic ones, of layers."""
    rng = np.random.default_rng(11)
    weights = jnp.asarray(rng.permutation(np.linspace(0, 2, cases)))
    cell = {
        "in": normal(rng, 2, 3),
        "recurrent": normal(rng, 3, 3, scale=0.7),
        "out": normal(rng, 3, 2),
    }
    x, soft = normal(rng, cases, 4, 2), soft_targets(rng, cases, 4, 2)
    tanh = functools.partial(states, logistic=False)
    logistic = functools.partial(states, logistic=True)
    softmax, sigmoid = "softmax_cross_entropy", "sigmoid_cross_entropy"
    layered = layers(rng, 2, 4, 3, 2)
    flat = (x[:, 0], normal(rng, cases, 2), weights)
    return [
        hidden_problem(
            "tanh", tanh, "squared_error", cell, softmax, (x, soft, weights), 0.03
        ),
        hidden_problem(
            "logistic", logistic, sigmoid, cell, sigmoid, (x, soft, weights), 0.0
        ),
        hidden_problem(
            "layers", both_layers, "bregman", layered, "squared_error", flat, 0.02
        ),
    ]


HIDDEN = with_hidden()
every_hidden_problem = pytest.mark.parametrize("problem", HIDDEN, ids=str)


def uneven(weights) -> Problem:
    """Return a problem with a frozen layer and these case weights."""
    rng, cases = np.random.default_rng(7), len(weights)
    params = {"first": layers(rng, 3, 4)[0], "frozen": layers(rng, 4, 2)[0]}
    t = jnp.asarray(rng.uniform(size=(cases, 2)))
    batch = (normal(rng, cases, 3), t, jnp.asarray(weights))
    return Problem("uneven", params, frozen, "sigmoid_cross_entropy", batch, 0.01)


def quantities(objective, params, batch, v) -> dict:
    """Return all that an objective gives an optimizer, as `reference.quantities`."""
    value, gradient = objective.value_and_grad(params, batch)
    return {
        "value": value,
        "gradient": gradient,
        "product": hfjax.curvature.ggn(objective, params, batch)(v),
        "fisher": hfjax.diagonals.empirical_fisher(objective, params, batch),
    }
