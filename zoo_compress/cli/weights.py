"""Commands on single weights: sparsify, cluster."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import MODEL_HELP, cli, compression, examples

if TYPE_CHECKING:
    from torch import nn

    from .common import Compressed

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
@click.option("--density", type=float, help="Fraction of the weights to keep.")
@click.option("--pattern", help="What is removed as a whole: kernel, channel; or N:M, which keeps N of every M weights.")
@click.option(
    "--criterion", default="magnitude", show_default=True, help="magnitude, random, synflow; with --data snip, grasp, gradient, obd."
)
@click.option("--scope", default="global", show_default=True, help="global ranks all weights together, local those of each layer.")
@click.option("--seed", type=int, default=0, show_default=True, help="For the random criterion.")
@EXCLUDE
@compression("Images with labels, for criteria that look at them: imagefolder:PATH, digits, or a name timm.data takes.")
def sparsify(model: "nn.Module", data: Any, **settings: Any) -> "Compressed":
    """Remove MODEL's least important weights, without training, and save it: the file holds those that are left."""
    import zoo_compress as zc

    return _weighed(zc.sparsify(model, data=data, **settings))


@cli.command(
    epilog=MODEL_HELP
    + "\n\n"
    + examples("zoo-compress cluster resnet18 --pretrained --bits 4 -o few", "zoo-compress cluster thin --bits 5 -o deep  # a sparse model")
)
@click.option("--bits", type=int, default=4, show_default=True, help="Of an index into a layer's values, 1 to 8.")
@EXCLUDE
@compression()
def cluster(model: "nn.Module", data: None, bits: int, exclude: tuple[str, ...]) -> "Compressed":
    """Let the weights of each of MODEL's layers share few values, without training, and save it."""
    import zoo_compress as zc

    return _weighed(zc.cluster(model, bits, exclude=exclude))


def _weighed(model: "nn.Module") -> "Compressed":
    from ..plugin.weights import WEIGHTS
    from ..surgery.masks import density, masks_of

    def report(output: Path) -> str:
        dense = sum(tensor.nbytes for tensor in model.state_dict().values())
        size = (output / WEIGHTS).stat().st_size
        left = f"{density(masks_of(model)):.1%} of the weights of convolutions and linear layers"
        return f"{left}, {size:,} bytes, {dense / size:.1f} times smaller than dense"

    return model, report
