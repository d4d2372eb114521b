"""The curvature of the true class against all others: one row of J̃ for each label."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import training
from jax.flatten_util import ravel_pytree
from mapped import axis_name, needs_devices, run
from problems import Problem
from reference import assert_close, flat, matrix_of, quick_jit

import hfjax
from hfjax.curvature.jacobian import jacobian, size
from hfjax.curvature.streamed_jacobian import StreamedJacobian, bounded_jacobian
from hfjax.losses.loss import Loss, are_disjoint, columns

NAME = "softmax_cross_entropy_with_integer_labels"
FULL = getattr(hfjax.losses, NAME)()
LOSS = getattr(hfjax.losses, NAME)(curvature="true_class")
CASES, STEPS, CLASSES = 5, 3, 4
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((CASES, STEPS, 2)))
LABELS = jnp.asarray(RNG.integers(0, CLASSES, (CASES, STEPS)))
WEIGHTS = jnp.asarray(
    [[1.0, 0.3, 2.0], [0.0, 1.0, 0.5], [1.0, 0, 0], [3, 2, 1], [1, 1, 0]]
)
BATCH = (X, LABELS, WEIGHTS)
PARAMS = {
    "w": jnp.asarray(RNG.standard_normal((2, CLASSES))),
    "b": jnp.asarray(RNG.standard_normal(CLASSES)),
}
DAMPING = 0.1


def model_fn(params, x):
    return jnp.sin(x @ params["w"] + params["b"][None, None])


OBJECTIVE = hfjax.Objective(model_fn, LOSS)


def dense(z, t):
    """Return ∇L, and the largest multiple of ∇L∇Lᵀ that does not exceed L″.

    c ∇L∇Lᵀ ≤ L″ if c ∇Lᵀ(L″)⁺∇L ≤ 1, as ∇L is in the range of L″. Of each label.
    """
    z = np.asarray(z).reshape(-1, z.shape[-1])
    _, slopes, hessians = reference.output_loss(NAME, z, np.asarray(t).ravel())
    inverses = np.linalg.pinv(hessians, rcond=1e-12, hermitian=True)
    squares = np.einsum("ia,ib->iab", slopes, slopes)
    limits = np.einsum("ia,iab,ib->i", slopes, inverses, slopes)
    return slopes, squares / limits[:, None, None]


@functools.cache
def truth():
    """Return ∇f and G of the objective, flat."""
    start, unravel = ravel_pytree(PARAMS)

    def outputs(flat):
        return model_fn(unravel(flat), X).reshape(-1, CLASSES)

    slopes, squares = dense(outputs(start), LABELS)
    j = np.asarray(quick_jit(jax.jacfwd(outputs))(start))
    weights = np.asarray(WEIGHTS).ravel()
    gradient = reference.mean(np.einsum("pan,pa->pn", j, slopes), weights)
    return gradient, reference.mean(
        np.einsum("pam,pab,pbn->pmn", j, squares, j), weights
    )


@pytest.mark.parametrize("classes", [2, CLASSES])
def test_it_is_the_largest_multiple_of_the_squared_gradient_below_the_full(classes):
    z, t = 2 * model_fn(PARAMS, X).reshape(-1, CLASSES)[:, :classes], LABELS.ravel() % 2

    @quick_jit
    def found(z):
        builds = (LOSS.hessian, LOSS.factor, FULL.hessian)
        maps = [
            jax.vmap(lambda z, t, f=f: matrix_of(f(z[None], t[None]), z[None]))
            for f in builds
        ]
        return LOSS.value(z, t), FULL.value(z, t), [of(z, t) for of in maps]

    ours, theirs, (hessian, factor, full) = found(z)
    np.testing.assert_array_equal(ours, theirs)
    square = np.einsum("iab,icb->iac", factor, factor)
    for matrix in (hessian, square):
        np.testing.assert_allclose(matrix, dense(z, t)[1], rtol=1e-10, atol=1e-14)
    rest = full - hessian
    assert np.min(np.linalg.eigvalsh(rest)) > -1e-14
    assert (np.max(np.abs(rest)) < 1e-14) == (classes == 2)


@pytest.mark.parametrize("margin", [-60.0, -20.0, 20.0, 60.0])
def test_saturated_logits_keep_the_digits_of_float32(margin):
    z, v = jnp.float32([[margin, 0.0, -1.0]]), jnp.float32([[1e4, 1e4 + 1, 1e4 - 2]])
    t = jnp.array([0])
    q = np.array([0, 1, np.exp(-1.0)]) / (1 + np.exp(-1.0))
    gap = margin - np.log1p(np.exp(-1.0))
    a, variance = np.array([1, 0, 0]) - q, 1 / (2 + np.exp(gap) + np.exp(-gap))
    product, column = LOSS.hessian(z, t)(v), LOSS.factor(z, t)(jnp.ones_like(z))
    np.testing.assert_allclose(
        product[0], variance * (a @ np.float64(v[0])) * a, rtol=1e-5
    )
    np.testing.assert_allclose(column[0], np.sqrt(variance) * a, rtol=1e-5)


def test_a_jacobian_has_a_row_for_each_label_and_its_residuals_give_the_gradient():
    @quick_jit
    def found(params):
        j = jacobian(OBJECTIVE, params, BATCH)
        diagonal = hfjax.diagonals.ggn_exact(OBJECTIVE, params, BATCH)
        return j.rows, j.residuals, diagonal

    rows, residuals, diagonal = found(PARAMS)
    gradient, ggn = truth()
    rows = np.asarray(jax.vmap(lambda row: ravel_pytree(row)[0])(rows))
    assert size(OBJECTIVE, PARAMS, BATCH)[:2] == rows.shape == (CASES * STEPS, len(ggn))
    np.testing.assert_allclose(rows.T @ rows, ggn, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(rows.T @ residuals, gradient, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(flat(diagonal), np.diag(ggn), rtol=1e-10)


def test_a_jacobian_that_is_not_stored_has_the_same_rows():
    def found(most):
        j = bounded_jacobian(OBJECTIVE, PARAMS, BATCH, most)
        assert isinstance(j, StreamedJacobian) == (most is not None)
        return j.transpose(j.residuals), j.transpose(j.product(PARAMS)), j.squares()

    # Two examples at once, of three rows each.
    most = 2 * 2 * STEPS * optax.tree.size(PARAMS)
    stored, streamed = (quick_jit(functools.partial(found, n))() for n in (None, most))
    assert_close(streamed, stored, rtol=1e-10, atol=1e-13)


def test_a_label_that_is_far_from_right_keeps_its_gradient_beside_others():
    # Its column of S is shorter than the rounding of the others, by 10⁻⁸.
    z = jnp.float32([[[0.0, 0, -40], [0, 0, 0.5]]])
    labels = jnp.array([[2, 1]])
    f = hfjax.Objective(lambda p, x: x + p, LOSS)
    j = jacobian(f, z, (jnp.zeros_like(z), labels))
    p = np.exp(np.float64(z))
    slope = p / p.sum(axis=-1, keepdims=True) - np.eye(3)[labels]
    np.testing.assert_allclose(j.transpose(j.residuals), slope, atol=1e-6)


@pytest.mark.parametrize("space", ["samples", "parameters"])
def test_an_exact_update_is_that_of_the_dense_system(space):
    solver = hfjax.sample_space.cholesky(space=space, corrections=0)
    tx = hfjax.hessian_free(
        OBJECTIVE,
        damping=hfjax.damping.constant(DAMPING),
        solver=solver,
        backtracking=None,
        line_search=None,
    )
    updates, _ = training.one_update(OBJECTIVE, tx, PARAMS, BATCH)
    gradient, ggn = truth()
    step = np.linalg.solve(ggn + DAMPING * np.eye(len(ggn)), -gradient)
    np.testing.assert_allclose(flat(updates), step, rtol=1e-9)


def test_signs_of_a_single_label_are_squared_so_estimates_are_exact():
    f = hfjax.Objective(lambda p, x: x @ p, LOSS)
    x, p = X[:, 0], PARAMS["w"]
    batch = (x, LABELS[:, 0])
    exact = hfjax.diagonals.ggn_exact(f, p, batch)
    estimate = hfjax.diagonals.ggn_rademacher(f, p, batch, key=jax.random.key(0))
    np.testing.assert_allclose(estimate, exact, rtol=1e-12)
    _, squares = dense(x @ p, batch[1])
    diagonal = np.einsum("in,iaa->na", np.square(x), squares) / CASES
    np.testing.assert_allclose(exact, diagonal, rtol=1e-10)


@needs_devices
@pytest.mark.slow
@pytest.mark.parametrize("way", ["shard_map_check_vma", "jit_with_shardings", "vmap"])
def test_devices_change_no_row(way):
    x, labels = jnp.sin(jnp.arange(24.0)).reshape(12, 2), jnp.arange(12) % CLASSES
    problem = Problem("", PARAMS["w"], lambda p, x: x @ p, NAME, (x, labels))

    def of_device(params, batch, v, name):
        f = hfjax.Objective(problem.model_fn, LOSS, axis_name=name)
        j = jacobian(f, params, batch)
        diagonal = hfjax.diagonals.ggn_exact(f, params, batch)
        return j.transpose(j.residuals), j.transpose(j.product(v)), diagonal

    known = of_device(problem.params, problem.batch, problem.direction, None)
    given = functools.partial(of_device, name=axis_name(way))
    assert_close(run(way, given, problem), known, rtol=1e-10, atol=1e-13)


def of_factor(factor):
    return Loss(lambda z, t: z[:, 0], lambda z, t: lambda v: v, factor, lambda z: z)


ONE = jnp.ones((1, 2, 3))
FACTORS = {
    "all": (lambda v: 2 * v, range(6)),
    "slice": (lambda v: v[..., 1:] @ jnp.ones((2, 3)), [1, 2, 4, 5]),
    "sum_before": (lambda v: jnp.cumsum(v, axis=-1)[..., :1] * ONE, range(6)),
    "unused": (lambda v: v + 0 * v[..., :1], range(6)),
    "position": (lambda v: v[:, :1] * ONE, [0, 1, 2]),
    "looked_up": (lambda v: jnp.sort(v, axis=-1)[..., :1] * ONE, range(6)),
}


@pytest.mark.parametrize("name", FACTORS)
def test_columns_are_left_out_only_where_a_slice_leaves_them_out(name):
    product, known = FACTORS[name]
    assert list(columns(of_factor(lambda z, t: product), ONE, None)) == list(known)


def test_parts_of_a_tree_keep_their_columns_and_scales():
    loss = hfjax.losses.tree(
        {
            "label": hfjax.losses.scaled(4.0, LOSS),
            "number": hfjax.losses.squared_error(),
        }
    )
    outputs = {"label": ONE, "number": ONE[..., 0]}
    targets = {"label": jnp.zeros((1, 2), int), "number": ONE[..., 1]}
    known = columns(loss, outputs, targets)
    assert known == [0, 3, 6, 7]
    assert are_disjoint(loss, outputs, targets, known)


def test_unknown_curvature_is_refused():
    with pytest.raises(ValueError, match=r"`curvature`.*true_class"):
        getattr(hfjax.losses, NAME)(curvature="one")
