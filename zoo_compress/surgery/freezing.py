"""Frozen BatchNorms: timm's `freeze` puts layers without a counter of batches in the place of others, which compute almost the same."""

from __future__ import annotations

from collections.abc import Sequence

from timm.utils.model import FrozenBatchNorm2d, FrozenBatchNormAct2d, freeze_batch_norm_2d
from torch import nn

from ..errors import VariantError


def frozen(model: nn.Module) -> tuple[str, ...]:
    """Paths of the frozen BatchNorms of a model."""
    return tuple(path for path, module in model.named_modules() if isinstance(module, (FrozenBatchNorm2d, FrozenBatchNormAct2d)))


def check(model: nn.Module, paths: Sequence[str]) -> None:
    """Check that a model has BatchNorms at the paths that a record calls frozen.

    Raises:
        VariantError: Naming the path, and what is there.
    """
    modules = dict(model.named_modules())
    for path in paths:
        found = modules.get(path)
        if not isinstance(found, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            what = "nothing of that name" if found is None else f"a {type(found).__name__}"
            raise VariantError(f"variant.frozen: expected BatchNorms of the base, found {what} at {path!r}")


def freeze_(model: nn.Module, paths: Sequence[str]) -> None:
    """Freeze BatchNorms of a model in place, as timm does it.

    Raises:
        VariantError: If a path leads to none.
    """
    check(model, paths)
    for path in paths:
        parent, _, name = path.rpartition(".")
        norm = model.get_submodule(path)
        model.get_submodule(parent).register_module(name, freeze_batch_norm_2d(norm).train(norm.training))
