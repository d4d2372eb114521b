"""Models and losses whose derivatives are backward rules: `jax.custom_vjp`.

Each stands beside a twin that computes the same numbers in plain JAX.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training
from jax.experimental.ode import odeint
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec
from mapped import mesh, needs_devices
from reference import flat, quick_jit

import hfjax
from hfjax import curvature, losses
from hfjax._tracing.linearize import NO_FORWARD, NO_REVERSE, NO_SECOND, linearized

F64 = jnp.float64
CASES = 6


def backward_only(forward, backward, **options):
    """Return tanh, or what `forward` says it is, with a rule of its own."""
    rule = jax.custom_vjp(jnp.tanh)
    rule.defvjp(forward, backward, **options)
    return rule


def slope(a, g):
    return (g / jnp.cosh(a) ** 2,)


def with_value(a):
    return jnp.tanh(a), a


@jax.custom_vjp
def scaled(g, by):
    return g * by


scaled.defvjp(
    lambda g, by: (g * by, (g, by)), lambda kept, c: (c * kept[1], c * kept[0])
)

PLAIN = backward_only(with_value, slope)
# A kernel's backward rule that is a kernel with a backward rule in turn.
NESTED = backward_only(
    lambda a: (PLAIN(a), a), lambda a, g: (scaled(g, 1 / jnp.cosh(a) ** 2),)
)


def by_symbolic_zeros(kept, g):
    a = kept
    zero = isinstance(g, jax.custom_derivatives.SymbolicZero)
    return (jnp.zeros_like(a) if zero else g / jnp.cosh(a) ** 2,)


def scanned(a):
    """Hand each column to the kernel in a step of its own."""
    return jax.lax.scan(lambda _, x: (None, PLAIN(x)), None, a.T)[1].T


KERNELS = {
    "plain": PLAIN,
    "nested": NESTED,
    "twice nested": backward_only(
        lambda a: (NESTED(a), a), lambda a, g: (jax.vjp(NESTED, a)[1](g)[0],)
    ),
    "symbolic zeros": backward_only(
        lambda a: (jnp.tanh(a.value), a.value), by_symbolic_zeros, symbolic_zeros=True
    ),
    "optimize_remat": backward_only(with_value, slope, optimize_remat=True),
    "jit": jax.jit(PLAIN),
    "checkpoint": jax.checkpoint(PLAIN),
    "scan": scanned,
    "cond": lambda a: jax.lax.cond(a[0, 0] > -9, PLAIN, jnp.sin, a),
    "case by case": jax.vmap(PLAIN),
}


def opaque_rule(a, g):
    """What JAX can run, and differentiate no further."""
    return (
        jax.pure_callback(
            lambda a, g: np.asarray(g) / np.cosh(np.asarray(a)) ** 2,
            jax.ShapeDtypeStruct(a.shape, a.dtype),
            a,
            g,
            vmap_method="expand_dims",
        ),
    )


def looping_rule(a, g):
    """What Diffrax's default adjoint is: as a loop of unknown length."""
    rounds = jnp.where(a.ravel()[0] > -99, 2, 3)
    half = jax.lax.fori_loop(0, rounds, lambda _, x: x / jnp.cosh(a), g)
    return (half,)


OPAQUE = {
    "callback": backward_only(with_value, opaque_rule),
    "loop": backward_only(with_value, looping_rule),
}


def forward_only(a):
    rounds = jnp.where(a[0, 0] > -99, 1, 2)
    return jax.lax.fori_loop(0, rounds, lambda _, x: jnp.tanh(x), a)


def network(activation):
    return lambda params, x: (
        activation(x @ params["in"] + params["b"][None]) @ params["out"]
    )


def draw(*shape, seed=0, dtype=F64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


PARAMS = {"in": draw(3, 4), "b": draw(4, seed=1), "out": draw(4, 2, seed=2)}
BATCH = (draw(CASES, 3, seed=3), draw(CASES, 2, seed=4), jnp.arange(1.0, CASES + 1))
V = jax.tree.map(
    lambda x: jnp.cos(1 + jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), PARAMS
)


def objective(activation, loss=None, **options):
    return hfjax.Objective(
        network(activation), losses.squared_error() if loss is None else loss, **options
    )


def product(f, make=curvature.ggn, v=V, **options):
    return flat(
        quick_jit(lambda params, v: make(f, params, BATCH, **options)(v))(PARAMS, v)
    )


@functools.cache
def dense_product():
    """Return Σ w JᵀJ v / Σ w of the network with tanh, by reverse mode in plain JAX."""
    theta, unravel = ravel_pytree(PARAMS)
    x, _, w = BATCH
    jacobian = jax.jacrev(lambda theta: network(jnp.tanh)(unravel(theta), x))(theta)
    j, w = np.asarray(jacobian), np.asarray(w)
    return np.einsum("i,iap,iaq,q->p", w / w.sum(), j, j, flat(V))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_product_needs_backward_rules_alone(kernel):
    f = objective(KERNELS[kernel])
    np.testing.assert_allclose(product(f), dense_product(), rtol=1e-12)


@pytest.mark.parametrize("kernel", ["plain", "nested"])
@pytest.mark.parametrize(
    "options",
    [{"microbatch_size": 2}, {"microbatch_size": 4, "linearize_once": True}],
    ids=["microbatches", "linearize_once"],
)
def test_a_product_over_microbatches_needs_backward_rules_alone(kernel, options):
    f = objective(KERNELS[kernel], **options)
    np.testing.assert_allclose(product(f), dense_product(), rtol=1e-12)


@pytest.mark.parametrize("kernel", ["plain", "nested"])
@pytest.mark.parametrize(
    "make",
    [
        curvature.hessian,
        curvature.empirical_fisher,
        curvature.with_precision("float32"),
    ],
    ids=["hessian", "empirical_fisher", "with_precision"],
)
def test_every_curvature_needs_backward_rules_alone(kernel, make):
    here, twin = objective(KERNELS[kernel]), objective(jnp.tanh)
    rtol = 1e-12 if make in (curvature.hessian, curvature.empirical_fisher) else 1e-5
    np.testing.assert_allclose(product(here, make), product(twin, make), rtol=rtol)


def test_structural_damping_and_sums_need_backward_rules_alone():
    def pair(activation):
        def model_fn(params, x):
            hidden = activation(x @ params["in"] + params["b"][None])
            return hidden @ params["out"], hidden

        return hfjax.Objective(
            model_fn, losses.squared_error(), hidden_loss=losses.squared_error()
        )

    def summed(activation):
        f = objective(activation)
        return lambda params: curvature.ggn(
            hfjax.objective.weighted_sum([(0.5, f), (2.0, f)]), params, (BATCH, BATCH)
        )(V)

    damped = [product(pair(act), structural=0.3) for act in (NESTED, jnp.tanh)]
    np.testing.assert_allclose(*damped, rtol=1e-12)
    np.testing.assert_allclose(
        flat(quick_jit(summed(NESTED))(PARAMS)), 2.5 * dense_product(), rtol=1e-12
    )


@pytest.mark.parametrize("width", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("make", [curvature.ggn, curvature.hessian])
def test_products_keep_the_dtypes_of_the_parameters(width, make):
    params, v, batch = jax.tree.map(lambda x: x.astype(width), (PARAMS, V, BATCH))
    found, exact = (
        quick_jit(lambda params, v, f=f: make(f, params, batch)(v))(params, v)
        for f in (objective(NESTED), objective(jnp.tanh))
    )
    assert all(x.dtype == width for x in jax.tree.leaves(found))
    found, exact = flat(found).astype(F64), flat(exact).astype(F64)
    eps = float(jnp.finfo(width).eps)
    assert np.linalg.norm(found - exact) < 20 * eps * np.linalg.norm(exact)


def test_the_residuals_of_a_backward_rule_are_computed_outside_of_the_product():
    matvec = curvature.ggn(objective(PLAIN), PARAMS, BATCH)
    program = str(jax.make_jaxpr(matvec)(V))
    assert "cosh" not in program
    assert "tanh" not in program


@pytest.mark.parametrize("kernel", ["plain", "nested"])
def test_the_product_with_the_transpose_belongs_to_the_same_jacobian(kernel):
    _, tangent, transpose = linearized(
        lambda params: network(KERNELS[kernel])(params, BATCH[0]), PARAMS
    )
    u = draw(CASES, 2, seed=5)
    left, right = jnp.vdot(u, tangent(V)), flat(transpose(u)) @ flat(V)
    np.testing.assert_allclose(left, right, rtol=1e-12)


@needs_devices
@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("make", [curvature.ggn, curvature.hessian])
def test_products_over_devices_need_backward_rules_alone(check_vma, make):
    cases = jax.tree.map(lambda x: jnp.tile(x, (2,) + (1,) * (x.ndim - 1)), BATCH)
    replicated, sharded = PartitionSpec(), PartitionSpec("cases")

    def over_devices(activation):
        f = objective(activation, axis_name="cases")
        mapped = jax.shard_map(
            lambda params, batch: make(f, params, batch)(V),
            mesh=mesh(),
            in_specs=(replicated, sharded),
            out_specs=replicated,
            check_vma=check_vma,
        )
        return flat(quick_jit(mapped)(PARAMS, cases))

    twin = product(objective(jnp.tanh), make)
    for kernel in (PLAIN, NESTED):
        np.testing.assert_allclose(over_devices(kernel), twin, rtol=1e-12)


def softplus_error(z, t):
    return jax.nn.softplus(z) - z * t


@jax.custom_vjp
def logistic_loss(z, t):
    return softplus_error(z, t)


# The slope is a kernel in turn, so that the loss has no L″ by forward over reverse.
half = backward_only(with_value, slope)
logistic_loss.defvjp(
    lambda z, t: (softplus_error(z, t), (z, t)),
    lambda kept, g: (g * (0.5 + 0.5 * half(kept[0] / 2) - kept[1]), -g * kept[0]),
)


@pytest.mark.parametrize("positive", [None, "clip"])
def test_a_loss_needs_backward_rules_alone(positive):
    z, t = BATCH[1], jax.nn.sigmoid(BATCH[1])
    v = draw(CASES, 2, seed=6)
    here = losses.from_function(logistic_loss, positive=positive)
    exact = losses.sigmoid_cross_entropy()
    for part in ("hessian", "factor"):
        found = jax.jit(lambda v, part=part: getattr(here, part)(z, t)(v))(v)
        np.testing.assert_allclose(found, getattr(exact, part)(z, t)(v), rtol=1e-9)


def first_update(f, **options):
    return training.one_update(f, hfjax.hessian_free(f, **options), PARAMS, BATCH)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preconditioner": hfjax.preconditioners.nystrom(rank=3)},
        {"preconditioner": hfjax.preconditioners.diagonal(hfjax.diagonals.ggn_exact)},
        {"solver": hfjax.sample_space.cholesky(), "preconditioner": None},
        {"damping": hfjax.damping.levenberg_marquardt(matrix="curvature_diagonal")},
        {
            "curvature": curvature.hessian,
            "solver": hfjax.krylov.subspace_descent(),
            "damping": hfjax.damping.constant(0.0),
        },
    ],
    ids=["default", "nystrom", "diagonal", "cholesky", "D", "hessian"],
)
def test_an_update_is_that_of_the_twin(options):
    def update(activation):
        # The kernel is no factor's: neither has the twin any.
        updates, state = first_update(objective(activation), **options)
        assert state.info.accepted
        return flat(updates)

    np.testing.assert_allclose(update(NESTED), update(jnp.tanh), rtol=1e-6)


@pytest.mark.slow
def test_kernels_outside_of_a_backward_rule_keep_their_factors():
    @jax.custom_vjp
    def layer(x, w):
        return jnp.tanh(x @ w)

    layer.defvjp(
        lambda x, w: jax.vjp(lambda x, w: jnp.tanh(x @ w), x, w),
        lambda pull, g: pull(g),
    )
    f = hfjax.Objective(
        lambda p, x: layer(x @ p["first"], p["fused"]) @ p["last"],
        losses.squared_error(),
    )
    params = {"first": draw(3, 4), "fused": draw(4, 4), "last": draw(4, 2)}
    found = hfjax.preconditioners.layers(f, params, BATCH)
    assert found["['first']"].startswith("factors")
    assert found["['last']"].startswith("factors")
    assert "custom_vjp_call" in found["['fused']"]
    _, state = training.one_update(f, hfjax.hessian_free(f), params, BATCH)
    assert state.info.accepted


@pytest.mark.slow
def test_an_ordinary_differential_equation_is_trained_by_odeint():
    # y' = a y from x: at t = 1 it is x exp(a), and G = mean (x exp(a))².
    def model_fn(params, x):
        def one(x):
            times = jnp.array([0.0, 1.0])
            return odeint(lambda y, t, a: a * y, x, times, params["a"])[-1]

        return jax.vmap(one)(x)

    f = hfjax.Objective(model_fn, losses.squared_error())
    x, params = jnp.array([0.5, 1.0, 2.0]), {"a": jnp.array(0.2)}
    batch = (x, x * jnp.exp(0.7))
    g = quick_jit(lambda params: curvature.ggn(f, params, batch)(params))(params)["a"]
    np.testing.assert_allclose(g / 0.2, jnp.mean((x * jnp.exp(0.2)) ** 2), rtol=1e-5)


@pytest.mark.slow
def test_verify_and_diagnostics_see_nothing_wrong_with_a_backward_rule():
    f = objective(NESTED)
    grads = f.value_and_grad(PARAMS, BATCH)[1]
    assert hfjax.verify.check(f, None, PARAMS, BATCH, grads) == []
    key = jax.random.key(0)
    errors = hfjax.verify.products(f, PARAMS, BATCH[:2], key=key, columns=4)
    assert max(errors) < 1e-6

    def model_values(f):
        run = functools.partial(
            hfjax.diagnostics.cg_run, f, damping=1.0, max_iterations=3
        )
        return quick_jit(run)(PARAMS, BATCH).model_values

    exact = model_values(objective(jnp.tanh))
    np.testing.assert_allclose(model_values(f), exact, rtol=1e-9)


def test_a_reparameterization_needs_backward_rules_alone():
    def product(original):
        matrix = hfjax.damping_matrices.reparameterization(original)
        return matrix.build(None, PARAMS["b"], None, None, jax.random.key(0))

    found, exact = product(NESTED), product(jnp.tanh)
    np.testing.assert_allclose(found.matvec(V["b"]), exact.matvec(V["b"]), rtol=1e-12)
    np.testing.assert_allclose(found.diagonal, exact.diagonal, rtol=1e-12)


# What JAX cannot differentiate.


def notes_of(error):
    return [
        note for note in error.__notes__ if note in (NO_FORWARD, NO_SECOND, NO_REVERSE)
    ]


@pytest.mark.parametrize("rule", OPAQUE)
def test_a_backward_rule_that_cannot_be_differentiated_is_told_with_its_cures(rule):
    f = objective(OPAQUE[rule])
    with pytest.raises(
        ValueError, match=r"differentiation does not|not support JVP"
    ) as failed:
        first_update(f)
    (note,) = notes_of(failed.value)
    for cure in ("sample_space.cholesky", "finite_difference_hessian", "DirectAdjoint"):
        assert cure in note


@pytest.mark.slow
@pytest.mark.parametrize("rule", OPAQUE)
@pytest.mark.parametrize(
    "options",
    [
        {"solver": hfjax.sample_space.cholesky()},
        {"curvature": curvature.finite_difference_hessian},
    ],
    ids=["cholesky", "finite differences"],
)
def test_the_cures_of_a_missing_forward_derivative_work(rule, options):
    f = objective(OPAQUE[rule])
    assert first_update(f, **options)[1].info.accepted


@pytest.mark.slow
def test_verify_has_nothing_against_an_optimizer_that_needs_no_forward_derivative():
    f, solver = objective(OPAQUE["loop"]), hfjax.sample_space.cholesky()
    for whole, batch in (
        (f, BATCH),
        (hfjax.objective.weighted_sum([(2.0, f)]), (BATCH,)),
    ):
        grads = whole.value_and_grad(PARAMS, batch)[1]
        exact = hfjax.hessian_free(whole, solver=solver)
        assert hfjax.verify.check(whole, exact, PARAMS, batch, grads) == []
    tx, grads = hfjax.hessian_free(f), f.value_and_grad(PARAMS, BATCH)[1]
    assert hfjax.verify.check(f, tx, PARAMS, BATCH, grads) == [NO_FORWARD]


@pytest.mark.slow
def test_a_loss_whose_backward_rule_cannot_be_differentiated_is_told_with_its_cures():
    opaque = jax.custom_vjp(lambda z, t: jnp.square(z - t))
    opaque.defvjp(
        lambda z, t: (jnp.square(z - t), z - t),
        lambda r, g: (opaque_rule(r, 2 * r * g)[0], jnp.zeros_like(g)),
    )
    f = objective(jnp.tanh, opaque)
    with pytest.raises(ValueError, match="not support JVP") as failed:
        first_update(f)
    (note,) = notes_of(failed.value)
    assert note == NO_SECOND
    cures = {
        "curvature": curvature.finite_difference_hessian,
        "preconditioner": hfjax.preconditioners.diagonal(),
    }
    assert first_update(f, **cures)[1].info.rejection == hfjax.Rejection.NONE


@pytest.mark.parametrize("path", ["gradient", "update", "diagonal", "cholesky"])
def test_a_model_of_forward_mode_only_is_told_so(path):
    f = objective(forward_only)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    exact = {"solver": hfjax.sample_space.cholesky()} if path == "cholesky" else {}
    tx = hfjax.hessian_free(f, **exact)
    run = {
        "gradient": lambda p: f.value_and_grad(p, BATCH),
        "diagonal": lambda p: hfjax.diagonals.ggn_exact(f, p, BATCH),
    }.get(path, lambda p: tx.update(grads, tx.init(p), p, batch=BATCH))
    with pytest.raises(ValueError, match="Reverse-mode") as failed:
        jax.eval_shape(run, PARAMS)
    assert notes_of(failed.value) == [NO_REVERSE]
    assert hfjax.verify.check(f, tx, PARAMS, BATCH, grads) == [NO_REVERSE]


def test_an_error_of_the_users_own_gets_no_note_of_derivatives():
    def model_fn(params, x):
        return PLAIN(x @ params["out"])

    f = hfjax.Objective(model_fn, losses.squared_error())
    with pytest.raises(TypeError, match="dot_general") as failed:
        curvature.ggn(f, PARAMS, BATCH)
    assert not notes_of(failed.value)
