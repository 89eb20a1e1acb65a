"""Modules whose weights are averaged with each other: a teacher that follows a student has to keep the student's widths."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from ..errors import CompressError
from ..structure import unify as u
from ..structure.layout import Layout
from ..structure.terms import Term
from .metadata import Attributes
from .rules.base import number
from .tracer import Tracer, named_tensors

_logger = logging.getLogger(__name__)

Pairs = list[tuple[str, str]]


def checked(model: nn.Module, tie: Iterable[tuple[str, str]]) -> Pairs:
    """Pairs of names of modules, if they are that, and copies of each other by the names and shapes of their parameters and buffers.

    Raises:
        CompressError: If not, naming what differs first.
    """
    pairs: Pairs = []
    modules = dict(model.named_modules())
    if isinstance(tie, str) or not isinstance(tie, Iterable):
        raise CompressError(f"tie: expected pairs of module names such as [('student', 'teacher')], found {tie!r}")
    for pair in tie:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise CompressError(f"tie: expected pairs of module names such as ('student', 'teacher'), found {pair!r}")
        for name in pair:
            if not name or name not in modules:
                raise CompressError(f"tie: {type(model).__name__} has no module {name!r}; it has {', '.join(list(modules)[1:9])}, …")
        one, other = ({n: tuple(t.shape) for n, t in named_tensors(modules[name])} for name in pair)
        for name in [*one, *other]:
            if one.get(name) != other.get(name):
                found = (str(shapes[name]) if name in shapes else "missing" for shapes in (one, other))
                raise CompressError(f"tie: {pair[0]!r} and {pair[1]!r} are no copies: {name!r} is {' and '.join(found)}")
        pairs.append((pair[0], pair[1]))
    return pairs


def _under(name: str, prefix: str) -> str | None:
    return name[len(prefix) + 1 :] if name.startswith(f"{prefix}.") else None


def tie_(tracer: Tracer, tensors: Mapping[str, torch.Tensor], dims: dict[str, list[Term]], attributes: Attributes, pairs: Pairs) -> None:
    """Give the tensors of tied modules the same dimensions. What one of them is used for, the other is."""
    for one, other in pairs:
        for name in list(tensors):
            inner = _under(name, one)
            twin = f"{other}.{inner}"
            if inner is None or twin not in tensors:
                continue
            for a, b in zip(dims[name], dims[twin], strict=True):
                if isinstance(u.resolve(a), int) or isinstance(u.resolve(b), int):  # a kernel's height, say
                    number(a)
                    number(b)
                else:
                    tracer.unify(a, b)
            if {id(tensors[name]), id(tensors[twin])} & tracer.seen:
                tracer.seen |= {id(tensors[name]), id(tensors[twin])}
        for path, variable in attributes.items():
            inner = _under(path, one)
            same = attributes.get(f"{other}.{inner}") if inner is not None else None
            if same is not None and same.size == variable.size:
                tracer.link(variable, same)


def with_scales(layout: Layout, pairs: Pairs) -> Layout:
    """The layout, with attention's scales of a module in the modules that are tied to it."""
    scales = dict(layout.scales)
    for pair in pairs:
        for one, other in (pair, pair[::-1]):
            scales.update({f"{other}.{inner}": term for path, term in layout.scales.items() if (inner := _under(path, one)) is not None})
    return replace(layout, scales=scales)


def warn_of_copies(model: nn.Module, layout: Layout) -> None:
    """Say which modules may be averages of others, where nothing was said of it: copies by class, names and shapes that are not trained, or
    that the traced passes did not reach."""
    for one, other in _copies(model, layout):
        _logger.warning(
            f"analyze: {one!r} and {other!r} have the same class and parameters, and {other!r} is not trained or did not run. If it "
            f"follows the other (mean teacher, momentum encoder), pass tie=[({one!r}, {other!r})], so that both keep the same widths"
        )


def _copies(model: nn.Module, layout: Layout) -> Iterator[tuple[str, str]]:
    unused = {name for name, dims in layout.params.items() if any(_is_unused(layout, dim) for dim in dims)}
    idle = {name for name, p in model.named_parameters() if not p.requires_grad or name in unused}
    if not idle or len(idle) == len(layout.trained):
        return
    told: list[str] = []
    modules = [(path, module) for path, module in model.named_modules() if path]
    for other, module in modules:
        names = [f"{other}.{name}" for name, _ in module.named_parameters()]
        if any(other.startswith(f"{path}.") for path in told) or not any(len(layout.params[n]) > 1 for n in names if n in layout.params):
            continue
        if all(name in idle for name in names):
            told.append(other)
            yield from ((one, other) for one, twin in modules if _is_trained_copy(one, twin, module, idle) and not _are_listed(one, other))


def _is_unused(layout: Layout, dim: str) -> bool:
    axis = layout.axes.get(dim)
    return axis is not None and axis.frozen is not None and axis.frozen.startswith("not used")


def _are_listed(one: str, other: str) -> bool:
    """Whether two modules are in different items of one list, as blocks are that follow each other."""
    apart = next(((a, b) for a, b in zip(one.split("."), other.split("."), strict=False) if a != b), ("", ""))
    return all(name.isdigit() for name in apart)


def _is_trained_copy(path: str, twin: nn.Module, module: nn.Module, idle: set[str]) -> bool:
    if twin is module or type(twin) is not type(module):
        return False
    shapes = [{name: tuple(p.shape) for name, p in m.named_parameters()} for m in (twin, module)]
    return shapes[0] == shapes[1] and not any(f"{path}.{name}" in idle for name in shapes[0])
