import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import quick_jit

from hfjax import stopping
from hfjax.solvers.stopping import Progress

pytestmark = pytest.mark.every

RULES = {
    "martens2010": (stopping.martens2010, 5e-4, True),
    "martens_sutskever2012": (stopping.martens_sutskever2012, 1e-4, False),
}
every_rule = pytest.mark.parametrize("name", RULES)


def decisions(rule, values):
    """Ask the rule after each iteration; what lies beyond it is NaN."""
    values = jnp.asarray(values)

    def ask(j):
        seen = jnp.where(jnp.arange(len(values)) <= j, values, jnp.nan)
        return rule(Progress(j, seen, jnp.asarray(1.0), jnp.asarray(1.0)))

    return np.asarray(
        quick_jit(jax.vmap(ask))(jnp.arange(len(values), dtype=jnp.int32))
    )


def expected(values, tolerance, per_iteration):
    """Decide as the report does, equation 2, with the reading of its errata."""
    stops = []
    for j, now in enumerate(values):
        k = max(math.ceil(j / 10), 10)
        bound = tolerance * k if per_iteration else tolerance
        relevant = j > k and now < 0
        stops.append(relevant and (now - values[j - k]) / now < bound)
    return np.array(stops)


def scripts():
    j, rng = np.arange(251), np.random.default_rng(0)
    yield "slow", -(1 - np.exp(-j / 40))
    yield "fast", -(1 - np.exp(-j / 4))
    yield "power", (1.0 + j) ** -2 - 1
    yield "from_above", 5 * np.exp(-j / 10) - 1
    yield "flat_above_then_below", np.where(j < 60, 1.0, -np.minimum(j - 59.0, 90))
    yield "random", -1 - np.cumsum(10.0 ** rng.uniform(-7, -3, 251))
    yield "growing", -(1.0005**j)


SCRIPTS = dict(scripts())


@every_rule
@pytest.mark.parametrize("script", SCRIPTS)
def test_rules_decide_as_equation_2(name, script):
    rule, tolerance, per_iteration = RULES[name]
    truth = expected(SCRIPTS[script], tolerance, per_iteration)
    np.testing.assert_array_equal(decisions(rule(), SCRIPTS[script]), truth)


def test_the_scripts_tell_the_rules_apart():
    def first(values, tolerance, per_iteration):
        return int(np.argmax(expected(values, tolerance, per_iteration)))

    looser, stricter = (
        [first(values, tolerance, per_iteration) for values in SCRIPTS.values()]
        for _, tolerance, per_iteration in RULES.values()
    )
    assert len(set(looser)) >= 5  # Argmax of none is 0.
    assert sum(a != b for a, b in zip(looser, stricter, strict=True)) >= 5


@every_rule
def test_no_rule_stops_before_the_model_is_negative(name):
    j = np.arange(251.0)
    for values in (0 * j, 0 * j + 1, np.nan * j, 1 + j, 300 - j):
        assert not np.any(decisions(RULES[name][0](), values))


@every_rule
def test_no_rule_stops_within_its_first_window(name):
    stops = decisions(RULES[name][0](), np.full(251, -1.0))
    assert np.flatnonzero(stops)[0] == 11
    assert np.all(stops[11:])


@every_rule
def test_the_window_is_a_tenth_of_the_iterations_rounded_up(name):
    # Progress ends at iteration 150, and is then out of the window of ⌈16.7⌉ at 167.
    values = -(1.05 ** np.minimum(np.arange(251), 150))
    stops = decisions(RULES[name][0](), values)
    assert np.flatnonzero(stops)[0] == 167


@pytest.mark.parametrize("x64", [False, True])
def test_the_window_is_exact_at_multiples_of_ten(x64):
    # At 10 n, 0.1 · j must not be rounded above n: progress ends at 9 n, at 10 n it
    # has left a window of n, and at 10 n − 1 it has not.
    with jax.enable_x64(x64):
        for n in (11, 15, 22, 25):
            values = -(1.05 ** np.minimum(np.arange(251), 9 * n))
            stops = decisions(stopping.martens2010(), values)
            assert np.flatnonzero(stops)[0] == 10 * n


@pytest.mark.parametrize("window", [10, 20])
def test_the_rules_differ_by_a_factor_of_the_window(window):
    options = {"fraction": 0.0, "minimum_window": window}
    values = SCRIPTS["slow"]
    older = decisions(stopping.martens2010(2e-3, **options), values)
    newer = stopping.martens_sutskever2012(2e-3 * window, **options)
    same = stopping.martens_sutskever2012(2e-3, **options)
    np.testing.assert_array_equal(older, decisions(newer, values))
    assert np.argmax(older) < np.argmax(decisions(same, values))


def test_progress_equal_to_the_bound_does_not_stop():
    values = [-0.25, -0.5, -1.0]  # The last step is half of M, exactly.
    for tolerance, stops in ((0.5, False), (0.5 + 1e-12, True)):
        rule = stopping.martens2010(tolerance, fraction=0.0, minimum_window=1)
        assert decisions(rule, values)[2] == stops


def test_the_tolerance_may_be_traced():
    values = jnp.asarray(SCRIPTS["slow"])

    @quick_jit
    def ask(tolerance, j):
        rule = stopping.martens2010(tolerance)
        return rule(Progress(j, values, jnp.asarray(1.0), jnp.asarray(1.0)))

    assert ask(1.0, jnp.int32(50))
    assert not ask(0.0, jnp.int32(50))


def test_residual_rule_compares_with_the_right_hand_side():
    rule = stopping.residual(1e-3)
    for norm, stops in ((2.1e-3, False), (2e-3, True), (0.0, True), (np.nan, False)):
        progress = Progress(
            jnp.int32(1), jnp.zeros(3), jnp.asarray(norm), jnp.asarray(2.0)
        )
        assert bool(rule(progress)) == stops


def test_bad_options_are_refused():
    for rule, _, _ in RULES.values():
        with pytest.raises(ValueError, match="`tolerance` must be at least 0"):
            rule(-1e-3)
        with pytest.raises(ValueError, match=r"`fraction` .* at most 1"):
            rule(fraction=1.5)
        with pytest.raises(ValueError, match="`minimum_window` must be at least 1"):
            rule(minimum_window=0)
    with pytest.raises(ValueError, match="`tolerance` must be at least 0"):
        stopping.residual(-1.0)


@pytest.mark.parametrize(("cost", "window"), [(1.0, 4), (6.0, 4), (9.0, 1), (0.5, 3)])
def test_marginal_compares_the_gain_of_an_iteration_with_the_rate_of_the_update(
    cost, window
):
    # (M(x_{j−k}) − M(x_j)) / k < −M(x_j) / (cost + j), k = min(window, j): with a window
    # that reaches back to the start, too, however cheap an update is.
    for seed in (0, 1, 2):
        falls = np.random.default_rng(seed).random(30) * 0.6 ** np.arange(30)
        values = np.append(0.0, -np.cumsum(falls))
        expected = [False]
        for j in range(1, len(values)):
            k = min(window, j)
            rate = (values[j - k] - values[j]) / k
            expected.append(rate < -values[j] / (cost + j))
        found = decisions(stopping.marginal(cost=cost, window=window), values)
        np.testing.assert_array_equal(found, expected)
        assert 0 < np.sum(found) < len(values) - 1


@pytest.mark.parametrize("name", RULES)
def test_no_run_stops_while_the_window_begins_where_m_is_not_negative(name):
    # However high the tolerance: Martens' program asks for M(x_{j−k}) < 0.
    rule = RULES[name][0](50.0, minimum_window=2)
    values = [0.5, 0.3, 0.1, 0.01, -1.0, -1.1, -1.2]
    found = decisions(rule, values)
    np.testing.assert_array_equal(found, [False] * 6 + [True])
