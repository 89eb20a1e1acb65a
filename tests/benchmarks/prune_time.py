"""Time of `prune` without its proofs, with the resize proof alone, and with both: CPU seconds on one thread, in turns after a warm-up.

Run with `OMP_NUM_THREADS=1 python tests/benchmarks/prune_time.py [names] --repeats 5 --out results.json`.
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import timm
import torch

import zoo_compress as zc

pruning = sys.modules[zc.prune.__module__]
WAYS = ("no proof", "resize proof", "both proofs")
MODELS = ["resnet50", "vit_base_patch16_224", "convnext_base"]


def seconds(model, how):
    context = mock.patch(f"{pruning.__name__}.prove_zeroing") if how == "resize proof" else nullcontext()
    with context:
        start = time.process_time()
        zc.prune(model, macs=0.5, check=how != "no proof")
        return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=MODELS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in args.names:
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        seconds(model, WAYS[-1])
        times = {how: [] for how in WAYS}
        for _ in range(args.repeats):
            for how in WAYS:
                times[how].append(seconds(model, how))
        results[name] = {how: round(statistics.median(values), 2) for how, values in times.items()}
        print(name, results[name], flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
