"""Distillation: timm's tasks, reached from a config, with one teacher or the average of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.task import (
    ClassificationTask,
    DistillationTeacher,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn
from torch.nn import functional as F

from ..errors import CompressError
from .config import DistillConfig, FinetuneConfig, TrainConfig


class Ensemble(nn.Module):
    """Several teachers as one, whose softmax at a temperature is the mean of theirs.

    The mean of probabilities, not of logits: for a student q, the divergences KL(p_k ‖ q) from the teachers average to
    KL(mean p ‖ q) up to a constant, so it learns from each of them alike. (Hinton et al. 2015, Distilling the Knowledge in a Neural
    Network, section 2, name both the arithmetic and the geometric mean; the latter is that of logits.)

    Args:
        teachers: The models. Each sees images normalised in its own way.
        student: The model whose normalisation the images have.
        temperature: Of the softmax.
        device: Where they are to be.
    """

    def __init__(self, teachers: Sequence[nn.Module], student: nn.Module, temperature: float, device: torch.device) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(DistillationTeacher(teacher, device=device) for teacher in teachers)
        cfg: Any = student.pretrained_cfg
        self.pretrained_cfg = cfg
        self.temperature = temperature
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(cfg[name], device=device).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes)."""
        found = [
            F.log_softmax(teacher(teacher.normalize_input(x, self.mean, self.std)) / self.temperature, dim=-1)  # type: ignore[operator]
            for teacher in self.teachers
        ]
        return self.temperature * (torch.stack(found).logsumexp(0) - torch.tensor(float(len(found))).log())


def create_task(model: nn.Module, config: TrainConfig, teachers: Sequence[nn.Module], device: torch.device) -> TrainingTask:
    """The task of timm's that trains a model as a config says.

    Args:
        model: The model, on `device`.
        config: What to do.
        teachers: For `config.distill`, the models to learn from.
        device: Where to train.

    Raises:
        CompressError: If distillation is asked for without a teacher, or of models that don't fit it.
    """
    criterion = {"smoothing": config.smoothing, "soft_targets": bool(config.mixup or config.cutmix)}
    shared: dict[str, Any] = {"criterion_kwargs": criterion, "device": device, "verbose": False}
    distill = config.distill if isinstance(config, FinetuneConfig) else None
    if distill is None:
        return ClassificationTask(model, **shared)
    _check(model, distill, teachers)
    teachers = [teacher.to(device) for teacher in teachers]
    teacher = teachers[0] if len(teachers) == 1 else Ensemble(teachers, model, distill.temperature, device)
    shared["task_loss_weight"] = distill.task_loss_weight
    if distill.match == "features":
        return FeatureDistillationTask(model, teacher, **shared)
    task = LogitDistillationTask if distill.match == "logits" else TokenDistillationTask
    return task(model, teacher, temperature=distill.temperature, **shared)


def _check(model: nn.Module, distill: DistillConfig, teachers: Sequence[nn.Module]) -> None:
    if not teachers:
        raise CompressError("distill: expected a teacher, found none")
    student: Any = model
    for teacher in teachers:
        for name in ("num_classes", "in_chans"):
            found, expected = (getattr(each, name, None) for each in (teacher, student))
            if found != expected:
                raise CompressError(f"distill: expected a teacher with {name} {expected} like the student, found {found}")
    if distill.match == "token" and not hasattr(model, "set_distilled_training"):
        raise CompressError(f"distill: match: token: expected a model with a distillation token, found {type(model).__name__}")
    if distill.match == "features":
        if len(teachers) > 1:
            raise CompressError(f"distill: match: features: expected one teacher, whose features are learnt; found {len(teachers)}")
        for each in (model, *teachers):
            if not (hasattr(each, "forward_features") and hasattr(each, "forward_head")):
                raise CompressError(f"distill: match: features: {type(each).__name__} has no forward_features and forward_head")
