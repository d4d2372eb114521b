import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax import linesearch


def run(rule, values, *, slope=-1.0, first=1.0, first_value=None, value=0.0):
    """Search where the k-th evaluation answers values[k]; return the tried α too."""
    tried, table = [], iter(values)

    def answer(alpha):
        tried.append(float(alpha))
        return np.float32(next(table))

    def along(alpha):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(answer, shape, alpha)

    found = rule.search(
        along,
        jnp.float32(value),
        jnp.float32(slope),
        jnp.float32(first),
        None if first_value is None else jnp.float32(first_value),
    )
    return jax.block_until_ready(found), tried


def test_armijo_shrinks_until_the_decrease_is_enough():
    # Enough is f ≤ −0.01 α: −0.004 is not at α = 0.5, but is at 0.25.
    rule = linesearch.armijo(shrink=0.5)
    found, tried = run(rule, [3.0, -0.004, -0.004])
    assert tried == [1.0, 0.5, 0.25]
    assert (found.step_size, found.value) == (0.25, np.float32(-0.004))
    assert found.success


def test_known_first_value_is_not_evaluated_again():
    rule = linesearch.armijo()
    found, tried = run(rule, [], first_value=-1.0)
    assert tried == []
    assert found.step_size == 1
    found, tried = run(rule, [-1.0], first_value=1.0)
    np.testing.assert_allclose(tried, [0.8], rtol=1e-6)


@pytest.mark.parametrize("first_value", [None, 1.0])
def test_failure_after_the_last_try_is_exactly_zero(first_value):
    rule = linesearch.armijo(max_tries=5)
    found, tried = run(rule, [1.0] * 9, first_value=first_value)
    assert len(tried) == (5 if first_value is None else 4)
    assert found.step_size == 0
    assert not found.success


def test_success_at_the_last_try_counts():
    rule = linesearch.armijo(max_tries=5)
    found, tried = run(rule, [1.0] * 4 + [-1.0])
    assert found.success
    np.testing.assert_allclose(found.step_size, 0.8**4, rtol=1e-6)
    np.testing.assert_allclose(tried, 0.8 ** np.arange(5), rtol=1e-6)


def test_sixty_tries_are_the_default():
    _, tried = run(linesearch.armijo(), [1.0] * 99)
    assert len(tried) == 60


def test_values_that_are_not_finite_are_no_decrease():
    found, _ = run(linesearch.armijo(), [np.nan, np.inf, -np.inf, -1.0])
    assert not found.success or found.value == -1.0
    found, _ = run(linesearch.armijo(), [np.nan, np.inf, -1.0])
    assert found.success
    assert found.value == -1.0


@pytest.mark.parametrize("slope", [0.0, 1.0, np.nan])
def test_nothing_is_tried_up_a_slope(slope):
    found, tried = run(linesearch.armijo(), [], slope=slope)
    assert tried == []
    assert found.step_size == 0


def test_a_search_that_is_left_out_takes_the_first_step_unless_f_rises():
    rule = linesearch.LineSearch()
    assert run(rule, [], first_value=-1.0)[0].step_size == 1
    assert run(rule, [0.0], first=0.5)[0].step_size == 0.5
    assert run(rule, [], first_value=0.1)[0].step_size == 0
    assert run(rule, [np.nan])[0].step_size == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shrink": 1.5}, ValueError, "`shrink` must be above 0"),
        ({"sufficient_decrease": -1.0}, ValueError, "`sufficient_decrease` must be"),
        ({"max_tries": 0}, ValueError, "`max_tries` must be at least 1"),
        ({"max_tries": 2.5}, TypeError, "`max_tries` must be a Python integer"),
    ],
)
def test_options_out_of_range_are_named(options, error, message):
    with pytest.raises(error, match=message):
        linesearch.armijo(**options)
