"""Curvature: an objective, parameters and a batch become a product v ↦ B v.

B is the Gauss-Newton matrix, the Hessian or the empirical Fisher matrix, and is never
formed. If products are not enough, the same arguments give the diagonal of B, or the
Jacobian of the outputs as an explicit matrix. Structural damping is also here, because
it is one more term of the Gauss-Newton matrix.
"""

from hfjax.curvature.products import Curvature as Curvature
from hfjax.curvature.products import empirical_fisher as empirical_fisher
from hfjax.curvature.products import (
    finite_difference_hessian as finite_difference_hessian,
)
from hfjax.curvature.products import ggn as ggn
from hfjax.curvature.products import hessian as hessian
from hfjax.curvature.products import with_precision as with_precision
