"""Data sources by name: training and evaluation images, and what a model should know of them."""

import gzip
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..errors import CompressError
from .config import DataConfig

FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts its four files."""

_MAX_IDX_ITEMS = 10_000_000
# Side in pixels a model sees, mean and standard deviation of the training images with values from 0 to 1.
_STATISTICS = {"digits": (32, 0.305, 0.376), "fashion_mnist": (28, 0.286, 0.353)}


@dataclass(frozen=True)
class Source:
    """Two data sets and what they imply.

    Attributes:
        train: training images; items are `(image, class index)` once a loader has set `transform`.
        test: images that metrics are computed on.
        num_classes: number of classes, or None when the source does not say.
        held_out: training images that are not trained on; None if there are none. `train` is without them.
        augment: default augmentation, as arguments of `timm.data.create_transform`.
    """

    train: Any
    test: Any
    num_classes: int | None = None
    held_out: Any = None
    augment: Mapping[str, Any] = field(default_factory=dict)


class Part(Dataset):
    """Some images of a data set, with a transform of their own.

    Args:
        dataset: gives `(image, class index)` as long as it has no transform.
        indices: which of its images (images,).
    """

    def __init__(self, dataset: Any, indices: np.ndarray):
        self.dataset = dataset
        self.indices = indices
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.dataset[int(self.indices[index])]
        return (self.transform(image) if self.transform else image), label


class ArrayDataset(Dataset):
    """Grey images held in memory.

    Args:
        images: uint8 array (images, height, width).
        labels: integer array (images,).
        in_chans: 1 gives grey PIL images, 3 gives RGB ones.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, in_chans: int):
        self.images = images
        self.labels = labels
        self.mode = _image_mode(in_chans)
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert(self.mode)
        return (self.transform(image) if self.transform else image), int(self.labels[index])


def open_source(config: DataConfig, in_chans: int = 3) -> Source:
    """Open a data source.

    Args:
        config: names the source; see `DataConfig`.
        in_chans: channels of the model's input; grey sources give 1 or 3, others 1 (grey) or 3 (RGB).

    Raises:
        CompressError: the source does not exist, cannot be read, or holds something else than expected.
    """
    if in_chans not in (1, 3):
        raise CompressError(f"data source {config.source!r}: expected a model with 1 or 3 input channels, found {in_chans}")
    return _hold_out(_open(config, in_chans), config)


def _open(config: DataConfig, in_chans: int) -> Source:
    kind, colon, path = config.source.partition(":")
    if colon and kind == "imagefolder":
        return _imagefolder(Path(path).expanduser(), config.class_map, in_chans)
    if config.class_map is not None:
        raise CompressError(f"data.class_map: expected it beside imagefolder:PATH, found it beside {config.source!r}")
    if config.source in SOURCES:
        return SOURCES[config.source](config, in_chans)
    return _timm_dataset(config, in_chans)


def _hold_out(source: Source, config: DataConfig) -> Source:
    """Take images out of training: evenly spaced ones, so that sorted classes all have their part, and nothing is drawn."""
    if not config.held_out:
        return source
    if not hasattr(source.train, "__len__") or not hasattr(source.train, "__getitem__"):
        raise CompressError(f"data.held_out: expected a data source with numbered images, found {config.source!r}, which is a stream")
    total = len(source.train)
    if config.held_out >= total:
        raise CompressError(f"data.held_out: expected fewer than the {total} training images, found {config.held_out}")
    held = np.arange(config.held_out) * total // config.held_out
    rest = np.setdiff1d(np.arange(total), held)
    return replace(source, train=Part(source.train, rest), held_out=Part(source.train, held))


def default_pretrained_cfg(source: str, in_chans: int) -> dict[str, Any]:
    """Preprocessing of a model trained from scratch on a source, as a timm `pretrained_cfg`; empty if the model's own will do."""
    if source not in _STATISTICS:
        return {}
    size, mean, std = _STATISTICS[source]
    return {
        "input_size": (in_chans, size, size),
        "mean": (mean,) * in_chans,
        "std": (std,) * in_chans,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }


def stratified_split(labels: np.ndarray, every: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Split by position: of each class, every fifth image is for testing. No randomness, so no version of anything can change it.

    Args:
        labels: class indices (images,).
        every: one test image in this many.

    Returns:
        Sorted indices of training images and of test images.
    """
    is_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        is_test[np.flatnonzero(labels == label)[every - 1 :: every]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes, the format of MNIST.

    Args:
        path: the `.gz` file.
        shape: shape of one item: `(28, 28)` for images, `()` for labels.

    Returns:
        uint8 array (items, *shape).

    Raises:
        CompressError: the file is missing, damaged, truncated, too long, or of another type or shape.
    """
    header_size = 4 + 4 * (1 + len(shape))
    try:
        with gzip.open(path, "rb") as file:
            header = file.read(header_size)
            if len(header) < header_size:
                raise CompressError(f"{path}: expected an idx header of {header_size} bytes, found {len(header)}")
            magic, count, *found = struct.unpack(f">{2 + len(shape)}I", header)
            expected = 0x0800 + 1 + len(shape)
            if magic != expected:
                raise CompressError(f"{path}: expected idx magic number {expected:#010x}, found {magic:#010x}")
            if tuple(found) != shape or not 0 < count <= _MAX_IDX_ITEMS:
                raise CompressError(f"{path}: expected up to {_MAX_IDX_ITEMS} items of shape {shape}, found {count} of {tuple(found)}")
            size = count * int(np.prod(shape, dtype=np.int64))
            # One byte more than announced tells a longer file without ever inflating it whole.
            data = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise CompressError(f"{path}: expected a gzipped idx file: {error}") from error
    if len(data) != size:
        raise CompressError(f"{path}: expected {size} bytes of data, found {'more' if len(data) > size else len(data)}")
    return np.frombuffer(data, dtype=np.uint8).reshape(count, *shape)


def _digits(config: DataConfig, in_chans: int) -> Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise CompressError("data source 'digits' needs scikit-learn: pip install 'zoo_compress[demo]'") from error
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    train, test = stratified_split(bunch.target)
    return Source(
        train=ArrayDataset(images[train], bunch.target[train], in_chans),
        test=ArrayDataset(images[test], bunch.target[test], in_chans),
        num_classes=10,
        augment={"scale": (0.7, 1.0), "ratio": (0.8, 1.25), "hflip": 0.0, "color_jitter": None},
    )


def _fashion_mnist(config: DataConfig, in_chans: int) -> Source:
    folder = _fashion_mnist_folder(config.root)
    arrays: dict[str, ArrayDataset] = {}
    for split in ("train", "t10k"):
        images = read_idx(folder / f"{split}-images-idx3-ubyte.gz", (28, 28))
        labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz", ())
        if len(images) != len(labels):
            raise CompressError(f"{folder}: expected as many {split} labels as images, found {len(labels)} and {len(images)}")
        if labels.max() > 9:
            raise CompressError(f"{folder}: expected {split} labels from 0 to 9, found {labels.max()}")
        arrays[split] = ArrayDataset(images, labels, in_chans)
    return Source(
        train=arrays["train"],
        test=arrays["t10k"],
        num_classes=10,
        augment={"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.5, "color_jitter": None},
    )


def _fashion_mnist_folder(root: str | None) -> Path:
    first = "train-images-idx3-ubyte.gz"
    if root is not None:
        folder = Path(root).expanduser()
        candidates = [folder, folder / "FashionMNIST" / "raw"]
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zoo_compress"
        candidates = [FASHION_MNIST_ROOT, folder / "FashionMNIST" / "raw"]
    for candidate in candidates:
        if (candidate / first).is_file():
            return candidate
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        raise CompressError(
            f"fashion_mnist: found no {first} in {' or '.join(map(str, candidates))}, and the download failed ({error}); "
            "on Debian: apt-get install dataset-fashion-mnist"
        ) from error
    return folder / "FashionMNIST" / "raw"


def _imagefolder(path: Path, class_map: str | None, in_chans: int) -> Source:
    from timm.data import create_dataset

    numbers = None if class_map is None else _class_map(Path(class_map).expanduser())

    if not path.is_dir():
        raise CompressError(f"imagefolder:{path}: expected a folder, found {'a file' if path.exists() else 'nothing'}")
    datasets = []
    for split, names in _SPLIT_FOLDERS.items():
        # Looked up here because timm falls back to the folder itself, and would evaluate on the training images.
        folder = next((path / name for name in names if (path / name).is_dir()), None)
        if folder is None:
            raise CompressError(f"imagefolder:{path}: expected a folder of {split} images in it, named {' or '.join(names)}")
        if numbers is not None:
            found = {Path(parent).name for parent, _, files in os.walk(folder, followlinks=True) if any(map(_is_image, files))}
            if odd := sorted(found - numbers.keys())[:3]:  # whose images timm would leave out without a word
                raise CompressError(
                    f"data.class_map: {class_map}: expected the names of all folders, found none for {', '.join(odd)} of {folder}"
                )
        try:
            datasets.append(
                create_dataset("", root=str(folder), search_split=False, class_map=numbers or {}, input_img_mode=_image_mode(in_chans))
            )
        except (OSError, RuntimeError) as error:
            raise CompressError(f"imagefolder:{path}: {error}") from error
    train, test = datasets
    classes, test_classes = train.reader.class_to_idx, test.reader.class_to_idx
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))[:3]
        raise CompressError(f"imagefolder:{path}: expected the same classes in both splits, found only in one: {', '.join(odd)}")
    return Source(train=train, test=test, num_classes=len(classes))


def _is_image(name: str) -> bool:
    from timm.data import is_img_extension

    return is_img_extension(Path(name).suffix.lower())


def _class_map(file: Path) -> dict[str, int]:
    """Class name → its number, the line it is on."""
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CompressError(f"data.class_map: {file}: expected a text file of class names, one a line ({error})") from error
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if not names or twice:
        raise CompressError(f"data.class_map: {file}: expected distinct class names, found {f'{twice} twice' if twice else 'none'}")
    return {name: number for number, name in enumerate(names)}


def _timm_dataset(config: DataConfig, in_chans: int) -> Source:
    from timm.data import create_dataset

    def open_split(split: str, is_training: bool) -> Any:
        return create_dataset(
            config.source,
            root=config.root,
            split=split,
            is_training=is_training,
            download=config.download,
            batch_size=config.batch_size,
            input_img_mode=_image_mode(in_chans),
        )

    # Without a prefix timm ignores the name and reads `root` as a folder, so that a misspelt name would train on whatever is there.
    if "/" not in config.source:
        raise CompressError(f"data source: expected {', '.join(SOURCES)}, imagefolder:PATH or timm's prefix/name, found {config.source!r}")
    try:
        train, test = open_split(config.train_split, True), open_split(config.eval_split, False)
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CompressError(f"data source {config.source!r}: timm cannot open it: {reason}") from error
    classes = getattr(train, "classes", None) or getattr(getattr(train, "reader", None), "class_to_idx", None)
    return Source(train=train, test=test, num_classes=len(classes) if classes else None)


def _image_mode(in_chans: int) -> str:
    return "L" if in_chans == 1 else "RGB"


_SPLIT_FOLDERS = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "eval", "evaluation")}

SOURCES: dict[str, Callable[[DataConfig, int], Source]] = {"digits": _digits, "fashion_mnist": _fashion_mnist}
