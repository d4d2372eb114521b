import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.flatten_util import ravel_pytree
from problems import every_problem, layers, mlp, named, normal
from reference import flat, quick_jit

import hfjax
from hfjax import diagonals
from hfjax._core.arguments import with_key
from hfjax.curvature import _case_gradients

SQUARED = hfjax.losses.squared_error()


def fisher(problem, **options):
    objective = problem.objective(**options)
    diagonal = quick_jit(functools.partial(diagonals.empirical_fisher, objective))
    return diagonal(problem.params, problem.batch)


def held(objective, params, batch):
    """Return how many entries of a case's gradient have to be formed."""

    def gradient(case):
        one = jax.tree.map(lambda leaf: leaf[None], case)
        return jax.grad(lambda params: objective.case_values(params, one)[0])(params)

    return _case_gradients.held_entries(gradient, batch[:2])


@every_problem
def test_diagonal_equals_dense(problem):
    truth = reference.empirical_fisher(problem)
    np.testing.assert_allclose(flat(fisher(problem)), truth, rtol=1e-10, atol=1e-20)


def test_diagonal_equals_squares_of_reverse_mode_case_gradients():
    problem = named("mlp_softmax")
    x, t = problem.batch

    def values(params):
        return -jnp.sum(t * jax.nn.log_softmax(mlp(params, x)), axis=1)

    gradients = quick_jit(jax.jacrev(values))(problem.params)
    truth = jax.tree.map(lambda leaf: jnp.mean(leaf**2, axis=0) + 0.02, gradients)
    np.testing.assert_allclose(flat(fisher(problem)), flat(truth), rtol=1e-10)


def test_dense_layers_are_not_formed_case_by_case():
    rng = np.random.default_rng(0)
    params = layers(rng, 30, 40, 20, 10)
    weights = sum(w.size for w, _ in params)
    objective = hfjax.Objective(mlp, SQUARED)
    batch = (jnp.ones((6, 30)), jnp.ones((6, 10)))
    # Biases are formed; they are few.
    assert held(objective, params, batch) == 40 + 20 + 10
    assert weights > 2000
    # Nor in a program under jit, in another notation, or with parts transposed.
    jitted = hfjax.Objective(jax.jit(mlp), SQUARED)
    assert held(jitted, params, batch) == 70

    def einsum(params, x):
        (w, _), (u, _), (out, _) = params
        hidden = jnp.tanh(jnp.einsum("bi,ij->bj", x, w))
        hidden = jnp.tanh(jnp.einsum("kj,bj->bk", u.T, hidden))
        return jax.lax.dot_general(hidden, out, (((1,), (0,)), ((), ())))

    assert held(hfjax.Objective(einsum, SQUARED), params, batch) == 70
    # Nor where layers are checkpointed.
    assert held(hfjax.Objective(recomputed, SQUARED), params, batch) == 70


def recomputed(params, x):
    """Run `mlp`, every hidden layer for itself recomputed on the way back."""
    *hidden, last = params
    for layer in hidden:
        x = jax.checkpoint(lambda layer, x: jnp.tanh(mlp([layer], x)))(layer, x)
    return mlp([last], x)


def test_the_diagonal_of_checkpointed_layers_equals_dense():
    problem = named("mlp_squared_error")
    found = fisher(dataclasses.replace(problem, model_fn=recomputed))
    truth = reference.empirical_fisher(problem)
    np.testing.assert_allclose(flat(found), truth, rtol=1e-10, atol=1e-20)


def test_no_array_of_cases_by_weights_is_in_the_program():
    rng = np.random.default_rng(0)
    params = layers(rng, 30, 40, 10)
    objective = hfjax.Objective(mlp, SQUARED)
    batch = (jnp.ones((6, 30)), jnp.ones((6, 10)))
    program = jax.make_jaxpr(functools.partial(diagonals.empirical_fisher, objective))(
        params, batch
    )
    largest = max(
        var.aval.size for equation in program.eqns for var in equation.outvars
    )
    assert largest <= 30 * 40


def test_shared_and_convolved_weights_are_formed():
    for name in ("convolution", "recurrent"):
        problem = named(name)
        kept = held(problem.objective(), problem.params, problem.batch)
        assert kept >= 16  # The kernel, the recurrent and input weights.


@pytest.mark.parametrize(("name", "cases_at_once"), [("convolution", 3), ("frozen", 1)])
def test_chunks_of_cases_change_nothing(name, cases_at_once, monkeypatch):
    problem = named(name)
    entries = held(problem.objective(), problem.params, problem.batch)
    monkeypatch.setattr(diagonals, "_HELD_ENTRIES", cases_at_once * entries)
    seen = []
    sum_of_squares = _case_gradients.sum_of_squares

    def spy(case_gradient, data, weights):
        seen.append(len(weights))
        return sum_of_squares(case_gradient, data, weights)

    monkeypatch.setattr(_case_gradients, "sum_of_squares", spy)
    truth = reference.empirical_fisher(problem)
    np.testing.assert_allclose(flat(fisher(problem)), truth, rtol=1e-10, atol=1e-20)
    assert max(seen) <= cases_at_once


def test_a_jitted_model_has_the_same_diagonal():
    problem = named("mlp_sigmoid")

    @jax.jit
    def half(layer, x):
        w, b = layer
        return jnp.tanh(x @ w + b[None])

    @jax.jit
    def model_fn(params, x):
        first, second, (w, b) = params
        return jax.jit(half)(second, half(first, x)) @ w + b[None]

    objective = hfjax.Objective(model_fn, hfjax.losses.sigmoid_cross_entropy())
    diagonal = quick_jit(functools.partial(diagonals.empirical_fisher, objective))
    found = flat(diagonal(problem.params, problem.batch))
    np.testing.assert_allclose(found, reference.empirical_fisher(problem), rtol=1e-10)


def tied(w, x):
    return jnp.tanh(x @ w) @ w.T


def outer_inside(w, x):
    # A product over the cases that is no gradient, and is used further.
    pairs = jnp.einsum("bi,bj->bij", x, jnp.sin(x))
    return jnp.einsum("bij,jk->bik", pairs, w)


def scaled(w, x):
    return x @ (0.5 * jnp.square(w))


def checkpointed(w, x):
    return jax.checkpoint(lambda w: jnp.tanh(x @ w))(w)


def branching(w, x):
    return jax.lax.cond(w[0, 0] > 0, lambda: x @ w, lambda: x @ (2 * w))


def with_its_own_derivative(w, x):
    return jax.nn.relu(x @ w) + jax.nn.silu(x) @ w


def twice_in_short_floats(w, x):
    short = (x.astype(jnp.float32) @ w.astype(jnp.float32)).astype(x.dtype)
    return short + jnp.sin(x) @ w


def scaled_in_short_floats(w, x):
    return (x.astype(jnp.float32) @ (0.5 * w).astype(jnp.float32)).astype(x.dtype)


@pytest.mark.parametrize(
    "model_fn",
    [
        tied,
        outer_inside,
        scaled,
        checkpointed,
        branching,
        with_its_own_derivative,
        twice_in_short_floats,
        scaled_in_short_floats,
    ],
)
def test_products_that_are_used_further_are_formed(model_fn):
    rng = np.random.default_rng(4)
    x, w = normal(rng, 5, 3), normal(rng, 3, 3)
    objective = hfjax.Objective(model_fn, SQUARED)
    t = jnp.zeros(jax.eval_shape(model_fn, w, x).shape)
    diagonal = quick_jit(functools.partial(diagonals.empirical_fisher, objective))

    def values(w):
        return jnp.sum(0.5 * model_fn(w, x).reshape(5, -1) ** 2, axis=1)

    truth = np.mean(np.square(quick_jit(jax.jacrev(values))(w)), axis=0)
    tolerance = 1e-5 if "short" in model_fn.__name__ else 1e-10
    np.testing.assert_allclose(diagonal(w, (x, t)), truth, rtol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_diagonal_is_in_float32_or_wider(dtype):
    problem = named("mlp_sigmoid")
    params, batch = jax.tree.map(
        lambda leaf: leaf.astype(dtype), (problem.params, problem.batch)
    )
    diagonal = quick_jit(
        functools.partial(diagonals.empirical_fisher, problem.objective())
    )(params, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(diagonal)} == {jnp.dtype("float32")}
    truth = reference.empirical_fisher(problem)
    error = np.linalg.norm(flat(diagonal) - truth) / np.linalg.norm(truth)
    assert error < (1e-5 if dtype == jnp.float32 else 0.1)
    assert np.min(flat(diagonal)) >= 0


@functools.cache
def drawn(problem, num_probes=1):
    """Compile keys ↦ estimates `[keys, n]` of diag(G)."""
    given = (problem.objective(), problem.params, problem.batch)

    def estimate(key):
        drawn = diagonals.ggn_rademacher(*given, key=key, num_probes=num_probes)
        return ravel_pytree(drawn)[0]

    return quick_jit(jax.vmap(estimate))


def deviation(problem):
    """Bound the standard deviation of one draw, entry by entry.

    Of a case the estimate is (aᵀs)², with a variance of 2 (‖a‖⁴ − Σ a⁴) ≤ 2 ‖a‖⁴, and
    ‖a‖² is its entry of diag(G), whatever S is.
    """
    weights = reference.parts(problem.batch)[2]
    each = np.diagonal(reference.dense(problem).ggns, axis1=1, axis2=2)
    return np.sqrt(2 * np.sum((weights[:, None] * each) ** 2, axis=0)) / np.sum(weights)


@every_problem
def test_exact_diagonal_equals_dense(problem):
    diagonal = quick_jit(functools.partial(diagonals.ggn_exact, problem.objective()))
    truth = np.diag(reference.ggn(problem))
    found = flat(diagonal(problem.params, problem.batch))
    atol = 1e-13 * np.max(truth)
    np.testing.assert_allclose(found, truth, rtol=1e-9, atol=atol)


@pytest.mark.parametrize(
    "name", ["softmax_masses", "two_heads", "recurrent", "integer_labels", "nested"]
)
def test_random_diagonal_is_unbiased(name):
    problem, draws = named(name), 3000
    estimates = np.asarray(drawn(problem)(jax.random.split(jax.random.key(1), draws)))
    truth = np.diag(reference.ggn(problem))
    bound = 5 * deviation(problem) / np.sqrt(draws) + 1e-13
    assert np.all(np.abs(np.mean(estimates, axis=0) - truth) <= bound)
    assert np.all(estimates >= 0)


@pytest.mark.slow
def test_the_mean_of_probes_varies_as_much_less_as_there_are_probes():
    problem, draws = named("softmax_masses"), 1000
    keys = jax.random.split(jax.random.key(2), draws)
    one, four = (
        np.sum(np.var(drawn(problem, probes)(keys), axis=0)) for probes in (1, 4)
    )
    np.testing.assert_allclose(one / four, 4, rtol=0.2)


def test_every_case_and_output_has_signs_of_its_own():
    # All cases alike, so that their mean is the truth if only their signs are not.
    cases, rng = 2000, np.random.default_rng(3)
    mix = normal(rng, 2, 4)
    objective = hfjax.Objective(lambda w, x: (x * w[None]) @ mix, SQUARED)
    batch = (jnp.ones((cases, 2)), jnp.zeros((cases, 4)))
    estimate = quick_jit(functools.partial(diagonals.ggn_rademacher, objective))
    diagonal = estimate(jnp.ones(2), batch, key=jax.random.key(0))
    truth = np.sum(np.square(mix), axis=1)
    bound = 5 * np.sqrt(2 / cases) * truth
    assert np.all(np.abs(diagonal - truth) <= bound)


def test_random_diagonal_of_outputs_that_share_no_parameter_is_exact():
    rng = np.random.default_rng(5)
    x, p = normal(rng, 6, 3), normal(rng, 3)
    loss = hfjax.losses.sigmoid_cross_entropy()
    objective = hfjax.Objective(lambda p, x: x * p[None], loss, weight_decay=0.5)
    batch = (x, jnp.full((6, 3), 0.3))

    @quick_jit
    def draw(key):
        return diagonals.ggn_rademacher(objective, p, batch, key=key, num_probes=2)

    z = np.asarray(x * p[None])
    truth = np.mean(x**2 / (2 + np.exp(z) + np.exp(-z)), axis=0) + 0.5
    for seed in range(3):
        diagonal = draw(jax.random.key(seed))
        np.testing.assert_allclose(diagonal, truth, rtol=1e-12)


@pytest.mark.slow
def test_signs_do_not_depend_on_microbatches_but_on_the_key():
    problem = named("softmax_soft_targets")

    def diagonal(objective):
        return quick_jit(
            lambda key: diagonals.ggn_rademacher(
                objective, problem.params, problem.batch, key=key, num_probes=2
            )
        )

    whole = diagonal(problem.objective())
    parts = diagonal(problem.objective(microbatch_size=3))
    first, other = jax.random.key(0), jax.random.key(1)
    truth = flat(whole(first))
    np.testing.assert_allclose(flat(parts(first)), truth, rtol=1e-10)
    assert np.max(np.abs(flat(parts(other)) / truth - 1)) > 1e-2


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_random_diagonal_takes_keys_of_any_implementation(implementation):
    objective = hfjax.Objective(lambda p, x: x * p[None], SQUARED)
    key = jax.random.key(0, impl=implementation)
    batch = (jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.zeros((2, 2)))
    diagonal = diagonals.ggn_rademacher(objective, jnp.zeros(2), batch, key=key)
    np.testing.assert_allclose(diagonal, [5.0, 2.0])


def test_estimates_that_ask_for_a_key_are_given_one():
    def with_default(objective, params, batch, *, key=None):
        raise NotImplementedError

    def asking(objective, params, batch, *, key):
        return key

    key = jax.random.key(3)
    for estimate in (diagonals.ggn_exact, diagonals.empirical_fisher, with_default):
        assert with_key(estimate, key) is estimate
    given = functools.partial(asking, key=jax.random.key(0))
    assert with_key(given, key) is given
    bound = functools.partial(diagonals.ggn_rademacher, num_probes=4)
    assert with_key(bound, key).keywords == {"num_probes": 4, "key": key}
    assert with_key(asking, key)(None, None, None) is key


@pytest.mark.parametrize(
    ("probes", "error", "message"),
    [
        (0, ValueError, "`num_probes` must be at least 1, got 0"),
        (2.0, TypeError, "`num_probes` must be a Python integer, got float"),
    ],
)
def test_a_number_of_probes_that_is_none_is_refused(probes, error, message):
    objective = hfjax.Objective(lambda p, x: x * p[None], SQUARED)
    batch = (jnp.ones((2, 2)), jnp.zeros((2, 2)))
    with pytest.raises(error, match=message):
        diagonals.ggn_rademacher(
            objective, jnp.zeros(2), batch, key=jax.random.key(0), num_probes=probes
        )


@pytest.mark.parametrize("name", ["empirical_fisher", "ggn_exact", "ggn_rademacher"])
def test_diagonals_of_a_scheduled_weight_decay_ask_when(name):
    objective = hfjax.Objective(
        lambda p, x: x * p[None], SQUARED, weight_decay=lambda count: 1.0 / (1 + count)
    )
    options = {"key": jax.random.key(0)} if name == "ggn_rademacher" else {}
    batch = (jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [1.0]]))
    estimate = functools.partial(getattr(diagonals, name), **options)
    diagonal = estimate(objective.at(3), jnp.zeros(1), batch)
    data = 2.5  # Mean of 1² and 2²; the errors are 1.
    np.testing.assert_allclose(diagonal, [data + 0.25], rtol=1e-12)
    with pytest.raises(TypeError, match="`weight_decay` is a schedule: say when"):
        estimate(objective, jnp.zeros(1), batch)
