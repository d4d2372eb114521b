"""Basic recurrent networks with a trainable initial state; import them from `hfjax.flax`.

`LinenRecurrentNetwork` and `RecurrentNetwork` (nnx) are the same function of the same
arrays, under the same names.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen

from hfjax._core import trees
from hfjax.models import initializers, scan
from hfjax.models.initializers import Initializer

nnx_error: Exception | None = None

if TYPE_CHECKING:
    from flax import nnx
else:
    try:
        from flax import nnx
    except (ImportError, AttributeError) as error:
        # Some versions of Flax do not work with some of JAX; linen needs no nnx.
        nnx, nnx_error = None, error

Activation: TypeAlias = Callable[[jax.Array], jax.Array]

Chunk: TypeAlias = int | Literal["sqrt"] | None
"""Steps per chunk, at whose start the state is stored; `None` stores every state."""

_KERNEL = initializers.sparse(scale=15**-0.5, replace=False)
_INPUT_KERNEL = initializers.sparse(scale=0.25 * 15**-0.5, replace=False)
_ZEROS = jax.nn.initializers.zeros


class _Weights(NamedTuple):
    """All parameters; kernels are `(inputs, units)`, and a bias may be `None`."""

    input_kernel: jax.Array
    recurrent_kernel: jax.Array
    output_kernel: jax.Array
    initial_hidden: jax.Array
    hidden_bias: jax.Array | None
    output_bias: jax.Array | None


class LinenRecurrentNetwork(linen.Module):
    """A basic recurrent network, as a Flax linen module.

        hₜ = s(W_xh xₜ + W_hh hₜ₋₁ + b)        zₜ = W_hz hₜ + c

    The initial state h₀ is a parameter. The network maps inputs `[cases, time, features]`
    to outputs z, `[cases, time, outputs]`, to which the loss applies its nonlinearity.
    With `return_hidden=True` it returns z and the hidden states h₁ … h_T, of shape
    `[cases, time, units]`, as structural damping needs.

    Attributes:
      units: number of hidden units.
      outputs: number of output units.
      activation: s, a function of arrays of any shape.
      input_init: initializer of W_xh; 15 connections for each unit from N(0, 1/15),
        divided by 4 so that inputs do not swamp the state.
      recurrent_init: initializer of W_hh; the same without the division.
        `hfjax.initializers.spectral_radius` is an alternative.
      output_init: initializer of W_hz; as for W_hh.
      hidden_init: initializer of h₀; zeros.
      bias_init: initializer of b and c; zeros.
      use_bias: whether to have biases b and c.
      chunk: steps per chunk, to save memory as `hfjax.scan.checkpointed` does; `"sqrt"` is
        ⌈√T⌉. `None` is a plain scan, which is faster. Hidden states that are returned are
        stored in any case.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: when called, if `inputs` does not have three axes.

    Example:
      >>> import hfjax, jax, jax.numpy as jnp
      >>> network = LinenRecurrentNetwork(units=4, outputs=1, chunk="sqrt")
      >>> x, t = jnp.ones((3, 7, 2)), jnp.zeros((3, 7, 1))
      >>> params = network.init(jax.random.key(0), x)
      >>> print(params["params"]["initial_hidden"])  # h₀ is learned
      [0. 0. 0. 0.]
      >>> outputs, hidden = network.apply(params, x, return_hidden=True)
      >>> print(outputs.shape, hidden.shape)
      (3, 7, 1) (3, 7, 4)
      >>> f = hfjax.Objective(network.apply, hfjax.losses.squared_error())
      >>> print(jnp.allclose(f.value(params, (x, t)), (outputs**2).sum() / 2 / 3))
      True

    References:
      Martens & Sutskever (2012), section 3, 7.1 (`chunk`) and 8.4 (hidden states);
      Sutskever's program (2011) for the initial weights.
    """

    units: int
    outputs: int
    activation: Activation = jnp.tanh
    input_init: Initializer = _INPUT_KERNEL
    recurrent_init: Initializer = _KERNEL
    output_init: Initializer = _KERNEL
    hidden_init: Initializer = _ZEROS
    bias_init: Initializer = _ZEROS
    use_bias: bool = True
    chunk: Chunk = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @linen.compact
    def __call__(self, inputs: jax.Array, *, return_hidden: bool = False) -> Any:
        """Return outputs; with `return_hidden`, a pair of these and the hidden states."""
        _check(inputs)

        def param(name: str, init: Initializer, *shape: int) -> Any:
            return self.param(name, init, shape, self.param_dtype)

        units, outputs, biased = self.units, self.outputs, self.use_bias
        weights = _Weights(
            param("input_kernel", self.input_init, inputs.shape[-1], units),
            param("recurrent_kernel", self.recurrent_init, units, units),
            param("output_kernel", self.output_init, units, outputs),
            param("initial_hidden", self.hidden_init, units),
            param("hidden_bias", self.bias_init, units) if biased else None,
            param("output_bias", self.bias_init, outputs) if biased else None,
        )
        return _run(weights, inputs, self.activation, self.chunk, return_hidden)


if nnx is not None:

    class RecurrentNetwork(nnx.Module):
        """A basic recurrent network, as a Flax nnx module.

        The size of the inputs comes first. The options are those of
        `LinenRecurrentNetwork`, which explains them.

        Args:
          features: number of inputs at each step.
          units: number of hidden units.
          outputs: number of output units.
          activation: s, a function of arrays of any shape.
          input_init: initializer of W_xh.
          recurrent_init: initializer of W_hh.
          output_init: initializer of W_hz.
          hidden_init: initializer of h₀.
          bias_init: initializer of b and c.
          use_bias: whether to have biases.
          chunk: steps per chunk, to save memory.
          param_dtype: dtype of the parameters.
          rngs: provides the keys, from the stream `params`.

        Example:
          >>> import hfjax.flax, jax.numpy as jnp
          >>> from flax import nnx
          >>> network = RecurrentNetwork(2, 4, 1, chunk="sqrt", rngs=nnx.Rngs(0))
          >>> x, t = jnp.ones((3, 7, 2)), jnp.zeros((3, 7, 1))
          >>> outputs, hidden = network(x, return_hidden=True)
          >>> print(outputs.shape, hidden.shape)
          (3, 7, 1) (3, 7, 4)
          >>> model_fn = hfjax.flax.nnx_model_fn(network)
          >>> f = hfjax.Objective(model_fn, hfjax.losses.squared_error())
          >>> value = f.value(nnx.state(network, nnx.Param), (x, t))
          >>> print(jnp.allclose(value, (outputs**2).sum() / 2 / 3))
          True
        """

        def __init__(
            self,
            features: int,
            units: int,
            outputs: int,
            *,
            activation: Activation = jnp.tanh,
            input_init: Initializer = _INPUT_KERNEL,
            recurrent_init: Initializer = _KERNEL,
            output_init: Initializer = _KERNEL,
            hidden_init: Initializer = _ZEROS,
            bias_init: Initializer = _ZEROS,
            use_bias: bool = True,
            chunk: Chunk = None,
            param_dtype: jax.typing.DTypeLike = jnp.float32,
            rngs: nnx.Rngs,
        ) -> None:
            def param(init: Initializer, *shape: int) -> nnx.Param[Any]:
                return nnx.Param(init(rngs.params(), shape, param_dtype))

            self.activation = activation
            self.chunk: Chunk = chunk
            self.input_kernel: nnx.Param[Any] = param(input_init, features, units)
            self.recurrent_kernel: nnx.Param[Any] = param(recurrent_init, units, units)
            self.output_kernel: nnx.Param[Any] = param(output_init, units, outputs)
            self.initial_hidden: nnx.Param[Any] = param(hidden_init, units)
            self.hidden_bias: nnx.Param[Any] | None = (
                param(bias_init, units) if use_bias else None
            )
            self.output_bias: nnx.Param[Any] | None = (
                param(bias_init, outputs) if use_bias else None
            )

        def __call__(self, inputs: jax.Array, *, return_hidden: bool = False) -> Any:
            """Return outputs; with `return_hidden`, a pair of these and the hidden states."""
            _check(inputs)
            params = [getattr(self, name) for name in _Weights._fields]
            arrays: Any = [None if param is None else param[...] for param in params]
            weights = _Weights(*arrays)
            return _run(weights, inputs, self.activation, self.chunk, return_hidden)


def _check(inputs: jax.Array) -> None:
    if inputs.ndim != 3:
        msg = f"`inputs` must be [cases, time, features], got shape {inputs.shape}."
        raise ValueError(msg)


def _run(
    weights: _Weights,
    inputs: jax.Array,
    activation: Activation,
    chunk: Chunk,
    return_hidden: bool,
) -> Any:
    # Cast everything to the widest dtype once, so that the carry of the scan keeps its
    # own.
    arrays = (inputs, *jax.tree.leaves(weights))
    dtype = trees.widest(*(x.dtype for x in arrays))
    weights, inputs = jax.tree.map(lambda x: x.astype(dtype), (weights, inputs))

    def drive(x: jax.Array) -> jax.Array:
        return _affine(x, weights.input_kernel, weights.hidden_bias)

    def advance(hidden: jax.Array, drive: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = activation(drive + hidden @ weights.recurrent_kernel)
        return hidden, hidden

    def read_out(hidden: jax.Array) -> jax.Array:
        return _affine(hidden, weights.output_kernel, weights.output_bias)

    first = weights.initial_hidden
    first = jnp.broadcast_to(first, (len(inputs), *first.shape))
    xs = inputs.swapaxes(0, 1)
    # A plain scan stores all states anyway, so inputs and outputs each take one large
    # product.
    if chunk is None:
        _, hidden = jax.lax.scan(advance, first, drive(xs))
        outputs = read_out(hidden)
    else:
        # Everything is computed within a step: what is computed for all steps at once
        # would be stored for all of them.
        def step(hidden: jax.Array, x: jax.Array) -> tuple[jax.Array, tuple]:
            hidden, _ = advance(hidden, drive(x))
            return hidden, (read_out(hidden), hidden if return_hidden else None)

        steps = None if chunk == "sqrt" else chunk
        _, (outputs, hidden) = scan.checkpointed(step, first, xs, chunk=steps)
    outputs = outputs.swapaxes(0, 1)
    return (outputs, hidden.swapaxes(0, 1)) if return_hidden else outputs


def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    y = x @ kernel
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)
