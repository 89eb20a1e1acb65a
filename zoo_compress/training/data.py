"""Loaders of a data source for a given model: timm's transforms, with the preprocessing the model's `pretrained_cfg` asks for."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_loader, resolve_input_data_config, resolve_model_data_config
from timm.data.transforms import MaybeToTensor
from torch import nn
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import Normalize

from ..errors import CompressError
from .config import DataConfig
from .distributed import Processes
from .sources import Source


@dataclass(frozen=True)
class Batches:
    """The first batches of a loader as something that can be walked more than once, for data-driven criteria.

    Yields `(input, target)` of shapes `(batch, channels, height, width)` and `(batch,)`.
    """

    loader: DataLoader
    count: int

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _, batch in zip(range(self.count), self.loader, strict=False):
            yield batch[0], batch[1]


def train_loader(source: Source, config: DataConfig, model: nn.Module, processes: Processes | None = None) -> DataLoader:
    """Loader of augmented, shuffled training images, prepared as the model's `pretrained_cfg` says.

    Args:
        source: the data sets.
        config: batch size (over all processes together), workers, augmentation.
        model: gives input size, normalisation and interpolation.
        processes: the processes that train together; None for one.

    Raises:
        CompressError: the batch cannot be shared out evenly, or the images do not fill one batch.
    """
    processes = processes or Processes()
    share, rest = divmod(config.batch_size, processes.world_size)
    if rest or not share:
        raise CompressError(f"data.batch_size: expected a multiple of the {processes.world_size} processes, found {config.batch_size}")
    chosen = config.augment.model_dump(exclude_none=True)
    loader = _loader(source.train, share, config.workers, model, processes, is_training=True, **{**source.augment, **chosen})
    if len(loader) == 0:
        raise CompressError(f"data.batch_size: expected at most the {len(source.train)} training images, found {config.batch_size}")
    return loader


def eval_loader(source: Source, config: DataConfig, model: nn.Module, processes: Processes | None = None) -> DataLoader:
    """Loader of the test images in order, resized, cropped and normalised as the model's `pretrained_cfg` says."""
    return _loader(source.test, config.eval_batch_size, config.workers, model, processes or Processes(), is_training=False)


def calibration_batches(source: Source, config: DataConfig, model: nn.Module, count: int) -> Batches:
    """The first `count` batches of shuffled training images without augmentation; seed torch before walking them."""
    return Batches(_loader(source.train, config.batch_size, 0, model, Processes(), is_training=True, no_aug=True), count)


def held_out_batches(source: Source, config: DataConfig, model: nn.Module) -> Batches | None:
    """All training images that are held out, in order and without augmentation; None if none are."""
    if source.held_out is None:
        return None
    loader = _loader(source.held_out, config.eval_batch_size, config.workers, model, Processes(), is_training=False)
    return Batches(loader, len(loader))


def _loader(
    dataset: Any, batch_size: int, workers: int, model: nn.Module, processes: Processes, *, is_training: bool, **transforms: Any
) -> DataLoader:
    loader = create_loader(
        # timm hangs the transform on the data set; a shallow copy keeps loaders over the same images from changing each other's.
        copy.copy(dataset),
        batch_size=batch_size,
        is_training=is_training,
        num_workers=workers,
        distributed=processes.distributed,
        use_prefetcher=False,
        # A persistent worker carries its random state from epoch to epoch, which a resumed run could not restore.
        persistent_workers=False,
        pin_memory=processes.device.type == "cuda",
        **resolve_input_data_config(model),
        **transforms,
    )
    _normalise_batches_(loader)
    return loader


def _normalise_batches_(loader: DataLoader) -> None:
    """Let a loader turn images to normalised tensors a batch at a time, to the same bits: for small images, in half the time."""
    steps = getattr(loader.dataset.transform, "transforms", [])  # type: ignore[attr-defined]
    if [type(step) for step in steps[-2:]] == [MaybeToTensor, Normalize] and loader.collate_fn is default_collate:
        loader.dataset.transform.transforms = steps[:-2]  # type: ignore[attr-defined]
        loader.collate_fn = _Normalised(steps[-1])


class _Normalised:
    """Makes images and labels a batch of normalised tensors.

    Args:
        normalize: Torchvision's transform.
    """

    def __init__(self, normalize: Normalize) -> None:
        self.normalize = normalize

    def __call__(self, items: list[tuple[Image.Image, Any]]) -> list[torch.Tensor]:
        images, labels = zip(*items, strict=True)
        pixels = [np.asarray(image) for image in images]
        if pixels[0].dtype == np.uint8:
            raw = torch.from_numpy(np.stack(pixels))
            batch = (raw.unsqueeze(1) if raw.ndim == 3 else raw.permute(0, 3, 1, 2).contiguous()).float().div_(255)
        else:
            batch = default_collate([MaybeToTensor()(image) for image in images])
        return [self.normalize(batch), default_collate(list(labels))]


def check_fits(source: Source, model: nn.Module) -> None:
    """Refuse a model and a data source that don't go together.

    Raises:
        CompressError: the model has another number of classes, or its `pretrained_cfg` prepares images of another number of channels.
    """
    classes = getattr(model, "num_classes", None)
    if source.num_classes is not None and classes != source.num_classes:
        raise CompressError(f"model.args.num_classes: expected the {source.num_classes} classes of the data source, found {classes}")
    check_channels(model)


def check_channels(model: nn.Module) -> None:
    """Refuse a model whose `pretrained_cfg` prepares images of another number of channels than it takes.

    Raises:
        CompressError: That.
    """
    preprocessing = resolve_model_data_config(model)
    channels = getattr(model, "in_chans", 3)
    sizes = {"input_size": preprocessing["input_size"][0], **{name: len(preprocessing[name]) for name in ("mean", "std")}}
    for name, found in sizes.items():
        if found != channels:
            raise CompressError(f"model.pretrained_cfg.{name}: expected {channels} channels as in the model, found {found}")
