"""Whole runs: from parameters and data to a fit, with its history and why it ended.

`fit` runs any optimizer on any objective. `least_squares` fits the parameters of a curve,
or of any model with residuals, to rounding, and knows how uncertain they are.
`minibatching` draws batches for training loops. A run is given functions and arrays; it
hands on a `Fit`.
"""
