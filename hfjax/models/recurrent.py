"""Basic recurrent networks with a learned first state, for Flax (report, section 3).

    hₜ = s(W_xh xₜ + W_hh hₜ₋₁ + b)        zₜ = W_hz hₜ + c

with h₀ a parameter. `LinenRecurrentNetwork` and `RecurrentNetwork` (nnx) are the same
function of the same arrays, under the same names. `hfjax.flax` is the module to use.
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
    except (ImportError, AttributeError) as error:  # Some mixes of flax and JAX.
        nnx, nnx_error = None, error

Activation: TypeAlias = Callable[[jax.Array], jax.Array]

Chunk: TypeAlias = int | Literal["sqrt"] | None
"""Steps between the hidden states that are kept; `"sqrt"` is ⌈√T⌉, `None` keeps all."""

_KERNEL = initializers.sparse(scale=15**-0.5, replace=False)
_INPUT_KERNEL = initializers.sparse(scale=0.25 * 15**-0.5, replace=False)
_ZEROS = jax.nn.initializers.zeros


class _Weights(NamedTuple):
    """All parameters, kernels as `(inputs, units)`; a bias may be `None`."""

    input_kernel: jax.Array
    recurrent_kernel: jax.Array
    output_kernel: jax.Array
    initial_hidden: jax.Array
    hidden_bias: jax.Array | None
    output_bias: jax.Array | None


class LinenRecurrentNetwork(linen.Module):
    """A basic recurrent network, as a Flax linen module.

    Called with inputs `[cases, time, features]` it returns outputs
    `[cases, time, outputs]`, before the loss's nonlinearity; with
    `return_hidden=True` the pair of them and the hidden states h₁ … h_T,
    `[cases, time, units]`, which is what a `model_fn` gives out for structural damping.

    Attributes:
      units: hidden units.
      outputs: output units.
      activation: s, on arrays of any shape.
      input_init: of W_xh. 15 connections for each unit, from N(0, 1/15), divided by
        4, so that inputs do not drown the state (Sutskever's program, 2011).
      recurrent_init: of W_hh. The same, not divided (ibid.);
        `hfjax.initializers.spectral_radius` is the other choice.
      output_init: of W_hz. As W_hh (ibid.).
      hidden_init: of h₀. Zeros (heuristic; ibid.: normal, of variance 1/15).
      bias_init: of both biases. Zeros (Martens 2010, section 5).
      use_bias: whether there are biases; the report has none.
      chunk: keep the state of few steps in derivatives, as `hfjax.scan.checkpointed`
        does: steps between those, `"sqrt"`, or `None` for a plain scan, faster.
        Hidden states that are returned are kept in any case.
      param_dtype: of the parameters.

    Raises:
      ValueError: when called, if `inputs` has not three axes.

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
      Martens & Sutskever (2012), section 3; 7.1 (`chunk`), 8.4 (hidden states).
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
        """Run over time.

        Args:
          inputs: shape `[cases, time, features]`.
          return_hidden: whether to return the hidden states too.

        Returns:
          Outputs `[cases, time, outputs]`, or the pair of them and the hidden states
          `[cases, time, units]`.
        """
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

        As `LinenRecurrentNetwork`, which says what the options are, and where the
        defaults come from; the size of the inputs comes first.

        Args:
          features: inputs at each step.
          units: hidden units.
          outputs: output units.
          activation: s, on arrays of any shape.
          input_init: of W_xh.
          recurrent_init: of W_hh.
          output_init: of W_hz.
          hidden_init: of h₀.
          bias_init: of both biases.
          use_bias: whether there are biases.
          chunk: steps between the states that are kept in derivatives.
          param_dtype: of the parameters.
          rngs: gives the keys, of the stream `params`.

        Example:
          >>> import hfjax, jax.numpy as jnp
          >>> from flax import nnx
          >>> network = RecurrentNetwork(2, 4, 1, chunk="sqrt", rngs=nnx.Rngs(0))
          >>> graph, params = nnx.split(network, nnx.Param)
          >>> f = hfjax.Objective(
          ...     lambda params, x: nnx.merge(graph, params)(x),
          ...     hfjax.losses.squared_error(),
          ... )
          >>> x, t = jnp.ones((3, 7, 2)), jnp.zeros((3, 7, 1))
          >>> _, gradient = f.value_and_grad(params, (x, t))
          >>> print(gradient["initial_hidden"][...].shape)  # h₀ is learned
          (4,)
          >>> outputs, hidden = network(x, return_hidden=True)
          >>> print(outputs.shape, hidden.shape)
          (3, 7, 1) (3, 7, 4)
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
            """Run over time.

            Args:
              inputs: shape `[cases, time, features]`.
              return_hidden: whether to return the hidden states too.

            Returns:
              Outputs `[cases, time, outputs]`, or the pair of them and the hidden
              states `[cases, time, units]`.
            """
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

    first = jnp.broadcast_to(
        weights.initial_hidden, (inputs.shape[0], *weights.initial_hidden.shape)
    )
    xs = inputs.swapaxes(0, 1)
    if chunk is None:
        _, hidden = jax.lax.scan(advance, first, drive(xs))
        outputs = read_out(hidden)
    else:
        # One step at a time: what is computed for all steps is kept for all.
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
