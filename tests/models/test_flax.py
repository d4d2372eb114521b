"""In loops of Flax, nnx and linen, and of Equinox: each trains."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from reference import assert_close, quick_jit

import hfjax

nnx = pytest.importorskip("flax.nnx")
flax = pytest.importorskip("hfjax.flax")

SQUARED_ERROR = hfjax.losses.squared_error()
SOLVER = hfjax.cg.conjugate_gradient(max_iterations=10)


@pytest.fixture(autouse=True)
def allow_rank_promotion():
    """Flax adds its biases so."""
    with jax.numpy_rank_promotion("allow"):
        yield


def make_batch(cases=30):
    x = jax.random.uniform(jax.random.key(0), (cases, 2), jnp.float32)
    return x, jnp.sin(3 * x[:, :1])


def optimizer_of(objective, init=0.1):
    damping = hfjax.damping.levenberg_marquardt(init=init)
    return hfjax.hessian_free(
        objective, solver=SOLVER, damping=damping, preconditioner=None
    )


def train(objective, params, batches):
    """Return f on each batch before its update, and the last parameters."""
    tx = optimizer_of(objective)
    step = quick_jit(functools.partial(training.train_step, objective, tx))
    state, values = tx.init(params), []
    for batch in batches:
        params, state = step(params, state, batch)
        assert state.info.accepted
        values.append(state.info.value_before)
    return values, params


class Network(nnx.Module):
    """A layer, batch normalisation, dropout, a layer."""

    def __init__(self, rngs, rate=0.0):
        self.hidden = nnx.Linear(2, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.out = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(jnp.tanh(self.norm(self.hidden(x)))))


@pytest.mark.slow
def test_nnx_optimizer_hands_the_batch_on():
    model = nnx.Sequential(
        nnx.Linear(2, 5, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(5, 1, rngs=nnx.Rngs(1))
    )
    objective = hfjax.Objective(flax.nnx_model_fn(model), SQUARED_ERROR)
    batch = make_batch()
    tx = optimizer_of(objective, init=1.0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        params = nnx.state(model, nnx.Param)
        value, grads = objective.value_and_grad(params, batch)
        optimizer.update(model, grads, batch=batch)
        return value

    params = nnx.state(model, nnx.Param)
    updates, _ = training.one_update(objective, tx, params, batch)
    expected = objective.value(optax.apply_updates(params, updates), batch)
    # These change the model, and `params` with it, in place.
    values = [step(model, optimizer) for _ in range(3)]
    assert values[2] < values[1] < values[0]
    np.testing.assert_allclose(values[1], expected, rtol=1e-5)
    # The state inside is read as any other.
    read = hfjax.diagnostics.scalars(optimizer.opt_state)
    assert read["count"] == 3
    assert read["value_before"] == pytest.approx(float(values[2]))


@pytest.mark.slow
def test_batch_normalisation_trains_on_its_running_statistics():
    model = Network(nnx.Rngs(0))
    model(5 + make_batch()[0])  # Statistics that are not those it starts with.
    model.eval()
    model_fn = flax.nnx_model_fn(model)
    params = nnx.state(model, nnx.Param)
    x, t = make_batch()
    # A case's outputs do not depend on the others: the mean over cases is f.
    np.testing.assert_allclose(model_fn(params, x)[:1], model_fn(params, x[:1]))
    np.testing.assert_array_equal(model_fn(params, x), model(x))
    values, params = train(
        hfjax.Objective(model_fn, SQUARED_ERROR), params, [(x, t)] * 3
    )
    assert values[2] < values[1] < values[0]
    assert "mean" not in params["norm"]


def test_batch_normalisation_in_training_mode_is_refused():
    model = Network(nnx.Rngs(0))
    objective = hfjax.Objective(flax.nnx_model_fn(model), SQUARED_ERROR)
    words = r"\['norm'\]\['mean'\].*model\.eval\(\).*`whole_batch=True`"
    with pytest.raises(ValueError, match=words):
        objective.value(nnx.state(model, nnx.Param), make_batch())


def test_a_key_for_each_case_and_a_whole_batch_are_not_asked_for_together():
    with pytest.raises(ValueError, match="one case at a time, and `whole_batch`"):
        flax.nnx_model_fn(Network(nnx.Rngs(0)), per_case_keys=True, whole_batch=True)


@pytest.mark.slow
def test_dropout_draws_by_the_key_of_each_case_and_trains():
    model = Network(nnx.Rngs(0), rate=0.5)
    model.norm.use_running_average = True
    model_fn = flax.nnx_model_fn(model, per_case_keys=True)
    params = nnx.state(model, nnx.Param)
    x, t = make_batch()
    keys = jax.random.split(jax.random.key(1), 30)
    outputs = quick_jit(model_fn)(params, (x, keys))
    # A case has the same mask in whatever company, and each another.
    order = jnp.arange(30)[::-1]
    turned = quick_jit(model_fn)(params, (x[order], keys[order]))
    np.testing.assert_allclose(turned[order], outputs, rtol=1e-6)
    same = quick_jit(model_fn)(params, (jnp.broadcast_to(x[:1], x.shape), keys))
    assert len(np.unique(same)) > 20
    # The mean over many masks is what the module gives without.
    many = jax.random.split(jax.random.key(2), 30 * 400).reshape(400, 30)
    mean = quick_jit(
        lambda p: jax.lax.map(lambda k: model_fn(p, (x, k)), many).mean(0)
    )(params)
    model.dropout.deterministic = True
    error = np.abs(mean - model(x))
    assert np.max(error) < 5 * np.std(same) / 20
    model.dropout.deterministic = False

    batches = [((x, jax.random.split(jax.random.key(i), 30)), t) for i in range(6)]
    values, _ = train(hfjax.Objective(model_fn, SQUARED_ERROR), params, batches)
    assert values[-1] < 0.5 * values[0]


def test_dropout_of_one_mask_for_all_updates_is_refused():
    model = Network(nnx.Rngs(0), rate=0.5)
    model.norm.use_running_average = True
    objective = hfjax.Objective(flax.nnx_model_fn(model), SQUARED_ERROR)
    with pytest.raises(ValueError, match=r"dropout mask.*per_case_keys=True"):
        objective.value(nnx.state(model, nnx.Param), make_batch())


def test_streams_of_other_names_are_drawn_independently_in_a_case():
    class Noisy(nnx.Module):
        def __init__(self):
            self.one = nnx.RngStream(0, tag="one")
            self.other = nnx.RngStream(1, tag="other")

        def __call__(self, x):
            draws = [jax.random.normal(s(), (1,)) for s in (self.one, self.other)]
            return jnp.stack(draws, axis=1) + x

    model_fn = flax.nnx_model_fn(Noisy(), per_case_keys=True)
    keys = jax.random.split(jax.random.key(0), 5)
    draws = model_fn(nnx.State({}), (jnp.zeros((5, 2)), keys))
    assert len(np.unique(draws)) == 10


def test_frozen_parameters_stay_and_the_rest_trains():
    model = Network(nnx.Rngs(0))
    model.eval()
    wrt = nnx.All(nnx.Param, nnx.PathContains("out"))
    model_fn = flax.nnx_model_fn(model, wrt)
    objective = hfjax.Objective(model_fn, SQUARED_ERROR)
    optimizer = nnx.Optimizer(model, optimizer_of(objective), wrt=wrt)
    batch = make_batch()
    before = jax.tree.map(lambda x: x, nnx.state(model))
    value, grads = objective.value_and_grad(nnx.state(model, wrt), batch)
    nnx.jit(lambda model, optimizer: optimizer.update(model, grads, batch=batch))(
        model, optimizer
    )
    after = nnx.state(model)
    assert objective.value(nnx.state(model, wrt), batch) < value
    changed = {
        path[0].key
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(before),
            jax.tree.leaves(after),
            strict=True,
        )
        if np.any(old != new)
    }
    assert changed == {"out"}


def test_what_is_frozen_is_as_it_was_when_the_function_was_made():
    model = Network(nnx.Rngs(0))
    model.eval()
    model_fn = flax.nnx_model_fn(model)
    params = jax.tree.map(lambda x: x, nnx.state(model, nnx.Param))
    x, _ = make_batch()
    before = model_fn(params, x)
    model.norm.mean[...] = jnp.full(8, 7.0)
    np.testing.assert_array_equal(model_fn(params, x), before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_recurrent_layers_of_flax_train(kind):
    # Three steps, the last state read out.
    x = jax.random.normal(jax.random.key(0), (20, 3, 2), jnp.float32)
    batch = (x, x[:, 0, :1])
    if kind == "nnx":
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(
            nnx.RNN(nnx.GRUCell(2, 4, rngs=rngs), rngs=rngs),
            nnx.Linear(4, 1, rngs=rngs),
        )
        model_fn = flax.nnx_model_fn(model, call=lambda model, x: model(x)[:, -1])
        params = nnx.state(model, nnx.Param)
    else:
        model = nn.Sequential([nn.RNN(nn.OptimizedLSTMCell(4)), nn.Dense(1)])
        params = model.init(jax.random.key(0), x)

        def model_fn(params, x):
            return model.apply(params, x)[:, -1]

    values, _ = train(hfjax.Objective(model_fn, SQUARED_ERROR), params, [batch] * 8)
    assert values[-1] < 0.1 * values[0]


class LinenNetwork(nn.Module):
    """The same in linen."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(use_running_average=True)(nn.Dense(8)(x))
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=not train)(jnp.tanh(x)))


@pytest.mark.slow
def test_train_state_hands_both_batches_on():
    module = LinenNetwork()
    # Two programs are compared: in float32 ten iterations tell them apart.
    x, t = jax.tree.map(jnp.float64, make_batch())
    keys = jax.random.split(jax.random.key(1), 30)
    variables = jax.tree.map(jnp.float64, module.init(jax.random.key(0), x))
    statistics = {"batch_stats": variables["batch_stats"]}

    def model_fn(params, inputs):
        def case(x, key):
            return module.apply(
                {"params": params, **statistics},
                x[None],
                train=True,
                rngs={"dropout": key},
            )[0]

        return jax.vmap(case)(*inputs)

    objective = hfjax.Objective(model_fn, SQUARED_ERROR)
    tx = optimizer_of(objective)
    state = flax.TrainState.create(
        apply_fn=module.apply, params=variables["params"], tx=tx
    )
    batch, other = (((x, keys), t)), ((x[:7], keys[:7]), t[:7])
    value, grads = objective.value_and_grad(state.params, batch)

    @quick_jit
    def step(state, grads):
        return state.apply_gradients(grads=grads, batch=batch, eval_batch=other)

    new = step(state, grads)
    updates, _ = training.one_update(
        objective, tx, state.params, batch, grads=grads, eval_batch=other
    )
    expected = optax.apply_updates(state.params, updates)
    assert_close(new.params, expected, rtol=1e-6)
    assert objective.value(new.params, batch) < value
    assert new.tx is tx
    assert new.step == 1


def test_train_state_replaces_fields_and_serves_optimizers_that_need_no_batch():
    state = flax.TrainState.create(
        apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.5)
    )
    state = state.apply_gradients(grads={"w": jnp.ones(2)}, batch=(), apply_fn=len)
    np.testing.assert_array_equal(state.params["w"], 0.5)
    assert state.apply_fn is len


def test_train_state_without_a_batch_says_so():
    params = {"w": jnp.ones(2)}
    objective = hfjax.Objective(lambda p, x: x @ p["w"], SQUARED_ERROR)
    state = flax.TrainState.create(
        apply_fn=None, params=params, tx=optimizer_of(objective)
    )
    with pytest.raises(TypeError, match="`batch` is missing"):
        state.apply_gradients(grads=params)


def test_a_linen_module_is_no_nnx_module():
    with pytest.raises(TypeError, match=r"nnx module, got LinenNetwork.*apply"):
        flax.nnx_model_fn(LinenNetwork())


@pytest.mark.slow
def test_the_part_of_an_equinox_model_that_is_trained_trains():
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(2, 1, 8, 1, jnp.tanh, key=jax.random.key(0))
    trained = jax.tree.map(equinox.is_inexact_array, model)
    trained = equinox.tree_at(lambda m: m.layers[0].bias, trained, replace=False)
    params, frozen = equinox.partition(model, trained)

    def model_fn(params, x):
        return jax.vmap(equinox.combine(params, frozen))(x)

    objective = hfjax.Objective(model_fn, SQUARED_ERROR)
    values, params = train(objective, params, [make_batch()] * 3)
    assert values[2] < values[1] < values[0]
    assert params.layers[0].bias is None


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.drop(jnp.ones_like(x))


class Stack(nnx.Module):
    def __init__(self, rngs):
        make = nnx.split_rngs(splits=3)(nnx.vmap(Block, axis_size=3))
        self.blocks = make(rngs)

    def __call__(self, x):
        return nnx.scan(lambda x, block: (block(x), None))(x, self.blocks)[0]


class Called(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.drop = nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.5)

    def __call__(self, x, rngs=None):
        return self.drop(jnp.ones_like(self.linear(x)), rngs=rngs)


@pytest.mark.slow
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("make", [Stack, Called])
def test_a_case_draws_masks_by_its_own_key(make, raw):
    """In a scanned stack, each block another; in a module that takes `rngs`, too."""
    module, x = make(nnx.Rngs(0)), jnp.zeros((6, 4))
    keys = jax.random.split(jax.random.key(1), 6)
    given = jax.random.key_data(keys) if raw else keys
    model_fn = jax.jit(flax.nnx_model_fn(module, per_case_keys=True))
    params = nnx.state(module, nnx.Param)
    masks = np.asarray(model_fn(params, (x, given)))
    np.testing.assert_array_equal(masks, model_fn(params, (x, given)))
    alone = model_fn(params, (x[2:4], given[2:4]))
    np.testing.assert_array_equal(masks[2:4], alone)
    assert len(np.unique(masks, axis=0)) > 1
    # A block adds 0 or 2: were all masks the same, 0 or 6 would come out, nothing else.
    expected = {0.0, 2.0, 4.0, 6.0} if make is Stack else {0.0, 2.0}
    assert set(np.unique(masks)) == expected
