"""The index of variants: which there are, where their weights are, and what was measured. Shipped as `index.json` beside this file."""

from __future__ import annotations

import fnmatch
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from ..errors import CompressError

FOLDER = Path(__file__).parent
INDEX = FOLDER / "index.json"
CHECKPOINTS = FOLDER / "checkpoints"

Count = Annotated[int, Field(ge=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
VariantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]+__[a-z0-9_]+\.[A-Za-z0-9_]+$", max_length=192)]
RepoId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$", max_length=256)]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
RecipeName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*$", max_length=192)]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][\w.-]*$", max_length=192)]


class Entry(BaseModel):
    """One variant.

    Attributes:
        name: `<base>__<method>.<tag>`, the name timm knows it by.
        dataset: Data source it was evaluated on.
        top1: Top-1 accuracy on that source's test images, percent.
        macs: Multiply-accumulates of one image.
        params: Number of parameters.
        size: Bytes of its model.safetensors.
        sha256: Hash of that file.
        base_top1: Of the model it was made of, percent. Where training itself makes this of it: of the same trained without, None where
            that was not measured.
        base_macs: Of the model it was made of.
        base_params: Of the model it was made of.
        recipe: File in `recipes/` that makes it.
        checkpoint: Folder in `zoo/checkpoints` of this package, if its weights are shipped.
        hub_id: `OWNER/NAME`, perhaps with `@REVISION`, if it was published.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: VariantName
    dataset: str
    top1: Percent
    macs: Count
    params: Count
    size: Count
    sha256: Hash
    base_top1: Percent | None = None
    base_macs: Count
    base_params: Count
    recipe: RecipeName | None = None
    checkpoint: FileName | None = None
    hub_id: RepoId | None = None

    @model_validator(mode="after")
    def _is_somewhere(self) -> Entry:
        if not (self.recipe or self.checkpoint or self.hub_id):
            raise ValueError(f"{self.name}: expected a recipe, a checkpoint or a hub_id, found none: nobody could have it")
        return self

    @property
    def architecture(self) -> str:
        """`<base>__<method>`."""
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        """What follows the dot in the name."""
        return self.name.partition(".")[2]

    @property
    def base(self) -> str:
        """timm architecture it was made of."""
        return self.architecture.rpartition("__")[0]

    @property
    def method(self) -> str:
        """What made it, such as `pruned`."""
        return self.architecture.rpartition("__")[2]

    @property
    def folder(self) -> Path | None:
        """Where its shipped checkpoint is."""
        return CHECKPOINTS / self.checkpoint if self.checkpoint else None


def entry(**values: Any) -> Entry:
    """An entry of plain values.

    Raises:
        CompressError: Naming the first that an index cannot hold.
    """
    try:
        return Entry(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "entry"
        raise CompressError(f"{where}: {first['msg']}, found {first['input']!r}") from error


class Index(BaseModel):
    """All variants, names distinct."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    variants: Annotated[tuple[Entry, ...], Field(strict=False)] = ()

    @field_validator("variants")
    @classmethod
    def _distinct(cls, variants: tuple[Entry, ...]) -> tuple[Entry, ...]:
        names = [entry.name for entry in variants]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"{twice} is there twice")
        return variants


@dataclass(frozen=True)
class VariantInfo:
    """One line of `list_variants`.

    Attributes:
        name: What `timm.create_model` takes, given `pretrained=True`, where `source` is no recipe.
        base: timm architecture it was made of.
        method: What made it.
        dataset: Data source of `top1`.
        top1: Top-1 accuracy, percent.
        macs: Multiply-accumulates of one image.
        params: Number of parameters.
        size: Bytes of its weights.
        source: `packaged`, `hf-hub:OWNER/NAME` or `recipes/FILE`.
    """

    name: str
    base: str
    method: str
    dataset: str
    top1: float
    macs: int
    params: int
    size: int
    source: str


def read(path: str | Path | None = None) -> Index:
    """Read an index; the shipped one unless a path is given.

    Raises:
        CompressError: It is not an index that this version reads, with the key that is wrong.
    """
    return _shipped() if path is None else _parse(Path(path))


@functools.cache
def _shipped() -> Index:
    return _parse(INDEX)


def _parse(path: Path) -> Index:
    try:
        return Index.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CompressError(f"{path}: cannot read the index: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        raise CompressError(f"{path}: expected an index of variants: {where}: {first['msg']}") from error


def dump(index: Index) -> str:
    """The text of an index file."""
    return index.model_dump_json(indent=1, exclude_none=True) + "\n"


def list_variants(pattern: str = "*") -> list[VariantInfo]:
    """Variants of the index that comes with the package.

    Args:
        pattern: Glob on names, or on the base's name: `resnet*`, `*__pruned.*`.

    Returns:
        One line each, sorted by name.
    """
    return [_info(entry) for entry in sorted(read().variants, key=lambda entry: entry.name) if matches(entry, pattern)]


def matches(entry: Entry, pattern: str) -> bool:
    """Whether a glob means this variant."""
    return fnmatch.fnmatchcase(entry.name, pattern) or fnmatch.fnmatchcase(entry.base, pattern)


def find(name: str) -> Entry | None:
    """The variant of that name, or None."""
    return next((entry for entry in read().variants if entry.name == name), None)


def repo_name(entry: Entry) -> str:
    """Name of the variant's repository on the Hub: its own, with what the Hub does not admit replaced."""
    return re.sub(r"-{2,}|\.{2,}", "-", entry.name)


def _info(entry: Entry) -> VariantInfo:
    source = "packaged" if entry.checkpoint else f"hf-hub:{entry.hub_id}" if entry.hub_id else f"recipes/{entry.recipe}"
    return VariantInfo(entry.name, entry.base, entry.method, entry.dataset, entry.top1, entry.macs, entry.params, entry.size, source)
