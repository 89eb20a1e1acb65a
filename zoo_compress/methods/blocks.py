"""Sparse structure selection of residual blocks (Huang & Wang 2018, section 3.3): a factor on what each adds to its input."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import CompressError
from ..surgery.blocks import Block, remove_blocks, residual_blocks
from .selection import Factors, SelectionConfig


class BlocksConfig(SelectionConfig):
    """Training that removes residual blocks."""

    kind: Literal["blocks"] = "blocks"

    def count(self, model: nn.Module) -> int:
        return len(blocks_of(model))

    def attach(self, net: nn.Module, factors: Factors) -> list[RemovableHandle]:
        ends = [(end, index) for index, block in enumerate(blocks_of(net)) for end in block.ends]
        return [net.get_submodule(end).register_forward_hook(partial(_scale, factors, index)) for end, index in ends]

    def select(self, net: nn.Module, factors: Tensor) -> nn.Module:
        gone = []
        for block, factor in zip(blocks_of(net), factors, strict=True):
            if factor.abs() < self.least:
                gone.append(block.path)  # as it is: times 0, nothing would show that its end gives what it adds
                continue
            for end in block.ends:
                for parameter in net.get_submodule(end).parameters():
                    parameter.mul_(factor)
        return remove_blocks(net, gone)


def _scale(factors: Factors, index: int, module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * factors(module)[index]


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
