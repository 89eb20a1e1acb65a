"""What operations do to the axes of their operands: each in a network of its own, whose layout is proven."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import ops as vision

import zoo_compress as zc
from zoo_compress.structure.terms import axes, parse, size

CHANNELS, HEIGHT, WIDTH = 12, 4, 6
IMAGES = torch.randn(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))


class Applies(nn.Module):
    """Two convolutions of 12 channels, an operation on what they give, and products with weights along what are channels in its result."""

    def __init__(self, operation):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(3, CHANNELS, 1)
        self.weight = nn.Parameter(torch.rand(CHANNELS) + 0.5)
        self.operation, self.channels = operation, {}
        self.register_buffer("mask", torch.arange(WIDTH) % 3 > 0)
        self.register_buffer("places", torch.arange(HEIGHT * WIDTH).view(HEIGHT, WIDTH) % 3 > 0)
        self.register_buffer("order", torch.tensor([3, 1, 0]))

    def forward(self, images):
        found = self.operation(self, self.left(images), self.right(images))
        results = []
        for i, result in enumerate(found if isinstance(found, (tuple, list)) else [found]):
            result = (torch.view_as_real(result) if result.is_complex() else result).float()
            if not torch.is_inference_mode_enabled() and i not in self.channels:
                self.channels[i] = [d for d, size in enumerate(tuple(result.shape)) if size == CHANNELS][:1]
            for d in self.channels[i]:
                result = (result.movedim(d, -1) * self.weight).sum(-1)
            results.append(result.flatten())
        return torch.cat(results) + self.weight.sum()


def proven(operation):
    """Reasons that froze the channels of the two convolutions, of a layout that was proven."""
    torch.manual_seed(0)
    model = Applies(operation).eval()
    model(IMAGES)  # finds out where channels are in the result
    layout = zc.analyze(model, IMAGES)
    zc.verify(model, layout, IMAGES)
    reasons = []
    for name in ("left", "right"):
        term = parse(layout.params[f"{name}.weight"][0])
        reasons += [layout.axes[axis].frozen for axis in axes(term) if layout.axes[axis].frozen]
        reasons += ["part of it is a number"] if size(term, dict.fromkeys(layout.axes, 0)) else []
    return reasons


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def best(x, number=5):
    """Positions of the largest tokens, one for each sample: (batch, number, 1)."""
    return x.norm(dim=2).argsort(1)[:, :number, None]


def assigned(x, index, value):
    x = x.clone()
    x[index] = value
    return x


def picked(x, dim):
    return x.argsort(dim).narrow(dim, 0, 2)


ALONG = {
    **{
        name: lambda m, a, b, d, name=name: getattr(torch, name)(a, dim=d)
        for name in (
            *("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "softmax", "logsumexp", "sum", "mean", "amax", "prod", "nansum"),
            *("argmax", "argmin", "sort", "argsort", "mode", "median", "nanmedian", "max", "min", "std", "var", "any", "count_nonzero"),
        )
    },
    "topk": lambda m, a, b, d: a.topk(2, dim=d),
    "kthvalue": lambda m, a, b, d: a.kthvalue(2, dim=d),
    "aminmax": lambda m, a, b, d: torch.aminmax(a, dim=d),
    "unfold": lambda m, a, b, d: a.unfold(d, 2, 2),
    "renorm": lambda m, a, b, d: a.renorm(2, d, 1.0),
    "flip": lambda m, a, b, d: a.flip(d),
    "fft": lambda m, a, b, d: torch.fft.fft(a, dim=d),
    "rfft": lambda m, a, b, d: torch.fft.rfft(a, dim=d),
    "irfft": lambda m, a, b, d: torch.fft.irfft(a, dim=d),
    "diff": lambda m, a, b, d: a.diff(dim=d),
    "quantile": lambda m, a, b, d: a.quantile(0.5, dim=d),
    "trapezoid": lambda m, a, b, d: torch.trapezoid(a, dim=d),
    "index_select": lambda m, a, b, d: a.index_select(d, m.order),
    "index_add": lambda m, a, b, d: a.index_add(d, m.order, b.narrow(d, 0, 3)),
    "index_copy": lambda m, a, b, d: a.index_copy(d, m.order, b.narrow(d, 0, 3)),
    "index_reduce": lambda m, a, b, d: a.index_reduce(d, m.order, b.narrow(d, 0, 3), "amax"),
    "index_fill": lambda m, a, b, d: a.index_fill(d, m.order, 1.0),
    "gather": lambda m, a, b, d: b.gather(d, picked(a, d)),
    "take_along_dim": lambda m, a, b, d: b.take_along_dim(picked(a, d), d),
    "scatter": lambda m, a, b, d: b.scatter(d, picked(a, d), a.narrow(d, 0, 2)),
    "scatter_add": lambda m, a, b, d: b.scatter_add(d, picked(a, d), a.narrow(d, 0, 2)),
    "scatter_reduce": lambda m, a, b, d: b.scatter_reduce(d, picked(a, d), a.narrow(d, 0, 2), "amax"),
    "scatter a number": lambda m, a, b, d: b.scatter(d, picked(a, d), 1.0),
    "repeat_interleave": lambda m, a, b, d: a.repeat_interleave(torch.tensor([2] + [1] * (a.shape[d] - 1)), d),
    "select_scatter": lambda m, a, b, d: a.select_scatter(b.select(d, 1), d, 1),
    "slice_scatter": lambda m, a, b, d: a.slice_scatter(b.narrow(d, 0, 2), d, 0, 2),
    "searchsorted": lambda m, a, b, d: torch.searchsorted(a.movedim(d, -1).sort(-1)[0].contiguous(), b.movedim(d, -1).contiguous()),
}
"""Operations along one dimension of (batch, channels, height, width)."""

SYMMETRIC = {"softmax", "logsumexp", "sum", "mean", "amax", "prod", "nansum", "std", "var", "any", "count_nonzero", "aminmax", "renorm"}
"""Those that channels may change along."""


@pytest.mark.parametrize("name", ALONG)
def test_operations_along_one_dimension_keep_the_others(name):
    for dim in (2, -1):
        assert not proven(lambda m, a, b, dim=dim: ALONG[name](m, a, b, dim)), dim
    frozen = proven(lambda m, a, b: ALONG[name](m, a, b, 1))
    assert bool(frozen) == (name not in SYMMETRIC)


@pytest.mark.parametrize("name", ["median", "max", "min"])
def test_positions_that_nothing_uses_freeze_nothing(name):
    assert not proven(lambda m, a, b: getattr(torch, name)(a, 1)[0])
    assert not proven(lambda m, a, b: getattr(a, name)(dim=1, keepdim=True).values * b)
    assert proven(lambda m, a, b: b.gather(1, getattr(torch, name)(a, 1, keepdim=True)[1]))


FREE = {
    "gather by tokens": lambda m, a, b: tokens(b).gather(1, best(tokens(a)).expand(-1, -1, b.shape[1])),
    "gather by repeated tokens": lambda m, a, b: tokens(b).gather(1, best(tokens(a)).repeat(1, 1, b.shape[1])),
    "gather by expand_as": lambda m, a, b: tokens(b).gather(1, best(tokens(a), 24).expand_as(tokens(b))),
    "scatter by tokens": lambda m, a, b: tokens(b).scatter(1, best(tokens(a)).expand(-1, -1, b.shape[1]), tokens(a)[:, :5]),
    "scatter_add by tokens": lambda m, a, b: torch.zeros_like(tokens(b)).scatter_add(
        1, best(tokens(a)).expand(-1, -1, b.shape[1]), tokens(b)[:, :5]
    ),
    "tokens of each sample": lambda m, a, b: tokens(b)[torch.arange(a.shape[0])[:, None], best(tokens(a))[..., 0]],
    "mask of columns": lambda m, a, b: a[..., m.mask],
    "mask of places": lambda m, a, b: a[:, :, m.places],
    "mask and positions": lambda m, a, b: a[:, :, m.order[:1], m.mask],
    "mask of all tokens": lambda m, a, b: tokens(a)[tokens(b).sum(2) > 0].sum(0, keepdim=True),
    "put a number by a mask": lambda m, a, b: assigned(a, (..., m.mask), 0.5),
    "put columns by a mask": lambda m, a, b: assigned(a, (..., m.mask), b[..., :1]),
    "put a token by a mask": lambda m, a, b: assigned(tokens(a), (slice(None), m.places.flatten()), m.weight),
    "put a token by tokens": lambda m, a, b: assigned(tokens(a), tokens(b).sum(2) > 0, m.weight),
    "put by position": lambda m, a, b: assigned(a, (..., m.order), b[..., :3]),
    "masked_scatter of tokens": lambda m, a, b: tokens(a).masked_scatter((tokens(b).sum(2) > 0)[..., None], tokens(b)),
    "embedding_bag": lambda m, a, b: F.embedding_bag(torch.tensor([[0, 1], [1, 2]]), tokens(a)[0]),
    "embedding_bag of maxima": lambda m, a, b: F.embedding_bag(torch.tensor([[0, 1], [1, 2]]), tokens(a)[0], mode="max"),
    "embedding that renorms": lambda m, a, b: F.embedding(torch.tensor([0, 1]), tokens(a)[0].clone(), max_norm=1.0),
    "bucketize": lambda m, a, b: torch.bucketize(a, torch.linspace(-1, 1, 5)) * b,
    "isin": lambda m, a, b: torch.isin((4 * a).round(), m.order.float()) * b,
    **{
        f"interpolate {mode}": lambda m, a, b, mode=mode: F.interpolate(a, scale_factor=2, mode=mode)
        for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area")
    },
    **{
        f"interpolate {mode} in 3D": lambda m, a, b, mode=mode: F.interpolate(a[:, :, None], scale_factor=2, mode=mode)
        for mode in ("nearest", "nearest-exact", "trilinear", "area")
    },
    **{f"pad {mode}": lambda m, a, b, mode=mode: F.pad(a, (1, 1, 1, 1), mode=mode) for mode in ("reflect", "replicate", "circular")},
    **{
        f"{name}{n}d": lambda m, a, b, name=name, n=n: getattr(F, f"{name}{n}d")(a if n == 2 else torch.stack((a, b), 2), 2)
        for name in ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool")
        for n in (2, 3)
    },
    "max_unpool2d": lambda m, a, b: F.max_unpool2d(*F.max_pool2d(a, 2, return_indices=True), 2),
    "max_unpool3d": lambda m, a, b: F.max_unpool3d(*F.max_pool3d(torch.stack((a, b), 2), 2, return_indices=True), 2),
    "fractional_max_pool2d": lambda m, a, b: F.fractional_max_pool2d(
        a, 2, output_size=2, _random_samples=torch.full((a.shape[0], a.shape[1], 2), 0.3)
    ),
    "grid_sample": lambda m, a, b: F.grid_sample(a, torch.zeros(a.shape[0], 3, 3, 2), align_corners=False),
    "grid_sample in 3D": lambda m, a, b: F.grid_sample(a[:, :, None], torch.zeros(a.shape[0], 1, 3, 3, 3), align_corners=False),
    "rot90": lambda m, a, b: a.rot90(1, (2, 3)),
    **{
        f"{name} {how}": lambda m, a, b, name=name, how=how: a + getattr(F, name)(a, b.sigmoid(), reduction=how)
        for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits", "kl_div")
        for how in ("none", "mean", "sum")
    },
    "binary_cross_entropy": lambda m, a, b: a + F.binary_cross_entropy(a.sigmoid(), b.sigmoid()),
    "cross_entropy along width": lambda m, a, b: F.cross_entropy(a.transpose(1, 3), b.argmax(3).transpose(1, 2), reduction="none"),
    "tril": lambda m, a, b: a.tril() + b.triu(),
    "complex": lambda m, a, b: torch.complex(a, b).abs() + torch.polar(a.abs(), b).angle(),
    "real": lambda m, a, b: torch.complex(a, b).conj().imag + torch.complex(a, b).real,
    "view_as_complex": lambda m, a, b: torch.view_as_complex(a.unflatten(3, (3, 2)).contiguous()),
    "diagonal": lambda m, a, b: a.diagonal(dim1=2, dim2=3),
    "diag_embed": lambda m, a, b: a.diag_embed(dim1=0, dim2=2),
    "diagonal_scatter": lambda m, a, b: a.diagonal_scatter(b.diagonal(dim1=2, dim2=3), dim1=2, dim2=3),
    "rfft2": lambda m, a, b: torch.fft.irfft2(torch.fft.rfft2(a), s=(4, 6)),
    "cdist": lambda m, a, b: torch.cdist(tokens(a), tokens(b)),
    "cdist of channels": lambda m, a, b: torch.cdist(a.flatten(2), b.flatten(2)).sum(2),
    "pdist": lambda m, a, b: F.pdist(tokens(a)[0]),
    "einsum": lambda m, a, b: torch.einsum("bchw,bcxy->bhwxy", a, b),
    "bilinear": lambda m, a, b: F.bilinear(tokens(a), tokens(b), m.weight[None, :, None] * m.weight),
    "addbmm": lambda m, a, b: torch.addbmm(a[0, :, :, 0], a.flatten(2)[:, :, :6], b.mean(1).transpose(1, 2)),
    "addmv": lambda m, a, b: torch.addmv(m.weight, a[0, :, :, 0], b[0].mean((0, 2))),
    **{
        f"linalg.{name}": lambda m, a, b, name=name: getattr(torch.linalg, name)(a @ a.mT + torch.eye(4))
        for name in ("inv", "det", "cholesky", "qr", "svdvals", "eigvalsh", "matrix_exp", "pinv", "slogdet")
    },
    "linalg.solve": lambda m, a, b: torch.linalg.solve(a @ a.mT + torch.eye(4), b),
    "linalg.cross": lambda m, a, b: torch.linalg.cross(a[:, :, :3], b[:, :, :3], dim=2),
    "native_layer_norm": lambda m, a, b: torch.native_layer_norm(a, [4, 6], None, None, 1e-5),
    "native_batch_norm": lambda m, a, b: torch.native_batch_norm(a, m.weight, m.weight, None, None, True, 0.1, 1e-5),
    "lerp": lambda m, a, b: a.lerp(b, 0.3).addcmul(a, b).nan_to_num(),
    "logsigmoid": lambda m, a, b: F.logsigmoid(a),
    "dist": lambda m, a, b: a * a.dist(b),
    "roi_align": lambda m, a, b: vision.roi_align(a, torch.tensor([[0.0, 0, 0, 3, 3], [0, 1, 1, 3, 3]]).to(a.device), (2, 2)),
    "roi_pool": lambda m, a, b: vision.roi_pool(a, torch.tensor([[0.0, 0, 0, 3, 3], [0, 1, 1, 3, 3]]).to(a.device), (2, 2)),
    "squeeze_ of a constant": lambda m, a, b: a * torch.arange(24.0).view(1, 1, 1, 4, 6).squeeze_(0).to(a.device),
    "unsqueeze_ of a constant": lambda m, a, b: a * torch.arange(24.0).view(4, 6).unsqueeze_(0).to(a.device),
    "transpose_ of a constant": lambda m, a, b: a @ torch.arange(30.0).view(5, 6).transpose_(0, 1).to(a.device),
    "t_ of zeros": lambda m, a, b: a @ torch.zeros(5, 6).t_().to(a.device),
    "swapaxes_": lambda m, a, b: a.clone().swapaxes_(1, 3),
    "squeeze_": lambda m, a, b: a[:, None].clone().squeeze_(1).unsqueeze_(-1),
    "data of another tensor": lambda m, a, b: changed(b.detach().clone(), a) * b,
}


def changed(x, data):
    x.data = data
    return x


@pytest.mark.parametrize("name", FREE)
def test_channels_stay_free(name):
    assert not proven(FREE[name])


HELD = {
    "argmax of all": lambda m, a, b: b + 0.01 * a.argmax(),
    "gather fewer channels": lambda m, a, b: tokens(a).gather(1, best(tokens(a)).expand(-1, -1, 5)),
    "gather channels": lambda m, a, b: a.gather(1, m.order[None, :, None, None].expand(a.shape[0], 3, 4, 6)),
    "channels by position": lambda m, a, b: a[:, m.order],
    "channels by a mask": lambda m, a, b: a[:, torch.arange(CHANNELS) % 3 > 0],
    "elements by a mask": lambda m, a, b: a[a > 0].sum() + b,
    "masked_select": lambda m, a, b: a.masked_select(a > 0)[:9],
    "masked_scatter": lambda m, a, b: a.masked_scatter(a > 0, b),
    "take": lambda m, a, b: a.take(m.order),
    "tril": lambda m, a, b: a.movedim(1, -1).tril(),
    "diagonal": lambda m, a, b: a.diagonal(dim1=1, dim2=3),
    "rot90": lambda m, a, b: a.rot90(1, (1, 3)),
    "deform_conv2d": lambda m, a, b: vision.deform_conv2d(
        a, b.mean(1, keepdim=True).repeat(1, 18, 1, 1), m.weight[None, :, None, None] * torch.ones(7, 1, 3, 3).to(a.device), padding=1
    ),
    "histc": lambda m, a, b: b * a.detach().histc(4).sum(),
    "cross_entropy": lambda m, a, b: F.cross_entropy(a, b.argmax(1), reduction="none"),
    "as_strided of as many": lambda m, a, b: a[0, :, :, 0].contiguous().as_strided((12, 4), (1, 12)),
    "as_strided_ of as many": lambda m, a, b: a[0, :, :, 0].clone().contiguous().as_strided_((12, 4), (1, 12)),
    "resize_": lambda m, a, b: b * a.detach().contiguous().clone().resize_(a.shape[0], 1, 4, 6),
    "unique": lambda m, a, b: b * (a > 0).float().unique().sum(),
    "cumsum of a transpose": lambda m, a, b: a.transpose(1, 3).cumsum(-1),
}


@pytest.mark.parametrize("name", HELD)
def test_channels_are_held_with_a_reason(name):
    reasons = proven(HELD[name])
    assert reasons
    assert all(len(reason) > 10 for reason in reasons)


def test_a_mask_and_what_it_selects_from_are_frozen_together():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)
            self.queries = nn.Parameter(torch.randn(24, 8))
            self.register_buffer("keep", torch.arange(24) % 3 > 0)

        def forward(self, x):
            return self.out((self.queries[self.keep] @ self.embed(x).flatten(2)).softmax(1).transpose(1, 2) @ self.queries[self.keep]).mean(
                1
            )

    model = Tokens().eval()
    layout = zc.analyze(model, IMAGES)
    assert layout.params["keep"] == layout.params["queries"][:1]
    assert "mask" in layout.axes[layout.params["keep"][0]].frozen
    assert layout.axes[layout.params["queries"][1]].frozen is None
    zc.verify(model, layout, IMAGES)


@pytest.mark.parametrize(
    ("rows", "decode"),
    [
        (20, lambda maps: maps.topk(5, dim=2).values.mean(2)),
        (17, lambda maps: maps.argmax(2)),
        (17, lambda maps: torch.stack((maps.argmax(2) % 4, maps.argmax(2) // 4), -1).float()),
        (20, lambda maps: maps.sort(2)[1][..., :3]),
        (20, lambda maps: maps.kthvalue(2, 2)[0]),
        (20, lambda maps: maps.transpose(1, 2).argmin(1)),
    ],
)
def test_what_a_model_gives_keeps_its_width_where_positions_are_read(rows, decode):
    class Decodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.maps = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, rows, 1)

        def forward(self, x):
            return decode(self.maps(self.body(x)).flatten(2))

    model = Decodes().eval()
    layout = zc.analyze(model, IMAGES)
    assert "output" in layout.axes[layout.params["maps.weight"][0]].frozen
    assert layout.axes[layout.params["body.weight"][0]].frozen is None


class Grouped(nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12, 5)
        self.weight = nn.Parameter(torch.randn(12, 4, 1, 1))
        self.operation = operation

    def forward(self, x):
        return self.head(self.operation(self.stem(x), self.weight).mean((2, 3)))


@pytest.mark.parametrize(
    "operation",
    [
        lambda x, w: torch.convolution(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 3),
        lambda x, w: torch.ops.aten.convolution(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 3),
        lambda x, w: F.conv2d(x, w, groups=3),
        lambda x, w: torch.ops.aten.native_group_norm(F.conv2d(x, w, groups=3), None, None, x.shape[0], 12, 24, 3, 1e-5)[0],
        lambda x, w: torch.native_group_norm(F.conv2d(x, w, groups=3), None, None, x.shape[0], 12, 24, 3, 1e-5)[0],
        lambda x, w: F.channel_shuffle(F.conv2d(x, w, groups=3), 3),
    ],
)
def test_groups_that_the_code_writes_as_a_number_stay(operation):
    model = Grouped(operation).eval()
    layout = zc.analyze(model, IMAGES)
    assert all(
        layout.axes[axis].frozen or layout.axes[axis].size != 3 for axis in layout.axes if layout.axes[axis].size == 3 and axis[0] == "g"
    )
    zc.verify(model, layout, IMAGES)


def test_results_may_be_written_into_given_tensors():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 12, 1), nn.Linear(12, 5)

        def forward(self, x):
            with torch.no_grad():
                a, b = self.left(x), self.right(x)
                total = torch.add(a, b, out=torch.empty_like(a))
                values, _ = torch.max(total, 3, out=(total.new_empty(0), torch.empty(0, dtype=torch.long, device=x.device)))
            return self.head(values.mean(2))

    model = Writes().eval()
    layout = zc.analyze(model, IMAGES)
    assert layout.axes[layout.params["left.weight"][0]].frozen is None
    zc.verify(model, layout, IMAGES)


def test_an_operation_of_another_library_is_not_taken_for_torchs_own():
    library = torch.library.Library("zoo_compress_tests", "FRAGMENT")
    library.define("flatten_all(Tensor x) -> Tensor")
    library.define("sum(Tensor x, int[] dim) -> Tensor")
    library.impl("sum", lambda x, dim: x.cumsum(1).sum(dim), "CompositeExplicitAutograd")
    try:
        reasons = proven(lambda m, a, b: torch.ops.zoo_compress_tests.sum(a, [2, 3]))
    finally:
        library._destroy()
    assert ["has no rule" in reason for reason in reasons] == [True]


def test_inference_mode_inside_a_model_changes_nothing():
    def inside(m, a, b):
        with torch.inference_mode():
            fixed = F.linear(F.softmax(tokens(m.left(IMAGES.to(a.device)[:1])), 1), m.weight.repeat(3, 1)).sum()
        return a * fixed.clone()

    assert not proven(inside)


class Masked(nn.Module):
    """A masked autoencoder: keeps a quarter of the tokens, puts a learned one in the others' places."""

    def __init__(self):
        super().__init__()
        self.embed, self.encoder = nn.Conv2d(3, 32, 1), nn.Linear(32, 32)
        self.decoder, self.token, self.out = nn.Linear(32, 16), nn.Parameter(torch.randn(1, 1, 16)), nn.Linear(16, 5)

    def forward(self, images):
        x = tokens(self.embed(images))
        order = x.norm(dim=2).argsort(1)
        kept = order[:, : x.shape[1] // 4]
        x = self.decoder(self.encoder(x.gather(1, kept.unsqueeze(-1).repeat(1, 1, x.shape[2]))))
        x = torch.cat([x, self.token.repeat(x.shape[0], order.shape[1] - x.shape[1], 1)], 1)
        return self.out(x.gather(1, order.argsort(1).unsqueeze(-1).repeat(1, 1, x.shape[2])))


class Chosen(nn.Module):
    """A detector's queries: the tokens with the best classes, gathered to an attribute's width."""

    def __init__(self):
        super().__init__()
        self.width, self.embed, self.score, self.out = 32, nn.Conv2d(3, 32, 1), nn.Linear(32, 7), nn.Linear(32, 4)

    def forward(self, images):
        x = tokens(self.embed(images))
        classes = self.score(x)
        best = classes.max(-1).values.topk(6, 1)[1].unsqueeze(-1)
        return self.out(x.gather(1, best.repeat(1, 1, self.width))), classes.gather(1, best.expand(-1, -1, classes.shape[2]))


class Experts(nn.Module):
    """Tokens are handed to experts by index and added up where they came from."""

    def __init__(self):
        super().__init__()
        self.embed, self.gate, self.out = nn.Conv2d(3, 32, 1), nn.Linear(32, 3), nn.Linear(32, 5)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 32)) for _ in range(3))

    def forward(self, images):
        x = tokens(self.embed(images)).flatten(0, 1)
        weights, chosen = self.gate(x).softmax(1).topk(2, 1)
        total = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == i)
            total.index_add_(0, rows, expert(x[rows]) * weights[rows, places, None])
        return self.out(total).unflatten(0, (images.shape[0], -1)).mean(1)


@pytest.mark.parametrize("kind", [Masked, Chosen, Experts])
def test_moving_tokens_leaves_the_width_free(kind):
    torch.manual_seed(0)
    model = kind().eval()
    layout = zc.analyze(model, IMAGES)
    assert layout.axes[layout.params["embed.weight"][0]].frozen is None
    zc.verify(model, layout, IMAGES)
