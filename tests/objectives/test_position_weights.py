"""Weights of positions: f is the mean over tokens of sequences of unequal lengths.

The truth takes every position for a case of its own: dense Jacobians by `jax.jacfwd`, and
the losses in closed form, in float64.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.flatten_util import ravel_pytree
from mapped import axis_name, needs_devices, run
from problems import Problem, normal, quantities
from reference import quick_jit

import hfjax
from hfjax.curvature.jacobian import jacobian
from hfjax.curvature.structural import with_structural_loss
from hfjax.inspection.verify import check
from hfjax.objectives.plain import subsample, terms_of
from hfjax.preconditioners import _factors

CASES, STEPS, INPUTS, UNITS = 12, 4, 3, 3
LENGTHS = np.array([4, 1, 3, 2, 0, 4, 2, 1, 3, 4, 0, 2])  # Two examples of no weight.
RNG = np.random.default_rng(3)
ALONG = np.arange(STEPS)[None] < LENGTHS[:, None]
WEIGHTS = jnp.asarray(np.where(ALONG, RNG.uniform(0.2, 2.0, (CASES, STEPS)), 0.0))
X = normal(RNG, CASES, STEPS, INPUTS)
LABELS = jnp.asarray(RNG.integers(0, UNITS, (CASES, STEPS)))
SOFT = jnp.asarray(RNG.dirichlet(np.ones(UNITS), (CASES, STEPS)))
PARAMS = {"w": normal(RNG, INPUTS, UNITS), "b": normal(RNG, UNITS)}
DECAY = 0.03
VECTOR = jax.tree.map(lambda leaf: jnp.cos(7 * leaf), PARAMS)
SQUARED = hfjax.losses.squared_error()
INTEGER = hfjax.losses.softmax_cross_entropy_with_integer_labels()


def by_position(params, x):
    """Apply a layer to every position by itself, whatever the leading axes are."""
    return x @ params["w"] + jnp.expand_dims(params["b"], range(x.ndim - 1))


def causal(params, x):
    """Let each position see those before it."""
    return by_position(params, jnp.tanh(jnp.cumsum(x, axis=1)))


def total_variation(z, t):
    """Return values by position that couple neighbours: a plain function may."""
    steps = jnp.diff(z, axis=1, prepend=z[:, :1])
    return jnp.sum(optax.losses.l2_loss(z, t) + 0.3 * steps**2, axis=-1)


def problem_of(name, targets, weights=WEIGHTS, model_fn=causal):
    return Problem(name, PARAMS, model_fn, name, (X, targets, weights), DECAY)


PROBLEMS = {
    "squared_error": problem_of("squared_error", SOFT),
    "sigmoid_cross_entropy": problem_of("sigmoid_cross_entropy", SOFT),
    "softmax_cross_entropy": problem_of("softmax_cross_entropy", SOFT),
    "integer": problem_of("softmax_cross_entropy_with_integer_labels", LABELS),
}
PLAIN = {
    "squared_error": optax.losses.l2_loss,
    "sigmoid_cross_entropy": optax.losses.sigmoid_binary_cross_entropy,
    "softmax_cross_entropy": optax.losses.softmax_cross_entropy,
    "integer": optax.losses.softmax_cross_entropy_with_integer_labels,
}
INTEGERS = PROBLEMS["integer"]


class Truth(NamedTuple):
    """f, ∇f and G, flat, without hfjax."""

    value: float
    gradient: np.ndarray
    ggn: np.ndarray


@functools.cache
def rows(problem):
    """Return value, gradient and JᵀL″J of each position as if it were a case."""
    flat, unravel = ravel_pytree(problem.params)
    x, t, _ = problem.batch

    def outputs(flat):
        z = problem.model_fn(unravel(flat), x)
        return z.reshape(-1, z.shape[-1])

    j, z = quick_jit(jax.jacfwd(outputs))(flat), quick_jit(outputs)(flat)
    t = np.asarray(t).reshape(-1, *t.shape[2:])
    values, slopes, hessians = reference.output_loss(problem.loss, np.asarray(z), t)
    gradients = np.einsum("pan,pa->pn", j, slopes)
    return values, gradients, np.einsum("pam,pab,pbn->pmn", j, hessians, j)


def truth(problem):
    found = rows(problem)
    weights = np.asarray(problem.batch[2]).ravel()
    value, gradient, ggn = (reference.mean(part, weights) for part in found)
    flat = np.asarray(ravel_pytree(problem.params)[0])
    return Truth(
        value + problem.weight_decay / 2 * flat @ flat,
        gradient + problem.weight_decay * flat,
        ggn + problem.weight_decay * np.eye(len(flat)),
    )


def fisher(problem):
    """Return the mean of squares of the gradients of each example's mean loss."""
    weights = np.asarray(problem.batch[2])
    whole = weights.sum(axis=1)
    shares = weights / np.where(whole == 0, 1, whole)[:, None]
    gradients = rows(problem)[1].reshape(*weights.shape, -1)
    cases = np.einsum("it,itn->in", shares, gradients)
    return reference.mean(cases**2, whole) + problem.weight_decay


def dense(product, params=PARAMS):
    flat, unravel = ravel_pytree(params)
    columns = jax.vmap(lambda e: ravel_pytree(product(unravel(e)))[0])
    return columns(jnp.eye(flat.size))


def close(ours, theirs, rtol=1e-11, atol=1e-13):
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)


def assert_equal(ours, theirs):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(x, y)


def spoilt(batch, number=jnp.nan, label=-100):
    """Put anything at the positions of weight 0."""
    x, t, weights = batch
    empty = weights == 0
    held = label if jnp.issubdtype(t.dtype, jnp.integer) else number
    t = jnp.where(empty if t.ndim == 2 else empty[..., None], held, t)
    return jnp.where(empty[..., None], number, x), t, weights


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_value_gradient_and_curvature_are_the_mean_over_all_positions(name, plain):
    problem = PROBLEMS[name]
    objective = problem.objective()
    if plain:
        objective = hfjax.Objective(causal, PLAIN[name], weight_decay=DECAY)

    @quick_jit
    def found(params, batch):
        value, gradient = objective.value_and_grad(params, batch)
        matrix = dense(hfjax.curvature.ggn(objective, params, batch))
        return Truth(value, ravel_pytree(gradient)[0], matrix)

    for ours, theirs in zip(found(PARAMS, problem.batch), truth(problem), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("name", ["squared_error", "integer"])
def test_whatever_is_made_of_factors_of_the_curvature_has_the_weights(name):
    problem = PROBLEMS[name]
    objective, exact = problem.objective(), truth(problem)

    @quick_jit
    def found(params, batch):
        rows = jacobian(objective, params, batch)
        return {
            "diagonal": hfjax.diagonals.ggn_exact(objective, params, batch),
            "fisher": hfjax.diagonals.empirical_fisher(objective, params, batch),
            "product": hfjax.curvature.empirical_fisher(objective, params, batch)(
                VECTOR
            ),
            "rows": jax.vmap(lambda row: ravel_pytree(row)[0])(rows.rows),
            "residuals": rows.residuals,
        }

    ours = found(PARAMS, problem.batch)
    close(ravel_pytree(ours["diagonal"])[0], np.diag(exact.ggn))
    close(ravel_pytree(ours["fisher"])[0], fisher(problem))
    flat = np.asarray(ravel_pytree(PARAMS)[0])
    rows = np.asarray(ours["rows"])
    close(rows.T @ rows + DECAY * np.eye(flat.size), exact.ggn)
    close(rows.T @ ours["residuals"] + DECAY * flat, exact.gradient)


def test_each_output_may_have_a_weight():
    weights = jnp.asarray(RNG.uniform(0, 2, X.shape))
    objective = hfjax.Objective(causal, SQUARED)
    z, share = causal(PARAMS, X), weights / jnp.sum(weights)
    value = objective.value(PARAMS, (X, SOFT, weights))
    close(value, jnp.sum(share * (z - SOFT) ** 2) / 2)


def test_equal_weights_in_an_example_are_a_weight_of_the_example():
    own = jnp.linspace(0.5, 2.0, CASES)
    spread = jnp.broadcast_to(own[:, None], (CASES, STEPS))
    f = hfjax.Objective(causal, INTEGER)
    whole = quick_jit(f.value_and_grad)(PARAMS, (X, LABELS, own))
    parts = quick_jit(f.value_and_grad)(PARAMS, (X, LABELS, spread))
    jax.tree.map(lambda x, y: close(x, STEPS * y), whole, parts)


@pytest.mark.parametrize("dtype", [bool, jnp.int32, jnp.float32])
def test_weights_of_any_dtype_are_exact_in_float64(dtype):
    weights = (7 * WEIGHTS).astype(dtype)
    problem = dataclasses.replace(INTEGERS, batch=(X, LABELS, weights))
    value = quick_jit(problem.objective().value)(PARAMS, problem.batch)
    close(value, truth(problem).value, rtol=1e-14 if dtype != jnp.float32 else 1e-7)


def test_float32_stays_float32_where_nothing_is_promoted():
    params, x, weights = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32), (PARAMS, X, WEIGHTS)
    )
    f = hfjax.Objective(causal, INTEGER)
    tx = hfjax.hessian_free(f)

    @quick_jit
    def update(params, batch):
        value, grads = f.value_and_grad(params, batch)
        steps, state = tx.update(grads, tx.init(params), params, batch=batch)
        return value, steps, state.info.value_after

    with jax.numpy_dtype_promotion("strict"):
        for own in (weights, weights > 0):
            before, steps, after = update(params, (x, LABELS, own))
            assert {leaf.dtype for leaf in jax.tree.leaves(steps)} == {
                np.dtype("float32")
            }
            assert after < before


def test_values_of_examples_do_not_know_their_weights():
    f, weights = hfjax.Objective(by_position, SQUARED), WEIGHTS[:, 0]
    values = f.case_values(PARAMS, (X[:, 0], SOFT[:, 0], weights))
    assert_equal(values, f.case_values(PARAMS, (X[:, 0], SOFT[:, 0])))


def test_values_of_examples_are_means_over_their_positions():
    values = INTEGERS.objective().case_values(PARAMS, INTEGERS.batch)
    each = rows(INTEGERS)[0].reshape(WEIGHTS.shape)
    whole = np.sum(WEIGHTS, axis=1)
    sums = np.sum(WEIGHTS * each, axis=1)
    close(values, sums / np.where(whole == 0, 1, whole))


PAIR = hfjax.losses.gaussian()
OTHERS = {
    "poisson": (hfjax.losses.poisson(), lambda z: z, LABELS[..., None] * jnp.ones(3)),
    "ordinal": (hfjax.losses.ordinal(), lambda z: z, LABELS),
    "gaussian": (PAIR, lambda z: (z, jnp.sin(z)), SOFT),
    "tree": (
        hfjax.losses.tree(
            {
                "a": hfjax.losses.scaled(0.3, INTEGER),
                "b": (PLAIN["squared_error"], PAIR),
            }
        ),
        lambda z: {"a": z, "b": (2 * z, (z, jnp.sin(z)))},
        {"a": LABELS, "b": (SOFT, SOFT)},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_loss_weighs_positions_as_it_does_examples(name):
    loss, head, targets = OTHERS[name]
    f = hfjax.Objective(lambda params, x: head(by_position(params, x)), loss)

    @quick_jit
    def found(params, batch):
        diagonal = hfjax.diagonals.ggn_exact(f, params, batch)
        value, gradient = f.value_and_grad(params, batch)
        return value, gradient, hfjax.curvature.ggn(f, params, batch)(VECTOR), diagonal

    def flat(leaf):
        return leaf.reshape(CASES * STEPS, *leaf.shape[2:])

    empty = WEIGHTS == 0
    bad = jax.tree.map(
        lambda t: jnp.where(empty if t.ndim == 2 else empty[..., None], -100, t),
        targets,
    )
    truth = found(PARAMS, jax.tree.map(flat, (X, targets, WEIGHTS)))
    jax.tree.map(close, found(PARAMS, (X, targets, WEIGHTS)), truth)
    jax.tree.map(close, found(PARAMS, (X, bad, WEIGHTS)), truth)


def test_tokens_of_no_weight_are_not_counted_by_the_factors_of_an_embedding():
    tokens = jnp.asarray(RNG.integers(0, INPUTS, (CASES, STEPS)))
    f = hfjax.Objective(lambda params, x: params["w"][x], INTEGER)
    params = {"w": PARAMS["w"]}
    model = _factors.read(f, params, (tokens, LABELS, WEIGHTS), 100)[0]
    (term,) = terms_of(f, (tokens, LABELS, WEIGHTS))
    (pair,) = quick_jit(
        lambda params: _factors.factors(term, params, model, key=jax.random.key(0))[0]
    )(params)
    weights = np.where(WEIGHTS > 0, np.sum(WEIGHTS, axis=1, keepdims=True), 0)
    counts = [np.sum(weights[np.asarray(tokens) == n]) for n in range(INPUTS)]
    close(pair.inputs, counts / np.sum(weights))


def test_a_plain_function_may_couple_positions():
    f = hfjax.Objective(causal, total_variation)
    flat, unravel = ravel_pytree(PARAMS)

    def of_outputs(z):
        values = total_variation(jnp.where(WEIGHTS[..., None] == 0, 0, z), SOFT)
        return jnp.sum(WEIGHTS * values) / jnp.sum(WEIGHTS)

    z, tangent = jax.linearize(lambda p: causal(unravel(p), X), flat)
    j = jax.vmap(tangent, out_axes=-1)(jnp.eye(flat.size)).reshape(-1, flat.size)
    hessian = jax.hessian(lambda z: of_outputs(z.reshape(X.shape)))(z.ravel())

    @quick_jit
    def found(params, batch):
        matrix = dense(hfjax.curvature.ggn(f, params, batch))
        return f.value(params, batch), matrix, jacobian(f, params, batch).rows

    value, matrix, rows = found(PARAMS, (X, SOFT, WEIGHTS))
    close(value, of_outputs(z))
    close(matrix, j.T @ hessian @ j)
    rows = jax.vmap(lambda row: ravel_pytree(row)[0])(rows)
    close(rows.T @ rows, matrix, rtol=1e-9)


def factors(model_fn, loss, batch, **options):
    f = hfjax.Objective(model_fn, loss, **options)
    model = _factors.read(f, PARAMS, batch, 100)[0]

    @quick_jit
    def pairs(params, batch):
        (term,) = terms_of(f, batch)
        return _factors.factors(term, params, model, key=jax.random.key(0))[0]

    (pair,) = pairs(PARAMS, batch)
    return pair


@pytest.mark.parametrize("size", [None, 5])
def test_factors_are_of_the_positions_that_count(size):
    pair = factors(by_position, SQUARED, (X, SOFT, WEIGHTS), microbatch_size=size)
    counts = np.asarray(WEIGHTS) > 0
    whole = np.sum(WEIGHTS, axis=1)
    x = np.concatenate([X, np.ones((CASES, STEPS, 1))], axis=-1)
    weights = counts * whole[:, None]
    inputs = np.einsum("it,ita,itb->ab", weights, x, x) / np.sum(weights)
    close(pair.inputs, inputs)
    # The signs have L″ = I on their diagonal whichever they are.
    close(np.diag(pair.units), np.ones(UNITS))


def test_what_stands_at_positions_of_no_weight_is_not_in_the_factors():
    batch = (X, LABELS, WEIGHTS)
    clean = factors(by_position, INTEGER, batch)
    for number in (jnp.nan, 1e8):
        assert_equal(factors(by_position, INTEGER, spoilt(batch, number)), clean)


def ending(model_fn, loss, batch, updates=3, **options):
    """Return f and the parameters after some updates."""
    f = hfjax.Objective(model_fn, loss, weight_decay=DECAY)
    tx = hfjax.hessian_free(f, **options)

    @quick_jit
    def update(params, state, batch):
        _, grads = f.value_and_grad(params, batch)
        steps, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, steps), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(updates):
        params, state = update(params, state, batch)
    return state.info.value_after, params, state.info.reduction_ratio


SOLVER = hfjax.cg.conjugate_gradient(max_iterations=4)
CG = {"solver": SOLVER, "preconditioner": None}
EXACT = {"solver": hfjax.sample_space.cholesky()}


@pytest.mark.parametrize("options", [EXACT, CG], ids=["exact", "cg"])
@pytest.mark.parametrize("loss", [INTEGER, PLAIN["integer"]], ids=["ours", "optax's"])
def test_an_update_is_that_of_the_positions_as_examples(options, loss):
    def flat(leaf):
        return leaf.reshape(CASES * STEPS, *leaf.shape[2:])

    batch = (X, LABELS, WEIGHTS)
    ours = ending(by_position, loss, batch, **options)
    theirs = ending(by_position, loss, jax.tree.map(flat, batch), **options)
    jax.tree.map(lambda x, y: close(x, y, rtol=1e-7, atol=1e-9), ours, theirs)
    assert ours[0] < truth(INTEGERS).value


@pytest.mark.parametrize("options", [{}, EXACT], ids=["default", "exact"])
@pytest.mark.slow
def test_an_update_does_not_depend_on_what_has_no_weight(options):
    batch = (X, LABELS, WEIGHTS)
    clean = ending(by_position, INTEGER, batch, **options)
    ours = ending(by_position, INTEGER, spoilt(batch), **options)
    jax.tree.map(close, ours, clean)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_positions_of_no_weight_may_hold_anything(name, plain):
    problem = dataclasses.replace(PROBLEMS[name], model_fn=by_position)
    f = problem.objective()
    if plain:
        f = hfjax.Objective(by_position, PLAIN[name])

    def found(params, batch):
        key = jax.random.key(0)
        random = hfjax.diagonals.ggn_rademacher(f, params, batch, key=key)
        hessian = hfjax.curvature.hessian(f, params, batch)(VECTOR)
        return quantities(f, params, batch, VECTOR), random, hessian

    run = quick_jit(found)
    clean = run(PARAMS, problem.batch)
    for number in (jnp.nan, jnp.inf, 1e300):
        bad = run(PARAMS, spoilt(problem.batch, number))
        jax.tree.map(lambda x, y: close(x, y, rtol=1e-13), bad, clean)


PARTS = hfjax.losses.tree(
    {"ours": INTEGER, "own": SQUARED, "optax": PLAIN["squared_error"]}
)


@pytest.mark.parametrize(
    ("positions", "options"),
    [
        (False, {}),
        (False, {"microbatch_size": 5}),
        (False, {"whole_batch": True}),
        (True, {"whole_batch": True}),
    ],
    ids=["plain", "microbatches", "whole_batch", "positions_of_a_whole_batch"],
)
def test_what_has_no_weight_may_hold_anything_in_every_part_of_a_tree(
    positions, options
):
    def model_fn(params, inputs):
        x, shift = inputs
        z = by_position(params, x + (shift[:, None] if positions else shift))
        return {"ours": z, "own": jnp.sin(z), "optax": jnp.cos(z)}

    weights = WEIGHTS if positions else WEIGHTS[:, 0]
    own = np.index_exp[:] if positions else np.index_exp[:, 0]
    x, labels, soft, shift = X[own], LABELS[own], SOFT[own], X[:, 0]
    f = hfjax.Objective(model_fn, PARTS, weight_decay=DECAY, **options)

    def made_of(number, label):
        empty = weights == 0
        t = jnp.where(empty[..., None], number, soft)
        targets = {"ours": jnp.where(empty, label, labels), "own": t, "optax": t}
        unread = jnp.where(LENGTHS[:, None] == 0, number, shift)
        return (jnp.where(empty[..., None], number, x), unread), targets, weights

    model = _factors.read(f, PARAMS, made_of(0.0, 0), 100)[0]

    @quick_jit
    def found(params, batch):
        (term,) = terms_of(f, batch)
        key = jax.random.key(0)
        return (
            f.value_and_grad(params, batch),
            hfjax.curvature.ggn(f, params, batch)(VECTOR),
            hfjax.curvature.hessian(f, params, batch)(VECTOR),
            hfjax.diagonals.ggn_exact(f, params, batch),
            hfjax.diagonals.ggn_rademacher(f, params, batch, key=key),
            jacobian(f, params, batch).rows,
            _factors.factors(term, params, model, key=key),
        )

    clean = found(PARAMS, made_of(0.0, 0))
    for number in (jnp.nan, jnp.inf):
        bad = found(PARAMS, made_of(number, -100))
        jax.tree.map(lambda x, y: close(x, y, rtol=1e-13), bad, clean)


def with_nan(params, inputs):
    """Make outputs that are NaN where nothing counts."""
    x, counts = inputs
    nan = jnp.where(counts, 0.0, jnp.nan)
    return causal(params, x) + nan[..., None]


def test_outputs_that_are_nan_at_positions_of_no_weight_do_no_harm():
    f = hfjax.Objective(with_nan, INTEGER, weight_decay=DECAY)
    batch = ((X, WEIGHTS > 0), LABELS, WEIGHTS)
    assert_true(quick_jit(functools.partial(quantities, f))(PARAMS, batch, VECTOR))


def test_outputs_that_are_nan_do_no_harm_to_a_function_of_the_whole_batch():
    loss = PLAIN["integer"]
    f = hfjax.Objective(with_nan, loss, weight_decay=DECAY, whole_batch=True)

    @quick_jit
    def found(params, batch):
        value, gradient = f.value_and_grad(params, batch)
        matrix = dense(hfjax.curvature.ggn(f, params, batch))
        return Truth(value, ravel_pytree(gradient)[0], matrix)

    ours = found(PARAMS, ((X, WEIGHTS > 0), LABELS, WEIGHTS))
    for mine, theirs in zip(ours, truth(INTEGERS), strict=True):
        close(mine, theirs)


def test_finite_inputs_at_positions_of_no_weight_reach_the_others():
    # Those of a prompt have no weight, and are read all the same.
    weights = WEIGHTS.at[:, 0].set(0.0)
    f = hfjax.Objective(causal, INTEGER)
    other = f.value(PARAMS, (X.at[:, 0].add(1.0), LABELS, weights))
    assert other != f.value(PARAMS, (X, LABELS, weights))


@pytest.mark.parametrize("options", [{}, {"linearize_once": True}])
@pytest.mark.parametrize("size", [1, 5])
def test_microbatches_of_sequences_change_nothing(size, options):
    f = INTEGERS.objective(microbatch_size=size, **options)
    found = quick_jit(functools.partial(quantities, f))(PARAMS, INTEGERS.batch, VECTOR)
    assert_true(found)


@needs_devices
@pytest.mark.parametrize(
    ("way", "size"),
    [
        ("jit_with_shardings", None),
        ("jit_with_explicit_shardings", None),
        ("jit_with_explicit_shardings", 4),
        ("shard_map_check_vma", 2),
        ("shard_map", None),
        ("pmap", None),
    ],
)
def test_devices_of_sequences_change_nothing(way, size):
    if "explicit" in way and jax.__version_info__ >= (0, 11):
        pytest.skip("JAX 0.12 has no gradients of single examples with labels there")
    f = INTEGERS.objective(axis_name=axis_name(way), microbatch_size=size)
    assert_true(run(way, functools.partial(quantities, f), INTEGERS))


def assert_true(found):
    exact, v = truth(INTEGERS), ravel_pytree(VECTOR)[0]
    close(found["value"], exact.value)
    close(ravel_pytree(found["gradient"])[0], exact.gradient)
    close(ravel_pytree(found["product"])[0], exact.ggn @ np.asarray(v))
    close(ravel_pytree(found["fisher"])[0], fisher(INTEGERS))


@needs_devices
def test_factors_of_sequences_on_devices_are_those_of_one():
    def of(f):
        def found(params, batch, _):
            model = _factors.read(f, params, batch, 100)[0]
            (term,) = terms_of(f, batch)
            return _factors.factors(term, params, model, key=jax.random.key(0))

        return found

    layer = dataclasses.replace(INTEGERS, model_fn=by_position)
    one = quick_jit(of(layer.objective()))(PARAMS, layer.batch, VECTOR)
    for way in ("jit_with_explicit_shardings", "shard_map_check_vma"):
        f = layer.objective(axis_name=axis_name(way))
        jax.tree.map(close, run(way, of(f), layer), one)


def test_a_sum_has_weights_of_positions_in_any_of_its_parts():
    f, g = INTEGERS.objective(), hfjax.Objective(by_position, SQUARED)
    both = hfjax.objective.weighted_sum([(2.0, f), (0.5, g)])
    other = (X[0], SOFT[0])
    value = both.value(PARAMS, (INTEGERS.batch, other))
    close(value, 2 * truth(INTEGERS).value + 0.5 * g.value(PARAMS, other))


def test_a_part_of_the_examples_keeps_its_weights():
    half = subsample(INTEGERS.objective(), INTEGERS.batch, 6)
    for leaf, whole in zip(half, INTEGERS.batch, strict=True):
        np.testing.assert_array_equal(leaf, whole[::2])


def test_hidden_states_of_an_example_count_with_its_weight():
    def pair_fn(params, x):
        return causal(params, x), x @ params["w"]

    f = hfjax.Objective(pair_fn, INTEGER, weight_decay=DECAY, hidden_loss=SQUARED)
    whole = np.sum(WEIGHTS, axis=1)
    square = np.einsum("i,ita,itb->ab", whole / np.sum(whole), X, X)
    distance = np.zeros((12, 12))
    distance[UNITS:, UNITS:] = np.kron(square, np.eye(UNITS))  # After the bias.

    @quick_jit
    def found(params, batch):
        damped = hfjax.curvature.ggn(f, params, batch, structural=0.7)
        rows = jacobian(with_structural_loss(f, 0.7), params, batch).rows
        return dense(damped), jax.vmap(lambda row: ravel_pytree(row)[0])(rows)

    matrix, rows = found(PARAMS, INTEGERS.batch)
    close(matrix, truth(INTEGERS).ggn + 0.7 * distance)
    close(rows.T @ rows + DECAY * np.eye(12), matrix)


@pytest.mark.slow
def test_a_sound_set_up_with_weights_of_positions_is_not_blamed():
    f = hfjax.Objective(by_position, INTEGER, weight_decay=DECAY)
    batch = spoilt(INTEGERS.batch)
    grads = f.value_and_grad(PARAMS, batch)[1]
    assert check(f, hfjax.hessian_free(f), PARAMS, batch, grads) == []
    # The sum over tokens, divided by the number of sequences.
    bare = dataclasses.replace(f, weight_decay=0.0).value_and_grad(PARAMS, batch)[1]
    factor = float(jnp.sum(WEIGHTS)) / CASES
    grads = jax.tree.map(lambda g, p: factor * g + DECAY * p, bare, PARAMS)
    (fault,) = check(f, None, PARAMS, batch, grads)
    assert "divided by the number of cases" in fault
    (fault,) = check(f, None, PARAMS, (X, LABELS, WEIGHTS.at[2, 1].set(-1.0)), grads)
    assert "weight is negative" in fault
    errors = hfjax.verify.products(f, PARAMS, batch, key=jax.random.key(1))
    assert max(errors) < 1e-6


@pytest.mark.parametrize(
    ("loss", "weights", "words"),
    [
        (INTEGER, WEIGHTS[:, :3], r"\[3\] a case, but .* values of shape \[4\] a case"),
        (SQUARED, WEIGHTS[:, :3], r"\[3\] a case, but .* of shape \[4, 3\] a case"),
        (INTEGER, WEIGHTS[..., None], r"\[4, 1\] a case, but .* shape \[4\] a case"),
        (PLAIN["integer"], WEIGHTS[:, :1], r"\[1\] a case, but .* shape \[4\] a case"),
        (
            lambda z, t: jnp.sum(optax.losses.l2_loss(z[..., 0], t), axis=1),
            WEIGHTS,
            r"\[4\] a case, but the loss has values of shape \[\] a case",
        ),
        (
            INTEGER,
            WEIGHTS[:5],
            r"weights must have shape \(12,\), or \(12, positions…\)",
        ),
        (
            dataclasses.replace(INTEGER, weighted=None),
            WEIGHTS,
            "of positions, and this `hfjax.losses.Loss` has no `weighted`",
        ),
    ],
)
def test_weights_that_do_not_fit_the_loss_are_refused(loss, weights, words):
    f, targets = hfjax.Objective(by_position, loss), SOFT if loss is SQUARED else LABELS
    for evaluate in (f.value, functools.partial(hfjax.curvature.ggn, f)):
        with pytest.raises(ValueError, match=words):
            evaluate(PARAMS, (X, targets, weights))
