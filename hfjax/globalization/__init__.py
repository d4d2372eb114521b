"""Globalisation: how far to trust the quadratic model, and how far to go.

M describes f only near θ. Damping chooses λ, or a radius, and the matrix D that λ
multiplies, from how well M predicted f. Backtracking chooses among the steps of one run
by f itself, and the line search shortens the chosen step. All of them see only numbers
and functions of a step, never the model or the data.
"""
