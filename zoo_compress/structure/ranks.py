"""Ranks for one budget over all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .budget import tolerance

BISECTIONS = 100


@dataclass(frozen=True)
class Choice:
    """One way to factorise a layer.

    Attributes:
        kind: One of `factors.KINDS`.
        ranks: Ranks to choose from, ascending.
        losses: What each loses, in a unit that all layers share.
        cost: Of one rank.
    """

    kind: str
    ranks: np.ndarray
    losses: np.ndarray
    cost: float


@dataclass(frozen=True)
class Candidate:
    """A layer that may be factorised, in one of several ways.

    Attributes:
        dense: What the layer costs as it is, losing nothing.
        choices: The ways; of each, only ranks that cost less than that count.
    """

    dense: float
    choices: tuple[Choice, ...]

    def options(self) -> tuple[np.ndarray, np.ndarray, list[tuple[str, int] | None]]:
        """Losses, costs, and what they are of: first the layer as it is, then every kind and rank that costs less."""
        losses, costs = [np.zeros(1)], [np.array([self.dense])]
        names: list[tuple[str, int] | None] = [None]
        for choice in self.choices:
            saves = choice.ranks * choice.cost < self.dense
            losses.append(choice.losses[saves])
            costs.append(choice.ranks[saves] * choice.cost)
            names += [(choice.kind, int(rank)) for rank in choice.ranks[saves]]
        return np.concatenate(losses), np.concatenate(costs), names


def allocate(candidates: Mapping[str, Candidate], limit: float) -> dict[str, tuple[str, int] | None]:
    """Kind and rank of every layer such that all together cost at most `limit` and lose as little as can be.

    A price is put on cost, and every layer takes what is best for it at that price; the price is bisected (Lagrange relaxation, Shoham &
    Gersho 1988, Efficient Bit Allocation for an Arbitrary Set of Quantizers). What it leaves of the budget goes, step by step, to the
    layer that then loses least for it.

    Args:
        candidates: Layer → its options.
        limit: The budget; `cheapest` says what is reachable.

    Returns:
        Layer → (kind, rank), or None where it stays as it is.
    """
    options = {name: candidate.options() for name, candidate in candidates.items()}

    def best(price: float) -> dict[str, int]:
        return {name: int(np.argmin(losses + price * costs)) for name, (losses, costs, _) in options.items()}

    def cost(chosen: Mapping[str, int]) -> float:
        return float(sum(options[name][1][i] for name, i in chosen.items()))

    low, high = -60.0, 60.0
    chosen = {name: int(np.argmin(costs)) for name, (_, costs, _) in options.items()}
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        tried = best(float(np.exp(middle)))
        if cost(tried) <= limit:
            chosen, high = tried, middle
        else:
            low = middle
    _spend(options, chosen, limit - cost(chosen))
    return {name: options[name][2][i] for name, i in chosen.items()}


def _spend(options: Mapping[str, tuple[np.ndarray, np.ndarray, list]], chosen: dict[str, int], rest: float) -> None:
    """Give what is left of a budget to the layers that gain most by it, in place."""
    while True:
        found: tuple[float, str, int] | None = None
        for name, (losses, costs, _) in options.items():
            gain, more = losses[chosen[name]] - losses, costs - costs[chosen[name]]
            rate = np.where((gain > 0) & (more > 0) & (more <= rest), gain / np.where(more > 0, more, 1), 0)
            i = int(np.argmax(rate))
            if rate[i] > 0 and (found is None or rate[i] > found[0]):
                found = float(rate[i]), name, i
        if found is None:
            return
        _, name, i = found
        rest -= float(options[name][1][i] - options[name][1][chosen[name]])
        chosen[name] = i


def evenly(candidates: Mapping[str, Candidate], limit: float) -> dict[str, tuple[str, int] | None]:
    """The same, but every layer keeps the same fraction of the rank at which it would save nothing, of its first kind."""

    def at(fraction: float) -> dict[str, tuple[str, int] | None]:
        found: dict[str, tuple[str, int] | None] = {}
        for name, candidate in candidates.items():
            choice = candidate.choices[0]
            below = choice.ranks[choice.ranks <= fraction * candidate.dense / choice.cost]
            rank = int(below[-1] if len(below) else choice.ranks[0])
            found[name] = (choice.kind, rank) if rank * choice.cost < candidate.dense else None
        return found

    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if total(candidates, at(middle)) <= limit else (low, middle)
    return at(low)


def total(candidates: Mapping[str, Candidate], chosen: Mapping[str, tuple[str, int] | None]) -> float:
    """Cost of all layers together at a choice."""
    out = 0.0
    for name, candidate in candidates.items():
        found = chosen[name]
        if found is None:
            out += candidate.dense
        else:
            out += next(choice.cost for choice in candidate.choices if choice.kind == found[0]) * found[1]
    return out


def cheapest(candidates: Mapping[str, Candidate]) -> float:
    """The least that all layers together can cost."""
    return float(sum(candidate.options()[1].min() for candidate in candidates.values()))


def meets(cost: float, limit: float, whole: float) -> bool:
    """Whether a cost is as near a limit as budgets are to be, as a fraction of what the whole model costs."""
    return abs(cost - limit) <= tolerance(limit / whole) * whole
