"""One run of CG solved again for other λ, the search among them, and who asks for it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from problems import layers, mlp, normal
from reference import model, quick_jit

import hfjax
from hfjax import backtracking, cg, damping, iterates, stopping
from hfjax.globalization.backtracking import Before
from hfjax.solvers._subspace import subspace
from hfjax.solvers.stopping import Progress

RNG = np.random.default_rng(0)
SQUARED = hfjax.losses.squared_error()
N, DAMPING = 12, 0.3
ROOT = RNG.standard_normal((N, N)) * np.geomspace(0.1, 3, N)
B = ROOT @ ROOT.T / N
RHS = RNG.standard_normal(N)
START = 0.3 * RNG.standard_normal(N)
P = np.diag(np.diag(B)) + 0.1 * np.ones((N, N)) + 0.2 * np.eye(N)


@functools.partial(quick_jit, static_argnames=("keep", "most", "warm", "scaled"))
def solved(keep, limit, most, warm, scaled):
    """Run CG on B + λI from zero or not, with P or not; return the subspace, too."""

    def split(x):
        return {"a": x[:5].reshape(5, 1), "b": x[5:]}

    def joined(tree):
        return jnp.concatenate([tree["a"][:, 0], tree["b"]])

    matrix = jnp.asarray(B + DAMPING * np.eye(N))
    inverse = jnp.asarray(np.linalg.inv(P))
    b = split(jnp.asarray(RHS))
    run = cg.solve(
        lambda v: split(matrix @ joined(v)),
        b,
        x0=split(jnp.asarray(START)) if warm else None,
        preconditioner=(lambda r: split(inverse @ joined(r))) if scaled else None,
        max_iterations=most,
        limit=limit,
        stopping=None,
        keep=keep,
    )
    space = subspace(run.kept, run.model_values, b, jnp.float64(DAMPING))
    steps, *models = jax.vmap(space.solve)(jnp.asarray(OTHERS))
    kept = jax.vmap(joined)(run.kept.iterates)
    return kept, run.kept.iterations, jax.vmap(joined)(steps), jnp.stack(models, -1)


OTHERS = np.array([0.0, 1e-3, 0.1, DAMPING, 1.0, 30.0, 1e4])


def lowest_in_span(vectors, damping):
    """Minimise ½xᵀ(B + λI)x − bᵀx over the span of rows, by least squares."""
    q, _ = np.linalg.qr(vectors.T)
    root = np.linalg.cholesky(q.T @ (B + damping * np.eye(N)) @ q)
    # ‖Lᵀy − L⁻¹qᵀb‖² is twice M, but for a constant.
    y = np.linalg.lstsq(root.T, np.linalg.solve(root, q.T @ RHS), rcond=None)[0]
    return q @ y


KEEPS = {
    "every": iterates.every(1),
    "grid": iterates.grid(first=1, growth=1.5),
    # As `at_most` leaves them after a long run: the seventh in the fifth slot, and so on.
    "shuffled": iterates.IterateRule(
        lambda *_: iterates._slots(7, lambda i: (3 * i + 4) % 7)
    ),
}


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_solutions_for_other_dampings_are_the_lowest_in_the_span(keep, warm, scaled):
    kept, numbers, steps, models = solved(KEEPS[keep], 7, 7, warm, scaled)
    assert np.all(numbers >= 0)
    assert len(numbers) == (6 if keep == "grid" else 7)
    assert (list(numbers) == sorted(numbers)) == (keep != "shuffled")
    for strength, step, value in zip(OTHERS, steps, models, strict=True):
        truth = lowest_in_span(np.asarray(kept), strength)
        np.testing.assert_allclose(step, truth, rtol=1e-7, atol=1e-9)
        at_own = model(B + DAMPING * np.eye(N), RHS, truth)
        undamped = model(B, RHS, truth)
        np.testing.assert_allclose(value, [at_own, undamped], rtol=1e-9)
    if not warm:  # Else the first iterate may be scaled, too.
        own = list(OTHERS).index(DAMPING)
        newest = kept[np.argmax(numbers)]
        np.testing.assert_allclose(steps[own], newest, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("warm", [False, True])
def test_slots_that_are_not_used_change_nothing(warm):
    _, numbers, *ours = solved(KEEPS["every"], 4, 9, warm, True)
    assert list(numbers) == [1, 2, 3, 4, -1, -1, -1, -1, -1]
    kept, _, *theirs = solved(KEEPS["every"], 4, 4, warm, True)
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-10)
    truth = lowest_in_span(np.asarray(kept), 1.0)
    np.testing.assert_allclose(ours[0][4], truth, rtol=1e-7)


@pytest.mark.parametrize("warm", [False, True])
def test_steps_that_are_rounding_spoil_nothing(warm):
    # Three iterations more than there are unknowns: their gains are rounding of M.
    _, numbers, steps, _ = solved(KEEPS["every"], 30, 30, warm, True)
    assert np.max(numbers) > N
    for strength, step in zip(OTHERS[2:], steps[2:], strict=True):
        truth = np.linalg.solve(B + strength * np.eye(N), RHS)
        # The last gain that counts is known to 1e-3 or so, and a part of the step.
        assert np.linalg.norm(step - truth) < 1e-5 * np.linalg.norm(truth)


LAMBDA, FACTOR = 0.5, 4.0
LOW, HIGH = -4, 8
SCALE = 1e-3
"""Of what f falls, so that M knows of it at every λ here."""
ASKED = []


def run_on(matvec, b, strength, **options):
    """Run the solver, which keeps every iterate, on a system of A = B + λI."""
    zero = jnp.zeros((), b.dtype)
    solver = cg.conjugate_gradient(stopping=None, keep=iterates.every(1), **options)
    strength = jnp.asarray(strength, b.dtype)
    given = (matvec, b, strength, jnp.int32(0), lambda x: zero, lambda x: zero, None)
    return solver.solve(cg.System(*given), None)


@functools.partial(quick_jit, static_argnames=("max_tries", "lower"))
def searched(entries, value, noise, tolerance, sacrifice, partial, max_tries, lower):
    """Search where f is a table of powers, of one unknown with B = b = 1.

    The step is 1 / (1 + λ), which tells the power of λ.
    """
    run = run_on(lambda v: (1 + LAMBDA) * v, jnp.ones(1), LAMBDA, max_iterations=3)

    def value_fn(step):
        strength = 1 / step[0] - 1
        power = jnp.round(jnp.log(strength / LAMBDA) / jnp.log(FACTOR)).astype(int)
        jax.debug.callback(lambda p: ASKED.append(int(p)), power)
        return entries[power - LOW]

    rule = damping.searched(
        factor=FACTOR,
        tolerance=tolerance,
        sacrifice=sacrifice,
        max_tries=max_tries,
        lower=lower,
    ).backtracking
    before = Before(value, noise, jnp.float64(LAMBDA), partial)
    return rule.choose(run, value_fn, before)


def scripted(
    table,
    *,
    value=1.0,
    noise=0.0,
    scale=SCALE,
    tolerance=0.01,
    sacrifice=0.0,
    partial=False,
    max_tries=8,
    lower=None,
):
    """Return the choice, and the powers that were asked for."""
    ASKED.clear()
    entries = jnp.asarray([table.get(p, jnp.nan) for p in range(LOW, HIGH + 1)])
    numbers = map(jnp.float64, (scale * value, scale * noise, tolerance, sacrifice))
    choice = searched(scale * entries, *numbers, jnp.bool(partial), max_tries, lower)
    jax.effects_barrier()
    return choice, list(ASKED)


NAN, INF = np.nan, np.inf
SEARCHES = {
    "up": ({0: 0.9, 1: 0.5, 2: 0.3, 3: 0.4}, [0, 1, 2, 3], 2, {}),
    "down": ({0: 0.5, 1: 0.6, -1: 0.3, -2: 0.2, -3: 0.25}, [0, 1, -1, -2, -3], -2, {}),
    "here": ({0: 0.5, 1: 0.6, -1: 0.6}, [0, 1, -1], 0, {}),
    "equal": (dict.fromkeys(range(6), 0.5), [0, 1, 2, 3, 4], 4, {"max_tries": 5}),
    "hardly_higher": ({0: 0.5, 1: 0.504, 2: 0.506}, [0, 1, 2], 1, {}),
    # Of the lowest, not of the last.
    "higher_each": ({0: 0.5, 1: 0.503, 2: 0.5045, 3: 0.506}, [0, 1, 2, 3], 2, {}),
    "no_tolerance": (
        {0: 0.5, 1: 0.504, -1: 0.4951, -2: 0.6},
        [0, 1, -1, -2],
        -1,
        {"tolerance": 0.0},
    ),
    "hardly_lower": ({0: 0.5, 1: 0.6, -1: 0.4951}, [0, 1, -1], 0, {}),
    "lower_enough": ({0: 0.5, 1: 0.6, -1: 0.4949, -2: 0.493}, [0, 1, -1, -2], -1, {}),
    "no_number": ({0: NAN, 1: INF, 2: -INF, 3: 0.7, 4: 0.8}, [0, 1, 2, 3, 4], 3, {}),
    "no_number_above": ({0: 0.5, 1: NAN, -1: 0.4, -2: NAN}, [0, 1, -1, -2], -1, {}),
    "none": ({0: NAN, 3: NAN}, [0, 1, 2, 3], 3, {"max_tries": 4}),
    "worse_than_before": ({0: 2.0, 1: 1.5, 2: 0.9, 3: 1.0}, [0, 1, 2, 3], 2, {}),
    "no_value_before": ({0: 0.5, 1: 0.4, 2: 0.41}, [0, 1, 2], 1, {"value": NAN}),
    "three_tries": (
        {0: 0.5, 1: 0.6, -1: 0.3, -2: 0.2},
        [0, 1, -1],
        -1,
        {"max_tries": 3},
    ),
    "one_try": ({0: 0.5, 1: 0.1}, [0], 0, {"max_tries": 1}),
    # A quarter of what f falls, from 1 to 0.6, is 0.1: of the lowest, not of the last.
    "longer_for_a_quarter": (
        {0: 0.6, 1: 0.6, -1: 0.65, -2: 0.69, -3: 0.71},
        [0, 1, -1, -2, -3],
        -2,
        {"sacrifice": 0.25},
    ),
    "a_new_lowest": (
        {0: 0.6, 1: 0.7, -1: 0.2, -2: 0.39, -3: 0.41},
        [0, 1, -1, -2, -3],
        -2,
        {"sacrifice": 0.25},
    ),
    "shorter_for_a_quarter": (
        {0: 0.6, 1: 0.49, 2: 0.37},
        [0, 1, 2],
        1,
        {"sacrifice": 0.25},
    ),
    "not_shorter_for_less": (
        {0: 0.6, 1: 0.51, -1: 0.71},
        [0, 1, -1],
        0,
        {"sacrifice": 0.25},
    ),
    "nothing_for_noise": (
        {0: 0.6, 1: 0.61, -1: 0.62},
        [0, 1, -1],
        0,
        {"sacrifice": 0.25, "noise": 0.5},
    ),
    "nothing_on_a_part": (
        {0: 0.6, 1: 0.7, -1: 0.61},
        [0, 1, -1],
        0,
        {"sacrifice": 0.25, "partial": True},
    ),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_search_asks_and_chooses(name):
    table, asked, power, options = SEARCHES[name]
    choice, ours = scripted(table, **options)
    assert sorted(ours) == sorted(asked)
    strength = LAMBDA * FACTOR**power
    np.testing.assert_allclose(choice.damping, strength, rtol=1e-12)
    step = 1 / (1 + strength)
    np.testing.assert_allclose(choice.step.direction, [step], rtol=1e-12)
    np.testing.assert_allclose(
        choice.step.model, 0.5 * (1 + LAMBDA) * step**2 - step, rtol=1e-12
    )
    seen = table[power]
    assert choice.value == (SCALE * seen if np.isfinite(seen) else INF)
    first = table[0]
    assert choice.last_value == (SCALE * first if np.isfinite(first) else INF)
    assert choice.step.iteration == 1


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_gain_that_may_be_rounding_tells_nothing_of_damping(noise):
    # 0.1 of gain, the same for all: the higher λ, unless it may be rounding.
    table = dict.fromkeys(range(-4, 9), 0.9)
    choice, _ = scripted(table, noise=noise, max_tries=4)
    expected = LAMBDA * FACTOR ** (0 if noise else 3)
    np.testing.assert_allclose(choice.damping, expected, rtol=1e-12)
    lower = {0: 0.9, 1: 0.95, -1: 0.75, -2: 0.8}
    choice, _ = scripted(lower, noise=noise)
    np.testing.assert_allclose(choice.damping, LAMBDA * FACTOR ** -(not noise))


def test_a_fall_that_the_model_knows_nothing_of_is_not_believed():
    # At 4³ λ = 32 M falls by 1 / 33 or so: of a fall of 0.5, ten times that is less.
    table = {0: 0.7, 1: 0.65, 2: 0.6, 3: 0.5, 4: 0.4}
    believed, asked = scripted(table)
    assert max(asked) > 3
    doubted, asked = scripted(table, scale=1.0)
    assert max(asked) == 3
    assert doubted.damping < believed.damping
    np.testing.assert_allclose(doubted.damping, LAMBDA * FACTOR**2, rtol=1e-12)


def test_a_step_whose_fall_is_far_from_what_m_predicts_is_not_taken():
    # M falls by (λ + ½) / (1 + λ)², with λ = 4^p / 2: the share ρ of it is scripted.
    def falling(shares):
        strengths = {p: LAMBDA * FACTOR**p for p in shares}
        promised = {p: (x + 0.5) / (1 + x) ** 2 for p, x in strengths.items()}
        return {p: 1 - share * promised[p] for p, share in shares.items()}

    # The first two steps break the promise; the third keeps it, and the fourth is better.
    values = falling({-1: 0.5, 0: 0.2, 1: 0.24, 2: 0.26, 3: 0.95})
    for lower, power in ((None, -1), (0.25, 3)):
        choice, _ = scripted(values, scale=1.0, lower=lower)
        np.testing.assert_allclose(choice.damping, LAMBDA * FACTOR**power, rtol=1e-12)
    # A lower λ lowers f, but by less than it promises.
    values = falling({-1: 0.249, 0: 0.251, 1: 0.24})
    assert values[-1] < values[0] - 0.01
    for lower, power in ((None, -1), (0.25, 0)):
        choice, _ = scripted(values, scale=1.0, lower=lower)
        np.testing.assert_allclose(choice.damping, LAMBDA * FACTOR**power, rtol=1e-12)


def test_the_best_of_a_quadratic_is_found_from_below_and_above():
    # Of f with B + λ*I for its Hessian, λ* is the best; brute force knows the powers.
    best = 0.05
    hessian = B + best * np.eye(N)
    matrix = jnp.asarray(B)

    @quick_jit
    def chosen(strength):
        b = jnp.asarray(RHS)
        matvec = lambda v: matrix @ v + strength * v  # noqa: E731
        run = run_on(matvec, b, strength, max_iterations=8)
        value_fn = lambda x: 0.5 * x @ jnp.asarray(hessian) @ x - b @ x  # noqa: E731
        rule = damping.searched(
            factor=2.0, tolerance=0.0, sacrifice=0.0, max_tries=12
        ).backtracking
        zero = jnp.float64(0)
        choice = rule.choose(run, value_fn, Before(zero, zero, strength))
        return choice, run.iterates.iterates

    for off in (2.0**-5, 0.7, 1.0, 2.0**4 * 1.1):
        strength = best * off
        choice, kept = chosen(jnp.float64(strength))
        powers = np.arange(-11, 12)
        values = [
            model(hessian, RHS, lowest_in_span(np.asarray(kept), strength * 2.0**p))
            for p in powers
        ]
        truth = strength * 2.0 ** powers[np.argmin(values)]
        np.testing.assert_allclose(choice.damping, truth, rtol=1e-10)
        assert best / 2 < truth < 2 * best
        np.testing.assert_allclose(choice.value, min(values), rtol=1e-9)


X, EVAL_X = RNG.standard_normal((2, 10, 4))
T, EVAL_T = np.stack([X, EVAL_X]) @ np.array([1.0, 0.5, -1.0, 0.0])[:, None]
T, EVAL_T = np.stack([T, EVAL_T]) + 0.7 * RNG.standard_normal((2, 10, 1))
OBJECTIVE = hfjax.Objective(lambda p, x: x @ p, SQUARED)
SOLVER = cg.conjugate_gradient(
    max_iterations=4,
    stopping=None,
    keep=iterates.grid(first=1, growth=1.1),
    warm_start_decay=None,
)


def updated(init=0.8, data=None, **options):
    """Do one update from zero on a linear model; four iterations solve it."""
    tx = hfjax.hessian_free(
        OBJECTIVE,
        damping=hfjax.damping.searched(init=init, **options),
        solver=SOLVER,
        preconditioner=None,
    )
    batch = (jnp.asarray(X), jnp.asarray(T))
    data = (jnp.asarray(EVAL_X), jnp.asarray(EVAL_T)) if data is None else data
    return training.one_update(OBJECTIVE, tx, jnp.zeros((4, 1)), batch, eval_batch=data)


def dense_search(init, rows=slice(None), factor=4.0, tolerance=0.01, tries=8):
    """Search as the docstring has it, over dense solutions; return λ and the step."""
    curvature, b = X.T @ X / 10, X.T @ T / 10
    x, t = EVAL_X[rows], EVAL_T[rows]

    def at(power):
        step = np.linalg.solve(curvature + init * factor**power * np.eye(4), b)
        return np.mean(0.5 * (x @ step - t) ** 2), step

    before = np.mean(0.5 * t**2)  # At zero.
    power, lowest, asked = 0, at(0)[0], 1
    up = True
    while asked < tries:
        following = power + (1 if up else -1)
        value, _ = at(following)
        asked += 1
        slack = tolerance * max(before - lowest, 0)
        if value <= lowest + slack if up else value < lowest - slack:
            power, lowest = following, min(value, lowest)
        elif up and power == 0:
            up = False
        else:
            break
    return init * factor**power, at(power)[1]


@pytest.mark.parametrize("init", [1e-3, 0.8, 3.0])
def test_an_update_takes_the_step_and_the_damping_of_the_search(init):
    updates, state = updated(init)
    damping, step = dense_search(init)
    assert state.info.accepted
    np.testing.assert_allclose(state.damping, damping, rtol=1e-10)
    assert state.damping != init
    np.testing.assert_allclose(updates / state.info.step_size, step, rtol=1e-7)
    # ρ is that of the model without damping, at the chosen step, on the batch.
    curvature, b = X.T @ X / 10, X.T @ T / 10
    undamped = 0.5 * (step.T @ curvature @ step)[0, 0] - (b.T @ step)[0, 0]
    np.testing.assert_allclose(state.info.predicted_change, undamped, rtol=1e-7)


@pytest.mark.parametrize("init", [1e-3, 0.8])
def test_a_part_of_the_cases_finds_the_damping(init):
    # And f(θ) that gains are a share of is that on the part.
    updates, state = updated(init, cases=3)
    damping, step = dense_search(init, slice(None, None, 3))
    np.testing.assert_allclose(state.damping, damping, rtol=1e-10)
    assert init == 0.8 or damping != dense_search(init)[0]
    taken = np.asarray(updates)
    np.testing.assert_allclose(taken / state.info.step_size, step, rtol=1e-7)
    everything = np.mean(0.5 * (EVAL_X @ taken - EVAL_T) ** 2)
    np.testing.assert_allclose(state.info.value_after, everything, rtol=1e-10)


def exponential(power, strength):
    """Return f = ½(eᵖ − 2)² at the end of the step from p = −1, and the step."""
    slope, residual = np.exp(-1.0), np.exp(-1.0) - 2
    step = -slope * residual / (slope**2 + strength * 1.3**power)
    return 0.5 * (np.exp(step - 1) - 2) ** 2, step


@pytest.mark.parametrize("own_data", [False, True])
@pytest.mark.parametrize("init", [0.32, 0.1])
def test_an_update_gives_up_half_for_a_longer_step_on_the_data_of_b(init, own_data):
    objective = hfjax.Objective(lambda p, x: jnp.exp(p) * x, SQUARED)
    tx = hfjax.hessian_free(
        objective,
        damping=damping.searched(init=init, factor=1.3, sacrifice=0.5),
        preconditioner=None,
    )
    batch = (jnp.ones((1, 1)), jnp.full((1, 1), 2.0))
    other = (jnp.ones((1, 1)), jnp.full((1, 1), 2.0)) if own_data else None
    _, state = training.one_update(
        objective, tx, jnp.float64(-1), batch, eval_batch=other
    )
    powers = np.arange(-8, 9)
    values = np.array([exponential(p, init)[0] for p in powers])
    before = exponential(0, np.inf)[0]
    least = np.min(values)
    if own_data:  # As B and f may be of different cases, the lowest f.
        expected = powers[np.argmin(values)]
    else:  # The longest step, where f rises along them; −8 is the longest.
        enough = values <= least + 0.5 * (before - least)
        expected = powers[enough][0]
        assert expected < powers[np.argmin(values)]
    np.testing.assert_allclose(state.damping, init * 1.3**expected, rtol=1e-10)


def test_a_rejected_step_raises_the_damping_by_its_rule():
    # Data on which every step is uphill.
    worse = (jnp.asarray(X), jnp.asarray(-T))
    updates, state = updated(0.8, worse)
    assert not state.info.accepted
    assert not np.any(updates)
    np.testing.assert_allclose(state.damping, 0.8 * 1.5)


def far_off(damping, curvature=hfjax.curvature.ggn):
    """Do an update of f = ½(p − 2)², whose λ is too high, or of a cosine at its top."""
    model_fn = (lambda p, x: p * x) if curvature is hfjax.curvature.ggn else COSINE
    objective = hfjax.Objective(model_fn, SQUARED)
    tx = hfjax.hessian_free(
        objective,
        damping=damping,
        curvature=curvature,
        preconditioner=None,
        solver=cg.conjugate_gradient(
            keep=iterates.grid(first=1), warm_start_decay=None
        ),
    )
    params, batch = jnp.array(0.1), (jnp.ones((1, 1)), jnp.full((1, 1), 2.0))
    return training.one_update(objective, tx, params, batch)


def COSINE(p, x):  # noqa: N802
    return jnp.sqrt(2 + 2 * jnp.cos(p)) * x + 2.0


@pytest.mark.slow
def test_the_found_damping_stays_within_the_limits_of_its_rule():
    rule = hfjax.damping.searched
    _, state = far_off(rule(init=100.0))
    assert state.damping < 1
    _, state = far_off(rule(init=100.0, minimum=50.0))
    assert state.damping == 50


@pytest.mark.slow
def test_where_curvature_is_negative_the_step_goes_downhill():
    # f = 1 + cos p near its top: the Hessian is −cos p, and λ less than that.
    rule = hfjax.damping.searched(init=1e-3)
    updates, state = far_off(rule, hfjax.curvature.hessian)
    assert state.info.accepted
    assert updates > 0


UNTOLD = [
    {"damping": hfjax.damping.constant(0.1)},
    {"damping": hfjax.damping.levenberg_marquardt()},
    {"solver": cg.conjugate_gradient(keep=iterates.best())},
    {"solver": cg.conjugate_gradient(keep=iterates.guarded())},
    {"solver": hfjax.krylov.subspace_descent(), "damping": hfjax.damping.constant(0.0)},
    {
        "solver": hfjax.trust_region.steihaug_toint(),
        "damping": hfjax.trust_region.radius(),
    },
]


def chosen_iteration(**options):
    """Say which iterate an update takes, and the next λ; f rises after the first."""
    parts = {"solver": SOLVER, "preconditioner": None} | options
    tx = hfjax.hessian_free(OBJECTIVE, line_search=None, **parts)
    batch = (jnp.asarray(X), jnp.asarray(T))
    # Data of which the first iterate already goes too far.
    data = (jnp.asarray(X), 0.3 * jnp.asarray(T))
    _, state = training.one_update(
        OBJECTIVE, tx, jnp.zeros((4, 1)), batch, eval_batch=data
    )
    info = state.info
    return int(info.chosen_iteration), int(info.cg_iterations)


@pytest.mark.parametrize("options", UNTOLD)
def test_where_other_dampings_cannot_be_told_or_looked_for_it_stops_early(options):
    early = {"backtracking": backtracking.early_stop()}
    assert chosen_iteration(**options) == chosen_iteration(**options, **early)


@pytest.mark.slow
def test_the_search_takes_the_step_of_the_whole_run_and_early_stop_an_iterate():
    searched = {"damping": hfjax.damping.searched(init=1e-3)}
    chosen, last = chosen_iteration(**searched)
    assert chosen == last
    early = {"backtracking": backtracking.early_stop()}
    chosen, last = chosen_iteration(**searched, **early)
    assert chosen < last


@pytest.mark.slow
def test_as_it_comes_the_optimizer_is_the_recipe():
    params, batch = regression("float64")
    objective = hfjax.Objective(mlp, SQUARED)
    both = hfjax.hessian_free(objective), hfjax.recipes.kronecker_factored(objective)
    ours, recipe = (training.one_update(objective, tx, params, batch) for tx in both)
    chex.assert_trees_all_equal(ours, recipe)
    after = objective.value(optax.apply_updates(params, ours[0]), batch)
    assert after < objective.value(params, batch) / 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"factor": 1.0}, ValueError, "`factor` must be above 1"),
        ({"tolerance": -0.1}, ValueError, "`tolerance` must be at least 0"),
        ({"lower": 1.5}, ValueError, "`lower` must be at least 0.0 and at most 1"),
        ({"max_tries": 0}, ValueError, "`max_tries` must be at least 1"),
        ({"max_tries": 2.0}, TypeError, "`max_tries` must be a Python integer"),
        ({"cases": 0}, ValueError, "`cases` must be at least 1"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        damping.searched(**options)


def decisions(values, **options):
    """Ask the rule after each iteration from 1; what lies beyond it is NaN."""
    rule, values = stopping.marginal(**options), jnp.asarray(values)

    def ask(j):
        seen = jnp.where(jnp.arange(len(values)) <= j, values, jnp.nan)
        return rule(Progress(j, seen, jnp.ones(()), jnp.ones(())))

    return np.asarray(quick_jit(jax.vmap(ask))(jnp.arange(1, len(values))))


J = np.arange(60.0)
GAINS = {
    "exponential": 1 - np.exp(-J / 8),
    "hyperbolic": J / (J + 5),
    "root": np.sqrt(J),
    "power": 1 - (1 + J) ** -0.3,
}


@pytest.mark.parametrize("name", GAINS)
@pytest.mark.parametrize("cost", [2.0, 6.0, 20.0])
def test_marginal_stops_just_after_the_best_rate(name, cost):
    gain = GAINS[name]
    rate = gain / (cost + J)
    stops = decisions(-gain, cost=cost, window=1)
    # The first iteration that lowers the rate follows the best one; and it goes on so.
    assert 1 + np.argmax(stops) == 1 + np.argmax(rate)
    assert np.all(stops[np.argmax(stops) :])


@pytest.mark.parametrize("window", [1, 3, 7])
def test_marginal_decides_by_its_formula(window):
    rng = np.random.default_rng(window)
    values = 0.5 - np.cumsum(rng.exponential(size=60) / np.arange(1, 61) ** 1.3)
    values[0] = 0.3  # M above 0 at first: no rate yet.
    truth = []
    for j in range(1, 60):
        k = min(window, j)
        gain = (values[j - k] - values[j]) / k
        truth.append(values[j] < 0 and gain < -values[j] / (5.0 + j))
    ours = decisions(values, cost=5.0, window=window)
    np.testing.assert_array_equal(ours, truth)
    assert 5 < sum(truth) < 58


def test_bad_options_of_marginal_are_named():
    with pytest.raises(ValueError, match="`cost` must be at least 0"):
        stopping.marginal(cost=-1.0)
    with pytest.raises(TypeError, match="`window` must be a Python integer"):
        stopping.marginal(window=2.0)


def regression(dtype):
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x.astype(dtype), layers(rng, 2, 10, 1))
    x = normal(rng, 40, 2)
    t = jnp.sin(2 * x[:, :1]) * x[:, 1:]
    return params, (x.astype(dtype), t.astype(dtype))


@functools.partial(quick_jit, static_argnames=("dtype", "updates"))
def trained(initial_damping, dtype, updates):
    params, batch = regression(dtype)
    objective = hfjax.Objective(mlp, SQUARED)
    tx = hfjax.recipes.kronecker_factored(objective, initial_damping=initial_damping)
    carry, (info, _) = training.train(objective, tx, params, batch, updates)
    return carry, info.value_before


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "fall"), [("float64", 100), ("bfloat16", 5)])
def test_recipe_trains_from_any_initial_damping(dtype, fall):
    for initial in (1e-3, 1.0, 1e3):
        (params, state), values = trained(jnp.asarray(initial, "float32"), dtype, 25)
        assert np.all(np.diff(values) <= 0)
        assert values[-1] < values[0] / fall, (initial, values)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        assert np.isfinite(state.damping)


@pytest.mark.slow
def test_recipe_takes_injected_numbers():
    params, batch = regression("float64")
    objective = hfjax.Objective(mlp, SQUARED)
    make = functools.partial(hfjax.recipes.kronecker_factored, objective)
    tx = optax.inject_hyperparams(
        lambda initial_damping: make(initial_damping=initial_damping)
    )(initial_damping=3.0)
    updates, state = training.one_update(objective, tx, params, batch)
    after = objective.value(optax.apply_updates(params, updates), batch)
    _, values = trained(jnp.float32(3.0), "float64", 25)
    np.testing.assert_allclose(after, values[1], rtol=1e-6)
    assert np.isfinite(state.inner_state.damping)


def test_the_subspace_needs_no_memory_beside_the_iterates():
    n, slots = 20_000, 30

    def search(b):
        matvec = lambda v: jnp.arange(1.0, n + 1, dtype=v.dtype) * v  # noqa: E731
        run = run_on(matvec, b, 1.0, max_iterations=slots)
        value = jnp.zeros((), b.dtype)
        rule = damping.searched().backtracking
        before = Before(value, value, value + 1)
        return rule.choose(run, lambda x: jnp.sum(x**2), before).step.direction

    b = jax.ShapeDtypeStruct((n,), jnp.float64)
    memory = quick_jit(search).lower(b).compile().memory_analysis()
    # A vector of each slot, and some of conjugate gradients' own.
    assert slots < memory.temp_size_in_bytes / (8 * n) < 1.5 * slots


def test_the_search_for_damping_goes_with_a_warm_start():
    """A run from the last direction is in a loop, of which everything is an array."""
    objective = hfjax.Objective(lambda p, x: x @ p, SQUARED)
    tx = hfjax.hessian_free(
        objective, solver=cg.conjugate_gradient(warm_start_decay=0.9, max_iterations=3)
    )
    params, batch = jnp.zeros((1, 1)), (jnp.ones((2, 1)), jnp.ones((2, 1)))
    jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, batch=batch), params)
