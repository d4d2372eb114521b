"""Examples of the pages run as they stand, and do what the pages say."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hfjax

pytest.importorskip("flax.nnx")

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def blocks(page):
    """Return the examples of a page."""
    text = (DOCS / page).read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def quick_parts(monkeypatch):
    """Give the optimizer parts that compile quickly, and let Flax promote ranks."""
    parts = {
        "damping": hfjax.damping.levenberg_marquardt(init=0.1),
        "preconditioner": None,
        "solver": hfjax.cg.conjugate_gradient(max_iterations=5),
    }

    def hessian_free(objective, **options):
        return build(objective, **{**parts, **options})

    build = hfjax.hessian_free
    monkeypatch.setattr(hfjax, "hessian_free", hessian_free)
    with jax.numpy_rank_promotion("allow"):
        yield


def test_models_that_change_are_compiled_once_and_trained():
    # In float32, as users run it: Flax would widen statistics of float64 inputs.
    with jax.enable_x64(False):
        run_page_of_changing_models()


def run_page_of_changing_models():
    names, steps = {}, []
    for block in blocks("changing.md"):
        exec(block, names)
        step = names["train_step"]
        step = getattr(step, "jitted_fn", step)
        assert step._cache_size() == 1, block
        steps.append(step)
        states = names["states"] if "forger" in block else [names["state"]]
        for state in states:
            assert state.count == 5
            assert state.info.update_norm > 0
        if "nn.BatchNorm" in block:
            check_statistics(names)
        if "nnx.BatchNorm" in block:
            assert np.all(np.asarray(names["model"].layers[1].mean[...]) != 0)
    assert len(steps) == len(set(steps)) == 6


def check_statistics(names):
    """Train on a batch with NaN: parameters and statistics stay as they are."""
    x, t = names["batch"]
    kept = names["params"], names["statistics"]
    *found, state = names["train_step"](*kept, names["state"], (x * jnp.nan, t))
    assert not state.info.accepted
    jax.tree.map(np.testing.assert_array_equal, tuple(found), kept)
    assert jnp.all(kept[1]["BatchNorm_0"]["var"] != 1)
