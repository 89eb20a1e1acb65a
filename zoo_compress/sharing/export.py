"""Other formats: ONNX, checked in onnxruntime, and torch.export's own program."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_input_data_config
from torch import nn

from ..errors import CompressError
from ..methods.slimmable import Slimmable
from ..plugin.hub import load
from ..surgery.exits import ExitsModel
from ..surgery.modules import evaluating
from ..training.checkpoint import scratch_beside
from ..training.config import DataConfig
from ..training.data import check_fits, eval_loader
from ..training.sources import open_source
from .pull import located
from .verify import read_card

TOLERANCE = 1e-4
"""Largest difference of an output from the model's own, relative to the largest output above 1."""

IMAGES = 8


@dataclass(frozen=True)
class Exported:
    """What was compared.

    Attributes:
        difference: Largest difference of outputs, see `TOLERANCE`.
        images: How many images, batches of one among them.
        real: Whether they were images of a data source, not noise.
        size: Bytes of the file.
    """

    difference: float
    images: int
    real: bool
    size: int


def open_for_export(name: str, source: str | None = None, data_root: str | None = None) -> tuple[nn.Module, DataConfig | None]:
    """A model by name or folder, and the data to compare on: the given source, or the one its card names.

    Raises:
        CompressError: There is no such model.
    """
    with located(name) as folder:
        model = load(folder).eval()
        if source is not None:
            return model, DataConfig(source=source, root=data_root)
        try:
            data = read_card(folder)[0].data
        except CompressError:
            return model, None  # a card is not needed for this
        return model, data if data_root is None else data.model_copy(update={"root": data_root})


def part(model: nn.Module, width: float | None = None, exit: int | None = None) -> nn.Module:
    """A model without choices, for formats that know none: of a slimmable network one width, of a network with early exits one end.

    Args:
        model: Any model; of one that is neither, nothing is a part.
        width: Fraction of the width; None takes a slimmable network's chosen one.
        exit: Number of an early exit, from 0; None takes the network's own end.

    Raises:
        CompressError: It has no widths or no exits, or not that one.
    """
    if isinstance(model, Slimmable):
        return model.export(width, exit=exit)
    if width is not None:
        raise CompressError(f"width: expected none, {type(model).__name__} is not slimmable, found {width:g}")
    if exit is None:
        return model
    if not isinstance(model, ExitsModel):
        raise CompressError(f"exit: expected none, {type(model).__name__} has no early exits, found {exit}")
    return model.export(exit)


def comparison_images(model: nn.Module, data: DataConfig | None, count: int = IMAGES) -> torch.Tensor:
    """Images to compare outputs on: the first test images of a data source, prepared as the model wants them, or noise.

    Returns:
        Tensor (count, channels, height, width).

    Raises:
        CompressError: The model takes no images in single precision, as data sources give them, or does not fit the source.
    """
    other = next((name for name, tensor in model.named_parameters() if tensor.is_floating_point() and tensor.dtype != torch.float32), None)
    if other is not None:
        found = str(model.get_parameter(other).dtype).removeprefix("torch.")
        raise CompressError(f"{type(model).__name__}: expected a model in float32, found {other!r} in {found}; export model.float()")
    if data is None:
        return torch.randn(count, *resolve_input_data_config(model)["input_size"], generator=torch.Generator().manual_seed(0))
    source = open_source(data, getattr(model, "in_chans", 3))
    check_fits(source, model)
    loader = eval_loader(source, data.model_copy(update={"eval_batch_size": count, "workers": 0}), model)
    return next(iter(loader))[0]


def export_onnx(model: nn.Module, path: str | Path, data: DataConfig | None = None) -> Exported:
    """Write a model as ONNX, any number of images at a time, and compare its outputs in onnxruntime.

    Args:
        model: In eval mode or not; it is not changed.
        path: The file. It appears once it was compared.
        data: Where images to compare on come from; noise unless given.

    Raises:
        CompressError: The extra `onnx` is missing, the model cannot be exported, or its outputs differ by more than `TOLERANCE`.
    """
    missing = [package for package in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(package) is None]
    if missing:
        raise CompressError(f"exporting to ONNX needs {', '.join(missing)}: pip install 'zoo_compress[onnx]'")
    import onnxruntime

    images = comparison_images(model, data)
    path = Path(path)
    with scratch_beside(path) as scratch, quiet():
        program = _program(model, images)
        file = scratch / path.name
        try:
            torch.onnx.export(program, (), str(file), dynamo=True, external_data=False, verbose=False, input_names=["images"])
            session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        except Exception as error:
            raise CompressError(f"{type(model).__name__}: cannot be exported to ONNX: {_reason(_root(error))}") from error
        name = session.get_inputs()[0].name
        exported = _compared(model, images, lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0]), data, file)
        os.replace(file, path)
    return exported


def export_program(model: nn.Module, path: str | Path | None = None, data: DataConfig | None = None) -> Exported:
    """Export a model with `torch.export`, any number of images at a time, and compare its outputs.

    Args:
        model: In eval mode or not; it is not changed.
        path: Where to write the program (`.pt2`), which appears once it was compared; compared only, unless given.
        data: Where images to compare on come from; noise unless given.

    Raises:
        CompressError: The model cannot be exported, or its outputs differ by more than `TOLERANCE`.
    """
    images = comparison_images(model, data)
    if path is None:
        return _compared(model, images, _program(model, images).module(), data, None)
    path = Path(path)
    with scratch_beside(path) as scratch:
        program = _program(model, images)
        file = scratch / path.name
        torch.export.save(program, str(file))
        exported = _compared(model, images, program.module(), data, file)
        os.replace(file, path)
    return exported


def _program(model: nn.Module, images: torch.Tensor) -> torch.export.ExportedProgram:
    # A pass that ends early leaves modules without their hooks, by which torch follows it unless it reads the code (`strict`).
    strict = isinstance(model, ExitsModel) and model.record.truncated
    try:
        with evaluating(model):
            return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=strict)
    except Exception as error:
        raise CompressError(f"{type(model).__name__}: torch.export cannot export it: {_reason(error)}") from error


def _compared(model: nn.Module, images: torch.Tensor, other: Any, data: DataConfig | None, file: Path | None) -> Exported:
    with evaluating(model), torch.no_grad():
        expected = model(images)
        # One image alone, too: a batch size that was written in would show.
        found = torch.cat([other(images[:1]), other(images[1:])])
    if found.shape != expected.shape:
        raise CompressError(f"{type(model).__name__}: expected outputs of shape {tuple(expected.shape)}, exported {tuple(found.shape)}")
    difference = ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
    if not difference <= TOLERANCE:
        raise CompressError(
            f"{type(model).__name__}: expected outputs within {TOLERANCE:g} of the model's, exported ones differ by {difference:.1e}"
        )
    return Exported(difference, len(images), data is not None, file.stat().st_size if file else 0)


class quiet:
    """The exporter reports its passes as warnings; only its errors are of use."""

    def __enter__(self) -> None:
        self._before = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(self._before)


def _root(error: BaseException) -> BaseException:
    """What an error comes from: the exporter's own only say in which of its steps it was."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
