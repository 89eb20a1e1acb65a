"""Network slimming: an L1 penalty on the scales of BatchNorms while training, so that channels that are not needed switch themselves off.

Liu et al. 2017, Learning Efficient Convolutional Networks through Network Slimming. (Not slimmable networks, which are `slim` and `us`.)
Channels are removed afterwards by a threshold on the scales over all layers: `prune` with criterion `slimming`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from timm.task import TrainingTask
from torch import Tensor, nn

from ..errors import CompressError
from ..training.task import MethodConfig, MethodTask


class SlimmingConfig(MethodConfig):
    """Training with a penalty on the scales of BatchNorms.

    Attributes:
        penalty: what the sum of their magnitudes is multiplied with, beside the loss; λ in the paper, which takes 1e-5 to 1e-4.
    """

    kind: Literal["slimming"] = "slimming"
    penalty: Annotated[float, Field(gt=0)] = 1e-4

    def wrap(self, model: nn.Module) -> nn.Module:
        scales(model)
        return model

    def task(self, task: TrainingTask, seed: int) -> SlimmingTask:
        return SlimmingTask(task, self.penalty)


def scales(model: nn.Module) -> list[nn.Parameter]:
    """The scales of a model's BatchNorms.

    Raises:
        CompressError: If it has none.
    """
    found = [m.weight for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.weight is not None]
    if not found:
        raise CompressError(f"slimming: expected a model with BatchNorms that have scales, found {type(model).__name__} without")
    return found


class SlimmingTask(MethodTask):
    """Trains as its task does, with the penalty added to the loss (Liu et al. 2017, equation 1).

    Args:
        task: A task of timm's, whose model has BatchNorms.
        penalty: See `SlimmingConfig.penalty`.
    """

    def __init__(self, task: TrainingTask, penalty: float = 1e-4) -> None:
        super().__init__(task, nn.Module)
        self.penalty = penalty
        self.scales = scales(self.net)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        found = self.task(input, target)
        size = torch.stack([scale.abs().sum() for scale in self.scales]).sum()
        return {**found, "loss": found["loss"] + self.penalty * size}
