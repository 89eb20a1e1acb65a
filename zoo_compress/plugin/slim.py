"""`<arch>__slim`: a timm architecture as a slimmable network, from a stored record or made on the spot."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import CompressError, VariantError
from ..surgery.restore import recorded_layout
from ..surgery.trace import analyze
from . import weights
from .request import PRIVATE, Request, answer

__all__ = ["create"]

OPTIONS = ("widths", "universal", "round_to")
"""Arguments of `zoo_compress.slim`; `exits` is that of `add_exits`."""


def create(base: str, /, **kwargs: Any) -> nn.Module:
    """Create a slimmable network; what the entrypoint of `<base>__slim` does.

    Args:
        base: timm architecture.
        **kwargs: timm's factory arguments but those of feature extractors (export a width first), the base's own, and either

            - `variant`: a record, as config.json holds it. With `pretrained=True` weights come from where the cfg points to; or
            - `widths`, `universal` and `round_to` of `zoo_compress.slim`, and `exits` of `zoo_compress.add_exits` for a network that has
              early exits as well. With `pretrained=True` the bank starts from the base's weights
              (`base_tag` chooses which), at which only the whole is of use before training.

    Raises:
        CompressError: Whatever goes wrong, with its cause.
    """
    return answer(_create, base, "slim", **kwargs)


def _create(request: Request) -> nn.Module:
    from ..methods.exiting import add_exits
    from ..methods.slimmable import restore_slimmable_, slim

    if request.args.get("features_only"):
        raise CompressError(f"{request.name}: expected a classifier, found features_only=True: export a width of it and save that first")
    variant = request.stored()
    if variant is None:
        options = request.chosen((*OPTIONS, "exits"))
        exits, model = options.pop("exits", None), request.base_model()
        return slim(model if exits is None else add_exits(model, exits), **options)
    if variant.bank is None:
        raise VariantError(f"variant.bank: expected what {request.name} runs at, found nothing")
    model, private = request.restore(variant)
    layout = recorded_layout(model, variant)
    if request.args:  # other classes or channels cost something else
        traced = analyze(model).settled()
        layout = traced if traced.params == layout.params else layout
    net = restore_slimmable_(model, layout, variant.bank)
    if request.pretrained:
        own = net.get_submodule(PRIVATE.rstrip("."))
        state = {name.removeprefix(PRIVATE): tensor for name, tensor in private.items()}
        weights.check(own, state, f"{request.name}: {PRIVATE}*", strict=True)
        with torch.no_grad():
            own.load_state_dict(state)
    return net
