"""Kronecker factors and what they precondition, against dense matrices in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from jax.flatten_util import ravel_pytree
from mapped import WEIGHTS, axis_name, needs_devices, run
from problems import Problem, normal, soft_targets
from reference import assert_close, flat, matrix_of, quick_jit

import hfjax
from hfjax import preconditioners
from hfjax.curvature import probes
from hfjax.curvature.structural import with_structural_loss
from hfjax.objectives.plain import terms_of
from hfjax.preconditioners import _blocks, _factors, _inverses

RNG = np.random.default_rng(5)
KEY = jax.random.key(3)
SQUARED = hfjax.losses.squared_error()


def signs_of(problem, outputs):
    """Return the random signs of every case."""
    (term,) = terms_of(problem.objective(), problem.batch)
    drawn = probes.probes(term.means, term.cases, KEY)
    return jax.vmap(drawn.signs, (0, None, 0))(drawn.data, 0, outputs)


def combined(problem, outputs):
    """Return S s of every case."""
    factor = problem.objective().loss.factor(outputs, problem.batch[1])
    return factor(signs_of(problem, outputs))


def factors_of(objective, params, batch, model):
    """Return Ā and Ḡ of each layer, of an objective of one term."""
    (term,) = terms_of(objective, batch)
    return _factors.factors(term, params, model, key=KEY)[0]


# Each model takes what is added to what its layers compute, so that derivatives by it
# are `jax.grad`'s; and tells, for each kernel, the layer's inputs.


def flat_model(params, x, added=None):
    """Two dense layers, the second without bias and transposed; a gain."""
    added = added or {"w": 0.0, "v": 0.0}
    h = jnp.tanh(x @ params["w"] + params["b"][None] + added["w"])
    return params["gain"][None] * (h @ params["v"].T + added["v"])


def flat_inputs(params, x):
    h = np.tanh(x @ np.asarray(params["w"]) + np.asarray(params["b"]))
    return {"w": np.column_stack([x, np.ones(len(x))])[:, None], "v": h[:, None]}


def recurrent(params, x, added=None):
    """Four steps; the last state is read out."""
    if added is None:

        def step(h, x):
            z = x @ params["w"] + h @ params["u"] + params["b"][None]
            return jnp.tanh(z), None

        # Varies over devices as the states do.
        start = jnp.tile(0 * x[:, 0, :1], (1, len(params["u"])))
        return jax.lax.scan(step, start, jnp.swapaxes(x, 0, 1))[0] @ params["out"]
    h = jnp.zeros((len(x), params["w"].shape[1]))
    for t in range(x.shape[1]):
        z = x[:, t] @ params["w"] + params["b"][None] + added["w"][:, t]
        h = jnp.tanh(z + h @ params["u"] + added["u"][:, t])
    return h @ params["out"] + added["out"]


def recurrent_inputs(params, x):
    w, u, b = (np.asarray(params[name]) for name in ("w", "u", "b"))
    states = [np.zeros((len(x), w.shape[1]))]
    for t in range(x.shape[1]):
        states.append(np.tanh(x[:, t] @ w + states[-1] @ u + b))
    ones = np.ones((*x.shape[:2], 1))
    before = np.stack(states[:-1], axis=1)
    # The scan adds the bias to the sum of both products: the first has it.
    return {
        "w": np.concatenate([x, ones], axis=2),
        "u": before,
        "out": states[-1][:, None],
    }


def flat_network(name, loss, targets):
    units = targets.shape[1]
    batch = (FLAT, targets, WEIGHED)
    return Problem(name, flat_params(units), flat_model, loss, batch)


def flat_params(units):
    return {
        "w": normal(RNG, 3, 4),
        "b": normal(RNG, 4),
        "v": normal(RNG, units, 4),
        "gain": normal(RNG, units) + 2,
    }


CELL = {
    "w": normal(RNG, 2, 3),
    "u": normal(RNG, 3, 3, scale=0.7),
    "b": normal(RNG, 3),
    "out": normal(RNG, 3, 1),
}
CASES = len(WEIGHTS)
FLAT = normal(RNG, CASES, 3)
SEQUENCE = normal(RNG, CASES, 4, 2)
WEIGHED = jnp.asarray(WEIGHTS)
READ_OUT = (SEQUENCE, jnp.full((CASES, 1), 0.3), WEIGHED)
NETWORKS = {
    problem.name: problem
    for problem in (
        flat_network("one_output", "squared_error", normal(RNG, CASES, 1)),
        flat_network("softmax", "softmax_cross_entropy", soft_targets(RNG, CASES, 3)),
        Problem("recurrent", CELL, recurrent, "sigmoid_cross_entropy", READ_OUT),
    )
}
INPUTS = {flat_model: flat_inputs, recurrent: recurrent_inputs}
every_network = pytest.mark.parametrize("name", NETWORKS)


@functools.cache
def dense_factors(name):
    """Return Ā and Ḡ of each kernel, by `jax.grad` and sums over cases in NumPy."""
    problem = NETWORKS[name]
    x, _, weights = problem.batch
    inputs = INPUTS[problem.model_fn](problem.params, np.asarray(x))
    share = np.asarray(weights) / np.sum(weights)
    outputs = problem.model_fn(problem.params, x)
    units = {k: problem.params[k].shape[0 if k == "v" else 1] for k in inputs}

    def added(k):
        steps = inputs[k].shape[1]
        return jnp.zeros((CASES, steps, units[k]) if steps > 1 else (CASES, units[k]))

    start = {k: added(k) for k in inputs}
    model_fn = functools.partial(problem.model_fn, problem.params, x)
    (errors,) = jax.vjp(model_fn, start)[1](combined(problem, outputs))

    def gram(rows):
        return np.einsum("i,itm,itn->mn", share, rows, rows)

    g = {k: gram(np.asarray(e).reshape(CASES, -1, units[k])) for k, e in errors.items()}
    a = {k: gram(rows) / rows.shape[1] for k, rows in inputs.items()}
    return a, g


def names(params):
    return [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def factors(problem, batch=None, **options):
    objective = problem.objective(**options)
    batch = problem.batch if batch is None else batch
    model = _factors.read(objective, problem.params, batch, 100)[0]
    pairs = quick_jit(
        lambda params, batch: factors_of(objective, params, batch, model)
    )(problem.params, batch)
    name = names(problem.params)
    return {
        name[layer.kernel]: pair
        for layer, pair in zip(model.layers, pairs, strict=True)
    }


@every_network
def test_factors_are_those_of_each_case_written_out(name):
    problem = NETWORKS[name]
    a, g = dense_factors(name)
    ours = factors(problem)
    assert ours.keys() == a.keys()
    for k, pair in ours.items():
        np.testing.assert_allclose(pair.inputs, a[k], rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(pair.units, g[k], rtol=1e-10, atol=1e-14)


def test_mean_of_many_signs_is_the_loss_hessian():
    # What comes back to the last layer of a softmax is S v: its square is L″ on average.
    cases = 6000
    logits = jnp.asarray([[1.0, -0.5, 0.3]])
    params = {"w": logits}  # Of one input, which is 1.
    objective = hfjax.Objective(
        lambda p, x: x @ p["w"], hfjax.losses.softmax_cross_entropy()
    )
    batch = (jnp.ones((cases, 1)), jnp.full((cases, 3), 1 / 3))
    problem = Problem(
        "signs", params, objective.model_fn, "softmax_cross_entropy", batch
    )
    pair = factors(problem)["w"]
    p = np.exp(np.asarray(logits[0]))
    p /= p.sum()
    truth = np.diag(p) - np.outer(p, p)
    # Entries of (S v)(S v)ᵀ are below 1: five standard deviations of their mean.
    np.testing.assert_allclose(pair.units, truth, atol=5 / np.sqrt(cases))
    assert np.max(np.abs(truth)) > 3 * 5 / np.sqrt(cases)


@pytest.mark.parametrize(
    ("name", "size"), [("one_output", 1), ("softmax", 5), ("recurrent", 5)]
)
def test_microbatches_change_no_factor(name, size):
    problem = NETWORKS[name]
    a, g = dense_factors(name)
    for k, pair in factors(problem, microbatch_size=size).items():
        np.testing.assert_allclose(pair.inputs, a[k], rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(pair.units, g[k], rtol=1e-10, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("every", [3, 1])
def test_a_part_of_the_cases_gives_the_preconditioner_of_every_kth(every):
    problem = NETWORKS["softmax"]
    batch = jax.tree.map(lambda leaf: leaf[::every], problem.batch)
    ours = built(problem, jnp.float64(0.3), cases=CASES // every)
    part = dataclasses.replace(problem, batch=batch)
    truth = built(part, jnp.float64(0.3), cases=None)
    np.testing.assert_array_equal(ours, truth)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["cases second", "cases merged", "a loop"])
def test_factors_are_the_same_wherever_a_model_has_the_cases(layout):
    # Of layers whose results have the cases' axis behind another, merged with another,
    # or within a loop; case by case there is no question.
    def model_fn(params, x):
        if layout == "cases second":
            h = jnp.einsum("ntd,du->tnu", x, params["w"]) + params["b"][None, None]
            return jnp.tanh(h).swapaxes(0, 1) @ params["v"]
        if layout == "cases merged":
            h = x.reshape(-1, x.shape[-1]) @ params["w"] + params["b"][None]
            return jnp.tanh(h).reshape(*x.shape[:2], -1) @ params["v"]

        def step(_, x):
            return None, jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"]

        return jax.lax.scan(step, None, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    last = normal(np.random.default_rng(1), 3, 2)
    params = {"w": CELL["w"], "b": CELL["b"], "v": last}
    batch = (SEQUENCE, jnp.zeros((CASES, 4, 2)), WEIGHED)
    problem = Problem(layout, params, model_fn, "squared_error", batch)
    rows = np.concatenate([SEQUENCE, np.ones((CASES, 4, 1))], axis=2)
    share = np.asarray(WEIGHTS) / np.sum(WEIGHTS)
    found = factors(problem)
    truth = np.einsum("i,itm,itn->mn", share, rows, rows) / 4
    np.testing.assert_allclose(found["w"].inputs, truth, rtol=1e-10)
    signs = signs_of(problem, batch[1])
    # Of half the squared error S is the identity.
    truth = np.einsum("i,itm,itn->mn", share, signs, signs)
    np.testing.assert_allclose(found["v"].units, truth, rtol=1e-10)
    small = factors(problem, microbatch_size=1)
    for k, pair in found.items():
        np.testing.assert_allclose(small[k].inputs, pair.inputs, rtol=1e-10)
        np.testing.assert_allclose(small[k].units, pair.units, rtol=1e-10)


def test_gradient_and_factors_have_one_pass_forward():
    objective = hfjax.Objective(
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"], SQUARED
    )
    params = {k: flat_params(2)[k] for k in ("w", "b")} | {"v": normal(RNG, 4, 2)}
    batch = (FLAT, normal(RNG, CASES, 2))

    def both(params, r):
        build = preconditioners.kronecker().build
        apply = build(objective, params, batch, jnp.float64(0.3), KEY)
        return objective.value_and_grad(params, batch), apply(r)

    compiled = quick_jit(both).lower(params, params).compile()
    assert compiled.as_text().count(" tanh(") == 1


@pytest.mark.slow
def test_padding_changes_no_factor_whatever_it_holds():
    problem = NETWORKS["softmax"]
    x, t, _ = problem.batch
    padding = (1e6 * x[:3], t[:3], jnp.zeros(3))
    longer = tuple(map(jnp.concatenate, zip(problem.batch, padding, strict=True)))
    a, g = dense_factors("softmax")
    for k, pair in factors(problem, batch=longer).items():
        np.testing.assert_allclose(pair.inputs, a[k], rtol=1e-10)
        np.testing.assert_allclose(pair.units, g[k], rtol=1e-10, atol=1e-14)


def inverse_of(pair, damping):
    return _inverses.inverse([pair], [damping])[0]


def dense_inverse(a, g, damping, *, transposed=False):
    """Return P⁻¹ of a kernel flat as it is, and its bias after it."""
    mean_a, mean_g = np.trace(a) / len(a), np.trace(g) / len(g)
    ratio = np.sqrt(mean_a / mean_g)
    left = a + ratio * np.sqrt(damping) * np.eye(len(a))
    right = g + np.sqrt(damping) / ratio * np.eye(len(g))
    blocks = (right, left) if transposed else (left, right)
    return np.linalg.inv(np.kron(*blocks))


def built(problem, damping, **options):
    """Return P⁻¹, dense, in the order of `ravel_pytree`."""
    rule = preconditioners.kronecker(**options)

    @quick_jit
    def matrix(params, batch, damping):
        apply = rule.build(problem.objective(), params, batch, damping, KEY)
        return matrix_of(apply, params)

    return np.asarray(matrix(problem.params, problem.batch, damping))


@functools.cache
def dense_preconditioner(name, damping, share, decay=0.0):
    """Return P⁻¹ of a network, dense: factors, and d + λ."""
    problem = NETWORKS[name]
    a, g = dense_factors(name)
    params, damping = problem.params, damping + decay
    flat, unravel = ravel_pytree(params)
    number = unravel(jnp.arange(flat.size, dtype=float))
    place = {k: np.asarray(v).astype(int).ravel() for k, v in number.items()}
    truth = np.zeros((flat.size, flat.size))
    for k in a:
        block = dense_inverse(a[k], g[k], share * damping, transposed=k == "v")
        index = np.concatenate([place[k], place["b"]]) if k == "w" else place[k]
        truth[np.ix_(index, index)] = block
    if "gain" in params:
        x, _, weights = problem.batch
        jacobian = jax.jacobian(
            lambda gain: problem.model_fn({**params, "gain": gain}, x)
        )(params["gain"])
        back = combined(problem, problem.model_fn(params, x))
        rows = np.einsum("imk,im->ik", jacobian, back)
        d = np.asarray(weights) @ rows**2 / np.sum(weights)
        truth[place["gain"], place["gain"]] = 1 / (d + damping)
    return truth


@every_network
@pytest.mark.parametrize("share", [1.0, 0.1])
def test_preconditioner_is_the_inverse_of_the_dense_kronecker_products(name, share):
    ours = built(NETWORKS[name], jnp.float64(0.3), damping_share=share)
    truth = dense_preconditioner(name, 0.3, share)
    np.testing.assert_allclose(ours, truth, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_weight_decay_counts_with_damping():
    decayed = dataclasses.replace(NETWORKS["softmax"], weight_decay=0.2)
    ours = built(decayed, jnp.float64(0.1))
    truth = dense_preconditioner("softmax", 0.1, 0.1, decay=0.2)
    np.testing.assert_allclose(ours, truth, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_a_damping_tree_counts_with_its_mean_for_a_kernel_and_entry_by_entry_else():
    problem = NETWORKS["one_output"]
    tree = jax.tree.map(lambda x: jnp.full_like(x, 0.3), problem.params)
    tree["w"] = jnp.linspace(0.1, 0.5, 12).reshape(3, 4)
    truth = dense_preconditioner("one_output", 0.3, 0.1)
    np.testing.assert_allclose(built(problem, tree), truth, rtol=1e-8, atol=1e-10)
    tree["gain"] = jnp.full(1, 0.7)
    other = dense_preconditioner("one_output", 0.7, 0.1)
    # Gains are where `ravel_pytree` has them: after the bias.
    np.testing.assert_allclose(built(problem, tree)[4, 4], other[4, 4], rtol=1e-10)


def test_one_iteration_solves_what_the_product_is_exact_of():
    # Of white inputs and one output G is the identity, its factors are.
    q, _ = np.linalg.qr(RNG.standard_normal((8, 8)))
    x = jnp.asarray(q[:, :4] * np.sqrt(8))
    objective = hfjax.Objective(lambda p, x: x @ p, SQUARED)
    params, batch = normal(RNG, 4, 1), (x, normal(RNG, 8, 1))
    # With unlike scales of inputs, and no damping, G = Ā ⊗ 1.
    scaled = (x * jnp.asarray([[1.0, 10.0, 0.1, 3.0]]), batch[1])
    for data, damping in ((batch, 0.7), (scaled, 0.0)):
        given = (objective, params, data)
        rule = preconditioners.kronecker(damping_share=1.0)
        assert iterations(*given, damping, rule) == 1
    assert iterations(objective, params, scaled, 0.0, None) > 3


def iterations(objective, params, data, damping, rule):
    """Return how many iterations of CG solve (G + λI) x = ∇f."""

    @quick_jit
    def solved(params, data):
        product = hfjax.curvature.ggn(objective, params, data)
        build = rule and rule.build(objective, params, data, jnp.float64(damping), KEY)
        return hfjax.cg.solve(
            lambda v: product(v) + damping * v,
            objective.value_and_grad(params, data)[1],
            preconditioner=build,
            stopping=hfjax.stopping.residual(1e-8),
        )

    return int(solved(params, data).num_iterations)


def test_joined_structural_damping_is_in_the_factors():
    # The hidden layer's units come back from outputs and from its distance, μ times.
    params = {"w": normal(RNG, 3, 4, scale=0.5), "v": normal(RNG, 4, 1, scale=0.6)}

    def pair_fn(params, x):
        h = jnp.tanh(x @ params["w"])
        return h @ params["v"], h

    objective = hfjax.Objective(pair_fn, SQUARED, hidden_loss=SQUARED)
    x, t = FLAT, normal(RNG, CASES, 1)
    mu, copies = 0.6, 500
    joined = with_structural_loss(objective, mu)
    many = (jnp.tile(x, (copies, 1)), jnp.tile(t, (copies, 1)))
    model = _factors.read(joined, params, many, 100)[0]
    pairs = quick_jit(lambda p, b: factors_of(joined, p, b, model))(params, many)
    ours = {
        names(params)[layer.kernel]: pair
        for layer, pair in zip(model.layers, pairs, strict=True)
    }
    h = np.tanh(np.asarray(x @ params["w"]))
    slope = 1 - h**2
    back = slope * np.asarray(params["v"])[:, 0]
    truth = back.T @ back / CASES + mu * np.diag(np.mean(slope**2, axis=0))
    scale = np.max(truth)
    np.testing.assert_allclose(ours["w"].units, truth, atol=0.05 * scale)
    assert np.max(np.diag(mu * np.mean(slope**2, axis=0))) > 0.2 * scale
    np.testing.assert_allclose(ours["v"].units, [[1.0]], rtol=1e-10)
    np.testing.assert_allclose(ours["v"].inputs, h.T @ h / CASES, rtol=1e-10)


def pairs_of(dtype):
    """Return factors of all kinds of trouble."""
    rng = np.random.default_rng(9)

    def gram(rank, size):
        rows = rng.standard_normal((rank, size))
        return rows.T @ rows / rank

    full, thin = (gram(40, 6), gram(30, 4)), (gram(2, 6), gram(1, 4))
    zero = (np.zeros((6, 6)), np.zeros((4, 4)))
    steep = np.diag(10.0 ** np.arange(0, -12, -2)), np.diag(10.0 ** np.arange(4))
    kinds = [
        full,
        thin,
        zero,
        steep,
        (full[0], zero[1]),
        (zero[0], thin[1]),
        *[(a * full[0], g * thin[1]) for a in (1e15, 1e-15) for g in (1e15, 1e-15)],
    ]
    return _blocks.Pair(
        *(jnp.asarray(np.stack(side), dtype) for side in zip(*kinds, strict=True))
    )


DAMPINGS = [1e3, 1.0, 1e-4, 1e-8, 1e-12, 0.0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_inverses_are_positive_definite_whatever_the_factors(dtype):
    pairs = pairs_of(dtype)
    over = jax.vmap(jax.vmap(inverse_of, (None, 0)), (0, None))
    found = quick_jit(over)(pairs, jnp.asarray(DAMPINGS, dtype))
    for pair in range(len(pairs.inputs)):
        for n, damping in enumerate(DAMPINGS):
            for side in range(2):
                matrix = np.asarray(found[side][pair, n])
                assert np.all(np.isfinite(matrix)), (pair, damping)
                np.testing.assert_allclose(matrix, matrix.T, rtol=1e-6)
                unit = matrix.astype(np.float64) / np.max(np.abs(matrix))
                assert np.linalg.eigvalsh(unit)[0] > 0, (pair, damping)


def test_inverses_are_as_exact_as_their_conditioning_allows_in_float32():
    pairs = pairs_of(jnp.float32)
    over = jax.vmap(jax.vmap(inverse_of, (None, 0)), (0, None))
    found = quick_jit(over)(pairs, jnp.asarray(DAMPINGS, jnp.float32))
    compared = 0
    for pair in range(len(pairs.inputs)):
        a, g = (np.asarray(side[pair], np.float64) for side in pairs)
        sizes = np.trace(a) / len(a), np.trace(g) / len(g)
        for n, damping in enumerate(DAMPINGS):
            if min(sizes) == 0 or damping > 1e6 * sizes[0] * sizes[1]:
                continue
            mu = np.sqrt(damping / (sizes[0] * sizes[1]))
            wells = [
                m / s + mu * np.eye(len(m)) for m, s in zip((a, g), sizes, strict=True)
            ]
            if max(np.linalg.cond(well) for well in wells) > 1e3:
                continue
            truth = [np.linalg.inv(well) for well in wells]
            scale = sizes[0] * sizes[1]
            for side, right in enumerate(truth):
                ours = np.asarray(found[side][pair, n], np.float64)
                ours = ours * scale if side else ours
                np.testing.assert_allclose(
                    ours, right, rtol=1e-3, atol=1e-3 * np.max(right)
                )
            compared += 1
    assert compared > 12


@pytest.mark.slow
def test_pairs_that_are_inverted_together_are_what_they_are_alone():
    # Two of one size, two nearly, one that is not positive, one of nothing, one float32.
    rng = np.random.default_rng(9)

    def gram(size):
        rows = rng.standard_normal((2 * size, size))
        return jnp.asarray(rows.T @ rows)

    sizes = [(4, 3), (4, 3), (21, 20), (300, 4), (299, 21)]
    pairs = [_blocks.Pair(gram(m), gram(n)) for m, n in sizes]
    pairs += [_blocks.Pair(-gram(4), gram(3)), _blocks.Pair(0 * gram(4), gram(3))]
    pairs.append(jax.tree.map(lambda x: x.astype(jnp.float32), pairs[0]))
    dampings = [jnp.float64(0.1 * n) for n in range(len(pairs))]
    dampings[6] = jnp.float64(0)
    together = quick_jit(_inverses.inverse)(pairs, dampings)
    for n, (pair, damping) in enumerate(zip(pairs, dampings, strict=True)):
        alone, rtol = inverse_of(pair, damping), 1e-4 if n == 7 else 1e-9
        for ours, truth in zip(together[n], alone, strict=True):
            assert ours.dtype == truth.dtype
            size = np.max(np.abs(truth))
            np.testing.assert_allclose(ours, truth, rtol=rtol, atol=rtol * size)


def deep(depth):
    """Return a network of equal layers between two others."""
    rng = np.random.default_rng(3)
    params = {"first": normal(rng, 3, 4), "last": normal(rng, 4, 2)}
    for n in range(depth):
        params |= {f"w{n}": normal(rng, 4, 4), f"b{n}": normal(rng, 4)}

    def model_fn(params, x):
        x = jnp.tanh(x @ params["first"])
        for n in range(depth):
            # Every second kernel is transposed: its matrix is as that of the others.
            kernel = params[f"w{n}"]
            x = jnp.tanh(x @ (kernel.T if n % 2 else kernel) + params[f"b{n}"][None])
        return x @ params["last"]

    batch = (FLAT, normal(rng, CASES, 2), WEIGHED)
    return Problem("deep", params, model_fn, "squared_error", batch)


@pytest.mark.slow
def test_equal_layers_are_inverted_and_multiplied_in_one_batch():
    rule, counts = preconditioners.kronecker(damping_share=1.0), []
    for depth in (2, 5):
        problem = deep(depth)

        def precondition(params, r, problem=problem):
            objective, damping = problem.objective(), jnp.float64(0.3)
            return rule.build(objective, params, problem.batch, damping, KEY)(r)

        params = problem.params
        text = str(jax.make_jaxpr(precondition)(params, params))
        counts.append(text.count("cholesky"))
        ours = quick_jit(precondition)(params, params)
        for k, pair in factors(problem).items():
            bias = k.replace("w", "b") if k.startswith("w") else None
            transposed = bias is not None and int(k[1:]) % 2
            inverse = dense_inverse(pair.inputs, pair.units, 0.3)
            truth, found = (
                (tree[k].T if transposed else tree[k]) for tree in (params, ours)
            )
            if bias is not None:
                truth, found = (
                    jnp.concatenate([matrix, tree[bias][None]])
                    for matrix, tree in ((truth, params), (found, ours))
                )
            truth = (inverse @ truth.ravel()).reshape(truth.shape)
            np.testing.assert_allclose(found, truth, rtol=1e-8, atol=1e-12)
    assert counts[0] == counts[1] > 0


def test_inverses_without_damping_are_those_on_the_range_of_the_factors():
    # A (A + μ)⁻¹ A is A but for μ = 10 n ε, of which the rounding n ε is a tenth: of
    # factors with a null space, too. (Of the identity in its place it would be A².)
    pairs = pairs_of(jnp.float32)
    for chosen in (0, 1):
        pair = jax.tree.map(lambda x, n=chosen: x[n], pairs)
        found = quick_jit(inverse_of)(pair, jnp.float32(0))
        a, g = (np.asarray(m, np.float64) / np.trace(m) * len(m) for m in pair)
        scale = np.prod([np.trace(m) / len(m) for m in pair])
        for matrix, inverse in zip((a, g), (found[0], scale * found[1]), strict=True):
            np.testing.assert_allclose(matrix @ inverse @ matrix, matrix, atol=0.1)


@pytest.mark.slow
def test_of_a_layer_that_nothing_passes_through_only_damping_is_known():
    zero = _blocks.Pair(jnp.zeros((3, 3)), jnp.zeros((2, 2)))
    for damping in (1e3, 1e-12):
        inputs, units = inverse_of(zero, jnp.float64(damping))
        product = np.kron(inputs, units)
        np.testing.assert_allclose(product, np.eye(6) / damping, rtol=1e-12)
    inputs, units = inverse_of(zero, jnp.float64(0))
    product = np.kron(inputs, units)
    np.testing.assert_array_equal(product, np.eye(6))  # Nothing is: leave it be.


@pytest.mark.slow
def test_a_factor_that_is_not_positive_counts_as_the_identity():
    # As rounding may leave one. Of mean eigenvalues 1 and 2, so μ = √(0.02 / 2).
    units = np.array([[3.0, 1.0], [1.0, 1.0]])
    for inputs in (np.diag([3.0, -1.0]), np.array([[1.0, 2.0], [2.0, 1.0]])):
        pair = _blocks.Pair(jnp.asarray(inputs), jnp.asarray(units))
        found = inverse_of(pair, jnp.float64(0.02))
        np.testing.assert_allclose(found.inputs, np.eye(2) / 1.1, rtol=1e-12)
        truth = np.linalg.inv(units + 0.2 * np.eye(2))
        np.testing.assert_allclose(found.units, truth, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1e25, 1e25), (1e38, 1e10)])
def test_factors_whose_product_overflows_leave_an_inverse_that_is_positive(sizes):
    pair = _blocks.Pair(
        *(jnp.float32(size) * jnp.eye(n) for size, n in zip(sizes, (3, 2), strict=True))
    )
    pair = jax.tree.map(lambda x: x.astype(jnp.float32), pair)
    inputs, units = inverse_of(pair, jnp.float32(0.1))
    for matrix in (inputs, units):
        assert np.all(np.isfinite(matrix))
        assert np.all(np.diagonal(matrix) > 0)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1.0, 1e12, 1e-12])
def test_preconditioner_of_a_network_in_float32_is_positive_definite(size):
    # Inputs of one rank, a hidden unit without way out, no case in some features.
    params = jax.tree.map(lambda x: x.astype(jnp.float32), flat_params(2))
    params["v"] = params["v"].at[:, 1].set(0)
    objective = hfjax.Objective(flat_model, SQUARED)
    x = jnp.zeros((5, 3), jnp.float32).at[:, 0].set(jnp.float32(size))
    batch = (x, jnp.ones((5, 2), jnp.float32))
    rule = preconditioners.kronecker()

    @quick_jit
    def matrices(dampings):
        def one(damping):
            apply = rule.build(objective, params, batch, damping, KEY)
            return matrix_of(apply, params)

        return jax.vmap(one)(dampings)

    for matrix in matrices(jnp.asarray(DAMPINGS, jnp.float32)):
        matrix = np.asarray(matrix, np.float64)
        assert np.all(np.isfinite(matrix))
        unit = 1 / np.sqrt(np.diag(matrix))
        matrix = unit[:, None] * matrix * unit[None]
        # Each entry is rounded, beside a diagonal of 1.
        rounding = len(matrix) * np.finfo(np.float32).eps
        np.testing.assert_allclose(matrix, matrix.T, atol=rounding)
        assert np.linalg.eigvalsh(matrix)[0] > -rounding


def averaged(decay, interval):
    return preconditioners.kronecker(damping_share=1.0, decay=decay, interval=interval)


LINEAR = hfjax.Objective(lambda p, x: x @ p["w"] + p["b"][None], SQUARED)
LINEAR_PARAMS = {"w": normal(RNG, 3, 1), "b": normal(RNG, 1)}
BATCHES = [(normal(RNG, 6, 3), normal(RNG, 6, 1)) for _ in range(4)]


def inputs_factor(batch):
    rows = np.column_stack([batch[0], np.ones(len(batch[0]))])
    return rows.T @ rows / len(rows)


def course(rule, batches, counts=None):
    """Build with one batch after another; return the memories, and P⁻¹ dense."""

    @quick_jit
    def build(batch, memory, count):
        given = (LINEAR, LINEAR_PARAMS, batch, jnp.float64(0.3), KEY)
        apply, memory = rule.build(*given, memory, count)
        return matrix_of(apply, LINEAR_PARAMS), memory

    memory, told = rule.init(LINEAR_PARAMS), []
    for k, batch in enumerate(batches):
        count = jnp.int32(k if counts is None else counts[k])
        matrix, memory = build(batch, memory, count)
        told.append((np.asarray(matrix), memory))
    return told


def linear_inverse(a, damping=0.3):
    """Return P⁻¹ where Ḡ is 1, the bias first as `ravel_pytree` has it."""
    matrix = dense_inverse(a, np.ones((1, 1)), damping)
    order = [3, 0, 1, 2]
    return matrix[np.ix_(order, order)]


def test_factors_are_averaged_over_builds():
    told = course(averaged(0.6, 1), BATCHES)
    a = np.zeros((4, 4))
    for k, (batch, (matrix, memory)) in enumerate(zip(BATCHES, told, strict=True), 1):
        kept = min(0.6, 1 - 1 / k)
        a = kept * a + (1 - kept) * inputs_factor(batch)
        np.testing.assert_allclose(matrix, linear_inverse(a), rtol=1e-8)
        _, numbers = memory["kronecker_factors"][1]  # Of "w", after "b".
        np.testing.assert_allclose(numbers[:17], [*a.ravel(), 1.0], rtol=1e-12)
        np.testing.assert_array_equal(numbers[17:], 0)


def test_between_builds_the_last_inverses_are_used_and_nothing_is_built():
    broken = (jnp.full((6, 3), jnp.nan), BATCHES[0][1])
    batches = [BATCHES[0], broken, broken, BATCHES[1], BATCHES[2], BATCHES[3]]
    told = course(averaged(0.6, 3), batches)
    first = linear_inverse(inputs_factor(BATCHES[0]))
    for matrix, memory in told[:3]:
        np.testing.assert_allclose(matrix, first, rtol=1e-8)
        jax.tree.map(np.testing.assert_array_equal, memory, told[0][1])
    # The second build, of the fourth update.
    a = 0.5 * inputs_factor(BATCHES[0]) + 0.5 * inputs_factor(BATCHES[1])
    for matrix, _ in told[3:]:
        np.testing.assert_allclose(matrix, linear_inverse(a), rtol=1e-8)


def test_a_build_that_is_not_finite_leaves_the_average():
    broken = (jnp.full((6, 3), jnp.inf), BATCHES[0][1])
    told = course(averaged(0.6, 1), [BATCHES[0], broken, BATCHES[1]])
    jax.tree.map(
        np.testing.assert_array_equal,
        told[1][1]["kronecker_factors"][1][1:],
        told[0][1]["kronecker_factors"][1][1:],
    )
    a = 0.6 * inputs_factor(BATCHES[0]) + 0.4 * inputs_factor(BATCHES[1])
    np.testing.assert_allclose(told[2][0], linear_inverse(a), rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [{"decay": 0.6}, {"interval": 2}])
def test_others_and_transposed_kernels_are_remembered_too(kept):
    # Twice the same: what went through memory is what was put there.
    problem = NETWORKS["softmax"]
    rule = preconditioners.kronecker(**kept)
    objective = problem.objective()

    @quick_jit
    def twice(params, batch):
        given = (objective, params, batch, jnp.float64(0.3), KEY)
        memory, matrices = rule.init(params), []
        for count in range(2):
            apply, memory = rule.build(*given, memory, jnp.int32(count))
            matrices.append(matrix_of(apply, params))
        return matrices

    truth = dense_preconditioner("softmax", 0.3, 0.1)
    for matrix in twice(problem.params, problem.batch):
        np.testing.assert_allclose(matrix, truth, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_memory_survives_scan_and_donation_as_the_plain_loop_has_it():
    problem = NETWORKS["one_output"]
    objective = problem.objective()
    tx = hfjax.hessian_free(
        objective,
        preconditioner=preconditioners.kronecker(decay=0.9, interval=2),
        # Well before the residual is rounding.
        solver=hfjax.cg.conjugate_gradient(max_iterations=4),
    )

    def step(carry):
        return training.train_step(objective, tx, *carry, problem.batch)

    # A copy, to be given away.
    start = jax.tree.map(jnp.array, problem.params)
    donating = quick_jit(step, donate_argnums=0)
    carry = (start, tx.init(start))
    for _ in range(3):
        carry = donating(carry)
    scanned, _ = training.trained(objective, tx, problem.params, problem.batch, 3)
    room = optax.tree.get(carry[1], "kronecker_factors")
    shapes = [[x.shape for x in leaf] for leaf in room]
    # b, gain, v (2² + 5² for one unit and four inputs), w: a row more for a bias.
    assert shapes == [[(4,)], [(1,)], [(1, 4), (29,)], [(3, 4), (41,)]]
    truth = (scanned[0], optax.tree.get(scanned[1], "kronecker_factors"))
    assert_close((carry[0], room), truth, rtol=1e-9, atol=1e-12)
    before = objective.value(problem.params, problem.batch)
    assert objective.value(carry[0], problem.batch) < before


def test_only_who_remembers_has_room():
    for options, rooms in (
        ({}, []),
        ({"decay": 0.5}, ["kronecker_factors"]),
        ({"interval": 2}, ["kronecker_inverses"]),
        ({"decay": 0.5, "interval": 2}, ["kronecker_factors", "kronecker_inverses"]),
    ):
        rule = preconditioners.kronecker(**options)
        state = hfjax.hessian_free(LINEAR, preconditioner=rule).init(LINEAR_PARAMS)
        assert sorted(state.preconditioner or {}) == rooms


@pytest.mark.parametrize("kept", [{"decay": 0.9}, {"interval": 2}])
def test_a_state_of_another_preconditioner_is_refused(kept):
    objective, params = hfjax.Objective(flat_model, SQUARED), flat_params(2)
    one, other = (
        hfjax.hessian_free(objective, preconditioner=rule, seed=0)
        for rule in (preconditioners.kronecker(**kept), preconditioners.kronecker())
    )
    batch = (jnp.ones((2, 3)), jnp.ones((2, 2)))
    for tx, state in ((one, other.init(params)), (other, one.init(params))):
        with pytest.raises(ValueError, match="of another preconditioner, `decay`"):
            jax.eval_shape(
                lambda s, tx=tx: tx.update(params, s, params, batch=batch), state
            )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"damping_share": 0.0}, ValueError, "`damping_share` must be above 0"),
        ({"decay": 1.5}, ValueError, "`decay` must be at least 0.0 and at most 1.0"),
        ({"interval": 0}, ValueError, "`interval` must be at least 1"),
        ({"max_size": 0.5}, TypeError, "`max_size` must be a Python integer"),
        ({"cases": 0}, ValueError, "`cases` must be at least 1"),
        ({"data": "all"}, ValueError, "`data` must be one of 'batch', 'eval_batch'"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        preconditioners.kronecker(**options)


def kept(problem, name):
    """Return `(params, batch, direction) -> P⁻¹ direction` for the ways of `mapped`."""

    def fn(params, batch, direction):
        objective = problem.objective(axis_name=axis_name(name), microbatch_size=2)
        rule = preconditioners.kronecker(decay=0.5, interval=2)
        given = (objective, params, batch, jnp.float64(0.3), KEY)
        memory = rule.init(params)
        for count in range(2):
            apply, memory = rule.build(*given, memory, jnp.int32(count))
        return apply(direction)

    return fn


def plain(problem, name):
    """Return the same without a memory."""

    def fn(params, batch, direction):
        objective = problem.objective(axis_name=axis_name(name), microbatch_size=2)
        given = (objective, params, batch, jnp.float64(0.3), KEY)
        return preconditioners.kronecker().build(*given)(direction)

    return fn


@pytest.mark.slow
@needs_devices
@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("one_output", "shard_map_check_vma"),
        ("one_output", "vmap"),
        ("one_output", "jit_with_explicit_shardings"),
        ("recurrent", "shard_map_of_two_axes"),
        ("recurrent", "shard_map"),
        ("recurrent", "jit_with_explicit_shardings"),
    ],
)
def test_devices_have_the_preconditioner_of_one(way, name):
    # Uneven weights, a device with padding only, microbatches that do not divide.
    problem = NETWORKS[name]
    truth = dense_preconditioner(name, 0.3, 0.1) @ flat(problem.direction)
    # In one program, XLA's threads for a CPU may wait for one another's collectives.
    for make in (kept, plain):
        found = run(way, make(problem, way), problem)
        np.testing.assert_allclose(flat(found), truth, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@needs_devices
def test_updates_on_devices_are_those_of_one():
    way = "shard_map_check_vma"
    problem = NETWORKS["recurrent"]
    ours = run(way, functools.partial(train, problem, axis_name(way)), problem)
    alone = train_alone()
    np.testing.assert_allclose(ours["values"], alone["values"], rtol=1e-9)
    np.testing.assert_allclose(ours["damping"], alone["damping"], rtol=1e-9)
    assert_close(ours["params"], alone["params"], rtol=1e-7, atol=1e-9)


@functools.cache
def train_alone():
    problem = NETWORKS["recurrent"]
    fn = functools.partial(train, problem, None)
    return quick_jit(fn)(problem.params, problem.batch, problem.direction)


def train(problem, axis, params, batch, _):
    objective = problem.objective(axis_name=axis, weight_decay=0.01)
    tx = hfjax.recipes.kronecker_factored(
        objective, max_iterations=6, decay=0.9, interval=2
    )
    (params, _), (info, dampings) = training.train(objective, tx, params, batch, 3)
    return {"values": info.value_after, "damping": dampings, "params": params}


@pytest.mark.slow
def test_fewer_iterations_than_with_a_diagonal_or_none_reach_the_same_model_value():
    rng = np.random.default_rng(2)
    # Inputs of scales from 1 to 300, mixed: no diagonal sees them.
    mixed = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    x = jnp.asarray(rng.standard_normal((60, 8)) * np.geomspace(1, 300, 8) @ mixed / 30)
    params = {"w": normal(rng, 8, 6, scale=0.2), "v": normal(rng, 6, 4, scale=0.5)}

    def model_fn(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    objective = hfjax.Objective(model_fn, SQUARED)
    batch = (x, normal(rng, 60, 4))
    damping = 1e-3

    @quick_jit
    def models(params, batch):
        product = hfjax.curvature.ggn(objective, params, batch)
        b = objective.value_and_grad(params, batch)[1]
        lam, found = jnp.float64(damping), []
        for rule in (
            preconditioners.kronecker(),
            preconditioners.diagonal(exponent=0.75),
            None,
        ):
            apply = rule and rule.build(objective, params, batch, lam, KEY)
            solved = hfjax.cg.solve(
                lambda v: jax.tree.map(lambda p, v: p + damping * v, product(v), v),
                b,
                preconditioner=apply,
                max_iterations=250,
                stopping=None,
            )
            found.append(solved.model_values)
        return found

    histories = [np.asarray(h) for h in models(params, batch)]
    lowest = min(h[-1] for h in histories)
    needed = [int(np.argmax(h < 0.99 * lowest)) for h in histories]
    assert needed[0] * 1.5 < min(needed[1:]), needed


@needs_devices
@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_without_weights_have_the_factors_of_one(check_vma):
    # Weights of a batch without any are ones, and do not vary over the devices.
    rng = np.random.default_rng(8)
    x, t = jnp.asarray(rng.normal(size=(8, 3))), jnp.asarray(rng.normal(size=(8, 1)))
    w = jnp.asarray(rng.normal(size=(3, 1)))
    squared, rule = hfjax.losses.squared_error(), preconditioners.kronecker()

    def inverse(w, batch, axis_name=None):
        f = hfjax.Objective(lambda w, x: jnp.tanh(x @ w), squared, axis_name=axis_name)
        return rule.build(f, w, batch, jnp.asarray(0.1), jax.random.key(0))(w)

    P = jax.sharding.PartitionSpec  # noqa: N806
    kind = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("d",), kind, devices=jax.devices()[:2])
    on_two = jax.shard_map(
        functools.partial(inverse, axis_name="d"),
        mesh=mesh,
        in_specs=(P(), P("d")),
        out_specs=P(),
        check_vma=check_vma,
    )
    # One output, and signs that depend on the case alone: both are exact.
    found, truth = quick_jit(on_two)(w, (x, t)), quick_jit(inverse)(w, (x, t))
    np.testing.assert_allclose(found, truth, rtol=1e-10)
