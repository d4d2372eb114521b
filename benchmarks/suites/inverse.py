"""An inverse problem: the viscosity of Burgers' equation, and its error bar, from data.

u is measured at some points, with noise. The network's parameters and log ν are fitted
together; u(0, x) is known. To first order ν = ν₀ + Σ gᵢ εᵢ, where εᵢ is the noise of a
measurement and σ its deviation, so that the standard error of ν is σ √(Σ gᵢ²).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from benchmarks.suites import evolution
from benchmarks.suites.experiment import Experiment
from benchmarks.suites.problem import Summary


@dataclasses.dataclass(frozen=True)
class Inverse(Experiment):
    """A network that finds the viscosity of its equation; the value is the error of ν.

    Attributes:
      viscosity: the true one.
      guess: the first.
      noise: its standard deviation, relative to that of u.
    """

    viscosity: float = 1.0
    guess: float = 0.03
    noise: float = 0.01

    def start(self, key: jax.Array) -> Any:
        """Draw the layers, and log ν."""
        return {"layers": super().start(key), "log_ν": jnp.log(jnp.array(self.guess))}

    def value(self, params: Any, points: jax.Array) -> jax.Array:
        """Compute u at points, `[cases]`."""
        return self.network(params["layers"], points)

    def residual(self, params: Any, points: jax.Array) -> jax.Array:
        """Compute the equation's residual, with the viscosity of `params`."""
        found = self.network.derive(params["layers"], points, ())
        return evolution.burgers_residual(found, jnp.exp(params["log_ν"]))

    def batch(self, key: jax.Array, updates: jax.Array | int = 0) -> Any:
        """Draw points inside and zeros, and points and what was measured there."""
        inside, (where, u) = super().batch(key, updates)
        deviation = self.noise * self.size(self.evaluation_points())
        noise = jax.random.normal(jax.random.fold_in(key, 2), u.shape, u.dtype)
        return inside, (where, u + deviation * noise)

    def error(self, params: Any, points: jax.Array, truth: jax.Array) -> jax.Array:
        """Compute the relative error of ν."""
        del points, truth
        return jnp.abs(jnp.exp(params["log_ν"]) / self.viscosity - 1)

    def standard_error(self, params: Any, batch: Any) -> float:
        """Compute the standard error of log ν, that is, of ν relative to itself."""
        vector, unravel = ravel_pytree(params)
        (points, _), (where, _) = batch

        def weighted(vector: jax.Array) -> jax.Array:
            params = unravel(vector)
            parts = self.residual(params, points), self.value(params, where)
            scales = [
                (weight / part.size) ** 0.5
                for weight, part in zip(self.weights, parts, strict=False)
            ]
            return jnp.concatenate([c * r for c, r in zip(scales, parts, strict=True)])

        jacobian = np.asarray(jax.jit(jax.jacfwd(weighted))(vector))
        is_viscosity = {**jax.tree.map(jnp.zeros_like, params), "log_ν": jnp.ones(())}
        chosen = np.asarray(ravel_pytree(is_viscosity)[0]) > 0
        column = jacobian[:, chosen][:, 0]
        # What no change of the other parameters can undo.
        others, _ = np.linalg.qr(jacobian[:, ~chosen])
        left = column - others @ (others.T @ column)
        scale = (self.weights[1] / where.shape[0]) ** 0.5
        slopes = scale * left[points.shape[0] :] / (left @ left)
        deviation = self.noise * float(self.size(self.evaluation_points()))
        return deviation * float(np.linalg.norm(slopes))

    def summary(self) -> Summary:
        """Say what tables and pictures need; milestones are powers of ten."""
        return (
            super()
            .summary()
            ._replace(
                value="relative error of ν",
                milestones={f"{level:g}": level for level in (0.1, 0.01, 0.001)},
                lowest=False,
                note=f"Data: {self.boundary:,} values of u with {self.noise:.0%} of noise.",
            )
        )
