"""Sparse by training: weights are removed little by little while the network learns, and may be replaced by others.

Zhu & Gupta 2017, To Prune, or Not to Prune, section 3. Replacing: Mocanu et al. 2018 (SET), Evci et al. 2020, Rigging the Lottery (RigL).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from timm.task import TrainingTask
from torch import Tensor, nn

from ..errors import CompressError
from ..structure.packed import Packing
from ..surgery.masks import density as density_of
from ..surgery.masks import keep_best, mask_, masks_in_force, pack_masks, unpack_masks
from ..surgery.origin import packed_of, stamp_packed
from ..surgery.weights import layer_weights
from ..training.config import Count, Fraction
from ..training.keep import Keeper
from ..training.task import MethodConfig, MethodTask


class GradualConfig(MethodConfig):
    """Removing weights while training.

    Attributes:
        density: fraction of the weights of convolutions and linear layers to end with.
        start: part of the training after which removing begins.
        end: part of the training after which no weight is removed or replaced any more.
        every: steps from one removal to the next.
        scope: `global` ranks all weights together, `local` those of each layer. A layer of a sparse model that has fewer left than its
            fraction keeps those, unless some are replaced: the density is then below the one asked for.
        exclude: patterns of parameter names to leave alone.
        regrow: fraction of the weights left that is replaced each time at first; it falls to 0 along a cosine.
        regrow_by: what replaces them: those of the largest `gradient` (RigL), or `random` ones (SET).
    """

    compresses = True
    kind: Literal["gradual"] = "gradual"
    density: Annotated[float, Field(gt=0, lt=1)]
    start: Fraction = 0.0
    end: Fraction = 0.75
    every: Count = 100
    scope: Literal["global", "local"] = "global"
    exclude: Annotated[tuple[str, ...], Field(strict=False)] = ()
    regrow: Annotated[float, Field(ge=0, lt=1)] = 0.0
    regrow_by: Literal["gradient", "random"] = "gradient"

    @model_validator(mode="after")
    def _starts_before_it_ends(self) -> GradualConfig:
        if self.start >= self.end:
            raise ValueError(f"expected start below end ({self.end:g}), found {self.start:g}")
        return self

    @property
    def removes(self) -> bool:
        return True

    def wrap(self, model: nn.Module) -> nn.Module:
        shared = next((name for name, packing in packed_of(model).items() if packing.bits is not None), None)
        if shared is not None:
            raise CompressError(f"gradual: expected a model without shared weights, which would be lost, found some in {shared!r}")
        left = density_of(masks_in_force(model, layer_weights(model, self.exclude)))
        if self.density > left:
            raise CompressError(
                f"gradual: density: expected at most the {left:.4g} that is left of the model's weights, found {self.density}"
            )
        return model

    def task(self, task: TrainingTask, seed: int) -> GradualTask:
        return GradualTask(task, self, seed)

    def finish(self, net: Any, images: Iterable[object], held_out: Iterable[object] = ()) -> nn.Module:
        stamp_packed(net, "sparse", dict.fromkeys(layer_weights(net, self.exclude), Packing(mask=True)))
        return net


class GradualTask(MethodTask):
    """Trains as its task does; after some steps the weights of least magnitude are removed, and perhaps replaced.

    Under DDP all processes remove the same: gradients that choose what replaces are added up over them.

    Args:
        task: A task of timm's.
        config: How many, and when.
        seed: Of random replacements.
    """

    def __init__(self, task: TrainingTask, config: GradualConfig, seed: int = 0) -> None:
        super().__init__(task, nn.Module)
        self.config, self.seed = config, seed
        self.weights = layer_weights(self.net, config.exclude)
        # Layers that are left alone keep the zeros that they came with.
        self.keeper = Keeper(self.net, {name: packing for name, packing in packed_of(self.net).items() if name not in self.weights})
        self.keeper.masks |= masks_in_force(self.net, self.weights)
        self.initial = density_of(self.masks)
        self.gradients: dict[str, Tensor] = {}
        self.steps = 0
        self._handles: list[Any] = []

    @property
    def masks(self) -> dict[str, Tensor]:
        """What is left now of the weights that this removes."""
        return {name: self.keeper.masks[name] for name in self.weights}

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        return self.task(input, target)

    def start_epoch(self, epoch: int, epochs: int, optimizer: torch.optim.Optimizer, steps: int | None = None) -> None:
        super().start_epoch(epoch, epochs, optimizer, steps)
        if steps is None:
            raise CompressError("gradual: start_epoch: expected steps, of the optimizer in an epoch, over which weights go; found none")
        self.steps = epochs * steps
        if not self._handles:
            self._handles = [weight.register_hook(self._see(name)) for name, weight in self.weights.items() if weight.requires_grad]
            self.keeper.attach(optimizer)
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._step()))

    def end(self) -> None:
        super().end()
        self.keeper.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def prepare_evaluation(self, net: Any, images: Iterable[object]) -> None:
        super().prepare_evaluation(net, images)
        self.keeper.restore_(net)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        state = super().get_task_state(module, ema)
        return {**state, "masks": pack_masks(self.masks)} if state else state

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        super().load_task_state(state, strict, module, ema)
        if state:
            self.keeper.masks |= unpack_masks(state["masks"], "training state")

    def density(self, step: int) -> float:
        """Density after so many steps (Zhu & Gupta 2017, equation 1)."""
        first, last = self._bounds
        part = min(1.0, max(0.0, (step - first) / max(1, last - first)))
        return self.config.density + (self.initial - self.config.density) * (1 - part) ** 3

    @property
    def _bounds(self) -> tuple[int, int]:
        """The steps after which weights are removed for the first and the last time."""
        last = max(1, round(self.config.end * self.steps))
        return min(round(self.config.start * self.steps) + 1, last), last

    def _due(self, step: int) -> bool:
        first, last = self._bounds
        return first <= step <= last and ((step - first) % self.config.every == 0 or step == last)

    def _see(self, name: str) -> Any:
        def see(gradient: Tensor) -> None:
            if self.config.regrow and self.config.regrow_by == "gradient" and self._due(self.draws + 1):
                earlier = self.gradients.get(name)
                # That of a step which was not taken, its gradients being infinite in half precision, is no part of this one's.
                if earlier is not None and (self.weights[name].grad is None or not bool(earlier.isfinite().all())):
                    earlier = None
                self.gradients[name] = gradient.detach().clone() if earlier is None else earlier + gradient

        return see

    @torch.no_grad()
    def _step(self) -> None:
        self.take_draw()
        if not self._due(self.draws):
            return
        scores = {name: weight.detach().abs() for name, weight in self.weights.items()}
        wanted, scope = self.density(self.draws), self.config.scope
        replaced = self._replaced()
        masks = keep_best(scores, wanted * (1 - replaced), scope, self.masks)
        if replaced:
            # Those that stay are above all others; the rest is filled up by what promises most.
            grown = {name: torch.where(mask, torch.inf, score) for (name, mask), score in zip(masks.items(), self._promise(), strict=True)}
            masks = keep_best(grown, wanted, scope)
        before = self.masks
        for name, mask in masks.items():
            weight = self.weights[name]
            weight[mask & ~before[name].to(mask.device)] = 0  # as RigL does
            mask_(weight, mask)
        self.keeper.masks |= masks
        self.gradients.clear()

    def _replaced(self) -> float:
        """Fraction of what is left to replace now (Evci et al. 2020, section 3, update schedule)."""
        first, last = self._bounds
        part = (self.draws - first) / max(1, last - first)
        return self.config.regrow / 2 * (1 + math.cos(math.pi * part))

    def _promise(self) -> Iterable[Tensor]:
        """Scores of what to replace weights by."""
        if self.config.regrow_by == "random":
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.draws)
            return [torch.rand(weight.shape, generator=generator).to(weight.device) for weight in self.weights.values()]
        found = [self.gradients.get(name, torch.zeros_like(weight)) for name, weight in self.weights.items()]
        if dist.is_available() and dist.is_initialized():
            for gradient in found:
                dist.all_reduce(gradient)
        return [gradient.abs() for gradient in found]
