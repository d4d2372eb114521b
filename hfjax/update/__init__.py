"""The update: all parts put together as one Optax transformation.

`hessian_free` is given an objective and the parts to use, and refuses parts that do not
fit. Each update assembles the system A δ = −∇f, has it solved, chooses and judges a step,
adapts λ, and hands on the change of the parameters and the state for the next update.
`recipes` has whole set-ups under one name.
"""
