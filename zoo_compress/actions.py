"""What each step of a run does: from the model that the step before it saved to a new one, and to its part of the record."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import parse_model_name
from torch import nn

import zoo_compress as zc

from .errors import CompressError, RecipeError
from .methods.criteria import by_weights
from .plan import PruneRound, Step, budget_of_round, milestones, uncompressed
from .plugin.weights import WEIGHTS
from .profiling.measure import measure_many
from .profiling.settings import ways
from .recipe import PruneStage, Recipe, SaveStage, methods_of
from .record import STEPS_FOLDER, Record, Row, StepRecord
from .training.checkpoint import whole_folder
from .training.config import FinetuneConfig, TrainConfig
from .training.data import Batches, calibration_batches, check_fits, eval_loader, held_out_batches, train_loader
from .training.distill import try_teachers
from .training.distributed import Processes
from .training.loop import Epoch, Phase, evaluate, fit, reseed
from .training.sources import Source, default_pretrained_cfg, open_source
from .training.task import ChangeConfig, nested

STATE_NAME = "training.safetensors"


@dataclass(frozen=True)
class Result:
    """What a step hands back: a new model or None, and its part of the record."""

    model: nn.Module | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    epochs: tuple[Epoch, ...] = ()
    table: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Run:
    """One run in progress, as every step sees it.

    Attributes:
        recipe: what to do.
        plan: the same as steps.
        output: where to write.
        processes: who does it.
        source: the images.
        record: what is done already.
        log: takes one line for people.
        dry: nothing is trained and nothing judged that trained weights decide: what the steps can do is tried, on few images.
    """

    recipe: Recipe
    plan: tuple[Step, ...]
    output: Path
    processes: Processes
    source: Source
    record: Record
    log: Callable[[str], None]
    dry: bool = False

    def folder(self, step: Step | StepRecord) -> Path:
        """Folder of the model a step makes."""
        return self.output / STEPS_FOLDER / step.name

    def latest(self) -> Path:
        """Folder of the newest model."""
        return self.output / self.record.latest_checkpoint

    def calibration(self, model: nn.Module, batches: int) -> Batches:
        """So many batches of training images without augmentation."""
        data = self.recipe.data
        if self.dry:
            data, batches = data.model_copy(update={"batch_size": min(data.batch_size, 2)}), 1
        return calibration_batches(self.source, data, model, batches)


def create(recipe: Recipe) -> nn.Module:
    """The model a recipe starts from, initialised from the recipe's seed."""
    wanted = recipe.model
    from_scratch = not wanted.pretrained and parse_model_name(wanted.name)[0] is None
    in_chans = wanted.args.get("in_chans", 3)
    defaults = default_pretrained_cfg(recipe.data.source, in_chans) if from_scratch and isinstance(in_chans, int) else {}
    overlay = {**defaults, **wanted.pretrained_cfg.model_dump(exclude_none=True)}
    args: dict[str, Any] = {"pretrained": wanted.pretrained, "pretrained_cfg_overlay": overlay, **wanted.args}
    reseed(recipe.seed, 0, 0)
    try:
        return timm.create_model(wanted.name, **args)
    except CompressError:
        raise
    # Whatever an architecture raises for arguments it cannot use, the recipe is what has to change.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise RecipeError(f"model: timm cannot create {wanted.name!r} with {wanted.args}: {type(error).__name__}: {reason}") from error


def open_images(recipe: Recipe, model: nn.Module, processes: Processes) -> Source:
    """The images, known to fit the model and to fill a batch."""
    with processes.primary_first():
        source = open_source(recipe.data, getattr(model, "in_chans", 3))
    check_fits(source, model)
    train_loader(source, recipe.data, model, processes)
    return source


def _create_step(run: Run, step: Step) -> Result:
    return Result(create(run.recipe))


def _fit_step(run: Run, step: Step) -> Result:
    config = step.action
    assert isinstance(config, TrainConfig)
    model, data = zc.load(run.latest(), **run.recipe.model.drop_rates), run.recipe.data
    teachers: list[nn.Module] = []
    if isinstance(config, FinetuneConfig) and config.distill:
        dense = uncompressed(run.plan)
        # In a trial, those that the run itself is to save are not there yet.
        names = [name for name in config.distill.teachers if not (run.dry and _saved_by(run.recipe, name))]
        teachers = [_teacher(name) for name in names] or [zc.load(run.folder(dense) if dense else run.latest())]
        if run.dry:
            try_teachers(model, teachers)
    loaders = train_loader(run.source, data, model, run.processes), eval_loader(run.source, data, model, run.processes)
    methods = methods_of(config)
    method = nested(methods) if methods else None
    calibration: Any = ()
    if method is not None:
        calibration = run.calibration(model, method.calibration_batches)
        reseed(run.recipe.seed, step.index, 0)
        model = method.wrap(model)
    history = fit(
        model,
        *loaders,
        config,
        phase=Phase(step.label, step.index, run.recipe.seed, run.record.recipe_sha256),
        teacher=teachers,
        method=method,
        calibration=calibration,
        processes=run.processes,
        state=run.output / STATE_NAME,
        log=None if run.dry else run.log,
        dry=run.dry,
    )
    if run.dry:
        return Result((model if method is None or method.needs_held_out else method.finish(model, calibration)).cpu())
    last = history[-1]
    metrics = {"loss": last.loss, "top1": last.top1, "top5": last.top5}
    if method is not None:
        reseed(run.recipe.seed, step.index, config.epochs)
        model = method.finish(model, calibration, held_out_batches(run.source, data, model) or ())
        if any(each.changes for each in methods):
            metrics = _evaluated(run, model, step.label)
    return Result(model.cpu(), metrics, tuple(history))


def _teacher(name: str) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever goes wrong, the recipe is what has to change
        raise RecipeError(f"distill.teacher: timm cannot create {name!r} with weights: {type(error).__name__}: {error}") from error


def _saved_by(recipe: Recipe, name: str) -> bool:
    """Whether a model's name is of a folder that a recipe writes."""
    source, _, path = name.partition(":")
    return source == "local-dir" and Path(path).expanduser().resolve().is_relative_to(Path(recipe.output).expanduser().resolve())


def _by_weights(stage: PruneStage) -> PruneStage:
    """A stage that ranks by weights alone, and measures nothing."""
    changes: dict[str, Any] = {"criterion": stage.criterion if by_weights(stage.criterion) else "l2", "reconstruct": False}
    return stage.model_copy(update={**changes, "round_to": 1 if stage.round_to == "auto" else stage.round_to})


def _prune_step(run: Run, step: Step) -> Result:
    action = step.action
    assert isinstance(action, PruneRound)
    if not run.processes.primary:
        return Result()
    stage, model = _by_weights(action.stage) if run.dry else action.stage, zc.load(run.latest())
    before = zc.analyze(model)
    size = {"macs": before.macs(), "params": before.num_params(), "keep": 1, "latency": 1}
    base: Any = size if action.first == step.name else run.record.step(action.first).metrics["before"]
    seed = reseed(run.recipe.seed, step.index, 0)
    budget: Any = budget_of_round(action, base[stage.budget[0]])
    data = run.calibration(model, stage.calibration_batches)
    if run.dry and "latency" in budget:
        budget = {"keep": 1.0}  # nothing is measured
    small = zc.prune(
        model,
        **budget,
        criterion=stage.criterion,
        scope=stage.scope,
        round_to=stage.round_to,
        min_keep=stage.min_keep,
        exclude=stage.exclude,
        data=data,
        reconstruct=data if stage.reconstruct else None,
        layout=before,
        seed=seed,
        batch_size=run.recipe.measure.batch_size,
        threads=run.recipe.measure.threads,
    )
    after = zc.analyze(small)
    metrics = {"before": size, "after": {"macs": after.macs(), "params": after.num_params()}}
    run.log(f"{step.label}: MACs {before.macs():,} → {after.macs():,}, parameters {before.num_params():,} → {after.num_params():,}")
    return Result(small, metrics)


def _change_step(run: Run, step: Step) -> Result:
    config = step.action
    assert isinstance(config, ChangeConfig)
    if not run.processes.primary:
        return Result()
    model = zc.load(run.latest())
    data, seed = run.calibration(model, config.calibration_batches), reseed(run.recipe.seed, step.index, 0)
    changed = config.rehearse(model, data, seed) if run.dry else config.apply(model, data, seed)
    if changed is None:
        return Result()
    before, after = (_size(found) for found in (model, changed))
    run.log(f"{step.label}: MACs {before['macs']:,} → {after['macs']:,}, parameters {before['params']:,} → {after['params']:,}")
    return Result(changed, {"before": before, "after": after})


def _size(model: nn.Module) -> dict[str, int]:
    layout = zc.analyze(model)
    return {"macs": layout.macs(), "params": layout.num_params()}


def _evaluate_step(run: Run, step: Step) -> Result:
    found = {label: _evaluated(run, model, label) for label, model in _by_way(step.label, zc.load(run.latest())).items()}
    for label, metrics in found.items():
        run.log(f"{label}: test loss {metrics['loss']:.4f}, top-1 {metrics['top1']:.2f}%")
    return Result(metrics=found if len(found) > 1 else found[step.label])


def _save_step(run: Run, step: Step) -> Result:
    assert isinstance(step.action, SaveStage)
    folder = run.output / step.action.to
    if run.processes.primary:
        save_whole(zc.load(run.latest()), folder)
        run.log(f"{step.label}: {folder}")
    return Result(metrics={"to": step.action.to, "of": run.latest().name})


def _report_step(run: Run, step: Step) -> Result:
    """Evaluate and measure the models of the table, and the saved one as a user would load it."""
    models: dict[str, nn.Module] = {}
    folders: dict[str, Path] = {}
    for label, made in milestones(run.plan).items():
        models.update(_by_way(label, zc.load(run.folder(made))))
        folders[label] = run.folder(made)
    saves = [done for done in run.record.steps if done.kind == "save"]
    if saves:
        folders["reloaded"] = run.output / str(saves[-1].metrics["to"])
        models["reloaded"] = timm.create_model(f"local-dir:{folders['reloaded']}", pretrained=True)
    top1 = {label: _evaluated(run, model, label)["top1"] for label, model in models.items()}
    if saves:
        # Training has noted the accuracy of the model it held in memory: an independent witness of what went through the files.
        saved = run.record.step(str(saves[-1].metrics["of"]))
        if "top1" in saved.metrics and saved.metrics["top1"] != top1["reloaded"]:
            raise CompressError(
                f"{folders['reloaded']}: expected top-1 of {saved.metrics['top1']}% as after {saved.name}, "
                f"found {top1['reloaded']}% after reloading"
            )
    if not run.processes.primary:
        return Result()
    config = run.recipe.measure
    # A network of several widths is measured as what it exports: that is what runs where time matters.
    statics = {label: next(iter(ways(model).values())) for label, model in models.items()}
    costs = measure_many({label: model.cpu() for label, model in statics.items()}, config.batch_size, config.threads, runs=config.runs)
    sizes = {label: (folder / WEIGHTS).stat().st_size for label, folder in folders.items()}
    images = len(run.source.test)
    rows = [Row(label=label, top1=top1[label], file_bytes=sizes.get(label), test_images=images, **asdict(c)) for label, c in costs.items()]
    return Result(table=tuple(rows))


def act(run: Run, step: Step) -> Result:
    """Do one step. Nothing is saved of it but what a `save` stage asks for."""
    return _ACTIONS.get(step.kind, _change_step)(run, step)


_ACTIONS: dict[str, Callable[[Run, Step], Result]] = {
    "create": _create_step,
    "train": _fit_step,
    "finetune": _fit_step,
    "prune": _prune_step,
    "evaluate": _evaluate_step,
    "save": _save_step,
    "report": _report_step,
}


def _by_way(label: str, model: nn.Module) -> dict[str, nn.Module]:
    """The model, or every way to run one that has several: its widths, its exits."""
    return {f"{label} {way}".rstrip(): found for way, found in ways(model).items()}


def _evaluated(run: Run, model: nn.Module, label: str) -> dict[str, float]:
    loader = eval_loader(run.source, run.recipe.data, model, run.processes)
    return evaluate(model.to(run.processes.device), loader, run.processes, f"{label} test")


def save_whole(model: nn.Module, folder: Path) -> None:
    """Save a model as a whole folder or not at all, and make sure that it comes back as it went."""
    images = torch.randn(2, *timm.data.resolve_input_data_config(model)["input_size"], generator=torch.Generator().manual_seed(0))
    with whole_folder(folder) as temporary:
        zc.save(model, temporary)
        with torch.no_grad():
            if not torch.equal(model.eval()(images), zc.load(temporary).eval()(images)):
                raise CompressError(f"{folder}: expected a saved model with the outputs of the one in memory, found other outputs")
