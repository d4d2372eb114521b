"""Conjugate gradients on any spectrum, against dense algebra in float64.

κ is the condition number. Sums of n numbers round by n ε each, and a solution by κ times
that; what CG loses beyond, as its directions cease to be conjugate, is a few digits where
κ ≤ 10, and there only can its iterates be held against the best of their Krylov spaces.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import quick_jit
from strategies import (
    UNKNOWNS,
    System,
    arrays,
    eighths,
    nonzero,
    scales,
    spectra,
    systems,
)

from hfjax import cg, iterates
from hfjax.solvers.cg import Reason

ITERATIONS = 4 * UNKNOWNS
DTYPES = (np.float64, np.float32)
DIGITS = {np.float64: 8.0, np.float32: 3.0}
"""Of the condition number: half of what the dtype has."""

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def halves(x):
    """Take x apart: a matrix, a scalar, an empty leaf, a vector."""
    return {"m": x[:2][:, None], "s": x[2], "none": x[:0], "v": (x[5:], x[3:5])}


def joined(tree):
    m, s, (last, v) = tree["m"][:, 0], tree["s"][None], tree["v"]
    return jnp.concatenate([m, s, v, last])


@functools.cache
def program(split=False, warm=False):
    take, join = (halves, joined) if split else (lambda x: x, lambda x: x)

    def run(a, b, inverse, x0, limit):
        result = cg.solve(
            lambda v: take(a @ join(v)),
            take(b),
            x0=take(x0) if warm else None,
            preconditioner=lambda r: take(inverse * join(r)),
            max_iterations=ITERATIONS,
            stopping=None,
            keep=iterates.every(1),
            limit=limit,
        )
        kept = jax.vmap(join)(result.kept.iterates)
        return result._replace(x=join(result.x), kept=kept)

    return quick_jit(run)


def solve(system, *, inverse=None, x0=None, limit=ITERATIONS, split=False):
    """Run it; iterates and M as arrays `[iterations + 1]`, with the start."""
    dtype = system.b.dtype
    inverse = np.ones(UNKNOWNS) if inverse is None else inverse
    start = (np.zeros(UNKNOWNS) if x0 is None else x0).astype(dtype)
    run = program(split=split, warm=x0 is not None)
    result = jax.device_get(run(*system, inverse.astype(dtype), start, np.int32(limit)))
    count = int(result.num_iterations)
    x = np.concatenate([start[None], result.kept[:count].astype(np.float64)])
    assert result.x.dtype == dtype
    if count:  # In units of b a start may vanish.
        np.testing.assert_array_equal(result.x, x[-1])
    later = result.model_values[count:]
    np.testing.assert_array_equal(later, np.full_like(later, later[0]))
    return result, x, result.model_values[: count + 1].astype(np.float64)


def well_conditioned(dtype):
    return systems(spectra(0.9)).map(lambda system: system.cast(dtype))


def any_conditioned(dtype):
    return systems(spectra(DIGITS[dtype])).map(lambda system: system.cast(dtype))


def eps(dtype):
    return float(np.finfo(dtype).eps)


@every_dtype
@given(data=st.data())
def test_the_solution_is_the_dense_one_within_the_condition(dtype, data):
    system = data.draw(any_conditioned(dtype))
    result, x, _ = solve(system)
    truth = np.linalg.solve(*system.wide)
    bound = 4 * UNKNOWNS * system.condition * eps(dtype)
    assert np.linalg.norm(x[-1] - truth) <= bound * np.linalg.norm(truth)
    assert result.reason in (Reason.RESIDUAL_ZERO, Reason.MAX_ITERATIONS)


@every_dtype
@given(data=st.data())
def test_as_many_iterations_as_unknowns_are_enough(dtype, data):
    system = data.draw(well_conditioned(dtype))
    _, x, _ = solve(system, limit=UNKNOWNS)
    truth = np.linalg.solve(*system.wide)
    bound = 1e3 * system.condition * eps(dtype)
    assert np.linalg.norm(x[-1] - truth) <= bound * np.linalg.norm(truth)


@every_dtype
@given(data=st.data())
def test_the_error_falls_as_fast_as_the_condition_says(dtype, data):
    # ‖x_k − x‖_A ≤ 2 ((√κ − 1) / (√κ + 1))^k ‖x‖_A, in finite precision too.
    system = data.draw(any_conditioned(dtype))
    _, x, _ = solve(system)
    a, b = system.wide
    errors = x - np.linalg.solve(a, b)
    errors = np.sqrt(np.einsum("ki,ij,kj->k", errors, a, errors))
    root = np.sqrt(system.condition)
    rate = ((root - 1) / (root + 1)) ** np.arange(len(x))
    rounding = 4 * UNKNOWNS * system.condition * eps(dtype)
    assert np.all(errors <= (2 * rate + rounding) * errors[0])


def krylov_best(system, inverse, count):
    """Return the least M over the span of P⁻¹b, (P⁻¹A) P⁻¹b, …, count vectors."""
    a, b = system.wide
    basis, v = [], inverse * b
    for _ in range(count):
        for _ in range(2):
            for u in basis:
                v = v - u * (u @ v)
        if np.linalg.norm(v) < 1e-14 * np.linalg.norm(inverse * b):
            break
        basis.append(v / np.linalg.norm(v))
        v = inverse * (a @ basis[-1])
    v = np.array(basis)
    small = System(v @ a @ v.T, v @ b)
    return small.model(np.linalg.solve(*small))


@every_dtype
@given(data=st.data())
def test_each_iterate_is_the_best_of_its_krylov_space(dtype, data):
    system = data.draw(systems(spectra(0.6)).map(lambda system: system.cast(dtype)))
    inverse = 1 + np.abs(data.draw(arrays(UNKNOWNS))) / 4  # Of P, at most 2.
    _, x, values = solve(system, inverse=inverse, limit=UNKNOWNS)
    slack = 100 * UNKNOWNS * eps(dtype)
    for k in range(1, len(x)):
        best = krylov_best(system, inverse, k)
        for value in (system.model(x[k]), values[k]):
            np.testing.assert_allclose(value, best, rtol=slack)


@every_dtype
@given(data=st.data())
def test_the_model_values_are_those_of_the_iterates(dtype, data):
    system = data.draw(any_conditioned(dtype))
    _, x, values = solve(system)
    true = np.array([system.model(point) for point in x])
    sizes = max(system.size(point) for point in x)
    slack = 10 * UNKNOWNS * len(x) * eps(dtype) * sizes
    np.testing.assert_allclose(values, true, rtol=0, atol=slack)


@given(data=st.data())
def test_a_consistent_singular_system_is_solved(data):
    kept = data.draw(st.lists(st.booleans(), min_size=UNKNOWNS, max_size=UNKNOWNS))
    values = np.where(kept, data.draw(spectra(0.9)), 0)
    b = data.draw(nonzero(UNKNOWNS)) * kept
    system = data.draw(systems(st.just(values), st.just(b)))
    _, x, _ = solve(system)
    a, b = system.wide
    truth = np.linalg.pinv(a, rcond=1e-9, hermitian=True) @ b
    # In M, that is: down the null space nothing holds x.
    slack = 100 * UNKNOWNS * eps(np.float64)
    slack *= max(system.size(x[-1]), system.size(truth))
    assert system.model(x[-1]) - system.model(truth) <= slack


@given(data=st.data(), power=st.integers(-90, 90))
def test_a_power_of_two_in_b_is_the_same_in_x_to_the_last_bit(data, power):
    system = data.draw(any_conditioned(np.float32))
    factor = np.float32(2.0**power)
    result, x, _ = solve(system)
    other, scaled, _ = solve(System(system.a, factor * system.b))
    held = np.abs(x) * 2.0**power >= np.finfo(np.float32).tiny
    np.testing.assert_array_equal(scaled[held], x[held] * 2.0**power)
    assert other.reason == result.reason


@every_dtype
@given(data=st.data())
def test_with_the_inverse_as_preconditioner_one_iteration_is_enough(dtype, data):
    # A diagonal, so that its inverse is a diagonal too.
    values = data.draw(spectra(DIGITS[dtype]))
    scale = data.draw(scales(-10, 10))
    b = data.draw(nonzero(UNKNOWNS))
    system = System(np.diag(scale * values), b).cast(dtype)
    inverse = 1 / np.diag(system.wide.a)
    _, x, _ = solve(system, inverse=inverse, limit=1)
    np.testing.assert_allclose(x[-1], inverse * b, rtol=4 * UNKNOWNS * eps(dtype))


@every_dtype
@given(data=st.data())
def test_how_the_unknowns_are_split_into_leaves_changes_rounding_only(dtype, data):
    system = data.draw(well_conditioned(dtype))
    order = data.draw(st.permutations(range(UNKNOWNS)))
    shuffled = System(system.a[np.ix_(order, order)], system.b[order])
    inverse = 1 + np.abs(data.draw(arrays(UNKNOWNS))) / 8
    limit = data.draw(st.integers(1, UNKNOWNS))
    _, x, _ = solve(system, inverse=inverse, limit=limit)
    _, y, _ = solve(shuffled, inverse=inverse[order], limit=limit, split=True)
    bound = 1e3 * system.condition * eps(dtype) * np.linalg.norm(x[-1])
    np.testing.assert_allclose(y[-1], x[-1][order], rtol=0, atol=bound)


@given(arrays(UNKNOWNS, UNKNOWNS), nonzero(UNKNOWNS))
def test_a_start_at_the_solution_is_kept(root, x0):
    # Of small eighths: every product and sum is exact.
    root = np.round(root)
    a = root @ root.T + np.eye(UNKNOWNS)
    system = System(a, a @ x0).cast(np.float32)
    result, x, _ = solve(system, x0=x0)
    assert result.num_iterations == 0
    assert result.reason == Reason.RESIDUAL_ZERO
    np.testing.assert_array_equal(x[-1], x0)


@given(data=st.data(), digits=eighths)
def test_a_warm_start_ends_at_the_same_solution(data, digits):
    system = data.draw(any_conditioned(np.float32))
    x0 = data.draw(arrays(UNKNOWNS)) * digits
    _, x, values = solve(system, x0=x0)
    truth = np.linalg.solve(*system.wide)
    size = np.linalg.norm(truth) + np.linalg.norm(x0)
    bound = 4 * UNKNOWNS * system.condition * eps(np.float32) * size
    assert np.linalg.norm(x[-1] - truth) <= bound
    slack = 4 * UNKNOWNS * eps(np.float32) * system.size(x0)
    assert abs(values[0] - system.model(x0)) <= slack
