"""What a model does with its layers: which are called and no more than that, and what each call costs as one layer or as two."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import AnalysisError
from ..structure import terms
from ..structure.factors import LayerShape
from ..structure.layout import Layout, parse
from .factors import shape_of, unfit
from .kernels import Kernels
from .modules import eval_copy, every_output, holders
from .trace import default_input
from .tracer import MODEL_ERRORS
from .weights import computed


@dataclass
class DenseLayer:
    """A layer that might be two.

    Attributes:
        shape: Its shape.
        calls: Shapes of (input, output) of each call, for one sample.
    """

    shape: LayerShape
    calls: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return sum(math.prod(out) for _, out in self.calls) * self.shape.columns

    @property
    def params(self) -> int:
        """Elements of the weight."""
        return self.shape.outputs * self.shape.columns

    def macs_per_rank(self, kind: str) -> int:
        """Multiply-accumulates of the two layers, for each rank."""
        first, second = self.shape.weights(kind)
        total = 0
        for given, out in self.calls:
            positions = math.prod(out) // self.shape.outputs
            # The first of two one-dimensional convolutions runs at the output's height and still at the input's width.
            early = positions // out[-1] * given[-1] if kind == "spatial" else positions
            total += early * first + positions * second
        return total

    def params_per_rank(self, kind: str) -> int:
        """Elements of the two weights, for each rank."""
        return sum(self.shape.weights(kind))


def dense_layers(model: nn.Module, layout: Layout, example: torch.Tensor | None = None) -> tuple[dict[str, DenseLayer], dict[str, str]]:
    """The linear layers and convolutions that might be two, and of the others why not.

    Args:
        model: The model. A copy runs, without data where that is enough.
        layout: Its layout.
        example: A batch, where the model does not say what it takes.

    Returns:
        Path → layer, and path → reason.
    """
    found: dict[str, DenseLayer] = {}
    left: dict[str, str] = {}
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    held = holders(model)
    replaced = _replaced_by_timm(model)
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            continue
        reason = computed(module, path) or unfit(module)
        if reason is None and not path:
            reason = "it is the whole model"
        if reason is None and names[id(module)] > 1:
            reason = "the model has it under several names"
        if reason is None and len(held[id(module.weight)]) > 1:
            reason = "its weight is another layer's too"
        if reason is None and path in replaced:
            reason = replaced[path]
        if reason is None:
            reason = _frozen(layout, path)
        if reason is None:
            found[path] = DenseLayer(shape_of(module))
        else:
            left[path] = reason
    seen = _look(model, found, default_input(model) if example is None else example)
    for path, reason in seen.items():
        del found[path]
        left[path] = reason
    return found, left


def _replaced_by_timm(model: nn.Module) -> dict[str, str]:
    """The layers that timm makes anew, or adapts, for other classes or other input channels."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    found = {}
    for key, what in (("classifier", "a classifier: made anew for other classes"), ("first_conv", "the first: adapted to other channels")):
        names = cfg.get(key) or ()
        found.update(dict.fromkeys((names,) if isinstance(names, str) else names, what))
    return found


def _frozen(layout: Layout, path: str) -> str | None:
    """Why, if a layer gives the model's outputs or reads its images."""
    dims = layout.params.get(f"{path}.weight", ())
    for dim, what in zip(dims, ("a classifier: made anew for other classes", "the first: adapted to other channels"), strict=False):
        reasons = {layout.axes[axis].frozen or "" for axis in terms.axes(parse(dim))}
        if any(reason.startswith(("model output", "image channels")) for reason in reasons):
            return what
    return None


def _look(model: nn.Module, layers: dict[str, DenseLayer], example: torch.Tensor) -> dict[str, str]:
    """Note the calls of layers; path → reason for those that are not called, or whose weight is read elsewhere."""
    failure: Exception | None = None
    for device in ("meta", "cpu"):  # a model that looks at values needs real tensors
        for layer in layers.values():
            layer.calls.clear()
        clone = eval_copy(model, device)
        image = torch.zeros((1, *example.shape[1:]), dtype=example.dtype, device=device)
        watch = _Watch(clone, layers)
        try:
            with Kernels(), watch, torch.no_grad(), every_output(clone):
                clone(image)
        except MODEL_ERRORS as error:
            failure = error
            continue
        never = {path: "not used when the model runs in eval mode" for path, layer in layers.items() if not layer.calls}
        return {**never, **watch.reads}
    raise AnalysisError(f"{type(model).__name__} does not run on an input of shape {tuple(example.shape)}: {failure}") from failure


class _Watch(TorchFunctionMode):
    """Sees calls of layers, and functions that read a layer's parameters while it is not being called."""

    def __init__(self, model: nn.Module, layers: dict[str, DenseLayer]) -> None:
        super().__init__()
        self.reads: dict[str, str] = {}
        self._active: list[str] = []
        self._owners: dict[int, str] = {}
        for path, layer in layers.items():
            module = model.get_submodule(path)
            self._owners.update((id(parameter), path) for parameter in module._parameters.values() if parameter is not None)
            module.register_forward_pre_hook(self._enter(path))
            module.register_forward_hook(self._leave(layer), with_kwargs=True)

    def _enter(self, path: str) -> Callable[..., None]:
        return lambda module, args: self._active.append(path)

    def _leave(self, layer: DenseLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
            self._active.pop()
            given = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            layer.calls.append((tuple(given.shape), tuple(out.shape)))

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            path = self._owners.get(id(value)) if isinstance(value, torch.Tensor) else None
            if path is not None and path not in self._active:
                self.reads[path] = "the model reads its weight in other places than its own call"
        return func(*args, **(kwargs or {}))
