"""What every part speaks: types, trees of arrays, and checked arguments.

Given what users hand in, these modules hand on trees of arrays with the dtypes and the
layout over devices that a computation needs, or an error that names the argument and the
cure. Sums over parameters are taken here and nowhere else, so that they are precise in
every dtype and never gather a sharded leaf. Nothing here knows what is computed.
"""
