"""`<arch>__pruned`: a timm architecture with fewer channels and heads, from a stored record or pruned on the spot."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..structure.budget import KINDS
from .request import Request, answer, recorded

__all__ = ["create"]

OPTIONS = (*KINDS, "criterion", "scope", "round_to", "min_keep", "exclude", "seed", "batch_size", "threads")
"""Arguments of `zoo_compress.prune` that are JSON values."""


def create(base: str, /, **kwargs: Any) -> nn.Module:
    """Create a pruned model; what the entrypoint of `<base>__pruned` does.

    Args:
        base: timm architecture.
        **kwargs: timm's factory arguments (`pretrained`, `pretrained_cfg`, `pretrained_cfg_overlay`, `cache_dir`, `features_only`,
            `out_indices`, …), the base's own (`num_classes`, `in_chans`, …), and either

            - `variant`: a record, as config.json holds it. With `pretrained=True` weights come from where the cfg points to; or
            - one of `keep`, `macs`, `params`, `latency` and further options of `zoo_compress.prune` that are JSON values. With
              `pretrained=True` the base's weights are pruned (`base_tag` chooses which) and nothing is fine-tuned. Without, the sizes
              depend on the budget alone: `scope` is `"local"` unless given, since a ranking of random weights means nothing. They are cut
              from the base's; `zoo_compress.reinitialize` draws them for these widths.

    Returns:
        The model, or the base's own feature extractor around it.

    Raises:
        CompressError: Whatever goes wrong, with its cause.
    """
    return answer(recorded(_pruned), base, "pruned", **kwargs)


def _pruned(request: Request) -> nn.Module:
    from ..methods.prune import prune

    options = request.chosen(OPTIONS, one_of=KINDS)
    if not request.pretrained:
        options.setdefault("scope", "local")
    return prune(request.base_model("pruned from the weights of %s and not fine-tuned"), **options)
