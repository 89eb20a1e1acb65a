"""Coverage: what the engine makes of every architecture in timm's registry, one row each, with no weights allocated.

Each architecture runs in a process of its own, forked from this one with everything imported, so that one that crashes, hangs or needs too
much memory costs its own row only; this needs a system that forks (Linux, macOS). The table is written after every architecture; an
interrupted run goes on where it stopped.
"""

import csv
import gc
import io
import json
import multiprocessing
import re
import resource
import signal
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from .errors import AnalysisError, CompressError, VerificationError
from .structure.layout import Layout
from .structure.widths import least
from .surgery.kernels import Kernels
from .surgery.resize import resize
from .surgery.trace import analyze, empty_input
from .surgery.tracer import MODEL_ERRORS
from .surgery.verify import prove_permutation, random_widths
from .training.checkpoint import made, write_atomic

MIN_KEEP = 0.1
"""The fraction of every axis that stays where the table says which share of MACs is reachable; `prune`'s own default."""

MACS_TOLERANCE = 1e-3

PROOF_SIDE = 128
"""Height and width of the images of the permutation proof, where a model takes them and has the same layout."""


class CoverageRow(BaseModel):
    """One architecture in the table. What an analysis that failed did not find out is None, and an empty cell of the file.

    Attributes:
        name: timm architecture.
        status: `ok`; `failed`, no layout; `wrong`, the permutation proof or a run at random widths refuted the layout; `unproven`, the
            permutation proof did not end.
        reason: why it is not `ok`.
        seconds: of the analysis.
        peak_mb: memory that creating and analysing the architecture took, in MiB.
        params: number of parameters.
        axes: number of axes.
        free: how many of them may change.
        free_share: share of the parameters that a free axis runs along, in 0…1.
        macs: multiply-accumulates of one image.
        reachable: least fraction of them that a choice of widths reaches which keeps a tenth of every axis.
        macs_error: relative difference of the layout's MACs and a real count, at random widths.
        links: pairs of sizes that must stay equal.
        unknown: operations that have no rule → how often.
        frozen: reason → number of axes that are frozen for it.
        permutation_error: relative change of the output when all free axes are permuted; None where it was not asked for.
        proof_seconds: of that proof, with the creation of weights.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    status: Literal["ok", "failed", "wrong", "unproven"] = "ok"
    reason: str = ""
    seconds: float | None = None
    peak_mb: float | None = None
    params: int | None = None
    axes: int | None = None
    free: int | None = None
    free_share: float | None = None
    macs: int | None = None
    reachable: float | None = None
    macs_error: float | None = None
    links: int | None = None
    unknown: dict[str, int] = {}
    frozen: dict[str, int] = {}
    permutation_error: float | None = None
    proof_seconds: float | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _read_cell(cls, value: Any, info: ValidationInfo) -> Any:
        if value == "" and info.field_name != "reason":
            return None
        return json.loads(value) if info.field_name in ("unknown", "frozen") and isinstance(value, str) else value

    def cells(self) -> dict[str, Any]:
        """The row as it stands in the file."""
        return {name: json.dumps(value) if isinstance(value, dict) else value for name, value in self.model_dump().items()}


def architectures(patterns: Sequence[str] = ()) -> list[str]:
    """timm's own architectures that match one of the patterns (names or globs), all without patterns; in the registry's order.

    Raises:
        CompressError: Naming the pattern that nothing matches.
    """
    names = timm.list_models(exclude_filters="*__*")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CompressError(f"coverage: {pattern!r} matches no architecture; expected a name or glob of timm.list_models()")
    return [name for name in names if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)]


def cover(
    names: Iterable[str],
    out: Path,
    *,
    proof_below: int = 0,
    time_limit: float = 600.0,
    memory_limit: float = 16.0,
    retry: bool = False,
    fresh: bool = False,
) -> list[CoverageRow]:
    """Analyse architectures, then prove the layouts of the smaller ones, cheapest first.

    Args:
        names: timm architectures.
        out: The CSV file. Rows it has already are not made again, and rows of other architectures stay in it.
        proof_below: Run the permutation proof on architectures with fewer parameters than this.
        time_limit: Seconds for one analysis or proof.
        memory_limit: GiB of memory for one.
        retry: Make rows again whose status is not `ok`.
        fresh: Make all rows again.

    Returns:
        The rows of `names`, in their order.

    Raises:
        CompressError: If the file is not such a table.
    """
    names = list(names)
    rows = _read(out)
    if fresh:
        rows = {name: row for name, row in rows.items() if name not in names}
    if retry:
        rows = {name: row for name, row in rows.items() if row.status == "ok" or name not in names}
    _warm_up()
    gc.freeze()  # a collection in a forked process would copy everything that is shared with this one

    def keep(row: CoverageRow) -> None:
        rows[row.name] = row
        _write(out, rows.values())
        if row.status != "ok":
            tqdm.write(f"{row.name}: {row.status}: {row.reason}", file=sys.stderr)

    for name in _progress([name for name in names if name not in rows], "analysis"):
        found = _isolated(survey, (name,), time_limit, memory_limit)
        keep(found if isinstance(found, CoverageRow) else CoverageRow(name=name, status="failed", reason=found))
    unproven = sorted((rows[name] for name in names if _wants_proof(rows[name], proof_below)), key=lambda row: row.macs or 0)
    for name in _progress([row.name for row in unproven], "permutation proof"):
        found = _isolated(prove, (rows[name],), time_limit, memory_limit)
        keep(found if isinstance(found, CoverageRow) else rows[name].model_copy(update={"status": "unproven", "reason": found}))
    return [rows[name] for name in names]


def _progress(names: list[str], what: str) -> Iterator[str]:
    with tqdm(names, desc=what, unit="model", file=sys.stderr) as bar:
        for name in bar:
            bar.set_postfix_str(name)
            yield name


def survey(name: str) -> CoverageRow:
    """Analyse one architecture, created without weights.

    Raises:
        Exception: Whatever creating it raises; an architecture whose analysis fails gives a row that says so.
    """
    before = _peak_mb()
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    started = time.perf_counter()
    try:
        layout = analyze(model)
    except AnalysisError as error:
        return CoverageRow(name=name, status="failed", reason=str(error))
    row = describe(name, layout)
    row.seconds = round(time.perf_counter() - started, 3)
    row.peak_mb = round(_peak_mb() - before, 1)
    try:
        row.macs_error = macs_error(model, layout)
        wrong = f"the layout's MACs differ from a count by {row.macs_error:.2%}" if row.macs_error > MACS_TOLERANCE else ""
    except MODEL_ERRORS as error:
        wrong = f"does not run at random widths: {type(error).__name__}: {error}"
    return row.model_copy(update={"status": "wrong", "reason": wrong}) if wrong else row


def macs_error(model: nn.Module, layout: Layout, seed: int = 0) -> float:
    """Run a model without data at random widths and count its MACs with torch's counter.

    Args:
        model: On the meta device.
        layout: Its layout.
        seed: Of the widths.

    Returns:
        Relative difference between the count and the layout's arithmetic. Without data, fused attention runs as the two products it
        consists of, so that they are counted too.
    """
    widths = random_widths(layout, np.random.default_rng(seed))
    resized = resize(model, layout, widths).requires_grad_(False)
    with Kernels(), FlopCounterMode(display=False) as counter, torch.no_grad():
        resized(empty_input(resized, (1, *layout.input_shape[1:])))
    counted, computed = counter.get_total_flops() / 2, layout.macs(widths)
    return abs(counted - computed) / max(computed, 1)


def describe(name: str, layout: Layout) -> CoverageRow:
    """The row of an architecture with this layout."""
    return CoverageRow(
        name=name,
        params=layout.num_params(),
        axes=len(layout.axes),
        free=len(layout.free),
        free_share=round(layout.free_share, 5),
        macs=layout.macs(),
        reachable=round(layout.macs(least(layout, MIN_KEEP)) / max(layout.macs(), 1), 4),
        links=len(layout.links),
        unknown=layout.unknown,
        frozen=dict(Counter(_summarised(axis.frozen) for axis in layout.axes.values() if axis.frozen).most_common()),
    )


def prove(row: CoverageRow) -> CoverageRow:
    """The row with what the permutation proof found, on random weights."""
    started = time.perf_counter()
    model = timm.create_model(row.name).eval()
    layout = analyze(model)
    try:
        found: dict[str, Any] = {"permutation_error": prove_permutation(model, layout, _proof_input(model, layout))}
    except VerificationError as error:
        found = {"status": "wrong", "reason": str(error)}
    return row.model_copy(update={**found, "proof_seconds": round(time.perf_counter() - started, 2)})


def _proof_input(model: nn.Module, layout: Layout) -> torch.Tensor:
    """The smallest input that the proof of a layout may run on: that of another size is proof only if the layout there is the same."""
    batch, channels, *sides = layout.input_shape
    small = empty_input(model, (batch, channels, *(min(side, PROOF_SIDE) for side in sides)))
    try:
        same = analyze(model, small).params == layout.params
    except AnalysisError:
        same = False
    return small if same else empty_input(model, layout.input_shape)


def _wants_proof(row: CoverageRow, below: int) -> bool:
    return row.status == "ok" and row.permutation_error is None and row.params is not None and row.params < below


def _summarised(reason: str) -> str:
    """A reason without the place in the model, so that equal ones count together."""
    place, colon, rest = reason.partition(": ")
    return re.sub(r"\d+(×\d+)*", "N", rest if colon and re.fullmatch(r"[\w.]+", place) else reason)


def _warm_up() -> None:
    """Analyse a small model: what torch imports and sets up on first use is then done once, before any fork."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 2))
        analyze(model, torch.empty(2, 3, 4, 4))


def _peak_mb() -> float:
    """The largest memory this process has had resident so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _isolated(work: Callable[..., CoverageRow], args: tuple[Any, ...], time_limit: float, memory_limit: float) -> CoverageRow | str:
    """Run `work` in a forked process: its result, or why there is none."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, work, args, memory_limit), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(time_limit):
            return f"took longer than {time_limit:g} s"
        return receiver.recv()
    except EOFError:
        process.join()
        return f"its process ended with exit code {process.exitcode}" + (" (killed: out of memory?)" if process.exitcode == -9 else "")
    finally:
        process.kill()
        process.join()
        receiver.close()


def _child(sender: Any, work: Callable[..., CoverageRow], args: tuple[Any, ...], memory_limit: float) -> None:
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    limit, hard = int(memory_limit * 2**30), resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    _warm_up()  # faults the code in, so that it does not count as an architecture's memory
    # Whatever an architecture raises is its row's reason.
    try:
        sender.send(work(*args))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _read(path: Path) -> dict[str, CoverageRow]:
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        try:
            rows = [CoverageRow.model_validate(cells) for cells in csv.DictReader(file)]
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise CompressError(f"{path}: expected a table that coverage wrote: {first['loc']}: {first['msg']}") from error
    return {row.name: row for row in rows}


def _write(path: Path, rows: Iterable[CoverageRow]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, CoverageRow.model_fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.cells() for row in sorted(rows, key=lambda row: row.name))
    made(path.parent)
    write_atomic(path, text.getvalue().encode())


def summary(rows: Sequence[CoverageRow]) -> str:
    """What the table says on the whole, as Markdown."""
    analysed = [row for row in rows if row.seconds is not None]
    count = Counter(row.status for row in rows)
    lines = ["| | |", "|---|---|", f"| architectures | {len(rows)} |", f"| ok | {count['ok']} |"]
    lines += [f"| {status} | {count[status]} |" for status in ("failed", "wrong", "unproven") if count[status]]
    for label, attribute, form in (
        ("analysis, seconds", "seconds", ".2f"),
        ("peak memory, MiB", "peak_mb", ".0f"),
        ("share of parameters on free axes", "free_share", ".4f"),
        ("reachable MACs", "reachable", ".3f"),
        ("MACs against a count", "macs_error", ".1e"),
        ("permutation error", "permutation_error", ".1e"),
    ):
        found = {row.name: getattr(row, attribute) for row in analysed if getattr(row, attribute) is not None}
        if found:
            worst = (min if attribute == "free_share" else max)(found, key=found.__getitem__)
            values = f"median {statistics.median(found.values()):{form}}, worst {found[worst]:{form}} ({worst})"
            lines.append(f"| {label} ({len(found)}) | {values} |")
    failures = Counter(f"{row.status}: {row.reason}" for row in rows if row.status != "ok")
    lines += [f"| {reason} | {number} |" for reason, number in failures.most_common()]
    frozen: Counter[str] = Counter()
    for row in analysed:
        frozen.update(row.frozen.keys())
    lines += ["", "| axes are frozen because | in models |", "|---|---|", *(f"| {reason} | {n} |" for reason, n in frozen.most_common(20))]
    return "\n".join(lines)
