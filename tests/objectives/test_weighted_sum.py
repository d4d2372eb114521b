"""A sum of objectives, each with cases of its own."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from jax.flatten_util import ravel_pytree
from reference import assert_close, flat, matrix_of, quick_jit

import hfjax
from hfjax.objectives.objective import weighted_sum
from hfjax.objectives.plain import subsample

SQUARED_ERROR = hfjax.losses.squared_error()
SIZES = (6, 3)


def model_fn(params, x):
    return (
        jnp.tanh(x @ params["w"] + params["b"].reshape((1,) * (x.ndim - 1) + (4,)))
        @ params["v"]
    )


def make_params():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"w": (2, 4), "b": (4,), "v": (4, 1)}
    return {
        name: jax.random.normal(key, shape, jnp.float64)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def make_batches():
    keys = jax.random.split(jax.random.key(1), 2)
    return tuple(
        (x, jnp.sin(3 * x[:, :1]))
        for x in (
            jax.random.normal(key, (n, 2), jnp.float64)
            for key, n in zip(keys, SIZES, strict=True)
        )
    )


PARAMS, BATCHES = make_params(), make_batches()
UNION = jax.tree.map(lambda *x: jnp.concatenate(x), *BATCHES)


def of_all_cases(times=1.0, **options):
    """Return the mean over both terms' cases as a sum, and as one objective."""
    one = hfjax.Objective(model_fn, SQUARED_ERROR, **options)
    parts = [(times * size / sum(SIZES), one) for size in SIZES]
    return weighted_sum(parts), one


def slope_and_boundary():
    """Return a sum of two models, its batch, and f by itself."""

    def slope(params, x):
        u = lambda point: model_fn(params, point)[0]  # noqa: E731
        return jax.vmap(lambda point: jax.jvp(u, (point,), (jnp.ones_like(point),))[1])(
            x
        )[:, None]

    f = weighted_sum(
        [
            (0.7, hfjax.Objective(slope, SQUARED_ERROR, weight_decay=0.1)),
            (2.0, hfjax.Objective(model_fn, SQUARED_ERROR, microbatch_size=2)),
        ]
    )

    def truth(params):
        (x, t), (y, s) = BATCHES
        squares = sum(jnp.sum(leaf**2) for leaf in params.values())
        return (
            0.7 * (jnp.sum((slope(params, x) - t) ** 2) / 12 + 0.05 * squares)
            + 2.0 * jnp.sum((model_fn(params, y) - s) ** 2) / 6
        )

    def residuals(params):
        (x, t), (y, s) = BATCHES
        return jnp.concatenate(
            [
                jnp.sqrt(0.7 / 6) * (slope(params, x) - t).ravel(),
                jnp.sqrt(2.0 / 3) * (model_fn(params, y) - s).ravel(),
            ]
        )

    return f, truth, residuals


def dense(product):
    return quick_jit(lambda: matrix_of(product, PARAMS))()


def test_value_gradient_and_curvature_are_the_weighted_sums():
    f, truth, residuals = slope_and_boundary()
    theta, unravel = ravel_pytree(PARAMS)
    value, gradient = quick_jit(f.value_and_grad)(PARAMS, BATCHES)
    np.testing.assert_allclose(value, truth(PARAMS), rtol=1e-12)
    np.testing.assert_allclose(f.value(PARAMS, BATCHES), value, rtol=1e-12)
    expected = quick_jit(jax.grad(truth))(PARAMS)
    assert_close(gradient, expected, rtol=1e-10)

    j = quick_jit(jax.jacobian(lambda p: residuals(unravel(p))))(theta)
    decay = 0.7 * 0.1 * np.eye(theta.size)
    np.testing.assert_allclose(
        dense(hfjax.curvature.ggn(f, PARAMS, BATCHES)), j.T @ j + decay, atol=1e-10
    )
    np.testing.assert_allclose(
        dense(hfjax.curvature.hessian(f, PARAMS, BATCHES)),
        quick_jit(jax.hessian(lambda p: truth(unravel(p))))(theta),
        atol=1e-10,
    )
    d = quick_jit(lambda: hfjax.diagonals.ggn_exact(f, PARAMS, BATCHES))()
    np.testing.assert_allclose(flat(d), np.diag(j.T @ j + decay), atol=1e-10)
    key = jax.random.key(3)
    signs = quick_jit(
        lambda: hfjax.diagonals.ggn_rademacher(f, PARAMS, BATCHES, key=key)
    )()
    # One output a case: the signs square away.
    np.testing.assert_allclose(flat(signs), np.diag(j.T @ j + decay), atol=1e-10)


@pytest.mark.slow
def test_products_in_fewer_digits_hold_to_the_exact_sum():
    f, _, _ = slope_and_boundary()
    product = hfjax.curvature.with_precision("bfloat16")(f, PARAMS, BATCHES)
    exact = hfjax.curvature.ggn(f, PARAMS, BATCHES)
    v = jax.tree.map(jnp.ones_like, PARAMS)
    nearly, truth, held = (
        flat(quick_jit(p)(v)) for p in (product.product, exact, product.exact)
    )
    np.testing.assert_allclose(held, truth, rtol=1e-10)
    error = np.linalg.norm(nearly - truth) / np.linalg.norm(truth)
    assert 1e-5 < error < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        hfjax.preconditioners.kronecker(damping_share=0.5, cases=None),
        hfjax.preconditioners.diagonal(),
        hfjax.preconditioners.nystrom(rank=17),
    ],
    ids=["kronecker", "diagonal", "nystrom"],
)
def test_preconditioners_of_a_sum_are_those_of_all_its_cases(rule):
    """With three times shares of the cases as weights the sum is three means."""
    both, one = of_all_cases(times=3.0, weight_decay=0.01)
    r = jax.tree.map(jnp.cos, PARAMS)

    def inverse(objective, batch, damping, r):
        key = jax.random.key(0)
        return rule.build(objective, PARAMS, batch, jnp.float64(damping), key)(r)

    inverse = quick_jit(inverse, static_argnums=0)
    expected = inverse(one, UNION, 0.1, r)
    single = weighted_sum([(3.0, one)])
    for objective, batch in ((both, BATCHES), (single, (UNION,))):
        found = inverse(objective, batch, 0.3, r)
        # Of a P of which the scale does not matter.
        scale = expected["v"][0, 0] / found["v"][0, 0]
        assert_close(optax.tree.scale(scale, found), expected, rtol=1e-6)


@pytest.mark.slow
def test_training_on_a_sum_is_training_on_all_its_cases():
    both, one = of_all_cases()

    def train(objective, batch):
        tx = hfjax.hessian_free(objective)
        return training.trained(objective, tx, PARAMS, batch, 2)[0]

    (found, state), (expected, other) = train(both, BATCHES), train(one, UNION)
    assert state.info.accepted
    np.testing.assert_allclose(state.damping, other.damping, rtol=1e-6)
    assert_close(found, expected, rtol=1e-6)


@pytest.mark.slow
def test_sums_of_sums_and_schedules_are_sums():
    one = hfjax.Objective(model_fn, SQUARED_ERROR)
    schedule = optax.piecewise_constant_schedule(1.0, {10: 0.5})
    inner = weighted_sum([(schedule, one), (2.0, one)])
    f = weighted_sum([(3.0, inner), (1.0, one)])
    batch = (BATCHES, BATCHES[0])
    a, b = (one.value(PARAMS, own) for own in BATCHES)
    for count, c in ((0, 1.0), (10, 0.5)):
        value = f.at(count).value(PARAMS, batch)
        np.testing.assert_allclose(value, 3 * (c * a + 2 * b) + a, rtol=1e-12)
    v = jax.tree.map(jnp.ones_like, PARAMS)
    product = hfjax.curvature.ggn(f.at(0), PARAMS, batch)(v)
    of_first, of_second = (hfjax.curvature.ggn(one, PARAMS, own)(v) for own in BATCHES)
    expected = jax.tree.map(lambda y, z: 4 * y + 6 * z, of_first, of_second)
    assert_close(product, expected, rtol=1e-10)
    values = f.at(0).case_values(PARAMS, batch)
    assert [np.shape(x) for x in jax.tree.leaves(values)] == [(6,), (3,), (6,)]


@pytest.mark.slow
def test_schedules_need_a_count_where_something_is_computed():
    schedule = optax.piecewise_constant_schedule(1.0, {10: 0.5})
    one = hfjax.Objective(model_fn, SQUARED_ERROR, weight_decay=0.1)
    f = weighted_sum([(schedule, one), (2.0, one)])
    assert f.case_values(PARAMS, BATCHES)[1].shape == (3,)
    with pytest.raises(TypeError, match=r"of the sum is a schedule, or balanced: say"):
        f.value(PARAMS, BATCHES)
    # By sizes alone, before the count is read, an update takes the exact solver.
    tx = hfjax.hessian_free(f, solver="auto")
    _, grads = f.at(0).value_and_grad(PARAMS, BATCHES)
    _, state = training.one_update(f, tx, PARAMS, BATCHES, grads=grads)
    assert state.info.accepted


def test_what_belongs_to_a_part_the_sum_does_not_have():
    plain = hfjax.Objective(model_fn, SQUARED_ERROR, axis_name="cases")
    decayed = hfjax.Objective(model_fn, SQUARED_ERROR, weight_decay=0.1)
    inner = weighted_sum([(2.0, plain), (3.0, decayed)])
    f = weighted_sum([(0.5, inner), (1.0, plain)])
    assert isinstance(f, hfjax.Objective)
    own = ("model_fn", "loss", "weight_decay", "microbatch_size", "linearize_once")
    for name in own:
        with pytest.raises(AttributeError, match=f"has no `{name}`: its parts have"):
            getattr(f, name)
    with pytest.raises(AttributeError, match=r"A weighted sum has no `outputs`\.$"):
        f.outputs  # noqa: B018
    assert (f.axis_name, f.hidden_loss) == ("cases", None)
    assert copy.copy(f).parts is f.parts


def test_a_part_of_the_cases_is_taken_of_each_term():
    both, _ = of_all_cases()
    (x, _), (y, _) = subsample(both, BATCHES, 3)
    np.testing.assert_array_equal(x, BATCHES[0][0][::2])
    np.testing.assert_array_equal(y, BATCHES[1][0])


def test_what_is_no_sum_is_refused():
    one = hfjax.Objective(model_fn, SQUARED_ERROR)
    with pytest.raises(TypeError, match=r"`parts` must be a list of pairs"):
        weighted_sum(one)
    with pytest.raises(ValueError, match="`parts` is empty"):
        weighted_sum([])
    with pytest.raises(TypeError, match=r"`parts\[1\]` must be a pair"):
        weighted_sum([(1.0, one), one])
    with pytest.raises(TypeError, match=r"`parts\[0\]` must be a pair .*second place"):
        weighted_sum([(one, 1.0)])
    with pytest.raises(ValueError, match=r"`parts\[0\]\[0\]` must be at least 0"):
        weighted_sum([(-1.0, one)])
    hidden = hfjax.Objective(
        lambda p, x: (x, x), SQUARED_ERROR, hidden_loss=SQUARED_ERROR
    )
    with pytest.raises(ValueError, match=r"`parts\[0\]` has a `hidden_loss`"):
        weighted_sum([(1.0, hidden)])


def test_a_batch_that_does_not_fit_is_refused():
    f, _ = of_all_cases()
    with pytest.raises(ValueError, match=r"terms' 2 batches.*got tuple of 1"):
        f.value(PARAMS, BATCHES[:1])
    with pytest.raises(ValueError, match=r"`batch\[0\]` must be \(inputs, targets\)"):
        f.value(PARAMS, UNION)
    tx = hfjax.hessian_free(f)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"`eval_batch` of a weighted sum"):
        tx.update(PARAMS, state, PARAMS, batch=BATCHES, eval_batch=UNION[:1])


@pytest.mark.slow
def test_a_set_up_is_checked_term_by_term_and_as_a_whole():
    both, one = of_all_cases()
    tx = hfjax.hessian_free(both)
    grads = both.value_and_grad(PARAMS, BATCHES)[1]
    check = hfjax.verify.check
    assert check(both, tx, PARAMS, BATCHES, grads) == []
    (fault,) = check(both, tx, PARAMS, BATCHES, jax.tree.map(jnp.add, grads, grads))
    assert "not the gradient of this sum (relative error 1)" in fault
    bad = (BATCHES[0], (BATCHES[1][0] * jnp.nan, BATCHES[1][1]))
    (fault,) = check(both, tx, PARAMS, bad, grads)
    assert fault.startswith("Of the sum's term 1: `inputs` holds NaN")
    (fault,) = check(
        both, hfjax.hessian_free(weighted_sum([(1.0, one)] * 2)), PARAMS, BATCHES, grads
    )
    assert "built with another objective" in fault
