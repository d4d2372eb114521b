"""Long sequences in less memory: a scan that keeps the state of few steps.

A product with the curvature needs every step's activations twice, in the tangent pass
and in its transpose. `jax.lax.scan` keeps them for the whole run of conjugate
gradients; here most are computed again (report, section 7.1 and figure 2).
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
    """Scan as `jax.lax.scan(step, init, xs, length=length)`, in less memory.

    The T steps are cut into chunks; the last may be shorter. Derivatives keep the
    carry at the start of each chunk, and run a chunk anew for the rest. With C the
    size of a carry and R that of all that a derivative needs of one step, T · R
    becomes

        ⌈T / chunk⌉ · C + chunk · R

    beside `xs` and the stacked outputs, which are whole in either case. Each state is
    computed once more in a gradient and twice in a product (`jax.lax.scan`: in none
    of the products), which by flops makes a gradient 4/3 and a product 3/2 as long.

    In a model, do all of a step's work in `step`, and let it give out what the loss
    needs rather than what only leads there: outputs `z`, not hidden states to be
    multiplied afterwards, for those are kept for all T.

    Args:
      step: `(carry, x) -> (carry, y)`.
      init: the first carry, a tree of arrays.
      xs: a tree of arrays with leading axis T, or `None`.
      length: T; needed where `xs` has no arrays.
      chunk: steps in a chunk. `None` is ⌈√T⌉ (report, section 7.1), the least memory
        for R = C; √(T · C / R) is the least for steps that need more. Shorter chunks
        do not save time: every state is computed anew in any case.

    Returns:
      The last carry, and the outputs, stacked along a leading axis of T.

    Raises:
      TypeError: if `length` or `chunk` is not a Python integer, or `step` no function.
      ValueError: if `chunk` is less than 1, or T is unknown or ambiguous.

    Example:
      A recurrent network of `[cases, time, features]`, as `model_fn` of an objective:

      >>> import hfjax
      >>> def model_fn(params, inputs, scan=checkpointed):
      ...     def step(h, x):
      ...         h = jnp.tanh(x @ params["in"] + h @ params["recurrent"])
      ...         return h, h @ params["out"]
      ...
      ...     h = jnp.zeros((len(inputs), 3))
      ...     return scan(step, h, inputs.swapaxes(0, 1))[1].swapaxes(0, 1)
      >>> shapes = {"in": (2, 3), "recurrent": (3, 3), "out": (3, 1)}
      >>> params = {name: jnp.full(shape, 0.1) for name, shape in shapes.items()}
      >>> f = hfjax.Objective(model_fn, hfjax.losses.squared_error())
      >>> inputs = jnp.ones((4, 5, 2))
      >>> product = hfjax.curvature.ggn(f, params, (inputs, jnp.ones((4, 5, 1))))
      >>> print(product(params)["recurrent"].shape)
      (3, 3)
      >>> plain = model_fn(params, inputs, scan=jax.lax.scan)
      >>> print(jnp.allclose(model_fn(params, inputs), plain))
      True

    References:
      Martens & Sutskever (2012), section 7.1.
    """
    check_function("step", step, "(carry, x) -> (carry, y)")
    steps = _steps(xs, length)
    if chunk is None:
        chunk = 1 + math.isqrt(max(steps - 1, 0))
    options.check_count("chunk", chunk, low=1)
    chunks, rest = divmod(steps, chunk)
    if not chunks and not rest:
        return jax.lax.scan(step, init, xs, length=0)

    # Barriers against common subexpressions stay on: XLA unrolls a loop over one
    # chunk, and could then merge the second run of it with the first.
    def run(carry: Tree, part: Tree, steps: int) -> tuple[Tree, Tree]:
        scan = jax.checkpoint(lambda c, p: jax.lax.scan(step, c, p, length=steps))
        return scan(carry, part)

    carry, parts = init, []
    if chunks:
        whole = chunks * chunk
        head = jax.tree.map(
            lambda x: x[:whole].reshape(chunks, chunk, *x.shape[1:]), xs
        )
        carry, ys = jax.lax.scan(
            lambda carry, part: run(carry, part, chunk), carry, head, length=chunks
        )
        parts.append(jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys))
    if rest:
        tail = jax.tree.map(lambda x: x[chunks * chunk :], xs)
        carry, ys = run(carry, tail, rest)
        parts.append(ys)
    if len(parts) == 1:
        return carry, parts[0]
    return carry, jax.tree.map(lambda *ys: jnp.concatenate(ys), *parts)


def _steps(xs: Tree, length: int | None) -> int:
    """Return T, which `length` and the leading axes of `xs` must agree on."""
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
