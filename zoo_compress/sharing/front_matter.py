"""What a model card says to machines: its front matter, with the model-index and what `verify` compares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from timm.models import get_pretrained_cfg, parse_model_name

from ..plugin.weights import digest
from ..record import Record, plural

FORMAT = 1
KEY = "zoo_compress"
"""Key of the card's front matter with what `verify` needs."""


def front_matter(record: Record | None, weights: Path, about: Mapping[str, Any]) -> ModelCardData:
    """The front matter of a card.

    Args:
        record: Of the run that made the model; None if there is none.
        weights: The model's file.
        about: What the card's parts share: `base`, `method`, `title`, `data`, `start`, `scratch`, `license`, `size`.
    """
    config: dict[str, Any] = {"format": FORMAT, "weights_sha256": digest(weights), "weights_bytes": about["size"]}
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
        ("latency", f"CPU latency, ms, batch {row.batch_size}, {plural(row.threads, 'thread')}", row.latency_ms),
    ]
    name = dataset(about["data"])
    # A folder may hold any part of the data set it is called after.
    part = f", {row.test_images:,} images" if row.test_images and about["data"].startswith("imagefolder:") else ""
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=name,
            dataset_name=f"{name}{part}",
            dataset_split="test",
            metric_type=kind,
            metric_name=called,
            metric_value=value,
        )
        for kind, called, value in metrics
        if not isinstance(value, float) or math.isfinite(value)
    ]
