"""What the surveys over timm's architectures share: one row a model, from a process of its own, into a CSV file that is continued."""

from __future__ import annotations

import csv
import multiprocessing
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import _registry
from torch import nn

import zoo_compress as zc
from zoo_compress.plugin.skip_init import skip_init
from zoo_compress.surgery.verify import flat

Steps = Callable[..., Iterator[tuple[str, str]]]
"""Does one thing after the other, yielding (column, value)."""


def drawn(name: str) -> tuple[nn.Module, torch.Tensor]:
    """An architecture of timm with a classifier and random weights, in eval mode, and two images for it."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    model = (model if getattr(model, "num_classes", 0) else timm.create_model(name, num_classes=1000)).eval()
    for module in model.modules():  # fresh statistics and scales would hide mistakes
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return model, torch.randn(2, *model.pretrained_cfg["input_size"])


def reloads(model: nn.Module, image: torch.Tensor, folder: str) -> str:
    """Whether a model that is saved and created again by plain timm gives the same outputs to the bit: yes or no."""
    zc.save(model, folder)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    with torch.no_grad():
        return "yes" if torch.equal(flat(again.eval()(image)), flat(model.eval()(image))) else "no"


def attempt(steps: Steps, args: Sequence[Any], limit: float, *, stop: str | None = None) -> dict[str, str]:
    """The columns of one row, from a process of its own with one thread.

    Args:
        steps: What to do.
        args: For it.
        limit: Seconds it may take.
        stop: A value after which nothing more is done.

    Returns:
        What was yielded, `seconds`, and `error`: empty, what was raised and where, or that the time was up.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, steps, args, stop), daemon=True)
    start = time.perf_counter()
    process.start()
    sender.close()
    row = {"error": ""}
    while receiver.poll(max(0.0, limit - (time.perf_counter() - start))):
        try:
            column, value = receiver.recv()
        except EOFError:
            row["error"] = "the process died"
            break
        if column == "end":
            break
        row[column] = value
    else:
        row["error"] = f"not done after {limit:.0f} s"
    process.kill()
    process.join()
    return {**row, "seconds": f"{time.perf_counter() - start:.1f}"}


def _work(pipe: Connection, steps: Steps, args: Sequence[Any], stop: str | None) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        for column, value in steps(*args):
            pipe.send((column, value))
            if value == stop:
                break
    except Exception as error:  # whatever a tool raises on a model is its result
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:240]
        pipe.send(("error", f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"))
    pipe.send(("end", ""))


def read(path: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    return list(csv.DictReader(path.open())) if path.exists() else []


def append(path: Path, fields: Sequence[str], row: dict[str, Any]) -> None:
    """Add a row, and before the first the names of the columns."""
    new = not path.exists()
    with path.open("a", newline="") as out:
        writer = csv.DictWriter(out, fields)
        if new:
            writer.writeheader()
        writer.writerow({field: row.get(field, "") for field in fields})


def write(path: Path, fields: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write all rows anew."""
    path.unlink(missing_ok=True)
    for row in rows:
        append(path, fields, row)


def smallest_of_each_file(progress: Path, only: Collection[str] | None = None) -> dict[str, str]:
    """Model file of timm → its architecture with the fewest parameters, counted on the meta device; `progress` keeps what is found."""
    names = defaultdict(list)
    for name, module in _registry._model_to_module.items():
        if "__" not in name and not name.startswith("test_"):
            names[module].append(name)
    found = dict(csv.reader(progress.open())) if progress.exists() else {}
    for module in sorted(names):
        if module not in found and (not only or module in only):
            found[module] = min(sorted(names[module]), key=_num_params)
            with progress.open("a", newline="") as file:
                csv.writer(file).writerow((module, found[module]))
    return {module: name for module, name in found.items() if not only or module in only}


def _num_params(name: str) -> float:
    # Some architectures cannot be built without data, and the largest not with them: both are not the smallest of their file.
    try:
        with torch.device("meta"), skip_init(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(sum(p.numel() for p in timm.create_model(name).parameters()))
    except Exception:
        return float("inf")
