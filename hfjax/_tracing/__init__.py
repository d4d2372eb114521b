"""How hfjax uses JAX: functions are traced, linearised and compiled.

`programs` reads the jaxpr of a traced function, `linearize` differentiates a function at
one point, `compiled` reuses executables between eager calls, `convolutions` and `linalg`
avoid slow or blocking code paths of XLA on CPUs; `layers` finds the layers of a model in
its program. Nothing here knows about optimization.
Most of what a new version of JAX or XLA can break is in this package.
"""
