"""Universally slimmable networks: one bank of weights that runs at any width between two bounds.

Yu & Huang 2019, Universally Slimmable Networks and Improved Training Techniques.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from timm.task import TrainingTask
from torch import Tensor, nn

from ..errors import CompressError
from ..surgery.calibrate import calibrate
from ..training.config import Count
from ..training.task import MethodConfig, MethodTask
from .slimmable import WIDTHS, Slimmable, slimmed


class UsConfig(MethodConfig):
    """Training at the widest, the narrowest and random widths between them in every step.

    Attributes:
        widths: the least and the greatest are the bounds; statistics are found for all of them after training.
        samples: widths in a step.
        round_to: preferred multiple for sizes, as in pruning.
    """

    kind: Literal["us"] = "us"
    widths: Annotated[tuple[float, ...], Field(min_length=2, strict=False)] = WIDTHS
    samples: Annotated[int, Field(ge=2)] = 4
    round_to: Count = 8

    @property
    def trains(self) -> tuple[str, ...]:
        return ("width",)

    def wrap(self, model: nn.Module) -> Slimmable:
        return slimmed(model, self.widths, universal=True, round_to=self.round_to)

    def task(self, task: TrainingTask, seed: int) -> UsTask:
        return UsTask(task, samples=self.samples, seed=seed)

    def finish(self, net: Any, images: Iterable[object], held_out: Iterable[object] = ()) -> nn.Module:
        for width in net.widths[:-1]:
            calibrate(net, width, images)
        return net


class UsTask(MethodTask):
    """The sandwich rule with in-place distillation: the widest learns from the labels, the others from its soft output (section 3.3).

    Under DDP all processes draw the same widths: the draw follows from the seed and the number of draws before it.

    Args:
        task: A task of timm's whose model is slimmable, universally.
        samples: Widths in a step: the widest, the narrowest, and random ones.
        seed: Of the draws.

    Raises:
        CompressError: If the model is not universal, or fewer than 2 widths are asked for.
    """

    def __init__(self, task: TrainingTask, *, samples: int = 4, seed: int = 0) -> None:
        super().__init__(task, Slimmable)
        if not self.net.universal:
            raise CompressError("UsTask: expected a universal network, zoo_compress.slim(model, universal=True), found one of fixed widths")
        if isinstance(task, MethodTask) and task.frozen:
            raise CompressError(
                "UsTask: expected a network that is trained as a whole: in a frozen one, random widths have no statistics. Train the heads "
                "of exits at fixed widths (slim), or everything"
            )
        if samples < 2:
            raise CompressError(f"UsTask: expected at least 2 widths in a step, found {samples}")
        self.samples, self.seed = samples, seed

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        net: Slimmable = self.net
        least, most = net.widths[0], net.widths[-1]
        net.set_width(most)
        result = dict(self.task(input, target))
        soft = result["output"].detach().softmax(-1)
        draw = np.random.default_rng([self.seed, self.take_draw()])
        for width in (least, *draw.uniform(least, most, self.samples - 2)):
            net.set_width(float(width))
            result["loss"] = result["loss"] + self.imitate(input, soft)
        net.set_width(most)
        return result
