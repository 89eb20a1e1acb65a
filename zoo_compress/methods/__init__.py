"""Methods: each chooses widths (or masks, exits, …) of a model with a layout; the executor is `surgery`."""

from typing import TypeAlias

from .binary import BinaryConfig, TernaryConfig
from .blocks import BlocksConfig
from .cluster import ClusterConfig
from .exits import ExitsConfig
from .factorize import FactorizeConfig
from .gradual import GradualConfig
from .groups import GroupsConfig
from .netaug import NetAugConfig
from .reinitialize import ReinitializeConfig
from .separate import SeparateConfig
from .slim import SlimConfig
from .slimming import SlimmingConfig
from .sparse import SparsifyConfig
from .supermask import SupermaskConfig
from .us import UsConfig

Trained: TypeAlias = (
    SlimConfig
    | UsConfig
    | NetAugConfig
    | ExitsConfig
    | GradualConfig
    | SupermaskConfig
    | BinaryConfig
    | TernaryConfig
    | SlimmingConfig
    | BlocksConfig
    | GroupsConfig
)
"""Methods that a training stage of a recipe may name. A method is one file and one entry here."""

Changed: TypeAlias = ReinitializeConfig | SparsifyConfig | ClusterConfig | FactorizeConfig | SeparateConfig
"""Methods that are a stage of a recipe: they turn one model into another at once. A method is one file and one entry here."""
