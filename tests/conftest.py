"""Four devices on one CPU, and float64 for the truth; float32 trees stay float32.

Property tests draw the same few examples in every run; `--hypothesis-profile=long`
draws others each time, twenty times as many, and prints how to repeat a failure.
"""

import atexit
import os
import tempfile

import jax
import pytest
from hypothesis import HealthCheck, settings

# A third of what compiling costs (see `reference`); workers of xdist inherit it.
QUICK_FLAGS = "--xla_cpu_use_fusion_emitters=false"
if os.environ.get("XLA_FLAGS", QUICK_FLAGS) == QUICK_FLAGS:
    # Else a user's own flags may set the devices.
    jax.config.update("jax_num_cpu_devices", 4)
    if jax.__version_info__ < (0, 11):
        os.environ["XLA_FLAGS"] = QUICK_FLAGS
jax.config.update("jax_enable_x64", True)

if "HYPOTHESIS_STORAGE_DIRECTORY" not in os.environ:  # Else Hypothesis writes here.
    storage = tempfile.TemporaryDirectory()
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = storage.name
    atexit.register(storage.cleanup)
settings.register_profile(
    "quick",
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,  # The first example compiles.
    suppress_health_check=[HealthCheck.too_slow],  # As a busy machine is.
)
settings.register_profile(
    "long",
    settings.get_profile("quick"),
    max_examples=800,
    derandomize=False,
    print_blob=True,
)
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def no_rank_promotion():
    """Let no array be broadcast unasked; doctests outside of `tests` may."""
    with jax.numpy_rank_promotion("raise"):
        yield
