"""Updates of an optimizer, and runs of them, as a training loop does them."""

import functools

import jax
import optax
from reference import quick_jit


def train_step(objective, tx, params, state, batch):
    """Do one update; return the parameters after it, and the state."""
    _, grads = objective.value_and_grad(params, batch)
    updates, state = tx.update(grads, state, params, batch=batch)
    return optax.apply_updates(params, updates), state


def counted(function):
    """Return a function compiled, and a list with an entry for each time it is traced."""
    # JAX counts what its fast path knows, which may be nothing late in a long process.
    traces = []

    def traced(*arguments):
        traces.append(None)
        return function(*arguments)

    return quick_jit(traced), traces


def one_update(objective, tx, params, batch, *, grads=None, state=None, **extra):
    """Return the updates and the state after one update, which is compiled.

    From the gradient on `batch` and from `tx.init(params)`, if nothing else is given.
    """

    @quick_jit
    def update(params, batch, grads, state, extra):
        if grads is None:
            _, grads = objective.value_and_grad(params, batch)
        state = tx.init(params) if state is None else state
        return tx.update(grads, state, params, batch=batch, **extra)

    return update(params, batch, grads, state, extra)


def train(objective, tx, params, batch, updates):
    """Do updates in a loop of JAX.

    Returns:
      The parameters and the state at the end; `info` and λ after each update.
    """

    def step(carry, _):
        params, state = train_step(objective, tx, *carry, batch)
        return (params, state), (state.info, state.damping)

    return jax.lax.scan(step, (params, tx.init(params)), length=updates)


def trained(objective, tx, params, batch, updates):
    """Compile `train`, and run it."""
    run = functools.partial(train, objective, tx, updates=updates)
    return quick_jit(run)(params, batch)
