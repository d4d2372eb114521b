"""Draw `update.svg`, the data flow of one update: `python docs/images/update.py`."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

INK, BLUE, ORANGE = "#1f2933", "#e3eefb", "#fdebd8"
mpl.rcParams["svg.hashsalt"] = "update"  # The same file every time.

# Centre and width, two lines of text, and a colour.
BOXES = {
    "data": (1.3, 5.3, 2.3, "parameters θ, batch", "from you", BLUE),
    "objective": (5.0, 5.3, 3.6, "objective f(θ)", "model, loss, weight decay", BLUE),
    "gradient": (1.3, 4.0, 2.3, "gradient ∇f", "computed by you", BLUE),
    "preconditioner": (4.0, 4.0, 2.4, "preconditioner", "r ↦ P⁻¹ r", "white"),
    "product": (7.2, 4.0, 3.0, "model, linearised once", "v ↦ (B + λD + μS) v", "white"),
    "solver": (
        4.6, 2.7, 8.2, "solver:  A δ = −∇f,  A = B + λD + μS",
        "by conjugate gradients, or exactly; for this λ and for others", "white",
    ),
    "choice": (1.65, 1.4, 2.5, "choice of δ and λ", "by values of f", "white"),
    "search": (4.6, 1.4, 2.2, "line search", "along αδ + α²c", "white"),
    "judge": (7.35, 1.4, 2.5, "judge", "ρ; accept or reject", "white"),
    "step": (3.2, 0.2, 4.2, "θ + αδ + α²c,  or θ if rejected", "the update", ORANGE),
    "damping": (7.35, 0.2, 2.5, "λ for the next update", "in the state", ORANGE),
}  # fmt: skip
HALF = 0.36


def draw():
    """Return the figure."""
    figure = Figure(figsize=(9.2, 5.9), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 9.2), ylim=(-0.3, 5.8))
    axes.axis("off")
    for x, y, width, first, second, colour in BOXES.values():
        corner = (x - width / 2, y - HALF)
        style = "round,pad=0,rounding_size=0.12"
        box = FancyBboxPatch(corner, width, 2 * HALF, boxstyle=style, ec=INK, fc=colour)
        axes.add_patch(box)
        text = {"ha": "center", "va": "center", "color": INK}
        axes.text(x, y + 0.14, first, size=12, weight="bold", **text)
        axes.text(x, y - 0.16, second, size=11.3, **text)

    def arrow(start, end, **style):
        arrow = {"arrowstyle": "-|>", "color": INK, "lw": 1.2, **style}
        axes.annotate("", xy=end, xytext=start, arrowprops=arrow)

    def down(above, below, x=None):
        x = BOXES[below][0] if x is None else x
        arrow((x, BOXES[above][1] - HALF), (x, BOXES[below][1] + HALF))

    def right(left, to):
        (x, y, width, *_), (end, _, other, *_) = BOXES[left], BOXES[to]
        arrow((x + width / 2, y), (end - other / 2, y))

    right("data", "objective")
    arrow((3.3, 5.3 - HALF), (2.0, 4.0 + HALF))
    down("objective", "preconditioner")
    arrow((6.5, 5.3 - HALF), (6.9, 4.0 + HALF))
    for name in ("gradient", "preconditioner", "product"):
        down(name, "solver", BOXES[name][0])
    down("solver", "choice")
    right("choice", "search")
    right("search", "judge")
    arrow((6.4, 1.4 - HALF), (5.0, 0.2 + HALF))
    down("judge", "damping")
    # λ goes back to the system of the next update.
    axes.plot([8.6, 8.95, 8.95], [0.2, 0.2, 4.0], color=INK, lw=1.2, ls="--")
    arrow((8.95, 4.0), (8.7, 4.0))
    return figure


if __name__ == "__main__":
    target = Path(__file__).with_suffix(".svg")
    draw().savefig(target, metadata={"Date": None})
