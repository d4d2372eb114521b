"""Products with microbatches, of which all is kept that does not depend on v.

`jax.linearize` does this for one batch. Of a loop over microbatches it would keep the
activations too, but then every product would go through all of them. Here each microbatch
is a product of its own, so that those without weight are passed over.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from hfjax._core import sharding, trees
from hfjax._core.types import Matvec, Tree
from hfjax._tracing.convolutions import for_loops
from hfjax._tracing.programs import NO_NAMES
from hfjax.objectives.cases import Microbatches
from hfjax.objectives.means import Means

_Build = Callable[[jax.Array], Matvec]
"""A microbatch's number ↦ (v ↦ Σᵢ wᵢ Bᵢ v), traced."""


def kept(build: _Build, parts: Microbatches, like: Tree, means: Means) -> _Build:
    """Return the same, computed here, once for each microbatch, as far as v allows.

    What is the same for all microbatches, such as the parameters, is kept once. If `means`
    skips those without weight, they are not computed, and must not be asked for. `like`
    has the types of v.
    """
    products: list[tuple[Jaxpr, Any, list[Any]]] = []

    def constants(number: jax.Array) -> list[jax.Array]:
        program, shapes = jax.make_jaxpr(build(number), return_shape=True)(like)
        kinds = [_key_kind(const) for const in program.consts]
        products.append((program.jaxpr, jax.tree.structure(shapes), kinds))
        # Keys are not numbers, which an array of zeros could be filled with.
        both = zip(program.consts, kinds, strict=True)
        return [jax.random.key_data(x) if kind else jnp.asarray(x) for x, kind in both]

    program = jax.make_jaxpr(constants)(jnp.zeros((), jnp.int32))
    product, structure, kinds = products[-1]
    shared, of_number, moves = _divided(program)
    numbers = _filled(of_number, parts, means)

    def matvec_of(number: jax.Array) -> Matvec:
        own, others = iter(trees.row(numbers, number)), iter(shared)
        data = [next(own) if its else next(others) for its in moves]
        consts = [
            jax.random.wrap_key_data(x, impl=kind) if kind else x
            for x, kind in zip(data, kinds, strict=True)
        ]
        run = jaxpr_as_fun(ClosedJaxpr(product, consts))
        return lambda v: structure.unflatten(run(*jax.tree.leaves(v)))

    return matvec_of


def _divided(
    program: ClosedJaxpr,
) -> tuple[list[jax.Array], Callable[[jax.Array], list[jax.Array]], list[bool]]:
    """Run what does not depend on the argument of a program.

    Returns:
      The results that do not depend on it; what computes the others; and of each result
      whether it is one of those.
    """
    jaxpr = program.jaxpr
    moving, once, each = set(jaxpr.invars), [], []

    def moves(atom: Any) -> bool:
        return not isinstance(atom, Literal) and atom in moving

    for equation in jaxpr.eqns:
        if any(map(moves, equation.invars)):
            each.append(equation)
            moving.update(equation.outvars)
        else:
            once.append(equation)
    atoms = [atom for equation in each for atom in equation.invars]
    needed = dict.fromkeys(
        atom for atom in atoms if not isinstance(atom, Literal) and atom not in moving
    )
    its = [moves(atom) for atom in jaxpr.outvars]
    ours = [atom for atom in jaxpr.outvars if not moves(atom)]
    before = _part(jaxpr, [], [*needed, *ours], once, jaxpr.constvars)
    known = jaxpr_as_fun(ClosedJaxpr(before, program.consts))()
    theirs = [atom for atom in jaxpr.outvars if moves(atom)]
    after = _part(jaxpr, [*needed, *jaxpr.invars], theirs, each)
    run = for_loops(jaxpr_as_fun(ClosedJaxpr(after, [])))
    count = len(needed)
    return known[count:], lambda number: run(*known[:count], number), its


def _part(
    whole: Jaxpr, invars: Any, outvars: Any, equations: Any, constvars: Any = ()
) -> Jaxpr:
    """Make a program of some equations of another."""
    return Jaxpr(
        constvars=list(constvars),
        invars=invars,
        outvars=outvars,
        eqns=equations,
        effects=whole.effects,
        debug_info=NO_NAMES,
    )


def _filled(
    of_number: Callable[[jax.Array], list[jax.Array]],
    parts: Microbatches,
    means: Means,
) -> list[jax.Array]:
    """Compute arrays for each microbatch, and stack them."""

    def all_of_them() -> list[jax.Array]:
        return jax.lax.map(of_number, jnp.arange(parts.count, dtype=jnp.int32))

    if not means.skips:
        return all_of_them()
    order, used = means.in_use(parts)

    def put(k: jax.Array, stacked: list[jax.Array]) -> list[jax.Array]:
        return trees.with_row(stacked, order[k], of_number(order[k]))

    # Under `shard_map` the carry of a loop must vary over devices as the results do.
    zeros = means.local(sharding.zeros(jax.eval_shape(all_of_them)))
    return jax.lax.fori_loop(0, used, put, zeros)


def _key_kind(x: Any) -> Any:
    """Return the implementation of random keys, or `None` for numbers."""
    dtype = getattr(x, "dtype", None)
    is_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return jax.random.key_impl(x) if is_key else None
