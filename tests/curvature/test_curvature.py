import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.flatten_util import ravel_pytree
from problems import every_problem, mlp, named, normal
from reference import flat, matrix_of, quick_jit

import hfjax
from hfjax import curvature
from hfjax.curvature import ggn


@functools.cache
def ggn_matrix(problem):
    """Return the matrix of hfjax's product, column by column."""

    @quick_jit
    def matrix(params):
        return matrix_of(ggn(problem.objective(), params, problem.batch), params)

    return np.asarray(matrix(problem.params))


@pytest.mark.every
@every_problem
def test_product_equals_dense_ggn(problem):
    truth = reference.ggn(problem)
    np.testing.assert_allclose(
        ggn_matrix(problem), truth, rtol=1e-10, atol=1e-13 * np.max(np.abs(truth))
    )


@every_problem
def test_ggn_is_symmetric_and_positive_semidefinite(problem):
    matrix = ggn_matrix(problem)
    size = np.max(np.abs(matrix))
    np.testing.assert_allclose(matrix, matrix.T, rtol=1e-9, atol=1e-14)
    least = problem.weight_decay - 1e-13 - 1e-13 * size
    assert np.min(np.linalg.eigvalsh(matrix)) >= least


def test_product_of_a_frozen_layer_is_weight_decay_alone():
    problem = named("frozen")
    start = sum(leaf.size for leaf in problem.params["first"])  # Sorted by key.
    rows = ggn_matrix(problem)[start:]
    np.testing.assert_array_equal(rows, 0.05 * np.eye(len(rows) + start)[start:])


def written_out(outputs_fn, t, params):
    """Return the mean softmax cross-entropy of some outputs of flat parameters."""

    def f(flat):
        return jnp.mean(optax.softmax_cross_entropy(outputs_fn(flat), t))

    return quick_jit(jax.hessian(f))(params)


def test_ggn_of_a_linear_model_is_the_hessian():
    rng = np.random.default_rng(1)
    x, w = normal(rng, 5, 3), normal(rng, 3, 3)
    t = jnp.asarray(rng.dirichlet(np.ones(3), 5))
    objective = hfjax.Objective(
        lambda w, x: x @ w.reshape(3, 3), hfjax.losses.softmax_cross_entropy()
    )
    product = quick_jit(jax.vmap(ggn(objective, w.ravel(), (x, t))))
    truth = written_out(lambda w: x @ w.reshape(3, 3), t, w.ravel())
    np.testing.assert_allclose(product(jnp.eye(9)), truth, rtol=1e-10, atol=1e-15)


def test_ggn_is_the_hessian_of_the_loss_of_the_linearised_model():
    problem = named("mlp_softmax")
    x, t = problem.batch
    params, unravel = ravel_pytree(problem.params)
    jacobian = quick_jit(jax.jacfwd(lambda flat: mlp(unravel(flat), x)))(params)
    outputs = mlp(problem.params, x)
    truth = written_out(lambda step: outputs + jacobian @ step, t, 0 * params)
    decay = problem.weight_decay * np.eye(len(params))
    np.testing.assert_allclose(
        ggn_matrix(problem), truth + decay, rtol=1e-10, atol=1e-15
    )
    # The model is not linear: its Hessian is another matrix.
    hessian = written_out(lambda flat: mlp(unravel(flat), x), t, params)
    assert np.max(np.abs(hessian - truth)) > 1e-2


@pytest.mark.parametrize("loss", [optax.l2_loss, optax.log_cosh])
def test_ggn_of_a_wrapped_loss_uses_its_second_derivative(loss):
    rng = np.random.default_rng(2)
    x, t, w = normal(rng, 5, 3), normal(rng, 5, 2), normal(rng, 3, 2)
    objective = hfjax.Objective(lambda w, x: jnp.tanh(x @ w), loss)
    z = np.tanh(x @ w)
    slope = 1 - z**2
    second = np.ones_like(z) if loss is optax.l2_loss else 1 - np.tanh(z - t) ** 2
    v = np.cos(3 * w)
    truth = x.T @ (slope * second * slope * (x @ v)) / 5
    product = quick_jit(lambda w, v: ggn(objective, w, (x, t))(v))(w, v)
    np.testing.assert_allclose(product, truth, rtol=1e-10)


def in_dtype(problem, dtype):
    arrays = (problem.params, problem.batch, problem.direction)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), arrays)


@pytest.mark.parametrize("vector", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_product_keeps_the_dtype_of_the_vector(dtype, microbatch_size, vector):
    problem = named("mlp_softmax")
    params, batch, _ = in_dtype(problem, dtype)
    objective = problem.objective(microbatch_size=microbatch_size)
    v = jax.tree.map(lambda leaf: leaf.astype(vector), problem.direction)
    shapes = jax.eval_shape(lambda v: ggn(objective, params, batch)(v), v)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(vector)}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 3e-6), (jnp.bfloat16, 0.05)]
)
def test_product_in_short_floats_is_near_the_truth(dtype, tolerance):
    problem = named("mlp_softmax")
    params, batch, v = in_dtype(problem, dtype)
    objective = problem.objective()
    product = quick_jit(lambda params, v: ggn(objective, params, batch)(v))(params, v)
    truth = reference.ggn(problem) @ flat(problem.direction)
    error = np.linalg.norm(flat(product).astype(float) - truth)
    assert error <= tolerance * np.linalg.norm(truth)


def counted(problem):
    calls = []

    def model_fn(params, x):
        calls.append(x)
        return problem.model_fn(params, x)

    loss = hfjax.losses.softmax_cross_entropy()
    return hfjax.Objective(model_fn, loss), calls


def test_the_product_runs_the_model_no_more():
    problem = named("mlp_softmax")
    objective, calls = counted(problem)
    product = ggn(objective, problem.params, problem.batch)
    assert len(calls) == 1
    product(problem.direction)
    again = str(jax.make_jaxpr(product)(problem.direction))
    assert len(calls) == 1
    assert "tanh" not in again
    assert "exp" not in again  # Neither is the softmax taken again.
    # Two hidden layers, one output layer: J v costs 2 · 2 + 1 products with data or
    # weights less one (the input is constant), Jᵀ as many.
    assert again.count("dot_general") <= 2 * 5


def test_the_product_in_a_loop_runs_the_model_outside_of_it():
    problem = named("mlp_softmax")
    objective, calls = counted(problem)

    def power_iteration(params, v):
        product = ggn(objective, params, problem.batch)
        return jax.lax.fori_loop(0, 5, lambda _, v: product(v), v)

    program = jax.make_jaxpr(power_iteration)(problem.params, problem.direction)
    assert len(calls) == 1
    (loop,) = (
        equation
        for equation in program.eqns
        if equation.primitive.name in ("scan", "while")
    )
    assert "tanh" not in str(loop)


def test_microbatches_run_the_model_once_in_a_product():
    problem = named("mlp_softmax")
    objective, calls = counted(problem)

    def building(params):  # Outside of `jit`, what is built is traced at once.
        few = dataclasses.replace(objective, microbatch_size=2)
        ggn(few, params, problem.batch)

    jax.eval_shape(building, problem.params)
    assert not calls


def test_product_is_linear_and_the_same_when_jitted():
    rng = np.random.default_rng(3)
    x, t = normal(rng, 4, 3), normal(rng, 4, 2)
    w, u, v = (normal(rng, 3, 2) for _ in range(3))
    objective = hfjax.Objective(lambda w, x: x @ jnp.tanh(w), optax.log_cosh)
    product = ggn(objective, w, (x, t))
    eager = product(2 * u - 3 * v)
    np.testing.assert_allclose(eager, 2 * product(u) - 3 * product(v), rtol=1e-12)
    jitted = quick_jit(lambda w, v: ggn(objective, w, (x, t))(v))(w, 2 * u - 3 * v)
    np.testing.assert_allclose(jitted, eager, rtol=1e-12)


@every_problem
def test_hessian_and_empirical_fisher_equal_dense(problem):
    objective = problem.objective()

    @quick_jit
    def matrices(params, batch):
        return {
            make.__name__: matrix_of(make(objective, params, batch), params)
            for make in (curvature.hessian, curvature.empirical_fisher)
        }

    ours = matrices(problem.params, problem.batch)
    for name, truth in (
        ("hessian", reference.hessian(problem)),
        ("empirical_fisher", reference.empirical_fisher_matrix(problem)),
    ):
        size = np.max(np.abs(truth))
        np.testing.assert_allclose(
            ours[name], truth, rtol=1e-9, atol=1e-12 * size, err_msg=name
        )


def differences(problem, dtype, scale, **options):
    """Return the error of a product by finite differences, relative to the truth."""
    params, batch, v = in_dtype(problem, dtype)
    objective = problem.objective()
    make = functools.partial(curvature.finite_difference_hessian, objective, **options)
    v = jax.tree.map(lambda leaf: (scale * leaf).astype(dtype), v)
    product = flat(quick_jit(lambda p, b, v: make(p, b)(v))(params, batch, v))
    truth = reference.hessian(problem) @ flat(problem.direction)
    return np.linalg.norm(product / scale - truth) / np.linalg.norm(truth)


@pytest.mark.parametrize(
    ("name", "dtype", "scale", "bound"),
    [
        ("convolution", jnp.float64, 1.0, 1e-9),
        ("convolution", jnp.float64, 1e-200, 1e-9),
        ("recurrent", jnp.float64, 1e200, 1e-9),
        ("mlp_softmax", jnp.float32, 1e-25, 1e-3),
        ("mlp_softmax", jnp.float32, 1e25, 1e-3),
    ],
)
def test_finite_differences_are_near_the_hessian_whatever_the_size_of_v(
    name, dtype, scale, bound
):
    assert differences(named(name), dtype, scale) <= bound


@pytest.mark.slow
def test_the_error_of_differences_falls_as_it_should_with_epsilon():
    problem = named("mlp_softmax")
    coarse, fine = (
        differences(problem, jnp.float64, 1.0, epsilon=epsilon)
        for epsilon in (2e-3, 1e-3)
    )
    np.testing.assert_allclose(coarse / fine, 2**2, rtol=0.05)


def test_differences_are_seen_beside_parameters_of_any_size():
    # ½ (x w)² is quadratic in w: nothing but rounding is left.
    objective = hfjax.Objective(lambda w, x: x * w, hfjax.losses.squared_error())
    x, v = jnp.ones((2, 3), jnp.float32), jnp.ones((1, 3), jnp.float32)
    make = curvature.finite_difference_hessian
    product = quick_jit(lambda w: make(objective, w, (x, 0 * x))(v))
    for size in (1e-6, 1.0, 1e6):
        w = jnp.full((1, 3), size, jnp.float32)
        np.testing.assert_allclose(product(w), 1.0, rtol=3e-3)


def test_differences_along_nothing_are_zero():
    problem = named("mlp_softmax")
    make = curvature.finite_difference_hessian

    @quick_jit
    def along_nothing(params):
        nothing = jax.tree.map(jnp.zeros_like, params)
        return make(problem.objective(), params, problem.batch)(nothing)

    np.testing.assert_array_equal(flat(along_nothing(problem.params)), 0.0)


def test_differences_cost_two_gradients_a_product():
    evaluations = []

    def model_fn(w, x):
        jax.debug.callback(lambda: evaluations.append(1))
        return jnp.tanh(x * w)

    objective = hfjax.Objective(model_fn, hfjax.losses.squared_error())
    x = jnp.ones((2, 1))
    product = curvature.finite_difference_hessian(objective, jnp.ones((1, 1)), (x, x))
    jax.effects_barrier()
    assert len(evaluations) == 0
    product(jnp.ones((1, 1)))
    jax.effects_barrier()
    assert len(evaluations) == 2


def test_an_epsilon_that_is_no_step_is_refused():
    problem = named("mlp_softmax")
    with pytest.raises(ValueError, match="`epsilon` must be above 0"):
        curvature.finite_difference_hessian(
            problem.objective(), problem.params, problem.batch, epsilon=0.0
        )


MAKERS = [curvature.ggn, curvature.hessian, curvature.empirical_fisher]
every_maker = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


@every_maker
@pytest.mark.parametrize("linearize_once", [False, True])
def test_microbatches_change_no_curvature(make, linearize_once):
    # Cases 7, microbatches of 3: the last holds one case, and padding.
    problem = named("softmax_soft_targets")
    objective = problem.objective(microbatch_size=3, linearize_once=linearize_once)
    product = quick_jit(lambda p, b, v: make(objective, p, b)(v))(
        problem.params, problem.batch, problem.direction
    )
    truth = {
        "ggn": reference.ggn,
        "hessian": reference.hessian,
        "empirical_fisher": reference.empirical_fisher_matrix,
    }[make.__name__](problem)
    np.testing.assert_allclose(
        flat(product), truth @ flat(problem.direction), rtol=1e-10, atol=1e-14
    )


def equations(program):
    """Yield every equation of a program, of inner ones too."""
    for equation in program.eqns:
        yield equation
        for option in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(option, "jaxpr", option)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def wide_network():
    """Return 24 cases and a hidden layer of 50 units: 1,200 activations."""
    rng = np.random.default_rng(6)
    params = [
        (normal(rng, 3, 50), normal(rng, 50)),
        (normal(rng, 50, 2), normal(rng, 2)),
    ]
    return params, (normal(rng, 24, 3), normal(rng, 24, 2))


@every_maker
def test_activities_are_kept_for_the_products_or_computed_anew(make):
    """A product of the whole batch, of microbatches anew, of cached microbatches."""
    params, batch = wide_network()
    evaluates, held, largest = {}, {}, {}
    for name, options in {
        "whole": {},
        "anew": {"microbatch_size": 4},
        "cached": {"microbatch_size": 4, "linearize_once": True},
    }.items():
        objective = hfjax.Objective(mlp, hfjax.losses.squared_error(), **options)
        program = jax.make_jaxpr(make(objective, params, batch))(params)
        found = list(equations(program.jaxpr))
        evaluates[name] = "tanh" in {one.primitive.name for one in found}
        held[name] = sum(const.size for const in program.consts)
        largest[name] = max(
            var.aval.size for one in found for var in one.outvars if var.aval.shape
        )
    assert evaluates == {"whole": False, "anew": True, "cached": False}
    assert held["whole"] >= 1200
    assert held["cached"] >= 1200
    assert held["anew"] < 1200
    # What a product computes on the way is of one microbatch, but for parameters.
    assert largest["whole"] >= 1200
    assert largest["anew"] <= 200
    # The Hessian's carries tangents from its forward to its backward sweep besides.
    assert largest["cached"] <= (1200 if make is curvature.hessian else 200)


@every_maker
def test_cached_microbatches_hold_the_parameters_once(make):
    params, batch = wide_network()
    objective = hfjax.Objective(
        mlp, hfjax.losses.squared_error(), microbatch_size=1, linearize_once=True
    )
    program = jax.make_jaxpr(make(objective, params, batch))(params)
    # Of 24 microbatches, each has its own activations; (50, 2) are the head's weights.
    shapes = [const.shape for const in program.consts]
    assert not [
        shape for shape in shapes if shape[:1] == (24,) and shape[-2:] == (50, 2)
    ]


@every_maker
def test_a_cached_product_counts_no_run_of_the_model(make):
    runs = []

    def model_fn(w, x):
        jax.debug.callback(lambda x: runs.append(len(x)), x)
        return jnp.tanh(x @ w)

    objective = hfjax.Objective(
        model_fn, hfjax.losses.squared_error(), microbatch_size=2, linearize_once=True
    )
    x, w = jnp.ones((6, 3)), jnp.ones((3, 2))
    product = make(objective, w, (x, jnp.zeros((6, 2))))
    jax.effects_barrier()
    assert runs == [2, 2, 2]
    for _ in range(3):
        product(w)
    jax.effects_barrier()
    assert len(runs) == 3


@every_maker
def test_cached_microbatches_sum_in_float32_or_wider(make):
    # A bfloat16 sum of ones stays at 256.
    objective = hfjax.Objective(
        lambda w, x: x * w,
        hfjax.losses.squared_error(),
        microbatch_size=1,
        linearize_once=True,
    )
    w, x = jnp.ones((1, 1), jnp.bfloat16), jnp.ones((1024, 1), jnp.bfloat16)
    product = quick_jit(lambda w, x, v: make(objective, w, (x, 0 * x))(v))(
        w, x, jnp.ones((1, 1), jnp.float32)
    )
    np.testing.assert_allclose(product, 1.0, rtol=1e-2)
