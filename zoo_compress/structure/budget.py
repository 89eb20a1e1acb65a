"""Budgets: which sizes, of all that could be chosen, cost what is asked and lose the least worth."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import BudgetError, CompressError, WidthError
from . import terms
from .cost import Polynomial
from .layout import Layout, parse
from .widths import Group

TOLERANCE = 0.02
"""A choice may miss the fraction asked for by this much; else there is an error that says what is reachable."""

COARSE = 0.05
"""The same where only one group of axes may change."""

BALANCING = 9
"""How often the worth of attention's heads and widths is bisected until attention shrinks in step with the rest of the model, so that a
budget of MACs holds whether or not a counter sees the products inside fused attention."""

KINDS = ("keep", "macs", "params", "latency")
"""What a budget may limit: elements of the axes that may change, multiply-accumulates, parameters, or time."""

REASONS = 5
"""How many reasons an error lists at most."""

Fraction = Callable[[Sequence[int]], float]
Steps = list[int]


def tolerance(target: float) -> float:
    """By how much a choice may miss a fraction asked for: never by more than that itself, or 50 meant as percent, and taken as a count,
    would leave next to nothing."""
    return min(TOLERANCE, target)


@dataclass(frozen=True)
class Budget:
    """What to keep of a model.

    Attributes:
        kind: One of `KINDS`.
        value: A fraction in (0, 1], or a count (milliseconds) above 1.
        scope: `global`, one ranking over all axes; or `local`, the same fraction of every axis.
        round_to: Preferred multiple for sizes, a power of two. Axes with few elements take smaller powers of two, and so do all axes
            where the budget would be missed otherwise.
        min_keep: No axis keeps less than this fraction of itself.
    """

    kind: str
    value: float
    scope: str = "global"
    round_to: int = 8
    min_keep: float = 0.1

    def __post_init__(self) -> None:
        if _is_bad(self.value, (int, float)) or not math.isfinite(self.value) or self.value <= 0:
            raise CompressError(f"prune: {self.kind} is a fraction in (0, 1] or a count above 1, found {self.value!r}")
        if self.scope not in ("global", "local"):
            raise CompressError(f"prune: scope is 'global' or 'local', found {self.scope!r}")
        if _is_bad(self.round_to, (int,)) or self.round_to < 1:
            raise CompressError(f"prune: round_to is a positive integer or 'auto', found {self.round_to!r}")
        if _is_bad(self.min_keep, (int, float)) or not 0 < self.min_keep <= 1:
            raise CompressError(f"prune: min_keep is a fraction in (0, 1], found {self.min_keep!r}")


def _is_bad(value: object, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, bool) or not isinstance(value, kinds)


def meet(
    layout: Layout, groups: Sequence[Group], scores: Mapping[str, np.ndarray], budget: Budget, *, latency: Polynomial | None = None
) -> dict[str, int]:
    """Sizes of all axes in `groups` that meet a budget.

    A threshold on the ranking is bisected until the rounded sizes fit; then single steps, the cheapest in worth first, close what rounding
    left. In the local scope the ranking is of how much of its group a step would be, so that all groups shrink alike and the sizes depend
    on the budget alone.

    Args:
        layout: The model's layout.
        groups: The groups of axes that may change; those with an axis that has no score stay as they are.
        scores: Axis → worth of each element, comparable between axes.
        budget: What to keep; a latency only as a fraction.
        latency: Time of one pass as a polynomial in the sizes of axes; needed where that is what the budget limits.

    Raises:
        WidthError: If no choice comes within `tolerance` of the budget (`COARSE` with one group), saying what is reachable.
    """
    ladders = [_Ladder(group, scores, budget) for group in groups if all(name in scores for name in group.axes)]
    costs = _costs(layout, ladders, budget.kind, latency)
    totals = [cost([ladder.group.steps for ladder in ladders]) for cost in costs]
    samples = layout.batch if budget.kind == "macs" else 1
    target = budget.value if budget.value <= 1 else budget.value * samples / totals[0]
    if target > 1 + TOLERANCE:
        raise CompressError(f"prune: {budget.kind}={budget.value:g} is more than the model has ({totals[0] // samples:,})")

    def fractions(steps: Sequence[int]) -> list[float]:
        return [cost(steps) / total for cost, total in zip(costs, totals, strict=True)]

    def asked(steps: Sequence[int]) -> float:
        return costs[0](steps) / totals[0]

    least = asked([ladder.least for ladder in ladders]) if ladders else 1.0
    wanted = f"{target:.1%} of {budget.kind}" + (f" ({budget.value:g} of {totals[0] // samples:,})" if budget.value > 1 else "")
    if least > target + tolerance(target):
        why = "" if ladders else f": the criterion ranks no axis of this model. {_obstacles(layout, groups)}"
        raise BudgetError(f"prune: cannot keep {wanted}: the least reachable with min_keep={budget.min_keep:g} is {least:.1%}{why}")
    if not ladders:
        return {}
    chosen = None
    if len(costs) > 1:
        chosen = _balanced(ladders, layout, budget, fractions, target)
    if chosen is None:
        chosen = _fit(ladders, budget, asked, target)
    # A model with one group of axes has few steps to stand on, and nothing else could meet the budget.
    allowed = min(COARSE, target) if len(ladders) == 1 else tolerance(target)
    if abs(asked(chosen) - target) > allowed:
        raise WidthError(f"prune: cannot keep {wanted}: the nearest reachable is {asked(chosen):.1%} (round_to={budget.round_to})")
    return {name: size for ladder, step in zip(ladders, chosen, strict=True) for name, size in ladder.group.at(step).items()}


def _obstacles(layout: Layout, groups: Sequence[Group]) -> str:
    """Why no axis can shrink: what is free and has no score, and what froze the others, most often first."""
    offered = {name for group in groups for name in group.axes}
    excluded = set(layout.free) - offered
    causes = Counter(axis.frozen for axis in layout.axes.values() if axis.frozen is not None)
    parts = [f"{len(offered)} may change, and it has no score for them"] if offered else []
    parts += [f"{len(excluded)} are excluded, or one that is excluded is tied to them"] if excluded else []
    parts += [f"{count} may not change: {reason}" for reason, count in causes.most_common(REASONS)]
    rest = sum(causes.values()) - sum(count for _, count in causes.most_common(REASONS))
    return f"Of its {len(layout.axes)} axes " + "; ".join([*parts, *([f"{rest} for other reasons"] if rest else [])])


class _Ladder:
    """The steps one group can stand on, and how much each step is worth."""

    def __init__(self, group: Group, scores: Mapping[str, np.ndarray], budget: Budget) -> None:
        self.group = group
        if budget.scope == "local":
            # Worth of the k-th step: the less, the more of the group is there already, whatever its elements are worth.
            self.worth = 1 - (np.arange(group.steps) + 0.5) / group.steps
        else:
            # The mean score of the elements it adds, over the group's axes.
            blocks = [np.sort(scores[name])[::-1].reshape(group.steps, -1).mean(axis=1) for name in group.axes]
            self.worth = np.mean(blocks, axis=0)
        self.least = group.least(budget.min_keep)
        self._round_to = budget.round_to

    def times(self, factor: float) -> _Ladder:
        """The same ladder with its worth scaled."""
        scaled = copy.copy(self)
        scaled.worth = self.worth * factor
        return scaled

    def allowed(self, fineness: int) -> np.ndarray:
        """Steps, ascending, at which the largest axis has a size that divides well; each fineness halves the multiple."""
        good = self.group.rounded(self._round_to, fineness)
        return good[good >= self.least]


class _Cost:
    """Cost of a list of steps, one per ladder, as one arithmetic expression."""

    def __init__(self, layout: Layout, ladders: Sequence[_Ladder], polynomials: Sequence[Polynomial]) -> None:
        place = {name: i for i, name in enumerate(layout.axes)}
        self._polynomials = polynomials
        self._sizes = np.array([axis.size for axis in layout.axes.values()], dtype=np.float64)
        self._places = [np.array([place[name] for name in ladder.group.axes]) for ladder in ladders]
        self._per_step = [np.array(ladder.group.sizes) / ladder.group.steps for ladder in ladders]

    def __call__(self, steps: Sequence[int]) -> int:
        sizes = self._sizes.copy()
        for places, per_step, step in zip(self._places, self._per_step, steps, strict=True):
            sizes[places] = per_step * step
        return sum(polynomial(sizes) for polynomial in self._polynomials)


def counted(layout: Layout, names: Iterable[str], kind: str) -> list[Polynomial]:
    """What a budget counts, in all but time: the polynomials whose values add up to it.

    Args:
        layout: The model's layout.
        names: The axes that may change.
        kind: `keep`, `macs` or `params`.
    """
    if kind == "keep":
        return [Polynomial(((name, 1) for name in names), tuple(layout.axes))]
    return [layout.params_polynomial] if kind == "params" else [layout.macs_polynomial, layout.fused_macs_polynomial]


def _costs(layout: Layout, ladders: Sequence[_Ladder], kind: str, latency: Polynomial | None) -> list[_Cost]:
    """What the budget counts, and where counters disagree about it, the other way to count."""
    if kind == "latency":
        assert latency is not None
        return [_Cost(layout, ladders, [latency])]
    everything = _Cost(layout, ladders, counted(layout, (name for ladder in ladders for name in ladder.group.axes), kind))
    if kind == "macs" and layout.fused_macs_terms:
        return [everything, _Cost(layout, ladders, [layout.macs_polynomial])]
    return [everything]


def _balanced(
    ladders: list[_Ladder], layout: Layout, budget: Budget, fractions: Callable[[Sequence[int]], list[float]], target: float
) -> Steps | None:
    """Steps that meet the target in every way of counting, or None if none were found."""
    inside = {str(axis) for text, _ in layout.fused_macs_terms for axis in terms.axes(parse(text))}

    def miss(steps: Sequence[int]) -> float:
        return max(abs(fraction - target) for fraction in fractions(steps))

    best: Steps | None = None
    low, high = 0.25, 4.0
    for _ in range(BALANCING if budget.scope == "global" else 1):
        bias = math.sqrt(low * high)
        biased = [ladder.times(bias) if inside.intersection(ladder.group.axes) else ladder for ladder in ladders]
        found = _fit(biased, budget, lambda steps: float(np.mean(fractions(steps))), target)
        best = found if best is None else min(best, found, key=miss)
        if miss(best) <= TOLERANCE / 2:
            break
        everything, rest = fractions(found)
        low, high = (low, bias) if rest < everything else (bias, high)
    return best if best is not None and miss(best) <= TOLERANCE else None


def _fit(ladders: list[_Ladder], budget: Budget, fraction: Fraction, target: float) -> Steps:
    """Steps, one per ladder, whose cost is nearest to the target; in the local scope the most even of those that are near enough. The
    preferred multiple is halved while the target is missed.
    """

    def miss(steps: Steps) -> float:
        return abs(fraction(steps) - target)

    def rank(steps: Steps) -> tuple[float, float]:
        if budget.scope == "global":
            return miss(steps), 0.0
        kept = [step / ladder.group.steps for ladder, step in zip(ladders, steps, strict=True)]
        return max(miss(steps), TOLERANCE / 2), max(kept) - min(kept)

    levels = np.unique(np.concatenate([ladder.worth for ladder in ladders]))
    best: Steps = []
    for fineness in range(budget.round_to.bit_length()):
        steps = [ladder.allowed(fineness) for ladder in ladders]
        sides = _bisect(ladders, steps, levels, fraction, target)
        # A coarse group (linked heads) may jump far past the target at one level: hold it on either side and let the others meet it.
        coarse = [_is_coarse(i, sides[0], allowed, fraction) for i, allowed in enumerate(steps)]
        choices = [[np.array([side[i]]) if coarse[i] else allowed for i, allowed in enumerate(steps)] for side in sides]
        if budget.scope == "local":
            choices.append(steps)
        for held in choices:
            for start in _bisect(ladders, held, levels, fraction, target):
                found = _close(ladders, held, start, fraction, target)
                best = min([best, found] if best else [found], key=rank)
        if miss(best) <= TOLERANCE / 2:
            break
    return best


def _is_coarse(i: int, chosen: Steps, allowed: np.ndarray, fraction: Fraction) -> bool:
    """Whether one step of the i-th group alone moves the cost by more than the tolerance."""
    place = int(np.searchsorted(allowed, chosen[i]))
    other = int(allowed[place - 1] if place else allowed[min(1, len(allowed) - 1)])
    return abs(fraction([*chosen[:i], other, *chosen[i + 1 :]]) - fraction(chosen)) > TOLERANCE


def _bisect(ladders: list[_Ladder], steps: list[np.ndarray], levels: np.ndarray, fraction: Fraction, target: float) -> list[Steps]:
    """The widest choice on one scale that stays within the target, and its wider neighbour. Levels run from wide to narrow."""

    def at(level: float) -> Steps:
        chosen = []
        for ladder, allowed in zip(ladders, steps, strict=True):
            wanted = int((ladder.worth >= level).sum())
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


def _close(ladders: list[_Ladder], steps: list[np.ndarray], chosen: Steps, fraction: Fraction, target: float) -> Steps:
    """Move single groups by one allowed step while that brings the cost closer to the target."""
    chosen = list(chosen)
    missing = target - fraction(chosen)
    for _ in range(4 * len(ladders) + 8):
        if abs(missing) <= TOLERANCE / 10:
            break
        moves = []
        for i, (ladder, allowed) in enumerate(zip(ladders, steps, strict=True)):
            place = int(np.searchsorted(allowed, chosen[i])) + (1 if missing > 0 else -1)
            if not 0 <= place < len(allowed):
                continue
            step = int(allowed[place])
            after = target - fraction([*chosen[:i], step, *chosen[i + 1 :]])
            if abs(after) < abs(missing):
                worth = float(ladder.worth[min(step, chosen[i]) : max(step, chosen[i])].mean())
                moves.append((-worth if missing > 0 else worth, abs(after), i, step, after))
        if not moves:
            break
        *_, i, step, missing = min(moves)
        chosen[i] = step
    return chosen
