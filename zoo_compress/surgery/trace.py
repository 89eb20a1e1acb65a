"""Analysis: run a model on tensors without data and infer the layout of its parameters."""

from __future__ import annotations

import gc
import itertools
import logging
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..errors import AnalysisError
from ..structure import unify as u
from ..structure.layout import Layout
from ..structure.terms import Term
from ..structure.unify import Variable
from . import metadata, ties, vanishing
from .draws import same_draws
from .elastic import Elastic
from .finish import finish
from .modes import Functions, Operations
from .modules import eval_copy, every_output, takes_model
from .outputs import gives_features, tensors_in
from .sizes import UnhashableError, heard_by
from .torch_attention import no_fast_path
from .tracer import MODEL_ERRORS, Tracer, named_tensors
from .unseen import freeze_unseen

_logger = logging.getLogger(__name__)

BATCH = 2  # a batch of one could be mistaken for a dimension to broadcast


@takes_model
def analyze(model: nn.Module, example_input: torch.Tensor | None = None, *, tie: Iterable[tuple[str, str]] = ()) -> Layout:
    """Infer the layout of a model: every dimension of every parameter and buffer in named axes.

    The model runs in eval mode and in training mode, as a copy whose tensors have shapes and no data, so nothing is computed and nothing is
    changed. What a model gives keeps its width, in both modes, whatever holds the tensors; only features of a timm model without classifier
    may be fewer. What neither run reaches is frozen, with every width that it may share.

    Args:
        model: Any module; timm models know their input size.
        example_input: A batch (at least 2, channels, height, width), or of whatever the model takes, where it does not say what that is.
            Its values are used where a model looks at values.
        tie: Pairs of names of modules that are copies and are averaged with each other, such as ("student", "teacher"): their parameters
            get the same axes, so that both shrink alike, also where only one of them runs.

    Returns:
        The layout. What the engine did not understand is frozen in it, with a reason.

    Raises:
        AnalysisError: If `model` is no module, its input is not known, or it does not run.
        CompressError: If it is compiled, or modules to tie are no copies.
    """
    layout = _infer(model, example_input, training=True, tie=tie)
    if not tie:
        ties.warn_of_copies(model, layout)
    if layout.untrained is not None:
        _logger.warning(
            f"analyze: {type(model).__name__} does not run in training mode on its input alone ({layout.untrained}): what only training "
            "reaches, or gives, was not seen"
        )
    return layout


@takes_model
def count_macs(model: nn.Module, example_input: torch.Tensor | None = None) -> int:
    """Multiply-accumulates of one sample, as `analyze(model, example_input).macs()` counts them, from a run in eval mode alone.

    Raises:
        AnalysisError: As `analyze` does.
    """
    return _infer(model, example_input, training=False).macs()


def _infer(model: nn.Module, example_input: torch.Tensor | None, *, training: bool, tie: Iterable[tuple[str, str]] = ()) -> Layout:
    if not isinstance(model, nn.Module):
        raise AnalysisError(f"analyze: expected a torch.nn.Module, found {type(model).__name__}")
    if isinstance(model, Elastic):
        raise AnalysisError(f"analyze: {type(model).__name__} runs at several widths; its layout is net.layout, or export one of them")
    example = example_input if example_input is not None else default_input(model)
    if not isinstance(example, torch.Tensor):
        raise AnalysisError(f"example_input: expected a tensor (batch, channels, height, width), found {type(example).__name__}")
    if not example.numel():
        raise AnalysisError(f"example_input: expected at least one sample, found a tensor of shape {tuple(example.shape)} without elements")
    pairs = ties.checked(model, tie)
    found: Layout | None = None
    for device in ("meta", "cpu"):  # a model that looks at values needs real tensors
        try:
            with _collector_paused():
                layout = _analyze(model, example, device, training=training, pairs=pairs)
        except AnalysisError:
            raise
        except MODEL_ERRORS as error:
            failure = error
            continue
        if layout.untrained is None:
            return layout
        found = found or layout
    if found is not None:
        return found
    what = f"{type(model).__name__} does not run on an input of shape {tuple(example.shape)}"
    raise AnalysisError(f"{what}: {type(failure).__name__}: {failure}") from failure


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Within, no garbage is collected: what an analysis makes lives until its end, and looking through it again and again takes as long as
    the analysis itself."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def default_input(model: nn.Module) -> torch.Tensor:
    """A batch of two images of the size a timm model was made for, without data: (2, channels, height, width).

    Raises:
        AnalysisError: If the model does not say what it takes.
    """
    from timm.models import get_model_input_config

    if not getattr(model, "pretrained_cfg", None):
        raise AnalysisError(f"{type(model).__name__} does not say what input it takes: pass example_input")
    return empty_input(model, (BATCH, *get_model_input_config(model)["input_size"]))


def empty_input(model: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """An input of the model's dtype without data."""
    parameter = next(model.parameters(), None)
    dtype = parameter.dtype if parameter is not None and parameter.is_floating_point() else torch.float32
    return torch.empty(shape, dtype=dtype, device="meta")


def input_for(model: nn.Module, layout: Layout) -> torch.Tensor:
    """What the model of a layout was given, for another run of it or of what was made of it."""
    return layout.example if layout.example is not None else empty_input(model, layout.input_shape)


def _analyze(model: nn.Module, example: torch.Tensor, device: str, *, training: bool, pairs: ties.Pairs) -> Layout:
    tracer, dims, attributes = run_traced(model, example, device, training=training, pairs=pairs)
    if tracer.shared_costs:
        # Some of these are paid once a batch, others by every sample: with one sample more only the latter grow. A sample alone pays both.
        more, _, _ = run_traced(model, torch.cat([example, example[:1]]), device)
        if len(more.shared_costs) == len(tracer.shared_costs):
            both = zip(tracer.shared_costs, more.shared_costs, strict=True)
            once = [term for term, twin in both if u.size_of(term) == u.size_of(twin)]
            tracer.costs += once * (len(example) - 1)
    if training:
        _try_scales(tracer, model, example, device)
    layout = ties.with_scales(finish(model, tracer, dims, attributes, example), pairs)
    return freeze_unseen(model, layout, tracer.calls, example) if training and device == "meta" else layout


def _try_scales(tracer: Tracer, model: nn.Module, example: torch.Tensor, device: str) -> None:
    """Find out which float attributes that a fused attention leaves unused are not its scale, though they have its value: run the model
    again with each of the switches of these modules the other way. One may choose between the fused function and scaling by hand, and a
    rate of dropout is used in training."""
    inside = {module for module, _ in tracer.scales.unused().values()}
    named = dict(model.named_modules())
    switches = {name for path in inside for name, value in vars(named[path]).items() if isinstance(value, bool)}
    undecided = set(tracer.scales.unused())
    for name in sorted(switches, key=lambda name: (name == "training", name)):
        if not undecided:
            return
        try:
            other, _, _ = run_traced(model, example, device, lambda tracer, clone, image, name=name: _turned(clone, inside, name))  # type: ignore[misc]
        except MODEL_ERRORS:
            continue  # not a switch that this model can turn
        other.scales.settle(other)
        used = undecided - other.scales.unused().keys()
        tracer.scales.disproven |= used - other.scales.found.keys()
        undecided -= used


@contextmanager
def _turned(clone: nn.Module, inside: Iterable[str], name: str) -> Iterator[None]:
    """Turn a switch of some modules of a copy that runs once."""
    for path in inside:
        values = vars(clone.get_submodule(path))
        if name in values:
            values[name] = not values[name]
    yield


Watch = Callable[[Tracer, nn.Module, torch.Tensor], AbstractContextManager[Any]]
"""What else to look at while a copy of a model runs on an image."""


Traced = tuple[Tracer, dict[str, list[Term]], metadata.Attributes]


def run_traced(
    model: nn.Module,
    example: torch.Tensor,
    device: str,
    watch: Watch | None = None,
    *,
    training: bool = False,
    pairs: Iterable[tuple[str, str]] = (),
) -> Traced:
    """Run a copy of a model and infer the terms of its tensors' dimensions and of its attributes.

    Args:
        model: The model.
        example: A batch; its values are used on a device where tensors have values, if it has any.
        device: `meta` for tensors without data, or `cpu`.
        watch: What else to look at while the copy runs in eval mode.
        training: Also run it in training mode, for what only that reaches and gives, if it takes the batch alone.
        pairs: Names of modules that have the same axes.
    """
    try:
        with _own_chance():
            return _run_traced(Tracer(), model, example, device, watch, training, list(pairs))
    except UnhashableError:
        tracer = Tracer()
        tracer.hashable = True
        with _own_chance():
            return _run_traced(tracer, model, example, device, watch, training, list(pairs))


@contextmanager
def _own_chance() -> Iterator[None]:
    """Within, what a model draws at random (layers to skip in training, say) is the same every time, and the generators of torch, numpy and
    Python go on afterwards as if nothing had been drawn."""
    python, arrays = random.getstate(), np.random.get_state()
    with same_draws():
        np.random.seed(0)
        random.seed(0)
        try:
            yield
        finally:
            np.random.set_state(arrays)
            random.setstate(python)


def _run_traced(
    tracer: Tracer, model: nn.Module, example: torch.Tensor, device: str, watch: Watch | None, training: bool, pairs: ties.Pairs
) -> Traced:
    try:
        clone = eval_copy(model, device)
    except MODEL_ERRORS as error:
        raise AnalysisError(f"{type(model).__name__} cannot be copied and set to eval mode: {type(error).__name__}: {error}") from error
    tensors = dict(named_tensors(clone))
    dims = {name: _unknown(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        tracer.set(tensor, dims[name])
        vanishing.mark(tensor)
    _mark_kept(tracer, clone)
    saved = clone.state_dict().keys()
    attributes = metadata.tag_attributes(clone)
    image = _input(example, device)
    tracer.set(image, _image_terms(image))
    tracer.mark_image(image)
    with _traced(tracer, clone), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spy = metadata.Spy(tracer, clone, attributes)
        with watch(tracer, clone, image) if watch else nullcontext(), every_output(clone):
            tracer.listening = True
            output = clone(image)
        tracer.listening = False
        after = dict(named_tensors(clone))
        spy.leave()
        given = tensors_in(output)
        if not given:
            what = f"{type(model).__name__} gives no tensors but {type(output).__name__}"
            raise AnalysisError(f"{what}: nothing says which widths stay. Let it give tensors, in objects of any class")
        tracer.outputs = [tracer.dims(tensor) for tensor in given]
        features = training and gives_features(model)
        _keep_outputs(tracer, tracer.outputs, "model output (class logits)", free=features)
        loose = _loose(tracer, given)
        if training:
            _train(tracer, clone, image, features=features)
            _follow_replaced(tracer, after, dict(named_tensors(clone)))
            if tracer.untrained is not None:
                _keep_untrained(tracer, loose, dims)
        spy.finish(dims, image, output)
    for name, tensor in after.items():
        if tensor is not tensors.get(name):
            dims[name] = tracer.dims(tensor)
            tracer.freeze(dims[name], "part of a buffer that the model computes anew when it runs")
    ties.tie_(tracer, tensors, dims, attributes, pairs)
    _keep_unused(tracer, {name: tensor for name, tensor in tensors.items() if after.get(name) is tensor}, dims)
    for name in after.keys() - saved:
        terms = [term for term in dims[name] if u.size_of(term) > 1 and term not in tracer.kernel_sides]
        if any(not u.is_free(term) for term in terms):
            tracer.freeze(terms, "runs through a buffer that is computed for the input's size and not saved")
    return tracer, dims, attributes


def _unknown(tensor: torch.Tensor) -> list[Term]:
    """A term of its own for every dimension of a tensor."""
    return [Variable(n) if n > 1 else n for n in tensor.shape]


def _input(example: torch.Tensor, device: str) -> torch.Tensor:
    """The batch that runs: the example's values where tensors have values, random ones where it has none."""
    if device == "meta":
        return torch.empty(example.shape, dtype=example.dtype, device=device)
    if not example.is_meta:
        return example.detach().to(device).clone()
    if not (example.is_floating_point() or example.is_complex()):
        return torch.zeros(example.shape, dtype=example.dtype, device=device)
    return torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).to(example.dtype)


def _mark_kept(tracer: Tracer, model: nn.Module) -> None:
    """What modules keep in plain attributes has the size it has: neither a parameter nor a buffer, it does not follow."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            for tensor in tree_leaves(value) if name not in ("_parameters", "_buffers", "_modules") else ():
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not hasattr(tensor, "_zc_dims"):
                    where = f"{path}.{name}".lstrip(".")
                    kept = _unknown(tensor)
                    tracer.freeze(kept, f"{where} is a tensor in a plain attribute: reset it if it is the state of a call before")
                    tracer.set(tensor, kept)


def _keep_outputs(tracer: Tracer, outputs: list[list[Term]], reason: str, *, free: bool) -> None:
    """What a model gives keeps its width. Features of a backbone may be fewer, but their order shows."""
    for term in itertools.chain.from_iterable(outputs):
        if free:
            u.order(term)
            tracer.mixed.append(term)
        else:
            u.freeze(term, reason)


def _loose(tracer: Tracer, given: list[torch.Tensor]) -> list[Term]:
    """Dimensions of what was computed and is neither read nor given."""
    known = {id(tensor) for tensor in given}
    loose = [tensor for key, tensor in tracer.loose.items() if key not in known and tensor.is_floating_point()]
    return [term for tensor in loose if not tracer.waits(tensor) for term in tracer.dims(tensor)]


def _train(tracer: Tracer, model: nn.Module, image: torch.Tensor, *, features: bool) -> None:
    """Run a model in training mode, if it takes a batch alone: what only that reaches follows, what only that gives keeps its width.

    A BatchNorm after global pooling does not take a sample alone: where one fails, two of it are tried.
    """
    alone = image.ndim > 0 and len(image) == 1
    model.train()
    try:
        for batch in [image, torch.cat([image, image])] if alone else [image]:
            try:
                with tracer.uncounted():
                    output = model(batch)
                    given = [tracer.dims(tensor) for tensor in tensors_in(output)]
                tracer.untrained = None
                break
            except UnhashableError:
                raise
            except MODEL_ERRORS as error:
                tracer.untrained = f"{type(error).__name__}: {error}"
        else:
            return
    finally:
        model.eval()
    _keep_outputs(tracer, given, "model output in training mode", free=features)


def _keep_untrained(tracer: Tracer, loose: list[Term], dims: dict[str, list[Term]]) -> None:
    """Where training wants more than this input, it may give what eval mode computes and drops, and what it only sums up at the end."""
    why = "training, for which this input is not enough, may give it"
    tracer.freeze(loose, f"computed and not used in eval mode: {why}")
    weights = Counter(v for terms in dims.values() if len(terms) > 1 for v in {v for term in terms for v in u.variables(term)})
    ends = [v for term in tracer.reduced for v in u.variables(term) if weights[v] < 2]
    tracer.freeze(ends, f"reduced, and read by no weight: {why}")


def _follow_replaced(tracer: Tracer, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """Buffers that training replaces (averages, codebooks) hold the same elements before and after."""
    for name, tensor in after.items():
        old = before.get(name)
        if old is None or old is tensor:
            continue
        terms = tracer.dims(old), tracer.dims(tensor)
        if old.shape == tensor.shape:
            for a, b in zip(*terms, strict=True):
                tracer.unify(a, b)
        else:
            tracer.freeze(itertools.chain(*terms), f"part of {name}, which training replaces by another size")


def _keep_unused(tracer: Tracer, tensors: dict[str, torch.Tensor], dims: dict[str, list[Term]]) -> None:
    """Parameters that this input does not reach (experts, mask tokens, other image sizes) may share any width of their size."""
    unused = [name for name, tensor in tensors.items() if id(tensor) not in tracer.seen and tensor.numel()]
    for name in unused:
        tracer.freeze(dims[name], "not used when the model runs in eval mode")
    own = {id(v) for name in unused for term in dims[name] for v in u.variables(term)}
    for name in unused:
        for size in {u.size_of(term) for term in dims[name]} - {1}:
            sharing = [t for t in tracer.met.get(size, ()) if not all(id(v) in own for v in u.variables(t))]
            if not sharing:  # it may read several dimensions as one
                sharing = [t for n, known in tracer.met.items() if n > 1 and size % n == 0 for t in known]
            tracer.freeze(sharing, f"may be shared with {name} (size {size}), which is not used when the model runs on this input")


def _image_terms(image: torch.Tensor) -> list[Term]:
    terms: list[Term] = [int(n) for n in image.shape]
    if image.ndim == 4 and image.shape[1] > 1:
        channels = Variable(int(image.shape[1]))
        channels.frozen = "image channels"
        terms[1] = channels
    return terms


@contextmanager
def _traced(tracer: Tracer, model: nn.Module) -> Iterator[None]:
    def enter(path: str) -> Callable[..., None]:
        return lambda module, _: tracer.modules.append((path, module))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        tracer.modules.pop()

    handles = []
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks
        handles += [module.register_forward_pre_hook(enter(path)), module.register_forward_hook(leave)]
    with no_fast_path(), Operations(tracer), Functions(tracer), heard_by(tracer):
        yield
    for handle in handles:
        handle.remove()
