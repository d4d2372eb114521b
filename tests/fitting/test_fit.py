"""Runs of any optimizer, against a loop that is written out."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from reference import assert_close

import hfjax
from hfjax.training import _progress
from hfjax.training.fit import Reason

F64 = jnp.float64
X = jax.random.normal(jax.random.key(0), (8, 3), F64)
BATCH = (X, jnp.sin(X @ jnp.ones((3, 2), F64)))
PARAMS = {"w": jnp.full((3, 2), 0.1, F64), "b": jnp.zeros(2, F64)}
ADAM = optax.adam(0.05)
HALVES = [jax.tree.map(lambda x: x[:4], BATCH), jax.tree.map(lambda x: x[4:], BATCH)]


def model_fn(params, x):
    return x @ params["w"] + params["b"][None]


OBJECTIVE = hfjax.Objective(
    model_fn,
    hfjax.losses.squared_error(),
    weight_decay=optax.exponential_decay(0.1, 1, 0.5),
)


def written_out(batches, params=PARAMS, first=0):
    """Return parameters, f before each update, and norms of gradients and steps."""
    state, rows = ADAM.init(params), []
    for count, batch in enumerate(batches):
        value, grads = OBJECTIVE.at(first + count).value_and_grad(params, batch)
        step, state = ADAM.update(grads, state)
        params = optax.apply_updates(params, step)
        norms = optax.tree.norm(grads), np.nan, optax.tree.norm(step)
        rows.append((value, *norms, np.nan))
    return params, np.array(rows).T


def fit(batch=BATCH, **options):
    options = {"optimizer": ADAM, "updates": 6, "progress": False} | options
    return hfjax.fit(OBJECTIVE, options.pop("params", PARAMS), batch, **options)


def test_a_run_is_the_loop_written_out():
    found, (params, rows) = fit(), written_out([BATCH] * 6)
    assert_close(found.params, params, rtol=1e-7)
    np.testing.assert_allclose(found.history, rows, rtol=1e-7)
    value = OBJECTIVE.at(6).value(params, BATCH)
    np.testing.assert_allclose(found.value, value, rtol=1e-7)
    assert found.reason is Reason.UPDATES


def test_batches_are_taken_in_turn_for_as_long_as_there_are_any():
    params, rows = written_out([*HALVES, *HALVES, *HALVES])
    for batches in (HALVES * 3, iter(HALVES * 9), (HALVES[k % 2] for k in range(9))):
        # A list is a batch, that of a sum.
        found = fit(iter(batches))
        assert_close(found.params, params, rtol=1e-7)
        np.testing.assert_allclose(found.history, rows, rtol=1e-7)
    few = fit(iter(HALVES))
    assert len(few.history.value) == 2
    assert few.reason is Reason.UPDATES

    class Loader:
        def __iter__(self):
            return iter(HALVES)

    assert_close(fit(Loader()).params, params, rtol=1e-7)


def test_an_interrupted_run_goes_on_with_its_schedules(monkeypatch):
    monkeypatch.setattr(_progress, "_EVERY", 0.0)
    lines, rows = [], []

    def callback(row):
        rows.append(row)
        return row["update"] == 2

    part = fit(callback=callback, progress=lines.append)
    assert part.reason is Reason.CALLBACK
    assert [row["update"] for row in rows] == [1, 2]
    assert_close(rows[-1]["params"], part.params, rtol=0)
    assert [line.split()[1] for line in lines] == ["1", "2", "2"]
    assert lines[-1].endswith("  The callback ended the run.")
    whole = fit()
    rest = fit(params=part.params, state=part.state, updates=4)
    assert_close((rest.params, rest.value), (whole.params, whole.value), rtol=1e-7)
    np.testing.assert_allclose(rest.history, np.array(whole.history)[:, 2:], rtol=1e-7)


def test_a_run_in_float32_goes_on_in_float64():
    objective = hfjax.Objective(
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None]), hfjax.losses.squared_error()
    )
    batch, tx = (X, model_fn(PARAMS, X)), hfjax.hessian_free(objective, solver="auto")
    options = {"optimizer": tx, "progress": False}
    narrow = optax.tree.cast((PARAMS, batch), jnp.float32)
    low = hfjax.fit(objective, *narrow, updates=10, **options)
    params = optax.tree.cast(low.params, F64)
    state = optax.tree.cast_like(low.state, tx.init(params))
    cast, followed = (
        hfjax.fit(objective, params, batch, updates=10, state=state, **options)
        for state in (state, low.state)
    )
    for run in (cast, followed):
        dtypes = jax.tree.map(lambda x: x.dtype, (run.params, run.state))
        assert dtypes == jax.tree.map(lambda x: x.dtype, (params, state))
    assert_close(cast.params, followed.params, rtol=1e-14)
    assert int(cast.state.count) == 20
    # Float32 cannot see what float64 still gains.
    best = hfjax.fit(objective, PARAMS, batch, updates=30, **options)
    gap_before = objective.value(params, batch) - best.value
    assert cast.value - best.value < 1e-3 * gap_before


def test_progress_goes_to_the_log_and_a_short_run_says_nothing(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="hfjax")
    fit(progress=True)
    assert not caplog.records
    monkeypatch.setattr(_progress, "_EVERY", 0.0)
    fit(progress=False)
    assert not caplog.records
    fit(progress=True)
    assert len(caplog.messages) == 7
    assert caplog.messages[-1].endswith("All updates were made.")


def test_a_run_ends_when_f_has_stopped_falling():
    done = fit(updates=400, tolerance=1e-3)
    assert done.reason is Reason.VALUE
    values = np.asarray(done.history.value)
    assert 11 < len(values) < 400
    kept = [min(values[:n]) for n in range(1, len(values) + 1)]
    slow = [kept[n - 10] - kept[n] <= 1e-3 * kept[n] for n in range(10, len(kept))]
    assert slow == [False] * (len(slow) - 1) + [True]


def test_what_cannot_be_run_is_refused_with_a_sentence():
    def refused(kind, match, batch=BATCH, **options):
        with pytest.raises(kind, match=match):
            fit(batch, **options)

    refused(TypeError, "`batch` must be .inputs, targets.", 3.0)
    refused(TypeError, "iterable of such batches, got float64", X)
    refused(ValueError, "has no batches", iter([]))
    refused(ValueError, "has several", iter(HALVES), tolerance=0.0)
    refused(ValueError, "`tolerance` must be at least 0", tolerance=-1.0)
    refused(ValueError, "`updates` must be at least 1", updates=0)
    refused(TypeError, "must be a gradient transformation, got int", optimizer=3)
    refused(TypeError, "`callback` must be a function", callback=3)
    bad = PARAMS | {"b": jnp.array([0.0, jnp.nan])}
    refused(ValueError, "not finite at the start: nan", params=bad)
    with pytest.raises(TypeError, match="`objective` must be"):
        hfjax.fit(model_fn, PARAMS, BATCH)


def test_a_run_that_diverges_says_so():
    found = fit(optimizer=optax.sgd(1e150))
    assert found.reason is Reason.NONFINITE
    assert 1 < len(found.history.value) < 6


@pytest.mark.slow
def test_the_default_is_the_hessian_free_optimizer():
    tx = hfjax.hessian_free(OBJECTIVE)
    params, state = PARAMS, tx.init(PARAMS)
    for count in range(3):
        params, state = training.train_step(
            OBJECTIVE.at(count), tx, params, state, BATCH
        )
    found = fit(optimizer=None, updates=3)
    assert_close(found.params, params, rtol=1e-7)
    assert found.history.damping[-1] == state.damping
    np.testing.assert_allclose(
        found.history.step[-1], state.info.update_norm, rtol=1e-7
    )


@pytest.mark.slow
def test_an_optimizer_that_searches_along_a_line_is_given_f():
    found = fit(optimizer=optax.lbfgs(), updates=30)
    assert found.value < 0.9 * fit().value
    assert np.all(np.isfinite(found.history.value))
