"""Recipes: what a YAML file may say, and reading one. Everything wrong with a recipe is said in one line, before anything starts."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from .errors import RecipeError
from .methods import Changed, Trained
from .profiling.latency import MAX_THREADS
from .profiling.measure import MAX_BATCH
from .structure.budget import KINDS
from .surgery.origin import for_training
from .training.config import Config, Count, DataConfig, FinetuneConfig, OwnFolder, Positive, TrainConfig, check_values, one_line
from .training.task import ChangeConfig, nested

REMOVED_PER_ROUND = 0.1
"""`rounds: auto` prunes in as many rounds as it takes for each to remove about this fraction of what is left."""


Side = Annotated[int, Field(ge=1, le=2**14)]


class PretrainedCfgConfig(Config):
    """Preprocessing that the model's `pretrained_cfg`, and so the saved checkpoint, carries. What is left out comes from the data source
    (for a model trained from scratch) or from the model."""

    input_size: tuple[Side, Side, Side] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = None
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one_per_channel(self) -> "PretrainedCfgConfig":
        for name, values in {"mean": self.mean, "std": self.std}.items():
            if values and self.input_size and len(values) != self.input_size[0]:
                raise ValueError(f"expected one {name} for each of {self.input_size[0]} channels, found {len(values)}")
        return self


class ModelConfig(Config):
    """The model to start from.

    Attributes:
        name: anything `timm.create_model` takes: an architecture, `local-dir:PATH`, `hf-hub:OWNER/REPO`.
        pretrained: load the weights the name stands for.
        args: keyword arguments of `timm.create_model`, such as `num_classes` and `in_chans`.
        pretrained_cfg: preprocessing.
    """

    name: str
    pretrained: bool = False
    args: dict[str, JsonValue] = Field(default_factory=dict)
    pretrained_cfg: PretrainedCfgConfig = PretrainedCfgConfig()

    @property
    def drop_rates(self) -> dict[str, JsonValue]:
        """Those of `args` that files of models do not keep: whoever loads one to train it has to pass them again."""
        return {name: value for name, value in self.args.items() if for_training(name)}

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        import timm
        from timm.models import parse_model_name, split_model_name_tag

        expected = "expected a name of timm.list_models(), local-dir:PATH or hf-hub:OWNER/REPO"
        try:
            source, identifier = parse_model_name(name)
        except ValueError as error:
            raise ValueError(expected) from error
        if source is None and not timm.is_model(split_model_name_tag(identifier)[0]):
            raise ValueError(expected)
        return name


def kinds(union: Any) -> tuple[str, ...]:
    """Names of the configs in a union of them, or of a single one."""
    return tuple(config.model_fields["kind"].default for config in get_args(union) or (union,))


def _named(value: Any) -> Any:
    """`{netaug: {r: 3}}` with its name inside, as pydantic's tagged unions want it."""
    names = kinds(Trained)
    name, body = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (None, None)
    if name not in names or not isinstance(body, dict | None) or (body and "kind" in body):
        raise ValueError(f"expected one of {', '.join(names)}, with its settings as a mapping")
    return {"kind": name, **(body or {})}


One = Annotated[Annotated[Trained, Field(discriminator="kind")], BeforeValidator(_named)]


def _nested(methods: tuple[Trained, ...]) -> tuple[Trained, ...]:
    nested(methods)
    return methods


Several = Annotated[tuple[One, ...], Field(strict=False, min_length=1), AfterValidator(_nested)]
_ALONE, _SEVERAL = "one method", "several methods"
Method = Annotated[
    Annotated[One, Tag(_ALONE)] | Annotated[Several, Tag(_SEVERAL)],
    Discriminator(lambda value: _SEVERAL if isinstance(value, (list, tuple)) else _ALONE),
]
"""What a stage says about methods: one, or a list of them, from the inside out."""


def methods_of(stage: Any) -> tuple[Trained, ...]:
    """The methods that a training phase names, from the inside out."""
    found = getattr(stage, "method", None)
    return () if found is None else found if isinstance(found, tuple) else (found,)


def _compresses(stage: Any) -> bool:
    return any(method.compresses for method in methods_of(stage))


class TrainStage(TrainConfig):
    """Train the model on labels.

    Attributes:
        method: another way to train than as the model is: `{slim: …}`, `{us: …}`, `{netaug: …}` or `{exits: …}`; or a list,
            `[{exits: …}, {slim: …}]`, of which each trains around the one before it.
    """

    noun: ClassVar[str] = "training"
    kind: Literal["train"]
    method: Method | None = None


class FinetuneStage(FinetuneConfig):
    """Train the model after a stage that compressed it, on labels and, with `distill`, on the logits of the model before it.

    Attributes:
        method: as for `train`; beside it, `distill` is of logits.
    """

    noun: ClassVar[str] = "fine-tuning"
    kind: Literal["finetune"]
    method: Method | None = None

    @model_validator(mode="after")
    def _together(self) -> "FinetuneStage":
        if self.method is not None:
            self.check_beside_method()
        return self


class PruneStage(Config):
    """Prune to a budget, at once or in rounds.

    Exactly one of `keep`, `macs`, `params` and `latency` is given, as in `zoo_compress.prune`: up to 1 a fraction kept, above 1 a count
    (milliseconds). Latency is measured as the recipe's `measure` says; what depends on measured times differs from run to run.

    Attributes:
        round_to: preferred multiple for sizes, or `auto` to find it out by measuring.
        rounds: how often to prune, in geometric steps to the budget, each but the last followed by `finetune`;
            `auto` removes about 10% of what is left each time (fractions only).
        finetune: the training between rounds.
        calibration_batches: training batches shown to criteria that need data, and to `reconstruct`.
        reconstruct: restore every layer's outputs by least squares on these batches, without training.
    """

    noun: ClassVar[str] = "pruning"
    kind: Literal["prune"]
    keep: Annotated[float, Field(gt=0, lt=1)] | None = None
    macs: Positive | None = None
    params: Positive | None = None
    latency: Positive | None = None
    criterion: str = "l2"
    scope: Literal["global", "local"] = "global"
    round_to: Count | Literal["auto"] = 8
    min_keep: Annotated[float, Field(gt=0, le=1)] = 0.1
    exclude: Annotated[tuple[str, ...], Field(strict=False)] = ()  # not JSON any more once the stage's name was put inside
    rounds: Count | Literal["auto"] = 1
    finetune: FinetuneConfig | None = None
    calibration_batches: Count = 8
    reconstruct: bool = False

    @field_validator("criterion")
    @classmethod
    def _known_criterion(cls, name: str) -> str:
        from .methods.criteria import CRITERIA

        if name not in CRITERIA:
            raise ValueError(f"expected one of {', '.join(CRITERIA)}")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> "PruneStage":
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {', '.join(KINDS)}, found {' and '.join(given) or 'none'}")
        if self.rounds == "auto" and self.budget[1] > 1:
            raise ValueError("expected a number of rounds beside an absolute budget, found 'auto'")
        if self.latency is not None and self.latency > 1 and self.rounds != 1:
            raise ValueError("expected a latency as a fraction beside several rounds, found milliseconds")
        if self.rounds != 1 and self.finetune is None:
            raise ValueError("expected finetune settings for the training between rounds, found none")
        if self.rounds == 1 and self.finetune is not None:
            raise ValueError("expected finetune only with several rounds; after a single one, add a finetune stage")
        return self

    @property
    def budget(self) -> tuple[str, float]:
        """The quantity that is limited, one of `KINDS`, and its limit."""
        return next((name, value) for name in KINDS if (value := getattr(self, name)) is not None)

    @property
    def num_rounds(self) -> int:
        """How often to prune, with `auto` worked out."""
        if self.rounds == "auto":
            return max(1, round(math.log(self.budget[1]) / math.log(1 - REMOVED_PER_ROUND)))
        return self.rounds


class EvaluateStage(Config):
    """Evaluate the model on the test images and note the result in the record."""

    kind: Literal["evaluate"]


class SaveStage(Config):
    """Save the model for `timm.create_model("local-dir:…", pretrained=True)`.

    Attributes:
        to: folder below the output folder.
    """

    kind: Literal["save"]
    to: OwnFolder = "model"


def _tag(stage: Any) -> Any:
    """`train: {epochs: 3}` with its name inside, as pydantic's tagged unions want it; a bare `save` is `save: {}`."""
    name, body = (stage, {}) if isinstance(stage, str) else next(iter(stage.items())) if isinstance(stage, dict) and stage else (None, None)
    body = {} if body is None else body
    if name not in STAGES or not isinstance(body, dict) or (isinstance(stage, dict) and len(stage) != 1) or "kind" in body:
        raise ValueError(f"expected one of {', '.join(STAGES)}, with its settings as a mapping")
    return {"kind": name, **body}


STAGES = ("train", "prune", "finetune", "evaluate", "save", *kinds(Changed))
Stage = Annotated[
    Annotated[TrainStage | PruneStage | FinetuneStage | EvaluateStage | SaveStage | Changed, Field(discriminator="kind")],
    BeforeValidator(_tag),
]


class MeasureConfig(Config):
    """How latency is measured: see `zoo_compress.measure`."""

    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH)] = 1
    threads: Annotated[int, Field(ge=1, le=MAX_THREADS)] | None = None
    runs: Count = 100


class Recipe(Config):
    """A whole experiment.

    Attributes:
        description: one line for people, and for the model card.
        model: the model to start from.
        data: images to train and evaluate on.
        seed: seed of everything random.
        device: where to train; None takes CUDA where there is one. Latency is always measured on the CPU.
        output: folder of everything the run writes, relative to the working directory.
        stages: what to do, in order.
        measure: how to measure latency.
    """

    description: str = ""
    model: ModelConfig
    data: DataConfig
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: str | None = None
    output: str = Field(min_length=1, pattern=r"^[^\x00]*$")
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    measure: MeasureConfig = MeasureConfig()

    @model_validator(mode="after")
    def _ordered(self) -> "Recipe":
        compressed = trained = False
        for index, stage in enumerate(self.stages):
            if isinstance(stage, FinetuneStage) and stage.distill and stage.distill.teacher is None and not compressed:
                raise ValueError(
                    f"expected a stage that compresses before stages.{index}.finetune.distill, whose teacher is the model before it, "
                    "or a teacher, found neither"
                )
            compressed = compressed or isinstance(stage, PruneStage | ChangeConfig) or (trained and _compresses(stage))
            trained = trained or isinstance(stage, TrainConfig)
        for index, stage in enumerate(self.stages):
            if any(method.needs_held_out for method in methods_of(stage)) and not self.data.held_out:
                raise ValueError(
                    f"expected data.held_out, a number of training images, for thresholds to be found on after stages.{index}.{stage.kind}"
                )
        folders = [stage.to for stage in self.stages if isinstance(stage, SaveStage)]
        if len(set(folders)) != len(folders):
            raise ValueError(f"expected a folder of its own for each save stage, found {', '.join(folders)}")
        return self

    def with_seed(self, seed: int) -> "Recipe":
        """The same recipe with another seed, and an output folder of its own.

        Raises:
            RecipeError: the seed is no integer in 0…2³²-1.
        """
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise RecipeError(f"seed: expected an integer in 0…2³²-1, found {seed!r}")
        return self.model_copy(update={"seed": seed, "output": f"{self.output.rstrip('/')}_seed{seed}"})

    @property
    def sha256(self) -> str:
        """Hash of all that decides the run's numbers: everything but `description` and `output`."""
        content = self.model_dump(mode="json", exclude={"description", "output"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_recipe(path: str | Path) -> Recipe:
    """Read and validate a recipe.

    Raises:
        RecipeError: one line that names the file, the key path, what was expected and what was found.
    """
    content = _read_yaml(Path(path))
    try:
        check_values(content)
        # Through JSON, where a list is how a tuple is written, so that strict types need no exceptions.
        text = json.dumps(content)
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: expected only mappings, lists, text, numbers, true, false and null: {error}") from error
    try:
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        raise RecipeError(f"{path}: {one_line(error, leave_out=(_ALONE, _SEVERAL))}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a subclass of yaml.SafeLoader
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: expected UTF-8 text: {error.reason} at byte {error.start}") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{path}{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: expected YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected a mapping with model, data, output and stages, found {type(content).__name__}")
    return content


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and, as YAML 1.2 does, reads `1e-3` as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"expected a key that is text, found {key!r}", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"found the key {key!r} twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))
