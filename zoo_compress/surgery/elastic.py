"""Elastic networks: one bank of weights that runs at many widths, as views of its parameters."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CompressError, WidthError
from ..structure.bank import Choice
from ..structure.layout import Layout
from ..structure.widths import Group, groups
from .mixed import Mixed
from .modules import clear_caches, statistics
from .resize import resize
from .tracer import named_tensors
from .views import ABSENT, Placing, View, narrowed, put

VIEWS = 64
"""Choices of widths whose views are kept ready."""


class _Private(nn.Module):
    """Tensors that one choice of widths has of its own. A slash stands for the dot in their names."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            key = name.replace(".", "/")
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(key, nn.Parameter(tensor.detach().clone(), tensor.requires_grad))
            else:
                self.register_buffer(key, tensor.detach().clone())

    def by_name(self) -> dict[str, Tensor]:
        return {name.replace("/", "."): tensor for name, tensor in named_tensors(self)}


class _Pass:
    """A pass of an elastic network; it lives as long as the call does."""


def _nothing() -> None:
    """No pass is in progress."""


@dataclass
class _State:
    """What an elastic network knows beside its tensors.

    Attributes:
        layout: Of the bank.
        groups: Of the axes that can change.
        sizes: The chosen ones.
        normalised: Names of the tensors in layers that keep statistics.
        forgetful: Paths of modules that do something of their own in `train`: those that keep tensors between calls forget them there.
        settings: What the method that made it has to remember.
        choices: Those with tensors of their own.
        views: Ready ones, by sizes.
        known: Width → sizes.
        keep: Copies of weights at the chosen widths stay between passes.
        lock: Held by the thread whose pass it is; others wait.
        undo: What to put back for the modules to be the bank again. Empty between passes, unless one was interrupted at the worst moment.
        running: The pass in progress; dead when that is over, however it ended.
    """

    layout: Layout
    groups: tuple[Group, ...]
    sizes: dict[str, int]
    normalised: list[str]
    forgetful: list[str]
    settings: Any
    choices: list[Choice] = field(default_factory=list)
    views: OrderedDict[tuple[int, ...], View] = field(default_factory=OrderedDict)
    known: dict[float, dict[str, int]] = field(default_factory=dict)
    keep: bool = False
    lock: Any = field(default_factory=threading.RLock)
    undo: list[Placing] = field(default_factory=list)
    running: Callable[[], _Pass | None] = _nothing

    def __deepcopy__(self, memo: dict[int, Any]) -> _State:
        return replace(self, choices=list(self.choices), **_fresh())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _fresh()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, **_fresh())


def _fresh() -> dict[str, Any]:
    """What no copy shares: views and what is put back are of the original's modules, and its passes are others."""
    return {"views": OrderedDict(), "lock": threading.RLock(), "undo": [], "running": _nothing}


class Elastic(Mixed, nn.Module):
    """What a timm model gains when its parameters are a bank. It stays the model it is, with its names and attributes.

    At rest it is the whole bank: optimizers, `state_dict` and DDP see every parameter once. While it runs, views of its parameters, and
    the sizes in its attributes, stand in for the chosen widths, and gradients reach the bank. Normalisation statistics differ from width
    to width: a choice of widths in `choices` has its own. At any other, layers in training mode normalise by the batch and forget it, and
    in eval mode the network has to be calibrated first (`zoo_compress.calibrate(net, width, data)`).

    Threads take turns, and a pass that is interrupted anywhere leaves the bank whole: what a pass changes is written down before, and put
    back after it, or before anything next looks at the network.

    Made by `make_elastic_`.
    """

    _elastic: _State
    _plain_class: type[nn.Module]

    @property
    def layout(self) -> Layout:
        """The layout of the bank."""
        return self._elastic.layout

    @property
    def sizes(self) -> dict[str, int]:
        """Axis → its size at the chosen widths."""
        return dict(self._elastic.sizes)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of axes that can change, each in step."""
        return self._elastic.groups

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The choices of widths, beside the whole, that have statistics of their own."""
        return tuple(self._elastic.choices)

    @property
    def calibrated(self) -> bool:
        """Whether there are statistics for the chosen widths, or none are needed."""
        return self._calibrated(self._elastic.sizes)

    def _calibrated(self, sizes: Mapping[str, int]) -> bool:
        state = self._elastic
        return sizes == self.layout.base_sizes or not state.normalised or any(choice.sizes == sizes for choice in state.choices)

    def set_widths(self, sizes: Mapping[str, int]) -> None:
        """Choose the size of every axis; the first elements of each are used.

        Args:
            sizes: Axis of `layout` → size; axes that are not named are whole.

        Raises:
            WidthError: If the layout does not admit the sizes.
        """
        if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes.values()):
            raise WidthError(f"set_widths: expected axis → size, found {dict(sizes)!r}")
        chosen = self.layout.sizes(sizes)
        wide = next((name for name, size in chosen.items() if size > self.layout.axes[name].size), None)
        if wide is not None:
            raise WidthError(f"axis {wide!r}: expected at most the {self.layout.axes[wide].size} of the bank, found {chosen[wide]}")
        self.layout.check_links(sizes)
        self._choose(chosen)

    def _choose(self, sizes: dict[str, int]) -> None:
        view = self._elastic.views.get(tuple(self._elastic.sizes.values()))
        if view is not None:
            view.forget()
        if sizes != self._elastic.sizes:
            self._elastic.sizes = sizes
            for path in self._elastic.forgetful:
                clear_caches(self.get_submodule(path))

    @contextmanager
    def at_widths(self) -> Iterator[None]:
        """Within, the modules hold what they do while the network runs at the chosen widths."""
        with self._elastic.lock:
            if self.is_running:
                yield
                return
            this = _Pass()
            try:
                self._begin(this)
                yield
            finally:
                self._end()

    def _run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method at the chosen widths. As `at_widths`, without anything between the lock and its release that Python could leave."""
        with self._elastic.lock:
            if self.is_running:
                return method(self, *args, **kwargs)
            if not self.training:
                self._check_calibrated()
            this = _Pass()
            try:
                self._begin(this)
                return method(self, *args, **kwargs)
            finally:
                self._end()

    @property
    def is_running(self) -> bool:
        """Whether a pass of this thread is in progress, for the thread that holds the lock."""
        return self._elastic.running() is not None

    def _begin(self, this: _Pass) -> None:
        state = self._elastic
        self._end()  # of a pass that was interrupted
        new: list[Placing] = []
        if isinstance(self, (nn.Sequential, nn.ModuleDict)):  # which run whatever modules they have
            new.append((self._modules, "private", ABSENT))
        if state.sizes != self.layout.base_sizes:
            new += self._view().changes()
        state.undo = [(container, key, container[key]) for container, key, _ in new]
        state.running = weakref.ref(this)
        put(new)

    def _end(self) -> None:
        """Put back what a pass has changed, whatever interrupts that; doing so twice does no harm."""
        interrupt: BaseException | None = None
        while self._elastic.undo:
            try:
                put(self._elastic.undo)
                self._elastic.undo = []
            except BaseException as error:
                interrupt = error
        self._elastic.running = _nothing
        if interrupt is not None:
            raise interrupt

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Within, nobody else runs it, and from outside of a pass it is the bank: what an interrupted one has left is put back."""
        state = vars(self).get("_elastic")
        if state is None:
            yield
            return
        with state.lock:
            if not self.is_running:
                self._end()
            yield

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The bank's, as of any module."""
        with self._whole():
            return super().state_dict(*args, **kwargs)

    def _named_members(self, *args: Any, **kwargs: Any) -> Any:
        with self._whole():
            return iter(list(super()._named_members(*args, **kwargs)))

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        with self._whole():
            return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """Set all modules to train, or to eval."""
        with self._whole():
            return super().train(mode)

    def __reduce_ex__(self, protocol: Any) -> Any:
        with self._whole():
            return super().__reduce_ex__(protocol)

    def sizes_at(self, width: float | Mapping[str, int]) -> tuple[dict[str, int], float | None]:
        """Size of every axis at a width, and the fraction that says it, if one does.

        Args:
            width: Axis → size, or in networks that admit it a fraction of all axes.

        Raises:
            WidthError: If the network does not run at that width.
        """
        if not isinstance(width, Mapping):
            raise WidthError(f"{type(self).__name__}: expected a width as axis → size, found {width!r}")
        return self.layout.sizes(width), None

    def macs(self) -> int:
        """Multiply-accumulates of one sample at the chosen widths."""
        return self.layout.macs(self._elastic.sizes)

    def static(self) -> nn.Module:
        """A model of its own with the chosen widths, in the same mode, with the same outputs to the bit.

        Raises:
            CompressError: If there are no statistics for these widths.
        """
        self._check_calibrated()
        state, own = self._elastic, self._own()
        with self.plain():
            small = resize(self, state.layout, state.sizes)
        with torch.no_grad():
            for name, tensor in named_tensors(small):
                if name in own:
                    tensor.copy_(own[name])
        return small

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Within, this is the bank as an ordinary model of its own class."""
        kind, state, private = type(self), vars(self).pop("_elastic"), self._modules.pop("private")
        self.__class__ = self._plain_class  # type: ignore[assignment]
        try:
            yield
        finally:
            self.__class__ = kind
            vars(self)["_elastic"], self._modules["private"] = state, private

    def add_choice(self, choice: Choice, own: Mapping[str, Tensor] | None = None) -> None:
        """Give a choice of widths statistics of its own, and scales and shifts where it says so, or new contents to those it has.

        Args:
            choice: The choice.
            own: Name of a tensor → its contents; those left out start as the bank's.
        """
        self.layout.check_links(choice.sizes)
        if choice.sizes == self.layout.base_sizes:
            targets = dict(named_tensors(self))
        else:
            known = [c.sizes for c in self._elastic.choices]
            if choice.sizes not in known:
                self._elastic.choices.append(choice)
                self._privates.append(_Private(self._narrowed(choice.sizes, affine=choice.affine)).train(self.training))
                self._elastic.views.clear()
                known.append(choice.sizes)
            targets = self._private(known.index(choice.sizes))
        with torch.no_grad():
            for name, tensor in (own or {}).items():
                targets[name].copy_(tensor)

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """Not available: the classifier is part of the bank, and what is known of its widths is of this one.

        Raises:
            CompressError: Always.
        """
        raise CompressError(
            f"{type(self).__name__}: reset_classifier({num_classes}) would leave the widths without their classifier: save it and load it "
            f"with timm.create_model(…, num_classes={num_classes}), or reset before it gets several widths"
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Not available: it would run parts of the network again after the chosen widths have been put away.

        Raises:
            CompressError: If it is asked for.
        """
        if enable:
            raise CompressError(f"{type(self).__name__}: gradient checkpointing does not work at several widths; train without it")

    @property
    def _privates(self) -> nn.ModuleList:
        return self._modules["private"]  # type: ignore[return-value]

    def _private(self, place: int) -> dict[str, Tensor]:
        return self._privates[place].by_name()  # type: ignore[operator]

    def _narrowed(self, sizes: Mapping[str, int], *, affine: bool) -> dict[str, Tensor]:
        """The bank's statistics, with or without what is trained in the same layers, at some sizes: parameters, or tensors."""
        tensors = dict(named_tensors(self))
        found = {}
        for name in self._elastic.normalised:
            trained = name in self.layout.trained
            if affine or not trained:
                tensor = narrowed(tensors[name].detach(), self.layout.params[name], self.layout.base_sizes, sizes)
                found[name] = nn.Parameter(tensor, tensors[name].requires_grad) if trained else tensor
        return found

    def _own(self) -> dict[str, Tensor]:
        """What the chosen widths have of their own, kept or to be forgotten."""
        for place, choice in enumerate(self._elastic.choices):
            if choice.sizes == self._elastic.sizes:
                return self._private(place)
        if self._elastic.sizes == self.layout.base_sizes:
            return {}
        return {name: tensor.clone() for name, tensor in self._narrowed(self._elastic.sizes, affine=False).items()}

    def _view(self) -> View:
        views, key = self._elastic.views, tuple(self._elastic.sizes.values())
        if key not in views:
            views[key] = View(self, self.layout, self._elastic.sizes, self._own())
            while len(views) > VIEWS:
                views.popitem(last=False)
        views.move_to_end(key)
        views[key].keep = self._elastic.keep
        return views[key]

    def _check_calibrated(self) -> None:
        if not self.calibrated:
            raise CompressError(
                f"{type(self).__name__}: its normalisation layers have no statistics for the chosen widths: expected "
                "zoo_compress.calibrate(net, width, images) first, or training mode"
            )


E = TypeVar("E", bound=Elastic)


def make_elastic_(model: nn.Module, layout: Layout, kind: type[E], settings: Any = None) -> E:
    """Make a model the bank of an elastic network, in place, and choose the whole of it.

    Args:
        model: The model.
        layout: Its layout.
        kind: `Elastic` or a subclass: what the network can do.
        settings: What that has to remember, immutable.
    """
    if isinstance(model, Elastic):
        raise CompressError(f"{type(model).__name__} runs at several widths already; export one of them first")
    model.__class__ = _mixed(kind, type(model))  # type: ignore[arg-type]  # classes are hashable, whatever their instances are
    normalised = [name for names in statistics(model).values() for name in names]
    forgetful = [path for path, module in model.named_modules() if path and type(module).train is not nn.Module.train]
    vars(model)["_elastic"] = _State(layout, tuple(groups(layout)), dict(layout.base_sizes), normalised, forgetful, settings)
    model._modules["private"] = nn.ModuleList()
    return model  # type: ignore[return-value]


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Within, what a model becomes is taken back if it cannot become that."""
    kind, values, modules = type(model), dict(vars(model)), dict(model._modules)
    try:
        yield
    except BaseException:
        model.__class__ = kind
        for held, before in ((vars(model), values), (model._modules, modules)):
            held.clear()
            held.update(before)
        raise


@cache
def _mixed(kind: type[Elastic], base: type[nn.Module]) -> type[Elastic]:
    """The class of elastic networks of one architecture: whatever of it runs, runs at the chosen widths."""
    methods = {name: _at_widths(getattr(base, name)) for name in dir(base) if name.startswith("forward") and callable(getattr(base, name))}
    own = {**methods, "_plain_class": base, "_made": (_mixed, kind, base), "__module__": base.__module__}
    return type(f"{kind.__name__}{base.__name__}", (kind, base), own)


def _at_widths(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def run(self: Elastic, *args: Any, **kwargs: Any) -> Any:
        return self._run(method, *args, **kwargs)

    return run
