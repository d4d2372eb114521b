"""Building and feeding a model: first weights, long scans, recurrent networks, batches.

Given a random key, a step function or a data set, these modules hand on weights to start
from, a scan that fits into memory, a recurrent network for Flax, or one batch after
another. Each is a convenience: the optimizer takes any function of parameters and inputs,
and nothing here knows of losses or updates.
"""
