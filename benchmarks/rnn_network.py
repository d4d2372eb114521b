"""A recurrent network without tricks: tanh units, linear outputs, a start that is learned.

    h_t = tanh(h_{t−1} W_recurrent + x_t W_input),    z_t = h_t W_output

No biases, as in Sutskever's program (2011).
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

import hfjax
from benchmarks.rnn_tasks import Task
from benchmarks.sequences import Inputs

UNITS = 100
_CONNECTIONS = 15
_INPUT_SCALE = 0.25
"""Larger input weights overwhelm what the units remember (a comment of his program)."""

Weights: TypeAlias = dict[str, jax.Array]
"""`start` `[units]`, `input` `[features, units]`, `recurrent` `[units, units]` and
`output` `[units, outputs]`."""


class RecurrentNetwork(NamedTuple):
    """A model as pure functions.

    Attributes:
      init: `key -> params`: 15 weights into each unit from N(0, 1/15), those from the
        inputs a quarter of that.
      model_fn: `(params, inputs) -> outputs`, `[cases, outputs]` at each sequence's
        last step, or `[cases, steps, outputs]`, as the task has targets.
      with_hidden: `(params, inputs) -> (outputs, hidden)`, hidden `[cases, steps,
        units]`, 0 after a sequence's end.
    """

    init: Callable[[jax.Array], Weights]
    model_fn: Callable[[Weights, Inputs], jax.Array]
    with_hidden: Callable[[Weights, Inputs], tuple[jax.Array, jax.Array]]


def recurrent_network(task: Task, units: int = UNITS) -> RecurrentNetwork:
    """Build the network for a task.

    Args:
      task: with its numbers of features and outputs.
      units: hidden ones.

    Returns:
      Its functions.

    Example:
      >>> from benchmarks.rnn_tasks import TASKS
      >>> task = TASKS["addition"]
      >>> network = recurrent_network(task, units=20)
      >>> params = network.init(jax.random.key(0))
      >>> inputs, targets = task.generate(jax.random.key(1), 4, 30)
      >>> outputs, hidden = network.with_hidden(params, inputs)
      >>> outputs.shape, hidden.shape
      ((4, 1), (4, 32, 20))
    """
    shapes = {
        "start": (1, units),
        "input": (task.features, units),
        "recurrent": (units, units),
        "output": (units, task.outputs),
    }

    def init(key: jax.Array) -> Weights:
        sparse = hfjax.initializers.sparse(
            _CONNECTIONS, scale=_CONNECTIONS**-0.5, replace=False
        )
        keys = jax.random.split(key, len(shapes))
        params = {
            name: sparse(its_key, shape)
            for its_key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        return {
            **params,
            "start": params["start"][0],
            "input": _INPUT_SCALE * params["input"],
        }

    def hidden_by_time(params: Weights, inputs: Inputs) -> jax.Array:
        cases = inputs.steps.shape[0]
        drive = jnp.swapaxes(inputs.steps, 0, 1) @ params["input"]

        def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = jnp.tanh(x + h @ params["recurrent"])
            return h, h

        start = jnp.broadcast_to(params["start"], (cases, units))
        return jax.lax.scan(step, start, drive)[1]

    def read(params: Weights, inputs: Inputs, hidden: jax.Array) -> jax.Array:
        if task.every_step:
            return jnp.swapaxes(hidden @ params["output"], 0, 1)
        last = inputs.lengths[None, :, None] - 1
        return jnp.take_along_axis(hidden, last, axis=0)[0] @ params["output"]

    def model_fn(params: Weights, inputs: Inputs) -> jax.Array:
        return read(params, inputs, hidden_by_time(params, inputs))

    def with_hidden(params: Weights, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        hidden = hidden_by_time(params, inputs)
        own = jnp.arange(hidden.shape[0])[:, None] < inputs.lengths
        masked = jnp.where(own[:, :, None], hidden, 0)
        return read(params, inputs, hidden), jnp.swapaxes(masked, 0, 1)

    return RecurrentNetwork(init, model_fn, with_hidden)
