"""Normalisation, pooling and resampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...structure import unify as u
from ...structure.terms import Term, product
from ...structure.unify import Variable
from ..tracer import Tracer
from .base import elementwise, keep_still, rule


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_batch_norm_no_update",
    "_batch_norm_with_update",
    "batch_norm",
)
def _batch_norm(t: Tracer, out: Any, *, input: torch.Tensor, **named: Any) -> Any:
    channels = t.dims(input)[1]
    for key in ("weight", "bias", "running_mean", "running_var"):
        if named.get(key) is not None:
            t.unify(channels, t.dims(named[key])[0])
    if named.get("training") or "no_stats" in t.operation:
        batch, _, *space = t.dims(input)
        t.mixed += [batch, *space]
    return _with_statistics(t.dims(input), out, [channels])


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(
    t: Tracer,
    out: Any,
    *,
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    **_: Any,
) -> Any:
    terms = t.dims(input)
    t.mixed.extend(terms[-len(normalized_shape) :])
    for affine in (weight, bias):
        if affine is not None:
            for a, b in zip(terms[-len(normalized_shape) :], t.dims(affine), strict=True):
                t.unify(a, b)
    return _with_statistics(terms, out, [*terms[: -len(normalized_shape)], *[1] * len(normalized_shape)])


@rule("native_group_norm")
def _group_norm(
    t: Tracer, out: Any, *, input: torch.Tensor, group: int, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, **_: Any
) -> Any:
    terms = t.dims(input)
    t.mixed.append(terms[1])
    t.group(group)
    if group > 1:
        t.unify(terms[1], product(t.groups, Variable(int(input.shape[1]) // group, piece=True)))
    for affine in (weight, bias):
        if affine is not None:
            t.unify(terms[1], t.dims(affine)[0])
    return _with_statistics(terms, out, [terms[0], t.groups])


def _with_statistics(terms: list[Term], out: Any, statistics: list[Term]) -> Any:
    """The normalised tensor, and what it was normalised by where the operation gives that too; empty where it is not needed."""
    if isinstance(out, torch.Tensor):
        return terms
    shape = tuple(map(u.size_of, statistics))
    return [terms, *(statistics if tuple(extra.shape) == shape else [int(n) for n in extra.shape] for extra in out[1:])]


@rule(
    "max_pool2d_with_indices",
    "max_pool2d",
    "max_pool1d",
    "avg_pool1d",
    "avg_pool2d",
    "_adaptive_avg_pool2d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool1d",
    "upsample_nearest2d",
    "_upsample_nearest_exact2d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "_upsample_lanczos2d_aa",
    "upsample_nearest1d",
    "_upsample_nearest_exact1d",
    "upsample_linear1d",
    "upsample_nearest3d",
    "_upsample_nearest_exact3d",
    "upsample_trilinear3d",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "avg_pool3d",
    "_adaptive_avg_pool3d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool3d",
    "max_pool3d_with_indices",
)
def _pool(t: Tracer, out: Any, *, self: torch.Tensor | None = None, input: torch.Tensor | None = None, **_: Any) -> Any:
    source = self if self is not None else input
    assert source is not None
    space = int(next(c for c in t.operation if c.isdigit()))
    terms = t.dims(source)
    keep_still(t, terms[-space:], "pools or resamples it")

    def of(tensor: torch.Tensor) -> list[Term]:
        return [*terms[:-space], *(int(n) for n in tensor.shape[-space:])]

    return of(out) if isinstance(out, torch.Tensor) else [of(tensor) for tensor in out]


@rule("max_unpool2d", "max_unpool3d")
def _unpool(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, indices: torch.Tensor, output_size: Sequence[int], **_: Any) -> list[Term]:
    terms = elementwise(t, (self, indices))
    space = len(output_size)
    keep_still(t, terms[-space:], "pools or resamples it")
    return [*terms[:-space], *(int(n) for n in out.shape[-space:])]


@rule("fractional_max_pool2d", "fractional_max_pool3d")
def _fractional_pool(t: Tracer, out: Any, *, self: torch.Tensor, random_samples: torch.Tensor, **_: Any) -> list[list[Term]]:
    space = 2 if "2d" in t.operation else 3
    terms = t.dims(self)
    keep_still(t, [*terms[-space:], t.dims(random_samples)[-1]], "pools or resamples it")
    for a, b in zip(terms[:-space][-2:], t.dims(random_samples)[:-1][-len(terms[:-space]) :], strict=True):
        t.unify(a, b)
    return [[*terms[:-space], *(int(n) for n in out[0].shape[-space:])] for _ in out]


@rule("affine_grid_generator")
def _affine_grid(t: Tracer, out: torch.Tensor, *, theta: torch.Tensor, **_: Any) -> list[Term]:
    batch, *matrix = t.dims(theta)
    keep_still(t, matrix, "reads it as a matrix of coordinates")
    return [batch, *(int(n) for n in out.shape[1:])]


@rule("grid_sampler_2d", "grid_sampler_3d", "grid_sampler")
def _grid_sample(t: Tracer, out: torch.Tensor, *, input: torch.Tensor, grid: torch.Tensor, **_: Any) -> list[Term]:
    batch, channels, *space = t.dims(input)
    keep_still(t, [*space, *t.dims(grid)[1:]], "samples by position")
    t.unify(batch, t.dims(grid)[0])
    return [batch, channels, *(int(n) for n in out.shape[2:])]
