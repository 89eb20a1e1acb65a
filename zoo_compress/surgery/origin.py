"""Where a model comes from: the timm architecture and arguments it was built of, and the record it already carries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.models import get_model_args, is_model
from torch import nn

from ..errors import CompressError
from ..structure.packed import Packing
from ..structure.variant import OPTIONS, Variant

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
    """Origin of a model that timm's factory made, compressed or not; None for any other module.

    Raises:
        VariantError: If the model carries a record that is none.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    architecture = cfg.get("architecture") if isinstance(cfg, Mapping) else None
    if not architecture or not is_model(architecture):
        return None
    args = dict(getattr(model, "_model_args", {}))
    stored = args.get("variant")
    previous = Variant.from_dict(stored) if stored is not None else None
    # As a file has them: tuples are lists there.
    own = {name: json.loads(json.dumps(value)) for name, value in args.items() if _describes_base(name, value)}
    live = {name: value for name, value in get_model_args(model).items() if name in _TRACKED}
    if previous is None:
        return Origin(architecture, own, None, live)
    return Origin(previous.base, {**previous.base_args, **own}, previous, live)


def variant_of(model: nn.Module) -> Variant | None:
    """The record a compressed model carries; None for any other.

    Raises:
        VariantError: If the record is none.
    """
    source = origin(model)
    return source.previous if source else None


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
    args = getattr(model, "_model_args", {})
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
