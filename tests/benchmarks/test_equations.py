"""The suite of equations: definitions, errors beside published ones, and the command."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.harness import table
from benchmarks.harness.history import Plan, Row, Run, RunFile
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.suites import derivatives
from benchmarks.suites.equations import EXPERIMENTS, SUITE
from benchmarks.suites.experiment import Levels, kind

EQUATIONS = {
    p.equation.title: p.equation for p in EXPERIMENTS.values() if p.equation.spatial
}
"""Those of `Derivatives`; the others are in `test_evolution.py`."""
KEY = jax.random.key(7)


@pytest.fixture(autouse=True)
def _quick():
    jax.config.update("jax_disable_most_optimizations", True)  # Compiling is the cost.
    with jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def dense(function, points, spatial):
    """Derive by `jax.grad` and `jax.hessian`, a point at a time."""
    hessians = jax.vmap(jax.hessian(function))(points)
    return derivatives.Derivatives(
        jax.vmap(function)(points),
        jax.vmap(jax.grad(function))(points),
        sum(hessians[:, i, i] for i in spatial),
    )


@pytest.mark.parametrize("title", EQUATIONS)
def test_the_solution_has_no_residual_and_another_function_has(title):
    equation = EQUATIONS[title]
    points = equation.inside(KEY, 6)

    def other(point):
        space = point[jnp.asarray(equation.spatial)]
        return equation.solution(point) + 0.01 * jnp.sum(space**2)

    found = dense(equation.solution, points, equation.spatial)
    residual = equation.residual(points, found)
    assert residual.shape == (6,)
    np.testing.assert_allclose(residual, 0, atol=1e-10)
    wrong = equation.residual(points, dense(other, points, equation.spatial))
    assert np.abs(wrong).min() > 1e-4


def half(dimension, time=None):
    return (
        np.full(dimension, 0.5)
        if time is None
        else np.r_[time, np.full(dimension, 0.5)]
    )


@pytest.mark.parametrize(
    ("name", "point", "value"),
    [
        ("poisson2d", [0.5, 1 / 6], 0.5),
        ("poisson2d_medium", [1 / 3, 1.0], -0.5),
        ("poisson2d_medium_sin", [0.5, 1 / 6], 0.5),
        ("poisson2d_large", [1 / 3, 1.0], -0.5),
        ("poisson2d_large_sin", [0.5, 1 / 6], 0.5),
        ("poisson3d", [0.5, 1 / 6, 0.5], 0.5),
        ("poisson5d", [0, 0, 0, 1 / 3, 1.0], 2.5),
        ("poisson10d", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 190 / 1.34),
        ("poisson100d", half(100), 25 / 33.47),
        # sin 4x sin 4y is 1 and the others are 0 there, but for sin 12x sin 12y, also 1.
        ("poisson2d_waves", [1 / 8, 1 / 8], 0.5),
        ("heat10d_large", half(10, 0.3), 10 * math.exp(-0.3) * math.sin(1)),
        ("heat1d", half(1, 0.4), math.exp(-0.1 * math.pi**2)),
        ("heat4d", half(4, 0.3), 4 * math.exp(-0.3) * math.sin(1)),
        # N(0, I) at the start, and ever nearer N(0, 2 I).
        ("log_fokker_planck9d", half(9, 0.0), -9 / 8 - 4.5 * math.log(2 * math.pi)),
        ("log_fokker_planck9d", half(9, 99.0), -9 / 16 - 4.5 * math.log(4 * math.pi)),
    ],
)
def test_solutions_are_the_published_ones(name, point, value):
    solution = EXPERIMENTS[name].equation.solution
    point = jnp.asarray(point, float)
    assert float(solution(point)) == pytest.approx(value, rel=1e-12)
    assert solution(point[None])[0] == solution(point)


def test_coefficients_of_the_residuals_are_the_published_ones():
    # By hand, of u with ∂u/∂t = 2, ∂u/∂xᵢ = 3 and Δu = 5 at t = 0, x = (1, …, 1).
    def residual(name):
        equation = EXPERIMENTS[name].equation
        point = jnp.ones((1, equation.coordinates)).at[0, 0].set(0.0)
        gradient = jnp.full(point.shape, 3.0).at[0, 0].set(2.0)
        found = derivatives.Derivatives(jnp.ones(1), gradient, jnp.full(1, 5.0))
        return float(equation.residual(point, found)[0])

    assert residual("heat4d") == pytest.approx(2 - 5 / 4)
    assert residual("poisson10d") == pytest.approx(5.0)
    assert residual("poisson100d") == pytest.approx(5 - 200 / 33.47)
    # ∂q/∂t + div μ + μ·∇q − ½|σ∇q|² − ½ tr(σσᵀ ∇²q), μ = −x/2, σ = √2.
    expected = 2 - 9 / 2 - 9 * 3 / 2 - 9 * 3**2 - 5
    assert residual("log_fokker_planck9d") == pytest.approx(expected)


@pytest.mark.parametrize("spatial", [(0, 1, 2), (1, 2)])
def test_derivatives_of_a_network_are_those_of_dense_hessians(spatial):
    params = derivatives.init(KEY, (3, 6, 5, 1))
    points = jax.random.normal(KEY, (4, 3))

    def u(point):
        return derivatives.network(params, point)

    expected = dense(u, points, spatial)
    found = derivatives.of_network(params, points, spatial)
    for ours, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-12, atol=1e-13)


def test_a_network_starts_as_pytorchs_linear_layers_do():
    params = derivatives.init(KEY, (25, 400, 1))
    for layer, inputs in zip(params, (25, 400), strict=True):
        for leaf in layer.values():
            assert leaf.dtype == np.float64
            assert np.abs(leaf).max() <= inputs**-0.5
    kernel = np.asarray(params[0]["kernel"])
    assert kernel.std() == pytest.approx(0.2 / math.sqrt(3), rel=0.02)  # Uniform.
    assert abs(kernel.mean()) < 0.01
    assert np.asarray(params[0]["bias"]).std() == pytest.approx(0.2 / 3**0.5, rel=0.1)


def on_faces(places):
    """Check that each point is on a face of the unit cube, and that all faces occur."""
    places = np.asarray(places)
    assert ((places >= 0) & (places <= 1)).all()
    on = (places == 0) | (places == 1)
    assert (on.sum(axis=1) == 1).all()
    dimension = places.shape[1]
    for axis in range(dimension):
        for side in (0, 1):
            share = (places[:, axis] == side).mean()
            assert share == pytest.approx(0.5 / dimension, rel=0.35)


def fills(places, low, high):
    places = np.asarray(places)
    assert (places >= low).all()
    assert (places <= high).all()
    np.testing.assert_allclose(
        places.mean(axis=0), (low + high) / 2, atol=(high - low) / 20
    )
    np.testing.assert_allclose(places.std(axis=0), (high - low) / 12**0.5, rtol=0.1)


def test_points_are_drawn_from_the_domain_and_where_the_solution_is_given():
    count = 2000
    for name in ("poisson2d", "poisson5d"):
        equation = EXPERIMENTS[name].equation
        fills(equation.inside(KEY, count), 0, 1)
        on_faces(equation.given(KEY, count))
    for name in ("heat1d", "heat4d"):
        equation = EXPERIMENTS[name].equation
        fills(equation.inside(KEY, count), 0, 1)
        points = equation.given(KEY, count)
        boundary, start = points[: count // 2], points[count // 2 :]
        fills(boundary[:, :1], 0, 1)
        on_faces(boundary[:, 1:])
        assert not start[:, 0].any()
        fills(start[:, 1:], 0, 1)
    equation = EXPERIMENTS["log_fokker_planck9d"].equation
    points = equation.inside(KEY, count)
    fills(points[:, :1], 0, 1)
    fills(points[:, 1:], -5, 5)
    points = equation.given(KEY, count)
    assert not points[:, 0].any()
    fills(points[:, 1:], -5, 5)


def test_points_are_drawn_anew_where_the_problem_says_so():
    def drawn(name, updates):
        problem = dataclasses.replace(EXPERIMENTS[name], interior=5, boundary=6)
        return problem.batch(KEY, updates)

    def same(one, other):
        leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        return all(bool((a == b).all()) for a, b in leaves if a.any())

    assert same(drawn("poisson2d", 0), drawn("poisson2d", 999))
    first = drawn("poisson5d", 0)
    assert same(first, drawn("poisson5d", 0))
    assert not same(first, drawn("poisson5d", 1))
    assert same(drawn("poisson100d", 0), drawn("poisson100d", 54))
    assert not same(drawn("poisson100d", 54), drawn("poisson100d", 55))
    (inside, zeros), (known, values) = first
    assert [leaf.shape for leaf in (inside, zeros)] == [(5, 5), (5,)]
    assert [leaf.shape for leaf in (known, values)] == [(6, 5), (6,)]
    assert not zeros.any()
    np.testing.assert_allclose(values, np.cos(np.pi * known).sum(axis=1), rtol=1e-12)


def test_f_is_half_the_mean_square_inside_and_half_that_where_u_is_given():
    problem = tiny("poisson2d")
    params = derivatives.init(KEY, problem.sizes)
    batch = problem.batch(KEY)
    (inside, _), (known, values) = batch
    found = dense(lambda p: derivatives.network(params, p), inside, (0, 1))
    source = 2 * np.pi**2 * np.prod(np.sin(np.pi * inside), axis=1)
    wrong = derivatives.network(params, known) - values
    expected = np.mean((found.laplacian + source) ** 2) / 2 + np.mean(wrong**2) / 2
    value = problem.objective.value(params, batch)
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    where = problem.equation.inside(KEY, 50)
    differences = derivatives.network(params, where) - problem.equation.solution(where)
    u = problem.equation.solution(where)
    relative = float(jnp.linalg.norm(differences) / jnp.linalg.norm(u))
    assert float(problem.error(params, where, u)) == pytest.approx(relative, rel=1e-12)


def test_f_is_half_the_square_of_all_weighted_residuals():
    problem = tiny("standing_wave")  # Three terms, each with a weight.
    params = problem.start(KEY)
    batch = problem.batch(KEY)
    residuals = problem.residuals(params, batch)
    assert len(residuals) == sum(len(target) for _, target in batch)
    f = float(problem.objective.value(params, batch))
    assert float(residuals @ residuals) / 2 == pytest.approx(f, rel=1e-12)


def test_published_errors_are_made_relative_to_the_solution():
    # The mean square of sin(πx) sin(πy) on the unit square is a quarter.
    problem = EXPERIMENTS["poisson2d"]
    relative, absolute = problem.relative_levels(), problem.levels.known()
    assert relative.keys() == absolute.keys()
    for name, level in absolute.items():
        assert relative[name] == pytest.approx(2 * level, rel=0.02)
    milestones = problem.summary().milestones
    assert next(iter(milestones.values())) == relative["HF"]
    assert milestones["others 5.4e-05"] == relative["SGD"]


# Number: parameters, budget, points inside, points where u is given, steps until the next.
PUBLISHED = {
    "09": (257, 1000, 900, 120, 0),
    "10": (449, 3000, 3000, 500, 1),
    "13": (257, 1000, 900, 120, 0),
    "14": (1_325_057, 10_000, 108, 2372, 55),
    "15": (9873, 1000, 900, 120, 0),
    "15s": (9873, 1000, 900, 120, 0),
    "16": (10_065, 3000, 3000, 500, 1),
    "19": (116_865, 3000, 3000, 500, 1),
    "20": (116_097, 1000, 900, 120, 0),
    "20s": (116_097, 1000, 900, 120, 0),
    "21": (118_145, 6000, 3000, 1000, 1),
    "27": (449, 3000, 3000, 500, 1),
    "28": (10_065, 3000, 3000, 500, 1),
    "29": (116_865, 3000, 3000, 500, 1),
    "43": (118_145, 6000, 3000, 1000, 1),
    "h10": (118_401, 3000, 3000, 500, 1),
    "14f": (1_325_057, 7000, 100, 50, 1),
    "b1": (1217, "10,000 iterations", 5000, 800, 0),
    "b2": (2201, "4,279 and 1,964 s of a CPU", 2201, 0, 6),
    "b3": (1361, "some 50,000 iterations", 5000, 0, 1),
    "b3s": (1361, "144 s on a GPU", 4000, 0, 1),
    "b4": (11_225, "635 s on a GPU, until t = 1", 1024, 256, 1),
    "b5": (11_285, "1,210 s on a GPU, until t = 1", 1024, 256, 1),
    "b6": (12_065, "281 s on a GPU", 1024, 256, 1),
    "inv": (942, "", 4000, 1000, 0),
    "b3sd": (5125, "144 s on a GPU", 32_768, 16_384, 0),
    "b4d": (11_225, "635 s on a GPU, until t = 1", 32_768, 16_384, 0),
    "b5d": (11_285, "1,210 s on a GPU, until t = 1", 32_768, 16_384, 0),
    "b6d": (12_065, "281 s on a GPU", 32_768, 16_384, 0),
}


def test_problems_have_the_published_sizes_and_every_level_is_an_error():
    found = {}
    for problem in EXPERIMENTS.values():
        points = (problem.interior, problem.boundary, problem.redrawn)
        found[problem.number] = (problem.parameters, problem.budget, *points)
        levels = problem.levels.known()
        assert all(1e-8 < level < 1 for level in levels.values())
        # Who is best of the first-order optimizers is behind Hessian-free.
        first = [levels[name] for name in ("L-BFGS", "Adam", "SGD") if name in levels]
        assert levels.get("HF", 0) < min(first, default=math.inf)
        # And SPRING before all others.
        spring = levels.pop("SPRING", 0)
        assert spring <= min(levels.values(), default=math.inf)
        if problem.number[0].isdigit():
            assert problem.evaluation == (30_000 if problem.redrawn else 9000)
    assert found == PUBLISHED


def test_problems_are_asked_for_by_name_by_number_or_all():
    assert SUITE.named("15,9,poisson5d") == (
        "poisson2d",
        "poisson5d",
        "poisson2d_medium",
    )
    assert SUITE.named("15s") == ("poisson2d_medium_sin",)
    assert SUITE.named("all") == tuple(EXPERIMENTS)
    for number, name in ((p.number, name) for name, p in EXPERIMENTS.items()):
        assert SUITE.named(number) == (name,)


def tiny(name, **changes):
    changes = {
        "hidden": (6,),
        "interior": 12,
        "boundary": 8,
        "evaluation": 40,
        **changes,
    }
    return dataclasses.replace(EXPERIMENTS[name], **changes)


def ended(rows, updates=(), optimizer="a", rate=None):
    """Make up a run: `rows` are (seconds, f, error)."""
    plan = Plan("p", 0, optimizer, rate)
    its = [Row(s, n, 0, f, error, 1.0) for n, (s, f, error) in enumerate(rows)]
    return RunFile(plan, {}, True, Run(its, list(updates)))


def update(accepted, promised=-1e-3):
    return {"accepted": accepted, "value_before": 1.0, "predicted_change": promised}


FALLING = [(0, 4, 4), (1, 2, 3), (3, 1, 2), (4, 0.5, 1)]


@pytest.mark.parametrize(
    ("rows", "updates", "why"),
    [
        (FALLING, [], "the seconds"),
        (FALLING, [update(False)] * 12, "no decrease"),
        (FALLING, [update(False, -1e-12)] * 12, "rounding"),
        (FALLING, [update(False)] * 12 + [update(True)], "the seconds"),
        ([*FALLING[:3], (4, 1, 2)], [], "standstill"),
        ([*FALLING[:3], (4, 0.5, 2)], [], "the data"),
        ([*FALLING[:3], (4, math.nan, 1)], [], "divergence"),
    ],
)
def test_what_limited_a_run_is_read_off_its_history(rows, updates, why):
    run = ended(rows, updates).run
    assert table.limited(run) == why
    assert table.limited(run, goal=2.5) == ("the goal" if run.last.value < 2.5 else why)


def test_the_lowest_error_counts_and_when_it_came_below_the_published_ones():
    levels = Levels(hf=2.5, kfac=0.5, lbfgs=3.5, adam=1.5)
    summary = tiny("poisson2d", levels=levels).summary()
    size = summary.milestones.popitem()[1] / 1.5
    summary = tiny("poisson2d", levels=levels).summary()
    runs = [
        ended([(0, 9, 4 * size), (1, 8, 3.2 * size), (2, 7, 2 * size)], rate=0.1),
        ended([(0, 9, 4 * size), (1, 8, 1 * size), (2, 7, 3 * size)], rate=0.2),
    ]
    (line,) = table.lines(runs, summary)
    assert line.name == "a 0.2"
    assert line.judged == [size]
    assert list(line.lost.values()) == [2 * size]
    reached = dict(zip(("HF", "KFAC", "others"), line.reached.values(), strict=True))
    assert reached == {"HF": [1], "KFAC": [math.inf], "others": [1]}
    head, row = table.cells([line], summary)
    cells = dict(zip(head, row, strict=True))
    assert float(cells["lowest relative L2 error"]) == pytest.approx(size, rel=0.01)
    assert cells["training"] == "4 s"
    assert f"a 0.1: {2 * size:.3g}" in table.caption([line], summary)


def compare(folder, *words):
    command = ("compare", "--suite", "equations", "--problem", "tiny")
    return main([*command, "--out", str(folder), *words])


@pytest.mark.parametrize(
    ("like", "optimizers"),
    [
        ("poisson2d", "hfjax,uncorrected,adam"),
        ("heat1d", "balanced,float32_first"),
        ("heat4d", "martens2010,lbfgs"),
    ],
)
def test_the_command_leaves_numbers_a_table_and_a_picture(
    like, optimizers, tmp_path, monkeypatch, capsys
):
    problem = tiny(like)
    monkeypatch.setitem(SUITE.problems, "tiny", kind(problem))
    words = ("--optimizers", optimizers, "--seconds", "0.4", "--turn", "0.2")
    with jax.enable_x64(False):  # As users run it: the suite asks for float64.
        assert compare(tmp_path, *words) == 0
        assert not jax.config.jax_enable_x64
    document = json.loads((tmp_path / "compare.json").read_text())
    (found,) = document["problems"]
    levels = problem.relative_levels()
    assert found["milestones"][f"HF {levels['HF']:.2g}"] == levels["HF"]
    assert f"HF {levels['HF']:.2g}" in found["note"]
    names = optimizers.split(",")
    assert list(dict.fromkeys(run["optimizer"] for run in found["runs"])) == names
    where = problem.evaluation_points()
    params = derivatives.init(jax.random.key(0), problem.sizes)
    start = float(problem.error(params, where, problem.equation.solution(where)))
    for run in found["runs"]:
        assert run["finished"]
        assert run["rows"][0]["value"] == pytest.approx(start, rel=1e-12)
        assert run["rows"][-1]["seconds"] >= 0.4
        assert run["value"] == min(row["value"] for row in run["rows"])
    best = min(row["loss"] for row in found["runs"][0]["rows"])
    assert best < 0.5 * found["runs"][0]["rows"][0]["loss"]
    assert (tmp_path / "tiny.png").stat().st_size > 5000
    assert (tmp_path / f"tiny-{names[0]}.png").stat().st_size > 5000
    text, printed = (tmp_path / "compare.md").read_text(), capsys.readouterr().out
    assert f"| HF {levels['HF']:.2g} |" in text
    assert "limited by" in text
    assert f"tiny 0 {names[0]}" in printed
    with jax.enable_x64(False):  # What is finished is not run again.
        assert compare(tmp_path, *words) == 0
        assert compare(tmp_path, *words, "--seconds", "9") == 2
    assert json.loads((tmp_path / "compare.json").read_text())["problems"] == [found]


def test_all_of_a_comparison_may_be_in_float32(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SUITE.problems, "tiny", kind(tiny("poisson2d")))
    words = ("--optimizers", "hfjax,float32_first", "--seconds", "0.2")
    with jax.enable_x64(False):
        assert compare(tmp_path, *words, "--precision", "float32") == 0
        assert compare(tmp_path, *words) == 2
    assert "with float64 False, not True" in capsys.readouterr().err
    document = json.loads((tmp_path / "compare.json").read_text())
    (found,) = document["problems"]
    (run,) = found["runs"]
    assert run["optimizer"] == "hfjax"
    # f has no more digits than float32 has.
    assert all(np.float32(row["loss"]) == row["loss"] for row in run["rows"])


def test_what_is_too_large_to_be_solved_exactly_is_said():
    unfit = OPTIMIZERS["spring"].unfit
    assert unfit(EXPERIMENTS["heat4d_large"].problem()) is None
    assert "3,286,141,360 numbers" in unfit(EXPERIMENTS["poisson100d"].problem())


def test_levenberg_marquardt_needs_residuals_on_the_same_points():
    unfit = OPTIMIZERS["optimistix_lm"].unfit
    fixed = EXPERIMENTS["poisson2d"].problem()
    assert unfit(fixed) is None
    assert "stay the same" in unfit(EXPERIMENTS["poisson5d"].problem())
    assert "sum of squares" in unfit(dataclasses.replace(fixed, residuals=None))


def test_an_unknown_problem_is_one_line_and_status_2(capsys):
    assert main(["compare", "--suite", "equations", "--problem", "spirals"]) == 2
    message = capsys.readouterr().err
    assert "poisson2d (09), poisson5d (10)" in message
    assert message.count("\n") == 1
