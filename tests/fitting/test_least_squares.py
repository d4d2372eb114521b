"""Runs of nonlinear least squares, against Gauss-Newton steps in NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, quick_jit

import hfjax
from hfjax.training import _progress
from hfjax.training.fit import History, Reason

F64 = jnp.float64
X = np.linspace(0.0, 3.0, 12)
EXACT = 2.5 * np.exp(-1.3 * X)
NOISY = EXACT + 0.1 * np.sin(40 * X)
START = {"height": 1.0, "rate": 0.5}
traces = []


def residual_fn(params, x, y):
    """Return a tree: the residuals of a decay as a matrix, a scalar, and some in float32."""
    traces.append(x.shape)
    model = params["height"] * jnp.exp(-params["rate"] * x)
    prior = (params["rate"] - 1.3) / 10
    narrow = 0 * params["rate"].astype(jnp.float32)
    return {"data": (model - y).reshape(3, -1), "prior": prior, "narrow": narrow}


def fit(y=NOISY, start=START, **options):
    return hfjax.least_squares(residual_fn, start, X, y, **options)


def residuals(theta, y=NOISY):
    """Return r and J in NumPy."""
    height, rate = theta
    decay = np.exp(-rate * X)
    jacobian = np.stack([decay, -height * X * decay], axis=1)
    r = np.append(height * decay - y, [(rate - 1.3) / 10, 0])
    return r, np.append(jacobian, [[0, 0.1], [0, 0]], axis=0)


@functools.cache
def truth():
    theta = np.array([2.5, 1.3])
    for _ in range(50):
        r, jacobian = residuals(theta)
        theta = theta - np.linalg.lstsq(jacobian, r)[0]
    return theta


def entries(fitted):
    return np.array([fitted.params["height"], fitted.params["rate"]])


def test_a_run_ends_at_the_minimum_where_rounding_hides_the_rest():
    found = fit()
    np.testing.assert_allclose(entries(found), truth(), rtol=1e-13)
    r, _ = residuals(truth())
    np.testing.assert_allclose(found.value, r @ r / 2, rtol=1e-13)
    assert found.reason is Reason.ROUNDING
    updates = len(found.history.value)
    assert all(column.shape == (updates,) for column in found.history)
    assert np.all(np.isfinite(np.asarray(found.history[:4])))
    assert found.history.gradient[0] > 0.1 > 1e-10 > found.history.gradient[-1]
    assert found.history.value[0] > found.value
    assert found.state.count == updates
    assert "Fit(params={" in repr(found)


def test_new_data_of_the_same_shapes_are_neither_traced_nor_compiled():
    fit()
    known = len(traces)
    found = fit(EXACT)
    assert len(traces) == known
    assert found.reason is Reason.ZERO
    np.testing.assert_allclose(entries(found), [2.5, 1.3], rtol=1e-14)


@pytest.mark.parametrize(
    ("option", "reason"),
    [("gtol", Reason.GRADIENT), ("xtol", Reason.STEP), ("ftol", Reason.VALUE)],
)
@pytest.mark.every
def test_a_tolerance_ends_a_run_sooner_and_not_too_soon(option, reason):
    found, whole = fit(**{option: 1e-5}), fit()
    assert found.reason is reason
    assert "tolerance" in reason.words
    assert 1 < len(found.history.value) < len(whole.history.value)
    np.testing.assert_allclose(entries(found), truth(), rtol=1e-3)
    looser = fit(**{option: 1e-2})
    assert len(looser.history.value) < len(found.history.value)


def test_a_run_of_far_too_high_a_damping_does_not_end_by_short_steps():
    high = fit().state._replace(damping=jnp.asarray(1e12, F64))
    for option in ("xtol", "ftol"):
        found = fit(state=high, **{option: 1e-6})
        np.testing.assert_allclose(entries(found), truth(), rtol=1e-3)


def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(monkeypatch):
    monkeypatch.setattr(_progress, "_EVERY", 0.0)
    rows, lines = [], []

    def callback(row):
        rows.append(row)
        return row["update"] == 3

    part = fit(callback=callback, progress=lines.append)
    assert part.reason is Reason.CALLBACK
    whole = fit()
    rest = fit(start=part.params, state=part.state)
    assert_close(rest.params, whole.params, rtol=0)
    for name in History._fields[:4]:  # There is no validation batch.
        column = np.asarray(getattr(whole.history, name))
        np.testing.assert_array_equal(getattr(rest.history, name), column[3:])
        assert [row[name] for row in rows] == column[:3].tolist()
    assert_close(rows[-1]["params"], part.params, rtol=0)
    assert [line.split()[1] for line in lines] == ["1", "2", "3", "3"]
    assert lines[-1].endswith(Reason.CALLBACK.words)


def test_the_covariance_is_that_of_the_linear_model():
    found = fit()
    r, jacobian = residuals(entries(found))
    inverse = np.linalg.inv(jacobian.T @ jacobian)
    known = found.covariance(scale=False)
    np.testing.assert_allclose(known, inverse, rtol=1e-9)
    variance = r @ r / (len(r) - 2)
    np.testing.assert_allclose(found.covariance(), variance * inverse, rtol=1e-9)
    errors = found.standard_errors()
    assert errors["rate"].shape == ()
    size = np.sqrt(variance * np.diag(inverse))
    np.testing.assert_allclose([errors["height"], errors["rate"]], size, rtol=1e-9)


def test_what_cannot_be_fitted_is_refused_with_a_sentence():
    def refused(
        kind, match, residual=residual_fn, start=START, args=(X, NOISY), **options
    ):
        with pytest.raises(kind, match=match):
            hfjax.least_squares(residual, start, *args, **options)

    refused(ValueError, "returned no residuals: tuple", lambda p: (), args=())
    refused(ValueError, "no residuals", lambda p: p[:0], jnp.ones(2), ())
    refused(TypeError, "real and the imaginary", lambda p: p + 1j, jnp.ones(2), ())
    refused(TypeError, "got int.*at residuals", lambda p: 3, jnp.ones(2), ())
    refused(TypeError, "real floats, got int at params", start={"height": 1, "rate": 2})
    refused(TypeError, "must be a function", residual=3)
    refused(TypeError, "got str: let `residual_fn` close", args=("x", NOISY))
    refused(ValueError, "`loss` must be one of 'linear', 'soft", loss="huberr")
    refused(ValueError, "`jacobian` must be one of", jacobian="central")
    refused(ValueError, "`gtol` must be at least 0", gtol=-1e-8)
    refused(ValueError, "`scale` must be above 0", scale=0.0)
    refused(TypeError, "`scale` must be a Python number", scale=jnp.ones(()))
    refused(ValueError, "`max_updates` must be at least 1", max_updates=0)
    refused(TypeError, "`solver` must be a `Solver`", solver="auto")
    refused(TypeError, "`state` must be that of an earlier fit", state=3)
    refused(TypeError, "`progress` must be a function `line -> None`", progress=3)
    refused(
        ValueError, "not finite at the start", start={"height": math.nan, "rate": 1.0}
    )
    watched = functools.partial(fit, progress=print)
    with pytest.raises(ValueError, match="not available inside of `jit`"):
        jax.eval_shape(watched, NOISY)


@pytest.mark.slow
def test_many_data_sets_are_fitted_at_once_as_one_by_one():
    scales = np.array([1.0, 3.0, 0.5])
    data = np.append(scales[:, None] * NOISY, EXACT[None], axis=0)
    fits = jax.vmap(fit)(jnp.asarray(data))
    for k, y in enumerate(data):
        alone = fit(y)
        one = jax.tree.map(lambda x, k=k: x[k], fits)
        assert_close(one.params, alone.params, rtol=1e-8)
        assert Reason(int(one.reason)) is alone.reason
        updates = int(np.sum(np.isfinite(one.history.value)))
        assert abs(updates - len(alone.history.value)) <= 2
        assert np.all(np.isnan(one.history.value[updates:]))
    errors = jax.vmap(lambda one: one.standard_errors())(fits)
    np.testing.assert_allclose(
        errors["rate"][0], fit().standard_errors()["rate"], rtol=1e-9
    )
    with pytest.raises(TypeError, match="A fit has no derivative"):
        jax.grad(lambda y: fit(y).value)(jnp.asarray(NOISY))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_both_ways_to_the_jacobian_end_at_the_same_place(mode):
    found = fit(jacobian=mode)
    np.testing.assert_allclose(entries(found), truth(), rtol=1e-8)


@pytest.mark.slow
def test_a_model_with_a_loop_of_unknown_length_is_fitted():
    def root(a):
        # Newton's iteration for √a ends by itself.
        def step(x):
            return 0.5 * (x + a / x)

        def going(x):
            return jnp.abs(x * x - a) > 1e-12

        return step(jax.lax.while_loop(going, step, jnp.ones_like(a)))

    def residual(p, x, y):
        return jnp.stack([root(p[0] * a) + p[1] for a in x]) - y

    x = jnp.array([1.0, 2.0, 3.0])
    y = jnp.sqrt(2 * x) - 1
    found = hfjax.least_squares(residual, jnp.array([1.0, 0.0]), x, y)
    np.testing.assert_allclose(found.params, [2.0, -1.0], rtol=1e-12)


@pytest.mark.slow
def test_a_run_that_does_not_converge_says_why():
    short = fit(max_updates=2)
    assert short.reason is Reason.UPDATES
    assert len(short.history.value) == 2

    @jax.custom_jvp
    def wrong(p):
        return p**2

    wrong.defjvp(lambda p, v: (wrong(*p), -2 * p[0] * v[0]))
    found = hfjax.least_squares(wrong, jnp.array([1.0, 2.0]))
    assert found.reason is Reason.STUCK
    np.testing.assert_array_equal(found.params, [1.0, 2.0])

    @jax.custom_jvp
    def broken(p):
        return p

    broken.defjvp(lambda p, v: (p[0], jnp.where(p[0] < 0.5, jnp.nan, 1) * v[0]))
    found = hfjax.least_squares(broken, jnp.array([1.0]))
    assert found.reason is Reason.NONFINITE
    assert found.params < 0.5
    np.testing.assert_allclose(found.value, found.params[0] ** 2 / 2, rtol=1e-12)


@pytest.mark.slow
def test_the_value_is_that_at_the_end_even_where_last_steps_without_damping_fail():
    # Freudenstein and Roth's function, at a minimum where J is nearly singular.
    def residual(x):
        first = -13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1]
        return jnp.stack([first, -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1]])

    found = hfjax.least_squares(residual, jnp.array([0.5, -2.0]))
    assert found.reason is Reason.ROUNDING
    at_end = 0.5 * jnp.sum(residual(found.params) ** 2)
    np.testing.assert_allclose([found.value, at_end], 48.98425368 / 2, rtol=1e-9)


@pytest.mark.slow
def test_in_float32_a_run_ends_at_the_rounding_of_float32():
    with jax.enable_x64(False):
        found = hfjax.least_squares(
            residual_fn, START, jnp.float32(X), jnp.float32(NOISY)
        )
    assert found.value.dtype == jnp.float32
    assert found.reason is Reason.ROUNDING
    assert len(found.history.value) < 40
    np.testing.assert_allclose(entries(found), truth(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["soft_l1", "huber", "cauchy", "arctan"])
@pytest.mark.every
def test_an_outlier_hardly_moves_a_robust_fit(loss):
    y = NOISY.copy()
    y[4] += 3
    found = fit(y, loss=loss, scale=0.2)
    assert found.reason is Reason.ROUNDING
    off, moved = (np.abs(entries(f) - truth()).max() for f in (found, fit(y)))
    assert off < 0.2 * moved

    def gradient(theta):
        r, jacobian = residuals(theta, y)
        u = (r / 0.2) ** 2
        slope = {
            "soft_l1": 1 / np.sqrt(1 + u),
            "huber": np.where(u > 1, 1 / np.sqrt(np.maximum(u, 1)), 1),
            "cauchy": 1 / (1 + u),
            "arctan": 1 / (1 + u**2),
        }[loss]
        return jacobian.T @ (slope * r)

    np.testing.assert_allclose(gradient(entries(found)), 0, atol=1e-8)


@pytest.mark.slow
def test_a_call_inside_of_jit_is_that_from_outside():
    inside = quick_jit(fit)(jnp.asarray(NOISY))
    assert_close(inside.params, fit().params, rtol=1e-9)
    assert inside.reason == Reason.ROUNDING


def test_parameters_that_only_their_product_shows_stay_alike():
    """The undamped step is the shortest, so none goes along what no residual shows."""

    def product(p, x, y):
        return p[0] * p[1] * jnp.exp(-p[2] * x) - y

    found = hfjax.least_squares(product, jnp.ones(3), X, NOISY)
    np.testing.assert_allclose(found.params[0], found.params[1], rtol=1e-2)


def test_a_function_that_closes_over_what_is_mapped_fits_each():
    def slope(y):
        return hfjax.least_squares(lambda p: p * X - y, jnp.zeros(())).params

    slopes = jax.vmap(slope)(jnp.stack([X, 3 * X]))
    np.testing.assert_allclose(slopes, [1.0, 3.0], rtol=1e-12)
