"""Elastic widths on timm's families: on how many do slimmable networks and NetAug run, learn, and export to the bit?

Claim: on all.

For each model, in a process of its own with a limit of time (`--limit` seconds) and one thread, twice:

- slim: `<name>__slim` at 25, 50, 75 and 100%; netaug: `<name>__netaug` with r=2, s=1;
- made: it is created;
- runs: at every width (netaug: as the base) forward gives finite outputs in eval mode;
- learns: a step forward and backward in train mode, at the narrowest width (netaug: at drawn widths), gives gradients to the bank;
- equal: every exported width (netaug: the exported base, which is of the base's own class) gives the same outputs to the bit.

Results go to a CSV file as they come; started again with the same file, the script does what is missing.

    python tests/benchmarks/elastic_families.py --csv /tmp/elastic.csv
    python tests/benchmarks/elastic_families.py --csv /tmp/few.csv --models test_resnet test_vit --kinds slim
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rows import append, attempt, read, smallest_of_each_file

from zoo_compress.surgery.verify import flat

KINDS = ("slim", "netaug")
CHECKS = ("made", "runs", "learns", "equal")
FIELDS = ("model", "kind", *CHECKS, "seconds", "error")


def steps(name: str, kind: str) -> Iterator[tuple[str, str]]:
    """Do what the columns say, one after the other, yielding (column, "yes" or "no")."""
    torch.manual_seed(0)
    net: Any = timm.create_model(f"{name}__{kind}", **({} if kind == "slim" else {"r": 2, "s": 1})).eval()
    yield "made", "yes"
    image = torch.randn(2, *net.pretrained_cfg["input_size"])
    equal = finite = True
    for width in net.widths if kind == "slim" else (None,):
        if width is not None:
            net.set_width(width)
        small = (net.export() if width is None else net.export(width)).eval()
        with torch.no_grad():
            found, expected = flat(net(image)), flat(small(image))
        finite = finite and bool(found.isfinite().all())
        equal = equal and torch.equal(found, expected)
        equal = equal and (width is not None or type(small) is type(timm.create_model(name)))
    yield "runs", "yes" if finite else "no"
    net.train()
    if kind == "slim":
        net.set_width(net.widths[0])
    else:
        net.draw(np.random.default_rng(0))
    flat(net(image)).sum().backward()
    yield "learns", "yes" if any(p.grad is not None for p in net.parameters()) else "no"
    yield "equal", "yes" if equal else "no"


def report(rows: list[dict[str, Any]]) -> None:
    """Print how many models come how far, and every one on which something failed."""
    print("| kind | models | " + " | ".join(CHECKS) + " |\n" + "|---" * (len(CHECKS) + 2) + "|")
    for kind in KINDS:
        own = [row for row in rows if row["kind"] == kind]
        count = Counter(check for row in own for check in CHECKS if row[check] == "yes")
        print(f"| {kind} | {len(own)} | {' | '.join(str(count[check]) for check in CHECKS)} |")
    for row in rows:
        if any(row[check] != "yes" for check in CHECKS):
            print(f"{row['model']}, {row['kind']}: {', '.join(check for check in CHECKS if row[check] != 'yes')} not; {row['error']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="where results are kept; beside it, the list of models")
    parser.add_argument("--models", nargs="+", help="architectures instead of the smallest of each model file")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one model and kind")
    parser.add_argument("--report", action="store_true", help="only print what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = read(args.csv)
    if not args.report:
        done = {(row["model"], row["kind"]) for row in rows}
        models = args.models or smallest_of_each_file(args.csv.with_suffix(".models.csv")).values()
        for name, kind in ((name, kind) for name in models for kind in args.kinds):
            if (name, kind) not in done:
                rows.append({"model": name, "kind": kind, **dict.fromkeys(CHECKS, "no"), **attempt(steps, (name, kind), args.limit)})
                append(args.csv, FIELDS, rows[-1])
    report(rows)


if __name__ == "__main__":
    main()
