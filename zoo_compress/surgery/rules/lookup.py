"""Looking elements up, and putting them, by position or by a mask.

A dimension that positions point into is frozen. Along every other dimension positions and what they select are matched element by element:
an index that `expand` made is the same for all channels and follows them, one that was computed for every channel runs along the same axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...structure import unify as u
from ...structure.terms import Term
from ..tracer import Tracer
from .base import broadcast, elementwise, keep_still, rule


def _frozen(t: Tracer, term: Term) -> Term:
    """A dimension that positions point into."""
    u.freeze(term, f"{t.where} looks it up by position")
    return term


@rule("index", "_unsafe_index")
def _index(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, indices: Sequence[torch.Tensor | None], **_: Any) -> list[Term]:
    before, picked, after = _picked(t, self, indices)
    if picked is None:
        picked = [int(n) for n in out.shape[len(before) : out.ndim - len(after)]]
    return [*before, *picked, *after]


@rule("index_put", "_unsafe_index_put", "_index_put_impl")
def _index_put(
    t: Tracer, out: torch.Tensor, *, self: torch.Tensor, indices: Sequence[torch.Tensor | None], values: torch.Tensor, **_: Any
) -> list[Term]:
    before, picked, after = _picked(t, self, indices)
    given = t.dims(values)
    if picked is None:
        # Values for what a mask selects: as many as it selects, or one for all.
        at = max(len(given) - len(after), 0)
        count = max(1, *(index.ndim for index in indices if index is not None and not _is_mask(index)), 0)
        for term in given[max(at - count, 0) : at]:
            u.freeze(term, f"{t.where} puts elements by a mask")
        broadcast(t, (before, given[: max(at - count, 0)]))
        broadcast(t, (after, given[at:]))
    else:
        broadcast(t, ([*before, *picked, *after], given))
    return t.dims(self)


def _is_mask(index: torch.Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _picked(t: Tracer, tensor: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> tuple[list[Term], list[Term] | None, list[Term]]:
    """The dimensions of `tensor[indices]`: those before what the indices pick, what they pick (None where a mask does), those after."""
    terms = t.dims(tensor)
    chosen: list[int] = []
    d = 0
    for index in indices:
        if index is None:
            d += 1
            continue
        covered = index.ndim if _is_mask(index) else 1
        if _is_mask(index):
            _cover(t, terms[d : d + covered], t.dims(index))
        else:
            _frozen(t, terms[d])
        chosen += range(d, d + covered)
        d += covered
    used = [index for index in indices if index is not None]
    masks = any(map(_is_mask, used))
    if masks:
        # How many a mask selects only its values tell.
        for index in used:
            keep_still(t, t.dims(index), "selects by a mask")
    rest = [term for d, term in enumerate(terms) if d not in chosen]
    adjacent = not chosen or chosen[-1] - chosen[0] + 1 == len(chosen)
    at = chosen[0] if chosen and adjacent else 0
    return rest[:at], None if masks else elementwise(t, used), rest[at:]


def _cover(t: Tracer, terms: Sequence[Term], mask: Sequence[Term]) -> None:
    """A mask runs along what it selects from, and how many elements that leaves is known to nobody: both stay as they are."""
    for a, b in zip(terms, mask, strict=True):
        t.unify(a, b)
    keep_still(t, [*terms, *mask], "selects by a mask")


@rule("index_select")
def _index_select(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: int, index: torch.Tensor, **_: Any) -> list[Term]:
    terms = t.dims(self)
    _frozen(t, terms[dim])
    terms[dim] = t.dims(index)[0] if index.ndim else 1
    return terms


@rule("take")
def _take(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, index: torch.Tensor) -> list[Term]:
    keep_still(t, t.dims(self), "looks it up by position")
    return t.dims(index)


@rule("embedding")
def _embedding(t: Tracer, out: torch.Tensor, *, weight: torch.Tensor, indices: torch.Tensor, **_: Any) -> list[Term]:
    rows, width = t.dims(weight)
    _frozen(t, rows)
    return [*t.dims(indices), width]


@rule("embedding_renorm")
def _embedding_renorm(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, **_: Any) -> list[Term]:
    rows, width = t.dims(self)
    _frozen(t, rows)
    t.mixed.append(width)
    return [rows, width]


@rule("_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(
    t: Tracer,
    out: Sequence[torch.Tensor],
    *,
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    per_sample_weights: torch.Tensor | None = None,
    **_: Any,
) -> list[list[Term]]:
    rows, width = t.dims(weight)
    _frozen(t, rows)
    for tensor in (indices, offsets, per_sample_weights):
        if tensor is not None:
            keep_still(t, t.dims(tensor), "sums runs of it")
    bags, *others = out
    return [[len(bags), width], *([int(n) if n != weight.shape[1] else width for n in other.shape] for other in others)]


def _matched(t: Tracer, dim: int, terms: list[Term], *others: list[Term]) -> None:
    """Along every dimension but `dim` the tensors hold the same elements; one that is read in part is frozen."""
    for d in range(len(terms)):
        if d == dim % len(terms):
            continue
        along = [terms[d], *(other[d] for other in others)]
        if len(set(map(u.size_of, along))) > 1:
            keep_still(t, along, "reads the first elements of it")
            continue
        for term in along[1:]:
            t.unify(along[0], term)


@rule("gather")
def _gather(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: int, index: torch.Tensor, **_: Any) -> list[Term]:
    terms, places = t.dims(self), t.dims(index)
    if terms:
        _matched(t, dim, terms, places)
        _frozen(t, terms[dim])
    return places


@rule("scatter", "scatter_add", "scatter_reduce")
def _scatter(
    t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: int, index: torch.Tensor, src: torch.Tensor | None = None, **_: Any
) -> list[Term]:
    terms, sources = t.dims(self), [t.dims(tensor) for tensor in (index, src) if isinstance(tensor, torch.Tensor)]
    if terms:
        _matched(t, dim, terms, *sources)
        for term in (terms[dim], *(source[dim] for source in sources)):
            _frozen(t, term)
    return terms


@rule("index_copy", "index_add", "index_reduce")
def _index_copy(
    t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, **_: Any
) -> list[Term]:
    terms, rows = t.dims(self), t.dims(source)
    if terms:
        _matched(t, dim, terms, rows)
        for term in (terms[dim], rows[dim], *t.dims(index)):
            _frozen(t, term)
    return terms


@rule("index_fill")
def _index_fill(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: int, index: torch.Tensor, **_: Any) -> list[Term]:
    terms = t.dims(self)
    if terms:
        for term in (terms[dim], *t.dims(index)):
            _frozen(t, term)
    return terms


@rule("masked_select")
def _masked_select(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, mask: torch.Tensor) -> list[Term]:
    for term in elementwise(t, (self, mask)):
        u.freeze(term, f"{t.where} selects by a mask")
    return [int(n) for n in out.shape]


@rule("masked_scatter")
def _masked_scatter(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> list[Term]:
    terms = elementwise(t, (self, mask))
    chosen, given = t.dims(mask), t.dims(source)
    rest = list(terms)
    # A mask that is the same all along the last dimensions takes whole rows of the source.
    while rest and given and (not chosen or u.size_of(chosen[-1]) == 1) and u.size_of(rest[-1]) == u.size_of(given[-1]):
        t.unify(rest.pop(), given.pop())
        chosen = chosen[:-1]
    keep_still(t, [*rest, *given], "puts elements by a mask")
    return terms


@rule("nonzero", "nonzero_static")
def _nonzero(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, **_: Any) -> list[Term]:
    keep_still(t, t.dims(self), "looks for a position along it")
    return [int(n) for n in out.shape]


@rule("searchsorted", "bucketize")
def _search(
    t: Tracer,
    out: torch.Tensor,
    *,
    self: Any,
    sorted_sequence: torch.Tensor | None = None,
    boundaries: torch.Tensor | None = None,
    sorter: torch.Tensor | None = None,
    **_: Any,
) -> list[Term]:
    """Which interval of a sorted sequence each element lies in. Sequences of more than one dimension are one for every row."""
    sequence = boundaries if sorted_sequence is None else sorted_sequence
    assert sequence is not None
    *rows, steps = t.dims(sequence)
    _frozen(t, steps)
    terms = t.dims(self) if isinstance(self, torch.Tensor) else []
    if rows:
        for term, row in zip(terms[:-1], rows, strict=True):
            t.unify(term, row)
    if sorter is not None:
        for a, b in zip(t.dims(sequence), t.dims(sorter), strict=True):
            t.unify(a, b)
    return terms


@rule("isin")
def _isin(t: Tracer, out: torch.Tensor, *, elements: Any = None, test_elements: Any = None, **_: Any) -> list[Term]:
    if isinstance(test_elements, torch.Tensor):
        keep_still(t, t.dims(test_elements), "looks elements up in it")
    return t.dims(elements) if isinstance(elements, torch.Tensor) else []


@rule("torchvision::roi_align", "torchvision::roi_pool")
def _roi(t: Tracer, out: Any, *, input: torch.Tensor, rois: torch.Tensor, **_: Any) -> Any:
    batch, channels, *space = t.dims(input)
    boxes, corners = t.dims(rois)
    keep_still(t, [batch, *space, corners], "samples by position")
    terms = [boxes, channels, *(int(n) for n in (out if isinstance(out, torch.Tensor) else out[0]).shape[2:])]
    return terms if isinstance(out, torch.Tensor) else [terms for _ in out]
