"""Residual blocks: which modules add to what they are given, found by running, and models without some of them."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torch
import torch.fx
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import AnalysisError, CompressError, VariantError
from ..structure.variant import Variant, record
from .images import fitting
from .modules import copied, eval_copy, every_output, holders, takes_model
from .origin import origin, stamp
from .trace import analyze, default_input
from .tracer import MODEL_ERRORS

TOLERANCE = 1e-5
"""Relative change that rounding may cause."""

Value = Callable[[nn.Module, Any, Any], Any]


class Skip(nn.Module):
    """In the place of a block that was removed: gives what it is given.

    Args:
        block: The block. What its forward method takes, this one's does.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        try:
            types = get_type_hints(block.forward)
        except (NameError, TypeError):  # of names that only a type checker sees
            types = {}
        parameters = inspect.signature(block.forward).parameters.values()
        self.takes = tuple((p.name, types.get(p.name), p.default, p.kind.name.startswith("VAR")) for p in parameters)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The first argument."""
        return x

    def __prepare_scriptable__(self) -> nn.Module:
        """What TorchScript compiles instead, since it knows no functions of any number of arguments."""
        graph = torch.fx.Graph()
        places = [graph.placeholder(name, kind, default) for name, kind, default, several in self.takes if not several]
        graph.output(places[0])
        return torch.fx.GraphModule(nn.Module(), graph)


@dataclass(frozen=True)
class Block:
    """A residual block.

    Attributes:
        path: Its module.
        ends: The modules whose outputs it adds to what it is given, in the order they run. Zero them, and the block is the identity;
            scale their parameters, and what it adds is scaled.
        direct: It adds these outputs themselves; else something made of them.
    """

    path: str
    ends: tuple[str, ...]
    direct: bool = True


@takes_model
def residual_blocks(model: nn.Module, example: torch.Tensor | None = None, seed: int = 0) -> tuple[dict[str, Block], dict[str, str]]:
    """The residual blocks of a model.

    The model runs once without data; modules within which the output of another module is added to the input, or to such a sum, are
    looked at further; where something else is added, the module that ran last may be what it is made of. Runs on random images must show
    that each block gives what it is given when all these outputs are zero, that they scale with their modules' parameters, and, where they
    are not added themselves, that what the block adds scales with them.

    Args:
        model: The model. It is not changed.
        example: A batch, where the model does not say what it takes.
        seed: Of the images.

    Returns:
        Path → block, in the order they run; and path → reason, for modules that add to their input and cannot be removed.
    """
    example = default_input(model) if example is None else example
    adding = _adding(model, example)
    refused: dict[str, str] = {}
    held = holders(model)
    for path, block in adding.items():
        parameters = [p for end in block.ends for p in model.get_submodule(end).parameters()]
        if any(len(held[id(p)]) > 1 for p in parameters):
            refused[path] = "what it adds comes from weights that others use too"
    image = torch.randn((2, *example.shape[1:]), generator=torch.Generator().manual_seed(seed))
    found = dict(adding)
    for check in (_not_linear, _not_identity, _not_made_of):
        found = {path: block for path, block in found.items() if path not in refused}
        refused |= check(model, found, image)
    return {path: block for path, block in found.items() if path not in refused}, refused


@takes_model
def remove_blocks(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """A copy of a model without some of its residual blocks: they give what they are given. It saves and reloads as `<arch>__pruned`.

    Args:
        model: A model that timm's factory made, compressed or not.
        paths: The blocks; see `residual_blocks`.

    Raises:
        CompressError: If one is no residual block, with what there is, or the model does not run without them.
    """
    blocks, refused = residual_blocks(model)
    for path in paths:
        if path not in blocks:
            reason = refused.get(path, f"no residual block; there are {', '.join(blocks) or 'none'}")
            raise CompressError(f"remove_blocks: {path!r}: {reason}")
    new = skip_(copied(model), tuple(paths))
    try:
        layout = analyze(new)
    except AnalysisError as error:
        raise CompressError(f"remove_blocks: the model does not run without {', '.join(paths)}: {error}") from error
    source = origin(new)
    if source is None or not paths:
        return new
    before = source.previous or Variant(method="pruned", base=source.base, base_args=source.args, sizes={}, params={})
    left = _without(before, paths)
    if not left.params:
        stamp(new, left.model_copy(update={"method": "pruned"}))
    else:
        stamp(new, record(layout, layout.base_sizes, method="pruned", base=source.base, base_args=source.args, previous=left))
    return new


def skip_(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """Replace blocks by the identity, in place.

    Raises:
        VariantError: If the model has no such module; nothing is changed then.
    """
    known = {path for path, _ in model.named_modules()} - {""}
    for path in paths:
        if path not in known:
            raise VariantError(f"variant.removed: {type(model).__name__} has no block {path!r}")
        if sum(path == other or path.startswith(f"{other}.") for other in paths) > 1:
            raise VariantError(f"variant.removed: {path!r} is there twice, or within another")
    for path in paths:
        parent, _, name = path.rpartition(".")
        skip = Skip(model.get_submodule(path)).train(model.training)
        model.get_submodule(parent).register_module(name, skip)
    return model


def present(model: nn.Module, paths: Sequence[str]) -> tuple[str, ...]:
    """The blocks that a part of the base has."""
    known = {path for path, _ in model.named_modules()}
    return tuple(path for path in paths if path in known)


def _without(variant: Variant, paths: Sequence[str]) -> Variant:
    """What a record says of the rest."""

    def rest(entries: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in entries.items() if not any(name.startswith(f"{path}.") for path in paths)}

    parts = {key: rest(getattr(variant, key)) for key in ("params", "attributes", "scales", "factors", "packed")}
    return variant.model_copy(update={**parts, "removed": (*variant.removed, *paths)})


@dataclass
class _Frame:
    """A module being run: what of the tensors alive is its input, or that with something added."""

    path: str
    shape: torch.Size
    trunk: set[int]
    ends: list[str] = field(default_factory=list)
    direct: bool = True
    last: str | None = None


class _Additions(TorchDispatchMode):
    """Sees what modules add to their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[_Frame] = []
        self.made: dict[int, str] = {}
        self.found: dict[str, Block] = {}
        self.calls: Counter[str] = Counter()
        self._alive: list[torch.Tensor] = []  # so that no storage is another's later

    def watch(self, model: nn.Module) -> None:
        for path, module in model.named_modules():
            if path:
                module.register_forward_pre_hook(self._enter(path), with_kwargs=True)
                module.register_forward_hook(self._leave(path))

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = _first(args, kwargs)
            first = given if isinstance(given, torch.Tensor) else None
            self.frames.append(_Frame(path, torch.Size() if first is None else first.shape, set() if first is None else {self._key(first)}))

        return hook

    def _leave(self, path: str) -> Value:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            frame = self.frames.pop()
            self.calls[path] += 1
            if not isinstance(out, torch.Tensor):
                return
            if any(True for _ in module.parameters()):
                self.made.setdefault(self._key(out), path)
            if module._parameters:
                for outer in self.frames:
                    if not (outer.last or "").startswith(f"{path}."):  # what runs within it is nearer to what it gives
                        outer.last = path
            if frame.ends and out.shape == frame.shape:
                self.found[path] = Block(path, tuple(frame.ends), frame.direct)

        return hook

    def _key(self, tensor: torch.Tensor) -> int:
        self._alive.append(tensor)
        return int(tensor.untyped_storage()._cdata)  # views and what is changed in place are the same to us

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2].removesuffix("_")
        pair = [self._key(arg) if isinstance(arg, torch.Tensor) else None for arg in args[:2]] if name == "add" else []
        ends = [self.made.get(key) if key is not None else None for key in pair]
        out = func(*args, **(kwargs or {}))
        if len(pair) == 2 and None not in pair:
            for frame in self.frames:
                for one, other in ((0, 1), (1, 0)):
                    end = ends[other]
                    if pair[one] in frame.trunk and pair[other] not in frame.trunk:
                        inside = end is not None and end.startswith(f"{frame.path}.")
                        frame.direct &= inside
                        made = end if inside else frame.last
                        if made is not None:
                            frame.ends.append(made)
                        frame.trunk.add(self._key(out))
                        break
        return out


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a call, by position or by keyword."""
    return next(iter((*args, *kwargs.values())), None)


def _adding(model: nn.Module, example: torch.Tensor) -> dict[str, Block]:
    """The innermost modules that add to their input and run once."""
    failure: Exception | None = None
    for device in ("meta", "cpu"):  # a model that looks at values needs real tensors
        clone, additions = eval_copy(model, device), _Additions()
        additions.watch(clone)
        try:
            with additions, torch.no_grad(), every_output(clone):
                clone(torch.zeros((2, *example.shape[1:]), dtype=example.dtype, device=device))
        except MODEL_ERRORS as error:
            failure = error
            continue
        found = additions.found
        inner = [path for path in found if not any(other.startswith(f"{path}.") for other in found)]
        once = [path for path in inner if all(additions.calls[name] == 1 for name in (path, *found[path].ends))]
        return {path: found[path] for path in once if len(set(found[path].ends)) == len(found[path].ends)}
    raise AnalysisError(f"{type(model).__name__} does not run on an input of shape {tuple(example.shape)}: {failure}") from failure


def _run(model: nn.Module, image: torch.Tensor) -> None:
    with torch.no_grad(), every_output(model):
        model(fitting(model, image))


def _far(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return not float((found - expected).norm()) <= TOLERANCE * float(expected.norm().clamp_min(1e-30))


def _not_linear(model: nn.Module, blocks: dict[str, Block], image: torch.Tensor) -> dict[str, str]:
    """Blocks in which twice the parameters of a module at the end of a branch do not give twice its output."""
    refused: dict[str, str] = {}
    clone = eval_copy(model, "cpu").requires_grad_(False)

    def hook(path: str, end: str) -> Callable[..., None]:
        def compare(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            twice = copy.deepcopy(module)
            twice._forward_hooks.clear()
            for parameter in twice.parameters():
                parameter.mul_(2)
            if _far(twice(*args, **kwargs), 2 * out):
                refused[path] = f"what {end} ({type(module).__name__}) adds does not scale with its weights"

        return compare

    for path, block in blocks.items():
        for end in block.ends:
            clone.get_submodule(end).register_forward_hook(hook(path, end), with_kwargs=True)
    _run(clone, image)
    return refused


def _not_identity(model: nn.Module, blocks: dict[str, Block], image: torch.Tensor) -> dict[str, str]:
    """Blocks that do not give what they are given when nothing is added to it."""
    refused: dict[str, str] = {}
    given: dict[str, torch.Tensor] = {}
    clone = eval_copy(model, "cpu").requires_grad_(False)

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given[path] = _first(args, kwargs).clone()

        return hook

    def leave(path: str) -> Value:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if _far(out, given.pop(path)):
                refused[path] = "without what it adds, it still changes what it is given"

        return hook

    for path, block in blocks.items():
        for end in block.ends:
            clone.get_submodule(end).register_forward_hook(lambda module, args, out: torch.zeros_like(out))
        clone.get_submodule(path).register_forward_pre_hook(enter(path), with_kwargs=True)
        clone.get_submodule(path).register_forward_hook(leave(path))
    _run(clone, image)
    return refused


def _not_made_of(model: nn.Module, blocks: dict[str, Block], image: torch.Tensor) -> dict[str, str]:
    """Blocks that do not add twice as much when one of the modules gives twice as much and the others nothing."""
    refused: dict[str, str] = {}
    if all(block.direct for block in blocks.values()):
        return refused

    def hook(block: Block) -> Callable[..., None]:
        def compare(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            for end in block.ends:
                once, twice = (_added(module, block, end, scale, args, kwargs) for scale in (1, 2))
                if not bool(once.any()) or _far(twice, 2 * once):
                    refused[block.path] = f"what it adds is not the output of a module, nor in proportion to that of {end}"

        return compare

    for precision in (torch.float64, torch.float32):
        # What is added may be a millionth of what it is added to. A model that mixes dtypes runs in its own only.
        clone = eval_copy(model, "cpu").requires_grad_(False).to(precision)
        for path, block in blocks.items():
            if not block.direct:
                clone.get_submodule(path).register_forward_hook(hook(block), with_kwargs=True)
        try:
            _run(clone, image)
        except MODEL_ERRORS:
            if precision is torch.float32:
                raise
            continue
        break
    return refused


def _added(module: nn.Module, block: Block, end: str, scale: int, args: Any, kwargs: Any) -> torch.Tensor:
    twin = copy.deepcopy(module)
    twin._forward_hooks.clear()
    for each in block.ends:
        factor = scale if each == end else 0
        twin.get_submodule(each.removeprefix(f"{block.path}.")).register_forward_hook(lambda module, args, out, factor=factor: out * factor)
    return twin(*args, **kwargs) - _first(args, kwargs)
