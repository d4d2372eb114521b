"""Four devices on one CPU, and float64 for the truth; float32 trees stay float32.

`make test` leaves out the benchmarks, tests that are marked `slow`, and every example of a
test but the first, unless the test or its file is marked `every`. Property tests draw the
same examples in every run: five, or forty with `--hypothesis-profile=full`. `long` draws 800
others each time, and prints how to repeat a failure.
"""

import atexit
import gc
import os
import tempfile

import jax
import pytest
from hypothesis import HealthCheck, settings

# Programs are not optimised, which halves what compiling costs. Notebooks, examples, the
# README and the commands of `.ci/run` are. Workers of xdist inherit the flags.
FLAGS = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):  # Else XLA has no other way to write a kernel.
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
if os.environ.setdefault("XLA_FLAGS", FLAGS) == FLAGS:
    # Else a user's own flags may set the devices.
    jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)

if "HYPOTHESIS_STORAGE_DIRECTORY" not in os.environ:  # Else Hypothesis writes here.
    storage = tempfile.TemporaryDirectory()
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = storage.name
    atexit.register(storage.cleanup)
settings.register_profile(
    "quick",
    max_examples=5,
    derandomize=True,
    database=None,
    deadline=None,  # The first example compiles.
    suppress_health_check=[HealthCheck.too_slow],  # As a busy machine is.
)
settings.register_profile("full", settings.get_profile("quick"), max_examples=40)
settings.register_profile(
    "long",
    settings.get_profile("full"),
    max_examples=800,
    derandomize=False,
    print_blob=True,
)
settings.load_profile("quick")

# A tenth of the time goes to looking for garbage among what tracing makes.
gc.freeze()
gc.set_threshold(50_000)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as slow what is left to `make test-all`."""
    seen = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        is_further = test in seen and not item.get_closest_marker("every")
        if is_further or "benchmarks" in item.path.parts:
            item.add_marker("slow")
        seen.add(test)


@pytest.fixture(autouse=True)
def no_rank_promotion():
    """Let no array be broadcast unasked; doctests outside of `tests` may."""
    with jax.numpy_rank_promotion("raise"):
        yield
