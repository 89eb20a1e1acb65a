"""The stored record of a compressed model: what a checkpoint says about its structure, beside its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import starmap, zip_longest
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError, field_validator, model_validator

from ..errors import VariantError
from . import terms
from .bank import Bank
from .exits import Exits
from .factors import Factor
from .layout import Layout, parse
from .packed import Packing
from .stored import MAX_ENTRIES, AxisName, Name, Path, Size, TermText

VERSION: Literal[1] = 1

OPTIONS = frozenset(
    {"variant", "keep", "macs", "params", "latency", "criterion", "scope", "round_to", "min_keep", "exclude", "seed", "base_tag"}
    | {"batch_size", "threads", "widths", "universal", "r", "s", "exits", "grid"}
    | {"density", "pattern", "bits", "energy", "scheme", "multiplier"}
)
"""Arguments of the plugin's entrypoints that say how to compress; never arguments of a base."""

# Parsing a term is quadratic in its length: this many squared characters take seconds at worst, and DenseNets need a quarter of them.
MAX_PARSE_WORK = 2**28
MAX_JSON = 65_536

Dims = Annotated[tuple[TermText | None, ...], Field(strict=False, max_length=16)]
Dimensions = tuple[str | None, ...]
Scalar = str | int | float | bool | None

# Arguments of timm's factory that choose weights or wrap the model: a record describes a structure and must not reach them.
_FACTORY = ("pretrained", "feature", "out_indices", "checkpoint_path", "cache_dir")


class Variant(BaseModel):
    """How a compressed model differs from its base, in the notation of `Layout`.

    Attributes:
        version: Format of the record.
        method: What made it, such as `pruned`.
        base: timm architecture it was made of, without a tag.
        base_args: Construction arguments of the base that are JSON values. The ones timm tracks on every model and stores itself
            (`num_classes`, `in_chans`, `global_pool`, `img_size`) and drop rates are left out; whoever loads may override any.
        sizes: Axis → its size now.
        params: Parameter or buffer name → one term per dimension, for those whose shape may differ from the base's. None is a dimension
            as the base has it, whatever number of classes or input channels that base is built for.
        attributes: `module.path.attr` (`attr[i]`, `attr[i].key`) → term whose size it holds.
        scales: `module.path.attr` → term `t` of a float attribute that holds size(t) ** -0.5.
        bank: What runs at many widths, in a network that does.
        exits: Early exits; their heads are part of what `params` describes.
        removed: Paths of residual blocks of the base that are the identity.
        packed: Parameter name → which zeros and shared values it keeps, for those that keep any.
        factors: Path of a layer of the base → the two that take its place, which `params` describes then.
        frozen: Paths of BatchNorms of the base that are frozen, as timm's `freeze_batch_norm_2d` makes them.
        provenance: Recipe, seed, versions, hash of the parent checkpoint, … as JSON scalars.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = VERSION
    method: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9]*(_[a-z0-9]+)*$", max_length=32)]
    base: Name
    base_args: dict[Name, JsonValue] = Field(default={})
    sizes: dict[AxisName, Size] = Field(max_length=MAX_ENTRIES)
    params: dict[Path, Dims] = Field(max_length=MAX_ENTRIES)
    attributes: dict[Path, TermText] = Field(default={}, max_length=MAX_ENTRIES)
    scales: dict[Path, TermText] = Field(default={}, max_length=MAX_ENTRIES)
    bank: Bank | None = None
    exits: Exits | None = None
    removed: Annotated[tuple[Path, ...], Field(strict=False, max_length=MAX_ENTRIES)] = ()
    packed: dict[Path, Packing] = Field(default={}, max_length=MAX_ENTRIES)
    factors: dict[Path, Factor] = Field(default={}, max_length=MAX_ENTRIES)
    frozen: Annotated[tuple[Path, ...], Field(strict=False, max_length=MAX_ENTRIES)] = ()
    provenance: dict[Name, Scalar] = Field(default={}, max_length=256)

    @field_validator("base_args")
    @classmethod
    def _only_structure(cls, args: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for name in args:
            if name.startswith(_FACTORY) or name in OPTIONS:
                raise ValueError(f"{name!r} is an argument of the factory, not of a model")
        return args

    @field_validator("base_args", "provenance")
    @classmethod
    def _bounded(cls, value: dict[str, Any]) -> dict[str, Any]:
        length = len(json.dumps(value, allow_nan=False))
        if length > MAX_JSON:
            raise ValueError(f"at most {MAX_JSON} characters of JSON, found {length}")
        return value

    @model_validator(mode="after")
    def _terms_are_known(self) -> Variant:
        distinct = set(self.terms())
        work = sum(len(term) ** 2 for term in distinct)
        if work > MAX_PARSE_WORK:
            raise ValueError(f"terms too long altogether: {len(distinct)} of them with {sum(map(len, distinct))} characters")
        for text in distinct:
            unknown = set(terms.axes(parse(text))) - self.sizes.keys()
            if unknown:
                raise ValueError(f"term {text[:80]!r}: axis {min(map(str, unknown))!r} has no entry in sizes")
        if self.bank is not None:
            self.bank.check(self.sizes)
        return self

    @property
    def architecture(self) -> str:
        """Name the model is registered under: `resnet18__pruned`."""
        return f"{self.base}__{self.method}"

    def terms(self) -> Iterator[str]:
        """Every term in the record."""
        for dims in self.params.values():
            yield from (term for term in dims if term is not None)
        yield from self.attributes.values()
        yield from self.scales.values()
        if self.bank is not None:
            yield from self.bank.terms()

    def size(self, term: str) -> int:
        """Size of a term at the recorded sizes of axes."""
        return terms.size(parse(term), self.sizes)

    def shape(self, name: str, base: Sequence[int]) -> tuple[int, ...]:
        """Recorded shape of a parameter or buffer whose shape in the base is `base`, with as many dimensions."""
        return tuple(n if term is None else self.size(term) for term, n in zip(self.params[name], base, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values, for `config.json`. It does not mention what the model has none of: a bank, exits, …"""
        optional = ("bank", "exits", "removed", "packed", "factors", "frozen")
        return self.model_dump(mode="json", exclude={name for name in optional if not getattr(self, name)})

    @classmethod
    def from_dict(cls, obj: object) -> Variant:
        """Read a record that may come from anywhere.

        Args:
            obj: What `to_dict` gave, usually by way of JSON.

        Raises:
            VariantError: If it is no such record, naming in one line the key, what was expected and what was found.
        """
        if not isinstance(obj, Mapping):
            raise VariantError(f"variant: expected a dict, found {type(obj).__name__}")
        version = obj.get("version")
        if isinstance(version, int) and version > VERSION:
            raise VariantError(
                f"variant.version: written by a newer zoo_compress (format {version}, this one reads up to {VERSION}); upgrade zoo_compress"
            )
        if version is None:
            raise VariantError(f"variant.version: expected {VERSION}, found nothing")
        try:
            return cls.model_validate(dict(obj))
        except ValidationError as error:
            raise VariantError(_one_line(error)) from error
        except RecursionError as error:
            raise VariantError("variant: nested too deeply") from error


def _one_line(error: ValidationError) -> str:
    """The first thing wrong: key, what was expected, what was found."""
    first, *others = error.errors(include_url=False)
    where = ".".join(["variant", *(str(part)[:80] for part in first["loc"] if part != "[key]")])
    message = first["msg"].removeprefix("Value error, ")
    found = "" if first["type"] in ("value_error", "missing") else f", found {_short(first['input'])}"
    more = f" (and {len(others)} more)" if others else ""
    return f"{where}: {message[0].lower()}{message[1:]}{found}{more}".replace("\n", " ")


def _short(value: object) -> str:
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "…"


def record(
    layout: Layout,
    sizes: Mapping[str, int],
    *,
    method: str,
    base: str,
    base_args: Mapping[str, Any] | None = None,
    previous: Variant | None = None,
    bank: Bank | None = None,
    provenance: Mapping[str, Scalar] | None = None,
) -> Variant:
    """Write down a choice of widths as a record against the base architecture.

    Args:
        layout: Layout of the model that was resized.
        sizes: Axis → its size after the choice, for every axis; `Layout.sizes` gives it.
        method: What made it, such as `pruned`.
        base: timm architecture, without a tag.
        base_args: Its construction arguments; see `Variant.base_args`.
        previous: The record of the model that was resized, if that one was compressed before. What it had reshaped and the layout
            regards as frozen, or does not know, is written with plain numbers.
        bank: See `Variant.bank`.
        provenance: See `Variant.provenance`.

    Raises:
        VariantError: If something does not fit into a record.
    """
    free = set(layout.free)

    def stored(term: str | None, earlier: str | None) -> str | None:
        if term is not None and any(axis in free for axis in terms.axes(parse(term))):
            return str(terms.substitute(parse(term), lambda axis: axis if axis in free else sizes[axis]))
        return None if earlier is None or previous is None else str(previous.size(earlier))

    def entries(now: Mapping[str, Dimensions], before: Mapping[str, Dimensions]) -> dict[str, Dimensions]:
        out = {}
        for name in {**now, **before}:
            dims = tuple(starmap(stored, zip_longest(now.get(name, ()), before.get(name, ()))))
            if any(term is not None for term in dims):
                out[name] = dims
        return out

    def single(now: Mapping[str, str], before: Mapping[str, str]) -> dict[str, str | None]:
        wrapped = entries({path: (term,) for path, term in now.items()}, {path: (term,) for path, term in before.items()})
        return {path: term for path, (term,) in wrapped.items()}

    return Variant.from_dict(
        {
            "version": VERSION,
            "method": method,
            "base": base,
            "base_args": dict(base_args or {}),
            "sizes": {name: int(sizes[name]) for name in layout.free},
            "params": entries(layout.params, previous.params if previous else {}),
            "attributes": single(layout.attributes, previous.attributes if previous else {}),
            "scales": single(layout.scales, previous.scales if previous else {}),
            "bank": None if bank is None else bank.model_dump(),
            "exits": previous.exits.model_dump(mode="json") if previous and previous.exits else None,
            "removed": previous.removed if previous else (),
            # A bank is trained as a whole: what it had of zeros and shared values is not kept.
            "packed": {name: p.model_dump() for name, p in previous.packed.items()} if previous and bank is None else {},
            "factors": {path: factor.model_dump() for path, factor in previous.factors.items()} if previous else {},
            "provenance": dict(provenance or {}),
        }
    )
