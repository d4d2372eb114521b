"""Functions of space and time, and of graphs: what physics and graphics bring."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from problems import layers, normal
from zoo.specimen import KEY, Specimen, equinox, half_squares, linen, of_logits

import hfjax

SQUARED = hfjax.losses.squared_error()


def neural_ode():
    """Follow dy/dt = MLP(y) by four-stage Runge-Kutta steps, in a scan."""
    params, rest = equinox(
        lambda: eqx.nn.MLP(2, 2, 5, 1, activation=jax.nn.softplus, key=KEY)
    )

    def model_fn(params, start):
        field, h = eqx.combine(params, rest), 0.3

        def step(y, _):
            k1 = field(y)
            k2 = field(y + h / 2 * k1)
            k3 = field(y + h / 2 * k2)
            k4 = field(y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            return y, y

        return jax.vmap(lambda y: jax.lax.scan(step, y, length=3)[1])(start)

    rng = np.random.default_rng(0)
    batch = (normal(rng, 3, 2), normal(rng, 3, 3, 2))
    return Specimen(model_fn, SQUARED, half_squares, params, batch)


class Siren(nn.Module):
    """Sines of a high frequency: a picture as a function of its coordinates."""

    @nn.compact
    def __call__(self, x):
        x = jnp.sin(10 * nn.Dense(6, name="first")(x))
        x = jnp.sin(3 * nn.Dense(5, name="second")(x))
        return nn.Dense(1, name="out")(x)


def siren():
    rng = np.random.default_rng(1)
    x, t = jnp.asarray(rng.uniform(-1, 1, (5, 2))), normal(rng, 5, 1)
    model_fn, params = linen(Siren(), x)
    return Specimen(model_fn, SQUARED, half_squares, params, (x, t), damping=10.0)


class Fourier(nn.Module):
    """A layer of an FNO: two modes multiplied by complex matrices, and a bypass."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, name="lift")(x)
        normals = nn.initializers.normal(0.5)
        parts = [self.param(k, normals, (3, 3, 2)) for k in ("real", "imag")]
        modes = jnp.fft.rfft(x, axis=1)[:, :2]
        modes = jnp.einsum("bmi,iom->bmo", modes, jax.lax.complex(*parts))
        modes = jnp.pad(modes, [(0, 0), (0, 2), (0, 0)])
        y = jnp.fft.irfft(modes, n=x.shape[1], axis=1)
        y = nn.gelu(y + nn.Dense(3, name="bypass")(x))
        return nn.Dense(1, name="out")(y)


def fno():
    rng = np.random.default_rng(2)
    x, t = normal(rng, 3, 6, 2), normal(rng, 3, 6, 1)
    model_fn, params = linen(Fourier(), x)
    return Specimen(model_fn, SQUARED, half_squares, params, (x, t))


def deeponet():
    """Map functions, known at five sensors, to their values at points that all share."""
    rng = np.random.default_rng(3)
    nets, rest = equinox(
        lambda: [
            eqx.nn.MLP(size, 3, 4, 1, activation=jnp.tanh, key=KEY) for size in (5, 1)
        ]
    )
    points = jnp.linspace(0, 1, 4)[:, None]

    def model_fn(params, sensed):
        branch, trunk = eqx.combine(params["nets"], rest)
        return jax.vmap(branch)(sensed) @ jax.vmap(trunk)(points).T + params["shift"]

    params = {"nets": nets, "shift": normal(rng)}
    batch = (normal(rng, 3, 5), normal(rng, 3, 4))
    return Specimen(model_fn, SQUARED, half_squares, params, batch)


def nerf():
    """Colours of rays by volume rendering, from a network of encoded points."""
    rng = np.random.default_rng(4)
    params = layers(rng, 12, 5, 4, scale=0.4)
    depths = jnp.linspace(0.5, 2, 4)

    def encoded(points):
        angles = [2.0**k * points for k in range(2)]
        return jnp.concatenate([f(x) for x in angles for f in (jnp.sin, jnp.cos)], -1)

    def model_fn(params, rays):
        origins, directions = rays
        points = origins[:, None] + depths[:, None] * directions[:, None]
        (w, b), (v, c) = params
        out = jax.nn.relu(encoded(points) @ w + b) @ v + c
        colours, density = jax.nn.sigmoid(out[..., :3]), jax.nn.softplus(out[..., 3])
        opacity = 1 - jnp.exp(-0.5 * density)
        passed = jnp.cumprod(1 - opacity + 1e-10, axis=-1)
        reaching = jnp.concatenate([jnp.ones_like(passed[:, :1]), passed[:, :-1]], -1)
        return jnp.sum((opacity * reaching)[..., None] * colours, axis=1)

    rays = normal(rng, 4, 3), normal(rng, 4, 3)
    batch = (rays, jnp.asarray(rng.uniform(size=(4, 3))))
    return Specimen(model_fn, SQUARED, half_squares, params, batch)


def graphs():
    """Pass messages along the edges of padded graphs, stacked and vmapped."""
    rng = np.random.default_rng(5)
    edge, node, out = (layers(rng, *sizes)[0] for sizes in ((6, 4), (7, 4), (4, 2)))
    params = {"edge": edge, "node": node, "out": out}

    def of_graph(params, graph):
        nodes, senders, receivers, real_nodes, real_edges = graph

        def dense(name, x):
            w, b = params[name]
            return x @ w + b

        ends = jnp.concatenate([nodes[senders], nodes[receivers]], axis=-1)
        messages = jnp.tanh(dense("edge", ends)) * real_edges[:, None]
        heard = jax.ops.segment_sum(messages, receivers, len(nodes))
        h = jax.nn.relu(dense("node", jnp.concatenate([nodes, heard], axis=-1)))
        pooled = jnp.sum(h * real_nodes[:, None], axis=0) / jnp.sum(real_nodes)
        return dense("out", pooled)

    def model_fn(params, graphs):
        return jax.vmap(of_graph, (None, 0))(params, graphs)

    nodes = jnp.array([4, 3, 2])[:, None] > jnp.arange(4)[None]
    edges = jnp.array([5, 4, 2])[:, None] > jnp.arange(5)[None]
    ends = jnp.asarray(rng.integers(0, 2, (2, 3, 5)))
    graph = (normal(rng, 3, 4, 3), *ends, nodes.astype(float), edges.astype(float))
    t = jnp.asarray(rng.integers(0, 2, (3, 2)).astype(float))
    loss = hfjax.losses.sigmoid_cross_entropy()
    return Specimen(model_fn, loss, of_logits, params, (graph, t))
