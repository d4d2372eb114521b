"""Nothing of the library relies on what JAX promotes by itself.

As where `jax_numpy_dtype_promotion` is "strict", for whoever trains in it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse

import hfjax
from hfjax import curvature, damping, preconditioners, recipes

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float64]
SOLVERS = {
    "cg": hfjax.cg.conjugate_gradient(warm_start_decay=0.9, max_iterations=5),
    "cholesky": hfjax.sample_space.cholesky(momentum=0.5),
}
PARTS = {
    "default": {},
    "warm start": {"solver": SOLVERS["cg"], "damping": damping.levenberg_marquardt()},
    "cholesky": {"solver": SOLVERS["cholesky"]},
    "krylov": {
        "solver": hfjax.krylov.subspace_descent(),
        "damping": hfjax.damping.constant(0.0),
    },
    "auto": {"solver": "auto"},
    "averaged factors": {
        "preconditioner": preconditioners.kronecker(decay=0.9, interval=2)
    },
    "nystrom": {"preconditioner": preconditioners.nystrom(rank=3, interval=2)},
    "diagonal": {"preconditioner": preconditioners.diagonal()},
    "D": {"damping": damping.levenberg_marquardt(matrix="curvature_diagonal")},
    "hessian": {"curvature": curvature.hessian},
}
RECIPES = {
    name: getattr(recipes, name)
    for name in (
        "martens2010",
        "curvature_guarded",
        "momentum_like",
        "kronecker_factored",
    )
}


def model_fn(params, x):
    return jnp.tanh(x @ params["w"]) @ params["k"]


OBJECTIVE = hfjax.Objective(model_fn, hfjax.losses.squared_error(), weight_decay=0.1)


def draw(*shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def data(dtype):
    params = {"w": draw(3, 4, dtype=dtype), "k": draw(4, 2, dtype=dtype, seed=1)}
    x, t = draw(6, 3, dtype=dtype, seed=2), draw(6, 2, dtype=dtype, seed=3)
    return params, (x, t, jnp.ones(6, jnp.int32))


@functools.cache
def built(name):
    if name in RECIPES:
        return RECIPES[name](OBJECTIVE)
    return hfjax.hessian_free(OBJECTIVE, **PARTS[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*PARTS, *RECIPES])
def test_an_update_promotes_nothing(name, dtype):
    params, batch = data(dtype)
    tx = built(name)

    def update(params):
        grads = OBJECTIVE.value_and_grad(params, batch)[1]
        _, state = tx.update(grads, tx.init(params), params, batch=batch)
        return tx.update(grads, state, params, batch=batch, eval_batch=batch)

    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(update, params)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "compute",
    [
        curvature.ggn,
        curvature.hessian,
        curvature.empirical_fisher,
        curvature.finite_difference_hessian,
        hfjax.diagonals.empirical_fisher,
        hfjax.diagonals.ggn_exact,
        functools.partial(hfjax.diagonals.ggn_rademacher, key=jax.random.key(0)),
    ],
)
def test_curvature_and_diagonals_promote_nothing(compute, dtype):
    params, batch = data(dtype)

    def run(params):
        found = compute(OBJECTIVE, params, batch)
        return found(params) if callable(found) else found

    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(run, params)


def test_a_sparse_matrix_in_a_batch_is_refused_by_name():
    params, (x, t, _) = data(jnp.float32)
    for batched in (0, 1):
        batch = (sparse.BCOO.fromdense(x, n_batch=batched), t)
        with pytest.raises(TypeError, match="sparse matrix in its inputs"):
            OBJECTIVE.value(params, batch)
