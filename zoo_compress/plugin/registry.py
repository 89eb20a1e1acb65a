"""Names: `<arch>__<kind>` for every architecture timm knows, registered by timm's own means."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

from timm.models import PretrainedCfg, _registry, generate_default_cfgs, list_models, register_model
from torch import nn

from ..zoo import index
from . import binary, clustered, exits, lowrank, netaug, pruned, separable, slim, sparse, ternary
from .remote import CONFIG

KINDS: dict[str, ModuleType] = {
    "pruned": pruned,
    "slim": slim,
    "netaug": netaug,
    "exits": exits,
    "lowrank": lowrank,
    "separable": separable,
    "sparse": sparse,
    "clustered": clustered,
    "binary": binary,
    "ternary": ternary,
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
    published = {entry.name: entry for entry in index.read().variants if entry.method == kind and entry.base in bases}
    # Not through `get_pretrained_cfg`, whose deep copies of them all would take as long as everything else here.
    cfgs = {f"{base}__{kind}": _without_weights(_registry._model_pretrained_cfgs.get(base)) for base in bases}
    for name, entry in published.items():
        if entry.folder or entry.hub_id:
            cfgs[name] = _with_weights(cfgs[entry.architecture], entry)
    defaults = generate_default_cfgs(cfgs)  # type: ignore[arg-type]
    for entry in published.values():
        # timm makes the first tag with weights the default. Here a name without a tag is the architecture, compressed as the user says.
        defaults[entry.architecture].tags.remove("")
        defaults[entry.architecture].tags.appendleft("")
    # timm looks for cfgs in the module an entrypoint says it is of.
    vars(module)["default_cfgs"] = defaults
    for base in bases:
        vars(module)[f"{base}__{kind}"] = register_model(_entrypoint(base, kind, module))


def _without_weights(cfg: PretrainedCfg | None) -> PretrainedCfg:
    return replace(cfg or PretrainedCfg(), **_NO_WEIGHTS, custom_load=False)


def _with_weights(cfg: PretrainedCfg, entry: index.Entry) -> PretrainedCfg:
    """The cfg of a published variant: where it is, and for a shipped one what its config.json says about images and classes."""
    if entry.folder is None:
        return replace(cfg, hf_hub_id=entry.hub_id)
    stored = json.loads((entry.folder / CONFIG).read_text(encoding="utf-8"))
    known = {field.name for field in fields(PretrainedCfg)} - _NO_WEIGHTS.keys()
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in stored["pretrained_cfg"].items() if key in known}
    return replace(cfg, **{**own, "num_classes": stored["num_classes"], "file": str(entry.folder)})


def _entrypoint(base: str, kind: str, module: ModuleType) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return module.create(base, pretrained=pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = f"{base}__{kind}"
    entrypoint.__module__ = module.__name__
    entrypoint.__doc__ = f"{base}, {kind}. See `{module.__name__}.create` for the arguments."
    return entrypoint
