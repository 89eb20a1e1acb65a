"""Commands on one model or several: inspect, prune, eval, measure."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import MODEL_HELP, cli, compression, examples, load_model, model_options

if TYPE_CHECKING:
    from torch import nn

    from ..training.data import Batches
    from .common import Compressed


class RoundToType(click.ParamType):
    """A positive integer or `auto`."""

    name = "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else click.IntRange(min=1).convert(value, param, ctx)


@cli.command(
    epilog=MODEL_HELP
    + "\n\n"
    + examples(
        "zoo-compress inspect resnet18",
        "zoo-compress inspect vit_tiny_patch16_224 -a img_size=96",
        "zoo-compress inspect runs/quickstart/model",
    )
)
@click.argument("model")
@model_options
def inspect(model: str, pretrained: bool, args: tuple[str, ...]) -> None:
    """Print MODEL's layout, its frozen axes and why they are frozen, its MACs and parameters."""
    import zoo_compress as zc

    click.echo(zc.analyze(load_model(model, pretrained, args)))


@cli.command(
    epilog=MODEL_HELP
    + "\n\n"
    + examples(
        "zoo-compress prune resnet18 --pretrained --macs 0.5 -o small/",
        "zoo-compress prune resnet50 --pretrained --macs 0.7 --criterion thinet --reconstruct --data imagefolder:/data/imagenet -o kept/",
        "zoo-compress prune mobilenetv2_100 --latency 0.5 --round-to auto --threads 1 -o fast/",
        "zoo-compress prune runs/mine/model --params 0.3 --criterion l1 --scope local -o smaller/",
    )
)
@click.option("--keep", type=float, help="Fraction of channels to keep.")
@click.option("--macs", type=float, help="MACs to keep: a fraction up to 1, a count above.")
@click.option("--params", type=float, help="Parameters to keep: a fraction up to 1, a count above.")
@click.option(
    "--latency", type=float, help="Latency to keep, measured on this machine: a fraction up to 1 of MODEL's own, milliseconds above."
)
@click.option(
    "--criterion",
    default="l2",
    show_default=True,
    help="Importance of a channel: l1, l2, bn_scale, slimming, lamp, fpgm, random; with --data: taylor, hessian, obdc, thinet.",
)
@click.option("--reconstruct", is_flag=True, help="Restore every layer's outputs by least squares on these images, without training.")
@click.option(
    "--scope",
    type=click.Choice(["global", "local"]),
    default="global",
    show_default=True,
    help="One ranking over all axes, or one for each.",
)
@click.option(
    "--round-to",
    type=RoundToType(),
    default=8,
    show_default=True,
    help="Keep multiples of this many channels; auto measures which, and which channels, run fastest within the budget.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Images in a pass that is measured.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of a pass that is measured; torch's choice unless given.")
@compression("Images to look at: imagefolder:PATH, digits, fashion_mnist, or a name timm.data.create_dataset takes.", ("reconstruct",))
def prune(model: "nn.Module", data: "Batches | None", reconstruct: bool, **settings: Any) -> "Compressed":
    """Prune MODEL to a budget, without training, and save it.

    Give exactly one of --keep, --macs, --params and --latency. Load the result with timm.create_model("local-dir:DIR", pretrained=True).
    """
    import zoo_compress as zc

    from ..profiling.measure import measure_many
    from ..record import plural

    small = zc.prune(model, data=data, reconstruct=data if reconstruct else None, **settings)

    def report(output: Path) -> str:
        before, after = zc.analyze(model), zc.analyze(small)
        lines = [
            f"MACs        {before.macs():>14,} → {after.macs():>14,}  ({after.macs() / before.macs():.1%})",
            f"parameters  {before.num_params():>14,} → {after.num_params():>14,}  ({after.num_params() / before.num_params():.1%})",
        ]
        if settings["latency"] is not None or settings["round_to"] == "auto":
            batch, threads = settings["batch_size"], settings["threads"]
            slow, fast = measure_many({"before": model, "after": small}, batch, threads, runs=30).values()
            times = f"{slow.latency_ms:>14,.2f} → {fast.latency_ms:>14,.2f}  ({fast.latency_ms / slow.latency_ms:.1%})"
            lines.append(f"ms a pass   {times}  batch {batch}, {plural(fast.threads, 'thread')}")
        return "\n".join(lines)

    return small, report


@cli.command(
    "eval",
    epilog=MODEL_HELP
    + "\n\n"
    + examples(
        "zoo-compress eval runs/quickstart/model --data digits",
        "zoo-compress eval resnet18 --pretrained --data imagefolder:/data/imagenet --batch-size 64 --workers 4",
        "zoo-compress eval hf-hub:OWNER/REPO --data torch/cifar10 --data-root /data --split test",
    ),
)
@click.argument("model")
@click.option("--data", "source", required=True, help="digits, fashion_mnist, imagefolder:PATH, or a name timm.data.create_dataset takes.")
@click.option("--data-root", help="Folder of the data set.")
@click.option("--split", default="validation", show_default=True, help="Split to evaluate on, for sources that name their splits.")
@click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Loader processes.")
@model_options
def evaluate(
    model: str, source: str, data_root: str | None, split: str, batch_size: int, workers: int, pretrained: bool, args: tuple[str, ...]
) -> None:
    """Evaluate MODEL on test images: top-1, top-5 and loss."""
    from ..training.config import DataConfig
    from ..training.data import check_fits, eval_loader
    from ..training.loop import evaluate as evaluate_model
    from ..training.sources import open_source

    loaded = load_model(model, pretrained, args)
    config = DataConfig(source=source, root=data_root, eval_split=split, eval_batch_size=batch_size, workers=workers)
    opened = open_source(config, getattr(loaded, "in_chans", 3))
    check_fits(opened, loaded)
    metrics = evaluate_model(loaded, eval_loader(opened, config, loaded), progress="eval")
    click.echo(f"top-1 {metrics['top1']:.2f}%, top-5 {metrics['top5']:.2f}%, loss {metrics['loss']:.4f}")


@cli.command(
    epilog=MODEL_HELP
    + "\n\n"
    + examples(
        "zoo-compress measure resnet18 resnet34",
        "zoo-compress measure runs/quickstart/steps/01_train runs/quickstart/model --threads 1",
    )
)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; torch's choice unless given.")
@click.option("--runs", type=click.IntRange(min=1), default=100, show_default=True, help="Timed passes of each model.")
@model_options
def measure(models: tuple[str, ...], batch_size: int, threads: int | None, runs: int, pretrained: bool, args: tuple[str, ...]) -> None:
    """Measure MODELs against each other: parameters, MACs, memory and median CPU latency, runs interleaved.

    Memory is that of weights and of the tensors alive at the worst moment of one forward pass.
    """
    from ..profiling.measure import measure_many
    from ..record import plural

    costs = measure_many({name: load_model(name, pretrained, args) for name in models}, batch_size, threads, runs=runs)
    width = max(map(len, costs))
    click.echo(f"{'':{width}}  {'parameters':>13}  {'MACs':>16}  {'memory, MB':>10}  {'latency, ms (median ± half IQR)':>31}")
    for name, cost in costs.items():
        latency = f"{cost.latency_ms:.2f} ± {cost.latency_iqr_ms / 2:.2f}"
        click.echo(f"{name:{width}}  {cost.params:>13,}  {cost.macs:>16,}  {cost.peak_memory / 1e6:>10.1f}  {latency:>31}")
    first = next(iter(costs.values()))
    click.echo(f"batch {first.batch_size}, {plural(first.threads, 'thread')}")
