"""Weights as a model uses them: what its activations are multiplied by, however that is computed of its parameters and buffers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..structure import terms
from ..structure import unify as u
from ..structure.layout import Layout, parse
from ..structure.terms import Product, Sum, Term
from ..structure.unify import Variable
from .modules import get_tensor
from .trace import input_for, run_traced
from .tracer import MODEL_ERRORS, Tracer, named_tensors

ADDED = frozenset(
    {"add", "sub", "rsub", "cat", "stack", "copy", "where", "masked_fill", "index_put", "slice_scatter", "select_scatter", "scatter"}
    | {"maximum", "minimum", "clamp", "eq", "ne", "lt", "le", "gt", "ge"}
)
"""Operations that put a parameter beside activations (position embeddings, class tokens, biases, thresholds) and scale nothing by it."""


@dataclass(frozen=True)
class Weight:
    """A weight as it meets an activation.

    Attributes:
        values: The tensor.
        dims: Its dimensions in the layout's axes.
        sources: Names of the parameters and buffers it was computed of.
    """

    values: torch.Tensor
    dims: tuple[str, ...]
    sources: frozenset[str]


@dataclass
class _Seen:
    """What one run used."""

    weights: list[tuple[torch.Tensor, list[Term], frozenset[str]]] = field(default_factory=list)
    added: set[str] = field(default_factory=set)
    dims: dict[str, list[Term]] = field(default_factory=dict)


def plain_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Names of the weights that convolutions and linear layers hold as parameters of their own → the layers."""
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    found = {f"{path}.weight" if path else "weight": module for path, module in model.named_modules() if isinstance(module, layers)}
    return {name: module for name, module in found.items() if isinstance(module._parameters.get("weight"), nn.Parameter)}


def other_weights(model: nn.Module, layout: Layout) -> list[Weight]:
    """The weights along free axes that are more than the plain ones of convolutions and linear layers.

    Those of recurrent layers, of torch's attention, of layers of one's own, with masks, norms or parametrizations, in buffers, …: whatever
    scales activations and holds several numbers for an element of a free axis. A plain weight counts where it is used together with another
    tensor of that kind, or with a buffer (a mask). What is only added to activations is no weight.

    Args:
        model: The model. A copy runs, on tensors with values if there are weights that have to be computed.
        layout: Its layout.
    """
    plain = plain_weights(model)
    saved = model.state_dict(keep_vars=True).keys()
    names = [name for name, _ in named_tensors(model) if name in saved and name in layout.params]
    several = [name for name in names if name not in plain and _several(layout, layout.params[name])]
    masks = {name for name in names if name not in layout.trained and layout.moves(name)}
    statistics = {name for name in masks if name.rpartition(".")[2].startswith("running_")}
    beside = masks.union(several)
    if not beside - statistics:
        return []
    seen = _watched(model, layout, names, beside)
    axes = _axis_names(layout, seen.dims)
    found: dict[tuple[frozenset[str], tuple[str, ...]], Weight] = {}
    for values, dims, sources in seen.weights:
        written = tuple(str(terms.substitute(u.resolve(term), lambda v: axes.get(v, v.size))) for term in dims)
        if sources & beside and _several(layout, written):
            found.setdefault((sources, written), Weight(values, written, sources))
    scaled = {name for _, _, sources in seen.weights for name in sources}
    for name in several:
        # A function that takes a weight as a whole (recurrent layers) meets it in no operation; axes of factors are not their product's.
        told = {axis for weight in found.values() if name in weight.sources for dim in weight.dims for axis in terms.axes(parse(dim))}
        own = tuple(_without(told, dim, layout) for dim in layout.params[name])
        if (name in scaled or name not in seen.added) and _several(layout, own):
            found[frozenset({name}), own] = Weight(get_tensor(model, name).detach(), own, frozenset({name}))
    return list(found.values())


def _several(layout: Layout, dims: tuple[str, ...]) -> bool:
    """Whether a tensor holds several numbers for an element of one of its free axes, as a matrix does and a bias or scale does not."""
    parsed = [parse(dim) for dim in dims]
    sizes = [size for term in parsed if (size := terms.size(term, layout.base_sizes)) > 1]
    free = (axis for term in parsed for axis in terms.axes(term) if layout.axes[axis].frozen is None)
    return len(sizes) > 1 and any(math.prod(sizes) > layout.axes[axis].size for axis in free)


def _without(told: Collection[str], dim: str, layout: Layout) -> str:
    return str(terms.substitute(parse(dim), lambda axis: layout.axes[axis].size if axis in told else axis))


def _watched(model: nn.Module, layout: Layout, names: Iterable[str], beside: set[str]) -> _Seen:
    """What a run uses, of a model on tensors without values where these need not be known."""
    example = input_for(model, layout)
    try:
        seen = _run(model, example, "meta", names)
        computed = any(sources & beside and tensor.ndim > 1 for tensor, _, sources in seen.weights)
    except MODEL_ERRORS:  # it looks at values
        computed = True
    return _run(model, example, "cpu", names) if computed else seen


def _run(model: nn.Module, example: torch.Tensor, device: str, names: Iterable[str]) -> _Seen:
    seen = _Seen()

    @contextmanager
    def watch(tracer: Tracer, clone: nn.Module, image: torch.Tensor) -> Iterator[None]:
        tensors = dict(named_tensors(clone))
        with _Uses(tracer, seen, {id(tensors[name]): frozenset({name}) for name in names}):
            yield

    _, seen.dims, _ = run_traced(model, example, device, watch)
    return seen


class _Uses(TorchDispatchMode):
    """Follows parameters to where they meet what was computed from the image."""

    def __init__(self, tracer: Tracer, seen: _Seen, sources: Mapping[int, frozenset[str]]) -> None:
        super().__init__()
        self._tracer, self._seen, self._named = tracer, seen, sources

    def _sources(self, tensor: torch.Tensor) -> frozenset[str]:
        named = self._named.get(id(tensor))
        return getattr(tensor, "_zc_sources", frozenset()) if named is None else named

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        named = [*zip((argument.name for argument in func._schema.arguments), args, strict=False), *(kwargs or {}).items()]
        operands = [(key, tensor) for key, value in named for tensor in (value if isinstance(value, (list, tuple)) else [value])]
        operands = [(key, tensor) for key, tensor in operands if isinstance(tensor, torch.Tensor)]
        if name in ("div", "div_", "true_divide"):
            operands = operands[:1]
        if any(self._tracer.is_image(tensor) for _, tensor in operands):
            for key, tensor in operands:
                if not self._tracer.is_image(tensor) and (sources := self._sources(tensor)):
                    if name.removesuffix("_") in ADDED or key in ("attn_mask", "attn_bias", "bias"):
                        self._seen.added |= sources
                    elif not self._tracer.quiet:
                        self._seen.weights.append((tensor, self._tracer.dims(tensor), sources))
        elif found := frozenset().union(*(self._sources(tensor) for _, tensor in operands)):
            for tensor in [out] if isinstance(out, torch.Tensor) else out if isinstance(out, (list, tuple)) else []:
                if isinstance(tensor, torch.Tensor):
                    tensor._zc_sources = found  # type: ignore[attr-defined]
        return out


def _axis_names(layout: Layout, dims: Mapping[str, list[Term]]) -> dict[Variable, str]:
    """Which axis of the layout each variable of another run of the same model is."""
    names: dict[Variable, str] = {}

    def pair(variable: Term, axis: Term) -> None:
        if isinstance(variable, Variable) and isinstance(axis, str):
            names.setdefault(variable, axis)
        elif isinstance(variable, Product) and isinstance(axis, Product) and len(variable.factors) == len(axis.factors):
            for v, a in zip(variable.factors, axis.factors, strict=True):
                pair(v, a)
        elif isinstance(variable, Sum) and isinstance(axis, Sum) and len(variable.terms) == len(axis.terms):
            for v, a in zip(variable.terms, axis.terms, strict=True):
                pair(v, a)

    for name, found in dims.items():
        for term, text in zip(found, layout.params.get(name, ()), strict=False):
            pair(u.resolve(term), parse(text))
    return names
