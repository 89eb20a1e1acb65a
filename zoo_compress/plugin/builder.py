"""The one place where the library steps into timm's factory: between building a model and loading its weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from timm.models import PretrainedCfg, _builder
from torch import nn

from ..errors import CompressError


class Loader(Protocol):
    """timm's `load_pretrained`, with the model and what the entrypoint chose for it filled in."""

    def __call__(self, state: dict[str, Any], check: Callable[[dict[str, Any], bool], None]) -> None:
        """Adapt `state` to the model as timm does and load it; `check(state, strict)` sees it as the base's own filter leaves it."""


@dataclass(frozen=True)
class Built:
    """A model as timm has built it, before weights and before any feature wrapper.

    Attributes:
        model: Of the base's architecture, or of the class the base uses for `features_only=True` where that is its own.
        num_classes: Number of classes the model is built for; 0 for features.
        in_chans: Number of input channels.
        load: Loads weights through timm's adaptation.
    """

    model: nn.Module
    num_classes: int
    in_chans: int
    load: Loader


def build(entrypoint: Callable[..., nn.Module], cfg: PretrainedCfg, between: Callable[[Built], None], **kwargs: Any) -> nn.Module:
    """Call a timm entrypoint and do something to the bare model where timm would load its weights.

    Whatever the entrypoint passes to `build_model_with_cfg` itself (feature extractor and its options, checkpoint filter, strictness, its
    own feature class) stays in force, which is why weights are not loaded after it returned: by then the model may be wrapped.
    `build_model_with_cfg` calls `load_pretrained` at that point; for the time of this call a stand-in takes its place that knows the
    model by the name in its cfg and passes every other one through.

    Args:
        entrypoint: A function registered with timm.
        cfg: Its cfg, whose `architecture` tells this model from those it is built of (a hybrid's backbone) and from other threads'.
        between: Called once.
        **kwargs: For the entrypoint.

    Raises:
        CompressError: If the entrypoint builds its model in some other way.
    """
    calls = 0

    def stand_in(model: nn.Module, pretrained_cfg: dict[str, Any], *, filter_fn: Callable | None = None, **options: Any) -> None:
        nonlocal calls
        calls += 1

        def load(state: dict[str, Any], check: Callable[[dict[str, Any], bool], None]) -> None:
            def filtered(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
                # Filters guess from names whose checkpoint this is; what fits as it is needs no guess.
                if filter_fn is not None and {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in model.state_dict().items()}:
                    # Filters drop buffers that their model computes; a resized model saves those it cannot compute.
                    buffers = {name: state[name] for name, b in model.named_buffers() if name in state and state[name].shape == b.shape}
                    state = {**buffers, **_filtered(filter_fn, state, model)}
                check(state, options["strict"])
                return state

            source = {**pretrained_cfg, "source": "", "state_dict": state, "custom_load": False}
            original(model, pretrained_cfg=source, filter_fn=filtered, **options)

        between(Built(model, options["num_classes"], options["in_chans"], load))

    with _replaced(cfg.architecture, stand_in) as original:
        model = entrypoint(pretrained=True, pretrained_cfg=cfg, **kwargs)
    if calls != 1:
        raise CompressError(f"{cfg.architecture}: its timm entrypoint loads weights {calls} times through timm's builder, expected once")
    return model


def _filtered(filter_fn: Callable, state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """timm admits filters of one argument too, and tells them apart in this way."""
    try:
        return filter_fn(state, model)
    except TypeError:
        return filter_fn(state)


_lock = threading.RLock()


@contextmanager
def _replaced(architecture: str | None, stand_in: Callable[..., None]) -> Iterator[Callable[..., None]]:
    with _lock:
        original = _builder.load_pretrained

        def load_pretrained(model: nn.Module, pretrained_cfg: dict[str, Any] | None = None, **options: Any) -> None:
            name = (pretrained_cfg or {}).get("architecture")
            if name == architecture:
                stand_in(model, pretrained_cfg, **options)
            elif threading.get_ident() != thread:
                original(model, pretrained_cfg=pretrained_cfg, **options)
            # Else it is a part that the entrypoint builds first: its weights come with the whole.

        thread = threading.get_ident()
        _builder.load_pretrained = load_pretrained  # type: ignore[assignment]
        try:
            yield original
        finally:
            _builder.load_pretrained = original
