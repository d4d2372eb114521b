"""Losses of Gaussians, counts and ordered labels, beside their formulas written out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.scipy.special import gammaln
from reference import quick_jit

import hfjax
from hfjax import losses


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape))


def gaussian(z, t):
    mean, s = z
    terms = (t - mean) ** 2 / jnp.exp(s) + s + math.log(2 * math.pi)
    return 0.5 * jnp.sum(terms)


def standard_divergence(z, t):
    mean, s = z
    return 0.5 * jnp.sum(mean**2 + jnp.exp(s) - 1 - s)


def divergence(z, t):
    (mean, s), (m, r) = z, t
    return 0.5 * jnp.sum(r - s - 1 + (jnp.exp(s) + (mean - m) ** 2) / jnp.exp(r))


def poisson(z, t):
    return jnp.sum(jnp.exp(z) - t * z + gammaln(t + 1.0))


def ordinal(z, t):
    above = jnp.arange(z.shape[-1])[None] < t[:, None]
    return -jnp.sum(jnp.log(jax.nn.sigmoid(jnp.where(above, z, -z))))


def draw(name, seed=0):
    """Draw outputs and targets of four cases, of 2 × 3 outputs each."""
    rng = np.random.default_rng(seed)
    z, s, t, m, r = (normal(rng, 4, 2, 3) for _ in range(5))
    counts = jnp.asarray(rng.integers(0, 6, z.shape)).at[0].set(0)
    counts = counts.at[1, 0].set(jnp.asarray([31, 32, 1000]))
    labels = jnp.asarray([[0, 3], [1, 2], [3, 3], [2, 0]])
    return {
        "gaussian": ((z, s), t),
        "standard": ((z, s), None),
        "divergence": ((z, s), (m, r)),
        "poisson": (z, counts),
        "ordinal": (z, labels),
    }[name]


LOSSES = {
    "gaussian": (losses.gaussian, gaussian),
    "standard": (losses.gaussian_kl_divergence, standard_divergence),
    "divergence": (losses.gaussian_kl_divergence, divergence),
    "poisson": (losses.poisson, poisson),
    "ordinal": (losses.ordinal, ordinal),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def expected_hessian(fn, z, t):
    """Return the Hessian of one case; of the Gaussian, its mean over targets."""

    def dense(t):
        flat, unravel = ravel_pytree(z)
        return jax.hessian(lambda flat: fn(unravel(flat), t))(flat)

    if fn is not gaussian:
        return dense(t)
    # L is quadratic in t, and so is each entry: the mean over ±σ is that over N(μ, σ²).
    mean, s = z
    return (dense(mean + jnp.exp(s / 2)) + dense(mean - jnp.exp(s / 2))) / 2


def rows(tree):
    return jax.vmap(lambda case: ravel_pytree(case)[0])(tree)


def matrix(linear_map, z):
    """Return a product of one case as a matrix, [cases, m, m]."""
    unravel = jax.vmap(ravel_pytree(jax.tree.map(lambda leaf: leaf[0], z))[1])
    count, units = rows(z).shape

    def column(unit):
        return rows(linear_map(unravel(jnp.broadcast_to(unit[None], (count, units)))))

    return jnp.moveaxis(jax.lax.map(column, jnp.eye(units)), 0, -1)


@pytest.mark.every
@every_loss
def test_value_gradient_curvature_and_factor_equal_the_formula(name):
    (build, fn), (z, t) = LOSSES[name], draw(name)
    loss = build()

    @quick_jit
    def both(z, t):
        def total(z):
            values = loss.value(z, t)
            return jnp.sum(values), values

        ours = jax.grad(total, has_aux=True)(z)
        products = matrix(loss.hessian(z, t), z), matrix(loss.factor(z, t), z)
        gradient, values = jax.vmap(jax.grad(fn))(z, t), jax.vmap(fn)(z, t)
        curved = jax.vmap(lambda z, t: expected_hessian(fn, z, t))(z, t)
        return ours, products, (gradient, values), curved

    ours, (hessian, factor), theirs, truth = both(z, t)
    for x, y in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(hessian, truth, rtol=1e-11, atol=1e-12)
    square = factor @ jnp.swapaxes(factor, 1, 2)
    np.testing.assert_allclose(square, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@every_loss
def test_values_and_products_keep_dtypes(name, dtype):
    loss, (z, t) = LOSSES[name][0](), draw(name)
    z, t = jax.tree.map(
        lambda x: x.astype(dtype) if x.dtype == jnp.float64 else x, (z, t)
    )

    def all_parts(z, t):
        return loss.value(z, t), loss.hessian(z, t)(z), loss.factor(z, t)(z)

    for leaf in jax.tree.leaves(jax.eval_shape(all_parts, z, t)):
        assert leaf.dtype == dtype


def test_a_pair_of_two_dtypes_is_computed_in_the_wider_one():
    loss = losses.gaussian()
    (mean, s), t = draw("gaussian")
    narrow = mean.astype(jnp.float32), s
    value = loss.value(narrow, t.astype(jnp.bfloat16))
    exact = t.astype(jnp.bfloat16).astype(float)
    truth = jax.vmap(gaussian)((narrow[0].astype(float), s), exact)
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, truth, rtol=1e-12)
    product = loss.hessian(narrow, t)(narrow)
    assert [x.dtype for x in product] == [jnp.float32, jnp.float64]
    np.testing.assert_allclose(product[1], s / 2, rtol=1e-12)


def test_whole_numbers_are_targets_of_a_gaussian():
    (mean, s), t = draw("gaussian")
    whole = jnp.round(3 * t)
    value = losses.gaussian().value
    np.testing.assert_array_equal(
        value((mean, s), whole.astype(jnp.int32)), value((mean, s), whole)
    )


def test_a_pair_may_be_a_list_or_a_named_tuple():
    (mean, s), t = draw("gaussian")
    loss = losses.gaussian()
    product = loss.hessian([mean, s], t)([mean, s])
    assert isinstance(product, list)
    np.testing.assert_array_equal(product, loss.hessian((mean, s), t)((mean, s)))


@pytest.mark.parametrize("t", [0, 1, 5, 31, 32, 1000, 10**6])
def test_the_loss_of_a_count_keeps_its_digits_in_float32(t):
    # At the rate t + √t, where eᶻ, t z and log t! are up to ten million.
    z = np.float32(np.log(t + np.sqrt(t) + 0.5))
    wide = float(z)
    truth = math.exp(wide) - t * wide + math.lgamma(t + 1)
    # Rounding of log t is all there is.
    noise = 2e-7 * math.log(max(t, 1)) * abs(math.exp(wide) - t)
    value = losses.poisson().value(jnp.full((1, 1), z), jnp.full((1, 1), t))
    assert value.dtype == jnp.float32
    assert abs(float(value[0]) - truth) < noise + 1e-5 * truth


@pytest.mark.parametrize("z", [-90.0, 0.0, 80.0])
def test_the_gradient_of_a_count_of_zero_is_its_rate(z):
    def value(z):
        return losses.poisson().value(z, jnp.zeros((1, 1), jnp.int32))[0]

    z = jnp.full((1, 1), z, jnp.float32)
    np.testing.assert_allclose(jax.grad(value)(z), jnp.exp(z), rtol=1e-6)


def test_a_divergence_near_its_minimum_keeps_its_digits_in_float32():
    s = jnp.full((1, 1), 1e-2, jnp.float32)
    value = losses.gaussian_kl_divergence().value((0 * s, s), None)
    wide = float(s[0, 0])
    np.testing.assert_allclose(value, 0.5 * (math.expm1(wide) - wide), rtol=1e-4)


def test_a_precision_that_is_no_float_does_not_spoil_a_small_error():
    s = jnp.full((1, 1), -100.0, jnp.float32)  # e¹⁰⁰ is more than float32 holds.
    error = jnp.full((1, 1), 1e-21, jnp.float32)
    value = losses.gaussian().value((error, s), 0 * s)
    truth = 0.5 * (1e-42 * math.exp(100) - 100 + math.log(2 * math.pi))
    np.testing.assert_allclose(value, truth, rtol=1e-5)


def test_ordered_labels_keep_the_curvature_of_saturated_logits():
    z = jnp.asarray([[20.0, -20.0]], jnp.float32)
    product = losses.ordinal().hessian(z, jnp.asarray([1]))(jnp.ones_like(z))
    np.testing.assert_allclose(product, np.full((1, 2), math.exp(-20)), rtol=1e-5)


def test_predictions_are_means_rates_and_probabilities_of_levels():
    (mean, s), _ = draw("gaussian")
    for build in (losses.gaussian, losses.gaussian_kl_divergence):
        assert build().predict((mean, s)) is mean
    np.testing.assert_allclose(losses.poisson().predict(s), np.exp(s))
    logits = jnp.asarray([[3.0, 1.0, -2.0]])
    above = losses.ordinal().predict(logits)
    np.testing.assert_allclose(above, 1 / (1 + np.exp(-logits)))
    assert jnp.sum(above > 0.5, axis=-1) == 2


def test_targets_that_a_loss_is_not_meant_for_are_found():
    logits = jnp.zeros((4, 2))
    allowed = losses.ordinal().targets.allowed(logits, jnp.asarray([-1, 0, 2, 3]))
    np.testing.assert_array_equal(allowed, [False, True, True, False])
    counts = jnp.asarray([[0.0, 2.0], [0.0, -1.0]])
    allowed = losses.poisson().targets.allowed(logits[:2], counts)
    np.testing.assert_array_equal(allowed, [True, False])


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_is_nan_in_value_and_gradient(label):
    loss, t = losses.ordinal(), jnp.asarray([label, 1], jnp.int8)
    z = jnp.ones((2, 2))
    value = loss.value(z, t)
    gradient = jax.grad(lambda z: jnp.sum(loss.value(z, t)))(z)
    np.testing.assert_array_equal(jnp.isnan(value), [True, False])
    np.testing.assert_array_equal(jnp.isnan(gradient), [[True] * 2, [False] * 2])


def test_ordered_labels_that_are_no_integers_are_refused():
    with pytest.raises(TypeError, match="must be integer labels, got float64"):
        losses.ordinal().value(jnp.zeros((1, 2)), jnp.zeros(1))


@pytest.mark.parametrize(
    "outputs",
    [
        jnp.zeros((2, 2)),
        (jnp.zeros((2, 1)),) * 3,
        (jnp.zeros((2, 3)), jnp.zeros((2, 1))),
        {"mean": jnp.zeros((2, 3)), "log_variance": jnp.zeros((2, 3))},
        ((jnp.zeros((2, 1)),), jnp.zeros((2, 1))),
    ],
    ids=["array", "three", "shapes", "dict", "tree"],
)
@pytest.mark.parametrize("part", ["value", "hessian", "factor"])
def test_outputs_that_are_no_pair_are_refused(outputs, part):
    for loss in (losses.gaussian(), losses.gaussian_kl_divergence()):
        with pytest.raises(ValueError, match=r"`outputs` must be a pair \(mean, log_v"):
            getattr(loss, part)(outputs, None)


@pytest.mark.parametrize("shape", [(4, 1), (4,), (4, 3, 1)])
def test_targets_of_a_pair_of_another_shape_are_refused(shape):
    outputs, t = (jnp.zeros((4, 3)),) * 2, jnp.zeros(shape)
    with pytest.raises(ValueError, match=r"`targets` must have shape \[3\] a case"):
        losses.gaussian().value(outputs, t)
    with pytest.raises(ValueError, match=r"`targets` must have shape \[3\] a case"):
        losses.gaussian_kl_divergence().value(outputs, (t, t))


def test_a_prior_that_is_no_pair_is_refused():
    outputs = (jnp.zeros((4, 3)),) * 2
    with pytest.raises(ValueError, match="`targets` must be a pair"):
        losses.gaussian_kl_divergence().value(outputs, jnp.zeros((4, 3)))


def heteroscedastic(params, x):
    hidden = jnp.tanh(x @ params["in"])
    return hidden @ params["mean"], hidden @ params["log_variance"]


def small_regression():
    rng = np.random.default_rng(5)
    params = {
        "in": normal(rng, 2, 3),
        "mean": normal(rng, 3, 1),
        "log_variance": normal(rng, 3, 1),
    }
    weights = jnp.asarray([1.0, 0.0, 2.0, 0.5, 1.0])
    return params, (normal(rng, 5, 2), normal(rng, 5, 1), weights)


def test_the_hessian_of_f_is_not_that_of_the_fisher_matrix():
    params, batch = small_regression()
    f = hfjax.Objective(heteroscedastic, losses.gaussian())
    flat, unravel = ravel_pytree(params)
    (x, t, w), v = batch, jax.tree.map(jnp.cos, params)

    def outputs(flat):
        return rows(heteroscedastic(unravel(flat), x))

    def value(flat):
        values = jax.vmap(gaussian)(heteroscedastic(unravel(flat), x), t)
        return jnp.sum(w * values) / jnp.sum(w)

    @quick_jit
    def both(params, flat):
        products = [
            ravel_pytree(curvature(f, params, batch)(v))[0]
            for curvature in (hfjax.curvature.ggn, hfjax.curvature.hessian)
        ]
        j, s = jax.jacfwd(outputs)(flat), outputs(flat)[:, 1]
        fisher = jnp.stack([jnp.exp(-s), jnp.full_like(s, 0.5)], axis=1)
        g = jnp.einsum("i,ia,iam,ian->mn", w / jnp.sum(w), fisher, j, j)
        return products, (g, jax.hessian(value)(flat))

    for product, dense in zip(*both(params, flat), strict=True):
        np.testing.assert_allclose(product, dense @ ravel_pytree(v)[0], rtol=1e-9)


@pytest.mark.slow
def test_nothing_is_wrong_with_a_set_up_of_a_gaussian():
    params, batch = small_regression()
    f = hfjax.Objective(heteroscedastic, losses.gaussian())
    grads = f.value_and_grad(params, batch)[1]
    assert hfjax.verify.check(f, None, params, batch, grads) == []
