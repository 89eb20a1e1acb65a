"""`<arch>__pruned`: a timm architecture with fewer channels and heads, from a stored record or pruned on the spot."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg, get_pretrained_cfg, model_entrypoint, resolve_pretrained_cfg
from torch import nn

from ..errors import CompressError, VariantError
from ..structure.budget import KINDS
from ..structure.variant import OPTIONS, Variant
from ..surgery.exits import attach_
from ..surgery.origin import origin
from ..surgery.restore import check, present, restore_
from ..surgery.rows import Boundary
from . import weights
from .builder import Built, build
from .skip_init import skip_init

__all__ = ["create"]

Fresh = Callable[..., nn.Module]
"""Makes a compressed model that no record describes yet: of (base, name, pretrained, overlay, cache_dir, options, kwargs)."""

_logger = logging.getLogger(__name__)

METHOD = "pruned"


def create(base: str, **kwargs: Any) -> nn.Module:
    """Create a pruned model; what the entrypoint of `<base>__pruned` does.

    Args:
        base: timm architecture.
        **kwargs: timm's factory arguments (`pretrained`, `pretrained_cfg`, `pretrained_cfg_overlay`, `cache_dir`, `features_only`,
            `out_indices`, …), the base's own (`num_classes`, `in_chans`, …), and either

            - `variant`: a record, as config.json holds it. With `pretrained=True` weights come from where the cfg points to; or
            - one of `keep`, `macs`, `params`, `latency` and further options of `zoo_compress.prune` that are JSON values. With
              `pretrained=True` the base's weights are pruned (`base_tag` chooses which) and nothing is fine-tuned. Without, the sizes
              depend on the budget alone: `scope` is `"local"` unless given, since a ranking of random weights means nothing.

    Returns:
        The model, or the base's own feature extractor around it.

    Raises:
        CompressError: Whatever goes wrong, with its cause.
    """
    return create_variant(base, METHOD, _pruned, **kwargs)


def create_variant(base: str, method: str, fresh: Fresh, **kwargs: Any) -> nn.Module:
    """Create a model from its record, or else by `fresh`; either way as timm's factory would, with everything it admits.

    Raises:
        CompressError: Whatever goes wrong, with its cause.
    """
    name = f"{base}__{method}"
    try:
        return _create(base, name, fresh, **kwargs)
    except CompressError:
        raise
    except Exception as error:
        raise CompressError(f"{name}: {type(error).__name__}: {error}") from error


def _create(
    base: str,
    name: str,
    fresh: Fresh,
    *,
    pretrained: bool = False,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_model_args: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    options = {key: kwargs.pop(key) for key in OPTIONS & kwargs.keys()}
    cfg = replace(_resolve(name, pretrained_cfg, pretrained_cfg_overlay), architecture=name)
    saved = pretrained_model_args or {}
    if options.get("variant") is not None:
        variant = Variant.from_dict(options.pop("variant"))
        if variant.architecture != name:
            raise VariantError(f"variant.base: expected {base!r} for {name}, found a record of {variant.architecture}")
        chosen = {key: value for key, value in options.items() if value != saved.get(key)}
        if chosen:
            raise CompressError(
                f"{name}: {', '.join(chosen)} given with a stored variant; load it, then use zoo_compress.prune or add_exits"
            )
        load = _from_source(cfg, cache_dir) if pretrained else _keep
        args = {"cache_dir": cache_dir, "pretrained_model_args": saved, **variant.base_args, **kwargs}
        # With other classes or channels than the weights', some parameters keep the values they are built with.
        whole = kwargs.get("num_classes") in (None, cfg.num_classes) and kwargs.get("in_chans") in (None, cfg.input_size[0])
        with skip_init() if pretrained and whole else nullcontext():
            return _restored(variant, cfg, load, {**variant.base_args, **_without_options(saved)}, args)
    if isinstance(pretrained_cfg, Mapping) and weights.has_source(cfg):
        raise VariantError(f"{cfg.file or cfg.hf_hub_id or name}: expected a record 'variant' in model_args of config.json, found none")
    small = fresh(base, name, pretrained, pretrained_cfg_overlay, cache_dir, options, kwargs)
    cfg = PretrainedCfg(**small.pretrained_cfg)  # type: ignore[arg-type]
    variant = origin(small).previous  # type: ignore[union-attr, assignment]
    state = small.state_dict()

    def copy(built: Built) -> None:
        built.model.load_state_dict({key: state[key] for key in built.model.state_dict()})

    proven = getattr(small, "boundaries", None)
    return _restored(variant, cfg, copy, variant.base_args, {**variant.base_args, **kwargs}, proven)


def _resolve(name: str, cfg: str | dict[str, Any] | PretrainedCfg | None, overlay: dict[str, Any] | None) -> PretrainedCfg:
    try:
        return resolve_pretrained_cfg(name, cfg, overlay)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise CompressError(
            f"{name}: there is no published checkpoint {cfg!r}; without a tag, pretrained=True prunes the base's weights (base_tag= "
            "chooses which)"
        ) from error


def _restored(
    variant: Variant,
    cfg: PretrainedCfg,
    load: Callable[[Built], None],
    source_args: dict[str, Any],
    kwargs: dict[str, Any],
    boundaries: tuple[Boundary, ...] | None = None,
) -> nn.Module:
    entrypoint = model_entrypoint(variant.base)

    def between(built: Built) -> None:
        if variant.exits and not kwargs.get("features_only"):
            attach_(built.model, variant.exits, boundaries)
        fitting = present(built.model, variant)
        if fitting != variant:
            # The model was asked for without its classifier, or as features. The record must still fit what it was made of.
            whole = entrypoint(pretrained=False, **source_args)
            check(attach_(whole, variant.exits) if variant.exits else whole, variant)
        restore_(built.model, fitting)
        load(built)

    model = build(entrypoint, replace(cfg, state_dict=None), between, **kwargs)
    model._model_args = {"variant": variant.to_dict()}  # type: ignore[assignment]
    return model


def _keep(built: Built) -> None:
    """Leave the weights as they are: the first of the base's random ones."""


def _from_source(cfg: PretrainedCfg, cache_dir: str | Path | None) -> Callable[[Built], None]:
    def load(built: Built) -> None:
        state, where = weights.read(cfg, cache_dir)
        other_classes = built.num_classes != cfg.num_classes
        other_input = built.in_chans != cfg.input_size[0]
        adapted = {
            f"{module}.{key}"
            for names, differs in ((cfg.classifier, other_classes), (_first_conv(built.model, cfg), other_input))
            for module in (names if isinstance(names, (tuple, list)) else [names])
            for key in ("weight", "bias")
            if differs and module
        }

        def fits(state: dict[str, Any], strict: bool) -> None:
            weights.check(built.model, state, where, strict=strict and not other_classes, adapted=adapted)

        built.load(state, fits)

    return load


def _first_conv(model: nn.Module, cfg: PretrainedCfg) -> Any:
    return getattr(model, "_traits", {}).get("first_conv", cfg.first_conv)


def _pruned(
    base: str,
    name: str,
    pretrained: bool,
    overlay: dict[str, Any] | None,
    cache_dir: str | Path | None,
    options: dict[str, Any],
    kwargs: dict[str, Any],
) -> nn.Module:
    """The base, built as a classifier with the user's arguments, pruned by the user's budget."""
    from ..methods.prune import prune

    options.pop("variant", None)
    if not any(options.get(kind) is not None for kind in KINDS):
        budgets = ", ".join(f"{kind}=" for kind in KINDS)
        raise CompressError(f"{name}: expected one of {budgets} (how much to keep) or variant= (a stored record), found none")
    if not pretrained:
        options.setdefault("scope", "local")
    tag = options.pop("base_tag", None)
    model = base_model(base, name, pretrained, tag, overlay, cache_dir, kwargs, "pruned from the weights of %s and not fine-tuned")
    return prune(model, **options)


def base_model(
    base: str,
    name: str,
    pretrained: bool,
    tag: str | None,
    overlay: dict[str, Any] | None,
    cache_dir: str | Path | None,
    kwargs: dict[str, Any],
    warning: str,
) -> nn.Module:
    """The base, built as a classifier with the user's arguments, to be compressed.

    Args:
        base: timm architecture.
        name: Of the model to be made of it, for messages.
        pretrained, overlay, cache_dir, kwargs: As the factory got them.
        tag: Which of the base's weights.
        warning: What to say about a model made of pretrained weights, with %s where they are named.

    Raises:
        CompressError: If there are no such weights.
    """
    if pretrained:
        _check_pretrained(base, tag, overlay)
        _logger.warning(f"%s: {warning}; train it before use.", name, f"{base}.{tag}" if tag else base)
    own = {key: value for key, value in kwargs.items() if not key.startswith("feature") and key != "out_indices"}
    model = model_entrypoint(base)(pretrained=pretrained, pretrained_cfg=tag, pretrained_cfg_overlay=overlay, cache_dir=cache_dir, **own)
    model._model_args = {key: value for key, value in own.items() if key not in ("device", "dtype")}
    return model


def _check_pretrained(base: str, tag: str | None, overlay: dict[str, Any] | None) -> None:
    try:
        cfg = get_pretrained_cfg(f"{base}.{tag}" if tag else base)
    except RuntimeError as error:
        raise CompressError(f"{base}: timm has no weights {tag!r} (base_tag=) for it") from error
    if not (cfg and weights.has_source(replace(cfg, **overlay or {}))):
        raise CompressError(f"{base}: timm has no pretrained weights for it; use pretrained=False, or pretrained_cfg_overlay= to name some")


def _without_options(args: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in args.items() if key not in OPTIONS}
