"""Losses and models that lose the case axis, or mix cases, are told so."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import normal
from reference import quick_jit

import hfjax
from hfjax.objectives.plain import terms_of

RNG = np.random.default_rng(3)
CASES = 5
COLUMN = normal(RNG, CASES, 1)
ROW = normal(RNG, CASES)
WIDE = normal(RNG, CASES, 3)
SQUARE = normal(RNG, CASES, CASES)
SCALE = jnp.asarray(1.5)


@pytest.fixture(autouse=True)
def allow_rank_promotion():
    """Broadcasting is what this is about."""
    with jax.numpy_rank_promotion("allow"):
        yield


def scaled(p, x):
    return jax.tree.map(lambda x: p * x, x)


def half_squares(z, t):
    return 0.5 * (z - t) ** 2


def summed(z, t):
    return jnp.sum(half_squares(z, t), axis=-1)


MIXED = {
    "squares": (half_squares, COLUMN, ROW),
    "squares_of_rows": (half_squares, ROW, COLUMN),
    "summed": (summed, COLUMN, ROW),
    "compiled": (jax.jit(summed), COLUMN, ROW),
    "huber": (optax.losses.huber_loss, COLUMN, ROW),
    "huber_mean": (lambda z, t: optax.losses.huber_loss(z, t).mean(-1), COLUMN, ROW),
    "log_cosh": (optax.losses.log_cosh, COLUMN, ROW),
    "sigmoid": (optax.losses.sigmoid_binary_cross_entropy, COLUMN, ROW > 0),
    "one_case": (summed, COLUMN[:1], ROW[:1]),
    "two_cases": (summed, COLUMN[:2], ROW[:2]),
    "as_many_outputs_as_cases": (summed, SQUARE, ROW),
    "as_many_targets_as_cases": (summed, ROW, SQUARE),
    "axis_in_between": (half_squares, WIDE[:, None], WIDE),
    "mask": (
        lambda z, t: jnp.sum(t["mask"] * half_squares(z, t["y"]), axis=-1),
        COLUMN,
        {"y": COLUMN, "mask": ROW},
    ),
    "choice": (lambda z, t: jnp.where(t > 0, z, -z).sum(-1), COLUMN, ROW),
    "second_leaf": (
        lambda z, t: half_squares(z["a"][0], t["c"]) + summed(z["b"], t["d"]),
        {"a": [ROW], "b": COLUMN},
        {"c": ROW, "d": ROW},
    ),
    "leaf_of_leaves": (
        lambda z, t: jax.tree.map(half_squares, z, t)["u"]["v"],
        {"u": {"v": COLUMN}},
        {"u": {"v": np.asarray(ROW)}},
    ),
    "slice_of_outputs": (lambda z, t: summed(z[:, :1], t), WIDE, ROW),
    "column_of_targets": (lambda z, t: summed(z, t[:, 0]), COLUMN, WIDE),
    "leaves_of_outputs": (
        lambda z, t: jnp.sum(half_squares(z["mean"], t) * jnp.exp(z["scale"]), axis=-1),
        {"mean": COLUMN, "scale": ROW},
        COLUMN,
    ),
    "leaves_of_targets": (
        lambda z, t: half_squares(z, t["y"]) * jnp.mean(t["w"] * t["mask"], axis=-1),
        ROW,
        {"y": ROW, "w": COLUMN, "mask": ROW},
    ),
    "put_together": (
        lambda z, t: summed(jnp.concatenate([z, z], 1)[:, 1:], t),
        COLUMN,
        ROW,
    ),
    "split": (lambda z, t: summed(jnp.split(z, 3, 1)[1], t), WIDE, ROW),
    "stacked": (lambda z, t: summed(jnp.stack([z, z], 2)[:, :, 0], t), COLUMN, ROW),
    "multiplied": (lambda z, t: summed(z @ jnp.ones((3, 1)), t), WIDE, ROW),
    "square_multiplied": (lambda z, t: summed(z, t @ jnp.eye(CASES)), ROW, SQUARE),
    "in_a_branch": (
        lambda z, t: jax.lax.cond(SCALE > 0, summed, lambda z, t: z[:, 0] * t, z, t),
        COLUMN,
        ROW,
    ),
    "own_outputs": (lambda z, t: half_squares(z, t) + z @ z.T, COLUMN, COLUMN),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_loss_that_broadcasts_cases_against_one_another_is_refused(name):
    loss, z, t = MIXED[name]
    f = hfjax.Objective(scaled, loss)
    with pytest.raises(ValueError, match="`loss` must not mix cases") as told:
        f.value(SCALE, (z, t))
    shapes = [f"[{','.join(map(str, x.shape))}]" for x in jax.tree.leaves((z, t))]
    assert all(shape in str(told.value) for shape in shapes)
    assert "needs `Objective(…, whole_batch=True)`" in str(told.value)
    tx = hfjax.hessian_free(f)
    assert hfjax.verify.check(f, tx, SCALE, (z, t), SCALE) == [str(told.value)]


def pairwise(z, t):
    same = t[:, None] == t
    return -jnp.sum(same * jax.nn.log_softmax(z @ z.T), axis=1)


UNMIXED = {
    "flat": (lambda z, t: half_squares(z.reshape(-1), t), COLUMN, ROW),
    "squeezed": (lambda z, t: half_squares(z.squeeze(), t), COLUMN, ROW),
    "transposed": (lambda z, t: half_squares(z.T, t).sum(0), WIDE, ROW),
    "slices": (lambda z, t: summed(z[:, :1], t[:, None]) + z[:, 1] * t, WIDE, ROW),
    "branches": (
        lambda z, t: jax.lax.cond(SCALE > 0, half_squares, lambda z, t: z * t, z, t), ROW, ROW
    ),
    "pairs_within": (
        lambda z, t: (z[:, :, None] - z[:, None]) ** 2 * t[:, :, None], SQUARE, SQUARE
    ),
    "products_within": (lambda z, t: z @ z.mT - t @ t.mT, SQUARE[:, None], SQUARE[:, None]),
    "by_case": (jax.vmap(half_squares), COLUMN, COLUMN),
    "weights": (lambda z, t: t["w"][:, None] * (z - t["y"]) ** 2, WIDE, {"y": WIDE, "w": ROW}),
    "labels": (
        optax.losses.softmax_cross_entropy_with_integer_labels,
        SQUARE,
        jnp.arange(CASES),
    ),
    "inner_products": (lambda z, t: jnp.einsum("nk,nk->n", z, t), WIDE, WIDE),
    "ctc": (
        lambda z, t: optax.losses.ctc_loss(z, t["zp"], t["l"], t["lp"]),
        normal(RNG, CASES, 6, 4),
        {
            "zp": jnp.zeros((CASES, 6)),
            "l": jnp.ones((CASES, 2), jnp.int32),
            "lp": jnp.zeros((CASES, 2)),
        },
    ),
    "no_targets": (lambda z, _: z**2, WIDE, None),
    "numbers_of_cases_written_out": (
        lambda z, t: half_squares(z.reshape(CASES), t), COLUMN, ROW
    ),
    "one_case_written_out": (
        lambda z, t: summed(z.reshape(1, 1), t), COLUMN[:1], ROW[:1]
    ),
    "one_case_of_pairs": (
        lambda z, t: jnp.sum(pairwise(z[0], t[0]))[None],
        WIDE[None],
        jnp.arange(CASES)[None],
    ),
    "every_case_of_pairs": (jax.vmap(pairwise), WIDE[None], jnp.arange(CASES)[None]),
    "keys": (
        jax.vmap(lambda z, key: z * jax.random.normal(key, z.shape)),
        WIDE,
        jax.random.split(jax.random.key(0), CASES),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNMIXED)
def test_a_loss_that_mixes_no_cases_is_what_it_was(name):
    loss, z, t = UNMIXED[name]
    f = hfjax.Objective(scaled, loss)
    values = loss(scaled(SCALE, z), t)
    truth = np.sum(np.asarray(values)) / len(jax.tree.leaves(z)[0])
    np.testing.assert_allclose(quick_jit(f.value)(SCALE, (z, t)), truth, rtol=1e-6)


def test_shapes_of_a_loss_are_looked_at_once():
    traces = []

    def loss(z, t):
        traces.append(z.shape)
        return half_squares(z, t)

    f = hfjax.Objective(scaled, loss)
    for _ in range(3):
        f.value(SCALE, (COLUMN, COLUMN))
    assert traces.count((CASES + 1, 1)) == 1


@pytest.mark.slow
def test_mixing_is_refused_in_microbatches_sums_and_hidden_states():
    for size in (1, 2):
        f = hfjax.Objective(scaled, summed, microbatch_size=size)
        with pytest.raises(ValueError, match="must not mix cases"):
            f.value_and_grad(SCALE, (COLUMN, ROW))
    both = hfjax.objective.weighted_sum([(1.0, hfjax.Objective(scaled, summed))] * 2)
    batch = ((ROW[:, None], ROW[:, None]), (COLUMN, ROW))
    with pytest.raises(ValueError, match="must not mix cases"):
        both.value(SCALE, batch)
    (fault,) = hfjax.verify.check(both, None, SCALE, batch, SCALE)
    assert fault.startswith("Of the sum's term 1: `loss` must not mix cases")
    hidden = hfjax.Objective(
        lambda p, x: (p * x, p * x),
        half_squares,
        hidden_loss=lambda h, r: half_squares(h, r[:, 0]),
    )
    with pytest.raises(ValueError, match="must not mix cases"):
        hfjax.curvature.ggn(hidden, SCALE, (COLUMN, COLUMN), structural=0.1)(SCALE)


def test_a_loss_of_ones_own_must_have_a_number_for_each_case():
    squares = hfjax.losses.squared_error()
    loss = hfjax.losses.Loss(
        half_squares, squares.hessian, squares.factor, squares.predict
    )
    with pytest.raises(
        ValueError, match=r"`loss.value` must have shape \[5\].*\[5, 5\]"
    ):
        hfjax.Objective(scaled, loss).value(SCALE, (COLUMN, ROW))


@pytest.mark.parametrize(
    ("loss", "z", "t", "told"),
    [
        (
            lambda z, t: -jnp.sum(t * jax.nn.log_softmax(z, axis=0), axis=-1),
            WIDE,
            jnp.abs(WIDE),
            "The loss mixes cases: ",
        ),
        (
            lambda z, t: summed(z.reshape(CASES, 1), t),
            COLUMN,
            COLUMN,
            r"fails on 1 of them \(TypeError",
        ),
        (
            # Indexing by numbers hides whose cases they are.
            lambda z, t: summed(z, t[:, jnp.arange(CASES)]),
            ROW,
            SQUARE,
            r"fails on 3 of them \(ValueError: Incompatible shapes",
        ),
    ],
    ids=["softmax", "written_out", "square"],
)
def test_mixing_that_no_shape_shows_is_found_by_the_check(loss, z, t, told):
    f = hfjax.Objective(scaled, loss)
    grads = f.value_and_grad(SCALE, (z, t))[1]
    (fault,) = hfjax.verify.check(f, None, SCALE, (z, t), grads)
    assert re.search(told, fault)


def squeezed(p, x):
    return (x @ p["w"]).squeeze()


PARAMS = {"w": normal(RNG, 3, 1)}
BATCH = (WIDE, ROW)
SQUEEZED = hfjax.Objective(squeezed, hfjax.losses.squared_error())
KEY = jax.random.key(0)


def update(**options):
    tx = hfjax.hessian_free(SQUEEZED, **options)
    grads = SQUEEZED.value_and_grad(PARAMS, BATCH)[1]
    return tx.update(grads, tx.init(PARAMS), PARAMS, batch=BATCH)


def check():
    tx = hfjax.hessian_free(SQUEEZED)
    grads = SQUEEZED.value_and_grad(PARAMS, BATCH)[1]
    raise ValueError(*hfjax.verify.check(SQUEEZED, tx, PARAMS, BATCH, grads))


def check_sum():
    f = hfjax.objective.weighted_sum([(1.0, SQUEEZED)])
    grads = f.value_and_grad(PARAMS, (BATCH,))[1]
    raise ValueError(*hfjax.verify.check(f, None, PARAMS, (BATCH,), grads))


def of_a_sum():
    f = hfjax.objective.weighted_sum([(1.0, SQUEEZED)])
    return hfjax.preconditioners.layers(f, PARAMS, (BATCH,))


ONE_CASE = {
    "default": update,
    "diagonal": lambda: update(preconditioner=hfjax.preconditioners.diagonal()),
    "auto": lambda: update(solver="auto", preconditioner=None),
    "cholesky": lambda: update(solver=hfjax.sample_space.cholesky()),
    "damping_matrix": lambda: update(
        damping=hfjax.damping.levenberg_marquardt(
            matrix=hfjax.damping_matrices.diagonal()
        )
    ),
    "microbatches_of_one": lambda: hfjax.Objective(
        squeezed, hfjax.losses.squared_error(), microbatch_size=1
    ).value(PARAMS, BATCH),
    "layers": lambda: hfjax.preconditioners.layers(SQUEEZED, PARAMS, BATCH),
    "layers_of_a_sum": of_a_sum,
    "fisher": lambda: hfjax.diagonals.empirical_fisher(SQUEEZED, PARAMS, BATCH),
    "rademacher": lambda: hfjax.diagonals.ggn_rademacher(
        SQUEEZED, PARAMS, BATCH, key=KEY
    ),
    "exact": lambda: hfjax.diagonals.ggn_exact(SQUEEZED, PARAMS, BATCH),
    "count": lambda: terms_of(SQUEEZED, BATCH)[0].columns(PARAMS),
    "cg_run": lambda: hfjax.diagnostics.cg_run(
        SQUEEZED,
        PARAMS,
        BATCH,
        damping=1.0,
        preconditioner=hfjax.preconditioners.kronecker(),
    ),
    "check": check,
    "check_sum": check_sum,
}


@pytest.mark.parametrize("name", ONE_CASE)
def test_a_model_that_squeezes_away_a_single_case_is_told_the_cure(name):
    with pytest.raises(ValueError, match=r"case axis first.*write `squeeze\(-1\)`"):
        ONE_CASE[name]()
