"""A bank at a choice of widths: views of its parameters, and its attributes, put in place while the model runs.

Between two passes nothing but the bank exists. Within one, a view whose elements do not lie side by side in memory becomes a copy, which
stays for the next pass where that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..structure import terms
from ..structure.layout import Layout, parse
from ..structure.terms import Product, Sum, Term
from .modules import get_tensor, holders, places

Narrowing = Callable[[Tensor], Tensor]
Placing = tuple[Any, Any, Any]
"""A dictionary or list, a key in it, and the value to put there."""

ABSENT = object()
"""Instead of a value: nothing is there."""


def narrowing(term: Term, dim: int, base: Mapping[str, int], sizes: Mapping[str, int]) -> Narrowing | None:
    """What takes the first elements of every axis along a dimension; None where all of them stay.

    The same elements, in the same order, as `terms.index` with `range(size)` for every axis, but as a view where memory has them so:
    always for an axis alone or the slowest of a product. Gradients flow back into what is viewed.

    Args:
        term: What the dimension is.
        dim: Which one.
        base: Axis → size before.
        sizes: Axis → size after, at most that.
    """
    if all(sizes[axis] == base[axis] for axis in terms.axes(term)):
        return None
    if _takes_first(term, base, sizes):
        length = terms.size(term, sizes)
        return lambda tensor: tensor.narrow(dim, 0, length)
    parts = terms.factors(term) if isinstance(term, Product) else terms.segments(term)
    whole = [terms.size(part, base) for part in parts]
    within = [narrowing(part, dim + i if isinstance(term, Product) else dim, base, sizes) or _all for i, part in enumerate(parts)]

    def narrow_factors(tensor: Tensor) -> Tensor:
        tensor = tensor.unflatten(dim, whole)
        for narrow in within:
            tensor = narrow(tensor)
        return tensor.flatten(dim, dim + len(whole) - 1)

    def narrow_segments(tensor: Tensor) -> Tensor:
        return torch.cat([narrow(segment) for narrow, segment in zip(within, tensor.split(whole, dim), strict=True)], dim)

    return narrow_factors if isinstance(term, Product) else narrow_segments


def _all(tensor: Tensor) -> Tensor:
    return tensor


def _takes_first(term: Term, base: Mapping[str, int], sizes: Mapping[str, int]) -> bool:
    """Whether what stays along a dimension is the first of it: where only the slowest factor, or the last segment, gets shorter."""
    if not isinstance(term, (Product, Sum)):
        return True
    first, *rest = terms.factors(term) if isinstance(term, Product) else terms.segments(term)[::-1]
    return all(terms.size(part, sizes) == terms.size(part, base) for part in rest) and _takes_first(first, base, sizes)


class View:
    """A bank at one choice of widths: with its `changes` put in place, the model is what `resize` makes of it, to the bit.

    Args:
        model: The bank.
        layout: Its layout.
        sizes: Axis → size, for every axis.
        own: Parameters and buffers, by name, that this choice has of its own.

    Attributes:
        keep: Whether copies stay between passes that record no gradients, until `forget` or a change of the bank in place. Changes by way
            of `tensor.data`, of which torch keeps no count, go unseen.
    """

    keep = False

    def __init__(self, model: nn.Module, layout: Layout, sizes: Mapping[str, int], own: Mapping[str, Tensor]) -> None:
        self._tensors: list[tuple[dict[str, Any], str, Tensor | Narrowing]] = []
        held = holders(model)
        for name, dims in layout.params.items():
            new = own[name] if name in own else _narrowing(dims, layout.base_sizes, sizes)
            if new is not None:
                self._tensors += [(tensors, key, new) for tensors, key in held[id(get_tensor(model, name))]]
        attributes = {path: terms.size(parse(term), sizes) for path, term in layout.attributes.items()}
        scales = {path: terms.size(parse(term), sizes) ** -0.5 for path, term in layout.scales.items()}
        self._values = places(model, {**attributes, **scales})
        self._recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
        self._kept: dict[int, tuple[tuple[Any, ...], Tensor]] = {}

    def changes(self) -> list[Placing]:
        """What to put where for the model to run at these widths; parameters as views, or copies, of those it has now."""
        tensors: list[Placing] = [
            (holder, key, own if isinstance(own, Tensor) else self._viewed(i, holder[key], own))
            for i, (holder, key, own) in enumerate(self._tensors)
        ]
        new = {(id(holder), key): tensor for holder, key, tensor in tensors}
        for module in self._recurrent:  # which keep a list of their weights
            held = module._parameters
            flat = [new.get((id(held), name), held.get(name)) for name in module._flat_weights_names]
            tensors.append((vars(module), "_flat_weights", flat))
        return [*tensors, *self._values]

    def forget(self) -> None:
        """Let go of the copies of an earlier pass."""
        self._kept.clear()

    def _viewed(self, place: int, tensor: Tensor, narrow: Narrowing) -> Tensor:
        if not self.keep or torch.is_grad_enabled() or tensor.is_inference():
            return _viewed(tensor, narrow)
        state = (tensor.data_ptr(), tensor._version, tensor.dtype, tensor.requires_grad)
        known = self._kept.get(place)
        if known is None or known[0] != state:
            known = self._kept[place] = (state, _viewed(tensor, narrow))
        return known[1]


def put(values: list[Placing]) -> None:
    """Put values into the dictionaries and lists that modules keep them in."""
    for holder, key, value in values:
        if value is ABSENT:
            holder.pop(key, None)
        else:
            holder[key] = value


def narrowed(tensor: Tensor, dims: tuple[str, ...], base: Mapping[str, int], sizes: Mapping[str, int]) -> Tensor:
    """The first elements of every axis of a tensor: a view where memory has them so, the tensor itself where nothing changes.

    Args:
        tensor: A parameter or buffer.
        dims: Its terms, one per dimension.
        base: Axis → size before.
        sizes: Axis → size after, at most that.
    """
    narrow = _narrowing(dims, base, sizes)
    return tensor if narrow is None else narrow(tensor)


def _viewed(tensor: Tensor, narrow: Narrowing) -> Tensor:
    # Torch chooses operations by the strides of a weight, and by whether it requires gradients even where none are recorded. For results
    # equal to a static model's to the bit both have to be as there; the copy lives as long as the pass.
    view = narrow(tensor).contiguous()
    return view if torch.is_grad_enabled() else view.requires_grad_(tensor.requires_grad)


def _narrowing(dims: tuple[str, ...], base: Mapping[str, int], sizes: Mapping[str, int]) -> Narrowing | None:
    found = [narrow for d, text in enumerate(dims) if (narrow := narrowing(parse(text), d, base, sizes)) is not None]
    if not found:
        return None

    def narrow_all(tensor: Tensor) -> Tensor:
        for narrow in found:
            tensor = narrow(tensor)
        return tensor

    return narrow_all
