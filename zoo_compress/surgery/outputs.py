"""What a model gives: the tensors in it, wherever they are, and whether they are the features of a timm model without classifier."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from timm.models import get_model_args
from torch import nn
from torch.utils._pytree import tree_leaves

from .modules import own
from .origin import architecture_of
from .tracer import MODEL_ERRORS, named_tensors

_OPAQUE = (nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, str, bytes, int, float, complex, torch.dtype)
"""What holds no outputs of its own: modules hold weights, functions and classes what they were made with."""


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor in what a model gives, once: in nested containers, dataclasses and objects of any class.

    Args:
        value: A tensor, or anything that holds tensors as items or attributes.

    Example:
        >>> from types import SimpleNamespace
        >>> [t.shape[1] for t in tensors_in(SimpleNamespace(logits=torch.ones(2, 3), hidden=[torch.ones(2, 5)]))]
        [3, 5]
    """
    found: list[torch.Tensor] = []
    seen: dict[int, Any] = {}  # objects stay alive, so that no other gets the identity of one
    pending = [value]
    while pending:
        item = pending.pop()
        if item is None or isinstance(item, _OPAQUE) or id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, torch.Tensor):
            found.append(item)
        else:
            pending += reversed(list(_parts(item)))
    return found


def _parts(item: Any) -> Iterator[Any]:
    if isinstance(item, Mapping):
        yield from item.values()
    elif isinstance(item, (list, tuple, set, frozenset)):
        yield from item
    else:
        yield from (leaf for leaf in tree_leaves(item) if leaf is not item)  # what is registered with torch as a container
    yield from getattr(item, "__dict__", {}).values()
    for kind in type(item).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if not name.startswith("__"):
                yield getattr(item, name, None)


def gives_features(model: nn.Module) -> bool:
    """Whether what a model gives is what timm documents for `num_classes=0`: features, as many as `num_features` says.

    A head of one's own on such a model, with parameters or without, makes its output something else, so the model has to have the modules,
    by name and class, and the parameters and buffers, by name and shape, that timm gives to one without classes.
    """
    architecture = architecture_of(model)
    if own(model, "num_classes") != 0 or architecture is None:
        return False
    cfg = dict(own(model, "pretrained_cfg"))
    args = {**(own(model, "_model_args") or {}), **get_model_args(model), "num_classes": 0}
    for device in ("meta", "cpu"):  # some build tables out of values
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                twin = timm.create_model(architecture, pretrained=False, pretrained_cfg=cfg, **args)
        except MODEL_ERRORS:
            continue
        return _structure(model) == _structure(twin)
    return False


def _structure(model: nn.Module) -> tuple[list[tuple[str, type]], list[tuple[str, tuple[int, ...]]]]:
    modules = [(path, type(module)) for path, module in model.named_modules()]
    return modules, [(name, tuple(tensor.shape)) for name, tensor in named_tensors(model)]
