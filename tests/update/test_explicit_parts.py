"""Every part takes arrays whose sharding is part of their type; traced, not compiled."""

import functools

import jax
import jax.numpy as jnp
import pytest
import training
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mapped import mesh, needs_devices
from test_sharded_params import PROBLEM, whole

import hfjax
from hfjax import backtracking, cg, curvature, damping, diagonals, iterates

pytestmark = needs_devices


def with_hidden(params, x):
    outputs = PROBLEM.model_fn(params, x)
    return outputs, jnp.tanh(x @ whole(params[0][0]))


CONFIGURATIONS = {
    "martens2010": hfjax.recipes.martens2010,
    "curvature_guarded": hfjax.recipes.curvature_guarded,
    "momentum_like": hfjax.recipes.momentum_like,
    "hessian": {"curvature": curvature.hessian},
    "finite_differences": {"curvature": curvature.finite_difference_hessian},
    "fisher": {"curvature": curvature.empirical_fisher},
    "rademacher": {
        "preconditioner": hfjax.preconditioners.diagonal(
            functools.partial(diagonals.ggn_rademacher, num_probes=2)
        )
    },
    "kronecker": {"preconditioner": hfjax.preconditioners.kronecker()},
    "kronecker_kept": {
        "preconditioner": hfjax.preconditioners.kronecker(decay=0.9, interval=2)
    },
    "nystrom": {"preconditioner": hfjax.preconditioners.nystrom(rank=3)},
    "nystrom_kept": {
        "preconditioner": hfjax.preconditioners.nystrom(rank=3, interval=2)
    },
    "kronecker_factored": hfjax.recipes.kronecker_factored,
    "exact": {"preconditioner": hfjax.preconditioners.diagonal(diagonals.ggn_exact)},
    "curvature_diagonal": {
        "damping": damping.constant(0.1, matrix="curvature_diagonal")
    },
    "curvature": {"damping": damping.constant(0.1, matrix="curvature")},
    "structural": {
        "damping": damping.levenberg_marquardt(init=0.1, structural=0.3),
        "preconditioner": None,
    },
    "trust_region": {
        "solver": hfjax.trust_region.steihaug_toint(),
        "damping": hfjax.trust_region.radius(init=0.1),
    },
    "krylov": {
        "solver": hfjax.krylov.subspace_descent(dimension=5),
        "damping": damping.constant(0.0),
    },
    "best": {
        "solver": cg.conjugate_gradient(keep=iterates.best()),
        "backtracking": backtracking.full_search(cases=20),
    },
}


def placed(kind, *, sharded):
    here = mesh(kind)
    cases = NamedSharding(here, PartitionSpec("cases"))
    layout = cases if sharded else NamedSharding(here, PartitionSpec())
    return jax.device_put(PROBLEM.params, layout), jax.device_put(PROBLEM.batch, cases)


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_part_takes_arrays_that_are_laid_out_by_type(name, sharded):
    params, batch = placed(AxisType.Explicit, sharded=sharded)
    given = CONFIGURATIONS[name]
    objective = PROBLEM.objective(microbatch_size=16)
    if name == "structural":
        objective = hfjax.Objective(
            with_hidden, objective.loss, hidden_loss=hfjax.losses.squared_error()
        )
    make = given if callable(given) else functools.partial(hfjax.hessian_free, **given)
    tx = make(objective)
    step = functools.partial(training.train_step, objective, tx)
    after = jax.eval_shape(step, params, tx.init(params), batch)
    layouts = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, params)
    assert jax.tree.map(lambda x: x.sharding.spec, after[0]) == layouts
    assert jax.tree.map(lambda x: x.sharding.spec, after[1].direction) == layouts


@pytest.mark.slow
@pytest.mark.parametrize("spec", [("model",), ("cases", "model")])
def test_as_it_comes_it_takes_parameters_that_lie_over_other_axes_than_the_cases(spec):
    here = mesh(AxisType.Explicit, axes=("cases", "model"), shape=(2, 2))
    params = jax.tree.map(
        lambda leaf: jax.device_put(
            leaf, NamedSharding(here, PartitionSpec(*spec[: leaf.ndim]))
        ),
        PROBLEM.params,
    )
    cases = NamedSharding(here, PartitionSpec("cases"))
    batch, objective = jax.device_put(PROBLEM.batch, cases), PROBLEM.objective()
    tx = hfjax.hessian_free(objective)
    step = functools.partial(training.train_step, objective, tx)
    after, _ = jax.eval_shape(step, params, tx.init(params), batch)
    layouts = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, params)
    assert jax.tree.map(lambda x: x.sharding.spec, after) == layouts
    found = hfjax.preconditioners.layers(objective, params, batch)
    assert all("that the cases do not" in line for line in found.values())


@pytest.mark.parametrize("kept", [{}, {"decay": 0.9}, {"decay": 0.9, "interval": 2}])
def test_parameters_that_are_no_layers_may_be_sharded_by_type_too(kept):
    cases = NamedSharding(mesh(AxisType.Explicit), PartitionSpec("cases"))
    devices = len(cases.mesh.devices.flat)
    lines = {"b": jnp.ones(devices), "scale": jnp.ones(devices)}
    params = {"w": jnp.ones((devices, devices)), **lines}
    batch = (jnp.ones((2 * devices, devices)),) * 2
    params, batch = jax.device_put((params, batch), cases)
    objective = hfjax.Objective(
        lambda p, x: p["scale"][None] * jnp.tanh(x @ p["w"] + p["b"][None]),
        hfjax.losses.squared_error(),
    )
    rule = hfjax.preconditioners.kronecker(**kept)

    def precondition(params, memory):
        given = (objective, params, batch, jnp.ones(()), jax.random.key(0))
        if memory is None:
            return rule.build(*given)(params), None
        invert, memory = rule.build(*given, memory, jnp.zeros((), int))
        return invert(params), memory

    memory = rule.init(params) if kept else None
    after = jax.eval_shape(precondition, params, memory)

    def layout(sharding):  # Of what has been said nothing, nothing is sharded.
        return () if sharding is None or not any(sharding.spec) else sharding.spec

    before = jax.tree.map(lambda x: layout(jax.typeof(x).sharding), (params, memory))
    assert jax.tree.map(lambda x: layout(x.sharding), after) == before
