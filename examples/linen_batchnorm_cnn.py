"""Train a Linen network that has batch normalisation with the Hessian-free optimizer.

    python examples/linen_batchnorm_cnn.py

Replace `CNN` and `stripes` by your own. In training, the layer normalises by the statistics
of the batch, so the loss is a function of the whole batch. The loop also keeps running
statistics, which are used for new images (docs/changing.md).
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import hfjax


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for channels in (4, 8):
            x = nn.Conv(channels, (3, 3), strides=2, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
            x = nn.relu(x)
        return nn.Dense(4)(x.reshape(len(x), -1))


def stripes(seed, cases):
    """Return noisy stripes in one of four directions, which are the labels."""
    keys = jax.random.split(jax.random.key(seed), 3)
    labels = jax.random.randint(keys[0], (cases,), 0, 4)
    angle, shift = jnp.pi / 4 * labels, 6 * jax.random.uniform(keys[1], (cases,))
    i, j = jnp.meshgrid(jnp.arange(12.0), jnp.arange(12.0))
    along = jnp.cos(angle)[:, None, None] * i + jnp.sin(angle)[:, None, None] * j
    images = jnp.sin(along + shift[:, None, None])
    return (images + jax.random.normal(keys[2], images.shape))[..., None], labels


parser = argparse.ArgumentParser()
parser.add_argument("--updates", type=int, default=15)
args = parser.parse_args()
model, batch, new = CNN(), stripes(0, 500), stripes(1, 1000)
variables = model.init(jax.random.key(0), batch[0], train=False)
params, start = variables["params"], variables["batch_stats"]


def run(params, statistics, x):
    """Return the outputs in training mode, and the statistics after it."""
    given = {"params": params, "batch_stats": statistics}
    outputs, after = model.apply(given, x, train=True, mutable=["batch_stats"])
    return outputs, after["batch_stats"]


objective = hfjax.Objective(
    lambda params, x: run(params, start, x)[0],  # Which does not depend on `start`.
    hfjax.losses.softmax_cross_entropy_with_integer_labels(),
    whole_batch=True,
)
tx = hfjax.hessian_free(objective)


@jax.jit
def train_step(params, statistics, state, batch):
    _, grads = objective.value_and_grad(params, batch)
    updates, state = tx.update(grads, state, params, batch=batch)
    params = optax.apply_updates(params, updates)
    _, after = run(params, statistics, batch[0])
    keep = lambda old, new: jnp.where(state.info.accepted, new, old)  # noqa: E731
    return params, jax.tree.map(keep, statistics, after), state


statistics, state = start, tx.init(params)
for _ in range(args.updates):
    params, statistics, state = train_step(params, statistics, state, batch)
    print(hfjax.diagnostics.line(state))
given = {"params": params, "batch_stats": statistics}
outputs = model.apply(given, new[0], train=False)
print(f"new images: {jnp.mean(jnp.argmax(outputs, axis=1) == new[1]):.1%} right")
