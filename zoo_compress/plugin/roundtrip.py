"""Proof that a saved model is the one that was given: both run on the same images, and every module must give the same to the bit."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from ..errors import CompressError
from ..surgery.draws import same_draws
from ..surgery.elastic import Elastic
from ..surgery.modules import every_output, statistics, twin
from ..surgery.outputs import tensors_in
from ..surgery.tracer import MODEL_ERRORS

_logger = logging.getLogger(__name__)

SCALES = (1.0, 8.0)
"""Deviation of the noise in the images that both models run on: large values reach where activations differ that agree on small ones."""

REMEDY = (
    "A file holds what timm's factory was asked for, weights, and what zoo_compress changed. For other classes use reset_classifier or "
    "num_classes=, pass other changes to timm.create_model as arguments, and save before blocks are merged (reparameterize, fuse)"
)

RUNTIME = ("fused_attn",)
"""Attributes by which timm's modules remember a switch of the whole process (`timm.layers.set_fused_attn`), which no file is about."""

Digests = dict[str, list[bytes]]
"""Path of a module → digests of what its calls gave."""


def check_same(model: nn.Module, again: nn.Module) -> None:
    """Check that a model that was saved and created again computes what the one given does.

    Both run in eval mode on two images of noise, of the size the model takes, in the model's own precision, device and memory format. No
    module that both have may give anything else, to the bit: what a branch computes matters though a weight of zero silences it today.

    Args:
        model: The model that is saved. It is left as it was.
        again: What timm makes of the files. It is moved and changed.

    Raises:
        CompressError: Naming the first module that computes something else, and what to do.
    """
    _like(again, model)
    structure = _structural(model, again)
    if structure is not None:
        raise CompressError(f"save: {structure}, which a file does not hold. {REMEDY}")
    images = _images(model)
    for subject, other in zip(_settings(twin(model)), _settings(again), strict=True):
        _compare(subject, other, images)
    _say_of_training(model, again)


def _settings(model: nn.Module) -> Iterator[nn.Module]:
    """A model at each setting at which it is looked at: a network of several widths at its narrowest and as a whole."""
    if isinstance(model, Elastic):
        model.set_widths(min((choice.sizes for choice in model.choices), key=model.layout.macs, default=model.layout.base_sizes))
        yield model
        model.set_widths(model.layout.base_sizes)
    yield model


def _compare(model: nn.Module, again: nn.Module, images: Tensor) -> None:
    expected, failure = _run(model, images)
    if failure is not None:
        raise CompressError(f"save: {type(model).__name__} does not run on images of shape {tuple(images.shape)}: {failure}") from failure
    found, failure = _run(again, images)
    path = next((path for path, digests in expected.items() if found.get(path, digests) != digests), None)
    if failure is None and path is None:
        return
    repeated, _ = _run(model, images)
    if failure is None and repeated != expected:
        _logger.warning(
            f"save: {type(model).__name__} gives something else each time it runs, with the same random numbers from torch: only names "
            "and shapes of its tensors were compared with what comes back"
        )
        return
    reason = first_difference(model, again, path or "", apart=failure is not None)
    if reason is None:
        where = f"{path} ({type(model.get_submodule(path)).__name__})" if path else f"the {type(model).__name__}"
        reason = f"{where} computes something else than what comes back{f': {failure}' if failure else ''}"
    raise CompressError(f"save: {reason}. {REMEDY}")


def _like(again: nn.Module, model: nn.Module) -> None:
    """Give every tensor the precision, device and memory format of the one it stands for, and modules their switches."""
    modules = dict(model.named_modules())
    for path, module in again.named_modules():
        switches = {name: value for name, value in vars(modules.get(path, module)).items() if name in RUNTIME}
        vars(module).update((name, value) for name, value in switches.items() if name in vars(module))
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    for module_path, module in again.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                like = own.get(f"{module_path}.{key}" if module_path else key)
                if tensor is None or like is None or tensor.shape != like.shape:
                    continue
                moved = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).copy_(tensor.detach())
                if isinstance(tensor, nn.Parameter):
                    tensor.data = moved
                else:
                    tensors[key] = moved


def _images(model: nn.Module) -> Tensor:
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    noise = torch.randn(len(SCALES), *get_model_input_config(model)["input_size"], generator=torch.Generator().manual_seed(0))
    images = noise * torch.tensor(SCALES).reshape(-1, 1, 1, 1)
    return images if parameter is None else images.to(parameter.device, parameter.dtype)


def _run(model: nn.Module, images: Tensor) -> tuple[Digests, Exception | None]:
    """Digests of what every module gives, in the order in which modules end, the whole by an empty path; and what went wrong."""
    found: Digests = {}

    last: list[Any] = [None, 0, b""]  # what a block gives is what its last layer gave

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            version = out._version if isinstance(out, Tensor) else 0
            if out is not last[0] or version != last[1]:
                last[:] = out, version, _digest(out)
            found.setdefault(path, []).append(last[2])

        return hook

    handles = [module.register_forward_hook(watch(path)) for path, module in model.named_modules()]
    model.eval()
    try:
        with same_draws(images.device), torch.no_grad(), every_output(model):
            model(images)
    except MODEL_ERRORS as error:
        return found, error
    finally:
        for handle in handles:
            handle.remove()
    return found, None


def _digest(output: Any) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for leaf in tensors_in(output):
        found.update(f"{tuple(leaf.shape)}{leaf.dtype}".encode())
        dense = leaf.detach().cpu().contiguous()
        found.update(dense.reshape(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b"")
    return found.digest()


def _structural(model: nn.Module, again: nn.Module) -> str | None:
    """A difference that two images may not show: the eps of a norm that hides behind a coarse precision."""
    others = dict(again.named_modules())
    for path, module in model.named_modules():
        eps, came = (vars(each).get("eps") for each in (module, others.get(path, module)))
        if eps != came:
            return f"{path or type(model).__name__}.eps is {eps}, and comes back as {came}"
    return None


def _say_of_training(model: nn.Module, again: nn.Module) -> None:
    """Say what comes back differently and matters in training only. Drop rates are left out: timm stores none."""
    others = dict(again.named_modules())
    for path in statistics(model):
        momentum, came = (getattr(each, "momentum", None) for each in (model.get_submodule(path), others.get(path)))
        if path in others and momentum != came:
            _logger.warning(f"save: {path}.momentum is {momentum}, and comes back as {came}: a file does not hold it")
            return


def first_difference(model: nn.Module, again: nn.Module, path: str = "", *, apart: bool = True) -> str | None:
    """The first module of one model, in its order, of which another model has a different one, and how they differ; None if none is seen.

    Args:
        model: The model that is saved.
        again: What timm makes of the files.
        path: Where to look: at the module of that path and what is inside.
        apart: Whether to look at all that is inside. Else only at what `again` has nothing of, and at the module itself.
    """
    others, prefix = dict(again.named_modules()), f"{path}." if path else ""
    for name, module in model.named_modules():
        if name != path and not (name.startswith(prefix) and (apart or name not in others)):
            continue
        other, what = others.get(name), f"{name or 'the model'} ({type(module).__name__})"
        if other is None:
            return f"{what} does not come back"
        if type(other) is not type(module):
            return f"{what} comes back as {type(other).__name__}"
        for key, value in vars(module).items():
            back = vars(other).get(key)
            if not key.startswith("_") and key != "training" and type(value) in (int, float, bool, str, tuple) and back != value:
                return f"{what} has {key} {value!r}, and comes back with {back!r}"
        for key, tensor in {**module._parameters, **module._buffers}.items():
            back = getattr(other, key, None)
            shapes = [None if each is None else tuple(each.shape) for each in (tensor, back)]
            if shapes[0] != shapes[1]:
                return f"{what} has {key} of shape {shapes[0]}, and comes back with {shapes[1]}"
        if len(module._forward_hooks) + len(module._forward_pre_hooks) != len(other._forward_hooks) + len(other._forward_pre_hooks):
            return f"{what} has forward hooks, and comes back without"
    return None
