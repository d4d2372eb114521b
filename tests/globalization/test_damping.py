import jax.numpy as jnp
import numpy as np
import pytest

import hfjax
from hfjax import damping
from hfjax.globalization.damping import Verdict
from hfjax.update._damped import damped as damped_product
from hfjax.update._judge import measured_ratio
from hfjax.update.point import rounding_noise


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
    after = rule.update(jnp.float32(9.0), Verdict(jnp.float32(ratio)))
    np.testing.assert_allclose(after, 9.0 * factor, rtol=1e-6)


@pytest.mark.slow
def test_damping_has_no_floor_but_never_reaches_zero_or_overflows():
    rule = damping.levenberg_marquardt()
    good, bad = (Verdict(jnp.float32(ratio)) for ratio in (1, -1))
    low, high = jnp.float32(1e-25), jnp.float32(1.0)
    for _ in range(200):
        low, high = rule.update(low, good), rule.update(high, bad)
    assert 0 < low < 1e-36
    assert np.isfinite(high)
    for _ in range(300):  # And back.
        low, high = rule.update(low, bad), rule.update(high, good)
    assert low > 1e-2
    assert high < 1e-2


def test_minimum_is_a_floor():
    rule = damping.levenberg_marquardt(init=1.0, minimum=0.5)
    assert rule.update(jnp.float32(0.6), Verdict(jnp.float32(1))) == 0.5


def test_what_a_search_finds_is_held_within_the_limits():
    verdict = Verdict(jnp.float32(0.5))

    def next_of(found, now=1.0, minimum=0.5):
        rule = damping.searched(minimum=minimum)
        return rule.update(jnp.float32(now), verdict, jnp.float32(found))

    assert next_of(0.1) == 0.5
    assert next_of(7.0) == 7
    assert next_of(1e20) == np.float32(1e18)
    # A caller has set it higher.
    assert next_of(1e20, now=1e19) == np.float32(1e19)
    assert next_of(0.0, minimum=0.0) > 0


@pytest.mark.parametrize(
    ("told", "after"),
    [
        ({}, 0.25),
        ({"accepted": False, "ratio": -np.inf}, 1.5),  # By ρ.
        ({"seen": False}, 2 / 3),  # The lower of both: M may have vanished.
        ({"seen": False, "ratio": 0.5}, 0.25),
        ({"seen": False, "has_part": False, "ratio": 0.9}, 0.25),
    ],
)
def test_what_a_search_finds_is_taken_where_the_step_was(told, after):
    verdict = Verdict(**({"ratio": 0.9} | told))
    found = 0.9 if after == 2 / 3 else 0.25
    rule = damping.searched()
    ours = rule.update(jnp.float32(1.0), verdict, jnp.float32(found))
    np.testing.assert_allclose(ours, after, rtol=1e-6)


def test_another_rule_takes_no_found_damping_and_wants_no_search():
    rule = damping.levenberg_marquardt()
    verdict = Verdict(jnp.float32(0.5))
    assert rule.update(jnp.float32(1.0), verdict, jnp.float32(7.0)) == 1
    assert rule.backtracking is None
    assert damping.constant(1.0).backtracking is None
    assert damping.searched().backtracking is not None


@pytest.mark.parametrize("make", [damping.levenberg_marquardt, damping.searched])
def test_damping_without_a_part_in_a_step_that_is_not_seen_stays(make):
    rule, now = make(), jnp.float32(2.0)
    for seen, has_part in ((True, True), (True, False), (False, True)):
        verdict = Verdict(jnp.float32(1.0), seen=seen, has_part=has_part)
        np.testing.assert_allclose(rule.update(now, verdict), 4 / 3, rtol=1e-6)
    verdict = Verdict(jnp.float32(1.0), seen=False, has_part=False)
    assert rule.update(now, verdict) == now


def test_scheduled_damping_is_read_at_the_count_and_a_number_from_the_state():
    scheduled = damping.constant(lambda count: 10.0 / (1 + count))
    assert scheduled.init() == 10.0
    assert scheduled.current(jnp.float32(7), jnp.int32(4)) == 2.0
    number = damping.constant(0.5)
    assert number.init() == 0.5
    assert number.current(jnp.float32(7), jnp.int32(4)) == 7.0
    assert number.update(jnp.float32(7), Verdict(jnp.float32(-1))) == 7.0
    array = damping.constant(jnp.float32(0.5))
    assert array.current(jnp.float32(7), jnp.int32(4)) == 0.5


def test_ratio_is_change_over_prediction_when_both_stand_out():
    ratio = measured_ratio(jnp.float64(-0.3), jnp.float64(-0.4), jnp.float64(1e-13))
    np.testing.assert_allclose(ratio, 0.75, rtol=1e-11)
    rose = measured_ratio(jnp.float32(0.2), jnp.float32(-0.4), jnp.float32(1e-7))
    np.testing.assert_allclose(rose, -0.5, rtol=1e-5)


def test_ratio_of_changes_below_the_rounding_of_f_is_near_one():
    noise = rounding_noise(jnp.float32(50.0))
    ulp = np.spacing(np.float32(50))
    for change in (-ulp, 0.0, ulp):
        ratio = measured_ratio(jnp.float32(change), jnp.float32(-1e-12), noise)
        assert 0.75 < ratio < 1.25


@pytest.mark.parametrize("change", [np.nan, np.inf, -np.inf])
def test_ratio_of_a_value_that_is_not_finite_is_minus_infinity(change):
    ratio = measured_ratio(jnp.float32(change), jnp.float32(-1), jnp.float32(1e-7))
    assert ratio == -np.inf
    ratio = measured_ratio(jnp.float32(-1), jnp.float32(change), jnp.float32(1e-7))
    assert ratio == -np.inf


def test_damping_adds_lambda_times_the_vector():
    matrix = np.array([[2.0, 1.0], [1.0, 3.0]])
    damped = damped_product(lambda v: jnp.asarray(matrix) @ v, jnp.float64(0.5))
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
    damped = damped_product(
        lambda v: jnp.asarray(matrix) @ v,
        jnp.float64(0.5),
        lambda v: jnp.asarray(d) @ v,
    )
    v = np.array([1.0, -2.0])
    np.testing.assert_allclose(damped(jnp.asarray(v)), (matrix + 0.5 * d) @ v)
