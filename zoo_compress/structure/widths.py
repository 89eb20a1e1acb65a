"""Which axes can change together: links solved into groups that shrink in step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from . import terms
from .layout import Layout, parse
from .terms import Product, Sum, Term

CHOICES = 8
"""Rounding leaves every group of axes at least this many sizes to choose from, if it has as many."""


@dataclass(frozen=True, slots=True)
class Group:
    """Axes that change in step: at step k of `steps`, each has k / steps of its elements.

    An axis without links is a group of its own with as many steps as elements. Linked axes (an embedding of heads × head width) share
    the greatest common divisor of their sizes.
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    steps: int

    def at(self, step: int) -> dict[str, int]:
        """Sizes of the group's axes at a step in 1…steps."""
        return {name: size * step // self.steps for name, size in zip(self.axes, self.sizes, strict=True)}

    def least(self, min_keep: float) -> int:
        """The lowest step that keeps at least this fraction of the axes."""
        return max(1, math.ceil(min_keep * self.steps - 1e-9))

    def rounded(self, round_to: int, fineness: int = 0) -> np.ndarray:
        """Steps, ascending, at which the largest axis has a size that divides well, and the whole.

        Args:
            round_to: The multiple to prefer. A group with few steps takes a smaller power of two, so that it has `CHOICES` of them.
            fineness: How often to halve the multiple after that.
        """
        return _rounded(self, round_to, fineness)

    def rungs(self, least: float, most: float, round_to: int) -> np.ndarray:
        """The rounded steps from one fraction of the group to another, both rounded."""
        allowed = self.rounded(round_to)
        return allowed[(allowed >= self.near(least, round_to)) & (allowed <= self.near(most, round_to))]

    def near(self, width: float, round_to: int) -> int:
        """The rounded step nearest to a fraction of the group; of two as near, the wider."""
        wanted, allowed = width * self.steps, self.rounded(round_to)
        place = int(np.searchsorted(allowed, wanted))
        if place == 0 or (place < len(allowed) and allowed[place] - wanted <= wanted - allowed[place - 1]):
            return int(allowed[place])
        return int(allowed[place - 1])


@lru_cache(maxsize=4096)
def _rounded(group: Group, round_to: int, fineness: int) -> np.ndarray:
    steps = np.arange(1, group.steps + 1)
    sizes = max(group.sizes) * steps // group.steps
    multiple = round_to
    while multiple > 1 and (sizes % multiple == 0).sum() < min(CHOICES, group.steps):
        multiple //= 2
    found = np.union1d(steps[sizes % max(1, multiple >> fineness) == 0], [group.steps])
    found.setflags(write=False)
    return found


def groups(layout: Layout) -> list[Group]:
    """Partition the axes that can change into groups that change in step.

    Axes that are free but held by a link (the head width, where heads carry the change) are in no group.
    """
    free = {name: layout.axes[name].size for name in layout.free}
    links = [(parse(a), parse(b)) for a, b in layout.links]
    found = []
    for component in _components(free, links):
        chosen = _scaled(component, links, free)
        if chosen:
            found.append(Group(tuple(chosen), tuple(free[a] for a in chosen), math.gcd(*(free[a] for a in chosen))))
    return found


def least(layout: Layout, min_keep: float) -> dict[str, int]:
    """The smallest sizes of the axes that can change, each keeping at least the fraction `min_keep` of itself."""
    return {name: size for group in groups(layout) for name, size in group.at(group.least(min_keep)).items()}


def uniform(groups: Iterable[Group], width: float, round_to: int) -> dict[str, int]:
    """Sizes of the axes that can change at one fraction of them all, rounded as a budget rounds.

    Args:
        groups: The groups of axes that can change.
        width: The fraction, in (0, 1].
        round_to: Preferred multiple for sizes; see `Group.rounded`.
    """
    return {name: size for group in groups for name, size in group.at(group.near(width, round_to)).items()}


def unsolvable(free: Mapping[str, int], links: Iterable[tuple[Term, Term]]) -> set[str]:
    """Axes that links hold at their size whatever is chosen for the others."""
    links = list(links)
    return {axis for component in _components(free, links) if not _scaled(component, links, free) for axis in component}


def _components(free: Mapping[str, int], links: list[tuple[Term, Term]]) -> list[list[str]]:
    root = {name: name for name in free}

    def find(name: str) -> str:
        while root[name] != name:
            root[name] = root[root[name]]
            name = root[name]
        return name

    for link in links:
        linked = [str(a) for side in link for a in terms.axes(side) if a in free]
        for other in linked[1:]:
            root[find(other)] = find(linked[0])
    components: dict[str, list[str]] = {}
    for name in free:
        components.setdefault(find(name), []).append(name)
    return list(components.values())


def _scaled(component: list[str], links: list[tuple[Term, Term]], free: Mapping[str, int]) -> list[str]:
    """The axes of a component that scale by a common factor while every link keeps its sides equal.

    Both sides of a link must scale by the same power. Where one side is a product of several axes, its fastest stays (the head width),
    unless so few steps remain that another way is finer: the slowest stays, or all but one axis of each side.
    """
    inside = set(component)
    own = [link for link in links if any(a in inside for side in link for a in terms.axes(side))]
    if not own:
        return component
    options = [_homogeneous(component, own, last, power) for power in (None, 1) for last in (True, False)]
    steps = [math.gcd(*(free[a] for a in option)) if option else 0 for option in options]
    return options[0 if steps[0] > 4 else steps.index(max(steps))]


def _homogeneous(component: list[str], links: list[tuple[Term, Term]], last: bool, power: int | None) -> list[str]:
    """The axes that may scale while both sides of every link scale by the same power, which is at most `power`."""
    scaled = dict.fromkeys(component, True)
    changed = True
    while changed:
        changed = False
        for left, right in links:
            held = _violation(left, right, scaled, last, power)
            if held is not None:
                del scaled[held]
                changed = True
    return list(scaled)


def _violation(left: Term, right: Term, scaled: Mapping[str, bool], last: bool, power: int | None) -> str | None:
    """An axis to hold so that both sides come closer to scaling by the same power, or None if they do."""
    parts = [part for side in (left, right) for part in _addends(side)]
    degrees = [len(_inside(part, scaled)) for part in parts]
    if len(set(degrees)) <= 1 and (power is None or degrees[0] <= power):
        return None
    found = _inside(parts[degrees.index(max(degrees))], scaled)
    return found[-1 if last else 0]


def _addends(term: Term) -> list[Term]:
    """A term multiplied out into products of atoms, which must all scale alike."""
    if isinstance(term, Sum):
        return [part for t in term.terms for part in _addends(t)]
    if isinstance(term, Product):
        rows: list[list[Term]] = [[]]
        for factor in term.factors:
            rows = [[*row, part] for row in rows for part in (_addends(factor) if isinstance(factor, Sum) else [factor])]
        return [terms.product(*row) for row in rows]
    return [term]


def _inside(term: Term, scaled: Mapping[str, bool]) -> list[str]:
    return [str(a) for a in terms.axes(term) if a in scaled]
