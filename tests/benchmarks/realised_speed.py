"""Realised speed: how much of a saving in MACs arrives as a saving in time.

Claim: models pruned to 50% of their MACs run faster by nearly the same factor, at batch 8 and at batch 1.

For resnet50, mobilenetv2_100 and vit_small_patch16_224 (random weights: widths alone decide the time) this prunes to half the MACs
with torch-pruning's defaults (the same ratio in every layer, no rounding; its ratio is bisected until the MACs are met), with
zoo_compress's defaults (`round_to=8`) and with `round_to="auto"`, which chooses widths by measuring at the batch size in question. Then
all of them and the dense model run in turns, in one process. Efficiency is (dense latency ÷ pruned latency) ÷ (dense MACs ÷ pruned MACs),
from the median over runs of the ratio to the dense model's neighbouring run. MACs of all models are counted by `zc.analyze`.

Run on an otherwise idle machine (about 8 minutes on two cores; all cores are used unless --threads says otherwise):

    python tests/benchmarks/realised_speed.py
    python tests/benchmarks/realised_speed.py --models mobilenetv2_100 --batches 1 --threads 1 --seconds 20
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np
import peer
import timm
import torch
from torch import nn

import zoo_compress as zc
from zoo_compress.profiling.latency import inference, interleaved, ratio

GOALS = {1: 0.85, 8: 0.95}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "mobilenetv2_100", "vit_small_patch16_224"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=25.0, help="about how long to time one table row's models together")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads, torch {torch.__version__}, load average {os.getloadavg()[0]:.2f} at the start\n")
    print("| model | batch | pruned by | MACs kept | ms (median ± half IQR) | time kept | efficiency | goal | seconds to prune |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.models:
        torch.manual_seed(0)
        dense = timm.create_model(name).eval()
        start = time.perf_counter()
        peers = {"torch-pruning": peer.prune_to_macs(dense, 0.5, lambda model: zc.analyze(model).macs())}
        spent = {"torch-pruning": time.perf_counter() - start}
        start = time.perf_counter()
        peers["zoo_compress, round_to=8"] = zc.prune(dense, macs=0.5)
        spent["zoo_compress, round_to=8"] = time.perf_counter() - start
        for batch in args.batches:
            start = time.perf_counter()
            auto = zc.prune(dense, macs=0.5, round_to="auto", batch_size=batch, threads=args.threads)
            spent["zoo_compress, round_to=auto"] = time.perf_counter() - start
            report(name, {"dense": dense, **peers, "zoo_compress, round_to=auto": auto}, batch, args, spent)
    print(f"\nload average {os.getloadavg()[0]:.2f} at the end")


def report(name: str, models: dict[str, nn.Module], batch: int, args: argparse.Namespace, spent: dict[str, float]) -> None:
    """Time the models in turns and print a line for each."""
    image = torch.zeros(batch, *models["dense"].pretrained_cfg["input_size"])
    with inference(models.values(), args.threads):
        once = sum(float(t[0]) for t in interleaved(models, dict.fromkeys(models, image), runs=1, warmup=1).values())
        runs = int(np.clip(args.seconds / once, 8, 200))
        times = interleaved(models, dict.fromkeys(models, image), runs=runs, warmup=1)
    macs = {label: zc.analyze(model).macs() for label, model in models.items()}
    for label in models:
        low, median, high = 1e3 * np.quantile(times[label], (0.25, 0.5, 0.75))
        kept, (fraction, error) = macs[label] / macs["dense"], ratio(times[label], times["dense"])
        cells = [f"{median:.2f} ± {(high - low) / 2:.2f}", f"{fraction:.3f} ± {error:.3f}", f"{kept / fraction:.2f}"]
        goal = f"{GOALS[batch]:.2f}" if label.endswith("auto") and batch in GOALS else ""
        seconds = f"{spent[label]:.0f}" if label in spent else ""
        print(f"| {name} | {batch} | {label} | {kept:.1%} | {' | '.join(cells)} | {goal} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
