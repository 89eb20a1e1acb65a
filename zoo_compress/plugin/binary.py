"""`<arch>__binary`: a timm architecture with the weights -a and a in each layer, from a stored record or quantised on the spot."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from .request import Request, answer, recorded

__all__ = ["create"]

OPTIONS = ("exclude",)
"""Arguments of `zoo_compress.quantize` beside the kind."""


def create(base: str, /, **kwargs: Any) -> nn.Module:
    """Create a binary model; what the entrypoint of `<base>__binary` does.

    Args:
        base: timm architecture.
        **kwargs: timm's factory arguments and the base's own, as for `<base>__pruned`, and `variant`, a record as config.json holds it.
            Without one, the base's weights (with `pretrained=True`; `base_tag` chooses which) or random ones are quantised, all but those
            of `exclude`, and nothing is trained.

    Raises:
        CompressError: Whatever goes wrong, with its cause.
    """
    return create_kind("binary", base, **kwargs)


def create_kind(kind: str, base: str, /, **kwargs: Any) -> nn.Module:
    """The same for a kind of `methods.binary`."""
    return answer(recorded(partial(_quantized, kind)), base, kind, **kwargs)


def _quantized(kind: str, request: Request) -> nn.Module:
    from ..methods.binary import quantize

    base = request.base_model(f"{kind} values of the weights of %s, not trained")
    return quantize(base, kind, **request.chosen(OPTIONS))
