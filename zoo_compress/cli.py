"""The command line. Each command is a thin adapter over one public function; heavy imports wait until a command runs."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .errors import CompressError

if TYPE_CHECKING:
    from torch import nn

    from .profiling.search import RoundTo
    from .training.data import Batches

Command = TypeVar("Command", bound=Callable[..., Any])

MODEL_HELP = "MODEL is anything timm.create_model takes (an architecture, local-dir:PATH, hf-hub:OWNER/REPO) or the path of a saved model."


class Group(click.Group):
    """Shows errors that a user can act on in one line; any other exception is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CompressError as error:
            rank = os.environ.get("RANK", "0")
            click.echo(f"error{'' if rank == '0' else f' (process {rank})'}: {' '.join(str(error).split())}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            ctx.exit(130)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="zoo_compress", prog_name="zoo-compress")
def cli() -> None:
    """Compress timm models: prune, fine-tune, measure, save."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `zoo-compress`."""
    cli(args=list(args) if args is not None else None, prog_name="zoo-compress")


class RoundToType(click.ParamType):
    """A positive integer or `auto`."""

    name = "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else click.IntRange(min=1).convert(value, param, ctx)


def model_options(command: Command) -> Command:
    """The options of every command that loads a model."""
    arg = click.option("-a", "--arg", "args", multiple=True, metavar="NAME=VALUE", help="Argument of timm.create_model; repeatable.")
    pretrained = click.option(
        "--pretrained", is_flag=True, help="Load an architecture's pretrained weights; saved models always have theirs."
    )
    return arg(pretrained(command))


def examples(*lines: str) -> str:
    """An epilog that click does not reflow."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


@cli.command(
    epilog=examples(
        "zoo-compress run recipes/quickstart.yaml",
        "./recipes/quickstart.yaml                  # recipes are scripts",
        "zoo-compress run recipes/quickstart.yaml --fresh",
        "zoo-compress run recipes/quickstart.yaml --seed 1",
        "torchrun --nproc_per_node 2 -m zoo_compress run recipes/quickstart.yaml",
    )
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--fresh", is_flag=True, help="Start over, whatever an earlier run left in the recipe's output folder.")
@click.option("--seed", type=int, help="Another seed than the recipe's; its output folder then ends with it.")
def run(recipe: Path, fresh: bool, seed: int | None) -> None:
    """Run RECIPE, or what is left of it, and print its table.

    A run that was stopped goes on after its last epoch and ends with the same numbers. A finished one is not run again.
    """
    from .record import format_table
    from .runner import run as run_recipe

    try:
        record = run_recipe(recipe, fresh=fresh, seed=seed)
    except KeyboardInterrupt:
        click.echo(f"stopped; zoo-compress run {recipe} goes on from the last epoch", err=True)
        raise SystemExit(130) from None
    if record.table:
        click.echo(format_table(record.table))


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
@click.argument("model")
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
    help="Importance of a channel: l1, l2, bn_scale, lamp, fpgm, random; with --data: taylor, hessian, obdc, thinet.",
)
@click.option(
    "--data", "source", help="Images to look at: imagefolder:PATH, digits, fashion_mnist, or a name timm.data.create_dataset takes."
)
@click.option("--data-root", help="Folder of the data set.")
@click.option("--images", type=click.IntRange(min=1), default=256, show_default=True, help="How many of its training images to look at.")
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
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to save to; new or empty.")
@model_options
def prune(
    model: str,
    keep: float | None,
    macs: float | None,
    params: float | None,
    latency: float | None,
    criterion: str,
    source: str | None,
    data_root: str | None,
    images: int,
    reconstruct: bool,
    scope: str,
    round_to: "RoundTo",
    batch_size: int,
    threads: int | None,
    output: Path,
    pretrained: bool,
    args: tuple[str, ...],
) -> None:
    """Prune MODEL to a budget, without training, and save it.

    Give exactly one of --keep, --macs, --params and --latency. Load the result with timm.create_model("local-dir:DIR", pretrained=True).
    """
    import zoo_compress as zc

    from .profiling.measure import measure_many

    if output.exists() and any(output.iterdir()):
        raise CompressError(f"{output}: expected a new or empty folder, found files in it")
    if reconstruct and source is None:
        raise CompressError("--reconstruct: expected --data with images to reconstruct from, found none")
    loaded = load_model(model, pretrained, args)
    data = None if source is None else _calibration_data(loaded, source, data_root, images)
    small = zc.prune(
        loaded,
        keep=keep,
        macs=macs,
        params=params,
        latency=latency,
        criterion=criterion,
        data=data,
        reconstruct=data if reconstruct else None,
        scope=scope,
        round_to=round_to,
        batch_size=batch_size,
        threads=threads,
    )
    zc.save(small, output)
    before, after = zc.analyze(loaded), zc.analyze(small)
    click.echo(f"MACs        {before.macs():>14,} → {after.macs():>14,}  ({after.macs() / before.macs():.1%})")
    click.echo(f"parameters  {before.num_params():>14,} → {after.num_params():>14,}  ({after.num_params() / before.num_params():.1%})")
    if latency is not None or round_to == "auto":
        slow, fast = measure_many({"before": loaded, "after": small}, batch_size, threads, runs=30).values()
        times = f"{slow.latency_ms:>14,.2f} → {fast.latency_ms:>14,.2f}  ({fast.latency_ms / slow.latency_ms:.1%})"
        click.echo(f"ms a pass   {times}  batch {batch_size}, {plural(fast.threads, 'thread')}")
    click.echo(f"saved to {output}; nothing was fine-tuned")


def _calibration_data(model: "nn.Module", source: str, root: str | None, images: int) -> "Batches":
    """Training images of a data source, shuffled, as the model wants them; the same ones every time."""
    from .training.config import DataConfig
    from .training.data import calibration_batches
    from .training.loop import reseed
    from .training.sources import open_source

    reseed(0, 0, 0)
    config = DataConfig(source=source, root=root, batch_size=min(images, 32))
    return calibration_batches(open_source(config, getattr(model, "in_chans", 3)), config, model, -(-images // config.batch_size))


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
    from .training.config import DataConfig
    from .training.data import check_fits, eval_loader
    from .training.loop import evaluate as evaluate_model
    from .training.sources import open_source

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
    from .profiling.measure import measure_many

    costs = measure_many({name: load_model(name, pretrained, args) for name in models}, batch_size, threads, runs=runs)
    width = max(map(len, costs))
    click.echo(f"{'':{width}}  {'parameters':>13}  {'MACs':>16}  {'memory, MB':>10}  {'latency, ms (median ± half IQR)':>31}")
    for name, cost in costs.items():
        latency = f"{cost.latency_ms:.2f} ± {cost.latency_iqr_ms / 2:.2f}"
        click.echo(f"{name:{width}}  {cost.params:>13,}  {cost.macs:>16,}  {cost.peak_memory / 1e6:>10.1f}  {latency:>31}")
    first = next(iter(costs.values()))
    click.echo(f"batch {first.batch_size}, {plural(first.threads, 'thread')}")


def plural(count: int, what: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count} {what}{'s' * (count != 1)}"


@cli.command(
    epilog=examples(
        "zoo-compress coverage --all",
        "zoo-compress coverage 'vit_*' resnet50 -o vits.csv --proof-below 30e6",
    )
)
@click.argument("patterns", nargs=-1, metavar="[NAME_OR_GLOB]...")
@click.option("--all", "everything", is_flag=True, help="Every architecture of timm's registry.")
@click.option("--proof-below", type=float, default=100e6, show_default=True, help="Prove layouts of models with fewer parameters; 0: none.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, dir_okay=False), default="coverage.csv", show_default=True, help="Table to write."
)
@click.option("--time-limit", type=click.FloatRange(min=1), default=600, show_default=True, help="Seconds for one analysis or proof.")
@click.option("--memory-limit", type=click.FloatRange(min=1), default=16, show_default=True, help="GiB for one analysis or proof.")
@click.option("--retry", is_flag=True, help="Do again what did not end well.")
@click.option("--fresh", is_flag=True, help="Do everything again.")
def coverage(
    patterns: tuple[str, ...],
    everything: bool,
    proof_below: float,
    out: Path,
    time_limit: float,
    memory_limit: float,
    retry: bool,
    fresh: bool,
) -> None:
    """Analyse timm architectures without allocating weights, and prove the layouts of all but the largest.

    Writes one row per architecture to a CSV file after each; a run that was stopped goes on where it was. Prints a summary.
    """
    from .coverage import architectures, cover, summary

    if not patterns and not everything:
        raise CompressError("coverage: expected names or globs of architectures, or --all")
    rows = cover(
        architectures(() if everything else patterns),
        out,
        proof_below=int(proof_below),
        time_limit=time_limit,
        memory_limit=memory_limit,
        retry=retry,
        fresh=fresh,
    )
    click.echo(summary(rows))
    wrong = [row.name for row in rows if row.status == "wrong"]
    if wrong:
        raise CompressError(f"coverage: the layout is wrong of {', '.join(wrong)}")


def load_model(name: str, pretrained: bool = False, args: Sequence[str] = ()) -> "nn.Module":
    """Load what a user calls a model.

    Args:
        name: an architecture, `local-dir:PATH`, `hf-hub:OWNER/REPO`, or the path of a folder that holds a saved model.
        pretrained: for an architecture, load its pretrained weights.
        args: `NAME=VALUE` arguments of `timm.create_model`, values written as in YAML.

    Raises:
        CompressError: there is no such model, or it cannot be loaded with these arguments.
    """
    import difflib

    import timm
    import yaml
    from timm.models import split_model_name_tag

    import zoo_compress  # noqa: F401  (registers its architectures with timm)

    kwargs = {}
    for arg in args:
        key, equals, value = arg.partition("=")
        if not equals or not key.isidentifier():
            raise CompressError(f"--arg: expected NAME=VALUE, found {arg!r}")
        try:
            kwargs[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise CompressError(f"--arg {key}: expected a value as in YAML, found {value!r}") from error
    if Path(name).is_dir():
        name = f"local-dir:{name}"
    saved = ":" in name
    if not saved and not timm.is_model(split_model_name_tag(name)[0]):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise CompressError(f"model {name!r}: expected a name of timm.list_models(), local-dir:PATH, hf-hub:OWNER/REPO or a folder{hint}")
    try:
        return timm.create_model(name, pretrained=pretrained or saved, **kwargs)
    except CompressError:
        raise
    # Whatever an architecture or the network raises, the user's name or arguments led there.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        given = f" with {kwargs}" if kwargs else ""
        raise CompressError(f"model {name!r}: timm cannot create it{given}: {type(error).__name__}: {reason}") from error
