"""Early exits: classifiers inside a network, by which samples that are easy leave it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.models import create_model
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn
from torch.nn import functional as F

from ..errors import CompressError
from ..structure.exits import Exits
from ..structure.variant import Variant, record
from ..surgery.exits import ExitsModel, attach_
from ..surgery.origin import Origin, origin, stamp
from ..surgery.places import check_wanted, choose
from ..surgery.proof import Trial
from ..surgery.trace import analyze, default_input

Weights = Literal["equal", "branchynet", "msdnet"]
Train = Literal["joint", "main", "heads"]


@dataclass(frozen=True)
class ExitsConfig:
    """How to train a network with exits.

    Attributes:
        weights: Of the losses, one an exit and last the network's own end; or a preset. `equal` averages them. `msdnet` adds them up
            (Huang et al. 2018, section 4: weight 1 for all). `branchynet` gives early exits 1 and the end 0.3 (Teerapittayanon et al.
            2016, section IV: more weight on early exits makes the later ones better).
        distill: Weight of what the exits learn from the last one's predictions, beside the task's loss with the rest of 1
            (self-distillation, Phuong & Lampert 2019, Distillation-based Training for Multi-exit Architectures).
        temperature: Of both sides of that.
        train: `joint`, everything; `main`, the network without exits; `heads`, the exits on a frozen network. The latter two one after
            the other leave the network as good as it is without exits.
    """

    weights: Weights | tuple[float, ...] = "equal"
    distill: float = 0.0
    temperature: float = 2.0
    train: Train = "joint"

    def __post_init__(self) -> None:
        if isinstance(self.weights, str):
            if self.weights not in _PRESETS:
                raise CompressError(f"weights: expected one of {', '.join(_PRESETS)}, or a number an exit, found {self.weights!r}")
        elif not all(_number(w) and w >= 0 for w in self.weights) or not any(self.weights):
            raise CompressError(f"weights: expected numbers from 0 on, not all 0, found {self.weights!r}")
        if not _number(self.distill) or not 0 <= self.distill <= 1:
            raise CompressError(f"distill: expected 0 to 1, found {self.distill!r}")
        if not _number(self.temperature) or not self.temperature > 0:
            raise CompressError(f"temperature: expected a number above 0, found {self.temperature!r}")
        if self.train not in ("joint", "main", "heads"):
            raise CompressError(f"train: expected joint, main or heads, found {self.train!r}")

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


def add_exits(model: nn.Module, exits: int | float | str | Sequence[str] | Sequence[float]) -> nn.Module:
    """A copy of a timm model with early exits, whose heads have random weights. It stays a timm model of its own class.

    Exits are modules between which nothing else of the batch is alive, where there are such, so that samples can leave there:
    `net.infer(x, threshold=0.9)`. That they can is proven by a run before anything is made. See `surgery.exits.ExitsModel` for what the
    network can do then.

    Args:
        model: A model that timm's factory made, pruned or not.
        exits: How many early exits, at evenly spaced fractions of the MACs; or those fractions; or the names of modules.

    Raises:
        CompressError: If there are no such places, with what there is, or why samples cannot leave there.
    """
    wanted = check_wanted(exits)
    if not isinstance(model, nn.Module):
        raise CompressError(f"exits: expected a model, found {type(model).__name__}")
    if isinstance(model, ExitsModel):
        raise CompressError("exits: the model has exits already")
    source = origin(model)
    if source is None:
        raise CompressError(f"exits: expected a model made by timm, which says what it takes; {type(model).__name__} does not")
    if source.previous is not None and source.previous.exits is not None:
        raise CompressError("exits: the model has exits already")
    places, boundaries = choose(model, default_input(model), wanted)
    chosen = Exits(places=tuple(places))
    net = attach_(copy.deepcopy(model), chosen, boundaries)
    stamp(net, _record(net, chosen, source))
    classifiers = [f"exits.{i}.fc" for i in range(len(chosen.places))]
    cfg: Any = net.pretrained_cfg
    own = cfg.get("classifier") or ()
    cfg["classifier"] = (*((own,) if isinstance(own, str) else own), *classifiers)
    return net


def _record(net: nn.Module, exits: Exits, source: Origin) -> Variant:
    """What a checkpoint says of a network with exits. Heads are made to fit the whole base; sizes then say what is left of them."""
    if source.previous is None:
        return Variant(method="exits", base=source.base, base_args=source.args, sizes={}, params={}, exits=exits)
    layout = analyze(net)
    before = source.previous.model_copy(update={"exits": _on_base(exits, source)})
    return record(layout, layout.base_sizes, method="exits", base=source.base, base_args=source.args, previous=before)


def _on_base(exits: Exits, source: Origin) -> Exits:
    """The same exits as heads on the uncompressed base would have them."""
    with torch.device("meta"):
        base = create_model(source.base, **source.args)
    proof = Trial(base, default_input(base), values=False).prove([exit.place for exit in exits.places])
    features = [shapes[e.leaf][e.format.index("C") - 1] for e, shapes in zip(exits.places, proof.shapes, strict=True)]
    places = (exit.model_copy(update={"features": n}) for exit, n in zip(exits.places, features, strict=True))
    return exits.model_copy(update={"places": tuple(places)})


class ExitsTask(TrainingTask):
    """Trains all exits of a network at once, each with the loss of another task.

    Args:
        task: What each exit is to learn, such as `timm.task.ClassificationTask` or `LogitDistillationTask`, of a network with exits.
        config: Weights of the exits, and what is trained.

    Raises:
        CompressError: If the task's network has no exits, or the weights are not as many.
    """

    def __init__(self, task: TrainingTask, config: ExitsConfig | None = None) -> None:
        net = unwrap_model(task.get_trainable_module()) if isinstance(task, TrainingTask) else None
        if not isinstance(net, ExitsModel) or net.record.truncated:
            found = type(task).__name__ if net is None else type(net).__name__
            raise CompressError(f"ExitsTask: expected a timm task that trains a network with exits, found {found}")
        super().__init__(device=task.device, dtype=task.dtype, verbose=task.verbose)
        self.task = task
        self.config = config or ExitsConfig()
        self.weights = self.config.weights_of(len(net.exits))
        self._freeze(net)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss and logits.

        Args:
            input: Images (batch, channels, height, width).
            target: Class indices (batch,), or whatever the task takes.

        Returns:
            `loss`; `output`, the logits of the network's end (batch, classes); and `loss_0`, `loss_1`, … of each exit that counts.
        """
        network: Any = self.task.trainable_module
        outputs = network(input)
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
        if mode and self.config.train == "heads":
            net: Any = unwrap_model(self.task.get_trainable_module())
            for child in net.children():
                child.train(child is net.exits)
        return self

    def _freeze(self, net: ExitsModel) -> None:
        heads = {id(p) for p in net.exits.parameters()}
        if self.config.train != "joint":
            for parameter in net.parameters():
                parameter.requires_grad_((id(parameter) in heads) == (self.config.train == "heads"))

    def get_trainable_module(self, ema: bool = False) -> nn.Module | None:
        return self.task.get_trainable_module(ema)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        return self.task.get_eval_model(module, ema)

    def setup_ema(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.task.setup_ema(*args, **kwargs)

    def prepare_distributed(self, *args: Any, **kwargs: Any) -> ExitsTask:
        self.task.prepare_distributed(*args, **kwargs)
        return self

    def compile(self, *args: Any, **kwargs: Any) -> Any:
        return self.task.compile(*args, **kwargs)

    def get_task_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.task.get_task_state(*args, **kwargs)

    def load_task_state(self, *args: Any, **kwargs: Any) -> None:
        self.task.load_task_state(*args, **kwargs)

    def create_evaluator(self, **kwargs: Any) -> Any:
        return self.task.create_evaluator(**kwargs)


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
