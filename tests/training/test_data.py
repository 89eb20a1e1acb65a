"""Loaders: preprocessing comes from the model, batches fit the processes."""

import copy

import pytest
import timm
import torch
from timm.data import create_loader, resolve_model_data_config

from zoo_compress.errors import CompressError
from zoo_compress.training.config import AugmentConfig, DataConfig
from zoo_compress.training.data import calibration_batches, check_fits, eval_loader, held_out_batches, train_loader
from zoo_compress.training.distributed import Processes
from zoo_compress.training.loop import reseed
from zoo_compress.training.sources import open_source

DIGITS = DataConfig(source="digits", batch_size=64)


def test_images_are_normalised_for_the_model(digits, make_model):
    images = torch.cat([x for x, _ in eval_loader(digits, DIGITS, make_model())])
    assert images.shape == (len(digits.test), 1, 16, 16)
    assert images.mean().abs() < 0.1
    assert (images.std() - 1).abs() < 0.2
    shifted = torch.cat([x for x, _ in eval_loader(digits, DIGITS, make_model(mean=(0.5,), std=(0.25,)))])
    back = shifted * 0.25 + 0.5, images * 0.376 + 0.305
    torch.testing.assert_close(*back)


def test_images_are_as_large_as_a_model_of_fixed_size_was_made_for(digits):
    small = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2, "num_classes": 10, "in_chans": 1}
    model = timm.create_model("vit_tiny_patch16_224", pretrained_cfg_overlay={"mean": (0.3,), "std": (0.4,)}, **small)
    images, _ = next(iter(eval_loader(digits, DIGITS, model)))
    assert model(images).shape == (len(images), 10)


def test_test_images_keep_their_order(digits, make_model):
    targets = torch.cat([y for _, y in eval_loader(digits, DIGITS, make_model())])
    assert targets.tolist() == digits.test.labels.tolist()


def test_a_second_loader_leaves_the_first_alone(digits, make_model):
    config = DataConfig(source="digits", augment=AugmentConfig(no_aug=True))
    first = train_loader(digits, config, make_model())
    train_loader(digits, config, make_model(input_size=(1, 8, 8)))
    assert next(iter(first))[0].shape[-1] == 16


def test_augmentation_follows_the_recipe(digits, make_model):
    flips = train_loader(digits, DataConfig(source="digits", augment=AugmentConfig(hflip=1.0, scale=(1, 1))), make_model())
    assert "RandomHorizontalFlip(p=1.0)" in str(flips.dataset.transform)
    default = str(train_loader(digits, DIGITS, make_model()).dataset.transform)
    assert "Flip" not in default
    assert "Jitter" not in default
    assert "RandomResizedCrop" in default


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(("workers", "erased"), [(0, 0.0), (2, 0.0), (0, 0.5)])
def test_batches_are_those_of_timms_loader_to_the_bit(in_chans, workers, erased):
    """Images become tensors a batch at a time here, one by one there; erasing, which timm does on tensors, stays image by image."""
    cfg = {"input_size": (in_chans, 20, 20), "mean": (0.31,) * in_chans, "std": (0.37,) * in_chans}
    model = timm.create_model("test_resnet", num_classes=10, in_chans=in_chans, pretrained_cfg_overlay=cfg)
    source = open_source(DIGITS, in_chans)
    augment = {"hflip": 0.5, "re_prob": erased}
    config = DataConfig(source="digits", batch_size=64, workers=workers, augment=AugmentConfig(**augment))
    ours = train_loader(source, config, model)
    plain = {"use_prefetcher": False, "persistent_workers": False, "is_training": True, "num_workers": workers}
    options = {**source.augment, **augment, **resolve_model_data_config(model)}
    theirs = create_loader(copy.copy(source.train), batch_size=64, **plain, **options)
    assert isinstance(ours.collate_fn, type(theirs.collate_fn)) == bool(erased)
    batches = []
    for loader in (ours, theirs):
        reseed(0, 0, 0)
        batches.append([batch for _, batch in zip(range(4), loader, strict=False)])
    for (images, labels), (expected, known) in zip(*batches, strict=True):
        assert torch.equal(images, expected)
        assert images.stride() == expected.stride()
        assert torch.equal(labels, known)


def test_calibration_batches_can_be_walked_twice(digits, make_model):
    batches = calibration_batches(digits, DIGITS, make_model(), 3)
    walks = []
    for _ in range(2):
        torch.manual_seed(0)
        walks.append(list(batches))
    assert len(walks[0]) == 3
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(*walks, strict=True))


def test_batch_must_be_shared_evenly(digits, make_model):
    with pytest.raises(CompressError, match="multiple of the 3 processes, found 64"):
        train_loader(digits, DIGITS, make_model(), Processes(world_size=3))


def test_batch_larger_than_the_data(digits, make_model):
    with pytest.raises(CompressError, match=r"at most the \d+ training images, found 5000"):
        train_loader(digits, DataConfig(source="digits", batch_size=5000), make_model())


def test_model_and_data_must_fit(digits, make_model):
    check_fits(digits, make_model())
    other = make_model()
    other.reset_classifier(7)
    with pytest.raises(CompressError, match="the 10 classes of the data source, found 7"):
        check_fits(digits, other)
    with pytest.raises(CompressError, match=r"pretrained_cfg.mean: expected 1 channels .* found 3"):
        check_fits(digits, make_model(mean=(0.1, 0.2, 0.3)))


def test_images_that_are_held_out_are_trained_on_by_nobody(make_model):
    config = DataConfig(source="digits", batch_size=64, held_out=100)
    whole, source = open_source(DataConfig(source="digits"), 1), open_source(config, 1)
    assert len(source.train) + len(source.held_out) == len(whole.train)
    assert sorted((*source.train.indices, *source.held_out.indices)) == list(range(len(whole.train)))
    held = held_out_batches(source, config, make_model())
    images, labels = (torch.cat(parts) for parts in zip(*held, strict=True))
    assert images.shape == (100, 1, 16, 16)
    assert labels.tolist() == whole.train.labels[source.held_out.indices].tolist()
    assert len(set(labels.tolist())) == 10
    # As test images are prepared, however the others are augmented.
    train_loader(source, config, make_model())
    again = torch.cat([part for part, _ in held_out_batches(source, config, make_model())])
    assert torch.equal(images, again)
    seen = {image.numpy().tobytes() for batch, _ in calibration_batches(source, config, make_model(), 100) for image in batch}
    assert not seen & {image.numpy().tobytes() for image in images}
    assert held_out_batches(whole, config, make_model()) is None


@pytest.mark.parametrize("count", [1500, 5000])
def test_not_all_images_can_be_held_out(count):
    with pytest.raises(CompressError, match=r"data.held_out: expected fewer than the \d+ training images"):
        open_source(DataConfig(source="digits", held_out=count), 1)
