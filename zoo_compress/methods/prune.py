"""Structured pruning: rank the elements of every free axis and keep the best that fit a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from torch import nn

from ..errors import CompressError, WidthError
from ..structure import terms
from ..structure.cost import Polynomial
from ..structure.layout import Layout, parse
from ..structure.widths import Group, groups
from ..surgery.resize import check_fits, resize
from ..surgery.trace import analyze
from .criteria import Data, scores

TOLERANCE = 0.02
"""A result may miss the fraction asked for by this much, else there is an error that says what is reachable."""


@dataclass(frozen=True)
class PruneConfig:
    """How to prune. Exactly one of `keep`, `macs` and `params` is given: a fraction to keep, or a count when above 1.

    Attributes:
        keep: Channels (elements of all free axes together; in the local scope, of each) to keep.
        macs: Multiply-accumulates to keep.
        params: Parameters to keep.
        criterion: Importance criterion, a key of `criteria.CRITERIA`.
        scope: `global`, one ranking over all axes, normalised per axis; or `local`, the same fraction of every axis.
        round_to: Preferred multiple for sizes. Axes below eight multiples take smaller powers of two, and a last few axes do where the
            budget would be missed otherwise.
        min_keep: No axis keeps less than this fraction of itself.
        exclude: Axes to leave alone: names of axes, or patterns of parameter names such as `layer4.*`.
        seed: For the random criterion.
    """

    keep: float | None = None
    macs: float | None = None
    params: float | None = None
    criterion: str = "l2"
    scope: str = "global"
    round_to: int = 8
    min_keep: float = 0.1
    exclude: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        budgets = {name: value for name in ("keep", "macs", "params") if (value := getattr(self, name)) is not None}
        if len(budgets) != 1:
            raise CompressError(f"prune: expected exactly one of keep, macs and params, found {', '.join(budgets) or 'none'}")
        for name, value in budgets.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
                raise CompressError(f"prune: {name} is a fraction in (0, 1] or a count above 1, found {value!r}")
        if self.scope not in ("global", "local"):
            raise CompressError(f"prune: scope is 'global' or 'local', found {self.scope!r}")
        if isinstance(self.round_to, bool) or not isinstance(self.round_to, int) or self.round_to < 1:
            raise CompressError(f"prune: round_to is a positive integer, found {self.round_to!r}")
        if isinstance(self.min_keep, bool) or not isinstance(self.min_keep, (int, float)) or not 0 < self.min_keep <= 1:
            raise CompressError(f"prune: min_keep is a fraction in (0, 1], found {self.min_keep!r}")

    @property
    def budget(self) -> tuple[str, float]:
        """Which of the three is given, and its value."""
        return next((name, value) for name in ("keep", "macs", "params") if (value := getattr(self, name)) is not None)


def prune(
    model: nn.Module,
    *,
    keep: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    criterion: str = "l2",
    scope: str = "global",
    round_to: int = 8,
    min_keep: float = 0.1,
    exclude: Iterable[str] = (),
    data: Data | None = None,
    layout: Layout | None = None,
    seed: int = 0,
) -> nn.Module:
    """Remove the least important elements of a model's free axes until it fits a budget.

    Nothing is fine-tuned: the accuracy of what comes out is that of the weights that stay.

    Args:
        model: The model. It is not changed. A pruned model can be pruned again.
        keep, macs, params: The budget: exactly one of them, the fraction of channels, multiply-accumulates or parameters to keep, or
            how many when above 1.
        criterion: Importance criterion: l1, l2, bn_scale, lamp, fpgm, random, and, with data, taylor, hessian, obdc.
        scope: `global` ranks all axes together; `local` keeps the same fraction of each.
        round_to: Preferred multiple for sizes; see `PruneConfig.round_to`.
        min_keep: No axis keeps less than this fraction of itself.
        exclude: Names of axes, or patterns of parameter names, to leave alone.
        data: Batches of (images (batch, channels, height, width), class indices (batch,)) for criteria that look at data.
        layout: The model's layout, if it is known already.
        seed: For the random criterion.

    Returns:
        A new model within 2 percentage points of the budget.

    Raises:
        CompressError: On bad arguments, or if no choice comes within 2 percentage points of the budget; the error says what is reachable.
    """
    if isinstance(exclude, str):
        exclude = (exclude,)
    config = PruneConfig(keep, macs, params, criterion, scope, round_to, min_keep, tuple(exclude), seed)
    if layout is None:
        layout = analyze(model)
    check_fits(model, layout)
    candidates = _candidates(layout, config.exclude)
    ranked = scores(model, layout, [name for group in candidates for name in group.axes], criterion, data, seed)
    chosen = choose(layout, candidates, ranked, config)
    return resize(model, layout, {name: _best(ranked[name], size) for name, size in chosen.items()})


def _candidates(layout: Layout, exclude: Sequence[str]) -> list[Group]:
    """Groups of axes that may change and that nothing excludes."""
    excluded: set[str] = set()
    for pattern in exclude:
        names = {str(a) for name, dims in layout.params.items() if fnmatchcase(name, pattern) for d in dims for a in terms.axes(parse(d))}
        if pattern in layout.axes:
            names.add(pattern)
        if not names:
            raise CompressError(f"exclude: {pattern!r} is no axis and matches no parameter such as {next(iter(layout.params))!r}")
        excluded |= names
    return [group for group in groups(layout) if not excluded.intersection(group.axes)]


def _best(score: np.ndarray, size: int) -> np.ndarray:
    """Indices of the `size` highest scores, ascending. Ties go to the first."""
    return np.sort(np.argsort(-score, kind="stable")[:size])


class _Ladder:
    """The steps one group can stand on, and how much each step is worth."""

    def __init__(self, group: Group, ranked: Mapping[str, np.ndarray], config: PruneConfig) -> None:
        self.group = group
        # Worth of the k-th step: the mean score of the elements it adds, over the group's axes.
        blocks = [np.sort(ranked[name])[::-1].reshape(group.steps, -1).mean(axis=1) for name in group.axes]
        self.worth = np.mean(blocks, axis=0)
        self.least = max(1, math.ceil(config.min_keep * group.steps - 1e-9))
        self._round_to = config.round_to

    def allowed(self, fineness: int) -> np.ndarray:
        """Steps, ascending, whose largest axis has a size that divides well; each fineness halves the multiple."""
        width = max(self.group.sizes)
        multiple = max(1, min(self._round_to, 2 ** int(math.log2(max(1, width / 8)))) >> fineness)
        steps = np.arange(self.least, self.group.steps + 1)
        good = steps[(width * steps // self.group.steps) % multiple == 0]
        return np.union1d(good, [self.group.steps]) if len(good) else np.array([self.group.steps])


def choose(layout: Layout, candidates: list[Group], ranked: Mapping[str, np.ndarray], config: PruneConfig) -> dict[str, int]:
    """Sizes of all axes in `candidates` that meet the budget.

    One number between 0 and 1 (a threshold on the ranking, or a fraction of every axis) is bisected until the rounded sizes fit; then
    single steps, the cheapest in worth first, close what rounding left.

    Raises:
        WidthError: If no choice comes within `TOLERANCE` of the budget, saying what is reachable.
    """
    ladders = [_Ladder(group, ranked, config) for group in candidates if all(name in ranked for name in group.axes)]
    kind, value = config.budget
    cost = _cost(layout, ladders, kind)
    total = cost([ladder.group.steps for ladder in ladders])
    target = value if value <= 1 else value / total
    if target > 1 + TOLERANCE:
        raise CompressError(f"prune: {kind}={value:g} is more than the model has ({total:,})")
    least = cost([ladder.least for ladder in ladders]) / total
    if not ladders or least > target + TOLERANCE:
        unranked = "" if ladders else f"; criterion {config.criterion!r} ranks no axis of this model"
        raise WidthError(f"prune: cannot keep {target:.1%} of {kind}: the least reachable with min_keep={config.min_keep:g} is {least:.1%}{unranked}")
    def fraction(steps: Sequence[int]) -> float:
        return cost(steps) / total

    levels = np.unique(np.concatenate([ladder.worth for ladder in ladders])) if config.scope == "global" else np.linspace(1, 0, 1025)
    best: list[int] = []
    for fineness in range(config.round_to.bit_length()):
        steps = [ladder.allowed(fineness) for ladder in ladders]
        # A coarse group may jump far past the target at one level: close in from both sides of it.
        found = [_close(ladders, steps, side, fraction, target) for side in _bisect(ladders, steps, levels, config.scope, fraction, target)]
        best = min([*([best] if best else []), *found], key=lambda chosen: abs(fraction(chosen) - target))
        if abs(fraction(best) - target) <= TOLERANCE / 2:
            break
    reached = cost(best) / total
    if abs(reached - target) > TOLERANCE:
        raise WidthError(f"prune: cannot keep {target:.1%} of {kind}: the nearest reachable is {reached:.1%} (round_to={config.round_to})")
    return {name: size for ladder, step in zip(ladders, best, strict=True) for name, size in ladder.group.at(step).items()}


class _Cost:
    """Cost of a list of steps, one per ladder, as one arithmetic expression."""

    def __init__(self, layout: Layout, ladders: list[_Ladder], polynomial: Polynomial) -> None:
        names = list(layout.axes)
        self._polynomial = polynomial
        self._sizes = np.array([axis.size for axis in layout.axes.values()], dtype=np.float64)
        self._places = [(np.array([names.index(n) for n in ladder.group.axes]), np.array(ladder.group.sizes) / ladder.group.steps) for ladder in ladders]

    def __call__(self, steps: Sequence[int]) -> int:
        sizes = self._sizes.copy()
        for (places, per_step), step in zip(self._places, steps, strict=True):
            sizes[places] = per_step * step
        return self._polynomial(sizes)


def _cost(layout: Layout, ladders: list[_Ladder], kind: str) -> _Cost:
    if kind == "keep":
        names = [name for ladder in ladders for name in ladder.group.axes]
        return _Cost(layout, ladders, Polynomial(((name, 1) for name in names), tuple(layout.axes)))
    return _Cost(layout, ladders, layout.macs_polynomial if kind == "macs" else layout.params_polynomial)


Fraction = Callable[[Sequence[int]], float]


def _bisect(
    ladders: list[_Ladder], steps: list[np.ndarray], levels: np.ndarray, scope: str, fraction: Fraction, target: float
) -> list[list[int]]:
    """The widest choice on one scale that stays within the target, and its wider neighbour. Levels run from wide to narrow."""

    def at(level: float) -> list[int]:
        chosen = []
        for ladder, allowed in zip(ladders, steps, strict=True):
            wanted = int((ladder.worth >= level).sum()) if scope == "global" else level * ladder.group.steps
            chosen.append(int(allowed[np.abs(allowed - wanted).argmin()]))
        return chosen

    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        if fraction(at(levels[middle])) <= target:
            high = middle
        else:
            low = middle + 1
    return [at(levels[low]), at(levels[max(low - 1, 0)])]


def _close(ladders: list[_Ladder], steps: list[np.ndarray], chosen: list[int], fraction: Fraction, target: float) -> list[int]:
    """Move single groups by one allowed step while that brings the cost closer to the target."""
    chosen = list(chosen)
    missing = target - fraction(chosen)
    for _ in range(4 * len(ladders) + 8):
        if abs(missing) <= 0.002:
            break
        moves = []
        for i, (ladder, allowed) in enumerate(zip(ladders, steps, strict=True)):
            place = int(np.searchsorted(allowed, chosen[i])) + (1 if missing > 0 else -1)
            if not 0 <= place < len(allowed):
                continue
            step = int(allowed[place])
            between = ladder.worth[min(step, chosen[i]) : max(step, chosen[i])]
            after = target - fraction([*chosen[:i], step, *chosen[i + 1 :]])
            if abs(after) < abs(missing):
                worth = float(between.mean())
                moves.append((-worth if missing > 0 else worth, abs(after), i, step, after))
        if not moves:
            break
        *_, i, step, missing = min(moves)
        chosen[i] = step
    return chosen
