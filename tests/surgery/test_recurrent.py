"""Recurrent layers and cells: units are an axis, gates × units the rows of their weights."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import zoo_compress as zc
from zoo_compress.structure.widths import groups

SEQUENCES = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


class Reads(nn.Module):
    """Embedding → recurrent part, called in one of many ways → classes."""

    def __init__(self, rnn, call, width):
        super().__init__()
        self.embed, self.rnn, self.out, self.call = nn.Linear(8, 12), rnn, nn.Linear(width, 5), call
        if call is started:
            self.start = nn.Parameter(torch.randn(4, 1, 10))

    def forward(self, x):
        return self.out(self.call(self, self.embed(x).relu()))


def steps(model, x):
    state = None
    for step in x.unbind(1):
        state = model.rnn(step, state)
    return state[0] if isinstance(state, tuple) else state


def functional(model, x):
    cell, state = model.rnn, x.new_zeros(x.shape[0], model.rnn.hidden_size)
    for step in x.unbind(1):
        state = torch.gru_cell(step, state, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    return state


def packed(model, x):
    lengths = torch.full((x.shape[0],), x.shape[1])
    return pad_packed_sequence(model.rnn(pack_padded_sequence(x, lengths, batch_first=True))[0], batch_first=True)[0].mean(1)


def shorter(model, x):
    lengths = torch.full((x.shape[0],), x.shape[1] - 2)
    _, state = model.rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    return (state[0] if isinstance(state, tuple) else state).sum(0)


def started(model, x):
    start = model.start.expand(-1, x.shape[0], -1)
    return model.rnn(x, (start, start.tanh()) if isinstance(model.rnn, nn.LSTM) else start)[0].mean(1)


def sequences(model, x):
    return model.rnn(x)[0].mean(1)


def unbatched(model, x):
    return torch.stack([model.rnn(one)[0].mean(0) for one in x])


def last(model, x):
    state = model.rnn(x)[1]
    return (state[0] if isinstance(state, tuple) else state).sum(0)


def memory(model, x):
    return model.rnn(x)[1][1].sum(0)


CASES = {
    "LSTMCell": (lambda: nn.LSTMCell(12, 10), steps, 10),
    "GRUCell": (lambda: nn.GRUCell(12, 10), steps, 10),
    "GRUCell without biases": (lambda: nn.GRUCell(12, 10, bias=False), steps, 10),
    "RNNCell": (lambda: nn.RNNCell(12, 10), steps, 10),
    "RNNCell with relu": (lambda: nn.RNNCell(12, 10, nonlinearity="relu"), steps, 10),
    "cell in a residual loop": (lambda: nn.GRUCell(12, 12), lambda m, x: m.rnn(x[:, 1], m.rnn(x[:, 0])) + x[:, 2], 12),
    "functional cell": (lambda: nn.GRUCell(12, 10), functional, 10),
    "unbatched cell": (lambda: nn.LSTMCell(12, 10), lambda m, x: torch.stack([m.rnn(one[0])[0] for one in x]), 10),
    "packed LSTM": (lambda: nn.LSTM(12, 10, batch_first=True), packed, 10),
    "packed GRU in two layers": (lambda: nn.GRU(12, 10, 2, batch_first=True, bidirectional=True), packed, 20),
    "packed and projected": (lambda: nn.LSTM(12, 10, batch_first=True, proj_size=6), packed, 6),
    "last of packed LSTM": (lambda: nn.LSTM(12, 10, batch_first=True), shorter, 10),
    "last of packed GRU": (lambda: nn.GRU(12, 10, batch_first=True, bidirectional=True), shorter, 10),
    "projected LSTM": (lambda: nn.LSTM(12, 10, batch_first=True, proj_size=6), sequences, 6),
    "projected LSTM in two layers": (lambda: nn.LSTM(12, 10, 2, batch_first=True, bidirectional=True, proj_size=6), sequences, 12),
    "last of projected LSTM": (lambda: nn.LSTM(12, 10, 2, batch_first=True, proj_size=6, bias=False), last, 6),
    "memory of projected LSTM": (lambda: nn.LSTM(12, 10, 2, batch_first=True, proj_size=6), memory, 10),
    "learned start": (lambda: nn.GRU(12, 10, 2, bidirectional=True, batch_first=True), started, 20),
    "learned start of an LSTM": (lambda: nn.LSTM(12, 10, 4, batch_first=True), started, 10),
    "unbatched": (lambda: nn.LSTM(12, 10, bidirectional=True), unbatched, 20),
    "time first": (lambda: nn.RNN(12, 10), lambda m, x: m.rnn(x.transpose(0, 1))[0].mean(0), 10),
}


@pytest.mark.parametrize("name", CASES)
def test_units_are_an_axis_that_may_change(name):
    make, call, width = CASES[name]
    torch.manual_seed(0)
    model = Reads(make(), call, width).eval()
    layout = zc.analyze(model, SEQUENCES)
    assert zc.verify(model, layout, SEQUENCES).permutation_error < 1e-9
    hidden = {axis for param, dims in layout.params.items() if "weight_hh" in param for axis in layout.axes if axis in dims[1].split()}
    assert hidden
    assert all(layout.axes[axis].frozen is None for axis in hidden), layout
    assert layout.axes[layout.params["embed.weight"][0]].frozen is None

    widths = {axis: size for group in groups(layout) for axis, size in group.at(max(1, group.steps // 2)).items()}
    small = zc.resize(model, layout, widths)
    rnn = small.rnn
    first = dict(rnn.named_parameters())
    hh, ih = (next(p for n, p in first.items() if n.startswith(f"weight_{side}")) for side in ("hh", "ih"))
    assert rnn.input_size == ih.shape[1]
    units = next((p.shape[1] for n, p in first.items() if n.startswith("weight_hr")), hh.shape[1])
    assert rnn.hidden_size == units < make().hidden_size
    small.train()(SEQUENCES).sum().backward()


def test_a_learned_start_keeps_one_row_for_every_layer_and_direction():
    model = Reads(nn.GRU(12, 10, 2, bidirectional=True, batch_first=True), started, 20).eval()
    layout = zc.analyze(model, SEQUENCES)
    assert "layers and directions" in layout.axes[layout.params["start"][0]].frozen
    assert layout.params["start"][2] == layout.params["rnn.weight_hh_l0"][1]
