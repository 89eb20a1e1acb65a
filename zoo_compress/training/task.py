"""What methods are to a recipe: a stage that changes a model at once, or another way to train it. Tasks of the latter wrap timm's."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ..errors import CompressError
from .config import Config, Count

T = TypeVar("T", bound="MethodTask")


class MethodConfig(Config):
    """What a recipe says about a method of training, and what the method does before, in and after it.

    Attributes:
        inner: others may train the same network around it.
        changes: `finish` gives a model that computes something else, if only by rounding, than the network that was evaluated.
        compresses: the model that `finish` gives is a smaller one than that which was to be trained.
        kind: name of the method.
        calibration_batches: training batches to find statistics of normalisation with.
    """

    inner: ClassVar[bool] = False
    changes: ClassVar[bool] = False
    compresses: ClassVar[bool] = False
    kind: str
    calibration_batches: Count = 16

    @property
    def needs_held_out(self) -> bool:
        """Whether `finish` needs images that were not trained on."""
        return False

    @property
    def removes(self) -> bool:
        """Whether the method itself says which weights are removed; training keeps those of other models as they are."""
        return False

    @property
    def trains(self) -> tuple[str, ...]:
        """Knobs of a network that runs in several ways (`width`, `exit`) all of whose values it takes care of."""
        return ()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The network to train."""
        raise NotImplementedError

    def task(self, task: TrainingTask, seed: int) -> MethodTask:
        """What trains it.

        Args:
            task: A task of timm's with the network as its model.
            seed: Of whatever the method draws.
        """
        raise NotImplementedError

    def finish(self, net: Any, images: Iterable[object], held_out: Iterable[object] = ()) -> nn.Module:
        """The model that the training ends with.

        Args:
            net: The trained network.
            images: Batches of training images without augmentation.
            held_out: Batches of images of the training set that were not trained on, if any were held out.
        """
        return net


class Nested(MethodConfig):
    """Several methods that train one network together, the first within all others."""

    kind: Literal["nested"] = "nested"
    methods: tuple[MethodConfig, ...]

    @property
    def needs_held_out(self) -> bool:
        return any(method.needs_held_out for method in self.methods)

    @property
    def removes(self) -> bool:
        return any(method.removes for method in self.methods)

    @property
    def trains(self) -> tuple[str, ...]:
        return tuple(knob for method in self.methods for knob in method.trains)

    def wrap(self, model: nn.Module) -> nn.Module:
        for method in self.methods:
            model = method.wrap(model)
        return model

    def task(self, task: TrainingTask, seed: int) -> MethodTask:
        for method in self.methods:
            task = method.task(task, seed)
        assert isinstance(task, MethodTask)
        return task

    def finish(self, net: Any, images: Iterable[object], held_out: Iterable[object] = ()) -> nn.Module:
        for method in reversed(self.methods):
            net = method.finish(net, images, held_out)
        return net


def nested(methods: Sequence[MethodConfig]) -> MethodConfig:
    """Several methods as one.

    Args:
        methods: From the inside out.

    Raises:
        CompressError: If one of them cannot have others around it.
    """
    if not methods:
        raise CompressError("method: expected at least one, found none")
    for method in methods[:-1]:
        if not method.inner:
            raise CompressError(f"method: expected {method.kind} last: nothing trains around it")
    if len(methods) == 1:
        return methods[0]
    return Nested(methods=tuple(methods), calibration_batches=max(method.calibration_batches for method in methods))


class ChangeConfig(Config):
    """What a recipe says about a method that turns one model into another at once, and how.

    Attributes:
        kind: name of the stage.
        noun: what it is called in tables.
        calibration_batches: training batches it may look at.
    """

    noun: ClassVar[str]
    kind: str
    calibration_batches: Count = 8

    def apply(self, model: nn.Module, images: Iterable[object], seed: int) -> nn.Module:
        """The changed model; the given one stays as it is.

        Args:
            model: The model.
            images: Batches of training images without augmentation, `(images, target)`; read only if they are asked for.
            seed: Of whatever the method draws.

        Raises:
            CompressError: If the method cannot work on this model.
        """
        raise NotImplementedError

    def rehearse(self, model: nn.Module, images: Iterable[object], seed: int) -> nn.Module | None:
        """What `apply` would make of a model with these widths and other weights; None where the weights decide that.

        Raises:
            CompressError: If the method cannot work on such a model, whatever its weights.
        """
        return self.apply(model, images, seed)


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

    frozen = False
    """The network is in eval mode while this trains: only parts without statistics move."""

    def __init__(self, task: TrainingTask, kind: type[nn.Module]) -> None:
        super().__init__(device=task.device, dtype=task.dtype, verbose=task.verbose)
        found = unwrap_model(task.get_trainable_module())
        if not isinstance(found, kind):
            raise CompressError(f"{type(self).__name__}: expected a task whose model is {kind.__name__}, found {type(found).__name__}")
        self.task = task
        self.draws = 0

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss and logits, those of the task unless a method says otherwise.

        Args:
            input: Images (batch, channels, height, width).
            target: Class indices (batch,), or whatever the task takes.
        """
        return self.task(input, target)

    @property
    def net(self) -> Any:
        """The network, without what wraps it for distribution."""
        return unwrap_model(self.task.get_trainable_module())

    @property
    def trained(self) -> nn.Module:
        """The network as it is to be called in training."""
        module = self.task.get_trainable_module()
        assert module is not None
        return module

    def imitate(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of learning soft labels (batch, classes) instead of the task's."""
        if isinstance(self.task, MethodTask):
            return self.task.imitate(input, target)
        return F.cross_entropy(self.trained(input), target)

    def take_draw(self) -> int:
        """The number of this draw: what a random choice follows from, with a seed that all processes share."""
        self.draws += 1
        return self.draws - 1

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        return {} if ema else {"draws": self.draws}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        if state:
            self.draws = int(state["draws"])

    def start_epoch(self, epoch: int, epochs: int, optimizer: torch.optim.Optimizer, steps: int | None = None) -> None:
        """Do what has to be done before the steps of an epoch.

        Args:
            epoch: Which one, the first being 0.
            epochs: How many there are.
            optimizer: What takes the steps.
            steps: How many an epoch has; only methods with a schedule of their own ask for it.

        Raises:
            CompressError: The method needs to know the steps.
        """
        if isinstance(self.task, MethodTask):
            self.task.start_epoch(epoch, epochs, optimizer, steps)

    def end(self) -> None:
        """Let go of network and optimizer after the last step."""
        if isinstance(self.task, MethodTask):
            self.task.end()

    def prepare_evaluation(self, net: Any, images: Iterable[object]) -> None:
        """Make a network, the trained one or its average, ready for evaluation.

        Args:
            net: The network.
            images: Batches of training images without augmentation.
        """
        if isinstance(self.task, MethodTask):
            self.task.prepare_evaluation(net, images)

    def prepare_distributed(self: T, device_ids: list | None = None, **ddp_kwargs: Any) -> T:
        # Buffers of all widths would be broadcast, and so changed, between the forward passes of one step.
        known = inspect.signature(DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # the latter before torch 2.14
        self.task.prepare_distributed(device_ids=device_ids, **{option: False, **ddp_kwargs})
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        raise CompressError(f"{type(self).__name__}: a network whose weights are replaced while it runs cannot be compiled")

    def get_trainable_module(self, ema: bool = False) -> nn.Module | None:
        return super().get_trainable_module(ema=True) if ema else self.task.get_trainable_module()

    def create_evaluator(self, **kwargs: Any) -> Any:
        return self.task.create_evaluator(**kwargs)
