"""P⁻¹∇f as a transformation of Optax, against factors that are averaged in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec
from mapped import needs_devices
from reference import counted_jit, flat, quick_jit

import hfjax
from hfjax.preconditioners import diagonal, kronecker

CASES, DECAY, SHARE = 12, 0.4, 0.1
RNG = np.random.default_rng(11)
SCALES = np.array([1.0, 3.0, 0.2])
X = RNG.standard_normal((4, CASES, 3)) * SCALES
T = RNG.standard_normal((4, CASES, 1))
BATCHES = [(jnp.asarray(x), jnp.asarray(t)) for x, t in zip(X, T, strict=True)]
START = jnp.asarray(RNG.standard_normal((3, 1)))
OBJECTIVE = hfjax.Objective(lambda w, x: x @ w, hfjax.losses.squared_error())


def gradient(w, n, beta=0.0):
    return X[n].T @ (X[n] @ w - T[n]) / CASES + beta * w


def inverse(lambdas, second_moments):
    """Write P⁻¹ of one output out: Ḡ is 1, Ā the average over builds.

    The k-th build keeps min(ε, 1 − 1/k) of the average; λ is that of the last build.
    """
    mean = 0
    for k, own in enumerate(second_moments, start=1):
        kept = min(DECAY, 1 - 1 / k)
        mean = kept * mean + (1 - kept) * own
    root, a = np.sqrt(SHARE * lambdas), np.trace(mean) / len(mean)
    inputs = mean + np.sqrt(a) * root * np.eye(len(mean))
    return np.linalg.inv((1 + root / np.sqrt(a)) * inputs)


def moments(*numbers):
    return [X[n].T @ X[n] / CASES for n in numbers]


def run(tx, objective=OBJECTIVE, batches=BATCHES, start=START):
    """Return what each update gives, at parameters that move by it."""
    params, state, found = start, tx.init(start), []

    @quick_jit
    def step(params, state, batch):
        grads = objective.value_and_grad(params, batch)[1]
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, jax.tree.map(jnp.negative, updates)), (
            updates,
            state,
        )

    for batch in batches:
        params, (updates, state) = step(params, state, batch)
        found.append(updates)
    return found, state


def test_factors_are_averaged_over_builds_and_inverses_kept_in_between():
    rule = kronecker(damping_share=SHARE, decay=DECAY, interval=2)
    # λ is read by each build, here in the updates 0 and 2.
    tx = hfjax.scale_by_preconditioner(
        OBJECTIVE, preconditioner=rule, damping=lambda count: 0.5 + count
    )
    found, state = run(tx)
    first, second = inverse(0.5, moments(0)), inverse(2.5, moments(0, 2))
    w = np.asarray(START)
    for n, (p, updates) in enumerate(
        zip((first, first, second, second), found, strict=True)
    ):
        truth = p @ gradient(w, n)
        np.testing.assert_allclose(updates, truth, rtol=1e-8)
        w = w - truth
    assert state.count == 4


def test_weight_decay_is_part_of_the_damping_and_of_the_gradient():
    f = hfjax.Objective(OBJECTIVE.model_fn, OBJECTIVE.loss, weight_decay=0.3)
    rule = kronecker(damping_share=SHARE, decay=DECAY)
    tx = hfjax.scale_by_preconditioner(f, preconditioner=rule, damping=0.2)
    ((updates,), _) = run(tx, f, BATCHES[:1])
    truth = inverse(0.5, moments(0)) @ gradient(np.asarray(START), 0, beta=0.3)
    np.testing.assert_allclose(updates, truth, rtol=1e-8)


@pytest.mark.parametrize("share", [0.25, 4.0])
def test_the_bound_is_on_the_length_that_p_measures(share):
    p, g = inverse(0.5, moments(0)), gradient(np.asarray(START), 0)
    length = np.sqrt(g.T @ p @ g).item()
    rule = kronecker(damping_share=SHARE, decay=DECAY)
    tx = hfjax.scale_by_preconditioner(
        OBJECTIVE,
        preconditioner=rule,
        damping=0.5,
        bound=lambda count: share * length + 0 * count,
    )
    ((updates,), _) = run(tx, batches=BATCHES[:1])
    np.testing.assert_allclose(updates, min(1, share) * p @ g, rtol=1e-8)
    u = np.asarray(updates)
    found = np.sqrt(u.T @ np.linalg.inv(p) @ u).item()
    np.testing.assert_allclose(found, min(1, share) * length, rtol=1e-8)


def test_a_zero_gradient_and_a_bound_of_zero_give_zero_and_not_nan():
    tx = hfjax.scale_by_preconditioner(OBJECTIVE, bound=lambda count: 0.0 * count)
    state = tx.init(START)
    updates, _ = tx.update(jnp.zeros_like(START), state, START, batch=BATCHES[0])
    assert not np.any(updates)


def test_a_huge_gradient_is_bounded_and_one_that_p_turns_round_is_dropped():
    rule = kronecker(damping_share=SHARE, decay=DECAY)
    tx = hfjax.scale_by_preconditioner(
        OBJECTIVE, preconditioner=rule, damping=0.5, bound=2.0
    )
    p, g = inverse(0.5, moments(0)), gradient(np.asarray(START), 0)
    huge = jnp.asarray(1e200 * g)
    updates, _ = tx.update(huge, tx.init(START), START, batch=BATCHES[0])
    truth = 2.0 * p @ g / np.sqrt(g.T @ p @ g)
    np.testing.assert_allclose(updates, truth, rtol=1e-8)
    negative = hfjax.preconditioners.custom(
        lambda objective, params, batch, damping: (
            lambda r: jax.tree.map(jnp.negative, r)
        )
    )
    tx = hfjax.scale_by_preconditioner(OBJECTIVE, preconditioner=negative, bound=1e-6)
    updates, _ = tx.update(huge, tx.init(START), START, batch=BATCHES[0])
    assert not np.any(updates)


def test_an_integer_is_a_learning_rate_and_zero_is_one_too():
    def after(rate):
        tx = hfjax.recipes.stochastic(OBJECTIVE, rate)
        grads = OBJECTIVE.value_and_grad(START, BATCHES[0])[1]
        return tx.update(grads, tx.init(START), START, batch=BATCHES[0])[0]

    np.testing.assert_array_equal(after(1), after(1.0))
    assert np.any(after(1))
    with jax.debug_nans(True):
        assert not np.any(after(0.0))


def test_the_recipe_is_momentum_of_bounded_preconditioned_gradients():
    alpha, mu, kappa, lam = 0.3, 0.8, 0.05, 0.5
    tx = hfjax.recipes.stochastic(
        OBJECTIVE,
        lambda count: alpha / (1.0 + count),
        damping=lam,
        momentum=mu,
        max_change=kappa,
        decay=DECAY,
        interval=1,
    )
    params, state = START, tx.init(START)
    w, m, bounded = np.asarray(START), np.zeros((3, 1)), []
    for n, batch in enumerate(BATCHES):
        grads = OBJECTIVE.value_and_grad(params, batch)[1]
        updates, state = tx.update(grads, state, params, batch=batch)
        params = optax.apply_updates(params, updates)
        p, g, rate = (
            inverse(lam, moments(*range(n + 1))),
            gradient(w, n),
            alpha / (1 + n),
        )
        length = rate * np.sqrt(g.T @ p @ g).item()
        bounded.append(length > np.sqrt(kappa))
        m = mu * m + min(1, np.sqrt(kappa) / length) * p @ g
        w = w - rate * m
        np.testing.assert_allclose(params, w, rtol=1e-6)
    assert len(set(bounded)) == 2  # Some are bounded and some are not.


def test_what_is_not_finite_changes_nothing_and_is_forgotten():
    tx = hfjax.scale_by_preconditioner(OBJECTIVE, preconditioner=kronecker(decay=DECAY))
    state, bad = tx.init(START), jnp.full_like(START, jnp.nan)
    updates, state = tx.update(bad, state, START, batch=BATCHES[0])
    assert not np.any(updates)
    x = BATCHES[1][0].at[0, 0].set(jnp.inf)
    fine = jnp.ones_like(START)
    _, state = tx.update(fine, state, START, batch=(x, BATCHES[1][1]))
    updates, state = tx.update(fine, state, START, batch=BATCHES[2])
    assert np.all(np.isfinite(flat(state.preconditioner)))
    assert np.all(np.isfinite(updates))
    assert np.any(updates)


def test_a_rule_without_memory_and_parameters_in_bfloat16_will_do():
    start = {"w": START.astype(jnp.bfloat16)}
    f = hfjax.Objective(lambda p, x: x @ p["w"], OBJECTIVE.loss)
    tx = hfjax.scale_by_preconditioner(
        f, preconditioner=diagonal(exponent=1.0), damping=0.5
    )
    grads = {"w": jnp.asarray(gradient(np.asarray(START), 0), jnp.bfloat16)}
    updates, state = tx.update(grads, tx.init(start), start, batch=BATCHES[0])
    assert state.preconditioner is None
    assert updates["w"].dtype == jnp.bfloat16
    g = np.asarray(grads["w"], float)
    residuals = X[0] @ np.asarray(start["w"], float) - T[0]
    fisher = np.mean((X[0] * residuals) ** 2, axis=0)[:, None]
    np.testing.assert_allclose(
        np.asarray(updates["w"], float), g / (fisher + 0.5), rtol=0.02
    )


def test_hidden_parameters_are_constants():
    def model_fn(params, x):
        return params["gain"] * (x @ params["w"])

    whole = {"gain": jnp.float64(2.0), "w": START}
    f = hfjax.Objective(model_fn, OBJECTIVE.loss)
    alone = hfjax.Objective(lambda w, x: 2.0 * (x @ w), OBJECTIVE.loss)

    def both(f):
        return hfjax.scale_by_preconditioner(f, preconditioner=kronecker(decay=0.5))

    tx = optax.partition(
        {"ours": both(f), "other": optax.set_to_zero()},
        {"gain": "other", "w": "ours"},
    )
    grads = f.value_and_grad(whole, BATCHES[0])[1]
    updates, _ = tx.update(
        grads, tx.init(whole), whole, batch=BATCHES[0], all_params=whole
    )
    ((truth,), _) = run(both(alone), alone, BATCHES[:1])
    np.testing.assert_allclose(updates["w"], truth, rtol=1e-8)
    assert not np.any(updates["gain"])


@needs_devices
def test_shards_of_a_batch_give_what_the_whole_gives():
    rule = kronecker(damping_share=SHARE, decay=DECAY, cases=None)
    make = functools.partial(
        hfjax.scale_by_preconditioner, preconditioner=rule, damping=0.5, bound=1.0
    )
    (truth,), _ = run(make(OBJECTIVE), batches=BATCHES[:1])
    f = hfjax.Objective(OBJECTIVE.model_fn, OBJECTIVE.loss, axis_name="data")
    tx, mesh = make(f), jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def step(params, batch):
        grads = f.value_and_grad(params, batch)[1]
        return tx.update(grads, tx.init(params), params, batch=batch)[0]

    everywhere, shard = PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(everywhere, shard), out_specs=everywhere
    )
    found = quick_jit(mapped)(START, BATCHES[0])
    np.testing.assert_allclose(found, truth, rtol=1e-8)


def test_an_update_is_compiled_once_for_all_batches():
    tx = hfjax.recipes.stochastic(OBJECTIVE, interval=2)
    step, traced = counted_jit(lambda g, s, p, batch: tx.update(g, s, p, batch=batch))
    state = tx.init(START)
    for batch in BATCHES:
        _, state = step(jnp.ones_like(START), state, START, batch)
    assert len(traced) == 1


def test_what_does_not_fit_is_refused_with_a_cure():
    tx = hfjax.scale_by_preconditioner(OBJECTIVE)
    state, g = tx.init(START), jnp.ones_like(START)
    with pytest.raises(TypeError, match=r"`batch` is missing: call"):
        tx.update(g, state, START)
    with pytest.raises(TypeError, match=r"`params` is missing: call"):
        tx.update(g, state, batch=BATCHES[0])
    with pytest.raises(TypeError, match=r"`state` must be a .* got tuple"):
        tx.update(g, (state,), START, batch=BATCHES[0])
    other = hfjax.scale_by_preconditioner(OBJECTIVE, preconditioner=kronecker())
    with pytest.raises(ValueError, match="is of another preconditioner"):
        other.update(g, state, START, batch=BATCHES[0])
    with pytest.raises(TypeError, match=r"`objective` must be"):
        hfjax.scale_by_preconditioner(lambda params: params)
    with pytest.raises(TypeError, match=r"`preconditioner` must be a rule .* got str"):
        hfjax.scale_by_preconditioner(OBJECTIVE, preconditioner="kronecker")
    with pytest.raises(ValueError, match="`damping` must be"):
        hfjax.scale_by_preconditioner(OBJECTIVE, damping=-1.0)
    with pytest.raises(ValueError, match="`bound` must be"):
        hfjax.scale_by_preconditioner(OBJECTIVE, bound=0.0)
    with pytest.raises(ValueError, match="`max_change` must be"):
        hfjax.recipes.stochastic(OBJECTIVE, max_change=0.0)
    with pytest.raises(ValueError, match="`momentum` must be"):
        hfjax.recipes.stochastic(OBJECTIVE, momentum=1.5)
    balanced = hfjax.objective.weighted_sum([(1.0, OBJECTIVE)] * 2, balance=0.1)
    with pytest.raises(ValueError, match="cannot balance the terms"):
        hfjax.scale_by_preconditioner(balanced)
