"""Training networks with early exits: all exits at once, one after the other, and from the last one's predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn
from torch.nn import functional as F

from ..errors import CompressError
from ..structure.exits import MAX_GRID, Confidence
from ..surgery.exits import ExitsModel
from ..surgery.places import check_wanted
from ..training.config import Fraction, Positive
from ..training.task import MethodConfig, MethodTask
from .exiting import add_exits

Train = Literal["joint", "main", "heads"]


class ExitsConfig(MethodConfig):
    """How to train a network with exits.

    Attributes:
        exits: how many exits, or where, as for `zoo_compress.add_exits`; None for a network that has them.
        grid: of their heads, as for `zoo_compress.add_exits`.
        weights: of the losses, one an exit and last the network's own end; or a preset. `equal` averages them. `msdnet` adds them up
            (Huang et al. 2018, section 4: weight 1 for all). `branchynet` gives early exits 1 and the end 0.3 (Teerapittayanon et al.
            2016, section IV: more weight on early exits makes the later ones better).
        distill: weight of what the exits learn from the last one's predictions, beside the task's loss with the rest of 1
            (self-distillation, Phuong & Lampert 2019, Distillation-based Training for Multi-exit Architectures).
        temperature: of both sides of that.
        train: `joint`, everything; `main`, the network without exits; `heads`, the exits on a frozen network. The latter two one after
            the other leave the network as good as it is without exits.
        budget: average MACs, as for `calibrate` of the network: thresholds are found for it when the training is over, on images that
            were held out of it. None finds none.
        confidence: what those thresholds are compared with.
    """

    inner = True
    kind: Literal["exits"] = "exits"
    exits: int | tuple[str, ...] | tuple[float, ...] | None = None
    grid: Annotated[int, Field(ge=1, le=MAX_GRID)] | None = None
    weights: str | tuple[float, ...] = "equal"
    distill: Fraction = 0.0
    temperature: Positive = 2.0
    train: Train = "joint"
    budget: Positive | None = None
    confidence: Confidence = "max_softmax"

    @field_validator("exits", mode="before")
    @classmethod
    def _places(cls, exits: Any) -> Any:
        try:
            return None if exits is None else check_wanted(exits)
        except CompressError as error:
            raise ValueError(str(error).removeprefix("exits: ")) from error

    @field_validator("weights", mode="before")
    @classmethod
    def _weights(cls, weights: Any) -> Any:
        if isinstance(weights, (list, tuple)):
            if not all(_number(w) and w >= 0 for w in weights) or not any(weights):
                raise ValueError(f"expected numbers from 0 on, not all 0, found {weights!r}")
            return tuple(map(float, weights))
        if not isinstance(weights, str) or weights not in _PRESETS:
            raise ValueError(f"expected one of {', '.join(_PRESETS)}, or a number an exit, found {weights!r}")
        return weights

    @model_validator(mode="after")
    def _grid_of_new_heads(self) -> ExitsConfig:
        if self.grid is not None and self.exits is None:
            raise ValueError(f"expected no grid without exits, whose heads it is of, found {self.grid}")
        return self

    @property
    def needs_held_out(self) -> bool:
        return self.budget is not None

    @property
    def trains(self) -> tuple[str, ...]:
        return ("exit",)

    def wrap(self, model: nn.Module) -> nn.Module:
        if self.exits is not None:
            return add_exits(model, self.exits, self.grid)
        if not isinstance(model, ExitsModel):
            raise CompressError(f"exits: expected how many exits, or where, for {type(model).__name__}, which has none; found neither")
        return model

    def task(self, task: TrainingTask, seed: int) -> ExitsTask:
        return ExitsTask(task, self)

    def finish(self, net: Any, images: Iterable[object], held_out: Iterable[object] = ()) -> nn.Module:
        if self.budget is not None:
            net.calibrate(held_out, self.budget, confidence=self.confidence)
        return net

    def weights_of(self, exits: int) -> tuple[float, ...]:
        """The weights of so many early exits and of the network's end.

        Raises:
            CompressError: If there are not as many weights.
        """
        weights = _PRESETS[self.weights](exits) if isinstance(self.weights, str) else tuple(map(float, self.weights))
        if len(weights) != exits + 1:
            raise CompressError(f"weights: expected {exits + 1}, one an exit and one for the network's end, found {len(weights)}")
        if self.train == "main":
            return (*[0.0] * exits, 1.0)
        if self.train == "heads":
            weights = (*weights[:-1], 0.0)
            if not any(weights):
                raise CompressError("weights: expected one above 0 on an early exit, where heads are trained; found none")
        return weights


_PRESETS: dict[str, Any] = {
    "equal": lambda exits: (1 / (exits + 1),) * (exits + 1),
    "branchynet": lambda exits: (*[1.0] * exits, 0.3),
    "msdnet": lambda exits: (1.0,) * (exits + 1),
}


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and abs(value) != float("inf")


class ExitsTask(MethodTask):
    """Trains all exits of a network at once, each with the loss of another task. What it freezes, `end` lets go of.

    Args:
        task: What each exit is to learn, such as `timm.task.ClassificationTask` or `LogitDistillationTask`, of a network with exits.
        config: Weights of the exits, and what is trained.

    Raises:
        CompressError: If the task's network has no exits, or the weights are not as many.
    """

    def __init__(self, task: TrainingTask, config: ExitsConfig | None = None) -> None:
        if isinstance(task, MethodTask):
            raise CompressError(f"ExitsTask: expected a task of timm's, found {type(task).__name__}, which goes around this one")
        net = unwrap_model(task.get_trainable_module()) if isinstance(task, TrainingTask) else None
        if not isinstance(net, ExitsModel) or net.record.truncated:
            found = type(task).__name__ if net is None else type(net).__name__
            raise CompressError(f"ExitsTask: expected a timm task that trains a network with exits, found {found}")
        super().__init__(task, ExitsModel)
        self.config = config or ExitsConfig()
        self.weights = self.config.weights_of(len(self.net.exits))
        self.frozen = self.config.train == "heads"
        self._frozen_parameters = self._freeze(self.net)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss and logits.

        Args:
            input: Images (batch, channels, height, width).
            target: Class indices (batch,), or whatever the task takes.

        Returns:
            `loss`; `output`, the logits of the network's end (batch, classes); and `loss_0`, `loss_1`, … of each exit that counts.
        """
        outputs = self.trained(input)
        if not isinstance(outputs, list):
            raise CompressError("ExitsTask: expected the logits of all exits; put the task in train mode")
        found: dict[str, torch.Tensor] = {"output": outputs[-1]}
        loss = outputs[-1].new_zeros(())
        teacher = outputs[-1].detach()
        with _replayed(self.task) as replay:
            for i, (weight, output) in enumerate(zip(self.weights, outputs, strict=True)):
                if not weight:
                    continue
                own = replay(output, input, target)
                if self.config.distill and i < len(outputs) - 1:
                    own = (1 - self.config.distill) * own + self.config.distill * _divergence(output, teacher, self.config.temperature)
                found[f"loss_{i}"] = own.detach()
                loss = loss + weight * own
        return {"loss": loss, **found}

    def train(self, mode: bool = True) -> ExitsTask:
        """Set the training mode; a frozen network stays in eval mode but for its heads, so that its statistics stay."""
        super().train(mode)
        if mode and self.frozen:
            for child in self.net.children():
                child.train(child is self.net.exits)
        return self

    def _freeze(self, net: ExitsModel) -> tuple[nn.Parameter, ...]:
        """Let only what is to be trained take gradients; returns the parameters that took them before and do not now."""
        if self.config.train == "joint":
            return ()
        heads = {id(p) for p in net.exits.parameters()}
        frozen = tuple(p for p in net.parameters() if p.requires_grad and (id(p) in heads) != (self.config.train == "heads"))
        for parameter in frozen:
            parameter.requires_grad_(False)
        return frozen

    def end(self) -> None:
        """Let go of what was frozen: the same network can be trained otherwise afterwards."""
        for parameter in self._frozen_parameters:
            parameter.requires_grad_(True)
        super().end()

    def imitate(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the exits' cross-entropies with soft labels."""
        outputs = self.trained(input)
        losses = [weight * F.cross_entropy(output, target) for weight, output in zip(self.weights, outputs, strict=True) if weight]
        return torch.stack(losses).sum()

    def compile(self, *args: Any, **kwargs: Any) -> Any:
        return self.task.compile(*args, **kwargs)


def _divergence(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    mine, other = (x.log_softmax(1) for x in (logits / temperature, teacher / temperature))
    return F.kl_div(mine, other, reduction="batchmean", log_target=True) * temperature**2


@contextmanager
def _replayed(task: TrainingTask) -> Iterator[Any]:
    """Within, a function (output, input, target) → the task's loss as if its network had given that output.

    Other networks the task holds (a teacher) run once: asked again in the same order, they give what they gave.
    """
    answers: dict[nn.Module, list[Any]] = {}
    asked: dict[nn.Module, int] = {}
    trained: Any = task.trainable_module
    others = [child for child in task.children() if child is not trained and any(True for _ in child.parameters())]

    def remembered(module: nn.Module, forward: Any) -> Any:
        def answer(*args: Any, **kwargs: Any) -> Any:
            nth = asked.get(module, 0)
            asked[module] = nth + 1
            if nth == len(answers.setdefault(module, [])):
                answers[module].append(forward(*args, **kwargs))
            return answers[module][nth]

        return answer

    def replay(output: torch.Tensor, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        asked.clear()
        vars(trained)["forward"] = lambda *args, **kwargs: output
        return task(input, target)["loss"]

    before = {module: vars(module).get("forward") for module in (trained, *others)}
    try:
        for module in others:
            vars(module)["forward"] = remembered(module, module.forward)
        yield replay
    finally:
        for module, forward in before.items():
            vars(module).pop("forward", None)
            if forward is not None:  # compiled modules have one of their own
                vars(module)["forward"] = forward
