"""Where a model comes from: the timm architecture and arguments it was built of, and the record it already carries."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from timm.models import get_model_args, is_model
from torch import nn

from ..errors import CompressError
from ..structure.packed import Packing
from ..structure.variant import OPTIONS, Variant
from .modules import own

# timm reads these off the live model whenever it saves one.
_TRACKED = ("num_classes", "in_chans", "global_pool", "img_size")
_OWN_NAMES = "packed_names"
_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")


@dataclass(frozen=True)
class Origin:
    """What a record must say about the base.

    Attributes:
        base: timm architecture, without a tag.
        args: Construction arguments, those of `Variant.base_args`.
        previous: The record of a model that is compressed already.
        live: Construction arguments that timm reads off the model and stores itself. The base takes them together with `args`, of which
            some are refused without them (`class_token=False` wants another pooling).
    """

    base: str
    args: dict[str, Any]
    previous: Variant | None
    live: dict[str, Any]


def origin(model: nn.Module) -> Origin | None:
    """Origin of a whole model that timm's factory made, compressed or not; None for any other module.

    What timm makes with `features_only=True` is the part of a model, under other names: no record describes it. Nor is a wrapper what timm
    made, though it may hand on, or copy, what the model inside it says of itself.

    Raises:
        VariantError: If the model carries a record that is none.
    """
    architecture = architecture_of(model)
    if architecture is None or is_backbone(model):
        return None
    inside = (architecture_of(part) for part in model.modules() if part is not model)
    if any(name is not None and _base(name) == _base(architecture) for name in inside):
        return None
    args = dict(own(model, "_model_args") or {})
    previous = variant_of(model)
    # As a file has them: tuples are lists there.
    described = {name: json.loads(json.dumps(value)) for name, value in args.items() if _describes_base(name, value)}
    live = {name: value for name, value in get_model_args(model).items() if name in _TRACKED}
    if previous is None:
        return Origin(architecture, described, None, live)
    return Origin(previous.base, {**previous.base_args, **described}, previous, live)


def variant_of(model: nn.Module) -> Variant | None:
    """The record a compressed model carries, or a backbone made of one; None for any other.

    Raises:
        VariantError: If the record is none.
    """
    if architecture_of(model) is None:
        return None
    stored = (own(model, "_model_args") or {}).get("variant")
    return Variant.from_dict(stored) if stored is not None else None


def architecture_of(model: nn.Module) -> str | None:
    """The name in timm's registry that a model says it has; None if it says none."""
    cfg = own(model, "pretrained_cfg")
    architecture = cfg.get("architecture") if isinstance(cfg, Mapping) else None
    return architecture if isinstance(architecture, str) and is_model(architecture) else None


def _base(architecture: str) -> str:
    return architecture.partition("__")[0]


def fresh_base(model: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """What to ask timm's factory for to get the uncompressed base of a model, or of a backbone, anew; None if timm did not make it."""
    source = origin(model)
    if source is not None:
        return source.base, {**source.args, **source.live}
    architecture = architecture_of(model)
    if architecture is None or not is_backbone(model):
        return None
    variant = variant_of(model)
    args = {name: value for name, value in own(model, "_model_args").items() if name not in OPTIONS}
    return (architecture, args) if variant is None else (variant.base, {**variant.base_args, **args})


def is_backbone(model: nn.Module) -> bool:
    """Whether timm made a model to give features alone (`features_only=True`)."""
    return bool((own(model, "_model_args") or {}).get("features_only"))


def parts(model: nn.Module) -> Iterator[tuple[str, nn.Module, Origin]]:
    """The whole models of timm's in a model, with their paths: itself, or those inside what somebody put around them."""
    done: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in done):
            continue
        source = origin(module)
        if source is not None:
            yield path, module, source
            if not path:
                return
            done.append(path)


def for_training(name: str) -> bool:
    """Whether an argument of timm's factory matters in training only: a drop rate. timm leaves those out of the files it writes."""
    return name in ("drop_rate", "drop_path_rate", "drop_block_rate") or name.endswith("_drop_rate")


def stamp(model: nn.Module, variant: Variant) -> None:
    """Make a resized model say what it is, so that timm's own saving writes a checkpoint that can be created again.

    Sets `pretrained_cfg` (a copy, named `<base>__<method>` and without the base's weight sources, which no longer fit) and puts the
    record into the arguments timm stores.
    """
    # A tag stays: some entrypoints derive structure from it.
    cfg = {name: value for name, value in model.pretrained_cfg.items() if name not in _SOURCES}  # type: ignore[operator, union-attr]
    cfg.update(architecture=variant.architecture, custom_load=False, label_offset=None)
    model.pretrained_cfg = model.default_cfg = cfg  # type: ignore[assignment]
    args = own(model, "_model_args") or {}
    kept = {name: value for name, value in args.items() if name not in variant.base_args and name not in OPTIONS}
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    variant = variant.model_copy(update={"packed": {name: packing for name, packing in variant.packed.items() if name in there}})
    model._model_args = {**kept, "variant": variant.to_dict()}  # type: ignore[assignment]


def stamp_packed(model: nn.Module, method: str, packed: Mapping[str, Packing]) -> None:
    """Make a model say which zeros and shared values its weights have, beside what it says of itself already.

    Nothing happens to a model that is not timm's: it carries them all the same.

    Args:
        model: The model, whose weights are so.
        method: What made them, such as `sparse`.
        packed: Parameter → what holds for it now. What it had before stays, where this says nothing of it.
    """
    source = origin(model)
    if source is None:
        return
    before = source.previous
    if before is None:
        before = Variant(method=method, base=source.base, base_args=source.args, sizes={}, params={})
    merged = dict(before.packed)
    for name, packing in packed.items():
        earlier = merged.get(name, packing)
        merged[name] = Packing(mask=packing.mask or earlier.mask, bits=packing.bits or earlier.bits)
    stamp(model, before.model_copy(update={"method": method, "packed": merged}))


def forget_packed(model: nn.Module, kept: Mapping[str, Packing] | None = None) -> None:
    """Make a model, whose weights were changed, say nothing of zeros and shared values any more but what is given."""
    variant = variant_of(model)
    if variant is not None and variant.packed:
        stamp(model, variant.model_copy(update={"packed": dict(kept or {})}))


def refuse_packed(model: nn.Module, what: str) -> None:
    """Refuse a model whose zeros or shared values would be lost.

    Raises:
        CompressError: If it has any.
    """
    packed = packed_of(model)
    if packed:
        raise CompressError(
            f"{what}: expected a model without removed or shared weights, which would be lost, found some in {next(iter(packed))!r}; "
            f"sparsify or cluster it afterwards"
        )


def packed_of(model: nn.Module) -> dict[str, Packing]:
    """What a model says of zeros and shared values in its weights."""
    variant = variant_of(model)
    names = getattr(model, _OWN_NAMES, {})
    return {names.get(name, name): packing for name, packing in variant.packed.items()} if variant else {}


def rename_packed(model: nn.Module, packed: Mapping[str, nn.Parameter]) -> None:
    """Make a feature extractor find the weights that its record speaks of: timm's give what they take over names of their own.

    Args:
        model: The extractor. It carries the record of the model it was made of.
        packed: Name of a parameter in that model → the parameter itself.
    """
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    setattr(model, _OWN_NAMES, {name: own[id(parameter)] for name, parameter in packed.items() if id(parameter) in own})


def _describes_base(name: str, value: object) -> bool:
    if name in _TRACKED or name in OPTIONS or for_training(name):
        return False
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
