"""One training loop, made of timm's tasks, optimizers, schedulers and metrics. Killed at any time, it goes on as if it had not been.

Everything random in an epoch follows from (seed, phase, epoch), and the state saved between epochs is complete. So an epoch computes the
same numbers whether the epochs before it ran in this process or in one that is gone.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationEvaluator, TokenDistillationTask, TrainingTask, evaluation_sample_limit
from timm.utils import dispatch_clip_grad, distribute_bn, random_seed, unwrap_model
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..errors import CompressError
from ..profiling.settings import Adjustable
from ..surgery.modules import evaluating
from .checkpoint import load_state, save_state
from .config import FinetuneConfig, TrainConfig
from .distill import create_task
from .distributed import Processes
from .keep import Keeper
from .snapshot import Marks, Snapshot, Take, put_back
from .task import MethodConfig, MethodTask


@dataclass(frozen=True)
class Phase:
    """Which training phase of which run this is: the key of its randomness and of its saved state.

    Attributes:
        name: what progress bars show.
        index: number of the phase in its run.
        seed: seed of the run.
        run: identity of the run; a state saved by another run is ignored.
    """

    name: str = "train"
    index: int = 0
    seed: int = 0
    run: str = ""


@dataclass(frozen=True)
class Epoch:
    """What one epoch did. `top1` and `top5` are percentages, as timm reports them.

    Attributes:
        train_loss: mean loss of the epoch's batches, distillation included.
        lr: learning rate of the last update.
        loss: cross-entropy on the test images, after the epoch.
        top1: top-1 accuracy on the test images, in percent.
        top5: top-5 accuracy on the test images, in percent.
        seconds: wall time, evaluation included.
    """

    train_loss: float
    lr: float
    loss: float
    top1: float
    top5: float
    seconds: float


def reseed(seed: int, phase: int, epoch: int, rank: int = 0, step: int = 0) -> int:
    """Seed torch, numpy and random for one epoch of one process, or for what is left of it after a step.

    Returns:
        A seed for what all processes must agree on, such as the order of the images.
    """
    shared = int(np.random.SeedSequence([seed, phase, epoch, step] if step else [seed, phase, epoch]).generate_state(1)[0]) & 0x3FFFFFFF
    random_seed(shared, rank)
    return shared


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, processes: Processes | None = None, progress: str | None = None) -> dict[str, float]:
    """Cross-entropy and accuracy of a model over a loader, counted over all processes.

    Args:
        model: the model; the training mode of each of its modules is restored afterwards.
        loader: yields `(batch, channels, height, width)` images and `(batch,)` class indices.
        processes: the processes that share the loader; None for one.
        progress: label of a progress bar; None shows none.

    Returns:
        `loss`, `top1` and `top5`, the latter two in percent.
    """
    processes = processes or Processes()
    evaluator = ClassificationEvaluator(processes.device, max_samples=evaluation_sample_limit(loader))
    with evaluating(model):
        for images, target in _bar(loader, progress, processes):
            evaluator.update(model(images.to(processes.device)), target.to(processes.device))
    return dict(evaluator.compute(distributed=processes.distributed))


def fit(
    model: nn.Module,
    train: DataLoader,
    test: DataLoader,
    config: TrainConfig,
    *,
    phase: Phase | None = None,
    teacher: nn.Module | Sequence[nn.Module] = (),
    method: MethodConfig | None = None,
    calibration: Iterable[object] = (),
    processes: Processes | None = None,
    state: Path | None = None,
    start: Snapshot | None = None,
    snapshot: Take | None = None,
    log: Callable[[str], None] | None = None,
    dry: bool = False,
) -> list[Epoch]:
    """Train a model in place. The last epoch's weights stay (their average with `ema_decay`): nothing is chosen by its test score.

    Zeros and shared values of a model whose record says that it has them are kept (see `keep`).

    Args:
        model: the model, on any device; moved to `processes.device`.
        train: training batches, `(batch, channels, height, width)` and `(batch,)`.
        test: evaluated after every epoch.
        config: what to do.
        phase: key of the randomness and of the saved state.
        teacher: for `config.distill`, the model to learn from, or several.
        method: how to train it, if not as it is; `model` is then what the method's `wrap` gives.
        calibration: batches of training images without augmentation, for the method.
        processes: the processes that train together; None for one.
        state: file that holds the state between epochs; a state of the same phase of the same run is resumed. None saves nothing.
        start: an earlier training of as many steps at one of them, to go on from with the weights that `model` has. Optimizer, schedule
            and images are those of the earlier one; its numbers repeat to the bit, if its weights do and it took this `snapshot`.
        snapshot: the step before which to take one, which costs the training a reseeding there.
        log: receives one line an epoch; None is silent, progress bars included.
        dry: set everything up, which finds out what does not go together, and train nothing.

    Returns:
        What each epoch did, those before a resume included.

    Raises:
        CompressError: the loss is not finite, distillation is asked for without a teacher or beside a method that it does not go with,
            batches to be mixed have no pairs, or the model runs in several ways and would be trained in one.
    """
    _check_ways(model, method)
    if method is not None and isinstance(config, FinetuneConfig):
        config.check_beside_method()
    phase, processes = phase or Phase(), processes or Processes()
    mix = _create_mix(model, train, config)
    model.to(processes.device)
    reseed(phase.seed, phase.index, 0)  # the task may have parameters of its own
    with ExitStack() as after:  # whether it ends well or not
        task = create_task(model, config, (teacher,) if isinstance(teacher, nn.Module) else teacher, processes.device)
        if isinstance(task, TokenDistillationTask):
            after.callback(model.set_distilled_training, False)  # type: ignore[arg-type]
        if method is not None:
            task = method.task(task, phase.seed)
            after.callback(task.end)
        optimizer = create_optimizer_v2(
            unwrap_model(task.get_trainable_module()),
            config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **config.optimizer_args,
        )
        scheduler = _create_scheduler(optimizer, config, len(train))
        if config.ema_decay is not None:
            task.setup_ema(decay=config.ema_decay, use_warmup=True)
        # Before anything is loaded: what is kept does not depend on where a run was stopped or starts from.
        keeper = Keeper(model, {} if method is not None and method.removes else None).attach(optimizer)
        after.callback(keeper.remove)
        marks = Marks(start, snapshot)
        marks.check(config.epochs * len(train))
        if start is not None:
            put_back(start, task, optimizer)
        history = _resume(state, phase, task, optimizer)
        if processes.distributed:
            task.prepare_distributed(device_ids=None if processes.device.type == "cpu" else [processes.device])
        if dry:
            return []

        for epoch in range(marks.first // len(train) + len(history), config.epochs):
            begun = time.perf_counter()
            shared_seed = reseed(phase.seed, phase.index, epoch, processes.rank)
            if hasattr(train.sampler, "set_epoch"):
                train.sampler.set_epoch(shared_seed)
            label = f"{phase.name} {epoch + 1}/{config.epochs}"
            if isinstance(task, MethodTask):
                task.start_epoch(epoch, config.epochs, optimizer, len(train))
            train_loss = _train_epoch(
                task, train, optimizer, scheduler, config, mix, marks, epoch, phase, processes, label if log else None
            )
            if not math.isfinite(train_loss):
                raise CompressError(
                    f"{label}: expected a finite training loss, found {train_loss}; lower lr ({config.lr:g}) or set clip_grad"
                )
            if isinstance(task, MethodTask):
                reseed(phase.seed, phase.index, epoch)  # all processes look at the same images
                task.prepare_evaluation(_result(task), calibration)
            keeper.restore_(model)
            if task.has_ema():
                keeper.restore_(_result(task))
            metrics = evaluate(_result(task), test, processes, f"{label} test" if log else None)
            lr = optimizer.param_groups[0]["lr"]
            history.append(Epoch(train_loss=train_loss, lr=lr, seconds=time.perf_counter() - begun, **metrics))
            if log and processes.primary:
                log(f"{label}: train loss {train_loss:.4f}, test loss {metrics['loss']:.4f}, top-1 {metrics['top1']:.2f}%")
            if state is not None and processes.primary:
                _save(state, phase, task, optimizer, history)
        if task.has_ema():
            model.load_state_dict(_result(task).state_dict())
    return history


def _check_ways(model: nn.Module, method: MethodConfig | None) -> None:
    knobs = model.knobs() if isinstance(model, Adjustable) else ()
    left = [knob for knob in knobs if method is None or knob not in method.trains]
    if left:
        raise CompressError(
            f"method: expected one that trains every {left[0]} of {type(model).__name__} (exits: {{}} for exits, slim or us for widths), "
            f"found {method.kind if method else 'none'}: the others would be lost"
        )


def _create_mix(model: nn.Module, train: DataLoader, config: TrainConfig) -> Mixup | None:
    if not config.mixup and not config.cutmix:
        return None
    if train.batch_size is None or train.batch_size % 2:
        raise CompressError(f"mixup, cutmix: expected an even number of images in a process's batch, found {train.batch_size}")
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=int(model.num_classes))  # type: ignore[arg-type]


def _create_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, updates_per_epoch: int) -> Scheduler | None:
    scheduler, _ = create_scheduler_v2(
        optimizer,
        config.sched,
        num_epochs=config.epochs,
        decay_epochs=config.decay_epochs,
        min_lr=config.min_lr,
        warmup_lr=config.warmup_lr,
        warmup_epochs=config.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler


def _train_epoch(
    task: TrainingTask,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler | None,
    config: TrainConfig,
    mix: Mixup | None,
    marks: Marks,
    epoch: int,
    phase: Phase,
    processes: Processes,
    progress: str | None,
) -> float:
    """One pass over the loader, or what is left of it from the first step on; returns the mean loss over all processes."""
    task.train()
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    task.to(memory_format=memory_format)
    losses = torch.zeros((), dtype=torch.float64, device=processes.device)
    bar = _bar(loader, progress, processes)
    batches, done = iter(bar), 0
    for step in range(epoch * len(loader), (epoch + 1) * len(loader)):
        if marks.reseeds(step):
            reseed(phase.seed, phase.index, epoch, processes.rank, step + 1)
        images, target = next(batches)
        if step < marks.first:
            continue
        marks.reach(step, task, optimizer)
        done += 1
        if scheduler is not None:
            scheduler.step_update(step)
        images, target = images.to(processes.device, memory_format=memory_format), target.to(processes.device)
        if mix is not None:
            images, target = mix(images, target)
        loss = task(images, target)["loss"]
        optimizer.zero_grad()
        loss.backward()
        if config.clip_grad is not None:
            dispatch_clip_grad(task.get_clip_parameters(), config.clip_grad)
        optimizer.step()
        task.update_ema(step=step + 1)
        losses += loss.detach()
        if isinstance(bar, tqdm) and step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    if isinstance(bar, tqdm):
        bar.close()
    task.to(memory_format=torch.contiguous_format)  # evaluated as it will be loaded
    if processes.distributed:
        dist.all_reduce(losses)
        for module in (task.get_trainable_module(), task.get_trainable_module(ema=True)):
            if module is not None:
                distribute_bn(module, processes.world_size, reduce=True)
    return losses.item() / (done * processes.world_size)


def _bar(loader: DataLoader, label: str | None, processes: Processes) -> Any:
    if label is None or not processes.primary:
        return loader
    return tqdm(loader, desc=label, leave=False, disable=None, unit="batch")


def _result(task: TrainingTask) -> nn.Module:
    """The module whose weights the phase would end with: the average where there is one."""
    return unwrap_model(task.get_eval_model(ema=task.has_ema()))


def _save(path: Path, phase: Phase, task: TrainingTask, optimizer: torch.optim.Optimizer, history: list[Epoch]) -> None:
    state = {
        "phase": asdict(phase),
        "history": [asdict(epoch) for epoch in history],
        "model": unwrap_model(task.get_trainable_module()).state_dict(),
        "optimizer": optimizer.state_dict(),
        "task": task.get_task_state(),
    }
    if task.has_ema():
        state["ema"] = _result(task).state_dict()
    save_state(path, state)


def _resume(path: Path | None, phase: Phase, task: TrainingTask, optimizer: torch.optim.Optimizer) -> list[Epoch]:
    if path is None or not path.exists():
        return []
    state = load_state(path)
    # The file outlives its phase until the next one saves; only the same phase of the same run may go on from it.
    if state["phase"] != asdict(phase):
        return []
    unwrap_model(task.get_trainable_module()).load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    task.load_task_state(state["task"])
    if task.has_ema():
        _result(task).load_state_dict(state["ema"])
    return [Epoch(**epoch) for epoch in state["history"]]
