"""Early exits on a model of any class: what they add to it, and how they are put on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import AnalysisError, CompressError
from ..structure.exits import CONFIDENCES, Calibration, Exits, budgeted
from ..structure.variant import Variant
from .images import fitting
from .kernels import Kernels
from .leaving import MEASURES, Decision, Every, Head, Leaving, Patience, Spent, Threshold, Until, thresholds_of
from .mixed import Mixed
from .modules import copied, eval_copy, evaluating
from .proof import Trial
from .restore import present
from .rows import Boundary, Visitor, run, set_taps, visiting
from .trace import default_input
from .truncate import truncate_

HEADS = "exits"
"""Name of the heads in the model: `exits.0.fc.weight`."""


@dataclass(frozen=True)
class Costs:
    """MACs of a sample of a network with exits, heads on the way included.

    Attributes:
        alone: Of one that is done at each exit, and last of one that stays to the end: nothing further runs.
        batch: The same in a batch whose others go on: until the exit where it leaves the batch.
        base: Of the whole network without heads.
    """

    alone: tuple[int, ...]
    batch: tuple[int, ...]
    base: int


class ExitsModel(Mixed, nn.Module):
    """What early exits add to a model's own class; `attach_` puts it over that.

    In train mode a call gives a list of logits, one of each exit and last those of the full network; in eval mode the full network's.

    Attributes:
        exits: The heads.
        record: Where they are, and when samples leave.
        boundaries: How rows leave the batch at each; None where they cannot.
    """

    exits: nn.ModuleList
    record: Exits
    boundaries: tuple[Boundary | None, ...]
    _every = False
    _chosen: int | None = None

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Logits (batch, classes), or in train mode a list of them."""
        if self.record.truncated:
            return self._until(0, x, *args, **kwargs)
        if not (self.training or self._every):
            # Not by way of `_until` where there is no exit chosen: whoever exports the network sees its own forward pass.
            return super().forward(x, *args, **kwargs) if self._chosen is None else self._until(self._chosen, x, *args, **kwargs)
        every = Every(self.exits, self.record.places)
        last = self.forward_followed(every, x, *args, **kwargs)
        return [*every.logits(), last]

    def forward_followed(self, visitor: Visitor | None, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of the full network, followed by a visitor; None if that stopped it."""
        return run(super().forward, visitor, x, *args, **kwargs)

    @property
    def chosen_exit(self) -> int:
        """The exit at which the network ends in eval mode; the number of exits is its own end."""
        return len(self.exits) if self._chosen is None else self._chosen

    def set_exit(self, exit: int) -> None:
        """Choose the exit at which the network ends in eval mode: later layers don't run. A checkpoint does not say which was chosen.

        Args:
            exit: Number of an exit, from 0; the number of exits is the network's own end.

        Raises:
            CompressError: If there is no such exit.
        """
        if self.record.truncated:
            raise CompressError("set_exit: this network was exported and ends at its only exit")
        self._check_exit(exit)
        self._chosen = None if exit == len(self.exits) else exit

    def _check_exit(self, exit: Any) -> None:
        count = len(self.exits)
        if not isinstance(exit, int) or isinstance(exit, bool) or not 0 <= exit <= count:
            raise CompressError(f"exit: expected 0 to {count} ({count} is the network's own end), found {exit!r}")

    @contextmanager
    def every_output(self) -> Iterator[None]:
        """Within, eval mode gives the list of all logits too."""
        before, self._every = self._every, True
        try:
            yield
        finally:
            self._every = before

    def forward_features(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The unpooled features of the full network; of a truncated one, what its exit reads."""
        if not self.record.truncated or visiting():  # the model's own forward calls this too
            return super().forward_features(x, *args, **kwargs)  # type: ignore[misc]
        until = Until(self.record.places, None, 0)
        self.forward_followed(until, x, *args, **kwargs)
        return until.found

    def forward_head(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Logits of what `forward_features` gives; with `pre_logits=True`, the features the classifier reads."""
        if not self.record.truncated:
            return super().forward_head(x, *args, **kwargs)  # type: ignore[misc]
        head: Any = self.exits[0]
        pre_logits = args[0] if args else kwargs.get("pre_logits", False)
        return head.features(head.pooled(x)) if pre_logits else head(x)

    def get_classifier(self) -> Any:
        """The last classifier there is."""
        return self.exits[0].fc if self.record.truncated else super().get_classifier()  # type: ignore[misc]

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """Make new classifiers, of the exits too."""
        if self.record.truncated:
            self.num_classes = num_classes
        else:
            super().reset_classifier(num_classes, *args, **kwargs)  # type: ignore[misc]
        for head in self.exits:
            head.reset(num_classes)  # type: ignore[operator]

    @torch.no_grad()
    def infer(
        self,
        x: torch.Tensor,
        *,
        exit: int | None = None,
        threshold: float | Sequence[float | None] | None = None,
        patience: int | None = None,
        confidence: str | None = None,
        return_exits: bool = False,
    ) -> Any:
        """Logits, computed no further than needed. Runs in eval mode.

        With `exit`, all samples leave there and nothing later runs. With a threshold, samples that are confident leave at each exit and
        the others flow on in a batch that gets smaller (Teerapittayanon et al. 2016, BranchyNet). At an exit where samples cannot leave
        the batch (`leaving`), those that are done get its logits all the same, and are computed along until they can leave. With
        `patience`, samples leave when so many exits in a row agree on the class (Zhou et al. 2020, BERT Loses Patience). With none of
        them, the exit that was chosen, or else the thresholds of `calibrate`.

        Args:
            x: Images (batch, channels, height, width).
            exit: Number of an exit, from 0; the number of exits is the network's own end.
            threshold: Least confidence, in 0…1, at which a sample leaves; or one an exit, None where nobody leaves.
            patience: How many exits have to agree, at least 2.
            confidence: `max_softmax`; `entropy`, as 1 - entropy / log(classes); or `margin` between the two most probable classes. Without
                it, `max_softmax`, or what `calibrate` measured.
            return_exits: Also return at which exit each sample left, (batch,).

        Returns:
            Logits (batch, classes), in the order of the images.

        Raises:
            CompressError: On arguments that make no sense together or lie outside what there is, and on a truncated network.
        """
        if exit is None and threshold is None and patience is None and confidence is None:
            exit = self._chosen
        decide = self._rule(exit, threshold, patience, confidence)
        if not isinstance(x, torch.Tensor) or x.ndim < 1 or len(x) == 0:
            found = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise CompressError(f"infer: expected a batch of at least one image, found {found}")
        with evaluating(self):
            if exit is not None:
                logits = self._until(exit, x) if exit < len(self.exits) else self.forward_followed(None, x)
                return (logits, torch.full((len(x),), exit, device=logits.device)) if return_exits else logits
            leaving = Leaving(self.exits, self.record.places, self.boundaries, decide, x)
            leaving.finish(self.forward_followed(leaving, x))
        return (leaving.logits, leaving.left) if return_exits else leaving.logits

    def _rule(self, exit: Any, threshold: Any, patience: Any, confidence: Any) -> Decision | None:
        """What decides who leaves; None for a fixed exit."""
        count = len(self.exits)
        if self.record.truncated:
            raise CompressError("infer: this network was exported and ends at its only exit; call it as it is")
        given = [name for name, value in (("exit", exit), ("threshold", threshold), ("patience", patience)) if value is not None]
        if len(given) > 1:
            raise CompressError(f"infer: expected one of exit, threshold and patience, found {' and '.join(given)}")
        if confidence is not None and confidence not in CONFIDENCES:
            raise CompressError(f"confidence: expected one of {', '.join(CONFIDENCES)}, found {confidence!r}")
        if confidence is not None and given not in (["threshold"], []):
            raise CompressError(f"confidence: is what a threshold is compared with; found {given[0]} instead of one")
        if exit is not None:
            self._check_exit(exit)
            return None
        if patience is not None:
            if not isinstance(patience, int) or isinstance(patience, bool) or not 2 <= patience <= count:
                raise CompressError(f"patience: expected 2 to {count} exits that agree, found {patience!r}")
            return Patience(patience)
        if threshold is None:
            if self.record.thresholds is None:
                raise CompressError("infer: expected exit=, threshold= or patience=, found none, nor thresholds stored by calibrate")
            if confidence not in (None, self.record.confidence):
                raise CompressError(f"confidence: the stored thresholds are of {self.record.confidence}, found {confidence!r}")
            return Threshold(self.record.thresholds, self.record.confidence)
        return Threshold(thresholds_of(threshold, count), confidence or "max_softmax")

    def _until(self, exit: int, x: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        until = Until(self.record.places, self.exits, exit)
        self.forward_followed(until, x, *args, **kwargs)
        return until.found

    @property
    def leaving(self) -> tuple[bool, ...]:
        """At which exits samples that are done leave the batch. At the others they are computed along with it, to the next that lets go.

        Rows leave where nothing else of the batch is used later: no second branch, no batch size kept as a number.
        """
        return tuple(boundary is not None for boundary in self.boundaries)

    def costs(self) -> tuple[int, ...]:
        """MACs of one sample that leaves at each exit, and last of one that stays; heads on the way included."""
        return self.all_costs().alone

    def all_costs(self) -> Costs:
        """What a sample costs that is done at each exit, alone and in a batch."""
        clone: Any = eval_copy(self, "meta")
        with Kernels(), FlopCounterMode(display=False) as counter, torch.no_grad():
            spent = Spent(clone.exits, self.record.places, counter)
            clone.forward_followed(spent, default_input(self)[:1])
            whole = counter.get_total_flops() // 2
        alone = (*spent.found, whole)
        lets_go = [exit for exit, leaves in enumerate((*self.leaving, True)) if leaves]
        batch = tuple(alone[next(exit for exit in lets_go if exit >= done)] for done in range(len(alone)))
        return Costs(alone, batch, whole - spent.heads)

    @torch.no_grad()
    def calibrate(self, loader: Iterable[Any], budget: float = 0.5, *, confidence: str = "max_softmax") -> Calibration:
        """Find thresholds with which the average cost of a sample is a budget, and store them: `infer(x)` uses them, a checkpoint has them.

        Args:
            loader: Batches of validation images, preprocessed as the model wants them, or of tuples that begin with one; no labels needed.
            budget: Average MACs of a sample in a batch, as a fraction of the network's without heads; a count when above 2. A sample that
                is done where it cannot leave the batch (`leaving`) costs what it is computed along.
            confidence: What is compared with the thresholds; see `infer`.

        Returns:
            The thresholds and what they do on these images; see `structure.exits.budgeted` for how they are found.

        Raises:
            CompressError: If no thresholds reach the budget; the error says what is reachable. Nothing is stored then.
        """
        if self.record.truncated:
            raise CompressError("calibrate: this network was exported and ends at its only exit; nobody can leave before")
        if confidence not in CONFIDENCES:
            raise CompressError(f"confidence: expected one of {', '.join(CONFIDENCES)}, found {confidence!r}")
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
            raise CompressError(f"budget: expected a fraction of the network's MACs, or a count, found {budget!r}")
        found_costs = self.all_costs()
        costs = found_costs.batch
        wanted = float(budget) if budget > 2 else budget * found_costs.base
        budgeted(np.zeros((1, len(self.exits))), costs, wanted)  # out of reach? before anything runs
        measure = MEASURES[confidence]
        rows = []
        with evaluating(self), self.every_output():
            for images in _images(loader):
                logits = self(fitting(self, images))
                rows.append(torch.stack([measure(each) for each in logits[:-1]], 1).double().cpu().numpy())
        if not rows:
            raise CompressError("calibrate: expected at least one batch of images, found none")
        found = budgeted(np.concatenate(rows), costs, wanted)
        store(self, self.record.model_copy(update={"thresholds": found.thresholds, "confidence": confidence}))
        return found

    def export(self, exit: int) -> nn.Module:
        """A network that ends at an exit: a copy without the modules that run after it and without the other heads.

        It saves and loads as a variant, and its forward pass is the same for every sample, so that it can be converted:
        `torch.jit.trace`, and `torch.export.export(…, strict=True)` (without that, torch does not see that the pass ends early).

        Args:
            exit: Number of the exit, from 0.

        Raises:
            CompressError: If there is no such exit.
        """
        count = len(self.exits)
        if self.record.truncated:
            raise CompressError("export: this network was exported already and ends at its only exit")
        if not isinstance(exit, int) or isinstance(exit, bool) or not 0 <= exit < count:
            raise CompressError(f"exit: expected 0 to {count - 1}, an early exit, found {exit!r}")
        short: Any = copied(self)
        short.zero_grad(set_to_none=True)
        short._chosen = None
        short.exits = nn.ModuleList([short.exits[exit]])
        place = self.record.places[exit]
        set_taps(short, [place.place])
        truncate_(short, place, HEADS)
        store(short, Exits(places=(place,), truncated=True), renamed=(f"{HEADS}.{exit}.", f"{HEADS}.0."))
        return short


def attach_(
    model: nn.Module, record: Exits, boundaries: tuple[Boundary | None, ...] | None = None, kind: type[ExitsModel] = ExitsModel
) -> nn.Module:
    """Give a model exits, in place. Their heads have random weights.

    Args:
        model: The model, built for the class count and channels its heads are to have.
        record: Where. It is checked against a run without data before anything is made.
        boundaries: How rows leave there, if that was proven on such a model already; there is no such run then.
        kind: `ExitsModel` or a subclass, which is put over the model's class: what the network can do.

    Raises:
        CompressError: If the record does not fit the model.
    """
    if isinstance(model, ExitsModel):
        raise CompressError(f"exits: {type(model).__name__} has exits already")
    if hasattr(model, HEADS):
        raise CompressError(f"exits: {type(model).__name__} has something else named {HEADS!r}")
    modules = dict(model.named_modules())
    for exit in record.places:
        if exit.place not in modules:
            raise CompressError(f"exits: {type(model).__name__} has no module {exit.place!r}")
    if boundaries is None:
        boundaries = _proven(model, record)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    classes: Any = getattr(model, "num_classes", None)
    if not isinstance(classes, int):
        raise CompressError(f"exits: expected a classifier with num_classes, found {type(model).__name__} without")
    with like.device:
        heads = nn.ModuleList(Head(exit, classes) for exit in record.places).to(like.dtype)
    heads.train(model.training)
    model.__class__ = _with_exits(kind, type(model))  # type: ignore[arg-type]
    net: Any = model
    net.exits, net.record, net.boundaries = heads, record, boundaries
    set_taps(net, [exit.place for exit in record.places])
    if record.truncated:
        truncate_(net, record.places[0], HEADS)
    return model


def _proven(model: nn.Module, record: Exits) -> tuple[Boundary | None, ...]:
    """How rows leave at every exit of a record, which is checked against the model."""
    names = [exit.place for exit in record.places]
    try:
        proof = Trial(model, default_input(model)).prove(names)
    except AnalysisError as error:
        raise CompressError(f"exits: there can be none at {', '.join(names)}: {error}") from error
    for exit, shapes in zip(record.places, proof.shapes, strict=True):
        shape = shapes[exit.leaf] if exit.leaf < len(shapes) else ()
        if len(shape) != len(exit.format) - 1 or shape[exit.format.index("C") - 1] != exit.features:
            raise CompressError(
                f"exits: {exit.place!r}: expected {exit.features} features in format {exit.format}, found a tensor of shape "
                f"(batch{''.join(f', {n}' for n in shape)})"
            )
    return proof.boundaries


def store(net: nn.Module, record: Exits, renamed: tuple[str, str] | None = None) -> None:
    """Set what a network knows of its exits, and what its checkpoint will say.

    Args:
        net: The network.
        record: Its exits now.
        renamed: Prefix of names before and after, of the heads that are left, if some were dropped.
    """
    net.record = record  # type: ignore[assignment]
    args = getattr(net, "_model_args", {})
    if "variant" not in args:
        return
    variant = Variant.from_dict(args["variant"]).model_copy(update={"exits": record})
    if renamed is not None:
        old, new = renamed

        def moved(terms: dict[str, Any]) -> dict[str, Any]:
            kept = {name: value for name, value in terms.items() if not name.startswith(f"{HEADS}.") or name.startswith(old)}
            return {new + name.removeprefix(old) if name.startswith(old) else name: value for name, value in kept.items()}

        parts = {key: moved(getattr(variant, key)) for key in ("params", "attributes", "scales", "packed")}
        variant = present(net, variant.model_copy(update=parts))
    net._model_args = {**args, "variant": variant.to_dict()}  # type: ignore[assignment]


@cache
def _with_exits(kind: type[ExitsModel], cls: type) -> type:
    own = {"_made": (_with_exits, kind, cls), "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(f"{cls.__name__}WithExits", (kind, cls), own)


def _images(loader: Iterable[Any]) -> Iterator[torch.Tensor]:
    for batch in loader:
        images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(images, torch.Tensor) or images.ndim < 2 or not images.is_floating_point():
            raise CompressError(f"calibrate: expected batches of images as floats, found {type(images).__name__}")
        yield images
