"""Solvers: from a gradient and a product with A = B + λD to a step δ.

A solver is given λ, or a radius, and minimises M(δ) = ½ δᵀAδ − bᵀδ, approximately or
exactly. It sees A as a function v ↦ A v (an exact solver, as the Jacobian), and never the
model or the loss. It returns the step, the iterates on the way if a later choice needs
them, and the reason why it stopped.
"""
