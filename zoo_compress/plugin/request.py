"""What `timm.create_model("<arch>__<kind>", …)` asks for, and the two ways to answer: from the base, or from a stored record."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models import PretrainedCfg, _factory, get_pretrained_cfg, model_entrypoint, resolve_pretrained_cfg
from torch import Tensor, nn

from ..errors import CompressError, VariantError
from ..methods.exiting import attach_exits_
from ..structure.variant import OPTIONS, Variant
from ..surgery import blocks, factors, freezing
from ..surgery.masks import mask_
from ..surgery.modules import classifiers, listed
from ..surgery.origin import origin, rename_packed
from ..surgery.packing import unpack_state
from ..surgery.restore import check, present, restore_
from ..surgery.rows import Boundary
from ..zoo import index
from . import weights
from .allowance import ELEMENTS_PER_BASE, allowance, allowed
from .builder import Built, build
from .skip_init import skip_init

_logger = logging.getLogger(__name__)

State = dict[str, Tensor]


@dataclass(frozen=True)
class Request:
    """The arguments of an entrypoint, sorted.

    Attributes:
        base: timm architecture.
        name: The name asked for, `<base>__<kind>`.
        pretrained: Load weights.
        cfg: The cfg of that name, with what the user put over it.
        from_file: The cfg came from a config.json.
        overlay: What the user put over it.
        cache_dir: Of the Hub's client.
        saved: Arguments that config.json holds.
        options: How to compress: those of `structure.variant.OPTIONS` that were given.
        args: The base's own arguments, and those of timm's for feature extractors.
    """

    base: str
    name: str
    pretrained: bool
    cfg: PretrainedCfg
    from_file: bool
    overlay: dict[str, Any] | None
    cache_dir: str | Path | None
    saved: Mapping[str, Any]
    options: dict[str, Any]
    args: dict[str, Any]

    def stored(self) -> Variant | None:
        """The record to restore, if there is one.

        Raises:
            CompressError: If it is none, or of another name, or options stand beside it; or if weights are given that need one.
        """
        if self.options.get("variant") is None:
            if self.from_file and weights.has_source(self.cfg):
                where = self.cfg.file or self.cfg.hf_hub_id or self.name
                raise VariantError(f"{where}: expected a record 'variant' in model_args of config.json, found none")
            return None
        variant = Variant.from_dict(self.options["variant"])
        if variant.architecture != self.name:
            raise VariantError(f"variant.base: expected {self.base!r} for {self.name}, found a record of {variant.architecture}")
        chosen = {key: value for key, value in self.options.items() if key != "variant" and value != self.saved.get(key)}
        if chosen:
            raise CompressError(
                f"{self.name}: {', '.join(chosen)} given with a stored variant; load it, then use zoo_compress.prune, slim or netaug"
            )
        return variant

    def chosen(self, expected: Collection[str], one_of: Collection[str] = ()) -> dict[str, Any]:
        """The options to compress by, without the tag of the base's weights.

        Args:
            expected: Those this kind takes.
            one_of: Those without which it does not know what to do.

        Raises:
            CompressError: If one is not among those this kind takes, or one that it needs is not there.
        """
        found = {key: value for key, value in self.options.items() if key not in ("variant", "base_tag")}
        for key in found:
            if key not in expected:
                raise CompressError(f"{self.name}: expected {', '.join(f'{name}=' for name in expected)}, found {key}=")
        if one_of and all(found.get(name) is None for name in one_of):
            known = ", ".join(f"{name}=" for name in (*one_of, "variant"))
            raise CompressError(f"{self.name}: expected one of {known} (a stored record), found none")
        return found

    def base_model(self, warning: str | None = None) -> nn.Module:
        """The base, built as a classifier with the user's arguments, with its own weights if weights are asked for.

        Args:
            warning: What to say of a model made of these weights, with %s where they are named.

        Raises:
            CompressError: If timm has none.
        """
        tag = self.options.get("base_tag")
        if self.pretrained:
            _check_pretrained(self.base, tag, self.overlay)
            if warning is not None:
                _logger.warning(f"%s: {warning}; train it before use.", self.name, f"{self.base}.{tag}" if tag else self.base)
        own = {key: value for key, value in self.args.items() if not key.startswith("feature") and key != "out_indices"}
        model = model_entrypoint(self.base)(
            pretrained=self.pretrained, pretrained_cfg=tag, pretrained_cfg_overlay=self.overlay, cache_dir=self.cache_dir, **own
        )
        model._model_args = {key: value for key, value in own.items() if key not in ("device", "dtype")}
        return model

    def rebuild(self, made: nn.Module) -> nn.Module:
        """A model that was compressed here, as timm's factory would create it again: as features, if those are asked for."""
        source = origin(made)
        assert source is not None
        assert source.previous is not None
        variant, state = source.previous, made.state_dict()

        def copy(built: Built) -> None:
            built.model.load_state_dict({key: state[key] for key in built.model.state_dict()})

        cfg, args = PretrainedCfg(**made.pretrained_cfg), {**variant.base_args, **self.args}  # type: ignore[arg-type]
        return restored(variant, cfg, copy, variant.base_args, args, getattr(made, "boundaries", None))

    def restore(self, variant: Variant) -> tuple[nn.Module, State]:
        """The model of a record, with its weights if weights are asked for, and those of them that are no base model's."""
        private: State = {}
        load: Callable[[Built], None] = _keep
        limit = self._proportion() if self.from_file and not self.pretrained else nullcontext()
        if self.pretrained:
            stored = weights.read(self.cfg, self.cache_dir)
            where = stored.where
            limit = allowance(stored.tensors, where)
            state = stored.whole(unpack_state(stored.tensors, variant.packed, where, allowed(stored.tensors)))
            if variant.bank is not None:
                private = {name: state.pop(name) for name in list(state) if name.startswith(PRIVATE)}
            self._check_classes(state, where)
            load = partial(self._load, state=state, where=where)
        args = {"cache_dir": self.cache_dir, "pretrained_model_args": self.saved, **variant.base_args, **self.args}
        # With other classes or channels than the weights', some parameters keep the values they are built with.
        whole = self.args.get("num_classes") in (None, self.cfg.num_classes) and self.args.get("in_chans") in (None, self.cfg.input_size[0])
        source_args = {**variant.base_args, **{key: value for key, value in self.saved.items() if key not in OPTIONS}}
        with limit, skip_init() if self.pretrained and whole else nullcontext():
            return restored(variant, self.cfg, load, source_args, args), private

    def _proportion(self) -> AbstractContextManager:
        """What a record from a file may ask for where no weights are asked for, to whose size it could be compared."""
        try:
            with torch.device("meta"), skip_init():
                base = model_entrypoint(self.base)(pretrained=False)
        except (RuntimeError, NotImplementedError):  # few cannot be built without data
            return nullcontext()
        return allowance(base.state_dict(), f"{self.name}, as timm makes {self.base}", ELEMENTS_PER_BASE)

    def _check_classes(self, state: State, where: str) -> None:
        for name in listed(self.cfg.classifier):
            head = state.get(f"{name}.weight")
            if head is not None and head.ndim and head.shape[0] != self.cfg.num_classes:
                # timm would take the difference for a wish, and leave the classifier random.
                raise VariantError(
                    f"{where}: tensor '{name}.weight': expected the {self.cfg.num_classes} classes of its config, found {head.shape[0]}"
                )

    def _load(self, built: Built, state: State, where: str) -> None:
        other_classes = built.num_classes != self.cfg.num_classes
        other_input = built.in_chans != self.cfg.input_size[0]
        adapted = {
            f"{module}.{key}"
            for names, differs in ((self.cfg.classifier, other_classes), (_first_conv(built.model, self.cfg), other_input))
            for module in listed(names)
            for key in ("weight", "bias")
            if differs
        }

        def fits(state: dict[str, Any], strict: bool) -> None:
            weights.check(built.model, state, where, strict=strict and not other_classes, adapted=adapted)

        built.load(dict(state), fits)


PRIVATE = "private."
"""How the names of tensors begin that single widths of an elastic network have of their own."""


def answer(create: Callable[[Request], nn.Module], base: str, kind: str, /, **kwargs: Any) -> nn.Module:
    """Sort the arguments of an entrypoint, and let one kind of error out of it.

    Args:
        create: What makes the model.
        base: timm architecture.
        kind: Kind of variant.
        **kwargs: timm's factory arguments, the base's own, and options.

    Raises:
        CompressError: Whatever goes wrong, with its cause.
    """
    name = f"{base}__{kind}"
    try:
        return create(_sorted(base, name, **kwargs))
    except CompressError:
        raise
    except Exception as error:
        raise CompressError(f"{name}: {type(error).__name__}: {error}") from error


def recorded(make: Callable[[Request], nn.Module]) -> Callable[[Request], nn.Module]:
    """What makes models of a kind of which a record says everything: restores it where there is one, else compresses the base by `make`."""

    def create(request: Request) -> nn.Module:
        variant = request.stored()
        return request.rebuild(make(request)) if variant is None else request.restore(variant)[0]

    return create


def _sorted(
    base: str,
    name: str,
    /,
    *,
    pretrained: bool = False,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_model_args: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> Request:
    if isinstance(pretrained_cfg, str) and pretrained_cfg:
        pretrained_cfg, pretrained_model_args = _published(name, pretrained_cfg, cache_dir)
        kwargs = {**pretrained_model_args, **kwargs}
    options = {key: kwargs.pop(key) for key in OPTIONS & kwargs.keys()}
    cfg = replace(_resolve(name, pretrained_cfg, pretrained_cfg_overlay), architecture=name)
    from_file, saved = isinstance(pretrained_cfg, Mapping), pretrained_model_args or {}
    return Request(base, name, pretrained, cfg, from_file, pretrained_cfg_overlay, cache_dir, saved, options, kwargs)


def _published(name: str, tag: str, cache_dir: str | Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What config.json of a published checkpoint says: its cfg and the arguments of the model, the record among them."""
    cfg = _resolve(name, tag, None)
    if cfg.file:
        found, architecture, args = _factory.load_model_config_from_path(cfg.file)
    else:
        found, architecture, args = _factory.load_model_config_from_hf(cfg.hf_hub_id, cache_dir=cache_dir)  # type: ignore[arg-type]
    if architecture != name:
        raise VariantError(f"{cfg.file or cfg.hf_hub_id}: expected a checkpoint of {name}, found one of {architecture}")
    return {**found, "tag": tag}, args


def _resolve(name: str, cfg: str | dict[str, Any] | PretrainedCfg | None, overlay: dict[str, Any] | None) -> PretrainedCfg:
    try:
        return resolve_pretrained_cfg(name, cfg, overlay)  # type: ignore[arg-type]
    except RuntimeError as error:
        recipe = next((entry.recipe for entry in index.read().variants if entry.name == f"{name}.{cfg}"), None)
        raise CompressError(
            f"{name}: there is no published checkpoint {cfg!r}; "
            + (
                f"its recipe makes it: zoo-compress run recipes/{recipe}"
                if recipe
                else "zoo_compress.list_variants() lists those there are, and without a tag, pretrained=True starts from the base's "
                "weights (base_tag= chooses which)"
            )
        ) from error


def restored(
    variant: Variant,
    cfg: PretrainedCfg,
    load: Callable[[Built], None],
    source_args: dict[str, Any],
    args: dict[str, Any],
    boundaries: tuple[Boundary | None, ...] | None = None,
) -> nn.Module:
    """The model of a record, or the base's own feature extractor around it.

    Args:
        variant: The record.
        cfg: timm's cfg of the model.
        load: Fills in its weights.
        source_args: The arguments the recorded model was built with.
        args: Those for the entrypoint of the base now.
        boundaries: Of its early exits, if they are known already.
    """
    entrypoint = model_entrypoint(variant.base)
    packed: dict[str, nn.Parameter] = {}

    def between(built: Built) -> None:
        removed, two = blocks.present(built.model, variant.removed), factors.present(built.model, variant.factors)
        factors.replace_(blocks.skip_(built.model, removed), two)
        if variant.exits and variant.exits.truncated and args.get("features_only"):
            raise VariantError(f"{variant.architecture}: it ends at an early exit: expected no features_only=True, found it")
        if variant.exits and not args.get("features_only"):
            attach_exits_(built.model, variant.exits, boundaries)
        fitting = present(built.model, variant)
        if fitting != variant or (removed, two) != (variant.removed, variant.factors):
            # The model was asked for without its classifier, or as features. The record must still fit what it was made of.
            whole = blocks.skip_(entrypoint(pretrained=False, **source_args), variant.removed)
            factors.replace_(whole, variant.factors)
            check(attach_exits_(whole, variant.exits) if variant.exits else whole, variant)
        restore_(built.model, fitting)
        if built.num_classes and not args.get("features_only") and _needs_head(entrypoint, cfg, source_args, args):
            built.model.reset_classifier(built.num_classes, *filter(None, [args.get("global_pool")]))  # type: ignore[operator]
        for name in fitting.packed:  # random weights are whole, even where they begin as zero
            weight = built.model.get_parameter(name)
            mask_(weight, torch.ones_like(weight, dtype=torch.bool))
        freezing.freeze_(built.model, fitting.frozen)
        load(built)
        packed.update((name, built.model.get_parameter(name)) for name in fitting.packed)

    model = build(entrypoint, replace(cfg, state_dict=None), between, **args)
    if args.get("features_only"):
        rename_packed(model, packed)
    model._model_args = {"variant": variant.to_dict()}  # type: ignore[assignment]
    return model


def _needs_head(entrypoint: Callable[..., nn.Module], cfg: PretrainedCfg, source_args: dict[str, Any], args: dict[str, Any]) -> bool:
    """Whether the classifier that the base was built with is none of the recorded model's: that has none, or one of another pooling."""
    if not cfg.num_classes:
        return True
    if args.get("global_pool") == source_args.get("global_pool"):
        return False
    with torch.device("meta"), skip_init():
        asked, recorded = (entrypoint(pretrained=False, **each) for each in (args, source_args))
    shapes = [{name: weight.shape[1:] for name, weight in classifiers(model, cfg.classifier).items()} for model in (asked, recorded)]
    return shapes[0] != shapes[1]


def _keep(built: Built) -> None:
    """Leave the weights as they are: the first of the base's random ones."""


def _first_conv(model: nn.Module, cfg: PretrainedCfg) -> Any:
    return getattr(model, "_traits", {}).get("first_conv", cfg.first_conv)


def _check_pretrained(base: str, tag: str | None, overlay: dict[str, Any] | None) -> None:
    try:
        cfg = get_pretrained_cfg(f"{base}.{tag}" if tag else base)
    except RuntimeError as error:
        raise CompressError(f"{base}: timm has no weights {tag!r} (base_tag=) for it") from error
    if not (cfg and weights.has_source(replace(cfg, **overlay or {}))):
        raise CompressError(f"{base}: timm has no pretrained weights for it; use pretrained=False, or pretrained_cfg_overlay= to name some")
