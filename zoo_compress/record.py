"""The record of a run: what ran, on what, and what came out. Model cards are made from it; a rerun continues from it."""

import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, JsonValue, StringConstraints, TypeAdapter, ValidationError, field_validator, model_validator

from .errors import RecipeError
from .training.checkpoint import write_atomic
from .training.config import Config, Count, OwnFolder
from .training.loop import Epoch

RECORD_NAME = "results.json"
STEPS_FOLDER = "steps"
"""Below the output folder: the models that steps made, until nothing needs them any more."""

_SAVED: TypeAdapter[str] = TypeAdapter(OwnFolder)


class Entry(Config):
    """Base of what a record holds. Measured numbers need not be finite: an epoch's test loss may well overflow."""

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="constants")


class StepRecord(Entry):
    """One finished step of a run.

    Attributes:
        name: name of the step, numbered.
        kind: `create`, `report`, or the kind of a stage.
        checkpoint: folder of the model it made, below the output folder; None if it made none.
        metrics: what it found out. Accuracies are in percent, latencies in ms.
        epochs: for training.
        seconds: wall time, over all processes that worked on it one after another.
    """

    name: Annotated[str, StringConstraints(pattern=r"^[0-9]{2,}_[a-z_]+$")]
    kind: str
    checkpoint: str | None = None
    metrics: dict[str, JsonValue] = Field(default_factory=dict)
    epochs: tuple[Epoch, ...] = ()
    seconds: float

    @model_validator(mode="after")
    def _below(self) -> "StepRecord":
        if self.checkpoint not in (None, f"{STEPS_FOLDER}/{self.name}"):
            raise ValueError(f"expected the checkpoint {STEPS_FOLDER}/{self.name} or none, found {self.checkpoint!r}")
        if self.kind == "save":
            _SAVED.validate_python(self.metrics.get("to"))
        return self


class Row(Entry):
    """One model in the table.

    Attributes:
        label: which one.
        params: number of parameters.
        macs: multiply-accumulates of one image.
        top1: top-1 accuracy on the test images, in percent.
        latency_ms: median milliseconds of one forward pass on CPU.
        latency_iqr_ms: distance between the quartiles.
        weight_memory: bytes of parameters and buffers.
        activation_memory: most bytes the tensors of that pass take up at one time.
        batch_size: images in that pass.
        threads: CPU threads it used.
        file_bytes: size of its weights' file; None where it has none of its own.
        test_images: number of images `top1` is of; None in records of earlier versions.
    """

    label: str
    params: Count
    macs: Count
    top1: float
    latency_ms: float
    latency_iqr_ms: float
    weight_memory: int
    activation_memory: int
    batch_size: int
    threads: int
    file_bytes: int | None = None
    test_images: int | None = None


class Record(Entry):
    """Everything about one run, as `results.json` holds it. `baselines` are rows like the table's, of the same structure trained from
    scratch (see `rethink`)."""

    format: Literal[1] = 1
    status: Literal["running", "finished"] = "running"
    recipe: dict[str, JsonValue]
    recipe_sha256: str
    seed: int
    world_size: int
    versions: dict[str, str]
    machine: dict[str, JsonValue]
    started: str
    steps: tuple[StepRecord, ...] = ()
    table: tuple[Row, ...] = ()
    baselines: tuple[Row, ...] = ()

    @field_validator("steps")
    @classmethod
    def _begin_with_a_model(cls, steps: tuple[StepRecord, ...]) -> tuple[StepRecord, ...]:
        if steps and steps[0].checkpoint is None:
            raise ValueError("expected a first step that made a model")
        return steps

    @field_validator("machine")
    @classmethod
    def _counts(cls, machine: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if not isinstance(machine.get("threads", 1), int):
            raise ValueError(f"expected a number of threads, found {machine['threads']!r}")
        return machine

    def step(self, name: str) -> StepRecord:
        """The finished step of that name."""
        return next(step for step in self.steps if step.name == name)

    @property
    def latest_checkpoint(self) -> str:
        """Folder of the newest model, below the output folder."""
        return next(step.checkpoint for step in reversed(self.steps) if step.checkpoint)

    def extended(self, step: StepRecord, **changes: Any) -> "Record":
        """This record with one more step."""
        return self.model_copy(update={"steps": (*self.steps, step), **changes})


def read_record(output: Path) -> Record | None:
    """The record in an output folder, or None if there is none.

    Raises:
        RecipeError: the file is not a record that this version reads.
    """
    path = output / RECORD_NAME
    try:
        return Record.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the record: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        reason = f"{where}: {first['msg']}"
        raise RecipeError(f"{path}: expected the record of a run, found another file ({reason}); choose another output") from error


def write_record(output: Path, record: Record) -> None:
    """Write or replace the record in an output folder, atomically."""
    write_atomic(output / RECORD_NAME, record.model_dump_json(indent=1).encode() + b"\n")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for package in ("zoo_compress", "torch", "timm", "torchvision", "torch-pruning", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine(threads: int, device: str) -> dict[str, JsonValue]:
    """What the run runs on, for reading latencies later."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    return {"system": platform.system(), "processor": processor, "threads": threads, "device": device}


def format_table(rows: Sequence[Row]) -> str:
    """The table for people: one line a model, columns aligned."""
    if not rows:
        return "(no model measured)"
    first = rows[0]
    latency = f"CPU latency, ms (median ± half IQR; batch {first.batch_size}, {plural(first.threads, 'thread')})"
    lines = [["", "parameters", "MACs", "file, bytes", "top-1", latency]]
    for row in rows:
        share = f" ({row.macs / first.macs:.1%})" if row is not first else ""
        lines.append(
            [
                row.label,
                f"{row.params:,}",
                f"{row.macs:,}{share}",
                "–" if row.file_bytes is None else f"{row.file_bytes:,}",
                f"{row.top1:.2f}%",
                f"{row.latency_ms:.2f} ± {row.latency_iqr_ms / 2:.2f}",
            ]
        )
    return aligned(lines)


def plural(count: int, what: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count} {what}{'s' * (count != 1)}"


def aligned(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table as text: the first `left` columns of cells to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    return "\n".join("  ".join(side(cell, width) for side, cell, width in zip(sides, line, widths, strict=True)).rstrip() for line in lines)
