"""Checkpoints on disk: `config.json` as timm writes it and `model.safetensors`, nothing else."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import is_model
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from ..errors import CompressError, VariantError
from ..structure.variant import OPTIONS, Variant
from ..surgery import factors, freezing
from ..surgery.elastic import Elastic
from ..surgery.modules import classifiers, own, takes_model
from ..surgery.origin import architecture_of, is_backbone, origin, packed_of, variant_of
from ..surgery.packing import assignments, pack_state
from ..surgery.restore import present
from .roundtrip import REMEDY, check_same, first_difference
from .weights import CONFIG, DIGEST, TIED, WEIGHTS, digest

_logger = logging.getLogger(__name__)


@takes_model
def save(model: nn.Module, directory: str | Path) -> None:
    """Write a model that timm's factory made, compressed or not, so that timm can create it again.

    `timm.create_model("local-dir:<directory>", pretrained=True)` reads it, given `import zoo_compress` for compressed ones.

    What was written is created again and run beside the model on two images, in eval mode, in its own precision, device and memory format:
    every module must give the same to the bit, or nothing is saved. This takes as long as some six forward passes (what modules give is
    hashed) and, while it lasts, the memory of one more copy of the model. What only training tells apart is not compared: timm stores no
    drop rates.

    BatchNorms that timm's `freeze` froze come back frozen. A model that is not compressed otherwise then becomes one of
    zoo_compress's names, as a `<architecture>__pruned` from which nothing was removed: plain timm would not freeze them.

    Both files are complete on disk before either gets its name, weights first. Should the process die between the two renames, the
    directory holds new weights beside the old config: the config carries the hash of its own weights, so a compressed model is then
    refused rather than loaded as something it is not, until it is saved again. Other files in the directory are left alone.

    Args:
        model: The model. Tied and channels_last tensors are written as ordinary ones; of a compressed model tied ones once.
        directory: Made if it does not exist.

    Raises:
        CompressError: If timm did not make the model, cannot describe it, or makes another one of what was written (layers were replaced,
            their numbers changed, blocks merged since); the message names the first module that differs and what to do. If the directory
            cannot be written. Nothing half-written stays behind.
    """
    _check_saveable(model)
    variant = _record(model)
    directory = Path(directory)
    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as scratch:
            weights, config = Path(scratch, WEIGHTS), Path(scratch, CONFIG)
            check_same(model, _written(model, variant, weights, config))
            for path in (weights, config):
                _flush(path)
                os.replace(path, directory / path.name)
    except Exception as error:
        if made:
            with suppress(OSError):  # not empty: somebody else writes there
                directory.rmdir()
        if isinstance(error, CompressError):
            raise
        raise CompressError(f"{directory}: cannot save {type(model).__name__}: {error}") from error


def load(directory: str | Path, **kwargs: Any) -> nn.Module:
    """Create a saved model again: `timm.create_model("local-dir:<directory>", pretrained=True, **kwargs)` with clearer errors.

    Args:
        directory: Where `save` wrote it.
        **kwargs: As for `timm.create_model`: `num_classes`, `in_chans`, `features_only`, …

    Raises:
        CompressError: If there is no checkpoint, it is damaged, or timm does not know its architecture. Only safetensors are read.
    """
    directory = Path(directory)
    architecture = _architecture(directory)
    pretrained = kwargs.pop("pretrained", True)
    if pretrained and not (directory / WEIGHTS).is_file():
        raise VariantError(f"{directory}: no {WEIGHTS}; other formats are not read")
    try:
        return timm.create_model(f"local-dir:{directory}", pretrained=pretrained, **kwargs)
    except CompressError:
        raise
    except Exception as error:
        raise CompressError(f"{directory}: cannot load {architecture}: {type(error).__name__}: {error}") from error


def _architecture(directory: Path) -> str:
    path = directory / CONFIG
    if not path.is_file():
        raise VariantError(f"{directory}: expected a directory with {CONFIG} and {WEIGHTS}, found no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise VariantError(f"{path}: expected JSON: {error}") from error
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str) or not is_model(architecture):
        raise VariantError(f"{path}: architecture: expected a model timm {timm.__version__} knows, found {architecture!r}")
    return architecture


def _check_saveable(model: nn.Module) -> None:
    what = type(model).__name__
    if not isinstance(model, nn.Module):
        raise CompressError(f"save: expected a model, found {what}")
    architecture = architecture_of(model)
    if architecture is None:
        raise CompressError(
            f"save: expected a model made by timm, which can create it again by name; {what} has no architecture of its own. If there is a "
            "model of timm's inside, save that"
        )
    if is_backbone(model) or own(model, "num_classes") is None:
        raise CompressError(
            f"save: expected a whole model, found the feature extractor {what} of {architecture}. Compress and save the model without "
            "features_only=True; what is saved can be created with it"
        )
    if origin(model) is None:
        raise CompressError(f"save: expected the model that timm made, found a {what} around a {architecture}: save the model inside")
    variant = variant_of(model)
    if isinstance(model, Elastic) and variant is None:
        raise CompressError(f"save: {what} is for training only; save what its export() gives")
    if variant is not None and variant.architecture != architecture:
        raise VariantError(f"save: the model's record is of {variant.architecture}, its cfg of {architecture}")


def _record(model: nn.Module) -> Variant | None:
    """What is to be said of the model beside timm's own arguments."""
    variant = variant_of(model)
    if variant is not None:
        return _as_it_is(model, variant)
    source = origin(model)
    frozen = freezing.frozen(model)
    if not frozen or source is None:
        return None
    return Variant(method="pruned", base=source.base, base_args=source.args, sizes={}, params={}, frozen=frozen)


def _written(model: nn.Module, variant: Variant | None, weights: Path, config: Path) -> nn.Module:
    """Write both files, and create the model again."""
    tensors, tied = _tensors(model, once=variant is not None)

    def create() -> nn.Module:
        save_file(_packed(model, tensors), weights, metadata={"format": "pt"})
        config.write_text(_config(model, variant, digest(weights), tied, config), encoding="utf-8")
        shutil.copymode(config, weights)  # safetensors writes for the owner alone
        return _created(model, config.parent)

    try:
        return create()
    except CompressError:
        # Profilers leave counters behind. That they are none of the model's shows when both run.
        strange = _strange_buffers(model, config.parent) & tensors.keys()
        if not strange:
            raise
        for name in strange:
            del tensors[name]
        again = create()
    _logger.warning(f"save: {min(strange)} and {len(strange) - 1} more buffers that timm's model has none of are left out")
    return again


def _strange_buffers(model: nn.Module, directory: Path) -> set[str]:
    """Buffers that timm does not create for such a model."""
    try:
        with torch.device("meta"):
            known = timm.create_model(f"local-dir:{directory}").state_dict()
    except Exception:  # a record of another model
        return set()
    return {name for name, _ in model.named_buffers() if name not in known}


def _created(model: nn.Module, directory: Path) -> nn.Module:
    # Creating a model draws random numbers, which are not the user's.
    with torch.random.fork_rng(devices=()):
        try:
            return timm.create_model(f"local-dir:{directory}", pretrained=True)
        except Exception as error:
            reason = _why_another(model, directory) or str(error).replace(f"{directory}{os.sep}", "").replace("\n", " ")
            raise CompressError(f"save: timm creates another model by this name than the one given: {reason}. {REMEDY}") from error


def _why_another(model: nn.Module, directory: Path) -> str | None:
    """What is different about the model that timm creates without the weights, if it creates one."""
    try:
        with torch.device("meta"):
            return first_difference(model, timm.create_model(f"local-dir:{directory}"))
    except Exception:  # a record of another model
        return None


def _tensors(model: nn.Module, *, once: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state as safetensors wants it: dense, on the CPU, no two in one storage. And which names stand for which others' tensors.

    Args:
        model: The model.
        once: Whether tied tensors are written once. timm alone expects a tensor for every name, and reads ordinary models; so it is
            compressed ones for which this is done.
    """
    first: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    tensors, tied = {}, {}
    for name, value in model.state_dict().items():
        same = first.setdefault((value.data_ptr(), value.shape, value.stride(), value.dtype), name)
        if once and same != name and value.numel():
            tied[name] = same
            continue
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors, tied


def _packed(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model as they are stored, with what it says it keeps of zeros and shared values packed."""
    packed = packed_of(model)
    for name, packing in packed.items():
        if name in tensors and packing.bits is not None and assignments(tensors[name], packing) is None:
            _logger.warning(
                f"save: {name} has more than the {2**packing.bits} values of {packing.bits} bits: is it new, or trained freely?"
            )
    return pack_state(tensors, packed)


def _config(model: nn.Module, variant: Variant | None, weights_digest: str, tied: Mapping[str, str], scratch: Path) -> str:
    """What timm writes for the model, without the options that made it, which the record replaces, and with what is said of the weights."""
    save_config_for_hf(model, str(scratch))
    config = json.loads(scratch.read_text())
    args = config.get("model_args", {})
    if variant is not None:
        kept = {key: value for key, value in args.items() if key not in OPTIONS and key not in variant.base_args}
        config["architecture"] = variant.architecture
        config["model_args"] = {**kept, "variant": variant.to_dict()}
    config[DIGEST] = weights_digest
    if tied:
        config[TIED] = tied
    return json.dumps(config, indent=2)


def _as_it_is(model: nn.Module, variant: Variant) -> Variant:
    """What a record says of the model now, whose classifier may have been taken away or made anew since."""
    own = {"factors": factors.present(model, variant.factors), "frozen": freezing.frozen(model)}
    live = present(model, variant).model_copy(update=own)
    if not live.sizes:
        return live
    heads = classifiers(model, model.pretrained_cfg.get("classifier"))  # type: ignore[union-attr, operator]
    new = {
        name: (None, *map(str, weight.shape[1:]))
        for name, weight in heads.items()
        if name not in live.params or live.shape(name, weight.shape) != weight.shape
    }
    return live.model_copy(update={"params": {**live.params, **new}})


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
