"""zoo_compress: compression for any timm model."""

from .errors import CompressError, VerificationError
from .methods.prune import prune
from .structure.layout import Axis, Layout
from .surgery.resize import resize
from .surgery.trace import analyze
from .surgery.verify import Verification, verify

__all__ = ["Axis", "CompressError", "Layout", "Verification", "VerificationError", "analyze", "prune", "resize", "verify"]
