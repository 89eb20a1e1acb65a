"""The executor: a layout and a choice of widths make a new static model."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..errors import WidthError
from ..structure import terms
from ..structure.layout import Layout, Widths, parse
from ..structure.variant import record
from .modules import copied, make_persistent, set_attribute, takes_model
from .origin import parts, stamp
from .tracer import named_tensors


@takes_model
def resize(model: nn.Module, layout: Layout, widths: Widths) -> nn.Module:
    """A copy of the model with other widths. The model itself stays as it is.

    Args:
        model: The model that `layout` was inferred of.
        layout: Its layout.
        widths: Axis → its new size (the first elements stay) or the indices that stay, in their new order.

    Returns:
        A new module of the same class, on the same device and in the same mode. A model of timm's, also one inside the module, says of
        itself that it is `<architecture>__pruned`, and saves and reloads as that.

    Raises:
        WidthError: If the layout does not admit the widths, or is not the layout of this model.
    """
    sizes = layout.sizes(widths)
    grown = [name for name, size in sizes.items() if size > layout.axes[name].size]
    if grown:
        raise WidthError(f"axis {grown[0]!r}: expected at most its {layout.axes[grown[0]].size} elements, found {sizes[grown[0]]}")
    layout.check_links(widths)
    check_fits(model, layout)
    made = list(parts(model))
    resized = changed_copy(model, layout, widths)
    for name in layout.params:
        if layout.moves(name):
            make_persistent(resized, name)
    for path, _, source in made:
        own = layout.part(path)
        stated = record(own, sizes, method="pruned", base=source.base, base_args=source.args, previous=source.previous)
        stamp(resized.get_submodule(path), stated)
    return resized


def changed_copy(model: nn.Module, layout: Layout, widths: Widths) -> nn.Module:
    """A copy of the model at other widths that the layout admits: its tensors, and the attributes that say their sizes."""
    sizes = layout.sizes(widths)
    changed = permuted_copy(model, layout, picks(layout, widths))
    for path, term in layout.attributes.items():
        set_attribute(changed, path, terms.size(parse(term), sizes))
    for path, term in layout.scales.items():
        set_attribute(changed, path, terms.size(parse(term), sizes) ** -0.5)
    return changed


def picks(layout: Layout, widths: Widths) -> dict[str, np.ndarray]:
    """Axis → indices kept, for the axes that a choice of widths changes."""
    out = {}
    for name, width in widths.items():
        indices = np.arange(width) if isinstance(width, (int, np.integer)) else np.asarray(width)
        if len(indices) != layout.axes[name].size or (indices != np.arange(len(indices))).any():
            out[name] = indices
    return out


def permuted_copy(model: nn.Module, layout: Layout, pick: dict[str, np.ndarray]) -> nn.Module:
    """A copy of the model in which every parameter and buffer keeps, along each axis in `pick`, the elements named there.

    Parameters that nothing changes are copied too; no tensor is shared with the model.
    """
    instead: dict[int, torch.Tensor] = {}
    for name, tensor in named_tensors(model):
        chosen = reindex(tensor.detach(), layout.params[name], layout, pick)
        if chosen is not None:
            instead[id(tensor)] = nn.Parameter(chosen, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else chosen
    return copied(model, instead)


def reindex(tensor: torch.Tensor, dims: tuple[str, ...], layout: Layout, pick: dict[str, np.ndarray]) -> torch.Tensor | None:
    """The elements of a tensor that a choice keeps, as a new tensor of the same memory format; None where the choice does not touch it."""
    touched, format = False, _memory_format(tensor)
    for d, text in enumerate(dims):
        term = parse(text)
        if any(axis in pick for axis in terms.axes(term)):
            index = terms.index(term, layout.base_sizes, pick)
            tensor = tensor.index_select(d, torch.from_numpy(index).to(tensor.device))
            touched = True
    return tensor.contiguous(memory_format=format) if touched else None


def _memory_format(tensor: torch.Tensor) -> torch.memory_format:
    """The order in memory of a tensor's dimensions: channels last, or as they are named."""
    for dims, format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.ndim == dims and tensor.is_contiguous(memory_format=format) and not tensor.is_contiguous():
            return format
    return torch.contiguous_format


def check_fits(model: nn.Module, layout: Layout) -> None:
    """Check that a layout describes this model's parameters.

    Raises:
        WidthError: Naming the first parameter that does not fit.
    """
    tensors = dict(named_tensors(model))
    if tensors.keys() != layout.params.keys():
        name = min(tensors.keys() ^ layout.params.keys())
        raise WidthError(f"{name!r} is in {'the model' if name in tensors else 'the layout'} only: the layout is of another model")
    for name, tensor in tensors.items():
        if name not in layout.trained and not layout.moves(name):
            continue  # some models compute such buffers anew, in the shape of their latest input
        expected = tuple(terms.size(parse(d), layout.base_sizes) for d in layout.params[name])
        if tuple(tensor.shape) != expected:
            raise WidthError(f"{name!r}: the layout says {expected}, found {tuple(tensor.shape)}: analyze the model again")
