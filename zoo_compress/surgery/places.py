"""Where exits can be: every module boundary of a forward pass, what it costs to get there, and what a head would read."""

from __future__ import annotations

import difflib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import AnalysisError, CompressError
from ..structure import unify as u
from ..structure.exits import MAPS, MAX_EXITS, MAX_GRID, Exit, Format
from .metadata import feature_modules
from .proof import Proof, Trial
from .rows import Boundary
from .trace import BATCH, run_traced
from .tracer import MODEL_ERRORS, Tracer


@dataclass(frozen=True)
class Place:
    """The end of one module in a forward pass.

    Attributes:
        path: Name of the module.
        fraction: MACs until there, as a fraction of the whole.
        exit: The exit a head would make there; None if nothing it gives can be pooled to features of each sample.
        why: Why not, then.
        beside: Number of other tensors computed from the image that are alive and used later. Where there are any, samples that are done
            cannot leave the batch, and are computed along.
        repeated: The module runs more than once.
        named: timm names it in `feature_info`.
        listed: It is a child of the model, or of a sequence of modules.
        block: It has modules of its own.
    """

    path: str
    fraction: float
    exit: Exit | None
    why: str
    beside: int
    repeated: bool
    named: bool
    listed: bool
    block: bool


def places(model: nn.Module, example: torch.Tensor, grid: int | None = None) -> list[Place]:
    """Every module boundary of a model's forward pass, in the order they are reached. Nothing is computed: tensors have no data.

    Args:
        model: The model.
        example: A batch of two; only its shape and dtype are used.
        grid: See `choose`.

    Raises:
        AnalysisError: If the model does not run.
    """
    for device in ("meta", "cpu"):  # a model that looks at values needs real tensors
        record = _Record()
        try:
            _, parameters, _ = run_traced(model, example, device, record.watch)
            break
        except MODEL_ERRORS as error:
            failure = error
    else:
        raise AnalysisError(f"{type(model).__name__} does not run on an input of shape {tuple(example.shape)}: {failure}") from failure
    named = {path for path, _ in feature_modules(model)}
    runs = Counter(end.path for end in record.ends)
    total = max(record.macs(record.last), 1)
    # How many dimensions of parameters each axis runs along: many for channels, few for positions (an embedding of them, a mixer).
    along = Counter(v for terms in parameters.values() for term in terms for v in u.variables(term))
    token = bool(getattr(model, "num_prefix_tokens", 0)) and getattr(model, "global_pool", "token") == "token"
    classes = getattr(model, "num_classes", 0)
    room = HEAD * sum(parameter.numel() for parameter in model.parameters()) / classes if classes else 0
    finest = functools.partial(_finest, grid=grid, room=room)
    found = []
    for end in record.ends:
        # Before anything has mixed positions, a class token knows nothing of the image.
        exit, why = _exit(end, along, token and end.step >= record.uses.mixed, finest)
        parent, _, _ = end.path.rpartition(".")
        listed = not parent or isinstance(model.get_submodule(parent), (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        block = any(True for _ in model.get_submodule(end.path).children())
        fraction = record.macs(end) / total
        found.append(Place(end.path, fraction, exit, why, record.beside(end), runs[end.path] > 1, end.path in named, listed, block))
    return found


def choose(
    model: nn.Module, example: torch.Tensor, wanted: int | Sequence[str] | Sequence[float], grid: int | None = None
) -> tuple[list[Exit], tuple[Boundary | None, ...]]:
    """The exits a user asked for, and where rows leave, proven by letting them.

    Args:
        model: The model.
        example: A batch of two; only its shape and dtype are used.
        wanted: How many, at evenly spaced fractions of the MACs; or at these fractions; or the names of modules.
        grid: Of exits that read maps; None takes the finest up to `GRID` whose head has at most `HEAD` of the model's parameters.

    Returns:
        The exits, and how rows leave the batch at each; None where they cannot, and are computed along.

    Raises:
        CompressError: If there is no such place, or no head fits there; says why.
    """
    found = places(model, example, grid)
    if isinstance(wanted, int) or not isinstance(wanted[0], str):
        fractions = [(i + 1) / (wanted + 1) for i in range(wanted)] if isinstance(wanted, int) else [float(f) for f in wanted]
        return _nearest(model, example, found, fractions)
    by_path = {place.path: place for place in found}
    chosen = [_by_name(model, name, by_path) for name in wanted]  # type: ignore[arg-type]
    order = {place.path: i for i, place in enumerate(found)}
    chosen.sort(key=lambda place: order[place.path])
    trial = Trial(model, example)
    proof = _try(trial, chosen)
    if isinstance(proof, str):
        for place in chosen:
            if isinstance(alone := _try(trial, [place]), str):
                raise CompressError(f"exits: there can be none at {place.path!r}: {alone}")
        raise CompressError(f"exits: there can be none at {', '.join(place.path for place in chosen)} together: {proof}")
    return [place.exit for place in chosen if place.exit is not None], proof.boundaries


def check_wanted(wanted: Any) -> int | tuple[str, ...] | tuple[float, ...]:
    """What a user may pass as `exits`, checked before anything runs.

    Raises:
        CompressError: If it is no count, names, or ascending fractions.
    """
    expected = "expected a number of exits, names of modules, or ascending fractions of the MACs between 0 and 1"
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        if not 1 <= wanted <= MAX_EXITS:
            raise CompressError(f"exits: expected 1 to {MAX_EXITS} of them, found {wanted}")
        return wanted
    items = (wanted,) if isinstance(wanted, (str, float)) else tuple(wanted) if isinstance(wanted, (list, tuple)) else ()
    if not items or len(items) > MAX_EXITS:
        raise CompressError(f"exits: {expected}, found {wanted!r}")
    if all(isinstance(item, str) for item in items):
        if len(set(items)) != len(items):
            raise CompressError(f"exits: expected each module once, found {', '.join(items)}")
        return items
    if all(isinstance(item, float) for item in items):
        if not all(a < b for a, b in zip((0.0, *items), (*items, 1.0), strict=True)):
            raise CompressError(f"exits: {expected}, found {', '.join(map(str, items))}")
        return items
    raise CompressError(f"exits: {expected}, found {wanted!r}")


def _by_name(model: nn.Module, name: str, by_path: dict[str, Place]) -> Place:
    if name not in {path for path, _ in model.named_modules()} or not name:
        near = difflib.get_close_matches(name, by_path, n=3, cutoff=0.4) or list(by_path)[:3]
        raise CompressError(f"exits: {type(model).__name__} has no module {name!r}; did you mean {', '.join(near)}?")
    place = by_path.get(name)
    if place is None:
        raise CompressError(f"exits: {name!r} does not run by itself in a forward pass; pick a module inside or around it")
    if place.fraction >= 1:
        raise CompressError(f"exits: nothing is computed after {name!r}: that is the network's own end, after its classifier")
    if place.repeated:
        raise CompressError(f"exits: {name!r} runs more than once in a forward pass; pick a module that runs once")
    if place.exit is None:
        raise CompressError(f"exits: no head fits {name!r}: {place.why}")
    return place


def _nearest(model: nn.Module, example: torch.Tensor, found: list[Place], fractions: list[float]) -> Any:
    """Places near the wanted fractions, and how rows leave there."""
    usable = [p for p in found if p.exit and p.exit.format != "NC" and not p.repeated and 0 < p.fraction < LAST]
    bad: dict[str, str] = {}
    held = {place.path for place in usable if place.beside}  # rows cannot leave there
    trial = Trial(model, example)
    while True:
        pool = [place for place in usable if place.path not in bad]
        picked = _pick(pool, held, fractions)
        if picked is None:
            some = next(iter(bad.items()), None)
            note = f" ({len(bad)} were refused; {some[0]!r}: {some[1]})" if some else ""
            most, what = len(_distinct([place for place in pool if _fits(place, held)])), type(model).__name__
            raise CompressError(f"exits: expected at most {most} of them, the places {what} has, found {len(fractions)}{note}")
        proof = _try(trial, picked)
        if isinstance(proof, str):
            alone = {place.path: reason for place in picked if isinstance(reason := _try(trial, [place]), str)}
            # Each alone is fine and together they are not: give up the last, which another takes the place of.
            bad |= alone or {picked[-1].path: "not together with the others"}
            continue
        holding = {place.path for place, how in zip(picked, proof.boundaries, strict=True) if how is None} - held
        if not holding:
            return [place.exit for place in picked if place.exit is not None], proof.boundaries
        held |= holding


GRID = 4
"""Finest grid of maps that a head pools to by default: 16 means of each channel."""

HEAD = 0.05
"""Most parameters of a head whose grid was not asked for, as a fraction of the model's."""

LAST = 0.97
"""Exits later than this fraction of the MACs save nothing worth a head."""


def _pick(pool: list[Place], held: Set[str], fractions: list[float]) -> list[Place] | None:
    """Places near the fractions: of those timm names or lists in sequences, else any block, where rows can leave; where all these lie too
    far off, also those where they are held."""
    spacing = 1 / (len(fractions) + 1)
    free = [place for place in pool if place.path not in held]
    tiers = [
        ([p for p in free if p.named or p.listed], spacing / 2),
        ([p for p in free if p.named or p.listed or p.block], spacing),
        ([p for p in pool if _fits(p, held)], spacing),
    ]
    best: tuple[float, list[Place]] | None = None
    for places, near in tiers:
        picked = _assign(_distinct(places, held), fractions, held)
        if picked is None:
            continue
        off = max(abs(place.fraction - f) for place, f in zip(picked, fractions, strict=True))
        if best is None or off < best[0]:
            best = (off, picked)
        if best[0] <= near:
            break
    return None if best is None else best[1]


def _fits(place: Place, held: Set[str]) -> bool:
    """Whether a place may be chosen for its cost; by name any may that works."""
    return place.named or place.listed or (place.block and place.path not in held)


def _try(trial: Trial, chosen: Sequence[Place]) -> Proof | str:
    """Where samples can leave among these places, or why there can be no exits."""
    try:
        return trial.prove([place.path for place in chosen])
    except AnalysisError as error:
        return str(error)


def _distinct(pool: list[Place], held: Set[str] = frozenset()) -> list[Place]:
    """One place of those with equal cost: where rows can leave, then one that timm names, else the last reached, which comes after
    activations and pooling."""
    best: dict[float, Place] = {}
    for place in pool:
        other = best.get(place.fraction)
        if other is None or (place.path not in held, place.named) >= (other.path not in held, other.named):
            best[place.fraction] = place
    return list(best.values())


def _assign(pool: list[Place], fractions: list[float], held: Set[str]) -> list[Place] | None:
    """Distinct places in order with the least sum of distances to the fractions; where rows are held counts as half a spacing further."""
    penalty = 1 / (len(fractions) + 1) / 2
    if len(pool) < len(fractions):
        return None
    # best[n]: (distance, places) of the best choice for the first n fractions among the places so far.
    best: list[tuple[float, list[Place]] | None] = [(0.0, []), *[None] * len(fractions)]
    for place in pool:
        for n in range(len(fractions), 0, -1):
            before = best[n - 1]
            if before is not None:
                distance = before[0] + abs(place.fraction - fractions[n - 1]) + penalty * (place.path in held)
                now = best[n]
                if now is None or distance < now[0]:
                    best[n] = (distance, [*before[1], place])
    last = best[-1]
    return None if last is None else last[1]


@dataclass(frozen=True)
class _End:
    """The end of a module's call: when it was, what was spent until then, and what came out."""

    path: str
    step: int
    costs: int
    fused: int
    leaves: tuple[tuple[tuple[int, ...], tuple[Any, ...], bool], ...]
    ids: frozenset[int]


class _Record:
    """What a traced run leaves behind."""

    def __init__(self) -> None:
        self.ends: list[_End] = []

    @contextmanager
    def watch(self, tracer: Tracer, model: nn.Module, image: torch.Tensor) -> Iterator[None]:
        self.tracer = tracer
        self.uses = _Uses(image)
        handles = [module.register_forward_hook(self._hook(path)) for path, module in model.named_modules() if path]
        with self.uses:
            yield
        for handle in handles:
            handle.remove()
        self.last = self._end("", None)

    def _hook(self, path: str) -> Any:
        return lambda module, args, output: self.ends.append(self._end(path, output))

    def _end(self, path: str, output: Any) -> _End:
        leaves = tree_leaves(output)
        described = tuple(
            (tuple(leaf.shape), tuple(self.tracer.dims(leaf)), leaf.is_floating_point()) if torch.is_tensor(leaf) else ((), (), False)
            for leaf in leaves
        )
        ids = frozenset(id(leaf) for leaf in leaves if torch.is_tensor(leaf))
        return _End(path, self.uses.step, len(self.tracer.costs), len(self.tracer.fused_costs), described, ids)

    def macs(self, end: _End) -> int:
        """MACs of the batch until a module's end."""
        return sum(u.size_of(t) for t in self.tracer.costs[: end.costs]) + sum(u.size_of(t) for t in self.tracer.fused_costs[: end.fused])

    def beside(self, end: _End) -> int:
        """Number of tensors made until a module's end and used after it, other than those it gave."""
        uses = self.uses
        return sum(1 for key, born in uses.born.items() if born <= end.step < uses.used.get(key, 0) and key not in end.ids)


class _Uses(TorchDispatchMode):
    """When each tensor that is computed from the image was made and last used, and when two such were first multiplied (attention)."""

    def __init__(self, image: torch.Tensor) -> None:
        super().__init__()
        self.step = 0
        self.mixed: float = math.inf
        self.born = {id(image): 0}
        self.used: dict[int, int] = {}
        self.kept: list[torch.Tensor] = [image]  # an identity stays unique only while its tensor lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.step += 1
        out = func(*args, **(kwargs or {}))
        inputs = [id(leaf) for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        derived = [key for key in inputs if key in self.born]
        for key in derived:
            self.used[key] = self.step
        if len(set(derived)) > 1 and torch.Tag.pointwise not in func.tags and func is not torch.ops.aten.cat.default:
            self.mixed = min(self.mixed, self.step)
        if derived:
            for leaf in tree_leaves(out):
                if torch.is_tensor(leaf) and id(leaf) not in self.born:
                    self.born[id(leaf)] = self.step
                    self.kept.append(leaf)
        return out


def _exit(end: _End, along: Counter[Any], token: bool, finest: Callable[[Format, tuple[int, ...]], int]) -> tuple[Exit | None, str]:
    """The exit at a module's end: the first tensor it gives whose rows are samples and along which an axis of the layout runs."""
    why = "it gives no tensor of floats whose rows are the samples"
    for i, (shape, terms, floats) in enumerate(end.leaves):
        if not floats or len(shape) not in (2, 3, 4) or shape[0] != BATCH or u.variables(terms[0]):
            continue
        channel = _channel(shape, terms, along)
        if channel is None:
            why = f"no axis of the layout runs along what it gives ({'×'.join(map(str, shape))})"
            continue
        format = _FORMATS[len(shape), channel]
        pool = "first" if token and format == "NLC" else "mean"
        return Exit(place=end.path, leaf=i, format=format, pool=pool, grid=finest(format, shape), features=shape[channel]), ""  # type: ignore[arg-type]
    return None, why


def _finest(format: Format, shape: tuple[int, ...], grid: int | None, room: float) -> int:
    """The grid of an exit that reads a tensor of this shape, whose head may have `room` features."""
    if format not in MAPS:
        return 1
    sizes = dict(zip(format, shape, strict=True))
    fits = math.isqrt(int(room // sizes["C"])) if grid is None else grid
    return max(1, min(fits, GRID if grid is None else MAX_GRID, sizes["H"], sizes["W"]))


_FORMATS: dict[tuple[int, int], Format] = {(2, 1): "NC", (3, 1): "NCL", (3, 2): "NLC", (4, 1): "NCHW", (4, 3): "NHWC"}


def _channel(shape: tuple[int, ...], terms: tuple[Any, ...], along: Counter[Any]) -> int | None:
    """The dimension that carries channels: the axis of the layout that runs along most parameters runs along it."""
    dims = {d: max(map(along.__getitem__, u.variables(terms[d])), default=0) for d in range(1, len(shape)) if (len(shape), d) in _FORMATS}
    channel = max(dims, key=dims.__getitem__)
    return channel if dims[channel] else None
