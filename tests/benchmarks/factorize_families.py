"""Factorising on all of timm: does every family survive it, from the plan to the reloaded file?

Claim: `zc.factorize(model, macs=0.7)` gives on every model file of timm a model that runs forward and backward, has exactly the MACs and
parameters computed, and is created again by name with the same outputs to the bit; layers that the model does not bear to be two are left,
with a reason.

The smallest architecture (by parameters) of each of timm's model files, or those of `--models`, with random weights:

- factorised: `zc.factorize` returned (it compares MACs and parameters with an analysis);
- trained: it runs forward and backward on a batch of two, and all parameters that had gradients before have finite ones;
- proven: as the layers' weights are composed again to one, the dense model gives the same (relative change of the logits below 1e-4);
- reloaded: saved and created again by plain `timm.create_model`, outputs equal bit by bit;
- pruned: `zc.prune(…, macs=0.7)` of it, saved and reloaded bit-equal.

`left` says how many linear layers and convolutions stay for which reason. Each model runs in a process of its own with one thread and a
limit of time; rows go to a CSV file as they come, and are not done again when the command is run again.

    python tests/benchmarks/factorize_families.py --csv /tmp/factors.csv
    python tests/benchmarks/factorize_families.py --csv /tmp/few.csv --models test_resnet test_vit --separable
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rows import append, attempt, drawn, read, reloads, smallest_of_each_file
from torch import nn

import zoo_compress as zc
from zoo_compress.structure.factors import Factor
from zoo_compress.surgery.factors import composed
from zoo_compress.surgery.verify import flat

CHECKS = ("factorised", "trained", "proven", "reloaded", "pruned")
FIELDS = ("model", "method", *CHECKS, "seconds", "layers", "left", "macs", "params", "error")


def steps(name: str, method: str) -> Iterator[tuple[str, str]]:
    """Do what the columns say, one after the other, yielding (column, value)."""
    model, image = drawn(name)
    layout = zc.analyze(model)
    plan = zc.plan_separate(model) if method == "separable" else zc.plan_factorize(model, macs=0.7)
    yield "layers", str(len(plan.factors))
    yield "left", "; ".join(f"{count} {reason}" for reason, count in collections.Counter(plan.left.values()).most_common())
    small = zc.separate(model, layout=layout) if method == "separable" else zc.factorize(model, macs=0.7, layout=layout)
    yield "macs", f"{plan.macs[1] / plan.macs[0]:.3f}"
    yield "params", f"{plan.params[1] / plan.params[0]:.3f}"
    yield "factorised", "yes"
    yield "trained", _trains(model, small, image)
    yield "proven", _proven(model, small.eval(), plan.factors, image)
    with tempfile.TemporaryDirectory() as folder:
        yield "reloaded", reloads(small, image, folder)
        yield "pruned", reloads(zc.prune(small, macs=0.7), image, folder)


def _trains(model: nn.Module, small: nn.Module, image: torch.Tensor) -> str:
    had, has = (_gradients(each, image) for each in (model, small))
    lost = {name for name in had - has if not any(name.startswith(f"{path}.") for path, m in small.named_modules() if _is_pair(m))}
    return "no" if lost else "yes"


def _gradients(model: nn.Module, image: torch.Tensor) -> set[str]:
    trained = copy.deepcopy(model).train()
    flat(trained(image)).sum().backward()
    return {name for name, p in trained.named_parameters() if p.grad is not None and bool(p.grad.isfinite().all())}


def _is_pair(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and len(module) == 2


@torch.no_grad()
def _proven(model: nn.Module, small: nn.Module, factors: dict[str, Factor], image: torch.Tensor) -> str:
    dense = copy.deepcopy(model)
    for path, factor in factors.items():
        two = small.get_submodule(path)
        dense.get_submodule(path).weight.copy_(composed(factor, two[0].weight, two[1].weight))
    change = float("inf")
    with contextlib.suppress(RuntimeError):  # a model that mixes dtypes runs in its own only
        expected, found = flat(dense.double()(image.double())), flat(copy.deepcopy(small).double()(image.double()))
        change = float((found - expected).norm() / expected.norm())
    if change == float("inf"):
        expected, found = flat(dense.float()(image)), flat(small(image))
        change = float((found - expected).norm() / expected.norm())
    return "yes" if change < 1e-4 else f"no ({change:.2g})"


def report(rows: list[dict[str, Any]]) -> None:
    """Print the summary: what holds how often, what stands in the way, and why layers are left."""
    for method in ("lowrank", "separable"):
        own = [row for row in rows if row["method"] == method]
        if not own:
            continue
        print(f"\n{method}: {len(own)} models; " + ", ".join(f"{check} {sum(row[check] == 'yes' for row in own)}" for check in CHECKS))
        for row in own:
            if any(row[check] != "yes" for check in CHECKS):
                print(f"  {row['model']}: {', '.join(check for check in CHECKS if row[check] != 'yes')} no: {row['error']}")
        reasons: collections.Counter[str] = collections.Counter()
        for row in own:
            for part in filter(None, (row["left"] or "").split("; ")):
                count, _, reason = part.partition(" ")
                reasons[re.sub(r"\(.*\)|[A-Z]\w+ computes|keeps [\d.]+%", "…", reason)] += int(count)
        for reason, count in reasons.most_common():
            print(f"  {count:6} layers left: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--models", nargs="+", help="architectures instead of one of each model file")
    parser.add_argument("--separable", action="store_true", help="depthwise-separable convolutions instead of low rank")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one model")
    parser.add_argument("--report", action="store_true", help="only print what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = read(args.csv)
    if not args.report:
        method = "separable" if args.separable else "lowrank"
        for name in args.models or smallest_of_each_file(args.csv.with_suffix(".models.csv")).values():
            if (name, method) in {(row["model"], row["method"]) for row in rows}:
                continue
            rows.append({"model": name, "method": method, **dict.fromkeys(CHECKS, "no"), **attempt(steps, (name, method), args.limit)})
            append(args.csv, FIELDS, rows[-1])
            print(name, {check: rows[-1][check] for check in CHECKS}, rows[-1]["seconds"], rows[-1]["error"], flush=True)
    report(rows)


if __name__ == "__main__":
    main()
