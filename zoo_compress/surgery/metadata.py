"""Numbers that modules keep about their sizes: those the forward pass reads, and those that only describe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..structure import unify as u
from ..structure.terms import Term, product
from ..structure.unify import Variable
from .modules import own
from .sizes import Setting, Size
from .tracer import MODEL_ERRORS, Tracer

Attributes = dict[str, Variable]
"""`module.path.attr`, or `module.path.attr[i]` in a tuple or list → the variable that stands for the number there."""


def tag_attributes(model: nn.Module) -> Attributes:
    """Replace every plain `int` above 1 on every module (and in its tuples and lists) by a `Size` that remembers where it came from, and
    every `float` by a `Setting`."""
    found: Attributes = {}

    def tag(value: Any, path: str) -> Any:
        if type(value) is float:
            setting = Setting(value)
            setting.path = path
            return setting
        if type(value) is not int or value < 2:
            return value
        found[path] = Variable(value, attribute=path)
        return Size(value, found[path])

    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # what it reads is compiled into it
        prefix = f"{path}." if path else ""
        for name, value in list(vars(module).items()):
            if type(value) in (tuple, list):
                vars(module)[name] = type(value)(tag(item, f"{prefix}{name}[{i}]") for i, item in enumerate(value))
            else:
                vars(module)[name] = tag(value, f"{prefix}{name}")
    return found


class Spy:
    """Learns during and after the run which numbers describe which dimensions, where the forward pass itself reads none of them.

    timm documents `num_features`, `head_hidden_size`, `feature_info` and `reset_classifier` for all its models.
    """

    def __init__(self, tracer: Tracer, model: nn.Module, attributes: Attributes) -> None:
        self.tracer, self.model, self.attributes = tracer, model, attributes
        self.features: list[Term] = []
        self.taps: dict[str, list[Term]] = {}
        self.handles = []
        if callable(getattr(model, "forward_features", None)):
            original: Any = model.forward_features

            def forward_features(*args: Any, **kwargs: Any) -> Any:
                out = original(*args, **kwargs)
                if isinstance(out, torch.Tensor):
                    self.features = tracer.dims(out)
                return out

            vars(model)["forward_features"] = forward_features
        modules = dict(model.named_modules())
        self.described = {path: found for path, module in modules.items() if (found := feature_modules(module, path))}
        for path in {path for found in self.described.values() for path, _ in found if path is not None}:
            self.handles.append(modules[path].register_forward_hook(self._tap(path)))

    def _tap(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            first = out[0] if isinstance(out, (tuple, list)) and out else out
            if isinstance(first, torch.Tensor):
                self.taps[path] = self.tracer.dims(first)

        return hook

    def leave(self) -> None:
        """Look at no more runs of the model."""
        for handle in self.handles:
            handle.remove()
        vars(self.model).pop("forward_features", None)

    def finish(self, dims: dict[str, list[Term]], image: torch.Tensor, output: Any) -> None:
        """Tie what was seen to the attributes that describe it.

        Args:
            dims: Parameter or buffer name → one term per dimension.
            image: The input of the run, for models whose features have to be asked for.
            output: What the run gave: of a model without classes, what a new classifier will read.
        """
        self.tracer.operation = "metadata"
        self._describe("num_features", self.features)
        for path in self.described:
            for i, term in enumerate(self._feature_channels(path, image)):
                if term is not None:
                    number = f"{path}.feature_info[{i}].num_chs".lstrip(".")
                    self.attributes[number] = Variable(u.size_of(term), attribute=number)
                    self.attributes[number].bound = term
        self._reset_classifier(dims, output)

    def _feature_channels(self, path: str, image: torch.Tensor) -> list[Term | None]:
        """The channel dimension of each entry of a part's `feature_info`: of the module it names, else of what the model's
        `forward_intermediates` gives."""
        entries = self.described[path]
        found = [_channel(self.taps.get(named or "", []), channels) for named, channels in entries]
        ask: Any = getattr(self.model, "forward_intermediates", None)
        if path or None not in found or not callable(ask):
            return found
        with self.tracer.uncounted():
            try:
                features = ask(image, intermediates_only=True)
            except MODEL_ERRORS:
                return found
        if len(features) != len(found):
            return found
        asked = [_channel(self.tracer.dims(f), size) for f, (_, size) in zip(features, entries, strict=True) if torch.is_tensor(f)]
        return asked if len(asked) == len(found) else found

    def _describe(self, name: str, terms: list[Term]) -> None:
        variable = self.attributes.get(name)  # the model may have replaced its number by another that is equal
        term = _channel(terms, variable.size) if variable is not None else None
        if variable is not None and term is not None:
            self.tracer.link(variable, term)

    def _reset_classifier(self, dims: dict[str, list[Term]], output: Any) -> None:
        """Ask the model for a new classifier: the sizes it is built with are the attributes that a user's call will read."""
        reset: Any = getattr(self.model, "reset_classifier", None)
        classes = own(self.model, "num_classes")
        if not callable(reset) or not isinstance(classes, int):
            return
        features = self.tracer.dims(output) if classes < 1 and isinstance(output, torch.Tensor) and output.ndim in (2, 3) else None
        before = list(self.model.modules())  # alive to the end: another object must not get the identity of one that was dropped
        old = set(map(id, before))
        try:
            with torch.device("meta"), self.tracer.silenced():
                reset(int(classes) + 1)
        except MODEL_ERRORS:
            return  # a model whose classifier cannot be reset has no attribute to keep for it
        for path, module in self.model.named_modules():
            read = getattr(module, "in_features", getattr(module, "in_channels", None))
            if id(module) in old or not isinstance(read, Size):
                continue
            weight = dims.get(f"{path}.weight", [1, features[-1]] if features else [])
            if len(weight) > 1 and u.size_of(weight[1]) == read:
                self.tracer.meet(read, weight[1])
                self._describe("head_hidden_size", weight[:2])


def describe_standard_modules(model: nn.Module, dims: dict[str, list[Term]], attributes: Attributes) -> None:
    """Tie the descriptive numbers of torch's own layers (`in_channels`, `out_features`, …) to the dimensions of their weights."""
    for path, module in model.named_modules():
        for name, term in _standard(path, module, dims, attributes):
            variable = attributes.get(f"{path}.{name}" if path else name)
            if variable is not None and variable.bound is None and variable.size == u.size_of(term):
                variable.bound = term


_SIDES = {
    **dict.fromkeys(("in_chs", "in_channels", "dim"), "in"),
    **dict.fromkeys(("out_chs", "out_channels", "dim_out"), "out"),
    "groups": "groups",
}
"""What blocks call the sizes of their convolutions."""


def describe_blocks(model: nn.Module, dims: dict[str, list[Term]], attributes: Attributes) -> None:
    """Tie what a block says of its convolutions, or norms, to their dimensions, where the forward pass does not read it and they agree.

    Blocks that can be merged into one convolution (`reparameterize`) build that from these numbers.
    """
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        said = {name: variable for name in _SIDES if (variable := attributes.get(prefix + name)) is not None}
        said = {name: v for name, v in said.items() if v.bound is None and v.frozen is None}
        if not said or isinstance(module, nn.modules.conv._ConvNd):
            continue
        sides = list(_sides(path, module, dims, attributes))
        for name, variable in said.items():
            fitting = {term for side in sides if u.size_of(term := u.resolve(side[_SIDES[name]])) == variable.size}
            if len(fitting) == 1 and u.variables(term := fitting.pop()):
                variable.bound = term


def _sides(path: str, block: nn.Module, dims: dict[str, list[Term]], attributes: Attributes) -> Iterator[dict[str, Term]]:
    """Input, output and groups of each convolution in a block; of its norms, each of which is one of depth, if it has none."""
    inside = [(p, m) for p, m in block.named_modules(prefix=path) if f"{p}.weight" in dims]
    convs = [p for p, m in inside if isinstance(m, nn.modules.conv._ConvNd) and not m.transposed]
    for p in convs:
        weight, groups = dims[f"{p}.weight"], attributes.get(f"{p}.groups", 1)
        yield {"in": product(groups, weight[1]), "out": weight[0], "groups": groups}
    for p, m in inside:
        if isinstance(m, nn.modules.batchnorm._NormBase) and not convs:
            yield dict.fromkeys(("in", "out", "groups"), dims[f"{p}.weight"][0])


def _standard(path: str, module: nn.Module, dims: dict[str, list[Term]], attributes: Attributes) -> Iterator[tuple[str, Term]]:
    prefix = f"{path}." if path else ""
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        first = "_l0" if isinstance(module, nn.RNNBase) else ""
        yield "input_size", dims[f"{prefix}weight_ih{first}"][1]
        if projection := dims.get(f"{prefix}weight_hr{first}"):
            yield from zip(("proj_size", "hidden_size"), projection, strict=True)
        else:
            yield "hidden_size", dims[f"{prefix}weight_hh{first}"][1]
        return
    if isinstance(module, nn.Transformer):
        for name, same in (("d_model", "embed_dim"), ("nhead", "num_heads")):
            if (said := attributes.get(f"{prefix}encoder.layers.0.self_attn.{same}")) is not None:
                yield name, said
        return
    weight = dims.get(f"{prefix}weight") or dims.get(f"{prefix}running_mean")
    if weight is None:
        return
    if isinstance(module, nn.modules.conv._ConvNd):
        groups = attributes.get(f"{prefix}groups", 1)
        sides = (weight[0], product(groups, weight[1]))
        yield from zip(("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels"), sides, strict=True)
    elif isinstance(module, nn.Linear):
        yield from zip(("out_features", "in_features"), weight, strict=True)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        yield "num_features", weight[0]
    elif isinstance(module, nn.GroupNorm):
        yield "num_channels", weight[0]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        yield from ((f"normalized_shape[{i}]", term) for i, term in enumerate(weight))
    elif isinstance(module, nn.Embedding):
        yield from zip(("num_embeddings", "embedding_dim"), weight, strict=True)


def feature_modules(model: nn.Module, prefix: str = "") -> list[tuple[str | None, int]]:
    """What timm's `feature_info` says: for each entry the path of the module it names, `None` where there is none, and its channels.

    A model around another may pass on the other's `feature_info`, whose names then begin there. What it computes or looks up whenever it
    is asked, by a property or `__getattr__`, is not its own.

    Args:
        model: A model, or a part of one that has a `feature_info` of its own.
        prefix: Where it is in the whole; paths begin with it.
    """
    info = vars(model).get("feature_info")
    entries = getattr(info, "info", info)
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, dict) for entry in entries):
        return []
    modules = dict(model.named_modules(prefix=prefix))
    owner = [path for path, module in modules.items() if vars(module).get("feature_info") == info][-1]
    paths = [f"{owner}.{entry.get('module', '')}".strip(".") for entry in entries]
    return [
        (path if path != owner and path in modules else None, entry.get("num_chs", 0)) for path, entry in zip(paths, entries, strict=True)
    ]


def _channel(terms: list[Term], size: int) -> Term | None:
    """The dimension of an output that has as many elements as its channels; dimensions that axes run along come first."""
    fitting = [term for term in terms[1:] if u.size_of(term) == size]
    return min(fitting, key=lambda term: not u.variables(term), default=None)
