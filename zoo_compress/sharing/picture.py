"""The widths of a compressed model beside those of its base, as a picture."""

from __future__ import annotations

from pathlib import Path

import torch
from timm.models import model_entrypoint
from torch import nn

from ..errors import CompressError
from ..figures import blank_figure, save_figure
from ..surgery.origin import origin


def base_of(model: nn.Module) -> nn.Module:
    """The whole architecture that a compressed model was made of, with shapes and no data.

    Raises:
        CompressError: The model is not a compressed one.
    """
    source = origin(model)
    if source is None or source.previous is None:
        raise CompressError(f"{type(model).__name__}: expected a compressed model, found one without a record")
    with torch.device("meta"):
        return model_entrypoint(source.base)(pretrained=False, **source.args, **source.live)


def widths(model: nn.Module) -> list[tuple[str, int, int]]:
    """Output channels of every layer with a matrix or kernel: name, in the base, now.

    Raises:
        CompressError: The model is not a compressed one.
    """
    before = {name: parameter.shape[0] for name, parameter in base_of(model).named_parameters() if parameter.ndim > 1}
    return [
        (name.removesuffix(".weight"), before[name], parameter.shape[0])
        for name, parameter in model.named_parameters()
        if name in before and name.endswith("weight")
    ]


def draw(model: nn.Module, path: Path) -> None:
    """Draw `widths` as one bar a layer, in the order of the layers, the base's behind the model's.

    Raises:
        CompressError: The model is not a compressed one, or matplotlib is missing.
    """
    layers = widths(model)
    figure = blank_figure((8, max(2.0, 0.6 + 0.16 * len(layers))))
    axes = figure.add_subplot()
    places = range(len(layers))
    axes.barh(places, [before for _, before, _ in layers], color="0.85", label="base")
    axes.barh(places, [now for _, _, now in layers], color="tab:blue", label="this model")
    axes.set_yticks(places, [name for name, _, _ in layers], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("output channels")
    axes.margins(y=0.01)
    axes.legend(loc="lower right", fontsize=8)
    save_figure(figure, path, dpi=100)
