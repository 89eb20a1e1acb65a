"""Does a pruned backbone transfer? Detection of Fashion-MNIST items in scenes, with a backbone pruned before, after, or never trained.

Claim: what pruning keeps serves another task too (Liu et al. 2019, Rethinking the Value of Network Pruning, asks it of a detector).

Scenes are made of Fashion-MNIST items, shrunk or enlarged, in random places of a grey canvas, so their boxes are known by construction. The
detector is torchvision's FCOS (Tian et al. 2019) on a feature pyramid over three maps of a backbone from `timm.create_model(...,
features_only=True)`. All arms end with a backbone of the same widths, and train as many epochs in all:

- dense: the backbone before pruning, for comparison;
- before: the pruned and fine-tuned classifier's backbone;
- after: the dense backbone; half-way, the detector's backbone is pruned to the same widths by the L2 norm of its filters, and with it the
  pyramid's columns that read them;
- scratch: the pruned structure with random weights.

The metric is the mean over classes of average precision at an overlap of 0.5 (all points, as VOC 2010 on), in percent.

    zoo-compress run recipes/transfer/fmnist_backbone.yaml
    python tests/benchmarks/transfer_detection.py --run runs/fmnist_backbone --seeds 0 1 2

One seed with the default numbers takes about 20 minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_iou
from tqdm import tqdm

import zoo_compress as zc
from zoo_compress.methods.criteria import scores
from zoo_compress.plan import make_plan, uncompressed
from zoo_compress.record import read_record
from zoo_compress.sharing.recipe_text import recipe_of
from zoo_compress.structure.widths import groups
from zoo_compress.training.config import DataConfig
from zoo_compress.training.sources import open_source

SIZE = 96
MAPS = (1, 2, 3)
PYRAMID = 64
ARMS = ("dense", "before", "after", "scratch")


def scene(items: np.ndarray, labels: np.ndarray, draw: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """One image (1, size, size) in 0…1 with one to four items that do not overlap, and what is where."""
    canvas = torch.from_numpy(draw.normal(0.1, 0.05, (SIZE, SIZE)).astype(np.float32)).clamp(0, 1)
    boxes: list[list[int]] = []
    found: list[int] = []
    for _ in range(int(draw.integers(1, 5))):
        which = int(draw.integers(len(items)))
        side = int(draw.integers(20, 44))
        item = torch.from_numpy(items[which].astype(np.float32) / 255)[None, None]
        item = nn.functional.interpolate(item, size=(side, side), mode="bilinear")[0, 0]
        rows, columns = (item > 0.1).any(1).nonzero(), (item > 0.1).any(0).nonzero()
        if len(rows) < 2 or len(columns) < 2:
            continue
        item = item[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        height, width = item.shape
        for _ in range(20):
            y, x = int(draw.integers(SIZE - height + 1)), int(draw.integers(SIZE - width + 1))
            box = [x, y, x + width, y + height]
            if not boxes or not box_iou(torch.tensor([box]).float(), torch.tensor(boxes).float()).any():
                canvas[y : y + height, x : x + width] = torch.where(item > 0.1, item, canvas[y : y + height, x : x + width])
                boxes.append(box)
                found.append(int(labels[which]))
                break
    return canvas[None], {"boxes": torch.tensor(boxes).float().reshape(-1, 4), "labels": torch.tensor(found)}


def scenes(dataset, count: int, seed: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    draw = np.random.default_rng(seed)
    made: list[tuple[Tensor, dict[str, Tensor]]] = []
    while len(made) < count:
        one = scene(np.asarray(dataset.images), np.asarray(dataset.labels), draw)
        if len(one[1]["labels"]):
            made.append(one)
    return made


class Backbone(nn.Module):
    """A timm feature extractor and a feature pyramid, as torchvision's detectors want them."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), PYRAMID)
        self.out_channels = PYRAMID

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), features) for i, features in enumerate(self.body(images))))


def features(folder: Path) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=MAPS)


def detector(body: nn.Module) -> FCOS:
    anchors = AnchorGenerator(sizes=((8,), (16,), (32,)), aspect_ratios=((1.0,),) * 3)
    return FCOS(
        Backbone(body), num_classes=10, min_size=SIZE, max_size=SIZE, image_mean=[0.286], image_std=[0.353], anchor_generator=anchors
    )


def train(model: FCOS, data: list, epochs: int, seed: int, label: str, first: int = 0, total: int | None = None) -> None:
    """Train in place, with one cosine schedule over `total` epochs of which these are a part.

    The first epoch warms up: without, the rectified box branch of FCOS dies in some runs and not in others, which is all that is seen then.
    """
    batch = 16
    steps = len(data) // batch
    whole = (total or epochs) * steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    model.train()
    for epoch in range(first, first + epochs):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed * 1000 + epoch))
        for i in tqdm(range(steps), desc=f"{label} {epoch + 1}", leave=False):
            warm = min(1.0, ((epoch - first) * steps + i + 1) / steps)
            optimizer.param_groups[0]["lr"] = warm * 1e-3 * 0.5 * (1 + np.cos(np.pi * (epoch * steps + i) / whole))
            picked = [data[j] for j in order[i * batch : (i + 1) * batch]]
            loss = sum(model([image for image, _ in picked], [target for _, target in picked]).values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()


@torch.no_grad()
def mean_average_precision(model: FCOS, data: list) -> float:
    """Mean over classes of the area under precision against recall at an overlap of 0.5, percent."""
    model.eval()
    model.score_thresh = 0.05
    found = [model([image])[0] for image, _ in data]
    values = []
    for label in range(10):
        hits: list[tuple[float, bool]] = []
        wanted = 0
        for output, (_, target) in zip(found, data, strict=True):
            boxes = target["boxes"][target["labels"] == label]
            wanted += len(boxes)
            free = torch.ones(len(boxes), dtype=torch.bool)
            mine = output["labels"] == label
            order = output["scores"][mine].argsort(descending=True)
            for box, score in zip(output["boxes"][mine][order], output["scores"][mine][order], strict=True):
                overlap = box_iou(box[None], boxes)[0] * free if len(boxes) else torch.zeros(0)
                hit = len(boxes) > 0 and bool(overlap.max() >= 0.5)
                if hit:
                    free[overlap.argmax()] = False
                hits.append((float(score), hit))
        hits.sort(reverse=True)
        right = np.cumsum([hit for _, hit in hits])
        precision = right / np.arange(1, len(hits) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        recall = np.concatenate([[0.0], right / wanted])
        values.append(float((np.diff(recall) * precision).sum()) if hits else 0.0)
    return 100 * statistics.mean(values)


def pruned_after(model: FCOS, dense: Path, small: Path) -> FCOS:
    """The same detector with its backbone pruned to the widths of the pruned classifier."""
    classifier = zc.load(dense)
    trained = {name: value for name, value in model.backbone.body.state_dict().items() if name in classifier.state_dict()}
    classifier.load_state_dict(trained, strict=False)
    layout = zc.analyze(classifier)
    sizes = zc.load(small)._model_args["variant"]["sizes"]
    ranked = scores(classifier, layout, list(layout.free), "l2")
    widths: dict[str, np.ndarray] = {}
    for group in groups(layout):
        rank = sum(ranked[name] for name in group.axes)
        kept = np.sort(np.argsort(-rank, kind="stable")[: sizes[group.axes[0]]])
        widths.update(dict.fromkeys(group.axes, kept))
    folder = small.parent / "pruned_after"
    zc.save(zc.resize(classifier, layout, widths), folder)
    cut = detector(features(folder))
    cut.head.load_state_dict(model.head.state_dict())
    fpn, old = cut.backbone.fpn, model.backbone.fpn
    fpn.layer_blocks.load_state_dict(old.layer_blocks.state_dict())
    info = [classifier.feature_info[i] for i in MAPS]
    for block, whole, kept in zip(fpn.inner_blocks, old.inner_blocks, tapped(layout, info, widths), strict=True):
        assert len(kept) == block[0].in_channels
        with torch.no_grad():
            block[0].weight.copy_(whole[0].weight[:, kept])
            block[0].bias.copy_(whole[0].bias)
    return cut


def tapped(layout: zc.Layout, info: list[dict], widths: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Which channels of each map are kept. A map's channels are the axis that the last vector of its module (a norm's bias) has."""
    found = []
    for each in info:
        vectors = [dims for name, dims in layout.params.items() if name.startswith(f"{each['module']}.") and len(dims) == 1]
        axis = vectors[-1][0]
        assert layout.axes[axis].size == each["num_chs"]
        found.append(widths[axis])
    return found


def study(output: Path, seed: int, count: int, epochs: int) -> dict[str, float]:
    """Average precision of every arm, for the run of a recipe in `output`."""
    record = read_record(output)
    assert record is not None
    plan = make_plan(recipe_of(record.recipe))
    dense_step = uncompressed(plan)
    assert dense_step is not None
    dense, small = output / "steps" / dense_step.name, output / "model"
    source = open_source(DataConfig(source="fashion_mnist"), in_chans=1)
    training, test = scenes(source.train, count, seed), scenes(source.test, max(1, count // 4), 10_000 + seed)
    scratch = output / "scratch_backbone"
    zc.save(zc.reinitialize(zc.load(small), seed), scratch)
    results = {}
    for arm in ARMS:
        begun = time.perf_counter()
        torch.manual_seed(seed)
        body = features({"dense": dense, "before": small, "after": dense, "scratch": scratch}[arm])
        model = detector(body)
        if arm == "after":
            half = epochs // 2
            train(model, training, half, seed, arm, total=epochs)
            model = pruned_after(copy.deepcopy(model), dense, small)
            train(model, training, epochs - half, seed, arm, first=half, total=epochs)
        else:
            train(model, training, epochs, seed, arm)
        results[arm] = mean_average_precision(model, test)
        parameters = sum(parameter.numel() for parameter in model.backbone.body.parameters())
        print(
            f"seed {seed}, {arm}: {results[arm]:.1f}, backbone {parameters:,} parameters, {time.perf_counter() - begun:.0f} s", flush=True
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output folder of recipes/transfer/fmnist_backbone.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--scenes", type=int, default=2000, help="training scenes; a quarter as many for testing")
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = [study(args.run, seed, args.scenes, args.epochs) for seed in args.seeds]
    print("\n| backbone | AP50, % |\n|---|---|")
    for arm in ARMS:
        values = [results[arm] for results in found]
        print(f"| {arm} | {statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "") + " |")


if __name__ == "__main__":
    main()
