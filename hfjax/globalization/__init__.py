"""Globalisation: how far the quadratic model is trusted, and how far a step is taken.

M describes f only near θ. Damping chooses λ, or a radius, and the matrix D that λ
multiplies, from how well M predicted f; backtracking chooses among the steps of one run by
f itself; the line search shortens what is left. All of them are given numbers and functions
of a step, and hand on a scalar or a choice: none knows the model or the data.
"""
