"""Weights as they lie in a file: a mask of one bit an element, and the values kept, or a codebook with indices of few bits into it.

A parameter `layer.weight` is stored as tensors `layer.weight.shape`, `.mask`, `.values`, `.codebook`, `.indices`, of which it has what it
needs. Mask and indices are Huffman-coded (`.mask_coded`, `.indices_coded`; Han et al. 2016, section 4) where that is smaller. No
parameter of a module can have such a name: `layer` would need a submodule `weight` beside its parameter of that name, which torch
refuses. Equal means equal to the bit: -0.0 is a value like any other, only +0.0 is no weight.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..errors import VariantError
from ..structure.packed import MAX_BITS, Packing
from ..structure.stored import MAX_SIZE

PARTS = ("shape", "mask", "mask_coded", "values", "codebook", "indices", "indices_coded")
NAME_BYTES = 96
"""About what one more tensor takes in the header of a file."""

WORTH = 0.97
"""A code is taken if it is smaller than this part of what it stands for."""

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**20


def as_integers(tensor: Tensor) -> Tensor:
    """The bits of a floating-point tensor's elements as integers; shares memory with a contiguous one. +0.0 is 0, -0.0 is not."""
    return tensor.detach().contiguous().view(_WHOLE[tensor.element_size()])


def pack_bits(mask: np.ndarray) -> np.ndarray:
    """Booleans (n,) as bytes (ceil(n / 8),), the first in the lowest bit."""
    return np.packbits(mask, bitorder="little")


def unpack_bits(packed: np.ndarray, count: int) -> np.ndarray:
    """The first `count` booleans of what `pack_bits` gave."""
    return np.unpackbits(packed, count=count, bitorder="little").astype(bool)


def assignments(tensor: Tensor, packing: Packing) -> Tensor | None:
    """Which of its values each element of a parameter has: integers of its shape, -1 where it is removed.

    Returns:
        None if there are more values than its record says. Weights drawn anew (those of a new classifier), or trained as if they were
        free, are so.
    """
    whole = as_integers(tensor.cpu()).flatten().numpy()
    kept = whole != 0 if packing.mask else np.ones(len(whole), dtype=bool)
    found = _few(whole[kept], 2 ** (packing.bits or 0))
    if found is None:
        return None
    out = np.full(len(whole), -1, dtype=np.int64)
    out[kept] = found[1]
    return torch.from_numpy(out).view(tensor.shape).to(tensor.device)


def pack(tensor: Tensor, packing: Packing) -> dict[str, Tensor] | None:
    """The parts of a parameter as they are stored; None if nothing is smaller than the parameter itself.

    Args:
        tensor: On the CPU.
        packing: What to look for. Values are only looked for where it says that they are few; if they are not, there is no codebook.
    """
    whole = as_integers(tensor).flatten().numpy()
    kept = whole != 0
    shape = {"shape": torch.tensor(tensor.shape, dtype=torch.int64)}
    ways: list[dict[str, Tensor]] = []
    if packing.bits is not None:
        ways += [_coded(whole, tensor.dtype, _most(packing.bits, masked=False))]
    if not kept.all():
        mask = _smaller("mask", pack_bits(kept), pack_bits(kept))
        ways += [{**mask, "values": tensor.flatten()[torch.from_numpy(kept)]}]
        if packing.bits is not None:
            ways += [{**mask, **_coded(whole[kept], tensor.dtype, _most(packing.bits, masked=True))}]
    ways = [{**shape, **way} for way in ways if "values" in way or "codebook" in way]
    best = min(ways, key=_bytes, default=None)
    return best if best is not None and _bytes(best) < tensor.nbytes + NAME_BYTES else None


def unpack(parts: Mapping[str, Tensor], packing: Packing, where: str, most: int = MAX_SIZE) -> Tensor:
    """The parameter that `pack` took apart, equal to the bit. Nothing of its size is allocated before its parts are known to fit.

    Args:
        parts: Name of a part → tensor, from anywhere.
        packing: What the record says of it.
        where: File and parameter, for messages.
        most: Elements it may have.

    Raises:
        VariantError: Naming the part, what was expected and what was found.
    """
    found = _Parts(parts, where)
    shape = found.sizes(most)
    count = math.prod(shape)
    kept, left = None, count
    if found.has("mask"):
        packed = found.coded("mask", -(-count // 8), f"bytes for {count} elements")
        kept = unpack_bits(packed, count)
        left = int(kept.sum())
        if left != int(np.unpackbits(packed).sum()):
            raise found.wrong("mask", "bits after the last element that are 0", "others")
    if not found.has("codebook"):
        if kept is None:
            raise found.wrong("mask", "a mask or a codebook", f"only {', '.join(parts)}")
        values = found.part("values", "floats")
        if len(values) != left:
            raise found.wrong("values", f"the {left} that its mask keeps", len(values))
    else:
        values = _looked_up(found, packing, left, masked=kept is not None)
    if kept is None:
        return values.reshape(shape)
    tensor = torch.zeros(count, dtype=values.dtype)
    tensor[torch.from_numpy(kept)] = values
    return tensor.reshape(shape)


def _looked_up(found: _Parts, packing: Packing, count: int, *, masked: bool) -> Tensor:
    """The values of so many elements by their indices into a codebook."""
    codebook = found.part("codebook", "floats")
    most = _most(packing.bits or 0, masked=masked)
    if packing.bits is None or not 1 <= len(codebook) <= most:
        raise found.wrong("codebook", f"at most {most} values, as its record says" if packing.bits else "none in its record", len(codebook))
    bits = _bits(len(codebook))
    if "indices_coded" in found.parts:
        indices = found.coded("indices", count, f"indices of {count} elements")
    else:
        packed = found.coded("indices", -(-count * bits // 8), f"bytes for {count} elements of {bits} bits")
        indices = _unpack_indices(packed, count, bits)
    if count and int(indices.max()) >= len(codebook):
        raise found.wrong("indices", f"all below {len(codebook)}, the size of the codebook", int(indices.max()))
    return codebook[torch.from_numpy(indices.astype(np.int64))]


class _Parts:
    """The parts of one parameter, from anywhere."""

    def __init__(self, parts: Mapping[str, Tensor], where: str) -> None:
        self.parts, self.where = parts, where

    def wrong(self, part: str, expected: str, found: object) -> VariantError:
        return VariantError(f"{self.where}.{part}: expected {expected}, found {found}")

    def has(self, part: str) -> bool:
        return part in self.parts or f"{part}_coded" in self.parts

    def part(self, name: str, kind: str) -> Tensor:
        if name not in self.parts:
            raise self.wrong(name, f"a packed parameter's {name}", f"only {', '.join(self.parts) or 'nothing'}")
        tensor = self.parts[name]
        fits = {"bytes": tensor.dtype == torch.uint8, "floats": tensor.is_floating_point(), "sizes": tensor.dtype == torch.int64}[kind]
        if not fits or tensor.ndim != 1:
            raise self.wrong(name, f"one dimension of {kind}", f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
        return tensor

    def sizes(self, most: int) -> list[int]:
        shape = self.part("shape", "sizes").tolist()
        if len(shape) > 16 or not all(1 <= size <= MAX_SIZE for size in shape):
            raise self.wrong("shape", f"at most 16 sizes of 1 to {MAX_SIZE}", str(shape)[:80])
        if math.prod(shape) > most:
            raise self.wrong("shape", f"at most {most} elements, in proportion to its file", math.prod(shape))
        return shape

    def coded(self, name: str, size: int, what: str) -> np.ndarray:
        """So many bytes, Huffman-coded or as they are."""
        if name in self.parts and f"{name}_coded" in self.parts:
            raise self.wrong(name, f"one of {name} and {name}_coded", "both")
        if f"{name}_coded" not in self.parts:
            found = self.part(name, "bytes").numpy()
            if len(found) != size:
                raise self.wrong(name, f"{size} {what}", len(found))
            return found
        name = f"{name}_coded"
        stream = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = stream.decompress(self.part(name, "bytes").numpy().tobytes(), max(1, size))
        except zlib.error as error:
            raise self.wrong(name, f"{size} {what}, Huffman-coded", f"a damaged stream: {error}") from error
        if len(data) != size or not stream.eof or stream.unused_data:
            raise self.wrong(name, f"{size} {what}, Huffman-coded", "more or fewer")
        return np.frombuffer(data, dtype=np.uint8)


def pack_state(state: Mapping[str, Tensor], packed: Mapping[str, Packing]) -> dict[str, Tensor]:
    """A state with the parameters of a record packed, those for which that is smaller."""
    out = {}
    for name, tensor in state.items():
        parts = pack(tensor, packed[name]) if name in packed else None
        out.update({name: tensor} if parts is None else {f"{name}.{part}": value.contiguous() for part, value in parts.items()})
    return out


def unpack_state(state: Mapping[str, Tensor], packed: Mapping[str, Packing], where: str, most: int = MAX_SIZE) -> dict[str, Tensor]:
    """The state that `pack_state` got.

    Args:
        state: From anywhere.
        packed: What the record says of parameters.
        where: The file, for messages.
        most: Elements that all of them together may have.

    Raises:
        VariantError: What is packed does not fit the record or is damaged.
    """
    out = dict(state)
    for name, packing in packed.items():
        parts = {part: out.pop(f"{name}.{part}") for part in PARTS if name not in state and f"{name}.{part}" in out}
        if parts:
            out[name] = unpack(parts, packing, f"{where}: tensor {name!r}", most)
            most -= out[name].numel()
    return out


def _most(bits: int, *, masked: bool) -> int:
    """How many values a codebook may have: as many as its bits tell apart, and without a mask one more, that of what is removed."""
    return min(2**MAX_BITS, 2**bits + (not masked))


def _bits(values: int) -> int:
    """Bits of an index into so many values."""
    return max(1, (values - 1).bit_length())


def _few(whole: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The distinct values of elements, ascending as integers, and which of them each has; None if there are more than `most`."""
    if len(np.unique(whole[:4096])) > most:  # sorting them all takes long
        return None
    values = np.unique(whole)
    return (values, np.searchsorted(values, whole)) if len(values) <= most else None


def _coded(whole: np.ndarray, dtype: torch.dtype, most: int) -> dict[str, Tensor]:
    """Codebook and indices of elements given as integers; empty where there are more values than `most`."""
    found = _few(whole, most)
    if found is None or not len(whole):
        return {}
    values, indices = found
    single = indices.astype(np.uint8)
    return {"codebook": torch.from_numpy(values).view(dtype), **_smaller("indices", _pack_indices(single, _bits(len(values))), single)}


def _smaller(name: str, raw: np.ndarray, symbols: np.ndarray) -> dict[str, Tensor]:
    """Bytes as they are, or the symbols they stand for as a Huffman code, if that saves something worth the name."""
    stream = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_HUFFMAN_ONLY)
    coded = stream.compress(np.ascontiguousarray(symbols).tobytes()) + stream.flush()
    if len(coded) < WORTH * len(raw):
        return {f"{name}_coded": torch.from_numpy(np.frombuffer(coded, dtype=np.uint8).copy())}
    return {name: torch.from_numpy(raw)}


def _pack_indices(indices: np.ndarray, bits: int) -> np.ndarray:
    """Indices (n,) of so many bits each, the lowest first, as bytes."""
    # In parts of whole bytes: each index takes `bits` bytes of memory on its way.
    parts = [indices[i : i + _CHUNK] for i in range(0, len(indices), _CHUNK)]
    return np.concatenate([pack_bits((part[:, None] >> np.arange(bits, dtype=np.uint8) & 1).ravel()) for part in parts])


def _unpack_indices(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    out = np.empty(count, dtype=np.uint8)
    for start in range(0, count, _CHUNK):
        part = out[start : start + _CHUNK]
        found = unpack_bits(packed[start * bits // 8 :], len(part) * bits).reshape(len(part), bits)
        part[:] = np.packbits(found, axis=1, bitorder="little")[:, 0]
    return out


def _bytes(parts: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes + NAME_BYTES for tensor in parts.values())
