"""Checkpoints hold everything, are whole or not there, and fit other devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reference import quick_jit

import hfjax
from benchmarks.harness import checkpoint
from benchmarks.harness.checkpoint import Checkpoints, NotWholeError, digest
from benchmarks.harness.history import Row, Run
from benchmarks.harness.race import Carry

SETTINGS = {"cases": 40, "rate": 0.1, "layers": (784, 5)}


def everything(updates):
    """Return a carry with a leaf of every kind, and a history with what JSON lacks."""
    state = (
        optax.EmptyState(),
        None,
        {"key": jax.random.key(updates), "other": jax.random.key(1, impl="rbg")},
        jnp.bool_(True),
    )
    params = {
        "half": jnp.full(3, updates, jnp.bfloat16),
        "double": jnp.linspace(0, 1, 7, dtype=jnp.float64) / updates,
        "large": jax.random.normal(jax.random.key(updates), (40, 50), jnp.float32),
    }
    carry = Carry(params, state, jnp.int32(updates))
    run = Run(seconds=updates / 3, startup_seconds=0.7, compile_seconds=1.5)
    run.rows = [Row(0.1 * i, i, 2 * i, float("nan"), 1e-30, 1 / 3) for i in range(4)]
    run.scalars = [{"accepted": True, "reason": "boundary", "λ": float("inf")}]
    return carry, run


def restore(folder, like=lambda: everything(9)[0]):
    with Checkpoints(folder, SETTINGS) as checkpoints:
        return checkpoints.restore(like)


def save(folder, *counts):
    with Checkpoints(folder, SETTINGS) as checkpoints:
        for count in counts:
            checkpoints.save(*everything(count))


def test_every_kind_of_leaf_and_number_comes_back(tmp_path):
    carry, run = everything(3)
    save(tmp_path, 3)
    restored, its = restore(tmp_path)
    assert jax.tree.structure(restored) == jax.tree.structure(carry)
    for leaf, other in zip(
        jax.tree.leaves(restored), jax.tree.leaves(carry), strict=True
    ):
        assert leaf.dtype == other.dtype
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, other = map(jax.random.key_data, (leaf, other))
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other))
    np.testing.assert_array_equal(its.rows, run.rows)
    assert all(isinstance(row, Row) for row in its.rows)
    assert (its.scalars, its.seconds) == (run.scalars, run.seconds)
    assert its.before_training == run.before_training == 0.7 + 1.5


def arrays_of(folder):
    """Return the file with the large array in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def cut_short(newest):
    file = arrays_of(newest)
    file.write_bytes(file.read_bytes()[:-5000])


def flip_a_bit(newest):
    file = arrays_of(newest)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change_the_history(newest):
    (file,) = newest.glob("run/metadata")
    file.write_text(file.read_text().replace('"seconds": 1.0', '"seconds": 2.0'))


def lose_the_history(newest):
    (file,) = newest.glob("run/metadata")
    file.unlink()


def delete_half(newest):
    for path in sorted(newest.rglob("*"))[::2]:
        if path.is_file():
            path.unlink()


@pytest.mark.parametrize(
    "spoil",
    [cut_short, flip_a_bit, change_the_history, lose_the_history, delete_half],
    ids=lambda fn: fn.__name__,
)
def test_a_spoiled_checkpoint_falls_back_to_the_one_before(spoil, tmp_path, capfd):
    save(tmp_path, 1, 2, 3)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"settings.json", "2", "3"}  # The newest two.
    spoil(tmp_path / "3")
    restored, run = restore(tmp_path)
    assert restored.updates == 2
    assert digest(restored) == digest(everything(2)[0])
    assert run.seconds == 2 / 3
    warning = capfd.readouterr().err
    assert warning.startswith(f"Warning: {tmp_path / '3'} is not whole: ")
    assert warning.count("\n") == 1
    # What comes after it counts, though the spoiled one is still there.
    save(tmp_path, 5)
    assert restore(tmp_path)[0].updates == 5


def test_a_half_written_checkpoint_is_none(tmp_path, capfd):
    save(tmp_path, 1, 2)
    part = tmp_path / "3.orbax-checkpoint-tmp"
    (tmp_path / "2").rename(part)  # So it is before Orbax renames it.
    assert restore(tmp_path)[0].updates == 1
    assert not capfd.readouterr().err
    save(tmp_path, 3)
    assert restore(tmp_path)[0].updates == 3
    assert not part.exists()


def test_nothing_is_begun_anew_where_no_checkpoint_is_whole(tmp_path):
    save(tmp_path, 1, 2)
    for name in "12":
        cut_short(tmp_path / name)
    with pytest.raises(NotWholeError, match=r"2 is not whole.*1 is not whole.*remove"):
        restore(tmp_path)
    assert restore(tmp_path / "other") is None


def test_checkpoints_of_other_settings_are_refused(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"with rate 0\.1, not 0\.2: choose another"):
        Checkpoints(tmp_path, SETTINGS | {"rate": 0.2})
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"does not hold settings.*Remove"):
        Checkpoints(tmp_path, SETTINGS)


def test_checkpoints_take_less_than_a_fiftieth_of_the_time(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    with Checkpoints(tmp_path, SETTINGS) as checkpoints:

        class Manager:
            def latest_step(self):
                return 1

            def save(self, *_, **__):
                nonlocal now
                now += 0.3

            def close(self):
                actual.close()

        actual, checkpoints._manager = checkpoints._manager, Manager()
        written, what = 0.0, everything(1)
        for _ in range(20_000):
            now += 0.01
            before = now
            checkpoints.keep(*what)
            written += now - before
    assert 0.0135 * now < written <= 0.015 * now


CASES = 24


def sharding(devices, spec=PartitionSpec()):
    auto = (AxisType.Auto,)
    mesh = jax.make_mesh(
        (devices,), ("x",), axis_types=auto, devices=jax.devices()[:devices]
    )
    return NamedSharding(mesh, spec)


def spread(tree, devices, shard):
    """Lay a tree out: leaves that can be cut along their first axis, or whole."""

    def put(leaf):
        cut = shard and leaf.ndim and leaf.shape[0] % devices == 0
        spec = PartitionSpec("x") if cut else PartitionSpec()
        return jax.device_put(leaf, sharding(devices, spec))

    return jax.tree.map(put, tree)


def sharded_problem():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (CASES, 8))
    batch = (x, jnp.sin(x[:, :2]))
    params = {
        "first": jax.random.normal(keys[1], (8, 12)) / 3,
        "second": jax.random.normal(keys[2], (12, 2)) / 3,
        "bias": jnp.zeros(2),
    }
    objective = hfjax.Objective(
        lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"] + p["bias"][None],
        hfjax.losses.squared_error(),
    )
    signs = functools.partial(hfjax.diagonals.ggn_rademacher, num_probes=1)
    tx = hfjax.hessian_free(
        objective,
        preconditioner=hfjax.preconditioners.diagonal(signs),
        solver=hfjax.cg.conjugate_gradient(max_iterations=10, warm_start_decay=0.9),
        backtracking=None,
        line_search=None,
    )
    return objective, tx, params, batch


@quick_jit
def sharded_step(carry, batch):
    objective, tx, *_ = sharded_problem()
    _, grads = objective.value_and_grad(carry.params, batch)
    updates, state = tx.update(grads, carry.state, carry.params, batch=batch)
    return Carry(optax.apply_updates(carry.params, updates), state, carry.updates + 1)


def train(carry, devices, updates):
    batch = jax.device_put(sharded_problem()[3], sharding(devices, PartitionSpec("x")))
    for _ in range(updates):
        carry = sharded_step(carry, batch)
    return carry


def sharded_start(devices, shard):
    _, tx, params, _ = sharded_problem()
    carry = Carry(params, tx.init(params), jnp.int32(0))
    return spread(carry, devices, shard)


@functools.cache
def on_one_device():
    return jax.device_get(train(sharded_start(1, shard=False), 1, 6).params)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize(
    ("shard", "devices"), [(True, 2), (True, 1), (False, 2)], ids=str
)
def test_a_state_goes_on_on_another_number_of_devices(shard, devices, tmp_path):
    run = Run()
    carry = train(sharded_start(4, shard), 4, 3)
    assert carry.params["first"].sharding.is_fully_replicated != shard
    with Checkpoints(tmp_path, SETTINGS) as checkpoints:
        checkpoints.save(carry, run)
    like = sharded_start(devices, shard=True)
    restored, _ = restore(tmp_path, lambda: like)
    for leaf, there, here in zip(
        *map(jax.tree.leaves, (restored, like, carry)), strict=True
    ):
        assert leaf.sharding == there.sharding
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(here))
    ended = train(restored, devices, 3).params
    for name, leaf in on_one_device().items():
        np.testing.assert_allclose(ended[name], leaf, rtol=1e-9, atol=1e-12)
