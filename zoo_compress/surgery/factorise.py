"""Replace layers of a model by two each, within a budget: what is chosen, what is left and why, and the model that comes of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..errors import CompressError, WidthError
from ..structure.factors import FIRST, SECOND, Factor
from ..structure.layout import Layout
from ..structure.ranks import Candidate, Choice, allocate, cheapest, evenly, meets, total
from ..structure.variant import Variant, record
from .calibrate import follow_
from .decompose import Seen, energy, fit, losses
from .factors import pair, put, refused, undrawn
from .images import image_batches
from .layers import DenseLayer, dense_layers
from .modules import copied, get_tensor
from .moments import Moments, gather
from .origin import origin, packed_of, stamp, variant_of
from .trace import analyze

BUDGETS = ("macs", "params", "energy")
"""What a budget may limit: multiply-accumulates, parameters, or how little of its energy each layer keeps."""

Curve = tuple[np.ndarray, np.ndarray]
"""Ranks, ascending, and the share of the energy each keeps."""


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        method: What the model is to be called, such as `lowrank`.
        kinds: Kinds of factors to choose from; in the local scope, the first that a layer has.
        budget: One of `BUDGETS` and its value; None factorises every layer that gets cheaper, at its greatest rank.
        scope: `global`, where it costs least; or `local`, the same fraction of each layer's rank.
        round_to: Preferred multiple for ranks.
        ranks: The only ranks to choose from; None takes all.
        exclude: Patterns of paths of layers to leave alone.
    """

    method: str
    kinds: tuple[str, ...]
    budget: tuple[str, float] | None
    scope: str = "global"
    round_to: int = 1
    ranks: tuple[int, ...] | None = None
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.budget is not None:
            name, value = self.budget
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
                raise CompressError(f"{self.method}: {name} is a fraction in (0, 1] or a count above 1, found {value!r}")
            if name == "energy" and value > 1:
                raise CompressError(f"{self.method}: energy is a fraction in (0, 1], found {value!r}")
        if self.scope not in ("global", "local"):
            raise CompressError(f"{self.method}: scope is 'global' or 'local', found {self.scope!r}")
        for name, number in {"round_to": self.round_to, **{f"ranks[{i}]": n for i, n in enumerate(self.ranks or ())}}.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise CompressError(f"{self.method}: {name} is a positive integer, found {number!r}")

    @property
    def unit(self) -> str:
        """What layers are compared in: `macs` or `params`."""
        return "params" if self.budget is not None and self.budget[0] == "params" else "macs"


@dataclass(frozen=True)
class FactorPlan:
    """Which layers become two, and what that costs.

    Attributes:
        method: What the model will be called, such as `lowrank`.
        factors: Path of a layer → how.
        left: Path of every other linear layer and convolution → why it stays as it is.
        kept: Path → share of the energy kept, in 0…1: of the weight's squared elements; with data, of the layer's output, weighted by how
            much the predictions depend on it.
        macs: Multiply-accumulates before and after.
        params: Parameters before and after.
        moments: What the layers see, by weight, if there was data.
        images: That data.
    """

    method: str
    factors: dict[str, Factor]
    left: dict[str, str]
    kept: dict[str, float]
    macs: tuple[int, int]
    params: tuple[int, int]
    moments: Mapping[str, Moments] = field(default_factory=dict, repr=False)
    images: tuple[torch.Tensor, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        width = max(map(len, (*self.factors, *self.left)), default=0)
        lines = [f"{path:<{width}}  {f.kind}, rank {f.rank}, keeps {self.kept[path]:.1%}" for path, f in self.factors.items()]
        if self.left:
            lines += ["", "left as they are", *(f"{path:<{width}}  {reason}" for path, reason in self.left.items())]
        lines.append("")
        for what, (before, after) in {"MACs": self.macs, "parameters": self.params}.items():
            lines.append(f"{what} {before:,} → {after:,} ({after / before:.1%})")
        return "\n".join(lines)


def plan_factors(
    model: nn.Module, wanted: Wanted, data: Iterable[object] | None = None, layout: Layout | None = None, seed: int = 0
) -> FactorPlan:
    """Choose which layers of a model become two, and of which ranks.

    Args:
        model: The model. It is not changed.
        wanted: What is asked for.
        data: Batches of images, or of tuples that begin with one, that say what layers see; None looks at weights alone.
        layout: The model's layout, if it is known already.
        seed: Of the positions looked at in images.

    Raises:
        CompressError: If no layer can be two, or no ranks come near the budget.
    """
    layout = analyze(model) if layout is None else layout
    layers, left = dense_layers(model, layout)
    order = [*layers, *left]
    images = [] if data is None else image_batches(data)
    moments = gather(model, layout, images, sensitivity=True, seed=seed) if images else {}
    left.update(_set_aside(model, layers, wanted, moments if images else None))
    layers = {path: layer for path, layer in layers.items() if path not in left}
    left.update(refused(model, {path: Factor(kind=_kinds(layer, wanted)[0], rank=1) for path, layer in layers.items()}))  # type: ignore[arg-type]
    layers = {path: layer for path, layer in layers.items() if path not in left}
    if not layers:
        raise _nothing(model, wanted, left)
    curves, energies = {}, {}
    for path, layer in tqdm(layers.items(), desc="decompositions", unit="layer", leave=False):
        weight, seen = get_tensor(model, f"{path}.weight"), Seen.of(moments[f"{path}.weight"]) if moments else None
        energies[path] = max(energy(weight, seen), 1e-30)
        curves[path] = {
            kind: (ranks, 1 - losses(kind, weight, seen, ranks, energies[path]) / energies[path])
            for kind in _kinds(layer, wanted)
            if len(ranks := _ranks(layer, kind, wanted))
        }
    # Without data the product of what layers keep is to stay high (Zhang et al. 2016, section 3.3); with data losses are in one unit.
    scales = energies if moments else None
    before = {"macs": layout.macs(), "params": layout.num_params()}
    try:
        chosen = _chosen(layers, curves, scales, before[wanted.unit], wanted)
    except WidthError as error:
        raise WidthError(f"{error}; {_most(left)}") from error
    factors = {path: Factor(kind=found[0], rank=found[1]) for path, found in chosen.items() if found is not None}  # type: ignore[arg-type]
    if not factors:
        raise _nothing(model, wanted, left)
    left.update({path: _why_dense(curves[path], wanted) for path, found in chosen.items() if found is None})
    kept = {path: _kept(curves[path][factor.kind], factor.rank) for path, factor in factors.items()}
    saved = {unit: sum(_cost(layers[p], None, unit) - _cost(layers[p], f, unit) for p, f in factors.items()) for unit in before}
    macs, params = ((before[unit], before[unit] - saved[unit]) for unit in before)
    left = {path: left[path] for path in order if path in left}
    return FactorPlan(wanted.method, factors, left, kept, macs, params, moments, tuple(images))


def _nothing(model: nn.Module, wanted: Wanted, left: Mapping[str, str]) -> CompressError:
    return CompressError(f"{wanted.method}: no layer of {type(model).__name__} gets cheaper; {_most(left) or 'it has none'}")


def _most(left: Mapping[str, str]) -> str:
    """The most frequent reasons for which layers are left."""
    return "; ".join(f"{count} left: {reason}" for reason, count in Counter(left.values()).most_common(3))


def apply_factors(model: nn.Module, plan: FactorPlan) -> nn.Module:
    """The model in which the layers of a plan are two. The model itself stays as it is.

    Raises:
        CompressError: If the model does not cost what the plan says.
    """
    # What is replaced below is not worth a copy.
    new = copied(model, {id(model.get_submodule(path).weight): None for path in plan.factors})
    shifts = {}
    for path, factor in tqdm(plan.factors.items(), desc="factors", unit="layer", leave=False):
        layer: Any = model.get_submodule(path)
        seen = plan.moments.get(f"{path}.weight")
        found = fit(factor, layer.weight, None if seen is None else Seen.of(seen))
        with undrawn(layer):
            two = pair(layer, factor)
        with torch.no_grad():
            two[0].weight.copy_(found.first)
            two[1].weight.copy_(found.second)
        put(new, path, two)
        if seen is not None and seen.bias is not None:
            shifts[f"{path}.{SECOND}.bias"] = found.shift
        elif seen is not None and seen.norm is not None:
            shifts[seen.norm] = -found.shift
    with torch.no_grad():
        for name, shift in shifts.items():
            get_tensor(new, name).add_(shift)
    layout = analyze(new)
    if plan.images:
        follow_(new, model, layout, {}, plan.images)
    if (layout.macs(), layout.num_params()) != (plan.macs[1], plan.params[1]):
        raise CompressError(
            f"{plan.method}: expected {plan.macs[1]:,} MACs and {plan.params[1]:,} parameters, found {layout.macs():,} and "
            f"{layout.num_params():,}: layers of {type(model).__name__} run in other places than it was seen to run them"
        )
    _stamp(new, layout, plan)
    return new


def _stamp(new: nn.Module, layout: Layout, plan: FactorPlan) -> None:
    """Make the model say what it is."""
    source = origin(new)
    if source is None:
        return
    before = source.previous
    if before is None or not before.params:
        blank = before or Variant(method=plan.method, base=source.base, base_args=source.args, sizes={}, params={})
        stamp(new, blank.model_copy(update={"method": plan.method, "factors": {**blank.factors, **plan.factors}}))
        return
    previous = before.model_copy(update={"factors": {**before.factors, **plan.factors}, **_moved(before, plan.factors)})
    stamp(new, record(layout, layout.base_sizes, method=plan.method, base=source.base, base_args=source.args, previous=previous))


def _moved(variant: Variant, factors: Mapping[str, Factor]) -> dict[str, dict]:
    """What a record says of layers, said of the two that take their place."""
    params, attributes = dict(variant.params), dict(variant.attributes)
    for path, factor in factors.items():
        weight = params.pop(f"{path}.weight", None)
        bias = params.pop(f"{path}.bias", None)
        sides = {name: attributes.pop(f"{path}.{name}", None) for name in ("in_channels", "out_channels", "in_features", "out_features")}
        if bias is not None:
            params[f"{path}.{SECOND}.bias"] = bias
        for name, term in sides.items():
            if term is not None:
                attributes[f"{path}.{FIRST if name.startswith('in') else SECOND}.{name}"] = term
        if weight is None:
            continue
        outputs, inputs, *rest = weight
        blank = (None,) * len(rest)
        params[f"{path}.{SECOND}.weight"] = (outputs, None, *blank)
        params[f"{path}.{FIRST}.weight"] = (None, inputs, *blank)
        if factor.kind == "separable" and inputs is not None:
            width = variant.size(inputs)
            params[f"{path}.{FIRST}.weight"] = (str(width * factor.rank), None, *blank)
            params[f"{path}.{SECOND}.weight"] = (outputs, str(width * factor.rank), *blank)
            own = {"out_channels": width * factor.rank, "in_channels": width, "groups": width}
            attributes.update({f"{path}.{FIRST}.{name}": str(size) for name, size in own.items()})
            attributes[f"{path}.{SECOND}.in_channels"] = str(width * factor.rank)
    return {"params": params, "attributes": attributes}


def _set_aside(model: nn.Module, layers: Mapping[str, DenseLayer], wanted: Wanted, moments: Mapping[str, Moments] | None) -> dict[str, str]:
    """Layers that are not looked at, and why."""
    out = {}
    for pattern in wanted.exclude:
        matched = [path for path, _ in model.named_modules() if fnmatchcase(path, pattern)]
        if not matched:
            raise CompressError(f"exclude: {pattern!r} matches no layer such as {next(iter(layers), 'fc')!r}")
        out.update(dict.fromkeys(matched, "excluded"))
    variant = variant_of(model)
    earlier = variant.factors if variant else {}
    packed = packed_of(model)
    for path, layer in layers.items():
        if f"{path}.weight" in packed:
            out[path] = "its weight has removed or shared elements, which would be lost"
        elif path.rpartition(".")[0] in earlier:
            out[path] = "one of two layers already: prune their rank"
        elif not _kinds(layer, wanted):
            out[path] = f"there are no {' or '.join(wanted.kinds)} factors of such a layer"
        elif not any(len(_ranks(layer, kind, wanted)) for kind in _kinds(layer, wanted)):
            out[path] = f"two layers would not have fewer {'MACs' if wanted.unit == 'macs' else 'parameters'}"
        elif moments is not None and f"{path}.weight" not in moments:
            out[path] = "what it reads was not looked at: too many inputs, or none that can change"
    return {path: reason for path, reason in out.items() if path in layers}


def _kinds(layer: DenseLayer, wanted: Wanted) -> list[str]:
    return [kind for kind in wanted.kinds if kind in layer.shape.kinds()]


def _cost(layer: DenseLayer, factor: Factor | None, unit: str) -> int:
    """What a layer costs as it is, or as two."""
    if factor is None:
        return layer.macs if unit == "macs" else layer.params
    return (layer.macs_per_rank if unit == "macs" else layer.params_per_rank)(factor.kind) * factor.rank


def _ranks(layer: DenseLayer, kind: str, wanted: Wanted) -> np.ndarray:
    """The ranks at which two layers cost less than the one."""
    dense, each = _cost(layer, None, wanted.unit), _cost(layer, Factor(kind=kind, rank=1), wanted.unit)  # type: ignore[arg-type]
    highest = min(layer.shape.full_rank(kind), -(-dense // each) - 1)
    if wanted.ranks is not None:
        return np.array([rank for rank in sorted(wanted.ranks) if rank <= highest], dtype=np.int64)
    return np.arange(1, highest + 1)


def _chosen(
    layers: Mapping[str, DenseLayer],
    curves: Mapping[str, Mapping[str, Curve]],
    scales: Mapping[str, float] | None,
    whole: int,
    wanted: Wanted,
) -> dict[str, tuple[str, int] | None]:
    """Kind and rank of every layer; None where it stays as it is."""

    def candidates(step: int) -> dict[str, Candidate]:
        return {
            path: _candidate(layer, curves[path], None if scales is None else scales[path], wanted, step) for path, layer in layers.items()
        }

    if wanted.budget is None:
        return {path: (kind := next(iter(found)), int(found[kind][0][-1])) for path, found in curves.items()}
    name, value = wanted.budget
    if name == "energy":
        found = candidates(wanted.round_to)
        return {path: _keeping(found[path], curves[path], value) for path in layers}
    target = value * whole if value <= 1 else value
    if target > whole:
        raise CompressError(f"{wanted.method}: {name}={value:g} is more than the model has ({whole:,})")
    rest = whole - sum(_cost(layer, None, wanted.unit) for layer in layers.values())
    step = wanted.round_to
    while True:
        found = candidates(step)
        chosen = (allocate if wanted.scope == "global" else evenly)(found, target - rest)
        cost = total(found, chosen)
        if layers and meets(cost + rest, target, whole):
            return chosen
        if step == 1:
            low, near = ((rest + n) / whole for n in (cheapest(found), max(cost, cheapest(found))))
            raise WidthError(
                f"{wanted.method}: no ranks come near {name}={value:g}; of the {low:.1%} to 100% that are "
                f"reachable, the nearest below is {near:.1%}"
            )
        step //= 2


def _candidate(layer: DenseLayer, curves: Mapping[str, Curve], scale: float | None, wanted: Wanted, step: int) -> Candidate:
    """What a layer may become. Ranks are multiples of a step, of smaller powers of two where there are few."""
    choices = []
    for kind, (ranks, kept) in curves.items():
        own = step if wanted.ranks is None else 1
        while own > 1 and len(ranks) < 4 * own:
            own //= 2
        chosen = slice(own - 1, None, own)
        lost = -np.log(np.maximum(kept, 1e-12)) if scale is None else (1 - kept) * scale
        each = _cost(layer, Factor(kind=kind, rank=1), wanted.unit)  # type: ignore[arg-type]
        choices.append(Choice(kind, ranks[chosen], lost[chosen], each))
    return Candidate(_cost(layer, None, wanted.unit), tuple(choices))


def _keeping(candidate: Candidate, curves: Mapping[str, Curve], share: float) -> tuple[str, int] | None:
    """The cheapest kind and rank that keeps a share of a layer's energy."""
    best: tuple[float, tuple[str, int] | None] = (candidate.dense, None)
    for choice in candidate.choices:
        ranks, kept = curves[choice.kind]
        enough = choice.ranks[kept[np.searchsorted(ranks, choice.ranks)] >= share]
        if len(enough) and enough[0] * choice.cost < best[0]:
            best = float(enough[0] * choice.cost), (choice.kind, int(enough[0]))
    return best[1]


def _why_dense(curves: Mapping[str, Curve], wanted: Wanted) -> str:
    if wanted.budget is not None and wanted.budget[0] == "energy":
        most = max(float(kept[-1]) for _, kept in curves.values())
        return f"what is cheaper keeps {most:.1%} of its energy at most"
    return "other layers lose less for the budget"


def _kept(curve: Curve, rank: int) -> float:
    ranks, kept = curve
    return float(kept[np.searchsorted(ranks, rank)])
