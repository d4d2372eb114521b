"""Inspection: what a run does, what its curvature is like, and what may be wrong with it.

Given the states of a run, `diagnostics` hands on numbers, tables and figures. Given a
product, `spectrum` estimates its eigenvalues. `verify` compares derivatives with finite
differences, and says in plain sentences what is wrong with a set-up. Training needs none of
this: nothing else imports it.
"""
