"""Analysis: run a model on tensors without data and infer the layout of its parameters."""

from __future__ import annotations

import gc
import inspect
import itertools
import logging
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import AnalysisError
from ..structure import unify as u
from ..structure.layout import Layout
from ..structure.terms import Term
from ..structure.unify import Variable
from . import metadata, recurrent, ties, vanishing  # noqa: F401 - importing registers the handlers of recurrent layers
from .elastic import Elastic
from .finish import finish
from .functions import FUNCTIONS
from .kernels import Kernels
from .modules import eval_copy, every_output, takes_model
from .outputs import gives_features, tensors_in
from .rules import COSTLY, RULES, elementwise
from .scales import ARITHMETIC
from .sizes import Computed, Number, Size, UnhashableError, heard_by, origins, plain
from .torch_attention import no_fast_path
from .tracer import MODEL_ERRORS, Tracer, named_tensors
from .unseen import call, freeze_unseen, leaves

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
        if layout.untrained is None or found is not None:
            return layout if layout.untrained is None or found is None else found
        found = layout
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
    _try_scales(tracer, model, example, device)
    calls = tracer.calls
    layout = ties.with_scales(finish(model, tracer, dims, attributes, example), pairs)
    return freeze_unseen(model, layout, calls, example) if training and device == "meta" else layout


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
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
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
    dims: dict[str, list[Term]] = {name: [Variable(n) if n > 1 else n for n in tensor.shape] for name, tensor in tensors.items()}
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
                    kept = [Variable(n) if n > 1 else n for n in tensor.shape]
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
    with no_fast_path(), _Operations(tracer), _Functions(tracer), heard_by(tracer):
        yield
    for handle in handles:
        handle.remove()


class _Functions(TorchFunctionMode):
    """Sees the sizes a model passes to torch functions, with where they came from."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What torch computes inside a function is its own business.
        tracer = self.tracer
        kept = tracer.stated, tracer.accounted
        tracer.stated, tracer.accounted = [], Counter()
        tracer.running += 1
        try:
            with heard_by(None):
                return self._call(func, args, kwargs or {})
        finally:
            tracer.running -= 1
            tracer.stated, tracer.accounted = kept

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        tracer = self.tracer
        handler = None if tracer.quiet else FUNCTIONS.get(func)
        name = tracer.operation = _name(func)
        products = len(tracer.scales.products)
        given = list(leaves((args, kwargs)))
        if tracer.listening:
            tracer.calls.append(call(getattr(func, "__name__", str(func)), given))
        if handler is not None and _takes(handler, tracer, func, *args, **kwargs):
            out = handler(tracer, func, *args, **kwargs)
        else:
            born = len(tracer.born)
            tracer.stated = [number for number in given if type(number) is int]
            out = func(*args, **kwargs)
            tracer.settle(born)
        if not tracer.quiet:
            numbers = [number for number in given if isinstance(number, (Size, Computed)) and not self._accounted(number)]
            computed = [number for number in numbers if isinstance(number, Computed)]
            tensors = [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
            for number in numbers:
                if isinstance(number, Size):
                    self._hand_over(number, name, [] if handler or name in ARITHMETIC else tensors)
            tracer.scales.follow(name, computed, tensors, out, products)
        return out

    def _hand_over(self, number: Size, name: str, tensors: list[torch.Tensor]) -> None:
        """Keep the sizes behind a number that a function was given, and dimensions that may be what it speaks of."""
        reason = f"{name} is given it as a number"
        self.tracer.keep(origins(number), reason)
        for tensor in tensors:
            if plain(number) >= tensor.ndim:  # else it may be the number of a dimension
                self.tracer.keep([term for term in self.tracer.dims(tensor) if u.size_of(term) == plain(number)], reason)

    def _accounted(self, number: Number) -> bool:
        known = self.tracer.accounted[id(number)]
        self.tracer.accounted[id(number)] -= 1
        return known > 0


def _name(function: Any) -> str:
    """Name of a torch function; of a property, with the class it belongs to."""
    name = getattr(function, "__name__", str(function))
    return f"Tensor.{getattr(function.__self__, '__name__', '')}" if name == "__get__" else name


def _takes(handler: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether a handler knows the arguments a function was called with."""
    try:
        _signature(handler).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


_signature = lru_cache(maxsize=None)(inspect.signature)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments, and in lists among them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _within(sizes: list[int], stated: list[int]) -> bool:
    """Whether numbers that a function was given are the sizes of a tensor, in order, with -1 for any."""
    windows = (stated[i : i + len(sizes)] for i in range(len(stated) - len(sizes) + 1))
    return any(all(number in (-1, size) for number, size in zip(window, sizes, strict=True)) for window in windows)


_SHAPING = {"view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "as_strided", "as_strided_"}
"""Operations that are told the sizes of their result."""
_NUMBERLESS = {"detach", "alias", "lift_fresh", "view_as"}
"""Operations that code may get to without a torch function and that neither read nor write a size."""


class _Operations(TorchDispatchMode):
    """Sees every ATen operation and applies its rule."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer
        self.kernels = Kernels()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tracer = self.tracer
        name = _operation(func)
        if name not in RULES and func._can_decompose():
            # Inside `inference_mode` torch hands over whole what it takes apart elsewhere.
            with self:
                return func.decompose(*args, **kwargs)
        tensors = list(_tensors((*args, *kwargs.values())))
        for tensor in tensors:
            tracer.seen.add(id(tensor))
            tracer.loose.pop(id(tensor), None)
        with nullcontext() if tracer.running else torch._C.DisableTorchFunction():
            before = self._as_it_was(args[0]) if torch.Tag.inplace_view in func.tags else None
            out = self.kernels(func, args, kwargs)
        if before is not None:  # the rule is that of the operation that gives the new shape to another tensor
            args, tensors = (before, *args[1:]), [before, *tensors[1:]]
        return self._told(func, args, kwargs, tensors, out)

    def _as_it_was(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of a tensor that is about to get another shape, with what is known of it; the tensor itself forgets that."""
        before = tensor.detach()
        self.tracer.hand_on(tensor, before)
        self.tracer.forget(tensor)
        return before

    def _told(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], out: Any) -> Any:
        """What an operation gave, with the terms of its dimensions."""
        tracer, name = self.tracer, _operation(func)
        from_image = any(map(tracer.is_image, tensors))
        if from_image:
            for tensor in _tensors([out]):
                tracer.mark_image(tensor)
        if not tracer.quiet:
            before = len(tracer.costs)
            self._apply(func, args, kwargs, tensors, out)
            numbers = any(isinstance(value, (int, float)) for value in args[1:])
            vanishing.follow(tracer, name, tensors, numbers, list(_tensors([out])))
            self._numbers(name, tensors, out)
            if not func._schema.is_mutable:
                tracer.loose.update((id(tensor), tensor) for tensor in _tensors([out]))
            elif "fill" not in tracer.operation and "zero" not in tracer.operation:
                tracer.written(out)
            if not from_image:
                tracer.shared_costs += tracer.costs[before:]
        return out

    def _apply(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], out: Any) -> None:
        tracer = self.tracer
        name = tracer.operation = _operation(func)
        rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
        if tensors and rule not in COSTLY and all(map(tracer.is_constant, tensors)):
            for tensor in _tensors([out]):
                tracer.set_constant(tensor)
            return
        if rule is None and not func._schema.returns and not func._schema.is_mutable:
            return  # a check
        try:
            terms = self._terms(func, rule, args, kwargs, tensors, out)
            for tensor, dims in [(out, terms)] if isinstance(out, torch.Tensor) else zip(out, terms, strict=True):
                if isinstance(tensor, torch.Tensor):
                    tracer.give(tensor, dims)
        except MODEL_ERRORS as error:
            # No rule, or one that does not fit this use or this release of torch: freezing is sound whatever the rule did before.
            why = "has no rule" if isinstance(error, NotImplementedError) else f"has no rule for this use ({error})"
            if tracer.freeze_all(tensors, f"{tracer.where} {why}"):
                tracer.unknown[name if "::" in name else f"aten.{name}"] += 1
            for tensor in _tensors([out]):
                tracer.set_constant(tensor)

    def _numbers(self, name: str, tensors: list[torch.Tensor], out: Any) -> None:
        """Keep the sizes that an operation was told as plain numbers."""
        tracer = self.tracer
        if not tracer.running and name not in _NUMBERLESS:
            inside = f"{tracer.where} runs in TorchScript, or in another extension, where sizes are numbers that cannot be followed"
            tracer.freeze_all((tensors, out), inside)
        elif name in _SHAPING and _within(list(out.shape), tracer.stated):
            for size, term in zip(out.shape, tracer.dims(out), strict=True):
                if size in tracer.stated:
                    u.fix(term, f"{tracer.where} writes its size as the number {size}")
        elif name == "native_group_norm":  # is told sizes too
            for term in tracer.dims(tensors[0]):
                if u.size_of(term) in tracer.stated:
                    u.freeze(term, f"{tracer.where} writes its size as the number {u.size_of(term)}")
        elif name in ("bmm", "baddbmm") and all(map(tracer.is_image, tensors[-2:])):
            tracer.scales.products.append(tracer.dims(tensors[-1])[-2])

    def _terms(self, func: Any, rule: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], out: Any) -> Any:
        if rule is not None:
            written = {a.name for a in func._schema.arguments if a.is_out}
            names = [a.name for a in func._schema.arguments]
            named = {**dict(zip(names, args, strict=False)), **kwargs}
            return rule(self.tracer, out, **{name: value for name, value in named.items() if name not in written})
        if _is_pointwise(func) and isinstance(out, torch.Tensor):
            return elementwise(self.tracer, tensors)
        raise NotImplementedError


def _operation(func: Any) -> str:
    """Name of an operation, with the library it belongs to where that is not torch itself."""
    return func._schema.name.removeprefix("aten::")


@cache
def _is_pointwise(func: Any) -> bool:
    """Whether torch says that an operation, or the one that it does in place, is pointwise."""
    name = func._schema.name
    twin = getattr(torch.ops.aten, _operation(func).removesuffix("_"), None) if name.startswith("aten::") else None
    return torch.Tag.pointwise in func.tags or (
        twin is not None and any(torch.Tag.pointwise in getattr(twin, overload).tags for overload in twin.overloads())
    )
