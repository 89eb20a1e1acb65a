"""Sparse structure selection: scaling factors on parts of a network, pushed to zero while training; parts that reach it are removed whole.

Huang & Wang 2018, Data-Driven Sparse Structure Selection for Deep Neural Networks. A factor has an L1 penalty and is trained by accelerated
proximal gradient in the form of the paper's equation 10; the factors of parts that stay go into the weights at the end. What the parts are,
`blocks` and `groups` say.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import torch.distributed as dist
from pydantic import Field
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import CompressError
from ..surgery.origin import refuse_packed
from ..training.config import Fraction
from ..training.task import MethodConfig, MethodTask

SCALES, VELOCITY = "structure_scales", "structure_velocity"
"""Names of the buffers that a network has while its parts are selected."""


class Factors:
    """The factors of a network, as its hooks ask for them. A copy of the network has its own, if its hooks hold this where copies reach it.

    Attributes:
        net: The network.
        leaf: What collects gradients in training until the next step; the network's own values.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.leaf: Tensor | None = None

    def __call__(self, module: nn.Module) -> Tensor:
        """The factors now, (parts,), for a module that is running."""
        return self.leaf if self.leaf is not None and module.training else self.net.get_buffer(SCALES)

    def __deepcopy__(self, memo: dict[int, Any]) -> Factors:
        return Factors(copy.deepcopy(self.net, memo))


@contextmanager
def _set_aside(net: nn.Module) -> Iterator[None]:
    """Within, a network is without its factors, which are no part of the model that is looked at."""
    own = {name: net._buffers.pop(name) for name in (SCALES, VELOCITY)}
    try:
        yield
    finally:
        net._buffers.update(own)


class SelectionConfig(MethodConfig):
    """Training that removes parts of a network.

    Attributes:
        penalty: of the sum of the factors' magnitudes, beside the loss; γ in the paper, which takes 5e-3 to 1e-2.
        momentum: of the accelerated proximal gradient.
        least: parts whose factor ends below this magnitude are removed.
    """

    changes = True
    compresses = True
    penalty: Annotated[float, Field(gt=0)] = 1e-2
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    least: Fraction = 0.01

    def count(self, model: nn.Module) -> int:
        """How many parts the model has that could go.

        Raises:
            CompressError: If it has none, with the reasons.
        """
        raise NotImplementedError

    def attach(self, net: nn.Module, factors: Factors) -> list[RemovableHandle]:
        """Multiply each part with its factor whenever the network runs, by hooks.

        Args:
            net: The network.
            factors: Gives the factors (parts,) to a module that is running. Hooks are partials with it, not closures: copies of the
                network, such as its average, are to run with their own.
        """
        raise NotImplementedError

    def select(self, net: nn.Module, factors: Tensor) -> nn.Module:
        """The network with factors (parts,) in its weights, without the parts whose factor is below `least`."""
        raise NotImplementedError

    def wrap(self, model: nn.Module) -> nn.Module:
        refuse_packed(model, self.kind)  # factors may turn signs, and with them removed weights into -0.0
        count = self.count(model)
        like = next(p for p in model.parameters() if p.is_floating_point())
        model.register_buffer(SCALES, torch.ones(count).to(like))
        model.register_buffer(VELOCITY, torch.zeros(count).to(like))
        return model

    def task(self, task: TrainingTask, seed: int) -> SelectionTask:
        return SelectionTask(task, self)

    def finish(self, net: Any, images: Iterable[object], held_out: Iterable[object] = ()) -> nn.Module:
        factors = net.get_buffer(SCALES)
        for name in (SCALES, VELOCITY):
            delattr(net, name)
        with torch.no_grad():
            return self.select(net, factors)


class SelectionTask(MethodTask):
    """Trains as its task does, with a factor on each part of the network.

    Under DDP the factors' gradients are averaged over all processes.

    Args:
        task: A task of timm's, whose model was wrapped by the config.
        config: What the parts are, penalty and momentum.
    """

    def __init__(self, task: TrainingTask, config: SelectionConfig) -> None:
        super().__init__(task, nn.Module)
        self.config = config
        if not hasattr(self.net, SCALES):
            raise CompressError(f"SelectionTask: expected a network made by {type(config).__name__}.wrap, found one without factors")
        self.factors = Factors(self.net)
        with _set_aside(self.net):
            self._handles: list[Any] = config.attach(self.net, self.factors)
        self._attached = False

    @property
    def scales(self) -> Tensor:
        """The factors now, (parts,)."""
        return self.net.get_buffer(SCALES)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        if self.factors.leaf is None:  # one until the next step, which adds up the gradients of several batches as parameters do
            self.factors.leaf = self.scales.detach().requires_grad_()
        return self.task(input, target)

    def start_epoch(self, epoch: int, epochs: int, optimizer: torch.optim.Optimizer, steps: int | None = None) -> None:
        super().start_epoch(epoch, epochs, optimizer, steps)
        if not self._attached:
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._step(optimizer.param_groups[0]["lr"])))
            self._attached = True

    def end(self) -> None:
        super().end()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.factors.leaf = None

    @torch.no_grad()
    def _step(self, lr: float) -> None:
        leaf = self.factors.leaf
        if leaf is None or leaf.grad is None:
            return
        gradient, self.factors.leaf = leaf.grad, None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        velocity = self.net.get_buffer(VELOCITY)
        moved = self.scales - lr * gradient
        shrunk = moved.sign() * (moved.abs() - lr * self.config.penalty).clamp_min(0)
        velocity.copy_(shrunk - self.scales + self.config.momentum * velocity)
        # A factor that the penalty holds at zero stays there: momentum alone does not bring a part back.
        self.scales.copy_(torch.where(shrunk == 0, 0.0, shrunk + self.config.momentum * velocity))
        velocity[shrunk == 0] = 0
