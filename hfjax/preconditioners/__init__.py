"""Preconditioners: matrices P close to A = B + λD whose inverses are cheap to apply.

Given an objective, parameters, a batch and λ, a rule returns the product r ↦ P⁻¹r. P is
a diagonal, a Kronecker product for each layer, or built from a random sketch of the
largest eigenvalues. Layers need no registration: they are found in the program of the
model.
"""

from hfjax.preconditioners.preconditioned import (
    ScaleByPreconditionerState as ScaleByPreconditionerState,
)
from hfjax.preconditioners.preconditioned import (
    scale_by_preconditioner as scale_by_preconditioner,
)
from hfjax.preconditioners.rules import PreconditionerRule as PreconditionerRule
from hfjax.preconditioners.rules import custom as custom
from hfjax.preconditioners.rules import diagonal as diagonal
from hfjax.preconditioners.rules import kronecker as kronecker
from hfjax.preconditioners.rules import layers as layers
from hfjax.preconditioners.rules import nystrom as nystrom
