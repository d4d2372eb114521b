import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import quick_jit

from hfjax import initializers


def drawn(init, seed, shape, dtype=jnp.float32):
    draw = quick_jit(init, static_argnums=(1, 2))
    return draw(jax.random.key(seed), shape, dtype)


def test_sparse_gives_each_unit_its_number_of_incoming_weights():
    kernel = drawn(initializers.sparse(15, replace=False), 0, (200, 50))
    np.testing.assert_array_equal(np.count_nonzero(kernel, axis=0), 15)
    with_repetition = initializers.sparse(15)(jax.random.key(0), (200, 50))
    counts = np.count_nonzero(with_repetition, axis=0)
    assert counts.max() <= 15
    assert counts.min() >= 10  # Two draws of one input are rare among 200.


def test_sparse_weights_are_standard_normal_times_the_scale():
    kernel = drawn(initializers.sparse(15, scale=0.5), 1, (400, 2000))
    weights = np.asarray(kernel)[np.asarray(kernel) != 0]
    assert abs(weights.mean()) < 0.02
    assert abs(weights.std() - 0.5) < 0.02


def test_sparse_draws_each_layer_of_a_stack_anew():
    kernel = drawn(initializers.sparse(3), 2, (4, 20, 7))
    assert kernel.shape == (4, 20, 7)
    assert len({layer.tobytes() for layer in np.asarray(kernel)}) == 4


def test_sparse_of_few_inputs_connects_them_all():
    kernel = drawn(initializers.sparse(15, replace=False), 3, (6, 25))
    assert np.all(kernel != 0)


def test_sparse_keeps_the_dtype():
    kernel = drawn(initializers.sparse(), 4, (20, 5), jnp.bfloat16)
    assert kernel.dtype == jnp.bfloat16


def test_sparse_refuses_biases_and_bad_options():
    with pytest.raises(ValueError, match="kernels"):
        initializers.sparse()(jax.random.key(0), (5,))
    with pytest.raises(ValueError, match="`connections` must be at least 1"):
        initializers.sparse(0)


@pytest.mark.parametrize("sides", [0, 1, 2])
def test_sparse_halves_the_weights_for_each_tanh_side(sides):
    options = {"connections": 7, "scale": 3.0}
    logistic = drawn(initializers.sparse(**options), 5, (20, 9))
    kernel = drawn(initializers.sparse(**options, tanh_sides=sides), 5, (20, 9))
    np.testing.assert_array_equal(kernel, logistic * [1, 0.5, 0.25][sides])
    with pytest.raises(ValueError, match="`tanh_sides` must be at least 0 and at most"):
        initializers.sparse(tanh_sides=3)


def true_radius(matrix):
    return np.max(np.abs(np.linalg.eigvals(np.asarray(matrix, np.float64))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(jnp.float32, 2e-6), (jnp.float64, 1e-13), (jnp.bfloat16, 0.02)]
)
def test_spectral_radius_is_that_of_the_eigenvalues(dtype, rtol):
    for units in (2, 40):
        init = quick_jit(
            initializers.spectral_radius(1.1), static_argnames=("shape", "dtype")
        )
        stack = init(jax.random.key(units), shape=(30, units, units), dtype=dtype)
        assert stack.dtype == dtype
        radii = [true_radius(matrix) for matrix in stack]
        np.testing.assert_allclose(radii, 1.1, rtol=rtol)


def with_radius(matrix, radius=1.0, dtype=jnp.float64):
    matrix = jnp.asarray(matrix, dtype)
    init = initializers.spectral_radius(radius, base=lambda key, shape, dtype: matrix)
    return np.asarray(quick_jit(lambda: init(None, matrix.shape, dtype))())


def test_spectral_radius_of_any_spectrum():
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]
    rotation = np.array([[0.6, -0.8], [0.8, 0.6]])
    pairs = np.kron(np.diag([3.0, 3.0, 1.0]), rotation)  # |λ| = 3, 3, 3, 3, 1, 1.
    cycle = np.roll(np.eye(6), 1, axis=0)  # The sixth roots of 1.
    plus_and_minus = np.diag([-2.0, 2.0, 1.0, 0.5, 0.0, 0.0])
    huge = np.diag([1e200, 1e-200, 0, 0, 0, 0])
    for spectrum in (pairs, cycle, plus_and_minus, huge, 1e-250 * cycle):
        matrix = basis @ spectrum @ basis.T
        radius = np.max(np.abs(np.linalg.eigvals(spectrum)))
        # Divided by the largest entry first, lest NumPy should overflow.
        expected = 0.7 * (matrix / radius)
        np.testing.assert_allclose(with_radius(matrix, 0.7), expected, atol=1e-13)


def test_spectral_radius_of_a_far_from_normal_matrix():
    """Norm 1e4 times the radius, so that no single norm would do."""
    matrix = np.array([[0.5, 1e4, 0], [0, -0.9, 1e4], [0, 0, 0.3]])
    np.testing.assert_allclose(with_radius(matrix), matrix / 0.9, rtol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "block", "rtol"),
    [
        (jnp.float32, 2, 1e-5),
        (jnp.float32, 5, 1e-4),
        (jnp.float32, 8, 5e-3),  # Where the powers underflow.
        (jnp.float64, 8, 1e-12),
    ],
)
def test_spectral_radius_of_a_defective_matrix(dtype, block, rtol):
    matrix = 2 * np.eye(block) + np.eye(block, k=1)
    found = with_radius(matrix, 1.0, dtype)
    np.testing.assert_allclose(found, matrix / 2, rtol=rtol)


def test_spectral_radius_leaves_a_nilpotent_matrix_as_it_is():
    delay_line = 5 * np.eye(9, k=1)
    for matrix in (np.zeros((4, 4)), delay_line, [[0.0]]):
        np.testing.assert_array_equal(with_radius(matrix), matrix)
    stack = with_radius(np.stack([delay_line, np.eye(9)]), 3.0)
    np.testing.assert_allclose(stack, np.stack([delay_line, 3 * np.eye(9)]), rtol=1e-14)


@pytest.mark.slow
def test_spectral_radius_takes_any_base_and_keeps_its_pattern():
    normal = jax.nn.initializers.normal()
    args = jax.random.key(0), (8, 8), jnp.float32
    kernel = initializers.spectral_radius(0.9, base=normal)(*args)
    factor = kernel / normal(*args)
    assert np.ptp(factor) < 1e-4 * np.max(factor)
    np.testing.assert_allclose(true_radius(kernel), 0.9, rtol=1e-5)
    sparse = initializers.spectral_radius()(jax.random.key(0), (90, 90))
    assert np.count_nonzero(sparse, axis=0).max() <= 15


def test_spectral_radius_refuses_other_shapes_and_negative_radii():
    for shape in ((5,), (4, 5)):
        with pytest.raises(ValueError, match="square recurrent matrices"):
            initializers.spectral_radius()(jax.random.key(0), shape)
    with pytest.raises(ValueError, match="`radius` must be at least 0"):
        initializers.spectral_radius(-1.0)
