"""Coverage: on how many of timm's architectures does pruning work, from the graph to the reloaded file, here and with torch-pruning?

Claim: zoo_compress prunes, proves, saves and reloads models that torch-pruning 1.6.1 cannot.

The smallest model (by parameters) of every model file in timm's registry is pruned three times, each in a process of its own with a
limit of time (`--limit` seconds) and one thread:

- ours: `zc.prune(model, macs=0.5)`;
- tp-script: torch-pruning as its own `examples/timm_models/prune_timm_models.py` uses it (attention by `num_heads` and `qkv`, linear layers
  with as many outputs as classes left alone, `num_heads` and `head_dim` set afterwards), default arguments, 30% of the channels, which is
  about half of the MACs;
- tp-adapted: the same with the classifier timm names, separate projections of attention, and further names of the sizes that follow.

Columns, each only if those before it hold:

- graph: the dependency graph (ours: the layout) was built;
- pruned: pruning returned, and there are fewer parameters;
- forward: the pruned model runs forward and backward on a batch of two and gives finite numbers and as many logits as before;
- correct: ours, `zc.verify`: permuting every axis everywhere leaves the output unchanged, and two more proofs. torch-pruning has no
  such check; for it, the channels that it says a layer no longer reads are zeroed in the dense model's weights, and both must give equal
  outputs. That holds where nothing normalises across the channels and no attention is taken between them; elsewhere it is n/a;
- reloaded: ours, saved and created again by plain `timm.create_model`, outputs equal bit by bit; torch-pruning, its `state_dict` pickled
  and its `load_state_dict` into a freshly created base, outputs equal bit by bit;
- seconds: of all the above.

Results go to a CSV file as they come; started again with the same file, the script does what is missing (`--fresh` starts over). On an
idle machine with two cores this takes about an hour; the tables of what is done so far are printed at the end, or with `--report` alone.

    python tests/benchmarks/torch_pruning_coverage.py --csv /tmp/coverage.csv
    python tests/benchmarks/torch_pruning_coverage.py --csv /tmp/coverage.csv --minutes 10   # as far as it comes; start it again
    python tests/benchmarks/torch_pruning_coverage.py --csv /tmp/few.csv --only resnet vision_transformer swin_transformer
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peer
import timm
import torch
from rows import append, attempt, read, smallest_of_each_file
from torch import nn

import zoo_compress as zc
from zoo_compress.surgery.verify import flat

TOOLS = ("ours", "tp-script", "tp-adapted")
CHECKS = ("graph", "pruned", "forward", "correct", "reloaded")
FIELDS = ("file", "model", "tool", *CHECKS, "seconds", "params_kept", "error")
ACROSS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.Softmax)


def steps(name: str, tool: str) -> Iterator[tuple[str, str]]:
    """Do what the columns say, one after the other, yielding (column, "yes", "no" or "n/a")."""
    torch.manual_seed(0)
    model = _create(name).eval()
    # Fresh statistics and scales would hide mistakes.
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    image = torch.randn(2, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        logits = flat(model(image))
    yield from (_ours if tool == "ours" else _torch_pruning)(model, name, image, logits, tool)


def _create(name: str) -> nn.Module:
    """The architecture, with a classifier where it comes without: the features of a pruned model are fewer, its logits are not."""
    model = timm.create_model(name)
    return model if getattr(model, "num_classes", 0) else timm.create_model(name, num_classes=1000)


def _ours(model: nn.Module, name: str, image: torch.Tensor, logits: torch.Tensor, tool: str) -> Iterator[tuple[str, str]]:
    layout = zc.analyze(model)
    yield "graph", "yes"
    small = zc.prune(model, macs=0.5, layout=layout)
    yield from _pruned_and_runs(model, small, image, logits)
    zc.verify(model, layout)
    yield "correct", "yes"
    with tempfile.TemporaryDirectory() as folder:
        zc.save(small, folder)
        yield "reloaded", _equal(timm.create_model(f"local-dir:{folder}", pretrained=True), small, image)


def _torch_pruning(model: nn.Module, name: str, image: torch.Tensor, logits: torch.Tensor, tool: str) -> Iterator[tuple[str, str]]:
    import torch_pruning as tp

    adapted = tool == "tp-adapted"
    # Copied first: some models keep tensors from a run that recorded gradients, which cannot be copied.
    small, zeroed = copy.deepcopy(model), copy.deepcopy(model)
    tp.DependencyGraph().build_dependency(model, example_inputs=image[:1])
    yield "graph", "yes"
    zeroing = peer.Zeroing(small, zeroed)
    peer.prune(small, 0.3, adapted=adapted, watch=zeroing)
    yield from _pruned_and_runs(model, small, image, logits)
    if zeroing.undefined or any(isinstance(m, ACROSS) or hasattr(m, "num_heads") for m in model.modules()):
        yield "correct", "n/a"
    else:
        with torch.no_grad():
            expected, found = flat(zeroed.eval()(image)), flat(small.eval()(image))
        yield "correct", "yes" if float((found - expected).norm() / expected.norm()) < 1e-4 else "no"
    with tempfile.TemporaryDirectory() as folder:
        torch.save(tp.state_dict(small), f"{folder}/small.pth")
        again = tp.load_state_dict(_create(name), torch.load(f"{folder}/small.pth", weights_only=False))
        yield "reloaded", _equal(again, small, image)


def _pruned_and_runs(model: nn.Module, small: nn.Module, image: torch.Tensor, logits: torch.Tensor) -> Iterator[tuple[str, str]]:
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    yield "params_kept", f"{after / before:.3f}"
    yield "pruned", "yes" if after < before else "no"
    with torch.no_grad():
        found = flat(small.eval()(image))
    flat(copy.deepcopy(small).train()(image)).sum().backward()  # a copy: training changes statistics
    yield "forward", "yes" if found.shape == logits.shape and bool(torch.isfinite(found).all()) else "no"


def _equal(again: nn.Module, small: nn.Module, image: torch.Tensor) -> str:
    with torch.no_grad():
        return "yes" if torch.equal(flat(again.eval()(image)), flat(small.eval()(image))) else "no"


def report(rows: list[dict[str, Any]]) -> None:
    """Print the summary, and every model on which something failed."""
    print("| tool | models | " + " | ".join(CHECKS) + " | seconds (median ± half IQR) |\n" + "|---" * (len(CHECKS) + 3) + "|")
    for tool in TOOLS:
        own = [row for row in rows if row["tool"] == tool]
        if not own:
            continue
        cells = []
        for check in CHECKS:
            yes, undefined = (sum(row[check] == value for row in own) for value in ("yes", "n/a"))
            cells.append(f"{yes}" + (f" (+ {undefined} n/a)" if undefined else ""))
        seconds = [float(row["seconds"]) for row in own]
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        time_ = f"{statistics.median(seconds):.1f} ± {(high - low) / 2:.1f}"
        print(f"| {tool} | {len(own)} | {' | '.join(cells)} | {time_} |")
    print("\n| file | model | tool | " + " | ".join(CHECKS) + " | s | error |\n" + "|---" * (len(CHECKS) + 5) + "|")
    for row in sorted(rows, key=lambda row: (row["file"], TOOLS.index(row["tool"]))):
        if any(row[check] == "no" for check in CHECKS):
            error = str(row["error"]).replace("|", "/")
            cells = [row["file"], row["model"], row["tool"], *(row[check] for check in CHECKS), row["seconds"], error]
            print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="where results are kept; beside it, the list of models")
    parser.add_argument("--only", nargs="+", metavar="FILE", help="model files of timm, without .py")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one model and tool")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop starting new ones after this long")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--report", action="store_true", help="only print what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.fresh:
        args.csv.unlink(missing_ok=True)
    rows = read(args.csv)
    if not args.report:
        started, done = time.perf_counter(), {(row["model"], row["tool"]) for row in rows}
        models = smallest_of_each_file(args.csv.with_suffix(".models.csv"), args.only)
        for file, name in models.items():
            for tool in TOOLS:
                late = time.perf_counter() - started > 60 * args.minutes
                if (name, tool) in done or late:
                    continue
                found = attempt(steps, (name, tool), args.limit, stop="no")
                rows.append({"file": file, "model": name, "tool": tool, **dict.fromkeys(CHECKS, "no"), **found})
                append(args.csv, FIELDS, rows[-1])
        missing = sum((name, tool) not in {(row["model"], row["tool"]) for row in rows} for name in models.values() for tool in TOOLS)
        print(f"{missing} of {len(TOOLS) * len(models)} rows still missing\n" if missing else "")
    report(rows)


if __name__ == "__main__":
    main()
