"""Benchmarks of hfjax: one comparison with other optimizers, and four small ones.

    python -m benchmarks compare --suite images    # a race of optimizers
    python -m benchmarks costs                     # what an update costs before it runs

`harness` runs optimizers in turns and keeps what they measure, `suites` has the problems,
`optimizers` and `peers` the competitors, and `micro` the small benchmarks.
"""

import time

IMPORTED = time.perf_counter()
"""When Python came here, which is before it imports JAX."""
