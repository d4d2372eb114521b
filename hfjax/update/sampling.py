"""The part of a batch from which an update computes the curvature.

| rule | cases |
|---|---|
| `growing` | few at first, and more as soon as they say too little about the others |
| `None` | all |

The gradient and f, also that in ρ, are of all cases whatever the rule. Curvature costs most of an update,
and far from a minimum a few hundred cases have much the same curvature as all of them.
"""

from typing import NamedTuple

from hfjax._core import options
from hfjax._core.types import Number


class Sampling(NamedTuple):
    """A rule for the cases that the curvature is computed from.

    Attributes:
      smallest: the fewest cases.
      agreement: the least mean q with which as many will do.
      least_work: the product of cases and parameters below which all cases are taken.
    """

    smallest: int
    agreement: Number
    least_work: int


def growing(
    smallest: int = 250, *, agreement: Number = 0.5, least_work: int = 0
) -> Sampling:
    """Compute the curvature from few cases, and from more when these agree too little.

    Each update takes the next cases S of the batch, in turn, for B and the preconditioner. Of
    its step δ it computes the curvature on as many fresh cases S′, too, and

        q = δᵀB_S δ / δᵀB_S′ δ.

    q is about 1 if S tells how f bends along δ. It falls below as δ comes to fit S alone:
    δ is long where B_S happens to be small. When the running mean of q is below `agreement`,
    the next updates take twice as many cases, up to all of the batch. Nothing is compiled
    again: the batch is divided into microbatches, and those that are left out cost nothing.

    The steps for several λ are compared on 2 · `smallest` cases, if the rule that compares
    them would look at more (`damping.searched(cases=…)`), and the one that is taken is
    judged on all.

    Order the cases at random beforehand, or S and S′ are of different kinds.

    A batch of fewer than 4 · `smallest` cases is taken as a whole. So is one that is passed
    with an `eval_batch`, because the caller has divided the data already.

    Args:
      smallest: the fewest cases of a part. The batch is divided into 16 equal parts, or 8
        or 4 if it is too small for more, and the first updates take one of them.
      agreement: q from 0 to 1. 0 never takes more cases; 1 takes all of them soon.
      least_work: take all of a batch if cases times parameters are fewer, as an update is
        then short, and compiling one that divides its batch takes some seconds more.

    Returns:
      The rule, for `hfjax.hessian_free(sampling=…)`.

    Raises:
      TypeError: if `smallest` is not a Python integer.
      ValueError: if an option is out of range.

    Example:
      The mean of 4,000 numbers can be learned from 250, so that no more are taken:

      >>> import hfjax, jax, jax.numpy as jnp
      >>> f = hfjax.Objective(lambda p, x: p * x, hfjax.losses.squared_error())
      >>> batch = jnp.ones((4000, 1)), jax.random.normal(jax.random.key(0), (4000, 1))
      >>> tx, p = hfjax.hessian_free(f, sampling=growing()), jnp.ones(1)
      >>> grads = f.value_and_grad(p, batch)[1]
      >>> updates, state = tx.update(grads, tx.init(p), p, batch=batch)
      >>> print(state.sample.share, state.sample.agreement.round(3))
      0.0625 1.0

    References:
      Martens (2010), section 4.4, computes the curvature from a fixed part of the batch.
      Byrd et al. (2012) let samples for the gradient grow by a test of its variance.
    """
    options.check_count("smallest", smallest, low=1)
    options.check_range("agreement", agreement, low=0.0, high=1.0)
    options.check_count("least_work", least_work, low=0)
    return Sampling(smallest, agreement, least_work)


SMALL = 10**8
"""Cases times parameters below which `sampling="auto"` takes all cases: a product then
takes some hundredths of a second on a core."""
