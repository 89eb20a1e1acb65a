"""A recipe's stages as a flat list of steps, each of which starts from one saved model and ends with another or none."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal, TypeAlias

from .recipe import EvaluateStage, FinetuneStage, PruneStage, Recipe, SaveStage, TrainStage, methods_of
from .training.config import TrainConfig
from .training.task import ChangeConfig


@dataclass(frozen=True)
class PruneRound:
    """One of the rounds of a prune stage.

    Attributes:
        stage: the stage.
        round: number of the round, from 1.
        first: name of the stage's first step, whose record holds the size of the model that the budget refers to.
    """

    stage: PruneStage
    round: int
    first: str


Action: TypeAlias = TrainConfig | PruneRound | ChangeConfig | EvaluateStage | SaveStage | Literal["create", "report"]


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        name: unique in its run, numbered in order; also the name of its folder.
        index: its number; key of its randomness.
        kind: `create`, `report`, or the kind of a stage.
        label: what people see.
        action: what to do.
    """

    name: str
    index: int
    kind: str
    label: str
    action: Action

    @property
    def makes_model(self) -> bool:
        """Whether the step ends with a new model."""
        return self.action == "create" or isinstance(self.action, TrainConfig | PruneRound | ChangeConfig)

    @property
    def compresses(self) -> bool:
        """Whether the step makes another model than training does."""
        return isinstance(self.action, PruneRound | ChangeConfig) or bool(self._compressing)

    @property
    def trains(self) -> bool:
        """Whether the step trains."""
        return isinstance(self.action, TrainConfig)

    @property
    def noun(self) -> str | None:
        """What the stage is called whose result this step's model is; None for steps within one."""
        if isinstance(self.action, PruneRound):
            return self.action.stage.noun if self.action.round == self.action.stage.num_rounds else None
        if not isinstance(self.action, TrainStage | FinetuneStage | ChangeConfig):
            return None
        return f"{self.action.noun} with {' and '.join(self._compressing)}" if self._compressing else self.action.noun

    @property
    def _compressing(self) -> list[str]:
        return [method.kind for method in methods_of(self.action) if method.compresses]


def make_plan(recipe: Recipe) -> tuple[Step, ...]:
    """The steps of a recipe: `create`, those of its stages with rounds written out, and `report`."""
    steps: list[Step] = []

    def add(kind: str, action: Action, detail: str = "") -> str:
        index = len(steps)
        steps.append(Step(f"{index:02d}_{kind}", index, kind, f"{kind}{detail}", action))
        return steps[-1].name

    add("create", "create")
    for stage in recipe.stages:
        if not isinstance(stage, PruneStage):
            add(stage.kind, stage)
            continue
        first = ""
        for number in range(1, stage.num_rounds + 1):
            detail = f" round {number}/{stage.num_rounds}" if stage.num_rounds > 1 else ""
            name = add("prune", PruneRound(stage, number, first or f"{len(steps):02d}_prune"), detail)
            first = first or name
            if stage.finetune is not None and number < stage.num_rounds:
                add("finetune", stage.finetune, detail)
    add("report", "report")
    return tuple(steps)


def uncompressed(plan: tuple[Step, ...]) -> Step | None:
    """The step whose model the first stage that compresses starts from; it teaches in distillation. None without such a stage.

    Training that compresses what nothing trained before has no such model: what it ends with is the first.
    """
    trained = next((step.index for step in plan if step.trains), len(plan))
    first = next((step.index for step in plan if step.compresses and (not step.trains or step.index > trained)), None)
    return next((step for step in reversed(plan[:first]) if step.makes_model), None) if first is not None else None


def milestones(plan: tuple[Step, ...]) -> dict[str, Step]:
    """The models of the final table: label to the step that makes it. One before the first stage that compresses, one after each stage."""
    dense = uncompressed(plan)
    last = next(step for step in reversed(plan) if step.makes_model)
    first = dense.index + 1 if dense else next((step.index for step in plan if step.compresses), last.index)
    later = [(step.noun, step) for step in plan[first:] if step.noun is not None]
    if dense is None and len(later) < 2:
        return {"model": last}
    rows = {f"before {later[0][0]}": dense} if dense else {}
    seen: Counter[str] = Counter()
    for noun, step in later:
        seen[noun] += 1
        rows[f"after {noun}" + (f" ({seen[noun]})" if seen[noun] > 1 else "")] = step
    return rows


def budget_of_round(action: PruneRound, size: float) -> dict[str, float]:
    """What one round asks of `zoo_compress.prune`: geometric steps from the model's size to the stage's budget.

    Args:
        action: the round.
        size: MACs or parameters, whichever is limited, of the model before the first round; unused for `keep`, `latency` and single
            rounds.

    Returns:
        One keyword argument. `keep` and `latency` are fractions of the model as it stands; `macs` and `params` are counts, so that
        rounds don't add up their rounding.
    """
    (name, limit), rounds = action.stage.budget, action.stage.num_rounds
    if rounds == 1:
        return {name: limit}
    if name in ("keep", "latency"):
        return {name: limit ** (1 / rounds)}
    target = limit if limit > 1 else limit * size
    return {name: size * (target / size) ** (action.round / rounds)}
