"""Does compression beat training the small structure from scratch? (Liu et al. 2019, Rethinking the Value of Network Pruning.)

For a recipe that trains, compresses and fine-tunes, what it ends with is trained again from random weights, in the way the recipe trained
before it compressed: Scratch-E for as many epochs, Scratch-B with as much compute, which is epochs × MACs before / MACs after, with the
schedule stretched in proportion. Fine-tuning is not counted, as in section 3 of the paper. For one that ends with a network that runs in
several ways, at widths or to exits, the network of each is trained alone for as many epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .actions import create
from .compare import Line, check_seeds, lines, names_of, outputs
from .errors import RecipeError
from .methods.exits import ExitsConfig
from .methods.reinitialize import ReinitializeConfig
from .plan import make_plan
from .plugin.hub import load, save
from .profiling.sampled import Sampled
from .profiling.settings import ways
from .recipe import EvaluateStage, ModelConfig, Recipe, SaveStage, TrainStage, load_recipe, methods_of
from .record import Record, Row, write_record
from .runner import run
from .sharing.card import saved_folder
from .sharing.recipe_text import to_yaml
from .surgery.exits import ExitsModel
from .surgery.trace import analyze
from .training.checkpoint import write_atomic


def rethink(paths: Sequence[str | Path], seeds: Sequence[int], *, log: Callable[[str], None] | None = None) -> list[Line]:
    """Run recipes and their baselines with seeds, or what is left of that.

    The baselines are recipes too: `scratch_e.yaml` and `scratch_b.yaml`, or `alone_0.5.yaml`, `alone_exit_0.yaml` and their like for widths
    and exits, in the output folder of each run, whose record then holds their rows, from which model cards take them.

    Args:
        paths: Recipes that train a model, compress it, and save the result, or that train one by a method and save it. What several train
            in the same way is trained once, as in `compare`.
        seeds: Seeds; each run has an output folder of its own, as `run(path, seed=…)` makes it.
        log: As for `run`.

    Returns:
        The recipes' tables with their baselines, over seeds.

    Raises:
        RecipeError: A recipe is none, or does not train before it compresses, or saves nothing; before anything is trained.
        CompressError: A run failed.
    """
    check_seeds(seeds)
    found: list[Line] = []
    studies = [(name, path, training_of(path, load_recipe(path))) for name, path in zip(names_of(paths), paths, strict=True)]
    for place, (name, path, training) in enumerate(studies):
        found += lines(name, [_one(path, training, seed, outputs(paths[:place], seed), log) for seed in seeds])
    return found


def training_of(path: str | Path, recipe: Recipe) -> tuple[TrainStage, ...]:
    """The stages that train the model before it is compressed, or while. Ways to train that prepare for it or do it are not theirs."""
    plan = make_plan(recipe)
    first = next((step.index for step in plan if step.compresses), None)
    if first is None and not any(methods_of(step.action) for step in plan):
        raise RecipeError(
            f"{path}: expected a stage that compresses, or trains by a method, found none: there is nothing to compare with training from "
            "scratch"
        )
    last = len(plan) if first is None else first
    stages = tuple(step.action for step in plan[: last + 1] if isinstance(step.action, TrainStage))
    if not stages:
        raise RecipeError(
            f"{path}: expected a train stage before the first that compresses, found none: how its model was trained is not known"
        )
    if not isinstance(recipe.stages[-1], SaveStage):
        raise RecipeError(
            f"{path}: expected a save stage at the end, whose model has the structure to train, found {recipe.stages[-1].kind}"
        )
    return tuple(stage.model_copy(update={"method": None}) for stage in stages)


def _one(
    path: str | Path, training: tuple[TrainStage, ...], seed: int, others: Sequence[Path], log: Callable[[str], None] | None
) -> Record:
    record = run(path, seed=seed, others=others, log=log)
    if record.baselines:
        return record
    recipe = load_recipe(path).with_seed(seed)
    output = Path(recipe.output).expanduser()
    before, after = analyze(create(recipe)).macs(), record.table[-1].macs
    saved = saved_folder(output)
    assert saved is not None  # the recipe ends with a save stage
    found: list[tuple[Recipe, Row]] = []
    for label, name, start, factor, method in _starts(saved, before / after):
        stages = tuple(_stretched(stage, factor).model_copy(update={"method": method}) for stage in training)
        baseline = _baseline(recipe, output, stages, label, name, start)
        # Where as much compute is as many epochs, as for masks, both baselines are one.
        row = next((row for other, row in found if (other.model, other.stages) == (baseline.model, baseline.stages)), None)
        if row is None:
            file = output / f"{name}.yaml"
            write_atomic(file, (to_yaml(baseline) + "\n").encode())
            row = run(file, log=log).table[-1]
        found.append((baseline, row.model_copy(update={"label": label})))
    record = record.model_copy(update={"baselines": tuple(row for _, row in found)})
    write_record(output, record)
    return record


def _starts(saved: Path, shrunk: float) -> Iterator[tuple[str, str, Path, float, ExitsConfig | None]]:
    """Label, name, structure, relative number of epochs and method of training of each baseline."""
    found = ways(load(saved))
    if len(found) == 1:
        yield "Scratch-E", "scratch_e", saved, 1.0, None
        yield "Scratch-B", "scratch_b", saved, max(1.0, shrunk), None
        return
    for way, net in found.items():
        if isinstance(net, Sampled):  # each sample takes one of the other ways
            continue
        suffix = "".join(f"_{part}" for part in way.replace("×", "").split())
        folder = saved.with_name(f"{saved.name}{suffix}")
        if way:
            save(net, folder)
        # What still has exits is trained as if it had none.
        main = ExitsConfig(train="main") if isinstance(net, ExitsModel) and not net.record.truncated else None
        yield f"Scratch-E {way}".rstrip(), f"alone{suffix}", folder, 1.0, main


def _baseline(recipe: Recipe, output: Path, training: tuple[TrainStage, ...], label: str, name: str, start: Path) -> Recipe:
    stages = (ReinitializeConfig(), *training, EvaluateStage(kind="evaluate"), SaveStage(kind="save"))
    return recipe.model_copy(
        update={
            "description": f"{label} for {recipe.description or output.name}",
            "model": ModelConfig(name=f"local-dir:{start}", pretrained=True, args=recipe.model.drop_rates),
            "output": str(output / name),
            "stages": stages,
        }
    )


def _stretched(stage: TrainStage, factor: float) -> TrainStage:
    changes: dict[str, Any] = {"epochs": max(1, round(stage.epochs * factor)), "warmup_epochs": round(stage.warmup_epochs * factor)}
    if stage.decay_epochs is not None:
        changes["decay_epochs"] = stage.decay_epochs * factor
    return stage.model_copy(update=changes)
