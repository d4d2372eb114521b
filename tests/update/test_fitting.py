"""Every solver with every damping rule, backtracking rule and preconditioner.

Each combination is either refused with its cure, or its update is that of the dense
matrix: the problem is a linear least-squares one, whose hidden states are its outputs.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training

import hfjax
from hfjax import backtracking, cg, curvature, damping, iterates, preconditioners
from hfjax.objectives.objective import weighted_sum

SQUARED = hfjax.losses.squared_error()
LAMBDA, MU = 0.3, 0.7
RNG = np.random.default_rng(3)
X, T = RNG.standard_normal((6, 3)), RNG.standard_normal((6, 1))
PARAMS = {"b": jnp.zeros(1), "w": jnp.zeros((3, 1))}
BATCH = (jnp.asarray(X), jnp.asarray(T))


def pair_fn(params, x):
    outputs = x @ params["w"] + params["b"][None]
    return outputs, outputs


OBJECTIVE = hfjax.Objective(pair_fn, SQUARED, hidden_loss=SQUARED)
PLAIN = hfjax.Objective(lambda p, x: pair_fn(p, x)[0], SQUARED)

# f = ½ mean (Jθ − t)², and G = JᵀJ / n.
J = np.concatenate([np.ones((6, 1)), X], axis=1)
G, B = J.T @ J / 6, J.T @ T[:, 0] / 6

CG = cg.conjugate_gradient(max_iterations=8, stopping=None)
SOLVERS = {
    "cg": CG,
    "cg_best": cg.conjugate_gradient(
        max_iterations=8, stopping=None, keep=iterates.best(first=1)
    ),
    "cg_replaced": cg.conjugate_gradient(
        max_iterations=8, stopping=None, replace_every=2
    ),
    "region": hfjax.trust_region.steihaug_toint(max_iterations=8, stopping=None),
    "ball": hfjax.trust_region.steihaug_toint(
        max_iterations=8, stopping=None, elliptical=False
    ),
    "krylov": hfjax.krylov.subspace_descent(dimension=5),
    "cholesky": hfjax.sample_space.cholesky(),
    "exact_region": hfjax.sample_space.trust_region(),
    "auto": "auto",
    "own": cg.Solver(*CG[:3]),
}
LM = damping.levenberg_marquardt
RULES = {
    "constant": damping.constant(LAMBDA),
    "constant_curvature": damping.constant(LAMBDA, matrix="curvature"),
    "constant_structural": damping.constant(LAMBDA, structural=MU, tied=False),
    "lm": LM(LAMBDA),
    "lm_diagonal": LM(LAMBDA, matrix="curvature_diagonal"),
    "searched": damping.searched(LAMBDA),
    "searched_structural": damping.searched(LAMBDA, structural=MU, tied=False),
    "radius": hfjax.trust_region.radius(100.0),
    "own": damping.Damping(*damping.constant(LAMBDA)[:4]),
    "own_searched": damping.searched(LAMBDA)._replace(
        matrix=hfjax.damping_matrices.diagonal()
    ),
}
CHOICES = {
    "none": {"backtracking": None},
    "default": {},
    "early_stop": {"backtracking": backtracking.early_stop()},
    "full_search": {"backtracking": backtracking.full_search()},
    "by_name": {"backtracking": "auto"},
}
PRECONDITIONERS = {
    "none": {"preconditioner": None},
    "own": {"preconditioner": preconditioners.custom(lambda *_: lambda r: r)},
    "diagonal": {"preconditioner": preconditioners.diagonal()},
    "default": {},
    "nystrom": {"preconditioner": preconditioners.nystrom(rank=2)},
}
"""From the cheapest to compile to the dearest, as `covering` takes the first."""
ADAPTED = {
    "lm",
    "lm_diagonal",
    "searched",
    "searched_structural",
    "own",
    "own_searched",
}
"""One that declares nothing may adapt."""
REGIONS = {"region", "ball", "exact_region"}
ALL = list(itertools.product(SOLVERS, RULES, CHOICES, PRECONDITIONERS))


def refusal(solver, rule, choice, preconditioner):
    """Say what a combination is refused with; `None` if it is admitted."""
    exact = solver in {"cholesky", "exact_region"}
    if exact and (
        rule == "constant_curvature" or (solver, rule) == ("cholesky", "radius")
    ):
        return r"solves with G \+ λD"
    if solver in REGIONS and rule != "radius":
        return r"Pass `damping=hfjax.trust_region.radius\(\)`"
    if rule == "radius" and solver not in REGIONS:
        return r"Pass `damping=hfjax.damping.searched\(\)` or `levenberg_marquardt\(\)`"
    if solver == "krylov" and rule in ADAPTED:
        return r"Pass `damping=hfjax.damping.constant\(0.0\)`"
    if exact and preconditioner not in {"default", "none"}:
        return "`solver` never asks for one"
    return None


def make(solver, rule, choice, preconditioner):
    return hfjax.hessian_free(
        OBJECTIVE,
        solver=SOLVERS[solver],
        damping=RULES[rule],
        **CHOICES[choice],
        **PRECONDITIONERS[preconditioner],
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_combination_is_admitted_or_refused_with_its_cure(solver):
    for combination in ALL:
        if combination[0] != solver:
            continue
        message = refusal(*combination)
        if message is None:
            make(*combination)
            continue
        with pytest.raises(ValueError, match=message):
            make(*combination)


def covering():
    """Return few admitted combinations that have every admitted pair of two parts.

    But for a rule of backtracking with a preconditioner, which never meet, and for what
    differs from another entry of its table in one option alone.
    """
    alike = {"ball", "by_name", "own_searched"}
    admitted = [n for n in ALL if refusal(*n) is None and not alike & set(n)]
    admitted.append(("cg", "own_searched", "default", "none"))

    def pairs(names):
        return set(itertools.combinations(enumerate(names), 2)) - {
            ((2, names[2]), (3, names[3]))
        }

    missing = set().union(*(pairs(names) for names in admitted))
    chosen = []
    while missing:
        best = max(admitted, key=lambda names: len(pairs(names) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def value(step):
    return 0.5 * np.mean(np.square(J @ step - T[:, 0]))


def solution(solver, rule):
    """Solve for the step of a run by its dense matrix."""
    if rule == "radius":
        return np.linalg.solve(G, B)
    matrix = np.eye(4)
    if rule == "constant_curvature":
        matrix = G + MU * G if "structural" in rule else G
    if rule in {"lm_diagonal", "own_searched"}:
        matrix = np.diag(np.diag(G))
    a = G + LAMBDA * matrix + ("structural" in rule) * MU * G
    return np.linalg.solve(a, B)


@pytest.mark.parametrize("names", covering(), ids="-".join)
def test_the_admitted_combinations_take_the_step_of_the_dense_matrix(names):
    solver, rule, choice, _ = names
    tx = make(*names)
    updates, state = training.one_update(OBJECTIVE, tx, PARAMS, BATCH)
    came = np.concatenate([np.ravel(updates["b"]), np.ravel(updates["w"])])
    assert state.info.accepted
    np.testing.assert_allclose(state.info.value_after, value(came), rtol=1e-10)
    dense = solution(solver, rule)
    if solver == "krylov":  # It looks at all λ.
        np.testing.assert_allclose(value(came), value(np.linalg.solve(G, B)), rtol=1e-6)
    elif choice == "none":
        np.testing.assert_allclose(came, dense, rtol=1e-6)
    else:  # A choice among iterates, or among λ, is at least as good.
        gain = value(np.zeros(4)) - value(dense)
        assert value(came) <= value(dense) + 0.0101 * gain


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"solver": hfjax.trust_region.steihaug_toint()},
            r"\(as the default, `damping.searched\(\)`\)",
        ),
        (
            {"solver": hfjax.krylov.subspace_descent()},
            r"\(as the default, `damping.searched\(\)`\)",
        ),
        (
            {"solver": SOLVERS["cholesky"], "damping": RULES["radius"]},
            "got a trust-region radius",
        ),
        (
            {"solver": SOLVERS["cholesky"], "curvature": curvature.hessian},
            "got another `curvature`",
        ),
        (
            {
                "solver": SOLVERS["cholesky"],
                "curvature": curvature.with_precision("bfloat16"),
            },
            "got another `curvature`",
        ),
        (
            {"solver": SOLVERS["cholesky"], "damping": RULES["constant_curvature"]},
            "got another damping matrix",
        ),
        (
            {
                "solver": SOLVERS["region"],
                "damping": RULES["radius"]._replace(
                    matrix=hfjax.damping_matrices.identity()
                ),
            },
            "`matrix=None`",
        ),
        (
            {
                "solver": SOLVERS["region"],
                "damping": RULES["radius"]._replace(
                    structural=damping.Structural(0.1, tied=True)
                ),
            },
            "no structural damping that is tied",
        ),
        ({"solver": CG._replace(scalar="λ")}, "`solver.scalar` must be one of"),
        ({"damping": LM()._replace(scalar="λ")}, "`damping.scalar` must be one of"),
        ({"solver": CG._replace(reads="λ")}, "`solver.reads` must be one of"),
        ({"preconditioner": "kronecker"}, "`preconditioner` must be one of 'auto'"),
        ({"backtracking": "last"}, "`backtracking` must be one of 'auto'"),
        ({"solver": "cholesky"}, "`solver` must be one of 'auto'"),
        (
            {
                "damping": RULES["searched_structural"],
                "curvature": lambda objective, params, batch: lambda v: v,
            },
            "`curvature` does not take `structural=μ`.*`hfjax.curvature.hessian` do",
        ),
        *(
            (
                {"damping": RULES["constant_structural"], "curvature": made},
                "`curvature` does not take `structural=μ`",
            )
            for made in (
                curvature.finite_difference_hessian,
                curvature.empirical_fisher,
                curvature.with_precision("bfloat16", of=curvature.empirical_fisher),
            )
        ),
    ],
)
def test_other_parts_that_do_not_fit_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        hfjax.hessian_free(OBJECTIVE, **parts)
    with pytest.raises(ValueError, match=message):
        hfjax.scale_by_hessian_free(OBJECTIVE, **parts)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"damping": 0.1}, "`damping` must be a `Damping`, got float."),
        ({"damping": damping.searched}, "got function: call its function."),
        ({"damping": SOLVERS["region"]}, "`damping` must be a `Damping`, got Solver."),
        ({"solver": RULES["radius"]}, "`solver` must be a `Solver`, got Damping."),
        ({"solver": cg.solve}, "`solver` must be a `Solver`, got function: call"),
        (
            {"preconditioner": preconditioners.kronecker},
            "`preconditioner` must be a `PreconditionerRule` or `None`, got function:",
        ),
        (
            {"preconditioner": lambda r: r},
            "`preconditioner` must be a `PreconditionerRule` or `None`, got function:",
        ),
        (
            {"backtracking": backtracking.early_stop},
            "`backtracking` must be a `Backtracking` or `None`, got function:",
        ),
        (
            {"line_search": hfjax.linesearch.armijo},
            "`line_search` must be a `LineSearch` or `None`, got function:",
        ),
        ({"curvature": "hessian"}, "`curvature` must be a function .*got 'hessian'"),
    ],
)
def test_a_part_in_the_place_of_another_is_refused(parts, message):
    with pytest.raises(TypeError, match=message):
        hfjax.hessian_free(OBJECTIVE, **parts)


def test_structural_damping_needs_hidden_states():
    rule = RULES["constant_structural"]
    with pytest.raises(ValueError, match="has no hidden states: give it"):
        hfjax.hessian_free(PLAIN, damping=rule)
    both = weighted_sum([(1.0, PLAIN), (2.0, PLAIN)])
    with pytest.raises(ValueError, match="a weighted sum has none"):
        hfjax.hessian_free(both, damping=rule)
    with pytest.raises(ValueError, match="`structural` is tied to λ, and λ is 0"):
        damping.constant(0.0, structural=MU)
    assert damping.constant(0.0, structural=MU, tied=False).structural is not None


def test_a_run_to_look_at_takes_no_radius_and_no_stray_part():
    def run(objective=OBJECTIVE, **options):
        return hfjax.diagnostics.cg_run(
            objective, PARAMS, BATCH, damping=LAMBDA, max_iterations=3, **options
        )

    with pytest.raises(ValueError, match="`rule` drives the radius"):
        run(rule=RULES["radius"])
    with pytest.raises(ValueError, match="has no hidden states"):
        run(PLAIN, rule=RULES["constant_structural"])
    with pytest.raises(TypeError, match="`rule` must be a `Damping`, got Solver"):
        run(rule=CG)
    with pytest.raises(TypeError, match="`preconditioner` must be"):
        run(preconditioner="auto")


@pytest.mark.slow
def test_the_default_preconditioner_is_the_kronecker_factors_where_it_is_asked_for():
    def step(**options):
        tx = hfjax.hessian_free(
            OBJECTIVE, solver=cg.conjugate_gradient(max_iterations=2), **options
        )
        return training.one_update(OBJECTIVE, tx, PARAMS, BATCH)[0]

    given = step(preconditioner=preconditioners.kronecker())
    for options in ({}, {"preconditioner": "auto"}):
        jax.tree.map(np.testing.assert_array_equal, step(**options), given)
