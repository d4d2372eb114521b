"""Small benchmarks: of products, compiled updates, preconditioners and rounding."""
