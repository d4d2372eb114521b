"""Objectives: a model, a loss and data as one function f(θ), and weighted sums of them.

Given a `model_fn` and a loss, an `Objective` hands on f, its gradient and the value of each
example, for any parameters and batch. It alone knows how a mean over examples is taken:
with weights, in microbatches, over devices. All that lies above computes through it, so
that value, gradient, curvature and preconditioner belong to the same f.
"""
