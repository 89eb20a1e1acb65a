"""Tasks that train a network in another way: each wraps a task of timm's, which knows model and loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn

from ..errors import CompressError

T = TypeVar("T", bound="MethodTask")


class MethodTask(TrainingTask):
    """Base of the methods' tasks. Model, loss, distillation, EMA and distribution are those of the task it wraps.

    In a loop of your own: wrap the task, then call `start_epoch` before and `prepare_evaluation` after each epoch's steps, and otherwise
    do as with any task of timm's.

    Args:
        task: A task of timm's, such as `ClassificationTask` or `LogitDistillationTask`, not distributed yet.
        kind: What its model has to be.

    Raises:
        CompressError: If it is something else.
    """

    def __init__(self, task: TrainingTask, kind: type[nn.Module]) -> None:
        super().__init__(device=task.device, dtype=task.dtype, verbose=task.verbose)
        found = unwrap_model(task.get_trainable_module())
        if not isinstance(found, kind):
            raise CompressError(f"{type(self).__name__}: expected a task whose model is {kind.__name__}, found {type(found).__name__}")
        self.task = task

    @property
    def net(self) -> Any:
        """The network, without what wraps it for distribution."""
        return unwrap_model(self.task.get_trainable_module())

    def start_epoch(self, epoch: int, epochs: int, optimizer: torch.optim.Optimizer) -> None:
        """Do what has to be done before the steps of an epoch, `epoch` of `epochs`, the first being 0."""

    def prepare_evaluation(self, net: Any, images: Iterable[object]) -> None:
        """Make a network, the trained one or its average, ready for evaluation.

        Args:
            net: The network.
            images: Batches of training images without augmentation.
        """

    def prepare_distributed(self: T, device_ids: list | None = None, **ddp_kwargs: Any) -> T:
        # Buffers of all widths would be broadcast, and so changed, between the forward passes of one step.
        self.task.prepare_distributed(device_ids=device_ids, **{"broadcast_buffers": False, **ddp_kwargs})
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        raise CompressError(f"{type(self).__name__}: a network whose weights are replaced while it runs cannot be compiled")

    def get_trainable_module(self, ema: bool = False) -> nn.Module | None:
        return super().get_trainable_module(ema=True) if ema else self.task.get_trainable_module()

    def create_evaluator(self, **kwargs: Any) -> Any:
        return self.task.create_evaluator(**kwargs)
