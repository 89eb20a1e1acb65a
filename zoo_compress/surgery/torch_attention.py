"""Torch's own attention: one function that projects, splits into heads, attends and projects back.

Its fast paths (`_native_multi_head_attention`, `_transformer_encoder_layer_fwd`, nested tensors) compute the same from the same parameters
and attributes; within an analysis they are off, so that the function is met in eval mode too.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..structure import unify as u
from ..structure.terms import Term, concat, product
from ..structure.unify import Variable
from .functions import handles
from .tracer import Tracer

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


_switch = threading.Lock()
_found: list[bool] = []
"""What torch's switch was when each of the analyses in progress, of all threads, began: it is one for the whole process."""


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Within, torch's attention runs as the function that this module knows. The last analysis to end leaves the switch as it was."""
    with _switch:
        _found.append(_found[0] if _found else torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        with _switch:
            before = _found.pop()
            if not _found:
                torch.backends.mha.set_fastpath_enabled(before)


@handles(F.multi_head_attention_forward)
def _multi_head_attention(t: Tracer, function: Any, *args: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    bound = _SIGNATURE.bind(*args, **named)
    bound.apply_defaults()
    given = bound.arguments
    if given["static_k"] is not None or given["static_v"] is not None:
        return function(*args, **named)
    with t.silenced():
        out, weights = function(*args, **named)
    t.operation = "attention"
    query, key, value = (t.dims(given[name]) for name in ("query", "key", "value"))
    # (tokens, batch, width), or without a batch (tokens, width)
    rows, *batch, width = query
    columns = key[0]
    for other in (key, value):
        for a, b in zip(batch, other[1:-1], strict=True):
            t.unify(a, b)
    t.unify(columns, value[0])

    heads, head_dim = _heads(t, given, width)
    inner = product(heads, head_dim)
    _project(t, given, (query, key, value), inner)
    for name in ("bias_k", "bias_v"):
        if given[name] is not None:
            t.unify(t.dims(given[name])[-1], inner)
    made, read = t.dims(given["out_proj_weight"])
    t.unify(read, inner)
    if given["out_proj_bias"] is not None:
        t.unify(t.dims(given["out_proj_bias"])[0], made)

    _masked(t, given, batch, heads, rows, columns)
    extra = (given["bias_k"] is not None) + bool(given["add_zero_attn"])
    attended = concat(columns, extra) if extra else columns
    t.mixed += [head_dim, attended]
    (t.costs if given["need_weights"] else t.fused_costs).extend([product(*batch, heads, rows, attended, head_dim)] * 2)
    t.costs.append(product(*batch, rows, made, inner))
    t.set(out, [rows, *batch, made])
    if weights is not None:
        averaged = given["average_attn_weights"]
        if averaged:
            t.mixed.append(heads)
        t.set(weights, [*batch, *([] if averaged else [heads]), rows, attended])
    return out, weights


def _heads(t: Tracer, given: dict[str, Any], width: Term) -> tuple[Term, Term]:
    """Heads and head width, whose product has the size of the query's width, though their elements are unrelated."""
    number, size = given["num_heads"], u.size_of(width)
    heads = Variable(int(number), hint="h", piece=True)
    head_dim = Variable(size // int(number), hint="d", piece=True)
    t.meet(number, heads)
    t.meet(given["embed_dim_to_check"], width)
    t.link(width, product(heads, head_dim))
    module = t.modules[-1][1] if t.modules else None
    if isinstance(module, nn.MultiheadAttention):
        t.meet(module.head_dim, head_dim)
    return heads, head_dim


def _project(t: Tracer, given: dict[str, Any], sources: Sequence[list[Term]], inner: Term) -> None:
    """The projections of query, key and value, in one weight or in three."""
    weights = [given[f"{name}_proj_weight"] for name in "qkv"] if given["use_separate_proj_weight"] else [given["in_proj_weight"]]
    for weight in weights:
        t.unify(t.dims(weight)[0], inner if len(weights) == 3 else product(3, inner))
    if given["in_proj_bias"] is not None:
        t.unify(t.dims(given["in_proj_bias"])[0], product(3, inner))
    for i, source in enumerate(sources):
        t.unify(t.dims(weights[i if len(weights) == 3 else 0])[1], source[-1])
        t.costs.append(product(*source, inner))
    module = t.modules[-1][1] if t.modules else None
    if isinstance(module, nn.MultiheadAttention):
        for name, source in (("kdim", sources[1]), ("vdim", sources[2])):
            t.meet(getattr(module, name), source[-1])


def _masked(t: Tracer, given: dict[str, Any], batch: list[Term], heads: Term, rows: Term, columns: Term) -> None:
    """Masks over (tokens, tokens), over that for every sample and head, and over (batch, tokens)."""
    if given["attn_mask"] is not None:
        *outer, a, b = t.dims(given["attn_mask"])
        for term in outer:
            if u.size_of(term) > 1:
                t.unify(term, product(*batch, heads))
        t.unify(a, rows)
        t.unify(b, columns)
    if given["key_padding_mask"] is not None:
        for x, y in zip(t.dims(given["key_padding_mask"]), (*batch, columns), strict=True):
            t.unify(x, y)
