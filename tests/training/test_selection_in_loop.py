"""Selecting blocks or groups in the training loop: killed, it goes on as if it had not been; with and without averages."""

import pytest
import timm
import torch

import zoo_compress as zc
from zoo_compress.errors import CompressError
from zoo_compress.methods.blocks import BlocksConfig
from zoo_compress.methods.groups import GroupsConfig
from zoo_compress.training.config import TrainConfig
from zoo_compress.training.loop import Phase, fit


def make():
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    cfg = {"input_size": (1, 16, 16), "mean": (0.0,), "std": (1.0,)}
    return timm.create_model("deit_tiny_patch16_224", **sizes, num_classes=10, in_chans=1, pretrained_cfg_overlay=cfg)


@pytest.mark.parametrize(("config", "parts"), [(BlocksConfig, 3), (GroupsConfig, 6)])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_training_goes_on_to_the_same_bits(tmp_path, make_loaders, ema, config, parts):
    train = TrainConfig(epochs=3, lr=3e-3, ema_decay=ema)
    method, phase = config(penalty=0.05), Phase("phase", 2, seed=7, run="this")
    whole = method.wrap(make())
    history = fit(whole, *make_loaders(), train, phase=phase, method=method)
    state = tmp_path / "state.safetensors"

    def stop(line):
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fit(method.wrap(make()), *make_loaders(), train, phase=phase, method=method, state=state, log=stop)
    resumed = method.wrap(make())
    again = fit(resumed, *make_loaders(), train, phase=phase, method=method, state=state)
    assert [epoch.train_loss for epoch in again] == [epoch.train_loss for epoch in history]
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    assert not torch.equal(whole.structure_scales, torch.ones(parts))
    assert method.finish(whole, ()).state_dict().keys() <= make().state_dict().keys()


@pytest.mark.parametrize("config", [BlocksConfig, GroupsConfig])
@pytest.mark.parametrize(
    "pack", [lambda net: zc.cluster(net, bits=2), lambda net: zc.sparsify(net, density=0.5)], ids=["shared", "removed"]
)
def test_what_would_lose_removed_or_shared_weights_is_refused_before_training(config, pack):
    with pytest.raises(CompressError, match=f"^{config().kind}: expected a model without removed or shared weights"):
        config().wrap(pack(make()))
