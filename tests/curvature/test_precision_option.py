"""Products in fewer digits: how many, where, and what replacing residuals makes of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import training
from jax.flatten_util import ravel_pytree
from mapped import PROBLEM, needs_devices
from mapped import by_shard_map as mapped
from problems import HIDDEN, layers, mlp, named, normal
from reference import assert_close, flat, quick_jit

import hfjax
from hfjax import cg, curvature
from hfjax._core.types import Approximate
from hfjax.update._damped import damped

MLP = named("mlp_sigmoid")
WITH_HIDDEN = HIDDEN[0]
FROM = {"float32": 1e-9, "bfloat16": 2e-4}  # Closer would be no rounding at all.
TO = {"float32": 1e-6, "bfloat16": 3e-2}
MATRICES = {
    "ggn": (curvature.ggn, MLP, {}, reference.ggn),
    "hessian": (curvature.hessian, MLP, {}, reference.hessian),
    "fisher": (curvature.empirical_fisher, MLP, {}, reference.empirical_fisher_matrix),
    "structural": (
        curvature.ggn,
        WITH_HIDDEN,
        {"structural": 0.7},
        lambda problem: reference.ggn(problem) + 0.7 * reference.structural(problem),
    ),
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MATRICES)
def test_a_product_is_the_matrix_to_its_rounding_and_no_closer(name, precision):
    of, problem, options, matrix = MATRICES[name]
    make = curvature.with_precision(jnp.dtype(precision), of=of)

    @quick_jit
    def products(v):
        product = make(problem.objective(), problem.params, problem.batch, **options)
        return product(v), product.exact(v)

    nearly, exact = products(problem.direction)
    assert {x.dtype for x in jax.tree.leaves(nearly)} == {jnp.dtype("float64")}
    truth = matrix(problem) @ flat(problem.direction)
    scale = np.linalg.norm(truth)
    error = np.linalg.norm(flat(nearly) - truth) / scale
    assert FROM[precision] < error < TO[precision]
    np.testing.assert_allclose(flat(exact), truth, atol=1e-12 * scale)


def deep(params, x):
    """Run a layer in a scan, one in a checkpoint, one in a jit, one by its own rule."""
    w, last = params

    def step(h, _):
        return jnp.tanh(h @ w), None

    h, _ = jax.lax.scan(step, x, length=3)
    h = jax.checkpoint(lambda h: jnp.tanh(h @ w))(h)
    h = jax.jit(lambda h: jnp.tanh(h @ w))(h)
    return jnp.matmul(h, last, precision="highest")


def dots(program):
    """Yield precision and dtype of each matrix product, those within others too."""
    program = getattr(program, "jaxpr", program)
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            dtype = equation.invars[0].aval.dtype.name
            yield equation.params["precision"], dtype, equation.outvars[0].aval.shape
        for option in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(option, "eqns"):
                yield from dots(option)


HIGH, HIGHEST = ((jax.lax.Precision[name],) * 2 for name in ("HIGH", "HIGHEST"))
RNG = np.random.default_rng(3)
SMALL = jax.tree.map(
    lambda x: x.astype(jnp.float32), (normal(RNG, 4, 4), normal(RNG, 4, 2))
)
SMALL_BATCH = (jnp.ones((6, 4), jnp.float32), jnp.ones((6, 2), jnp.float32))


@pytest.mark.parametrize("size", [None, 2])
def test_every_product_of_matrices_has_the_precision_but_for_the_models_own(size):
    objective = hfjax.Objective(
        deep, hfjax.losses.squared_error(), microbatch_size=size
    )

    def product(v):
        make = curvature.with_precision("tensorfloat32")
        return make(objective, SMALL, SMALL_BATCH)(v)

    found = [precision for precision, *_ in dots(jax.make_jaxpr(product)(SMALL))]
    assert set(found) == {HIGH, HIGHEST}
    # Forward, tangent and transposes of the last layer alone.
    assert 0 < found.count(HIGHEST) < found.count(HIGH) / 3


@pytest.mark.parametrize(
    ("precision", "others"),
    [("tensorfloat32", (HIGH, "float32")), ("bfloat16", (None, "bfloat16"))],
)
def test_nothing_but_the_product_changes(precision, others):
    objective = hfjax.Objective(lambda w, x: x @ w, hfjax.losses.squared_error())
    w, x = jnp.ones((4, 2), jnp.float32), jnp.ones((6, 4), jnp.float32)

    def programs(make, every=None):
        tx = hfjax.hessian_free(
            objective,
            curvature=make,
            solver=cg.conjugate_gradient(replace_every=every),
            backtracking=None,
        )
        batch = (x, x @ w)
        update = functools.partial(tx.update, batch=batch)
        return sorted(map(str, dots(jax.make_jaxpr(update)(w, tx.init(w), w))))

    usual, here = programs(curvature.ggn), programs(curvature.with_precision(precision))
    new = [dot for dot in here if dot not in usual]
    assert new
    assert len(here) == len(usual)
    assert all(dot.startswith(f"({others[0]}, '{others[1]}'") for dot in new)
    # The exact product is linearised where it is used: at x0, and when it is due.
    replaced = programs(curvature.with_precision(precision), every=5)
    assert {dot for dot in replaced if dot not in usual} == set(new)
    assert len(replaced) > len(here)


N = 30
ROOT = RNG.standard_normal((N, N)) * np.geomspace(1, 30, N)
A = ROOT @ ROOT.T / N + np.eye(N)
NOISE = RNG.standard_normal((N, N))
NOISE = NOISE + NOISE.T
WRONG = A + 0.8 * NOISE / np.linalg.norm(NOISE, 2)  # The least eigenvalue of A is 1.
B = RNG.standard_normal(N)


def unknown(v):
    raise AssertionError


def solve(matvec, *, b=B, most=N, keep=hfjax.iterates.every(1), **options):
    run = functools.partial(
        cg.solve, matvec, max_iterations=most, stopping=None, keep=keep, **options
    )
    return quick_jit(run)(jnp.asarray(b))


def times(matrix):
    return lambda v: jnp.asarray(matrix) @ v


def residual(x):
    return np.linalg.norm(A @ np.asarray(x) - B) / np.linalg.norm(B)


@pytest.mark.parametrize("every", [1, 4])
def test_of_exact_products_a_run_stays_algorithm_2(every):
    p = np.diag(np.diag(A))
    run = solve(
        Approximate(times(A), times(A)),
        x0=jnp.asarray(0.1 * B),
        preconditioner=times(np.linalg.inv(p)),
        replace_every=every,
        most=12,
    )
    iterates, models = reference.pcg(A, B, 0.1 * B, np.linalg.inv(p), 12)
    np.testing.assert_allclose(run.kept.iterates, iterates[1:], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(run.model_values, models, rtol=1e-9)
    assert np.all(run.coefficients[:every])
    assert not np.any(run.coefficients[every:])


def test_without_replacement_nothing_is_exact_and_nothing_else_changes():
    ours = solve(Approximate(times(WRONG), unknown))
    plain = solve(times(WRONG))
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


@pytest.mark.parametrize("every", [5, 20])
def test_replaced_residuals_lead_to_the_solution_of_the_exact_system(every):
    pair = Approximate(times(WRONG), times(A))
    keep = hfjax.iterates.every(3000)
    floor = residual(solve(pair, most=3000, keep=keep).x)
    run = solve(pair, most=3000, keep=keep, replace_every=every)
    assert floor > 1e-1
    assert residual(run.x) < 1e-10
    np.testing.assert_allclose(
        run.model_values[-1], reference.model(A, B, run.x), rtol=1e-12
    )


@pytest.mark.slow
def test_in_bfloat16_replaced_residuals_vanish_and_others_do_not():
    problem, strength = MLP, jnp.float64(0.3)
    rhs, unravel = ravel_pytree(problem.direction)
    matrix = reference.ggn(problem) + 0.3 * np.eye(rhs.size)

    @functools.partial(quick_jit, static_argnames="every")
    def solved(b, every):
        make = curvature.with_precision("bfloat16")
        product = make(problem.objective(), problem.params, problem.batch)
        return cg.solve(
            damped(product, strength),
            b,
            max_iterations=80,
            stopping=None,
            replace_every=every,
        ).x

    def left(every):
        x = ravel_pytree(solved(unravel(rhs), every))[0]
        return np.linalg.norm(matrix @ x - rhs) / np.linalg.norm(rhs)

    assert left(None) > 1e-4
    assert left(10) < 1e-7


def test_what_stands_for_a_damped_product_is_exact_in_both_parts():
    problem = MLP
    make = curvature.with_precision("bfloat16")
    product = make(problem.objective(), problem.params, problem.batch)
    both = damped(product, jnp.float64(0.5), product)
    truth = 1.5 * reference.ggn(problem) @ flat(problem.direction)
    found = flat(quick_jit(both.exact)(problem.direction))
    np.testing.assert_allclose(found, truth, atol=1e-12 * np.linalg.norm(truth))


def test_the_exact_of_a_precision_may_be_another():
    make = curvature.with_precision("bfloat16", exact="float32")
    product = make(MLP.objective(), MLP.params, MLP.batch)
    truth = reference.ggn(MLP) @ flat(MLP.direction)
    exact = flat(quick_jit(product.exact)(MLP.direction))
    error = np.linalg.norm(exact - truth) / np.linalg.norm(truth)
    assert FROM["float32"] < error < TO["float32"]


def test_an_exact_product_that_is_not_finite_ends_the_run_and_leaves_m_a_number():
    run = solve(Approximate(times(A), lambda v: v * jnp.nan), replace_every=5)
    assert run.reason == cg.Reason.NONFINITE
    assert run.num_iterations == 5
    assert np.isfinite(run.x).all()
    assert np.isfinite(run.model_values).all()


@pytest.mark.slow
def test_hessian_free_trains_with_it():
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), layers(rng, 2, 8, 1))
    x = jnp.asarray(rng.uniform(size=(60, 2)), jnp.float32)
    batch = (x, jnp.sin(3 * x[:, :1]) * x[:, 1:])
    objective = hfjax.Objective(mlp, hfjax.losses.squared_error())
    tx = hfjax.hessian_free(
        objective,
        curvature=curvature.with_precision("bfloat16"),
        solver=cg.conjugate_gradient(replace_every=10, warm_start_decay=None),
        preconditioner=None,
    )
    (params, state), (info, _) = training.trained(objective, tx, params, batch, 20)
    assert info.value_before[-1] < 0.01 * info.value_before[0]
    leaves = jax.tree.leaves((params, state.direction))
    assert {x.dtype.name for x in leaves} == {"float32"}


@pytest.mark.slow
@needs_devices
def test_many_devices_make_the_update_of_one():
    def update(params, batch, _, axis_name=None):
        objective = PROBLEM.objective(axis_name=axis_name)
        grads = objective.value_and_grad(params, batch)[1]
        tx = hfjax.hessian_free(
            objective,
            curvature=curvature.with_precision("float32"),
            solver=cg.conjugate_gradient(
                replace_every=2, max_iterations=7, warm_start_decay=None
            ),
            preconditioner=None,
            backtracking=None,
            line_search=None,
        )
        return tx.update(grads, tx.init(params), params, batch=batch)[0]

    names = ("cases",)
    many = mapped(functools.partial(update, axis_name=names), check_vma=True)
    one = quick_jit(update)(PROBLEM.params, PROBLEM.batch, PROBLEM.direction)
    assert np.any(jax.tree.leaves(one)[0])
    assert_close(many, one, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("replace_every", [None, 3])
def test_another_damping_cannot_be_told_from_replaced_residuals(replace_every):
    solver = cg.conjugate_gradient(max_iterations=4, replace_every=replace_every)
    zero = jnp.zeros(())
    system = cg.System(
        lambda v: 2 * v, jnp.ones(3), zero, jnp.int32(0), jnp.sum, jnp.sum, jnp.sum
    )
    run = solver.solve(system, None)
    assert (run.at_damping is None) == (replace_every is not None)


@pytest.mark.parametrize("precision", ["float8", "", jnp.float16, 16])
def test_a_precision_that_is_none_is_one_error(precision):
    for given in (
        {"precision": precision},
        {"precision": "float32", "exact": precision},
    ):
        with pytest.raises(ValueError, match=r"A precision must be .bfloat16.*got"):
            curvature.with_precision(**given)


@pytest.mark.parametrize(
    ("every", "error"), [(0, ValueError), (2.5, TypeError), (True, TypeError)]
)
@pytest.mark.parametrize("where", ["solve", "conjugate_gradient"])
def test_a_count_that_is_none_is_named(where, every, error):
    make = functools.partial(cg.solve, times(A), jnp.asarray(B))
    make = make if where == "solve" else cg.conjugate_gradient
    with pytest.raises(error, match="`replace_every`"):
        make(replace_every=every)
