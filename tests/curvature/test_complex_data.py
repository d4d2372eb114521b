"""Real parameters that meet complex data: diagonals and factors against dense truth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import normal
from reference import quick_jit

import hfjax
from hfjax._tracing import layers

RNG = np.random.default_rng(7)
REAL, OTHER = normal(RNG, 5, 3), normal(RNG, 5, 3)
X = REAL + 1j * OTHER
T = normal(RNG, 5, 3)
PARAMS = {"w": normal(RNG, 3, 3), "v": normal(RNG, 3, 3)}
MODELS = {
    "abs": (lambda p, x: jnp.abs(x @ p["w"]) @ p["v"], X),
    "real": (lambda p, x: (x @ p["w"]).real + (x @ p["v"]).imag, X),
    "cast": (lambda p, x: jnp.abs(x @ p["w"].astype(complex)) @ p["v"], X),
    "transposed": (lambda p, x: jnp.abs(p["w"].T @ x.T).T @ p["v"], X),
    "complex": (lambda p, x: jnp.abs(x @ jax.lax.complex(p["w"], p["v"])), REAL),
    "fourier": (
        lambda p, x: jnp.fft.irfft(jnp.fft.rfft(x @ p["w"]) ** 2, 3) @ p["v"],
        REAL,
    ),
}


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("name", MODELS)
def test_diagonals_of_real_weights_and_complex_data_are_dense_ones(name, size):
    model_fn, x = MODELS[name]
    f = hfjax.Objective(model_fn, hfjax.losses.squared_error(), microbatch_size=size)
    jacobian = quick_jit(jax.jacrev(lambda p: model_fn(p, x)))(PARAMS)
    missed = model_fn(PARAMS, x) - T
    exact = jax.tree.map(lambda j: jnp.mean(jnp.sum(j**2, 1), 0), jacobian)
    fisher = jax.tree.map(
        lambda j: jnp.mean(jnp.einsum("no,noij->nij", missed, j) ** 2, 0), jacobian
    )
    for estimate, truth in (
        (hfjax.diagonals.ggn_exact, exact),
        (hfjax.diagonals.empirical_fisher, fisher),
    ):
        found = quick_jit(lambda estimate=estimate: estimate(f, PARAMS, (x, T)))()
        for k, expected in truth.items():
            assert found[k].dtype == jnp.float64
            np.testing.assert_allclose(found[k], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["abs", "real", "cast", "transposed"])
def test_a_real_kernel_is_used_by_real_and_imaginary_parts(name):
    """Σ over positions of x gᵀ is the gradient: rows and errors are real, and right."""
    model_fn, x = MODELS[name]
    model = layers.read(model_fn, PARAMS, x[:1], {})
    names = sorted(PARAMS)
    assert "w" in [names[layer.kernel] for layer in model.layers]

    def total(params):
        return jnp.sum(model_fn(params, x[:1]) * T[:1])

    _, transpose, taken = jax.vjp(
        lambda added: model.evaluate(PARAMS, x[:1], added), model.zeros(), has_aux=True
    )
    (derivatives,) = transpose(T[:1])
    rows = [model.rows(n, taken, derivatives) for n in range(len(model.uses))]
    truth = jax.grad(total)(PARAMS)
    for layer in model.layers:
        found = sum(rows[n][0].T @ rows[n][1] for n in layer.uses)
        found = layer.sides.kernel(found, PARAMS[names[layer.kernel]].shape)
        np.testing.assert_allclose(found, truth[names[layer.kernel]], atol=1e-12)
        assert found.dtype == jnp.float64
        positions = sum(len(rows[n][0]) for n in layer.uses)
        assert layer.positions(model.uses) == positions


def test_a_bias_of_a_complex_product_has_a_diagonal():
    params = {"w": PARAMS["w"], "b": T[0]}
    with jax.numpy_rank_promotion("allow"):
        f = hfjax.Objective(
            lambda p, x: jnp.abs(x @ p["w"] + p["b"]), hfjax.losses.squared_error()
        )
        found = hfjax.preconditioners.layers(f, params, (X, T))
    assert found["['w']"] == "factors of 3 inputs and 3 units, at 2 positions"
    assert found["['b']"].startswith("diagonal: ")
