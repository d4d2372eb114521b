"""Losses: how far a model's outputs are from the targets, example by example.

A `Loss` provides the value for each example, products with its Hessian L″ with respect to
the outputs, and products with a factor S of that Hessian, S Sᵀ = L″. The built-in losses
have both in closed form. For any other callable they are derived by automatic
differentiation, and an L″ that is not positive semi-definite can be repaired. `tree` puts
losses of several outputs together.
"""

from hfjax.losses.combined import scaled as scaled
from hfjax.losses.combined import tree as tree
from hfjax.losses.likelihoods import gaussian as gaussian
from hfjax.losses.likelihoods import gaussian_kl_divergence as gaussian_kl_divergence
from hfjax.losses.likelihoods import ordinal as ordinal
from hfjax.losses.likelihoods import poisson as poisson
from hfjax.losses.matching import Loss as Loss
from hfjax.losses.matching import from_function as from_function
from hfjax.losses.matching import sigmoid_cross_entropy as sigmoid_cross_entropy
from hfjax.losses.matching import softmax_cross_entropy as softmax_cross_entropy
from hfjax.losses.matching import (
    softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,
)
from hfjax.losses.matching import squared_error as squared_error
