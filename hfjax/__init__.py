"""hfjax: Hessian-free optimisation for JAX, as an Optax transformation.

The method of Martens (2010) and Martens & Sutskever (2012). `hessian_free` is the
whole optimizer; the modules are its parts, each of use alone.
"""

from hfjax import backtracking as backtracking
from hfjax import cg as cg
from hfjax import curvature as curvature
from hfjax import damping as damping
from hfjax import damping_matrices as damping_matrices
from hfjax import diagnostics as diagnostics
from hfjax import diagonals as diagonals
from hfjax import initializers as initializers
from hfjax import iterates as iterates
from hfjax import krylov as krylov
from hfjax import linesearch as linesearch
from hfjax import losses as losses
from hfjax import minibatching as minibatching
from hfjax import objective as objective
from hfjax import preconditioners as preconditioners
from hfjax import recipes as recipes
from hfjax import sample_space as sample_space
from hfjax import scan as scan
from hfjax import spectrum as spectrum
from hfjax import stopping as stopping
from hfjax import structural as structural
from hfjax import trust_region as trust_region
from hfjax import verify as verify
from hfjax.objective import Objective as Objective
from hfjax.state import HessianFreeInfo as HessianFreeInfo
from hfjax.state import HessianFreeState as HessianFreeState
from hfjax.state import Rejection as Rejection
from hfjax.transform import hessian_free as hessian_free
from hfjax.transform import scale_by_hessian_free as scale_by_hessian_free

__version__ = "0.1.0"
