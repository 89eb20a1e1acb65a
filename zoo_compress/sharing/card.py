"""Model cards, made from a run's own record (Mitchell et al. 2019, Model Cards for Model Reporting)."""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_pretrained_cfg, parse_model_name
from torch import nn

from ..errors import CompressError
from ..plugin.hub import load
from ..plugin.weights import WEIGHTS, digest
from ..record import RECORD_NAME, Record, Row, read_record
from ..structure.variant import Variant
from ..surgery.elastic import Elastic
from ..surgery.trace import analyze
from ..training.checkpoint import write_atomic
from . import picture
from .recipe_text import is_of, recipe_of, to_yaml

README = "README.md"
PICTURE = "widths.png"
FORMAT = 1
KEY = "zoo_compress"
"""Key of the card's front matter with what `verify` needs."""

HERE = "local-dir:."
"""Name in the snippet of a card that lies beside its weights."""

_TEMPLATE = Path(__file__).with_name("card_template.md")
_STRUCTURE = (
    "the same structure trained from scratch, for as many epochs (Scratch-E) or with as much compute (Scratch-B; Liu et al. 2019, "
    "Rethinking the Value of Network Pruning)"
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
    return tuple(found[1:])


def draw(subject: Subject, folder: Path, name: str = PICTURE) -> str | None:
    """Draw the widths into a folder, if the model is a compressed one and matplotlib is there.

    Returns:
        The picture's name, or None if there is none.
    """
    if _variant(subject.model) is None or importlib.util.find_spec("matplotlib") is None:
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
        card_data=_data(subject, about),
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        title=about["title"],
        what=about["what"],
        picture=picture_name,
        name=subject.name,
        usage=_usage(subject.model),
        results=_results(subject, about),
        rows=[_cells(row, record.table[0], about, subject) for row in (*record.table, *record.baselines)] if record else [],
        measured=_measured(record) if record else "",
        baselines=_baselines(subject),
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
    return record


def _variant(model: nn.Module) -> Variant | None:
    """What a compressed model was made of; None for a plain one."""
    stored = getattr(model, "_model_args", {}).get("variant")
    return Variant.from_dict(stored) if stored else None


def _about(subject: Subject) -> dict[str, Any]:
    """The facts that several parts of a card need."""
    model, record = subject.model, subject.record
    cfg: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    variant = _variant(model)
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


def _data(subject: Subject, about: Mapping[str, Any]) -> ModelCardData:
    """Front matter."""
    record = subject.record
    config: dict[str, Any] = {"format": FORMAT, "weights_sha256": digest(subject.folder / WEIGHTS), "weights_bytes": about["size"]}
    if record:
        config |= {
            "recipe_sha256": record.recipe_sha256,
            "data": record.recipe["data"],
            "top1": record.table[-1].top1,
            "params": record.table[-1].params,
            "macs": record.table[-1].macs,
        }
    source, name = parse_model_name(str(about["start"]["name"]))
    cfg = get_pretrained_cfg(name, allow_unregistered=True) if source is None else None
    hub_id = name if source == "hf-hub" else cfg.hf_hub_id if cfg else None
    keywords: dict[str, Any] = {
        **_license(cfg.license if cfg else about["license"], about["scratch"], hub_id),
        "tags": ["image-classification", "timm", "zoo_compress", *([about["method"]] if about["method"] else [])],
        "base_model": hub_id,
        # Pruning is none of the Hub's relations; fine-tuning is the nearest, and the text says what was taken from the base.
        **({"base_model_relation": "finetune"} if hub_id else {}),
        "datasets": [dataset(about["data"])] if about["data"] else None,
        "model_name": about["title"] if record else None,
        "eval_results": _eval_results(record, about) if record else None,
        KEY: config,
    }
    return ModelCardData(library_name="timm", pipeline_tag="image-classification", **keywords)


def _license(name: str | None, scratch: bool, hub_id: str | None) -> dict[str, str]:
    if scratch:
        return {"license": "apache-2.0"}  # of timm's code, which is all that is used of the base
    if name:
        return {"license": name.lower()}
    link = {"license_link": f"https://huggingface.co/{hub_id}"} if hub_id else {}
    return {"license": "other", "license_name": "that-of-the-base-model", **link}


def dataset(source: str) -> str:
    """A data source's name without paths: what others may call it. A folder of images is called as its last part is."""
    kind, _, path = source.partition(":")
    if kind == "imagefolder":
        return Path(path).name or kind
    return source.partition("/")[2] or source


def _eval_results(record: Record, about: Mapping[str, Any]) -> list[EvalResult]:
    row = record.table[-1]
    found = next((step.metrics for step in reversed(record.steps) if {"top1", "top5", "loss"} <= step.metrics.keys()), {})
    metrics: list[tuple[str, str, Any]] = [("accuracy", "Top-1 accuracy, %", row.top1)]
    if found.get("top1") == row.top1:
        metrics += [("top5", "Top-5 accuracy, %", found["top5"]), ("loss", "Cross-entropy", found["loss"])]
    metrics += [
        ("parameters", "Parameters", row.params),
        ("macs", "MACs of one image", row.macs),
        ("size", "Bytes of model.safetensors", about["size"]),
        ("latency", f"CPU latency, ms, batch {row.batch_size}, {_threads(row.threads)}", row.latency_ms),
    ]
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=dataset(about["data"]),
            dataset_name=dataset(about["data"]),
            dataset_split="test",
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for kind, name, value in metrics
        if not isinstance(value, float) or math.isfinite(value)
    ]


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
    if not subject.others:
        return f"{text}, one run with seed {record.seed}. How much another seed changes was not measured."
    top1 = [run.table[-1].top1 for run in (record, *subject.others)]
    seeds = ", ".join(str(run.seed) for run in (record, *subject.others))
    return (
        f"{text}: top-1 {_spread(top1)}, seeds {seeds}. The table is of the run with seed {record.seed}, whose weights these are; in "
        "brackets, mean and standard deviation of all."
    )


def _cells(row: Row, first: Row, about: Mapping[str, Any], subject: Subject) -> list[str]:
    share = "" if row is first else f" ({row.macs / first.macs:.1%})"
    # Records of earlier versions know memory alone, which for one of their models is a file as well: the one that is here.
    stored = about["size"] if row.label == "reloaded" else row.file_bytes
    size = f"{stored:,}" if stored is not None else "–"
    others = [same for other in subject.others for same in (*other.table, *other.baselines) if same.label == row.label]
    top1 = [row.top1, *(same.top1 for same in others)]
    return [
        row.label,
        f"{row.params:,}",
        f"{row.macs:,}{share}",
        size,
        f"{row.top1:.2f}%{f' ({statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f})' if len(top1) > 1 else ''}",
        f"{row.latency_ms:.2f} ± {row.latency_iqr_ms / 2:.2f}",
    ]


def _usage(model: nn.Module) -> str:
    variant = _variant(model)
    if variant is not None and variant.bank is not None:
        return "`model.set_width(0.5)` chooses a width, `model.export(0.5)` gives an ordinary timm model of it."
    if variant is not None and variant.exits is not None and not variant.exits.truncated:
        return "`model.infer(images, exit=0)` stops at an exit, `model.infer(images, threshold=0.9)` where a sample is sure enough."
    return "The model is an ordinary timm model: `features_only=True`, `num_classes=` and `in_chans=` work."


def _measured(record: Record) -> str:
    first, where = record.table[0], record.machine
    return f"Latency: batch {first.batch_size}, {_threads(first.threads)}, {where.get('processor')}, {where.get('system')}."


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def _baselines(subject: Subject) -> str:
    if subject.record is None or not subject.record.baselines:
        variant = _variant(subject.model)
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
        ("machine", ", ".join(f"{value}" if key != "threads" else _threads(int(str(value))) for key, value in record.machine.items())),
        ("processes", str(record.world_size)),
        *record.versions.items(),
    ]


def _limits(subject: Subject) -> list[str]:
    size = timm.data.resolve_model_data_config(subject.model)["input_size"]
    limits = [f"Made for images of {size[1]}×{size[2]} with {size[0]} channel{'s' * (size[0] != 1)}; MACs are at that size."]
    if subject.record:
        limits += [
            "Accuracy is on one data set; other images, classes and shifts were not looked at.",
            "Latency is of one machine: fewer MACs are not the same share less time everywhere.",
            "The run repeats bit by bit on the same machine with the same versions; elsewhere rounding differs.",
        ]
    return limits
