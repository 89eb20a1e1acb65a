"""`<arch>__ternary`: a timm architecture with the weights -a, 0 and a in each layer; `<arch>__binary` with a third value."""

from __future__ import annotations

from typing import Any

from torch import nn

from .binary import create_kind

__all__ = ["create"]


def create(base: str, /, **kwargs: Any) -> nn.Module:
    """Create a ternary model; what the entrypoint of `<base>__ternary` does. Arguments and errors are those of `binary.create`."""
    return create_kind("ternary", base, **kwargs)
