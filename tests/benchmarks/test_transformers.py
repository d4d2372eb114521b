"""The suite of small transformers: what can be learned, and what a mask hides."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import benchmarks.suites
from benchmarks import cli
from benchmarks.suites import transformer_networks, transformers

BUILDERS = {
    "writer": transformers.writer,
    "tagger": transformers.tagger,
    "vision": transformers.vision,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_start_is_about_as_good_as_chance_and_the_milestones_lie_below(name):
    problem = BUILDERS[name]()
    params = problem.start(jax.random.key(0))
    f, excess = problem.measurer(params, 0)(params, 0)
    assert f - excess == pytest.approx(problem.summary.floor)
    places, kinds = {"writer": (16, 32), "tagger": (16, 12), "vision": (1, 10)}[name]
    assert 0.9 < f / (places * np.log(kinds)) < 1.4
    milestones = list(problem.summary.milestones.values())
    assert milestones == sorted(milestones, reverse=True)
    assert milestones[0] < excess
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 18_000 < size < 20_000


def test_the_floor_of_the_writer_is_the_entropy_of_what_follows_a_beginning():
    inputs, targets = map(np.asarray, transformers.writer().data(0))
    total = 0.0
    for n in range(len(inputs)):
        for step in range(inputs.shape[1]):
            same = np.all(inputs[:, : step + 1] == inputs[n, : step + 1], axis=1)
            follow = same & (targets[:, step] == targets[n, step])
            total -= np.log(np.sum(follow) / np.sum(same))
    floor = transformers.writer().summary.floor
    assert floor == pytest.approx(total / len(inputs), rel=1e-6)


def test_the_writer_does_not_look_ahead_and_the_tagger_not_at_what_fills_up():
    writer, tagger = transformers.writer(), transformers.tagger()
    inputs, _ = writer.data(0)
    params = writer.start(jax.random.key(0))
    changed = inputs.at[:, 9:].set((inputs[:, 9:] + 1) % transformer_networks.SYMBOLS)
    ours, theirs = (writer.objective.model_fn(params, x) for x in (inputs, changed))
    np.testing.assert_allclose(ours[:, :9], theirs[:, :9], atol=1e-5)
    assert float(jnp.max(jnp.abs(ours[:, 9:] - theirs[:, 9:]))) > 0.1
    symbols, _ = tagger.data(0)
    params = tagger.start(jax.random.key(0))
    filled = params["Embed_0"]["embedding"]
    params["Embed_0"]["embedding"] = filled.at[0].add(1.0)
    moved = tagger.objective.model_fn(params, symbols)
    params["Embed_0"]["embedding"] = filled
    there = np.asarray(symbols > 0)
    ours = tagger.objective.model_fn(params, symbols)
    np.testing.assert_allclose(ours[there], moved[there], atol=1e-5)
    assert not np.any(ours[~there])


def test_without_flax_the_suite_says_what_to_install(monkeypatch):
    name = transformer_networks.__name__
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(benchmarks.suites, name.rpartition(".")[2])
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(cli.RefusedError, match=r"pip install 'hfjax\[flax\]'"):
        transformers.vision()
