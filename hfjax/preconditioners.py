"""Preconditioners: positive definite P ≈ A whose inverse is cheap.

| function | P | to build, in gradients |
|---|---|---|
| `diagonal` | (d + λ diag(D) + κ s)^ξ, d of a curvature matrix (report, section 11.2) | 1 |
| `kronecker` | a product of two matrices for each layer | 1 to 2, and inverses |
| `nystrom` | G's largest eigenvalues, by a random sketch, and one for the rest | 4/3 `rank` |
| `custom` | the caller's | |

Damping is inside of each: P stands for the damped matrix, which is what conjugate
gradients work on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hfjax import _kronecker, _nystrom, _options, diagonals
from hfjax._arguments import as_params, check_function, describe, with_key
from hfjax._convolutions import for_loops
from hfjax._merged_layers import Merged, merged
from hfjax._objective import thinned
from hfjax._terms import decay_of
from hfjax._types import Batch, Number, Params, Preconditioner, Tree
from hfjax.objective import Objective


class PreconditionerRule(NamedTuple):
    """How each update makes its preconditioner.

    Attributes:
      build: `(objective, params, batch, damping, key) -> (r -> P⁻¹ r)`, with
        `damping` the diagonal of λD: the scalar λ where D = I, else a tree like the
        parameters, or 0 where D = B, as P's scale does not matter. With structural
        damping `objective` has its distance in its loss. The typed key is new in each
        update: of `hessian_free`'s seed and the number of the update alone.
      data: that `build` is given as its batch: the update's `"batch"`, as the
        curvature, or its `"eval_batch"`.
      init: `params -> memory`, of a rule that hands something to the next update; its
        `build` then takes `memory` and `count`, updates so far, too, and returns
        `(r -> P⁻¹ r, memory)`. `None` of one that does not.
    """

    build: Callable[..., Any]
    data: str = "batch"
    init: Callable[[Params], Tree] | None = None


def diagonal(
    estimate: diagonals.Estimate = diagonals.empirical_fisher,
    *,
    exponent: Number = 0.75,
    kappa: Number = 0.0,
    scale: Tree | None = None,
    data: str = "batch",
) -> PreconditionerRule:
    """Precondition by P = (d + λ diag(D) + κ s)^ξ, a diagonal matrix.

    Args:
      estimate: `(objective, params, batch) -> d`, a function of `hfjax.diagonals` or
        the caller's; weight decay counts in d. One that takes a `key` is given a new
        one in each update: `functools.partial(diagonals.ggn_rademacher,
        num_probes=4)`. (The Fisher's: Martens 2010, 4.7.)
      exponent: ξ in [0, 1]; 0.75 (Martens 2010, section 4.7), 1 is the diagonal
        itself, 0 the identity.
      kappa: κ ≥ 0, where λ is weak or absent (report, section 11.2; 0 in Martens'
        program).
      scale: s, a tree like the parameters of the coarse relative scale of their
        curvature; `None` is 1 everywhere.
      data: that d is estimated on: `"batch"`, the curvature data (report, section
        11.2: P is to stand for A), or `"eval_batch"` (Martens' program: all training
        data).

    Returns:
      The rule.

    Raises:
      ValueError: if an option is out of range.

    Example:
      >>> import hfjax, jax.numpy as jnp
      >>> f = hfjax.Objective(lambda p, x: x * p, hfjax.losses.squared_error())
      >>> batch = (jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [-1.0]]))  # d = 2.5
      >>> rule = diagonal(exponent=0.5)
      >>> precondition = rule.build(f, jnp.zeros(1), batch, jnp.float32(1.5), None)
      >>> print(precondition(jnp.array([6.0])))  # 6 / √(2.5 + 1.5)
      [3.]
    """
    _options.check_range("exponent", exponent, low=0.0, high=1.0)
    _options.check_range("kappa", kappa, low=0.0)
    _options.check_choice("data", data, ("batch", "eval_batch"))
    call = "(objective, params, batch) -> diagonal"
    check_function("estimate", estimate, call)

    def build(
        objective: Objective,
        params: Params,
        batch: Batch,
        damping: Tree,
        key: jax.Array,
    ) -> Preconditioner:
        entries = _within_range(with_key(estimate, key)(objective, params, batch))
        powers = diagonals.interpolate(
            _plus(entries, damping), exponent=exponent, kappa=kappa, scale=scale
        )
        # Where nothing is known of a parameter's curvature (all zero), leave it be.
        powers = jax.tree.map(lambda p: jnp.where(p > 0, p, 1), powers)
        return lambda r: jax.tree.map(
            lambda r, p: (r.astype(p.dtype) / p).astype(r.dtype), r, powers
        )

    return PreconditionerRule(build, data=data)


def kronecker(
    *,
    damping_share: Number = 0.1,
    num_probes: int = 1,
    decay: Number = 0.0,
    interval: int = 1,
    max_size: int = 8192,
    cases: int | None = 2000,
    data: str = "batch",
) -> PreconditionerRule:
    """Precondition by the Kronecker factors of each layer, and a diagonal for the rest.

        P = (Ḡ + √(g/a) √(sλ) I) ⊗ (Ā + √(a/g) √(sλ) I)        for each kernel
        P = d + λ                                              for each other parameter

    Ā is the mean of x xᵀ over cases and positions, with x a layer's input (and 1 for a
    bias); Ḡ that of g gᵀ, summed over positions, with g what comes back to the layer of
    the outputs' random combinations Sᵢvᵢ; a and g their mean eigenvalues; d the same
    estimate of diag(G) as `diagonals.ggn_rademacher`. Weight decay counts with λ. Without
    damping P equals G if x and g are independent, and different layers are; conjugate
    gradients make up for the rest.

    No layer is registered: the program of `model_fn` is traced. A parameter of two or
    more axes counts as a kernel if it is only used in products `x @ w`, `x @ w.T`,
    `einsum` of all its axes but the last (or of the last alone), or convolutions whose
    outputs are its last axis, at any depth of `jit` and `checkpoint`, and in a `scan`
    that closes over it. A parameter of one axis that is added to each such product is
    its bias. Of Flax that is Dense, Conv without groups, and most recurrent cells; it is
    not what a scan takes layer by layer, kernels that are concatenated first (linen's
    `OptimizedLSTMCell`), or attention's projections to several heads. `layers` tells
    what was found in a model.

    In a weighted sum a term that does not read a kernel adds nothing to its factors: Ā is
    the mean over the terms that have the layer, weighted by cₖ, and Ḡ their sum. A term
    that reads the kernel otherwise (a penalty on parameters) adds the mean of its
    diagonal of G there to λ. A kernel that one term uses transposed has no factors.

    On a mesh of `Explicit` axes parameters may be sharded
    over the axis of the cases; where some lie over others, all have the diagonal.

    A build costs a pass forward and `num_probes` passes back; the products x xᵀ and
    g gᵀ, of cases · positions · (inputs² + units²) multiplications a layer; and two
    inverses, of inputs³ + units³. It holds the inputs of all layers, of a convolution
    its patches; microbatches bound them. P⁻¹r takes inputs · units · (inputs + units).

    Args:
      damping_share: s, the part of λ that damps the factors. Less than 1, as their
        product counts what damps one factor times the other, too (0.1: measured,
        `benchmarks/results/step6.md`; heuristic).
      num_probes: random combinations vᵢ of each case that are averaged (1: with hundreds
        of cases more gain nothing, ibid.).
      decay: ε of the factors' running average over builds, min(ε, 1 − 1/k) of the k-th
        (Martens & Grosse 2015, section 5: 0.95, for small batches). 0 takes each
        batch's own, and saves the memory.
      interval: updates from one build to the next; those between use its inverses.
      max_size: longest side of a kernel that has factors (8192: 256 MiB in float32;
        heuristic).
      cases: how many of the batch (of each device's, under `axis_name`) the factors are
        estimated on at least: every k-th, with the largest k for which they are so
        many; `None` is all (2,000: a quarter of 2,000 did nearly as well,
        `benchmarks/results/step6.md`; heuristic).
      data: as in `diagonal`.

    Returns:
      The rule. With a `decay`, or an `interval` above 1, the state has room for two
      matrices of each parameter that may be a kernel, `(inputs + 1)²` and `(units +
      1)²`, and a diagonal; twice that for both.

    Raises:
      TypeError: if a count is no Python integer.
      ValueError: if an option is out of range.

    Example:
      Of a linear model with white inputs, P is G, and one iteration is enough:

      >>> import hfjax, jax, jax.numpy as jnp
      >>> f = hfjax.Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
      >>> p, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.array([[1.0], [3.0]]))
      >>> rule = kronecker(damping_share=1.0)
      >>> invert = rule.build(f, p, batch, jnp.float32(0.25), jax.random.key(0))
      >>> r = jnp.array([[1.0], [2.0]])
      >>> product = hfjax.curvature.ggn(f, p, batch)
      >>> ratio = invert(product(r) + 0.25 * r) / r  # a multiple of 1
      >>> print(bool(jnp.allclose(ratio, ratio[0])))
      True

    References:
      Martens & Grosse (2015), "Optimizing neural networks with Kronecker-factored
      approximate curvature", sections 3, 5 and 6.3; Grosse & Martens (2016), of
      convolutions.
    """
    _options.check_range("damping_share", damping_share, low=0.0, open_low=True)
    _options.check_count("num_probes", num_probes, low=1)
    _options.check_range("decay", decay, low=0.0, high=1.0)
    _options.check_count("interval", interval, low=1)
    _options.check_count("max_size", max_size, low=1)
    if cases is not None:
        _options.check_count("cases", cases, low=1)
    _options.check_choice("data", data, ("batch", "eval_batch"))
    averages = not (_options.is_plain_number(decay) and decay == 0)

    def init(params: Params) -> dict[str, tuple]:
        kinds = ["kronecker_factors"] if averages else []
        kinds += ["kronecker_inverses"] if interval > 1 else []
        # Each its own arrays: a state that is donated may hold none of them twice.
        return {kind: _kronecker.room_for(params, max_size) for kind in kinds}

    def build(
        objective: Objective,
        params: Params,
        batch: Batch,
        damping: Tree,
        key: jax.Array,
        memory: dict[str, tuple] | None = None,
        count: jax.Array | int = 0,
    ) -> Any:
        if cases is not None:
            batch = thinned(objective, batch, cases)
        model = merged(_kronecker.read(objective, params, batch, max_size))
        damping = _with_decay(damping, objective)

        def fresh(memory: dict[str, tuple]) -> tuple[_kronecker.Blocks, dict]:
            blocks = _kronecker.estimate(
                objective, params, batch, model, key=key, num_probes=num_probes
            )
            if "kronecker_factors" in memory:
                old = memory["kronecker_factors"]
                builds = jnp.asarray(count // interval + 1, float)
                kept = jnp.minimum(jnp.asarray(decay, builds.dtype), 1 - 1 / builds)
                new = _kronecker.pack(blocks, model, old)
                new = jax.tree.map(
                    lambda x, y: _mixed(kept.astype(x.dtype), x, y), old, new
                )
                memory = memory | {"kronecker_factors": new}
                blocks = _kronecker.unpack(new, model)
            blocks = _kronecker.inverted(blocks, model, damping, damping_share)
            if "kronecker_inverses" in memory:
                old = memory["kronecker_inverses"]
                packed = _kronecker.pack(blocks, model, old)
                memory = memory | {"kronecker_inverses": packed}
            return blocks, memory

        if memory is None:
            return _product(fresh({})[0], model)
        if interval > 1:
            memory = jax.lax.cond(
                count % interval == 0,
                for_loops(lambda memory: fresh(memory)[1]),
                lambda memory: memory,
                memory,
            )
            assert memory is not None
            blocks = _kronecker.unpack(memory["kronecker_inverses"], model)
        else:
            blocks, memory = fresh(memory)
        return _product(blocks, model), memory

    remembers = averages or interval > 1
    return PreconditionerRule(build, data=data, init=init if remembers else None)


def nystrom(
    *,
    rank: int = 50,
    chunk: int | None = None,
    interval: int = 1,
    data: str = "batch",
) -> PreconditionerRule:
    """Precondition by a random sketch of G: its largest eigenvalues, and one for the rest.

        P⁻¹ = μ U (Λ + λI)⁻¹ Uᵀ + (I − U Uᵀ),      μ = λ + Λᵣ
        U Λ Uᵀ = GΩ (ΩᵀGΩ)⁻¹ (GΩ)ᵀ,    G ⪰ U Λ Uᵀ

    with r = `rank` orthonormal random columns Ω. P⁻¹(G + λD) has no large eigenvalues
    left where G has no more than r of them. With d = Σᵢ λᵢ/(λᵢ + λ) over G's eigenvalues,
    about the number of those above λ, and r = 2 ⌈1.5 d⌉ + 1, the condition number is below
    28 in expectation (Frangella et al. 2023, theorem 1.1); `hfjax.spectrum.density` gives
    d. With a smaller r it helps less, and costs `rank` products all the same.

    G is the Gauss-Newton matrix of the batch, with structural damping, without weight
    decay: that counts with λ, as only what decays has an approximation of low rank. Where
    D ≠ I the parameters are scaled by √diag(D), and G is sketched in that scale.
    Eigenvalues within the rounding of the products, 2e-6 of the largest in float32, count
    as 0, and μ − λ is at least 1e-5 of that: P is positive for λ = 0, and I for G = 0.

    A build costs `rank` products, and 16 rank² multiplications and additions for each
    parameter: on one CPU core, 840,000 parameters and a rank of 50, as long as 20 products
    of 2,000 cases, or 160 of 200. It holds 5 `rank` vectors like the parameters, and
    `chunk` times what a product does. P⁻¹r reads U twice.

    Args:
      rank: r, columns (50: heuristic); no more are taken than there are parameters.
      chunk: columns of a product at a time, where memory is short; `None` is all. On one
        CPU core one after another is as fast.
      interval: updates from one sketch to the next; those between have its U and Λ, and
        their own λ.
      data: as in `diagonal`.

    Returns:
      The rule. With an `interval` above 1 the state has room for `rank` + 1 vectors.

    Raises:
      TypeError: if a count is no Python integer.
      ValueError: if an option is out of range.

    Example:
      With as many columns as G has eigenvalues P is G + λI, and one iteration is enough:

      >>> import hfjax, jax, jax.numpy as jnp
      >>> f = hfjax.Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
      >>> p, batch = jnp.zeros(3), (jnp.array([[1.0, 2.0, 0.0]]), jnp.ones(1))
      >>> rule = nystrom(rank=2)
      >>> invert = rule.build(f, p, batch, jnp.float32(0.1), jax.random.key(0))
      >>> product = hfjax.curvature.ggn(f, p, batch)
      >>> r = jnp.array([1.0, 1.0, 3.0])
      >>> print((10 * invert(product(r) + 0.1 * r)).round(3))
      [1. 1. 3.]

    References:
      Frangella, Tropp & Udell (2023), "Randomized Nyström preconditioning", algorithm
      2.1 and equation 1.3.
    """
    _options.check_count("rank", rank, low=1)
    if chunk is not None:
        _options.check_count("chunk", chunk, low=1)
    _options.check_count("interval", interval, low=1)
    _options.check_choice("data", data, ("batch", "eval_batch"))

    def build(
        objective: Objective,
        params: Params,
        batch: Batch,
        damping: Tree,
        key: jax.Array,
        memory: dict[str, tuple] | None = None,
        count: jax.Array | int = 0,
    ) -> Any:
        total = _with_decay(damping, objective)

        def fresh() -> _nystrom.Sketch:
            return _nystrom.sketch(
                objective, params, batch, total, key, rank=rank, chunk=chunk
            )

        if memory is None:
            return _nystrom.inverse(fresh(), total)
        kept = jax.lax.cond(
            count % interval == 0,
            lambda kept: tuple(fresh()),
            lambda kept: kept,
            memory["nystrom"],
        )
        return _nystrom.inverse(_nystrom.Sketch(*kept), total), {"nystrom": kept}

    def init(params: Params) -> dict[str, tuple]:
        return {"nystrom": tuple(_nystrom.room_for(params, rank))}

    return PreconditionerRule(build, data=data, init=init if interval > 1 else None)


def layers(
    objective: Objective, params: Params, batch: Batch, *, max_size: int = 8192
) -> dict[str, str]:
    """Say what `kronecker` finds in a model: which parameter gets what, and why.

    Args:
      objective: whose model is traced; nothing is run.
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.
      max_size: the same as `kronecker` has (8192: as `kronecker`).

    Returns:
      A line for each parameter, by its path.

    Raises:
      TypeError: if `objective` is no `Objective`, or `max_size` no Python integer.

    Example:
      >>> import hfjax, jax.numpy as jnp
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2), "scale": jnp.ones(2)}
      >>> model_fn = lambda p, x: p["scale"] * jnp.tanh(x @ p["w"] + p["b"])
      >>> f = hfjax.Objective(model_fn, hfjax.losses.squared_error())
      >>> for name, what in layers(
      ...     f, params, (jnp.ones((1, 3)), jnp.ones((1, 2)))
      ... ).items():
      ...     print(name, what)
      ['b'] bias of ['w']
      ['scale'] diagonal: `mul` uses it
      ['w'] factors of 3 + 1 inputs and 2 units
    """
    if not isinstance(objective, Objective):
        msg = f"`objective` must be an `hfjax.Objective`, got {describe(objective)}."
        raise TypeError(msg)
    _options.check_count("max_size", max_size, low=1)
    params = as_params(params)
    model = merged(_kronecker.read(objective, params, batch, max_size))
    note = _kronecker.coarse(objective, params, batch)
    nearly = "" if note is None else f", nearly: {note}"
    paths = [
        jax.tree_util.keystr(path) or "params"
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    lines = {n: f"diagonal: {why}" for n, why in model.others.items()}
    for place, layer in enumerate(model.layers):
        inputs = f"{layer.inputs}" + (" + 1" if layer.bias is not None else "")
        positions = model.positions(place)
        words = " or ".join(map(str, positions))
        often = f", at {words} positions" if positions[-1] > 1 else ""
        units = f"{layer.units} units" if layer.units > 1 else "1 unit"
        beside = [
            f"; term {k} ({why}) adds the mean of its diagonal to the damping"
            for k, why in model.beside.get(layer.kernel, {}).items()
        ]
        lines[layer.kernel] = (
            f"factors of {inputs} inputs and {units}{often}{nearly}{''.join(beside)}"
        )
        if layer.bias is not None:
            lines[layer.bias] = f"bias of {paths[layer.kernel]}"
    return {path: lines[n] for n, path in enumerate(paths)}


def _with_decay(damping: Tree, objective: Objective) -> Tree:
    decay = decay_of(objective.weight_decay)
    if decay is None:
        return damping
    return jax.tree.map(lambda d: d + decay.astype(d.dtype), damping)


def _product(blocks: _kronecker.Blocks, model: Merged) -> Preconditioner:
    return lambda r: _kronecker.product(blocks, model, r)


def _mixed(kept: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Average, but for a build that is not finite: it would stay for ever."""
    mixed = kept * old + (1 - kept) * new
    return jnp.where(jnp.all(jnp.isfinite(new)), mixed, old)


def custom(build: Callable[..., Preconditioner]) -> PreconditionerRule:
    """Precondition by the caller's own P.

    Args:
      build: `(objective, params, batch, damping) -> (r -> P⁻¹ r)`, called once in
        each update, with arguments as in `PreconditionerRule`; P must be symmetric
        positive definite. If it has one more parameter, `key`, it is given a typed key
        that is new in each update.

    Returns:
      The rule.

    Raises:
      TypeError: if `build` is not callable.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = custom(lambda objective, params, batch, damping: lambda r: r / damping)
      >>> print(rule.build(None, None, None, 2.0, None)(jnp.array([6.0])))
      [3.]
    """
    if not callable(build):
        msg = f"`build` must be callable, got {type(build).__name__}."
        raise TypeError(msg)

    def with_or_without_key(
        objective: Objective,
        params: Params,
        batch: Batch,
        damping: Tree,
        key: jax.Array,
    ) -> Preconditioner:
        return with_key(build, key)(objective, params, batch, damping)

    return PreconditionerRule(with_or_without_key)


def _within_range(entries: Tree) -> Tree:
    """Put the largest float for infinity: squares of gradients overflow before these."""
    return jax.tree.map(lambda d: jnp.minimum(d, jnp.finfo(d.dtype).max), entries)


def _plus(entries: Tree, damping: Tree) -> Tree:
    """Add a scalar, or a tree like `entries`, in the dtypes of `entries`."""
    if getattr(damping, "ndim", None) == 0:
        return jax.tree.map(lambda d: d + damping.astype(d.dtype), entries)
    return jax.tree.map(lambda d, x: d + x.astype(d.dtype), entries, damping)
