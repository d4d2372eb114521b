"""The thirteen problems that Hessian-free is measured on today, and what others reach.

Dangel, Müller & Zeinhofer (2024), "Kronecker-factored approximate curvature for
physics-informed neural networks", let optimizers run for equal times, each with the best
of tens of settings; the logs of these runs are in their repository,
`f-dangel/kfac-pinns-experiments`. A problem has the number of its experiment there, and
`Levels` the lowest error in each log.

Where the logs are of several problems: in 15 and 20 Hessian-free was run on the sum of
cosines, the others on the product of sines. Both are here, each with the levels that are
its own; `_sin` is the second. In 14 every optimizer has points of its own number, and
here are those of Hessian-free. Where new points are drawn in each step, KFAC had new ones
every 100 steps, in 43 every 10.
"""

import argparse
import functools

from benchmarks import pinn_equations as equations
from benchmarks import pinn_solutions as solutions
from benchmarks.pinn_problem import Levels, Problem

SMALL, MEDIUM = (64,), (64, 64, 48, 48)
LARGE, LARGEST = (256, 256, 128, 128), (768, 768, 512, 512)


_sin2 = equations.poisson(2, "product of sines", *solutions.product_of_sines(2))
_cos2 = equations.poisson(2, "sum of cosines", *solutions.sum_of_cosines())
_cos5 = equations.poisson(5, "sum of cosines", *solutions.sum_of_cosines())
_pairs10 = equations.poisson(10, "sum of pairs", *solutions.sum_of_pairs(1.34))
_norm100 = equations.poisson(100, "squared norm", *solutions.squared_norm(100, 33.47))
_heat1 = equations.heat(1, solutions.decaying_sines(1))
_heat4 = equations.heat(4, solutions.decaying_sum)

_fixed = functools.partial(
    Problem, budget=1000, interior=900, boundary=120, redrawn=0, evaluation=9000
)
_drawn = functools.partial(Problem, budget=3000)
_long = functools.partial(Problem, budget=6000, boundary=1000)

PROBLEMS = {
    "poisson2d": _fixed(
        "09",
        _sin2,
        SMALL,
        levels=Levels(3.21e-7, 1.99e-7, 6.12e-8, 1.56e-4, 9.40e-5, 2.72e-5),
    ),
    "poisson5d": _drawn(
        "10",
        _cos5,
        SMALL,
        levels=Levels(6.10e-6, 2.58e-6, 5.58e-8, 8.88e-4, 1.14e-3, 2.59e-3),
    ),
    "heat1d": _fixed(
        "13",
        _heat1,
        SMALL,
        levels=Levels(6.20e-7, 8.39e-7, 2.75e-8, 2.69e-4, 7.95e-5, 2.82e-4),
    ),
    "poisson100d": Problem(
        "14",
        _norm100,
        LARGEST,
        budget=10_000,
        levels=Levels(1.02e-2, 4.30e-3, None, 1.34e-2, 1.70e-2, 2.35e-2),
        interior=108,
        boundary=2372,
        redrawn=55,
    ),
    "poisson2d_medium": _fixed("15", _cos2, MEDIUM, levels=Levels(1.25e-6)),
    "poisson2d_medium_sin": _fixed(
        "15s",
        _sin2,
        MEDIUM,
        levels=Levels(None, 7.89e-7, 9.49e-5, 3.39e-4, 2.11e-4, 5.58e-4),
    ),
    "poisson5d_medium": _drawn(
        "16",
        _cos5,
        MEDIUM,
        # ENGD reached 1.14e-4 with a smaller network, 64-48-32-16.
        levels=Levels(1.23e-4, 6.33e-4, 3.95e-4, 3.01e-3, 3.77e-3, 9.74e-3),
    ),
    "poisson5d_large": _drawn(
        "19",
        _cos5,
        LARGE,
        levels=Levels(2.52e-4, 1.73e-4, None, 2.96e-3, 3.98e-3, 5.44e-3),
    ),
    "poisson2d_large": _fixed("20", _cos2, LARGE, levels=Levels(2.01e-6)),
    "poisson2d_large_sin": _fixed(
        "20s",
        _sin2,
        LARGE,
        levels=Levels(None, 1.52e-5, None, 3.97e-4, 8.54e-4, 1.22e-3),
    ),
    "poisson10d": _long(
        "21",
        _pairs10,
        LARGE,
        levels=Levels(2.17e-5, 4.71e-5, None, 6.95e-4, 1.49e-3, 4.09e-3),
    ),
    "heat4d": _drawn(
        "27",
        _heat4,
        SMALL,
        levels=Levels(1.44e-5, 5.59e-5, 7.36e-7, 4.85e-4, 1.05e-3, 8.38e-3),
    ),
    "heat4d_medium": _drawn(
        "28",
        _heat4,
        MEDIUM,
        levels=Levels(1.11e-5, 9.32e-6, 1.45e-4, 1.17e-3, 7.38e-4, 4.88e-3),
    ),
    "heat4d_large": _drawn(
        "29",
        _heat4,
        LARGE,
        levels=Levels(1.97e-5, 1.32e-5, None, 6.71e-4, 7.47e-4, 5.11e-3),
    ),
    "log_fokker_planck9d": _long(
        "43",
        equations.log_fokker_planck(9),
        LARGE,
        levels=Levels(2.35e-2, 2.60e-2, None, 4.88e-2, 0.183, 0.495),
    ),
}
"""By the name on the command line."""


def named(word: str) -> tuple[str, ...]:
    """Read names or numbers of problems.

    Args:
      word: as the user typed it, with commas; `all` is all.

    Returns:
      The names, in the order of `PROBLEMS`.
    """
    if word == "all":
        return tuple(PROBLEMS)
    names = {problem.number: name for name, problem in PROBLEMS.items()}
    asked = set()
    for part in word.split(","):
        name = names.get(part.zfill(2), part)
        if name not in PROBLEMS:
            known = ", ".join(f"{name} ({number})" for number, name in names.items())
            msg = f"must be all, or among {known}, got {part!r}"
            raise argparse.ArgumentTypeError(msg)
        asked.add(name)
    return tuple(name for name in PROBLEMS if name in asked)
