"""Sparse structure selection: scaling factors on residual blocks, pushed to zero while training; blocks that reach it are removed whole.

Huang & Wang 2018, Data-Driven Sparse Structure Selection for Deep Neural Networks, on residual blocks (section 3.3). What a block adds to
its input is multiplied with a factor, trained with an L1 penalty by accelerated proximal gradient in the form of their equation 10. The
factors of blocks that stay go into their weights at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from timm.task import TrainingTask
from torch import Tensor, nn

from ..errors import CompressError
from ..surgery.blocks import Block, remove_blocks, residual_blocks
from ..training.config import Fraction
from ..training.task import MethodConfig, MethodTask

SCALES, VELOCITY = "block_scales", "block_velocity"
"""Names of the buffers that a network has while its blocks are selected."""


class BlocksConfig(MethodConfig):
    """Training that removes residual blocks.

    Attributes:
        penalty: of the sum of the factors' magnitudes, beside the loss; γ in the paper, which takes 5e-3 to 1e-2.
        momentum: of the accelerated proximal gradient.
        least: blocks whose factor ends below this magnitude are removed.
    """

    changes = True
    kind: Literal["blocks"] = "blocks"
    penalty: Annotated[float, Field(gt=0)] = 1e-2
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    least: Fraction = 0.01

    def wrap(self, model: nn.Module) -> nn.Module:
        count = len(blocks_of(model))
        like = next(p for p in model.parameters() if p.is_floating_point())
        model.register_buffer(SCALES, torch.ones(count).to(like))
        model.register_buffer(VELOCITY, torch.zeros(count).to(like))
        return model

    def task(self, task: TrainingTask, seed: int) -> BlocksTask:
        return BlocksTask(task, self)

    def finish(self, net: Any, images: Iterable[object], held_out: Iterable[object] = ()) -> nn.Module:
        scales = net.get_buffer(SCALES).tolist()
        for name in (SCALES, VELOCITY):
            delattr(net, name)
        blocks = blocks_of(net)
        gone = [block.path for block, scale in zip(blocks, scales, strict=True) if abs(scale) < self.least]
        with torch.no_grad():
            for block, scale in zip(blocks, scales, strict=True):
                for end in block.ends:
                    for parameter in net.get_submodule(end).parameters():
                        parameter.mul_(scale)
        return remove_blocks(net, gone)


def blocks_of(model: nn.Module) -> list[Block]:
    """The residual blocks of a model, in their order.

    Raises:
        CompressError: If it has none that could be removed, with the reasons.
    """
    found, refused = residual_blocks(model)
    if not found:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(refused.items())[:3])
        raise CompressError(f"blocks: {type(model).__name__} has no residual block that can be removed ({reasons or 'none was seen'})")
    return list(found.values())


class BlocksTask(MethodTask):
    """Trains as its task does, with a factor on what each residual block adds.

    Under DDP the factors' gradients are averaged over all processes.

    Args:
        task: A task of timm's, whose model was wrapped by `BlocksConfig.wrap`.
        config: Penalty and momentum.
    """

    def __init__(self, task: TrainingTask, config: BlocksConfig) -> None:
        super().__init__(task, nn.Module)
        self.config = config
        if not hasattr(self.net, SCALES):
            raise CompressError("BlocksTask: expected a network made by BlocksConfig.wrap, found one without factors")
        self._current: Tensor | None = None
        self._handles = [
            self.net.get_submodule(end).register_forward_hook(self._scale(index))
            for index, block in enumerate(blocks_of(self.net))
            for end in block.ends
        ]
        self._attached = False

    @property
    def scales(self) -> Tensor:
        """The factors now, (blocks,)."""
        return self.net.get_buffer(SCALES)

    def _scale(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            factors = self._current if self._current is not None and module.training else self.scales
            return out * factors[index]

        return hook

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        self._current = self.scales.detach().clone().requires_grad_()
        return self.task(input, target)

    def start_epoch(self, epoch: int, epochs: int, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
        super().start_epoch(epoch, epochs, optimizer, steps)
        if not self._attached:
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._step(optimizer.param_groups[0]["lr"])))
            self._attached = True

    def end(self) -> None:
        super().end()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._current = None

    @torch.no_grad()
    def _step(self, lr: float) -> None:
        if self._current is None or self._current.grad is None:
            return
        gradient, self._current = self._current.grad, None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        velocity = self.net.get_buffer(VELOCITY)
        moved = self.scales - lr * gradient
        shrunk = moved.sign() * (moved.abs() - lr * self.config.penalty).clamp_min(0)
        velocity.copy_(shrunk - self.scales + self.config.momentum * velocity)
        # A factor that the penalty holds at zero stays there: momentum alone does not bring a block back.
        self.scales.copy_(torch.where(shrunk == 0, 0.0, shrunk + self.config.momentum * velocity))
        velocity[shrunk == 0] = 0
