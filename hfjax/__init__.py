"""hfjax: Hessian-free optimization for JAX, as an Optax transformation.

This is the method of Martens (2010) and Martens & Sutskever (2012). `hessian_free` is the
complete optimizer. The modules contain its components, which are also useful on their own.
"""

from hfjax import curvature as curvature
from hfjax import losses as losses
from hfjax import preconditioners as preconditioners
from hfjax.curvature import diagonals as diagonals
from hfjax.globalization import backtracking as backtracking
from hfjax.globalization import damping as damping
from hfjax.globalization import damping_matrices as damping_matrices
from hfjax.globalization import linesearch as linesearch
from hfjax.globalization import trust_region as trust_region
from hfjax.inspection import diagnostics as diagnostics
from hfjax.inspection import spectrum as spectrum
from hfjax.inspection import verify as verify
from hfjax.models import initializers as initializers
from hfjax.models import scan as scan
from hfjax.objectives import objective as objective
from hfjax.objectives.objective import Objective as Objective
from hfjax.preconditioners import scale_by_preconditioner as scale_by_preconditioner
from hfjax.solvers import cg as cg
from hfjax.solvers import iterates as iterates
from hfjax.solvers import krylov as krylov
from hfjax.solvers import sample_space as sample_space
from hfjax.solvers import stopping as stopping
from hfjax.training import minibatching as minibatching
from hfjax.training.fit import fit as fit
from hfjax.training.least_squares import least_squares as least_squares
from hfjax.update import recipes as recipes
from hfjax.update import sampling as sampling
from hfjax.update import state as state
from hfjax.update import transform as transform
from hfjax.update.state import HessianFreeInfo as HessianFreeInfo
from hfjax.update.state import HessianFreeState as HessianFreeState
from hfjax.update.state import Rejection as Rejection
from hfjax.update.transform import hessian_free as hessian_free
from hfjax.update.transform import scale_by_hessian_free as scale_by_hessian_free

__version__ = "0.1.0"
