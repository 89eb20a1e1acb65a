"""`<arch>__clustered`: a timm architecture whose weights share few values, from a stored record or clustered on the spot."""

from __future__ import annotations

from typing import Any

from torch import nn

from .request import Request, answer, recorded

__all__ = ["create"]

OPTIONS = ("bits", "exclude")
"""Arguments of `zoo_compress.cluster`."""


def create(base: str, /, **kwargs: Any) -> nn.Module:
    """Create a model with shared weights; what the entrypoint of `<base>__clustered` does.

    Args:
        base: timm architecture.
        **kwargs: timm's factory arguments and the base's own, as for `<base>__pruned`, and either

            - `variant`: a record, as config.json holds it. With `pretrained=True` weights come from where the cfg points to; without,
              they are random and share nothing; or
            - `bits` and `exclude` of `zoo_compress.cluster`. With `pretrained=True` the base's weights are clustered (`base_tag` chooses
              which) and nothing is fine-tuned.

    Raises:
        CompressError: Whatever goes wrong, with its cause.
    """
    return answer(recorded(_clustered), base, "clustered", **kwargs)


def _clustered(request: Request) -> nn.Module:
    from ..methods.cluster import cluster

    options = request.chosen(OPTIONS, one_of=("bits",))
    return cluster(request.base_model("clustered from the weights of %s and not fine-tuned"), **options)
