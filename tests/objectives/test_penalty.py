"""Terms that read the parameters and no data."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from reference import flat, matrix_of, quick_jit

import hfjax
from hfjax import preconditioners, sample_space
from hfjax.objectives.objective import penalty, weighted_sum

EPSILON = 0.3


def model_fn(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"]


def smooth_l1(params):
    return sum(jnp.sum(jnp.sqrt(p**2 + EPSILON**2)) for p in jax.tree.leaves(params))


def group_lasso(params):
    """Of the columns of one kernel: units of a layer, which it may remove."""
    squares = jnp.sum(params["w"] ** 2, axis=0) + EPSILON**2
    return jnp.sum(jnp.sqrt(squares))


def per_layer(params):
    return 0.5 * (0.2 * jnp.sum(params["w"] ** 2) + 0.7 * jnp.sum(params["v"] ** 2))


PENALTIES = {"l1": smooth_l1, "group": group_lasso, "per_layer": per_layer}
SIZE, STRENGTH = 16, 0.4


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


PARAMS = {"w": normal(0, 2, 4), "b": normal(1, 4), "v": normal(2, 4, 1)}
DATA = (normal(3, 5, 2), normal(4, 5, 1))
BATCH = (DATA, ())
FLAT, UNRAVEL = ravel_pytree(PARAMS)
BARE = hfjax.Objective(model_fn, hfjax.losses.squared_error())


def summed(name, **options):
    return weighted_sum(
        [
            (1.0, hfjax.Objective(model_fn, hfjax.losses.squared_error(), **options)),
            (STRENGTH, penalty(PENALTIES[name])),
        ]
    )


def dense(product):
    return np.asarray(quick_jit(lambda: matrix_of(product, PARAMS))())


def residuals(vector):
    return (model_fn(UNRAVEL(vector), DATA[0]) - DATA[1]).ravel() / np.sqrt(5)


def truth(name):
    """Return f, ∇f and G, with the Hessian of the penalty in full."""

    def f(vector):
        own = PENALTIES[name](UNRAVEL(vector))
        return 0.5 * jnp.sum(residuals(vector) ** 2) + STRENGTH * own

    @quick_jit
    def found():
        j = jax.jacobian(residuals)(FLAT)
        curved = jax.hessian(lambda x: PENALTIES[name](UNRAVEL(x)))(FLAT)
        return *jax.value_and_grad(f)(FLAT), j.T @ j + STRENGTH * curved

    return map(np.asarray, found())


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_adds_its_value_its_gradient_and_its_hessian(name):
    f, (value, gradient, g) = summed(name), truth(name)
    found, slope = f.value_and_grad(PARAMS, BATCH)
    np.testing.assert_allclose(found, value, rtol=1e-13)
    np.testing.assert_allclose(f.value(PARAMS, BATCH), value, rtol=1e-13)
    np.testing.assert_allclose(flat(slope), gradient, rtol=1e-11, atol=1e-14)
    product = hfjax.curvature.ggn(f, PARAMS, BATCH)
    np.testing.assert_allclose(dense(product), g, atol=1e-13)


@pytest.mark.parametrize("name", ["l1", "per_layer", "group"])
def test_the_diagonal_of_a_penalty_is_that_of_its_hessian(name):
    d = flat(hfjax.diagonals.ggn_exact(summed(name), PARAMS, BATCH))
    *_, g = truth(name)
    np.testing.assert_allclose(d, np.diag(g), atol=1e-12)
    if name != "group":
        # Signs square away where every entry stands alone.
        f, key = penalty(PENALTIES[name]), jax.random.key(0)
        signs = flat(hfjax.diagonals.ggn_rademacher(f, PARAMS, (), key=key))
        own = np.diag(g - dense(hfjax.curvature.ggn(BARE, PARAMS, DATA))) / STRENGTH
        np.testing.assert_allclose(signs, own, atol=1e-12)


def test_no_block_of_a_group_lasso_is_approximate():
    f = penalty(group_lasso)
    stacked = jax.tree.map(lambda x: x[None], PARAMS)
    assert f.loss.coarse(stacked, ()) is None


def test_the_absolute_value_has_a_slope_and_no_curvature():
    f = penalty(lambda p: sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(p)))
    value, slope = f.value_and_grad(PARAMS, ())
    np.testing.assert_allclose(value, np.sum(np.abs(FLAT)))
    np.testing.assert_array_equal(flat(slope), np.sign(FLAT))
    v = jax.tree.map(jnp.ones_like, PARAMS)
    assert not np.any(flat(hfjax.curvature.ggn(f, PARAMS, ())(v)))


@pytest.mark.parametrize("name", PENALTIES)
def test_layers_that_a_penalty_reads_keep_their_factors(name):
    told = preconditioners.layers(summed(name), PARAMS, BATCH)
    kinds = [told[f"['{n}']"].split()[0] for n in "wbv"]
    assert kinds == ["factors", "bias", "factors"]


@pytest.mark.parametrize("name", ["l1", "per_layer"])  # Others' diagonals are drawn.
def test_the_diagonal_of_a_penalty_damps_the_factors_by_its_mean(name):
    """P of the sum is P of the data's term with the layer's mean diagonal in λ."""
    rule = preconditioners.kronecker(cases=None, damping_share=1.0)
    *_, g = truth(name)
    own = np.diag(g - dense(hfjax.curvature.ggn(BARE, PARAMS, DATA)))
    own = UNRAVEL(jnp.asarray(own))
    first = (jnp.sum(own["w"]) + jnp.sum(own["b"])) / 12  # A kernel and its bias.
    damping = {"w": 0.1 + first, "b": 0.1 + first, "v": 0.1 + jnp.mean(own["v"])}
    damping = jax.tree.map(lambda d, p: jnp.full(p.shape, d), damping, PARAMS)
    key = jax.random.key(0)
    # The first of two terms draws with a key of its own.
    first_of_two = jax.random.fold_in(key, 0)

    @quick_jit
    def both(r):
        found = rule.build(summed(name), PARAMS, BATCH, jnp.float64(0.1), key)(r)
        return found, rule.build(BARE, PARAMS, DATA, damping, first_of_two)(r)

    ours, theirs = both(jax.tree.map(jnp.cos, PARAMS))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), ours, theirs)


@pytest.mark.parametrize("solver", ["cg", "samples", "parameters"])
def test_an_update_takes_the_dense_step(solver):
    f = summed("l1", weight_decay={"w": 0.2, "b": 0.0, "v": 0.1}, microbatch_size=2)
    made = (
        hfjax.cg.conjugate_gradient(max_iterations=60, stopping=None)
        if solver == "cg"
        else sample_space.cholesky(space=solver, corrections=0)
    )
    tx = hfjax.hessian_free(
        f,
        solver=made,
        damping=hfjax.damping.constant(0.1),
        backtracking=None,
        line_search=None,
    )
    grads = f.value_and_grad(PARAMS, BATCH)[1]
    updates, state = quick_jit(tx.update)(grads, tx.init(PARAMS), PARAMS, batch=BATCH)
    assert state.info.accepted
    _, gradient, g = truth("l1")
    betas = flat({"w": jnp.full(8, 0.2), "b": jnp.zeros(4), "v": jnp.full(4, 0.1)})
    gradient = gradient + betas * FLAT
    step = np.linalg.solve(g + np.diag(betas + 0.1), -gradient)
    np.testing.assert_allclose(flat(updates), step, rtol=1e-7)


@pytest.mark.slow
def test_training_with_a_penalty_and_a_schedule_reaches_its_minimum():
    """Of ½(p − 1)² + c √(p² + ε²), whose c falls to a tenth."""
    schedule = optax.piecewise_constant_schedule(2.0, {5: 0.1})
    data = hfjax.Objective(lambda p, x: p[None] + 0 * x, hfjax.losses.squared_error())
    f = weighted_sum([(1.0, data), (schedule, penalty(smooth_l1))])
    batch = ((jnp.zeros((1, 1)), jnp.ones((1, 1))), ())
    tx, params = hfjax.hessian_free(f), jnp.full(1, 3.0, jnp.float64)

    @quick_jit
    def step(params, state):
        grads = f.at(state.count).value_and_grad(params, batch)[1]
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    state, found = tx.init(params), []
    for _ in range(25):
        params, state = step(params, state)
        found.append(float(params[0]))
    slope = params - 1 + 0.2 * params / np.sqrt(params**2 + EPSILON**2)
    np.testing.assert_allclose(slope, 0, atol=1e-9)
    assert found[4] < found[-1]  # The heavier penalty had its turn.


@pytest.mark.slow
def test_devices_count_a_penalty_once():
    axis = "cases"
    f = weighted_sum(
        [
            (
                1.0,
                hfjax.Objective(model_fn, hfjax.losses.squared_error(), axis_name=axis),
            ),
            (STRENGTH, penalty(smooth_l1)),
        ]
    )
    x, t = (leaf[:4] for leaf in DATA)
    shards = jax.tree.map(lambda leaf: leaf.reshape(2, 2, -1), (x, t))
    found = jax.vmap(lambda data: f.value_and_grad(PARAMS, (data, ())), axis_name=axis)(
        shards
    )
    whole = summed("l1").value_and_grad(PARAMS, ((x, t), ()))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-12), found, whole
    )


@pytest.mark.slow
def test_a_set_up_with_a_penalty_is_checked():
    f = summed("l1")
    tx, grads = hfjax.hessian_free(f), f.value_and_grad(PARAMS, BATCH)[1]
    assert hfjax.verify.check(f, tx, PARAMS, BATCH, grads) == []
    bent = weighted_sum(
        [(1.0, BARE), (1.0, penalty(lambda p: jnp.sum(jnp.cos(p["w"]))))]
    )
    grads = bent.value_and_grad(PARAMS, BATCH)[1]
    (fault,) = hfjax.verify.check(bent, None, PARAMS, BATCH, grads)
    assert fault.startswith("Of the sum's term 1: The loss is not convex")


def test_what_is_no_penalty_is_refused():
    with pytest.raises(TypeError, match="`fn` must be a function `params -> scalar`"):
        penalty(3.0)
    with pytest.raises(ValueError, match=r"`fn` must return a scalar, got .*\[4\]"):
        penalty(lambda p: p["b"]).value(PARAMS, ())
    with pytest.raises(ValueError, match=r"or \(\) for a penalty, got tuple of 1"):
        summed("l1").value(PARAMS, (DATA,))
