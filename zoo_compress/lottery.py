"""Lottery tickets: subnetworks that train as well as the whole from the weights they had at its beginning, and what that is worth.

Frankle & Carbin 2019, The Lottery Ticket Hypothesis; rewinding to a later step: Frankle et al. 2020, Linear Mode Connectivity and the
Lottery Ticket Hypothesis; signs: Zhou et al. 2019, Deconstructing Lottery Tickets. Large learning rates: Liu et al. 2019, Rethinking the
Value of Network Pruning, section 6.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, JsonValue, ValidationError
from torch import nn

import zoo_compress as zc

from .actions import create, open_images
from .compare import check_seeds
from .errors import RecipeError
from .figures import blank_figure, save_figure
from .methods.reinitialize import reinitialize
from .recipe import EvaluateStage, Recipe, SaveStage, TrainStage, load_recipe
from .record import Entry, aligned, machine, versions
from .runner import deterministic, locked, say
from .structure.packed import Packing
from .surgery.masks import Masks, apply_, density, masks_of, random_like, remove_fraction
from .surgery.origin import stamp_packed
from .surgery.weights import classifiers, layer_weights
from .training.checkpoint import write_atomic
from .training.config import Config, Count, TrainConfig
from .training.data import eval_loader, train_loader
from .training.distributed import Processes, init_processes
from .training.loop import Phase, fit
from .training.snapshot import Snapshot, Take
from .training.sources import Source

RECORD_NAME = "lottery.json"
TICKET = "ticket"
Control = Literal["reinit", "random", "signs", "finetune"]
CONTROLS: tuple[Control, ...] = ("reinit", "random", "signs", "finetune")
TICKS = 14
"""Rounds that a plot has room to name."""


class LotteryConfig(Config):
    """How tickets are drawn.

    Attributes:
        rounds: how often weights are removed.
        fraction: of the weights that remain, how many each round removes.
        output_fraction: the same for the output layer, in the local scope; None is half of `fraction`, as 10% is of the paper's 20%.
        scope: `local` removes as much of each layer, `global` the smallest weights of all.
        rewind: step of the first training whose weights, optimizer and schedule every ticket starts from; 0 is the beginning.
        controls: what the same masks reach otherwise. `reinit`: other initial weights. `random`: random masks with as many weights in
            each layer. `signs`: weights of the step rewound to, but each only its sign times the deviation of its layer's weights.
            `finetune`: the trained weights go on, at a tenth of the learning rate, constant.
        every: controls at every so many rounds.
    """

    rounds: Count = 8
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    output_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None
    scope: Literal["local", "global"] = "local"
    rewind: Annotated[int, Field(ge=0)] = 0
    controls: tuple[Control, ...] = CONTROLS
    every: Count = 1


class Point(Entry):
    """One training.

    Attributes:
        round: how often weights were removed before; 0 is the whole network.
        arm: `ticket`, or the control.
        remaining: fraction of the weights of convolutions and linear layers that are left.
        top1: top-1 accuracy on the test images after each epoch, in percent.
        seconds: wall time.
    """

    round: int
    arm: str
    remaining: float
    top1: tuple[float, ...]
    seconds: float


class Study(Entry):
    """The record of one seed: all that `lottery.json` holds."""

    format: Literal[1] = 1
    recipe: dict[str, JsonValue]
    settings: LotteryConfig
    sha256: str
    versions: dict[str, str]
    machine: dict[str, JsonValue]
    points: tuple[Point, ...] = ()

    def has(self, number: int, arm: str) -> bool:
        """Whether a training is done."""
        return any((point.round, point.arm) == (number, arm) for point in self.points)


def lottery(
    path: str | Path, settings: LotteryConfig | None = None, seeds: Sequence[int] = (0,), *, log: Callable[[str], None] | None = None
) -> list[Study]:
    """Train, remove weights, rewind and train again, round by round, with controls; or what is left of that.

    Each seed has a folder, the recipe's output with `_lottery_seed0` behind, or `_lottery_rewind468_seed0` where that step is rewound to:
    the record, the snapshot that is rewound to, and every round's trained ticket as a sparse model
    (`timm.create_model("local-dir:…/rounds/03", pretrained=True)`), whose file holds its mask with one bit a weight. A study that was
    stopped goes on, within a training after its last epoch, and ends with the same numbers.

    Args:
        path: A recipe whose only stage besides `evaluate` and `save` is one `train` stage, without a method.
        settings: How tickets are drawn.
        seeds: Seeds of everything random.
        log: Takes lines about progress; None writes them to standard error.

    Raises:
        RecipeError: The recipe has other stages, or the output folder holds another study; before anything is trained.
        CompressError: A training failed.
    """
    settings = settings or LotteryConfig()
    check_seeds(seeds)
    recipes = [_recipe(path, settings.rewind, seed) for seed in seeds]
    return [_one(path, recipe, settings, log or say) for recipe in recipes]


def _recipe(path: str | Path, rewind: int, seed: int) -> Recipe:
    recipe = load_recipe(path)
    rest = [stage.kind for stage in recipe.stages[1:] if not isinstance(stage, EvaluateStage | SaveStage)]
    first = recipe.stages[0]
    if not isinstance(first, TrainStage) or first.method is not None or rest:
        raise RecipeError(f"{path}: expected one train stage without a method, and no others but evaluate and save: it is what is repeated")
    output = f"{recipe.output.rstrip('/')}_lottery" + (f"_rewind{rewind}" if rewind else "")
    return recipe.model_copy(update={"output": output}).with_seed(seed)


@dataclass(frozen=True)
class _Lab:
    """What all trainings of one seed share."""

    recipe: Recipe
    settings: LotteryConfig
    output: Path
    source: Source
    processes: Processes
    sha256: str
    log: Callable[[str], None]

    @property
    def config(self) -> TrainConfig:
        stage = self.recipe.stages[0]
        assert isinstance(stage, TrainStage)
        return stage

    def ticket(self, number: int) -> Path:
        """Folder of a round's ticket."""
        return self.output / "rounds" / f"{number:02d}"

    @property
    def snapshot(self) -> Path:
        return self.output / "snapshot.safetensors"

    def train(self, model: nn.Module, label: str, config: TrainConfig | None = None, **kwargs: Any) -> tuple[float, ...]:
        """Train a model in place; all that are rewound see the images in the same order. Returns top-1 after each epoch."""
        history = fit(
            model,
            train_loader(self.source, self.recipe.data, model, self.processes),
            eval_loader(self.source, self.recipe.data, model, self.processes),
            config or self.config,
            phase=Phase(label, 1, self.recipe.seed, f"{self.sha256} {label}"),
            processes=self.processes,
            state=self.output / "training.safetensors",
            log=self.log,
            **kwargs,
        )
        return tuple(epoch.top1 for epoch in history)


def _one(path: str | Path, recipe: Recipe, settings: LotteryConfig, log: Callable[[str], None]) -> Study:
    output = Path(recipe.output).expanduser()
    sha256 = hashlib.sha256(json.dumps([recipe.sha256, settings.model_dump(mode="json")]).encode()).hexdigest()
    with init_processes(recipe.device) as processes, deterministic():
        if processes.world_size > 1:
            raise RecipeError(f"{path}: lottery runs in one process, found {processes.world_size}")
        study = _read(path, output / RECORD_NAME, sha256) or Study(
            recipe=recipe.model_dump(mode="json"),
            settings=settings,
            sha256=sha256,
            versions=versions(),
            machine=machine(torch.get_num_threads(), str(processes.device)),
        )
        model = create(recipe)
        lab = _Lab(recipe, settings, output, open_images(recipe, model, processes), processes, sha256, log)
        with locked(output, processes):
            for number in range(settings.rounds + 1):
                controls = settings.controls if number and number % settings.every == 0 else ()
                masks = None
                for arm in (TICKET, *controls):
                    if study.has(number, arm):
                        continue
                    masks = masks or _masks(lab, number)
                    point = _train_arm(lab, number, arm, masks)
                    study = study.model_copy(update={"points": (*study.points, point)})
                    write_atomic(output / RECORD_NAME, study.model_dump_json(indent=1).encode() + b"\n")
                    log(f"round {number}, {arm}: {point.remaining:.1%} of the weights, top-1 {point.top1[-1]:.2f}%")
    return study


def _read(path: str | Path, file: Path, sha256: str) -> Study | None:
    try:
        study = Study.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise RecipeError(f"{file}: expected the record of a lottery study, found another file ({type(error).__name__})") from error
    if study.sha256 != sha256:
        raise RecipeError(
            f"{path}: expected the recipe and settings of the study in {file.parent}, found others; remove that folder, or choose another"
        )
    return study


def _masks(lab: _Lab, number: int) -> Masks:
    """A round's masks: of what the last one kept, the smallest trained weights are removed."""
    if number == 0:
        return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in layer_weights(create(lab.recipe)).items()}
    model = zc.load(lab.ticket(number - 1))
    weights = layer_weights(model)
    before = masks_of(model, weights) if number > 1 else {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    settings = lab.settings
    output_fraction = settings.fraction / 2 if settings.output_fraction is None else settings.output_fraction
    other = dict.fromkeys(classifiers(model), output_fraction) if settings.scope == "local" else {}
    scores = {name: weight.detach().abs() for name, weight in weights.items()}
    return remove_fraction(before, scores, settings.fraction, scope=settings.scope, other=other)


def _train_arm(lab: _Lab, number: int, arm: str, masks: Masks) -> Point:
    begun = time.perf_counter()
    label = f"round {number} {arm}"
    if number == 0:
        model = create(lab.recipe)
        top1 = lab.train(model, label, snapshot=Take(lab.settings.rewind, lambda taken: taken.save(lab.snapshot)))
    else:
        model, options = _ARMS[arm](lab, number)
        masks = random_like(masks, lab.recipe.seed + number) if arm == "random" else masks
        apply_(model, masks)
        stamp_packed(model, "sparse", dict.fromkeys(masks, Packing(mask=True)))
        top1 = lab.train(model, label, **options)
    if arm == TICKET:
        zc.save(model.cpu(), lab.ticket(number))
    return Point(round=number, arm=arm, remaining=density(masks), top1=top1, seconds=time.perf_counter() - begun)


def _rewound(lab: _Lab, number: int) -> tuple[nn.Module, dict[str, Any]]:
    model, snapshot = create(lab.recipe), Snapshot.load(lab.snapshot)
    model.load_state_dict(snapshot.model)
    return model, {"start": snapshot}


def _reinitialised(lab: _Lab, number: int) -> tuple[nn.Module, dict[str, Any]]:
    return reinitialize(create(lab.recipe), seed=_OTHER + lab.recipe.seed * 1000 + number), {}


@torch.no_grad()
def _signs(lab: _Lab, number: int) -> tuple[nn.Module, dict[str, Any]]:
    model, options = _rewound(lab, number)
    for weight in layer_weights(model).values():
        weight.copy_(weight.sign() * weight.std(correction=0))
    return model, options


def _trained(lab: _Lab, number: int) -> tuple[nn.Module, dict[str, Any]]:
    tuning = {"lr": lab.config.lr / 10, "sched": "constant", "warmup_epochs": 0}
    return zc.load(lab.ticket(number - 1), **lab.recipe.model.drop_rates), {"config": lab.config.model_copy(update=tuning)}


_OTHER = 2**31  # seeds that no training has
_ARMS: dict[str, Callable[[_Lab, int], tuple[nn.Module, dict[str, Any]]]] = {
    TICKET: _rewound,
    "random": _rewound,
    "reinit": _reinitialised,
    "signs": _signs,
    "finetune": _trained,
}


@dataclass(frozen=True)
class Curve:
    """Accuracy of one arm against the weights that remain, over seeds.

    Attributes:
        arm: `ticket`, or the control.
        remaining: fraction of the weights that are left, for each round the arm was trained in.
        mean: top-1 after the last epoch in percent, mean over seeds.
        spread: its standard deviation, in points; empty of a single seed.
    """

    arm: str
    remaining: tuple[float, ...]
    mean: tuple[float, ...]
    spread: tuple[float, ...]


def curves(studies: Sequence[Study]) -> list[Curve]:
    """The arms of several seeds' studies of one recipe with one kind of settings; rounds that all of them finished."""
    found = []
    for arm in (TICKET, *studies[0].settings.controls):
        points = [{point.round: point for point in study.points if point.arm == arm or point.round == 0} for study in studies]
        rounds = [number for number in points[0] if all(number in of_seed for of_seed in points)]
        top1 = [[of_seed[number].top1[-1] for of_seed in points] for number in rounds]
        found.append(
            Curve(
                arm,
                tuple(points[0][number].remaining for number in rounds),
                tuple(statistics.mean(values) for values in top1),
                tuple(statistics.stdev(values) for values in top1 if len(values) > 1),
            )
        )
    return found


def format_curves(table: Sequence[Curve]) -> str:
    """The curves as a table for people: one line a round, one column an arm."""
    rows = [["weights left", *(curve.arm for curve in table)]]
    for remaining in table[0].remaining:
        cells = [f"{remaining:.2%}"]
        for curve in table:
            at = next((j for j, other in enumerate(curve.remaining) if other == remaining), None)
            cells.append("–" if at is None else f"{curve.mean[at]:.2f}" + (f" ± {curve.spread[at]:.2f}" if curve.spread else ""))
        rows.append(cells)
    return aligned(rows)


def plot(table: Sequence[Curve], file: str | Path, title: str = "") -> None:
    """Draw the curves into a PNG or any other format of matplotlib (extra `plots`).

    Raises:
        CompressError: The picture cannot be written, or matplotlib is missing.
    """
    figure = blank_figure((7, 4.5))
    axes = figure.subplots()
    for place, curve in enumerate(table):
        left = [100 * x * 1.015**place for x in curve.remaining]  # beside each other, not on top
        axes.errorbar(left, curve.mean, curve.spread or None, marker="o", markersize=3, capsize=2, label=curve.arm)
    axes.set_xscale("log")
    axes.invert_xaxis()
    rounds = [100 * x for x in table[0].remaining]
    shown = rounds[:: -(-len(rounds) // TICKS)]
    axes.set_xticks(shown, [f"{x:.3g}" for x in shown])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="weights left, %", ylabel="top-1, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, file, dpi=150)
