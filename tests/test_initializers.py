import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax import initializers


def test_sparse_gives_each_unit_its_number_of_incoming_weights():
    kernel = initializers.sparse(15, replace=False)(jax.random.key(0), (200, 50))
    np.testing.assert_array_equal(np.count_nonzero(kernel, axis=0), 15)
    drawn = initializers.sparse(15)(jax.random.key(0), (200, 50))
    counts = np.count_nonzero(drawn, axis=0)
    assert counts.max() <= 15
    assert counts.min() >= 10  # Two draws of one input are rare among 200.


def test_sparse_weights_are_standard_normal_times_the_scale():
    kernel = initializers.sparse(15, scale=0.5)(jax.random.key(1), (400, 2000))
    weights = np.asarray(kernel)[np.asarray(kernel) != 0]
    assert abs(weights.mean()) < 0.02
    assert abs(weights.std() - 0.5) < 0.02


def test_sparse_draws_each_layer_of_a_stack_anew():
    kernel = initializers.sparse(3)(jax.random.key(2), (4, 20, 7))
    assert kernel.shape == (4, 20, 7)
    assert len({layer.tobytes() for layer in np.asarray(kernel)}) == 4


def test_sparse_of_few_inputs_connects_them_all():
    kernel = initializers.sparse(15, replace=False)(jax.random.key(3), (6, 25))
    assert np.all(kernel != 0)


def test_sparse_keeps_the_dtype():
    kernel = initializers.sparse()(jax.random.key(4), (20, 5), jnp.bfloat16)
    assert kernel.dtype == jnp.bfloat16


def test_sparse_refuses_biases_and_bad_options():
    with pytest.raises(ValueError, match="kernels"):
        initializers.sparse()(jax.random.key(0), (5,))
    with pytest.raises(ValueError, match="`connections` must be at least 1"):
        initializers.sparse(0)
