"""Networks that run in several ways, at widths or to exits: every way as a model of its own, and the way that fits a time limit here."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.models import get_model_input_config
from torch import nn

from ..errors import CompressError
from ..surgery.images import fitting
from . import latency
from .latency import inference

Value = float | int
Accuracies = Mapping[Any, float]


@dataclass(frozen=True)
class Setting:
    """One way to run a network, and what it costs on this machine.

    Attributes:
        values: Knob (`width`, `exit`) → where it is.
        macs: Multiply-accumulates of one sample.
        latency_ms: Median milliseconds of one forward pass.
    """

    values: dict[str, Value]
    macs: int
    latency_ms: float

    def __str__(self) -> str:
        return ", ".join(f"{knob} {value:g}" for knob, value in self.values.items())


@dataclass(frozen=True)
class Fitted:
    """The setting that was picked for a time limit. Printed, it is a table of all that were measured.

    Attributes:
        best: It.
        measured: All of them.
        batch_size: Images in a pass.
        threads: CPU threads it used.
    """

    best: Setting
    measured: tuple[Setting, ...] = field(repr=False)
    batch_size: int
    threads: int

    @property
    def width(self) -> float | None:
        """The width that was picked; None of a network that has one."""
        return self.best.values.get("width")

    @property
    def exit(self) -> int | None:
        """The exit that was picked; None of a network without exits."""
        found = self.best.values.get("exit")
        return None if found is None else int(found)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample there."""
        return self.best.macs

    @property
    def latency_ms(self) -> float:
        """Median milliseconds of one forward pass there."""
        return self.best.latency_ms

    def __str__(self) -> str:
        head = "".join(f"{knob:>7}" for knob in self.best.values)
        rows = [
            "".join(f"{value:>7g}" for value in s.values.values())
            + f"  {s.macs:>16,}  {s.latency_ms:>9.3f}{'  best' if s is self.best else ''}"
            for s in self.measured
        ]
        return "\n".join([f"{head}  {'MACs':>16}  {'ms':>9}", *rows])


class Adjustable(nn.Module):
    """What a network gains that runs in several ways. Each part that adds a knob says which values it has, and puts its own part in."""

    def knobs(self) -> dict[str, tuple[Value, ...]]:
        """Knob → its values, those that cost least first. `set_<knob>` turns it."""
        return {}

    def chosen(self) -> dict[str, Any]:
        """Knob → where it is, so that `use` brings it back there."""
        return {}

    def chosen_macs(self) -> int:
        """Multiply-accumulates of one sample with the knobs where they are."""
        own: Any = self
        return int(own.macs())

    def ways(self) -> dict[str, nn.Module]:
        """Short label → a model of its own, for every way to run, that of the whole first."""
        return {"": self}

    def use(self, values: Mapping[str, Any]) -> None:
        """Turn knobs to these values."""
        for knob, value in values.items():
            getattr(self, f"set_{knob}")(value)

    def fit(
        self,
        latency_ms: float,
        *,
        batch_size: int = 1,
        threads: int | None = None,
        accuracies: Accuracies | None = None,
        runs: int = 30,
    ) -> Fitted:
        """Measure every setting on this machine's CPU, and choose one that keeps to a time limit.

        Of the settings whose median latency is within the limit, the most accurate is chosen where accuracies are given, and without
        them the one of most MACs: within one network, more computing seldom predicts worse. The network runs at it from then on. A
        checkpoint does not say what was chosen: it depends on the machine.

        Args:
            latency_ms: Milliseconds that one forward pass may take.
            batch_size: Images in a pass, of the size the model's `pretrained_cfg` names.
            threads: CPU threads; None takes what torch is set to.
            accuracies: Of every setting, or of those to choose from: width → accuracy, exit → accuracy, or in a network with both,
                (width, exit) → accuracy.
            runs: Timed passes of each setting, in turns.

        Raises:
            CompressError: If no setting keeps to the limit; the error says the fastest. The network is then as it was.
        """
        if isinstance(latency_ms, bool) or not isinstance(latency_ms, (int, float)) or not 0 < latency_ms < float("inf"):
            raise CompressError(f"fit: expected latency_ms as milliseconds above 0, found {latency_ms!r}")
        for name, number in {"batch_size": batch_size, "runs": runs}.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise CompressError(f"fit: expected {name} of at least 1, found {number!r}")
        knobs = self.knobs()
        settings = [dict(zip(knobs, values, strict=True)) for values in itertools.product(*knobs.values())]
        if len(settings) < 2:
            raise CompressError(f"fit: expected a network with exits or several widths, found {type(self).__name__}, which runs in one way")
        known = None if accuracies is None else _checked(accuracies, settings)
        before = self.chosen()
        try:
            measured, used = self._measured(settings, batch_size, threads, runs)
        finally:
            self.use(before)
        best = _best(measured, latency_ms, known)
        self.use(best.values)
        return Fitted(best, tuple(measured), batch_size, used)

    def _measured(self, settings: list[dict[str, Value]], batch_size: int, threads: int | None, runs: int) -> tuple[list[Setting], int]:
        macs = []
        for values in settings:
            self.use(values)
            macs.append(self.chosen_macs())
        image = fitting(self, torch.zeros(batch_size, *get_model_input_config(self)["input_size"]))
        times = np.empty((runs, len(settings)))
        with inference([self], threads) as used:
            for run, (i, values) in itertools.product(range(runs), enumerate(settings)):
                self.use(values)
                self(image)  # what is prepared once after a knob was turned is not part of a pass
                start = latency.clock()
                self(image)
                times[run, i] = latency.clock() - start
        medians = 1e3 * np.median(times, axis=0)
        return [Setting(values, count, float(ms)) for values, count, ms in zip(settings, macs, medians, strict=True)], used


def ways(model: nn.Module) -> dict[str, nn.Module]:
    """Short label → model, for every way a model runs; the model itself, with an empty label, where that is one."""
    return model.ways() if isinstance(model, Adjustable) else {"": model}


def _best(measured: list[Setting], latency_ms: float, accuracies: dict[tuple[Value, ...], float] | None) -> Setting:
    inside = [setting for setting in measured if setting.latency_ms <= latency_ms]
    if accuracies is not None:
        inside = [setting for setting in inside if tuple(setting.values.values()) in accuracies]
    if not inside:
        fastest = min(measured, key=lambda setting: setting.latency_ms)
        raise CompressError(f"fit: nothing keeps to {latency_ms:g} ms here: the fastest, {fastest}, takes {fastest.latency_ms:.3g} ms")
    if accuracies is None:
        return max(inside, key=lambda setting: setting.macs)
    # Of equally accurate ones, the fastest.
    return max(inside, key=lambda setting: (accuracies[tuple(setting.values.values())], -setting.latency_ms))


def _checked(accuracies: Accuracies, settings: list[dict[str, Value]]) -> dict[tuple[Value, ...], float]:
    """Values of the knobs → accuracy."""
    known = {tuple(values.values()) for values in settings}
    names = " and ".join(settings[0])
    if not isinstance(accuracies, Mapping) or not accuracies:
        raise CompressError(f"fit: expected accuracies as {names} → number, found {accuracies!r}")
    found = {}
    for key, value in accuracies.items():
        values = key if isinstance(key, tuple) else (key,)
        if values not in known:
            raise CompressError(f"fit: accuracies: expected {names} of the network, found {key!r}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise CompressError(f"fit: accuracies[{key!r}]: expected a number, found {value!r}")
        found[values] = float(value)
    return found
