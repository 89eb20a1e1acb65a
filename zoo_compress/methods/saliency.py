"""How much single weights matter: pure functions of a model and data, each a score of every weight. The highest are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import CompressError
from ..surgery.modules import copied, every_output, in_eval_mode
from ..surgery.trace import default_input
from .criteria import Data, Statistic, cross_entropy, fitted, gather, gradient, squared_gradient

Scores = dict[str, Tensor]
"""Name of a parameter → scores of its elements, of its shape."""

TEMPERATURE = 200.0
"""Of the logits in GraSP: it evens out the predictions of an untrained network."""


@dataclass(frozen=True, slots=True)
class Saliency:
    """One way to score weights.

    Attributes:
        score: Function of a weight and the statistic of it.
        statistic: What to gather from data before: name of a parameter → tensor of its shape.
        batch_statistics: Let normalisation use the statistics of each batch meanwhile; those of an untrained network mean nothing.
        rounds: In how many rounds the weights are removed, unless said otherwise.
        source: The paper.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    statistic: Statistic | None = None
    batch_statistics: bool = True
    rounds: int = 1
    source: str = ""


def hessian_gradient(model: nn.Module, data: Data, masks: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Product of the Hessian and the gradient of the cross-entropy, both summed over batches; removed weights have no gradient."""
    named = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    batches = list(data)

    def losses() -> Iterable[Tensor]:
        for images, target in fitted(model, batches, "gradients"):
            yield cross_entropy(model, images, target, TEMPERATURE)

    total = [torch.zeros_like(p) for p in named.values()]
    for loss in losses():
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        total = [t if g is None else t + g for t, g in zip(total, found, strict=True)]
    # What removed weights would change is no part of what training will.
    removed = {name: ~mask for name, mask in (masks or {}).items()}
    total = [t.masked_fill(removed[name].to(t.device), 0) if name in removed else t for name, t in zip(named, total, strict=True)]
    model.zero_grad()
    with sdpa_kernel(SDPBackend.MATH):  # the only one whose gradient has a gradient
        for loss in losses():
            found = torch.autograd.grad(loss, list(named.values()), create_graph=True, allow_unused=True)
            try:
                sum((t * g).sum() for t, g in zip(total, found, strict=True) if g is not None).backward()  # type: ignore[union-attr]
            except RuntimeError as error:
                raise CompressError(f"it needs second derivatives, and torch has none of this model: {error}") from error
    return {name: p.grad for name, p in named.items() if p.grad is not None}


SALIENCIES: dict[str, Saliency] = {
    "magnitude": Saliency(lambda w, _: w.abs(), source="Han et al. 2015, Learning both Weights and Connections"),
    "random": Saliency(lambda w, _: torch.rand(w.shape), source="baseline"),
    "gradient": Saliency(lambda w, g: g.abs(), gradient, source="the change that training would make first"),
    "snip": Saliency(lambda w, g: (w * g).abs(), gradient, source="Lee et al. 2019, SNIP"),
    "grasp": Saliency(lambda w, hg: w * hg, hessian_gradient, source="Wang et al. 2020, Picking Winning Tickets Before Training"),
    "obd": Saliency(lambda w, gg: w**2 * gg, squared_gradient, batch_statistics=False, source="LeCun et al. 1989, Optimal Brain Damage"),
    "synflow": Saliency(lambda w, g: (w * g).abs(), rounds=100, source="Tanaka et al. 2020, Pruning Neural Networks Without Any Data"),
}


def saliency(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    criterion: str,
    data: Data | None = None,
    seed: int = 0,
    masks: Mapping[str, Tensor] | None = None,
) -> Scores:
    """Scores of single weights, in double precision.

    Args:
        model: The model, not changed.
        weights: Its weights to score, such as `surgery.weights.layer_weights` gives.
        criterion: A key of `SALIENCIES`.
        data: Batches of (images (batch, channels, height, width), class indices (batch,)), for those that look at data.
        seed: For the random one.
        masks: What is left of the model's weights, the others being zero; None where nothing is removed.

    Raises:
        CompressError: If the criterion is unknown, or needs data and there is none, a score is not finite, or all are 0.
    """
    chosen = lookup(criterion)
    if criterion == "synflow":
        statistic = _flow(model)
    elif chosen.statistic is not None:
        of = partial(hessian_gradient, masks=masks) if chosen.statistic is hessian_gradient else chosen.statistic
        statistic = gather(model, of, criterion, data, batch_statistics=chosen.batch_statistics)
    else:
        statistic = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        found = {}
        for name, weight in weights.items():
            zero = torch.zeros((), dtype=torch.float64)  # a weight that the model does not use
            score = chosen.score(weight.detach().cpu().double(), statistic.get(name, zero).detach().cpu().double())
            if not bool(score.isfinite().all()):
                raise CompressError(
                    f"criterion {criterion!r}: scores of {name!r} are not finite: its weights are not, or products of them overflow"
                )
            found[name] = score.expand(weight.shape)
    if not any(bool(score.any()) for score in found.values()):
        raise CompressError(
            f"criterion {criterion!r}: expected weights that the model's output depends on, found none: every score is 0, as where its "
            "classifier begins with zeros or all weights of a layer are removed; initialise it, or use magnitude"
        )
    return found


def lookup(criterion: str) -> Saliency:
    """The criterion of that name.

    Raises:
        CompressError: If there is none.
    """
    if criterion not in SALIENCIES:
        raise CompressError(f"criterion: expected one of {', '.join(SALIENCIES)}, found {criterion!r}")
    return SALIENCIES[criterion]


def _flow(model: nn.Module) -> dict[str, Tensor]:
    """Gradient of the sum of outputs for an image of ones through the network with all its weights' magnitudes (section 5, algorithm 1)."""
    subject = in_eval_mode(copied(model).cpu().double()).requires_grad_(True)
    with torch.no_grad():
        for tensor in (*subject.parameters(), *subject.buffers()):
            if tensor.is_floating_point():
                tensor.abs_()
    with every_output(subject), torch.enable_grad():  # wherever this is called
        output = subject(torch.ones(1, *default_input(model).shape[1:], dtype=torch.float64))
        torch.as_tensor(sum(o.sum() for o in output) if isinstance(output, (list, tuple)) else output.sum()).backward()
    return {name: p.grad for name, p in subject.named_parameters() if p.grad is not None}
