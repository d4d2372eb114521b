"""Losses of trees and multiples of losses, beside their parts and dense truth."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from reference import quick_jit

import hfjax
from hfjax import losses

BINARY = losses.sigmoid_cross_entropy()
LABELS = losses.softmax_cross_entropy_with_integer_labels()
DIVERGENCE = losses.gaussian_kl_divergence()


class Heads(NamedTuple):
    kind: Any
    where: Any


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape))


def parts(seed=0):
    """Return three losses, one of them a function, with outputs and targets of each."""
    rng = np.random.default_rng(seed)
    latent = normal(rng, 4, 2), normal(rng, 4, 2)
    return {
        "labels": (LABELS, normal(rng, 4, 3), jnp.asarray([0, 2, 1, 1])),
        "box": (optax.losses.huber_loss, normal(rng, 4, 2), normal(rng, 4, 2)),
        "latent": (DIVERGENCE, latent, None),
    }


CONTAINERS = {
    "dict": dict,
    "tuple": lambda p: tuple(p.values()),
    "list": lambda p: list(p.values()),
    "named": lambda p: Heads((p["labels"],), [p["box"], {"z": p["latent"]}]),
}


@pytest.mark.every
@pytest.mark.parametrize("container", CONTAINERS)
def test_values_add_up_and_products_are_those_of_each_part(container):
    given = parts()
    build = CONTAINERS[container]
    loss = losses.tree(build({name: part for name, (part, _, _) in given.items()}))
    z = build({name: z for name, (_, z, _) in given.items()})
    t = build({name: t for name, (_, _, t) in given.items()})
    v = jax.tree.map(jnp.cos, z)

    @quick_jit
    def ours(z, t, v):
        return loss.value(z, t), loss.hessian(z, t)(v), loss.factor(z, t)(v)

    @quick_jit
    def theirs(z):
        values, curved, rooted, links = 0, {}, {}, {}
        for name, (part, z, t) in given.items():
            part = part if name != "box" else losses.from_function(part)
            own = jax.tree.map(jnp.cos, z)
            values += part.value(z, t)
            curved[name] = part.hessian(z, t)(own)
            rooted[name] = part.factor(z, t)(own)
            links[name] = part.predict(z)
        return values, build(curved), build(rooted), build(links)

    truth = theirs(z)
    found = (*ours(z, t, v), loss.predict(z))
    assert jax.tree.structure(found) == jax.tree.structure(truth)
    for x, y in zip(*map(jax.tree.leaves, (found, truth)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-13)


def test_closed_forms_are_kept():
    # By differentiation, a float32 logit of 20 has no curvature.
    z = {"a": jnp.full((1, 1), 20.0, jnp.float32)}
    t = {"a": jnp.ones((1, 1), jnp.float32)}
    loss = losses.scaled(4.0, losses.tree({"a": BINARY}))
    np.testing.assert_allclose(loss.hessian(z, t)(t)["a"], 4 * np.exp(-20), rtol=1e-5)
    np.testing.assert_allclose(loss.factor(z, t)(t)["a"], 2 * np.exp(-10), rtol=1e-5)


def test_a_tree_of_one_loss_alone_is_that_loss():
    assert losses.tree(BINARY) is BINARY
    wrapped = losses.tree(optax.losses.l2_loss)
    np.testing.assert_allclose(wrapped.value(jnp.ones((1, 2)), jnp.zeros((1, 2))), 1)


def test_values_of_two_dtypes_add_up_in_the_wider_one():
    loss = losses.tree((BINARY, losses.squared_error()))
    z = jnp.zeros((2, 1), jnp.float32), jnp.ones((2, 1), jnp.float64)
    value = loss.value(z, z)
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, np.log(2), rtol=1e-7)
    product = loss.hessian(z, z)(z)
    assert [x.dtype for x in product] == [jnp.float32, jnp.float64]


def test_a_scaled_loss_has_its_value_and_curvature_times_c_and_its_root_times_root_c():
    rng = np.random.default_rng(0)
    z, t, v = (
        normal(rng, 3, 4),
        jnp.asarray(rng.uniform(size=(3, 4))),
        normal(rng, 3, 4),
    )

    @quick_jit
    def scaled(c):
        loss = losses.scaled(c, BINARY)
        return loss.value(z, t), loss.hessian(z, t)(v), loss.factor(z, t)(v)

    value, hessian, factor = scaled(2.5)
    np.testing.assert_allclose(value, 2.5 * BINARY.value(z, t), rtol=1e-13)
    np.testing.assert_allclose(hessian, 2.5 * BINARY.hessian(z, t)(v), rtol=1e-13)
    truth = np.sqrt(2.5) * BINARY.factor(z, t)(v)
    np.testing.assert_allclose(factor, truth, rtol=1e-13)
    whole = losses.scaled(4, optax.losses.squared_error)
    np.testing.assert_allclose(whole.factor(z, t)(v), np.sqrt(8) * v, rtol=1e-13)
    assert not np.any(losses.scaled(0, BINARY).factor(z, t)(v))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_scaled_loss_keeps_dtypes(dtype):
    loss = losses.scaled(jnp.asarray(0.1), BINARY)
    z = jnp.ones((2, 3), dtype)
    for x in (loss.value(z, z), loss.hessian(z, z)(z), loss.factor(z, z)(z)):
        assert x.dtype == dtype


def test_a_scaled_loss_is_otherwise_the_same():
    loss = losses.scaled(0.5, BINARY)
    assert loss.targets is BINARY.targets
    assert loss.predict is BINARY.predict
    assert loss.coarse is BINARY.coarse


def test_weights_that_are_no_numbers_or_negative_are_refused():
    with pytest.raises(ValueError, match=r"`c` must be at least 0\.0, got -1"):
        losses.scaled(-1, BINARY)
    for c in (None, optax.constant_schedule(1.0)):
        with pytest.raises(TypeError, match=r"`c` must be a number.*weighted_sum"):
            losses.scaled(c, BINARY)
    with pytest.raises(TypeError, match=r"`loss` must be an `hfjax\.losses\.Loss`"):
        losses.scaled(1.0, 2.0)


@pytest.mark.parametrize("leaf", [None, "huber", 1.0], ids=str)
def test_a_leaf_that_is_no_loss_is_refused(leaf):
    with pytest.raises(TypeError, match=r"`losses\['b'\]` must be an `hfjax\.los"):
        losses.tree({"a": BINARY, "b": leaf})


@pytest.mark.parametrize("empty", [{}, (), [{}]], ids=str)
def test_a_tree_without_losses_is_refused(empty):
    with pytest.raises(ValueError, match="`losses` holds no loss"):
        losses.tree(empty)


@pytest.mark.parametrize("part", ["value", "hessian", "factor"])
def test_outputs_and_targets_of_another_tree_are_refused_with_both_trees(part):
    loss = losses.tree({"a": BINARY, "b": DIVERGENCE})
    x = jnp.zeros((2, 1))
    z = {"a": x, "b": (x, x)}
    begin = (
        r"must begin with the tree of the losses, dict\(\['a'\] Loss, \['b'\] Loss\)"
    )
    wanted = rf"`outputs` {begin}, got dict\(\['a'\] float64\[2,1\]\)\. Let `model_fn`"
    with pytest.raises(ValueError, match=wanted):
        getattr(loss, part)({"a": x}, {"a": x, "b": None})
    with pytest.raises(ValueError, match=rf"`targets` {begin}, .*`None` if it reads n"):
        getattr(loss, part)(z, {"a": x})
    with pytest.raises(ValueError, match=rf"`targets` {begin}, got tuple"):
        getattr(loss, part)(z, (x, None))


def test_the_error_of_a_part_says_which_it_is():
    loss = losses.tree({"a": BINARY, "b": [losses.squared_error()]})
    x = jnp.zeros((2, 1))
    with pytest.raises(ValueError, match="must have shape") as caught:
        loss.value({"a": x, "b": [x]}, {"a": x, "b": [x[:, 0]]})
    assert "`losses['b'][0]` with outputs float64[2,1]" in caught.value.__notes__[0]


def test_a_part_that_takes_the_mean_over_cases_is_refused():
    mean = losses.Loss(
        lambda z, t: jnp.mean(z), BINARY.hessian, BINARY.factor, BINARY.predict
    )
    loss = losses.tree({"a": BINARY, "b": mean})
    z = {"a": jnp.zeros((2, 1)), "b": jnp.zeros((2, 1))}
    with pytest.raises(ValueError, match="must return one value per case"):
        loss.value(z, z)


def test_targets_of_each_part_are_looked_at_and_named():
    loss = losses.tree({"a": BINARY, "b": LABELS, "c": losses.squared_error()})
    z = {"a": jnp.zeros((3, 1)), "b": jnp.zeros((3, 2)), "c": jnp.zeros((3, 1))}
    t = {
        "a": jnp.asarray([[0.0], [2.0], [1.0]]),
        "b": jnp.asarray([0, 1, 2]),
        "c": jnp.full((3, 1), 7.0),
    }
    np.testing.assert_array_equal(loss.targets.allowed(z, t), [True, False, False])
    assert loss.targets.words == (
        "between 0 and 1 at targets['a'] and labels of the classes there are, from 0 at "
        "targets['b']"
    )
    assert losses.tree((losses.squared_error(), DIVERGENCE)).targets is None


def test_a_part_whose_root_is_coarse_is_reported():
    def coupled(z, t):
        distance = jnp.sum((z - t) ** 2, axis=-1) ** 1.5
        return distance + jax.nn.logsumexp(z, axis=-1)

    loss = losses.tree({"a": BINARY, "b": coupled})
    x, y = jnp.zeros((1, 2)), jnp.zeros((1, 120))
    assert loss.coarse({"a": x, "b": y}, {"a": x, "b": y}).startswith(
        "the loss couples 120 outputs"
    )
    fine = losses.tree({"a": BINARY, "b": optax.losses.huber_loss})
    assert fine.coarse({"a": x, "b": y}, {"a": x, "b": y}) is None


def encode_and_decode(params, inputs):
    """Run a variational autoencoder; the noise is part of the inputs."""
    x, noise = inputs
    hidden = jnp.tanh(x @ params["encoder"] + params["bias"][None])
    mean, s = hidden @ params["mean"], hidden @ params["log_variance"]
    latent = mean + jnp.exp(s / 2) * noise
    return {"image": latent @ params["decoder"], "latent": (mean, s)}


def autoencoder(beta=0.5):
    """Return parameters, a batch, and a VAE's loss as a tree and as a function."""
    rng = np.random.default_rng(3)
    params = {
        "encoder": normal(rng, 4, 3),
        "bias": normal(rng, 3),
        "mean": normal(rng, 3, 2),
        "log_variance": normal(rng, 3, 2),
        "decoder": normal(rng, 2, 4),
    }
    x = jnp.asarray(rng.integers(0, 2, (6, 4)), float)
    weights = jnp.asarray([1.0, 0.0, 2.0, 0.5, 1.0, 1.0])
    batch = (x, normal(rng, 6, 2)), {"image": x, "latent": None}, weights

    def function(z, t):
        (mean, s), logits, pixels = z["latent"], z["image"], t["image"]
        image = jnp.logaddexp(0, logits) - pixels * logits
        latent = 0.5 * (jnp.exp(s) + mean**2 - 1 - s)
        return jnp.sum(image, axis=1) + beta * jnp.sum(latent, axis=1)

    scaled = losses.scaled(beta, DIVERGENCE)
    tree = losses.tree({"image": BINARY, "latent": scaled})
    return params, batch, tree, function


def test_a_variational_autoencoder_has_the_dense_gradient_and_curvature():
    params, batch, tree, function = autoencoder()
    f = hfjax.Objective(encode_and_decode, tree, weight_decay=0.1)
    flat, unravel = ravel_pytree(params)
    inputs, targets, w = batch
    v = jnp.cos(flat)

    def outputs(flat):
        z = encode_and_decode(unravel(flat), inputs)
        return jax.vmap(lambda case: ravel_pytree(case)[0])(z)

    def value(flat):
        values = function(encode_and_decode(unravel(flat), inputs), targets)
        return jnp.sum(w * values) / jnp.sum(w) + 0.05 * jnp.sum(flat**2)

    @quick_jit
    def both(params, flat):
        ours = (
            *f.value_and_grad(params, batch),
            hfjax.curvature.ggn(f, params, batch)(unravel(v)),
            hfjax.diagonals.ggn_exact(f, params, batch),
        )
        j, z = jax.jacfwd(outputs)(flat), outputs(flat)
        p = jax.nn.sigmoid(z[:, :4])
        # Leaves are in the order of their names: image, mean, log variance.
        curved = [p * (1 - p), jnp.full((6, 2), 0.5), 0.25 * jnp.exp(z[:, 6:])]
        curved = jnp.concatenate(curved, axis=1)
        g = jnp.einsum("i,ia,iam,ian->mn", w / jnp.sum(w), curved, j, j)
        g += 0.1 * jnp.eye(len(flat))
        return ours, (*jax.value_and_grad(value)(flat), g @ v, jnp.diag(g))

    for x, y in zip(*both(params, flat), strict=True):
        np.testing.assert_allclose(ravel_pytree(x)[0], jnp.ravel(y), rtol=1e-9)


@pytest.mark.parametrize("other", ["function", "weighted_sum"])
def test_a_variational_autoencoder_takes_the_same_step_as_in_other_forms(other):
    params, batch, tree, function = autoencoder()
    forms = {"tree": (hfjax.Objective(encode_and_decode, tree), batch)}
    if other == "function":
        forms[other] = hfjax.Objective(encode_and_decode, function), batch
    else:
        (inputs, targets, weights) = batch

        def part(name):
            return lambda params, inputs: encode_and_decode(params, inputs)[name]

        image = hfjax.Objective(part("image"), BINARY)
        latent = hfjax.Objective(part("latent"), DIVERGENCE)
        f = hfjax.objective.weighted_sum([(1.0, image), (0.5, latent)])
        both = ((inputs, targets[name], weights) for name in ("image", "latent"))
        forms[other] = f, tuple(both)

    def step(f, batch):
        tx = hfjax.hessian_free(
            f,
            damping=hfjax.damping.levenberg_marquardt(),
            preconditioner=None,
            solver=hfjax.cg.conjugate_gradient(max_iterations=8),
        )

        @quick_jit
        def run(params):
            grads = f.value_and_grad(params, batch)[1]
            return tx.update(grads, tx.init(params), params, batch=batch)

        return run(params)

    (ours, state), (theirs, _) = (step(*form) for form in forms.values())
    assert state.info.accepted
    for name, x in ours.items():
        assert np.any(x != 0)
        np.testing.assert_allclose(x, theirs[name], rtol=1e-7, err_msg=name)


def test_every_kernel_of_a_variational_autoencoder_has_exact_factors():
    params, batch, tree, _ = autoencoder()
    f = hfjax.Objective(encode_and_decode, tree)
    lines = hfjax.preconditioners.layers(f, params, batch)
    for path, line in lines.items():
        assert line.startswith("bias" if "bias" in path else "factors"), (path, line)
        assert "nearly" not in line


def flow(params, x):
    """Return the image of a point and log |det| of the Jacobian, of an affine coupling."""
    a, b = x[:, :1], x[:, 1:]
    hidden = jnp.tanh(a @ params["in"])
    s, shift = hidden @ params["scale"], hidden @ params["shift"]
    return jnp.concatenate([a, b * jnp.exp(s) + shift], axis=1), s[:, 0]


def likelihood(outputs, targets):
    z, log_det = outputs
    return 0.5 * jnp.sum(z**2, axis=1) - log_det


@pytest.mark.parametrize("form", ["function", "tree"])
def test_the_gauss_newton_matrix_of_a_flow_knows_nothing_of_the_determinant(form):
    rng = np.random.default_rng(0)
    params = {"in": normal(rng, 1, 3), "scale": normal(rng, 3, 1)}
    params["shift"] = normal(rng, 3, 1)
    x = normal(rng, 5, 2)
    none = jnp.zeros_like(x)
    split = losses.tree((losses.squared_error(), lambda log_det, t: -log_det))
    loss, t = (likelihood, none) if form == "function" else (split, (none, None))
    f = hfjax.Objective(flow, loss)
    alone = hfjax.Objective(lambda p, x: flow(p, x)[0], losses.squared_error())
    flat, unravel = ravel_pytree(params)
    v = unravel(jnp.cos(flat))

    @quick_jit
    def products(params, flat):
        g = hfjax.curvature.ggn(f, params, (x, t))(v)
        part = hfjax.curvature.ggn(alone, params, (x, none))(v)
        h = hfjax.curvature.hessian(f, params, (x, t))(v)

        def value(flat):
            return jnp.mean(likelihood(flow(unravel(flat), x), None))

        dense = jax.hessian(value)(flat) @ jnp.cos(flat)
        return *(ravel_pytree(y)[0] for y in (g, part, h)), dense

    g, part, h, dense = products(params, flat)
    np.testing.assert_allclose(g, part, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(h, dense, rtol=1e-10)
    assert np.linalg.norm(h - g) > 0.1 * np.linalg.norm(h)
