"""NetAug: a tiny network trained as the first part of a larger one, which exists in training only.

Cai et al. 2022, Network Augmentation for Tiny Deep Learning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..errors import CompressError
from ..structure import terms
from ..structure.bank import Choice
from ..structure.layout import Layout, parse
from ..structure.widths import Group
from ..surgery.calibrate import calibrate
from ..surgery.elastic import Elastic, make_elastic_
from ..surgery.grow import grow, growable
from ..surgery.modules import get_tensor, statistics, takes_model
from ..surgery.origin import refuse_packed
from ..surgery.resize import check_fits, reindex
from ..surgery.trace import analyze, input_for
from ..surgery.tracer import named_tensors
from ..surgery.verify import check_runs
from ..training.config import Count
from ..training.task import MethodConfig, MethodTask

ROUND_TO = 8
"""Preferred multiple for augmented sizes."""

RESIDUAL_UNTIL = 0.5
"""Part of the training in which residual widths are augmented too."""


class NetAugConfig(MethodConfig):
    """Training inside a larger network.

    Attributes:
        r: width of the largest network, in base widths.
        s: number of steps from the base width to that; the paper's best is r=3, s=3.
        alpha: weight of the augmented network's loss.
        sort: bring the most important inner channels into the base at each epoch's start.
        sort_momentum: take the optimizer's state along.
    """

    kind: Literal["netaug"] = "netaug"
    r: Annotated[float, Field(ge=1)] = 3
    s: Count = 3
    alpha: Annotated[float, Field(ge=0)] = 1.0
    sort: bool = True
    sort_momentum: bool = True

    def wrap(self, model: nn.Module) -> Augmented:
        return netaug(model, self.r, self.s)

    def task(self, task: TrainingTask, seed: int) -> NetAugTask:
        return NetAugTask(task, alpha=self.alpha, sort=self.sort, sort_momentum=self.sort_momentum, seed=seed)

    def finish(self, net: Any, images: Iterable[object], held_out: Iterable[object] = ()) -> nn.Module:
        return net.export()


@dataclass(frozen=True)
class _Settings:
    """What an augmented network remembers.

    Attributes:
        base: Axis → its size in the base.
        points: Group of axes → the sizes it is drawn from, the base's first.
        inner: Axes written by one layer only.
        cfg: timm's cfg of the base.
        args: Its construction arguments.
    """

    base: dict[str, int]
    points: tuple[tuple[Group, tuple[dict[str, int], ...]], ...]
    inner: frozenset[str]
    cfg: Any
    args: Any


class Augmented(Elastic):
    """A network that is the first part of a larger one. At rest, and in evaluation, it is the base."""

    def set_base(self) -> None:
        """Choose the widths of the base."""
        self._choose(self._settings.base)

    def draw(self, generator: np.random.Generator, *, residual: bool = True) -> None:
        """Choose random widths, each group of axes by itself, between the base's and the largest.

        Args:
            generator: The source of randomness.
            residual: Whether axes that several layers write are augmented too.
        """
        chosen = dict(self._settings.base)
        for group, sizes in self._settings.points:
            drawn = sizes[int(generator.integers(len(sizes)))]
            if residual or self._settings.inner.issuperset(group.axes):
                chosen.update(drawn)
        self._choose(chosen)

    def export(self) -> nn.Module:
        """The base alone: a model of the architecture this one was made of, with nothing added."""
        widths = self._elastic.sizes
        self.set_base()
        try:
            small = self.static()
        finally:
            self._choose(widths)
        settings = self._settings
        for name, value in (("pretrained_cfg", settings.cfg), ("default_cfg", settings.cfg), ("_model_args", settings.args)):
            if value is not None:
                setattr(small, name, value)
        return small

    @torch.no_grad()
    def sort_(self, optimizer: torch.optim.Optimizer | None = None, orders: Mapping[str, np.ndarray] | None = None) -> None:
        """Bring the elements of every inner axis into another order.

        The whole stays the same function; the base takes over the best. Statistics of the base have to be found again.

        Args:
            optimizer: Its state is taken along.
            orders: Axis → its elements in their new order; the network's own `orders` unless given.
        """
        layout, tensors = self.layout, dict(named_tensors(self))
        picks = dict(self.orders() if orders is None else orders)
        for name, dims in layout.params.items():
            sorted_tensor = reindex(tensors[name].detach(), dims, layout, picks)
            if sorted_tensor is None:
                continue
            state = optimizer.state.get(tensors[name], {}) if optimizer is not None else {}
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == tensors[name].shape:
                    value.copy_(reindex(value, dims, layout, picks))  # type: ignore[arg-type]
            tensors[name].copy_(sorted_tensor)

    def orders(self) -> dict[str, np.ndarray]:
        """Inner axis → its elements, the most important first: those whose weights in the next layers sum up to most."""
        return {axis: order for axis in sorted(self._settings.inner) if (order := self._order(axis)) is not None}

    def _order(self, axis: str) -> np.ndarray | None:
        """Elements of an axis by the sum of the absolute weights that read them, the greatest first."""
        total = None
        for name, dims in self.layout.params.items():
            if name not in self.layout.trained or len(dims) < 2 or axis not in terms.axes(parse(dims[1])):
                continue
            places = terms.positions(parse(dims[1]), self.layout.base_sizes, axis)
            sums = get_tensor(self, name).detach().abs().movedim(1, 0).flatten(1).sum(1).cpu().numpy()
            found = sums[places].sum(1)
            total = found if total is None else total + found
        return None if total is None else np.argsort(-total, kind="stable")

    @property
    def _settings(self) -> _Settings:
        return self._elastic.settings


@takes_model
def netaug(model: nn.Module, r: float = 3, s: int = 3, *, layout: Layout | None = None) -> Augmented:
    """A larger network around a model, for training it.

    Args:
        model: The base; pruned ones too. It is not changed.
        r: Width of the largest network, in base widths.
        s: Number of steps to it: widths are drawn from s + 1 evenly spaced ones, from the base's to r times that.
        layout: The model's layout, if it is known already.

    Returns:
        The network. It computes what the model does until it is trained.

    Raises:
        CompressError: If r or s is below 1, or no axis of the model may grow.
    """
    if isinstance(r, bool) or not isinstance(r, (int, float)) or not math.isfinite(r) or r < 1:
        raise CompressError(f"netaug: expected r, the largest width in base widths, of at least 1, found {r!r}")
    if isinstance(s, bool) or not isinstance(s, int) or s < 1:
        raise CompressError(f"netaug: expected s, a number of steps of at least 1, found {s!r}")
    if isinstance(model, Elastic):
        raise CompressError(f"netaug: {type(model).__name__} runs at several widths already; export one of them first")
    refuse_packed(model, "netaug")
    layout = analyze(model) if layout is None else layout
    check_fits(model, layout)
    layout = layout.settled()
    movable = growable(model, layout)
    if not movable:
        raise CompressError(f"netaug: no axis of {type(model).__name__} may grow")
    largest = {name: size for group in movable for name, size in group.at(round(r * group.steps)).items()}
    bank, grown = grow(model, layout, largest)
    check_runs(bank, layout, largest, input_for(bank, layout))
    settings = _Settings(
        base=dict(layout.base_sizes),
        points=tuple((group, _points(group, r, s)) for group in movable),
        inner=frozenset(name for group in movable for name in group.axes if _is_inner(layout, name)),
        cfg=getattr(model, "pretrained_cfg", None),
        args=getattr(model, "_model_args", None),
    )
    net = make_elastic_(bank.train(model.training), grown, Augmented, settings)
    own = {name: get_tensor(model, name) for names in statistics(model).values() for name in names if name not in layout.trained}
    net.add_choice(Choice(sizes=settings.base), own)
    net.set_base()
    return net


def _points(group: Group, r: float, s: int) -> tuple[dict[str, int], ...]:
    """Sizes of a group at s + 1 evenly spaced widths: the base's, rounded ones, and the largest."""
    most = round(r * group.steps)
    whole = Group(group.axes, tuple(group.at(most)[name] for name in group.axes), most)
    between = (max(group.steps, whole.near((1 + (r - 1) * k / s) / r, ROUND_TO)) for k in range(1, s))
    return tuple(whole.at(step) for step in (group.steps, *between, most))


def _is_inner(layout: Layout, axis: str) -> bool:
    """Whether one layer only writes the elements of an axis, so that no residual addition holds them together with others'."""
    writers = 0
    for name, dims in layout.params.items():
        if name in layout.trained and len(dims) > 1 and axis in terms.axes(parse(dims[0])):
            read = parse(dims[1])
            writers += not (isinstance(read, int) and read == 1)  # a depthwise layer passes on what another has written
    return writers == 1


class NetAugTask(MethodTask):
    """A step of the base and one of a larger network around it, drawn anew each time; the losses are added up.

    Under DDP all processes draw the same: the draw follows from the seed and the number of draws before it.

    Args:
        task: A task of timm's whose model is `Augmented`.
        alpha: Weight of the larger network's loss.
        sort: Bring the most important inner channels into the base at each epoch's start.
        sort_momentum: Take the optimizer's state along.
        seed: Of the draws.
    """

    def __init__(self, task: TrainingTask, *, alpha: float = 1.0, sort: bool = True, sort_momentum: bool = True, seed: int = 0) -> None:
        super().__init__(task, Augmented)
        self.alpha, self.sort, self.sort_momentum, self.seed = alpha, sort, sort_momentum, seed
        self.residual = True

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        net: Augmented = self.net
        net.set_base()
        base = self.task(input, target)
        net.draw(np.random.default_rng([self.seed, self.take_draw()]), residual=self.residual)
        augmented = self.task(input, target)
        net.set_base()
        return {**base, "loss": base["loss"] + self.alpha * augmented["loss"], "base_loss": base["loss"], "aug_loss": augmented["loss"]}

    def start_epoch(self, epoch: int, epochs: int, optimizer: torch.optim.Optimizer, steps: int | None = None) -> None:
        self.residual = epoch < RESIDUAL_UNTIL * epochs
        if self.sort:
            orders = self.net.orders()
            self.net.sort_(optimizer if self.sort_momentum else None, orders)
            if self.has_ema():  # in the network's order, not in its own: what is averaged are the same channels
                unwrap_model(self.get_trainable_module(ema=True)).sort_(orders=orders)

    def prepare_evaluation(self, net: Augmented, images: Iterable[object]) -> None:
        calibrate(net, net._settings.base, images)
