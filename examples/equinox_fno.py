"""Train a Fourier neural operator of Equinox with the Hessian-free optimizer.

    python examples/equinox_fno.py --checkpoint runs/fno --plot runs/fno.png

The operator learns how Burgers' equation changes a function in time. Replace `FNO` and
`burgers` by your own. If the run is killed, the same command goes on from its checkpoint.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp

import hfjax

POINTS, MODES, WIDTH = 64, 8, 12


class FNO(eqx.Module):
    """Layers that multiply the lowest Fourier modes by complex matrices."""

    lift: eqx.nn.Conv1d
    spectral: list  # Of pairs: real and imaginary parts, [modes, inputs, outputs].
    bypasses: list
    head: eqx.nn.Conv1d

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.lift = eqx.nn.Conv1d(2, WIDTH, 1, key=keys[0])
        draws = jax.random.normal(keys[1], (2, 2, MODES, WIDTH, WIDTH)) / WIDTH
        self.spectral = [tuple(draw) for draw in draws]
        self.bypasses = [eqx.nn.Conv1d(WIDTH, WIDTH, 1, key=k) for k in keys[2:4]]
        self.head = eqx.nn.Conv1d(WIDTH, 1, 1, key=keys[4])

    def __call__(self, u):
        x = self.lift(jnp.stack([u, jnp.linspace(0, 1, POINTS, endpoint=False)]))
        for (real, imaginary), bypass in zip(self.spectral, self.bypasses, strict=True):
            modes = jnp.fft.rfft(x)[:, :MODES]
            modes = jnp.einsum("im,mio->om", modes, jax.lax.complex(real, imaginary))
            x = jax.nn.gelu(jnp.fft.irfft(modes, n=POINTS) + bypass(x))
        return self.head(x)[0]


def burgers(seed, cases, nu=0.05):
    """Return random u(0) and the u(½) of uₜ + u uₓ = ν uₓₓ, by Cole and Hopf's formula."""
    k = 2 * jnp.pi * jnp.arange(POINTS // 2 + 1)
    draws = jax.random.normal(jax.random.key(seed), (2, cases, 4)) * POINTS / 8
    spectrum = jnp.pad(jax.lax.complex(*draws), [(0, 0), (1, len(k) - 5)])
    integral = jnp.fft.irfft(spectrum / jnp.where(k > 0, 1j * k, 1))
    heat = jnp.fft.rfft(jnp.exp(-integral / (2 * nu))) * jnp.exp(-nu * k**2 / 2)
    slope = jnp.fft.irfft(1j * k * heat)
    return jnp.fft.irfft(spectrum), -2 * nu * slope / jnp.fft.irfft(heat)


parser = argparse.ArgumentParser()
parser.add_argument("--updates", type=int, default=30)
parser.add_argument("--checkpoint", help="folder, from which the same command goes on")
parser.add_argument("--plot", help="PNG file, drawn while the run goes on")
args = parser.parse_args()
batch, new = burgers(0, 100), burgers(1, 100)
params, rest = eqx.partition(FNO(jax.random.key(0)), eqx.is_inexact_array)
objective = hfjax.Objective(
    lambda params, u: jax.vmap(eqx.combine(params, rest))(u),
    hfjax.losses.squared_error(),
)
fit = hfjax.fit(  # In a terminal it draws a bar.
    objective,
    params,
    batch,
    updates=args.updates,
    validation=new,
    checkpoint=args.checkpoint,
    callback=hfjax.diagnostics.live_plot(args.plot),
)
values, (u, t) = fit.history.value, new
print(f"f from {values[0]:.3g} to {fit.value:.3g} in {len(values)} updates")
error = jnp.linalg.norm(objective.model_fn(fit.params, u) - t) / jnp.linalg.norm(t)
print(f"new functions: relative error {error:.1%}")
