"""Search for the best sub-network of a trained bank under a budget.

Cai et al. 2020, Once-for-All (evolution); Yu & Huang 2019, AutoSlim (greedy). Every candidate is judged with normalisation statistics of
its own, found on the same images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from ..errors import CompressError, WidthError
from ..figures import blank_figure, save_figure
from ..structure.bank import Choice
from ..surgery.calibrate import Statistics, calibrated
from ..surgery.images import LIMIT, fitting
from ..surgery.modules import evaluating, takes_model
from ..surgery.tracer import MODEL_ERRORS
from .slimmable import Slimmable

POPULATION = 16
MUTATION = 0.2
"""Part of the groups of axes that a child changes."""

CALIBRATION = 256
"""Images that statistics are found on, unless there are fewer."""

Steps = tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """One sub-network that was judged.

    Attributes:
        sizes: Axis → size.
        macs: Multiply-accumulates of one sample.
        top1: Accuracy on the data, in percent.
        loss: Cross-entropy on the data.
    """

    sizes: dict[str, int]
    macs: int
    top1: float
    loss: float


@dataclass(frozen=True)
class SearchResult:
    """What a search found. Printed, it is a table of the Pareto front.

    Attributes:
        best: The candidate of the least loss within the budget.
        front: Those that none with fewer MACs beats, by MACs.
        judged: All, in the order they were judged.
        whole: MACs of the whole bank.
    """

    best: Candidate
    front: tuple[Candidate, ...]
    judged: tuple[Candidate, ...] = field(repr=False)
    whole: int

    def __str__(self) -> str:
        rows = [
            f"{c.macs:>16,}  {c.macs / self.whole:>6.1%}  {c.top1:>6.2f}%  {c.loss:>7.4f}{'  best' if c is self.best else ''}"
            for c in self.front
        ]
        return "\n".join([f"{'MACs':>16}  {'':>6}  {'top-1':>7}  {'loss':>7}", *rows])

    def plot(self, path: str | Path) -> None:
        """Draw all candidates and their Pareto front; needs the extra `plots`.

        Args:
            path: Image file; its ending says which kind.

        Raises:
            CompressError: The picture cannot be written, or matplotlib is missing.
        """
        figure = blank_figure((6, 4))
        axes = figure.add_subplot(xlabel="MACs of the bank, %", ylabel="top-1, %")
        axes.scatter([100 * c.macs / self.whole for c in self.judged], [c.top1 for c in self.judged], s=12, label="judged")
        axes.plot([100 * c.macs / self.whole for c in self.front], [c.top1 for c in self.front], "o-", color="C1", label="Pareto front")
        axes.scatter([100 * self.best.macs / self.whole], [self.best.top1], marker="*", s=160, color="C3", zorder=3, label="best")
        axes.legend()
        save_figure(figure, path)


@takes_model
def search(
    net: Slimmable,
    *,
    macs: float,
    data: Iterable[tuple[torch.Tensor, torch.Tensor]],
    how: str = "evolution",
    evaluations: int = 128,
    seed: int = 0,
) -> SearchResult:
    """Find the sizes of axes at which a trained bank does best within a budget.

    The network keeps the statistics of the best candidate, so that `net.export(result.best.sizes)` gives it; nothing else changes.

    Args:
        net: A trained slimmable network; a universal one, since the others were trained at a few widths only.
        macs: The budget: a fraction of the bank's multiply-accumulates, or how many when above 1.
        data: Labelled batches that candidates are judged on, (images (batch, channels, height, width), class indices (batch,)). Kept in
            memory, at most `surgery.images.LIMIT` images; not those that the result is tested on.
        how: `evolution`, of a population that starts from uniform and random widths, or `greedy`, which shrinks from the whole what costs
            least.
        evaluations: Candidates to judge at most; greedy search may need fewer, or end above the budget with an error.
        seed: Of the random choices.

    Raises:
        CompressError: On bad arguments, or data the network does not take.
        WidthError: If no sub-network meets the budget.
    """
    if not isinstance(net, Slimmable):
        raise CompressError(f"search: expected a slimmable network, found {type(net).__name__}")
    ways: dict[str, Callable[[_Judge, int, np.random.Generator], None]] = {"evolution": _evolve, "greedy": _shrink}
    if how not in ways:
        raise CompressError(f"search: expected how to be one of {', '.join(ways)}, found {how!r}")
    if isinstance(macs, bool) or not isinstance(macs, (int, float)) or not 0 < macs <= net.layout.macs():
        raise CompressError(f"search: macs is a fraction in (0, 1] or a count up to {net.layout.macs():,}, found {macs!r}")
    if isinstance(evaluations, bool) or not isinstance(evaluations, int) or evaluations < 2:
        raise CompressError(f"search: expected at least 2 evaluations, found {evaluations!r}")
    budget = int(macs if macs > 1 else macs * net.layout.macs())
    before = net.sizes
    try:
        with evaluating(net), tqdm(total=evaluations, desc="search", unit="network", leave=False) as progress:
            judge = _Judge(net, _batches(data), budget, progress)
            if judge.macs(judge.least) > budget:
                found = judge.macs(judge.least) / net.layout.macs()
                raise WidthError(f"search: no sub-network has {macs:g} of the MACs: the least has {found:.1%}")
            ways[how](judge, evaluations, np.random.default_rng(seed))
            best = judge.best()
            net.add_choice(Choice(sizes=best.sizes), judge.statistics(best))
    except MODEL_ERRORS as error:
        if isinstance(error, CompressError):
            raise
        raise CompressError(f"data: expected batches of (images, class indices) that {type(net).__name__} takes: {error}") from error
    finally:
        net.set_widths(before)
    judged = tuple(judge.seen.values())
    return SearchResult(best, _front(judged), judged, net.layout.macs())


class _Judge:
    """Judges candidates, each given as one step for every group of axes."""

    def __init__(self, net: Slimmable, batches: list[tuple[torch.Tensor, torch.Tensor]], budget: int, progress: tqdm) -> None:
        self.net, self.batches, self.budget, self.progress = net, batches, budget, progress
        self.groups = net.groups
        low, high = net.widths[0], net.widths[-1]
        self.rungs = [group.rungs(low, high, net.round_to) for group in self.groups]
        self.least: Steps = tuple(int(rungs[0]) for rungs in self.rungs)
        self.most: Steps = tuple(int(rungs[-1]) for rungs in self.rungs)
        self.seen: dict[Steps, Candidate] = {}
        self._images: list[torch.Tensor] = []
        for batch, _ in batches:
            if sum(map(len, self._images)) < CALIBRATION:
                self._images.append(batch)

    def sizes(self, steps: Steps) -> dict[str, int]:
        chosen = {name: size for group, step in zip(self.groups, steps, strict=True) for name, size in group.at(step).items()}
        return {**self.net.layout.base_sizes, **chosen}

    def macs(self, steps: Steps) -> int:
        return self.net.layout.macs(self.sizes(steps))

    def statistics(self, candidate: Candidate) -> Statistics:
        self.net.set_widths(candidate.sizes)
        with calibrated(self.net, self._images) as found:
            return found

    def __call__(self, steps: Steps) -> Candidate:
        if steps in self.seen:
            return self.seen[steps]
        sizes = self.sizes(steps)
        self.net.set_widths(sizes)
        right, loss, total = 0, 0.0, 0
        with torch.no_grad(), calibrated(self.net, self._images):
            for images, target in self.batches:
                logits = self.net(fitting(self.net, images))
                right += int((logits.argmax(-1) == target.to(logits.device)).sum())
                loss += float(F.cross_entropy(logits, target.to(logits.device), reduction="sum"))
                total += len(target)
        self.seen[steps] = Candidate(sizes, self.macs(steps), 100 * right / total, loss / total)
        self.progress.update()
        return self.seen[steps]

    def best(self) -> Candidate:
        inside = [candidate for candidate in self.seen.values() if candidate.macs <= self.budget]
        if not inside:
            least = min(candidate.macs for candidate in self.seen.values())
            raise WidthError(f"search: none of {len(self.seen)} networks meets the budget of {self.budget:,} MACs; the least has {least:,}")
        return min(inside, key=lambda candidate: candidate.loss)


def _evolve(judge: _Judge, evaluations: int, random: np.random.Generator) -> None:
    """Judge random candidates, then children of the best: each the mix of two, or one with some groups changed."""

    def fitted(steps: Sequence[int]) -> Steps:
        """The candidate with random groups made narrower until it meets the budget."""
        chosen = list(steps)
        while judge.macs(tuple(chosen)) > judge.budget:
            able = [i for i, rungs in enumerate(judge.rungs) if chosen[i] > rungs[0]]
            i = int(random.choice(able))
            chosen[i] = int(judge.rungs[i][np.searchsorted(judge.rungs[i], chosen[i]) - 1])
        return tuple(chosen)

    def uniform() -> Steps:
        """The widest at one fraction of all axes."""
        for width in np.linspace(1, 0, 101):
            steps = tuple(int(rungs[np.abs(rungs - width * rungs[-1]).argmin()]) for rungs in judge.rungs)
            if judge.macs(steps) <= judge.budget:
                return steps
        return judge.least

    tries = 0
    judge(uniform())
    while len(judge.seen) < evaluations and tries < 20 * evaluations:
        tries += 1
        ranked = sorted(judge.seen, key=lambda steps: judge.seen[steps].loss)[: max(2, POPULATION // 4)]
        if len(judge.seen) < min(POPULATION, evaluations):
            judge(fitted([int(random.choice(rungs)) for rungs in judge.rungs]))
        elif random.random() < 0.5:
            first, second = (ranked[int(i)] for i in random.choice(len(ranked), 2, replace=False))
            judge(fitted([(a, b)[int(random.integers(2))] for a, b in zip(first, second, strict=True)]))
        else:
            parent = ranked[int(random.integers(len(ranked)))]
            changed = random.random(len(parent)) < max(MUTATION, 1 / len(parent))
            judge(fitted([int(random.choice(r)) if new else old for old, r, new in zip(parent, judge.rungs, changed, strict=True)]))


def _shrink(judge: _Judge, evaluations: int, random: np.random.Generator) -> None:
    """From the whole, make narrower whichever group raises the loss least for the MACs it saves, until the budget is met."""
    now = judge.most
    judge(now)
    # So many rounds fit into the evaluations; each takes the part of the MACs that remains over them.
    rounds = max(1, (evaluations - 1) // len(judge.rungs))
    for done in range(rounds):
        over = judge.macs(now) - judge.budget
        if over <= 0:
            return
        children = [child for i in range(len(now)) if (child := _narrower(judge, now, i, over / (rounds - done))) is not None]
        if not children:
            return
        base = judge(now)

        prices = {child: (judge(child).loss - base.loss) / (base.macs - judge(child).macs) for child in children}
        now = min(prices, key=prices.__getitem__)


def _narrower(judge: _Judge, steps: Steps, i: int, saving: float) -> Steps | None:
    """A candidate with the i-th group narrow enough to save so many MACs, or as narrow as it gets; None if it is."""
    child = None
    for rung in judge.rungs[i][judge.rungs[i] < steps[i]][::-1]:
        child = (*steps[:i], int(rung), *steps[i + 1 :])
        if judge.macs(steps) - judge.macs(child) >= saving:
            break
    return child


def _front(judged: Sequence[Candidate]) -> tuple[Candidate, ...]:
    front: list[Candidate] = []
    for candidate in sorted(judged, key=lambda c: (c.macs, c.loss)):
        if not front or candidate.loss < front[-1].loss:
            front.append(candidate)
    return tuple(front)


def _batches(data: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch in data:
        images, target = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (None, None)
        if not isinstance(images, torch.Tensor) or not isinstance(target, torch.Tensor) or len(images) != len(target):
            raise CompressError(f"data: expected batches of (images, class indices), found {type(batch).__name__}")
        left = LIMIT - sum(len(t) for _, t in found)
        found.append((images[:left], target[:left]))
        if len(target) >= left:
            break
    if not found:
        raise CompressError("data: expected at least one batch of (images, class indices), found none")
    return found
