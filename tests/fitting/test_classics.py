"""The functions of Moré, Garbow & Hillstrom: a known minimum, by default options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hfjax
from benchmarks.suites import classics

STARTS = {
    "Rosenbrock": 24.2,
    "Freudenstein-Roth": 400.5,
    "Powell badly scaled": 1.13526171734838,
    "Brown badly scaled": 999998000003.0,
    "Beale": 14.203125,
    "helical valley": 2500.0,
    "Powell singular": 215.0,
    "Wood": 19192.0,
    "Watson 6": 30.0,
    "linear, full rank": 25.0,
}
"""Σ r² at the standard start, where that can be had by hand."""


def test_functions_have_the_known_values_at_their_starts():
    for name, value in STARTS.items():
        problem = classics.PROBLEMS[name]
        r = problem.residuals(jnp.array(problem.start))
        assert float(r @ r) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("name", classics.PROBLEMS)
def test_fits_end_at_a_known_minimum(name):
    problem = classics.PROBLEMS[name]
    fit = hfjax.least_squares(problem.residuals, np.array(problem.start))
    r = jax.jit(problem.residuals)(fit.params)
    found = float(r @ r)
    assert 2 * float(fit.value) == pytest.approx(found, rel=1e-9, abs=1e-25)
    # The paper has six digits of the minima that are not 0.
    assert any(found == pytest.approx(x, rel=5e-6, abs=1e-20) for x in problem.minima)
