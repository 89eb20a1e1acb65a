"""Hooks that users put on a model: they see nothing of an analysis, and none that changes what a model computes is overlooked."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CompressError
from .draws import same_draws

_logger = logging.getLogger(__name__)

Hooks = dict[str, dict[str, OrderedDict[int, Any]]]
"""Path of a module → name of one of its dictionaries → the hooks in it, by the keys they have there."""

_FORWARD = ("_forward_pre_hooks", "_forward_hooks")
_OTHERS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_FLAGS = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}


@contextmanager
def away(model: object) -> Iterator[Hooks]:
    """Within, a model has none of its users' hooks, which come back to it afterwards.

    What torch and this package register stays, such as `weight_norm`, the masks of `torch.nn.utils.prune` and early exits, and so do
    methods of the model's own parts, by which timm collects features: they are how the model computes.

    Yields:
        What was taken away.
    """
    taken: Hooks = {}
    before: list[tuple[OrderedDict, OrderedDict]] = []
    if isinstance(model, nn.Module):
        parts = _parts(model)
        for path, module in model.named_modules():
            for name in (*_FORWARD, *_OTHERS):
                hooks = vars(module).get(name)
                users = {key: hook for key, hook in hooks.items() if not _belongs(hook, parts)} if hooks else {}
                if hooks and users:
                    before.append((hooks, OrderedDict(hooks)))
                    taken.setdefault(path, {})[name] = OrderedDict(users)
    try:
        for hooks, _ in before:
            for key in [key for each in taken.values() for users in each.values() for key in users]:
                hooks.pop(key, None)
        yield taken
    finally:
        for hooks, whole in before:
            hooks.clear()
            hooks.update(whole)


def give_(model: nn.Module, hooks: Hooks, source: nn.Module) -> None:
    """Give a model that was made of another the hooks that the other's users have put there, where it still has such modules."""
    own = dict(model.named_modules())
    for path, dictionaries in hooks.items():
        if path not in own:
            continue
        old, new = vars(source.get_submodule(path)), vars(own[path])
        for name, users in dictionaries.items():
            new[name].update(users)
            for flag in _FLAGS.get(name, ()):
                new[flag].update({key: old[flag][key] for key in users if key in old[flag]})


def refuse_changing(model: nn.Module, hooks: Hooks, images: Tensor, copied: Callable[[nn.Module], nn.Module]) -> None:
    """Refuse hooks that change what a model computes: with them it is another function than the one that is looked at.

    A copy of the model runs with and without copies of them, so that what they collect they collect elsewhere.

    Args:
        model: The model, from which the hooks were taken away.
        hooks: They.
        images: A batch that it takes.
        copied: What copies a model.

    Raises:
        CompressError: Naming the module and the hook.
    """
    forward = {path: {name: users for name, users in each.items() if name in _FORWARD} for path, each in hooks.items()}
    forward = {path: each for path, each in forward.items() if each}
    if not forward:
        return
    expected, failure = _outputs(copied(model), images)
    found, other = _outputs(_hooked(model, forward, copied), images)
    if failure is not None and other is not None:
        return  # the images are none that it takes: what needs them will say so
    if failure is None and other is None and _same(found, expected):
        return
    guilty = next(iter(forward))
    for path, each in forward.items():
        alone, wrong = _outputs(_hooked(model, {path: each}, copied), images)
        if wrong is not None or not _same(alone, expected):
            guilty = path
            break
    hook = next(iter(next(iter(forward[guilty].values())).values()))
    name = getattr(hook, "__qualname__", type(hook).__qualname__)
    what = f"fails ({type(other).__name__}: {other})" if other is not None else "changes what the model computes"
    raise CompressError(
        f"{guilty or type(model).__name__}: a forward hook ({name}) {what}, and nothing is looked at with it. Remove it, or "
        "write what it does into the module's forward"
    )


def _parts(model: nn.Module) -> set[int]:
    """Identities of the modules of a model and of what they keep as attributes."""
    return {id(part) for module in model.modules() for part in (module, *vars(module).values())}


def _belongs(hook: Any, parts: set[int]) -> bool:
    """Whether a hook is part of how a model computes."""
    while isinstance(hook, partial):
        hook = hook.func
    if isinstance(hook, MethodType):
        return id(hook.__self__) in parts
    kind = hook if isinstance(hook, FunctionType) else type(hook)
    return (kind.__module__ or "").partition(".")[0] in ("torch", __name__.partition(".")[0])


def _hooked(model: nn.Module, hooks: Hooks, copied: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A copy of a model with copies of hooks, which reach the copy where they would have reached the model."""
    clone = copied(model)
    memo: dict[int, Any] = {id(a): b for a, b in zip(model.modules(), clone.modules(), strict=True)}
    memo.update((id(a), b) for a, b in zip(model.parameters(), clone.parameters(), strict=True))
    chosen: Hooks = {}
    for path, dictionaries in hooks.items():
        for name, users in dictionaries.items():
            copies = {key: _isolated(hook, memo) for key, hook in users.items()}
            chosen.setdefault(path, {})[name] = OrderedDict((key, hook) for key, hook in copies.items() if hook is not None)
    give_(clone, chosen, model)
    return clone


def _isolated(hook: Any, memo: dict[int, Any]) -> Any:
    """A copy of a hook and of what it reaches; None if that cannot be copied."""
    try:
        return _copy(hook, memo)
    except Exception as error:  # whatever a user's objects raise when they are copied
        _logger.warning(f"a hook ({getattr(hook, '__qualname__', hook)}) is left out of what is looked at: it cannot be copied ({error})")
        return None


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    if not isinstance(value, FunctionType):
        return copy.deepcopy(value, memo)
    closure = tuple(CellType(_copy(cell.cell_contents, memo)) for cell in value.__closure__ or ())
    fixed = (ModuleType, type, FunctionType, BuiltinFunctionType)
    read = {name: value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__}
    reached = {name: copy.deepcopy(each, memo) for name, each in read.items() if not isinstance(each, fixed)}
    made = FunctionType(value.__code__, {**value.__globals__, **reached}, value.__name__, copy.deepcopy(value.__defaults__, memo), closure)
    made.__kwdefaults__ = copy.deepcopy(value.__kwdefaults__, memo)
    return made


def _outputs(model: nn.Module, images: Tensor) -> tuple[list[Tensor], Exception | None]:
    from .outputs import tensors_in  # which knows modules, as what decorates public functions does

    try:
        with same_draws(images.device), torch.no_grad():
            model.eval()
            return tensors_in(model(images)), None
    except Exception as error:  # a user's hook may raise anything
        return [], error


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    pairs = list(zip(a, b, strict=False))
    return len(a) == len(b) and all(x.shape == y.shape and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in pairs)
