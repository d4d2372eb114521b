"""Which outputs of a case a loss couples, and roots of L″ by that, beside dense truth."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import hfjax
from hfjax import losses
from hfjax.losses import _coupling, _repair


def softmaxed(rng, *shape):
    return jax.nn.softmax(jnp.asarray(rng.standard_normal(shape)))


def gaussian(z, t):
    mean, log_scale = jnp.split(z, 2, axis=-1)
    return log_scale + 0.5 * jnp.square((t - mean) * jnp.exp(-log_scale))


def masked(z, t):
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(z, t["labels"])
    return jnp.where(t["mask"], loss, 0.0)


def of_leaves(z, t):
    logits = optax.losses.softmax_cross_entropy(z["logits"], t["p"])
    kl = 0.5 * (jnp.exp(z["log_var"]) + z["mean"] ** 2 - 1 - z["log_var"])
    return jnp.sum(logits, axis=-1) + jnp.sum(kl, axis=-1)


def branching(z, t):
    return jax.lax.cond(jnp.all(t == t), lambda z: z**4, lambda z: z**2, z)


def neighbours(z, t):
    return jnp.sum(jnp.cosh(z[:, 1:] - z[:, :-1]), axis=-1) + 0 * t[:, 0]


def thirds(z, t):
    first, second, third = jnp.split(z, [1, 3], axis=-1)
    return jnp.cosh(first[:, 0]) + jnp.sum(jnp.cosh(second - third[:, :2]), -1)


def cases(seed=0):
    """Losses, with outputs and targets of three cases, and the sizes of their blocks."""
    rng = np.random.default_rng(seed)
    flat, deep = (jnp.asarray(rng.standard_normal((3, *s))) for s in ((6,), (2, 4)))
    labels = jnp.asarray(rng.integers(0, 4, (3, 2)))
    mask = jnp.asarray([[True, False], [True, True], [False, True]])
    binary = jnp.asarray(rng.integers(0, 2, (3, 6)), float)
    tree = {"logits": deep, "mean": flat[:, :3], "log_var": flat[:, 3:]}
    return {
        "huber": (optax.losses.huber_loss, flat, flat[::-1], [1]),
        "log_cosh": (optax.losses.log_cosh, deep, deep[::-1], [1]),
        "sigmoid": (optax.losses.sigmoid_binary_cross_entropy, flat, binary, [1]),
        "focal": (optax.losses.sigmoid_focal_loss, flat, binary, [1]),
        "einsum": (
            lambda z, t: jnp.einsum("ni,ni->n", z - t, z - t),
            flat,
            binary,
            [1],
        ),
        "branching": (branching, flat, flat, [1]),
        "softmax": (
            optax.losses.softmax_cross_entropy,
            deep,
            softmaxed(rng, 3, 2, 4),
            [4],
        ),
        "labels": (
            optax.losses.softmax_cross_entropy_with_integer_labels,
            deep,
            labels,
            [4],
        ),
        "masked": (masked, deep, {"labels": labels, "mask": mask}, [4]),
        "gaussian": (gaussian, flat, flat[:, :3], [2]),
        "leaves": (of_leaves, tree, {"p": softmaxed(rng, 3, 2, 4)}, [1, 4]),
        "poly": (optax.losses.poly_loss_cross_entropy, flat, softmaxed(rng, 3, 6), [6]),
        "square_of_a_sum": (
            lambda z, t: (jnp.sum(z - t, axis=-1)) ** 2,
            flat,
            flat,
            [6],
        ),
        "margin": (
            lambda z, t: jax.nn.softplus(-jnp.sum(z * (2 * t - 1), axis=-1)),
            deep,
            jnp.broadcast_to(jnp.eye(2, 4), deep.shape),
            [4],
        ),
        "sum_and_some_squares": (
            lambda z, t: jnp.sum(z, axis=-1) ** 2 + jnp.sum(z[:, :2] ** 2, axis=-1) * t,
            flat,
            jnp.asarray([1.0, 0.0, 1e-30]),
            [6],
        ),
        "neighbours": (neighbours, flat, flat, [6]),
        "thirds": (thirds, flat, flat, [1, 2]),
        "cosine": (optax.losses.cosine_distance, flat, binary + 1, [6]),
    }


def dense(fn, z, t):
    """Return L″ of each case, `[cases, m, m]`, by `jax.hessian` alone."""

    def one(z, t):
        flat, unravel = ravel_pytree(z)

        def value(flat):
            lead = jax.tree.map(lambda x: x[None], (unravel(flat), t))
            return jnp.sum(fn(*lead))

        return jax.hessian(value)(flat)

    return np.asarray(jax.jit(jax.vmap(one))(z, t))


def factor(loss, z, t):
    """Return S of each case, column by column, in one program."""
    units = sum(leaf[0].size for leaf in jax.tree.leaves(z))
    unravel = jax.vmap(ravel_pytree(jax.tree.map(lambda x: x[0], z))[1])

    @jax.jit
    def columns(z, t):
        product = loss.factor(z, t)

        def column(unit):
            count = len(jax.tree.leaves(z)[0])
            result = product(unravel(jnp.broadcast_to(unit[None], (count, units))))
            return jax.vmap(lambda case: ravel_pytree(case)[0])(result)

        return jax.lax.map(column, jnp.eye(units))

    return np.moveaxis(np.asarray(columns(z, t)), 0, -1)


def positive_part(matrix, positive):
    values, vectors = np.linalg.eigh(matrix)
    if positive == "shift":
        return matrix + np.maximum(-values[:, :1], 0)[..., None] * np.eye(
            len(matrix[0])
        )
    return vectors * np.maximum(values, 0)[:, None] @ np.swapaxes(vectors, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases())
def test_blocks_hold_every_entry_of_the_dense_hessian(name):
    fn, z, t, sizes = cases()[name]

    def curvature(z, t):
        return jax.linearize(jax.grad(lambda z: jnp.sum(fn(z, t))), z)[1]

    one = jax.tree.map(lambda leaf: leaf[:1], (z, t))
    shapes = [leaf.shape for leaf in jax.tree.leaves(one[0])]
    numbers = _coupling.blocks(_coupling.trace(curvature, *one), shapes)
    assert sorted(set(np.bincount(numbers))) == sizes
    apart = numbers[:, None] != numbers[None]
    assert not np.any(dense(fn, z, t)[:, apart])


NOT_CONVEX = ("focal", "gaussian", "poly", "cosine")


@pytest.mark.parametrize(
    ("name", "positive"),
    [(name, None) for name in cases()]
    + [(name, repair) for name in NOT_CONVEX for repair in ("clip", "shift")],
)
def test_the_factor_is_a_root_of_the_dense_hessian(name, positive):
    fn, z, t, _ = cases(seed=1)[name]
    loss = losses.from_function(fn, positive=positive)
    s, truth = factor(loss, z, t), positive_part(dense(fn, z, t), positive)
    np.testing.assert_allclose(s @ np.swapaxes(s, 1, 2), truth, atol=1e-12)


@pytest.mark.parametrize(
    "shift", [1e3, -1e3], ids=["one certain class", "one class out"]
)
def test_the_factor_of_a_saturated_softmax_is_finite_and_right(shift):
    z = jnp.zeros((1, 5)).at[0, 2].set(shift)
    loss = losses.from_function(optax.losses.softmax_cross_entropy)
    t = jnp.full((1, 5), 0.2)
    s = factor(loss, z, t)
    p = np.asarray(jax.nn.softmax(z))
    truth = np.diag(p[0]) - p.T @ p
    np.testing.assert_allclose((s @ np.swapaxes(s, 1, 2))[0], truth, atol=1e-12)


def largest_array(program):
    """Return the size of the largest array that a program makes, within it too."""
    largest = 0
    for equation in getattr(program, "jaxpr", program).eqns:
        largest = max([largest, *(out.aval.size for out in equation.outvars)])
        inside = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        )
        found = [largest_array(part) for part in inside if hasattr(part, "eqns")]
        largest = max([largest, *found])
    return largest


@pytest.mark.parametrize(
    "fn", [optax.losses.log_cosh, optax.losses.softmax_cross_entropy]
)
def test_no_matrix_of_outputs_by_outputs_is_made_where_a_closed_form_needs_none(fn):
    loss, z = losses.from_function(fn), jnp.ones((2, 3, 400))
    program = jax.make_jaxpr(lambda z: loss.factor(z, z)(z))(z)
    assert largest_array(program) == z.size
    assert loss.coarse(z[:1], z[:1]) is None


def test_blocks_of_a_few_outputs_are_small_however_many_there_are():
    loss, z, t = losses.from_function(gaussian), jnp.ones((2, 600)), jnp.ones((2, 300))
    program = jax.make_jaxpr(lambda z: loss.factor(z, t)(z))(z)
    assert largest_array(program) == 2 * z.size  # [cases, 300, 2, 2]


def coupled(z, t):
    """Couple all outputs by two sums."""
    distance = jnp.sum((z - t) ** 2, axis=-1) ** 1.5
    return distance + 50 * jax.nn.logsumexp(z, axis=-1) + jnp.sum(z**4, axis=-1)


@pytest.mark.slow
def test_large_coupled_losses_have_a_root_by_lanczos_and_say_so():
    rng = np.random.default_rng(0)
    z, t, v = jnp.asarray(rng.standard_normal((3, 2, 120)))
    loss = losses.from_function(coupled)
    values, vectors = np.linalg.eigh(dense(coupled, z, t))
    assert np.all(values > 0)
    v = np.asarray(v)
    within = np.einsum("nji,nj->ni", vectors, v)
    truth = np.einsum("nij,nj->ni", vectors, np.sqrt(values) * within)
    error = np.linalg.norm(loss.factor(z, t)(jnp.asarray(v)) - truth, axis=1)
    assert np.all(error < 0.02 * np.linalg.norm(truth, axis=1))
    f = hfjax.Objective(lambda p, x: x @ p, loss)
    p = jnp.zeros((4, 120))
    batch = (jnp.asarray(rng.standard_normal((3, 4))), jnp.ones((3, 120)))
    (line,) = hfjax.preconditioners.layers(f, p, batch).values()
    assert line.startswith(
        "factors of 4 inputs and 120 units, nearly: the loss couples"
    )
    grads = f.value_and_grad(p, batch)[1]
    (sentence,) = hfjax.verify.check(f, None, p, batch, grads)
    assert "the loss couples 120 outputs of a case" in sentence


@pytest.mark.slow
def test_lanczos_is_exact_where_there_are_few_eigenvalues_and_of_zero_is_zero():
    d = jnp.asarray([[0.0, 1.0, 4.0, 9.0] * 10, [2.0] * 40])
    v = jnp.asarray(np.random.default_rng(0).standard_normal((2, 40)))
    for short in (1.0, 2.0**-10):  # A power of 2, for the same rounding.
        root = _repair._root_by_lanczos(lambda x: d * x, short * v)
        np.testing.assert_allclose(root, short * jnp.sqrt(d) * v, atol=1e-12)
    assert not np.any(_repair._root_by_lanczos(lambda x: d * x, 0 * v))


@pytest.mark.slow
def test_a_loss_that_is_read_gives_the_preconditioner_of_its_closed_form():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((12, 3)))
    t = jnp.asarray(rng.integers(0, 4, 12))
    p = {
        "w": jnp.asarray(rng.standard_normal((3, 5))),
        "scale": jnp.ones(5),
        "v": jnp.asarray(rng.standard_normal((5, 4))),
    }
    rule = hfjax.preconditioners.kronecker()

    def model_fn(p, x):
        return jnp.tanh(x @ p["w"] * p["scale"][None]) @ p["v"]

    def inverted(loss):
        f = hfjax.Objective(model_fn, loss)

        @jax.jit
        def product(p):
            return rule.build(f, p, (x, t), jnp.asarray(0.1), jax.random.key(0))(p)

        return ravel_pytree(product(p))[0]

    plain = inverted(optax.losses.softmax_cross_entropy_with_integer_labels)
    closed = inverted(losses.softmax_cross_entropy_with_integer_labels())
    np.testing.assert_allclose(plain, closed, rtol=1e-10)


def test_the_limits_are_those_that_the_docstring_names():
    text = losses.from_function.__doc__
    assert text is not None
    for number in (
        _repair.MOST_FOR_EIGENVALUES,
        _repair._MOST_FOR_ROOT,
        _repair._STEPS,
    ):
        assert f" {number} " in " ".join(text.split())


@pytest.mark.parametrize("positive", [None, "clip", "shift"])
def test_outputs_without_entries_have_a_root_and_a_product(positive):
    loss = losses.from_function(optax.losses.l2_loss, positive=positive)
    z = jnp.zeros((3, 0))
    assert loss.factor(z, z)(z).shape == loss.hessian(z, z)(z).shape == (3, 0)
