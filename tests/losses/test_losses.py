import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.flatten_util import ravel_pytree
from reference import quick_jit

from hfjax import losses

MATCHING = [
    "squared_error",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
]
OPTAX = {
    "squared_error": optax.l2_loss,
    "sigmoid_cross_entropy": optax.sigmoid_binary_cross_entropy,
    "softmax_cross_entropy": optax.softmax_cross_entropy,
    "softmax_cross_entropy_with_integer_labels": (
        optax.softmax_cross_entropy_with_integer_labels
    ),
}
every_loss = pytest.mark.parametrize("name", MATCHING)
KINDS = ["closed_form", "from_function", "clip", "shift"]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_repair = pytest.mark.parametrize("positive", ["clip", "shift"])


def draw(name, shape=(4, 2, 3), seed=0):
    """Draw outputs and targets; softmax targets do not sum to one."""
    rng = np.random.default_rng(seed)
    z, t = 2 * rng.standard_normal(shape), rng.uniform(0, 1, shape)
    if name.endswith("integer_labels"):
        t = rng.integers(0, shape[-1], shape[:-1])
    return jnp.asarray(z), jnp.asarray(t)


def build(name, kind="closed_form"):
    if kind == "closed_form":
        return getattr(losses, name)()
    positive = None if kind == "from_function" else kind
    return losses.from_function(OPTAX[name], positive=positive)


def per_case(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape))


def indefinite(shapes, seed):
    """Draw a loss with L″ of both signs, outputs of these shapes, and its dense L″."""
    rng = np.random.default_rng(seed)
    z = {name: per_case(rng, 3, *shape) for name, shape in shapes.items()}
    units = sum(leaf[0].size for leaf in z.values())
    coupling = per_case(rng, units, units) / np.sqrt(units)

    def one_case(flat, t):
        return t * (flat @ coupling @ flat + 2 * jnp.sum(jnp.sin(flat)))

    def rows(z):
        return jax.vmap(lambda case: ravel_pytree(case)[0])(z)

    def fn(z, t):
        return jax.vmap(one_case)(rows(z), t)

    t = jnp.asarray([1.0, -0.5, 2.0])
    flats = rows(z)
    sines = jax.vmap(jnp.diag)(jnp.sin(flats))
    both = np.asarray(coupling + coupling.T)
    truth = np.asarray(t)[:, None, None] * (both - 2 * np.asarray(sines))
    return fn, z, t, truth


def repair(matrix, positive):
    """Repair one dense L″ in NumPy, as `from_function` says."""
    if len(matrix) > 64:
        radius = np.sum(np.abs(matrix), axis=1) - np.abs(np.diag(matrix))
        return matrix + np.diag(np.maximum(0, radius - np.diag(matrix)))
    values, vectors = np.linalg.eigh(matrix)
    if positive == "shift":
        return matrix + max(0, -values[0]) * np.eye(len(matrix))
    return vectors @ np.diag(np.maximum(values, 0)) @ vectors.T


@functools.partial(quick_jit, static_argnums=0)
def measure(loss, z, t):
    """Return values and the matrices [cases, m, m] of L″ and S, cases kept apart."""
    flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], z))
    cases = len(jax.tree.leaves(z)[0])

    def matrix(linear_map):
        def column(v):
            v = jax.tree.map(lambda leaf: jnp.stack([leaf] * cases), unravel(v))
            return jax.vmap(lambda leaf: ravel_pytree(leaf)[0])(linear_map(v))

        return jax.vmap(column, out_axes=2)(jnp.eye(flat.size, dtype=flat.dtype))

    return loss.value(z, t), matrix(loss.hessian(z, t)), matrix(loss.factor(z, t))


def assert_equal_to_dense(loss, z, t, values, curvature):
    value, hessian, factor = measure(loss, z, t)
    np.testing.assert_allclose(value, values, rtol=1e-12)
    np.testing.assert_allclose(hessian, curvature, rtol=1e-10, atol=1e-13)
    square = np.einsum("iab,icb->iac", factor, factor)
    np.testing.assert_allclose(square, curvature, rtol=1e-10, atol=1e-13)


@pytest.mark.every
@every_kind
@every_loss
def test_value_hessian_and_factor_equal_dense_numpy(name, kind):
    z, t = draw(name)
    truth = reference.output_loss(name, np.asarray(z), np.asarray(t))
    assert_equal_to_dense(build(name, kind), z, t, truth[0], truth[2])


@every_kind
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
@every_loss
def test_values_and_products_keep_dtypes(name, dtype, kind):
    z, t = draw(name)
    z, t = z.astype(dtype), t.astype(dtype if t.ndim == z.ndim else t.dtype)
    loss = build(name, kind)

    def all_parts(z, t):
        return loss.value(z, t), loss.hessian(z, t)(z), loss.factor(z, t)(z)

    for leaf in jax.eval_shape(all_parts, z, t):
        assert leaf.dtype == dtype


@pytest.mark.parametrize("kind", ["from_function", "clip", "shift"])
def test_curvature_in_half_precision_is_decomposed_wider(kind):
    # LAPACK has no bfloat16.
    z, t = draw("sigmoid_cross_entropy", (2, 3))
    loss = build("sigmoid_cross_entropy", kind)
    z, t = z.astype(jnp.bfloat16), t.astype(jnp.bfloat16)
    variance = jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)
    ones = jnp.ones_like(z)
    twice = loss.factor(z, t)(loss.factor(z, t)(ones))
    for product in (loss.hessian(z, t)(ones), twice):
        np.testing.assert_allclose(product, variance, rtol=0.1)


def test_integer_labels_are_one_hot_targets():
    z, t = draw("softmax_cross_entropy_with_integer_labels")
    hot = jnp.eye(3)[t]
    integer = measure(losses.softmax_cross_entropy_with_integer_labels(), z, t)
    for ours, truth in zip(
        integer, measure(losses.softmax_cross_entropy(), z, hot), strict=True
    ):
        np.testing.assert_allclose(ours, truth, rtol=1e-12, atol=1e-15)


def test_predictions_are_the_matching_links():
    z, _ = draw("squared_error")
    links = [
        (losses.squared_error(), z),
        (losses.sigmoid_cross_entropy(), 1 / (1 + np.exp(-z))),
        (losses.softmax_cross_entropy(), np.exp(z) / np.exp(z).sum(-1, keepdims=True)),
        (losses.from_function(optax.l2_loss), z),
    ]
    for loss, truth in links:
        np.testing.assert_allclose(loss.predict({"a": z})["a"], truth, rtol=1e-12)


def test_a_tree_of_outputs_is_a_sum_of_losses():
    name = "sigmoid_cross_entropy"
    (a, ta), (b, tb) = draw(name, (4, 3)), draw(name, (4, 2, 2), seed=1)
    parts = [
        reference.output_loss(name, np.asarray(z), np.asarray(t))
        for z, t in ((a, ta), (b, tb))
    ]
    values = parts[0][0] + parts[1][0]
    curvature = reference.block_diagonal([parts[0][2], parts[1][2]])
    z, t = {"a": a, "b": [b]}, {"a": ta, "b": [tb]}
    assert_equal_to_dense(losses.sigmoid_cross_entropy(), z, t, values, curvature)

    def summed(z, t):
        first = OPTAX[name](z["a"], t["a"]).sum(1)
        return first + OPTAX[name](z["b"][0], t["b"][0]).sum((1, 2))

    assert_equal_to_dense(losses.from_function(summed), z, t, values, curvature)


def test_curvature_of_a_function_without_closed_form():
    z, t = draw("squared_error", (4, 3))
    error = np.asarray(z - t)
    values = np.sum(np.log(np.cosh(error)), axis=1)
    truth = [np.diag(case) for case in 1 - np.square(np.tanh(error))]
    assert_equal_to_dense(losses.from_function(optax.log_cosh), z, t, values, truth)


def test_factor_drops_negative_curvature():
    # cos has the curvature −cos: positive only where z is near π.
    loss = losses.from_function(lambda z, t: jnp.cos(z) + 0 * t)
    z = jnp.asarray([[0.5, 3.0]])
    _, hessian, factor = measure(loss, z, z)
    np.testing.assert_allclose(hessian[0], np.diag(-np.cos(z[0])), rtol=1e-12)
    truth = np.diag([0.0, -np.cos(3.0)])
    np.testing.assert_allclose(factor[0] @ factor[0].T, truth, atol=1e-12)


@every_repair
@pytest.mark.parametrize(
    "shapes",
    [{"z": (3,)}, {"z": (2, 2)}, {"a": (2,), "b": (1, 3)}, {"z": (5, 13)}],
    ids=["vector", "sequence", "tree", "many"],
)
def test_a_repaired_hessian_equals_dense_numpy(shapes, positive):
    fn, z, t, indefinite_truth = indefinite(shapes, seed=3)
    assert np.all(np.linalg.eigvalsh(indefinite_truth)[:, 0] < -0.5)
    truth = np.array([repair(matrix, positive) for matrix in indefinite_truth])
    loss = losses.from_function(fn, positive=positive)
    assert_equal_to_dense(loss, z, t, fn(z, t), truth)


@every_repair
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shapes", [{"z": (4,)}, {"a": (60,), "b": (2, 3)}], ids=str)
def test_a_repaired_hessian_is_positive_semi_definite(shapes, seed, positive):
    fn, z, t, _ = indefinite(shapes, seed)
    _, hessian, _ = measure(losses.from_function(fn, positive=positive), z, t)
    np.testing.assert_allclose(hessian, np.swapaxes(hessian, 1, 2), atol=1e-12)
    values = np.linalg.eigvalsh(hessian)
    assert np.all(values[:, 0] >= -1e-13 * values[:, -1])


@pytest.mark.parametrize("units", [3, 65])
def test_clip_drops_what_is_negative_of_an_elementwise_loss(units):
    loss = losses.from_function(lambda z, t: jnp.cos(z) * t, positive="clip")
    z, t = draw("squared_error", (2, units))
    _, hessian, factor = measure(loss, z, t)
    truth = [np.diag(case) for case in np.maximum(0, -np.cos(z) * t)]
    np.testing.assert_allclose(hessian, truth, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(factor @ factor, truth, rtol=1e-12, atol=1e-15)


@every_repair
@pytest.mark.parametrize("name", ["sigmoid_cross_entropy", "softmax_cross_entropy"])
def test_a_repair_leaves_convex_losses_of_many_outputs(name, positive):
    z, t = draw(name, (2, 11, 6))
    truth = reference.output_loss(name, np.asarray(z), np.asarray(t))
    assert_equal_to_dense(build(name, positive), z, t, truth[0], truth[2])


@every_repair
@pytest.mark.parametrize("units", [3, 65])
def test_a_repair_is_made_outside_of_the_product(units, positive):
    loss = losses.from_function(
        lambda z, t: jnp.cos(z) * t * jnp.sum(z, axis=-1, keepdims=True),
        positive=positive,
    )
    z, t = draw("squared_error", (2, units))
    whole = str(jax.make_jaxpr(lambda z: loss.hessian(z, t)(z))(z))
    made = ("scan",) if units > 64 else ("eigh", "cos")
    assert any(name in whole for name in made)
    product = str(jax.make_jaxpr(loss.hessian(z, t))(z))
    assert not any(name in product for name in ("scan", "eigh", "cos", "sin"))


def test_an_unknown_repair_is_refused():
    with pytest.raises(ValueError, match=r"`positive` must be one of 'clip', 'shift'"):
        losses.from_function(optax.l2_loss, positive="abs")


@pytest.mark.parametrize(
    "fn",
    [
        lambda z, t: jnp.mean(optax.l2_loss(z, t)),
        lambda z, t: jnp.sum(optax.l2_loss(z, t), axis=0),
    ],
    ids=["mean", "summed_over_cases"],
)
def test_a_loss_that_mixes_cases_is_refused(fn):
    z, t = draw("squared_error")
    loss = losses.from_function(fn)
    for part in (loss.value, loss.hessian, loss.factor):
        with pytest.raises(ValueError, match="one value per case"):
            jax.eval_shape(part, z, t)


def test_outputs_without_case_axis_are_refused():
    with pytest.raises(ValueError, match="one value per case"):
        losses.squared_error().value(jnp.asarray(1.0), jnp.asarray(0.0))


def test_logistic_curvature_keeps_its_digits_when_saturated():
    z = jnp.asarray([[-30.0, -17.5, -3.0, 0.0, 3.0, 17.5, 30.0]], jnp.float32)
    loss, v = losses.sigmoid_cross_entropy(), jnp.ones_like(z)
    wide = np.asarray(z, np.float64)
    truth = 1 / (1 + np.exp(-wide)) / (1 + np.exp(wide))
    product = loss.hessian(z, z)(v)
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product, truth, rtol=1e-6)
    factor = np.asarray(loss.factor(z, z)(v), np.float64)
    np.testing.assert_allclose(np.square(factor), truth, rtol=2e-6)


@pytest.mark.parametrize("winner", [0.0, 0.3], ids=["without_winner", "with_winner"])
def test_softmax_curvature_keeps_its_digits_when_saturated(winner):
    z = jnp.asarray([[30.0, -30.0, 0.0], [-30.0, -31.0, 30.0]], jnp.float32)
    t = jnp.asarray([[1.0, 0.0, 0.0], [0.5, 0.2, 0.3]], jnp.float32)
    name = "softmax_cross_entropy"
    _, _, truth = reference.output_loss(name, np.asarray(z), np.asarray(t))
    v = np.array([[winner, 1.0, -0.5], [1.0, 0.7, winner]], np.float32)
    product = losses.softmax_cross_entropy().hessian(z, t)(jnp.asarray(v))
    expected = np.einsum("iab,ib->ia", truth, v.astype(np.float64))
    np.testing.assert_allclose(product, expected, rtol=1e-5)


def test_logistic_value_and_gradient_keep_their_digits_when_saturated():
    z = jnp.asarray([[-20.0], [-10.0], [10.0], [20.0]], jnp.float32)
    t = jnp.asarray([[0.0], [0.0], [1.0], [1.0]], jnp.float32)
    value = losses.sigmoid_cross_entropy().value
    distance = np.abs(np.asarray(z[:, 0], np.float64))
    np.testing.assert_allclose(value(z, t), np.log1p(np.exp(-distance)), rtol=1e-5)
    gradient = jax.grad(lambda z: jnp.sum(value(z, t)))(z)
    truth = 1 / (1 + np.exp(distance))
    np.testing.assert_allclose(np.abs(gradient[:, 0]), truth, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("squared_error", (4,)),
        ("squared_error", (4, 3)),
        ("sigmoid_cross_entropy", (4,)),
        ("softmax_cross_entropy", (4,)),
    ],
)
def test_targets_of_another_shape_than_the_outputs_are_refused(name, targets):
    z, t = jnp.zeros((4, 1)), jnp.ones(targets)
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match="shape"):
        jax.eval_shape(build(name).value, z, t)
