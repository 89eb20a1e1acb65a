"""Training slimmable networks: every width in every step.

Yu et al. 2019, Slimmable Neural Networks, algorithm 1.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from timm.task import TrainingTask
from torch import Tensor, nn

from ..training.config import Count
from ..training.task import MethodConfig, MethodTask
from .slimmable import WIDTHS, Slimmable, slimmed


class SlimConfig(MethodConfig):
    """Training at every width in every step.

    Attributes:
        widths: fractions of every axis that may change.
        round_to: preferred multiple for sizes, as in pruning.
    """

    kind: Literal["slim"] = "slim"
    widths: Annotated[tuple[float, ...], Field(min_length=1, strict=False)] = WIDTHS
    round_to: Count = 8

    @property
    def trains(self) -> tuple[str, ...]:
        return ("width",)

    def wrap(self, model: nn.Module) -> Slimmable:
        return slimmed(model, self.widths, round_to=self.round_to)

    def task(self, task: TrainingTask, seed: int) -> SlimTask:
        return SlimTask(task)


class SlimTask(MethodTask):
    """Every width in each step, the widest first; the losses are added up (Yu et al. 2019, algorithm 1).

    Args:
        task: A task of timm's whose model is slimmable.
    """

    def __init__(self, task: TrainingTask) -> None:
        super().__init__(task, Slimmable)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        net: Slimmable = self.net
        result: dict[str, Tensor] = {}
        for width in net.widths[::-1]:
            net.set_width(width)
            found = self.task(input, target)
            result = {**found, "loss": result["loss"] + found["loss"]} if result else found
            result.setdefault("output", found["output"])
        net.set_width(net.widths[-1])
        return result
