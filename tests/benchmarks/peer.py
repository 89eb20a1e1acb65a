"""torch-pruning as the benchmarks use it: by the recipe of its own timm script, and adapted to what timm models look like."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import nn

PROJECTIONS = ("qkv", "qkv_proj", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj", "to_q", "to_k", "to_v", "to_kv", "to_qkv", "q_bias")


def own_heads(model: nn.Module) -> dict[nn.Module, int]:
    """Attention as torch-pruning's `examples/timm_models/prune_timm_models.py` finds it: a `qkv` beside a `num_heads`."""
    found = {}
    for module in model.modules():
        if hasattr(module, "num_heads"):
            layer = getattr(module, "qkv", getattr(module, "qkv_proj", None))
            if isinstance(layer, nn.Module):
                found[layer] = module.num_heads
    return found


def all_heads(model: nn.Module) -> dict[nn.Module, int]:
    """The same for separate projections too, under any of the names timm gives them."""
    found = {}
    for module in model.modules():
        heads = getattr(module, "num_heads", None)
        for name in PROJECTIONS:
            layer = getattr(module, name, None)
            if isinstance(heads, int) and isinstance(layer, nn.Linear) and layer.out_features % heads == 0:
                found[layer] = heads
    return found


def own_ignored(model: nn.Module) -> list[nn.Module]:
    """The classifier as torch-pruning's script finds it: linear layers with as many outputs as there are classes."""
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == model.num_classes]


def all_ignored(model: nn.Module) -> list[nn.Module]:
    """What timm says is the classifier, which may be a convolution or several layers, besides."""
    found = model.get_classifier()
    heads = found if isinstance(found, (tuple, list)) else found.values() if isinstance(found, dict) else [found]
    return [*own_ignored(model), *(head for head in heads if isinstance(head, nn.Module))]


def own_repair(model: nn.Module, heads: dict[nn.Module, int]) -> None:
    """Attributes that torch-pruning's script sets after pruning."""
    for module in model.modules():
        layer = getattr(module, "qkv", getattr(module, "qkv_proj", None))
        if hasattr(module, "num_heads") and layer in heads:
            module.num_heads = heads[layer]
            module.head_dim = layer.out_features // (3 * module.num_heads)


def all_repair(model: nn.Module, heads: dict[nn.Module, int]) -> None:
    """The same for other projections, with the further names timm has for these sizes and the scale that belongs to them."""
    for module in model.modules():
        layers = {name: getattr(module, name, None) for name in PROJECTIONS}
        for name, layer in layers.items():
            if layer not in heads:
                continue
            parts = 3 if "qkv" in name else 2 if "kv" in name else 1
            before, width = getattr(module, "head_dim", None), layer.out_features // parts
            module.num_heads = heads[layer]
            for attribute in ("head_dim", "key_dim", "dim_head"):
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, width // module.num_heads)
            for attribute in ("attn_dim", "all_head_dim", "inner_dim"):
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, width)
            if before and isinstance(getattr(module, "scale", None), float):
                module.scale = (width // module.num_heads) ** -0.5


Watch = Callable[[object], None]


def prune(model: nn.Module, ratio: float, *, adapted: bool, watch: Watch | None = None, importance: object = None) -> nn.Module:
    """Prune a timm model in place with torch-pruning's defaults: the same ratio for every layer, importance of groups by magnitude.

    Args:
        model: In eval mode.
        ratio: Share of channels to remove.
        adapted: Find heads, classifier and attributes by all of timm's names rather than as torch-pruning's script does.
        watch: Sees every group before it is pruned.
        importance: One of `torch_pruning.importance` instead; those that look at gradients find them in the model.
    """
    import torch_pruning as tp

    heads = (all_heads if adapted else own_heads)(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model,
            torch.randn(1, *model.pretrained_cfg["input_size"]),
            importance=importance or tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=(all_ignored if adapted else own_ignored)(model),
            num_heads=heads,
            # Its defaults for these two are shared between all pruners.
            in_channel_groups={},
            out_channel_groups={},
        )
        for group in pruner.step(interactive=True):
            if watch is not None:
                watch(group)
            group.prune()
    (all_repair if adapted else own_repair)(model, heads)
    return model


def prune_to_macs(
    model: nn.Module, fraction: float, macs: Callable[[nn.Module], int], tolerance: float = 0.01, importance: object = None
) -> nn.Module:
    """A copy of a model pruned by torch-pruning to a fraction of its MACs: bisects the ratio, as its users do by hand."""
    low, high, total = 0.0, 0.9, macs(model)
    for _ in range(10):
        ratio = (low + high) / 2
        small = copy.deepcopy(model)
        for new, old in zip(small.parameters(), model.parameters(), strict=True):
            new.grad = None if old.grad is None else old.grad.clone()
        prune(small, ratio, adapted=True, importance=importance)
        reached = macs(small) / total
        if abs(reached - fraction) <= tolerance:
            break
        low, high = (ratio, high) if reached > fraction else (low, ratio)
    return small


class Zeroing:
    """Zeroes, in a copy of the dense model, what the layers of the pruned one no longer read.

    To be given to `prune` as `watch`. Where nothing mixes or normalises the channels in between, both models then give equal outputs.

    Attributes:
        undefined: A group held something whose inputs cannot be told apart by index: a grouped convolution, or a bare parameter.
    """

    def __init__(self, pruned: nn.Module, dense: nn.Module) -> None:
        self.undefined = False
        self._dense = dict(dense.named_modules())
        self._names = {module: name for name, module in pruned.named_modules()}
        self._left: dict[str, torch.Tensor] = {}

    def __call__(self, group: object) -> None:
        import torch_pruning as tp

        for dep, indices in group:  # type: ignore[attr-defined]
            layer, function = dep.target.module, dep.handler
            reads = function in (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
            name = self._names.get(layer)
            if isinstance(layer, nn.Parameter) or (isinstance(layer, nn.modules.conv._ConvNd) and 1 < layer.groups < layer.in_channels):
                self.undefined = True
            elif reads and name is not None:
                weight = self._dense[name].weight
                dim = 0 if getattr(layer, "transposed", False) else 1
                left = self._left.setdefault(name, torch.arange(weight.shape[dim]))
                with torch.no_grad():
                    weight.index_fill_(dim, left[indices], 0.0)
                keep = torch.ones(len(left), dtype=torch.bool)
                keep[indices] = False
                self._left[name] = left[keep]
