"""A training at one of its steps, and going on from there: what rewinding is (Frankle et al. 2020, Linear Mode Connectivity and the
Lottery Ticket Hypothesis, section 3)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model

from ..errors import CompressError
from .checkpoint import load_state, save_state


@dataclass(frozen=True)
class Snapshot:
    """All that the steps after one depend on, beside the images.

    Attributes:
        step: Optimizer steps done before.
        model: State of the trained network, by name.
        optimizer: State of the optimizer.
        task: State of the task.
        ema: State of the average of the weights; empty without one.
    """

    step: int
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    task: dict[str, Any]
    ema: dict[str, torch.Tensor]

    def save(self, path: Path) -> None:
        """Write it, atomically."""
        save_state(path, vars(self))

    @classmethod
    def load(cls, path: Path) -> Snapshot:
        """Read one.

        Raises:
            CompressError: If there is none.
        """
        if not path.exists():
            raise CompressError(f"{path}: expected the snapshot of a training, found no such file: that step was never saved")
        state = load_state(path)
        if set(state) != set(cls.__dataclass_fields__):
            raise CompressError(f"{path}: expected the snapshot of a training, found another file")
        return cls(**state)


@dataclass(frozen=True)
class Take:
    """Asks a training for a snapshot of itself.

    Attributes:
        step: Optimizer steps before it.
        to: What gets it.
    """

    step: int
    to: Callable[[Snapshot], None]


@dataclass(frozen=True)
class Marks:
    """The steps of a training at which something happens besides training.

    Attributes:
        start: Where it begins; None is the beginning.
        take: The snapshot to take.
    """

    start: Snapshot | None
    take: Take | None

    @property
    def first(self) -> int:
        """The first step that is done."""
        return 0 if self.start is None else self.start.step

    def check(self, total: int) -> None:
        """Refuse steps that a training of so many does not have.

        Raises:
            CompressError: That.
        """
        for name, mark in (("start", self.start), ("snapshot", self.take)):
            if mark is not None and not 0 <= mark.step < total:
                raise CompressError(f"{name}: expected a step below the {total} of this training, found {mark.step}")
        if self.take is not None and self.take.step < self.first:
            raise CompressError(f"snapshot: expected a step from {self.first} on, where this training begins, found {self.take.step}")

    def reseeds(self, step: int) -> bool:
        """Whether random numbers start over before a step, so that a training from there draws the same ones."""
        return any(mark is not None and mark.step == step for mark in (self.start, self.take))

    def reach(self, step: int, task: TrainingTask, optimizer: torch.optim.Optimizer) -> None:
        """Take the snapshot, if it is of before this step."""
        if self.take is not None and self.take.step == step:
            self.take.to(_taken(step, task, optimizer))


def _taken(step: int, task: TrainingTask, optimizer: torch.optim.Optimizer) -> Snapshot:
    """A snapshot that later steps don't change."""
    ema = task.get_trainable_module(ema=True) if task.has_ema() else None
    return Snapshot(
        step=step,
        model=copy.deepcopy(unwrap_model(task.get_trainable_module()).state_dict()),
        optimizer=copy.deepcopy(optimizer.state_dict()),
        task=copy.deepcopy(task.get_task_state()),
        ema=copy.deepcopy(unwrap_model(ema).state_dict()) if ema is not None else {},
    )


def put_back(snapshot: Snapshot, task: TrainingTask, optimizer: torch.optim.Optimizer) -> None:
    """Make a training what it was. The network's own state stays: whoever rewinds decides what of it is taken back."""
    optimizer.load_state_dict(copy.deepcopy(snapshot.optimizer))
    task.load_task_state(copy.deepcopy(snapshot.task))
    if task.has_ema() and snapshot.ema:
        unwrap_model(task.get_trainable_module(ema=True)).load_state_dict(snapshot.ema)
