"""What happens at an early exit: heads, confidence, who leaves, and the visitors that follow a forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..errors import CompressError
from ..structure.exits import Exit
from .rows import Boundary, Stop, Visitor, select


class Head(nn.Module):
    """Classifier of an early exit: pooling, LayerNorm over channels, linear. Without classes, the normalised features.

    Args:
        exit: What it reads.
        num_classes: 0 for features.
    """

    def __init__(self, exit: Exit, num_classes: int) -> None:
        super().__init__()
        self.format, self.pool, self.grid = exit.format, exit.pool, exit.grid
        self.norm = nn.LayerNorm(exit.features)
        self.fc = self._classifier(num_classes)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """Means of each sample, (batch, channels), or of a grid's parts (batch, parts, channels), of a tensor in the exit's format."""
        if self.pool == "first":
            return x[:, 0].clone()  # later modules may change what they are given
        if self.grid > 1:
            maps = x if self.format == "NCHW" else x.permute(0, 3, 1, 2)
            return F.adaptive_avg_pool2d(maps, self.grid).flatten(2).transpose(1, 2)
        positions = [d for d, letter in enumerate(self.format) if letter not in "NC"]
        return x.mean(positions) if positions else x.clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of a tensor in the exit's format."""
        return self.fc(self.features(self.pooled(x)))

    def features(self, pooled: torch.Tensor) -> torch.Tensor:
        """What the classifier reads, (batch, features), of what was pooled."""
        return self.norm(pooled).flatten(1)

    def reset(self, num_classes: int) -> None:
        """Make a new classifier, as the model does when it gets a new one."""
        self.fc = self._classifier(num_classes).to(self.norm.weight.device, self.norm.weight.dtype)

    def _classifier(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.norm.normalized_shape[0] * self.grid**2, num_classes) if num_classes else nn.Identity()


def max_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Probability of the most probable class, (batch,)."""
    return logits.softmax(1).amax(1)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """1 - entropy / log(classes), (batch,): 1 is sure, 0 is uniform."""
    logs = logits.log_softmax(1)
    return (1 + (logs.exp() * logs).sum(1) / math.log(max(logits.shape[1], 2))).clamp(0, 1)


def margin(logits: torch.Tensor) -> torch.Tensor:
    """Probability of the most probable class less that of the second, (batch,)."""
    top = logits.softmax(1).topk(min(2, logits.shape[1]), 1).values
    return top[:, 0] - top[:, -1] if logits.shape[1] > 1 else top[:, 0]


MEASURES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"max_softmax": max_softmax, "entropy": entropy, "margin": margin}


def thresholds_of(given: Any, count: int) -> tuple[float | None, ...]:
    """Thresholds as a user gives them: one for all exits, or one each.

    Raises:
        CompressError: If they are no confidences, or not as many as exits.
    """
    single = isinstance(given, (int, float)) and not isinstance(given, bool)
    values = [given] * count if single else list(given) if isinstance(given, (list, tuple)) else None
    if values is None or len(values) != count:
        raise CompressError(f"threshold: expected a number in 0…1, or {count} of them, one an exit, found {given!r}")
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1):
            raise CompressError(f"threshold: expected a confidence in 0…1, found {value!r}")
    return tuple(values)


class Decision:
    """Decides who leaves at an exit."""

    def asks(self, index: int) -> bool:
        """Whether anybody may leave there, or what is predicted there matters."""
        raise NotImplementedError

    def leave(self, index: int, logits: torch.Tensor) -> torch.Tensor:
        """Who leaves, (batch,) of booleans."""
        raise NotImplementedError

    def keep(self, stay: torch.Tensor) -> None:
        """Only these samples are still there."""


class Threshold(Decision):
    def __init__(self, thresholds: Sequence[float | None], confidence: str) -> None:
        self.thresholds, self.measure = thresholds, MEASURES[confidence]

    def asks(self, index: int) -> bool:
        return self.thresholds[index] is not None

    def leave(self, index: int, logits: torch.Tensor) -> torch.Tensor:
        return self.measure(logits.float()) >= self.thresholds[index]  # type: ignore[operator]


class Patience(Decision):
    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.latest = self.streak = torch.empty(0)

    def asks(self, index: int) -> bool:
        return True

    def leave(self, index: int, logits: torch.Tensor) -> torch.Tensor:
        predicted = logits.argmax(1)
        one = torch.ones_like(predicted)
        self.streak = torch.where(predicted == self.latest, self.streak + 1, one) if index else one
        self.latest = predicted
        return self.streak >= self.patience

    def keep(self, stay: torch.Tensor) -> None:
        self.latest, self.streak = self.latest[stay], self.streak[stay]


class Every(Visitor):
    """Pools what every exit reads. Norms and classifiers run afterwards: blocks may be run again in the backward pass, without this."""

    def __init__(self, heads: nn.ModuleList, places: Sequence[Exit]) -> None:
        self.heads, self.places = heads, places
        self.pooled: dict[int, torch.Tensor] = {}

    def at(self, index: int, output: Any) -> None:
        head: Any = self.heads[index]
        self.pooled[index] = head.pooled(_leaf(output, self.places[index].leaf))

    def logits(self) -> list[torch.Tensor]:
        """Of every exit, when the forward pass is over."""
        heads: Any = self.heads
        return [head.fc(head.features(self.pooled[i])) for i, head in enumerate(heads)]


class Until(Visitor):
    """Stops at one exit, with its logits, or with what it reads where there are no heads."""

    def __init__(self, places: Sequence[Exit], heads: nn.ModuleList | None, exit: int) -> None:
        self.places, self.heads, self.exit = places, heads, exit
        self.found: Any = None

    def at(self, index: int, output: Any) -> None:
        if index == self.exit:
            x = _leaf(output, self.places[index].leaf)
            self.found = x if self.heads is None else self.heads[index](x)
            raise Stop


class Spent(Visitor):
    """Counts the MACs of one sample until it has left at each exit, heads on the way included."""

    def __init__(self, heads: nn.ModuleList, places: Sequence[Exit], counter: FlopCounterMode) -> None:
        self._heads, self._places, self._counter = heads, places, counter
        self.found: list[int] = []
        self.heads = 0
        """MACs of all heads."""

    def at(self, index: int, output: Any) -> None:
        before = self._counter.get_total_flops() // 2
        self._heads[index](_leaf(output, self._places[index].leaf))
        self.found.append(self._counter.get_total_flops() // 2)
        self.heads += self.found[-1] - before


class Leaving(Visitor):
    """Lets samples leave: stores their logits and hands on the others.

    Where nobody can leave the batch, samples that are done are computed along until the next exit where they can.

    Args:
        heads: Of the exits.
        places: The exits.
        boundaries: How rows leave the batch at each; None where they cannot.
        decide: Who is done.
        x: The batch.

    Attributes:
        logits: Of every sample, (batch, classes).
        left: At which exit it was done, (batch,).
    """

    def __init__(
        self, heads: nn.ModuleList, places: Sequence[Exit], boundaries: Sequence[Boundary | None], decide: Any, x: torch.Tensor
    ) -> None:
        self.heads, self.places, self.boundaries, self.decide = heads, places, boundaries, decide
        self.samples = self.going = len(x)
        self.logits: Any = None
        self.left = torch.full((self.samples,), len(heads), device=x.device)
        self.rows: torch.Tensor | None = None  # of the samples in the batch; None is all of them
        self.done: torch.Tensor | None = None  # which of these are computed along, (rows,) of booleans; None is none of them

    def at(self, index: int, output: Any) -> Any:
        if self.decide.asks(index):
            self._ask(index, _leaf(output, self.places[index].leaf))
        boundary = self.boundaries[index]
        if boundary is None or self.done is None:
            return None
        stay = self.done.logical_not().nonzero()[:, 0]
        self.done = None
        self.rows = stay if self.rows is None else self.rows[stay]
        self.decide.keep(stay)
        return select(output, boundary, stay)

    def _ask(self, index: int, x: torch.Tensor) -> None:
        """Store the logits of the samples that an exit is sure of."""
        logits = self.heads[index](x)
        leave = self.decide.leave(index, logits)
        if self.done is not None:
            leave = leave & ~self.done
        leaving = int(leave.count_nonzero())
        if leaving == 0:
            return
        if leaving == len(leave):
            self._store(self.rows, logits, index)
            raise Stop
        gone = leave.nonzero()[:, 0]
        self._store(gone if self.rows is None else self.rows[gone], logits[gone], index)
        self.going -= leaving
        if self.going == 0:
            raise Stop
        self.done = leave if self.done is None else self.done | leave

    def finish(self, logits: torch.Tensor | None) -> None:
        """The logits of those who were never done; None if there are none."""
        if logits is None:
            return
        if self.done is None:
            self._store(self.rows, logits, len(self.heads))
            return
        last = self.done.logical_not().nonzero()[:, 0]
        self._store(last if self.rows is None else self.rows[last], logits[last], len(self.heads))

    def _store(self, rows: torch.Tensor | None, logits: torch.Tensor, index: int) -> None:
        if rows is None:
            self.logits = logits
            self.left.fill_(index)
            return
        if self.logits is None:
            self.logits = logits.new_empty((self.samples, *logits.shape[1:]))
        self.logits[rows] = logits
        self.left[rows] = index


def _leaf(output: Any, leaf: int) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else tree_leaves(output)[leaf]
