"""Structural damping (report, section 8.4): μS beside the curvature, and its price."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from problems import HIDDEN, every_hidden_problem, layers, normal
from reference import flat, matrix_of, quick_jit

import hfjax
from hfjax import curvature, diagonals
from hfjax.curvature.structural import hidden_distance, with_structural_loss
from hfjax.objectives.plain import terms_of

TRUTHS = {"ggn": reference.ggn, "hessian": reference.hessian}
SQUARED = hfjax.losses.squared_error()


@functools.cache
def damped_matrices(problem, microbatch_size, linearize_once):
    """Compile μ ↦ the matrices with structural damping, and the Fisher's, without."""
    objective = problem.objective(
        microbatch_size=microbatch_size, linearize_once=linearize_once
    )

    def matrices(mu):
        params, batch = problem.params, problem.batch
        products = {
            name: getattr(curvature, name)(objective, params, batch, structural=mu)
            for name in TRUTHS
        }
        products["fisher"] = curvature.empirical_fisher(objective, params, batch)
        return {name: matrix_of(v, params) for name, v in products.items()}

    return quick_jit(matrices)


TANH, LOGISTIC, LAYERS = HIDDEN


@pytest.mark.parametrize(
    ("problem", "microbatch_size", "linearize_once"),
    [(TANH, None, False), (TANH, 2, False), (LOGISTIC, 3, True), (LAYERS, 2, True)],
)
def test_structural_damping_adds_mu_times_the_curvature_of_the_hidden_states(
    problem, microbatch_size, linearize_once
):
    matrices = damped_matrices(problem, microbatch_size, linearize_once)
    for mu in (0.0, 0.7):
        penalty = mu * reference.structural(problem)
        truths = {name: truth(problem) + penalty for name, truth in TRUTHS.items()}
        truths["fisher"] = reference.empirical_fisher_matrix(problem)
        for name, matrix in matrices(mu).items():
            np.testing.assert_allclose(
                matrix, truths[name], rtol=1e-9, atol=1e-13, err_msg=name
            )


@every_hidden_problem
def test_the_distance_of_hidden_states_adds_nothing_to_f_or_its_gradient(problem):
    objective = problem.objective()

    @quick_jit
    def both(params, batch):
        damped = with_structural_loss(objective, 3.0)
        return (
            objective.value_and_grad(params, batch),
            damped.value_and_grad(params, batch)[1],
            objective.case_values(params, batch),
        )

    (value, gradient), damped, cases = both(problem.params, problem.batch)
    np.testing.assert_allclose(value, reference.value(problem), rtol=1e-12)
    truth = reference.gradient(problem)
    np.testing.assert_allclose(flat(gradient), truth, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(flat(damped), truth, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(cases, reference.dense(problem).values, rtol=1e-12)


def test_the_distance_is_of_states_near_by_from_those_at_theta():
    # S is the Hessian of δ ↦ d(h(θ + δ); h(θ)) at 0: here by differences of d itself.
    x, w = jnp.asarray([[0.5], [2.0]]), jnp.asarray(0.8)

    def distance(delta):
        before, after = np.tanh(0.8 * x), np.tanh((0.8 + delta) * x)
        return np.mean(0.5 * np.sum((after - before) ** 2, axis=1))

    step = 1e-4
    truth = (distance(step) - 2 * distance(0.0) + distance(-step)) / step**2
    objective = hfjax.Objective(
        lambda w, x: (0 * w * x, jnp.tanh(w * x)), SQUARED, hidden_loss=SQUARED
    )
    for name in ("ggn", "hessian"):
        product = getattr(curvature, name)(objective, w, (x, 0 * x), structural=1.0)
        np.testing.assert_allclose(product(jnp.ones(())), truth, rtol=1e-6)


def test_predictions_of_a_joined_loss_are_those_of_outputs_and_of_hidden_states():
    # Each by its own link, from its own place in the pair.
    f = hfjax.Objective(
        lambda p, x: (x @ p, 2 * x @ p),
        hfjax.losses.sigmoid_cross_entropy(),
        hidden_loss=hfjax.losses.softmax_cross_entropy(),
    )
    outputs, hidden = jnp.array([[1.0, -2.0]]), jnp.array([[0.5, 3.0]])
    of_outputs, of_hidden = with_structural_loss(f, 0.3).loss.predict((outputs, hidden))
    np.testing.assert_allclose(of_outputs, 1 / (1 + np.exp(-outputs)), rtol=1e-12)
    exponentials = np.exp(hidden)
    np.testing.assert_allclose(of_hidden, exponentials / exponentials.sum(), rtol=1e-12)
    distance = hidden_distance(f).loss.predict(hidden)
    np.testing.assert_allclose(distance, of_hidden, rtol=1e-12)


def test_outputs_leave_the_hidden_states_out():
    (term,) = terms_of(TANH.objective(), TANH.batch)
    outputs = term.outputs(TANH.params, TANH.batch[0])
    np.testing.assert_array_equal(outputs, TANH.pair_fn(TANH.params, TANH.batch[0])[0])


def deep(rng, steps, inputs, units, outputs):
    """Return a recurrent network without a loop, whose flops a compiler counts."""
    params = {
        "in": normal(rng, inputs, units),
        "recurrent": normal(rng, units, units, scale=0.1),
        "out": normal(rng, units, outputs),
    }

    def pair_fn(params, x):
        h, all_states = jnp.zeros((len(x), units)), []
        for k in range(steps):
            h = jnp.tanh(x[:, k] @ params["in"] + h @ params["recurrent"])
            all_states.append(h)
        states = jnp.stack(all_states, axis=1)
        return states @ params["out"], states

    return params, pair_fn


def flops(product, v):
    return quick_jit(product).lower(v).compile().cost_analysis()["flops"]


@pytest.mark.slow
def test_structural_damping_costs_at_most_a_twentieth_of_a_product():
    params, pair_fn = deep(np.random.default_rng(0), 5, 10, 64, 10)
    objective = hfjax.Objective(pair_fn, SQUARED, hidden_loss=SQUARED)
    batch = (jnp.ones((16, 5, 10)), jnp.ones((16, 5, 10)))
    plain, damped = (
        flops(curvature.ggn(objective, params, batch, structural=mu), params)
        for mu in (None, 0.5)
    )
    # Jv: three products a step (two at the first), Jᵀ as many.
    least = 2 * 2 * 16 * (5 * (10 * 64 + 64 * 10) + 4 * 64 * 64)
    assert least <= plain
    assert plain <= damped <= 1.05 * plain


@pytest.mark.parametrize("structural", [None, 0.5])
def test_a_model_without_hidden_states_is_refused_by_name(structural):
    objective = hfjax.Objective(lambda w, x: x @ w, SQUARED, hidden_loss=SQUARED)
    batch, w = (jnp.ones((4, 3)), jnp.ones((4, 2))), jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"must return \(outputs, hidden\), got"):
        curvature.ggn(objective, w, batch, structural=structural)
    with pytest.raises(ValueError, match=r"must return \(outputs, hidden\), got"):
        objective.value(w, batch)


def test_a_model_that_returns_three_things_is_refused():
    objective = hfjax.Objective(
        lambda w, x: (x @ w, x, x), SQUARED, hidden_loss=SQUARED
    )
    with pytest.raises(ValueError, match="got a tuple of 3"):
        objective.value(jnp.ones((3, 2)), (jnp.ones((4, 3)), jnp.ones((4, 2))))


def test_hidden_states_must_lead_with_the_cases():
    objective = hfjax.Objective(
        lambda w, x: (x @ w, (x @ w).T), SQUARED, hidden_loss=SQUARED
    )
    batch, w = (jnp.ones((4, 3)), jnp.ones((4, 2))), jnp.ones((3, 2))
    with pytest.raises(ValueError, match="case axis first"):
        curvature.ggn(objective, w, batch, structural=1.0)


@pytest.mark.parametrize("name", TRUTHS)
def test_structural_damping_without_a_hidden_loss_is_refused(name):
    objective = hfjax.Objective(lambda w, x: x @ w, SQUARED)
    batch, w = (jnp.ones((4, 3)), jnp.ones((4, 2))), jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"needs hidden states.*`hidden_loss`"):
        getattr(curvature, name)(objective, w, batch, structural=1.0)


def test_an_update_refuses_structural_damping_without_a_hidden_loss():
    objective = hfjax.Objective(lambda w, x: x @ w, SQUARED)
    damping = hfjax.damping.constant(1.0, structural=1.0)
    with pytest.raises(ValueError, match="`damping` is structural, but `objective`"):
        hfjax.hessian_free(objective, damping=damping)


def test_a_hidden_loss_that_is_no_loss_is_refused():
    with pytest.raises(TypeError, match="`hidden_loss` must be an"):
        hfjax.Objective(lambda w, x: (x, x), SQUARED, hidden_loss="squared_error")


@every_hidden_problem
def test_exact_diagonal_contains_structural_damping(problem):
    objective = problem.objective()

    @quick_jit
    def diagonal(mu):
        return diagonals.ggn_exact(
            with_structural_loss(objective, mu), problem.params, problem.batch
        )

    for mu in (0.0, 2.0):
        truth = reference.ggn(problem) + mu * reference.structural(problem)
        np.testing.assert_allclose(
            flat(diagonal(mu)), np.diag(truth), rtol=1e-9, atol=1e-14
        )


@pytest.mark.slow
def test_random_diagonal_contains_structural_damping():
    problem, mu, draws = LAYERS, 2.0, 2000
    objective = problem.objective(microbatch_size=3)

    @quick_jit
    def mean(keys):
        damped = with_structural_loss(objective, mu)
        draw = jax.vmap(
            lambda key: diagonals.ggn_rademacher(
                damped, problem.params, problem.batch, key=key
            )
        )
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), draw(keys))

    cases = reference.dense(problem).ggns + mu * reference.structural_cases(problem)
    weights = reference.parts(problem.batch)[2]
    each = np.diagonal(cases, axis1=1, axis2=2)
    truth = reference.mean(each, weights) + problem.weight_decay
    # A case's estimate (aᵀs)² has a variance of at most 2 ‖a‖⁴, and ‖a‖² is the truth.
    deviation = np.sqrt(2 * np.sum((weights[:, None] * each) ** 2, axis=0) / draws)
    estimate = flat(mean(jax.random.split(jax.random.key(0), draws)))
    assert np.all(np.abs(estimate - truth) <= 5 * deviation / np.sum(weights) + 1e-12)


def test_hidden_states_that_do_not_meet_the_outputs_are_damped_too():
    rng = np.random.default_rng(3)
    params = {"used": layers(rng, 3, 2)[0], "unused": normal(rng, 3, 2)}

    def pair_fn(params, x):
        w, b = params["used"]
        return x @ w + b[None], x @ params["unused"]

    objective = hfjax.Objective(pair_fn, SQUARED, hidden_loss=SQUARED)
    x, v = normal(rng, 5, 3), jax.tree.map(jnp.ones_like, params)
    product = curvature.ggn(objective, params, (x, x[:, :2]), structural=2.0)(v)
    np.testing.assert_allclose(
        product["unused"], 2 * x.T @ x @ jnp.ones((3, 2)) / 5, rtol=1e-12
    )
