"""Widths by measurement: of all that meet a budget, those that run fast here; or those that meet a latency."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..errors import CompressError, WidthError
from ..structure.budget import Budget, meet
from ..structure.cost import Polynomial
from ..structure.layout import Layout
from ..structure.widths import Group
from ..surgery.images import fitting
from ..surgery.resize import resize
from .fit import DESIGNS, fit_latency
from .latency import inference, interleaved, ratio

RoundTo = int | Literal["auto"]

LATENCY_TOLERANCE = 0.03
"""A measured latency may miss the fraction asked for by this much, plus twice the standard error of the measurement, though never by more
than twice this much."""

MULTIPLES = (1, 8, 16, 32)
"""What `round_to="auto"` tries."""

FLOORS = (1.0, 0.75, 0.5)
"""Choices that prefer channels which take little time keep of no axis less than this share of what a choice blind to time keeps; at 1
there is no preference."""

RUNS, FINAL_RUNS = (3, 50), (8, 50)
"""Timed passes of each choice, at least and at most, in the race and where it is decided."""

FIT_SECONDS = 8.0
RACE_SECONDS = 16.0
FINAL_SECONDS = 8.0
RACERS = 6
"""Choices that are timed at all: those that the polynomial says are fastest, or with a latency, that keep the most worth."""

FINALISTS = 3
CORRECTIONS = 6


@dataclass(frozen=True)
class Choice:
    """One way to meet a budget.

    Attributes:
        sizes: Axis → size.
        worth: Share of the worth of all elements that it keeps.
        floor: See `FLOORS`.
        round_to: See `MULTIPLES`.
    """

    sizes: dict[str, int]
    worth: float
    floor: float
    round_to: int


def search(
    model: nn.Module,
    layout: Layout,
    groups: Sequence[Group],
    scores: Mapping[str, np.ndarray],
    budget: Budget,
    round_to: RoundTo,
    *,
    batch_size: int,
    threads: int | None,
) -> dict[str, int]:
    """Sizes of all axes in `groups` that meet a budget, chosen by measured latency.

    The latency of the model is first written as a polynomial in its widths (`fit_latency`). Where an axis takes more time for each of
    its MACs than others do, the worth of its elements is discounted, within several bounds (`FLOORS`) and with several multiples. Each
    of these choices, or those of them that promise most, is built and timed against the dense model in turns: about 70 passes in all
    of a slow model, and half a minute for a fast one.

    - With a budget of MACs, parameters or channels, which all choices meet, the one that ran fastest is taken.
    - With a latency, each choice is first made by the polynomial; then the one that keeps the most worth is corrected by what it
      measured until it meets the latency.

    Args:
        model: The model, on the CPU. Weights do not matter.
        layout: Its layout.
        groups: The groups of axes that may change; those with an axis that has no score stay as they are.
        scores: Axis → worth of each element.
        budget: What to keep; `latency` as a fraction of the dense model's, or milliseconds above 1.
        round_to: Preferred multiple for sizes, or `auto` to try several.
        batch_size: Images in a pass.
        threads: CPU threads; None takes what torch is set to.

    Raises:
        WidthError: If no choice meets the budget, saying what is reachable.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise CompressError(f"prune: expected batch_size of at least 1, found {batch_size!r}")
    groups = [group for group in groups if all(name in scores for name in group.axes)]
    if not groups:
        raise WidthError(f"prune: cannot prune to a {budget.kind} budget: the criterion ranks no axis of this model")
    image = fitting(model, torch.zeros(batch_size, *layout.input_shape[1:]))
    floors = FLOORS if budget.scope == "global" else FLOORS[:1]
    ways = [(floor, multiple) for multiple in ([round_to] if isinstance(round_to, int) else MULTIPLES) for floor in floors]
    with inference([model], threads), tqdm(total=1 + DESIGNS + RACERS + 1, desc="measuring", unit="width", leave=False) as progress:
        latency = fit_latency(model, layout, groups, image, seconds=FIT_SECONDS, progress=progress)
        chooser = _Chooser(layout, groups, scores, latency)
        timer = _Timer(model, layout, image, progress)
        if budget.kind == "latency":
            return _meet_latency(chooser, timer, budget, ways).sizes
        return _fastest(chooser, timer, budget, ways).sizes


class _Timer:
    """Times choices of widths against the dense model."""

    def __init__(self, model: nn.Module, layout: Layout, image: torch.Tensor, progress: tqdm) -> None:
        self._model, self._layout, self._image, self._progress = model, layout, image, progress
        self.dense = float(np.median(self._interleaved({"dense": model}, runs=RUNS[0])["dense"]))
        """Seconds of one pass of the dense model."""

    def __call__(self, choices: Sequence[Choice], seconds: float, limits: tuple[int, int]) -> list[tuple[float, float]]:
        """Latency of each choice as a fraction of the dense model's, and its standard error: about so many seconds, and runs in limits."""
        models = {str(i): resize(self._model, self._layout, choice.sizes) for i, choice in enumerate(choices)}
        runs = int(np.clip(seconds / (self.dense * (1 + len(choices))), *limits))
        times = self._interleaved({"dense": self._model, **models}, runs)
        self._progress.update(1)
        return [ratio(times[name], times["dense"]) for name in models]

    def _interleaved(self, models: Mapping[str, nn.Module], runs: int) -> dict[str, np.ndarray]:
        return interleaved(models, dict.fromkeys(models, self._image), runs=runs, warmup=1)


class _Chooser:
    """Makes choices of widths that meet a budget."""

    def __init__(self, layout: Layout, groups: Sequence[Group], scores: Mapping[str, np.ndarray], latency: Polynomial) -> None:
        self._layout, self._groups, self._scores, self._latency = layout, groups, scores, latency
        self._prices = {name: price for group, price in zip(groups, self._price(), strict=True) for name in group.axes}
        self._sorted = {name: np.sort(score)[::-1] for name, score in scores.items()}

    def __call__(self, budget: Budget, floor: float, round_to: int) -> Choice:
        """The choice with one floor and one multiple.

        Raises:
            WidthError: If there is none within the tolerance of `meet`.
        """
        budget = replace(budget, round_to=round_to)
        sizes = meet(self._layout, self._groups, self._scores, budget, latency=self._latency)
        if floor < 1:
            sizes = meet(self._layout, self._groups, self._discounted(sizes, floor), budget, latency=self._latency)
        kept = sum(float(self._sorted[name][:size].sum()) for name, size in sizes.items())
        return Choice(sizes, kept / sum(float(self._sorted[name].sum()) for name in sizes), floor, round_to)

    def _discounted(self, blind: Mapping[str, int], floor: float) -> dict[str, np.ndarray]:
        """Worth for each unit of time, relative to MACs; what the floor keeps is worth more than all else."""
        scores = {name: score / self._prices[name] for name, score in self._scores.items() if name in blind}
        most = max(float(score.max()) for score in scores.values())
        for name, score in scores.items():
            score[np.argsort(-score, kind="stable")[: round(floor * blind[name])]] += most
        return scores

    def predicted(self, choice: Choice) -> int:
        """Nanoseconds of a pass, as far as the polynomial knows."""
        return self._latency(self._layout.sizes(choice.sizes))

    def all(self, budget: Budget, ways: Iterable[tuple[float, int]]) -> list[Choice]:
        """The choices of several floors and multiples, equal ones once.

        Raises:
            WidthError: If there is none at all.
        """
        found: dict[tuple[int, ...], Choice] = {}
        failure = None
        for way in ways:
            try:
                choice = self(budget, *way)
            except WidthError as error:
                failure = failure or error
            else:
                found.setdefault(tuple(choice.sizes.values()), choice)
        if failure is not None and not found:
            raise failure
        return list(found.values())

    def _price(self) -> list[float]:
        """Time that shrinking a group saves for each MAC it saves, relative to the median group, around two thirds of all widths."""
        shrunk = {name: size for group in self._groups for name, size in group.at(max(1, round(group.steps * 2 / 3))).items()}
        prices = []
        for group in self._groups:
            less = self._layout.sizes({**shrunk, **group.at(max(1, group.steps // 3))})
            around = self._layout.sizes(shrunk)
            macs = self._layout.macs(around) - self._layout.macs(less)
            prices.append((self._latency(around) - self._latency(less)) / macs if macs > 0 else 0.0)
        middle = float(np.median([price for price in prices if price > 0] or [1.0]))
        return [float(np.clip(price / middle, 0.1, 10.0)) if price > 0 else 1.0 for price in prices]


def _fastest(chooser: _Chooser, timer: _Timer, budget: Budget, ways: Sequence[tuple[float, int]]) -> Choice:
    choices = chooser.all(budget, ways)
    choices = sorted(choices, key=chooser.predicted)[:RACERS]
    first = [timer([choice], RACE_SECONDS / len(choices), RUNS)[0][0] for choice in choices]
    finalists = [choices[i] for i in np.argsort(first, kind="stable")[:FINALISTS]]
    return finalists[int(np.argmin([fraction for fraction, _ in timer(finalists, FINAL_SECONDS, FINAL_RUNS)]))]


def _meet_latency(chooser: _Chooser, timer: _Timer, budget: Budget, ways: Sequence[tuple[float, int]]) -> Choice:
    target = budget.value if budget.value <= 1 else budget.value / 1e3 / timer.dense
    if target > 1:
        raise CompressError(f"prune: latency={budget.value:g} ms is more than the model takes here ({timer.dense * 1e3:.1f} ms)")

    def asked(fraction: float) -> Budget:
        return replace(budget, value=min(fraction, 1.0))

    choices = sorted(chooser.all(asked(target), ways), key=lambda c: -c.worth)[:RACERS]
    # The polynomial knows nothing of multiples; how far each choice misses shows what to ask of it instead.
    bias = {(c.floor, c.round_to): timer([c], RACE_SECONDS / len(choices), RUNS)[0][0] / target for c in choices}
    corrected = [c for way, factor in bias.items() for c in _some(chooser, asked(target / factor), way)]
    nearest: float | None = None
    for best in sorted(corrected, key=lambda c: -c.worth)[:FINALISTS]:
        choice, value = best, target / bias[best.floor, best.round_to]
        for _ in range(CORRECTIONS):
            ((found, error),) = timer([choice], FINAL_SECONDS / 2, FINAL_RUNS)
            if abs(found - target) <= LATENCY_TOLERANCE + min(2 * error, LATENCY_TOLERANCE):
                return choice
            nearest = found if nearest is None or abs(found - target) < abs(nearest - target) else nearest
            value *= target / found
            following = _some(chooser, asked(value), (best.floor, best.round_to))
            if not following or following[0].sizes == choice.sizes:
                break
            choice = following[0]
    multiples = ", ".join(str(multiple) for multiple in dict.fromkeys(multiple for _, multiple in ways))
    reached = "" if nearest is None else f": the nearest measured is {nearest:.1%}"
    raise WidthError(f"prune: cannot keep {target:.1%} of latency{reached} (round_to={multiples})")


def _some(chooser: _Chooser, budget: Budget, way: tuple[float, int]) -> list[Choice]:
    try:
        return chooser.all(budget, [way])
    except WidthError:
        return []
