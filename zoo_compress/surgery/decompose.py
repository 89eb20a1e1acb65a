"""The two weights that come nearest to one: by singular value decomposition, or by least squares on what the layer sees.

Without statistics the squared error of the weight is least. With them it is that of the layer's output on the images they are of: columns
are weighted with the covariance of the inputs, and rows with how much the model's predictions depend on each output (as in Zhang et al.
2016, section 3.1, with that weight added). Then

- `svd` and `channel` are exact: the truncated decomposition of the weighted weight (Eckart & Young 1936).
- `spatial` is exact without statistics. With them the vertical filters are those of the decomposition weighted by the covariance of
  columns of pixels, and the horizontal ones exact least squares on what they give; together that is not always the least.
- `separable` is exact without statistics: input channels don't share anything, so each takes the leading singular vectors of its kernels.
  With them, least squares for pointwise and depthwise weights in turns; each turn is exact, and none makes it worse.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..structure.factors import Factor
from .factors import composed
from .moments import Moments
from .reconstruct import ridge

TURNS = 3
"""How often depthwise and pointwise weights are fitted in turns."""

LEAST_SENSITIVITY = 1e-2
"""Outputs count at least with this fraction of the mean sensitivity: what few images don't move, others may."""


@dataclass(frozen=True)
class Seen:
    """What a layer sees, and how much what it gives matters.

    Attributes:
        covariance: Of its inputs, (columns, columns), with the ridge that few images call for.
        mean: Of its inputs, (columns,); zeros if the layer's output cannot be shifted.
        weights: Of the squared error of each output, (outputs,).
    """

    covariance: torch.Tensor
    mean: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, moments: Moments) -> Seen:
        """What moments of one layer, not in groups, say."""
        covariance, mean, rows = moments.covariance()
        sensitivity = moments.sensitivity.double()
        weights = sensitivity.clamp_min(float(sensitivity.mean()) * LEAST_SENSITIVITY) if bool(sensitivity.any()) else sensitivity + 1
        return cls((covariance + ridge(covariance, rows, mean))[0], mean[0], weights)


@dataclass(frozen=True)
class Fit:
    """Two weights in place of one.

    Attributes:
        first: Weight of the first layer, in its shape.
        second: Weight of the second.
        shift: What the output's mean lost by it, (outputs,).
    """

    first: torch.Tensor
    second: torch.Tensor
    shift: torch.Tensor


def energy(weight: torch.Tensor, seen: Seen | None) -> float:
    """The squared (weighted) size of what a layer gives: what a loss of all of it would be."""
    matrix = weight.detach().double().flatten(1)
    if seen is None:
        return float(matrix.square().sum())
    return float(seen.weights @ ((matrix @ seen.covariance) * matrix).sum(1))


def losses(kind: str, weight: torch.Tensor, seen: Seen | None, ranks: np.ndarray, whole: float) -> np.ndarray:
    """The squared (weighted) error that the best two weights of each rank leave, in the unit of `energy`.

    Args:
        kind: One of `structure.factors.KINDS`.
        weight: Weight of the layer, (outputs, inputs, …).
        seen: What it sees; None fits the weight alone.
        ranks: Ascending.
        whole: Its energy.
    """
    weight = weight.detach().double()
    if kind == "separable" and seen is None:
        kept = _Cut(_by_input(weight)).squares().sum(0).cumsum(0)
    elif kind == "separable" and seen is not None:
        return np.array([_error(weight, Factor(kind="separable", rank=int(rank)), seen) for rank in ranks])
    elif kind == "spatial" and seen is not None:
        kept = _Horizontal(weight, seen, int(ranks[-1])).kept
    else:
        kept = _weighted(kind, weight, seen).squares().cumsum(0)
    # Rounding must not make a rank look better than the whole.
    return (whole - kept[torch.from_numpy(ranks) - 1]).clamp_min(0).cpu().numpy()


def fit(factor: Factor, weight: torch.Tensor, seen: Seen | None) -> Fit:
    """The two weights.

    Args:
        factor: Kind and rank.
        weight: Weight of the layer, (outputs, inputs, …).
        seen: What it sees; None fits the weight alone.
    """
    dense = weight.detach().double()
    if factor.kind == "separable":
        first, second = _separable(dense, factor.rank, seen)
    elif factor.kind == "spatial" and seen is not None:
        first, second = _Horizontal(dense, seen, factor.rank).weights(factor.rank)
    else:
        first, second = _truncated(factor, dense, seen)
    shift = torch.zeros(len(dense), dtype=dense.dtype)
    if seen is not None:
        shift = (dense - composed(factor, first, second)).flatten(1) @ seen.mean
    return Fit(first.to(weight), second.to(weight), shift.to(weight))


def _error(weight: torch.Tensor, factor: Factor, seen: Seen) -> float:
    found = fit(factor, weight, seen)
    return energy(weight - composed(factor, found.first, found.second), seen)


class _Cut:
    """A matrix cut down to lower ranks with the least weighted error (Eckart & Young 1936), or several at once.

    It works on the Gram matrix of the shorter side, whose eigenvalues are the squared singular values: several times faster than a singular
    value decomposition. Only singular values below 1e-8 of the greatest lose digits by that, and they are rounding in weights.

    Args:
        matrix: (…, rows, columns).
        covariance: What weighs the columns, (…, columns, columns); None is the identity.
        roots: What the rows are multiplied with before they are squared, (rows,); None is one.
    """

    def __init__(self, matrix: torch.Tensor, covariance: torch.Tensor | None = None, roots: torch.Tensor | None = None) -> None:
        self.roots = matrix.new_ones(matrix.shape[-2]) if roots is None else roots
        self.matrix = self.roots[:, None] * matrix
        self.wide = matrix.shape[-2] <= matrix.shape[-1]
        self.factor = None if covariance is None or self.wide else torch.linalg.cholesky(covariance)
        if self.wide:
            self.gram = (self.matrix if covariance is None else self.matrix @ covariance) @ self.matrix.mT
        else:
            self.matrix = self.matrix if self.factor is None else self.matrix @ self.factor
            self.gram = self.matrix.mT @ self.matrix

    def squares(self) -> torch.Tensor:
        """Squared singular values of what is weighted, descending: what each further rank keeps."""
        return torch.linalg.eigvalsh(self.gram).flip(-1).clamp_min(0)

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two factors of a rank, (…, rows, rank) and (…, rank, columns), of equal weighted size."""
        squares, basis = torch.linalg.eigh(self.gram)
        basis = basis.flip(-1)[..., :rank]
        size = squares.flip(-1)[..., :rank].clamp_min(0).sqrt()
        root = size.maximum(1e-8 * size[..., :1]).clamp_min(1e-30).sqrt()  # ranks that add nothing stay small on both sides
        if self.wide:
            left, right = basis * root[..., None, :], basis.mT @ self.matrix / root[..., None]
        else:
            left, right = self.matrix @ basis / root[..., None, :], basis.mT * root[..., None]
        if self.factor is not None:
            right = torch.linalg.solve_triangular(self.factor, right, upper=False, left=False)
        return left / self.roots[:, None], right


def _weighted(kind: str, weight: torch.Tensor, seen: Seen | None) -> _Cut:
    """A weight as the matrix that is cut down.

    Rows are outputs, (outputs × width) in the spatial kind; columns what the first layer reads.
    """
    if kind != "spatial":
        return _Cut(weight.flatten(1), *(() if seen is None else (seen.covariance, seen.weights.sqrt())))
    outputs, inputs, height, width = weight.shape
    matrix = weight.permute(0, 3, 1, 2).reshape(outputs * width, inputs * height)
    if seen is None:
        return _Cut(matrix)
    by_column = seen.covariance.reshape(inputs * height, width, inputs * height, width)
    return _Cut(matrix, torch.einsum("awbw->ab", by_column) / width, seen.weights.sqrt().repeat_interleave(width))


def _truncated(factor: Factor, weight: torch.Tensor, seen: Seen | None) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = _weighted(factor.kind, weight, seen).factors(factor.rank)
    if factor.kind == "spatial":
        outputs, inputs, height, width = weight.shape
        second = left.reshape(outputs, width, factor.rank).permute(0, 2, 1).reshape(outputs, factor.rank, 1, width)
        return right.reshape(factor.rank, inputs, height, 1), second
    return right.reshape(factor.rank, *weight.shape[1:]), left.reshape(*left.shape, *[1] * (weight.ndim - 2))


class _Horizontal:
    """Least squares for the horizontal filters, given vertical ones in the order of what they are worth; for all ranks at once.

    Attributes:
        kept: Squared weighted size of the output explained with the first 1, 2, … vertical filters.
    """

    def __init__(self, weight: torch.Tensor, seen: Seen, rank: int) -> None:
        self.shape = weight.shape
        _, inputs, height, width = weight.shape
        _, vertical = _weighted("spatial", weight, seen).factors(rank)
        self.vertical = vertical / vertical.norm(dim=1, keepdim=True).clamp_min(1e-30)
        # What the second layer reads is each vertical filter at each of the kernel's columns: how that varies with the layer's inputs,
        # (rank, width, inputs × height, width), and with itself.
        reads = (self.vertical @ seen.covariance.reshape(inputs * height, -1)).reshape(rank, width, inputs * height, width)
        gram = torch.einsum("rwbv,qb->rwqv", reads, self.vertical).reshape(rank * width, -1)
        _lift_(gram, 1e-12)
        self.factor = torch.linalg.cholesky(gram)
        target = weight.flatten(1) @ reads.reshape(rank * width, -1).mT
        self.found = torch.linalg.solve_triangular(self.factor, target.mT, upper=False).mT  # (outputs, rank × width)
        explained = seen.weights @ self.found.square()
        self.kept = explained.reshape(-1, width).sum(1).cumsum(0)

    def weights(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Vertical and horizontal filters of a rank."""
        outputs, inputs, height, width = self.shape
        columns = rank * width
        second = torch.linalg.solve_triangular(self.factor[:columns, :columns].mT, self.found[:, :columns].mT, upper=True).mT
        return self.vertical[:rank].reshape(rank, inputs, height, 1), second.reshape(outputs, rank, 1, width)


def _lift_(gram: torch.Tensor, part: float) -> None:
    """Make a Gram matrix invertible, in place: add a part of its diagonal's mean, or next to nothing where all of it is zero."""
    gram.diagonal().add_(max(part * float(gram.diagonal().mean()), 1e-30))


def _by_input(weight: torch.Tensor) -> torch.Tensor:
    """Kernels of each input channel: (inputs, outputs, height × width)."""
    return weight.flatten(2).movedim(1, 0)


def _separable(weight: torch.Tensor, rank: int, seen: Seen | None) -> tuple[torch.Tensor, torch.Tensor]:
    outputs, inputs, *kernel = weight.shape
    kernels = _by_input(weight)
    if seen is None:
        point, deep = _Cut(kernels).factors(rank)
    else:
        deep, point = _in_turns(kernels, weight.flatten(1), rank, seen)
    first = deep.reshape(inputs * rank, 1, *kernel)
    return first, point.movedim(0, 1).reshape(outputs, inputs * rank, 1, 1)


def _in_turns(kernels: torch.Tensor, weight: torch.Tensor, rank: int, seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
    """Depthwise (inputs, rank, taps) and pointwise (inputs, outputs, rank) weights by least squares in turns."""
    inputs, outputs, taps = kernels.shape
    blocks = seen.covariance.reshape(inputs, taps, inputs, taps)
    _, deep = _Cut(kernels, torch.einsum("ctcs->cts", blocks), seen.weights.sqrt()).factors(rank)
    target = weight @ seen.covariance  # (outputs, columns)
    point = torch.zeros(0)
    for turn in range(TURNS):
        if turn:
            # The depthwise filters' normal equations: how outputs weigh pairs of them, times how their inputs vary together.
            flat = point.movedim(0, 1)  # (outputs, inputs, rank)
            weighing = torch.einsum("o,ocm,odn->cmdn", seen.weights, flat, flat)
            normal = torch.einsum("cmdn,ctds->cmtdns", weighing, blocks).reshape(inputs * rank * taps, -1)
            wanted = torch.einsum("o,ocm,oct->cmt", seen.weights, flat, target.reshape(outputs, inputs, taps)).flatten()
            _lift_(normal, 1e-9)
            deep = torch.linalg.solve(normal, wanted).reshape(inputs, rank, taps)
        deep = deep / deep.norm(dim=2, keepdim=True).clamp_min(1e-30)
        # The pointwise ones', on what the depthwise filters give.
        gram = torch.einsum("cmt,ctds,dns->cmdn", deep, blocks, deep).reshape(inputs * rank, -1)
        _lift_(gram, 1e-9)
        given = torch.einsum("oct,cmt->ocm", target.reshape(outputs, inputs, taps), deep).flatten(1)
        point = torch.linalg.solve(gram, given, left=False).reshape(outputs, inputs, rank).movedim(1, 0)
    return deep, point
