"""Data sources: what they hold, and what they refuse."""

import gzip
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from zoo_compress.errors import CompressError
from zoo_compress.training import sources
from zoo_compress.training.config import DataConfig
from zoo_compress.training.sources import default_pretrained_cfg, open_source, read_idx, stratified_split


def write_idx(path, array, magic=None, cut=None, extra=b""):
    magic = 0x0800 + array.ndim if magic is None else magic
    data = struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data[:cut] + extra))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.integers(2, 7))
def test_split_is_a_partition_with_the_same_share_of_every_class(labels, every):
    labels = np.array(labels)
    train, test = stratified_split(labels, every)
    assert sorted([*train, *test]) == list(range(len(labels)))
    for label in np.unique(labels):
        assert (labels[test] == label).sum() == (labels == label).sum() // every


def test_digits_are_the_real_ones(digits):
    from sklearn.datasets import load_digits

    assert len(digits.train) + len(digits.test) == len(load_digits().target) == 1797
    image, label = digits.test[0]
    assert image.size == (8, 8)
    assert image.mode == "L"
    assert label in range(10)
    pixels = digits.train.images / 255
    cfg = default_pretrained_cfg("digits", 1)
    assert pixels.mean() == pytest.approx(cfg["mean"][0], abs=0.01)
    assert pixels.std() == pytest.approx(cfg["std"][0], abs=0.01)


def test_grey_sources_serve_models_with_three_channels():
    source = open_source(DataConfig(source="digits"), in_chans=3)
    assert source.train[0][0].mode == "RGB"
    assert default_pretrained_cfg("digits", 3)["input_size"][0] == len(default_pretrained_cfg("digits", 3)["mean"]) == 3


def test_idx_round_trip(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 28, 28))
    write_idx(tmp_path / "a.gz", array)
    assert (read_idx(tmp_path / "a.gz", (28, 28)) == array).all()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path, array: path.unlink(), "gzipped idx"),
        (lambda path, array: path.write_bytes(b"not gzip at all"), "gzipped idx"),
        (lambda path, array: path.write_bytes(path.read_bytes()[:-20]), "gzipped idx"),
        (lambda path, array: write_idx(path, array, cut=9), "header of 16 bytes, found 9"),
        (lambda path, array: write_idx(path, array, cut=-1), "bytes of data, found"),
        (lambda path, array: write_idx(path, array, extra=b"\0"), "found more"),
        (lambda path, array: write_idx(path, array, magic=0x0D03), "magic number 0x00000803, found 0x00000d03"),
        (lambda path, array: write_idx(path, array[:, :27]), "shape (28, 28), found"),
        (lambda path, array: write_idx(path, array[:0]), "found 0"),
    ],
)
def test_damaged_idx_is_refused_by_name(tmp_path, spoil, words):
    path = tmp_path / "images.gz"
    array = np.zeros((3, 28, 28))
    write_idx(path, array)
    spoil(path, array)
    with pytest.raises(CompressError) as error:
        read_idx(path, (28, 28))
    assert "images.gz" in str(error.value)
    assert words in str(error.value)


def fashion_mnist_files(folder, train=6, labels=None):
    rng = np.random.default_rng(0)
    for split, count in {"train": train, "t10k": 4}.items():
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", np.arange(count) % 10 if labels is None else labels)


def test_fashion_mnist_reads_a_given_root(tmp_path):
    fashion_mnist_files(tmp_path)
    source = open_source(DataConfig(source="fashion_mnist", root=str(tmp_path)), in_chans=1)
    assert (len(source.train), len(source.test), source.num_classes) == (6, 4, 10)
    assert source.train[1][1] == 1


@pytest.mark.skipif(not sources.FASHION_MNIST_ROOT.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_the_real_one():
    source = open_source(DataConfig(source="fashion_mnist"), in_chans=1)
    assert (len(source.train), len(source.test)) == (60_000, 10_000)
    assert (np.bincount(source.train.labels) == 6_000).all()
    cfg = default_pretrained_cfg("fashion_mnist", 1)
    pixels = source.train.images[::10] / 255
    assert pixels.mean() == pytest.approx(cfg["mean"][0], abs=0.01)
    assert pixels.std() == pytest.approx(cfg["std"][0], abs=0.01)


@pytest.mark.parametrize(("labels", "words"), [(np.zeros(9), "as many train labels as images"), (np.full(6, 11), "labels from 0 to 9")])
def test_fashion_mnist_labels_must_fit(tmp_path, labels, words):
    fashion_mnist_files(tmp_path, labels=labels)
    with pytest.raises(CompressError, match=words):
        open_source(DataConfig(source="fashion_mnist", root=str(tmp_path)))


def test_fashion_mnist_says_where_it_looked(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", no_network)
    with pytest.raises(CompressError, match=f"{tmp_path}.*dataset-fashion-mnist"):
        open_source(DataConfig(source="fashion_mnist", root=str(tmp_path)))


def image_folder(root, splits=("train", "val"), classes=("cat", "dog")):
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (10, 10)).save(root / split / name / "a.png")
    return root


def test_image_folder(tmp_path):
    source = open_source(DataConfig(source=f"imagefolder:{image_folder(tmp_path)}"))
    assert source.num_classes == 2
    assert len(source.train) == len(source.test) == 2
    assert {source.test.filename(i, absolute=True).split("/")[-3] for i in range(2)} == {"val"}


def test_image_folder_never_evaluates_on_training_images(tmp_path):
    with pytest.raises(CompressError, match="folder of validation images"):
        open_source(DataConfig(source=f"imagefolder:{image_folder(tmp_path, splits=['train'])}"))


def test_image_folder_with_other_classes_for_evaluation(tmp_path):
    image_folder(tmp_path, splits=["train"])
    image_folder(tmp_path, splits=["val"], classes=["cat", "eel"])
    with pytest.raises(CompressError, match=r"same classes .* dog, eel"):
        open_source(DataConfig(source=f"imagefolder:{tmp_path}"))


def test_image_folder_with_a_class_map(tmp_path):
    image_folder(tmp_path, splits=["train"], classes=["cat"])
    image_folder(tmp_path, splits=["val"], classes=["eel", "dog"])
    (tmp_path / "train" / "notes.txt").write_text("no image")
    (tmp_path / "classes.txt").write_text("eel\ncat\nwild boar\ndog\n")
    source = open_source(DataConfig(source=f"imagefolder:{tmp_path}", class_map=str(tmp_path / "classes.txt")))
    assert source.num_classes == 4
    assert [source.train[0][1]] == [1]
    assert [source.test[i][1] for i in range(2)] == [3, 0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat\n", r"expected the names of all folders, found none for dog of .*train"),
        ("cat\ndog\ncat", r"expected distinct class names, found cat twice"),
        (" \n", "expected distinct class names, found none"),
        (None, "expected a text file of class names"),
    ],
)
def test_class_maps_that_do_not_fit(tmp_path, text, words):
    file = image_folder(tmp_path) / "classes.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(CompressError, match=f"data.class_map: .*{words}"):
        open_source(DataConfig(source=f"imagefolder:{tmp_path}", class_map=str(file)))


def test_class_map_is_for_folders():
    with pytest.raises(CompressError, match=r"data\.class_map: expected it beside imagefolder:PATH, found it beside 'digits'"):
        open_source(DataConfig(source="digits", class_map="classes.txt"))


@pytest.mark.parametrize("name", ["digit", "imagefolder:/nowhere", "torch/no_such_set", "imagefolder:"])
def test_unknown_sources(name):
    with pytest.raises(CompressError, match=r"expected|cannot open"):
        open_source(DataConfig(source=name))
