"""The update: all components combined into one Optax transformation.

`hessian_free` takes an objective and the components to use, and refuses those that do not
fit together. Each update assembles the system A δ = −∇f, has it solved, chooses and judges
a step, adapts λ, and returns the change of the parameters and the state for the next
update. `recipes` has complete set-ups under one name.
"""
