"""Long sequences in less memory: a scan that stores the state of only a few steps.

A curvature-vector product needs the activations of every step twice, in the tangent pass
and in its transpose. `jax.lax.scan` stores them throughout a run of conjugate gradients;
here most of them are recomputed.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hfjax._core import options
from hfjax._core.arguments import check_function
from hfjax._core.types import Tree


def checkpointed(
    step: Callable[[Tree, Tree], tuple[Tree, Tree]],
    init: Tree,
    xs: Tree,
    *,
    length: int | None = None,
    chunk: int | None = None,
) -> tuple[Tree, Tree]:
    """Scan like `jax.lax.scan(step, init, xs, length=length)`, in less memory.

    The T steps are divided into chunks, of which the last may be shorter. Derivatives
    store the carry at the start of each chunk and recompute a chunk when they need it. If
    C is the size of a carry, and R of all that the derivative of one step needs, the
    memory falls from T · R to

        ⌈T / chunk⌉ · C + chunk · R

    in addition to `xs` and the stacked outputs. Each state is computed once more for a
    gradient and twice more for a curvature-vector product (`jax.lax.scan` recomputes
    none): a gradient takes 4/3 and a product 3/2 as many operations.

    In a model, do all the work of a step in `step`, and return only what the loss needs:
    outputs `z`, rather than hidden states to be multiplied afterwards, since those would
    be stored for all T steps.

    Args:
      step: `(carry, x) -> (carry, y)`.
      init: the initial carry, a tree of arrays.
      xs: a tree of arrays with leading axis T, or `None`.
      length: T; required if `xs` has no arrays.
      chunk: steps per chunk. `None` is ⌈√T⌉, which takes the least memory if R = C; in
        general that is √(T · C / R). Shorter chunks do not save time.

    Returns:
      The final carry, and the outputs, stacked along a leading axis of length T.

    Raises:
      TypeError: if `length` or `chunk` is not a Python integer, or `step` not a function.
      ValueError: if `chunk` is less than 1, or T is unknown or ambiguous.

    Example:
      A recurrent network on `[cases, time, features]`, as the `model_fn` of an objective:

      >>> def model_fn(params, inputs, scan=checkpointed):
      ...     def step(h, x):
      ...         h = jnp.tanh(x @ params["in"] + h @ params["recurrent"])
      ...         return h, h @ params["out"]
      ...
      ...     h = jnp.zeros((len(inputs), 3))
      ...     return scan(step, h, inputs.swapaxes(0, 1))[1].swapaxes(0, 1)
      >>> shapes = {"in": (2, 3), "recurrent": (3, 3), "out": (3, 1)}
      >>> params = {name: jnp.full(shape, 0.1) for name, shape in shapes.items()}
      >>> inputs = jnp.ones((4, 5, 2))
      >>> plain = model_fn(params, inputs, scan=jax.lax.scan)
      >>> print(jnp.allclose(model_fn(params, inputs), plain))
      True

    References:
      Martens & Sutskever (2012), section 7.1 and figure 2.
    """
    check_function("step", step, "(carry, x) -> (carry, y)")
    steps = _steps(xs, length)
    if chunk is None:
        chunk = 1 + math.isqrt(max(steps - 1, 0))
    options.check_count("chunk", chunk, low=1)
    chunks, rest = divmod(steps, chunk)
    if not chunks and not rest:
        return jax.lax.scan(step, init, xs, length=0)

    # `prevent_cse` stays on: XLA unrolls a loop over a single chunk, and could then merge
    # its second run with the first, which would store everything again.
    def run(steps: int) -> Callable[[Tree, Tree], tuple[Tree, Tree]]:
        return jax.checkpoint(lambda c, p: jax.lax.scan(step, c, p, length=steps))

    # An outer scan over the full chunks, then the shorter one, if there is any.
    carry, parts, full = init, [], chunks * chunk
    if chunks:
        head = jax.tree.map(lambda x: x[:full].reshape(chunks, chunk, *x.shape[1:]), xs)
        carry, ys = jax.lax.scan(run(chunk), carry, head, length=chunks)
        parts.append(jax.tree.map(lambda y: y.reshape(full, *y.shape[2:]), ys))
    if rest:
        tail = jax.tree.map(lambda x: x[full:], xs)
        carry, ys = run(rest)(carry, tail)
        parts.append(ys)
    if len(parts) == 1:
        return carry, parts[0]
    return carry, jax.tree.map(lambda *ys: jnp.concatenate(ys), *parts)


def _steps(xs: Tree, length: int | None) -> int:
    """Return T, on which `length` and the leading axes of `xs` must agree."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(xs)]
    if () in shapes:
        msg = "`xs` must have the steps as leading axis, got a scalar in it."
        raise ValueError(msg)
    known = {shape[0] for shape in shapes}
    if length is not None:
        options.check_count("length", length, low=0)
        known.add(length)
    if len(known) != 1:
        msg = (
            f"The number of steps must be one number, got leading axes {shapes} of "
            f"`xs` and `length` {length}. Give `length` where `xs` has no arrays."
        )
        raise ValueError(msg)
    return known.pop()
