"""The curvature of an update may be of a part of the cases, which grows by itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import counted_jit, flat, programs, quick_jit
from training import one_update

import hfjax
from hfjax.curvature.forms import quadratic_form
from hfjax.update.sampling import growing

CASES, PARTS, DAMPING = 64, 16, 3.0
RNG = np.random.default_rng(5)
X = jnp.asarray(RNG.standard_normal((CASES, 6)))
T = jnp.asarray(RNG.standard_normal((CASES, 1)))
START = jnp.asarray(RNG.standard_normal((6, 1)))
BATCH = (X, T)
OBJECTIVE = hfjax.Objective(lambda w, x: x @ w, hfjax.losses.squared_error())
FEW = growing(4)


def optimizer(objective=OBJECTIVE, **options):
    solver = hfjax.cg.conjugate_gradient(stopping=None, max_iterations=6)
    return hfjax.hessian_free(
        objective,
        **{
            "damping": hfjax.damping.constant(DAMPING),
            "solver": solver,
            "preconditioner": None,
            "backtracking": None,
            "line_search": None,
            "sampling": FEW,
            **options,
        },
    )


def state_of(tx, **sample):
    state = tx.init(START)
    given = {name: jnp.asarray(x, float) for name, x in sample.items()}
    if "turn" in given:
        given["turn"] = given["turn"].astype(jnp.int32)
    return state._replace(sample=state.sample._replace(**given))


def update(tx, state, batch=BATCH, **extra):
    return one_update(OBJECTIVE, tx, START, batch, state=state, **extra)


def gram(numbers):
    """Return the curvature of microbatches: case i is in number i mod 16."""
    own = np.asarray(X)[np.isin(np.arange(CASES) % PARTS, numbers)]
    return own.T @ own / len(own)


def gradient():
    x, t, w = (np.asarray(a) for a in (X, T, START))
    return x.T @ (x @ w - t) / CASES


@pytest.mark.parametrize(
    ("share", "turn", "before", "numbers", "fresh"),
    [
        (0.0, 0, 0.75, [0], [1]),
        (0.125, 15, 0.1, [15, 0], [1, 2]),
        (0.75, 2, 0.1, [*range(2, 14)], [14, 15, 0, 1]),
    ],
)
def test_the_step_is_that_of_the_sample_and_its_agreement_that_with_fresh_cases(
    share, turn, before, numbers, fresh
):
    tx = optimizer()
    steps, state = update(tx, state_of(tx, share=share, turn=turn, agreement=before))
    # Float64, dense: (B_S + λI) δ = −∇f with the gradient of all cases.
    delta = np.linalg.solve(gram(numbers) + DAMPING * np.eye(6), -gradient())
    np.testing.assert_allclose(steps, delta, rtol=1e-8)
    q = (delta.T @ gram(numbers) @ delta) / (delta.T @ gram(fresh) @ delta)
    mean = 0.7 * before + 0.3 * q.item()
    grows = mean < 0.5
    assert grows == (before == 0.1)
    found = state.sample.agreement
    np.testing.assert_allclose(found, -1 if grows else mean, rtol=1e-8)
    taken = len(numbers) / PARTS
    assert state.sample.share == min(1, 2 * taken if grows else taken)
    assert state.sample.turn == (turn + len(numbers)) % PARTS


def test_an_agreement_that_is_not_asked_for_keeps_the_sample_small():
    tx = optimizer(sampling=growing(4, agreement=0.0))
    state = tx.init(START)
    for _ in range(4):
        _, state = update(tx, state)
    assert state.sample.share == 1 / PARTS


def test_all_cases_make_the_update_of_no_sampling():
    tx, whole = optimizer(), optimizer(sampling=None)
    steps, state = update(tx, state_of(tx, share=1.0, agreement=0.5))
    truth, other = update(whole, whole.init(START))
    np.testing.assert_allclose(steps, truth, rtol=1e-10)
    assert state.sample.share == 1.0
    assert state.sample.agreement == 0.5
    assert other.sample is None


@pytest.mark.parametrize("case", ["few", "eval_batch"])
def test_a_batch_that_is_small_or_divided_already_is_taken_as_a_whole(case):
    batch = (X[:15], T[:15]) if case == "few" else BATCH
    extra = {"eval_batch": BATCH} if case == "eval_batch" else {}
    tx, whole = optimizer(), optimizer(sampling=None)
    steps, state = update(tx, tx.init(START), batch, **extra)
    truth, _ = update(whole, whole.init(START), batch, **extra)
    np.testing.assert_allclose(steps, truth, rtol=1e-12)
    assert state.sample.share == 0.0


def test_a_batch_that_is_little_work_is_taken_as_a_whole():
    # 64 cases times 6 parameters.
    for least, taken in ((CASES * 6, 1 / PARTS), (CASES * 6 + 1, 0)):
        tx = optimizer(sampling=growing(4, least_work=least))
        assert update(tx, tx.init(START))[1].sample.share == taken


def test_weights_and_microbatches_of_the_user_are_kept():
    # Of two cases in a microbatch, three make the sixteenth of a batch or more.
    weights = jnp.linspace(0.5, 2.0, CASES)
    objective = hfjax.Objective(
        lambda w, x: x @ w, hfjax.losses.squared_error(), microbatch_size=2
    )
    tx = optimizer(objective)
    steps, state = one_update(
        objective, tx, START, (*BATCH, weights), state=tx.init(START)
    )
    own = np.arange(CASES) % 32 < 2
    x, w = np.asarray(X), np.asarray(weights)
    b = (x[own] * w[own, None]).T @ x[own] / w[own].sum()
    g = x.T @ (w[:, None] * (x @ np.asarray(START) - np.asarray(T))) / w.sum()
    delta = np.linalg.solve(b + DAMPING * np.eye(6), -g)
    np.testing.assert_allclose(steps, delta, rtol=1e-8)
    assert state.sample.turn == 2


def test_a_rejected_update_leaves_a_sample_that_is_finite():
    tx = optimizer()
    grads = jnp.full_like(START, jnp.nan)
    _, state = update(tx, tx.init(START), grads=grads)
    assert state.info.rejection == hfjax.Rejection.NONFINITE_GRADIENT
    assert all(np.isfinite(leaf) for leaf in state.sample)
    assert state.sample.share == 1 / PARTS


def test_nothing_is_compiled_again_as_the_sample_grows():
    tx = optimizer(sampling=growing(4, agreement=1.0))

    def step(params, state):
        grads = OBJECTIVE.value_and_grad(params, BATCH)[1]
        steps, state = tx.update(grads, state, params, batch=BATCH)
        return optax.apply_updates(params, steps), state

    step, traced = counted_jit(step)
    params, state = step(START, tx.init(START))
    with programs("backend_compile") as compiled:
        for _ in range(8):
            params, state = step(params, state)
    assert state.sample.share > 1 / PARTS
    assert not compiled
    assert len(traced) == 1


def test_few_cases_run_the_model_on_few():
    runs = []

    def model_fn(w, x):
        jax.debug.callback(lambda x: runs.append(len(x)), x)
        return x @ w

    f = hfjax.Objective(model_fn, hfjax.losses.squared_error())
    tx = optimizer(f)
    step = quick_jit(lambda g, s, w: tx.update(g, s, w, batch=BATCH)[1])
    jax.block_until_ready(step(START, tx.init(START), START))
    jax.effects_barrier()
    # The sample and as many fresh cases are run in microbatches of 4, f on all of them.
    assert sorted(runs)[:2] == [4, 4]
    assert set(sorted(runs)[2:]) == {CASES}


def test_the_curvature_along_a_step_is_that_of_the_product():
    f = hfjax.Objective(
        lambda w, x: jnp.tanh(x @ w), hfjax.losses.squared_error(), weight_decay=0.3
    )

    v = jnp.cos(START)
    found = quick_jit(lambda w: quadratic_form(f, w, BATCH, v))(START)
    x, w = np.asarray(X), np.asarray(START)
    slope = 1 - np.tanh(x @ w) ** 2
    truth = np.mean((slope * (x @ np.asarray(v))) ** 2) + 0.3 * np.sum(v**2)
    np.testing.assert_allclose(found, truth, rtol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"curvature": hfjax.curvature.hessian},
        {
            "solver": hfjax.sample_space.cholesky(),
            "damping": hfjax.damping.searched(),
        },
    ],
    ids=["hessian", "exact"],
)
def test_a_sample_that_the_curvature_cannot_be_of_is_refused(options):
    with pytest.raises(ValueError, match=r"`sampling` was given, but it needs"):
        optimizer(**options)


def test_a_sum_and_a_loss_of_a_whole_batch_are_not_divided():
    loss = hfjax.losses.squared_error()
    whole = hfjax.Objective(lambda w, x: x @ w, loss, whole_batch=True)
    added = hfjax.objective.weighted_sum([(1.0, OBJECTIVE)])
    for f in (whole, added):
        with pytest.raises(ValueError, match="which cannot be divided"):
            optimizer(f)
        tx = optimizer(f, sampling="auto")
        assert flat(tx.init(START).sample).size == 3


def test_a_state_of_another_sampling_and_bad_options_are_refused():
    tx, none = optimizer(), optimizer(sampling=None)
    with pytest.raises(ValueError, match=r"`state.sample` is of another `sampling`"):
        update(tx, none.init(START))
    with pytest.raises(ValueError, match="`agreement` must be"):
        growing(agreement=1.5)
    with pytest.raises(TypeError, match="`smallest` must be a Python integer"):
        growing(2.5)
    with pytest.raises(
        TypeError, match="`sampling` must be a `Sampling`, got function"
    ):
        optimizer(sampling=growing)


def test_a_sample_without_curvature_grows_and_fresh_cases_without_weight_say_nothing():
    # Microbatch 0 has inputs of 0, and so a curvature of 0: the worst agreement.
    x = jnp.where(jnp.arange(CASES)[:, None] % PARTS == 0, 0, X)
    _, state = update(optimizer(), optimizer().init(START), (x, T))
    assert state.sample.share == 2 / PARTS
    # All cases are taken: there are no others, and weight decay is no curvature of any.
    decayed = hfjax.Objective(
        lambda w, x: x @ w, hfjax.losses.squared_error(), weight_decay=0.3
    )
    tx = optimizer(decayed)
    state = state_of(tx, share=1.0, agreement=0.75)
    _, state = one_update(decayed, tx, START, BATCH, state=state)
    assert state.sample.agreement == 0.75


def test_a_sample_is_of_microbatches_with_weight():
    # Every third case has one: microbatches 0 to 15 all do. Then one in four does.
    weights = jnp.where(jnp.arange(CASES) % 4 == 1, 1.0, 0.0)
    tx = optimizer()
    steps, state = update(tx, state_of(tx, turn=1, agreement=-1), (*BATCH, weights))
    own = np.isin(np.arange(CASES) % PARTS, [5])  # Of 1, 5, 9 and 13, the second.
    x, every = np.asarray(X), np.asarray(weights) > 0
    b = x[own].T @ x[own] / own.sum()
    residuals = (x @ np.asarray(START) - np.asarray(T))[every]
    delta = np.linalg.solve(
        b + DAMPING * np.eye(6), -x[every].T @ residuals / every.sum()
    )
    np.testing.assert_allclose(steps, delta, rtol=1e-8)
    assert state.sample.share == 1 / 4


def test_positions_with_weights_are_sampled_with_their_cases():
    x = jnp.asarray(RNG.standard_normal((CASES, 3, 6)))
    t = jnp.asarray(RNG.standard_normal((CASES, 3)))
    weights = jnp.asarray(RNG.uniform(0.5, 1.5, (CASES, 3)))
    f = hfjax.Objective(lambda w, x: (x @ w)[..., 0], hfjax.losses.squared_error())
    for microbatch in (None, 2):
        own = dataclasses.replace(f, microbatch_size=microbatch)
        tx = optimizer(own)
        steps, _ = one_update(own, tx, START, (x, t, weights), state=tx.init(START))
        rows, shares = np.asarray(x), np.asarray(weights)
        taken = np.arange(CASES) % (PARTS if microbatch is None else 32) < (
            1 if microbatch is None else 2
        )
        b = np.einsum("npi,np,npj->ij", rows[taken], shares[taken], rows[taken])
        residuals = (rows @ np.asarray(START))[..., 0] - np.asarray(t)
        g = np.einsum("npi,np,np->i", rows, shares, residuals)[:, None] / shares.sum()
        b = b / shares[taken].sum() + DAMPING * np.eye(6)
        np.testing.assert_allclose(steps, np.linalg.solve(b, -g), rtol=1e-8)


def test_a_state_keeps_its_types_whatever_those_of_the_data():
    params = START.astype(jnp.float32)
    tx = optimizer()

    def step(carry, _):
        params, state = carry
        grads = OBJECTIVE.value_and_grad(params, BATCH)[1]
        steps, state = tx.update(grads, state, params, batch=BATCH)
        return (optax.apply_updates(params, steps), state), None

    # A scan refuses a state of another type.
    (_, state), _ = quick_jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=2))(
        params
    )
    assert state.sample.agreement.dtype == jnp.float32


def test_strict_promotion_takes_samples_and_microbatches_with_weights():
    weights = jnp.linspace(0.5, 2.0, CASES)
    f = dataclasses.replace(OBJECTIVE, microbatch_size=8)
    tx = optimizer()
    with jax.numpy_dtype_promotion("strict"):
        update(tx, tx.init(START))
        quick_jit(f.value_and_grad)(START, (*BATCH, weights))
        quick_jit(f.value)(START, (*BATCH, weights))


@pytest.mark.parametrize("partial", [True, False])
def test_longer_steps_cost_nothing_while_curvature_is_of_a_part(partial):
    f = hfjax.Objective(lambda w, x: jnp.sin(2 * x @ w), hfjax.losses.squared_error())
    start, steps = 0.3 * jax.random.normal(jax.random.key(0), (6, 1)), []
    for sacrifice in (0.0, 0.5):
        tx = optimizer(
            f,
            damping=hfjax.damping.searched(sacrifice=sacrifice),
            backtracking="auto",
        )
        # A share of 1 is all cases: then a longer step may give up half of the decrease.
        state = state_of(tx, share=0.0 if partial else 1.0)
        state = state._replace(damping=jnp.float64(1.0))
        grads = f.value_and_grad(start, BATCH)[1]
        steps.append(
            quick_jit(functools.partial(tx.update, batch=BATCH))(grads, state, start)[0]
        )
    assert np.allclose(*steps) == partial
