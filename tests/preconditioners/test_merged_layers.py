"""Kronecker factors of a sum of objectives, against NumPy in float64, term by term."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from jax.flatten_util import ravel_pytree
from problems import normal
from reference import matrix_of, quick_jit

import hfjax
from hfjax.objectives.objective import weighted_sum
from hfjax.preconditioners._inverses import _similar

RNG = np.random.default_rng(11)
KEY = jax.random.key(2)
SQUARED = hfjax.losses.squared_error()
PARAMS = {
    "w": normal(RNG, 3, 4),
    "b": normal(RNG, 4),
    "v": normal(RNG, 4, 1),
    "u": normal(RNG, 4, 1),
}
WEIGHTS = (0.7, 2.0, 0.3)
SHARE, DAMPING = 0.4, 0.25


def with_bias(p, x):
    return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"]


def without_bias(p, x):
    return jnp.tanh(x @ p["w"]) @ p["u"]


def penalty(p, x):
    """Read kernel and bias of one layer, entry by entry: J is the diagonal of x θ."""
    entries = jnp.concatenate([p["w"].ravel(), p["b"]])
    return 0.5 * x * jnp.square(entries)[None]


TERMS = (with_bias, without_bias, penalty)


def batches(seed):
    rng = np.random.default_rng(seed)
    x, y = normal(rng, 6, 3), normal(rng, 4, 3)
    one = (jnp.ones((1, 1)), jnp.zeros((1, 16)))
    return ((x, jnp.ones((6, 1))), (y, jnp.ones((4, 1))), one)


def the_sum(weights=WEIGHTS, **options):
    return weighted_sum(
        [
            (c, hfjax.Objective(model_fn, SQUARED, **options))
            for c, model_fn in zip(weights, TERMS, strict=True)
        ]
    )


def mean_square(rows):
    return rows.T @ rows / len(rows)


def dense_blocks(data, weights=WEIGHTS):
    """Return Ā and Ḡ of each kernel, and the mean diagonal beside those of w."""
    p = {name: np.asarray(leaf) for name, leaf in PARAMS.items()}
    (x, _), (y, _), _ = jax.tree.map(np.asarray, data)
    first = np.tanh(x @ p["w"] + p["b"])
    second = np.tanh(y @ p["w"])
    ones, none = np.ones((len(x), 1)), np.zeros((len(y), 1))
    a, b, c = weights
    inputs = a * mean_square(np.hstack([x, ones]))
    inputs += b * mean_square(np.hstack([y, none]))
    units = a * mean_square((1 - first**2) * p["v"][:, 0])
    units += b * mean_square((1 - second**2) * p["u"][:, 0])
    beside = c * np.mean(np.concatenate([p["w"].ravel(), p["b"]]) ** 2)
    return {
        "w": (inputs / (a + b), units, beside),
        "v": (mean_square(first), a * np.ones((1, 1)), 0.0),
        "u": (mean_square(second), b * np.ones((1, 1)), 0.0),
    }


def dense_inverse(blocks):
    """Return P⁻¹ from factors that are damped, in the order of `ravel_pytree`."""
    place = ravel_pytree(PARAMS)[1](jnp.arange(24.0))
    place = {k: np.asarray(n).astype(int).ravel() for k, n in place.items()}
    truth = np.zeros((24, 24))
    for name, (inputs, units, beside) in blocks.items():
        damping = SHARE * (DAMPING + beside)
        ratio = np.sqrt(np.trace(inputs) / len(inputs) / (np.trace(units) / len(units)))
        left = inputs + ratio * np.sqrt(damping) * np.eye(len(inputs))
        right = units + np.sqrt(damping) / ratio * np.eye(len(units))
        index = np.concatenate([place[name], place["b"] if name == "w" else []])
        index = index.astype(int)
        truth[np.ix_(index, index)] = np.linalg.inv(np.kron(left, right))
    return truth


def rule(**options):
    return hfjax.preconditioners.kronecker(damping_share=SHARE, cases=None, **options)


@functools.cache
def built(size=None):
    return np.asarray(quick_jit(lambda: dense(the_sum(microbatch_size=size)))())


def dense(f, data=None):
    """Return P⁻¹ as the library has it, in the order of `ravel_pytree`."""
    data = batches(0) if data is None else data
    apply = rule().build(f, PARAMS, data, jnp.float64(DAMPING), KEY)
    return matrix_of(apply, PARAMS)


@pytest.mark.parametrize("size", [None, 2])
def test_factors_are_those_of_the_terms_that_read_the_kernel(size):
    """A term without the bias has zeros for it, a penalty its mean diagonal."""
    truth = dense_inverse(dense_blocks(batches(0)))
    np.testing.assert_allclose(built(size), truth, rtol=1e-8, atol=1e-10)


def test_what_stands_beside_factors_is_averaged_and_kept_with_them():
    f = the_sum()
    kept = rule(decay=0.9, interval=2)

    @quick_jit
    def run(memory, data, count):
        build = (f, PARAMS, data, jnp.float64(DAMPING), KEY, memory, count)
        invert, memory = kept.build(*build)
        return matrix_of(invert, PARAMS), memory

    memory = kept.init(PARAMS)
    first, second = (dense_blocks(batches(seed)) for seed in (0, 1))
    half = {
        k: tuple((x + y) / 2 for x, y in zip(first[k], second[k], strict=True))
        for k in first
    }
    # A build that is used twice, then one that is averaged with it: 1 − 1/2 of the old.
    for seed, count, truth in ((0, 0, first), (1, 1, first), (1, 2, half)):
        found, memory = run(memory, batches(seed), count)
        np.testing.assert_allclose(found, dense_inverse(truth), rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_weights_that_are_zero_or_traced_and_sums_of_sums_change_nothing_else():
    data = batches(0)
    truth = dense_inverse(dense_blocks(data))
    traced = quick_jit(lambda weights: dense(the_sum(weights)))
    np.testing.assert_allclose(traced(WEIGHTS), truth, rtol=1e-8, atol=1e-10)
    # No part of G: v's block is damped alone, and u's and w's are the second term's.
    none = np.asarray(traced((0.0, 2.0, 0.0)))
    alone = quick_jit(lambda: dense(hfjax.Objective(without_bias, SQUARED), data[1]))()
    at = np.asarray(ravel_pytree(PARAMS)[1](jnp.arange(24.0))["u"], int).ravel()
    assert np.all(np.linalg.eigvalsh(none) > 0)
    ratio = none[np.ix_(at, at)][0, 0] / np.asarray(alone)[np.ix_(at, at)][0, 0]
    assert 0.3 < ratio < 0.8  # G is twice as large, λ the same.
    schedule = optax.piecewise_constant_schedule(0.0, {})
    one = hfjax.Objective
    inner = weighted_sum(
        [(1.0, one(without_bias, SQUARED)), (schedule, one(penalty, SQUARED))]
    )
    nested = weighted_sum([(0.7, one(with_bias, SQUARED)), (2.0, inner)]).at(0)
    found = quick_jit(lambda: dense(nested, (data[0], data[1:])))()
    expected = dense_inverse(dense_blocks(data, (0.7, 2.0, 0.0)))
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


P = {"w": normal(RNG, 3, 3), "b": normal(RNG, 3), "c": normal(RNG, 3)}
DENSE = lambda p, x: x @ p["w"] + p["b"]  # noqa: E731
SENTENCES = {
    "nothing_is_read": (
        (DENSE, lambda p, x: x),
        {"w": "factors of 3 + 1 inputs and 3 units", "b": "bias of ['w']"},
    ),
    "no_bias": (
        (DENSE, lambda p, x: x @ p["w"]),
        {"w": "factors of 3 + 1 inputs and 3 units", "b": "bias of ['w']"},
    ),
    "another_bias": (
        (DENSE, lambda p, x: x @ p["w"] + p["c"]),
        {
            "w": "factors of 3 inputs and 3 units",
            "b": "diagonal: its kernel has another bias in another term",
            "c": "diagonal: its kernel has another bias in another term",
        },
    ),
    "bias_alone": (
        (DENSE, lambda p, x: x * p["b"]),
        {
            "w": "factors of 3 inputs and 3 units",
            "b": "diagonal: `mul` uses it",
            "c": "diagonal: the model does not read it",
        },
    ),
    "bias_once_without": (
        (DENSE, lambda p, x: x @ p["w"] + p["b"] + jnp.sin(x) @ p["w"]),
        {
            "w": "factors of 3 inputs and 3 units, at 1 or 2 positions",
            "b": "diagonal: its kernel is used without it",
        },
    ),
    "transposed": (
        (DENSE, lambda p, x: x @ p["w"].T),
        {
            "w": "diagonal: it is used in another way in another term",
            "b": "diagonal: its kernel has no factors",
        },
    ),
    "penalty": (
        (DENSE, lambda p, x: x * p["w"].ravel()[:3] * p["b"]),
        {
            "w": "factors of 3 + 1 inputs and 3 units; term 1 (`slice` uses it) "
            "adds the mean of its diagonal to the damping",
            "b": "bias of ['w']",
        },
    ),
    "in_no_term": (
        (lambda p, x: x @ p["w"] ** 2, lambda p, x: x @ jnp.exp(p["w"])),
        {
            "w": "diagonal: `integer_pow` uses it",
            "b": "diagonal: the model does not read it",
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SENTENCES)
def test_a_sum_says_which_layers_its_terms_share(name):
    models, expected = SENTENCES[name]
    x = normal(RNG, 2, 3)
    with jax.numpy_rank_promotion("allow"):
        f = weighted_sum([(1.0, hfjax.Objective(m, SQUARED)) for m in models])
        found = hfjax.preconditioners.layers(f, P, ((x, x), (x, x)))
        for leaf, sentence in expected.items():
            assert found[f"['{leaf}']"] == sentence
        other_way = weighted_sum(
            [(1.0, hfjax.Objective(m, SQUARED)) for m in models[::-1]]
        )
        again = hfjax.preconditioners.layers(other_way, P, ((x, x), (x, x)))
        kinds = [{k: v.split()[0] for k, v in of.items()} for of in (found, again)]
        assert kinds[0] == kinds[1]
        invert = hfjax.preconditioners.kronecker().build(
            f, P, ((x, x), (x, x)), jnp.float64(0.1), KEY
        )
        step = invert(jax.tree.map(jnp.ones_like, P))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(step))


@pytest.mark.slow
def test_a_sum_with_a_penalty_is_trained():
    f = the_sum()
    tx = hfjax.hessian_free(f)
    _, (info, _) = training.trained(f, tx, PARAMS, batches(0), 4)
    values = info.value_before.tolist()
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.5 * values[0]


def test_inverses_are_grouped_as_long_as_padding_is_an_eighth_of_the_work():
    ours = [785, 784, *[401, 400] * 2, *[201, 200] * 2, *[101, 100] * 2, 51, 50, 7, 6]
    for lengths in (ours, [900, 100, 90, 8], [300, 300, 290, 3], [5], [], [2000, 1999]):
        groups = _similar(lengths)
        assert sorted(n for group in groups for n in group) == [*range(len(lengths))]
        work = sum(length**3 for length in lengths)
        padded = sum(len(group) * lengths[group[0]] ** 3 for group in groups)
        nearly = sum((length / 0.9) ** 3 for length in lengths)
        assert padded <= max(nearly, work) + work / 8
        assert all(lengths[n] <= lengths[group[0]] for group in groups for n in group)
    assert len(_similar(ours)) == 3
    assert len(_similar([900, 100, 90, 8])) == 2  # 900 would pad too much.
    assert len(_similar([2000, 1999])) == 2  # These are too large to copy.
