"""What a recipe says about data and training: frozen, validated data without behaviour."""

from collections.abc import Collection
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from ..errors import CompressError

MAX_VALUES = 100_000


def check_values(content: object) -> None:
    """Refuse content that is larger than it is written: YAML's aliases stand for parts, and these for parts of theirs.

    Raises:
        ValueError: There are more than `MAX_VALUES` values in it.
    """
    count, waiting = 0, [content]
    while waiting:
        value = waiting.pop()
        count += 1
        if count > MAX_VALUES:
            raise ValueError(f"expected at most {MAX_VALUES} values, found more")
        if isinstance(value, (dict, list, tuple)):
            waiting.extend(value.values() if isinstance(value, dict) else value)


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or PurePosixPath(path).is_absolute() or ".." in parts or parts[0] in ("steps", "results.json") or parts[0].startswith("."):
        raise ValueError("expected a folder below the output folder, other than steps/")
    return path


Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
OwnFolder = Annotated[str, AfterValidator(_inside)]
"""A folder below the output folder of a run that is the user's to name."""


class Config(BaseModel):
    """Base of every config: immutable, strict about types, closed to unknown keys, finite numbers only.

    Raises:
        CompressError: In one line, what is wrong with a config that is made in Python.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise CompressError(one_line(error, whole=type(self).__name__)) from error

    # Pydantic's mark of an initialiser that it need not call for configs inside others: it then knows where in the whole an error is.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def one_line(error: ValidationError, leave_out: Collection[str] = (), whole: str = "the recipe") -> str:
    """The first thing wrong with a config: key, what was expected, what was found.

    Args:
        error: What pydantic found.
        leave_out: Parts of keys that are not written in files.
        whole: What to call the config where it is wrong as a whole; also stands before a key, unless it is a recipe's.
    """
    details = error.errors(include_url=False)
    first = details[0]
    path = ".".join(str(part) for part in first["loc"] if part not in leave_out)
    key = f"{whole}: {path}" if path and whole != "the recipe" else path or whole
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{key}: expected no such key{more}"
    if first["type"] == "missing":
        return f"{key}: expected a value, found none{more}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = message if "expected" in message else f"expected {message}"
    found = "" if "found" in message else f", found {_short(first['input'])}"
    return f"{key}: {message}{found}{more}"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


class AugmentConfig(Config):
    """Augmentation of training images, in the terms of `timm.data.create_transform`.

    A field left out takes the data source's default: none of timm's ImageNet defaults suits an 8x8 digit.
    """

    no_aug: bool = False
    scale: tuple[Fraction, Fraction] | None = None
    ratio: tuple[Positive, Positive] | None = None
    hflip: Fraction | None = None
    vflip: Fraction | None = None
    color_jitter: Fraction | None = None
    auto_augment: str | None = None
    re_prob: Fraction | None = None

    @field_validator("auto_augment")
    @classmethod
    def _known_policy(cls, policy: str | None) -> str | None:
        from timm.data import create_transform

        try:
            create_transform(32, is_training=True, auto_augment=policy)
        except Exception as error:  # timm asserts, indexes and converts
            raise ValueError("expected a policy of timm, such as 'rand-m9-mstd0.5' or 'trivialaugment'") from error
        return policy


class DataConfig(Config):
    """Where images come from and how they are batched.

    Attributes:
        source: `digits`, `fashion_mnist`, `imagefolder:PATH`, or any name `timm.data.create_dataset` takes (`hfds/…`, `torch/…`).
        root: folder of the data set; unused by `digits` and `imagefolder:PATH`.
        class_map: text file of class names, one a line, in the order of the model's outputs. For `imagefolder:PATH`, whose folders are
            otherwise classes in alphabetical order; not all of them have to be there.
        train_split: name of the training split, for sources that have named splits.
        eval_split: name of the split that metrics are computed on.
        held_out: images of the training split that are not trained on; thresholds of early exits are found on them.
        download: let timm fetch the data where it can.
        batch_size: images per optimizer step, over all processes together.
        eval_batch_size: images per forward pass in evaluation, per process.
        workers: loader processes; 0 loads in the training process.
        augment: augmentation of the training images.
    """

    source: str
    root: str | None = None
    class_map: str | None = None
    train_split: str = "train"
    eval_split: str = "validation"
    held_out: Annotated[int, Field(ge=0)] = 0
    download: bool = False
    batch_size: Count = 64
    eval_batch_size: Count = 256
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    augment: AugmentConfig = AugmentConfig()


class DistillConfig(Config):
    """Distillation, by the tasks of `timm.task`.

    Attributes:
        teacher: anything `timm.create_model` takes with pretrained weights, or a list: their probabilities are averaged. None is the model
            before the first stage that compressed it.
        match: what is learnt from the teacher: its `logits` (`LogitDistillationTask`), its pooled `features` as well as labels
            (`FeatureDistillationTask`), or its logits by a distillation `token` (`TokenDistillationTask`).
        temperature: softmax temperature of both models.
        task_loss_weight: weight of the loss on labels; distillation gets the rest. 0 ignores labels.
    """

    teacher: str | Annotated[tuple[str, ...], Field(strict=False, min_length=1, max_length=64)] | None = None
    match: Literal["logits", "features", "token"] = "logits"
    temperature: Positive = 1.0
    task_loss_weight: Fraction = 0.5

    @model_validator(mode="after")
    def _possible(self) -> "DistillConfig":
        if self.match == "features" and isinstance(self.teacher, tuple) and len(self.teacher) > 1:
            raise ValueError(f"expected one teacher beside match: features, found {len(self.teacher)}")
        if self.match == "features" and self.task_loss_weight == 0:
            raise ValueError("expected a task_loss_weight above 0 beside match: features, which do not train the classifier, found 0")
        if self.match == "features" and self.temperature != 1.0:
            raise ValueError(f"expected no temperature beside match: features, which have no softmax, found {self.temperature:g}")
        return self

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers; none where the model before it was compressed teaches."""
        return (self.teacher,) if isinstance(self.teacher, str) else self.teacher or ()


class TrainConfig(Config):
    """One training phase: `timm.optim`, `timm.scheduler` and `timm.task` settings under timm's own names.

    Attributes:
        epochs: passes over the training images, warm-up included.
        opt: an optimizer of `timm.optim.list_optimizers()`.
        lr: peak learning rate.
        weight_decay: not applied to biases and norms, as is timm's habit.
        opt_args: further arguments of the optimizer, such as `betas`.
        sched: learning-rate schedule, stepped every update.
        decay_epochs: interval (`step`) or length (`wsd`) of the decay; None takes timm's default.
        smoothing: label smoothing.
        mixup: alpha of mixup (Zhang et al. 2018): pairs of images and their labels are mixed; 0 does not.
        cutmix: alpha of CutMix (Yun et al. 2019): a rectangle of another image is pasted; 0 does not. With both, each batch draws one.
        clip_grad: gradient norm clipped to this; None leaves gradients alone.
        channels_last: run the steps with channels last in memory, which is faster for most convolutions; a matter of rounding otherwise.
        ema_decay: decay of the weight average (`ModelEmaV3`, with warm-up) that becomes the result; None keeps the last weights.
    """

    epochs: Annotated[int, Field(ge=1, le=100_000)]
    opt: str = "adamw"
    lr: Positive
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    opt_args: dict[str, JsonValue] = Field(default_factory=dict)
    sched: Literal["cosine", "tanh", "step", "poly", "wsd", "rsqrt", "constant", "none"] = "cosine"
    decay_epochs: Positive | None = None
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    warmup_lr: Annotated[float, Field(ge=0)] = 1e-6
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    clip_grad: Positive | None = None
    channels_last: bool = False
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None

    @property
    def optimizer_args(self) -> dict[str, Any]:
        """`opt_args` as optimizers take them: lists in files stand for tuples."""
        return {key: tuple(value) if isinstance(value, list) else value for key, value in self.opt_args.items()}

    @field_validator("opt")
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        from timm.optim import list_optimizers

        if name not in list_optimizers():
            raise ValueError("expected one of timm.optim.list_optimizers(), such as 'sgd' or 'adamw'")
        return name

    @model_validator(mode="after")
    def _optimizer_takes(self) -> "TrainConfig":
        if self.opt_args:
            from timm.optim import create_optimizer_v2
            from torch import nn

            try:
                create_optimizer_v2(nn.Linear(1, 1), self.opt, self.lr, self.weight_decay, self.momentum, **self.optimizer_args)
            except Exception as error:  # optimizers compare, index and call what they are given
                raise ValueError(f"expected opt_args that {self.opt} takes, found {self.opt_args}: {error}") from error
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> "TrainConfig":
        if self.warmup_epochs >= self.epochs and self.warmup_epochs > 0:
            raise ValueError(f"expected warmup_epochs below epochs ({self.epochs}), found {self.warmup_epochs}")
        if self.sched == "rsqrt" and self.warmup_epochs == 0:
            raise ValueError("expected warmup_epochs above 0 beside sched: rsqrt, which decays by their length, found 0")
        return self


class FinetuneConfig(TrainConfig):
    """A training phase that may learn from another model as well."""

    distill: DistillConfig | None = None

    def check_beside_method(self) -> None:
        """Check that a method of training can go around the distillation.

        Raises:
            CompressError: If timm's task is to train more than the network: a projection of features, or a head that answers beside it.
        """
        if self.distill is not None and self.distill.match != "logits":
            raise CompressError(f"distill.match: expected logits beside a method of training, found {self.distill.match}")


AnyTrainConfig: TypeAlias = TrainConfig | FinetuneConfig
