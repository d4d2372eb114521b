"""NIST's certified fits: 27 curves, from both starts, by default options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hfjax
from benchmarks.suites import nist


def test_certified_parameters_give_what_else_is_certified():
    for name, problem in nist.load().items():
        linear = jax.jit(
            jax.jacfwd(
                lambda b, p=problem: (p.residuals(b, *p.data),) * 2, has_aux=True
            )
        )
        jacobian, r = map(np.asarray, linear(jnp.asarray(problem.certified)))
        free = len(r) - len(problem.certified)
        square = float(r @ r)
        if name == "Lanczos1":  # Its residuals are 1e-13, and b is rounded to 1e-11.
            assert square < 1e-20
        else:
            assert square == pytest.approx(problem.sum_of_squares, rel=1e-10)
        lengths = np.linalg.norm(jacobian, axis=0)
        inverse = np.linalg.inv(np.linalg.qr(jacobian / lengths, mode="r"))
        roots = np.linalg.norm(inverse, axis=1) / lengths
        deviations = roots * np.sqrt(problem.sum_of_squares / free)
        np.testing.assert_allclose(deviations, problem.deviations, rtol=1e-9)


def test_parameters_of_the_same_curve_are_right():
    same = {
        "MGH17": ([0, 2, 1, 4, 3], 1),
        "Lanczos2": ([4, 5, 0, 1, 2, 3], 1),
        "Eckerle4": ([0, 1, 2], [-1, -1, 1]),
    }
    for name, (order, signs) in same.items():
        problem = nist.load()[name]
        b = problem.certified[order] * np.array(signs)
        np.testing.assert_allclose(
            problem.model(b, problem.x), problem.model(problem.certified, problem.x)
        )
        assert problem.digits(b) == 11
        assert problem.digits(b * (1 + 1e-5)) == pytest.approx(5, abs=1e-3)
        assert problem.digits(b, problem.deviations[order]) == 11


@pytest.mark.parametrize("name", nist.MODELS)
def test_fits_have_the_certified_digits_from_both_starts(name):
    problem = nist.load()[name]
    for start in problem.starts:
        fit = hfjax.least_squares(problem.residuals, start, *problem.data)
        b, deviations = np.asarray(fit.params), np.asarray(fit.standard_errors())
        assert problem.digits(b) >= 7
        # The residuals of Lanczos1 are 1e-13 and have three digits in float64.
        assert problem.digits(b, deviations) >= (2.5 if name == "Lanczos1" else 7)
