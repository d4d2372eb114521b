"""Build a model: initial weights, long scans, recurrent networks.

Each module is a convenience. The optimizer takes any function of parameters and inputs,
and nothing here knows about losses or updates.
"""
