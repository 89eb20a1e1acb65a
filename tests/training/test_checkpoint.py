"""Training state: comes back to the last bit, survives a failed write, is never pickled."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2

from zoo_compress.errors import CompressError
from zoo_compress.training import checkpoint
from zoo_compress.training.checkpoint import load_state, save_state, write_atomic

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
tensors = st.lists(st.floats(width=32, allow_nan=False), max_size=4).map(torch.tensor)
trees = st.recursive(
    scalars | tensors,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=10,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@settings(deadline=None)
@given(st.dictionaries(st.text() | st.integers(), trees, max_size=3))
def test_any_tree_comes_back(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    save_state(path, tree)
    assert same(load_state(path), tree)


def test_views_and_shared_storage_are_saved_by_value(tmp_path):
    x = torch.arange(12.0).reshape(3, 4)
    save_state(tmp_path / "s", {"a": x, "b": x, "t": x.T, "row": x[1]})
    state = load_state(tmp_path / "s")
    assert torch.equal(state["t"], x.T)
    assert torch.equal(state["row"], x[1])
    assert torch.equal(state["a"], state["b"])


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb", "lookahead_radam", "muon"])
def test_optimizers_go_on_where_they_were(tmp_path, opt):
    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.ones(2, 6)).square().sum().backward()
            optimizer.step()

    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
        return model, create_optimizer_v2(model, opt, lr=0.01, weight_decay=0.1)

    model, optimizer = make()
    steps(model, optimizer, 7)
    first, first_optimizer = make()
    steps(first, first_optimizer, 4)
    save_state(tmp_path / "s", {"model": first.state_dict(), "optimizer": first_optimizer.state_dict()})
    second, second_optimizer = make()
    state = load_state(tmp_path / "s")
    second.load_state_dict(state["model"])
    second_optimizer.load_state_dict(state["optimizer"])
    steps(second, second_optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), second.parameters(), strict=True))


def test_what_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(CompressError, match=r"/optimizer/0: expected a tensor or a JSON scalar, found object"):
        save_state(tmp_path / "s", {"optimizer": [object()]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        pickle.dumps({"model": {}}),
        b"\xff" * 64,
        b"\x02\0\0\0\0\0\0\0{}",
        b'\x2a\0\0\0\0\0\0\0{"__metadata__":{"format":"something else"}}'.ljust(50),
    ],
)
def test_other_files_are_refused(tmp_path, content, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", never)
    monkeypatch.setattr(pickle, "loads", never)
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(CompressError, match="expected a training state"):
        load_state(tmp_path / "s")


def test_truncated_state_is_refused(tmp_path):
    save_state(tmp_path / "s", {"x": torch.arange(100)})
    data = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(data[:-8])
    with pytest.raises(CompressError, match="expected a training state"):
        load_state(tmp_path / "s")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomic(path, b"old")

    def killed(*args):
        raise KeyboardInterrupt

    for point in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, point, killed)
            with pytest.raises(KeyboardInterrupt):
                write_atomic(path, b"new and longer")
        assert path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
