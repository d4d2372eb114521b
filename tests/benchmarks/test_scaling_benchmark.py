"""The scaling benchmark: its formulas are those of the compiled programs."""

import json

import jax
import pytest

from benchmarks import scaling_machines as machines
from benchmarks import scaling_model as model
from benchmarks import scaling_programs as programs
from benchmarks.__main__ import main
from benchmarks.scaling_tables import dense
from benchmarks.scaling_traffic import (
    BACKTRACKING,
    ITERATION,
    LINE_SEARCH,
    OUTSIDE,
    ROUND,
)

DEVICES = 4
pytestmark = pytest.mark.skipif(
    jax.device_count() < DEVICES, reason="needs four devices"
)
NETWORK = programs.Network(width=64, layers=3)
VECTOR = 4 * NETWORK.parameters  # bytes
SCALARS = 0.01  # of a vector; what a place may move beside vectors


@pytest.fixture(autouse=True, scope="module")
def in_float32():
    with jax.enable_x64(False):
        yield


def in_vectors(moved):
    return moved.reduced / VECTOR, moved.gathered / VECTOR


@pytest.mark.parametrize("layout", programs.LAYOUTS)
def test_a_product_moves_and_computes_what_the_formulas_say(layout):
    cases = 256
    mesh = programs.mesh_of(DEVICES)
    product = programs.compile_product(NETWORK, layout, mesh, cases)
    expected = model.product_elements(NETWORK.parameters, layout)
    assert in_vectors(product.traffic[ITERATION]) == (
        expected.reduced / NETWORK.parameters,
        expected.gathered / NETWORK.parameters,
    )
    if layout != programs.SCANNED:  # Of a scan XLA counts the flops of one layer.
        one = dense(NETWORK)
        flops = cases / DEVICES * (one.whole + one.product)
        assert 1 <= product.flops / flops < 1.05


def test_an_update_with_replicated_parameters_is_as_the_formulas_say():
    mesh, cases = programs.mesh_of(DEVICES), 256
    update = programs.compile_update(NETWORK, programs.REPLICATED, mesh, cases)
    assert {place: m.counts for place, m in update.traffic.items()} == {
        place: {"all-reduce": 1}
        for place in (OUTSIDE, ROUND, ITERATION, BACKTRACKING, LINE_SEARCH)
    }
    assert in_vectors(update.traffic[ITERATION]) == (1, 0)
    check_total(update, programs.REPLICATED)
    flops = model.update_flops(
        dense(NETWORK),
        gradient_cases=cases / DEVICES,
        curvature_cases=cases / DEVICES,
        evaluation_cases=cases / DEVICES,
        iterations=1,
        evaluations=2,  # One for each loop, as XLA counts them.
        shared=True,
    )
    assert 1 <= update.flops / flops < 1.1


def test_an_update_with_sharded_parameters_holds_its_share_of_the_vectors():
    mesh = programs.mesh_of(DEVICES)
    update = programs.compile_update(
        NETWORK, programs.SCANNED, mesh, 64, preconditioner=None
    )
    check_total(update, programs.SCANNED, diagonal=False)
    share = model.update_vectors(16, diagonal=False) / DEVICES
    layers = 3 / NETWORK.layers  # w, v and G v of one, whole.
    held = (update.temporary + update.held) / VECTOR
    assert held == pytest.approx(share + layers, rel=0.1)


def check_total(update, layout, *, diagonal=True):
    iterations, looks = 7, 2
    times = {OUTSIDE: 1, ROUND: 1, ITERATION: iterations, BACKTRACKING: looks}
    moved = [
        sum(times[place] * in_vectors(update.traffic[place])[kind] for place in times)
        for kind in (0, 1)
    ]
    expected = model.update_elements(
        NETWORK.parameters,
        NETWORK.parameters / NETWORK.layers,
        layout,
        iterations=iterations,
        evaluations=looks,
        diagonal=diagonal,
    )
    formula = [elements / NETWORK.parameters for elements in expected]
    assert moved == pytest.approx(formula, rel=SCALARS, abs=SCALARS)


def test_links_matter_less_the_larger_the_batch():
    sizes = (machines.H200, 8, 25e6, 50e6)
    even = machines.hidden_cases(*sizes)
    at_even = machines.iteration_seconds(*sizes, even)
    assert at_even.links == pytest.approx(at_even.matrices)
    # A gradient computes less than a product, and reduces as much.
    adam = machines.gradient_seconds(*sizes, even)
    assert adam.links == pytest.approx(at_even.links)
    assert adam.matrices < at_even.matrices


def test_too_few_devices_are_refused_in_one_line(tmp_path, capsys):
    status = main(["scaling", "--devices", "64", "--out", str(tmp_path / "o.json")])
    assert status == 2
    assert "64 devices are needed" in capsys.readouterr().err


def test_the_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    nothing = programs.Program({}, 1.0, 1.0, VECTOR, VECTOR)
    monkeypatch.setattr("benchmarks.scaling.compile_one", lambda *args: nothing)
    path = tmp_path / "scaling.json"
    assert main(["scaling", "--devices", "1", "4", "--out", str(path)]) == 0
    rows = json.loads(path.read_text())["memory"]
    assert [row["mesh"] for row in rows] == [[1], [1], [4], [4], [2, 2], [2, 2]]
    assert "Predictions" in capsys.readouterr().out
