"""Eight bits for deployment: onnxruntime's static quantization of an exported model, with accuracy and time beside the float model's.

Weights are int8 with a scale for each output channel, activations uint8 with one scale a tensor, found on training images (Jacob et al.
2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, section 2). Kernels are onnxruntime's.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..errors import CompressError
from ..training.checkpoint import scratch_beside
from ..training.config import DataConfig
from ..training.data import calibration_batches, check_fits, eval_loader
from ..training.sources import open_source
from .export import export_onnx, quiet

RUNS = 50


@dataclass(frozen=True)
class Side:
    """One of the two files.

    Attributes:
        size: Bytes.
        top1: Top-1 accuracy on the test images, percent.
        milliseconds: Median time of one image on one thread; runs of both files take turns.
        iqr: Distance between the quartiles of that.
    """

    size: int
    top1: float
    milliseconds: float
    iqr: float


def export_int8(model: nn.Module, path: str | Path, data: DataConfig, *, batches: int = 8) -> tuple[Side, Side]:
    """Write a model as ONNX in eight bits, and compare it with the same in 32.

    Args:
        model: In eval mode or not; it is not changed.
        path: The file. It appears once everything was measured.
        data: Training images give the ranges of activations, test images the accuracy.
        batches: Training batches to look at.

    Returns:
        The float file, which is not kept, and the int8 file.

    Raises:
        CompressError: The extra `onnx` is missing, there are no batches to look at, or the model cannot be exported or quantized.
    """
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise CompressError(f"batches: expected a positive number of training batches, found {batches!r}")
    path = Path(path)
    with scratch_beside(path) as scratch:
        whole, prepared, small = (scratch / name for name in ("float.onnx", "prepared.onnx", path.name))
        export_onnx(model, whole, data)
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        source = open_source(data, getattr(model, "in_chans", 3))
        check_fits(source, model)
        torch.manual_seed(0)
        images = (batch for batch, _ in calibration_batches(source, data, model, batches))
        try:
            with quiet():
                quant_pre_process(str(whole), str(prepared), skip_symbolic_shape=True)
                quantize_static(
                    str(prepared),
                    str(small),
                    _reader(str(prepared), images),
                    quant_format=QuantFormat.QDQ,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    per_channel=True,
                )
        except Exception as error:  # onnxruntime raises what it likes; the model is what it cannot take
            reason = next(iter(str(error).splitlines()), "")
            raise CompressError(f"{type(model).__name__}: onnxruntime cannot quantize it: {type(error).__name__}: {reason}") from error
        sides = _measured([whole, small], eval_loader(source, data, model))
        os.replace(small, path)
    return sides


def _reader(file: str, images: Iterator[torch.Tensor]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    name = _session(file).get_inputs()[0].name

    class Reader(CalibrationDataReader):
        def get_next(self) -> Any:
            batch = next(images, None)
            return None if batch is None else {name: batch.numpy()}

    return Reader()


def _session(file: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _measured(files: list[Path], loader: Any) -> tuple[Side, Side]:
    sessions = [_session(str(file)) for file in files]
    right, seen = [0, 0], 0
    image = None
    for images, target in tqdm(loader, desc="int8 and float", leave=False, disable=None, unit="batch"):
        image = images[:1].numpy() if image is None else image
        seen += len(target)
        for i, session in enumerate(sessions):
            logits = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
            right[i] += int((torch.from_numpy(logits).argmax(1) == target).sum())
    times: list[list[float]] = [[], []]
    for _ in range(RUNS):
        for i, session in enumerate(sessions):
            start = time.perf_counter()
            session.run(None, {session.get_inputs()[0].name: image})
            times[i].append(1000 * (time.perf_counter() - start))
    found = []
    for file, count, taken in zip(files, right, times, strict=True):
        low, middle, high = statistics.quantiles(taken, n=4)
        found.append(Side(file.stat().st_size, 100 * count / seen, middle, high - low))
    return found[0], found[1]
