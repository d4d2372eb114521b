"""Use hfjax with Flax: `model_fn` of an nnx module, a train state, recurrent networks.

    model_fn = hfjax.flax.nnx_model_fn(model)            # nnx
    params = nnx.state(model, nnx.Param)

    model_fn = lambda params, x: module.apply({"params": params}, x)       # linen

Needs the extra `flax`, and is not imported by `import hfjax`.

**Batch normalisation.** Either on the running statistics, which an update takes for
constants (`model.eval()`, `use_running_average=True`); or in training mode, on those of the
batch, with `nnx_model_fn(model, whole_batch=True)` or in linen

    def model_fn(params, x):
        variables = {"params": params, "batch_stats": statistics}
        return module.apply(variables, x, train=True, mutable=["batch_stats"])[0]

and `Objective(…, whole_batch=True)`. `docs/changing.md` shows how to update the running
statistics after each step.

**Dropout.** The objective must be a fixed function of the parameters within an update, so
each example brings its own key: `nnx_model_fn(model, per_case_keys=True)`, or in linen

    def model_fn(params, inputs):
        def case(x, key):
            return module.apply({"params": params}, x[None], rngs={"dropout": key})[0]
        return jax.vmap(case)(*inputs)

with `inputs = (x, jax.random.split(key, cases))` and a new `key` for each batch. All
evaluations within an update then use the same dropout masks.
"""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from hfjax._core.types import Batch, Params, Tree
from hfjax.models.recurrent import LinenRecurrentNetwork as LinenRecurrentNetwork
from hfjax.models.recurrent import nnx, nnx_error

if TYPE_CHECKING or nnx is not None:
    from hfjax.models.recurrent import RecurrentNetwork as RecurrentNetwork

    def nnx_model_fn(
        model: nnx.Module,
        wrt: Any = nnx.Param,
        *,
        call: Callable[[Any, Any], Any] | None = None,
        per_case_keys: bool = False,
        whole_batch: bool = False,
    ) -> Callable[[Params, Any], Any]:
        """Make the `model_fn` of an nnx module, for `hfjax.Objective`.

        model_fn(params, inputs) calls the module with `params` in place of
        `nnx.state(model, wrt)`. Everything else in the module is frozen at its present
        value. It becomes a constant of the compiled program, so hundreds of megabytes of
        it compile slowly. The module itself is not changed.

        Args:
          model: the module, already in the mode in which to call it.
          wrt: the variables to train, as in `nnx.Optimizer(model, tx, wrt=wrt)`: a type of
            variable or any nnx filter.
          call: `(model, inputs) -> outputs`; `None` is `model(inputs)`. For structural
            damping use `lambda model, x: model(x, return_hidden=True)`.
          per_case_keys: for dropout: take `(inputs, keys)` as inputs, with one key per
            example, shape `[cases]` (raw keys: `[cases, 2]`). The module is called, under
            `vmap`, on a batch of one example at a time, with its random streams seeded
            from the example's key (split to the shape of the stream, for scanned blocks).
            A module or a `call` with an argument `rngs` receives `nnx.Rngs` of the key.
          whole_batch: for an `Objective` with `whole_batch`: let the module change its
            `nnx.BatchStat` variables, as batch normalisation does in training mode. The
            changes are dropped.

        Returns:
          `(params, inputs) -> outputs`. `params` may be the state, or the pure tree that
          `nnx.Optimizer` passes.

        Raises:
          TypeError: if `model` is not an nnx module.
          ValueError: when the function is traced, if calling the module changes variables
            that are not trained (batch normalisation in training mode, without
            `whole_batch`), or draws the same dropout mask in every update, without
            `per_case_keys`; if both options are set.

        Example:
          Train only the last layer:

          >>> import hfjax, jax, jax.numpy as jnp, optax
          >>> from flax import nnx
          >>> rngs = nnx.Rngs(0)
          >>> model = nnx.Sequential(
          ...     nnx.Linear(2, 9, rngs=rngs), nnx.tanh, nnx.Linear(9, 1, rngs=rngs)
          ... )
          >>> last = nnx.All(nnx.Param, nnx.PathContains(2))
          >>> objective = hfjax.Objective(
          ...     nnx_model_fn(model, last), hfjax.losses.squared_error()
          ... )
          >>> optimizer = nnx.Optimizer(model, hfjax.hessian_free(objective), wrt=last)
          >>> x = jax.random.normal(jax.random.key(0), (20, 2))
          >>> batch = (x, jnp.tanh(x[:, :1]))
          >>> @nnx.jit
          ... def train_step(model, optimizer):
          ...     params = nnx.state(model, last)
          ...     value, grads = objective.value_and_grad(params, batch)
          ...     optimizer.update(model, grads, batch=batch)
          ...     return value
          >>> before, after = (train_step(model, optimizer) for _ in range(2))
          >>> bool(after < before)
          True
        """
        if not isinstance(model, nnx.Module):
            msg = (
                f"`model` must be an nnx module, got {type(model).__name__}. (Of a linen "
                'module: `lambda params, x: module.apply({"params": params}, x)`.)'
            )
            raise TypeError(msg)
        if per_case_keys and whole_batch:
            msg = (
                "`per_case_keys` calls the model on one case at a time, and `whole_batch` "
                "on all of them. Let `model_fn` draw one mask for the batch by itself."
            )
            raise ValueError(msg)
        graph, _, rest = nnx.split(model, wrt, ...)
        # New containers, because the module's own are changed in place.
        frozen = jax.tree.map(lambda x: x, rest)
        tags = _streams(model) if per_case_keys else ()
        run: Callable[..., Any] = call or (
            lambda model, *args, **kw: model(*args, **kw)
        )
        takes_rngs = per_case_keys and _takes_rngs(call or type(model).__call__)

        def apply(params: Params, inputs: Any, key: jax.Array | None) -> Any:
            # Without a copy, a module that counts its random draws would change `frozen`.
            module = nnx.merge(graph, params, frozen, copy=True)
            options: dict[str, Any] = {}
            if key is not None:
                typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
                own: jax.Array = key if typed else jax.random.wrap_key_data(key)
                if takes_rngs:
                    own, called = jax.random.split(own)
                    options = {"rngs": nnx.Rngs(called)}
                keys = dict(zip(tags, jax.random.split(own, len(tags)), strict=True))
                nnx.reseed(module, policy="match_shape", **keys)
            outputs = run(module, inputs, **options)
            dropped = nnx.BatchStat if whole_batch else ()
            _check_unchanged(module, wrt, frozen, dropped, keyed=per_case_keys)
            return outputs

        def model_fn(params: Params, inputs: Any) -> Any:
            if not per_case_keys:
                return apply(params, inputs, None)

            def case(inputs: Tree, key: jax.Array) -> Any:
                alone = jax.tree.map(lambda x: x[None], inputs)
                return jax.tree.map(lambda z: z[0], apply(params, alone, key))

            return jax.vmap(case)(*inputs)

        return model_fn


class TrainState(train_state.TrainState):
    """Flax's `TrainState`, whose `apply_gradients` also passes batches to the optimizer.

    It passes all parameters as well, for an `optax.partition` or `optax.masked`.

    Example:
      >>> import hfjax, jax.numpy as jnp
      >>> objective = hfjax.Objective(
      ...     lambda params, x: x * params["w"], hfjax.losses.squared_error()
      ... )
      >>> tx = hfjax.hessian_free(objective, damping=hfjax.damping.constant(0.0))
      >>> params = {"w": jnp.zeros(1)}
      >>> state = TrainState.create(apply_fn=None, params=params, tx=tx)
      >>> batch = (jnp.ones((3, 1)), jnp.full((3, 1), 2.0))
      >>> _, grads = objective.value_and_grad(state.params, batch)
      >>> state = state.apply_gradients(grads=grads, batch=batch)
      >>> print(state.params["w"], state.step)
      [2.] 1
    """

    def apply_gradients(
        self,
        *,
        grads: Any,
        batch: Batch | None = None,
        eval_batch: Batch | None = None,
        **kwargs: Any,
    ) -> Any:
        """Update `step`, `params` and `opt_state`.

        Args:
          grads: ∇f, like `params`.
          batch: data for the curvature, as `tx.update` takes it.
          eval_batch: data for evaluating steps; `None` is `batch`.
          **kwargs: other fields to replace, as in Flax.

        Returns:
          The new train state.

        Raises:
          TypeError: by `tx`, if it needs `batch` and there is none.
        """
        # Flax calls `tx.update` without extra arguments, so bind them, and undo that
        # after.
        tx = optax.with_extra_args_support(self.tx)
        extra = {"batch": batch, "eval_batch": eval_batch, "all_params": self.params}
        update = functools.partial(tx.update, **extra)
        handing_on = self.replace(tx=tx._replace(update=update))
        new = train_state.TrainState.apply_gradients(handing_on, grads=grads, **kwargs)
        return new.replace(tx=self.tx)


def __getattr__(name: str) -> Any:
    """Say why the names that need nnx are missing."""
    if name in ("RecurrentNetwork", "nnx_model_fn"):
        msg = "`flax.nnx` fails to import here; linen does without."
        raise ImportError(msg) from nnx_error
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def _streams(model: Any) -> tuple[str, ...]:
    """Return the names of a module's random streams."""
    found = (part for _, part in nnx.iter_graph(model))
    return tuple(sorted({p.key.tag for p in found if isinstance(p, nnx.RngStream)}))


def _takes_rngs(call: Callable[..., Any]) -> bool:
    """Return whether a function has an argument `rngs`."""
    try:
        return "rngs" in inspect.signature(call).parameters
    except ValueError:  # A callable without a signature.
        return False


def _check_unchanged(
    module: Any, wrt: Any, frozen: Tree, dropped: Any, *, keyed: bool
) -> None:
    """Raise if a call changed frozen variables, or drew one mask for all examples.

    Variables of the type `dropped` may change.
    """
    _, _, rest = nnx.split(module, wrt, ...)
    # Arrays are immutable, so a variable was assigned if it holds another array than
    # before.
    now = dict(jax.tree_util.tree_leaves_with_path(rest))
    changed = [
        path
        for path, leaf in jax.tree_util.tree_leaves_with_path(frozen)
        if now.get(path, leaf) is not leaf
    ]
    random = dict(jax.tree_util.tree_leaves_with_path(nnx.state(module, nnx.RngState)))
    free = dict(jax.tree_util.tree_leaves_with_path(nnx.state(module, dropped)))
    statistics = [path for path in changed if path not in {*random, *free}]
    if statistics:
        msg = (
            "Calling the model changes variables that are not trained, as "
            f"{jax.tree_util.keystr(statistics[0])}: its outputs may depend on all "
            "cases of the batch together. Call `model.eval()` first, so that batch "
            "normalisation uses its running statistics, or set `whole_batch=True`, here "
            "and for the `Objective`. docs/changing.md shows both."
        )
        raise ValueError(msg)
    # Only random counters changed. That is an error if they belong to dropout and the key
    # is not the example's own; other layers with random state draw at initialisation.
    masks = {
        tuple(str(part) for part in path)
        for path, part in nnx.iter_graph(module)
        if isinstance(part, nnx.Dropout)
    }
    for path in changed:
        names = tuple(str(getattr(part, "key", part)) for part in path)
        if not keyed and any(names[: len(mask)] == mask for mask in masks):
            msg = (
                "The model draws a dropout mask, the same in every update. Call "
                "`model.eval()` first, or let each case bring its key: "
                "`nnx_model_fn(model, per_case_keys=True)`, with `(inputs, keys)` for "
                "inputs."
            )
            raise ValueError(msg)
