"""Does a student know a class of which it never saw an image?

Claim: what a teacher says of other images tells a student enough of a class to recognise it (Hinton et al. 2015, Distilling the Knowledge
in a Neural Network, section 3, where a student that never saw a 3 has 98.6% of them right once its bias for 3 is raised).

Students train on Fashion-MNIST without the images of one class: from the teacher's probabilities alone at a temperature, without labels, or
from labels, for comparison. As in the paper, the bias of that class is then raised to where most of all test images are right. Printed is,
for each class left out, the share of its test images that are right, as trained and with that bias, and how many of all are; in percent.

    python tests/benchmarks/unseen_class.py --classes 3 5 8
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import timm
import torch
from torch import nn
from torch.nn import functional as F

import zoo_compress  # noqa: F401  registers the names below with timm
from zoo_compress.training.config import DataConfig, DistillConfig, FinetuneConfig
from zoo_compress.training.data import eval_loader, train_loader
from zoo_compress.training.loop import Phase, fit
from zoo_compress.training.sources import Part, Source, default_pretrained_cfg, open_source

BIASES = torch.arange(0, 20, 0.1)
"""What is added to the logit of the class that was left out."""

ARMS = ("teacher", "labels")
DATA = DataConfig(source="fashion_mnist", batch_size=128)


def without(source: Source, missing: int) -> Source:
    """A source whose training images are those of the other classes."""
    return replace(source, train=Part(source.train, np.flatnonzero(np.asarray(source.train.labels) != missing)))


def trained(source: Source, arm: str, args: argparse.Namespace) -> nn.Module:
    """A student that learnt from a source's training images."""
    torch.manual_seed(args.seed)
    cfg = default_pretrained_cfg(DATA.source, 1)
    student = timm.create_model(args.student, keep=args.keep, num_classes=10, in_chans=1, pretrained_cfg_overlay=cfg)
    teacher = timm.create_model(args.teacher, pretrained=True)
    settings = {"epochs": args.epochs, "opt": "adamw", "lr": 3e-3, "weight_decay": 0.05, "warmup_epochs": 1, "channels_last": True}
    distill = DistillConfig(temperature=args.temperature, task_loss_weight=0.0) if arm == "teacher" else None
    fit(
        student,
        train_loader(source, DATA, student),
        eval_loader(source, DATA, student),
        FinetuneConfig(**settings, distill=distill),
        teacher=teacher,
        phase=Phase(arm, 1, args.seed),
        log=lambda line: print(line, flush=True),
    )
    return student.eval()


@torch.no_grad()
def logits_of(model: nn.Module, source: Source) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the test images (images, classes), and their labels."""
    found = [(model(images), labels) for images, labels in eval_loader(source, DATA, model)]
    return torch.cat([logits for logits, _ in found]), torch.cat([labels for _, labels in found])


def shares(logits: torch.Tensor, labels: torch.Tensor, missing: int) -> tuple[float, float, float, float]:
    """Percentages that are right: of the missing class and of all, as trained; and with the bias at which most of all are."""
    own = F.one_hot(torch.tensor(missing), logits.shape[1])
    right = torch.stack([(logits + bias * own).argmax(1) == labels for bias in BIASES]).float()
    best = int(right.mean(1).argmax())
    return tuple(100 * float(part.mean()) for at in (0, best) for part in (right[at][labels == missing], right[at]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[3])
    parser.add_argument("--teacher", default="test_resnet__clustered.fmnist_8")
    parser.add_argument("--student", default="test_byobnet__pruned")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = open_source(DATA, in_chans=1)
    rows = []
    for missing in args.classes:
        for arm in ARMS:
            student = trained(without(source, missing), arm, args)
            rows.append((missing, arm, shares(*logits_of(student, source), missing)))
    print(f"\n{'left out':8}  {'learnt from':11}  {'its images':>10}  {'all':>6}  {'raised: its':>11}  {'all':>6}")
    for missing, arm, found in rows:
        print(f"{missing:8}  {arm:11}  {found[0]:10.2f}  {found[1]:6.2f}  {found[2]:11.2f}  {found[3]:6.2f}")


if __name__ == "__main__":
    main()
