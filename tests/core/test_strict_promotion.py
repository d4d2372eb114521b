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
from hfjax.update._damped import damped

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
        "damping": damping.constant(0.0),
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


LOSSES = {
    "squared": hfjax.losses.squared_error(),
    "sigmoid": hfjax.losses.sigmoid_cross_entropy(),
    "softmax": hfjax.losses.softmax_cross_entropy(),
    "coupled": hfjax.losses.from_function(
        lambda z, t: jnp.prod(z, axis=-1) * jnp.sum(t.astype(z.dtype), axis=-1),
        positive="clip",
    ),
}


@pytest.mark.parametrize("of_targets", [*DTYPES, jnp.int32, jnp.uint8, bool])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_outputs_meet_targets_of_any_dtype(name, dtype, of_targets):
    """In the wider of the two, where both are floating."""
    loss, z = LOSSES[name], draw(4, 3, dtype=dtype)
    t = jnp.asarray(np.eye(4, 3), of_targets)

    def parts(z, t):
        products = [of(z, t)(z) for of in (loss.hessian, loss.factor)]
        fits = loss.targets.allowed(z, t) if loss.targets else None
        return loss.value(z, t), products, loss.predict(z), fits

    with jax.numpy_dtype_promotion("strict"):
        value, products, _, _ = jax.eval_shape(parts, z, t)
    assert [product.dtype for product in products] == [dtype, dtype]
    if name != "coupled" and jnp.issubdtype(of_targets, jnp.floating):
        assert value.dtype == jnp.promote_types(dtype, of_targets)


def test_targets_in_float32_are_not_rounded_to_outputs_in_bfloat16():
    z, t = draw(4, 3, dtype=jnp.bfloat16), jnp.abs(draw(4, 3, dtype=jnp.float32))
    for name in ("squared", "sigmoid", "softmax"):
        exact = LOSSES[name].value(z.astype(jnp.float64), t.astype(jnp.float64))
        np.testing.assert_allclose(LOSSES[name].value(z, t), exact, rtol=1e-5)


@pytest.mark.slow
def test_a_tree_of_outputs_of_two_dtypes_has_one_value():
    z = {"a": draw(4, 2, dtype=jnp.bfloat16), "b": draw(4, 3, dtype=jnp.float64)}
    t = jax.tree.map(lambda z: jnp.abs(z).astype(jnp.float32), z)
    coupled = hfjax.losses.from_function(
        lambda z, t: jax.nn.logsumexp(
            jnp.concatenate([z["a"].astype(jnp.float64), z["b"]], -1), -1
        )
    )
    of_z = jax.tree.map(jnp.result_type, z)
    with jax.numpy_dtype_promotion("strict"):
        for loss in (LOSSES["softmax"], coupled):
            assert loss.value(z, t).dtype == jnp.float64
            for product in (loss.hessian(z, t)(z), loss.factor(z, t)(z)):
                assert jax.tree.map(jnp.result_type, product) == of_z


@pytest.mark.parametrize("dtype", DTYPES)
def test_fewer_digits_meet_constants_and_targets(dtype):
    """A model's constants keep their dtype, though its parameters lose digits."""
    params, (x, t, weights) = data(dtype)
    half = jnp.full((1, 4), 0.5, dtype)

    def shifted(params, x):
        return jnp.tanh(x @ params["w"] + half) @ params["k"]

    for loss in (LOSSES["softmax"], LOSSES["coupled"]):
        f = hfjax.Objective(shifted, loss)
        with jax.numpy_dtype_promotion("strict"):
            jax.eval_shape(
                lambda p, f=f: curvature.with_precision("bfloat16")(
                    f, p, (x, jnp.abs(t), weights)
                )(p),
                params,
            )


NUMBER = np.float64
"""A number with a dtype of its own."""
OPTIONS = {
    "search": {
        "line_search": hfjax.linesearch.armijo(
            sufficient_decrease=NUMBER(0.01), shrink=NUMBER(0.8)
        ),
        "damping": damping.levenberg_marquardt(
            NUMBER(1.0),
            decrease=NUMBER(0.6),
            increase=NUMBER(1.5),
            lower=NUMBER(0.25),
            upper=NUMBER(0.75),
            minimum=NUMBER(1e-9),
            ratio=damping.ReductionRatio(expected=NUMBER(0.9)),
        ),
        "backtracking": hfjax.backtracking.full_search(),
    },
    "searched": {
        "solver": hfjax.cg.conjugate_gradient(
            warm_start_decay=NUMBER(0.9),
            stopping=hfjax.stopping.residual(NUMBER(1e-3)),
            limit=NUMBER(2.0),
            max_iterations=3,
            keep=hfjax.iterates.grid(first=1),
        ),
        "damping": damping.searched(
            NUMBER(1.0),
            factor=NUMBER(4.0),
            tolerance=NUMBER(0.01),
            minimum=NUMBER(1e-9),
        ),
    },
    "constant": {"damping": damping.constant(NUMBER(0.1)), "solver": "auto"},
    "krylov": {
        "solver": hfjax.krylov.subspace_descent(dimension=3, floor=NUMBER(1e-4)),
        "damping": damping.constant(0.0),
    },
    "radius": {
        "solver": hfjax.trust_region.steihaug_toint(),
        "damping": hfjax.trust_region.radius(NUMBER(1.0), maximum=NUMBER(1e6)),
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_numbers_of_numpy_are_options_like_any(name):
    params, batch = data(jnp.float32)
    f = hfjax.Objective(model_fn, LOSSES["squared"], weight_decay=NUMBER(0.1))
    tx = hfjax.hessian_free(f, **OPTIONS[name])

    def update(params):
        value, grads = f.value_and_grad(params, batch)
        return value, tx.update(grads, tx.init(params), params, batch=batch)

    with jax.numpy_dtype_promotion("strict"):
        value, (updates, _) = jax.eval_shape(update, params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((value, updates)))


@pytest.mark.parametrize("of_outputs", DTYPES)
@pytest.mark.parametrize("solver", ["cg", "cholesky"])
def test_outputs_may_have_another_dtype_than_parameters(solver, of_outputs):
    params, batch = data(jnp.float32)
    f = hfjax.Objective(
        lambda p, x: model_fn(p, x).astype(of_outputs),
        LOSSES["squared"],
        weight_decay=0.1,
    )
    both = hfjax.objective.weighted_sum([(NUMBER(0.5), f), (1.0, OBJECTIVE)])
    for objective, data_of in ((f, batch), (both, (batch, batch))):
        tx = hfjax.hessian_free(objective, solver=SOLVERS[solver])

        def update(params, objective=objective, data_of=data_of, tx=tx):
            grads = objective.value_and_grad(params, data_of)[1]
            return tx.update(grads, tx.init(params), params, batch=data_of)

        with jax.numpy_dtype_promotion("strict"):
            jax.eval_shape(update, params)


def test_hidden_states_in_bfloat16_are_damped():
    params, batch = data(jnp.bfloat16)

    def with_hidden(params, x):
        hidden = jnp.tanh(x @ params["w"])
        return hidden @ params["k"], hidden

    f = hfjax.Objective(
        with_hidden, LOSSES["squared"], hidden_loss=hfjax.losses.squared_error()
    )
    tx = hfjax.hessian_free(f, damping=damping.levenberg_marquardt(structural=0.1))
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, batch=batch), params)


@pytest.mark.slow
@pytest.mark.parametrize("x64", [True, False])
def test_parts_without_an_optimizer_promote_nothing(x64):
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        for dtype in DTYPES if x64 else DTYPES[:2]:
            v, key = draw(4, dtype=dtype), jax.random.key(0)
            density = hfjax.spectrum.Density(jnp.ones((2, 3)), jnp.ones((2, 3)))
            for points, width in (([0, 1], 1), (np.ones(2), NUMBER(0.1)), (v, v[0])):
                assert density.at(points, width).dtype == density.nodes.dtype
            jax.eval_shape(
                lambda v, key, dtype=dtype: (
                    hfjax.spectrum.eigenvalues(lambda x: v * x, v, key=key),
                    hfjax.spectrum.density(lambda x: v * x, v, key=key),
                    hfjax.spectrum.trace(lambda x: v * x, v, key=key),
                    hfjax.krylov.basis(lambda x: v * x, v, 3, direction=v),
                    hfjax.trust_region.solve(lambda x: v * x, v, NUMBER(0.5)),
                    damped(lambda x: v * x, 0.5)(v),
                    hfjax.initializers.sparse(2, scale=NUMBER(1.0))(key, (4, 3), dtype),
                    hfjax.initializers.spectral_radius(NUMBER(1.2))(key, (4, 4), dtype),
                ),
                v,
                key,
            )
        for count in (7, np.int64(7), jnp.uint8(7)):
            taken = hfjax.minibatching.in_turn(jnp.arange(5), 2, count)
            assert taken.tolist() == [4, 0]


@pytest.mark.slow
def test_verify_runs_a_model_with_constants_in_float64():
    """Where it widens the parameters itself, their constants are none of a fault."""
    params, batch = data(jnp.float32)
    ones = jnp.ones((1, 4), jnp.float32)
    f = hfjax.Objective(lambda p, x: (x @ p["w"] + ones) @ p["k"], LOSSES["squared"])
    with jax.numpy_dtype_promotion("strict"):
        grads = f.value_and_grad(params, batch)[1]
        assert hfjax.verify.check(f, None, params, batch, grads) == []
        assert (
            max(hfjax.verify.products(f, params, batch, key=jax.random.key(0))) < 1e-6
        )


@pytest.mark.slow
def test_a_recurrent_network_in_bfloat16_takes_inputs_in_float32():
    network = pytest.importorskip("hfjax.flax").LinenRecurrentNetwork(3, 2)
    x = draw(2, 4, 3, dtype=jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        params = network.init(jax.random.key(0), x)
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        outputs = jax.eval_shape(network.apply, params, x)
    assert outputs.dtype == jnp.float32


@pytest.mark.slow
def test_a_sparse_matrix_in_a_batch_is_refused_by_name():
    params, (x, t, _) = data(jnp.float32)
    for batched in (0, 1):
        batch = (sparse.BCOO.fromdense(x, n_batch=batched), t)
        with pytest.raises(TypeError, match="sparse matrix in its inputs"):
            OBJECTIVE.value(params, batch)
