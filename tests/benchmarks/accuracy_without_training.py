"""Accuracy without training: top-1 right after pruning, by criterion, with and without reconstruction, beside torch-pruning.

Claim: with a few hundred unlabelled images, a network pretrained on ImageNet keeps most of its accuracy through pruning.

With real weights (recipes/imagenet/weights.py says from where) tf_efficientnet_lite0 and mobilenetv2_100 are pruned to parts of their MACs.
`--photos` is a folder of photos named by their class index (`0123.jpg`). They are split in two by turns: one part is the calibration data
(for `reconstruct=`, for criteria that look at data, for re-estimating BatchNorm statistics), the other the test, so no test photo is ever
calibrated on; `--both` repeats it with the parts exchanged and counts both tests together. Nothing is trained.

Columns: `plain` is what pruning leaves; `statistics` the same after `zc.calibrate`, which re-estimates BatchNorm; `reconstruct` is
`zc.prune(…, reconstruct=data)`. torch-pruning prunes with its defaults and the same criterion, its ratio bisected until the MACs are met.

    python tests/benchmarks/accuracy_without_training.py --photos PHOTOS --both --out accuracy.csv

Rows are appended to `--out` as they are done, and not done again when the command is run again. About an hour on two cores.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "imagenet"))

import peer
import weights

import zoo_compress as zc
from zoo_compress.methods import prune as pruning

BATCH = 25
PEERS = {
    "l2": ("GroupMagnitudeImportance", {"p": 2}),
    "lamp": ("LAMPImportance", {}),
    "fpgm": ("FPGMImportance", {}),
    "taylor": ("GroupTaylorImportance", {}),
}
FIELDS = ("model", "fold", "macs", "by", "criterion", "variant", "correct", "tested", "reached", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(weights.SOURCES), choices=list(weights.SOURCES))
    parser.add_argument("--macs", nargs="+", type=float, default=[0.9, 0.8, 0.7, 0.5])
    parser.add_argument("--criteria", nargs="+", default=["l2", "lamp", "fpgm", "taylor", "thinet"])
    parser.add_argument("--both", action="store_true", help="also with the two parts exchanged")
    parser.add_argument("--out", type=Path, default=Path("accuracy.csv"))
    parser.add_argument("--plot", type=Path, help="PNG of top-1 against MACs (needs the extra `plots`)")
    args = parser.parse_args()
    rows = Rows(args.out)
    for name in args.models:
        model = weights.load(name).to(memory_format=torch.channels_last)
        images, labels = photos(args.photos, model, name)
        for fold in range(1 + args.both):
            data = Data(images[fold::2], labels[fold::2], images[1 - fold :: 2], labels[1 - fold :: 2])
            one_fold(name, fold, model, data, args, rows)
    print(table(rows))
    if args.plot:
        plot(rows, args.plot)


class Rows(dict[tuple[str, ...], dict[str, str]]):
    """The rows of a CSV file by their first six fields; each new one is written at once."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        if path.exists():
            with open(path, newline="") as file:
                for row in csv.DictReader(file):
                    self[tuple(row[field] for field in FIELDS[:6])] = row

    def add(self, *values: object) -> None:
        row = dict(zip(FIELDS, map(str, values), strict=True))
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if not self:
                writer.writeheader()
            writer.writerow(row)
        self[tuple(row[field] for field in FIELDS[:6])] = row


class Data:
    """Calibration and test photos with labels."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, test_images: torch.Tensor, test_labels: torch.Tensor) -> None:
        self.calibration = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
        self.test = list(zip(test_images.split(BATCH), test_labels.split(BATCH), strict=True))


def photos(folder: Path, model: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    config = resolve_model_data_config(model)
    transform = create_transform(**config, is_training=False)
    files = sorted(folder.glob("*.jpg"))
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in tqdm(files, desc="photos", leave=False)])
    return images.to(memory_format=torch.channels_last), torch.tensor([int(file.stem) for file in files])


def correct(model: nn.Module, data: Data) -> int:
    model = model.eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        return sum(int((model(images).argmax(1) == labels).sum()) for images, labels in data.test)


def one_fold(name: str, fold: int, model: nn.Module, data: Data, args: argparse.Namespace, rows: Rows) -> None:
    tested = sum(len(labels) for _, labels in data.test)
    layout = zc.analyze(model)
    # Several budgets and variants ask for the same moments and the same ranking: work them out once. `seconds` of the first row counts.
    for function in ("gather", "scores", "damage_scores"):
        setattr(pruning, function, remembered(getattr(pruning, function)))

    def note(macs: float, by: str, criterion: str, variant: str, small: nn.Module, seconds: float) -> None:
        reached = zc.analyze(small).macs() / layout.macs()
        rows.add(name, fold, macs, by, criterion, variant, correct(small, data), tested, f"{reached:.4f}", f"{seconds:.1f}")

    if (name, str(fold), "1.0", "dense", "", "plain") not in rows:
        note(1.0, "dense", "", "plain", model, 0.0)
    for macs in args.macs:
        for criterion in args.criteria:
            for by in ("zoo_compress", "torch-pruning"):
                if by == "torch-pruning" and criterion not in PEERS:
                    continue
                variants = ("plain", "statistics", "reconstruct")[: 3 if by == "zoo_compress" else 2]
                if all((name, str(fold), str(macs), by, criterion, variant) in rows for variant in variants):
                    continue
                start = time.perf_counter()
                if by == "zoo_compress":
                    small = zc.prune(model, macs=macs, criterion=criterion, data=data.calibration, layout=layout)
                else:
                    small = by_torch_pruning(model, macs, criterion, data)
                note(macs, by, criterion, "plain", small, time.perf_counter() - start)
                zc.calibrate(small, data.calibration)
                note(macs, by, criterion, "statistics", small, time.perf_counter() - start)
                if by == "zoo_compress":
                    start = time.perf_counter()
                    small = zc.prune(
                        model, macs=macs, criterion=criterion, data=data.calibration, reconstruct=data.calibration, layout=layout
                    )
                    note(macs, by, criterion, "reconstruct", small, time.perf_counter() - start)


def remembered(function):
    """The function, with its results remembered by its plain arguments and the model."""
    function = getattr(function, "__wrapped__", function)
    known = {}

    @functools.wraps(function)
    def wrapped(model, layout, *args, **kwargs):
        key = repr([value for value in (*args, *sorted(kwargs.items())) if isinstance(value, (str, int, tuple))])
        if key not in known:
            known[key] = function(model, layout, *args, **kwargs)
        return known[key]

    return wrapped


def by_torch_pruning(model: nn.Module, macs: float, criterion: str, data: Data) -> nn.Module:
    import torch_pruning as tp

    kind, arguments = PEERS[criterion]
    model = copy.deepcopy(model)
    if criterion == "taylor":
        for images, labels in data.calibration:
            nn.functional.cross_entropy(model(images), labels).backward()
    importance = getattr(tp.importance, kind)(**arguments)
    return peer.prune_to_macs(model, macs, lambda small: zc.analyze(small).macs(), importance=importance)


def totals(rows: Rows) -> dict[tuple[str, str, str], dict[tuple[float, str], float]]:
    """(model, by, criterion) → (MACs, variant) → top-1 over the folds done."""
    counts: dict[tuple[str, str, str], dict[tuple[float, str], list[int]]] = {}
    for (name, _, macs, by, criterion, variant), row in rows.items():
        cell = counts.setdefault((name, by, criterion), {}).setdefault((float(macs), variant), [0, 0])
        cell[0] += int(row["correct"])
        cell[1] += int(row["tested"])
    return {key: {column: right / tested for column, (right, tested) in cells.items()} for key, cells in counts.items()}


def table(rows: Rows) -> str:
    """Markdown: one line per model, pruner and criterion, one column per budget and variant."""
    found = totals(rows)
    columns = sorted({column for cells in found.values() for column in cells}, key=lambda c: (-c[0], c[1]))
    lines = ["| model | by | criterion | " + " | ".join(f"{m:.0%} {v}" for m, v in columns) + " |", "|---" * (3 + len(columns)) + "|"]
    for (name, by, criterion), cells in found.items():
        values = [f"{cells[c]:.3f}" if c in cells else "" for c in columns]
        lines.append(f"| {name} | {by} | {criterion} | {' | '.join(values)} |")
    return "\n".join(lines)


def plot(rows: Rows, path: Path) -> None:
    from matplotlib import pyplot

    found = totals(rows)
    models = list(dict.fromkeys(name for name, _, _ in found))
    figure, axes = pyplot.subplots(1, len(models), figsize=(6 * len(models), 4.5), squeeze=False, sharey=True)
    for axis, model in zip(axes[0], models, strict=True):
        dense = found[model, "dense", ""][1.0, "plain"]
        for (name, by, criterion), cells in found.items():
            best = "reconstruct" if by == "zoo_compress" else "statistics"
            line = sorted((macs, top1) for (macs, variant), top1 in cells.items() if variant == best)
            if name == model and line:
                x, y = zip(*line, (1.0, dense), strict=True)
                axis.plot(x, y, "o-" if by == "zoo_compress" else "x--", label=f"{by}, {criterion}, {best}")
        axis.set(title=model, xlabel="MACs kept", ylabel="top-1, nothing trained")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
