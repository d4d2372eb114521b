"""Optimizers of other packages, with the settings that they themselves recommend.

They are imported when they are built, so that `compare` works without them.
"""

import contextlib
import importlib
import io
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from benchmarks.first_order import first_order
from benchmarks.harness.machine import Taken, compile_ahead, timed
from benchmarks.harness.race import Carry, Racer
from benchmarks.suites.problem import Problem

SOMAX_RATES = (1.0, 0.1)
"""The default, and that of somax's README."""

KRON_RATES = (1e-2, 1e-3, 3e-4)
"""Its default and the other of rollfast's README, and a larger one."""

_BURN_IN = 5  # batches that K-FAC estimates its factors on before the first update
_WARM = 6  # updates, after which K-FAC has done all that it ever does
_REGISTER: dict[str | None, str] = {
    "sigmoid": "register_sigmoid_cross_entropy_loss",
    "softmax": "register_softmax_cross_entropy_loss",
}
_SOMAX: dict[str | None, str] = {"softmax": "sgn_ce", "squared": "sgn_mse"}

_BatchOf: TypeAlias = Callable[[Carry], tuple[Any, Any]]
"""`carry -> (batch, kept)`."""


def unfit_for_redrawn(problem: Problem) -> str | None:
    """Say why a package that needs the same examples in each update cannot be used."""
    if problem.redraw is None:
        return None
    return "it is set up here for examples that stay the same"


def unfit_for_kfac(problem: Problem) -> str | None:
    """Say why kfac-jax cannot solve a problem."""
    if problem.layered and problem.loss in _REGISTER:
        return None
    return "kfac-jax has no curvature blocks for such a model"


def kfac(problem: Problem, params: Any, seed: int) -> Racer:
    """Build kfac-jax as its example of an autoencoder on MNIST has it.

    All cases in each update, or those that are drawn for it; damping, learning rate and
    momentum adapt. The example's ℓ₂ regularisation is left out: f has none.

    Returns:
      The racer; a step is an update.
    """
    optimizer, key = _kfac_optimizer(problem), jax.random.key(seed)
    batch_of = _batches(problem, params, seed)

    def init(params: Any) -> Carry:
        carry = Carry(params, (), jnp.int32(0), problem.kept)
        state = optimizer.init(params, key, batch_of(carry)[0])
        # Its updates take over the memory of what they are given. All is put where a
        # checkpoint puts it, as updates after one would else be compiled anew.
        carry = carry._replace(params=jax.tree.map(jnp.copy, params), state=state)
        return jax.device_put(carry, jax.devices()[0])

    def step(carry: Carry) -> Carry:
        count = int(carry.updates)
        batch, kept = batch_of(carry)
        # The first update draws batches for the burn-in, and may take their memory.
        first = itertools.chain(_before(batch_of, carry), _copies(batch))
        data = {"batch": batch} if count else {"data_iterator": first}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Some donated buffers")
            params, state, _ = optimizer.step(
                carry.params,
                carry.state,
                jax.random.fold_in(key, count),
                global_step_int=count,
                **data,
            )
        return Carry(params, state, carry.updates + 1, kept)

    def warm() -> Carry:
        carry = init(params)
        for _ in range(_WARM):
            carry = step(carry)
        return carry

    # It compiles as it goes. The second time nothing is left to compile.
    (_, first), (_, second) = timed(warm), timed(warm)
    pairs = zip(first, second, strict=True)
    compiling = Taken(*(max(0.0, a - b) for a, b in pairs))
    structure = jax.tree.structure(init(params).state)

    # Every checkpoint can hold a state's leaves.
    def leaves_of(carry: Carry) -> Carry:
        return carry._replace(state=jax.tree.leaves(carry.state))

    def state_of(carry: Carry) -> Carry:
        return carry._replace(state=jax.tree.unflatten(structure, carry.state))

    return Racer(
        lambda params: leaves_of(init(params)),
        lambda carry: leaves_of(step(state_of(carry))),
        compiling,
    )


def _kfac_optimizer(problem: Problem) -> Any:
    """Build the optimizer with the settings of the example."""
    module = _kfac_jax()
    register = getattr(module, _REGISTER[problem.loss])
    objective = problem.objective

    def loss(params: Any, batch: Any) -> jax.Array:
        inputs, targets = batch
        outputs = objective.model_fn(params, inputs)
        register(outputs, targets)
        return jnp.mean(objective.loss.value(outputs, targets))

    return module.Optimizer(
        jax.value_and_grad(loss),
        l2_reg=0.0,
        inverse_update_period=5,
        damping_adaptation_interval=5,
        num_burnin_steps=_BURN_IN,
        curvature_ema=0.95,
        use_adaptive_damping=True,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        damping_adaptation_decay=0.95,
        initial_damping=150.0,
        min_damping=1e-5,
        max_damping=1000.0,
        multi_device=False,
    )


def kron(problem: Problem, params: Any, seed: int) -> Callable[[float], Racer]:
    """Build PSGD Kron, a Kronecker-factored preconditioner, with rollfast's defaults."""
    module = importlib.import_module("rollfast")

    def optimizer(rate: Any) -> optax.GradientTransformation:
        # A checkpoint holds numbers, and no key of the new kind.
        tx = module.kron(rate, key=jax.random.key_data(jax.random.key(seed)))
        return tx._replace(init=_silent(tx.init))

    return first_order(optimizer, problem, params, seed)


def unfit_for_somax(problem: Problem) -> str | None:
    """Say why somax cannot solve a problem."""
    if problem.loss in _SOMAX:
        return unfit_for_redrawn(problem)
    # Its Newton by conjugate gradients takes any loss, but not negative curvature: on
    # autoencoders f is NaN after the first update.
    return "somax has no Gauss-Newton matrix for such a loss"


def somax(problem: Problem, params: Any, seed: int) -> Callable[[float], Racer]:
    """Build somax's Gauss-Newton by conjugate gradients, as in its README.

    Returns:
      `learning_rate -> racer`; a step is an update.
    """
    preset = getattr(importlib.import_module("somax"), _SOMAX[problem.loss])
    batch = dict(zip("xy", problem.data(seed), strict=True))
    key = jax.random.key(seed)

    def racer(rate: float) -> Racer:
        tx = preset(
            predict_fn=problem.objective.model_fn,
            lam0=1e-2,
            tol=1e-4,
            maxiter=20,
            learning_rate=rate,
        )

        def init(params: Any) -> Carry:
            return Carry(params, tx.init(params), jnp.int32(0))

        def step(carry: Carry, batch: Any) -> Carry:
            its_key = jax.random.fold_in(key, carry.updates)
            params, state, _ = tx.step(carry.params, batch, carry.state, its_key)
            return Carry(params, state, carry.updates + 1)

        return _compiled(init, step, params, batch)

    return racer


def optimistix_lbfgs(problem: Problem, params: Any, seed: int) -> Racer:
    """Build `optimistix.LBFGS` with its defaults: memory 10, backtracking.

    A step is a trial, accepted or not.
    """
    return _optimistix("LBFGS", problem.objective.value, problem, params, seed)


def optimistix_lm(problem: Problem, params: Any, seed: int) -> Racer:
    """Build `optimistix.LevenbergMarquardt` with its defaults: QR of the Jacobian.

    A step is a trial, accepted or not.
    """
    residuals = problem.residuals
    return _optimistix("LevenbergMarquardt", residuals, problem, params, seed)


def unfit_for_lm(problem: Problem) -> str | None:
    """Say why a problem cannot be solved with the whole Jacobian."""
    if problem.residuals is None:
        return "f is not a sum of squares whose Jacobian could be stored"
    return unfit_for_redrawn(problem)


def _optimistix(name: str, fn: Any, problem: Problem, params: Any, seed: int) -> Racer:
    """Build a solver that steps by itself; `fn(params, batch)` is what it minimises."""
    data = problem.data(seed)
    module = importlib.import_module("optimistix")
    equinox = importlib.import_module("equinox")
    solver = getattr(module, name)(rtol=0.0, atol=0.0)

    def f(params: Any, batch: Any) -> tuple[jax.Array, None]:
        return fn(params, batch), None

    tags, options = frozenset(), {}
    shape = jax.eval_shape(fn, params, data)

    def begin(params: Any) -> Any:
        state = solver.init(f, params, data, options, shape, None, tags)
        return equinox.partition(state, equinox.is_array)

    begun, static = begin(params)
    structure = jax.tree.structure(begun)

    def init(params: Any) -> Carry:
        return Carry(params, jax.tree.leaves(begin(params)[0]), jnp.int32(0))

    def step(carry: Carry, batch: Any) -> Carry:
        arrays = jax.tree.unflatten(structure, carry.state)
        state = equinox.combine(arrays, static)
        params, state, _ = solver.step(f, carry.params, batch, options, state, tags)
        leaves = jax.tree.leaves(equinox.filter(state, equinox.is_array))
        return Carry(params, leaves, carry.updates + 1)

    return _compiled(init, step, params, data)


def _kfac_jax() -> Any:
    """Import kfac-jax, and mend what keeps its release from working here.

    Version 0.0.8 expects what JAX returned before 0.9.2; its repository has this as
    below.
    """

    def eval_jaxpr_eqn(eqn: Any, in_values: list[Any]) -> list[Any]:
        output = eqn.primitive.bind(
            *in_values, **eqn.primitive.get_bind_params(eqn.params)
        )
        return output if isinstance(output, list) else [output]

    module = importlib.import_module("kfac_jax")
    if module.__version__ == "0.0.8":
        matcher = importlib.import_module("kfac_jax._src.tag_graph_matcher")
        vars(matcher)["eval_jaxpr_eqn"] = eval_jaxpr_eqn
    return module


def _copies(batch: Any) -> Iterator[Any]:
    return (jax.tree.map(jnp.copy, batch) for _ in itertools.count())


def _batches(problem: Problem, params: Any, seed: int) -> _BatchOf:
    """Return what gives an update's examples, and what the next one keeps of them."""
    data = problem.data(seed)
    if problem.redraw is None:
        return lambda carry: problem.batch(data, carry)
    start = Carry(params, (), jnp.int32(0), problem.kept)
    compiled, _ = compile_ahead(problem.batch, data, start)
    return lambda carry: compiled(data, carry._replace(state=()))


def _before(batch_of: _BatchOf, carry: Carry) -> Iterator[Any]:
    """Give batches for the burn-in: other examples than the updates', if they change."""
    for ahead in range(_BURN_IN):
        earlier = carry._replace(updates=carry.updates - 1 - ahead)
        yield jax.tree.map(jnp.copy, batch_of(earlier)[0])


def _silent(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a function from printing."""

    def quiet(*args: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return fn(*args)

    return quiet


def _compiled(
    init: Callable[[Any], Carry],
    step: Callable[[Carry, Any], Carry],
    params: Any,
    batch: Any,
) -> Racer:
    compiled, taken = compile_ahead(step, init(params), batch)
    return Racer(init, lambda carry: compiled(carry, batch), taken)
