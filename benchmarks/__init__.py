"""Benchmarks: Hessian-free against its rivals on deep autoencoders.

    python -m benchmarks autoencoder     # a race of about four minutes on two cores
    python -m benchmarks product         # what a curvature product costs

The experiment is that of Martens (2010): autoencoders too deep for plain gradient
descent from a random start. `data` makes or reads the images, `network` builds
the model, `racers` the optimizers, `race` runs one of them against the clock.
"""
