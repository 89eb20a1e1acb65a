"""Recurrent layers and cells: many small operations a step, which stack the gates of all units in one dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..structure import unify as u
from ..structure.terms import Term, concat, product
from .functions import handles
from .tracer import Tracer

GATES = {
    **{torch.lstm: 4, torch.gru: 3, torch.rnn_tanh: 1, torch.rnn_relu: 1},
    **{torch.lstm_cell: 4, torch.gru_cell: 3, torch.rnn_tanh_cell: 1, torch.rnn_relu_cell: 1},
}


@handles(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
def _recurrent(t: Tracer, function: Any, input: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    # Of a packed sequence there are the lengths of its steps, and no `batch_first`.
    packed = not isinstance(args[2], bool)
    hx, params, has_biases, num_layers, _, _, bidirectional = args[1:8] if packed else args[:7]
    states = [hx] if isinstance(hx, torch.Tensor) else list(hx)
    directions = 2 if bidirectional else 1
    per_cell = len(params) // (num_layers * directions)
    projected = per_cell > (4 if has_biases else 2)
    t.seen.update(map(id, params))
    with t.silenced():
        width = int(params[per_cell - 1].shape[0] if projected else params[1].shape[1])
        out, *ends = _without_data(input, states, width * directions) if input.is_meta else function(input, *args)[: 1 + len(states)]
    t.operation = function.__name__
    *outer, term = t.dims(input)
    inside: list[Term] = []  # the units of every cell, and what they give
    given: list[Term] = []
    for layer in range(num_layers):
        made = []
        for cell in range(layer * directions, (layer + 1) * directions):
            tensors = params[cell * per_cell : (cell + 1) * per_cell]
            units, result = _cell(t, GATES[function], term, tensors, outer, projected)
            inside.append(units)
            made.append(result)
        given += made
        term = concat(*made)
    batch = 1 if packed else outer[0 if args[-1] else 1]
    for state, held in zip(states, (given, inside), strict=False):
        # Zeros fit any units; a state that is given holds the same for all layers and directions.
        _initial(t, state, held[:1] if t.is_alike(state) else held, t.dims(state)[1] if packed else batch)
    for held in (given, inside) if projected else (given,):
        for other in held[1:]:
            t.link(held[0], other)
    t.set(out, [*outer, term])
    for end, held in zip(ends, (given, inside), strict=False):
        t.set_when_asked(end, lambda held=held, end=end: _stacked(t, held, [int(n) for n in end.shape], batch))  # type: ignore[misc]
    return (out, *ends)


def _initial(t: Tracer, state: torch.Tensor, held: list[Term], batch: Term) -> None:
    """An initial state (cells, batch, units) with the units of some cells."""
    cells, samples, units = t.dims(state)
    u.freeze(cells, f"{t.where} has as many layers and directions")
    t.unify(samples, batch)
    for term in held:
        t.unify(units, term)


def _stacked(t: Tracer, held: list[Term], shape: list[int], batch: Term) -> list[Term]:
    """A final state (cells, batch, units)."""
    for other in held[1:]:
        t.unify(held[0], other)
    return [len(held), batch if u.size_of(batch) == shape[1] else shape[1], held[0]]


def _without_data(input: torch.Tensor, states: list[torch.Tensor], width: int) -> list[torch.Tensor]:
    """Output and final states as shapes only; running thousands of operations for them would take seconds."""
    return [input.new_empty((*input.shape[:-1], width)), *(state.new_empty(state.shape) for state in states)]


def _cell(
    t: Tracer, gates: int, width: Term, tensors: Sequence[torch.Tensor], outer: Sequence[Term], projected: bool = False
) -> tuple[Term, Term]:
    """The units of one layer in one direction, and what it gives. Its weights are (gates × units, …), the first for the input, the second
    for what it gave before; a projection is the last."""
    stacked = tensors[:-1] if projected else tensors
    (rows, columns), (_, result) = t.dims(stacked[0]), t.dims(stacked[1])
    t.unify(columns, width)
    units = result
    if projected:
        first, units = t.dims(tensors[-1])
        t.unify(first, result)
        t.costs.append(product(*outer, result, units))
    for tensor in stacked:
        t.unify(t.dims(tensor)[0], product(gates, units))
    t.mixed += [units, result]
    t.costs += [product(*outer, rows, columns), product(*outer, rows, result)]
    return units, result


@handles(torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)
def _single(
    t: Tracer,
    function: Any,
    input: torch.Tensor,
    hx: Any,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor | None = None,
    b_hh: torch.Tensor | None = None,
) -> Any:
    states = [hx] if isinstance(hx, torch.Tensor) else list(hx)
    with t.silenced():
        out = function(input, hx, w_ih, w_hh, b_ih, b_hh)
    t.operation = function.__name__
    *outer, width = t.dims(input)
    units, _ = _cell(t, GATES[function], width, [tensor for tensor in (w_ih, w_hh, b_ih, b_hh) if tensor is not None], outer)
    for state in states:
        for a, b in zip(t.dims(state), (*outer, units), strict=True):
            t.unify(a, b)
    for end in [out] if isinstance(out, torch.Tensor) else out:
        t.set(end, [*outer, units])
    return out
