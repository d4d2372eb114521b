"""The path of a step, θ + αδ + α²c, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.solvers.descent import Step

RNG = np.random.default_rng(0)
DELTA, C = RNG.standard_normal((2, 5))
TREE = (jnp.asarray(DELTA[:2]), jnp.asarray(DELTA[2:]))
BENT = (jnp.asarray(C[:2]), jnp.asarray(C[2:]))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def step(correction):
    return Step(TREE, jnp.zeros(()), jnp.int32(1), correction)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("bent", [False, True])
def test_a_path_is_a_parabola_and_its_length_is_told(bent, alpha):
    taken = step(BENT if bent else None)
    truth = alpha * DELTA + alpha**2 * bent * C
    np.testing.assert_allclose(flat(taken.at(jnp.float64(alpha))), truth, rtol=1e-14)
    length = taken.length(jnp.float64(alpha))
    np.testing.assert_allclose(length, np.linalg.norm(truth), rtol=1e-14)


def test_the_end_of_a_path_is_that_of_alpha_one():
    np.testing.assert_array_equal(flat(step(None).at()), DELTA)
    np.testing.assert_array_equal(flat(step(BENT).at()), DELTA + C)


def test_a_short_step_along_a_direction_too_long_for_a_float_has_a_length():
    direction = (jnp.full(9, 2e38, jnp.float32),)
    long = Step(direction, jnp.zeros(()), jnp.int32(1))
    length = long.length(jnp.float32(2.0**-20))
    np.testing.assert_allclose(length, 3 * 2e38 * 2.0**-20, rtol=1e-6)
