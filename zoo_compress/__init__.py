"""zoo_compress: compression for any timm model.

Importing the package registers its names with timm: `timm.create_model("resnet18__pruned", keep=0.5)`.
"""

from .errors import AnalysisError, CompressError, RecipeError, VariantError, VerificationError, WidthError
from .methods.exits import ExitsConfig, ExitsTask, add_exits
from .methods.prune import prune
from .plugin import load, save
from .profiling.measure import Measurement, measure
from .structure.layout import Axis, Layout
from .surgery.calibrate import calibrate
from .surgery.resize import resize
from .surgery.trace import analyze
from .surgery.verify import Verification, verify

__all__ = [
    "AnalysisError",
    "Axis",
    "CompressError",
    "ExitsConfig",
    "ExitsTask",
    "Layout",
    "Measurement",
    "RecipeError",
    "VariantError",
    "Verification",
    "VerificationError",
    "WidthError",
    "add_exits",
    "analyze",
    "calibrate",
    "load",
    "measure",
    "prune",
    "resize",
    "save",
    "verify",
]
