"""Fewer weights and fewer bits on all of timm: does every family survive it, from the masks to the reloaded file?

Claim: on every model file of timm a sparse, a clustered and a binary model is created again by name with the same outputs to the bit, its
file is as small as promised, and a sparse one can be clustered and pruned.

The smallest architecture (by parameters) of each of timm's model files, or those of `--models`, with random weights. Each column is
`yes` where what it made reloaded bit-equal:

- sparse: `zc.sparsify(model, density=0.3)`, and exactly that many weights are left;
- scored: `zc.sparsify(model, density=0.3, criterion="snip", data=…)` on two images;
- n_m: `zc.sparsify(model, pattern="2:4")`;
- clustered: `zc.cluster(sparse, bits=4)`;
- binary: `zc.quantize(model)`;
- pruned: `zc.prune(sparse, macs=0.7)`.

`sparse_bytes`, `clustered_bytes` and `binary_bytes` are their files as fractions of the dense one. Each model runs in a process of its own
with one thread and a limit of time; rows go to a CSV file as they come, and are not done again when the command is run again.

    python tests/benchmarks/packed_families.py --csv /tmp/packed.csv
    python tests/benchmarks/packed_families.py --csv /tmp/few.csv --models test_resnet test_vit
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rows import append, attempt, drawn, read, reloads, smallest_of_each_file
from torch import nn

import zoo_compress as zc
from zoo_compress.surgery.masks import masks_of

CHECKS = ("sparse", "scored", "n_m", "clustered", "binary", "pruned")
SIZES = ("sparse_bytes", "clustered_bytes", "binary_bytes")
FIELDS = ("model", *CHECKS, *SIZES, "seconds", "error")
DENSITY = 0.3


def steps(name: str) -> Iterator[tuple[str, str]]:
    """Do what the columns say, one after the other, yielding (column, value). What one method refuses does not keep others from it."""
    model, image = drawn(name)
    refused = []
    with tempfile.TemporaryDirectory() as folder:
        zc.save(model, folder)
        dense = _bytes(folder)

        def check(column: str, made: Any, *, size: bool = False) -> Iterator[tuple[str, str]]:
            try:
                small = made()
            except zc.CompressError as error:
                refused.append(f"{column}: {error}")
                return
            yield column, reloads(small, image, folder)
            if size:
                yield f"{column}_bytes", f"{_bytes(folder) / dense:.3f}"

        sparse = zc.sparsify(model, density=DENSITY)
        wrong = _left(sparse) != round(DENSITY * sum(mask.numel() for mask in masks_of(model).values()))
        yield from (("sparse", "no (other density)"),) if wrong else check("sparse", lambda: sparse, size=True)
        yield from check("clustered", lambda: zc.cluster(sparse, bits=4), size=True)
        yield from check("pruned", lambda: zc.prune(sparse, macs=0.7))
        yield from check("n_m", lambda: zc.sparsify(model, pattern="2:4"))
        yield from check("binary", lambda: zc.quantize(model), size=True)
        data = [(image, torch.tensor([0, 1]))]
        yield from check("scored", lambda: zc.sparsify(model, density=DENSITY, criterion="snip", data=data))
    yield "error", "; ".join(refused)


def _left(model: nn.Module) -> int:
    return sum(int(mask.sum()) for mask in masks_of(model).values())


def _bytes(folder: str) -> int:
    return (Path(folder) / "model.safetensors").stat().st_size


def report(rows: list[dict[str, Any]]) -> None:
    """Print the summary: what holds how often, what stands in the way, and how small files are."""
    print(f"\n{len(rows)} models; " + ", ".join(f"{check} {sum(row[check] == 'yes' for row in rows)}" for check in CHECKS))
    for row in rows:
        if any(row[check] != "yes" for check in CHECKS):
            print(f"  {row['model']}: {', '.join(check for check in CHECKS if row[check] != 'yes')} no: {row['error']}")
    for size in SIZES:
        shares = [float(row[size]) for row in rows if row[size]]
        if shares:
            print(f"  {size}: median {statistics.median(shares):.3f} of the dense file, {min(shares):.3f} to {max(shares):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--models", nargs="+", help="architectures instead of one of each model file")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one model")
    parser.add_argument("--report", action="store_true", help="only print what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = read(args.csv)
    if not args.report:
        done = {row["model"] for row in rows}
        for name in args.models or smallest_of_each_file(args.csv.with_suffix(".models.csv")).values():
            if name in done:
                continue
            found = {**dict.fromkeys(CHECKS, "no"), **dict.fromkeys(SIZES, ""), **attempt(steps, (name,), args.limit)}
            rows.append({"model": name, **found})
            append(args.csv, FIELDS, rows[-1])
            print(name, {check: rows[-1][check] for check in CHECKS}, rows[-1]["seconds"], rows[-1]["error"], flush=True)
    report(rows)


if __name__ == "__main__":
    main()
