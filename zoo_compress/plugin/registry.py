"""Names: `<arch>__<kind>` for every architecture timm knows, registered by timm's own means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

from timm.models import PretrainedCfg, _registry, generate_default_cfgs, list_models, register_model
from torch import nn

from . import exits, pruned

KINDS: dict[str, ModuleType] = {
    "pruned": pruned,
    "exits": exits,
}
"""Kind → module whose `create(base, **kwargs)` makes such a model of a timm architecture. A kind is one line here."""

# Weights of the base don't fit; a format of theirs and an offset of their labels mean nothing without them.
_NO_WEIGHTS: dict[str, Any] = dict.fromkeys(
    ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "architecture", "tag", "label_offset")
)


def register_all() -> None:
    """Register every kind of every architecture of timm. Architectures added to timm later can be added with `register`."""
    bases = [name for name in list_models() if "__" not in name]
    for kind in KINDS:
        register(kind, bases)


def register(kind: str, bases: list[str]) -> None:
    """Register `<base>__<kind>` with timm, with the base's cfg but none of its weights.

    Args:
        kind: One of `KINDS`. The names are listed by timm as models of the module that makes them.
        bases: timm architectures.
    """
    module = KINDS[kind]
    # Not through `get_pretrained_cfg`, whose deep copies of them all would take as long as everything else here.
    cfgs = {f"{base}__{kind}": _without_weights(_registry._model_pretrained_cfgs.get(base)) for base in bases}
    # timm looks for cfgs in the module an entrypoint says it is of.
    vars(module)["default_cfgs"] = generate_default_cfgs(cfgs)  # type: ignore[arg-type]
    for base in bases:
        vars(module)[f"{base}__{kind}"] = register_model(_entrypoint(base, kind, module))


def _without_weights(cfg: PretrainedCfg | None) -> PretrainedCfg:
    return replace(cfg or PretrainedCfg(), **_NO_WEIGHTS, custom_load=False)


def _entrypoint(base: str, kind: str, module: ModuleType) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return module.create(base, pretrained=pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = f"{base}__{kind}"
    entrypoint.__module__ = module.__name__
    entrypoint.__doc__ = f"{base}, {kind}. See `{module.__name__}.create` for the arguments."
    return entrypoint
