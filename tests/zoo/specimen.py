"""What a model of the zoo is, and how its parameters come to be in float64."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from problems import normal
from reference import quick_jit

import hfjax

KEY = jax.random.key(0)


class Specimen(NamedTuple):
    """A model as people bring it, with its loss and a few examples.

    Attributes:
      model_fn: `(params, inputs) -> outputs`.
      loss: of `hfjax.losses`, or a function, as a user passes it.
      plain: `(outputs, targets) -> array` for a single example: the same loss by formulas
        of `jax.numpy` alone. It has an entry for each position if positions have weights.
      params: θ, in float64.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.
      damping: a λ for which the full step lowers f.
      routed: whether each position goes to some of several experts.
      whole_batch: whether the outputs depend on the whole batch.
      held: the model with what factors leave out held fixed: how the scale of a kernel
        depends on the kernel. `None` if there is no such thing.
    """

    model_fn: Callable
    loss: Any
    plain: Callable
    params: Any
    batch: tuple
    damping: float = 1.0
    routed: bool = False
    whole_batch: bool = False
    held: Callable | None = None

    @property
    def objective(self):
        """Return f as a user writes it."""
        return hfjax.Objective(self.model_fn, self.loss, whole_batch=self.whole_batch)

    @property
    def read(self):
        """Return the model that factors are of; a whole batch is its only example."""
        model_fn = self.held or self.model_fn
        if not self.whole_batch:
            return model_fn
        return lambda params, inputs: model_fn(params, inputs[0])[None]


def spread(tree, scale=0.3):
    """Return parameters in float64, none of which is where it was initialised."""
    rng = np.random.default_rng(1)

    def leaf(x):  # In NumPy, which compiles nothing for each shape.
        return jnp.asarray(
            np.asarray(x) + np.asarray(normal(rng, *x.shape, scale=scale))
        )

    return jax.tree.map(leaf, tree)


def linen(module, inputs, **collections):
    """Return a linen module's `model_fn` and parameters."""
    variables = quick_jit(module.init)(KEY, inputs)
    collections |= {k: spread(v) for k, v in variables.items() if k == "batch_stats"}

    def model_fn(params, inputs):
        return module.apply({"params": params, **collections}, inputs)

    return model_fn, spread(variables["params"])


def nnx_module(make):
    """Return an nnx module, whose initial values are computed by one program."""
    graph, _ = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, quick_jit(lambda: nnx.state(make()))())


def equinox(make):
    """Return the parameters of an Equinox module, and what else it consists of."""
    shapes = eqx.filter_eval_shape(make)
    _, rest = eqx.partition(shapes, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    params = quick_jit(lambda: eqx.filter(make(), eqx.is_inexact_array))()
    return spread(params), rest


def of_labels(logits, labels):
    """Return −log softmax at the labels, which may have a value of no class."""
    p = jnp.exp(logits) / jnp.sum(jnp.exp(logits), axis=-1, keepdims=True)
    labels = jnp.maximum(labels, 0)
    return -jnp.log(jnp.take_along_axis(p, labels[..., None], axis=-1)[..., 0])


def summed_over_labels(logits, labels):
    return jnp.sum(of_labels(logits, labels))


def half_squares(outputs, targets):
    return jnp.sum((outputs - targets) ** 2) / 2


def of_logits(logits, targets):
    """Return the cross-entropy of logistic units."""
    p = 1 / (1 + jnp.exp(-logits))
    return -jnp.sum(targets * jnp.log(p) + (1 - targets) * jnp.log(1 - p))
