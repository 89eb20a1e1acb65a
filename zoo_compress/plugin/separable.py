"""`<arch>__separable`: a timm architecture with depthwise and pointwise convolutions in place of dense ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from .request import Request, answer, recorded

__all__ = ["create"]

OPTIONS = ("macs", "params", "multiplier", "exclude", "seed")
"""Arguments of `zoo_compress.separate` that are JSON values."""


def create(base: str, /, **kwargs: Any) -> nn.Module:
    """Create a model with separable convolutions; what the entrypoint of `<base>__separable` does.

    Args:
        base: timm architecture.
        **kwargs: timm's factory arguments and the base's own, as for `<base>__pruned`, and either

            - `variant`: a record, as config.json holds it. With `pretrained=True` weights come from where the cfg points to; or
            - options of `zoo_compress.separate` that are JSON values; none are needed. With `pretrained=True` the base's weights are
              approximated (`base_tag` chooses which).

    Returns:
        The model, or the base's own feature extractor around it.

    Raises:
        CompressError: Whatever goes wrong, with its cause.
    """
    return answer(recorded(_separable), base, "separable", **kwargs)


def _separable(request: Request) -> nn.Module:
    from ..methods.separate import separate

    return separate(request.base_model("fitted to the weights of %s and not fine-tuned"), **request.chosen(OPTIONS))
