"""Calls from outside of `jit`: the second compiles nothing, and keeps nothing."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from reference import assert_close, programs

import hfjax
from hfjax import cg, curvature, diagonals, spectrum
from hfjax._tracing import compiled

X = np.linspace(-1, 1, 12).reshape(6, 2)
T = np.sin(3 * X[:, :1])
KEY = jax.random.key(0)


def model_fn(params, inputs):
    """Run a network with a loop and a `custom_jvp`: each trace makes them anew."""

    def layer(h, w):
        return jax.nn.relu(h @ w) + jax.nn.silu(h), None

    return jax.lax.scan(layer, inputs, params["layers"])[0] @ params["out"]


def params_at(scale):
    return {
        "layers": scale * jnp.cos(jnp.arange(8.0)).reshape(2, 2, 2),
        "out": jnp.array([[1.0], [-1.0]]),
    }


def objective(**options):
    return hfjax.Objective(model_fn, hfjax.losses.squared_error(), **options)


def batch_at(scale):
    return jnp.asarray(X * scale), jnp.asarray(T)


def solved(run):
    """Let a run solve a system that is written down in each call."""

    def call(scale):
        a = scale * jnp.array([[2.0, 0.5], [0.5, 1.0]])
        return run(lambda v: a @ v, jnp.array([1.0, 2.0]))

    return call


def at(call):
    """Make all of it anew in each call: objective, parameters and batch."""
    return lambda scale: call(
        objective(weight_decay=1e-3, microbatch_size=4),
        params_at(scale),
        batch_at(scale),
    )


def ones(params):
    return jax.tree.map(jnp.ones_like, params)


CALLS = {
    "cg.solve": solved(lambda matvec, b: cg.solve(matvec, b).x),
    "cg.inverse": solved(lambda matvec, b: cg.inverse(matvec, damping=0.1)(b)),
    "trust_region.solve": solved(
        lambda matvec, b: hfjax.trust_region.solve(matvec, b, 0.5).x
    ),
    "krylov.basis": solved(lambda matvec, b: hfjax.krylov.basis(matvec, b, 2).matrix),
    "eigenvalues": solved(lambda matvec, b: spectrum.eigenvalues(matvec, b, key=KEY)),
    "density": solved(
        lambda matvec, b: spectrum.density(matvec, b, key=KEY, num_probes=2)
    ),
    "trace": solved(lambda matvec, b: spectrum.trace(matvec, b, key=KEY, num_probes=2)),
    "value": at(lambda f, p, batch: f.value(p, batch)),
    "value_and_grad": at(lambda f, p, batch: f.value_and_grad(p, batch)),
    "case_values": at(lambda f, p, batch: f.case_values(p, batch)),
    "product": at(lambda f, p, batch: curvature.ggn(f, p, batch)(ones(p))),
    "hessian": at(lambda f, p, batch: curvature.hessian(f, p, batch)(ones(p))),
    "linearised": lambda scale: curvature.ggn(
        objective(), params_at(scale), batch_at(scale)
    )(ones(params_at(scale))),
    "linearised once": lambda scale: curvature.hessian(
        objective(microbatch_size=4, linearize_once=True),
        params_at(scale),
        batch_at(scale),
    )(ones(params_at(scale))),
    "rounded": lambda scale: curvature.with_precision("bfloat16")(
        objective(), params_at(scale), batch_at(scale)
    )(ones(params_at(scale))),
    "Fisher": at(lambda f, p, batch: diagonals.empirical_fisher(f, p, batch)),
    "diagonal": at(lambda f, p, batch: diagonals.ggn_rademacher(f, p, batch, key=KEY)),
    "inverse of a product": at(
        lambda f, p, batch: cg.inverse(
            curvature.ggn(f, p, batch), damping=1.0, max_iterations=3
        )(ones(p))
    ),
    "sum": at(
        lambda f, p, batch: hfjax.objective.weighted_sum(
            [(1.0, f), (2.0, f)]
        ).value_and_grad(p, (batch, batch))
    ),
    "cg_run": at(
        lambda f, p, batch: hfjax.diagnostics.cg_run(
            f, p, batch, damping=1.0, preconditioner=None, max_iterations=3
        )
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_compiles_nothing_and_gives_its_own_result(name):
    call = CALLS[name]
    jax.block_until_ready(call(1.0))
    call(0.5)  # Arrays of the test itself.
    with programs("backend_compile") as compiled:
        found = jax.block_until_ready(call(0.5))
    assert not compiled
    truth = jax.jit(lambda: call(0.5))()
    rtol = 1e-2 if name == "rounded" else 1e-6
    assert_close(found, truth, rtol=rtol, atol=1e-9)


def optimizer(**options):
    """Build one that compiles in little time."""
    return hfjax.hessian_free(
        objective(),
        solver=cg.conjugate_gradient(max_iterations=3),
        damping=hfjax.damping.levenberg_marquardt(1.0),
        preconditioner=None,
        backtracking=None,
        line_search=None,
        **options,
    )


def update(tx, params, state, batch):
    return training.train_step(objective(), tx, params, state, batch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one optimizer", "one for each", "injected"])
def test_the_second_update_compiles_nothing(kind):
    def made():
        if kind == "injected":
            injected = optax.inject_hyperparams(
                lambda learning_rate: optimizer(learning_rate=learning_rate)
            )
            return injected(learning_rate=lambda count: 1 / (1 + count))
        return optimizer()

    tx, batch = made(), batch_at(1.0)
    params = params_at(1.0)
    state = tx.init(params)
    for _ in range(2):
        params, state = update(tx, params, state, batch)
    with programs("backend_compile") as compiled:
        tx = made() if kind == "one for each" else tx
        params, state = update(tx, params, state, batch)
        jax.block_until_ready(params)
    assert not compiled
    by_jit, other = params_at(1.0), made()
    its = other.init(by_jit)
    step = jax.jit(lambda params, state: update(other, params, state, batch))
    for _ in range(3):
        by_jit, its = step(by_jit, its)
    assert_close((params, state), (by_jit, its), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_memory_does_not_grow_with_calls():
    tx, batch, params = optimizer(), batch_at(1.0), params_at(1.0)
    state = tx.init(params)

    def everything(params, state):
        product = curvature.ggn(objective(), params, batch)
        cg.inverse(product, damping=1.0, max_iterations=3)(ones(params))
        return update(tx, params, state, batch)

    held = []
    for _ in range(6):
        params, state = everything(params, state)
        gc.collect()
        held.append((len(jax.live_arrays()), compiled._compiled.cache_info().currsize))
    assert held[2] == held[-1]
    assert compiled._compiled.cache_info().maxsize == 64


def test_what_a_product_reads_is_read_anew_in_each_call():
    a, b = np.diag([1.0, 2.0]), jnp.ones(2)
    inverse = cg.inverse(lambda v: a @ v)
    np.testing.assert_allclose(inverse(b), [1, 0.5], rtol=1e-5)
    a[0, 0] = 4
    np.testing.assert_allclose(inverse(b), [0.25, 0.5], rtol=1e-5)
    factor = 1.0
    f = hfjax.Objective(lambda p, x: factor * x * p, hfjax.losses.squared_error())
    batch = (jnp.ones(1), jnp.zeros(1))
    assert f.value(jnp.ones(()), batch) == 0.5
    factor = 2.0
    assert f.value(jnp.ones(()), batch) == 2.0


def test_a_model_that_looks_at_the_numbers_is_evaluated_as_it_is():
    def bent(params, inputs):
        return inputs * params if float(jnp.sum(params)) > 0 else -inputs * params

    f = hfjax.Objective(bent, lambda z, t: z - t)
    batch = (jnp.ones(1), jnp.zeros(1))
    assert f.value(jnp.ones(()), batch) == f.value(-jnp.ones(()), batch) == 1


PAIRS = {
    "zeros of two signs": (lambda x: x * 0.0, lambda x: x * -0.0),
    "one and true": (lambda x: x + 1, lambda x: x + True * 2),
    "axes": (lambda x: jnp.sum(x, 0), lambda x: jnp.sum(x, 1)),
    "which is read": (lambda x: x - x.T, lambda x: x.T - x),
    "results": (lambda x: (x, 2 * x), lambda x: (2 * x, x)),
    "inside a loop": (
        lambda x: jax.lax.fori_loop(0, 3, lambda k, y: y * x, x),
        lambda x: jax.lax.fori_loop(0, 3, lambda k, y: y + x, x),
    ),
    "lengths of loops": (
        lambda x: jax.lax.fori_loop(0, 3, lambda k, y: y * x, x),
        lambda x: jax.lax.fori_loop(0, 4, lambda k, y: y * x, x),
    ),
    "branches": (
        lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x, lambda: -x),
        lambda x: jax.lax.cond(x[0, 0] > 0, lambda: -x, lambda: x),
    ),
    "custom_jvp": (jax.nn.relu, jax.nn.relu6),
    "callbacks": tuple(
        lambda x, k=k: jax.pure_callback(lambda x: k * np.asarray(x), x, x)
        for k in (2.0, 3.0)
    ),
    "precision of a dtype": (
        lambda x: x.astype(jnp.bfloat16).astype(x.dtype),
        lambda x: x.astype(jnp.float16).astype(x.dtype),
    ),
    "large constants": tuple(lambda x, k=k: x + np.full((2, 2), k) for k in (1.0, 2.0)),
    "NaN and its place": (
        lambda x: jnp.where(x > 2, np.nan, x),
        lambda x: jnp.where(x > 2, np.inf, x),
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_programs_that_differ_are_not_taken_for_one_another(pair):
    x = jnp.array([[1.0, 2.1], [3.3, 4.7]])
    for function in (*PAIRS[pair], *PAIRS[pair]):
        found, truth = compiled.run(function, x), function(x)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(np.signbit(a), np.signbit(b))


def test_settings_of_jax_are_those_of_the_call():
    def program(x):
        return x @ x, jnp.ones(()) / 3

    once, x = compiled.once(program), jnp.eye(2, dtype=jnp.float32)
    assert once(x)[1].dtype == jnp.float64
    with jax.enable_x64(False):
        assert once(x)[1].dtype == jnp.float32
    with jax.disable_jit():
        assert once(x)[1].dtype == jnp.float64
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        compiled.run(lambda x: x / jnp.zeros(()), jnp.zeros(()))


@pytest.mark.slow
def test_inside_of_transformations_nothing_is_compiled_apart():
    def solve(b):
        a = jnp.diag(jnp.array([1.0, 2.0]))
        return cg.inverse(lambda v: a @ v)(b)

    program = str(jax.make_jaxpr(lambda: solve(jnp.ones(2)))())
    assert "operands" not in program
    many = jax.vmap(solve)(jnp.eye(2))
    np.testing.assert_allclose(many, np.diag([1.0, 0.5]), rtol=1e-5)
    slope = jax.grad(lambda s: jnp.sum(cg.inverse(lambda v: s * v)(jnp.ones(2))))(2.0)
    np.testing.assert_allclose(slope, -0.5, rtol=1e-5)
