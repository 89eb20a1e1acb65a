"""A recipe tried without training: what cannot work is said before anything is trained, not after hours of it.

Every step that makes a model does so from the one before it, through files, as in the run: training sets everything up and takes no step,
pruning and sparsifying rank by weights alone. What trained weights decide is not judged, and where a step's structure follows from them
the trial ends.
"""

from dataclasses import replace

import torch
from torch import nn

import zoo_compress as zc

from .actions import STEPS_FOLDER, Result, Run, act
from .errors import BudgetError, CompressError, RecipeError, WidthError
from .record import StepRecord
from .surgery.verify import randomise_
from .training.checkpoint import scratch_beside
from .training.distributed import Processes


def rehearse(run: Run, model: nn.Module) -> None:
    """Try the steps of a run that has not begun. Nothing of it is written.

    Args:
        run: The run.
        model: What its first step would make. Its weights are others afterwards.

    Raises:
        RecipeError: Naming the first step that cannot work.
        CompressError: Nothing can be written where the run is to write.
    """
    # On the disk that is to hold the models; that of temporary files may be too small for them.
    there = next(folder for folder in run.output.absolute().parents if folder.is_dir())
    with scratch_beside(there / run.output.name) as scratch:
        trial = replace(run, output=scratch, processes=Processes(run.processes.device), log=lambda _: None, dry=True)
        changed = False
        for step in trial.plan:
            if not step.makes_model:
                continue
            try:
                result = Result(model) if step.action == "create" else act(trial, step)
            except CompressError as error:
                # Other weights rank otherwise: that a budget is met nearly is not to be had from these, nor what is left for the next one.
                if isinstance(error, WidthError) and (changed or not isinstance(error, BudgetError)):
                    return
                raise RecipeError(f"{step.name}: {error}") from error
            if result.model is None:
                return
            if step.action == "create" and not run.recipe.model.pretrained:
                # Initial zeros would be taken for what training leaves: layers that give nothing, and have no gradient.
                with torch.no_grad():
                    randomise_(result.model, torch.Generator().manual_seed(run.recipe.seed))
            zc.save(result.model, trial.folder(step))
            place = f"{STEPS_FOLDER}/{step.name}"
            done = StepRecord(name=step.name, kind=step.kind, checkpoint=place, metrics=result.metrics, seconds=0)
            trial = replace(trial, record=trial.record.extended(done))
            changed = changed or step.compresses
