"""Structured pruning: rank the elements of every free axis and keep the best that fit a budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import nn

from ..errors import CompressError
from ..profiling.search import RoundTo, search
from ..structure import terms
from ..structure.budget import KINDS, Budget, meet
from ..structure.layout import Layout, parse
from ..structure.widths import Group, groups
from ..surgery.calibrate import follow_
from ..surgery.images import image_batches
from ..surgery.modules import takes_model
from ..surgery.moments import Moments, gather
from ..surgery.origin import forget_packed
from ..surgery.reconstruct import reconstruct_
from ..surgery.resize import check_fits, resize
from ..surgery.trace import analyze, input_for
from ..surgery.verify import check_runs, prove_zeroing
from .criteria import Data, lookup, scores
from .damage import UNREAD, damage_scores


@dataclass(frozen=True)
class PruneConfig:
    """How to prune. Exactly one of `keep`, `macs`, `params` and `latency` is given: a fraction to keep, or a count when above 1.

    Attributes:
        keep: Channels (elements of all free axes together; in the local scope, of each) to keep.
        macs: Multiply-accumulates to keep.
        params: Parameters to keep.
        latency: Measured latency to keep; milliseconds when above 1.
        criterion: Importance criterion, a key of `criteria.CRITERIA`.
        scope: See `Budget.scope`.
        round_to: See `Budget.round_to`; `auto` finds out by measuring.
        min_keep: See `Budget.min_keep`.
        exclude: Axes to leave alone: names of axes, or patterns of parameter names such as `layer4.*`.
        seed: For the random criterion.
        batch_size: Images in a pass that is measured.
        threads: CPU threads of a pass that is measured; None takes what torch is set to.
    """

    keep: float | None = None
    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    criterion: str = "l2"
    scope: str = "global"
    round_to: RoundTo = 8
    min_keep: float = 0.1
    exclude: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        budgets = [name for name in KINDS if getattr(self, name) is not None]
        if len(budgets) != 1:
            raise CompressError(f"prune: expected exactly one of keep, macs, params and latency, found {', '.join(budgets) or 'none'}")
        _ = self.budget  # checks the values

    @property
    def budget(self) -> Budget:
        """The one of the four that is given; without the multiple where that is measured."""
        kind, value = next((name, value) for name in KINDS if (value := getattr(self, name)) is not None)
        return Budget(kind, value, self.scope, 1 if self.round_to == "auto" else self.round_to, self.min_keep)

    @property
    def measured(self) -> bool:
        """Whether widths are chosen by measuring."""
        return self.latency is not None or self.round_to == "auto"


@takes_model
def prune(
    model: nn.Module,
    *,
    keep: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    criterion: str = "l2",
    scope: str = "global",
    round_to: RoundTo = 8,
    min_keep: float = 0.1,
    exclude: Iterable[str] = (),
    data: Data | None = None,
    reconstruct: Iterable[object] | None = None,
    layout: Layout | None = None,
    seed: int = 0,
    batch_size: int = 1,
    threads: int | None = None,
    check: bool = True,
    tie: Iterable[tuple[str, str]] = (),
) -> nn.Module:
    """Remove the least important elements of a model's free axes until it fits a budget.

    Nothing is trained. Without `reconstruct` the accuracy of what comes out is that of the weights that stay, which is often that of
    guessing. With it, least squares restores what every layer gave from the channels that stay, and the running statistics of BatchNorms
    are changed as the removal changed them: see `surgery.reconstruct` and `surgery.calibrate`.

    Args:
        model: The model. It is not changed. A pruned model can be pruned again.
        keep, macs, params: The budget: exactly one of them, the fraction of channels, multiply-accumulates or parameters to keep, or
            how many when above 1.
        latency: The same as a measured latency on this machine's CPU: a fraction of the model's own, or milliseconds when above 1.
            The pruned model is built and timed against the model in turns until it meets the fraction within 3 percentage points plus
            twice the standard error of that measurement (6 at most). Two calls may choose differently.
        criterion: Importance criterion: l1, l2, bn_scale, slimming (after training with that method), lamp, fpgm, random; with data,
            taylor, hessian, obdc; with images (of `reconstruct` or `data`), thinet, which measures what removal does to the predictions
            and keeps most accuracy.
        scope: `global` ranks all axes together; `local` keeps the same fraction of each.
        round_to: Preferred multiple for sizes; see `Budget.round_to`. With `auto`, whatever the budget, several multiples and rankings
            that prefer channels which take little time are built and timed, and the fastest is taken; see `profiling.search`.
        min_keep: No axis keeps less than this fraction of itself.
        exclude: Names of axes, or patterns of parameter names, to leave alone.
        data: Batches of (images (batch, channels, height, width), class indices (batch,)) for criteria that look at data.
        reconstruct: Batches of images, or of tuples that begin with images, preprocessed as the model wants them; a few hundred images
            without labels do. They are kept in memory (at most `surgery.images.LIMIT`); of activations only second moments are.
        layout: The model's layout, if it is known already.
        seed: For the random criterion.
        batch_size: Images in a pass, where latency is measured (`latency=`, `round_to="auto"`).
        threads: CPU threads, there; None takes what torch is set to.
        check: Prove what is handed out: it runs and costs what was computed, and gives what the model gives with the same elements zeroed,
            where nothing normalises across them. Sweeps over many budgets of one model may leave that out.
        tie: Pairs of names of modules that are averaged with each other; see `analyze`, which is given them where a layout is known.

    Returns:
        A new model within 2 percentage points of the budget.

    Raises:
        CompressError: On bad arguments, or if no choice comes within 2 percentage points of the budget (5 where only one group of axes may
            change); the error says what is reachable.
        VerificationError: If what came out is not what was meant, or the model is one of which nothing can be proven.
    """
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    config = PruneConfig(keep, macs, params, latency, criterion, scope, round_to, min_keep, exclude, seed, batch_size, threads)
    if layout is None:
        layout = analyze(model, tie=tie)
    elif tie:
        raise CompressError("tie: the layout is known already; pass tie= to analyze, which makes it")
    check_fits(model, layout)
    candidates = _candidates(layout, config.exclude)
    by_damage = lookup(criterion).importance is None
    images: list[torch.Tensor] = []
    moments: dict[str, Moments] = {}
    if reconstruct is not None or by_damage:
        images = _images(reconstruct if reconstruct is not None else data, criterion)
        moments = gather(model, layout, images, sensitivity=by_damage, seed=seed)
    names = [name for group in candidates for name in group.axes]
    if by_damage:
        plain = scores(model, layout, names, UNREAD, seed=seed)
        ranked = damage_scores(model, layout, candidates, moments, images, plain, config.budget.kind)
    else:
        ranked = scores(model, layout, names, criterion, data, seed)
    if config.measured:
        sizes = search(model, layout, candidates, ranked, config.budget, round_to, batch_size=batch_size, threads=threads)
    else:
        sizes = meet(layout, candidates, ranked, config.budget)
    widths = {name: _best(ranked[name], size) for name, size in sizes.items()}
    small = resize(model, layout, widths)
    if reconstruct is not None:
        reconstruct_(small, model, layout, widths, moments)
        follow_(small, model, layout, widths, images)
        forget_packed(small)
    if check:  # what does not do as computed is not given out
        check_runs(small, layout, sizes, input_for(small, layout))
        prove_zeroing(model, layout, widths)
    return small


def _images(data: Iterable[object] | None, criterion: str) -> list[torch.Tensor]:
    if data is None:
        raise CompressError(f"criterion {criterion!r} looks at images: pass reconstruct= or data=, batches of them")
    return image_batches(data)


def _candidates(layout: Layout, exclude: Sequence[str]) -> list[Group]:
    """Groups of axes that may change and that nothing excludes."""
    excluded: set[str] = set()
    for pattern in exclude:
        matched = [dims for name, dims in layout.params.items() if fnmatchcase(name, pattern)]
        if not matched and pattern not in layout.axes:
            raise CompressError(f"exclude: {pattern!r} is no axis and matches no parameter such as {next(iter(layout.params))!r}")
        excluded |= {str(axis) for dims in matched for dim in dims for axis in terms.axes(parse(dim))} | {pattern}
    return [group for group in groups(layout) if not excluded.intersection(group.axes)]


def _best(score: np.ndarray, size: int) -> np.ndarray:
    """Indices of the `size` highest scores, ascending. Ties go to the first."""
    return np.sort(np.argsort(-score, kind="stable")[:size])
