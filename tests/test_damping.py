import jax.numpy as jnp
import numpy as np
import pytest

import hfjax
from hfjax import damping


@pytest.mark.parametrize(
    ("ratio", "factor"),
    [
        (0.9, 2 / 3),
        (np.nextafter(np.float32(0.75), np.float32(1)), 2 / 3),
        (0.75, 1.0),
        (0.5, 1.0),
        (0.25, 1.0),
        (np.nextafter(np.float32(0.25), np.float32(0)), 3 / 2),
        (0.0, 3 / 2),
        (-3.0, 3 / 2),
        (-np.inf, 3 / 2),
        (np.nan, 3 / 2),
        (np.inf, 2 / 3),
    ],
)
@pytest.mark.parametrize("make", [damping.levenberg_marquardt, damping.searched])
def test_levenberg_marquardt_follows_a_scripted_ratio(make, ratio, factor):
    rule = make(init=9.0)
    after = rule.update(jnp.float32(9.0), jnp.float32(ratio))
    np.testing.assert_allclose(after, 9.0 * factor, rtol=1e-6)


def test_damping_has_no_floor_but_never_reaches_zero_or_overflows():
    rule = damping.levenberg_marquardt()
    low, high = jnp.float32(1e-25), jnp.float32(1.0)
    for _ in range(200):
        low, high = rule.update(low, jnp.float32(1)), rule.update(high, jnp.float32(-1))
    assert 0 < low < 1e-36
    assert np.isfinite(high)
    for _ in range(300):  # And back.
        low, high = rule.update(low, jnp.float32(-1)), rule.update(high, jnp.float32(1))
    assert low > 1e-2
    assert high < 1e-2


def test_minimum_is_a_floor():
    rule = damping.levenberg_marquardt(init=1.0, minimum=0.5)
    assert rule.update(jnp.float32(0.6), jnp.float32(1)) == 0.5


def test_what_a_search_finds_is_held_within_the_limits():
    limit = damping.searched(minimum=0.5).limit
    now = jnp.float32(1.0)
    assert limit(jnp.float32(0.1), now) == 0.5
    assert limit(jnp.float32(7.0), now) == 7
    assert limit(jnp.float32(1e20), now) == np.float32(1e18)
    # A caller has set it higher.
    assert limit(jnp.float32(1e20), jnp.float32(1e19)) == np.float32(1e19)
    assert damping.searched().limit(jnp.float32(0.0), now) > 0
    assert damping.levenberg_marquardt().limit is None


def test_scheduled_damping_is_read_at_the_count_and_a_number_from_the_state():
    scheduled = damping.constant(lambda count: 10.0 / (1 + count))
    assert scheduled.init() == 10.0
    assert scheduled.current(jnp.float32(7), jnp.int32(4)) == 2.0
    number = damping.constant(0.5)
    assert number.init() == 0.5
    assert number.current(jnp.float32(7), jnp.int32(4)) == 7.0
    assert number.update(jnp.float32(7), jnp.float32(-1)) == 7.0
    array = damping.constant(jnp.float32(0.5))
    assert array.current(jnp.float32(7), jnp.int32(4)) == 0.5


def test_ratio_is_change_over_prediction_when_both_stand_out():
    ratio = damping.measured_ratio(
        jnp.float64(-0.3), jnp.float64(-0.4), jnp.float64(1e-13)
    )
    np.testing.assert_allclose(ratio, 0.75, rtol=1e-11)
    rose = damping.measured_ratio(
        jnp.float32(0.2), jnp.float32(-0.4), jnp.float32(1e-7)
    )
    np.testing.assert_allclose(rose, -0.5, rtol=1e-5)


def test_ratio_of_changes_below_the_rounding_of_f_is_near_one():
    noise = damping.rounding_noise(jnp.float32(50.0))
    ulp = np.spacing(np.float32(50))
    for change in (-ulp, 0.0, ulp):
        ratio = damping.measured_ratio(jnp.float32(change), jnp.float32(-1e-12), noise)
        assert 0.75 < ratio < 1.25


@pytest.mark.parametrize("change", [np.nan, np.inf, -np.inf])
def test_ratio_of_a_value_that_is_not_finite_is_minus_infinity(change):
    ratio = damping.measured_ratio(
        jnp.float32(change), jnp.float32(-1), jnp.float32(1e-7)
    )
    assert ratio == -np.inf
    ratio = damping.measured_ratio(
        jnp.float32(-1), jnp.float32(change), jnp.float32(1e-7)
    )
    assert ratio == -np.inf


def test_damping_adds_lambda_times_the_vector():
    matrix = np.array([[2.0, 1.0], [1.0, 3.0]])
    damped = damping.damped(lambda v: jnp.asarray(matrix) @ v, jnp.float64(0.5))
    v = np.array([1.0, -2.0])
    np.testing.assert_allclose(damped(jnp.asarray(v)), (matrix + 0.5 * np.eye(2)) @ v)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": 0.0}, "`init` must be above 0"),
        ({"decrease": 1.5}, "`decrease` must be above 0.0 and at most 1.0"),
        ({"increase": 0.5}, "`increase` must be at least 1"),
        ({"lower": 0.8, "upper": 0.7}, "`upper` must be at least 0.8"),
        ({"minimum": -1.0}, "`minimum` must be at least 0"),
        (
            {"ratio": hfjax.damping.ReductionRatio(step="first")},
            "`ratio.step` must be one of 'chosen', 'last', 'taken', got 'first'",
        ),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        damping.levenberg_marquardt(**options)


def test_negative_constant_is_refused():
    with pytest.raises(ValueError, match="`value` must be at least 0"):
        damping.constant(-1.0)


def test_structural_strength_is_tied_to_lambda_unless_it_is_not():
    lam, count = jnp.float32(0.5), jnp.int32(4)
    tied = damping.levenberg_marquardt(structural=0.03).structural
    np.testing.assert_allclose(tied.at(lam, count), 0.015, rtol=1e-6)
    free = damping.constant(0.5, structural=0.03, tied=False).structural
    np.testing.assert_allclose(free.at(lam, count), 0.03, rtol=1e-6)
    falling = damping.constant(0.5, structural=lambda count: 2.0 / (1 + count))
    np.testing.assert_allclose(falling.structural.at(lam, count), 0.2, rtol=1e-6)
    assert damping.constant(0.5).structural is None
    assert damping.levenberg_marquardt().structural is None


def test_damping_adds_lambda_times_the_matrix():
    matrix = np.array([[2.0, 1.0], [1.0, 3.0]])
    d = np.array([[4.0, -1.0], [-1.0, 5.0]])
    damped = damping.damped(
        lambda v: jnp.asarray(matrix) @ v,
        jnp.float64(0.5),
        lambda v: jnp.asarray(d) @ v,
    )
    v = np.array([1.0, -2.0])
    np.testing.assert_allclose(damped(jnp.asarray(v)), (matrix + 0.5 * d) @ v)
