"""Convolutions in loops: the same numbers, in the layout that XLA is fast with."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from reference import flat, quick_jit

import hfjax
from hfjax._tracing.convolutions import for_loops
from hfjax.curvature import empirical_fisher, ggn, hessian

NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")

KINDS = {
    "channels last": ((4, 5, 2), (3, 3, 2, 3), NHWC, {}),
    "channels first": ((2, 5, 4), (3, 2, 3, 3), NCHW, {}),
    "strides": ((5, 6, 2), (3, 2, 2, 3), NHWC, {"window_strides": (2, 3)}),
    "no padding": ((5, 4, 2), (3, 2, 2, 3), NHWC, {"padding": "VALID"}),
    "own padding": ((4, 4, 2), (2, 2, 2, 3), NHWC, {"padding": [(2, 0), (-1, 3)]}),
    "transposed": (
        (3, 3, 2),
        (3, 3, 2, 3),
        NHWC,
        {"lhs_dilation": (2, 2), "padding": [(2, 1), (2, 1)]},
    ),
    "dilated": ((5, 5, 2), (2, 2, 2, 3), NHWC, {"rhs_dilation": (2, 1)}),
    "one axis": ((6, 2), (3, 2, 3), ("NHC", "HIO", "NHC"), {}),
    "three axes": ((3, 3, 2, 2), (2, 2, 2, 2, 3), ("NDHWC", "DHWIO", "NDHWC"), {}),
    "mixed layout": ((5, 2, 4), (3, 2, 2, 3), ("NHCW", "OHIW", "CWNH"), {}),
    "depthwise": ((4, 4, 3), (3, 3, 1, 6), NHWC, {"feature_group_count": 3}),
    "two groups": ((4, 4, 16), (2, 2, 8, 2), NHWC, {"feature_group_count": 2}),
}
"""Shapes of an input and of a kernel, the layout, and options."""

FAST = {"b0f_0io->b0f", "b01f_01io->b01f", "b012f_012io->b012f"}
"""What XLA has fast code for, in its own words."""


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def problem(kind, **options):
    """Return parameters of inputs and kernel, a convolution of both, and data."""
    shape, kernel, layout, given = KINDS[kind]
    options = {"window_strides": (1,) * (len(kernel) - 2), "padding": "SAME"} | options
    options |= given
    params = {"input": normal(0, *shape), "kernel": normal(1, *kernel)}

    def model_fn(params, inputs):
        z = jax.lax.conv_general_dilated(
            inputs + params["input"][None],
            params["kernel"],
            dimension_numbers=layout,
            **options,
        )
        return jnp.tanh(
            jnp.moveaxis(z, layout[2].index("N"), 0).reshape(len(inputs), -1)
        )

    return params, model_fn, normal(2, 3, *shape)


def dense(model_fn, params, inputs):
    """Return JᵀJ / cases, J by forward derivatives of the plain model."""
    flat, unravel = ravel_pytree(params)
    jacobian = jax.jacfwd(lambda flat: model_fn(unravel(flat), inputs).reshape(-1))
    rows = np.asarray(quick_jit(jacobian)(flat))
    return rows.T @ rows / len(inputs)


def objective_of(model_fn, **options):
    return hfjax.Objective(model_fn, hfjax.losses.squared_error(), **options)


def batch_of(model_fn, params, inputs):
    return inputs, jnp.zeros_like(model_fn(params, inputs))


def like(params):
    flat, unravel = ravel_pytree(params)
    return unravel(normal(7, flat.size))


def layouts(function, *args):
    """Return the layouts of the convolutions in a compiled program."""
    text = jax.jit(function).lower(*args).compile().as_text()
    return set(re.findall(r"dim_labels=([\w>-]+)", text))


def in_a_loop(curvature, objective):
    """Return products with a curvature in a loop, as conjugate gradients have them."""

    def products(count, v, params, batch):
        product = curvature(objective, params, batch)
        return jax.lax.fori_loop(0, count, lambda _, v: product(v), v)

    return products


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_with_convolutions_equals_dense_truth(kind):
    params, model_fn, inputs = problem(kind)
    batch, v = batch_of(model_fn, params, inputs), like(params)

    products = jax.jit(in_a_loop(ggn, objective_of(model_fn)))
    found = products(jnp.array(1), v, params, batch)
    truth = dense(model_fn, params, inputs) @ flat(v)
    atol = 1e-12 * np.max(np.abs(truth))
    np.testing.assert_allclose(flat(found), truth, rtol=1e-11, atol=atol)


@pytest.mark.parametrize("kind", ["channels last", "channels first", "strides"])
@pytest.mark.parametrize("curvature", [ggn, hessian, empirical_fisher])
def test_no_convolution_in_a_loop_has_a_slow_layout(curvature, kind):
    params, model_fn, inputs = problem(kind)
    batch, v = batch_of(model_fn, params, inputs), like(params)

    products = in_a_loop(curvature, objective_of(model_fn))
    found = layouts(products, jnp.array(1), v, params, batch)
    assert found <= FAST, found


def scanned(model_fn, params, inputs):
    _, (outputs,) = jax.lax.scan(
        lambda carry, _: (carry, model_fn(params, inputs)), 0.0, length=1
    )
    return outputs


WITHIN = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda model_fn: lambda *args: scanned(model_fn, *args),
    "checkpoint in scan": lambda model_fn: (
        lambda *args: scanned(jax.checkpoint(model_fn), *args)
    ),
    "cond": lambda model_fn: (
        lambda params, inputs: jax.lax.cond(
            jnp.sum(inputs) < 1e9,
            model_fn,
            lambda *args: 0 * model_fn(*args),
            params,
            inputs,
        )
    ),
    "vmap": lambda model_fn: (
        lambda params, inputs: jax.vmap(lambda x: model_fn(params, x[None])[0])(inputs)
    ),
}
"""Programs that hold a model's convolutions."""


@pytest.mark.slow
@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("once", [False, True])
def test_convolutions_within_other_programs_are_found(within, once):
    params, plain, inputs = problem("channels first")
    batch, v = batch_of(plain, params, inputs), like(params)
    model_fn = WITHIN[within](plain)

    objective = objective_of(model_fn, microbatch_size=2, linearize_once=once)
    products = jax.jit(in_a_loop(ggn, objective))
    compiled = products.lower(jnp.array(1), v, params, batch).compile()
    assert set(re.findall(r"dim_labels=([\w>-]+)", compiled.as_text())) <= FAST
    truth = dense(plain, params, inputs) @ flat(v)
    found = flat(compiled(jnp.array(1), v, params, batch))
    atol = 1e-13 * np.max(np.abs(truth))
    np.testing.assert_allclose(found, truth, rtol=1e-11, atol=atol)


@pytest.mark.slow
def test_gradients_and_losses_of_microbatches_have_no_slow_layout():
    params, model_fn, inputs = problem("channels first")
    batch = batch_of(model_fn, params, inputs)
    objective = objective_of(model_fn, microbatch_size=1)
    functions = [objective.value, objective.value_and_grad, objective.case_values]
    diagonal = hfjax.diagonals.empirical_fisher
    for function in (*functions, functools.partial(diagonal, objective)):
        found = layouts(function, params, batch)
        assert found <= FAST, (function, found)


@pytest.mark.slow
def test_an_update_has_no_slow_layout():
    params, model_fn, inputs = problem("channels first")
    batch = batch_of(model_fn, params, inputs)
    tx = hfjax.hessian_free(objective_of(model_fn))

    def update(params, state, batch):
        return tx.update(like(params), state, params, batch=batch)

    found = layouts(update, params, tx.init(params), batch)
    assert found
    assert found <= FAST, found


def test_a_program_without_convolutions_stays_as_it_is():
    def function(w, x):
        return jax.lax.scan(lambda h, x: (jax.nn.relu(h @ w) + x, h), x[0], x)

    args = (normal(0, 3, 3), normal(1, 4, 3))
    assert str(jax.make_jaxpr(for_loops(function))(*args)) == str(
        jax.make_jaxpr(function)(*args)
    )


def test_a_gpu_and_a_tpu_run_the_convolutions_that_the_model_has():
    params, model_fn, inputs = problem("channels first")
    batch, v = batch_of(model_fn, params, inputs), like(params)

    def product(v, params, batch):
        _, tangent = jax.linearize(lambda p: model_fn(p, batch[0]), params)
        return jax.linear_transpose(tangent, params)(tangent(v))[0]

    def lowered(function, platform):
        traced = jax.jit(function).trace(v, params, batch)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        dimensions = re.findall(r"dim_numbers = ([^,]*(?:, [^,]*)*?), window", text)
        return text.count("stablehlo.transpose"), dimensions

    for platform in ("cuda", "tpu"):
        assert lowered(for_loops(product), platform) == lowered(product, platform)
    assert lowered(for_loops(product), "cpu") != lowered(product, "cpu")


def test_a_product_with_convolutions_can_be_transformed():
    params, model_fn, inputs = problem("channels first")
    batch, v = batch_of(model_fn, params, inputs), like(params)

    @quick_jit
    def products(v, params, batch):
        product = ggn(objective_of(model_fn), params, batch)
        twice = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), v)
        return (
            jax.linear_transpose(product, v)(v)[0],
            jax.jvp(product, (v,), (v,))[1],
            jax.vjp(product, v)[1](v)[0],
            jax.tree.map(lambda x: x[1] / 2, jax.vmap(product)(twice)),
        )

    truth = dense(model_fn, params, inputs) @ flat(v)
    atol = 1e-13 * np.max(np.abs(truth))
    for found in products(v, params, batch):
        np.testing.assert_allclose(flat(found), truth, rtol=1e-11, atol=atol)


def test_derivatives_by_the_parameters_pass_through_a_product():
    params, model_fn, inputs = problem("channels first")
    batch, v = batch_of(model_fn, params, inputs), like(params)

    def curvature_along(v, theta):
        product = ggn(objective_of(model_fn), theta, batch)(v)
        return ravel_pytree(product)[0] @ ravel_pytree(v)[0]

    slope = quick_jit(
        lambda v, p: jax.jvp(lambda p: curvature_along(v, p), (p,), (v,))[1]
    )
    step = 1e-5
    above = jax.tree.map(lambda x, y: x + step * y, params, v)
    below = jax.tree.map(lambda x, y: x - step * y, params, v)
    evaluate = quick_jit(curvature_along)
    truth = (evaluate(v, above) - evaluate(v, below)) / (2 * step)
    np.testing.assert_allclose(slope(v, params), truth, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_in_other_dtypes_are_those_of_the_plain_convolutions(dtype):
    params, model_fn, inputs = problem("channels first")
    params, inputs, v = jax.tree.map(
        lambda x: x.astype(dtype), (params, inputs, like(params))
    )

    def product(v, params, inputs):
        _, tangent = jax.linearize(lambda p: model_fn(p, inputs), params)
        return jax.linear_transpose(tangent, params)(tangent(v))[0]

    found, plain = (
        jax.jit(function)(v, params, inputs)
        for function in (for_loops(product), product)
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        assert x.dtype == dtype
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(x, y, atol=8 * eps * np.max(np.abs(y)))
