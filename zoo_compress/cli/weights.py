"""Commands on single weights: sparsify, cluster."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import MODEL_HELP, OUTPUT, calibration_data, cli, data_options, examples, load_model, model_options

if TYPE_CHECKING:
    from torch import nn

EXCLUDE = click.option("--exclude", multiple=True, help="Pattern of parameter names to leave alone; repeatable.")


@cli.command(
    epilog=MODEL_HELP
    + "\n\n"
    + examples(
        "zoo-compress sparsify resnet18 --pretrained --density 0.2 -o thin",
        "zoo-compress sparsify resnet18 --density 0.1 --criterion synflow -a zero_init_last=false -o early",
        "zoo-compress sparsify runs/mine/model --pattern 2:4 -o quarter",
    )
)
@click.argument("model")
@click.option("--density", type=float, help="Fraction of the weights to keep.")
@click.option("--pattern", help="What is removed as a whole: kernel, channel; or N:M, which keeps N of every M weights.")
@click.option(
    "--criterion", default="magnitude", show_default=True, help="magnitude, random, synflow; with --data snip, grasp, gradient, obd."
)
@click.option("--scope", default="global", show_default=True, help="global ranks all weights together, local those of each layer.")
@click.option("--seed", type=int, default=0, show_default=True, help="For the random criterion.")
@data_options("Images with labels, for criteria that look at them: imagefolder:PATH, digits, or a name timm.data takes.")
@EXCLUDE
@OUTPUT
@model_options
def sparsify(
    model: str,
    source: str | None,
    data_root: str | None,
    images: int,
    output: Path,
    pretrained: bool,
    args: tuple[str, ...],
    **settings: Any,
) -> None:
    """Remove MODEL's least important weights, without training, and save it: the file holds those that are left."""
    import zoo_compress as zc

    from ..training.checkpoint import check_empty

    check_empty(output)
    loaded = load_model(model, pretrained, args)
    data: Any = calibration_data(loaded, source, data_root, images) if source else None
    _finish(zc.sparsify(loaded, data=data, **settings), output)


@cli.command(
    epilog=MODEL_HELP
    + "\n\n"
    + examples("zoo-compress cluster resnet18 --pretrained --bits 4 -o few", "zoo-compress cluster thin --bits 5 -o deep  # a sparse model")
)
@click.argument("model")
@click.option("--bits", type=int, default=4, show_default=True, help="Of an index into a layer's values, 1 to 8.")
@EXCLUDE
@OUTPUT
@model_options
def cluster(model: str, bits: int, exclude: tuple[str, ...], output: Path, pretrained: bool, args: tuple[str, ...]) -> None:
    """Let the weights of each of MODEL's layers share few values, without training, and save it."""
    import zoo_compress as zc

    from ..training.checkpoint import check_empty

    check_empty(output)
    _finish(zc.cluster(load_model(model, pretrained, args), bits, exclude=exclude), output)


def _finish(model: "nn.Module", output: Path) -> None:
    import zoo_compress as zc

    from ..plugin.weights import WEIGHTS
    from ..surgery.masks import density, masks_of

    zc.save(model, output)
    dense = sum(tensor.nbytes for tensor in model.state_dict().values())
    size = (output / WEIGHTS).stat().st_size
    left = f"{density(masks_of(model)):.1%} of the weights of convolutions and linear layers"
    click.echo(f"{output}: {left}, {size:,} bytes, {dense / size:.1f} times smaller than dense; nothing was fine-tuned")
