"""Terms of a sum that are balanced in the run, each by a scale of its weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mapped import PROBLEM, by_shard_map, needs_devices
from reference import quick_jit

import hfjax
from hfjax.objectives.balance import next_scales
from hfjax.objectives.objective import balanced, penalty, weighted_sum
from hfjax.objectives.plain import each

SQUARED_ERROR = hfjax.losses.squared_error()
X = np.linspace(0.0, 1.0, 5)
BATCH = ((X, np.exp(-X)), (X[:2], np.array([3.0, -1.0])))
PARAMS = jnp.array([0.3, -0.8])
TERMS = [
    hfjax.Objective(lambda p, x: p[0] * jnp.exp(p[1] * x), SQUARED_ERROR),
    hfjax.Objective(lambda p, x: p[1] + p[0] * x, SQUARED_ERROR, weight_decay=0.1),
]
PARTS = [(1.5, TERMS[0]), (lambda count: 4.0 / (1.0 + count), TERMS[1])]
F = weighted_sum(PARTS, balance=0.05)


def values(params, count=0):
    """Return c₁f₁ and c₂f₂ by NumPy."""
    (a, b), params = BATCH, np.asarray(params)
    first = params[0] * np.exp(params[1] * a[0]) - a[1]
    second = params[1] + params[0] * b[0] - b[1]
    decay = 0.05 * np.sum(params**2)
    found = [np.mean(first**2) / 2, np.mean(second**2) / 2 + decay]
    return np.array([1.5, 4 / (1 + count)]) * found


def by_hand(scales, values, balance):
    """Return Webb, Jerad & Cartis' rule, divided so that the product stays the same."""
    raw = scales * (np.mean(scales * values) / (scales * values)) ** balance
    return raw * (np.prod(scales) / np.prod(raw)) ** (1 / len(scales))


def test_constant_values_give_shares_that_draw_together_at_a_known_rate():
    size, scales = np.array([3.0, 0.2, 10.0]), np.array([1.0, 10.0, 0.1])
    found = scales
    for _ in range(30):
        found = balanced(found, size)
    before, after = (np.log(s * size) for s in (scales, np.asarray(found)))
    rate = 0.95**30
    np.testing.assert_allclose(
        after - after.mean(), rate * (before - before.mean()), rtol=1e-10
    )
    np.testing.assert_allclose(np.prod(found), np.prod(scales), rtol=1e-12)
    once = balanced(scales, size, 0.3)
    np.testing.assert_allclose(once, by_hand(scales, size, 0.3), rtol=1e-12)


@pytest.mark.parametrize("bad", [0.0, -2.0, np.nan, np.inf])
def test_a_term_without_a_size_keeps_its_scale_and_the_others_do_not_notice(bad):
    pair = balanced([1.0, 2.0], np.array([5.0, 0.1]))
    three = balanced([1.0, 7.0, 2.0], np.array([5.0, bad, 0.1]))
    np.testing.assert_allclose(three, [pair[0], 7.0, pair[1]], rtol=1e-12)
    np.testing.assert_array_equal(balanced([3, 4], np.array([bad, bad])), [3, 4])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_term_that_is_solved_exactly_does_not_get_all_the_weight(dtype):
    scales = jnp.ones(3, dtype)
    for _ in range(20):
        scales = balanced(scales, jnp.array([1.0, 1e-30, 1e-37], dtype), 0.9)
    assert scales.dtype == dtype
    np.testing.assert_allclose(scales[1:] / scales[0], 100, rtol=1e-3)


def test_an_update_is_that_of_a_sum_with_these_weights_and_balances_its_terms():
    def step(params, state):
        now = F.at(state.count, state.scales)
        _, grads = now.value_and_grad(params, BATCH)
        updates, after = tx.update(grads, state, params, batch=BATCH)
        weights = state.scales * jnp.stack([1.5, 4 / (1.0 + state.count)])
        f = weighted_sum(list(zip(list(weights), TERMS, strict=True)))
        fixed = hfjax.hessian_free(f, solver="auto")
        same, other = fixed.update(
            grads, state._replace(scales=None), params, batch=BATCH
        )
        assert other.scales is None
        return grads, updates, same, after

    tx = hfjax.hessian_free(F, solver="auto")
    params, state, step = PARAMS, tx.init(PARAMS), quick_jit(step)
    np.testing.assert_array_equal(state.scales, [1, 1])
    for count in range(3):
        grads, updates, same, after = step(params, state)
        scales = np.asarray(state.scales)
        found = [
            scales @ (values(params + e, count) - values(params - e, count)) / 2e-5
            for e in 1e-5 * np.eye(2)
        ]
        np.testing.assert_allclose(grads, found, rtol=1e-6)
        np.testing.assert_allclose(updates, same, rtol=1e-12)
        assert np.any(np.asarray(updates) != 0)
        expected = by_hand(scales, values(params, count), 0.05)
        np.testing.assert_allclose(after.scales, expected, rtol=1e-10)
        assert np.abs(np.log(expected / scales)).min() > 1e-3
        params, state = params + updates, after


def test_a_fit_that_goes_on_from_its_state_is_the_whole_fit():
    whole = hfjax.fit(F, PARAMS, BATCH, updates=4)
    half = hfjax.fit(F, PARAMS, BATCH, updates=2)
    kept = jax.tree.map(
        np.array, (half.params, half.state)
    )  # As a checkpoint has them.
    more = hfjax.fit(F, kept[0], BATCH, updates=2, state=kept[1])
    jax.tree.map(
        np.testing.assert_array_equal,
        (more.params, more.state),
        (whole.params, whole.state),
    )
    assert not np.allclose(whole.state.scales, half.state.scales, rtol=1e-4)
    expected = F.at(4, whole.state.scales).value(whole.params, BATCH)
    np.testing.assert_allclose(whole.value, expected, rtol=1e-12)


@pytest.mark.slow
def test_a_run_inside_of_scan_is_the_loop():
    tx = hfjax.hessian_free(F, solver="auto")

    def step(carry, _):
        params, state = carry
        now = F.at(state.count, state.scales)
        _, grads = now.value_and_grad(params, BATCH)
        updates, state = tx.update(grads, state, params, batch=BATCH)
        return (params + updates, state), state.scales

    @quick_jit
    def run(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=3)

    (params, state), seen = run(PARAMS)
    fit = hfjax.fit(F, PARAMS, BATCH, updates=3, optimizer=tx)
    np.testing.assert_allclose(params, fit.params, rtol=1e-9)
    np.testing.assert_allclose(seen[-1], fit.state.scales, rtol=1e-9)
    np.testing.assert_array_equal(seen[-1], state.scales)


@pytest.mark.slow
@needs_devices
def test_devices_balance_terms_alike():
    def scales_of(axis_name, params, batch):
        one = PROBLEM.objective(axis_name=axis_name)
        f = weighted_sum([(1.0, one), (3.0, penalty(norm))], balance=0.2)
        tx = hfjax.hessian_free(f, preconditioner=None)
        state, data = tx.init(params), (batch, ())
        for _ in range(2):
            now = f.at(state.count, state.scales)
            _, grads = now.value_and_grad(params, data)
            updates, state = tx.update(grads, state, params, batch=data)
            params = jax.tree.map(jnp.add, params, updates)
        return state.scales

    def norm(params):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

    alone = quick_jit(lambda: scales_of(None, PROBLEM.params, PROBLEM.batch))()
    mapped = by_shard_map(
        lambda params, batch, _: scales_of("cases", params, batch), check_vma=True
    )
    assert np.abs(np.log(alone)).min() > 1e-2
    np.testing.assert_allclose(mapped, alone, rtol=1e-8)


def test_scales_of_any_sum_may_be_given_and_those_of_a_balanced_one_must_be():
    given = np.array([0.5, 3.0])
    for f in (weighted_sum(PARTS), F):
        value = f.at(3, given).value(PARAMS, BATCH)
        np.testing.assert_allclose(value, given @ values(PARAMS, 3), rtol=1e-12)
    # As under `optax.masked`, where each part is changed once the scales are known.
    changed = each(F.at(3, given), lambda f: f)
    after = next_scales(changed, jnp.asarray(given), PARAMS, BATCH)
    np.testing.assert_allclose(
        after, by_hand(given, values(PARAMS, 3), 0.05), rtol=1e-12
    )
    with pytest.raises(TypeError, match=r"schedule, or balanced: say when"):
        F.value(PARAMS, BATCH)
    with pytest.raises(TypeError, match=r"terms of this sum are balanced"):
        F.at(0)
    with pytest.raises(ValueError, match=r"must be 2 numbers.*shape \(3,\)"):
        F.at(0, [1.0, 2.0, 3.0])
    with pytest.raises(TypeError, match=r"`scales` are for a weighted sum"):
        TERMS[0].at(0, [1.0])


def test_what_cannot_be_balanced_is_refused():
    with pytest.raises(ValueError, match=r"`parts\[1\]` is balanced itself"):
        weighted_sum([(1.0, TERMS[0]), (1.0, F)])
    with pytest.raises(ValueError, match="`balance` must be at least 0"):
        weighted_sum(PARTS, balance=1.5)
    tx, state = hfjax.hessian_free(F), hfjax.hessian_free(TERMS[0]).init(PARAMS)
    with pytest.raises(ValueError, match=r"`state.scales` is of another objective"):
        tx.update(PARAMS, state, PARAMS, batch=BATCH)


@pytest.mark.slow
def test_a_set_up_with_balanced_terms_is_checked_as_it_starts():
    tx = hfjax.hessian_free(F)
    _, grads = F.at(0, [1.0, 1.0]).value_and_grad(PARAMS, BATCH)
    assert hfjax.verify.check(F, tx, PARAMS, BATCH, grads) == []
    (fault,) = hfjax.verify.check(F, tx, PARAMS, BATCH, 2 * grads)
    assert "not the gradient of this sum" in fault
