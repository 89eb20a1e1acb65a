"""A grown model has the model in its first elements, and new ones as layers make them."""

import pytest
import timm
import torch
from torch import nn

import zoo_compress as zc
from zoo_compress.surgery.grow import grow, growable
from zoo_compress.surgery.verify import flat


def doubled(model, layout):
    return {name: 2 * layout.axes[name].size for group in growable(model, layout) for name in group.axes}


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext", "test_byobnet", "densenet121", "convit_tiny"]
)
def test_the_first_elements_are_the_model(name):
    model = timm.create_model(name, num_classes=5).eval()
    layout = zc.analyze(model)
    sizes = doubled(model, layout)
    large, grown = grow(model, layout, sizes)
    assert sizes
    assert zc.analyze(large).params == layout.params
    assert sum(p.numel() for p in large.parameters()) == layout.num_params(sizes) == grown.num_params()
    image = torch.randn(2, *model.default_cfg["input_size"])
    again = zc.resize(large, grown, layout.base_sizes)
    with torch.no_grad():
        assert torch.equal(flat(again(image)), flat(model(image)))


def test_new_elements_are_as_layers_initialise_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 5)).eval()
    for parameter in model.parameters():
        parameter.data.fill_(7.0)
    layout = zc.analyze(model, torch.randn(2, 3, 8, 8))
    large, _ = grow(model, layout, {layout.params["0.weight"][0]: 64})
    bound = 1 / 27**0.5  # torch's default for 3 × 3 × 3 inputs
    new = large[0].weight.detach()[8:]
    assert new.abs().max() <= bound
    assert new.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert (large[1].weight[8:] == 1).all()
    assert (large[1].running_var[8:] == 1).all()
    assert (large[1].running_mean[8:] == 0).all()
    assert (large[0].weight[:8] == 7).all()
    assert (large[3].weight[:, :8] == 7).all()


def test_axes_of_ordered_elements_or_constants_do_not_grow():
    class Filtered(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(4, 2)
            self.register_buffer("frequency", torch.arange(6.0).reshape(6, 1, 1))
            self.register_buffer("blur", torch.full((4, 1, 3, 3), 1 / 9))

        def forward(self, x):
            x = self.out(self.inner(x) * self.frequency)
            return self.head(nn.functional.conv2d(x, self.blur, groups=x.shape[1]).mean((2, 3)))

    model = Filtered().eval()
    layout = zc.analyze(model, torch.randn(2, 3, 8, 8))
    axis = {name: layout.params[name][0] for name in ("inner.weight", "out.weight")}
    assert axis["inner.weight"] in layout.free
    assert axis["out.weight"] in layout.free
    assert [group.axes for group in growable(model, layout)] == [(axis["out.weight"],)]
    with pytest.raises(zc.WidthError, match="may grow"):
        grow(model, layout, {axis["inner.weight"]: 12})
    with pytest.raises(zc.WidthError, match="may grow"):
        grow(model, layout, {axis["out.weight"]: 3})
