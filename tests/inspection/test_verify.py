import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import mlp, named
from reference import quick_jit

import hfjax
from hfjax import losses, verify

PROBLEM = named("mlp_squared_error")  # 7 cases, 2 outputs, tanh, weight decay 0.01.
X, T = PROBLEM.batch
CASES, UNITS, DECAY = 7, 2, PROBLEM.weight_decay


@functools.cache
def optimizer(objective):
    """Compile the update as a whole: eagerly, each of its parts is compiled alone."""
    solver = hfjax.cg.conjugate_gradient(max_iterations=5)
    tx = hfjax.hessian_free(objective, solver=solver)
    return tx._replace(update=quick_jit(tx.update))


@functools.cache
def gradient(objective):
    return objective.value_and_grad(PROBLEM.params, PROBLEM.batch)[1]


OBJECTIVE = PROBLEM.objective()


def only(faults, *words):
    """There is one fault, and it names all of these."""
    assert len(faults) == 1, faults
    for word in words:
        assert word in faults[0], faults


def check(objective=OBJECTIVE, tx=None, params=PROBLEM.params, batch=None, grads=None):
    batch = PROBLEM.batch if batch is None else batch
    if grads is None:
        grads = quick_jit(objective.value_and_grad)(params, batch)[1]
    return verify.check(objective, tx, params, batch, grads)


def modelled(model_fn, loss=None, **options):
    return hfjax.Objective(model_fn, loss or losses.squared_error(), **options)


def compiled_model(problem):
    """Return the objective of a model that is compiled: eager loops are, in each call."""
    return dataclasses.replace(problem.objective(), model_fn=jax.jit(problem.model_fn))


def single(tree):
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, tree
    )


# Nothing is found where nothing is wrong.


SOUND = [
    "mlp_squared_error",
    "mlp_sigmoid",
    "mlp_softmax",
    "softmax_soft_targets",
    "integer_labels",
    "two_heads",
    "recurrent",
    "frozen",
    "nested",
]


@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_found_in_a_correct_setup(name):
    problem = named(name)
    loops = name == "recurrent"
    objective = compiled_model(problem) if loops else problem.objective()
    grads = quick_jit(objective.value_and_grad)(problem.params, problem.batch)[1]
    assert verify.check(objective, None, problem.params, problem.batch, grads) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp_squared_error", "integer_labels"])
def test_nothing_is_found_in_float32(name):
    problem = named(name)
    params, batch = single((problem.params, problem.batch))
    with jax.enable_x64(False):
        objective = problem.objective()
        tx = optimizer(objective) if name == "mlp_squared_error" else None
        assert check(objective, tx, params, batch) == []


@pytest.mark.slow
def test_nothing_is_found_with_microbatches_and_an_optimizer():
    objective = PROBLEM.objective(microbatch_size=3)
    assert check(objective, optimizer(objective)) == []


@pytest.mark.slow
def test_nothing_is_found_in_a_chain():
    tx = optax.chain(
        hfjax.scale_by_hessian_free(OBJECTIVE), optax.scale_by_learning_rate(0.5)
    )
    assert check(tx=tx) == []


@pytest.mark.slow
def test_nothing_is_found_with_rectifiers_on_their_kinks():
    def relu_net(params, x):
        (w, b), *rest = params
        return mlp(rest, jax.nn.relu(x @ w + b[None]))

    (w, b), *rest = PROBLEM.params
    params = [(w, 0 * b), *rest]
    assert check(modelled(relu_net), params=params, batch=(X.at[0].set(0), T)) == []


@pytest.mark.slow
def test_nothing_is_found_where_a_model_is_bound_to_float32():
    def step(carry, x):  # One function in all calls, so that it is compiled once.
        h, w = carry
        return (jnp.tanh(x @ w + h), w), None

    def bound(params, x):
        h = jnp.zeros((len(x), 2), jnp.float32)
        return jax.lax.scan(step, (h, params), jnp.stack([x, x]))[0][0]

    params, batch = single((PROBLEM.params[0][0][:, :2], PROBLEM.batch))
    assert check(modelled(bound), params=params, batch=batch) == []


@pytest.mark.slow
def test_nothing_is_found_with_one_key_for_each_case():
    def noisy(params, inputs):
        x, keys = inputs
        return mlp(params, x + jax.vmap(lambda k: jax.random.normal(k, (3,)))(keys))

    inputs = (X, jax.random.split(jax.random.key(0), CASES))
    assert check(modelled(noisy), batch=(inputs, T)) == []


@pytest.mark.slow
def test_masks_that_a_key_draws_otherwise_in_float64_are_no_rounding():
    def dropping_out(params, inputs):
        x, keys = inputs
        draw = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (3,)))
        return mlp(params, x * draw(keys))

    with jax.enable_x64(False):
        params, batch = single((PROBLEM.params, PROBLEM.batch))
        keys = jax.random.split(jax.random.key(0), CASES)
        faults = check(
            modelled(dropping_out), params=params, batch=((batch[0], keys), batch[1])
        )
    assert faults == []


@pytest.mark.slow
def test_losses_that_are_rounding_do_not_depend_on_one_another():
    # The model sums in another order in half the batch, as a device may.
    def model_fn(p, x):
        return (x @ p) * (1 + 1e-15 * (len(x) % 14 == 0))

    best = jnp.linalg.lstsq(X, T)[0]
    x = jnp.concatenate([X, X])
    assert check(modelled(model_fn), params=best, batch=(x, x @ best)) == []


@pytest.mark.slow
def test_nothing_is_found_at_an_optimum():
    # Where ∇f is rounding, or zero, and so is f.
    objective = modelled(lambda p, x: x @ p)
    x = jnp.concatenate([X, X])
    best = jnp.linalg.lstsq(X, T)[0]
    for t in (jnp.concatenate([T, 2 * X @ best - T]), x @ best):
        found = check(objective, params=best, batch=(x, t))
        assert found == []
    nothing = jnp.zeros((14, 2))
    assert check(objective, params=0 * best, batch=(x, nothing)) == []


# A gradient of something else.


@pytest.mark.slow
def test_what_was_done_to_the_gradient_is_named():
    g = gradient(OBJECTIVE)
    data = gradient(dataclasses.replace(OBJECTIVE, weight_decay=0.0))
    decay = jax.tree.map(lambda x: DECAY * x, PROBLEM.params)
    leaves = jnp.concatenate([jnp.abs(leaf).ravel() for leaf in jax.tree.leaves(g)])
    bound = float(jnp.sort(leaves)[-4])

    def plus(x, y, a=1.0, b=1.0):
        return jax.tree.map(lambda x, y: a * x + b * y, x, y)

    only(check(grads=plus(g, g, CASES, 0)), "7 times", "sum over the cases")
    only(check(grads=plus(data, decay, CASES)), "7 times the gradient of the mean loss")
    only(check(grads=plus(g, g, 1 / UNITS, 0)), "mean over 2 output units")
    only(check(grads=plus(g, g, -1, 0)), "sign is reversed")
    only(check(grads=plus(g, g, 0, 0)), "`grads` is zero")
    only(check(grads=plus(g, g, 3.3, 0)), "3.3 times")
    only(check(grads=data), "lacks the weight decay", "0.01")
    only(check(grads=plus(g, decay)), "weight decay 0.01 twice")
    only(check(grads=plus(g, decay, 1, 4)), "coefficient 0.05", "0.01")
    only(check(grads=plus(data, decay, 3.3, 5)), "3.3 times", "plus 0.05 θ")
    clipped = optax.projections.projection_l2_ball(g, 0.1)
    only(check(grads=clipped), "norm 0.1 instead of", "clipped by norm")
    by_value = jax.tree.map(lambda x: jnp.clip(x, -bound, bound), g)
    only(check(grads=by_value), "clipped by value", f"{bound:.4g}")


def test_the_reduction_is_named_where_cases_have_weights():
    weights = jnp.asarray([1.0, 0.0, 2.5, 0.3, 0.0, 1.0, 4.0])
    f, batch = modelled(mlp), (X, T, weights)
    g = f.value_and_grad(PROBLEM.params, batch)[1]
    total = float(jnp.sum(weights))
    summed = jax.tree.map(lambda x: total * x, g)
    only(check(f, batch=batch, grads=summed), "8.8 times", "sum over the cases")
    over_all = jax.tree.map(lambda x: total / CASES * x, g)
    only(check(f, batch=batch, grads=over_all), "not by their total weight")


def test_weight_decay_that_the_objective_lacks_is_named():
    f = modelled(mlp)
    grads = jax.tree.map(lambda g, x: g + 0.03 * x, gradient(f), PROBLEM.params)
    only(check(f, grads=grads), "coefficient 0.03", "the objective none")


def test_a_gradient_from_elsewhere_is_told_with_its_cosine():
    other = OBJECTIVE.value_and_grad(PROBLEM.params, (X[:5], T[:5]))[1]
    x, y = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (other, gradient(OBJECTIVE))
    )
    cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    only(check(grads=other), f"cosine {cosine:.4f}", "larger batch that holds this one")


def test_a_gradient_of_another_shape_is_named():
    g = gradient(OBJECTIVE)
    only(check(grads=g[:2]), "another structure", "[2][0]")
    (w, b), *rest = g
    only(check(grads=[(w.T, b), *rest]), "`grads[0][0]` has shape (4, 3)")


# Numbers that are none.


@pytest.mark.slow
def test_what_is_not_finite_is_named():
    g = gradient(OBJECTIVE)
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), g)
    only(
        check(grads=broken),
        "`grads` holds NaN",
        "the gradient of the objective does not",
    )
    only(check(batch=(X.at[1, 1].set(jnp.nan), T), grads=g), "`inputs` holds NaN")
    only(check(params=broken, grads=g), "`params[0][0]` holds NaN")
    logs = modelled(lambda p, x: jnp.log(mlp(p, x)))
    values = np.asarray(mlp(PROBLEM.params, X))
    first = int(np.flatnonzero(np.any(values < 0, axis=1))[0])
    only(check(logs, grads=g), "NaN or infinite", f"case {first}")
    roots = modelled(lambda p, x: jnp.sqrt(0 * mlp(p, x)))
    only(check(roots, grads=g), "The gradient of the objective", "f is finite")


def test_weights_that_are_none_are_named():
    g = gradient(OBJECTIVE)
    only(check(batch=(X, T, jnp.zeros(7)), grads=g), "All weights are 0")
    only(check(batch=(X, T, -jnp.ones(7)), grads=g), "negative")


# Models that are no functions of one case.


def test_a_random_model_is_named():
    rng = np.random.default_rng(0)
    dropout = modelled(lambda p, x: mlp(p, x) * (rng.uniform() > 0.5))
    g = gradient(OBJECTIVE)
    only(check(dropout, grads=g), "random")


@pytest.mark.slow
def test_batch_normalisation_in_training_mode_is_named():
    def normalised(params, x):
        z = mlp(params, x)
        return (z - jnp.mean(z, 0, keepdims=True)) / jnp.std(z, 0, keepdims=True)

    only(check(modelled(normalised)), "depend on one another", "batch normalisation")


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_noise_that_belongs_to_the_place_is_named_however_small(size):
    def noise(params, x):
        rows = jnp.arange(len(x)) % 4  # As 4 and 3 cases, the halves see the same.
        return mlp(params, x) + size * jnp.sin(rows)[:, None]

    only(check(modelled(noise)), "place in the batch")


# Derivatives.


@jax.custom_jvp
def wrongly_squared(x):
    return x**2


wrongly_squared.defjvp(lambda primal, v: (primal[0] ** 2, primal[0] * v[0]))


@jax.custom_vjp
def backward_only(x):
    return x**2


backward_only.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))


def test_a_wrong_derivative_is_named():
    f = modelled(lambda p, x: wrongly_squared(mlp(p, x)))
    only(check(f), "not that of its values", "custom_jvp")


def test_a_straight_through_estimator_is_named():
    def rounded(params, x):
        z = mlp(params, x)
        return z + jax.lax.stop_gradient(jnp.sin(9 * z) - z)

    only(check(modelled(rounded)), "not that of its values")


@pytest.mark.slow
def test_a_backward_rule_alone_is_no_fault():
    assert check(modelled(lambda p, x: backward_only(mlp(p, x)))) == []


@pytest.mark.slow
def test_a_loss_that_is_not_convex_is_named_unless_it_is_repaired():
    def squashed(z, t):
        return 0.5 * (jnp.tanh(z) - t) ** 2

    batch = (X, T.at[3].set(jnp.asarray([-9.0, -9.0])))
    found = check(modelled(mlp, squashed), batch=batch)
    only(found, "not convex", "L″ of case 3", "positive")
    for positive in ("clip", "shift"):
        repaired = losses.from_function(squashed, positive=positive)
        assert check(modelled(mlp, repaired), batch=batch) == []


@pytest.mark.slow
def test_negative_curvature_of_many_outputs_is_found():
    def many(params, x):
        return jnp.tile(mlp(params, x), (1, 40))

    batch = (X, jnp.tile(T, (1, 40)))
    only(
        check(
            modelled(many, lambda z, t: (z - t) ** 2 / 2 + 2 * jnp.cos(z)), batch=batch
        ),
        "not convex",
    )
    assert check(modelled(many), batch=batch) == []


# Rounding.


@pytest.mark.slow
def test_a_gradient_that_is_rounding_is_named():
    def cancels(params, x):
        # XLA would cancel it.
        return jax.lax.optimization_barrier(3e6 + mlp(params, x)) - 3e6

    params, batch = single((PROBLEM.params, PROBLEM.batch))
    with jax.enable_x64(False):
        found = check(modelled(cancels), params=params, batch=batch)
    only(found, "The gradient in float32", "rounding")


@pytest.mark.slow
def test_an_update_below_the_rounding_of_f_is_named():
    params, batch = single((PROBLEM.params, PROBLEM.batch))
    with jax.enable_x64(False):
        objective = modelled(mlp, lambda z, t: optax.l2_loss(z, t) + 1e8)
        found = check(objective, optimizer(objective), params, batch)
    only(found, "too coarse in float32")


# The optimizer.


@pytest.mark.slow
def test_another_optimizer_is_named():
    only(check(tx=optax.sgd(0.1)), "not a Hessian-free transformation")
    only(check(tx="hessian_free"), "`tx` is a str")


@pytest.mark.slow
def test_an_optimizer_of_another_objective_is_named():
    other = modelled(lambda p, x: 3 * mlp(p, x))
    only(check(tx=optimizer(other)), "built with another objective")


@pytest.mark.slow
def test_a_rejected_update_is_named_by_its_reason():
    flat = modelled(lambda p, x: 0 * mlp(p, x))
    only(check(flat, optimizer(flat)), "rejects its first update", "ZERO_GRADIENT")


def test_what_follows_from_a_fault_is_not_told():
    uphill = jax.tree.map(jnp.negative, gradient(OBJECTIVE))
    only(check(tx=optimizer(OBJECTIVE), grads=uphill), "sign is reversed")


def test_something_that_is_no_objective_is_refused():
    with pytest.raises(TypeError, match=r"must be an `hfjax.Objective`, got function"):
        verify.check(mlp, None, PROBLEM.params, PROBLEM.batch, PROBLEM.params)


# Products.


@pytest.mark.parametrize("name", ["integer_labels", "two_heads", "recurrent"])
def test_products_agree_with_finite_differences(name):
    problem = named(name)
    errors = verify.products(
        compiled_model(problem), problem.params, problem.batch, key=jax.random.key(0)
    )
    assert 0 < max(errors) < 1e-6
    assert min(errors) > 0


@pytest.mark.slow
def test_products_are_in_float64_whatever_the_setting():
    params, batch = single((PROBLEM.params, PROBLEM.batch))
    with jax.enable_x64(False):
        errors = verify.products(
            PROBLEM.objective(), params, batch, key=jax.random.key(0), columns=5
        )
    assert 0 < max(errors) < 1e-6


def products(objective, **options):
    return verify.products(
        objective, PROBLEM.params, PROBLEM.batch, key=jax.random.key(1), **options
    )


@pytest.mark.slow
def test_each_wrong_part_shows_in_its_errors():
    model = products(modelled(lambda p, x: wrongly_squared(mlp(p, x))), columns=9)
    assert min(model.jacobian, model.transpose, model.ggn) > 0.3
    assert model.loss_hessian < 1e-6

    squared = losses.squared_error()
    doubled = dataclasses.replace(
        squared, hessian=lambda z, t: lambda v: jax.tree.map(lambda x: 2 * x, v)
    )
    loss = products(modelled(mlp, doubled), columns=9)
    np.testing.assert_allclose([loss.loss_hessian, loss.ggn], 1.0, rtol=1e-6)
    assert max(loss.jacobian, loss.transpose) < 1e-6


@pytest.mark.slow
def test_networks_that_are_no_toys_are_refused():
    big = jnp.zeros((3, verify.MOST_PARAMETERS))
    f = modelled(lambda p, x: (x @ p)[:, :2])
    with pytest.raises(ValueError, match=r"9000 parameters.*`columns=20`"):
        verify.products(f, big, PROBLEM.batch, key=jax.random.key(0))
    some = verify.products(f, big, PROBLEM.batch, key=jax.random.key(0), columns=3)
    assert max(some) < 1e-6
    wide = modelled(lambda p, x: jnp.tile(mlp(p, x), (1, 51)))
    batch = (X, jnp.tile(T, (1, 51)))
    with pytest.raises(ValueError, match="102 outputs, more than 100"):
        verify.products(wide, PROBLEM.params, batch, key=jax.random.key(0))
