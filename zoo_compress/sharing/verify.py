"""Does a checkpoint do what its card says? Evaluated again, on the data the card names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from huggingface_hub import ModelCard
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import CompressError
from ..plugin.hub import load
from ..plugin.weights import WEIGHTS, digest
from ..surgery.trace import analyze
from ..training.config import DataConfig, check_values
from ..training.data import check_fits, eval_loader
from ..training.loop import evaluate
from ..training.sources import open_source
from . import card
from .front_matter import KEY
from .pull import located

TOLERANCE = 0.1
"""Percentage points of accuracy, or one image where that is more: another machine rounds otherwise."""


class Facts(BaseModel):
    """What a card says for machines; see `front_matter`."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    format: Literal[1]
    weights_sha256: str
    data: DataConfig
    top1: Annotated[float, Field(ge=0, le=100)]
    params: int
    macs: int


@dataclass(frozen=True)
class Verified:
    """What was compared.

    Attributes:
        top1: Of the card, percent.
        found: Of the weights, percent.
        images: How many test images.
        params: Number of parameters, the same in both.
        macs: MACs of one image, the same in both.
    """

    top1: float
    found: float
    images: int
    params: int
    macs: int


def verify_card(name: str, *, data_root: str | None = None) -> Verified:
    """Evaluate a variant on the data of its recipe and compare with its card.

    Args:
        name: A folder, a name of the index, or `OWNER/NAME[@REVISION]` on the Hub.
        data_root: Folder of the data set, if it is not where the recipe had it.

    Raises:
        CompressError: The card's numbers are not those of the weights, it names none, or the variant or its data cannot be had.
    """
    with located(name) as folder:
        facts, shown = read_card(folder)
        model = load(folder)
        layout = analyze(model)
        wrong = [
            f"{what}: the card says {said}, found {found}"
            for what, said, found in (
                ("weights' sha256", facts.weights_sha256[:16], digest(folder / WEIGHTS)[:16]),
                ("parameters", facts.params, layout.num_params()),
                ("MACs", facts.macs, layout.macs()),
                ("top-1 in its model-index", shown, facts.top1),
            )
            if said != found
        ]
        config = facts.data.model_copy(update={} if data_root is None else {"root": data_root})
        source = open_source(config, getattr(model, "in_chans", 3))
        check_fits(source, model)
        found = evaluate(model, eval_loader(source, config, model), progress="verify")["top1"]
        images = len(source.test)
        if abs(found - facts.top1) > max(TOLERANCE, 100 / images) + 1e-9:
            wrong.append(f"top-1: the card says {facts.top1:.2f}%, found {found:.2f}% on {images} images")
    if wrong:
        raise CompressError(f"{name}: its weights do not do what its card says: {'; '.join(wrong)}")
    return Verified(facts.top1, found, images, layout.num_params(), layout.macs())


def read_card(folder: Path) -> tuple[Facts, float | None]:
    """What a folder's card says for machines, and the accuracy in its model-index.

    Raises:
        CompressError: There is no card, or not one with numbers.
    """
    path = folder / card.README
    if not path.is_file():
        raise CompressError(f"{folder}: expected a card {card.README} with numbers to compare, found none; zoo-compress card writes one")
    try:
        data = ModelCard(path.read_text(encoding="utf-8")).data
        stored = data.to_dict().get(KEY)
        check_values(stored)
        facts = Facts.model_validate_json(json.dumps(stored))
    except (ValidationError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else " ".join(str(error).split())[:200]
        raise CompressError(
            f"{path}: expected a card that zoo-compress wrote from a run, with numbers to compare under {KEY!r} ({reason})"
        ) from error
    results = getattr(data, "eval_results", None) or []
    shown = [result.metric_value for result in results if result.metric_type == "accuracy"]
    return facts, shown[0] if shown else None
