"""Importance criteria: torch-pruning's, on groups written from the layout.

A group gathers, for one axis, every layer the axis runs through. Convolution and linear weights are handed over with the axis gathered
into one dimension, (elements, everything else), so that heads, groups and concatenations score like plain channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from ..errors import CompressError
from ..structure import terms
from ..structure.layout import Layout, parse
from ..surgery.images import fitting
from ..surgery.modules import clear_caches, copied, every_output, in_eval_mode
from ..surgery.modules import statistics as running
from ..surgery.uses import Weight, other_weights, plain_weights

Data = Iterable[tuple[torch.Tensor, torch.Tensor]]
Statistic = Callable[[nn.Module, Data], "dict[str, torch.Tensor]"]


@dataclass(frozen=True, slots=True)
class Criterion:
    """One importance criterion.

    Attributes:
        importance: Name of the class in `torch_pruning.importance`; None for criteria that `damage.damage_scores` works out.
        arguments: Its arguments.
        statistic: What to gather from data before scoring: parameter name → tensor of its shape; None for criteria on weights alone.
        source: The paper.
    """

    importance: str | None
    arguments: dict[str, Any] = field(default_factory=dict)
    statistic: Statistic | None = None
    source: str = ""


def fitted(model: nn.Module, data: Data, desc: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of images and class indices where a model is, the images in the precision of its weights.

    Raises:
        TypeError: If they are something else.
    """
    for images, target in tqdm(data, desc=desc, unit="batch", leave=False):
        if not isinstance(images, torch.Tensor) or not images.is_floating_point() or not isinstance(target, torch.Tensor):
            raise TypeError(f"expected float images and class indices, found {_kind(images)} and {_kind(target)}")
        images = fitting(model, images)
        yield images, target.to(images.device)


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def cross_entropy(model: nn.Module, images: torch.Tensor, target: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Cross-entropy of a model's logits over a temperature, added up over all that it gives."""
    output = model(images)
    every = output if isinstance(output, list) else [output]
    return torch.stack([F.cross_entropy(logits / temperature, target) for logits in every]).sum()


def gradient(model: nn.Module, data: Data) -> dict[str, torch.Tensor]:
    """Gradient of the cross-entropy, summed over batches."""
    model.zero_grad()
    for images, target in fitted(model, data, "gradients"):
        cross_entropy(model, images, target).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def squared_gradient(model: nn.Module, data: Data) -> dict[str, torch.Tensor]:
    """Mean over samples of the squared gradient of each sample's cross-entropy: the diagonal of the empirical Fisher information."""
    total: dict[str, torch.Tensor] = {}
    samples = 0
    for images, target in fitted(model, data, "per-sample gradients"):
        for image, label in zip(images.split(1), target.split(1), strict=True):
            model.zero_grad()
            cross_entropy(model, image, label).backward()
            samples += 1
            for name, p in model.named_parameters():
                if p.grad is not None:
                    total[name] = total.get(name, 0) + p.grad**2
    return {name: value / samples for name, value in total.items()}


CRITERIA: dict[str, Criterion] = {
    "l1": Criterion("GroupMagnitudeImportance", {"p": 1}, source="Li et al. 2017, Pruning Filters for Efficient ConvNets"),
    "l2": Criterion("GroupMagnitudeImportance", {"p": 2}, source="Fang et al. 2023, DepGraph"),
    "bn_scale": Criterion("BNScaleImportance", source="Liu et al. 2017, Network Slimming"),
    "slimming": Criterion("BNScaleImportance", {"normalizer": None}, source="the same, by one threshold on scales over all layers"),
    "lamp": Criterion("LAMPImportance", source="Lee et al. 2021, Layer-adaptive Sparsity for Magnitude-based Pruning"),
    "fpgm": Criterion("FPGMImportance", source="He et al. 2019, Filter Pruning via Geometric Median"),
    "random": Criterion("RandomImportance", source="baseline"),
    "taylor": Criterion("GroupTaylorImportance", statistic=gradient, source="Molchanov et al. 2019, Importance Estimation for Pruning"),
    "hessian": Criterion("GroupHessianImportance", statistic=squared_gradient, source="LeCun et al. 1989, Optimal Brain Damage"),
    "thinet": Criterion(None, source="Luo et al. 2017, ThiNet; see damage"),
    "obdc": Criterion("OBDCImportance", {"num_classes": -1}, statistic=squared_gradient, source="Wang et al. 2019, EigenDamage, section 3"),
}


def lookup(criterion: str) -> Criterion:
    """The criterion of that name.

    Raises:
        CompressError: If there is none.
    """
    found = CRITERIA.get(criterion)
    if found is None:
        raise CompressError(f"criterion: expected one of {', '.join(CRITERIA)}, found {criterion!r}")
    return found


def by_weights(criterion: str) -> bool:
    """Whether a criterion looks at nothing but a model's weights."""
    chosen = lookup(criterion)
    return chosen.importance is not None and chosen.statistic is None


def scores(
    model: nn.Module, layout: Layout, names: Iterable[str], criterion: str, data: Data | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Importance of every element of the given axes, normalised per axis as the criterion does (usually to a mean of 1).

    Args:
        model: The model, not changed.
        layout: Its layout.
        names: Axes to score.
        criterion: A key of `CRITERIA` that has an importance.
        data: Batches of (images (batch, channels, height, width), class indices (batch,)) for criteria that need them.
        seed: For the random criterion.

    Returns:
        Axis → float array (size,). Axes the criterion says nothing about (no BatchNorm on it, say) are missing.

    Raises:
        CompressError: If the criterion is unknown, or needs data and there is none.
    """
    from torch_pruning.pruner import importance

    chosen = lookup(criterion)
    if chosen.importance is None:
        raise ValueError(f"criterion {criterion!r} is no importance of torch-pruning")
    statistics: dict[str, torch.Tensor] = {}
    if chosen.statistic is not None:
        statistics = gather(model, chosen.statistic, criterion, data)
    others = [] if criterion == "random" else _rankable(other_weights(model, layout), model, layout, statistics, chosen)
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in names:
            scorer = getattr(importance, chosen.importance)(**chosen.arguments)
            if criterion == "random":  # looks at nothing but how many elements there are
                items = [_Item(SimpleNamespace(), list(range(layout.axes[name].size)), [])]
            else:
                items = _items(model, layout, name, statistics, scorer, others)
            group = _Group(items)
            score = scorer(group) if len(group) else None
            if score is not None and len(score) == layout.axes[name].size and bool(torch.isfinite(score).all()):
                found[name] = score.detach().double().cpu().numpy()
    return found


def gather(
    model: nn.Module, statistic: Statistic, criterion: str, data: Data | None, *, batch_statistics: bool = False
) -> dict[str, torch.Tensor]:
    """A statistic of data: parameter name → tensor of its shape.

    Args:
        model: The model, not changed; a copy of it runs in eval mode.
        statistic: The function that gathers.
        criterion: What it is for, for messages.
        data: Batches of (images, class indices).
        batch_statistics: Let layers with running statistics use those of each batch instead.

    Raises:
        CompressError: If there is no data, or none that the model takes.
    """
    if data is None:
        raise CompressError(f"criterion {criterion!r} looks at data: pass data=, an iterable of (images, class indices) batches")
    subject = in_eval_mode(copied(model)).requires_grad_(True)
    if batch_statistics:
        for path in running(subject):
            subject.get_submodule(path).train()
    # Some keep what they computed of their weights for the next image, and with it the graph of a backward pass that is over.
    subject.register_forward_pre_hook(lambda *_: clear_caches(subject))
    try:
        with every_output(subject), torch.enable_grad():  # wherever this is called
            found = statistic(subject, data)
    except CompressError as error:
        raise CompressError(f"criterion {criterion!r}: {error}") from error
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise CompressError(f"data: expected batches of (images, class indices) that the model takes: {error}") from error
    if not found:
        raise CompressError("data: expected at least one batch of (images, class indices), found none")
    return found


@dataclass(slots=True)
class _Item:
    """One entry of a torch-pruning group: a layer, the positions of the axis in it, and the element of the axis at each position."""

    dep: Any
    idxs: list[int]
    root_idxs: list[int]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.dep, self.idxs))


class _Group(list[_Item]):
    """What torch-pruning's importance classes need of a `torch_pruning.Group`."""


def _rankable(
    weights: list[Weight], model: nn.Module, layout: Layout, statistics: dict[str, torch.Tensor], criterion: Criterion
) -> list[Weight]:
    """The weights as a criterion can rank them: where it needs gradients, the parameters they are computed of."""
    if criterion.statistic is None:
        return weights
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found: dict[str, Weight] = {}
    for weight in weights:
        for name in sorted(weight.sources - plain_weights(model).keys() & statistics.keys()):
            if tensors[name].ndim > 1:
                # Where what is used is zero, so is what it is computed of: a criterion may look at the value apart from the gradient.
                masked = weight.values.shape == tensors[name].shape and weight.dims == layout.params[name]
                values = tensors[name] * (weight.values.to(tensors[name].device) != 0) if masked else tensors[name]
                found.setdefault(name, Weight(values, layout.params[name], frozenset({name})))
    return list(found.values())


def _items(
    model: nn.Module, layout: Layout, axis: str, statistics: dict[str, torch.Tensor], scorer: Any, others: Sequence[Weight]
) -> list[_Item]:
    """What an axis runs through: the plain weights of convolutions and linear layers, scales of norms, and all other weights."""
    from torch_pruning.pruner import function

    items = []
    computed = {name for weight in others if len(weight.sources) > 1 for name in weight.sources}
    for path, module in model.named_modules():
        name = f"{path}.weight" if path else "weight"
        dims = layout.params.get(name)
        if dims is None or name in computed or not any(axis in terms.axes(parse(d)) for d in dims):
            continue
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            outputs = 1 if getattr(module, "transposed", False) else 0
            items += _gathered(module.weight, dims, (outputs, 1 - outputs), layout, axis, statistics.get(name), scorer)
        elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)) and len(dims) == 1:
            labels = terms.labels(parse(dims[0]), layout.base_sizes, axis)
            handler = function.prune_layernorm_out_channels if isinstance(module, nn.LayerNorm) else function.prune_batchnorm_out_channels
            layer = module
            if name in statistics:
                layer = copy.copy(module)
                layer._parameters = dict(module._parameters)
                layer.weight = nn.Parameter(module.weight.detach().clone())
                layer.weight.grad = statistics[name]
            positions = np.flatnonzero(labels >= 0)
            items.append(_Item(_dependency(layer, handler), positions.tolist(), labels[positions].tolist()))
    for weight in others:
        statistic = next((statistics[name] for name in weight.sources if name in statistics), None)
        items += _gathered(weight.values, weight.dims, range(len(weight.dims)), layout, axis, statistic, scorer)
    return items


def _gathered(
    weight: torch.Tensor,
    dims: Sequence[str],
    along: Iterable[int],
    layout: Layout,
    axis: str,
    statistic: torch.Tensor | None,
    scorer: Any,
) -> list[_Item]:
    """A weight once for each of its dimensions that the axis runs along; the first of those named is the outputs'."""
    items = []
    for i, d in enumerate(along):
        rows = terms.positions(parse(dims[d]), layout.base_sizes, axis)
        if len(rows):
            items.append(_weights(weight, d, rows, statistic, scorer, is_output=i == 0))
    return items


def _weights(weight: torch.Tensor, dim: int, rows: np.ndarray, statistic: torch.Tensor | None, scorer: Any, *, is_output: bool) -> _Item:
    from torch_pruning.pruner import function

    def gathered(tensor: torch.Tensor) -> torch.Tensor:
        matrix = tensor.detach().movedim(dim, 0)[torch.from_numpy(rows)].reshape(len(rows), -1)
        matrix = matrix if matrix.is_floating_point() else matrix.float()  # weights in integers
        return matrix if is_output else matrix.t()

    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.weight = nn.Parameter(gathered(weight))
    if statistic is not None:
        layer.weight.grad = gathered(statistic)
        if hasattr(scorer, "Fisher"):
            scorer.Fisher[layer] = layer.weight.grad
            scorer.steps = 1
    handler = function.prune_linear_out_channels if is_output else function.prune_linear_in_channels
    every = list(range(len(rows)))
    return _Item(_dependency(layer, handler), every, list(every))


def _dependency(layer: nn.Module, handler: Any) -> SimpleNamespace:
    # torch-pruning's classes spell the same two things in two ways.
    return SimpleNamespace(layer=layer, pruning_fn=handler, target=SimpleNamespace(module=layer), handler=handler)
