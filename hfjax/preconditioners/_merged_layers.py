"""The layers of a sum of objectives, merged from those of each term's model.

A term that does not read a kernel adds nothing to its factors. A term that reads it,
but not as a layer, has no Kronecker factors for it: its diagonal stands beside the
factors of the terms in which the kernel is a layer.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from hfjax._tracing.layers import Layer, Model


class Part(NamedTuple):
    """What a term adds to the blocks of the sum.

    Attributes:
      model: the model of the term, with those layers that are layers of the sum, and
        those biases that are biases of the sum.
      places: for each of these layers, its index among the layers of the sum.
      diagonals: the parameters for which the diagonal of the term's G counts.
    """

    model: Model
    places: tuple[int, ...]
    diagonals: tuple[int, ...]


class Merged(NamedTuple):
    """The layers of a sum; a plain objective is a sum of one term.

    Attributes:
      layers: the layers of all terms. Ignore their `uses`, which differ from term to
        term.
      others: why each other parameter is not part of a layer, by its number.
      beside: for parameters of a layer that some terms read in another way, the numbers
        of these terms, and why.
      parts: the part of each term.
    """

    layers: tuple[Layer, ...]
    others: Mapping[int, str]
    beside: Mapping[int, Mapping[int, str]]
    parts: tuple[Part, ...]

    def positions(self, place: int) -> list[int]:
        """List, sorted, how often an example uses a layer in terms that have it."""
        found = {
            part.model.layers[part.places.index(place)].positions(part.model.uses)
            for part in self.parts
            if place in part.places
        }
        return sorted(found)


def merged(models: Sequence[Model]) -> Merged:
    """Merge the layers of several models of the same parameters.

    A parameter is the bias of a kernel if it is so in every term that reads it, except
    for terms in which the kernel is not part of a layer either, and if no term has
    another bias for this kernel.
    """
    uses: dict[int, list[Layer]] = {}
    for model in models:
        for layer in model.layers:
            uses.setdefault(layer.kernel, []).append(layer)
    others = {
        kernel: "it is used in another way in another term"
        for kernel, found in uses.items()
        if len({(layer.sides, layer.is_lookup) for layer in found}) > 1
    }
    uses = {kernel: found for kernel, found in uses.items() if kernel not in others}
    others |= _no_biases(models, others.keys())
    layers = tuple(
        found[0]._replace(bias=_bias(found, others)) for found in uses.values()
    )
    known = {n for layer in layers for n in (layer.kernel, layer.bias)}
    beside: dict[int, dict[int, str]] = {}
    for k, model in enumerate(models):
        for n in sorted(_read_otherwise(model) & known):
            beside.setdefault(n, {})[k] = model.others[n]
    # Prefer the reason of a term that reads the parameter.
    for unread in (False, True):
        for model in models:
            for n, why in model.others.items():
                if n not in known and (n in model.unread) is unread:
                    others.setdefault(n, why)
    parts = (_part(k, model, layers, others, beside) for k, model in enumerate(models))
    return Merged(layers, others, beside, tuple(parts))


def _no_biases(models: Sequence[Model], spoiled: Collection[int]) -> dict[int, str]:
    """Return which biases of a term are not biases of the sum, and why."""
    kernels_of: dict[int, set[int]] = {}
    biases_of: dict[int, set[int]] = {}
    for model in models:
        for layer in model.layers:
            if layer.bias is not None:
                kernels_of.setdefault(layer.bias, set()).add(layer.kernel)
                biases_of.setdefault(layer.kernel, set()).add(layer.bias)
    found: dict[int, str] = {}
    for bias, kernels in kernels_of.items():
        kernel = next(iter(kernels))
        elsewhere = [
            model.others[bias]
            for model in models
            if bias in _read_otherwise(model) and kernel not in _read_otherwise(model)
        ]
        if kernels & set(spoiled):
            found[bias] = "its kernel has no factors"
        elif len(kernels) > 1:
            found[bias] = "several kernels share it"
        elif elsewhere:
            found[bias] = elsewhere[0]
        elif len(biases_of[kernel]) > 1:
            found[bias] = "its kernel has another bias in another term"
    return found


def _read_otherwise(model: Model) -> set[int]:
    """Return the parameters that a model reads, but not as part of a layer."""
    return model.others.keys() - model.unread


def _bias(found: Sequence[Layer], others: Mapping[int, str]) -> int | None:
    """Return the bias of a layer of the sum."""
    biases = {layer.bias for layer in found} - {None} - others.keys()
    return next(iter(biases), None)


def _part(
    term: int,
    model: Model,
    layers: Sequence[Layer],
    others: Mapping[int, str],
    beside: Mapping[int, Mapping[int, str]],
) -> Part:
    places = {layer.kernel: place for place, layer in enumerate(layers)}
    own = [
        layer._replace(bias=None if layer.bias in others else layer.bias)
        for layer in model.layers
        if layer.kernel in places
    ]
    diagonals = [n for n in others if n not in model.unread]
    diagonals += [n for n, terms in beside.items() if term in terms]
    return Part(
        dataclasses.replace(model, layers=tuple(own)),
        tuple(places[layer.kernel] for layer in own),
        tuple(sorted(diagonals)),
    )
