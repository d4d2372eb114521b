"""Tools to inspect a training run, a curvature matrix, or a set-up.

`diagnostics` turns optimizer states into numbers, tables and figures. `spectrum`
estimates eigenvalues of a matrix from its products with vectors. `verify` compares
derivatives with finite differences and explains what is wrong with a set-up. No other
package needs this one.
"""
