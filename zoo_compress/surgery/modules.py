"""Reading and writing what a layout names: tensors by name, attributes by path."""

from __future__ import annotations

import copy
import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar

import torch
from timm.models import FeatureInfo, get_model_input_config
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import CompressError
from ..structure.layout import Layout
from . import hooks

Step = str | int

M = TypeVar("M", bound=nn.Module)
P = ParamSpec("P")
R = TypeVar("R")

# Below the module that holds the value.
_PATH = re.compile(r"\w+(\[\d+\])*(\.\w+(\[\d+\])*)*", re.ASCII)
_STEP = re.compile(r"\[(\d+)\]|(\w+)", re.ASCII)


def get_attribute(model: nn.Module, path: str) -> Any:
    """Value at an attribute path.

    Args:
        model: The root of the path.
        path: Module names and an attribute joined by dots, then indices into tuples or lists and keys of dicts:
            `blocks.0.attn.num_heads`, `norm.normalized_shape[0]`, `feature_info[2].num_chs`.

    Raises:
        AttributeError: If there is no such module, or no such value in that module's own `__dict__`. Methods, properties, class
            attributes, modules, parameters, buffers and dunder names are not reachable.
    """
    module, steps = _locate(model, path)
    value: Any = module.__dict__
    for step in steps:
        value = _item(value, step, path)
    return value


def set_attribute(model: nn.Module, path: str, value: object) -> None:
    """Replace the value at an attribute path; see `get_attribute` for paths and errors."""
    get_attribute(model, path)
    module, steps = _locate(model, path)
    _put(module.__dict__, steps, value)


def places(model: nn.Module, values: Mapping[str, object]) -> list[tuple[Any, Any, Any]]:
    """Where values at attribute paths are kept and what has to be put there for all of them to change.

    Args:
        model: The root of the paths.
        values: Attribute path → new value; see `get_attribute` for paths and errors.

    Returns:
        (container, key, new value) with a dictionary or list as container: tuples, which cannot change, are made anew, once for all the
        values in them.
    """
    found: dict[tuple[int, Step], list[Any]] = {}
    for path, value in values.items():
        get_attribute(model, path)
        module, (key, *steps) = _locate(model, path)
        container: Any = module.__dict__
        while steps and not isinstance(container[key], tuple):
            inner = container[key]
            container, (key, *steps) = inner.info if isinstance(inner, FeatureInfo) else inner, steps
        place = found.setdefault((id(container), key), [container, key, copy.deepcopy(container[key]) if steps else None])
        place[2] = _put(place[2], steps, value)
    return [(container, key, value) for container, key, value in found.values()]


def listed(names: Any) -> list[str]:
    """Names of modules as a list, which timm's cfgs have as one, several or None."""
    return [name for name in (names if isinstance(names, (tuple, list)) else [names]) if name]


def classifiers(model: nn.Module, names: object) -> dict[str, nn.Parameter]:
    """Names and weights of a model's classifiers.

    Args:
        model: The model.
        names: Of the modules, as timm's cfgs have them: one, several or None.
    """
    known = {f"{name}.weight" for name in listed(names)}
    return {name: weight for name, weight in model.named_parameters() if name in known}


def get_tensor(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name.

    Raises:
        AttributeError: If there is none.
    """
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    for tensors in (module._parameters, module._buffers):
        tensor = tensors.get(key)
        if tensor is not None:
            return tensor
    raise AttributeError(f"{type(model).__name__} has no parameter or buffer {name!r}")


def holders(model: nn.Module) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """Identity of every parameter and buffer → the dictionaries of modules that hold it, each with its key there."""
    found: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    found.setdefault(id(tensor), []).append((tensors, key))
    return found


def set_tensors(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Give parameters or buffers new contents, of any shape, wherever in the model they are used.

    A parameter stays the same object, so ties, hooks, `requires_grad` and subclasses outlive the change; its gradient is dropped.
    A buffer is replaced, after all parameters, in every module of this model that holds it: it may be shared with other models.

    Raises:
        AttributeError: If there is no tensor of one of these names.
    """
    buffers: dict[int, Tensor] = {}
    for name, tensor in tensors:
        old = get_tensor(model, name)
        if isinstance(old, nn.Parameter):
            old.data = tensor.detach()
            old.grad = None
        else:
            buffers[id(old)] = tensor
    held = holders(model) if buffers else {}
    for identity, tensor in buffers.items():
        for tensors_of_module, key in held[identity]:
            tensors_of_module[key] = tensor


def make_persistent(model: nn.Module, name: str) -> None:
    """Make a buffer part of the state that is saved; nothing happens to a parameter.

    A buffer that is built, not saved, holds what the whole base needs; which part of it a resized model keeps only its values tell.
    """
    owner, _, key = name.rpartition(".")
    model.get_submodule(owner)._non_persistent_buffers_set.discard(key)


def clear_caches(model: nn.Module) -> None:
    """Drop tensors that modules keep between calls in eval mode; timm's models do so when they are set to train.

    Every module's own training flag is left as it was.
    """
    flags = {module: module.training for module in model.modules()}
    model.train()
    for module, training in flags.items():
        module.training = training


def in_eval_mode(model: M) -> M:
    """The model, set to eval mode. A model's own `train` may give nothing back, and `model.eval()` then gives that."""
    model.eval()
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, a model is in eval mode; afterwards every module is in the mode it was in."""
    if not any(module.training for module in model.modules()):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train()  # modules that keep tensors between calls in eval mode forget them
        for module, training in modes:
            module.training = training


def every_output(model: nn.Module) -> AbstractContextManager[Any]:
    """Within, the model computes everything it can, in eval mode too.

    A model with parts that only some calls need (heads of early exits) offers a method of this name that returns such a context; all its
    outputs then come back in a list. Other models always compute everything.
    """
    own = getattr(model, "every_output", None)
    return own() if callable(own) else nullcontext()


def own(model: nn.Module, name: str) -> Any:
    """What a model says of itself under a name, such as `num_classes`; None if it says nothing.

    A wrapper may hand on what the model inside says, by a property or `__getattr__`. That is not said of the wrapper.
    """
    return vars(model).get(name)


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` was given, or the model itself."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def refuse_wrapped(model: object, *, compiled: bool = True) -> None:
    """Refuse what torch puts around a model to compile or to distribute it.

    It has other names for all that the model has, and keeps graphs or buckets of the sizes it saw.

    Args:
        model: What a user passes as a model.
        compiled: Whether what `torch.compile` gives is refused too.

    Raises:
        CompressError: The model is inside such a wrapper; the message says where.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        name = type(model.module).__name__
        raise CompressError(
            f"expected the {name} itself, found {type(model).__name__} around it: pass model.module, and wrap what comes of it"
        )
    inner = uncompiled(model) if isinstance(model, nn.Module) else model
    if compiled and inner is not model:
        raise CompressError(
            f"expected the {type(inner).__name__} itself, found what torch.compile made of it; pass the model that was compiled, and "
            "compile what comes of it"
        )


def takes_model(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function whose first argument is a model.

    It refuses wrappers around the model, and runs in torch's ordinary mode whatever is around the call: tensors made in `inference_mode`
    could never be trained, and some of what is measured needs gradients. Meanwhile the model is without its users' hooks: a model that
    comes out has them again, and hooks that change what the model computes are refused.
    """
    first = next(iter(inspect.signature(function).parameters))

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        model = args[0] if args else kwargs.get(first)
        refuse_wrapped(model)
        with torch.inference_mode(False), hooks.away(model) as taken:  # the former switches gradients on, too
            if taken and isinstance(model, nn.Module) and (images := _example(model, (*args[1:], *kwargs.values()))) is not None:
                hooks.refuse_changing(model, taken, images, copied)
            result = function(*args, **kwargs)
            if taken and isinstance(model, nn.Module) and isinstance(result, nn.Module) and result is not model:
                hooks.give_(result, taken, model)
            return result

    return run


def _example(model: nn.Module, arguments: Iterable[object]) -> Tensor | None:
    """A batch to run a model on: the one a user passes, or noise of the shape that a layout or the model's own cfg names."""
    shape = None
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.device.type != "meta":
            return argument
        if isinstance(argument, (Tensor, Layout)):
            shape = argument.input_shape if isinstance(argument, Layout) else tuple(argument.shape)
    if shape is None and own(model, "pretrained_cfg"):
        shape = (2, *get_model_input_config(model)["input_size"])
    if shape is None:
        return None
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return noise if parameter is None else noise.to(parameter.device, parameter.dtype)


def copied(model: M, instead: Mapping[int, Any] | None = None) -> M:
    """A copy of a model, without what modules keep between calls in eval mode.

    The model forgets that too, and works it out again when it is called: it may hang in the graph of a call that is over, and torch
    copies no such tensors.

    Args:
        model: The model.
        instead: By `id`, what takes the place of some of its tensors.
    """
    clear_caches(model)
    with torch.no_grad():
        clone = copy.deepcopy(model, {**_copied_dictionaries(model), **_cut_loose(model), **(instead or {})})
    for module, twin in zip(model.modules(), clone.modules(), strict=True):
        if isinstance(module, torch.jit.ScriptModule):  # whose copies are operations on its tensors
            for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
                theirs.requires_grad_(ours.requires_grad)
    return clone


def _cut_loose(model: nn.Module) -> dict[int, Any]:
    """A memo for `copy.deepcopy(model, memo)` with copies of the tensors that hang in a graph, such as a weight that a hook computed."""
    values = (value for module in model.modules() for value in vars(module).values())
    return {id(value): value.detach().clone() for value in values if isinstance(value, torch.Tensor) and not value.is_leaf}


def twin(model: M) -> M:
    """A copy of a model that shares its parameters: it may run, and what it keeps in buffers stays its own. See `copied`."""
    return copied(model, {id(parameter): parameter for parameter in model.parameters()})


def _copied_dictionaries(model: nn.Module) -> dict[int, Any]:
    """A memo for `copy.deepcopy(model, memo)` with copies of the empty dictionaries of its modules.

    A module has a dozen dictionaries for hooks; copying the empty ones one by one takes longer than all the rest.
    """
    values = (value for module in model.modules() for value in vars(module).values())
    return {id(value): type(value)() for value in values if type(value) in (dict, OrderedDict) and not value}


def eval_copy(model: nn.Module, device: str) -> nn.Module:
    """A copy in eval mode on a device, as `copied` makes it; on the meta device its tensors have shapes and no data."""
    return in_eval_mode(_copied_without_data(model) if device == "meta" else copied(model).to(device))


def _copied_without_data(model: nn.Module) -> nn.Module:
    clear_caches(model)
    memo = _copied_dictionaries(model)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers, vars(module)):
            for tensor in tree_leaves([value for value in tensors.values() if value is not module._modules and id(value) not in memo]):
                if isinstance(tensor, torch.Tensor) and id(tensor) not in memo:
                    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
                    memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _locate(model: nn.Module, path: str) -> tuple[nn.Module, list[Step]]:
    """The module a path leads to and the steps left from that module's `__dict__`."""
    module, rest = model, path
    name, dot, after = rest.partition(".")  # names of modules may hold anything but dots
    while dot and (child := module._modules.get(name)) is not None:
        module, rest = child, after
        name, dot, after = rest.partition(".")
    if _PATH.fullmatch(rest) is None:
        raise AttributeError(f"{path[:80]!r} is no attribute path such as 'blocks.0.attn.num_heads'")
    steps: list[Step] = [int(index) if index else name for index, name in _STEP.findall(rest)]
    attribute, keys = steps[0], pairwise(steps)
    if any(isinstance(step, str) and isinstance(before, str) for before, step in keys):
        raise AttributeError(f"{path!r}: {type(module).__name__} has no module {attribute!r}")
    if not isinstance(attribute, str) or attribute.startswith("__") or attribute not in module.__dict__:
        raise AttributeError(f"{type(model).__name__} has no plain attribute {path!r}")
    return module, steps


def _item(value: Any, step: Step, path: str) -> Any:
    if isinstance(step, int) and isinstance(value, (tuple, list, FeatureInfo)) and step < len(value):
        return value[step]
    if isinstance(step, str) and isinstance(value, dict) and step in value:
        return value[step]
    raise AttributeError(f"{path!r}: {type(value).__name__} has no item {step!r}")


def _put(container: Any, steps: list[Step], value: object) -> Any:
    """The container with `value` put at the steps; only tuples, which cannot change, are made anew."""
    if not steps:
        return value
    step, *rest = steps
    if isinstance(container, FeatureInfo):
        _put(container.info, steps, value)
        return container
    item = _put(container[step], rest, value)
    if not isinstance(container, tuple):
        container[step] = item
        return container
    at = int(step)  # into a tuple only
    items = [*container[:at], item, *container[at + 1 :]]
    return container._make(items) if hasattr(container, "_make") else type(container)(items)


def statistics(model: nn.Module) -> dict[str, list[str]]:
    """Path of every layer that keeps running statistics of its input → names of its own parameters and buffers.

    Such layers are known by torch's convention for them: buffers whose names begin with `running_`.
    """
    found = {}
    for path, module in model.named_modules():
        if any(key.startswith("running_") and buffer is not None for key, buffer in module._buffers.items()):
            own = {**module._parameters, **module._buffers}
            found[path] = [f"{path}.{key}" if path else key for key, tensor in own.items() if tensor is not None]
    return found
