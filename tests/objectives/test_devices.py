"""Sharded cases change nothing: every way of mapping equals the dense truth."""

import functools

import collectives
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import NamedSharding, PartitionSpec
from mapped import DEVICES, PROBLEM, axis_name, by_shard_map, mesh, needs_devices, run
from problems import quantities, with_hidden
from reference import flat, quick_jit

import hfjax
from hfjax import curvature, diagonals
from hfjax.curvature.structural import with_structural_loss

pytestmark = needs_devices


@pytest.mark.parametrize(
    ("way", "microbatch_size"),
    [
        ("jit_with_shardings", None),
        ("jit_with_explicit_shardings", None),
        ("shard_map_of_two_axes", 2),
        ("shard_map_check_vma", None),
        ("shard_map_check_vma", 2),
        ("shard_map", None),
        ("pmap", None),
        ("vmap", None),
        ("vmap", 2),
    ],
)
def test_devices_change_nothing(way, microbatch_size):
    objective = PROBLEM.objective(
        axis_name=axis_name(way), microbatch_size=microbatch_size
    )
    result = run(way, functools.partial(quantities, objective))
    truth = reference.quantities(PROBLEM, flat(PROBLEM.direction))
    for name, leaf in result.items():
        np.testing.assert_allclose(
            flat(leaf), truth[name], rtol=1e-12, atol=1e-16, err_msg=name
        )


@pytest.mark.parametrize("size", [5, 9])
def test_a_microbatch_is_a_share_of_every_devices_cases(size):
    # 52 cases: five are no even share of four devices, and nine leave some over.
    x = jnp.sin(jnp.arange(156.0)).reshape(52, 3)
    params = jnp.full((3, 2), 0.1)
    objective = hfjax.Objective(
        lambda p, x: jnp.tanh(x @ p),
        hfjax.losses.squared_error(),
        microbatch_size=size,
    )

    def product(params, batch):
        return curvature.ggn(objective, params, batch)(params)

    batch = jax.device_put((x, x[:, :2]), NamedSharding(mesh(), PartitionSpec("cases")))
    params = jax.device_put(params, NamedSharding(mesh(), PartitionSpec()))
    for fn in (product, objective.case_values):
        compiled = quick_jit(fn).lower(params, batch).compile()
        sent = collectives.read(compiled.as_text())
        assert {one.kind for one in sent} <= {"all-reduce"}
        alone = quick_jit(fn)(np.asarray(params), jax.tree.map(np.asarray, batch))
        np.testing.assert_allclose(compiled(params, batch), alone, rtol=1e-12)


def test_case_values_are_each_devices_own():
    objective = PROBLEM.objective(axis_name="cases", microbatch_size=2)
    values = quick_jit(
        jax.shard_map(
            objective.case_values,
            mesh=mesh(),
            in_specs=(PartitionSpec(), PartitionSpec("cases")),
            out_specs=PartitionSpec("cases"),
        )
    )(PROBLEM.params, PROBLEM.batch)
    np.testing.assert_allclose(values, reference.dense(PROBLEM).values, rtol=1e-12)


HIDDEN = with_hidden(cases=12)[0]
MU = 0.7


def structural_quantities(objective, params, batch, v):
    """Return products and diagonals with structural damping, and a random diagonal."""
    damped = with_structural_loss(objective, MU)
    products = {
        make.__name__: make(objective, params, batch, structural=MU)(v)
        for make in (curvature.ggn, curvature.hessian)
    }
    products["empirical_fisher"] = curvature.empirical_fisher(objective, params, batch)(
        v
    )
    key = jax.random.key(3)
    return products | {
        "exact": diagonals.ggn_exact(damped, params, batch),
        "random": diagonals.ggn_rademacher(
            damped, params, batch, key=key, num_probes=2
        ),
    }


@functools.cache
def structural_truths():
    v, structural = flat(HIDDEN.direction), MU * reference.structural(HIDDEN)
    alone = HIDDEN.objective()
    one_device = quick_jit(functools.partial(structural_quantities, alone))
    random = one_device(HIDDEN.params, HIDDEN.batch, HIDDEN.direction)["random"]
    return {
        "ggn": (reference.ggn(HIDDEN) + structural) @ v,
        "hessian": (reference.hessian(HIDDEN) + structural) @ v,
        "empirical_fisher": reference.empirical_fisher_matrix(HIDDEN) @ v,
        "exact": np.diag(reference.ggn(HIDDEN) + structural),
        "random": flat(random),  # The same signs, whatever the devices.
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("shard_map_check_vma", {"microbatch_size": 2, "linearize_once": True}),
        ("shard_map", {"microbatch_size": 2}),
        ("vmap", {"microbatch_size": 2, "linearize_once": True}),
    ],
)
def test_devices_change_no_curvature_and_no_sign(way, options):
    objective = HIDDEN.objective(axis_name="cases", **options)
    compute = functools.partial(structural_quantities, objective)
    result = run(way, compute, HIDDEN)
    for name, truth in structural_truths().items():
        found = flat(result[name])
        np.testing.assert_allclose(found, truth, rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.slow
def test_a_structurally_damped_update_is_the_dense_step_on_devices():
    objective = HIDDEN.objective(axis_name="cases")
    tx = hfjax.hessian_free(
        objective,
        damping=hfjax.damping.constant(
            0.4, matrix="curvature_diagonal", structural=MU, tied=False
        ),
        solver=hfjax.cg.conjugate_gradient(
            stopping=None, warm_start_decay=None, max_iterations=120
        ),
        preconditioner=hfjax.preconditioners.diagonal(diagonals.ggn_rademacher),
        backtracking=None,
        line_search=None,
    )

    def update(params, batch, _):
        _, grads = objective.value_and_grad(params, batch)
        updates, state = tx.update(grads, tx.init(params), params, batch=batch)
        return updates, state.info.predicted_change

    updates, predicted = by_shard_map(update, problem=HIDDEN, check_vma=True)
    b, gradient = reference.ggn(HIDDEN), reference.gradient(HIDDEN)
    damped = b + 0.4 * np.diag(np.diag(b)) + MU * reference.structural(HIDDEN)
    step = -np.linalg.solve(damped, gradient)
    np.testing.assert_allclose(flat(updates), step, rtol=1e-7, atol=1e-9)
    model = gradient @ step + 0.5 * step @ b @ step
    np.testing.assert_allclose(predicted, model, rtol=1e-7)


@pytest.mark.slow
def test_every_device_draws_signs_of_its_own():
    # All cases alike: of one estimate for each of 2,000, the mean is near the truth.
    cases, mix = 2000, np.random.default_rng(3).standard_normal((2, 4))
    objective = hfjax.Objective(
        lambda w, x: (x * w[None]) @ mix,
        hfjax.losses.squared_error(),
        axis_name="cases",
    )
    batch = (jnp.ones((DEVICES, cases // DEVICES, 2)), jnp.zeros((DEVICES, 500, 4)))
    draw = functools.partial(diagonals.ggn_rademacher, objective, jnp.ones(2))
    draws = quick_jit(
        jax.vmap(
            jax.vmap(
                lambda batch, key: draw(batch, key=key), (0, None), axis_name="cases"
            ),
            (None, 0),
        )
    )(batch, jax.random.split(jax.random.key(0), 200))[:, 0]
    # The variance of one draw is 2 (‖a‖⁴ − Σ a⁴) / cases; four times that if the devices
    # drew alike.
    variance = 2 * (np.sum(mix**2, axis=1) ** 2 - np.sum(mix**4, axis=1)) / cases
    np.testing.assert_allclose(np.var(draws, axis=0), variance, rtol=0.4)
