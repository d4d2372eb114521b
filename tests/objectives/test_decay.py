"""Weight decay with several coefficients, one for each part of the parameters' tree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from reference import counted_jit, flat, matrix_of, quick_jit

import hfjax
from hfjax import preconditioners, sample_space
from hfjax.objectives import decay
from hfjax.objectives.objective import weighted_sum

SQUARED_ERROR = hfjax.losses.squared_error()
CURVATURES = {
    "ggn": hfjax.curvature.ggn,
    "hessian": hfjax.curvature.hessian,
    "finite_differences": hfjax.curvature.finite_difference_hessian,
    "fisher": hfjax.curvature.empirical_fisher,
}


def model_fn(params, x):
    body = params["body"]
    return jnp.tanh(x @ body["w"] + body["b"][None]) @ params["out"]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


PARAMS = {
    "body": {"w": normal(0, 2, 3), "b": normal(1, 3)},
    "out": normal(2, 3, 1),
}
BATCH = (normal(3, 5, 2), normal(4, 5, 1))
FLAT, UNRAVEL = ravel_pytree(PARAMS)
# A prefix of the tree, and the β of each entry: those of "b", "w" and "out".
PREFIX = {"body": {"w": 0.3, "b": 0.0}, "out": 0.05}
BETAS = np.repeat([0.0, 0.3, 0.05], [3, 6, 3])


def objective(weight_decay=PREFIX, **options):
    return hfjax.Objective(
        model_fn, SQUARED_ERROR, weight_decay=weight_decay, **options
    )


BARE = objective(0.0)


def dense(product):
    return np.asarray(quick_jit(lambda: matrix_of(product, PARAMS))())


def residuals(vector):
    x, t = BATCH
    return (model_fn(UNRAVEL(vector), x) - t).ravel() / np.sqrt(5)


def loss(vector):
    return 0.5 * jnp.sum(residuals(vector) ** 2)


def ggn():
    j = np.asarray(quick_jit(jax.jacobian(residuals))(FLAT))
    return j.T @ j


@pytest.mark.parametrize("size", [None, 2])
def test_value_and_gradient_have_a_coefficient_for_each_part(size):
    value, gradient = objective(microbatch_size=size).value_and_grad(PARAMS, BATCH)
    truth = loss(FLAT) + 0.5 * np.sum(BETAS * np.asarray(FLAT) ** 2)
    np.testing.assert_allclose(value, truth, rtol=1e-13)
    slope = np.asarray(quick_jit(jax.grad(loss))(FLAT)) + BETAS * np.asarray(FLAT)
    np.testing.assert_allclose(flat(gradient), slope, rtol=1e-11)


@pytest.mark.parametrize("name", CURVATURES)
def test_every_curvature_has_them_on_its_diagonal(name):
    build = CURVATURES[name]
    bare, found = (dense(build(f, PARAMS, BATCH)) for f in (BARE, objective()))
    atol = 1e-7 if name == "finite_differences" else 1e-13
    np.testing.assert_allclose(found - bare, np.diag(BETAS), atol=atol)


def test_every_diagonal_has_them_once():
    estimates = (
        hfjax.diagonals.empirical_fisher,
        hfjax.diagonals.ggn_exact,
        lambda *given: hfjax.diagonals.ggn_rademacher(
            *given, key=jax.random.key(0), num_probes=2
        ),
    )
    for estimate in estimates:
        bare, found = (flat(estimate(f, PARAMS, BATCH)) for f in (BARE, objective()))
        np.testing.assert_allclose(found - bare, BETAS, atol=1e-13)


def test_a_prefix_counts_for_all_leaves_below_it():
    prefix, whole = {"body": 0.3, "out": 0.05}, {"body": {"w": 0.3, "b": 0.3}}
    ours, theirs = (
        objective(x).value_and_grad(PARAMS, BATCH)
        for x in (prefix, whole | {"out": 0.05})
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-13), ours, theirs
    )


def test_one_number_and_the_same_number_everywhere_are_alike():
    tree = jax.tree.map(lambda _: 0.2, PARAMS)
    one, many = (objective(x).value_and_grad(PARAMS, BATCH) for x in (0.2, tree))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-13), one, many)


def test_an_integer_is_a_number():
    value = objective({"body": 0, "out": 1}).value(PARAMS, BATCH)
    square = jnp.sum(PARAMS["out"] ** 2)
    np.testing.assert_allclose(value, loss(FLAT) + 0.5 * square, rtol=1e-13)
    d = hfjax.diagonals.ggn_exact(objective({"body": 0, "out": 1}), PARAMS, BATCH)
    np.testing.assert_allclose(flat(d), np.diag(ggn()) + (BETAS == 0.05), rtol=1e-12)


def test_a_part_without_decay_may_be_infinite():
    def masked(params, x):
        return jnp.exp(params["mask"])[None] * (x @ params["w"])

    f = hfjax.Objective(masked, SQUARED_ERROR, weight_decay={"w": 0.1, "mask": 0.0})
    params = {"w": jnp.ones((2, 2)), "mask": jnp.array([0.0, -jnp.inf])}
    batch = (jnp.ones((3, 2)), jnp.ones((3, 2)))
    value, gradient = f.value_and_grad(params, batch)
    np.testing.assert_allclose(value, 0.5 * 1 + 0.5 * 1 + 0.05 * 4)
    assert np.all(np.isfinite(flat(gradient)))


def test_schedules_may_stand_for_any_of_the_numbers():
    schedule = optax.piecewise_constant_schedule(0.3, {10: 0.5})
    f = objective({"body": {"w": schedule, "b": 0.0}, "out": 0.05})
    with pytest.raises(TypeError, match="`weight_decay` is a schedule: say when"):
        f.value(PARAMS, BATCH)
    for count, times in ((0, 1.0), (10, 0.5)):
        d = flat(hfjax.diagonals.ggn_exact(f.at(count), PARAMS, BATCH)) - np.diag(ggn())
        truth = np.where(BETAS == 0.3, times * BETAS, BETAS)
        np.testing.assert_allclose(d, truth, atol=1e-13)
    assert objective().at(3).weight_decay is PREFIX


def test_a_schedule_that_jax_takes_for_a_tree_is_a_schedule():
    schedule = jax.tree_util.Partial(lambda scale, count: scale / (1 + count), 0.4)
    f = objective(schedule).at(1)
    np.testing.assert_allclose(f.weight_decay, 0.2)


def test_terms_of_a_sum_may_have_different_prefixes():
    parts = [(2.0, objective()), (0.5, objective({"body": 0.0, "out": 0.4}))]
    f = weighted_sum([*parts, (1.0, objective(0.1))])
    betas = 2 * BETAS + 0.5 * np.repeat([0.0, 0.4], [9, 3]) + 0.1
    product = dense(hfjax.curvature.ggn(f, PARAMS, (BATCH,) * 3))
    np.testing.assert_allclose(product, 3.5 * ggn() + np.diag(betas), atol=1e-12)
    # The exact solver and preconditioners take the sum apart by themselves.
    step = exact_step(f, (BATCH,) * 3, "samples")
    np.testing.assert_allclose(
        step, solution(3.5 * ggn(), betas, f, (BATCH,) * 3), rtol=1e-9
    )
    with pytest.raises(AttributeError, match="no `weight_decay`: its parts have"):
        f.weight_decay  # noqa: B018


def solution(matrix, betas, f, batch, damping=0.1):
    gradient = flat(f.value_and_grad(PARAMS, batch)[1])
    return np.linalg.solve(matrix + np.diag(betas + damping), -gradient)


def exact_step(f, batch, space, damping=0.1):
    tx = hfjax.hessian_free(
        f,
        solver=sample_space.cholesky(space=space, corrections=0),
        damping=hfjax.damping.constant(damping),
        backtracking=None,
        line_search=None,
    )
    grads = f.value_and_grad(PARAMS, batch)[1]
    update = quick_jit(tx.update)
    updates, state = update(grads, tx.init(PARAMS), PARAMS, batch=batch)
    step, gradient = flat(updates), flat(grads)
    assert state.info.accepted
    # M of the step, which ρ has without damping, is that of the dense matrix, too.
    g = dense(hfjax.curvature.ggn(f, PARAMS, batch))
    model = 0.5 * step @ g @ step + gradient @ step
    np.testing.assert_allclose(state.info.predicted_change, model, rtol=1e-8)
    return step


@pytest.mark.parametrize("space", ["samples", "parameters"])
@pytest.mark.parametrize("damping", [1e-6, 0.1, 10.0])
def test_the_exact_step_is_that_of_the_dense_matrix(space, damping):
    f = objective()
    step = exact_step(f, BATCH, space, damping)
    truth = solution(ggn(), BETAS, f, BATCH, damping)
    np.testing.assert_allclose(step, truth, rtol=1e-6)


@pytest.mark.parametrize("space", ["samples", "parameters"])
def test_momentum_of_the_exact_solver_subtracts_the_decay_of_the_last_step(space):
    f, before = objective(), jax.tree.map(jnp.cos, PARAMS)
    solver = sample_space.cholesky(space=space, momentum=0.5, corrections=0)
    tx = hfjax.hessian_free(
        f,
        solver=solver,
        damping=hfjax.damping.constant(0.1),
        backtracking=None,
        line_search=None,
    )
    grads = f.value_and_grad(PARAMS, BATCH)[1]
    state = tx.init(PARAMS)._replace(direction=before)
    new = quick_jit(tx.update)(grads, state, PARAMS, batch=BATCH)[1]
    matrix = ggn() + np.diag(BETAS + 0.1)
    truth = np.linalg.solve(matrix, -flat(grads) + 0.1 * 0.5 * flat(before))
    # The direction is kept even if f rose along it, unless nothing was accepted.
    assert new.info.accepted
    np.testing.assert_allclose(flat(new.direction), truth, rtol=1e-9)


def test_a_full_sketch_inverts_the_whole_damped_matrix():
    rule = preconditioners.nystrom(rank=12)
    build = quick_jit(
        lambda r: rule.build(
            objective(), PARAMS, BATCH, jnp.float64(0.1), jax.random.key(0)
        )(r)
    )
    r = UNRAVEL(jnp.cos(jnp.arange(12.0)))
    a = ggn() + np.diag(BETAS + 0.1)
    found = flat(build(UNRAVEL(jnp.asarray(a @ flat(r)))))
    scale = found[0] / flat(r)[0]
    np.testing.assert_allclose(found, scale * flat(r), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("damping", ["scalar", "diagonal"])
def test_factors_are_damped_by_the_decay_of_their_own_layer(damping):
    """P with λ and β is P with λ + β for D and no weight decay."""
    rule, key = preconditioners.kronecker(cases=None), jax.random.key(0)
    lam = jnp.float64(0.1)
    if damping == "diagonal":
        lam = jax.tree.map(lambda x: 0.1 + x**2, PARAMS)
    whole = jax.tree.broadcast(lam, PARAMS)
    whole = jax.tree.map(lambda d, b: d + b, whole, UNRAVEL(jnp.asarray(BETAS)))

    @quick_jit
    def both(r):
        found = rule.build(objective(), PARAMS, BATCH, lam, key)(r)
        return found, rule.build(BARE, PARAMS, BATCH, whole, key)(r)

    ours, truth = both(jax.tree.map(jnp.cos, PARAMS))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10), ours, truth)
    # The same λ for all layers would be something else.
    mean = rule.build(objective(0.1), PARAMS, BATCH, lam, key)
    assert np.max(np.abs(flat(mean(PARAMS)) / flat(ours) - 1)) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        preconditioners.kronecker(interval=2, decay=0.5),
        preconditioners.nystrom(rank=4, interval=2),
        preconditioners.diagonal(),
    ],
    ids=["kronecker", "nystrom", "diagonal"],
)
def test_conjugate_gradients_reach_the_dense_step_with_every_preconditioner(rule):
    f = objective()
    tx = hfjax.hessian_free(
        f,
        solver=hfjax.cg.conjugate_gradient(max_iterations=40, stopping=None),
        damping=hfjax.damping.constant(0.1),
        preconditioner=rule,
        backtracking=None,
        line_search=None,
    )
    grads = f.value_and_grad(PARAMS, BATCH)[1]
    (update, traced), state = counted_jit(tx.update), tx.init(PARAMS)
    for _ in range(2):
        state = state._replace(direction=jax.tree.map(jnp.zeros_like, PARAMS))
        updates, state = update(grads, state, PARAMS, batch=BATCH)
        truth = solution(ggn(), BETAS, f, BATCH)
        np.testing.assert_allclose(flat(updates), truth, rtol=1e-8)
    assert len(traced) == 1


def test_what_is_no_prefix_or_no_number_is_refused():
    with pytest.raises(ValueError, match=r"`weight_decay\['out'\]` must be at least 0"):
        objective({"body": 0.1, "out": -0.1})
    with pytest.raises(TypeError, match=r"`weight_decay\['out'\]` must be a real num"):
        objective({"body": 0.1, "out": True})
    with pytest.raises(ValueError, match=r"`weight_decay\['out'\]` must be one number"):
        objective({"body": 0.1, "out": jnp.ones(3)})
    for wrong in ({"body": 0.1}, [0.1, 0.2], {"body": {"w": {"x": 1.0}}, "out": 0.1}):
        with pytest.raises(ValueError, match="must be a number or a tree prefix"):
            objective(wrong).value(PARAMS, BATCH)


def test_spread_has_an_entry_for_every_leaf():
    assert decay.spread({"body": 0.3, "out": 0.0}, PARAMS) == {
        "body": {"b": 0.3, "w": 0.3},
        "out": 0.0,
    }
    assert decay.spread(0.5, PARAMS["body"]) == {"b": 0.5, "w": 0.5}


# What `hfjax.verify` says.


def test_products_are_verified_against_differences_with_each_coefficient():
    errors = hfjax.verify.products(objective(), PARAMS, BATCH, key=jax.random.key(0))
    assert max(errors) < 1e-6


@pytest.mark.parametrize(
    ("times", "words"),
    [
        (0, "`grads` lacks the weight decay of the objective, 0 to 0.3 θ"),
        (2, r"has the objective's weight decay 0 to 0.3 twice: leave it to"),
    ],
)
def test_decay_that_is_missing_or_counted_twice_is_named(times, words):
    f, bare = objective(), BARE.value_and_grad(PARAMS, BATCH)[1]
    check, tx = hfjax.verify.check, hfjax.hessian_free(f)
    decayed = f.value_and_grad(PARAMS, BATCH)[1]
    assert check(f, None, PARAMS, BATCH, decayed) == []
    grads = jax.tree.map(lambda b, d: b + times * (d - b), bare, decayed)
    (fault, *_) = check(f, None if times else tx, PARAMS, BATCH, grads)
    assert words in fault
