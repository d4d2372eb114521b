"""Four devices on one CPU, and float64 for the truth; float32 trees stay float32."""

import os

import jax
import pytest

if "XLA_FLAGS" not in os.environ:  # Where a user's own flags may set the devices.
    jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)


@pytest.fixture(autouse=True)
def no_rank_promotion():
    """Let no array be broadcast unasked; doctests outside of `tests` may."""
    with jax.numpy_rank_promotion("raise"):
        yield
