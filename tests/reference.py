"""Slow dense truth in float64, from the formulas of the report, without hfjax."""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


class Dense(NamedTuple):
    """What a problem is, case by case; `n` parameters, flat as `ravel_pytree` has it.

    Attributes:
      values: shape `[cases]`, the losses.
      gradients: shape `[cases, n]`, of each case's loss.
      ggns: shape `[cases, n, n]`, JᵀL″J of each case.
    """

    values: np.ndarray
    gradients: np.ndarray
    ggns: np.ndarray


QUICK = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # Else XLA has no other way to write a kernel.
    # One MLIR context for each fusion is two thirds of what compiling costs.
    QUICK["xla_cpu_use_fusion_emitters"] = False


def quick_jit(fn, **options):
    """Compile without optimising: a test runs its program once."""
    return jax.jit(fn, compiler_options=QUICK, **options)


def counted_jit(fn, **options):
    """Compile so, and return a list, too, that grows with each time it is traced.

    JAX's own count, `_cache_size`, is 0 for a program that it has evicted meanwhile.
    """
    traced = []

    def counted(*args, **kwargs):
        traced.append(fn)
        return fn(*args, **kwargs)

    return quick_jit(counted, **options), traced


@contextlib.contextmanager
def programs(event: str):
    """Collect the names of what JAX traces or compiles meanwhile.

    Args:
      event: `"jaxpr_trace"` or `"backend_compile"`.
    """
    seen = []

    def listen(name, seconds, **about):
        del seconds
        if name == f"/jax/core/compile/{event}_duration":
            seen.append(about.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def flat(tree: Any) -> np.ndarray:
    """Return all entries of a tree as one vector."""
    return np.asarray(ravel_pytree(tree)[0])


def matrix_of(linear_map, like: Any):
    """Return the matrix of a linear map on trees like this one, from unit vectors."""
    vector, unravel = ravel_pytree(like)
    column = jax.vmap(lambda e: ravel_pytree(linear_map(unravel(e)))[0], out_axes=1)
    return column(jnp.eye(vector.size, dtype=vector.dtype))


def assert_close(tree: Any, truth: Any, rtol: float = 1e-7, atol: float = 0.0):
    """Compare the leaves of two trees, as `np.testing.assert_allclose` does."""
    for leaf, right in zip(jax.tree.leaves(tree), jax.tree.leaves(truth), strict=True):
        np.testing.assert_allclose(leaf, right, rtol=rtol, atol=atol)


@functools.cache
def dense(problem: Any) -> Dense:
    """Write the problem out: J by `jax.jacfwd`, the rest in closed form in NumPy."""
    flat, unravel = ravel_pytree(problem.params)
    inputs, targets, _ = parts(problem.batch)

    def outputs(flat):
        leaves = jax.tree.leaves(problem.model_fn(unravel(flat), inputs))
        return [z.reshape(len(z), -1) for z in leaves], leaves

    jacobians, leaves = quick_jit(jax.jacfwd(outputs, has_aux=True))(flat)
    cases = [
        output_loss(problem.loss, np.asarray(z), np.asarray(t))
        for z, t in zip(leaves, jax.tree.leaves(targets), strict=True)
    ]
    j = np.concatenate(jacobians, axis=1)
    gradient = np.concatenate([leaf[1] for leaf in cases], axis=1)
    hessian = block_diagonal([leaf[2] for leaf in cases])
    return Dense(
        values=sum(leaf[0] for leaf in cases),
        gradients=np.einsum("ian,ia->in", j, gradient),
        ggns=np.einsum("iam,iab,ibn->imn", j, hessian, j, optimize=True),
    )


def parts(batch: tuple) -> tuple:
    """Return inputs, targets and weights, which are 1 where the batch has none."""
    inputs, targets, *rest = batch
    cases = len(jax.tree.leaves(targets)[0])
    return inputs, targets, np.asarray(rest[0]) if rest else np.ones(cases)


def mean(cases: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return Σ w q / Σ w over the leading axis."""
    return np.tensordot(weights, cases, axes=1) / np.sum(weights)


def value(problem: Any) -> float:
    """Return f(θ)."""
    flat, _ = ravel_pytree(problem.params)
    data = mean(dense(problem).values, parts(problem.batch)[2])
    return data + 0.5 * problem.weight_decay * np.sum(np.square(flat))


def gradient(problem: Any) -> np.ndarray:
    """Return ∇f(θ), flat."""
    flat, _ = ravel_pytree(problem.params)
    data = mean(dense(problem).gradients, parts(problem.batch)[2])
    return data + problem.weight_decay * np.asarray(flat)


def ggn(problem: Any) -> np.ndarray:
    """Return G = Σ w JᵀL″J / Σ w + weight_decay · I."""
    data = mean(dense(problem).ggns, parts(problem.batch)[2])
    return data + problem.weight_decay * np.eye(len(data))


def empirical_fisher(problem: Any) -> np.ndarray:
    """Return the diagonal of Σ w ∇L ∇Lᵀ / Σ w + weight_decay · I, flat."""
    squares = np.square(dense(problem).gradients)
    return mean(squares, parts(problem.batch)[2]) + problem.weight_decay


def empirical_fisher_matrix(problem: Any) -> np.ndarray:
    """Return Σ w ∇L ∇Lᵀ / Σ w + weight_decay · I."""
    gradients = dense(problem).gradients
    outer = np.einsum("im,in->imn", gradients, gradients)
    data = mean(outer, parts(problem.batch)[2])
    return data + problem.weight_decay * np.eye(len(data))


@functools.cache
def hessian(problem: Any) -> np.ndarray:
    """Return ∇²f = G + Σ w Σₖ (∂L/∂zₖ) ∇²zₖ / Σ w, with ∂L/∂z in closed form."""
    flat, unravel = ravel_pytree(problem.params)
    inputs, targets, weights = parts(problem.batch)
    slopes = [
        output_loss(problem.loss, np.asarray(z), np.asarray(t))[1]
        for z, t in zip(
            jax.tree.leaves(problem.model_fn(problem.params, inputs)),
            jax.tree.leaves(targets),
            strict=True,
        )
    ]

    def bent(flat):
        leaves = jax.tree.leaves(problem.model_fn(unravel(flat), inputs))
        share = (weights / np.sum(weights))[:, None]
        rows = [z.reshape(len(z), -1) for z in leaves]
        return sum(
            (share * slope * z).sum() for slope, z in zip(slopes, rows, strict=True)
        )

    return ggn(problem) + np.asarray(quick_jit(jax.hessian(bent))(flat))


@functools.cache
def structural_cases(problem: Any) -> np.ndarray:
    """Return Jₕᵀ d″ Jₕ of each case, `[cases, n, n]`: d″ is diagonal in closed form."""
    flat, unravel = ravel_pytree(problem.params)

    def hidden(flat):
        leaves = jax.tree.leaves(problem.pair_fn(unravel(flat), problem.batch[0])[1])
        leaves = [h.reshape(len(h), -1) for h in leaves]
        return leaves, leaves

    jacobians, leaves = quick_jit(jax.jacfwd(hidden, has_aux=True))(flat)
    j, h = np.concatenate(jacobians, axis=1), np.concatenate(leaves, axis=1)
    curved = {
        "squared_error": np.ones_like,
        "sigmoid_cross_entropy": lambda z: 1 / (2 + np.exp(z) + np.exp(-z)),
        "bregman": np.cosh,
    }[problem.distance](h)
    return np.einsum("iam,ia,ian->imn", j, curved, j)


def structural(problem: Any) -> np.ndarray:
    """Return S = Σ w Jₕᵀ d″ Jₕ / Σ w: no weight decay."""
    return mean(structural_cases(problem), parts(problem.batch)[2])


def quantities(problem: Any, v: np.ndarray) -> dict:
    """Return f, ∇f, G v and the Fisher diagonal, flat."""
    return {
        "value": value(problem),
        "gradient": gradient(problem),
        "product": ggn(problem) @ v,
        "fisher": empirical_fisher(problem),
    }


def nearest_product(pairs) -> tuple[np.ndarray, np.ndarray]:
    """Return one pair (Ā, Ḡ) for a sum of Kronecker products, with its trace.

    Each matrix is divided by its mean eigenvalue, and counts with the share of its product.
    """
    means = [(np.trace(a) / len(a), np.trace(g) / len(g)) for a, g in pairs]
    sizes = np.array([x * y for x, y in means])
    shares = sizes / np.sum(sizes)
    inputs = [c * a / x for c, (a, _), (x, _) in zip(shares, pairs, means, strict=True)]
    units = [c * g / y for c, (_, g), (_, y) in zip(sizes, pairs, means, strict=True)]
    return sum(inputs), sum(units)


def output_loss(name: str, z: np.ndarray, t: np.ndarray) -> tuple:
    """Return value `[cases]`, gradient `[cases, m]` and Hessian `[cases, m, m]` in z.

    The last axis is one distribution for the softmax; those between it and the case
    axis are summed, so the Hessian is block-diagonal over them.
    """
    cases, units = z.shape[0], z.shape[-1]
    z = z.astype(np.float64).reshape(cases, -1, units)
    integer = name == "softmax_cross_entropy_with_integer_labels"
    t = np.eye(units)[t] if integer else t.astype(np.float64)
    t = t.reshape(z.shape)
    rows = [
        [_row(name, z[i, k], t[i, k]) for k in range(z.shape[1])] for i in range(cases)
    ]
    return (
        np.array([sum(row[0] for row in case) for case in rows]),
        np.array([np.concatenate([row[1] for row in case]) for case in rows]),
        block_diagonal(
            [np.array([case[k][2] for case in rows]) for k in range(z.shape[1])]
        ),
    )


def _row(name: str, z: np.ndarray, t: np.ndarray) -> tuple:
    """Return value, gradient and Hessian in z, one vector (report, table 2)."""
    if name == "squared_error":
        return 0.5 * np.sum((z - t) ** 2), z - t, np.eye(len(z))
    if name == "sigmoid_cross_entropy":
        p, q = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
        return -np.sum(t * np.log(p) + (1 - t) * np.log(q)), p - t, np.diag(p * q)
    p = np.exp(z - np.max(z))
    p, mass = p / np.sum(p), np.sum(t)
    off = np.outer(p, p) * (1 - np.eye(len(z)))
    # diag(p) − ppᵀ, with p(1 − p) as the sum of its row: no digits cancel.
    hessian = np.diag(np.sum(off, axis=1)) - off
    return -np.sum(t * np.log(p)), mass * p - t, mass * hessian


def block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    """Return [cases, Σm, Σm] from blocks [cases, m, m]."""
    size, at = sum(block.shape[-1] for block in blocks), 0
    out = np.zeros((len(blocks[0]), size, size))
    for block in blocks:
        end = at + block.shape[-1]
        out[:, at:end, at:end] = block
        at = end
    return out


def pcg(a, b, x0=None, inverse=None, iterations=10):
    """Run algorithm 2 of the report as it is printed.

    Returns:
      The iterates x₀, x₁, … and ½xᵀAx − bᵀx at each.
    """
    x = np.zeros_like(b) if x0 is None else x0
    inverse = np.eye(len(b)) if inverse is None else inverse
    r = a @ x - b
    y = inverse @ r
    p, iterates = -y, [x]
    for _ in range(iterations):
        alpha = (r @ y) / (p @ a @ p)
        x = x + alpha * p
        r_new = r + alpha * (a @ p)
        y_new = inverse @ r_new
        beta = (r_new @ y_new) / (r @ y)
        r, y, p = r_new, y_new, -y_new + beta * p
        iterates.append(x)
    return np.array(iterates), np.array([model(a, b, x) for x in iterates])


def model(a, b, x):
    """Return M(x) = ½xᵀA x − bᵀx in float64."""
    a, b, x = (np.asarray(leaf, np.float64) for leaf in (a, b, x))
    return 0.5 * x @ a @ x - b @ x
