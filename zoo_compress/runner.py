"""Running a recipe: every step reads the model the last one saved and saves its own, so stopping between or within steps changes nothing.

A step is done when the record names it. What was in the making when a run was killed is made again; training goes on after its last epoch.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

import zoo_compress as zc

from .actions import STATE_NAME, STEPS_FOLDER, Run, act, create, open_images, save_whole
from .errors import RecipeError
from .plan import Step, make_plan, milestones
from .recipe import Recipe, load_recipe
from .record import RECORD_NAME, Record, StepRecord, machine, read_record, versions, write_record
from .rehearsal import rehearse
from .sharing.recipe_text import is_of, recipe_of
from .training.checkpoint import made
from .training.config import TrainConfig
from .training.distributed import Processes, init_processes


def run(
    path: str | Path,
    *,
    fresh: bool = False,
    seed: int | None = None,
    others: Sequence[str | Path] = (),
    log: Callable[[str], None] | None = None,
) -> Record:
    """Run a recipe, or what is left of it.

    Args:
        path: the recipe.
        fresh: start over, whatever an earlier run left in the output folder.
        seed: another seed than the recipe's; the output folder's name then ends with it.
        others: output folders of other runs. A run that trained the same model in the same way, before it compressed it, is taken over
            up to there: this one would get the same numbers. Not where several processes train.
        log: takes lines about progress; None writes them to standard error, between progress bars.

    Returns:
        The record. If an earlier run had finished, its record, and nothing runs.

    Raises:
        RecipeError: the recipe, or an earlier run in its output folder, does not admit a start; nothing was written.
        CompressError: a step failed.
    """
    recipe = load_recipe(path)
    if seed is not None:
        recipe = recipe.with_seed(seed)
    output = Path(recipe.output).expanduser()
    report = log or say
    with init_processes(recipe.device) as processes, deterministic():
        log = report if processes.primary else lambda _: None
        record = None if fresh else _earlier(path, recipe, output, processes)
        if record and record.status == "finished":
            log(f"{path}: finished earlier, in {output}; nothing was trained. --fresh starts over.")
            return record
        model = zc.load(output / record.latest_checkpoint) if record else create(recipe)
        source = open_images(recipe, model, processes)
        if record is None:
            record = Record(
                recipe=recipe.model_dump(mode="json"),
                recipe_sha256=recipe.sha256,
                seed=recipe.seed,
                world_size=processes.world_size,
                versions=versions(),
                machine=machine(torch.get_num_threads(), str(processes.device)),
                started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            )
        else:
            log(f"{path}: going on after {record.steps[-1].name}")
        state = Run(recipe, make_plan(recipe), output, processes, source, record, log)
        if not record.steps:
            rehearse(state, model)
        # All processes have read the old state here, and none has written.
        processes.barrier()
        with locked(output, processes):
            if processes.primary and not record.steps:
                _clear(output)
                state = replace(state, record=_begun(state, others))
            for step in state.plan[len(state.record.steps) :]:
                state = replace(state, record=_do(state, step))
    return state.record


def say(line: str) -> None:
    """Write a line to standard error, between progress bars."""
    tqdm.write(line, file=sys.stderr)


def _earlier(path: str | Path, recipe: Recipe, output: Path, processes: Processes) -> Record | None:
    """The record to go on from, if it is of this very run."""
    record = read_record(output)
    if record is None:
        return None
    if not is_of(record.recipe, recipe):
        raise RecipeError(
            f"{path}: expected the recipe of the run in {output}, found a changed one; use --fresh to start over, or another output"
        )
    if record.status == "running" and record.world_size != processes.world_size:
        raise RecipeError(
            f"{path}: expected to go on with {record.world_size} processes, found {processes.world_size}; use --fresh to start over"
        )
    if [done.name for done in record.steps] != [step.name for step in make_plan(recipe)][: len(record.steps)]:
        raise RecipeError(
            f"{output / RECORD_NAME}: expected the steps of its recipe, found {', '.join(done.name for done in record.steps)}; use --fresh "
            "to start over"
        )
    return record if record.steps else None


def _begun(run: Run, others: Sequence[str | Path]) -> Record:
    """The record to start with: nothing, or what another run did in the way this one would, with its models."""
    found = {Path(other): _shared(run, Path(other)) for other in others}
    folder = max(found, key=lambda other: len(found[other]), default=None)
    if folder is None or run.processes.distributed or not any(step.epochs for step in found[folder]):
        return run.record
    shared = found[folder]
    for step in shared:
        if step.checkpoint and (folder / step.checkpoint).is_dir():
            shutil.copytree(folder / step.checkpoint, run.output / step.checkpoint)
    record = run.record.model_copy(update={"steps": shared})
    write_record(run.output, record)
    run.log(f"begins as the run in {folder} did: taken over up to {shared[-1].name}")
    return record


def _shared(run: Run, folder: Path) -> tuple[StepRecord, ...]:
    """What a run in another folder did that this one would do to the bit: making the model and training it, up to a model that is there."""
    record = read_record(folder)
    if record is None or (record.world_size, record.versions, record.machine) != (1, run.record.versions, run.record.machine):
        return ()
    try:
        other = recipe_of(record.recipe)
    except RecipeError:
        return ()  # of another version
    if (other.model, other.data, other.seed, other.device) != (run.recipe.model, run.recipe.data, run.recipe.seed, run.recipe.device):
        return ()
    found: tuple[StepRecord, ...] = ()
    for mine, theirs, done in zip(run.plan, make_plan(other), record.steps, strict=False):
        if mine.action != theirs.action or not (mine.action == "create" or isinstance(mine.action, TrainConfig)):
            break
        found = (*found, done)
    while found and not (found[-1].checkpoint and (folder / found[-1].checkpoint).is_dir()):
        found = found[:-1]
    return found


def _do(run: Run, step: Step) -> Record:
    """Do one step, save its model, and only then add it to the record."""
    run.log(f"[{step.index + 1}/{len(run.plan)}] {step.label}")
    start = time.perf_counter()
    result = act(run, step)
    made = f"{STEPS_FOLDER}/{step.name}" if step.makes_model else None
    if result.model is not None and run.processes.primary:
        save_whole(result.model, run.folder(step))
    seconds = sum(epoch.seconds for epoch in result.epochs) or time.perf_counter() - start
    done = StepRecord(name=step.name, kind=step.kind, checkpoint=made, metrics=result.metrics, epochs=result.epochs, seconds=seconds)
    status = "finished" if step is run.plan[-1] else "running"
    record = run.record.extended(done, status=status, table=result.table)
    if run.processes.primary:
        write_record(run.output, record)
        _tidy(run, step)
        if record.status == "finished":
            (run.output / STATE_NAME).unlink(missing_ok=True)
    run.processes.barrier()
    return record


def _tidy(run: Run, step: Step) -> None:
    """Remove models that nothing needs any more: neither the next step, nor a teacher, nor the table."""
    if not step.makes_model:
        return
    needed = {made.name for made in milestones(run.plan).values()} | {step.name}
    for done in run.record.steps:
        if done.checkpoint and done.name not in needed:
            shutil.rmtree(run.folder(done), ignore_errors=True)


def _clear(output: Path) -> None:
    """Remove what an earlier run left, and nothing else that may lie in the folder."""
    shutil.rmtree(output / STEPS_FOLDER, ignore_errors=True)
    for name in (RECORD_NAME, STATE_NAME):
        (output / name).unlink(missing_ok=True)


@contextmanager
def locked(output: Path, processes: Processes) -> Iterator[None]:
    """Keep other runs out of the folder. The system lets go of the lock however the process ends."""
    if not processes.primary or sys.platform == "win32":
        yield
        return
    import fcntl

    with open(made(output) / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RecipeError(f"{output}: expected no other run in this folder, found one at work") from error
        yield


@contextmanager
def deterministic() -> Iterator[None]:
    """Let torch take operations that repeat bit by bit, where it has them."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
