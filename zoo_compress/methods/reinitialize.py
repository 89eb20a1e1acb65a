"""Starting over: the structure stays, the weights are drawn anew, as the architecture it was made of draws them.

What a pruned model is to be compared with (Liu et al. 2019, Rethinking the Value of Network Pruning).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from timm.models import create_model
from torch import Tensor, nn

from ..errors import CompressError
from ..structure.packed import Packing
from ..surgery.masks import apply_, masks_of
from ..surgery.modules import copied, statistics, takes_model
from ..surgery.origin import forget_packed, fresh_base, packed_of
from ..training.task import ChangeConfig

# Deviation times the root of the fan, of initialisations whose deviation follows the fan: He et al. 2015, LeCun et al. 1998, and torch's
# default for layers (uniform within 1 / sqrt(fan)).
_GAINS = (math.sqrt(2), 1.0, 1 / math.sqrt(3))
_Fan: TypeAlias = Literal["ins", "outs", "both"]
_Law: TypeAlias = tuple[_Fan, float]
_LAWS: tuple[_Law, ...] = tuple((fan, gain) for fan in get_args(_Fan) for gain in _GAINS)


class ReinitializeConfig(ChangeConfig):
    """Draw the weights anew; see `reinitialize`."""

    noun = "re-initialising"
    kind: Literal["reinitialize"] = "reinitialize"

    def apply(self, model: nn.Module, images: Iterable[object], seed: int) -> nn.Module:
        return reinitialize(model, seed)


@takes_model
def reinitialize(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a model, compressed or not, with the weights it would have before any training.

    The architecture it was made of is created anew, and its random weights are cut to the model's shapes. Where their deviation follows
    the number of inputs or outputs (He, LeCun, Glorot, torch's default) it is scaled to the model's numbers. Weights the architecture
    does not have, such as heads of exits, are initialised by their layers (`reset_parameters`). Running statistics start over; other
    buffers stay. Removed weights stay removed; weights that shared values do not any more.

    Args:
        model: A model that timm's factory made.
        seed: Of the weights.

    Raises:
        CompressError: If it is none, or a layer has no way to initialise itself.
    """
    base = fresh_base(model)
    if base is None:
        raise CompressError(f"reinitialize: expected a model made by timm, which says what it is made of; {type(model).__name__} does not")
    fresh = copied(model)
    kept = {name for names in statistics(fresh).values() for name in names}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        start = create_model(base[0], **base[1]).state_dict(keep_vars=True)
        laws = _laws(start.values())
        _reset_others(fresh, start.keys())
        for name, tensor in fresh.named_parameters():
            if name in start:
                tensor.copy_(_drawn(start[name].detach(), tensor.shape, laws))
        for name, buffer in fresh.named_buffers():
            if name in start and name in kept:
                buffer.copy_(_drawn(start[name], buffer.shape, laws))
    masked = [name for name, packing in packed_of(model).items() if packing.mask]
    apply_(fresh, masks_of(model, masked))
    forget_packed(fresh, dict.fromkeys(masked, Packing(mask=True)))
    return fresh


def _reset_others(model: nn.Module, known: Any) -> None:
    for path, module in model.named_modules():
        own = [f"{path}.{key}" if path else key for key, _ in module.named_parameters(recurse=False)]
        if all(name in known for name in own):
            continue
        reset = getattr(module, "reset_parameters", None)
        if not callable(reset):
            raise CompressError(f"reinitialize: {path or 'the model'} has weights that its architecture has not, and no reset_parameters()")
        reset()


def _drawn(start: Tensor, shape: torch.Size, laws: Sequence[_Law]) -> Tensor:
    """Values of a tensor's initialisation for another shape."""
    if start.shape == shape:
        return start
    if start.ndim == len(shape) and all(n >= wanted for n, wanted in zip(start.shape, shape, strict=True)):
        values = start[tuple(slice(wanted) for wanted in shape)]
    elif start.is_floating_point() and start.numel() > 1:
        values = start.mean() + start.std(correction=0) * torch.randn(shape, device=start.device, dtype=start.dtype)
    else:
        values = start.reshape(-1)[:1].expand(shape)
    return values * _rescale(start, shape, laws)


def _laws(tensors: Iterable[Tensor]) -> list[_Law]:
    """The laws that deviations may follow, those first that most of an architecture's tensors do: single ones may fit several by chance,
    such as both fans of a square matrix, or LeCun's of the inputs where there are half as many as He's counts outputs."""
    found = Counter(law for tensor in tensors for law in _followed(tensor, _LAWS))
    return sorted(_LAWS, key=lambda law: -found[law])


def _followed(start: Tensor, laws: Sequence[_Law]) -> list[_Law]:
    """Those of some laws that a tensor's deviation may follow."""
    if start.ndim < 2 or start.numel() < 16 or not start.is_floating_point():
        return []
    near = 3 / math.sqrt(2 * start.numel())  # three times the relative error of a deviation estimated from so many values
    deviation = float(start.detach().float().std(correction=0))
    return [law for law in laws if abs(deviation * math.sqrt(_fan(start.shape, law)) / law[1] - 1) < near]


def _rescale(start: Tensor, shape: torch.Size, laws: Sequence[_Law]) -> float:
    """By how much a deviation that follows the fan grows, where this tensor's does; else 1."""
    followed = _followed(start, laws) if len(shape) == start.ndim else []
    return math.sqrt(_fan(start.shape, followed[0]) / _fan(shape, followed[0])) if followed else 1.0


def _fan(shape: torch.Size, law: _Law) -> float:
    field = math.prod(shape[2:])
    return {"ins": shape[1] * field, "outs": shape[0] * field, "both": (shape[0] + shape[1]) * field / 2}[law[0]]
