"""Early exits: how much of a saving in average MACs arrives as a saving in time, and what exits cost where nobody leaves.

Claims: (plain time ÷ time of `infer`) ÷ (plain MACs ÷ average MACs) is at least 0.9 at batch 64 and 0.85 at batch 1; with thresholds nobody
meets, `infer` takes at most 3% longer than the plain model, plus the heads' own MACs.

For resnet18, mobilenetv2_100 and vit_tiny_patch16_224 (random weights: who leaves where decides the time, not whether it is right) this
attaches four exits and calibrates them on the very images that are timed, so that half the MACs are spent on average and samples leave at
every exit. Then the plain model, `infer` with these thresholds and `infer` with thresholds of 1 run in turns, in one process. At batch 1,
one run is all images, one after the other. Ratios are medians over runs of the ratio to the neighbouring run of the plain model.

A MAC in one layer takes many times what it takes in another, so average MACs can promise time that no mechanism could save. "Stopping
there" is the time it takes to run all images to each exit with `infer(exit=)`, weighted with the fraction that leaves there: what leaving
rows one by one costs beyond that is the mechanism's own.

Run on an otherwise idle machine:

    python tests/benchmarks/exits_speed.py
    python tests/benchmarks/exits_speed.py --models resnet18 --threads 1 --images 16 --batches 1
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import numpy as np
import timm
import torch

import zoo_compress as zc

GOALS = {1: 0.85, 64: 0.9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenetv2_100", "vit_tiny_patch16_224"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=25.0, help="about how long to time one line of the table")
    parser.add_argument("--budget", type=float, default=0.5, help="average MACs, as a fraction of the plain model's")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads, torch {torch.__version__}, load average {os.getloadavg()[0]:.2f} at the start\n")
    columns = ["model", "batch", "MACs spent", "time taken", "realised / ideal", "goal", "stopping there", "nobody leaves: time"]
    columns += ["of which heads' MACs", "runs"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in args.models:
        for batch in args.batches:
            report(name, batch, args)
    print(f"\nload average {os.getloadavg()[0]:.2f} at the end")


@torch.no_grad()
def report(name: str, batch: int, args: argparse.Namespace) -> None:
    """Time one model at one batch size and print its line."""
    torch.manual_seed(0)
    plain = timm.create_model(name).eval()
    net = zc.add_exits(plain, 4).eval()
    images = torch.randn(args.images, *plain.pretrained_cfg["input_size"]) * torch.linspace(0.5, 2, args.images)[:, None, None, None]
    batches = images.split(batch)
    # Calibrated batch by batch as it is timed, so that rounding moves nobody across a threshold.
    net.calibrate(batches, args.budget)
    left = torch.cat([net.infer(x, return_exits=True)[1] for x in batches])
    costs, base = torch.tensor(net.costs(), dtype=torch.float64), zc.analyze(plain).macs()
    spent = float(costs[left].mean() / base)

    def over(call: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            for x in batches:
                call(x)

        return run

    calls = {"plain": over(plain), "exits": over(net.infer), "nobody": over(lambda x: net.infer(x, threshold=1.0))}
    for exit in range(4):
        calls[f"exit {exit}"] = over(lambda x, exit=exit: net.infer(x, exit=exit))
    once = sum(timed(call) for call in calls.values())
    runs = int(np.clip(args.seconds / once, 5, 200))
    times: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(runs):
        for label, call in calls.items():
            times[label].append(timed(call))
    of = {label: float(np.median(np.array(times[label]) / np.array(times["plain"]))) for label in calls}
    taken, nobody = of["exits"], of["nobody"]
    stopping = sum(float((left == exit).double().mean()) * of.get(f"exit {exit}", nobody) for exit in range(5))
    heads = float(costs[-1] / base) - 1
    goal = f"{GOALS[batch]:.2f}" if batch in GOALS else ""
    cells = [f"{spent:.3f}", f"{taken:.3f}", f"{spent / taken:.2f}", goal, f"{stopping:.3f}"]
    cells += [f"{nobody - 1:+.1%}", f"{heads:.1%}", str(runs)]
    print(f"| {name} | {batch} | {' | '.join(cells)} |", flush=True)


def timed(call: Callable[[], None]) -> float:
    """Seconds a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
