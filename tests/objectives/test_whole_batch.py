"""Models and losses that mix the examples of a batch, which then is one example.

The truth is dense, in float64: the Jacobian of the outputs of the whole batch, and the
Hessian of its loss in them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from mapped import needs_devices, run
from problems import Problem, normal
from reference import assert_close, flat, matrix_of, quick_jit

import hfjax
from hfjax import curvature, diagonals
from hfjax.curvature.jacobian import jacobian
from hfjax.curvature.probes import probes
from hfjax.inspection.verify import check
from hfjax.objectives.plain import alone, subsample, terms_of
from hfjax.preconditioners import _factors
from hfjax.preconditioners._merged_layers import merged

CASES, DECAY = 8, 0.03
RNG = np.random.default_rng(5)
X, T = normal(RNG, CASES, 3), normal(RNG, CASES, 2)
LABELS = jnp.asarray([0, 0, 1, 1, 2, 2, 3, 3])
WEIGHTS = jnp.asarray([1.0, 0.0, 2.5, 0.3, 1.0, 0.0, 4.0, 0.7])
PARAMS = {
    "w": normal(RNG, 3, 4),
    "scale": normal(RNG, 4),
    "shift": normal(RNG, 4),
    "head": normal(RNG, 4, 2),
}
SQUARED = hfjax.losses.squared_error()
INTEGER = hfjax.losses.softmax_cross_entropy_with_integer_labels()
KEY = jax.random.key(0)


def normalised(params, y):
    """Normalise by the statistics of the batch, in the order of Flax's operations."""
    axes = tuple(range(y.ndim - 1))
    y = y - jnp.mean(y, axes, keepdims=True)
    variance = jnp.mean(y**2, axes, keepdims=True)
    scale = jnp.expand_dims(params["scale"], axes)
    shift = jnp.expand_dims(params["shift"], axes)
    return y * (jax.lax.rsqrt(variance + 1e-3) * scale) + shift


def batch_norm(params, x):
    return jnp.tanh(normalised(params, x @ params["w"])) @ params["head"]


def similarities(params, x):
    """Return the scalar products of all pairs of examples, mixed by the model."""
    z = batch_norm(params, x)
    return z @ z.T


def info_nce(z, t):
    """Return a value for each example: its target among those of all."""
    return -jnp.diagonal(jax.nn.log_softmax(z @ t.T))


def both(params, x):
    z = batch_norm(params, x)
    return {"pair": z, "own": z * params["head"][:1]}


TREE = {"pair": hfjax.losses.scaled(0.7, info_nce), "own": SQUARED}
LOSSES = {
    "tree": (both, hfjax.losses.tree(TREE), (X, {"pair": T, "own": T}, WEIGHTS)),
    "batch_norm": (batch_norm, SQUARED, (X, T, WEIGHTS)),
    "batch_norm_and_plain_loss": (batch_norm, optax.losses.l2_loss, (X, T, WEIGHTS)),
    "ntxent": (batch_norm, optax.losses.ntxent, (X, LABELS)),
    "info_nce": (batch_norm, info_nce, (X, T, WEIGHTS)),
    "similarities": (similarities, INTEGER, (X, jnp.arange(CASES))),
}
TRUTHS = {
    "batch_norm": lambda z, t: jnp.sum((z - t) ** 2, axis=1) / 2,
    "batch_norm_and_plain_loss": lambda z, t: jnp.sum((z - t) ** 2, axis=1) / 2,
    "ntxent": lambda z, t: jnp.full(CASES, optax.losses.ntxent(z, t)),
    "info_nce": info_nce,
    "similarities": lambda z, t: -jnp.diagonal(jax.nn.log_softmax(z)),
    "tree": lambda z, t: (
        0.7 * info_nce(z["pair"], t["pair"])
        + jnp.sum((z["own"] - t["own"]) ** 2, axis=1) / 2
    ),
}
CONVEX = {"batch_norm", "batch_norm_and_plain_loss", "similarities"}


def objective_of(name):
    model_fn, loss, batch = LOSSES[name]
    f = hfjax.Objective(model_fn, loss, weight_decay=DECAY, whole_batch=True)
    return f, batch


def truth(name):
    """Return f, ∇f, G and ∇²f, flat, without hfjax."""
    model_fn, _, (x, t, *rest) = LOSSES[name]
    weights = rest[0] if rest else jnp.ones(CASES)
    theta, unravel = ravel_pytree(PARAMS)
    _, to_tree = ravel_pytree(model_fn(PARAMS, x))

    def outputs(theta):
        return ravel_pytree(model_fn(unravel(theta), x))[0]

    def mean(z):
        return jnp.sum(weights * TRUTHS[name](to_tree(z), t)) / jnp.sum(weights)

    def value(theta):
        return mean(outputs(theta)) + DECAY / 2 * theta @ theta

    @quick_jit
    def found(theta):
        j, hessian = jax.jacfwd(outputs)(theta), jax.hessian(mean)(outputs(theta))
        ggn = j.T @ hessian @ j + DECAY * jnp.eye(theta.size)
        return value(theta), jax.grad(value)(theta), ggn, jax.hessian(value)(theta)

    return found(theta)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_and_curvature_are_those_of_the_whole_batch(name):
    f, batch = objective_of(name)

    @quick_jit
    def found(params, batch):
        value, gradient = f.value_and_grad(params, batch)
        ggn = matrix_of(curvature.ggn(f, params, batch), params)
        hessian = matrix_of(curvature.hessian(f, params, batch), params)
        return value, flat_of(gradient), ggn, hessian

    assert_close(found(PARAMS, batch), truth(name), rtol=1e-9, atol=1e-11)


def flat_of(tree):
    return ravel_pytree(tree)[0]


@pytest.mark.parametrize("name", sorted(CONVEX))
def test_the_jacobian_and_the_exact_diagonal_are_those_of_the_whole_batch(name):
    f, batch = objective_of(name)
    _, gradient, ggn, _ = truth(name)

    @quick_jit
    def found(params, batch):
        j = jacobian(f, params, batch)
        rows = jax.vmap(flat_of)(j.rows)
        return rows.T @ rows, rows.T @ j.residuals

    square, slope = found(PARAMS, batch)
    np.testing.assert_allclose(square, ggn - DECAY * np.eye(len(ggn)), atol=1e-10)
    data = gradient - DECAY * flat(PARAMS)
    np.testing.assert_allclose(slope, data, rtol=1e-7, atol=1e-10)
    exact = quick_jit(functools.partial(diagonals.ggn_exact, f))(PARAMS, batch)
    np.testing.assert_allclose(flat(exact), np.diag(ggn), rtol=1e-9, atol=1e-12)


def test_draws_of_a_whole_batch_are_averaged():
    f, batch = objective_of("batch_norm")
    (term,) = terms_of(f, batch)
    draw = functools.partial(diagonals.ggn_rademacher, key=KEY)
    four = draw(alone(term), PARAMS, term.cases, num_probes=4)
    assert_close(draw(f, PARAMS, batch), four, rtol=1e-12)


IMAGES, KERNEL = normal(RNG, CASES, 4, 4, 2), normal(RNG, 2, 2, 2, 3)
CONV = {
    "kernel": KERNEL,
    "scale": normal(RNG, 3),
    "shift": normal(RNG, 3),
    "head": normal(RNG, 27, 2, scale=0.3),
}


def convolved(x, kernel):
    order = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=order
    )


def conv_net(params, x):
    y = normalised(params, convolved(x, params["kernel"]))
    return jnp.tanh(y).reshape(len(x), -1) @ params["head"]


def estimated(f, params, batch):
    """Return the factors of each kernel and the diagonals of other parameters, by name."""
    model = merged(_factors.read(f, params, batch, 100))
    blocks = _factors.estimate(f, params, batch, model, key=KEY)
    names = sorted(params)
    pairs = {
        names[layer.kernel]: pair
        for layer, pair in zip(model.layers, blocks.pairs, strict=True)
    }
    return pairs, {names[n]: x for n, x in blocks.diagonals.items()}


def test_factors_are_of_errors_that_came_through_the_statistics_of_the_batch():
    batch = (IMAGES, T, WEIGHTS)
    f = hfjax.Objective(conv_net, SQUARED, weight_decay=DECAY, whole_batch=True)
    pairs, others = quick_jit(functools.partial(estimated, f))(CONV, batch)
    assert set(pairs) == {"kernel", "head"}
    (term,) = terms_of(f, batch)
    drawn, share = probes(term.means, term.cases, KEY), WEIGHTS / jnp.sum(WEIGHTS)

    def forward(params, added, more):
        # The same network, with zeros to differentiate by.
        y = convolved(IMAGES, params["kernel"]) + added
        y = jnp.tanh(normalised(params, y) + more).reshape(CASES, -1)
        return y @ params["head"], y

    zeros = jnp.zeros((CASES, 3, 3, 3))
    z, transpose, inputs = jax.vjp(forward, CONV, zeros, zeros, has_aux=True)

    def errors(draw):
        signs = drawn.signs(drawn.data[0], draw, z)
        v = jnp.sqrt(share)[:, None] * signs
        return v, *transpose(v)

    v, _, of_kernel, of_shift = errors(0)
    patches = np.zeros((CASES, 9, 8))
    for at in range(9):
        row, column = divmod(at, 3)
        window = IMAGES[:, row : row + 2, column : column + 2]
        patches[:, at] = np.asarray(window).reshape(CASES, 8)
    right = {
        "kernel": (
            np.einsum("i,ipa,ipb->ab", share, patches, patches) / 9,
            np.einsum("ihwa,ihwb->ab", of_kernel, of_kernel),
        ),
        "head": (np.einsum("i,ia,ib->ab", share, inputs, inputs), v.T @ v),
    }
    for name, truth in right.items():
        assert_close(tuple(pairs[name]), truth, rtol=1e-9, atol=1e-12)
    by_example = np.sum(of_shift, axis=(1, 2))
    np.testing.assert_allclose(others["shift"], np.sum(by_example**2, 0), rtol=1e-9)
    # The scale meets the variance before it meets an example: several draws of the sum.
    squares = [errors(draw)[1]["scale"] ** 2 for draw in range(4)]
    np.testing.assert_allclose(others["scale"], np.mean(squares, 0), rtol=1e-9)


def unmixed(params, x):
    y = convolved(x, params["kernel"]) * params["scale"][None, None, None]
    y = jnp.tanh(y + params["shift"][None, None, None])
    return y.reshape(len(x), -1) @ params["head"]


@pytest.mark.parametrize(
    "weights",
    [WEIGHTS, WEIGHTS[:, None], None],
    ids=["weights", "weights_of_positions", "none"],
)
def test_without_mixing_the_flag_changes_nothing(weights):
    # The squares of a single output do not depend on the signs that are drawn.
    batch = (IMAGES, T[:, :1], weights)
    params = {**CONV, "head": CONV["head"][:, :1]}
    v = jax.tree.map(jnp.cos, params)

    def found(f, params):
        value, gradient = f.value_and_grad(params, batch)
        return (
            (value, gradient, curvature.ggn(f, params, batch)(v)),
            diagonals.ggn_exact(f, params, batch),
            estimated(f, params, batch),
        )

    flagged, plain = (
        quick_jit(functools.partial(found, f))(params)
        for f in (
            hfjax.Objective(unmixed, SQUARED, whole_batch=True),
            hfjax.Objective(unmixed, SQUARED),
        )
    )
    assert set(plain[2][1]) == {"scale", "shift"}
    assert_close(flagged, plain, rtol=1e-9, atol=1e-14)


def test_a_kernel_whose_examples_are_not_certain_has_factors_of_all_positions():
    def fixed(params, x):
        assert len(x) == CASES  # It cannot be read on more of them.
        return batch_norm(params, x)

    f, batch = objective_of("batch_norm")
    (uncertain, _), (certain, _) = (
        quick_jit(functools.partial(estimated, g))(PARAMS, batch[:2])
        for g in (hfjax.Objective(fixed, SQUARED, whole_batch=True), f)
    )
    assert_close(uncertain, certain, rtol=1e-9)


@needs_devices
@pytest.mark.parametrize("way", ["jit_with_shardings", "jit_with_explicit_shardings"])
def test_sharded_examples_change_nothing(way):
    problem = Problem("", PARAMS, batch_norm, "squared_error", (X, T, WEIGHTS), DECAY)
    f = problem.objective(whole_batch=True)

    def found(params, batch, v):
        value, gradient = f.value_and_grad(params, batch)
        product = curvature.ggn(f, params, batch)(v)
        return value, gradient, product, estimated(f, params, batch)

    one = quick_jit(found)(PARAMS, problem.batch, problem.direction)
    assert_close(run(way, found, problem), one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["tree", "batch_norm"])
def test_float32_stays_float32_where_nothing_is_promoted(name):
    f, batch = objective_of(name)
    params, batch = jax.tree.map(jnp.float32, (PARAMS, batch))

    def found(params):
        value, gradient = f.value_and_grad(params, batch)
        product = curvature.ggn(f, params, batch)(gradient)
        return value, gradient, product, estimated(f, params, batch)

    with jax.numpy_dtype_promotion("strict"):
        shapes = jax.eval_shape(found, params)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_no_rule_takes_a_part_of_the_batch():
    f, batch = objective_of("batch_norm")
    assert subsample(f, batch, 2) is batch
    assert f.case_values(PARAMS, batch).shape == (1,)


def test_an_update_with_default_options_lowers_f():
    f, batch = objective_of("batch_norm")
    tx = hfjax.hessian_free(f)

    @quick_jit
    def update(params, batch):
        value, grads = f.value_and_grad(params, batch)
        updates, state = tx.update(grads, tx.init(params), params, batch=batch)
        return value, f.value(optax.apply_updates(params, updates), batch), state.info

    before, after, info = update(PARAMS, batch)
    assert info.accepted
    np.testing.assert_allclose(info.value_after, after, rtol=1e-9)
    assert after < 0.7 * before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"microbatch_size": 2}, "`microbatch_size` does not go .* `jax.checkpoint`"),
        ({"axis_name": "cases"}, "`axis_name` does not go .* `jax.jit` alone"),
        ({"hidden_loss": SQUARED}, "`hidden_loss` does not go with `whole_batch`"),
    ],
)
def test_options_that_take_a_batch_apart_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        hfjax.Objective(batch_norm, SQUARED, whole_batch=True, **options)


def test_what_is_made_of_single_examples_is_refused():
    f, batch = objective_of("batch_norm")
    with pytest.raises(ValueError, match=r"use `diagonals\.ggn_rademacher`"):
        diagonals.empirical_fisher(f, PARAMS, batch)
    with pytest.raises(ValueError, match=r"use `curvature\.ggn`"):
        curvature.empirical_fisher(f, PARAMS, batch)
    tx = hfjax.recipes.martens2010(f)
    with pytest.raises(ValueError, match=r"preconditioners\.diagonal"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, batch=batch)


@pytest.mark.parametrize(
    ("loss", "weights", "words"),
    [
        (
            optax.losses.ntxent,
            WEIGHTS,
            r"shape \[\]: weights of shape \[8\] need values",
        ),
        (
            lambda z, t: z[:4],
            None,
            r"\[4, 2\]: return one value .* shape \[8\], or their",
        ),
        (
            hfjax.losses.Loss(SQUARED.value, SQUARED.hessian, SQUARED.factor, flat),
            None,
            "has no `weighted`: write the loss by `hfjax.losses.from_function`",
        ),
    ],
)
def test_losses_that_do_not_fit_are_refused(loss, weights, words):
    f = hfjax.Objective(batch_norm, loss, whole_batch=True)
    with pytest.raises(ValueError, match=words):
        f.value(PARAMS, (X, LABELS, weights))


@pytest.mark.slow
def test_the_check_of_a_set_up_names_the_flag_and_passes_with_it():
    f, batch = objective_of("batch_norm")
    grads = f.value_and_grad(PARAMS, batch)[1]
    assert check(f, hfjax.hessian_free(f), PARAMS, batch, grads) == []
    errors = hfjax.verify.products(f, PARAMS, batch, key=KEY)
    assert max(errors) < 1e-6
    (fault,) = check(f, None, PARAMS, batch, jax.tree.map(lambda g: CASES * g, grads))
    assert "`grads`" in fault
    bare = hfjax.Objective(batch_norm, SQUARED)
    (fault,) = check(bare, None, PARAMS, batch, grads)
    assert "batch normalisation in training mode" in fault
    assert "`Objective(…, whole_batch=True)`" in fault
