"""Programs do not grow unnoticed: what compiling an update takes its time for."""

import jax
import pytest

from benchmarks.micro import costs, programs
from benchmarks.micro.cost_problems import FLOAT64, PROBLEMS

LIMITS = {
    "readme": (2400, 365),
    "poisson": (2450, 340),
    "recurrent": (2750, 530),
    "autoencoder": (7150, 1415),
}
"""Operations that XLA is given, and kernels that it makes of them, some 3 % above what
they were with jax 0.10.2 and 0.12 on 2026-11-30. A change that lowers them lowers these.
That of the autoencoder has loops over parts of the batch, which are 400 of its kernels."""


@pytest.mark.parametrize("name", LIMITS)
def test_an_update_has_no_more_operations_and_kernels_than_it_had(name):
    most_operations, most_kernels = LIMITS[name]
    with jax.enable_x64(name in FLOAT64), jax.numpy_rank_promotion("allow"):
        problem = PROBLEMS[name](None)
        lowered = costs.lower(costs.OPTIONS["default"], problem).program
        lines = lowered.as_text().splitlines()
        operations = sum(" = " in line for line in lines)
        kernels = programs.read(lowered.compile().as_text()).kinds.total()
    assert 0.9 * most_operations < operations <= most_operations
    assert 0.9 * most_kernels < kernels <= most_kernels
