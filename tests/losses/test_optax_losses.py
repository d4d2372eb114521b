"""Optax's losses in an `Objective`, and the page that says how each of them fares.

`docs/losses.md` is read here: its tables must name all of `optax.losses`, and what they
say is measured.
"""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from reference import flat as ravel
from reference import quick_jit

import hfjax
from hfjax import losses

pytestmark = pytest.mark.filterwarnings("ignore:.*convex_kl:DeprecationWarning")


def read_page():
    """Return the rows of each table, by the name in their first column."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    sections = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    tables = {}
    for title, body in zip(sections[1::2], sections[2::2], strict=True):
        rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", body, flags=re.MULTILINE)
        cells = {name: [c.strip() for c in rest.split("|")] for name, rest in rows}
        assert len(cells) == len(rows)  # No name twice.
        tables[title] = cells
    return tables


PAGE = read_page()
PLAIN, LAMBDAS = PAGE["As they are"], PAGE["With a lambda"]
TABLE = {**PLAIN, **LAMBDAS}
every_loss = pytest.mark.parametrize("name", TABLE)


def loss_of(name):
    if name in PLAIN:
        return getattr(optax.losses, name)
    code = LAMBDAS[name][0].strip("`")
    return eval(code, {"jax": jax, "optax": optax})


def real(rng, *shape):
    return rng.standard_normal(shape)


def bits(rng, *shape):
    return rng.integers(0, 2, shape).astype(float)


def signs(rng, *shape):
    return 2 * bits(rng, *shape) - 1


def labels(rng, *shape):
    return rng.integers(0, shape[-1], shape[:-1])


def one_hot(rng, *shape):
    return np.eye(shape[-1])[labels(rng, *shape)]


def distributions(rng, *shape):
    return rng.dirichlet(np.ones(shape[-1]), shape[:-1])


def log_distributions(rng, *shape):
    return np.log(distributions(rng, *shape))


def spoken(rng, cases, frames, classes):
    """Targets of CTC: the last frame and the last label of the last case are padding."""
    paddings, label_paddings = np.zeros((cases, frames)), np.zeros((cases, 2))
    paddings[-1, -1] = label_paddings[-1, -1] = 1
    symbols = rng.integers(1, classes, (cases, 2))
    return {"paddings": paddings, "labels": symbols, "label_paddings": label_paddings}


def nothing(rng, cases, *shape):
    return np.zeros(cases)


DRAW = {
    "l2_loss": real,
    "squared_error": real,
    "huber_loss": real,
    "log_cosh": real,
    "cosine_distance": real,
    "sigmoid_binary_cross_entropy": bits,
    "softmax_cross_entropy": distributions,
    "safe_softmax_cross_entropy": one_hot,
    "softmax_cross_entropy_with_integer_labels": labels,
    "poly_loss_cross_entropy": one_hot,
    "sigmoid_focal_loss": bits,
    "sparsemax_loss": bits,
    "multiclass_sparsemax_loss": labels,
    "hinge_loss": signs,
    "perceptron_loss": signs,
    "multiclass_hinge_loss": labels,
    "multiclass_perceptron_loss": labels,
    "kl_divergence": distributions,
    "kl_divergence_with_log_targets": log_distributions,
    "generalized_kl_divergence": distributions,
    "convex_kl_divergence": distributions,
    "dice_loss": one_hot,
    "binary_dice_loss": bits,
    "ranking_softmax_loss": distributions,
    "make_fenchel_young_loss": distributions,
    "ctc_loss": spoken,
    "triplet_margin_loss": nothing,
    "multiclass_generalized_dice_loss": one_hot,
}
ONE_VECTOR = {"cosine_distance", "multiclass_sparsemax_loss"}
CASES = 6
WEIGHTS = np.array([1.0, 0.0, 2.5, 0.3, 4.0, 1.0])


def shapes(name):
    """Return the shape of a case's outputs: of two axes, where a loss knows more."""
    if name == "triplet_margin_loss":
        return dict.fromkeys(("anchor", "negative", "positive"), (2,))
    return (3,) if name in ONE_VECTOR else (3, 2)


def targets(name, rng):
    shape = shapes(name)
    drawn = DRAW[name](rng, CASES, *(shape if isinstance(shape, tuple) else ()))
    return jax.tree.map(jnp.asarray, drawn)


def unravel(name, rows):
    """Turn outputs `[cases, m]` into what the loss is of."""
    shape = shapes(name)
    if isinstance(shape, tuple):
        return rows.reshape(-1, *shape)
    parts = jnp.split(rows, len(shape), axis=1)
    return dict(zip(shape, parts, strict=True))


def units(name):
    shape = shapes(name)
    return np.prod(shape) if isinstance(shape, tuple) else 2 * len(shape)


@functools.cache
def dense(name):
    """Return the compiled `(z [cases, m], t) -> values [cases], L″ [cases, m, m]`."""
    loss = loss_of(name)

    def of_one(z, t):
        one = jax.tree.map(lambda leaf: leaf[None], t)
        return jnp.sum(loss(unravel(name, z[None]), one))

    def both(z, t):
        return of_one(z, t), jax.hessian(of_one)(z, t)

    return quick_jit(jax.vmap(both))


@pytest.fixture(autouse=True)
def rank_promotion():
    """Optax's own code may broadcast; what it is given must not be."""
    with jax.numpy_rank_promotion("allow"):
        yield


def test_every_public_name_of_optax_losses_is_in_one_table_of_the_page():
    public = {name for name in dir(optax.losses) if not name.startswith("_")}
    tables = [*TABLE, *PAGE["Not losses of one example"]]
    assert sorted(tables) == sorted(public)
    assert set(DRAW) == set(TABLE)


def features(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


@every_loss
def test_value_and_product_in_an_objective_are_the_dense_truth(name):
    rng = np.random.default_rng(3)
    m, x, t = units(name), jnp.asarray(real(rng, CASES, 3)), targets(name, rng)
    weights = {"in": real(rng, 3, 2), "out": 3 * real(rng, 2, m)}
    params = jax.tree.map(jnp.asarray, weights)
    v = jax.tree.map(jnp.cos, params)
    batch = (x, t, jnp.asarray(WEIGHTS))

    def both(positive):
        loss = loss_of(name)
        if positive is not None:
            loss = losses.from_function(loss, positive=positive)
        objective = hfjax.Objective(lambda p, x: unravel(name, features(p, x)), loss)
        product = hfjax.curvature.ggn(objective, params, batch)(v)
        return objective.value(params, batch), ravel_pytree(product)[0]

    flat, restore = ravel_pytree(params)
    j = jax.jacfwd(lambda flat: features(restore(flat), x))(flat)
    values, hessians = (
        np.asarray(leaf) for leaf in dense(name)(features(params, x), t)
    )
    np.testing.assert_array_equal(hessians.shape, (CASES, m, m))

    def assert_true(positive, hessians):
        value, product = quick_jit(both, static_argnums=0)(positive)
        truth = np.einsum("i,iam,iab,ib->m", WEIGHTS, j, hessians, j @ ravel(v))
        truth /= np.sum(WEIGHTS)
        np.testing.assert_allclose(
            value, WEIGHTS @ values / np.sum(WEIGHTS), rtol=1e-12
        )
        scale = np.max(np.abs(truth))
        np.testing.assert_allclose(product, truth, rtol=1e-10, atol=1e-12 * scale)

    assert_true(None, hessians)
    if TABLE[name][1] == "no":
        eigenvalues, vectors = np.linalg.eigh(hessians)
        positive = np.maximum(eigenvalues, 0)
        assert np.min(eigenvalues[WEIGHTS > 0]) < -1e-3
        assert_true("clip", np.einsum("iak,ik,ibk->iab", vectors, positive, vectors))


@functools.cache
def spectra(name):
    """Return the least eigenvalue of L″ and its largest entry, of 4800 cases."""
    least, largest = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        for scale in (0.3, 1.0, 3.0, 10.0):
            z = jnp.asarray(scale * real(rng, CASES, units(name)))
            hessians = np.asarray(dense(name)(z, targets(name, rng))[1])
            least.append(np.linalg.eigvalsh(hessians)[:, 0])
            largest.append(np.max(np.abs(hessians), axis=(1, 2)))
    return np.concatenate(least), np.concatenate(largest)


@every_loss
def test_the_page_says_of_each_loss_whether_it_is_convex(name):
    least, largest = spectra(name)
    verdict, does = TABLE[name][1:3]
    if verdict == "no":
        assert np.min(least + 0.1 * largest) < -1e-3
        assert 'G is indefinite: `positive="clip"`' in does
        return
    # Where an entry is p − p², with p near 1, it is right to an ulp of 1.
    assert np.all(least >= -1e-9 * largest - 1e-15)
    zero = not np.any(largest)
    assert verdict == ("yes, L″ = 0" if zero else "yes")
    assert does.startswith("G = 0: gradient steps") == zero


@pytest.mark.parametrize("name", [name for name in TABLE if TABLE[name][3]])
def test_the_closed_form_that_the_page_names_is_the_same_loss(name):
    times, closed = re.fullmatch(r"(twice )?`(\w+)\(\)`", TABLE[name][3]).groups()
    closed, times = getattr(losses, closed)(), 2 if times else 1
    rng = np.random.default_rng(5)
    z, t = jnp.asarray(2 * real(rng, CASES, units(name))), targets(name, rng)
    values, hessians = dense(name)(z, t)
    outputs = unravel(name, z)
    np.testing.assert_allclose(times * closed.value(outputs, t), values, rtol=1e-12)
    v = jnp.cos(3 * z)
    product = closed.hessian(outputs, t)(unravel(name, v)).reshape(z.shape)
    truth = np.einsum("iab,ib->ia", hessians, v)
    np.testing.assert_allclose(times * product, truth, rtol=1e-11, atol=1e-15)


@pytest.mark.slow
def test_kl_divergence_of_logits_has_the_curvature_of_softmax():
    rng = np.random.default_rng(7)
    z = jnp.asarray(3 * real(rng, CASES, 4))
    t, v = jnp.asarray(distributions(rng, CASES, 4)), jnp.asarray(real(rng, CASES, 4))

    def fn(z, t):
        return optax.losses.kl_divergence(jax.nn.log_softmax(z), t)

    ours, theirs = losses.softmax_cross_entropy(), losses.from_function(fn)
    np.testing.assert_allclose(
        theirs.hessian(z, t)(v), ours.hessian(z, t)(v), rtol=1e-9, atol=1e-15
    )
    entropy = -np.sum(t * np.log(t), axis=1)
    np.testing.assert_allclose(
        theirs.value(z, t), ours.value(z, t) - entropy, rtol=1e-9
    )


def test_squared_error_of_unit_vectors_is_the_cosine_distance():
    rng = np.random.default_rng(9)
    z, t = jnp.asarray(real(rng, CASES, 3)), jnp.asarray(real(rng, CASES, 3))
    pair = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (z, t)]
    np.testing.assert_allclose(
        losses.squared_error().value(*pair),
        optax.losses.cosine_distance(z, t),
        rtol=1e-12,
    )


def test_the_closed_form_keeps_curvature_that_differentiating_loses():
    z, t = jnp.full((1, 1), 17, jnp.float32), jnp.zeros((1, 1), jnp.float32)
    automatic = losses.from_function(optax.losses.sigmoid_binary_cross_entropy)
    assert automatic.hessian(z, t)(jnp.ones_like(z)) == 0
    product = losses.sigmoid_cross_entropy().hessian(z, t)(jnp.ones_like(z))
    np.testing.assert_allclose(product, 4.14e-8, rtol=1e-3)


@pytest.mark.slow
def test_where_the_loss_has_no_curvature_the_empirical_fisher_matrix_goes_further():
    rng = np.random.default_rng(0)
    x = jnp.asarray(real(rng, 40, 3))
    batch = (x, jnp.argmax(x @ jnp.asarray(real(rng, 3, 3)), axis=1))
    objective = hfjax.Objective(
        lambda params, x: x @ params, optax.losses.multiclass_hinge_loss
    )

    def train(curvature):
        tx = hfjax.hessian_free(objective, curvature=curvature, preconditioner=None)

        def step(carry, _):
            params, state = carry
            grads = objective.value_and_grad(params, batch)[1]
            updates, state = tx.update(grads, state, params, batch=batch)
            carry = optax.apply_updates(params, updates), state
            return carry, (state.info.value_after, grads, updates)

        params = jnp.zeros((3, 3))
        return jax.lax.scan(step, (params, tx.init(params)), length=15)[1]

    train = quick_jit(train, static_argnums=0)
    plain, grads, updates = train(hfjax.curvature.ggn)
    for g, u in zip(grads, updates, strict=True):  # Gradient steps, as the page says.
        np.testing.assert_allclose(u / jnp.max(jnp.abs(u)), -g / jnp.max(jnp.abs(g)))
    fisher, _, _ = train(hfjax.curvature.empirical_fisher)
    assert fisher[-1] < 0.7 * plain[-1] < 0.3 * plain[0]


def test_a_loss_that_compares_cases_is_refused():
    labels = jnp.array([0, 1, 0, 1])
    objective = hfjax.Objective(lambda p, x: x * p, optax.losses.ntxent)
    with pytest.raises(ValueError, match="must return one value per case"):
        objective.value(jnp.ones(()), (jnp.eye(4), labels))
