"""`<arch>__exits`: a timm architecture with early exits, from a stored record or attached on the spot."""

from __future__ import annotations

from typing import Any

from torch import nn

from .request import Request, answer, recorded

__all__ = ["create"]

OPTIONS = ("exits", "grid")
"""Arguments of `zoo_compress.add_exits`."""


def create(base: str, /, **kwargs: Any) -> nn.Module:
    """Create a model with early exits; what the entrypoint of `<base>__exits` does.

    Args:
        base: timm architecture.
        **kwargs: timm's factory arguments and the base's own, as for `<base>__pruned`, and either

            - `variant`: a record, as config.json holds it. With `pretrained=True` weights come from where the cfg points to; or
            - `exits`: how many, or where, and `grid`; see `zoo_compress.add_exits`. With `pretrained=True` the trunk has the base's weights
              (`base_tag` chooses which) and the heads have random ones.

    Returns:
        The model, or the base's own feature extractor, which has no exits.

    Raises:
        CompressError: Whatever goes wrong, with its cause.
    """
    return answer(recorded(_with_exits), base, "exits", **kwargs)


def _with_exits(request: Request) -> nn.Module:
    from ..methods.exiting import add_exits

    options = request.chosen(OPTIONS, one_of=("exits",))
    return add_exits(request.base_model("weights of %s, with exits that are not trained"), **options)
