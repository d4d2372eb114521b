"""How JAX is used: functions become programs, which are read, linearised and compiled.

Given a function, these modules make it linear at one place, read the program that JAX
traces of it, lay out its convolutions so that loops run fast, and keep what has been
compiled for the next call. They hand on linear maps, equations and decompositions. What a
new version of JAX or XLA may change is met here.
"""
