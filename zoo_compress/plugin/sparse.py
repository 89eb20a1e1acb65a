"""`<arch>__sparse`: a timm architecture with single weights removed, from a stored record or chosen on the spot."""

from __future__ import annotations

from typing import Any

from torch import nn

from .request import Request, answer, recorded

__all__ = ["create"]

OPTIONS = ("density", "pattern", "scope", "criterion", "exclude", "seed")
"""Arguments of `zoo_compress.sparsify` that are JSON values."""


def create(base: str, /, **kwargs: Any) -> nn.Module:
    """Create a sparse model; what the entrypoint of `<base>__sparse` does.

    Args:
        base: timm architecture.
        **kwargs: timm's factory arguments and the base's own, as for `<base>__pruned`, and either

            - `variant`: a record, as config.json holds it. With `pretrained=True` weights come from where the cfg points to; without,
              they are random and none is removed; or
            - `density` or `pattern`, and further options of `zoo_compress.sparsify` that are JSON values. With `pretrained=True` the
              base's weights are sparsified (`base_tag` chooses which) and nothing is fine-tuned. Without, `scope` is `"local"` unless
              given, since a ranking of random weights means nothing.

    Raises:
        CompressError: Whatever goes wrong, with its cause.
    """
    return answer(recorded(_sparse), base, "sparse", **kwargs)


def _sparse(request: Request) -> nn.Module:
    from ..methods.sparse import sparsify

    options = request.chosen(OPTIONS, one_of=("density", "pattern"))
    if not request.pretrained:
        options.setdefault("scope", "local")
    return sparsify(request.base_model("sparsified from the weights of %s and not fine-tuned"), **options)
