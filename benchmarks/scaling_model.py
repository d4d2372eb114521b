"""What a product and an update cost: formulas in the sizes of a problem.

n: parameters; c: flops of a forward pass, a case; k: CG iterations; e: evaluations of f
away from θ, by backtracking and line search; D: devices. Bytes are those of float32.

Compiled programs are held against them by `python -m benchmarks scaling`;
`benchmarks.scaling_machines` predicts from them.
"""

from typing import NamedTuple

BYTES = 4
"""Of a float32."""


class Dense(NamedTuple):
    """A dense network, by the flops of a forward pass of one case.

    Attributes:
      whole: F, all layers: two for each weight.
      first: F₁, the first layer, whose inputs need no derivatives.
    """

    whole: float
    first: float

    @property
    def value(self) -> float:
        """Flops of f."""
        return self.whole

    @property
    def gradient(self) -> float:
        """Flops of ∇f: cotangents of the weights, and of the inputs but for the data."""
        return 3 * self.whole - self.first

    @property
    def product(self) -> float:
        """Flops of G v: tangents by weights and by inputs, and the transposes of both."""
        return 4 * self.whole - 2 * self.first

    @property
    def diagonal(self) -> float:
        """Flops of the empirical Fisher's diagonal.

        Forward, back to the layers' inputs, and one product of squares for each layer;
        the weights' gradients are not formed.
        """
        return 3 * self.whole - self.first


class Elements(NamedTuple):
    """Elements of the results of collectives on each device.

    Attributes:
      reduced: by all-reduces or reduce-scatters.
      gathered: by all-gathers.
    """

    reduced: float
    gathered: float = 0.0

    def wire_bytes(self, devices: int, *, scattered: bool = False) -> float:
        """Return what a device sends, by rings.

        Args:
          devices: D.
          scattered: whether reductions leave each device its part alone.
        """
        share = (devices - 1) / devices * BYTES
        return share * ((1 if scattered else 2) * self.reduced + self.gathered)


def product_elements(parameters: float, layout: str) -> Elements:
    """Count what a product of CG moves.

    Args:
      parameters: n.
      layout: of `benchmarks.scaling_programs`: if parameters are sharded, v is gathered
        once; with a scan the weights are, too, in the pass forward and the one back.

    Returns:
      The elements.
    """
    gathers = {"FSDP": 1, "FSDP, scan": 3}.get(layout, 0)
    return Elements(parameters, gathers * parameters)


def update_elements(
    parameters: float,
    first: float,
    layout: str,
    *,
    iterations: float,
    evaluations: float,
    diagonal: bool = True,
) -> Elements:
    """Count what an update, with its gradient, moves; scalars left out.

    Args:
      parameters: n.
      first: those of the first layer, whose transposed weights nothing needs.
      layout: of `benchmarks.scaling_programs`.
      iterations: k; a warm start costs one product more.
      evaluations: e, f at θ not among them.
      diagonal: whether the preconditioner is one.

    Returns:
      The elements.
    """
    product = product_elements(parameters, layout)
    products = iterations + 1
    reduced = (1 + diagonal + products) * product.reduced
    once = {
        # Gathered for the pass forward; for the one back, in each of two loops.
        "FSDP": parameters + 2 * (parameters - first),
        # The gradient, forward and back, the linearisation, and f(θ).
        "FSDP, scan": 4 * parameters,
    }.get(layout, 0)
    each = parameters if once else 0
    gathered = once + products * product.gathered + evaluations * each
    return Elements(reduced, gathered)


def update_flops(
    network: Dense,
    *,
    gradient_cases: float,
    curvature_cases: float,
    evaluation_cases: float,
    iterations: float,
    evaluations: float,
    shared: bool = False,
) -> float:
    """Count the flops of an update on all devices together: its matrix products.

    Args:
      network: the flops of a case.
      gradient_cases: b of the gradient.
      curvature_cases: b of G and of the diagonal.
      evaluation_cases: b of backtracking and line search.
      iterations: k; a warm start costs one product more.
      evaluations: e, f at θ not among them.
      shared: whether the three are the same batch: the forward pass of the
        gradient is then that of the linearisation and of f(θ).

    Returns:
      The flops.
    """
    forward = network.whole * curvature_cases + network.value * evaluation_cases
    once = network.gradient * gradient_cases + network.diagonal * curvature_cases
    products = (iterations + 1) * network.product * curvature_cases
    looks = evaluations * network.value * evaluation_cases
    return once + products + looks + (0 if shared else forward)


def update_vectors(kept: int, *, diagonal: bool = True) -> float:
    """Count the vectors of n that an update holds at its height, of 4n bytes each.

    θ and the warm start among them, batch and activations not. A fit to what XLA's CPU
    compiler plans, within one vector: CG's own x, r, p, A p and b are five.

    Args:
      kept: iterates that CG keeps: 1 for `hfjax.iterates.best`, 16 for `grid` and 250
        iterations.
      diagonal: whether the preconditioner is one.

    Returns:
      The number.
    """
    return 9.5 + kept + 2 * diagonal
