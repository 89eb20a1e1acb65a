"""The command on networks with early exits."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import CompressError
from .common import cli, examples

if TYPE_CHECKING:
    from torch import nn

    from ..training.config import DataConfig


@cli.command(
    epilog=examples(
        "zoo-compress exits runs/fmnist_exits_joint",
        "zoo-compress exits runs/fmnist_exits_joint runs/fmnist_exits_joint_seed1 runs/fmnist_exits_joint_seed2",
        "zoo-compress exits saved --data fashion_mnist --held-out 5000 --plot exits.png",
    )
)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--data", "source", help="Images to find thresholds and evaluate on, where MODEL is not the output folder of a recipe.")
@click.option("--data-root", help="Folder of the data set.")
@click.option(
    "--held-out",
    type=click.IntRange(min=1),
    help="Training images to find thresholds on. Those the recipe held out unless given; others were trained on, which is said.",
)
@click.option("--budget", "budgets", type=click.FloatRange(0, 2, min_open=True), multiple=True, help="Average MACs; repeat for more.")
@click.option("--confidence", type=click.Choice(["max_softmax", "entropy", "margin"]), default="max_softmax", show_default=True)
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw test images by the exit at which they leave on half the MACs."
)
def exits(
    models: tuple[str, ...],
    source: str | None,
    data_root: str | None,
    held_out: int | None,
    budgets: tuple[float, ...],
    confidence: str,
    plot: Path | None,
) -> None:
    """Print accuracy against average MACs of a network with exits: each exit, batches on budgets, and each width it has.

    MODEL is the output folder of a recipe, a saved model, or anything timm.create_model takes with weights. Several of one structure, such
    as runs with other seeds, give mean and standard deviation. Thresholds are found on training images, accuracies on test images.
    """
    from ..curve import BUDGETS, curve, format_curves
    from ..figures import check_figure
    from ..training.data import check_fits, eval_loader, held_out_batches
    from ..training.sources import open_source

    if plot is not None:
        check_figure(plot)
    curves, trained_on = [], False
    for name in models:
        net, found = _opened(name, source, data_root)
        data = found if held_out is None else found.model_copy(update={"held_out": held_out})
        if not data.held_out:
            raise CompressError(f"{name}: expected --held-out, a number of training images to find thresholds on: its recipe held none out")
        trained_on = trained_on or data.held_out != found.held_out
        images = open_source(data, getattr(net, "in_chans", 3))
        check_fits(images, net)
        batches, test = held_out_batches(images, data, net), eval_loader(images, data, net)
        curves.append(curve(net, batches or (), test, budgets=budgets or BUDGETS, confidence=confidence))  # type: ignore[arg-type]
        if plot is not None and name == models[0]:
            from ..sharing.gallery import plot_exits

            net.calibrate(batches, 0.5, confidence=confidence)  # type: ignore[operator]
            plot_exits(net, test, plot)
    click.echo(format_curves(curves))
    note = ", which may have been trained on" if trained_on else ", which were held out of training"
    click.echo(f"thresholds found on {data.held_out:,} training images{note}; accuracies on {len(images.test):,} test images")


def _opened(name: str, source: str | None, root: str | None) -> "tuple[nn.Module, DataConfig]":
    """A network, and the data it is about: that of the recipe, or what the user says."""
    from ..record import read_record
    from ..sharing.push import model_folder
    from ..sharing.recipe_text import recipe_of
    from ..training.config import DataConfig
    from .common import load_model

    record = read_record(Path(name)) if Path(name).is_dir() else None
    net = load_model(str(model_folder(name)) if record else name, pretrained=True)
    if source is not None:
        return net, DataConfig(source=source, root=root)
    if record is None:
        raise CompressError(f"{name}: expected --data, or the output folder of a recipe, which knows its data; found no record there")
    data = recipe_of(record.recipe).data
    return net, data if root is None else data.model_copy(update={"root": root})
