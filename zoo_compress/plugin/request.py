"""What `timm.create_model("<arch>__<kind>", …)` asks for, and the two ways to answer: from the base, or from a stored record."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg, get_pretrained_cfg, model_entrypoint, resolve_pretrained_cfg
from torch import Tensor, nn

from ..errors import CompressError, VariantError
from ..structure.variant import OPTIONS, Variant
from ..surgery.restore import check, present, restore_
from . import weights
from .builder import Built, build
from .skip_init import skip_init

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
            raise CompressError(f"{self.name}: {', '.join(chosen)} given with a stored variant; load it, then compress what was loaded")
        return variant

    def chosen(self, expected: Collection[str]) -> dict[str, Any]:
        """The options to compress by, without the tag of the base's weights.

        Raises:
            CompressError: If one is not among those this kind takes.
        """
        found = {key: value for key, value in self.options.items() if key not in ("variant", "base_tag")}
        for key in found:
            if key not in expected:
                raise CompressError(f"{self.name}: expected {', '.join(f'{name}=' for name in expected)}, found {key}=")
        return found

    def base_model(self) -> nn.Module:
        """The base, built as a classifier with the user's arguments, with its own weights if weights are asked for.

        Raises:
            CompressError: If timm has none.
        """
        tag = self.options.get("base_tag")
        if self.pretrained:
            _check_pretrained(self.base, tag, self.overlay)
        own = {key: value for key, value in self.args.items() if not key.startswith("feature") and key != "out_indices"}
        model = model_entrypoint(self.base)(
            pretrained=self.pretrained, pretrained_cfg=tag, pretrained_cfg_overlay=self.overlay, cache_dir=self.cache_dir, **own
        )
        model._model_args = {key: value for key, value in own.items() if key not in ("device", "dtype")}
        return model

    def restore(self, variant: Variant) -> tuple[nn.Module, State]:
        """The model of a record, with its weights if weights are asked for, and those of them that are no base model's."""
        private: State = {}

        def load(built: Built) -> None:
            state, where = weights.read(self.cfg, self.cache_dir)
            if variant.bank is not None:
                private.update({name: state.pop(name) for name in list(state) if name.startswith(PRIVATE)})
            self._load(built, state, where)

        args = {"cache_dir": self.cache_dir, "pretrained_model_args": self.saved, **variant.base_args, **self.args}
        # With other classes or channels than the weights', some parameters keep the values they are built with.
        whole = self.args.get("num_classes") in (None, self.cfg.num_classes) and self.args.get("in_chans") in (None, self.cfg.input_size[0])
        source_args = {**variant.base_args, **{key: value for key, value in self.saved.items() if key not in OPTIONS}}
        with skip_init() if self.pretrained and whole else nullcontext():
            return restored(variant, self.cfg, load if self.pretrained else _keep, source_args, args), private

    def _load(self, built: Built, state: State, where: str) -> None:
        other_classes = built.num_classes != self.cfg.num_classes
        other_input = built.in_chans != self.cfg.input_size[0]
        adapted = {
            f"{module}.{key}"
            for names, differs in ((self.cfg.classifier, other_classes), (_first_conv(built.model, self.cfg), other_input))
            for module in (names if isinstance(names, (tuple, list)) else [names])
            for key in ("weight", "bias")
            if differs and module
        }

        def fits(state: dict[str, Any], strict: bool) -> None:
            weights.check(built.model, state, where, strict=strict and not other_classes, adapted=adapted)

        built.load(state, fits)


PRIVATE = "private."
"""How the names of tensors begin that single widths of an elastic network have of their own."""


def answer(create: Callable[[Request], nn.Module], base: str, kind: str, **kwargs: Any) -> nn.Module:
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


def _sorted(
    base: str,
    name: str,
    *,
    pretrained: bool = False,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_model_args: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> Request:
    options = {key: kwargs.pop(key) for key in OPTIONS & kwargs.keys()}
    try:
        cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise CompressError(
            f"{name}: there is no published checkpoint {pretrained_cfg!r}; without a tag, pretrained=True starts from the base's weights "
            "(base_tag= chooses which)"
        ) from error
    cfg = replace(cfg, architecture=name)
    from_file, saved = isinstance(pretrained_cfg, Mapping), pretrained_model_args or {}
    return Request(base, name, pretrained, cfg, from_file, pretrained_cfg_overlay, cache_dir, saved, options, kwargs)


def restored(
    variant: Variant, cfg: PretrainedCfg, load: Callable[[Built], None], source_args: dict[str, Any], args: dict[str, Any]
) -> nn.Module:
    """The model of a record, or the base's own feature extractor around it.

    Args:
        variant: The record.
        cfg: timm's cfg of the model.
        load: Fills in its weights.
        source_args: The arguments the recorded model was built with.
        args: Those for the entrypoint of the base now.
    """
    entrypoint = model_entrypoint(variant.base)

    def between(built: Built) -> None:
        fitting = present(built.model, variant)
        if fitting != variant:
            # The model was asked for without its classifier, or as features. The record must still fit what it was made of.
            check(entrypoint(pretrained=False, **source_args), variant)
        restore_(built.model, fitting)
        load(built)

    model = build(entrypoint, replace(cfg, state_dict=None), between, **args)
    model._model_args = {"variant": variant.to_dict()}  # type: ignore[assignment]
    return model


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
