"""Weights from a directory or the Hub: safetensors only, checked against the model before they are loaded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg
from timm.models._hub import download_from_hf
from torch import Tensor, nn

from ..errors import CompressError, VariantError
from .remote import CONFIG, forget, hub_errors

WEIGHTS = "model.safetensors"
_SHA256 = re.compile("[0-9a-f]{64}")

DIGEST = "weights_sha256"
"""Key in config.json: the hash of the weights it was written with."""

TIED = "tied_weights"
"""Key in config.json: names of tensors that the file of weights does not hold → the names of those they are."""


@dataclass(frozen=True)
class Stored:
    """What a file of weights holds.

    Attributes:
        tensors: By name.
        tied: Names that stand for the tensors of others.
        where: Where they come from, for messages.
    """

    tensors: dict[str, Tensor]
    tied: dict[str, str]
    where: str

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors, perhaps unpacked, with those of tied names."""
        tied = {name: tensors[other] for name, other in self.tied.items() if other in tensors and name not in tensors}
        return {**tensors, **tied}


def read(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Stored:
    """Read the weights that a timm cfg points to.

    Args:
        cfg: Its `state_dict`, `file` (a safetensors file or a directory with one) or `hf_hub_id` is used, in timm's order.
        cache_dir: Of the Hub's client.

    Raises:
        VariantError: If there are no safetensors there, the file is damaged, or it is not the one its config.json was written with.
        HubError: If the Hub did not give them.
    """
    if cfg.state_dict:
        return Stored(dict(cfg.state_dict), {}, "state_dict")
    config, weights = _locate(cfg, cache_dir)
    if config is not None and _from_hub(cfg):
        return downloaded(str(cfg.hf_hub_id), config, weights)
    return _verified(config, weights)


def downloaded(hub_id: str, config: Path, weights: Path) -> Stored:
    """Read what the Hub's client has put into its cache, and remove it from there if it is damaged.

    Args:
        hub_id: `OWNER/NAME` or `OWNER/NAME@REVISION`, for the message.
        config: Path of config.json in the cache.
        weights: Path of the weights in the cache.

    Raises:
        VariantError: If the weights are no safetensors, or not those that were announced, or not those config.json was written with.
    """
    try:
        return _verified(config, weights)
    except CompressError as error:
        # The client takes what it has for good: a damaged file would be found in the cache for ever.
        try:
            for path in (config, weights):
                forget(path)
            remedy = "It was removed from the cache: try again, it will be downloaded anew"
        except OSError as failed:
            remedy = f"It cannot be removed from the cache ({failed.strerror}): remove it, or choose another by HF_HUB_CACHE"
        raise VariantError(f"{hub_id}: {error}. {remedy}") from error


def _verified(config: Path | None, weights: Path) -> Stored:
    # In this order: saving replaces the weights first, so weights that match a config read before them cannot be another save's.
    said = _said_in(config) if config is not None else {}
    expected = said.get(DIGEST)
    tensors = _open(weights)
    blob = weights.resolve().name if weights.is_symlink() else ""
    if _SHA256.fullmatch(blob) and digest(weights) != blob:
        raise VariantError(f"{weights}: not the file that the Hub announced (expected sha256 {blob[:12]}…): damaged on its way")
    if expected is not None and (found := digest(weights)) != expected:
        raise VariantError(
            f"{weights}: not the file that {CONFIG} was written with (expected sha256 {expected[:12]}…, found {found[:12]}…): "
            f"damaged, or a save was interrupted; save again, or remove {DIGEST!r} from {CONFIG} to take them as they are"
        )
    return Stored(tensors, said.get(TIED, {}), str(weights))


def _from_hub(cfg: PretrainedCfg) -> bool:
    return bool(cfg.hf_hub_id) and (cfg.source == "hf-hub" or not cfg.file)


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def check(model: nn.Module, state: Mapping[str, Tensor], where: str, *, strict: bool, adapted: Collection[str] = ()) -> None:
    """Compare names, shapes and kinds of tensors with what a model expects.

    Precision may differ (timm loads float16 into float32), kind may not.

    Args:
        model: The model to load into.
        state: The tensors.
        where: Where they come from.
        strict: Whether tensors the model does not have are an error.
        adapted: Names that timm adapts or leaves out because the model has other classes or input channels.

    Raises:
        VariantError: Naming the first tensor that does not fit, what was expected and what was found.
    """
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name in adapted:
            continue
        if name not in state:
            raise VariantError(f"{where}: tensor {name!r}: expected {_describe(tensor)}, found none")
        found = state[name]
        if found.shape != tensor.shape or found.is_floating_point() != tensor.is_floating_point():
            raise VariantError(f"{where}: tensor {name!r}: expected {_describe(tensor)}, found {_describe(found)}")
    for name in state:
        if strict and name not in expected and name not in adapted:
            raise VariantError(f"{where}: tensor {name!r}: expected none of that name, found {_describe(state[name])}")


def has_source(cfg: PretrainedCfg) -> bool:
    """Whether a cfg says where weights are."""
    return bool(cfg.state_dict or cfg.has_weights)


def _locate(cfg: PretrainedCfg, cache_dir: str | Path | None) -> tuple[Path | None, Path]:
    """Paths of config.json, if it goes with the weights, and of the weights."""
    if cfg.file and not _from_hub(cfg):
        path = Path(cfg.file)
        if path.is_dir():
            if not (path / WEIGHTS).is_file():
                others = sorted(p.name for p in path.iterdir() if p.is_file() and p.name != CONFIG)
                raise VariantError(f"{path}: no {WEIGHTS}, found {', '.join(others[:4]) or 'nothing'}; other formats are not read")
            return path / CONFIG, path / WEIGHTS
        if not path.is_file() or path.suffix != ".safetensors":
            raise VariantError(f"{path}: expected a safetensors file or a directory with {WEIGHTS}; other formats are not read")
        return None, path
    if cfg.hf_hub_id:
        name = cfg.hf_hub_filename or WEIGHTS
        if not name.endswith(".safetensors"):
            raise VariantError(f"{cfg.hf_hub_id}: expected a safetensors file, found {name!r}; other formats are not read")
        with hub_errors(cfg.hf_hub_id, name):
            config = Path(download_from_hf(cfg.hf_hub_id, CONFIG, cache_dir=cache_dir))
            try:
                return config, Path(download_from_hf(cfg.hf_hub_id, name, cache_dir=cache_dir))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError as error:
                raise VariantError(f"{cfg.hf_hub_id}: no {name}; other formats are not read") from error
    found = f"a url ({cfg.url})" if cfg.url else "no weights"
    raise VariantError(f"{cfg.architecture}: expected a directory, a Hub repository or a safetensors file, found {found}")


def _open(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise VariantError(f"{path}: expected a whole safetensors file, found {path.stat().st_size} bytes: {error}") from error


def _said_in(config: Path) -> dict[str, Any]:
    """What config.json says of the weights beside it."""
    if not config.is_file():
        return {}
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise VariantError(f"{config}: expected JSON: {error}") from error
    said = {key: content[key] for key in (DIGEST, TIED) if content.get(key) is not None} if isinstance(content, dict) else {}
    if not isinstance(said.get(DIGEST, ""), str):
        raise VariantError(f"{config}: {DIGEST}: expected a string, found {type(said[DIGEST]).__name__}")
    tied = said.get(TIED, {})
    if not isinstance(tied, dict) or not all(isinstance(other, str) for other in tied.values()):
        raise VariantError(f"{config}: {TIED}: expected names of tensors for names of tensors, found {str(tied)[:80]}")
    return said


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
