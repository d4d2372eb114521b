"""What `fit` offers a training loop: bars, rows, validation, checkpoints, monitoring."""

import builtins
import contextlib
import functools
import io
import pathlib
import re
import sys
import types

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reference import assert_close

import hfjax
from hfjax.training import _checkpoint, _progress
from hfjax.training.fit import History, Reason

F64 = jnp.float64
X = jax.random.normal(jax.random.key(0), (8, 3), F64)
BATCH = (X, jnp.sin(X @ jnp.ones((3, 2), F64)))
OTHER = (X[:4], -BATCH[1][:4])
PARAMS = {"w": jnp.full((3, 2), 0.1, F64), "b": jnp.zeros(2, F64)}
ADAM = optax.adam(0.05)
HALVES = [jax.tree.map(lambda x: x[:4], BATCH), jax.tree.map(lambda x: x[4:], BATCH)]
OBJECTIVE = hfjax.Objective(
    lambda p, x: x @ p["w"] + p["b"][None], hfjax.losses.squared_error()
)


def fit(batch=BATCH, **options):
    options = {"optimizer": ADAM, "updates": 6, "progress": False} | options
    return hfjax.fit(OBJECTIVE, options.pop("params", PARAMS), batch, **options)


@functools.cache
def hessian_free():
    return hfjax.hessian_free(
        OBJECTIVE, solver=hfjax.sample_space.cholesky(), preconditioner=None
    )


def as_terminal(monkeypatch):
    """Let the output go to a terminal, and return what is written there."""
    file = io.StringIO()
    file.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(rich, "_console", None)  # Made anew, for this terminal.
    return file


def test_a_bar_is_drawn_in_a_terminal_and_nothing_in_a_pipe(monkeypatch, capfd):
    terminal = as_terminal(monkeypatch)
    fit(progress=True)
    words = terminal.getvalue()
    assert "6/6" in words
    assert "All updates were made." in words
    assert "\x1b[?25h" in words  # The cursor is shown again.
    terminal.isatty = lambda: False
    terminal.truncate(0)
    fit(progress=True)
    assert not terminal.getvalue().strip("\0")
    assert capfd.readouterr() == ("", "")


def test_a_callback_ends_a_run_by_true_of_python_or_of_numpy():
    for true in (True, np.True_):
        found = fit(callback=lambda row, true=true: true)
        assert found.reason is Reason.CALLBACK
        assert len(found.history.value) == 1
    assert fit(callback=lambda row: 1).reason is Reason.UPDATES


def test_a_bar_ends_after_an_error(monkeypatch):
    terminal = as_terminal(monkeypatch)

    def callback(row):
        raise ValueError(row["update"])

    with pytest.raises(ValueError, match="1"):
        fit(progress=True, callback=callback)
    assert terminal.getvalue().count("\x1b[?25h") == 1


def test_a_notebook_gets_a_bar_of_tqdm_and_a_log_gets_lines(
    monkeypatch, capsys, caplog
):
    monkeypatch.setattr(_progress, "in_notebook", lambda: True)
    fit(progress=True)
    words = capsys.readouterr().err
    assert "6/6" in words
    assert "All updates were made." in words
    monkeypatch.setattr(_progress, "_is_installed", lambda name: False)
    fit(progress=True)
    monkeypatch.setattr(_progress, "_EVERY", 0.0)
    caplog.set_level("INFO", logger="hfjax")
    fit(progress=True)
    assert len(caplog.messages) == 7
    assert capsys.readouterr().err == ""
    with pytest.raises(ImportError, match=r"needs rich: pip install hfjax\[progress\]"):
        fit(progress="rich")
    with pytest.raises(ValueError, match="`progress` must be one of 'rich'"):
        fit(progress="bar")


def test_a_row_has_what_a_hessian_free_optimizer_says_and_a_logger_its_numbers():
    rows = []
    found = fit(optimizer=hessian_free(), updates=2, callback=rows.append)
    assert rows[-1]["reduction_ratio"] == float(found.state.info.reduction_ratio)
    assert rows[-1]["rejection"] == "none"
    taken = hfjax.diagnostics.numbers(rows[-1])
    assert {type(x) for x in taken.values()} == {float}
    assert taken["value"] == found.history.value[-1]
    assert set(rows[-1]) - set(taken) == {
        "params",
        "rejection",
        "cg_reason",
        "validation",  # NaN
    }
    # What tables and figures are made of.
    assert len(hfjax.diagnostics.table(rows).splitlines()) == 3


def test_listeners_of_jax_hear_the_numbers_of_each_update():
    heard = []

    def listener(event, value, **more):
        heard.append((event, value, more))

    jax.monitoring.register_scalar_listener(listener)
    try:
        found = fit(updates=2)
    finally:
        jax.monitoring.unregister_scalar_listener(listener)
    values = found.history.value.tolist()
    told = [(x, more) for name, x, more in heard if name == "/hfjax/value"]
    assert told == [(values[0], {"update": 1}), (values[1], {"update": 2})]
    names = {name for name, *_ in heard if name.startswith("/hfjax/")}
    assert names == {f"/hfjax/{name}" for name in ("value", "gradient", "step")}


def test_a_callback_is_closed_at_the_end_and_after_an_error():
    class Callback:
        closed = 0

        def __call__(self, row):
            if row["update"] == 2:
                raise KeyboardInterrupt

        def close(self):
            self.closed += 1

    callback = Callback()
    fit(updates=1, callback=callback)
    assert callback.closed == 1
    with pytest.raises(KeyboardInterrupt):
        fit(callback=callback)
    assert callback.closed == 2


def test_f_of_other_data_is_in_the_history():
    found = fit(validation=OTHER)
    values = [OBJECTIVE.value(fit(updates=k).params, OTHER) for k in (1, 2)]
    np.testing.assert_allclose(found.history.validation[:2], values, rtol=1e-12)
    assert_close(found.params, fit().params, rtol=0)


def test_a_run_ends_where_f_of_other_data_no_longer_falls_and_returns_the_best():
    start = fit(updates=40, batch=OTHER).params  # Too far for the other data.
    options = {"params": start, "validation": OTHER, "updates": 60}
    halfway = jax.tree.map(lambda *x: jnp.concatenate(x), BATCH, OTHER)
    whole = fit(halfway, **options, optimizer=optax.adam(0.3))
    values = np.asarray(whole.history.validation)
    assert whole.reason is Reason.UPDATES
    best = next(
        k
        for k in range(60)
        if values[k] < min(values[:k], default=9) <= 9
        and min(values[k + 1 : k + 6]) >= min(values[: k + 1])
    )
    found = fit(halfway, **options, optimizer=optax.adam(0.3), patience=5)
    assert found.reason is Reason.VALIDATION
    assert len(found.history.value) == best + 6
    assert OBJECTIVE.value(found.params, OTHER) == values[best]
    assert found.state[0].count == best + 1


class KilledError(Exception):
    """Stands for the end of the process."""


def killed_at(update):
    def callback(row):
        if row["update"] == update:
            raise KilledError

    return callback


def same_bits(found, whole):
    for one, other in zip(
        jax.tree.leaves((found.params, found.state, found.value, found.history)),
        jax.tree.leaves((whole.params, whole.state, whole.value, whole.history)),
        strict=True,
    ):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.every
@pytest.mark.parametrize("kind", ["adam", "hessian free", "batches", "float32"])
def test_a_run_that_was_killed_goes_on_with_the_same_bits(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(_checkpoint, "_EVERY", 0.0)
    monkeypatch.setattr(_checkpoint, "_SHARE", 1e9)
    options = {"updates": 7, "validation": OTHER}
    if kind == "hessian free":
        options["optimizer"] = hessian_free()
    if kind == "float32":
        cast = optax.tree.cast((PARAMS, BATCH, OTHER), jnp.float32)
        options |= {"params": cast[0], "batch": cast[1], "validation": cast[2]}
    batch = options.pop("batch", BATCH)
    batches = lambda: iter(HALVES * 4) if kind == "batches" else batch  # noqa: E731
    whole = fit(batches(), **options)
    options["checkpoint"] = tmp_path / "run"
    for update in (3, 6):  # The checkpoint is of the update before.
        with pytest.raises(KilledError):
            fit(batches(), callback=killed_at(update), **options)
    rows = []
    same_bits(fit(batches(), callback=rows.append, **options), whole)
    assert [row["update"] for row in rows] == [6, 7]
    again = fit(batches(), callback=rows.append, **options)
    same_bits(again, whole)
    assert len(rows) == 2
    assert rows[-1]["seconds"] > rows[0]["seconds"]


def test_the_best_parameters_are_in_the_checkpoint(tmp_path):
    options = {"validation": OTHER, "patience": 3, "updates": 30}
    whole = fit(**options)
    assert whole.reason is Reason.VALIDATION
    part = fit(**options | {"updates": 2}, checkpoint=tmp_path)
    assert part.reason is Reason.UPDATES
    same_bits(fit(**options, checkpoint=tmp_path), whole)


def test_a_folder_of_another_problem_is_refused(tmp_path):
    fit(checkpoint=tmp_path)

    def refused(match, batch=BATCH, **options):
        with pytest.raises(ValueError, match=match):
            fit(batch, checkpoint=tmp_path, **options)

    end = "Choose another folder, or remove this one"
    refused(rf"f at the start was \S+, and is \S+\. {end}", HALVES[0])
    refused(
        r": params\['b'\] is float64\[2\] there and float32\[2\] here",
        params=optax.tree.cast(PARAMS, jnp.float32),
    )
    refused(r": state\S+ is .* there and missing here", optimizer=optax.sgd(0.1))
    refused("fewer batches", iter(HALVES))
    (tmp_path / "other" / "3").mkdir(parents=True)
    with pytest.raises(ValueError, match="checkpoints that are not of"):
        fit(checkpoint=tmp_path / "other")


def test_without_orbax_a_checkpoint_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name.startswith("orbax"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(ImportError, match=r"pip install hfjax\[checkpoint\]"):
        fit(checkpoint=tmp_path)


def test_every_kind_of_leaf_comes_back(tmp_path):
    tree = (
        {"half": jnp.full(3, 0.1, jnp.bfloat16), "none": None, "numpy": np.arange(3)},
        (jax.random.key(3), jnp.bool_(True), jnp.int32(7), optax.EmptyState()),
        None,
    )
    columns = {"value": [np.float32(0.1), np.float32(np.nan)]}
    with _checkpoint.Checkpoints(tmp_path) as kept:
        assert kept.restore(tree) is None
        kept.save(2, _checkpoint.Saved(tree, columns, 0.5))
    with _checkpoint.Checkpoints(tmp_path) as kept:
        found = kept.restore(tree)
    assert jax.tree.structure(found.tree) == jax.tree.structure(tree)
    for one, other in zip(*map(jax.tree.leaves, (found.tree, tree)), strict=True):
        assert one.dtype == other.dtype
        assert (one == other).all()
    np.testing.assert_array_equal(found.columns["value"], columns["value"])
    assert found.columns["value"][0].dtype == np.float32
    assert found.seconds == 0.5


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_a_checkpoint_keeps_arrays_on_their_devices(tmp_path):
    mesh = jax.make_mesh(
        (2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
    )
    place = functools.partial(NamedSharding, mesh)
    params = jax.device_put(PARAMS, place(PartitionSpec()))
    batch = jax.device_put(BATCH, place(PartitionSpec("x")))
    whole = fit(batch, params=params)
    fit(batch, params=params, updates=3, checkpoint=tmp_path)
    found = fit(batch, params=params, checkpoint=tmp_path)
    same_bits(found, whole)
    assert found.params["w"].sharding == whole.params["w"].sharding


@pytest.mark.slow
def test_the_examples_of_the_page_run_and_loggers_get_numbers(
    tmp_path, monkeypatch, capsys
):
    logged = {"board": [], "wandb": [], "mlflow": []}

    def keep(name):
        return lambda numbers, step: logged[name].append((step, numbers))

    class Writer:
        def __init__(self, folder):
            assert folder

        def add_scalar(self, name, number, update):
            logged["board"].append((update, {name: number}))

    run = types.SimpleNamespace(log=keep("wandb"))
    begun = contextlib.nullcontext(run)
    fakes = {
        "tensorboardX": {"SummaryWriter": Writer},
        "wandb": {"init": lambda project: begun},
        "mlflow": {"start_run": lambda: begun, "log_metrics": keep("mlflow")},
    }
    for name, parts in fakes.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**parts))
    monkeypatch.chdir(tmp_path)
    page = pathlib.Path(__file__).parents[2] / "docs" / "api" / "fit.md"
    names = {}
    try:
        with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
            for block in re.findall(
                r"```python\n(.*?)```", page.read_text(), re.DOTALL
            ):
                exec(block, names)
    finally:
        if "listener" in names:
            jax.monitoring.unregister_scalar_listener(names["listener"])
    assert (tmp_path / "runs" / "first.png").exists()
    assert len(list((tmp_path / "runs" / "first").iterdir())) == 1
    assert "f is " in capsys.readouterr().out
    assert len(names["values"]) == 5
    assert names["values"][-1] < names["values"][0]
    for told in logged.values():
        assert {step for step, _ in told} == {1, 2, 3, 4, 5}
        named = dict(x for _, numbers in told for x in numbers.items())
        assert {type(x) for x in named.values()} == {float}
        assert {"value", "damping", "reduction_ratio", "cg_iterations"} <= set(named)


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="`patience` needs a `validation` batch"):
        fit(patience=3)
    with pytest.raises(ValueError, match="`patience` must be at least 1"):
        fit(patience=0, validation=OTHER)
    assert History._fields[-1] == "validation"
