"""Foundations that every module shares: types, trees of arrays, and checks of arguments.

They turn user-supplied arguments into trees of arrays with the dtypes and the device
layout that a computation needs, or raise an error that names the argument and the remedy.
All sums over parameters are taken here, so that they are accurate in every dtype and
never gather a sharded leaf. Nothing here knows what is being computed.
"""
