"""Networks with early exits: classifiers inside a network, by which samples that are easy leave it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import create_model
from torch import nn

from ..errors import CompressError
from ..profiling.sampled import Sampled
from ..profiling.settings import Adjustable, Value
from ..structure.exits import MAX_GRID, Exits
from ..structure.variant import Variant, record
from ..surgery import blocks, factors
from ..surgery.elastic import Elastic
from ..surgery.exits import ExitsModel, attach_
from ..surgery.modules import copied, takes_model
from ..surgery.origin import Origin, origin, stamp
from ..surgery.places import check_wanted, choose
from ..surgery.proof import Trial
from ..surgery.rows import Boundary
from ..surgery.trace import analyze, default_input


class Exiting(ExitsModel, Adjustable):
    """A network with early exits, whose depth is a knob. See `ExitsModel` for what it can do."""

    def knobs(self) -> dict[str, tuple[Value, ...]]:
        return super().knobs() if self.record.truncated else {**super().knobs(), "exit": tuple(range(len(self.exits) + 1))}

    def chosen(self) -> dict[str, Any]:
        return super().chosen() if self.record.truncated else {**super().chosen(), "exit": self.chosen_exit}

    def chosen_macs(self) -> int:
        return self.costs()[self.chosen_exit]

    def ways(self) -> dict[str, nn.Module]:
        """The whole, the network that ends at each exit, and where thresholds are stored, the one whose samples leave by them."""
        if self.record.truncated:
            return {"": self}
        whole = copied(self)
        whole.set_exit(len(self.exits))
        found: dict[str, nn.Module] = {"": whole, **{f"exit {i}": self.export(i) for i in range(len(self.exits))}}
        return found if self.record.thresholds is None else {**found, "thresholds": PerSample(whole)}


class PerSample(Sampled):
    """A network whose samples leave by its stored thresholds, as a model of its own.

    Args:
        net: A calibrated network with exits; it is used as it is, not copied.
    """

    def __init__(self, net: Exiting) -> None:
        super().__init__(net.all_costs().batch)
        self.net = net
        self.pretrained_cfg, self.num_classes = net.pretrained_cfg, net.num_classes
        self.in_chans = getattr(net, "in_chans", 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes)."""
        logits, left = self.net.infer(x, return_exits=True)
        self.note(x, left)
        return logits


def attach_exits_(model: nn.Module, record: Exits, boundaries: tuple[Boundary | None, ...] | None = None) -> nn.Module:
    """Give a model the exits of a record, in place; see `surgery.exits.attach_`."""
    return attach_(model, record, boundaries, Exiting)


@takes_model
def add_exits(model: nn.Module, exits: int | float | str | Sequence[str] | Sequence[float], grid: int | None = None) -> nn.Module:
    """A copy of a timm model with early exits, whose heads have random weights. It stays a timm model of its own class.

    Exits are modules between which nothing else of the batch is alive, where there are such, so that samples can leave there:
    `net.infer(x, threshold=0.9)`. That they can is proven by a run before anything is made. At other exits samples get their logits as
    well, and are computed along with their batch until the next exit where they can leave: `net.leaving` says where that is. See
    `surgery.exits.ExitsModel` for what the network can do then.

    Args:
        model: A model that timm's factory made, pruned or not.
        exits: How many early exits, at evenly spaced fractions of the MACs; or those fractions; or the names of modules.
        grid: Heads that read maps take the means of grid × grid parts of them, or of as many as a map has. None takes 4 × 4, or fewer where
            a head would otherwise have more than a twentieth of the model's parameters.

    Raises:
        CompressError: If there are no such places, with what there is, or why no head fits there.
    """
    wanted = check_wanted(exits)
    if grid is not None and (not isinstance(grid, int) or isinstance(grid, bool) or not 1 <= grid <= MAX_GRID):
        raise CompressError(f"grid: expected 1 to {MAX_GRID} parts of each side of a map, found {grid!r}")
    if not isinstance(model, nn.Module):
        raise CompressError(f"exits: expected a model, found {type(model).__name__}")
    if isinstance(model, ExitsModel):
        raise CompressError("exits: the model has exits already")
    if isinstance(model, Elastic):
        raise CompressError(
            f"exits: {type(model).__name__} runs at several widths already: add exits first, then zoo_compress.slim(net, widths); or "
            "export one width and add them to that"
        )
    source = origin(model)
    if source is None:
        raise CompressError(f"exits: expected a model made by timm, which says what it takes; {type(model).__name__} does not")
    if source.previous is not None and source.previous.exits is not None:
        raise CompressError("exits: the model has exits already")
    places, boundaries = choose(model, default_input(model), wanted, grid)
    chosen = Exits(places=tuple(places))
    net = attach_exits_(copied(model), chosen, boundaries)
    stamp(net, _record(net, chosen, source))
    classifiers = [f"exits.{i}.fc" for i in range(len(chosen.places))]
    cfg: Any = net.pretrained_cfg
    own = cfg.get("classifier") or ()
    cfg["classifier"] = (*((own,) if isinstance(own, str) else own), *classifiers)
    return net


def _record(net: nn.Module, exits: Exits, source: Origin) -> Variant:
    """What a checkpoint says of a network with exits. Heads are made to fit the whole base; sizes then say what is left of them."""
    if source.previous is None:
        return Variant(method="exits", base=source.base, base_args=source.args, sizes={}, params={}, exits=exits)
    layout = analyze(net)
    before = source.previous.model_copy(update={"exits": _on_base(exits, source)})
    return record(layout, layout.base_sizes, method="exits", base=source.base, base_args=source.args, previous=before)


def _on_base(exits: Exits, source: Origin) -> Exits:
    """The same exits as heads on the uncompressed base would have them."""
    previous = source.previous
    assert previous is not None
    with torch.device("meta"):
        base = create_model(source.base, **source.args, **source.live)
        factors.replace_(blocks.skip_(base, previous.removed), previous.factors)  # an exit may lie between the two layers of a pair
    proof = Trial(base, default_input(base)).prove([exit.place for exit in exits.places])
    features = [shapes[e.leaf][e.format.index("C") - 1] for e, shapes in zip(exits.places, proof.shapes, strict=True)]
    places = (exit.model_copy(update={"features": n}) for exit, n in zip(exits.places, features, strict=True))
    return exits.model_copy(update={"places": tuple(places)})
