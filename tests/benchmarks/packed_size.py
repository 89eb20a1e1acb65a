"""File sizes of sparse, clustered, binary and ternary checkpoints: what is stored, and what each step of packing saves.

For every checkpoint, the bytes of the weights that are packed, in parts: dense; the values (or codebooks) and bit-packed masks and indices
that the method promises; what the file takes with Huffman codes; and the entropy, below which no code of single symbols gets. Han et al.
2016 (Deep Compression) report 35 to 49 times for AlexNet and VGG-16, whose linear layers have 96% and 89% of all weights; these are
removed to 4% to 25% of themselves and take 5 bits each.

Run on what recipes saved:

    zoo-compress run recipes/bits/fmnist_deep_compression.yaml
    python tests/benchmarks/packed_size.py runs/fmnist_deep_compression/model --data fashion_mnist
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import zoo_compress as zc
from zoo_compress.plugin.weights import WEIGHTS
from zoo_compress.structure.packed import Packing
from zoo_compress.structure.variant import Variant
from zoo_compress.surgery.packing import assignments, pack
from zoo_compress.training.config import DataConfig
from zoo_compress.training.data import eval_loader
from zoo_compress.training.loop import evaluate
from zoo_compress.training.sources import open_source


def entropy(counts: torch.Tensor) -> float:
    """Bits of so many symbols of each kind, in their best code of single symbols."""
    share = counts[counts > 0].double() / counts.sum()
    return float(counts.sum() * -(share * share.log2()).sum())


def sizes(weight: torch.Tensor, packing: Packing) -> dict[str, float]:
    """Bytes of one parameter, by ways to store it."""
    kept = weight != 0 if packing.mask else torch.ones_like(weight, dtype=torch.bool)
    places = weight.numel() / 8 if packing.mask else 0
    counts = torch.stack([kept.sum(), (~kept).sum()])
    if packing.bits is None:
        values = least = 4.0 * float(kept.sum())
    else:
        found = assignments(weight, packing)
        assert found is not None
        used = torch.bincount(found[kept])
        values = 4 * len(used) + float(kept.sum()) * packing.bits / 8
        least = 4 * len(used) + entropy(used) / 8
    parts = pack(weight, packing)
    return {
        "dense": weight.nbytes,
        "bits": places + values,
        "stored": sum(part.nbytes for part in parts.values()) if parts else weight.nbytes,
        "entropy": least + (entropy(counts) / 8 if packing.mask else 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="Saved models.")
    parser.add_argument("--data", help="Evaluate on this source too.")
    options = parser.parse_args()
    print(f"{'':34}{'file':>11}{'ratio':>7} | packed weights: {'dense':>11}{'bits':>11}{'stored':>11}{'entropy':>11}{'ratio':>7}   top-1")
    for folder in options.folders:
        model = zc.load(folder).eval()
        variant = Variant.from_dict(model._model_args["variant"])
        total = dict.fromkeys(("dense", "bits", "stored", "entropy"), 0.0)
        for name, packing in variant.packed.items():
            for key, value in sizes(model.get_parameter(name).detach(), packing).items():
                total[key] += value
        file, whole = (folder / WEIGHTS).stat().st_size, sum(tensor.nbytes for tensor in model.state_dict().values())
        top1 = ""
        if options.data:
            config = DataConfig(source=options.data)
            source = open_source(config, model.in_chans)
            top1 = f"{evaluate(model, eval_loader(source, config, model))['top1']:.2f}%"
        cells = "".join(f"{total[key]:>11,.0f}" for key in total)
        ratio = f"{total['dense'] / total['stored']:.1f}×"
        print(f"{str(folder)[-33:]:34}{file:>11,}{f'{whole / file:.1f}×':>7} | {'':16}{cells}{ratio:>7}   {top1}", flush=True)


if __name__ == "__main__":
    main()
