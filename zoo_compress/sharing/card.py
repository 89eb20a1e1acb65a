"""Model cards, made from a run's own record (Mitchell et al. 2019, Model Cards for Model Reporting)."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from timm.models import get_model_input_config, parse_model_name
from torch import nn

from ..actions import create
from ..errors import CompressError, RecipeError
from ..plan import make_plan, uncompressed
from ..plugin.hub import load
from ..plugin.weights import WEIGHTS
from ..record import RECORD_NAME, Record, Row, plural, read_record
from ..structure.layout import Layout
from ..surgery.elastic import Elastic
from ..surgery.origin import packed_of, variant_of
from ..surgery.trace import analyze, default_input
from ..training.checkpoint import write_atomic
from . import picture
from .front_matter import dataset, front_matter
from .recipe_text import is_of, recipe_of, to_yaml

README = "README.md"
PICTURE = "widths.png"
SEED = "seed"
"""Beside a shipped checkpoint: folders of this name and a number, each with the record of the same recipe with that seed."""

HERE = "local-dir:."
"""Name in the snippet of a card that lies beside its weights."""

_TEMPLATE = Path(__file__).with_name("card_template.md")
_STRUCTURE = (
    "the same structure trained from scratch, for as many epochs (Scratch-E) or with as much compute (Scratch-B; Liu et al. 2019, "
    "Rethinking the Value of Network Pruning)"
)
_FROM_SCRATCH = (
    "This is one: it was compressed before it was trained, from random weights, so that nothing but the choice of what to remove came "
    "before. What another choice of as much reaches was not measured."
)
_UNMEASURED = (
    "Not measured: {what}. Without {it} this card does not say whether compression gained anything over training {small} right away."
)


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        model: The model, as loaded from `folder`.
        folder: Its config.json and model.safetensors.
        name: What the snippet loads.
        record: Of the run that made it; None if there is none.
        others: Records of the same recipe with other seeds.
    """

    model: nn.Module
    folder: Path
    name: str
    record: Record | None = None
    others: tuple[Record, ...] = ()


def write(directory: str | Path, seeds: Sequence[str | Path] = ()) -> Path:
    """Write the card of a recipe's result, README.md, and where matplotlib is installed its picture, beside the weights.

    Args:
        directory: Output folder of a finished run.
        seeds: Output folders of runs of the same recipe with other seeds, for the spread of accuracy.

    Returns:
        The folder the card is in.

    Raises:
        CompressError: There is no finished run, it saved no model, or the other runs are of another recipe.
    """
    record = finished(Path(directory))
    folder = saved_folder(Path(directory))
    if folder is None:
        raise CompressError(f"{directory}: expected a run that saved a model, found no save stage in its record")
    subject = Subject(load(folder), folder, HERE, record, of_seeds(record, seeds))
    write_atomic(folder / README, render(subject, draw(subject, folder)).encode())
    return folder


def of_seeds(record: Record, seeds: Sequence[str | Path]) -> tuple[Record, ...]:
    """Records of the same recipe with other seeds.

    Args:
        record: Of the run they are to stand beside.
        seeds: Output folders of the others.

    Raises:
        CompressError: One is no finished run of that recipe, or of a seed that is there already.
    """
    found, recipe = [record], recipe_of(record.recipe)
    for where in seeds:
        other = finished(Path(where))
        if not is_of({**other.recipe, **_own(record)}, recipe) or other.seed in {each.seed for each in found}:
            raise CompressError(f"{where}: expected the recipe of the run with another seed, found another recipe or the same seed")
        found.append(other)
    return tuple(sorted(found[1:], key=lambda each: each.seed))


def draw(subject: Subject, folder: Path, name: str = PICTURE) -> str | None:
    """Draw the widths into a folder, if the model is a compressed one and matplotlib is there.

    Returns:
        The picture's name, or None if there is none.
    """
    if variant_of(subject.model) is None or importlib.util.find_spec("matplotlib") is None:
        return None
    picture.draw(subject.model, folder / name)
    return name


def plain(model: nn.Module, folder: Path, repo_id: str) -> str:
    """The card of a model nobody has a record of: what the model itself knows, and that nothing else is known."""
    return render(Subject(model, folder, f"hf-hub:{repo_id}"))


def at(repo_id: str, text: str) -> str:
    """A card whose snippet loads from a repository instead of the folder beside it."""
    return text.replace(f'"{HERE}"', f'"hf-hub:{repo_id}"')


def saved_folder(directory: Path) -> Path | None:
    """Where the run with this output folder saved its model last; None if it is no run, or saved none."""
    record = read_record(directory)
    saves = [step for step in record.steps if step.kind == "save"] if record else []
    return directory / str(saves[-1].metrics["to"]) if saves else None


def render(subject: Subject, picture_name: str | None = None) -> str:
    """The text of a card. The same subject gives the same text."""
    record = subject.record
    about = _about(subject)
    card = ModelCard.from_template(
        card_data=front_matter(record, subject.folder / WEIGHTS, about),
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        title=about["title"],
        what=about["what"],
        picture=picture_name,
        name=subject.name,
        usage=_usage(subject.model),
        results=_results(subject, about),
        rows=_table(record, about, subject.others) if record else [],
        measured=_measured(record) if record else "",
        baselines=_baselines(subject, about),
        made=_made(record),
        recipe=to_yaml(recipe_of(record.recipe)) if record else "",
        facts=_facts(record) if record else [],
        limits=_limits(subject),
    )
    # Blocks that a card leaves out leave their empty lines.
    lines: list[str] = []
    for line in str(card).splitlines():
        if line.strip() or (lines and lines[-1]):
            lines.append(line.rstrip())
    return "\n".join(lines).strip() + "\n"


def _own(record: Record) -> dict[str, Any]:
    return {key: record.recipe[key] for key in ("seed", "output", "description")}


def finished(directory: Path) -> Record:
    """The record in the output folder of a run that is over.

    Raises:
        CompressError: There is none, or the run is not over.
    """
    record = read_record(directory)
    if record is None:
        raise CompressError(f"{directory}: expected the output folder of a run, found no {RECORD_NAME}")
    if record.status != "finished" or not record.table:
        raise CompressError(f"{directory}: expected a finished run, found one that is not; run its recipe again, it goes on")
    try:
        recipe_of(record.recipe)
    except RecipeError as error:
        raise RecipeError(f"{directory / RECORD_NAME}: {error}") from error
    return record


def before(record: Record) -> Row | None:
    """The row of the model that a run compressed; None if there is none, because training came only with or after compressing."""
    recipe = recipe_of(record.recipe)
    dense = uncompressed(make_plan(recipe))
    trained = dense is not None and (dense.action != "create" or recipe.model.pretrained)
    return record.table[0] if trained else None


def _compressed_first(record: Record) -> bool:
    """Whether a run compressed the model as it was created, and trained what that left."""
    dense = uncompressed(make_plan(recipe_of(record.recipe)))
    return dense is not None and dense.action == "create" and any(step.epochs for step in record.steps)


def start_layout(record: Record, model: nn.Module) -> Layout:
    """The layout of the model that a run began with, for images of the size of the one it made."""
    recipe = recipe_of(record.recipe)
    named = parse_model_name(recipe.model.name)[0] is None
    untrained = recipe.model_copy(update={"model": recipe.model.model_copy(update={"pretrained": False})})
    # Weights in a folder may be gone; the architecture they are of is known.
    return analyze(create(untrained) if named else picture.base_of(model), default_input(model))


def whole_baseline(record: Record, model: nn.Module, start: Layout) -> Row | None:
    """The row of all of the model that a run began with, trained without compressing; None if no baseline is that.

    Args:
        record: Of a run whose training came with compressing, so that `before` knows no such row.
        model: What the run made. Baselines of one with masks are trained with its masks.
        start: Layout of what it began with.
    """
    if any(packing.mask for packing in packed_of(model).values()):
        return None
    return next((row for row in record.baselines if row.params >= start.num_params() and row.macs >= start.macs()), None)


def _about(subject: Subject) -> dict[str, Any]:
    """The facts that several parts of a card need."""
    model, record = subject.model, subject.record
    cfg: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    variant = variant_of(model)
    base = variant.base if variant else cfg["architecture"]
    start = record.recipe["model"] if record else {"name": base, "pretrained": None}
    scratch = start["pretrained"] is False and parse_model_name(start["name"])[0] is None  # type: ignore[index, call-overload, arg-type]
    data = record.recipe["data"]["source"] if record else None  # type: ignore[index, call-overload]
    method = variant.method if variant else None
    size = (subject.folder / WEIGHTS).stat().st_size
    what = [f"timm's `{base}`{f', {method} by zoo_compress' if method else ''}."]
    if record and record.recipe.get("description"):
        what.append(f"{str(record.recipe['description']).rstrip('.')}.")
    if scratch:
        what.append(f"Its weights were trained from scratch on `{dataset(str(data))}`: of the base model only the architecture is used.")
    elif record:
        what.append(f"It started from the weights of `{start['name']}`.")  # type: ignore[index, call-overload]
    return {
        "title": subject.name if ":" not in subject.name else f"{base}__{method}" if method else base,
        "base": base,
        "method": method,
        "start": start,
        "scratch": scratch,
        "data": data,
        "license": cfg.get("license"),  # which weights in a folder say themselves
        "size": size,
        "what": " ".join(what),
    }


def _results(subject: Subject, about: Mapping[str, Any]) -> str:
    record = subject.record
    if record is None:
        layout = subject.model.layout if isinstance(subject.model, Elastic) else analyze(subject.model)
        return (
            f"{layout.num_params():,} parameters, {layout.macs():,} MACs an image, {about['size']:,} bytes of weights. Nothing else is "
            "known: this card was written without the record of a run."
        )
    count = record.table[-1].test_images
    text = f"On the {f'{count:,} ' if count else ''}test images of `{dataset(about['data'])}`"
    base = ""
    if before(record) is None and variant_of(subject.model) is not None:
        start = start_layout(record, subject.model)
        base = f" What training began with has {start.num_params():,} parameters and {start.macs():,} MACs"
        whole = whole_baseline(record, subject.model, start)
        if whole is not None:
            base += f"; trained without compressing it reaches {whole.top1:.2f}%."
        else:
            base += "; how it does when it is trained without compressing was not measured."
    if not subject.others:
        return f"{text}, one run with seed {record.seed}. How much another seed changes was not measured.{base}"
    top1 = [run.table[-1].top1 for run in (record, *subject.others)]
    seeds = ", ".join(str(run.seed) for run in (record, *subject.others))
    return (
        f"{text}: top-1 {_spread(top1)}, seeds {seeds}. The table is of the run with seed {record.seed}, whose weights these are; in "
        f"brackets, mean and standard deviation of all.{base}"
    )


def _table(record: Record, about: Mapping[str, Any], others: Sequence[Record]) -> list[list[str]]:
    # A baseline has the time of what it is the structure of; its own may have been measured elsewhere, on another day.
    rows = [*((row, True) for row in record.table), *((row, False) for row in record.baselines)]
    return [_cells(row, record.table[0], about, others, timed=timed) for row, timed in rows]


def _cells(row: Row, first: Row, about: Mapping[str, Any], others: Sequence[Record] = (), *, timed: bool = True) -> list[str]:
    share = "" if row is first else f" ({row.macs / first.macs:.1%})"
    # Records of earlier versions know memory alone, which for one of their models is a file as well: the one that is here.
    stored = about["size"] if row.label == "reloaded" else row.file_bytes
    size = f"{stored:,}" if stored is not None else "–"
    top1 = [row.top1, *(same.top1 for other in others for same in (*other.table, *other.baselines) if same.label == row.label)]
    return [
        row.label,
        f"{row.params:,}",
        f"{row.macs:,}{share}",
        size,
        f"{row.top1:.2f}%{f' ({statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f})' if len(top1) > 1 else ''}",
        f"{row.latency_ms:.2f} ± {row.latency_iqr_ms / 2:.2f}" if timed else "–",
    ]


def _usage(model: nn.Module) -> str:
    variant = variant_of(model)
    if variant is not None and variant.bank is not None:
        return "`model.set_width(0.5)` chooses a width, `model.export(0.5)` gives an ordinary timm model of it."
    if variant is not None and variant.exits is not None and not variant.exits.truncated:
        return "`model.infer(images, exit=0)` stops at an exit, `model.infer(images, threshold=0.9)` where a sample is sure enough."
    features = "" if variant is not None and variant.exits is not None else "`features_only=True`, "
    return f"The model is an ordinary timm model: {features}`num_classes=` and `in_chans=` work."


def _measured(record: Record) -> str:
    first, where = record.table[0], record.machine
    return f"Latency: batch {first.batch_size}, {plural(first.threads, 'thread')}, {where.get('processor')}, {where.get('system')}."


def _baselines(subject: Subject, about: Mapping[str, Any]) -> str:
    if subject.record is None or not subject.record.baselines:
        if subject.record and about["scratch"] and _compressed_first(subject.record):
            return _FROM_SCRATCH
        variant = variant_of(subject.model)
        if variant is not None and variant.bank is not None:
            return _UNMEASURED.format(what="each width trained alone", it="that", small="networks of these widths")
        if variant is not None and variant.exits is not None and not variant.exits.truncated:
            return _UNMEASURED.format(what="networks that end at the exits, trained alone", it="them", small="these")
        return _UNMEASURED.format(what=_STRUCTURE, it="them", small="a small model")
    found: dict[str, list[float]] = {}
    for record in (subject.record, *subject.others):
        for row in record.baselines:
            found.setdefault(row.label, []).append(row.top1)
    return (
        "The same structure trained from scratch (Liu et al. 2019), for as many epochs (Scratch-E) or with as much compute (Scratch-B) as "
        f"the training before compression: {'; '.join(f'{label}: top-1 {_spread(top1)}' for label, top1 in found.items())}."
    )


def _spread(top1: Sequence[float]) -> str:
    if len(top1) == 1:
        return f"{top1[0]:.2f}%"
    return f"{statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f}% (mean and standard deviation of {len(top1)} runs)"


def _made(record: Record | None) -> str:
    if record is None:
        return "Unknown: there is no record of a run."
    seconds = sum(step.seconds for step in record.steps)
    return (
        f"By this recipe, in {seconds / 60:.0f} minutes on the machine below."
        if seconds >= 90
        else f"By this recipe, in {seconds:.0f} seconds."
    )


def _facts(record: Record) -> list[tuple[str, str]]:
    return [
        ("seed", str(record.seed)),
        ("recipe's sha256", record.recipe_sha256),
        (
            "machine",
            ", ".join(f"{value}" if key != "threads" else plural(int(str(value)), "thread") for key, value in record.machine.items()),
        ),
        ("processes", str(record.world_size)),
        *record.versions.items(),
    ]


def _limits(subject: Subject) -> list[str]:
    size = get_model_input_config(subject.model)["input_size"]
    limits = [f"Made for images of {size[1]}×{size[2]} with {plural(size[0], 'channel')}; MACs are at that size."]
    if subject.record:
        limits += [
            "Accuracy is on one data set; other images, classes and shifts were not looked at.",
            "Latency is of one machine: fewer MACs are not the same share less time everywhere.",
            "The run repeats bit by bit on the same machine with the same versions; elsewhere rounding differs.",
        ]
    return limits
