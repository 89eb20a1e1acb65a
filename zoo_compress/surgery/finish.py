"""From variables to names: the last step of an analysis."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from ..structure import unify as u
from ..structure.layout import Axis, Layout
from ..structure.terms import Term, axes, substitute
from ..structure.unify import Variable
from ..structure.widths import unsolvable
from .metadata import Attributes, describe_blocks, describe_standard_modules
from .tracer import Tracer


def finish(model: nn.Module, tracer: Tracer, dims: dict[str, list[Term]], attributes: Attributes, example: torch.Tensor) -> Layout:
    """Freeze what no choice of widths can satisfy, name the axes and write the layout down.

    Args:
        model: The analysed model.
        tracer: What the run left behind.
        dims: Parameter or buffer name → one term over variables per dimension.
        attributes: Attribute path → its variable.
        example: The batch that ran.
    """
    describe_standard_modules(model, dims, attributes)
    describe_blocks(model, dims, attributes)
    for variable in attributes.values():
        _give_hint(variable)
    tracer.settle_numbers()
    _settle_links(tracer, dims)
    names = _names(dims, tracer)

    def written(term: Term) -> str:
        return str(substitute(u.resolve(term), lambda v: names.get(v, v.size)))

    moving = {path: v for path, v in attributes.items() if any(a in names and a.frozen is None for a in u.variables(v))}
    return Layout(
        params={name: tuple(written(term) for term in terms) for name, terms in dims.items()},
        axes={name: Axis(v.size, v.frozen, v.ordered) for v, name in names.items()},
        attributes={path: written(variable) for path, variable in moving.items()},
        scales={path: written(term) for path, term in tracer.scales.found.items() if any(v in names for v in u.variables(term))},
        links=tuple(dict.fromkeys((written(a), written(b)) for a, b in tracer.links)),
        macs_terms=tuple(Counter(map(written, tracer.costs)).items()),
        fused_macs_terms=tuple(Counter(map(written, tracer.fused_costs)).items()),
        input_shape=tuple(map(int, example.shape)),
        example=example,
        outputs=tuple(tuple(map(written, terms)) for terms in tracer.outputs),
        trained=frozenset(name for name, _ in model.named_parameters()),
        normalised=frozenset(names[v] for term in tracer.mixed for v in u.variables(term) if v in names),
        unknown=dict(tracer.unknown),
        untrained=tracer.untrained,
    )


def _settle_links(tracer: Tracer, dims: dict[str, list[Term]]) -> None:
    """Drop links that hold by themselves; freeze axes that a link ties to something that never changes."""
    stored = {v for terms in dims.values() for term in terms for v in u.variables(term)}
    while True:
        met, tracer.links = tracer.links, []
        for link in met:
            tracer.link(*link)
        tracer.links = [link for link in tracer.links if any(map(u.is_free, link))]
        for link in tracer.links:
            for side in link:
                for variable in u.variables(side):
                    if variable not in stored and variable.attribute is None:
                        u.freeze(variable, "its size is that of a temporary tensor")
        free = {str(v.serial): v for link in tracer.links for side in link for v in axes(side) if v.frozen is None}
        named = [tuple(substitute(side, lambda v: v.size if v.frozen else str(v.serial)) for side in link) for link in tracer.links]
        held = unsolvable({name: v.size for name, v in free.items()}, named)  # type: ignore[arg-type]
        if not held:
            return
        for name in held:
            u.freeze(free[name], "its size is tied to another that cannot follow")


def _give_hint(variable: Variable) -> None:
    """Axes that an attribute names get its letter."""
    target = u.resolve(variable)
    if isinstance(target, Variable) and variable.attribute is not None:
        name = variable.attribute.rpartition(".")[2]
        target.hint = target.hint or ("d" if "head_dim" in name else "h" if "heads" in name else "g" if "groups" in name else "")


def _names(dims: dict[str, list[Term]], tracer: Tracer) -> dict[Variable, str]:
    """Name every axis of a parameter, and every attribute a link needs, in order of appearance: c channels, e features, h heads, …"""
    names: dict[Variable, str] = {}
    counts: Counter[str] = Counter()
    appearing = [(v, "c" if len(terms) > 2 else "e") for terms in dims.values() for term in terms for v in u.variables(term)]
    appearing += [(v, "n") for link in tracer.links for side in link for v in u.variables(side)]
    for variable, letter in appearing:
        if variable not in names:
            letter = variable.hint or letter
            names[variable] = f"{letter}{counts[letter]}"
            counts[letter] += 1
    return names
