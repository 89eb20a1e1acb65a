"""What an analysis watches while a model runs: the functions its code calls, and the operations that torch does for them."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import cache, lru_cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..structure import unify as u
from . import recurrent, torch_attention, vanishing  # noqa: F401 - importing registers the handlers of recurrent layers and attention
from .functions import FUNCTIONS
from .kernels import Kernels
from .rules import COSTLY, RULES, elementwise
from .scales import ARITHMETIC
from .sizes import Computed, Number, Size, heard_by, origins, plain
from .tracer import MODEL_ERRORS, Tracer
from .unseen import call, leaves


class Functions(TorchFunctionMode):
    """Sees the sizes a model passes to torch functions, with where they came from."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What torch computes inside a function is its own business.
        tracer = self.tracer
        kept = tracer.stated, tracer.accounted
        tracer.stated, tracer.accounted = [], Counter()
        tracer.running += 1
        try:
            with heard_by(None):
                return self._call(func, args, kwargs or {})
        finally:
            tracer.running -= 1
            tracer.stated, tracer.accounted = kept

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        tracer = self.tracer
        handler = None if tracer.quiet else FUNCTIONS.get(func)
        name = tracer.operation = _name(func)
        products = len(tracer.scales.products)
        given = list(leaves((args, kwargs)))
        if tracer.listening:
            tracer.calls.append(call(func, given))
        if handler is not None and _takes(handler, tracer, func, *args, **kwargs):
            out = handler(tracer, func, *args, **kwargs)
        else:
            born = len(tracer.born)
            tracer.stated = [number for number in given if type(number) is int]
            out = func(*args, **kwargs)
            tracer.settle(born)
        if not tracer.quiet:
            numbers = [number for number in given if isinstance(number, (Size, Computed)) and not self._accounted(number)]
            computed = [number for number in numbers if isinstance(number, Computed)]
            tensors = [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
            for number in numbers:
                if isinstance(number, Size):
                    self._hand_over(number, name, [] if handler or name in ARITHMETIC else tensors)
            tracer.scales.follow(name, computed, tensors, out, products)
        return out

    def _hand_over(self, number: Size, name: str, tensors: list[torch.Tensor]) -> None:
        """Keep the sizes behind a number that a function was given, and dimensions that may be what it speaks of."""
        reason = f"{name} is given it as a number"
        self.tracer.keep(origins(number), reason)
        for tensor in tensors:
            if plain(number) >= tensor.ndim:  # else it may be the number of a dimension
                self.tracer.keep([term for term in self.tracer.dims(tensor) if u.size_of(term) == plain(number)], reason)

    def _accounted(self, number: Number) -> bool:
        known = self.tracer.accounted[id(number)]
        self.tracer.accounted[id(number)] -= 1
        return known > 0


def _name(function: Any) -> str:
    """Name of a torch function; of a property, with the class it belongs to."""
    name = getattr(function, "__name__", str(function))
    return f"Tensor.{getattr(function.__self__, '__name__', '')}" if name == "__get__" else name


def _takes(handler: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether a handler knows the arguments a function was called with."""
    try:
        _signature(handler).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


_signature = lru_cache(maxsize=None)(inspect.signature)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments, and in lists among them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _within(sizes: list[int], stated: list[int]) -> bool:
    """Whether numbers that a function was given are the sizes of a tensor, in order, with -1 for any."""
    windows = (stated[i : i + len(sizes)] for i in range(len(stated) - len(sizes) + 1))
    return any(all(number in (-1, size) for number, size in zip(window, sizes, strict=True)) for window in windows)


_SHAPING = {"view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "as_strided", "as_strided_"}
"""Operations that are told the sizes of their result."""
_NUMBERLESS = {"detach", "alias", "lift_fresh", "view_as"}
"""Operations that code may get to without a torch function and that neither read nor write a size."""


class Operations(TorchDispatchMode):
    """Sees every ATen operation and applies its rule."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer
        self.kernels = Kernels()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tracer = self.tracer
        name = _operation(func)
        if name not in RULES and func._can_decompose():
            # Inside `inference_mode` torch hands over whole what it takes apart elsewhere.
            with self:
                return func.decompose(*args, **kwargs)
        tensors = list(_tensors((*args, *kwargs.values())))
        for tensor in tensors:
            tracer.seen.add(id(tensor))
            tracer.loose.pop(id(tensor), None)
        with nullcontext() if tracer.running else torch._C.DisableTorchFunction():
            before = self._as_it_was(args[0]) if torch.Tag.inplace_view in func.tags else None
            out = self.kernels(func, args, kwargs)
        if before is not None:  # the rule is that of the operation that gives the new shape to another tensor
            args, tensors = (before, *args[1:]), [before, *tensors[1:]]
        return self._told(func, args, kwargs, tensors, out)

    def _as_it_was(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of a tensor that is about to get another shape, with what is known of it; the tensor itself forgets that."""
        before = tensor.detach()
        self.tracer.hand_on(tensor, before)
        self.tracer.forget(tensor)
        return before

    def _told(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], out: Any) -> Any:
        """What an operation gave, with the terms of its dimensions."""
        tracer, name = self.tracer, _operation(func)
        from_image = any(map(tracer.is_image, tensors))
        if from_image:
            for tensor in _tensors([out]):
                tracer.mark_image(tensor)
        if not tracer.quiet:
            before = len(tracer.costs)
            self._apply(func, args, kwargs, tensors, out)
            numbers = any(isinstance(value, (int, float)) for value in args[1:])
            vanishing.follow(tracer, name, tensors, numbers, list(_tensors([out])))
            self._numbers(name, tensors, out)
            if not func._schema.is_mutable:
                tracer.loose.update((id(tensor), tensor) for tensor in _tensors([out]))
            elif "fill" not in tracer.operation and "zero" not in tracer.operation:
                tracer.written(out)
            if not from_image:
                tracer.shared_costs += tracer.costs[before:]
        return out

    def _apply(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], out: Any) -> None:
        tracer = self.tracer
        name = tracer.operation = _operation(func)
        rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
        if tensors and rule not in COSTLY and all(map(tracer.is_constant, tensors)):
            for tensor in _tensors([out]):
                tracer.set_constant(tensor)
            return
        if rule is None and not func._schema.returns and not func._schema.is_mutable:
            return  # a check
        try:
            terms = self._terms(func, rule, args, kwargs, tensors, out)
            for tensor, dims in [(out, terms)] if isinstance(out, torch.Tensor) else zip(out, terms, strict=True):
                if isinstance(tensor, torch.Tensor):
                    tracer.give(tensor, dims)
        except MODEL_ERRORS as error:
            # No rule, or one that does not fit this use or this release of torch: freezing is sound whatever the rule did before.
            why = "has no rule" if isinstance(error, NotImplementedError) else f"has no rule for this use ({error})"
            if tracer.freeze_all(tensors, f"{tracer.where} {why}"):
                tracer.unknown[name if "::" in name else f"aten.{name}"] += 1
            for tensor in _tensors([out]):
                tracer.set_constant(tensor)

    def _numbers(self, name: str, tensors: list[torch.Tensor], out: Any) -> None:
        """Keep the sizes that an operation was told as plain numbers."""
        tracer = self.tracer
        if not tracer.running and name not in _NUMBERLESS:
            inside = f"{tracer.where} runs in TorchScript, or in another extension, where sizes are numbers that cannot be followed"
            tracer.freeze_all((tensors, out), inside)
        elif name in _SHAPING and _within(list(out.shape), tracer.stated):
            for size, term in zip(out.shape, tracer.dims(out), strict=True):
                if size in tracer.stated:
                    u.fix(term, f"{tracer.where} writes its size as the number {size}")
        elif name == "native_group_norm":  # is told sizes too
            for term in tracer.dims(tensors[0]):
                if u.size_of(term) in tracer.stated:
                    u.freeze(term, f"{tracer.where} writes its size as the number {u.size_of(term)}")
        elif name in ("bmm", "baddbmm") and all(map(tracer.is_image, tensors[-2:])):
            tracer.scales.products.append(tracer.dims(tensors[-1])[-2])

    def _terms(self, func: Any, rule: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], out: Any) -> Any:
        if rule is not None:
            written = {a.name for a in func._schema.arguments if a.is_out}
            names = [a.name for a in func._schema.arguments]
            named = {**dict(zip(names, args, strict=False)), **kwargs}
            return rule(self.tracer, out, **{name: value for name, value in named.items() if name not in written})
        if _is_pointwise(func) and isinstance(out, torch.Tensor):
            return elementwise(self.tracer, tensors)
        raise NotImplementedError


@cache
def _operation(func: Any) -> str:
    """Name of an operation, with the library it belongs to where that is not torch itself."""
    return func._schema.name.removeprefix("aten::")


@cache
def _is_pointwise(func: Any) -> bool:
    """Whether torch says that an operation, or the one that it does in place, is pointwise."""
    name = func._schema.name
    twin = getattr(torch.ops.aten, _operation(func).removesuffix("_"), None) if name.startswith("aten::") else None
    return torch.Tag.pointwise in func.tags or (
        twin is not None and any(torch.Tag.pointwise in getattr(twin, overload).tags for overload in twin.overloads())
    )
