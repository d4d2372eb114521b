import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from problems import every_problem, mlp, named, normal, quantities, uneven
from reference import flat, quick_jit

import hfjax
from hfjax.curvature import ggn
from hfjax.curvature.diagonals import empirical_fisher

SQUARED = hfjax.losses.squared_error()


@pytest.mark.every
@every_problem
def test_value_and_gradient_equal_dense(problem):
    value, gradient = quick_jit(problem.objective().value_and_grad)(
        problem.params, problem.batch
    )
    np.testing.assert_allclose(value, reference.value(problem), rtol=1e-12)
    truth = reference.gradient(problem)
    np.testing.assert_allclose(flat(gradient), truth, rtol=1e-10, atol=1e-14)


def test_value_and_gradient_equal_a_written_out_objective():
    problem = named("mlp_softmax")
    x, t = problem.batch
    weights = jnp.asarray([0.5, 0.0, 3.0, 1.0, 1.0, 0.0, 2.0])

    def f(params):
        losses = optax.softmax_cross_entropy(mlp(params, x), t)
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return jnp.sum(weights * losses) / 7.5 + 0.02 / 2 * squares

    value, gradient = quick_jit(jax.value_and_grad(f))(problem.params)
    batch = (x, t, weights)
    objective = problem.objective()
    np.testing.assert_allclose(
        objective.value(problem.params, batch), value, rtol=1e-13
    )
    ours = quick_jit(objective.value_and_grad)(problem.params, batch)
    np.testing.assert_allclose(ours[0], value, rtol=1e-13)
    np.testing.assert_allclose(flat(ours[1]), flat(gradient), rtol=1e-11, atol=1e-15)


def test_value_is_what_value_and_grad_returns_and_its_gradient_is_the_gradient():
    problem = named("nested")
    objective = problem.objective()
    value, gradient = quick_jit(jax.value_and_grad(objective.value))(
        problem.params, problem.batch
    )
    np.testing.assert_allclose(value, reference.value(problem), rtol=1e-12)
    np.testing.assert_allclose(
        flat(gradient), reference.gradient(problem), rtol=1e-10, atol=1e-14
    )


def test_cases_of_weight_zero_change_nothing():
    problem = named("mlp_squared_error")
    x, t = problem.batch
    keep = jnp.arange(7) < 5
    padded = jax.tree.map(lambda leaf: jnp.where(keep[:, None], leaf, 9.0), (x, t))
    value_and_grad = quick_jit(problem.objective().value_and_grad)
    value, gradient = value_and_grad(problem.params, (*padded, 1.0 * keep))
    truth = value_and_grad(problem.params, (x[:5], t[:5]))
    np.testing.assert_allclose(value, truth[0], rtol=1e-13)
    np.testing.assert_allclose(flat(gradient), flat(truth[1]), rtol=1e-12, atol=1e-15)


def test_the_scale_of_the_weights_changes_nothing():
    problem = named("frozen")
    x, t, weights = problem.batch
    value = quick_jit(problem.objective().value)(problem.params, (x, t, 8 * weights))
    np.testing.assert_allclose(value, reference.value(problem), rtol=1e-13)


def test_without_any_weight_only_weight_decay_is_left():
    problem = named("mlp_squared_error")
    batch = (*problem.batch, jnp.zeros(7))
    value_and_grad = quick_jit(problem.objective().value_and_grad)
    value, gradient = value_and_grad(problem.params, batch)
    params = flat(problem.params)
    np.testing.assert_allclose(value, 0.005 * np.sum(params**2), rtol=1e-13)
    np.testing.assert_allclose(flat(gradient), 0.01 * params, rtol=1e-13)


def test_case_values_are_losses_without_weights_or_decay():
    problem = named("integer_labels")
    values = quick_jit(problem.objective().case_values)(problem.params, problem.batch)
    np.testing.assert_allclose(values, reference.dense(problem).values, rtol=1e-12)


def test_traced_weight_decay_and_float32_parameters_keep_their_dtypes():
    x, t = jnp.ones((3, 2), jnp.float32), jnp.ones((3, 1), jnp.float32)
    w = jnp.ones((2, 1), jnp.bfloat16)

    def run(w, decay):
        objective = hfjax.Objective(lambda w, x: x @ w, SQUARED, weight_decay=decay)
        return objective.value_and_grad(w, (x, t))

    value, gradient = quick_jit(run)(w, jnp.float32(0.5))
    np.testing.assert_allclose(value, 0.5 * 1 + 0.5 * 0.5 * 2, rtol=1e-6)
    np.testing.assert_allclose(gradient.astype(jnp.float32), 1 + 0.5, rtol=1e-2)
    assert (value.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)


def in_parts(parts, zeros):
    """Return weights of `parts` · 7 cases; part k, every `parts`-th, has some zeros."""
    weights = np.linspace(0.5, 2.0, 7 * parts)
    for k, count in enumerate(zeros):
        weights[k::parts][:count] = 0
    return weights


@pytest.mark.parametrize(
    ("weights", "size"),
    [
        pytest.param(np.linspace(0.5, 2.0, 15), 8, id="parts_of_8_and_7"),
        pytest.param(in_parts(4, (3, 4, 0, 7)), 7, id="real_cases_4_3_7_and_0"),
    ],
)
def test_microbatches_change_nothing(weights, size):
    problem = uneven(weights)
    assert_quantities(problem, problem.objective(microbatch_size=size))


def assert_quantities(problem, objective):
    """Compare all that an objective gives an optimizer with the dense truth."""
    truth = reference.quantities(problem, flat(problem.direction))
    result = quick_jit(functools.partial(quantities, objective))(
        problem.params, problem.batch, problem.direction
    )
    for name, leaf in result.items():
        np.testing.assert_allclose(
            flat(leaf), truth[name], rtol=1e-11, atol=1e-15, err_msg=name
        )


@pytest.mark.parametrize("size", [4, 8, 14])
def test_case_values_keep_the_order_of_the_batch(size):
    x = jnp.arange(15.0)[:, None]
    objective = hfjax.Objective(lambda w, x: w * x, SQUARED, microbatch_size=size)
    values = objective.case_values(jnp.asarray(1.0), (x, jnp.zeros((15, 1))))
    np.testing.assert_array_equal(values, 0.5 * np.arange(15.0) ** 2)


@pytest.mark.parametrize("size", [1, 4, 8])
def test_no_microbatch_is_larger_than_its_bound(size):
    seen = []

    def model_fn(w, x):
        seen.append(len(x))
        return w * x

    objective = hfjax.Objective(model_fn, SQUARED, microbatch_size=size)
    x = jnp.ones((15, 1))
    jax.eval_shape(objective.value_and_grad, jnp.ones(()), (x, x))
    assert max(seen) <= size


def test_padding_of_microbatches_is_made_of_real_cases():
    # log of a row of zeros is −inf, and 0 · inf is NaN.
    def model_fn(w, x):
        return w * jnp.log(x)

    objective = hfjax.Objective(model_fn, SQUARED, microbatch_size=2)
    x = jnp.full((3, 1), jnp.e)
    value, gradient = objective.value_and_grad(jnp.ones(()), (x, 0 * x))
    np.testing.assert_allclose([value, gradient], [0.5, 1.0], rtol=1e-12)


def test_one_key_per_case_gives_every_evaluation_the_same_noise():
    def drawn(keys):  # As `jax.random` would, but quick to compile.
        return jax.random.key_data(keys)[:, :1] / 2.0**32

    def model_fn(w, inputs):
        return (inputs["x"] * drawn(inputs["key"])) @ w

    rng = np.random.default_rng(0)
    x, t, w = normal(rng, 5, 3), normal(rng, 5, 2), normal(rng, 3, 2)
    bits = jnp.asarray(rng.integers(0, 2**32, (5, 2)), jnp.uint32)
    keys = jax.random.wrap_key_data(bits, impl="threefry2x32")
    batch = ({"x": x, "key": keys}, t)
    objective = hfjax.Objective(model_fn, SQUARED, microbatch_size=2)
    result = quick_jit(functools.partial(quantities, objective))(w, batch, w)

    x = np.asarray(x * drawn(keys))
    error = x @ w - t
    np.testing.assert_allclose(result["value"], np.sum(error**2) / 10, rtol=1e-12)
    np.testing.assert_allclose(result["gradient"], x.T @ error / 5, rtol=1e-11)
    np.testing.assert_allclose(result["product"], x.T @ x @ w / 5, rtol=1e-11)
    np.testing.assert_allclose(
        result["fisher"], np.square(x).T @ np.square(error) / 5, rtol=1e-11
    )


X, T = jnp.ones((4, 3)), jnp.ones((4, 2))
BAD_BATCHES = {
    "one_part": ((X,), "got tuple of 1 parts"),
    "four_parts": ((X, T, T, T), "got tuple of 4 parts"),
    "array": (X, r"`batch` must be \(inputs, targets\)"),
    "dict": ({"x": X, "t": T}, "got dict"),
    "leading_axes_differ": (
        (X, T[:3]),
        "same number of cases.*4.*3.*close over it.*vmap",
    ),
    "leaf_differs": (({"a": X, "b": X[:2]}, T), "same number of cases.*'b'"),
    "no_case_axis": ((X, jnp.asarray(1.0)), "same number of cases"),
    "no_leaves": (((), ()), "same number of cases"),
    "no_cases": ((X[:0], T[:0]), "holds no cases"),
    "weights_too_short": ((X, T, jnp.ones(3)), r"weights must have shape \(4,\)"),
    "weights_of_no_axis": ((X, T, jnp.ones(())), r"got \(\)"),
    "weights_of_other_positions": (
        (X, T, jnp.ones((4, 1))),
        r"shape \[1\] a case, but the loss has values of shape \[2\]",
    ),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_a_bad_batch_is_refused(name):
    batch, message = BAD_BATCHES[name]
    objective = hfjax.Objective(lambda w, x: x @ w, SQUARED)
    others = [functools.partial(fn, objective) for fn in (ggn, empirical_fisher)]
    for evaluate in (objective.value, objective.case_values, *others):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda w, f=evaluate: f(w, batch), jnp.ones((3, 2)))


@pytest.mark.parametrize(
    "evaluate",
    [
        hfjax.Objective.value,
        hfjax.Objective.value_and_grad,
        hfjax.Objective.case_values,
        empirical_fisher,
        ggn,
    ],
)
@pytest.mark.parametrize(
    "model_fn",
    [lambda w, x: jnp.sum(x @ w, 0), lambda w, x: (x @ w).T, lambda w, x: w[0, 0]],
    ids=["summed", "transposed", "scalar"],
)
def test_a_model_that_drops_the_case_axis_is_refused(model_fn, evaluate):
    objective = hfjax.Objective(model_fn, SQUARED)
    with pytest.raises(ValueError, match="must keep the case axis first"):
        jax.eval_shape(lambda w: evaluate(objective, w, (X, T)), jnp.ones((3, 2)))


def test_a_loss_that_averages_over_cases_is_refused():
    objective = hfjax.Objective(
        lambda w, x: x @ w, lambda z, t: jnp.mean(optax.l2_loss(z, t))
    )
    with pytest.raises(ValueError, match="do not average or sum over the cases"):
        jax.eval_shape(objective.value, jnp.ones((3, 2)), (X, T))


def test_bad_options_are_refused():
    def model_fn(w, x):
        return x @ w

    with pytest.raises(TypeError, match="`model_fn` must be a callable"):
        hfjax.Objective(X, SQUARED)
    with pytest.raises(TypeError, match="`loss` must be"):
        hfjax.Objective(model_fn, "squared_error")
    with pytest.raises(ValueError, match="`weight_decay` must be at least 0"):
        hfjax.Objective(model_fn, SQUARED, weight_decay=-1e-3)
    with pytest.raises(ValueError, match="`weight_decay`"):
        hfjax.Objective(model_fn, SQUARED, weight_decay=float("nan"))
    with pytest.raises(TypeError, match="`microbatch_size` must be a Python integer"):
        hfjax.Objective(model_fn, SQUARED, microbatch_size=2.0)
    with pytest.raises(ValueError, match="`microbatch_size` must be at least 1"):
        hfjax.Objective(model_fn, SQUARED, microbatch_size=0)


def test_a_weight_decay_schedule_is_read_at_the_count():
    problem = named("mlp_squared_error")
    objective = problem.objective(weight_decay=lambda count: 0.04 / (1 + count))

    @quick_jit
    def at(count):
        f = objective.at(count)
        value, gradient = f.value_and_grad(problem.params, problem.batch)
        product = ggn(f, problem.params, problem.batch)(problem.direction)
        return value, gradient, product

    # The problem's own weight decay is 0.01.
    value, gradient, product = at(3)
    np.testing.assert_allclose(value, reference.value(problem), rtol=1e-12)
    np.testing.assert_allclose(flat(gradient), reference.gradient(problem), rtol=1e-10)
    truth = reference.ggn(problem) @ flat(problem.direction)
    np.testing.assert_allclose(flat(product), truth, rtol=1e-10)
    (others, _, _), params = at(0), flat(problem.params)
    more = 0.5 * 0.03 * np.sum(params**2)
    np.testing.assert_allclose(others, reference.value(problem) + more, rtol=1e-12)


def test_an_objective_shows_four_methods():
    shown = {name for name in vars(hfjax.Objective) if not name.startswith("_")}
    assert shown == {"at", "case_values", "value", "value_and_grad"}


def test_a_number_as_weight_decay_is_the_same_at_every_count():
    objective = hfjax.Objective(lambda w, x: x @ w, SQUARED, weight_decay=0.5)
    assert objective.at(7) is objective


@pytest.mark.parametrize(
    "evaluate",
    [
        hfjax.Objective.value,
        hfjax.Objective.value_and_grad,
        lambda objective, w, batch: ggn(objective, w, batch)(w),
        lambda objective, w, batch: hfjax.curvature.hessian(objective, w, batch)(w),
    ],
    ids=["value", "value_and_grad", "ggn", "hessian"],
)
def test_a_weight_decay_schedule_without_a_count_is_refused(evaluate):
    objective = hfjax.Objective(
        lambda w, x: x @ w, SQUARED, weight_decay=lambda count: 0.1
    )
    with pytest.raises(TypeError, match=r"`weight_decay` is a schedule: say when.*at"):
        jax.eval_shape(lambda w: evaluate(objective, w, (X, T)), jnp.ones((3, 2)))


@pytest.mark.parametrize("size", [3, None])
def test_cached_microbatches_change_nothing(size):
    problem = uneven(np.linspace(0.0, 2.0, 8))
    objective = problem.objective(microbatch_size=size, linearize_once=True)
    assert_quantities(problem, objective)
    values = quick_jit(objective.case_values)(problem.params, problem.batch)
    np.testing.assert_allclose(values, reference.dense(problem).values, rtol=1e-12)
