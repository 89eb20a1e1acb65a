"""Recurrent layers: many small operations a step, which stack the gates of all units in one dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..structure.terms import Term, concat, product
from .functions import handles
from .tracer import Tracer

GATES = {torch.lstm: 4, torch.gru: 3, torch.rnn_tanh: 1, torch.rnn_relu: 1}


@handles(*GATES)
def _recurrent(
    t: Tracer,
    function: Any,
    input: torch.Tensor,
    hx: Any,
    params: Any,
    has_biases: Any,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, ...]:
    args = (input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
    states = [hx] if isinstance(hx, torch.Tensor) else list(hx)
    directions = 2 if bidirectional else 1
    per_cell = 4 if has_biases is True else 2
    # Packed sequences have other arguments in these places, and projections have one weight more.
    if input.ndim != 3 or not isinstance(has_biases, bool) or len(params) != per_cell * num_layers * directions:
        return function(*args)
    t.seen.update(map(id, params))
    with t.silenced():
        out, *ends = _without_data(args, states) if input.is_meta else function(*args)
    t.operation = function.__name__
    *outer, width = t.dims(input)
    # Zeros as an initial state fit any unit; a state that is given holds the same units for all layers and directions.
    given = not all(map(t.is_alike, states))
    units: list[Term] = []
    for layer in range(num_layers):
        made = []
        for cell in range(layer * directions, (layer + 1) * directions):
            tensors = params[cell * per_cell : (cell + 1) * per_cell]
            made.append(_cell(t, GATES[function], width, tensors, outer))
        units += made
        width = concat(*made)
    for state in states:
        for term in units if given else units[:1]:
            t.unify(t.dims(state)[-1], term)
    for other in units[1:]:
        t.link(units[0], other)
    t.set(out, [*outer, width])

    def stacked() -> list[Term]:
        for other in units[1:]:
            t.unify(units[0], other)
        return [len(units), outer[0 if batch_first else 1], units[0]]

    for end in ends:
        t.set_when_asked(end, stacked)
    return (out, *ends)


def _without_data(args: tuple[Any, ...], states: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and final states as shapes only; running thousands of operations for them would take seconds."""
    input, _, params, _, _, _, _, bidirectional, _ = args
    width = params[1].shape[1] * (2 if bidirectional else 1)
    return [input.new_empty((*input.shape[:2], width)), *(state.new_empty(state.shape) for state in states)]


def _cell(t: Tracer, gates: int, width: Term, tensors: Sequence[torch.Tensor], outer: Sequence[Term]) -> Term:
    """The units of one layer in one direction. Its weights are (gates × units, …), the first for the input, the second for the state."""
    (rows, columns), (_, units) = t.dims(tensors[0]), t.dims(tensors[1])
    t.unify(columns, width)
    for tensor in tensors:
        t.unify(t.dims(tensor)[0], product(gates, units))
    t.mixed.append(units)
    t.costs += [product(*outer, rows, columns), product(*outer, rows, units)]
    return units
