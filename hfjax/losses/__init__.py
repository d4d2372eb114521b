"""Losses: how far a model's outputs are from the targets, example by example.

Given outputs and targets, a `Loss` hands on the value of each example, and products with
its Hessian L″ in the outputs and with a factor S of it, S Sᵀ = L″. The matching losses
have both in closed form. For any other callable they are derived from its program, and L″
is repaired, if asked, where it is not positive semi-definite.
"""

from hfjax.losses.matching import Loss as Loss
from hfjax.losses.matching import from_function as from_function
from hfjax.losses.matching import sigmoid_cross_entropy as sigmoid_cross_entropy
from hfjax.losses.matching import softmax_cross_entropy as softmax_cross_entropy
from hfjax.losses.matching import (
    softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,
)
from hfjax.losses.matching import squared_error as squared_error
