"""Commands that run for long: recipes, and the table over timm's registry."""

from pathlib import Path
from typing import Any

import click

from ..errors import CompressError
from .common import cli, examples


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

    A run that was stopped goes on after its last epoch and ends with the same numbers. A finished one is not run again. Of a recipe that
    made a variant of the zoo, the hash of the weights is compared with the zoo's.
    """
    from ..recipe import load_recipe
    from ..record import format_table
    from ..runner import run as run_recipe
    from ..sharing.ship import rebuilt

    try:
        record = run_recipe(recipe, fresh=fresh, seed=seed)
    except KeyboardInterrupt:
        click.echo(f"stopped; zoo-compress run {recipe} goes on from the last epoch", err=True)
        raise SystemExit(130) from None
    if record.table:
        click.echo(format_table(record.table))
    for line in rebuilt(Path(load_recipe(recipe).output).expanduser(), recipe) if seed is None else ():
        click.echo(line)


SEEDS = click.option("--seeds", type=int, multiple=True, default=(0, 1, 2), show_default=True, help="A seed to run with; repeat for more.")


@cli.command(
    epilog=examples(
        "zoo-compress compare recipes/elastic/fmnist_slim.yaml recipes/elastic/fmnist_alone_50.yaml",
        "zoo-compress compare RECIPE OTHER --seeds 0 --seeds 1",
    )
)
@click.argument("recipes", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RECIPE...")
@SEEDS
def compare(recipes: tuple[Path, ...], seeds: tuple[int, ...]) -> None:
    """Run recipes with several seeds, or what is left of that, and print their models in one table with mean and spread of accuracy.

    What several recipes train in the same way before they compress it is trained once.
    """
    from ..compare import compare as run_all
    from ..compare import format_lines

    click.echo(format_lines(run_all(recipes, seeds)))


@cli.command(
    epilog=examples(
        "zoo-compress rethink recipes/test_byobnet_fmnist_half.yaml --seeds 0",
        "zoo-compress rethink recipes/rethink/resnet_*.yaml",
    )
)
@click.argument("recipes", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RECIPE...")
@SEEDS
def rethink(recipes: tuple[Path, ...], seeds: tuple[int, ...]) -> None:
    """Run recipes, then train what they end with from scratch, and print both with mean and spread of accuracy.

    Scratch-E trains for as many epochs as the recipe trained before it compressed, Scratch-B with as much compute (Liu et al. 2019). Of a
    network of several widths or exits, Scratch-E trains each alone. Model cards of the runs show them from then on. What several recipes
    train in the same way before they compress it is trained once.
    """
    from ..compare import format_lines
    from ..rethink import rethink as run_all

    click.echo(format_lines(run_all(recipes, seeds)))


@cli.command(
    epilog=examples(
        "zoo-compress lottery recipes/elastic/fmnist_alone_100.yaml",
        "zoo-compress lottery RECIPE --rounds 12 --rewind 100 --control reinit --seeds 0 --seeds 1 --plot tickets.png",
    )
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--rounds", type=int, default=8, show_default=True, help="How often weights are removed.")
@click.option("--fraction", type=float, default=0.2, show_default=True, help="Of the remaining weights, how many a round removes.")
@click.option("--output-fraction", type=float, help="The same for the output layer, in the local scope; half of --fraction unless given.")
@click.option("--scope", default="local", show_default=True, help="local removes as much of each layer, global the smallest of all.")
@click.option("--rewind", type=int, default=0, show_default=True, help="Step of the first training that every ticket starts from.")
@click.option("--control", "controls", multiple=True, help="reinit, random, signs or finetune; repeat for more, all unless given.")
@click.option("--every", type=int, default=1, show_default=True, help="Controls at every so many rounds.")
@click.option("--plot", "picture", type=click.Path(path_type=Path, dir_okay=False), help="Image file for the curves.")
@click.option("--seeds", type=int, multiple=True, default=(0,), show_default=True, help="A seed to run with; repeat for more.")
def lottery(recipe: Path, seeds: tuple[int, ...], picture: Path | None, controls: Any, **settings: Any) -> None:
    """Draw lottery tickets: repeat RECIPE's training with ever fewer of its weights, each time from their values at its beginning.

    Prints accuracy against the weights that are left, for tickets and controls (Frankle & Carbin 2019). Goes on where it was stopped.
    """
    from ..figures import check_figure
    from ..lottery import CONTROLS, LotteryConfig, curves, format_curves, plot
    from ..lottery import lottery as run_all

    if picture is not None:
        check_figure(picture)
    table = curves(run_all(recipe, LotteryConfig(controls=controls or CONTROLS, **settings), seeds))
    click.echo(format_curves(table))
    if picture is not None:
        plot(table, picture, recipe.stem)


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
    from ..coverage import architectures, cover, summary

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
