import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hfjax._core import trees

F16, BF16, F32, F64 = jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64


def tree_of(seed, *dtypes):
    rng = np.random.default_rng(seed)
    shapes = [(3, 2), (), (5,)]
    return {
        str(k): [jnp.asarray(rng.standard_normal(shapes[k % 3]), dtype)]
        for k, dtype in enumerate(dtypes)
    }


def wide_leaves(tree):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def dtypes_of(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("dtypes", [(F64, F64), (F32, F32, F32), (BF16, F32), (F16,)])
def test_dot_equals_float64_sum(dtypes):
    x, y = tree_of(0, *dtypes), tree_of(1, *dtypes)
    truth = sum(
        np.sum(a * b) for a, b in zip(wide_leaves(x), wide_leaves(y), strict=True)
    )
    result = trees.dot(x, y)
    assert result.dtype == (F64 if F64 in dtypes else F32)
    np.testing.assert_allclose(result, truth, rtol=1e-14 if F64 in dtypes else 1e-6)


def test_dot_of_mixed_dtypes_has_the_widest():
    x = tree_of(0, BF16, F64, F32)
    assert trees.dot(x, x).dtype == F64
    truth = sum(np.sum(np.square(leaf)) for leaf in wide_leaves(x))
    np.testing.assert_allclose(trees.dot(x, x), truth, rtol=1e-6)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_dot_accumulates_in_float32(dtype):
    # In bfloat16 a running sum of ones stops at 256, in float16 65504 is the end.
    ones = jnp.ones(70_000, dtype)
    assert trees.dot(ones, ones) == 70_000
    assert trees.dot(300 * ones[:9], 300 * ones[:9]) > 8e5


def test_dot_of_an_empty_tree_is_zero():
    assert trees.dot({}, {}) == 0
    assert trees.norm({}) == 0
    assert trees.dot({}, {}).dtype == F32


@pytest.mark.parametrize("dtypes", [(F64, F64), (F32, F32, F32), (BF16, F32)])
def test_gram_holds_the_products_of_every_pair_summed_wide(dtypes):
    rng = np.random.default_rng(3)

    def stacked(count):
        return {
            str(k): jnp.asarray(rng.standard_normal((count, *shape)), dtype)
            for k, (shape, dtype) in enumerate(
                zip([(3, 2), (), (5,)], dtypes, strict=False)
            )
        }

    v, w = stacked(4), stacked(2)
    rows = [
        np.concatenate([leaf.reshape(len(leaf), -1) for leaf in wide_leaves(x)], axis=1)
        for x in (v, w)
    ]
    result = trees.gram(v, w)
    assert result.dtype == (F64 if F64 in dtypes else F32)
    rtol = 1e-13 if F64 in dtypes else 1e-5
    np.testing.assert_allclose(result, rows[0] @ rows[1].T, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sums_gather_no_sharded_array(axis_type):
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    mesh = jax.make_mesh((4,), ("model",), axis_types=(axis_type,))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*a)) for a in (("model",), ()))
    x = {
        "w": jax.device_put(jnp.arange(32.0).reshape(8, 4), rows),
        "b": jax.device_put(jnp.arange(8.0), rows),
        "c": jax.device_put(jnp.arange(8.0) + 1, whole),
    }
    truth = sum(np.sum(np.square(leaf)) for leaf in wide_leaves(x))
    for verb in (lambda x: trees.dot(x, x), lambda x: trees.norm(x) ** 2):
        compiled = jax.jit(verb).lower(x).compile()
        assert "all-reduce" in compiled.as_text()
        assert "all-gather" not in compiled.as_text()
        np.testing.assert_allclose(compiled(x), truth, rtol=1e-6)


def test_vectors_of_one_type_are_summed_at_once():
    rng = np.random.default_rng(4)
    shapes = [(5,), (2, 3), (5,), (7,), (), (5,), (2, 3), ()]
    x, y = (
        [jnp.asarray(rng.standard_normal(shape), F32) for shape in shapes]
        for _ in range(2)
    )
    x[5] = x[5].astype(BF16)  # Multiplied in float32, as its like.
    products = [a * b for a, b in zip(wide_leaves(x), wide_leaves(y), strict=True)]
    np.testing.assert_allclose(trees.dot(x, y), sum(map(np.sum, products)), rtol=1e-6)
    sizes = [np.max(np.abs(leaf)) for leaf in wide_leaves(x)]
    np.testing.assert_allclose(trees.largest(x), max(sizes), rtol=1e-7)
    # (5,), (7,) and two matrices; of the scalars' sum nothing is left to sum up.
    program = str(jax.make_jaxpr(trees.dot)(x, y))
    assert program.count("reduce_sum") - program.count("reduce_sum[axes=()") == 4
    assert len(trees.maxima(x)) == 6


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", range(6))
def test_no_entry_hides_what_is_not_finite(place, bad):
    x = [
        np.full(shape, 1e30, np.float32) for shape in [(2,), (2,), (2,), (), (), (1, 2)]
    ]
    assert trees.is_finite(x)
    x[place].flat[-1:] = bad
    assert not trees.is_finite(x)


def test_maxima_tell_what_scaling_takes_out_of_range():
    for dtype, scale, stays in (
        (F16, 8.0, True),
        (F16, 32.0, False),
        (BF16, 32.0, True),
        (F32, 1e34, True),
        (F32, 1e36, False),
    ):
        x = {"a": jnp.asarray([1.0, -4e3], dtype), "b": jnp.ones(3, F32)}
        assert jnp.all(jnp.isfinite(trees.scale(F32(scale), x)["a"])) == stays
        assert trees.is_finite(trees.scale(F32(scale), trees.maxima(x))) == stays


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_norm_neither_overflows_nor_vanishes(scale):
    x = {"a": jnp.asarray([3.0, 0.0], F32) * F32(scale), "b": F32(-4.0 * scale)}
    np.testing.assert_allclose(trees.norm(x), 5.0 * scale, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_norm_of_a_nonfinite_tree_is_not_finite(bad):
    for x in (
        [jnp.ones(2), jnp.asarray([1.0, bad])],
        [jnp.asarray([bad]), jnp.ones(2)],
    ):
        assert not jnp.isfinite(trees.norm(x))
        assert not jnp.isfinite(trees.magnitude(x))


def test_norm_of_zeros_is_zero():
    assert trees.norm({"a": jnp.zeros(3)}) == 0
    assert trees.magnitude({"a": jnp.zeros(3)}) == 1


@pytest.mark.parametrize("largest", [1e-37, 0.7, 1.0, 3.0, 1e38])
def test_magnitude_is_a_power_of_two_near_the_largest_entry(largest):
    x = [jnp.asarray([0.1 * largest, -largest], F32), jnp.zeros(2, F32)]
    size = float(trees.magnitude(x))
    assert np.frexp(size)[0] == 0.5
    assert 0.25 <= largest / size <= 4
    assert np.isfinite(np.float32(1) / np.float32(size))
    assert np.all(np.float32(1) / np.float32(size) * size == 1)


@pytest.mark.parametrize("dtypes", [(F64, F64), (F32, BF16), (F16, F64)])
def test_axpy_adds_in_the_dtypes_of_y(dtypes):
    x, y = tree_of(2, F32, F32), tree_of(3, *dtypes)
    result = trees.axpy(jnp.asarray(0.3, F32), x, y)
    assert dtypes_of(result) == list(dtypes)
    for got, a, b in zip(
        jax.tree.leaves(result), wide_leaves(x), wide_leaves(y), strict=True
    ):
        tolerance = 1.01 * float(jnp.finfo(got.dtype).eps) + 1e-7
        truth = np.float64(np.float32(0.3)) * a + b
        np.testing.assert_allclose(got.astype(F64), truth, rtol=tolerance, atol=1e-7)


def test_axpy_multiplies_in_float32():
    # 300 · 300 is no float16, but 300 · 300 − 60000 is.
    y = jnp.asarray([-60_000.0], F16)
    result = trees.axpy(jnp.asarray(300.0, F32), jnp.asarray([300.0], F16), y)
    assert result.dtype == F16
    np.testing.assert_allclose(result, [30_000.0], rtol=1e-3)


def test_scale_keeps_dtypes_and_multiplies_in_float32():
    x = tree_of(4, BF16, F32, F64)
    result = trees.scale(jnp.asarray(1e-3, F32), x)
    assert dtypes_of(result) == [BF16, F32, F64]
    for got, a in zip(jax.tree.leaves(result), wide_leaves(x), strict=True):
        tolerance = 1.01 * float(jnp.finfo(got.dtype).eps) + 1e-7
        np.testing.assert_allclose(got.astype(F64), 1e-3 * a, rtol=tolerance)


def test_add_select_and_casts_keep_structure_and_dtypes():
    x, y = tree_of(5, F32, BF16), tree_of(6, F64, F32)
    assert dtypes_of(trees.add(x, y)) == [F32, BF16]
    np.testing.assert_allclose(
        trees.add(x, y)["0"][0], wide_leaves(x)[0] + wide_leaves(y)[0], rtol=1e-6
    )
    assert dtypes_of(trees.cast_like(y, x)) == [F32, BF16]
    assert dtypes_of(trees.widen(x)) == [F32, F32]
    for predicate, truth in ((True, x), (False, trees.cast_like(y, x))):
        chosen = trees.select(jnp.asarray(predicate), x, trees.cast_like(y, x))
        for got, leaf in zip(
            jax.tree.leaves(chosen), jax.tree.leaves(truth), strict=True
        ):
            np.testing.assert_array_equal(got, leaf)


def test_select_does_not_hand_nan_on():
    bad = {"a": jnp.asarray([jnp.nan, 1.0])}
    good = {"a": jnp.asarray([0.0, 2.0])}
    assert jnp.all(jnp.isfinite(trees.select(jnp.asarray(False), bad, good)["a"]))


@pytest.mark.parametrize(("exponent", "kappa"), [(0.0, 0.5), (0.75, 0.5), (1.0, 0.0)])
def test_interpolation_is_a_power_of_the_shifted_diagonal(exponent, kappa):
    d = {"a": jnp.array([0.0, 2.0]), "b": jnp.array([4.0])}
    scale = {"a": jnp.array([0.0, 1.0]), "b": jnp.array([3.0])}
    result = trees.interpolate(d, exponent=exponent, kappa=kappa, scale=scale)
    truth = np.array([0.0, 2.0 + kappa, 4.0 + 3 * kappa]) ** exponent
    np.testing.assert_allclose(
        np.concatenate([result[k] for k in d]), truth, rtol=1e-12
    )


def test_interpolation_without_a_scale_is_towards_the_identity():
    result = trees.interpolate(
        jnp.array([0.0, 3.0]), exponent=0.5, kappa=1.0, scale=None
    )
    np.testing.assert_allclose(result, [1.0, 2.0])
