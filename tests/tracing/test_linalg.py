"""Decompositions that wait for nobody: one matrix at a time on a CPU."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mapped import mesh, needs_devices
from reference import quick_jit

import hfjax
from hfjax._tracing import linalg

CASES = PartitionSpec("cases")


def symmetric(*shape, seed=0):
    matrices = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(matrices + np.swapaxes(matrices, -1, -2) + 8 * np.eye(shape[-1]))


def shared_out(compiled):
    """Return the calls of LAPACK and BLAS with more than one matrix at once."""
    calls = re.findall(
        r"= \(?\w+\[([\d,]*)\][^=\n]* custom-call\([^\n]*"
        r'custom_call_target="((?:lapack|blas)\w*)"',
        compiled.as_text(),
    )
    assert calls, "the program has no decomposition at all"
    batches = [(name, [int(n) for n in shape.split(",")[:-2]]) for shape, name in calls]
    return [(name, batch) for name, batch in batches if np.prod(batch) > 1]


DECOMPOSITIONS = {
    "eigh": lambda a: linalg.eigh(a)[0],
    "cholesky": linalg.cholesky,
    "inverse_root": lambda a: linalg.inverse_root(a @ a.T),
    "cho_solve": lambda a: linalg.cho_solve(jnp.tril(a), a[0]),
    "solve": lambda a: linalg.solve(a, a[0]),
    "pinv": lambda a: linalg.pinv(a, jnp.asarray(1e-12)),
}
TRUTH = {
    "eigh": np.linalg.eigvalsh,
    "cholesky": np.linalg.cholesky,
    "inverse_root": lambda a: np.linalg.inv(np.linalg.cholesky(a @ a.T)),
    "cho_solve": lambda a: np.linalg.solve(np.tril(a) @ np.tril(a).T, a[0]),
    "solve": lambda a: np.linalg.solve(a, a[0]),
    "pinv": np.linalg.inv,
}


@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_a_batch_is_decomposed_one_after_another_and_right(name):
    a = symmetric(2, 3, 4, 4)
    compiled = jax.jit(jax.vmap(jax.vmap(DECOMPOSITIONS[name]))).lower(a).compile()
    assert not shared_out(compiled)
    truth = [[TRUTH[name](matrix) for matrix in row] for row in np.asarray(a)]
    np.testing.assert_allclose(compiled(a), truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_each_device_goes_through_its_own_matrices(axis_type):
    a = symmetric(8, 3, 3)
    mesh = jax.make_mesh((4,), ("cases",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(a, NamedSharding(mesh, CASES))
        values = jax.jit(jax.vmap(DECOMPOSITIONS["eigh"]))(sharded)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(a), rtol=1e-12)


@pytest.mark.parametrize("check_vma", [True, False])
def test_under_shard_map_they_are_the_same(check_vma):
    a = symmetric(8, 3, 3)
    mesh = jax.make_mesh((4,), ("cases",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        jax.vmap(DECOMPOSITIONS["eigh"]),
        mesh=mesh,
        in_specs=CASES,
        out_specs=CASES,
        check_vma=check_vma,
    )
    np.testing.assert_allclose(jax.jit(mapped)(a), np.linalg.eigvalsh(a), rtol=1e-12)


def poly(z, t):
    """A loss whose L″ is decomposed: it couples three outputs by several sums."""
    return optax.losses.poly_loss_cross_entropy(z, t, epsilon=0.5)


def compiled_update(objective, batch, ensemble=False, **options):
    params = {"w": jnp.ones((2, 3)), "scale": jnp.ones(3), "v": jnp.eye(3)}
    if ensemble:
        params = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    tx = hfjax.hessian_free(objective, line_search=None, **options)

    def update(params):
        grads = objective.value_and_grad(params, batch)[1]
        return tx.update(grads, tx.init(params), params, batch=batch)[0]

    return jax.jit(jax.vmap(update) if ensemble else update).lower(params).compile()


def model_fn(params, x):
    return jnp.tanh(x @ params["w"] * params["scale"][None]) @ params["v"]


def batch(cases=5):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((cases, 2)))
    return x, jnp.full((cases, 3), 1 / 3)


@pytest.mark.slow
@pytest.mark.parametrize("positive", [None, "clip"])
def test_an_update_decomposes_the_curvature_of_a_loss_case_by_case(positive):
    loss = hfjax.losses.from_function(poly, positive=positive)
    objective = hfjax.Objective(model_fn, loss)
    assert not shared_out(compiled_update(objective, batch()))


@pytest.mark.slow
def test_two_terms_solved_exactly_have_their_roots_inverted_case_by_case():
    term = hfjax.Objective(model_fn, hfjax.losses.softmax_cross_entropy())
    objective = hfjax.objective.weighted_sum([(1.0, term), (2.0, term)])
    exact = hfjax.sample_space.cholesky(momentum=None)
    assert not shared_out(compiled_update(objective, (batch(), batch(4)), solver=exact))


@pytest.mark.slow
def test_an_ensemble_that_is_vmapped_decomposes_its_factors_one_by_one():
    objective = hfjax.Objective(model_fn, hfjax.losses.softmax_cross_entropy())
    assert not shared_out(compiled_update(objective, batch(), ensemble=True))


CHILD = """
import jax, jax.numpy as jnp, optax, hfjax
key = jax.random.key(0)
x = jax.random.normal(key, (500, 20))
t = jax.nn.one_hot(jax.random.randint(key, (500,), 0, 10), 10)
params = {
    "w": jax.random.normal(key, (20, 30)) * 0.3,
    "scale": jnp.ones(30),
    "v": jax.random.normal(key, (30, 10)) * 0.3,
}
loss = optax.losses.poly_loss_cross_entropy
f = hfjax.Objective(lambda p, x: jnp.tanh(x @ p["w"] * p["scale"]) @ p["v"], loss)
rule = hfjax.preconditioners.kronecker()

@jax.jit
def build(params, n):
    invert = rule.build(f, params, (x, t), jnp.float32(1.0), jax.random.key(n))
    return invert(params)

for n in range(300):
    jax.block_until_ready(build(params, n))
print("done")
"""


@pytest.mark.slow
def test_on_two_threads_no_build_waits_for_another_for_ever():
    # With batches it stopped within some hundred builds in most runs, and for good.
    run = subprocess.run(
        [sys.executable, "-c", CHILD],
        env=os.environ | {"PJRT_NPROC": "2"},
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "done", run.stderr[-1000:]


@pytest.mark.every
@pytest.mark.parametrize(("rows", "columns"), [(2100, 9), (7, 450)])
def test_squares_are_those_of_the_whole_matrix(rows, columns):
    """By chunks of rows, of which the last is shorter, and by blocks."""
    a = np.random.default_rng(0).normal(size=(rows, columns))
    x, y = jnp.asarray(a[:, :4]).reshape(rows, 2, 2), jnp.asarray(a[:, 4:])

    def squared(x, y):
        return linalg.squared_columns({"x": x, "y": y}, x.dtype)

    found = quick_jit(squared)(x, y)
    np.testing.assert_allclose(found, a.T @ a, rtol=1e-12, atol=1e-12 * rows)
    np.testing.assert_array_equal(found, np.asarray(found).T)


@needs_devices
def test_devices_square_their_own_rows():
    def squared(x):
        return jax.lax.psum(linalg.squared_columns(x, x.dtype), "cases")

    a = np.random.default_rng(0).normal(size=(4 * 2100, 5))
    spread = jax.shard_map(
        squared, mesh=mesh(), in_specs=PartitionSpec("cases"), out_specs=PartitionSpec()
    )
    found = quick_jit(spread)(jnp.asarray(a))
    np.testing.assert_allclose(found, a.T @ a, rtol=1e-12, atol=1e-10)
