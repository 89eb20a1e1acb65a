"""Files that a killed run leaves whole: written under a temporary name and renamed.

Tensors are stored as safetensors and the rest as JSON in the same file; nothing is pickled, nothing unpickled.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..errors import CompressError

_FORMAT = "zoo_compress.state.1"


def check_empty(folder: Path) -> None:
    """Refuse to write among files that are there, before the work whose result is to be written.

    Raises:
        CompressError: The folder holds something, or is none.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CompressError(f"{folder}: expected a new or empty folder, found files in it")


def made(folder: Path) -> Path:
    """The folder itself, which exists from then on.

    Raises:
        CompressError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CompressError(f"{str(folder)!r}: expected a folder that can be written, found none and cannot make it: {reason}") from error
    return folder


@contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """A folder on the same disk as a path, for what is renamed to it once it is whole. It is gone afterwards.

    Raises:
        CompressError: Nothing can be written there.
    """
    made(path.parent)
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".making-", dir=path.parent)
    except OSError as error:
        raise CompressError(f"{path}: expected a place in a folder that can be written: {error.strerror}") from error
    with scratch as folder:
        yield Path(folder)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part.

    Args:
        path: the file; its folder exists.
        data: the whole content.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which then takes the place of another or none. Until then, and if writing fails, that one stays.

    Args:
        folder: the place.
    """
    temporary, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("tmp", "old"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Save a tree of dicts, lists, tuples, tensors and JSON scalars as one safetensors file, atomically.

    Args:
        path: the file to write or replace.
        state: the tree, for example `{"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}`.

    Raises:
        CompressError: a leaf is neither a tensor nor a JSON scalar.
    """
    tensors: dict[str, torch.Tensor] = {}
    skeleton = _take_apart(state, "", tensors)
    # safetensors refuses views and shared storage; copies cost little beside training.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomic(path, save(copies, metadata={"format": _FORMAT, "state": json.dumps(skeleton)}))


def load_state(path: Path) -> Any:
    """Load what `save_state` wrote; dicts, lists, tuples, numbers and tensors (on CPU) come back equal to the last bit.

    Raises:
        CompressError: the file is missing, damaged, or not a state.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise CompressError(f"{path}: expected a training state ({_FORMAT}), found {metadata.get('format')!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            return _put_together(json.loads(metadata["state"]), tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CompressError):
            raise
        raise CompressError(f"{path}: expected a training state, found a file that cannot be read: {error}") from error


def _take_apart(node: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The tree as JSON, with every tensor moved to `tensors`; inner nodes are tagged because JSON knows neither tuples nor integer keys."""
    if isinstance(node, torch.Tensor):
        tensors[name] = node
        return {"tensor": name}
    if isinstance(node, Mapping):
        if not all(isinstance(key, str | int) for key in node):
            raise CompressError(f"training state at {name or 'its root'}: expected keys that are strings or integers")
        return {"dict": [[key, _take_apart(value, f"{name}/{key}", tensors)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        return {type(node).__name__: [_take_apart(value, f"{name}/{index}", tensors) for index, value in enumerate(node)]}
    if node is None or type(node) in (bool, int, float, str):
        return node
    raise CompressError(f"training state at {name or 'its root'}: expected a tensor or a JSON scalar, found {type(node).__name__}")


def _put_together(node: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, body),) = node.items()
    if kind == "tensor":
        return tensors[body]
    if kind == "dict":
        return {key: _put_together(value, tensors) for key, value in body}
    items = [_put_together(value, tensors) for value in body]
    return tuple(items) if kind == "tuple" else items
