"""Conjugate gradients and trust regions on whatever is finite, and on what is not."""

import functools

import jax
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from reference import quick_jit
from strategies import (
    UNKNOWNS,
    System,
    arrays,
    nonfinite,
    nonzero,
    scales,
    signed_spectra,
    spectra,
    systems,
    wild,
)
from test_properties_cg import DTYPES, eps, every_dtype, solve

from hfjax import trust_region
from hfjax.solvers.cg import Reason

ONES = np.ones(UNKNOWNS)


@st.composite
def of_any_scale(draw, low, high):
    """Draw a system whose x and M float32 holds, of eigenvalues between the scales."""
    middle = draw(st.integers(-26, 26))
    spectrum = draw(signed_spectra(low, high, zeros=False))
    # x is about b / λ, or b where λ is negative.
    most = min((34 + middle) // 2 + low, 32 + middle + low, (32 - middle) // 2 - high)
    power = draw(st.integers(max(-30, (middle - 30) // 2), most))
    b = draw(nonzero(UNKNOWNS)) * 10.0**power
    return draw(systems(st.just(spectrum * 10.0**middle), st.just(b)))


@given(st.sampled_from(DTYPES), of_any_scale(-3, 3))
@example(np.float32, System(np.diag(1e-20 * ONES), ONES))
def test_the_model_never_rises_whatever_the_spectrum(dtype, system):
    system = system.cast(dtype)
    result, x, values = solve(system)
    assert np.all(np.isfinite(values))
    assert np.all(np.diff(values) <= 0)
    assert values[0] == 0
    # What r has drifted from b − A x by, and the rounding of M: both in each step.
    sizes = max(system.size(point) for point in x)
    slack = 10 * UNKNOWNS * len(x) * eps(dtype) * sizes + float(np.finfo(dtype).tiny)
    true = np.array([system.model(point) for point in x])
    assert np.all(np.diff(true) <= slack)
    np.testing.assert_allclose(values, true, rtol=0, atol=slack)
    ends = (Reason.RESIDUAL_ZERO, Reason.MAX_ITERATIONS, Reason.NONPOSITIVE_CURVATURE)
    assert result.reason in ends


def singular(kept, values, b):
    return systems(st.just(np.where(kept, values, 0)), st.just(b))


@given(
    st.sampled_from(DTYPES),
    st.builds(
        singular,
        st.lists(st.booleans(), min_size=UNKNOWNS, max_size=UNKNOWNS),
        spectra(0.9),
        nonzero(UNKNOWNS),
    ).flatmap(lambda drawn: drawn),
)
@example(np.float32, System(np.diag([0.0, 1, 1, 1, 1, 1]), ONES / np.arange(1, 7)))
def test_an_inconsistent_singular_system_ends_finite_with_m_falling(dtype, system):
    result, x, values = solve(system.cast(dtype))
    assert np.all(np.isfinite(x))
    assert np.all(np.isfinite(values))
    assert np.all(np.diff(values) <= 0)
    assert result.reason not in (Reason.RUNNING, Reason.NONFINITE)


wild_vectors = arrays(UNKNOWNS, elements=wild())


@given(
    arrays(UNKNOWNS, UNKNOWNS, elements=wild()),
    wild_vectors,
    st.one_of(st.none(), wild_vectors),
    st.one_of(st.none(), wild_vectors),
    st.booleans(),
)
@example(1e-30 * np.eye(UNKNOWNS), 1e30 * ONES, None, None, False)
@example(1e29 * (np.eye(UNKNOWNS)[::-1]), 1e-10 * ONES, np.eye(6)[0], None, False)
def test_whatever_is_finite_leaves_a_finite_result(a, b, x0, inverse, symmetric):
    a = a + a.T if symmetric else a
    system = System(a, b).cast(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        result, x, values = solve(system, x0=x0, inverse=inverse)
    assert np.all(np.isfinite(x))
    assert not np.any(np.isnan(values))
    assert np.all(np.isfinite(result.kept))
    assert Reason(int(result.reason)) != Reason.RUNNING


@every_dtype
@given(
    system=systems(spectra(1.0)),
    where=st.sampled_from(["b", "product", "preconditioner"]),
    place=st.integers(0, UNKNOWNS - 1),
    bad=nonfinite,
)
def test_what_is_not_finite_ends_the_run_at_a_finite_iterate(
    dtype, system, where, place, bad
):
    a, b = system.cast(dtype)
    inverse = np.ones(UNKNOWNS)
    if where == "b":
        b[place] = bad
    elif where == "product":
        a[place, place] = bad
    else:
        inverse[place] = bad
    result, x, values = solve(System(a, b), inverse=inverse)
    assert result.reason == Reason.NONFINITE
    np.testing.assert_array_equal(x, np.zeros((1, UNKNOWNS)))
    np.testing.assert_array_equal(values, [0])


@functools.cache
def trust_region_program():
    def run(a, b, inverse, radius):
        return trust_region.solve(
            lambda v: a @ v,
            b,
            radius,
            preconditioner=lambda r: inverse * r,
            norm=lambda v: v / inverse,
            max_iterations=3 * UNKNOWNS,
        )

    return quick_jit(run)


@every_dtype
@given(
    system=systems(signed_spectra(-3, 3, zeros=True)),
    diagonal=arrays(UNKNOWNS),
    scale=scales(-12, 12),
    radius=scales(-12, 12),
)
def test_a_trust_region_is_kept_and_the_cauchy_point_is_beaten(
    dtype, system, diagonal, scale, radius
):
    system = System(system.a, scale * system.b).cast(dtype)
    inverse = (2.0 ** np.round(diagonal)).astype(dtype)
    radius = dtype(radius)
    run = trust_region_program()
    result = jax.device_get(run(*system, inverse, radius))
    x, p, (a, b) = result.x.astype(float), 1 / inverse.astype(float), system.wide
    radius, slack = float(radius), 4 * UNKNOWNS * eps(dtype)
    length = np.sqrt(x @ (p * x))
    assert length <= (1 + slack) * radius
    if result.on_boundary:
        assert length >= (1 - slack) * radius

    down = b / p  # The steepest descent of M in that norm, to where M is least.
    curvature, longest = down @ a @ down, radius / np.sqrt(b @ down)
    inside = curvature * longest > b @ down
    step = b @ down / curvature if inside else longest
    cauchy = system.model(step * down)
    # The rounding of A in b's direction may turn the sign of what is nearly flat.
    size = max(system.size(x), system.size(step * down))
    assert system.model(x) <= cauchy + slack * size
    assert result.reason != Reason.RUNNING
    assert not np.any(np.isnan(result.model_values))


@given(
    arrays(UNKNOWNS, UNKNOWNS, elements=wild()),
    wild_vectors,
    scales(-30, 30),
    st.booleans(),
)
@example(np.eye(UNKNOWNS), 1e24 * ONES, 1e-15, False)
@example(np.diag([1e20, 1.5e20, 4e20, 4e20, 4e20, 4e20]), ONES, 0.95e-20, False)
def test_a_trust_region_step_is_finite_whatever_is_finite(a, b, radius, symmetric):
    a = (a + a.T if symmetric else a).astype(np.float32)
    run, ones = trust_region_program(), np.ones(UNKNOWNS, np.float32)
    result = jax.device_get(run(a, b.astype(np.float32), ones, np.float32(radius)))
    assert np.all(np.isfinite(result.x))
    assert Reason(int(result.reason)) != Reason.RUNNING
    length = np.linalg.norm(result.x.astype(float))
    assert length <= radius * (1 + 4 * UNKNOWNS * eps(np.float32))
