"""Distillation: timm's tasks, reached from a config, with one teacher or the average of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import resolve_input_data_config
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


class _Teacher(DistillationTeacher):
    """A teacher that says what images it cannot look at: those of another size than its own, or of another precision."""

    def forward(self, input: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        try:
            return super().forward(input, return_features)
        except Exception as error:  # models assert, index and reshape
            reason = next(iter(str(error).splitlines()), "")
            raise CompressError(
                f"distill: expected a teacher that takes the student's images of {tuple(input.shape[1:])} in "
                f"{str(input.dtype).removeprefix('torch.')}, found {type(self.model).__name__}: {type(error).__name__}: {reason}"
            ) from error


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
        self.teachers = nn.ModuleList(_Teacher(teacher, device=device) for teacher in teachers)
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
    teacher = _Teacher(teachers[0], device=device) if len(teachers) == 1 else Ensemble(teachers, model, distill.temperature, device)
    shared["task_loss_weight"] = distill.task_loss_weight
    if distill.match == "features":
        return FeatureDistillationTask(model, teacher, **shared)
    task = LogitDistillationTask if distill.match == "logits" else TokenDistillationTask
    return task(model, teacher, temperature=distill.temperature, **shared)


def _check(model: nn.Module, distill: DistillConfig, teachers: Sequence[nn.Module]) -> None:
    """Refuse a student and teachers that don't go together, as far as they say so themselves."""
    if not teachers:
        raise CompressError("distill: expected a teacher, found none")
    student: Any = model
    normalisation = getattr(model, "pretrained_cfg", None)
    if not isinstance(normalisation, Mapping):
        raise CompressError(
            f"distill: expected a student of timm's, whose pretrained_cfg says what images have, found {type(model).__name__}"
        )
    for teacher in teachers:
        for name in ("num_classes", "in_chans"):
            found, expected = (getattr(each, name, None) for each in (teacher, student))
            if found != expected:
                raise CompressError(f"distill: expected a teacher with {name} {expected} like the student, found {found}")
        for name, values in (getattr(teacher, "pretrained_cfg", None) or {}).items():
            if name in ("mean", "std") and len(values) != len(normalisation[name]):
                raise CompressError(
                    f"distill: expected a teacher whose pretrained_cfg.{name} has as many channels as the student's, "
                    f"{len(normalisation[name])}, found {len(values)}"
                )
    if distill.match == "token" and not hasattr(model, "set_distilled_training"):
        raise CompressError(f"distill: match: token: expected a model with a distillation token, found {type(model).__name__}")
    if distill.match == "features":
        if len(teachers) > 1:
            raise CompressError(f"distill: match: features: expected one teacher, whose features are learnt; found {len(teachers)}")
        for each in (model, *teachers):
            if not (hasattr(each, "forward_features") and hasattr(each, "forward_head")):
                raise CompressError(f"distill: match: features: {type(each).__name__} has no forward_features and forward_head")


@torch.no_grad()
def try_teachers(model: nn.Module, teachers: Sequence[nn.Module]) -> None:
    """Let teachers look at an image of the size that a student's data has.

    Raises:
        CompressError: One cannot.
    """
    for teacher in teachers:
        _Teacher(teacher)(torch.zeros(1, *resolve_input_data_config(model)["input_size"]))
