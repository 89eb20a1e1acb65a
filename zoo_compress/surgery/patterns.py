"""Weights that are removed together: whole kernels, whole channels, or all but N of every M."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CompressError
from .masks import Masks, keep_best

UNITS = ("kernel", "channel")
_N_OF_M = re.compile(r"([1-9]\d{0,2}):([1-9]\d{0,2})")


def check_pattern(pattern: str | None) -> tuple[int, int] | None:
    """N and M of a pattern `N:M`, None for others.

    Raises:
        CompressError: If there is no such pattern.
    """
    if pattern is None or pattern in UNITS:
        return None
    found = _N_OF_M.fullmatch(pattern) if isinstance(pattern, str) else None
    n, m = map(int, found.groups()) if found else (0, 0)
    if not 0 < n < m:
        raise CompressError(f"pattern: expected {', '.join(UNITS)} or N:M with N below M, such as 2:4, found {pattern!r}")
    return n, m


def keep_units(
    scores: Mapping[str, Tensor], density: float, scope: str, pattern: str | None, within: Mapping[str, Tensor] | None = None
) -> Masks:
    """Masks of the highest scores that keep or remove units as a whole; a unit's score is the mean of its weights', 0 for removed ones.

    Args:
        scores: Name → scores of a weight (outputs, inputs, …).
        density: Fraction of the weights to keep.
        scope: As in `masks.keep_best`.
        pattern: `channel`: all weights of one output. `kernel`: those of one output for one input, in a linear layer a single weight.
        within: Masks whose removed elements stay removed.
    """
    if pattern is None:
        return keep_best(scores, density, scope, within)
    dims = 1 if pattern == "channel" else 2
    if scope == "local":
        return {name: _units({name: score}, density, dims, within)[name] for name, score in scores.items()}
    return _units(scores, density, dims, within)


def keep_n_of_m(scores: Mapping[str, Tensor], n: int, m: int, within: Mapping[str, Tensor] | None = None) -> Masks:
    """Masks that keep, of every M weights that follow each other along the inputs, the N of the highest scores.

    Weights whose number of inputs is no multiple of M are kept whole, as hardware with such multiplications runs them.

    Raises:
        CompressError: If that are all.
    """
    out = {}
    for name, score in scores.items():
        if score.shape[1] % m == 0:
            alive = score if within is None else torch.where(within[name].to(score.device), score, -torch.inf)
            rows = alive.movedim(1, -1)
            order = rows.reshape(-1, m).argsort(dim=1, descending=True, stable=True)
            chosen = torch.zeros(order.shape, dtype=torch.bool, device=score.device).scatter_(1, order[:, :n], True)
            out[name] = chosen.view(rows.shape).movedim(-1, 1)
            if within is not None:
                out[name] &= within[name].to(score.device)
    if not out:
        raise CompressError(f"pattern {n}:{m}: expected layers whose number of inputs is a multiple of {m}, found none")
    return out


def _units(scores: Mapping[str, Tensor], density: float, dims: int, within: Mapping[str, Tensor] | None) -> Masks:
    """As many of the best units as fit a fraction of all weights, at least one."""
    alive = {name: torch.ones_like(score, dtype=torch.bool) if within is None else within[name] for name, score in scores.items()}
    left, mean = [], []
    for name, score in scores.items():
        mask = _by_unit(alive[name].to(score.device), dims)
        left.append(mask.sum(-1))
        mean.append(torch.where(mask, _by_unit(score, dims), 0).mean(-1).where(left[-1] > 0, -torch.inf))
    flat = torch.cat([unit.flatten() for unit in mean])
    # A unit counts with what is left of it: what it lost before is saved already.
    sizes = torch.cat([count.flatten() for count in left]).cpu()
    order = flat.argsort(descending=True, stable=True).cpu()
    fitting = int((sizes[order].cumsum(0) <= density * sum(score.numel() for score in scores.values())).sum())
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[order[: max(1, fitting)]] = True
    out = {}
    for name, unit, part in zip(scores, mean, chosen.split([unit.numel() for unit in mean]), strict=True):
        kept = part.view(unit.shape).reshape(*unit.shape, *[1] * (scores[name].ndim - unit.ndim))
        out[name] = kept & alive[name].cpu()
    return out


def _by_unit(values: Tensor, dims: int) -> Tensor:
    """(units…, weights of each), where the first few dimensions tell units apart."""
    return values.flatten(dims) if values.ndim > dims else values.unsqueeze(-1)
