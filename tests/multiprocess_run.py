"""One process of several: ten updates, with its share of the cases.

    python tests/multiprocess_run.py HOST:PORT PROCESSES PROCESS_ID FILE

writes f before each update, and what the parameters have come to, into the file.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reference import quick_jit

import hfjax

UPDATES = 10
# Of four parts, the second has no weight at all, and the third little.
WEIGHTS = [1.0, 2.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 3.0, 1.0, 1.0]


def problem():
    """Return parameters and a batch, in NumPy: JAX must not begin before it joins."""
    rng = np.random.default_rng(0)
    params = {
        "hidden": rng.standard_normal((3, 5)),
        "bias": rng.standard_normal(5),
        "out": rng.standard_normal((5, 2)),
    }
    x = rng.standard_normal((len(WEIGHTS), 3))
    return params, (x, np.sin(3 * x[:, :2]), np.array(WEIGHTS))


def network(params, x):
    return jnp.tanh(x @ params["hidden"] + params["bias"][None]) @ params["out"]


def train(params, batch):
    """Return f before each update, and the parameters after them all, flat."""
    loss = hfjax.losses.squared_error()
    objective = hfjax.Objective(network, loss, weight_decay=1e-3)
    # Few iterations: they, rather than updates, are what makes rounding grow.
    solver = hfjax.cg.conjugate_gradient(max_iterations=8, warm_start_decay=0.95)
    tx = hfjax.hessian_free(
        objective,
        damping=hfjax.damping.levenberg_marquardt(),
        solver=solver,
        preconditioner=hfjax.preconditioners.diagonal(),
    )

    @quick_jit
    def step(params, state, batch):
        value, grads = objective.value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(UPDATES):
        params, state, value = step(params, state, batch)
        values.append(float(value))
    leaves = jax.tree.leaves(jax.device_get(params))
    return np.array(values), np.concatenate([leaf.ravel() for leaf in leaves])


def main(coordinator, processes, process_id, file):
    jax.distributed.initialize(coordinator, processes, process_id)
    axis_types = (AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("cases",), axis_types=axis_types)
    shared = NamedSharding(mesh, PartitionSpec("cases"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    share = len(WEIGHTS) // processes
    mine = slice(share * process_id, share * (process_id + 1))
    params, batch = problem()
    batch = jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(shared, leaf[mine]), batch
    )
    values, params = train(jax.device_put(params, everywhere), batch)
    np.savez(file, values=values, params=params)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
