"""Objectives: a model, a loss and data as one function f(θ), and weighted sums of them.

An `Objective` evaluates f, its gradient and the loss of each example, for any parameters
and batch. This package alone knows how a mean over examples is taken: with weights, in
microbatches, over devices. Value, gradient, curvature and preconditioner all compute
through it, so they all belong to the same f.
"""
