"""Solvers: from a gradient and a product with A = B + λD to a step δ.

A solver is given λ, or a radius, and minimises M(δ) = ½ δᵀAδ − bᵀδ, nearly or exactly. It
sees A as a function v ↦ A v (the exact one as the Jacobian), and never the model or the
loss. It hands on the step, the iterates on the way to it where a later choice needs them,
and the reason why it stopped.
"""
