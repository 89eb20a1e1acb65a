"""Elastic speed: what it costs to run a width as views of a bank, and a NetAug step as one network.

Claims: a width of a slimmable network runs, forward and in training, as fast as the static model that it exports (at most 1.05 times the
time at batch 32); switching takes less than a millisecond; a NetAug step takes at most 1.05 times the steps of its two networks as static
models. Also printed, as it is: a NetAug step against plain training of the base (the paper reports +16.7% on its hardware).

Runs in turns, in one process; medians of the ratio to the neighbouring run of the static model, with half the interquartile range.
Processor time, so that other processes on the machine disturb less.

    python tests/benchmarks/elastic_speed.py
    python tests/benchmarks/elastic_speed.py --models vit_tiny_patch16_224 --widths 0.5 --batch 8 --runs 5
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping

import numpy as np
import timm
import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

import zoo_compress as zc
from zoo_compress.methods.netaug import NetAugTask

MODELS = ["resnet18", "mobilenetv2_100", "vit_tiny_patch16_224"]


def in_turns(works: Mapping[str, Callable[[], object]], runs: int) -> dict[str, np.ndarray]:
    """Seconds of processor time of each run of each work: name → (runs,). One run before them is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(runs + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            times[name].append(time.process_time() - start)
    return {name: np.array(seconds[1:]) for name, seconds in times.items()}


def told(ratios: np.ndarray, goal: float | None = 1.05) -> str:
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    missed = "" if goal is None or median <= goal else " (missed)"
    return f"{median:.3f} ± {(high - low) / 2:.3f}{missed}"


def training_step(model: nn.Module, images: Tensor, target: Tensor) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), target).backward()

    return step


def forward(model: nn.Module, images: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model(images)

    return run


def slimmable(name: str, widths: list[float], batch: int, runs: int) -> None:
    net = zc.slim(timm.create_model(name), sorted({*widths, 1.0}))
    images, target = torch.randn(batch, *net.default_cfg["input_size"]), torch.arange(batch) % 1000
    bank = sum(p.numel() for p in net.parameters())
    alone = net.layout.num_params()
    switches = []
    for _ in range(50):
        for width in net.widths:
            start = time.perf_counter()
            net.set_width(width)
            switches.append(time.perf_counter() - start)
    for width in widths:
        static = net.export(width)
        net.set_width(width)
        net.eval(), static.eval()
        times = in_turns({"elastic": forward(net, images), "static": forward(static, images)}, runs)
        net.train(), static.train()
        steps = {"elastic": training_step(net, images, target), "static": training_step(static, images, target)}
        trained = in_turns(steps, runs)
        print(
            f"| {name} | {width:g} | {told(times['elastic'] / times['static'])} | {told(trained['elastic'] / trained['static'])} | "
            f"{1e3 * np.median(switches):.3f} | {bank / alone:.3f} |",
            flush=True,
        )


def augmented(name: str, batch: int, runs: int) -> None:
    base = timm.create_model(name).train()
    net = zc.netaug(base, 3, 3)
    task = NetAugTask(ClassificationTask(net, verbose=False)).train()
    images, target = torch.randn(batch, *net.default_cfg["input_size"]), torch.arange(batch) % 1000
    ratios, plain = [], []
    for draw in range(runs):
        net.draw(np.random.default_rng([0, draw]))
        layout, sizes = net.layout, net.sizes
        with net.plain():
            static = zc.resize(net, layout, sizes).train()
        net.set_base()

        def augmented_step(draw: int = draw) -> None:
            task.draws = draw
            net.zero_grad(set_to_none=True)
            task(images, target)["loss"].backward()

        steps = {"netaug": augmented_step, "base": training_step(base, images, target), "drawn": training_step(static, images, target)}
        times = in_turns(steps, 1)
        ratios.append(float(times["netaug"][0] / (times["base"][0] + times["drawn"][0])))
        plain.append(float(times["netaug"][0] / times["base"][0]))
    print(f"| {name} | {told(np.array(ratios))} | {told(np.array(plain), None)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--widths", nargs="+", type=float, default=[0.25, 0.5, 0.75])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"batch {args.batch}, {args.threads} threads, torch {torch.__version__}, load average {os.getloadavg()[0]:.2f} at the start\n")
    print("| model | width | forward, elastic ÷ static | forward and backward | ms to switch | parameters ÷ those of the whole |")
    print("|---|---|---|---|---|---|")
    for name in args.models:
        slimmable(name, args.widths, args.batch, args.runs)
    print("\n| model | NetAug step ÷ both static steps | ÷ plain step of the base |")
    print("|---|---|---|")
    for name in args.models:
        augmented(name, max(1, args.batch // 4), args.runs)


if __name__ == "__main__":
    main()
