"""Models as people bring them: gradient, G, factors and step, against dense truth.

Each model is small, and in float64. `truth` has f, ∇f and G = JᵀL″J from the model's
outputs and the plain formulas of its loss, and the inputs x and errors g of each layer at
each position from the model's unrolled program.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest
from reference import assert_close, flat, matrix_of, nearest_product, quick_jit
from zoo import densities, fields, sequences, truth, vision

import hfjax
from hfjax.curvature import probes
from hfjax.objectives.plain import terms_of
from hfjax.preconditioners import _factors
from hfjax.preconditioners._merged_layers import merged

pytestmark = pytest.mark.every

KEY = jax.random.key(4)
ZOO = {
    "cnn": vision.cnn,
    "cnn_in_training": functools.partial(vision.cnn, in_training=True),
    "vae": densities.vae,
    "tagger": sequences.tagger,
    "gemma": sequences.gemma,
    "seq2seq": sequences.seq2seq,
    "graphs": fields.graphs,
    "resnet": vision.resnet,
    "vit": vision.vit,
    "gru": sequences.gru,
    "neural_ode": fields.neural_ode,
    "siren": fields.siren,
    "fno": fields.fno,
    "deeponet": fields.deeponet,
    "nerf": fields.nerf,
    "flow": densities.flow,
    "contrastive": densities.contrastive,
    "generator": densities.generator,
    "experts": sequences.experts,
    "scanned": sequences.scanned,
    "lora": sequences.lora,
    "weight_norm": sequences.weight_norm,
}
LAYERS = {
    "cnn": {
        "factors": "conv1/kernel conv2/kernel out/kernel",
        "diagonal": "norm/bias norm/scale",
    },
    "cnn_in_training": {
        "factors": "conv1/kernel conv2/kernel out/kernel",
        "diagonal": "norm/bias norm/scale",
    },
    "vae": {"factors": "decode/kernel encode/kernel log/kernel mean/kernel out/kernel"},
    "tagger": {
        "factors": "attention/key/kernel attention/out/kernel attention/query/kernel "
        "attention/value/kernel embed/embedding out/kernel",
        "diagonal": "norm/bias norm/scale places",
    },
    "gemma": {
        "factors": "down/w embedding gating/w kv/w out/w q/w",
        "diagonal": "after/scale before/scale between/scale",
    },
    "seq2seq": {
        "factors": " ".join(
            f"{cell}/{gate}/kernel"
            for cell in ("decoder", "encoder")
            for gate in ("hf", "hg", "hi", "ho", "if", "ig", "ii", "io")
        )
        + " out/kernel"
    },
    "graphs": {"factors": "edge/0 node/0 out/0"},
    "resnet": {
        "factors": "beside/kernel first/kernel out/kernel second/kernel",
        "diagonal": "beside_norm/bias beside_norm/scale first_norm/bias "
        "first_norm/scale second_norm/bias second_norm/scale",
    },
    "vit": {
        "factors": "patches/weight attention/query_proj/weight "
        "attention/key_proj/weight attention/value_proj/weight "
        "attention/output_proj/weight mlp/layers/0/weight mlp/layers/1/weight "
        "head/weight",
        "diagonal": "token places norms/0/weight norms/0/bias norms/1/weight "
        "norms/1/bias",
    },
    "gru": {
        "factors": "cell/weight_ih cell/weight_hh linear/weight",
        "diagonal": "cell/bias_n",
    },
    "neural_ode": {"factors": "layers/0/weight layers/1/weight"},
    "siren": {"factors": "first/kernel out/kernel second/kernel"},
    "fno": {
        "factors": "bypass/kernel lift/kernel out/kernel",
        "2 blocks": "imag real",
    },
    "deeponet": {
        "factors": "nets/0/layers/0/weight nets/0/layers/1/weight "
        "nets/1/layers/0/weight nets/1/layers/1/weight",
        "diagonal": "shift",
    },
    "nerf": {"factors": "0/0 1/0"},
    "flow": {"factors": "0/0/0 0/1/0 1/0/0 1/1/0"},
    "contrastive": {"factors": "0/0 1/0"},
    "generator": {"factors": "0/0 1/0"},
    "experts": {"3 blocks": "down up", "factors": "router/kernel"},
    "scanned": {
        "2 blocks": "blocks/attention/key/kernel blocks/attention/out/kernel "
        "blocks/attention/query/kernel blocks/attention/value/kernel "
        "blocks/down/kernel blocks/up/kernel",
        "factors": "head/kernel",
        "diagonal": "blocks/before/bias blocks/before/scale blocks/between/bias "
        "blocks/between/scale",
    },
    "lora": {
        "factors": "first/lora/lora_a first/lora/lora_b last/lora/lora_a "
        "last/lora/lora_b"
    },
    "weight_norm": {
        "factors": "conv/kernel out/kernel",
        "diagonal": "WeightNorm_0/conv/kernel/scale conv/bias",
    },
}
"""What each parameter gets; those that are left out are biases of kernels."""

QUICK = ("siren", "contrastive", "lora", "weight_norm")
each = pytest.mark.parametrize(
    "name",
    [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in ZOO],
)


@pytest.fixture(autouse=True)
def allow_rank_promotion():
    """Biases are added as users add them."""
    with jax.numpy_rank_promotion("allow"):
        yield


class Known(NamedTuple):
    """What the truth about factors is made of, for random signs s of each example.

    Attributes:
      root: S of all examples, dense.
      uses: of each use of a kernel the number of the parameter, its derivatives as
        `truth.Program` has them, and the errors that come back to it from S s.
      gradients: of each parameter what comes back to it, `[cases, …]`.
    """

    root: np.ndarray
    uses: list[tuple]
    gradients: list[np.ndarray]


class Compared:
    """A model with all that is compared, computed once."""

    def __init__(self, name):
        self.specimen = ZOO[name]()
        self.objective = self.specimen.objective
        self.params, self.batch = self.specimen.params, self.specimen.batch
        (self.term,) = terms_of(self.objective, self.batch)
        self.weights = np.asarray(self.term.cases.weights, np.float64)
        read = _factors.read(self.objective, self.params, self.batch, 8192)
        self.model = merged(read)

    @functools.cached_property
    def dense(self):
        return truth.dense(self.specimen)

    @functools.cached_property
    def ours(self):
        """What the library computes: one program for all."""
        f, batch = self.objective, self.batch
        tx = hfjax.hessian_free(
            f,
            damping=hfjax.damping.constant(self.specimen.damping),
            solver=hfjax.cg.conjugate_gradient(stopping=hfjax.stopping.residual(1e-11)),
            backtracking=None,
            line_search=None,
        )

        @quick_jit
        def run(params, batch):
            value, gradient = f.value_and_grad(params, batch)
            updates, state = tx.update(gradient, tx.init(params), params, batch=batch)
            product = hfjax.curvature.ggn(f, params, batch)
            return {
                "value": value,
                "gradient": gradient,
                "ggn": matrix_of(product, params),
                "blocks": _factors.estimate(f, params, batch, self.model, key=KEY),
                "step": updates,
                "accepted": state.info.accepted,
            }

        return run(self.params, batch)

    @functools.cached_property
    def known(self):
        term, model_fn = self.term, self.specimen.read
        inputs, targets, _ = term.cases
        program = truth.Program(model_fn, self.params, inputs)

        def of_case(params, example, back):
            alone, back = jax.tree.map(lambda x: x[None], (example, back))
            outputs, to_params = jax.vjp(lambda p: model_fn(p, alone), params)
            again, to_uses, read = jax.vjp(
                lambda added: program(example, added), program.zeros(), has_aux=True
            )
            (errors,) = to_uses(jax.tree.leaves(back))
            return (jax.tree.leaves(outputs), again), read, errors, *to_params(back)

        @quick_jit
        def run(params, inputs):
            outputs = term.model_fn(params, inputs)
            factor = term.loss.factor(outputs, targets)
            drawn = probes.probes(term.means, term.cases, KEY)
            signs = jax.vmap(lambda key, z: drawn.signs(key, 0, z))(drawn.data, outputs)
            cases = jax.vmap(of_case, (None, 0, 0))(params, inputs, factor(signs))
            return matrix_of(factor, outputs), outputs, *cases

        found = jax.tree.map(np.asarray, run(self.params, inputs))
        root, outputs, (held, again), read, errors, gradients = found
        for ours in (held, again):
            assert_close([x[:, 0] for x in ours], jax.tree.leaves(outputs), 1e-9, 1e-12)
        uses = [
            (n, *derivatives, back)
            for reads, back in zip(read, errors, strict=True)
            for n, derivatives in reads.items()
        ]
        return Known(root, uses, jax.tree.leaves(gradients))


compared = functools.cache(Compared)


def assert_near(ours, right, tolerance=1e-9, *, scale=0.0):
    """Compare arrays on the scale of the largest entry, or on a larger one."""
    ours, right = np.asarray(ours), np.asarray(right)
    scale = max(scale, np.max(np.abs(right)))
    np.testing.assert_allclose(ours, right, rtol=0, atol=tolerance * scale)


@each
def test_value_and_gradient_are_those_of_the_loss_written_out(name):
    z = compared(name)
    np.testing.assert_allclose(z.ours["value"], z.dense.value, rtol=1e-11)
    assert_near(flat(z.ours["gradient"]), z.dense.gradient)


@each
def test_the_products_are_those_with_the_dense_matrix(name):
    z = compared(name)
    assert_near(z.ours["ggn"], z.dense.ggn)


@each
def test_an_update_is_the_dense_damped_step(name):
    z = compared(name)
    damped = z.dense.ggn + z.specimen.damping * np.eye(len(z.dense.ggn))
    assert z.ours["accepted"]
    assert_near(flat(z.ours["step"]), -np.linalg.solve(damped, z.dense.gradient), 1e-8)


@each
def test_the_root_of_the_loss_curvature_is_that_of_its_positive_part(name):
    z = compared(name)
    root = z.known.root
    values, vectors = np.linalg.eigh(z.dense.hessian)
    positive = (vectors * np.maximum(values, 0)) @ vectors.T
    share = z.weights / np.sum(z.weights)
    shapes = jax.eval_shape(z.term.model_fn, z.params, z.term.cases.inputs)
    shares = [np.repeat(share, x.size // len(share)) for x in jax.tree.leaves(shapes)]
    assert_near(root @ root.T * np.concatenate(shares)[:, None], positive)


def written_out(z, layer):
    """Return Ā and Ḡ of each block from the products with a kernel.

    If it is used transposed, too, a second list has those of its transpose, exchanged.
    That inputs and errors are right is seen from the gradient of each example by kernel
    and bias, which is Σₜ xₜ gₜᵀ and Σₜ gₜ.
    """
    _, uses, gradients = z.known
    cases = len(z.weights)
    kernel = jax.tree.leaves(z.params)[layer.kernel]
    places = layer.sides.matrices(np.arange(kernel.size).reshape(kernel.shape))
    places = places.reshape(-1, *places.shape[-2:])
    ways, of_kernel = ([], []), np.zeros((cases, *places.shape))
    of_bias = np.zeros((cases, len(places), layer.units))
    for leaf, *use in uses:
        if leaf == layer.kernel:
            found = truth.rows_of(places, *use)
            flipped = found is None
            if flipped:
                found = truth.rows_of(places.swapaxes(1, 2), *use)
            assert found is not None, "its sides are others"
            ways[flipped].append(found)
            outer = np.einsum("nbti,nbtu->nbiu", found.inputs, found.errors)
            of_kernel[:, found.blocks] += outer.swapaxes(2, 3) if flipped else outer
            if layer.bias is not None:
                of_bias[:, found.blocks] += found.errors.sum(axis=2)
    assert ways[0], "no product with it is seen"
    assert_near(of_kernel, gradients[layer.kernel].reshape(cases, -1)[:, places])
    if layer.bias is not None:
        # A bias of keys has no part in attention: its gradient is the rounding of errors.
        largest = max(np.max(np.abs(use.errors)) for own in ways for use in own)
        right = gradients[layer.bias].ravel()
        assert_near(of_bias.ravel(), right, scale=largest)
    first, *flipped = [means(z, layer, found) for found in ways if found]
    return [first, *([pair[::-1] for pair in found] for found in flipped)]


def means(z, layer, uses):
    """Return Σ w x xᵀ / Σ w over positions and Σ w g gᵀ / Σᵢ wᵢ of each block.

    Where positions have weights, or go to some of several experts, Ā leaves out those at
    which x or g is 0.
    """
    inputs, units, often = ([0.0] * layer.blocks for _ in range(3))
    for blocks, x, g in uses:
        if layer.bias is not None:
            x = np.concatenate([x, np.ones_like(x[..., :1])], axis=-1)
        reached = np.ones(g.shape[:-1])
        if z.term.by_position or z.specimen.routed:
            reached = np.any(g != 0, axis=-1) & np.any(x != 0, axis=-1)
        weights = z.weights[:, None, None] * reached
        for n, block in enumerate(blocks):
            own, w = (weights[:, n], x[:, n], x[:, n]), z.weights
            inputs[block] += np.einsum("nt,nti,ntj->ij", *own)
            units[block] += np.einsum("n,nti,ntj->ij", w, g[:, n], g[:, n])
            often[block] += np.sum(weights[:, n])
    whole = np.sum(z.weights)
    its = zip(inputs, units, often, strict=True)
    return [(a / count, g / whole) for a, g, count in its]


@each
def test_factors_are_those_of_the_inputs_and_errors_of_each_position(name):
    """And diagonals those of each example's squared gradient."""
    z = compared(name)
    found, gradients = z.ours["blocks"], z.known.gradients
    share = z.weights / np.sum(z.weights)
    # Those of a whole batch are means over several draws (objectives/test_whole_batch.py).
    for n in () if z.specimen.whole_batch else z.model.others:
        right = np.tensordot(share, gradients[n] ** 2, 1)
        assert_near(found.diagonals[n], right)
    for layer, pair in zip(z.model.layers, found.pairs, strict=True):
        for block, ways in enumerate(zip(*written_out(z, layer), strict=True)):
            inputs, units = pair
            if layer.sides.blocks:
                inputs, units = inputs[block], units[block]
            if layer.is_lookup:  # Whose inputs have the diagonal alone.
                ways = [(np.diag(np.diag(a)), g) for a, g in ways]
                inputs = np.diag(inputs)
            a, g = nearest_product(ways) if len(ways) > 1 else ways[0]
            assert_near(inputs, a)
            assert_near(units, g)


def told(z):
    """Return the parameters of each kind but biases, in the words of `layers`."""
    lines = hfjax.preconditioners.layers(z.objective, z.params, z.batch).values()
    paths = jax.tree_util.tree_leaves_with_path(z.params)
    kinds = {}
    for line, (path, _) in zip(lines, paths, strict=True):
        kind = line.partition(" with" if " blocks with" in line else " ")[0].strip(":")
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        kinds.setdefault(kind, []).append(name.removesuffix("/value"))
    return {kind: " ".join(own) for kind, own in kinds.items() if kind != "bias"}


@each
def test_layers_get_what_they_should(name):
    assert told(compared(name)) == LAYERS[name]
