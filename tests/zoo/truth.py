"""The truth about a model of the zoo: dense matrices, and rows of its layers.

Nothing here reads how hfjax finds layers. A model is traced with `jax.disable_jit`, which
unrolls its loops, and its program is evaluated step by step. A value that is computed from
parameters alone carries its derivatives by them along. So a product of such a value with
another is known for what it is, whatever the model calls it, and each entry of its result
for the entries of the parameter that it reads.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jax.flatten_util import ravel_pytree
from reference import parts, quick_jit

from hfjax._tracing import programs

PRODUCTS = frozenset(("dot_general", "conv_general_dilated", "gather"))
CALLS = frozenset(("jit", "pjit", "checkpoint", "remat", "remat2"))


class Dense(NamedTuple):
    """f of a model, flat; the outputs of all examples are one vector z.

    Attributes:
      value: f.
      gradient: ∇f, by `jax.grad`.
      hessian: ∂²f/∂z², by `jax.hessian`.
      ggn: JᵀHJ, with J by `jax.jacfwd`.
    """

    value: np.ndarray
    gradient: np.ndarray
    hessian: np.ndarray
    ggn: np.ndarray


def dense(specimen) -> Dense:
    """Write f out, by the plain formulas of its loss."""
    inputs, targets, weights = parts(specimen.batch)
    theta, unravel = ravel_pytree(specimen.params)
    shapes = jax.eval_shape(specimen.model_fn, specimen.params, inputs)
    zeros = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), shapes)
    unravel_z = ravel_pytree(zeros)[1]

    def outputs(theta):
        return ravel_pytree(specimen.model_fn(unravel(theta), inputs))[0]

    def f(z):
        values = jax.vmap(specimen.plain)(unravel_z(z), targets)
        assert values.shape == weights.shape
        return jnp.sum(weights * values) / jnp.sum(weights)

    @quick_jit
    def run(theta):
        value, gradient = jax.value_and_grad(lambda theta: f(outputs(theta)))(theta)
        hessian = jax.hessian(f)(outputs(theta))
        return value, gradient, hessian, jax.jacfwd(outputs)(theta)

    value, gradient, hessian, j = map(np.asarray, run(theta))
    return Dense(value, gradient, hessian, j.T @ hessian @ j)


class Program:
    """The unrolled program of a model for one example."""

    def __init__(self, model_fn, params, inputs):
        self.leaves = jax.tree.leaves(params)
        first = jax.tree.map(lambda x: x[0], inputs)
        alone = jax.tree.map(lambda x: x[None], first)
        with jax.disable_jit():
            self.program = jax.make_jaxpr(model_fn)(params, alone)
        self.results: list[Any] = []

        def results(first):
            found: list[dict] = []
            self._run(first, None, found)

        jax.eval_shape(results, first)

    def zeros(self):
        """Return zeros like the result of each product with parameters."""
        return [jnp.zeros(x.shape, x.dtype) for x in self.results]

    def __call__(self, example, added):
        """Return the outputs, and of each product the derivatives by parameters.

        They are pairs, by the number of the parameter: the second is taken where the other
        operand is 1 everywhere, which shows what may be read at all. `added` is added to
        the results of the products.
        """
        found: list[dict] = []
        return self._run(example, added, found), found

    def _run(self, example, added, found):
        args = [
            (leaf, {n: jnp.eye(leaf.size).reshape(leaf.size, *leaf.shape)})
            for n, leaf in enumerate(self.leaves)
        ]
        args += [(x[None], None) for x in jax.tree.leaves(example)]
        return [value for value, _ in self._walk(self.program, args, added, found)]

    def _walk(self, program, args, added, found):
        """Evaluate a program on values with their derivatives; those of data are `None`."""
        consts = [(x, {}) for x in getattr(program, "consts", ())]
        jaxpr = getattr(program, "jaxpr", program)
        inputs = (*jaxpr.constvars, *jaxpr.invars)
        values = dict(zip(inputs, [*consts, *args], strict=True))

        def read(atom):
            return (atom.val, {}) if isinstance(atom, Literal) else values[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            if equation.primitive.name in CALLS:
                inner = equation.params["jaxpr"]
                results = self._walk(inner, operands, added, found)
            else:
                results = self._equation(equation, operands, added, found)
            values |= dict(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation, operands, added, found):
        values, slopes = [x for x, _ in operands], [own for _, own in operands]
        results = programs.run(equation, values)
        of_params = [side for side, own in enumerate(slopes) if own]
        if equation.primitive.name in PRODUCTS and len(of_params) == 1:
            found.append(_reads(equation, values, slopes, *of_params))
            if added is None:
                self.results.append(equation.outvars[0].aval)
                return [(results[0], None)]
            return [(results[0] + added[len(found) - 1], None)]
        if any(own is None for own in slopes):
            return [(x, None) for x in results]
        moved = self._moved(equation, values, slopes, of_params)
        each = [{n: own[k] for n, own in moved.items()} for k in range(len(results))]
        return list(zip(results, each, strict=True))

    def _moved(self, equation, values, slopes, of_params):
        """Return the derivatives of what is computed from parameters alone."""
        at = tuple(values[side] for side in of_params)

        def run(*own):
            return _run(equation, values, dict(zip(of_params, own, strict=True)))

        def of_leaf(n):
            along = [
                slopes[side].get(n, jnp.zeros((self.leaves[n].size, *x.shape), x.dtype))
                for side, x in zip(of_params, at, strict=True)
            ]
            return jax.vmap(lambda *own: jax.jvp(run, at, own)[1])(*along)

        return {n: of_leaf(n) for n in {n for own in slopes for n in own}}


def _run(equation, values, others):
    """Run an equation with others in place of some of its operands."""
    operands = [others.get(side, x) for side, x in enumerate(values)]
    return programs.run(equation, operands)


def _reads(equation, values, slopes, side):
    """Return the derivatives of a product by the parameters that operand `side` is of."""
    is_lookup = equation.primitive.name == "gather"
    ones = values if is_lookup else [_ones(x) for x in values]

    def by(slope, values):
        found = jax.vmap(lambda own: _run(equation, values, {side: own})[0])(slope)
        rows = found.reshape(len(found), -1).T
        # A complex result counts as two.
        return (
            jnp.concatenate([rows.real, rows.imag]) if jnp.iscomplexobj(rows) else rows
        )

    return {n: (by(own, values), by(own, ones)) for n, own in slopes[side].items()}


def _ones(x):
    """Return ones, with an imaginary part, too, if `x` is complex."""
    is_complex = jnp.issubdtype(x.dtype, jnp.complexfloating)
    return jnp.full_like(x, 1 + 1j if is_complex else 1)


class Rows(NamedTuple):
    """Inputs and errors of a use, in all examples.

    Attributes:
      blocks: the blocks of the kernel that it uses.
      inputs: shape `[cases, blocks, positions, inputs]`.
      errors: shape `[cases, blocks, positions, units]`.
    """

    blocks: np.ndarray
    inputs: np.ndarray
    errors: np.ndarray


def rows_of(places, read, some, errors) -> Rows | None:
    """Sort what a use computes by positions, or return `None` if it has other sides.

    Args:
      places: which entry of the parameter a kernel `[blocks, inputs, units]` has where.
        That these are its sides is seen from the product: an entry of the result reads
        one unit of one block, and entries of one position the same inputs.
      read: the derivative by the parameter, shape `[cases, results, entries]`.
      some: the same where all inputs are 1.
      errors: shape `[cases, …]`, those that come back to the result.
    """
    blocks, _, units = places.shape
    errors = errors.reshape(len(errors), -1)
    if np.iscomplexobj(errors):  # Which are ∂/∂u − i ∂/∂v.
        errors = np.concatenate([errors.real, -errors.imag], axis=1)
    of_units = np.any(some[..., places] != 0, axis=(0, 3)).reshape(-1, blocks * units)
    if np.any(of_units.sum(axis=1) > 1):
        return None
    # Kernels may be concatenated: other results read another one.
    (results,) = np.nonzero(of_units.any(axis=1))
    unit = of_units[results].argmax(axis=1)
    used, positions = np.unique(unit, return_counts=True)
    assert np.all(positions == positions[0])
    assert np.array_equal(
        used.reshape(-1, units), used[::units, None] + np.arange(units)
    )
    order = results[np.argsort(unit, kind="stable")].reshape(-1, units, positions[0])
    # Where units of a kernel are scaled, their errors have the scales.
    scales = np.abs(some[..., places]).max(axis=(2, 3, 4))[:, order]
    # [cases, blocks, units, positions, inputs]
    inputs = read[..., places].sum(axis=(2, 4))[:, order] / scales[..., None]
    np.testing.assert_allclose(inputs, np.broadcast_to(inputs[:, :, :1], inputs.shape))
    errors = (errors[:, order] * scales).swapaxes(2, 3)
    return Rows(used[::units] // units, inputs[:, :, 0], errors)
