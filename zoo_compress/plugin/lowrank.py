"""`<arch>__lowrank`: a timm architecture in which layers are products of two, from a stored record or factorised on the spot."""

from __future__ import annotations

from typing import Any

from torch import nn

from .request import Request, answer, recorded

__all__ = ["create"]

BUDGETS = ("macs", "params", "energy")
OPTIONS = (*BUDGETS, "scheme", "scope", "round_to", "exclude", "seed")
"""Arguments of `zoo_compress.factorize` that are JSON values."""


def create(base: str, /, **kwargs: Any) -> nn.Module:
    """Create a model with factorised layers; what the entrypoint of `<base>__lowrank` does.

    Args:
        base: timm architecture.
        **kwargs: timm's factory arguments and the base's own, as for `<base>__pruned`, and either

            - `variant`: a record, as config.json holds it. With `pretrained=True` weights come from where the cfg points to; or
            - one of `macs`, `params` and `energy`, and further options of `zoo_compress.factorize` that are JSON values. With
              `pretrained=True` the base's weights are factorised (`base_tag` chooses which). Without, ranks depend on the budget alone:
              `scope` is `"local"` unless given, since random weights say nothing.

    Returns:
        The model, or the base's own feature extractor around it.

    Raises:
        CompressError: Whatever goes wrong, with its cause.
    """
    return answer(recorded(_factorized), base, "lowrank", **kwargs)


def _factorized(request: Request) -> nn.Module:
    from ..methods.factorize import factorize

    options = request.chosen(OPTIONS, one_of=BUDGETS)
    if not request.pretrained and options.get("energy") is None:
        options.setdefault("scope", "local")
    return factorize(request.base_model("factorised from the weights of %s and not fine-tuned"), **options)
