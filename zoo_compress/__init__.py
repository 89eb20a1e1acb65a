"""zoo_compress: compression for any timm model.

Importing the package registers its names with timm: `timm.create_model("resnet18__pruned", keep=0.5)`.
"""

from .errors import AnalysisError, CompressError, HubError, RecipeError, VariantError, VerificationError, WidthError
from .methods.binary import quantize
from .methods.cluster import cluster
from .methods.exiting import add_exits
from .methods.exits import ExitsConfig, ExitsTask
from .methods.factorize import factorize, plan_factorize
from .methods.netaug import netaug
from .methods.prune import prune
from .methods.reinitialize import reinitialize
from .methods.separate import plan_separate, separate
from .methods.slimmable import slim
from .methods.sparse import sparsify
from .methods.subnets import SearchResult, search
from .plugin import load, save
from .profiling.measure import Measurement, measure
from .sharing.gallery import plot_exits
from .sharing.push import push_to_hub
from .structure.layout import Axis, Layout
from .surgery.blocks import remove_blocks, residual_blocks
from .surgery.calibrate import calibrate
from .surgery.resize import resize
from .surgery.trace import analyze
from .surgery.verify import Verification, verify
from .training.keep import keep_packed
from .zoo.index import list_variants

__all__ = [
    "AnalysisError",
    "Axis",
    "CompressError",
    "ExitsConfig",
    "ExitsTask",
    "HubError",
    "Layout",
    "Measurement",
    "RecipeError",
    "SearchResult",
    "VariantError",
    "Verification",
    "VerificationError",
    "WidthError",
    "add_exits",
    "analyze",
    "calibrate",
    "cluster",
    "factorize",
    "keep_packed",
    "list_variants",
    "load",
    "measure",
    "netaug",
    "plan_factorize",
    "plan_separate",
    "plot_exits",
    "prune",
    "push_to_hub",
    "quantize",
    "reinitialize",
    "remove_blocks",
    "residual_blocks",
    "resize",
    "save",
    "search",
    "separate",
    "slim",
    "sparsify",
    "verify",
]
