"""Early exits on timm's families: on how many do they attach, train, let samples leave with unchanged logits, save and reload?

Claim: on all.

For each model, in a process of its own with a limit of time (`--limit` seconds) and one thread:

- attached: `<name>__exits` with as many exits as asked for, or fewer where the model has fewer places, and says so;
- trained: one step of SGD on a batch of two through `zc.ExitsTask`; every exit gives finite logits and every head a gradient;
- leaving (`let_go` exits let them leave the batch; at the others they are computed along): five samples with thresholds at which they
  leave at different exits. The logits of all equal those they get alone, and those of the whole batch at the exit where each leaves, to a
  thousandth (L2). Weights are random ones that make logits differ between samples (`initial` where those give none that do, and statistics
  are estimated): equal logits prove nothing where all samples have the same;
- reloaded: saved and created again by plain `timm.create_model`, all logits equal bit by bit, at the same thresholds too.

Images are of 96×96 where the model takes such (`--size`), else of its own size. Results go to a CSV file as they come; started again
with the same file, the script does what is missing. The models are those of `--families` (JSON, family → name), names on the command line,
or else the smallest architecture of each of timm's model files, which takes some minutes to find out once.

    python tests/benchmarks/exits_families.py --csv /tmp/exits.csv --families families.json
    python tests/benchmarks/exits_families.py --csv /tmp/few.csv test_vit test_resnet densenet121
    python tests/benchmarks/exits_families.py --csv /tmp/exits.csv --retry --limit 900   # do again what did not work
    python tests/benchmarks/exits_families.py --csv /tmp/exits.csv --report              # only print what is there
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from rows import attempt, read, smallest_of_each_file, write
from timm.task import ClassificationTask
from torch import nn

import zoo_compress as zc
from zoo_compress.surgery.leaving import max_softmax
from zoo_compress.surgery.verify import randomise_

STEPS = ("attached", "trained", "leaving", "reloaded")
FIELDS = ("family", "name", *STEPS, "exits", "let_go", "size", "weights", "difference", "seconds", "error")
SAMPLES = 5
TOLERANCE = 1e-3
FAINT = 1e-3
"""Logits that differ less between samples, relative to their size, would show rounding."""


class Vacuous(Exception):
    """Samples cannot be told apart, so that equal logits would prove nothing."""


def steps(name: str, size: int | None, wanted: int, weights: str) -> Iterator[tuple[str, str]]:
    """Do what the columns say, one after the other, yielding (column, value); or ("vacuous", why)."""
    try:
        yield from _steps(name, size, wanted, weights)
    except Vacuous as error:
        yield "vacuous", str(error)


def _steps(name: str, size: int | None, wanted: int, weights: str) -> Iterator[tuple[str, str]]:
    torch.manual_seed(0)
    net: Any = _created(name, size, wanted)
    yield "exits", str(len(net.exits))
    yield "let_go", str(sum(net.leaving))
    yield "size", "×".join(map(str, net.pretrained_cfg["input_size"]))
    yield "attached", "yes"
    shape = net.pretrained_cfg["input_size"]
    _train(net, torch.randn(2, *shape))
    yield "trained", "yes"
    net.eval().requires_grad_(False)
    scale = torch.linspace(0.3, 3, SAMPLES)[:, None, None, None]
    x = torch.randn(SAMPLES, *shape) * scale + torch.randn(SAMPLES, shape[0], 1, 1)
    with torch.no_grad():
        _tell_apart(net, x, weights)
        thresholds, every = _spread(net, x)
    yield "weights", weights
    difference = _difference(net, x, thresholds, every)
    yield "difference", f"{difference:.1e}"
    yield "leaving", "yes" if difference < TOLERANCE else "no"
    with tempfile.TemporaryDirectory() as folder:
        zc.save(net, folder)
        again: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().requires_grad_(False)
    with net.every_output(), again.every_output(), torch.no_grad():
        equal = all(map(torch.equal, net(x), again(x)))
    equal = equal and torch.equal(net.infer(x, threshold=thresholds), again.infer(x, threshold=thresholds))
    yield "reloaded", "yes" if equal else "no"


def _created(name: str, size: int | None, wanted: int) -> nn.Module:
    overlay = {} if size is None else {"pretrained_cfg_overlay": {"input_size": (3, size, size)}}
    while True:
        try:
            return timm.create_model(f"{name}__exits", exits=wanted, num_classes=10, **overlay)
        except zc.CompressError as error:
            most = re.search(r"expected at most (\d+) of them", str(error))
            if most is None or not 0 < int(most[1]) < wanted:
                raise
            wanted = int(most[1])


def _train(net: Any, images: torch.Tensor) -> None:
    task = zc.ExitsTask(ClassificationTask(net, verbose=False)).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    loss = task(images, torch.tensor([1, 2]))["loss"]
    if not torch.isfinite(loss):
        raise zc.CompressError("the loss of the first step is not finite")
    loss.backward()
    missing = [key for key, parameter in net.exits.named_parameters() if parameter.grad is None]
    if missing:
        raise zc.CompressError(f"no gradient for {missing[0]} of the heads")
    optimizer.step()


def _tell_apart(net: Any, x: torch.Tensor, weights: str) -> None:
    """Give a network weights with which samples get different logits, and are sure at different exits."""
    if weights == "random":
        saved = net.state_dict().keys()
        built = {key: buffer.clone() for key, buffer in net.named_buffers() if key not in saved}
        randomise_(net, torch.Generator().manual_seed(1))
        for key, buffer in net.named_buffers():
            if key in built:  # what is not saved has to be as it is built, or a reloaded model differs
                buffer.copy_(built[key])
    else:
        zc.calibrate(net, [x])
    with net.every_output():
        every = net(x)
    for head, logits in zip(net.exits, every[:-1], strict=True):
        # Logits that differ by about 2 between samples, around 0: some samples are surer than others, and none is sure altogether.
        middle, apart = logits.mean(0), float(logits.std(0).mean())
        if not apart > FAINT * float(logits.abs().mean()):
            raise Vacuous("what an exit reads hardly differs between samples")
        head.fc.bias.copy_((head.fc.bias - middle) * 2 / apart)
        head.fc.weight.mul_(2 / apart)


def _spread(net: Any, x: torch.Tensor) -> tuple[list[float], list[torch.Tensor]]:
    """Thresholds at which one sample leaves at each exit, as long as there are any and none is near another; and all logits."""
    with net.every_output():
        every = net(x)
    there, thresholds = list(range(len(x))), []
    for logits in every[:-1]:
        sure = max_softmax(logits)[there].sort(descending=True).values
        apart = len(sure) > 1 and float(sure[0] - sure[1]) > 1e-4
        thresholds.append(float(sure[:2].mean()) if apart else 1.0)
        there = [i for i in there if float(max_softmax(logits)[i]) < thresholds[-1]]
    if not there or len(there) > len(x) - min(2, len(thresholds)):
        raise Vacuous(f"{len(there)} of {len(x)} samples stay to the end")
    if not float(every[-1].std(0).mean()) > 1e-6 * float(every[-1].abs().mean()):
        raise Vacuous("all samples have the same logits")
    return thresholds, every


def _difference(net: Any, x: torch.Tensor, thresholds: list[float], every: list[torch.Tensor]) -> float:
    """How far logits in a batch that shrinks are from those of samples alone and of the whole batch, relative (L2)."""
    found, left = net.infer(x, threshold=thresholds, return_exits=True)
    alone, own = zip(*(net.infer(image[None], threshold=thresholds, return_exits=True) for image in x), strict=True)
    if left.tolist() != torch.cat(own).tolist():
        raise zc.CompressError(f"samples leave at {left.tolist()}, alone at {torch.cat(own).tolist()}")
    whole = torch.stack([every[exit][i] for i, exit in enumerate(left.tolist())])
    return max(float((found - other).norm() / other.norm()) for other in (torch.cat(alone), whole))


def run(name: str, size: int, wanted: int, limit: float) -> dict[str, Any]:
    """One row: at a small size and at the model's own, with random weights and with those it starts with."""
    start = time.perf_counter()
    row: dict[str, Any] = {}
    for side in (size, None):
        for weights in ("random", "initial"):
            found = attempt(steps, (name, side, wanted, weights), limit - (time.perf_counter() - start))
            row = {**dict.fromkeys(FIELDS, ""), **dict.fromkeys(STEPS, "no"), **found}
            if "vacuous" not in row:
                break
            row["error"] = f"no comparison can tell: {row.pop('vacuous')}"
        if works(row) or row["error"].startswith("not done"):
            break
    return {**row, "seconds": f"{time.perf_counter() - start:.0f}"}


def works(row: dict[str, Any]) -> bool:
    """Whether all of it does."""
    return all(row[step] == "yes" for step in STEPS)


def report(rows: list[dict[str, Any]]) -> None:
    """Print how many models come how far, the reasons of failures, and a line for each of these."""
    seconds = [float(row["seconds"]) for row in rows] or [0.0]
    heads = ("models", *STEPS, "samples leave the batch at an exit", "at all exits", "seconds (median, most)")
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    cells = [str(sum(row[step] == "yes" for row in rows)) for step in STEPS]
    cells += [
        str(sum(works(row) and int(row["let_go"] or 0) >= least(row) for row in rows))
        for least in (lambda _: 1, lambda row: int(row["exits"]))
    ]
    print(f"| {len(rows)} | {' | '.join(cells)} | {statistics.median(seconds):.0f}, {max(seconds):.0f} |")
    failed = [row for row in rows if not works(row)]
    if failed:
        print("\n| reason | models |\n|---|---|")
        reasons = Counter(re.sub(r"'[^']*'|\d+", "…", row["error"].partition(" (")[0])[:100] or "other logits" for row in failed)
        for reason, count in reasons.most_common():
            print(f"| {reason.replace('|', '/')} | {count} |")
        print("\n| family | model | " + " | ".join(STEPS) + " | difference | s | error |\n" + "|---" * (len(STEPS) + 5) + "|")
    for row in failed:
        error = row["error"].replace("|", "/")
        cells = [row["family"], row["name"], *(row[step] for step in STEPS), row["difference"], row["seconds"], error]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures of timm")
    parser.add_argument("--csv", type=Path, required=True, help="where results are kept")
    parser.add_argument("--families", type=Path, help="JSON file, family → architecture")
    parser.add_argument("--exits", type=int, default=4)
    parser.add_argument("--size", type=int, default=96, help="side of the images, where a model takes such")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one model")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop starting new ones after this long")
    parser.add_argument("--retry", action="store_true", help="do again what did not work")
    parser.add_argument("--report", action="store_true", help="only print what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {row["name"]: row for row in read(args.csv)}
    if not args.report:
        models = {name: name for name in args.names} or (
            json.loads(args.families.read_text()) if args.families else smallest_of_each_file(args.csv.with_suffix(".models.csv"))
        )
        started = time.perf_counter()
        for family, name in models.items():
            late = time.perf_counter() - started > 60 * args.minutes
            if late or (name in rows and not (args.retry and not works(rows[name]))):
                continue
            rows[name] = {**run(name, args.size, args.exits, args.limit), "family": family, "name": name}
            print(f"{family}, {name}: {'works' if works(rows[name]) else rows[name]['error'] or 'other logits'}", flush=True)
            write(args.csv, FIELDS, list(rows.values()))
        missing = sum(name not in rows for name in models.values())
        print(f"{missing} of {len(models)} models still missing\n" if missing else "")
    report(list(rows.values()))


if __name__ == "__main__":
    main()
