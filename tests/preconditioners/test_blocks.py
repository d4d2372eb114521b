"""A kernel of blocks, or with axes in any order, has the factors of its plain twin."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from mapped import axis_name, needs_devices, run
from problems import Problem, normal
from reference import nearest_product, quick_jit

import hfjax
from hfjax._tracing import programs
from hfjax.curvature import probes
from hfjax.objectives.plain import terms_of
from hfjax.preconditioners import _factors

RNG = np.random.default_rng(2)
SEQUENCE, IMAGE = normal(RNG, 6, 5, 4), normal(RNG, 6, 5, 4, 2)
ROW = jnp.asarray([[0.5, 1.0, 2.0, 4.0]])
KEY = jax.random.key(1)


@pytest.fixture(autouse=True)
def allow_rank_promotion():
    """Biases are added as users add them."""
    with jax.numpy_rank_promotion("allow"):
        yield


def layer(h, p):
    return jnp.tanh(h @ p["w"] + p["b"])


def scanned(params, x):
    body = jax.checkpoint(lambda h, p: (layer(h, p), None))
    return jax.lax.scan(body, x, params)[0]


def each(tree):
    """Return the blocks of a tree as separate trees."""
    leaves, structure = jax.tree.flatten(tree)
    return [structure.unflatten(block) for block in zip(*leaves, strict=True)]


def unrolled(params, x):
    for p in params:
        x = layer(x, p)
    return x


def convolved(params, x, order="HWIO", **options):
    numbers = ("NHWC", order, "NHWC")
    y = jax.lax.conv_general_dilated(
        x, params["k"], (1, 1), "SAME", dimension_numbers=numbers, **options
    )
    return y + params["b"]


def halves(params, x):
    own = [convolved(p, x[..., n : n + 1]) for n, p in enumerate(params)]
    return jnp.concatenate(own, axis=-1)


def tokens(x):
    """Return indices from 0 to 4 of 7, so that two are never looked up."""
    return jnp.clip(2 + 2 * x[..., 0], 0, 4).astype(int)


def gates(cell):
    return nn.RNN(cell(3, param_dtype=float))


def modes(params, x):
    """A complex product for each mode, as in Fourier layers."""
    kernel = jax.lax.complex(params["re"], params["im"])
    z = jnp.einsum("ntd,tdk->ntk", x * jnp.exp(1j * x), kernel)
    return jnp.stack([z.real, z.imag], axis=1)


def modes_in_real_numbers(params, x):
    def product(x, p):
        return jnp.einsum("ntd,tdk->ntk", x, p)

    re, im, c, s = params["re"], params["im"], x * jnp.cos(x), x * jnp.sin(x)
    real = product(c, re) - product(s, im)
    return jnp.stack([real, product(s, re) + product(c, im)], axis=1)


def branch(params, x):
    def other(x, params):  # That is not taken.
        return jnp.sin(x @ params["w"] + params["b"])

    return jax.lax.cond(jnp.max(x) > 100, other, layer, x, params)


def same(params):
    return params


# A model, its parameters and inputs; the same model with plain kernels, and how the
# parameters become its own.
TWINS = {
    "stack": (
        scanned,
        {"w": normal(RNG, 3, 4, 4), "b": normal(RNG, 3, 4)},
        SEQUENCE,
        unrolled,
        each,
    ),
    "experts": (
        lambda p, x: jnp.einsum("nej,ejk->nek", x, p["w"]) + p["b"],
        {"w": normal(RNG, 5, 4, 3), "b": normal(RNG, 5, 3)},
        SEQUENCE,
        lambda ps, x: jnp.stack(
            [x[:, n] @ p["w"] + p["b"] for n, p in enumerate(ps)], axis=1
        ),
        each,
    ),
    "groups": (
        lambda p, x: convolved(p, x, feature_group_count=2),
        {"k": normal(RNG, 3, 2, 1, 4), "b": normal(RNG, 4)},
        IMAGE,
        halves,
        lambda p: [
            {"k": p["k"][..., half], "b": p["b"][half]}
            for half in (slice(0, 2), slice(2, 4))
        ],
    ),
    "heads": (
        lambda p, x: jnp.einsum("ntd,hdk->nhtk", x, p["w"]) + p["b"],
        {"w": normal(RNG, 2, 4, 3), "b": normal(RNG, 2, 1, 3)},
        SEQUENCE,
        lambda p, x: jnp.moveaxis((x @ p["w"] + p["b"]).reshape(-1, 5, 2, 3), 2, 1),
        lambda p: {"w": jnp.moveaxis(p["w"], 0, 1).reshape(4, 6), "b": p["b"].ravel()},
    ),
    "units_first": (
        lambda p, x: convolved(p, x, "OIHW"),
        {"k": normal(RNG, 3, 2, 3, 2), "b": normal(RNG, 3)},
        IMAGE,
        convolved,
        lambda p: {"k": p["k"].transpose(2, 3, 1, 0), "b": p["b"]},
    ),
    "embedding": (
        lambda p, x: jnp.tanh(p["w"][tokens(x)] @ p["v"]),
        {"w": normal(RNG, 7, 3), "v": normal(RNG, 3, 2)},
        SEQUENCE,
        lambda p, x: jnp.tanh(
            jax.nn.one_hot(tokens(x), 7, dtype=float) @ p["w"] @ p["v"]
        ),
        lambda p: p,
    ),
    "basis_functions_last": (
        lambda p, x: jnp.einsum("nig,oig->no", x, p["w"]),
        {"w": normal(RNG, 3, 5, 4)},
        SEQUENCE,
        lambda p, x: x.reshape(len(x), -1) @ p["w"],
        lambda p: {"w": p["w"].reshape(3, -1).T},
    ),
    "concatenated_gates": (
        gates(nn.OptimizedLSTMCell).apply,
        gates(nn.LSTMCell).init(KEY, SEQUENCE),
        SEQUENCE,
        gates(nn.LSTMCell).apply,
        same,
    ),
    "scaled": (
        lambda p, x: jnp.tanh(x @ (p["w"] * ROW.T) + p["b"]) @ (p["v"] / ROW * 3),
        {"w": normal(RNG, 4, 3), "b": normal(RNG, 3), "v": normal(RNG, 3, 4)},
        SEQUENCE,
        lambda p, x: jnp.tanh((x * ROW) @ p["w"] + p["b"]) @ p["v"] * (3 / ROW),
        same,
    ),
    "branches": (
        branch,
        {"w": normal(RNG, 4, 3), "b": normal(RNG, 3)},
        SEQUENCE,
        lambda p, x: layer(x, p),
        same,
    ),
    "complex": (
        modes,
        {"re": normal(RNG, 5, 4, 3), "im": normal(RNG, 5, 4, 3)},
        SEQUENCE,
        modes_in_real_numbers,
        same,
    ),
}


def objective_of(model_fn):
    return hfjax.Objective(model_fn, hfjax.losses.squared_error())


def batch_of(model_fn, params, x):
    shape = jax.eval_shape(model_fn, params, x).shape
    rng = np.random.default_rng(3)
    return x, normal(rng, *shape), jnp.asarray(rng.uniform(0.5, 2.0, len(x)))


@pytest.mark.parametrize("name", TWINS)
def test_blocks_are_preconditioned_as_separate_kernels_are(name):
    model_fn, params, x, twin, split = TWINS[name]
    batch = batch_of(model_fn, params, x)
    # A tree of λ, so that blocks would differ if each were damped by its own.
    r = jax.tree.map(lambda p: normal(np.random.default_rng(p.size), *p.shape), params)

    def solved(model_fn, params, r):
        """Solve by factors that are built, and by those that a state remembers."""
        known = (objective_of(model_fn), params, batch, jnp.float64(0.3), KEY)
        first = hfjax.preconditioners.kronecker().build(*known)(r)
        if name == "groups":  # For which a state has no space.
            return (first,)
        rule = hfjax.preconditioners.kronecker(interval=2)
        memory = rule.init(params)
        for count in range(2):
            apply, memory = rule.build(*known, memory, jnp.int32(count))
        return first, apply(r)

    ours = quick_jit(lambda: solved(model_fn, params, r))()
    theirs = quick_jit(lambda: solved(twin, split(params), split(r)))()
    for one, other in zip(map(split, ours), theirs, strict=True):
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        for x, y in pairs:
            np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-12)


def test_a_kernel_that_a_state_has_no_space_for_has_the_diagonal_and_says_so():
    model_fn, params, x = TWINS["groups"][:3]
    objective, batch = objective_of(model_fn), batch_of(model_fn, params, x)
    (kept,) = _factors.read(objective, params, batch, 8192, stored=True)
    assert kept.others[1] == "the state has no space for its factors"
    (built,) = _factors.read(objective, params, batch, 8192)
    assert not built.others


@pytest.mark.slow
def test_a_scanned_model_and_its_unrolled_twin_take_the_same_steps():
    model_fn, params, x, twin, split = TWINS["stack"]
    batch = batch_of(model_fn, params, x)

    def trained(model_fn, params):
        objective = objective_of(model_fn)
        tx = hfjax.hessian_free(objective)

        @jax.jit
        def step(params, state):
            _, grads = objective.value_and_grad(params, batch)
            updates, state = tx.update(grads, state, params, batch=batch)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for _ in range(3):
            params, state = step(params, state)
        return params

    ours, theirs = split(trained(model_fn, params)), trained(twin, split(params))
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_program_does_not_grow_with_the_depth_of_a_stack():
    def length(depth):
        params = {"w": jnp.ones((depth, 4, 4)), "b": jnp.ones((depth, 4))}
        batch = (SEQUENCE, SEQUENCE)
        objective = objective_of(scanned)

        def solve(params, r):
            rule = hfjax.preconditioners.kronecker()
            return rule.build(objective, params, batch, jnp.float64(0.3), KEY)(r)

        program = jax.make_jaxpr(solve)(params, params)
        return sum(1 for _ in programs.equations_of(program))

    assert length(12) == length(2)


@pytest.mark.parametrize("looked_up", [False, True])
def test_a_tied_kernel_has_the_trace_of_both_products_and_shares_of_their_factors(
    looked_up,
):
    w = normal(RNG, 7, 3)
    x = SEQUENCE @ normal(RNG, 4, 7)

    def model_fn(params, x, added=(0.0, 0.0)):
        h = params["w"][tokens(x)] if looked_up else x @ params["w"]
        h = jnp.tanh(h + added[0])
        return h @ params["w"].T + added[1]

    f, batch = objective_of(model_fn), batch_of(model_fn, {"w": w}, x)
    (model,) = _factors.read(f, {"w": w}, batch, 8192)
    (term,) = terms_of(f, batch)
    ((pair,), _) = quick_jit(lambda: _factors.factors(term, {"w": w}, model, key=KEY))()
    # The same, with signs and derivatives written out, for each of the two products.
    drawn = probes.probes(term.means, term.cases, KEY)
    keys = drawn.data
    weights = np.asarray(batch[2]) / np.sum(batch[2])
    zeros = (jnp.zeros((6, 5, 3)), jnp.zeros((6, 5, 7)))
    outputs, transpose = jax.vjp(lambda added: model_fn({"w": w}, x, added), zeros)
    signs = jax.vmap(lambda key, z: drawn.signs(key, 0, z))(keys, outputs)
    (errors,) = transpose(signs)
    h = jnp.tanh(w[tokens(x)] if looked_up else x @ w)
    first = jax.nn.one_hot(tokens(x), 7, dtype=float) if looked_up else x

    def gram(rows):
        return np.einsum("n,nti,ntj->ij", weights, rows, rows)

    ours = [(gram(first) / 5, gram(errors[0])), (gram(errors[1]), gram(h) / 5)]
    if looked_up:  # Only the diagonal on the side of the indices.
        ours = [(np.diag(np.diag(v)), d) for v, d in ours]
    inputs, units = nearest_product(ours)
    found = np.diag(pair.inputs) if looked_up else pair.inputs
    np.testing.assert_allclose(found, inputs, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(pair.units, units, rtol=1e-9, atol=1e-12)
    traces = sum(np.trace(v) * np.trace(d) for v, d in ours)
    np.testing.assert_allclose(np.trace(found) * np.trace(pair.units), traces)


def test_a_normalised_kernel_has_the_factors_of_its_product_and_scaled_errors():
    params = {"v": normal(RNG, 4, 3), "gain": 1 + normal(RNG, 3), "b": normal(RNG, 3)}

    def model_fn(params, x, added=0.0):
        lengths = jnp.linalg.norm(params["v"], axis=0)
        h = x @ (params["gain"] * params["v"] / lengths) + params["b"]
        return jnp.tanh(h + added)

    f, batch = objective_of(model_fn), batch_of(model_fn, params, SEQUENCE)
    (model,) = _factors.read(f, params, batch, 8192)
    (term,) = terms_of(f, batch)
    ((pair,), diagonals) = quick_jit(
        lambda: _factors.factors(term, params, model, key=KEY)
    )()
    drawn = probes.probes(term.means, term.cases, KEY)
    zeros = jnp.zeros((6, 5, 3))
    outputs, transpose = jax.vjp(lambda z: model_fn(params, SEQUENCE, z), zeros)
    (errors,) = transpose(
        jax.vmap(lambda k, z: drawn.signs(k, 0, z))(drawn.data, outputs)
    )
    weights = np.asarray(batch[2]) / np.sum(batch[2])
    scale = np.asarray(params["gain"] / np.linalg.norm(params["v"], axis=0))

    def gram(rows):
        return np.einsum("n,nti,ntj->ij", weights, rows, rows)

    np.testing.assert_allclose(pair.inputs, gram(SEQUENCE) / 5, rtol=1e-9)
    np.testing.assert_allclose(pair.units, gram(errors * scale), rtol=1e-9)
    # The bias is not scaled: it has the exact diagonal of a shift. So has no gain.
    (place,) = diagonals
    assert place == 0
    squares = np.sum(errors, axis=1) ** 2
    np.testing.assert_allclose(diagonals[place], weights @ squares, rtol=1e-9)


def test_a_long_embedding_has_factors_though_no_other_side_may_be_so_long():
    model_fn, params, x = TWINS["embedding"][:3]
    batch, f = batch_of(model_fn, params, x), objective_of(model_fn)
    found = hfjax.preconditioners.layers(f, params, batch, max_size=3)
    assert found["['w']"] == "factors of 7 inputs and 3 units, at 5 positions"


def test_scales_and_shifts_have_the_diagonal_of_the_dense_matrix():
    def model_fn(p, x):  # One output, so that any sign is as good.
        h = (x + p["place"]) * p["scale"] + p["shift"]
        h = jnp.tanh(h @ p["w"]) * p["gain"] + p["shift"][:1]
        return jnp.sum(h, axis=(1, 2))[:, None]

    params = {
        "place": normal(RNG, 5, 4),
        "scale": normal(RNG, 4),
        "w": normal(RNG, 4, 3),
    }
    params |= {"shift": normal(RNG, 4), "gain": jnp.asarray(0.7)}
    batch = batch_of(model_fn, params, SEQUENCE)

    @quick_jit
    def solve():
        rule, ones = (
            hfjax.preconditioners.kronecker(),
            jax.tree.map(jnp.ones_like, params),
        )
        known = (objective_of(model_fn), params, batch, jnp.float64(0.3), KEY)
        jacobian = jax.jacobian(lambda p: model_fn(p, SEQUENCE)[:, 0])(params)
        return rule.build(*known)(ones), jacobian

    found, jacobian = solve()
    weights = np.asarray(batch[2])
    for name in ("place", "scale", "shift", "gain"):
        squares = np.tensordot(weights, np.asarray(jacobian[name]) ** 2, 1)
        diagonal = squares / weights.sum()
        np.testing.assert_allclose(1 / found[name], diagonal + 0.3, rtol=1e-9)


def test_blocks_are_told():
    params = {"w": jnp.ones((5, 4, 3)), "b": jnp.ones((5, 3))}
    model_fn = TWINS["experts"][0]
    batch = (SEQUENCE, jnp.zeros((6, 5, 3)))
    found = hfjax.preconditioners.layers(objective_of(model_fn), params, batch)
    assert found == {
        "['b']": "bias of ['w']",
        "['w']": "5 blocks with factors of 4 + 1 inputs and 3 units",
    }


@pytest.mark.slow
@needs_devices
@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("experts", "shard_map_check_vma"),
        ("experts", "jit_with_explicit_shardings"),
        ("stack", "vmap"),
        ("stack", "jit_with_explicit_shardings"),
        ("embedding", "shard_map_check_vma"),
        ("scaled", "shard_map_check_vma"),
        ("scaled", "jit_with_explicit_shardings"),
        ("branches", "shard_map_check_vma"),
        ("branches", "jit_with_explicit_shardings"),
        ("embedding", "jit_with_shardings"),  # JAX looks up no rows on explicit axes.
    ],
)
def test_devices_have_the_preconditioner_of_one(name, way):
    model_fn, params, x = TWINS[name][:3]
    x = jnp.concatenate([x, 0.5 * x])  # Twelve cases.
    problem = Problem(
        name, params, model_fn, "squared_error", batch_of(model_fn, params, x)
    )

    def solved(axis, params, batch, r):
        f = problem.objective(axis_name=axis, microbatch_size=2)
        rule = hfjax.preconditioners.kronecker()
        return rule.build(f, params, batch, jnp.float64(0.3), KEY)(r)

    ours = run(way, functools.partial(solved, axis_name(way)), problem)
    alone = quick_jit(functools.partial(solved, None))
    theirs = alone(problem.params, problem.batch, problem.direction)
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
