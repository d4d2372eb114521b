"""Faults that can be seen while the program is built: one clear error each.

It names the argument, what came, and what to do. `docs/faults.md` has the table.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hfjax
from hfjax import losses

pytestmark = pytest.mark.every

F32 = jnp.float32
PARAMS = {"b": jnp.zeros(2, F32), "w": jnp.full((3, 2), 0.1, F32)}
X, T = jnp.ones((4, 3), F32), jnp.zeros((4, 2), F32)
LABELS = jnp.array([0, 1, 1, 0])


def model_fn(params, x):
    return jnp.tanh(x @ params["w"]) + params["b"][None]


OBJECTIVE = hfjax.Objective(model_fn, losses.squared_error())
TX = hfjax.hessian_free(OBJECTIVE)


@pytest.mark.parametrize(
    ("leaf", "came"),
    [
        (jnp.arange(3), r"int32\[3\]|int64\[3\]"),
        (jnp.array(True), r"bool\[\]"),
        (jax.random.key(0), "key<fry>"),
        (jnp.zeros(2, jnp.complex64), r"complex64\[2\] .*real and imaginary parts"),
        ("adam", "str"),
        (3, "int"),
    ],
)
@pytest.mark.parametrize("call", ["init", "value", "value_and_grad", "ggn"])
def test_a_parameter_that_is_no_real_float_is_named(leaf, came, call):
    params = {**PARAMS, "step": leaf}
    calls = {
        "init": lambda: TX.init(params),
        "value": lambda: OBJECTIVE.value(params, (X, T)),
        "value_and_grad": lambda: OBJECTIVE.value_and_grad(params, (X, T)),
        "ggn": lambda: hfjax.curvature.ggn(OBJECTIVE, params, (X, T)),
    }
    with pytest.raises(TypeError, match=rf"`params` .* got ({came}).*") as error:
        calls[call]()
    assert "params['step']" in str(error.value)


def update(*, grads=PARAMS, state=None, batch=(X, T), tx=TX, **extra):
    state = tx.init(PARAMS) if state is None else state
    return tx.update(grads, state, PARAMS, batch=batch, **extra)


@pytest.mark.parametrize(
    ("grads", "error", "words"),
    [
        ({"w": PARAMS["w"]}, ValueError, r"`grads` must be a tree like `params`"),
        ([PARAMS["b"], PARAMS["w"]], ValueError, "`grads` must be a tree .* got list"),
        ({"b": None, "w": None}, ValueError, "`grads` must be a tree like `params`"),
        ((jnp.zeros(()), PARAMS), ValueError, "without the value"),
        (
            {**PARAMS, "b": jnp.zeros(3)},
            ValueError,
            r"got grads\['b'\] of shape \(3,\) for \(2,\)",
        ),
        (
            jax.tree.map(lambda g: g.astype(jnp.int32), PARAMS),
            TypeError,
            r"`grads` must be real floats, got int32\[2\] at grads\['b'\]",
        ),
    ],
)
def test_a_gradient_of_other_parameters_is_named(grads, error, words):
    with pytest.raises(error, match=words) as raised:
        update(grads=grads)
    # The value before it is mentioned where a pair came.
    assert ("value_and_grad" in str(raised.value)) == isinstance(grads, tuple)


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        (TX.init(PARAMS)._asdict(), TypeError, "got dict.* template"),
        (optax.adam(1.0).init(PARAMS), TypeError, "`tx.init.params.`.* got tuple"),
        (TX.init({"w": PARAMS["w"]}), ValueError, "`state.direction` .* other param"),
        (
            TX.init({**PARAMS, "b": jnp.zeros(5)}),
            ValueError,
            r"state.direction\['b'\] of shape \(5,\) for \(2,\)",
        ),
    ],
)
def test_a_state_of_something_else_is_named(state, error, words):
    with pytest.raises(error, match=words):
        update(state=state)


@pytest.mark.slow
def test_random_numbers_need_nothing_of_the_state():
    estimate = hfjax.diagonals.ggn_rademacher
    random = hfjax.hessian_free(
        OBJECTIVE, preconditioner=hfjax.preconditioners.diagonal(estimate)
    )
    _, state = update(tx=random, state=TX.init(PARAMS))
    assert state.count == 1


@pytest.mark.parametrize("name", ["batch", "eval_batch"])
@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (X, ValueError, r"must be \(inputs, targets\)"),
        ({"x": X, "t": T}, ValueError, "got dict"),
        ((X, T, None, None), ValueError, "got tuple of 4 parts"),
        ((X, T[:3]), ValueError, "must lead with the same number of cases"),
        ((X[:0], T[:0]), ValueError, "holds no cases"),
        ((X, T, jnp.ones((3, 1))), ValueError, r"weights must have shape \(4,\)"),
        ((X, T, jnp.ones(4) * 1j), TypeError, "be real, got complex"),
        (
            ([[1.0] * 3] * 4, T),
            TypeError,
            r"got float at inputs\[0\]\[0\].*jnp.asarray",
        ),
        ((np.array(["a"] * 4), T), TypeError, "array of numbers, got <U1 at inputs"),
    ],
)
def test_bad_data_are_named(name, data, error, words):
    given = {"batch": (X, T), name: data}
    with pytest.raises(error, match=words) as raised:
        update(**given)
    assert f"`{name}`" in str(raised.value)


OUTPUTS = {
    "nothing": (lambda p, x: None, TypeError, "got None: is a `return` missing"),
    "a pair": (lambda p, x: (x @ p["w"], 1), TypeError, r"got int at outputs\[1\]"),
    "integers": (
        lambda p, x: (x @ p["w"]).astype(jnp.int32),
        TypeError,
        "real floats.* got int32 at outputs",
    ),
    "complex": (lambda p, x: 1j * (x @ p["w"]), TypeError, "got complex"),
    "a sum": (lambda p, x: jnp.sum(x @ p["w"]), ValueError, "keep the case axis first"),
    "a mean": (lambda p, x: jnp.mean(x @ p["w"], 0), ValueError, r"\(2,\) for 4 cases"),
    "a dict": (
        lambda p, x: {"z": x @ p["w"]},
        ValueError,
        "`targets` must be a tree like what `model_fn` returns",
    ),
    "another shape": (
        lambda p, x: x @ p["w"][:, :1],
        ValueError,
        r"`targets` must have shape \[1\] a case, .* got \[2\]: .*broadcast",
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("call", ["value_and_grad", "ggn", "update"])
def test_a_model_that_returns_the_wrong_thing_is_told_so(name, call):
    model_fn, error, words = OUTPUTS[name]
    objective = hfjax.Objective(model_fn, losses.squared_error())
    calls = {
        "value_and_grad": lambda: objective.value_and_grad(PARAMS, (X, T)),
        "ggn": lambda: hfjax.curvature.ggn(objective, PARAMS, (X, T))(PARAMS),
        "update": lambda: update(tx=hfjax.hessian_free(objective)),
    }
    with pytest.raises(error, match=words):
        calls[call]()


def test_a_batch_of_another_shape_than_the_parameters_is_told_beside_them():
    with pytest.raises(TypeError) as error:
        OBJECTIVE.value_and_grad(PARAMS, (jnp.ones((4, 5), F32), T))
    (note,) = [note for note in error.value.__notes__ if "hfjax" in note]
    assert "`model_fn(params, inputs)`" in note
    assert "['w'] float32[3,2]" in note
    assert "inputs float32[4,5]" in note


def test_a_model_of_swapped_arguments_is_told_what_it_was_called_with():
    objective = hfjax.Objective(lambda x, params: x @ params["w"], lambda z, t: z - t)
    with pytest.raises(TypeError) as error:
        objective.value(PARAMS, (X, T))
    assert any("`model_fn(params, inputs)`" in n for n in error.value.__notes__)


def test_a_loss_that_fails_is_told_what_it_was_called_with():
    def loss(outputs, targets):
        return jnp.dot(outputs, targets)

    with pytest.raises(TypeError) as error:
        hfjax.Objective(model_fn, loss).value(PARAMS, (X, T))
    (note,) = [note for note in error.value.__notes__ if "hfjax" in note]
    assert "outputs float32[4,2], targets float32[4,2]" in note


@pytest.mark.parametrize(
    ("loss", "targets", "error", "words"),
    [
        ("softmax_cross_entropy", LABELS, ValueError, r"must have shape \[2\] a case"),
        (
            "softmax_cross_entropy_with_integer_labels",
            T,
            ValueError,
            r"must have shape \[\] a case, for outputs of shape \[2\] a case, got \[2\]",
        ),
        (
            "softmax_cross_entropy_with_integer_labels",
            LABELS.astype(jnp.float32),
            TypeError,
            "integer labels, got float32.* `softmax_cross_entropy`",
        ),
    ],
)
def test_targets_of_the_wrong_kind_are_named(loss, targets, error, words):
    objective = hfjax.Objective(model_fn, getattr(losses, loss)())
    with pytest.raises(error, match=words):
        objective.value(PARAMS, (X, targets))


TREES = {
    "None among them": {"w": jnp.full((3, 2), 0.1), "none": None},
    "a Python float": {"w": jnp.full((3, 2), 0.1), "s": 1.0},
    "a scalar array": {"w": jnp.full((3, 2), 0.1), "s": jnp.array(1.0)},
    "NumPy arrays": {"w": np.full((3, 2), 0.1, np.float32)},
    "an empty leaf": {"w": jnp.full((3, 2), 0.1), "e": jnp.zeros((0, 3))},
    "mixed dtypes": {"w": jnp.full((3, 2), 0.1, jnp.bfloat16), "s": jnp.float16(1.0)},
    "a tuple of tuples": ((jnp.full((3, 2), 0.1),), ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TREES)
def test_any_tree_of_real_floats_is_trained(name):
    def model_fn(params, x):
        leaves = {leaf.shape: leaf for leaf in jax.tree.leaves(params)}
        return x @ leaves[3, 2] * leaves.get((), 1)

    params = TREES[name]
    objective = hfjax.Objective(model_fn, losses.squared_error())
    tx = hfjax.hessian_free(objective, preconditioner=None)
    batch = (X, T + 1)
    _, grads = objective.value_and_grad(params, batch)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, batch=batch)
    after = optax.apply_updates(params, updates)
    assert state.info.accepted
    assert objective.value(after, batch) < objective.value(params, batch)
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        assert new.shape == jnp.shape(old)
        assert new.dtype == jnp.asarray(old).dtype


@pytest.mark.parametrize("params", [{}, {"e": jnp.zeros((0, 2))}])
def test_nothing_to_train_is_a_zero_gradient(params):
    objective = hfjax.Objective(lambda p, x: x[:, :2], losses.squared_error())
    tx = hfjax.hessian_free(objective)
    updates, state = tx.update(params, tx.init(params), params, batch=(X, T))
    assert int(state.info.rejection) == hfjax.Rejection.ZERO_GRADIENT
    assert jax.tree.structure(updates) == jax.tree.structure(params)
