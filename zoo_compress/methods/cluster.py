"""Shared weights: those of a layer are the members of few clusters, each of one value.

Han et al. 2016, Deep Compression, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from ..errors import CompressError
from ..structure.packed import MAX_BITS, Packing
from ..surgery.kmeans import kmeans, nearest
from ..surgery.masks import mask_
from ..surgery.modules import copied, takes_model
from ..surgery.origin import packed_of, stamp_packed
from ..surgery.packing import as_integers
from ..surgery.weights import check_finite, layer_weights
from ..training.task import ChangeConfig


@takes_model
def cluster(model: nn.Module, bits: int | Mapping[str, int] = 4, *, exclude: Iterable[str] = ()) -> nn.Module:
    """A copy of a model whose weights of convolutions and linear layers have at most 2^bits values each, by k-means of every layer.

    Nothing is trained. Fine-tuning by this package's loop moves the values and keeps who shares them, in a loop of your own
    `zoo_compress.keep_packed` does; a value gets the sum of its weights' gradients, so plain SGD wants a much lower learning rate than
    for single weights, and Adam about the same. Saving stores the values and `bits` bits a weight, or less where a Huffman code is
    smaller. In a sparse model only the weights that are left are clustered, and where these are few each keeps its value.

    Args:
        model: The model. It is not changed. Compressed models too.
        bits: Of an index into a layer's values, 1 to 8; or pattern of parameter names → bits, of which the first that matches counts,
            and weights that none matches stay as they are. The paper has 8 in convolutions and 5 in linear layers.
        exclude: Patterns of parameter names to leave alone. The classifier is not, unless it is named here.

    Returns:
        A new model, `<architecture>__clustered`.

    Raises:
        CompressError: If bits are out of range, nothing matches, or a layer has fewer values than clusters.
    """
    weights = layer_weights(model, exclude)
    chosen = _bits(weights, bits)
    subject, before = copied(model), packed_of(model)
    masked = {name for name in chosen if name in before and before[name].mask}
    # Of layers that are removed whole there is nothing to share.
    chosen = {name: wanted for name, wanted in chosen.items() if name not in masked or as_integers(weights[name]).any()}
    for name, wanted in chosen.items():
        _share(subject.get_parameter(name), name, wanted, masked=name in masked)
    stamp_packed(subject, "clustered", {name: Packing(bits=wanted) for name, wanted in chosen.items()})
    return subject


@torch.no_grad()
def _share(weight: Tensor, name: str, bits: int, *, masked: bool) -> None:
    """Give the weights of one layer that are not removed the values of their clusters, in place."""
    kept = as_integers(weight) != 0 if masked else torch.ones_like(weight, dtype=torch.bool)
    values = weight[kept].double().cpu().numpy()
    check_finite(weight, name, "cluster")
    found = len(np.unique(values[:4096]))
    if found < 2**bits:  # only then is it worth the time to look at all of them
        found = len(np.unique(values))
    if masked and found < 2**bits:
        return  # sparsifying left so few that each has a value of its own
    if found < 2**bits:
        raise CompressError(
            f"cluster: {name!r}: expected at least the {2**bits} values of {bits} bits, found {found}; exclude it, or take fewer bits"
        )
    centroids = kmeans(values, 2**bits)
    shared = torch.from_numpy(centroids).to(weight.dtype)[torch.from_numpy(nearest(values, centroids))]
    weight[kept] = shared.to(weight.device)
    if masked:
        mask_(weight, kept)


def _bits(weights: Mapping[str, nn.Parameter], bits: object) -> dict[str, int]:
    """Bits of every weight that gets any."""
    patterns = _by_pattern(bits)
    found: dict[str, int] = {}
    for pattern, value in patterns.items():
        matched = [name for name in weights if fnmatchcase(name, pattern)]
        if not matched:
            raise CompressError(f"bits: {pattern!r} matches none of the weights such as {next(iter(weights))!r}")
        found = {**dict.fromkeys(matched, value), **found}
    return {name: found[name] for name in weights if name in found}


def _by_pattern(bits: object) -> dict[str, Any]:
    patterns = dict(bits) if isinstance(bits, Mapping) else {"*": bits}
    for pattern, value in patterns.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_BITS:
            raise CompressError(f"bits: expected 1 to {MAX_BITS}, or a pattern of parameter names for each, found {value!r}")
        if not isinstance(pattern, str):
            raise CompressError(f"bits: expected patterns of parameter names such as 'fc.*', found {pattern!r}")
    if not patterns:
        raise CompressError("bits: expected at least one pattern of parameter names, found none")
    return patterns


class ClusterConfig(ChangeConfig):
    """Let weights share values; see `cluster` for what the settings are."""

    noun = "clustering"
    kind: Literal["cluster"] = "cluster"
    bits: int | dict[str, int] = 4
    exclude: Annotated[tuple[str, ...], Field(strict=False)] = ()

    @field_validator("bits")
    @classmethod
    def _in_range(cls, bits: int | dict[str, int]) -> int | dict[str, int]:
        _by_pattern(bits)
        return bits

    def apply(self, model: nn.Module, images: Iterable[object], seed: int) -> nn.Module:
        return cluster(model, self.bits, exclude=self.exclude)
