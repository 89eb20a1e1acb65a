"""From a record to a model: give a freshly built base the shapes that a `Variant` says, without tracing anything."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from ..errors import VariantError
from ..structure.layout import Axis, Layout
from ..structure.variant import Variant
from . import freezing
from .modules import clear_caches, get_attribute, get_tensor, make_persistent, set_attribute, set_tensors
from .tracer import named_tensors


def restore_(model: nn.Module, variant: Variant) -> nn.Module:
    """Give the base model, in place, the structure of a record. Weights are the first elements of the base's; load others over them.

    The whole record is checked against the model first: when it does not fit, the model is left as it was.

    Args:
        model: A model of the architecture `variant.base`, uncompressed.
        variant: The record.

    Returns:
        The same model.

    Raises:
        VariantError: If the record names something the model does not have, or asks for it to grow.
    """
    check(model, variant)
    # References to the old contents are taken before any is replaced: tied parameters are one tensor with several names.
    old = {name: get_tensor(model, name).detach() for name in variant.params}

    def shrunk() -> Iterator[tuple[str, torch.Tensor]]:
        for name in variant.params:
            whole = old.pop(name)
            shape = variant.shape(name, whole.shape)
            if shape != tuple(get_tensor(model, name).shape):
                yield name, whole[tuple(slice(n) for n in shape)].clone(memory_format=torch.contiguous_format)

    set_tensors(model, shrunk())
    for name in variant.params:
        make_persistent(model, name)
    for path, term in variant.attributes.items():
        set_attribute(model, path, variant.size(term))
    for path, term in variant.scales.items():
        set_attribute(model, path, variant.size(term) ** -0.5)
    clear_caches(model)
    return model


def check(model: nn.Module, variant: Variant) -> None:
    """Check that a record fits a base model, allocating nothing.

    Raises:
        VariantError: Naming the tensor or attribute, what was expected and what was found.
    """
    shapes: dict[int, tuple[str, tuple[int, ...]]] = {}
    for name in variant.params:
        try:
            tensor = get_tensor(model, name)
        except AttributeError as error:
            raise VariantError(f"variant.params[{name!r}]: {variant.base} has no such parameter or buffer") from error
        dims = len(variant.params[name])
        if dims != tensor.ndim:
            raise VariantError(f"variant.params[{name!r}]: expected {tensor.ndim} dimensions as the base has, found {dims}")
        shape = variant.shape(name, tensor.shape)
        if any(not 1 <= new <= old for new, old in zip(shape, tensor.shape, strict=True)):
            raise VariantError(f"variant.params[{name!r}]: expected a shape within the base's {tuple(tensor.shape)}, found {shape}")
        twin, other = shapes.setdefault(id(tensor), (name, shape))
        if shape != other:
            raise VariantError(f"variant.params[{name!r}]: it is tied to {twin!r} of shape {other}, found {shape}")
    for path, term in variant.attributes.items():
        current = _attribute(model, variant, path, int, "attributes")
        size = variant.size(term)
        if not 1 <= size <= current:
            raise VariantError(f"variant.attributes[{path!r}]: expected 1 to {current}, the base's value, found {size}")
    for path, term in variant.scales.items():
        current = _attribute(model, variant, path, float, "scales")
        size = variant.size(term)
        if size < 1 or not math.isfinite(current) or size**-0.5 < current * (1 - 1e-6):
            raise VariantError(f"variant.scales[{path!r}]: expected a width of at most the base's (scale {current:g}), found {size}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in variant.packed:
        if name not in parameters or not parameters[name].is_floating_point():
            raise VariantError(f"variant.packed[{name!r}]: {variant.base} has no such parameter")
    freezing.check(model, variant.frozen)


def recorded_layout(model: nn.Module, variant: Variant) -> Layout:
    """The layout of a restored model, as its record tells it; nothing is traced.

    Args:
        model: What `restore_` made.
        variant: The record, with a bank.
    """
    bank = variant.bank
    assert bank is not None
    params = {}
    for name, tensor in named_tensors(model):
        stored = variant.params.get(name, (None,) * tensor.ndim)
        params[name] = tuple(str(n) if term is None else term for term, n in zip(stored, tensor.shape, strict=True))
    return Layout(
        params=params,
        axes={name: Axis(size, ordered=name in bank.ordered) for name, size in variant.sizes.items()},
        attributes=variant.attributes,
        scales=variant.scales,
        links=bank.links,
        macs_terms=bank.macs_terms,
        fused_macs_terms=bank.fused_macs_terms,
        input_shape=bank.input_shape,
        trained=frozenset(name for name, _ in model.named_parameters()),
    )


def present(model: nn.Module, variant: Variant) -> Variant:
    """The part of a record that a part of the base has: timm builds some feature extractors without the layers of the head."""

    def has(path: str, get: object) -> bool:
        try:
            get(model, path)  # type: ignore[operator]
        except AttributeError:
            return False
        return True

    return variant.model_copy(
        update={
            "params": {name: dims for name, dims in variant.params.items() if has(name, get_tensor)},
            "attributes": {path: term for path, term in variant.attributes.items() if has(path, get_attribute)},
            "scales": {path: term for path, term in variant.scales.items() if has(path, get_attribute)},
            "packed": {name: packing for name, packing in variant.packed.items() if has(name, get_tensor)},
            "frozen": tuple(path for path in variant.frozen if has(path, nn.Module.get_submodule)),
        }
    )


def _attribute(model: nn.Module, variant: Variant, path: str, kind: type, field: str) -> float:
    try:
        value = get_attribute(model, path)
    except AttributeError as error:
        raise VariantError(f"variant.{field}[{path!r}]: {variant.base} has no such plain attribute") from error
    if type(value) is not kind:
        raise VariantError(f"variant.{field}[{path!r}]: expected an attribute of type {kind.__name__}, found {type(value).__name__}")
    return value  # type: ignore[return-value]
