"""Load time: from files on disk to a model in memory.

Claim: `timm.create_model` makes a pruned model from our folder at least as fast as it makes the unpruned one from its own weights.

For resnet50 and vit_base_patch16_224 (random weights, half the MACs) this times, in turns and in one process, files in the page cache:

- base: `timm.create_model(name, pretrained=True)` with its weights in a local safetensors file;
- ours: `timm.create_model("local-dir:…", pretrained=True)` on the folder that `zc.save` wrote (its SHA-256 is checked);
- pickle: `torch.load` of the same pruned module, pickled whole (`weights_only=False`; runs whatever code the file names);
- torch-pruning: `timm.create_model(name)`, then its `load_state_dict` of its `state_dict`, which pickles every module's `__dict__`.

Run (about two minutes):

    python tests/benchmarks/load_time.py
    python tests/benchmarks/load_time.py --models resnet50 --runs 5
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import zoo_compress as zc
from zoo_compress.profiling.latency import ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_base_patch16_224"])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    print(f"{args.threads} threads, torch {torch.__version__}, load average {os.getloadavg()[0]:.2f}, {args.runs} runs each, in turns\n")
    print("| model | loaded by | file, MB | ms (median ± half IQR) | of the base's time | goal |")
    print("|---|---|---|---|---|---|")
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            report(name, Path(folder), args.runs)


def report(name: str, folder: Path, runs: int) -> None:
    """Write the four files, load each in turns, check that all give the same model, and print a line for each."""
    import torch_pruning as tp

    torch.manual_seed(0)
    dense = timm.create_model(name).eval()
    small = zc.prune(dense, macs=0.5).eval()
    image = torch.randn(1, *dense.pretrained_cfg["input_size"])
    files = {"base": folder / "base.safetensors", "ours": folder / "ours", "pickle": folder / "p.pth", "torch-pruning": folder / "tp.pth"}
    save_file(dense.state_dict(), files["base"])
    zc.save(small, files["ours"])
    torch.save(small, files["pickle"])
    torch.save(tp.state_dict(small), files["torch-pruning"])
    loads: dict[str, Callable[[], nn.Module]] = {
        "base": lambda: timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(files["base"])}),
        "ours": lambda: timm.create_model(f"local-dir:{files['ours']}", pretrained=True),
        "pickle": lambda: torch.load(files["pickle"], weights_only=False),
        "torch-pruning": lambda: tp.load_state_dict(timm.create_model(name), torch.load(files["torch-pruning"], weights_only=False)),
    }
    with torch.no_grad():
        for label, load in loads.items():
            assert torch.equal(load().eval()(image), (dense if label == "base" else small)(image)), label
    times: dict[str, list[float]] = {label: [] for label in loads}
    for _ in range(runs):
        for label, load in loads.items():
            start = time.perf_counter()
            load()
            times[label].append(time.perf_counter() - start)
    for label, file in files.items():
        size = sum(p.stat().st_size for p in ([file] if file.is_file() else file.iterdir())) / 1e6
        low, median, high = 1e3 * np.quantile(times[label], (0.25, 0.5, 0.75))
        fraction, error = ratio(np.array(times[label]), np.array(times["base"]))
        took, goal = f"{median:.0f} ± {(high - low) / 2:.0f}", "1.00" if label == "ours" else ""
        print(f"| {name} | {label} | {size:.1f} | {took} | {fraction:.2f} ± {error:.2f} | {goal} |", flush=True)


if __name__ == "__main__":
    main()
