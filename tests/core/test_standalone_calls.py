"""What the parts take by themselves: trees, products, keys; and what they say of others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hfjax
from hfjax import cg, curvature, diagonals, iterates, krylov, spectrum, trust_region
from hfjax.curvature.structural import with_structural_loss

KEY = jax.random.key(0)
A = np.array([[4.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 2.0]])
B = np.array([1, 2, 3])
RIGHT = np.linalg.solve(A, B)
F = hfjax.Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
P = jnp.zeros((2, 1), jnp.float32)
BATCH = (jnp.ones((3, 2), jnp.float32), jnp.ones((3, 1), jnp.float32))


def product(v):
    return jnp.asarray(A, v.dtype) @ v


def twice(v):
    return jax.tree.map(lambda x: 2 * x, v)


SOLUTIONS = {
    "cg.solve": lambda matvec, b: cg.solve(matvec, b, stopping=None).x,
    "cg.inverse": lambda matvec, b: cg.inverse(matvec, tolerance=1e-12)(b),
    "trust_region.solve": lambda matvec, b: trust_region.solve(matvec, b, 100.0).x,
}


@pytest.mark.parametrize("solution", SOLUTIONS)
@pytest.mark.parametrize(
    "b", [B, jnp.asarray(B), B.astype(np.uint8), B.astype(np.float32)], ids=str
)
def test_an_integer_system_has_its_float_solution(solution, b):
    x = SOLUTIONS[solution](product, b)
    assert jnp.issubdtype(x.dtype, jnp.floating)
    np.testing.assert_allclose(x, RIGHT, rtol=1e-5)


@pytest.mark.parametrize("solution", SOLUTIONS)
def test_booleans_and_numbers_and_trees_of_them_are_vectors(solution):
    solve = SOLUTIONS[solution]
    x = solve(twice, {"flag": np.array([True, False]), "number": 4.0, "hole": None})
    np.testing.assert_allclose(x["flag"], [0.5, 0], atol=1e-7)
    np.testing.assert_allclose(x["number"], 2, rtol=1e-6)
    assert x["hole"] is None
    np.testing.assert_allclose(solve(twice, 3), 1.5, rtol=1e-6)
    assert jax.tree.leaves(solve(twice, {})) == []


def test_a_start_of_integers_is_one_of_floats():
    x = cg.solve(product, B, x0=np.array([1, 0, 2]), stopping=None).x
    np.testing.assert_allclose(x, RIGHT, rtol=1e-6)


@pytest.mark.slow
def test_spectra_are_those_of_a_tree_of_numbers():
    found = spectrum.eigenvalues(twice, {"a": 1.0, "b": np.array([1, 2])}, key=KEY)
    np.testing.assert_allclose(found.values, 2, rtol=1e-6)
    shapes = jax.ShapeDtypeStruct((3,), jnp.float32)
    np.testing.assert_allclose(spectrum.trace(twice, shapes, key=KEY).value, 6)
    old = jax.random.PRNGKey(0)
    np.testing.assert_array_equal(
        spectrum.density(product, jnp.ones(3), key=old, num_probes=1).nodes,
        spectrum.density(product, jnp.ones(3), key=KEY, num_probes=1).nodes,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_product_is_handed_the_dtypes_of_like_and_sums_stay_wide(dtype):
    d, seen = jnp.array([1, 2, 300], dtype), set()

    def own(v):
        seen.add(v["d"].dtype)
        gradient = jax.grad(lambda q: 0.5 * jnp.sum(d * q["d"] ** 2))
        return jax.jvp(gradient, ({"d": jnp.ones_like(d)},), (v,))[1]

    like = {"d": d}
    pairs = spectrum.eigenvalues(own, like, key=KEY, num=1)
    np.testing.assert_allclose(pairs.values, 300, rtol=1e-2)
    assert pairs.values.dtype == pairs.vectors["d"].dtype == jnp.float32
    # In bfloat16 1 + 2 + 300 is 304.
    assert spectrum.trace(own, like, key=KEY).value == 303
    nodes = spectrum.density(own, like, key=KEY, num_probes=1).nodes
    np.testing.assert_allclose(jnp.max(nodes), 300, rtol=1e-2)
    assert seen == {jnp.dtype(dtype)}


def test_a_curvature_product_takes_numbers_of_any_kind():
    f = hfjax.Objective(lambda p, x: x * p["w"], hfjax.losses.squared_error())
    batch = (jnp.ones(2), jnp.ones(2))
    matvec = curvature.ggn(f, params={"w": 1.0}, batch=batch)
    for v in (3, 3.0, np.array(3), np.float32(3), jnp.asarray(3)):
        found = matvec({"w": v})["w"]
        assert found == 3
        assert jnp.issubdtype(found.dtype, jnp.floating)


MATRIX = jnp.asarray(A)
V = jnp.ones(3)
GGN = curvature.ggn(F, P, BATCH)
OWN = hfjax.preconditioners.custom(lambda *_: twice)
BAD = {
    # A matrix in the place of a product.
    "cg.solve: matrix": (lambda: cg.solve(MATRIX, V), "`matvec`.*lambda v: A @ v"),
    "cg.inverse: matrix": (lambda: cg.inverse(A), "`matvec`.*lambda v: A @ v"),
    "region: matrix": (
        lambda: trust_region.solve(MATRIX, V, 1.0),
        "`matvec`.*lambda v: A @ v",
    ),
    "region: norm": (
        lambda: trust_region.solve(product, V, 1.0, norm=MATRIX),
        "`norm`.*lambda v: P @ v",
    ),
    "basis: matrix": (lambda: krylov.basis(MATRIX, V, 2), "`matvec`.*lambda v: A @ v"),
    "eigenvalues: matrix": (
        lambda: spectrum.eigenvalues(MATRIX, V, key=KEY),
        "`matvec`.*lambda v: A @ v",
    ),
    "density: matrix": (
        lambda: spectrum.density(MATRIX, V, key=KEY),
        "`matvec`.*lambda v: A @ v",
    ),
    "trace: matrix": (
        lambda: spectrum.trace(MATRIX, V, key=KEY),
        "`matvec`.*lambda v: A @ v",
    ),
    "preconditioner: matrix": (
        lambda: cg.solve(product, V, preconditioner=MATRIX),
        "`preconditioner`",
    ),
    "preconditioner: rule": (
        lambda: cg.solve(product, V, preconditioner=OWN),
        "`preconditioner`.*`build`",
    ),
    "inverse: rule": (
        lambda: cg.inverse(product, preconditioner=OWN),
        "`preconditioner`.*`build`",
    ),
    "nothing": (lambda: cg.solve(None, V), "`matvec`.*got NoneType"),
    # Products of something else.
    "product: shape": (
        lambda: cg.solve(lambda v: v[:2], V),
        r"`matvec\(v\)`.*float64\[2\] for float64\[3\]",
    ),
    "product: structure": (
        lambda: cg.solve(lambda v: (v,), V),
        r"`matvec\(v\)`.*tuple",
    ),
    "product: complex": (
        lambda: cg.inverse(lambda v: 1j * v)(V),
        "real floats.*complex",
    ),
    "product: integers": (
        lambda: krylov.basis(lambda v: v.astype(int), V, 2),
        "real floats.*int",
    ),
    "product: nothing": (
        lambda: spectrum.trace(lambda v: None, V, key=KEY),
        "NoneType",
    ),
    "preconditioner: shape": (
        lambda: cg.solve(product, V, preconditioner=lambda r: r[:1]),
        r"`preconditioner\(v\)`.*float64\[1\]",
    ),
    # Vectors that are none.
    "b: complex": (
        lambda: cg.solve(product, 1j * V),
        "`b`.*complex.*real and imaginary",
    ),
    "b: a complex number": (lambda: cg.solve(twice, 1j), "`b`.*complex"),
    "b: words": (lambda: cg.solve(twice, {"x": "one"}), r"`b`.*str at b\['x'\]"),
    "b: a key": (lambda: cg.solve(twice, KEY), "`b`.*key"),
    "b: nothing": (lambda: cg.solve(twice, None), "`b`.*got None"),
    "v: complex": (lambda: cg.inverse(product)(1j * V), "`v`.*complex"),
    "b: complex, in a region": (
        lambda: trust_region.solve(product, 1j * V, 1.0),
        "`b`.*complex",
    ),
    "x0: complex": (lambda: cg.solve(product, V, x0=1j * V), "`x0`.*complex"),
    "x0: structure": (lambda: cg.solve(product, V, x0={"x": V}), "`x0`.*tree like `b`"),
    "direction": (
        lambda: krylov.basis(product, V, 2, direction=V[:2]),
        "`direction`.*tree like `b`",
    ),
    "like: complex": (
        lambda: spectrum.trace(twice, 1j * V, key=KEY),
        "`like`.*complex",
    ),
    "like: empty": (
        lambda: spectrum.eigenvalues(twice, {}, key=KEY),
        "`like`.*no numbers",
    ),
    "product's v: shape": (lambda: GGN(V), r"`v`.*tree like `params`.*float32\[2,1\]"),
    "product's v: structure": (lambda: GGN({"w": P}), "`v`.*tree like `params`"),
    "product's v: complex": (lambda: GGN(1j * P), "`v`.*complex"),
    "hessian's v": (
        lambda: curvature.hessian(F, P, BATCH)(V),
        "`v`.*tree like `params`",
    ),
    "Fisher's v": (
        lambda: curvature.empirical_fisher(F, P, BATCH)("v"),
        "`v`.*got str",
    ),
    "difference's v": (
        lambda: curvature.finite_difference_hessian(F, P, BATCH)(V),
        "`v`.*tree like `params`",
    ),
    "rounded v": (
        lambda: curvature.with_precision("bfloat16")(F, P, BATCH).exact(V),
        "`v`.*tree like `params`",
    ),
    "sum's v": (
        lambda: curvature.ggn(hfjax.objective.weighted_sum([(1.0, F)]), P, (BATCH,))(V),
        "`v`.*tree like `params`",
    ),
    # Keys, objectives, parameters, functions, numbers.
    "key: a seed": (lambda: spectrum.trace(twice, V, key=0), "`key`.*got int"),
    "key: several": (
        lambda: spectrum.eigenvalues(twice, V, key=jax.random.split(KEY)),
        "`key` must be one key",
    ),
    "key of a diagonal": (
        lambda: diagonals.ggn_rademacher(F, P, BATCH, key=0),
        "`key`.*got int",
    ),
    "objective of a diagonal": (
        lambda: diagonals.empirical_fisher(lambda p: p, P, BATCH),
        "`objective`.*Objective",
    ),
    "params of a diagonal": (
        lambda: diagonals.ggn_exact(F, jnp.ones((2, 1), int), BATCH),
        "`params`.*int",
    ),
    "params of layers": (
        lambda: hfjax.preconditioners.layers(F, 1j * P, BATCH),
        "`params`.*complex",
    ),
    "objective of layers": (
        lambda: hfjax.preconditioners.layers(None, P, BATCH),
        "`objective`.*Objective",
    ),
    "objective of structural": (
        lambda: with_structural_loss(F.value, 0.5),
        "`objective`.*Objective",
    ),
    "objective of a run": (
        lambda: hfjax.diagnostics.cg_run(F.value, P, BATCH, damping=1.0),
        "`objective`.*Objective",
    ),
    "x0 of a run": (
        lambda: hfjax.diagnostics.cg_run(F, P, BATCH, damping=1.0, x0=V),
        "`x0`.*tree like `params`",
    ),
    "key of products": (
        lambda: hfjax.verify.products(F, P, BATCH, key=7),
        "`key`.*got int",
    ),
    "stopping: not called": (
        lambda: cg.solve(product, V, stopping=hfjax.stopping.martens2010),
        r"`stopping` is the function.*call it",
    ),
    "stopping: a number": (lambda: cg.solve(product, V, stopping=1e-3), "`stopping`"),
    "keep: not called": (lambda: cg.solve(product, V, keep=iterates.grid), "`keep`"),
    "value_fn: a number": (lambda: cg.solve(product, V, value_fn=1.0), "`value_fn`"),
    "tolerance: words": (lambda: hfjax.stopping.residual("1e-3"), "`tolerance`.*str"),
    "damping: complex": (lambda: cg.inverse(product, damping=1j), "`damping`.*complex"),
    "damping: several": (
        lambda: cg.inverse(product, damping=V),
        "`damping`.*one number",
    ),
    "radius: several": (
        lambda: trust_region.solve(product, V, V),
        "`radius`.*one number",
    ),
    "coefficients": (lambda: spectrum.ritz_values(V), r"`coefficients`.*float64\[3\]"),
    "cases of numbers": (
        lambda: hfjax.minibatching.in_turn([1, 2, 3], 2, 0),
        r"`data`.*int at data\[0\]",
    ),
    "step of a scan": (lambda: hfjax.scan.checkpointed(None, V, V), "`step`"),
    "shape of a kernel": (
        lambda: hfjax.initializers.sparse()(KEY, 3),
        "`shape`.*got int",
    ),
    "key of a kernel": (lambda: hfjax.initializers.sparse()(0, (3, 2)), "`key`"),
    "dtype of a kernel": (
        lambda: hfjax.initializers.spectral_radius()(KEY, (3, 3), jnp.int32),
        "`dtype`.*int32",
    ),
    "diagonal of a damping matrix": (
        lambda: hfjax.damping_matrices.custom(lambda *_: (twice, V)).build(
            F, P, BATCH, GGN, None
        ),
        "`diagonal`.*shapes of `params`",
    ),
    "product of a damping matrix": (
        lambda: (
            hfjax.damping_matrices.custom(lambda *_: (lambda v: v[0], 1.0))
            .build(F, P, BATCH, GGN, None)
            .matvec(P)
        ),
        r"`matrix\(v\)`.*float32\[1\]",
    ),
}


@pytest.mark.every
@pytest.mark.parametrize("case", BAD)
def test_what_is_no_such_thing_is_named_in_one_sentence(case):
    call, sentence = BAD[case]
    with pytest.raises((TypeError, ValueError), match=sentence):
        call()


def test_an_error_of_a_users_product_tells_what_it_was_given():
    with pytest.raises(TypeError) as raised:
        cg.solve(lambda v: jnp.ones((2, 2)) @ v, V)
    assert any("`matvec(v)` with v float64[3]" in n for n in raised.value.__notes__)


@pytest.mark.parametrize("option", [True, np.True_, jnp.array(True)], ids=str)
def test_a_boolean_is_no_number(option):
    loss = hfjax.losses.squared_error()
    with pytest.raises(
        TypeError, match="`weight_decay` must be a real number, got bool"
    ):
        hfjax.Objective(lambda p, x: x @ p, loss, weight_decay=option)
