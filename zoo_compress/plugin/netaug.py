"""`<arch>__netaug`: a timm architecture inside a larger network, for training only."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import CompressError
from .request import Request, answer

__all__ = ["create"]

OPTIONS = ("r", "s")
"""Arguments of `zoo_compress.netaug`."""


def create(base: str, /, **kwargs: Any) -> nn.Module:
    """Create an augmented network; what the entrypoint of `<base>__netaug` does.

    Args:
        base: timm architecture.
        **kwargs: timm's factory arguments but those of feature extractors, the base's own, and `r` and `s` of `zoo_compress.netaug`. With
            `pretrained=True` the base has its own weights (`base_tag` chooses which).

    Raises:
        CompressError: Whatever goes wrong, with its cause.
    """
    return answer(_create, base, "netaug", **kwargs)


def _create(request: Request) -> nn.Module:
    from ..methods.netaug import netaug

    if request.args.get("features_only"):
        raise CompressError(f"{request.name}: expected a classifier, found features_only=True")
    if request.stored() is not None:
        raise CompressError(f"{request.name}: expected no record: an augmented network is for training, what it exports is saved")
    return netaug(request.base_model(), **request.chosen(OPTIONS))
