"""`<arch>__exits`: a timm architecture with early exits, from a stored record or attached on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CompressError
from ..methods.exits import add_exits
from .pruned import base_model, create_variant

__all__ = ["create"]

METHOD = "exits"


def create(base: str, **kwargs: Any) -> nn.Module:
    """Create a model with early exits; what the entrypoint of `<base>__exits` does.

    Args:
        base: timm architecture.
        **kwargs: timm's factory arguments and the base's own, as for `<base>__pruned`, and either

            - `variant`: a record, as config.json holds it. With `pretrained=True` weights come from where the cfg points to; or
            - `exits`: how many, or where; see `zoo_compress.add_exits`. With `pretrained=True` the trunk has the base's weights
              (`base_tag` chooses which) and the heads have random ones.

    Returns:
        The model, or the base's own feature extractor, which has no exits.

    Raises:
        CompressError: Whatever goes wrong, with its cause.
    """
    return create_variant(base, METHOD, _with_exits, **kwargs)


def _with_exits(
    base: str,
    name: str,
    pretrained: bool,
    overlay: dict[str, Any] | None,
    cache_dir: str | Path | None,
    options: dict[str, Any],
    kwargs: dict[str, Any],
) -> nn.Module:
    wanted, tag = options.pop("exits", None), options.pop("base_tag", None)
    other = [key for key, value in options.items() if value is not None]
    if other:
        raise CompressError(f"{name}: {', '.join(other)}: exits are attached to the whole model; prune it with zoo_compress.prune")
    if wanted is None:
        raise CompressError(f"{name}: expected exits= (how many, or where) or variant= (a stored record), found none")
    model = base_model(base, name, pretrained, tag, overlay, cache_dir, kwargs, "weights of %s, with exits that are not trained")
    return add_exits(model, wanted)
