"""Commands of the zoo: what there is, getting it, checking it, giving it to others."""

from pathlib import Path

import click

from ..errors import CompressError
from .common import cli, examples

VARIANT_HELP = "NAME is a name of `zoo-compress list`, or OWNER/REPO or OWNER/REPO@REVISION on the Hub"
NAME_HELP = f"{VARIANT_HELP}, or a folder."
TOKENS = "The token is the one `hf auth login` stored, or HF_TOKEN."


@cli.command("list", epilog=examples("zoo-compress list", "zoo-compress list 'resnet*'"))
@click.argument("pattern", default="*", metavar="[GLOB]")
def list_(pattern: str) -> None:
    """List the variants of the zoo: accuracy, MACs, parameters, bytes of weights, and where they are."""
    import zoo_compress as zc

    from ..record import aligned

    rows = [["", "data", "top-1", "MACs", "parameters", "bytes", "where"]]
    for v in zc.list_variants(pattern):
        rows.append([v.name, v.dataset, f"{v.top1:.2f}%", f"{v.macs:,}", f"{v.params:,}", f"{v.size:,}", v.source])
    if len(rows) == 1:
        raise CompressError(f"list: no variant's name, nor its base's, matches {pattern!r}")
    click.echo(aligned(rows, left=2))


@cli.command(
    epilog=VARIANT_HELP
    + ".\n\n"
    + examples("zoo-compress pull test_byobnet__pruned.fmnist_half", "zoo-compress pull OWNER/REPO@v1 -o there")
)
@click.argument("name")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="New or empty folder; NAME's last part unless given."
)
def pull(name: str, output: Path | None) -> None:
    """Fetch a variant into a folder: config.json, model.safetensors and its card."""
    from ..sharing.pull import pull as fetch

    folder = fetch(name, output or Path(name.rpartition("/")[2].partition("@")[0]))
    click.echo(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


@cli.command(
    epilog=TOKENS
    + "\n\n"
    + examples("zoo-compress push runs/quickstart me/digits-half", "zoo-compress push out me/resnet18-half --tag v1 --private")
)
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.argument("repo_id", metavar="OWNER/REPO")
@click.option("--tag", help="A name for this version.")
@click.option("--private", is_flag=True, help="Only the owner sees it.")
@click.option("--message", help="Of the commit.")
@click.option("--revision", help="Branch to commit to; it must exist.")
def push(directory: Path, repo_id: str, tag: str | None, private: bool, message: str | None, revision: str | None) -> None:
    """Publish the model in DIR on the Hugging Face Hub: its files and its card in one commit, and nothing else.

    DIR is a saved model, or the output folder of a recipe, whose card is then written first.
    """
    import zoo_compress as zc

    from ..record import read_record
    from ..sharing import card

    if directory.is_dir() and read_record(directory) is not None:
        directory = card.write(directory)
    pushed = zc.push_to_hub(directory, repo_id, tag=tag, private=private, commit_message=message, revision=revision)
    state = f"commit {pushed.commit[:12]}" if pushed.changed else f"nothing changed, commit {pushed.commit[:12]} holds the same files"
    click.echo(f"{pushed.name}: {state}")


@cli.command(
    epilog=examples("zoo-compress card runs/quickstart", "zoo-compress card runs/seed0 --seed-run runs/seed1 --seed-run runs/seed2")
)
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--seed-run", "seeds", multiple=True, type=click.Path(path_type=Path), help="Output folder of the same recipe with another seed."
)
def card(directory: Path, seeds: tuple[Path, ...]) -> None:
    """Write the model card of a finished recipe, from its record, beside its model. DIR is the recipe's output folder."""
    from ..sharing.card import README, write

    click.echo(f"{write(directory, seeds) / README}")


@cli.command(
    epilog=NAME_HELP
    + "\n\n"
    + examples(
        "zoo-compress verify test_byobnet__pruned.fmnist_half",
        "zoo-compress verify runs/quickstart/model",
        "zoo-compress verify OWNER/REPO --data-root /data/imagenet",
    )
)
@click.argument("name")
@click.option("--data-root", help="Folder of the data set, if it is not where the recipe had it.")
def verify(name: str, data_root: str | None) -> None:
    """Evaluate a variant on its recipe's data and compare with its card; a difference is an error."""
    from ..sharing.verify import verify_card

    done = verify_card(name, data_root=data_root)
    click.echo(
        f"{name}: the card's numbers hold: top-1 {done.found:.2f}% on {done.images:,} images (card {done.top1:.2f}%), "
        f"{done.params:,} parameters, {done.macs:,} MACs"
    )


@cli.command(
    epilog=TOKENS + "\n\n" + examples("zoo-compress publish --owner me", "zoo-compress publish --owner me --tag v1 --index index.json")
)
@click.option("--owner", required=True, help="User or organisation.")
@click.option("--index", "file", type=click.Path(path_type=Path), help="The index to read and to write; the package's own unless given.")
@click.option("--runs", type=click.Path(path_type=Path), default="runs", show_default=True, help="Output folders of recipes.")
@click.option("--tag", help="A name for this version.")
@click.option("--private", is_flag=True, help="Only the owner sees them.")
def publish(owner: str, file: Path | None, runs: Path, tag: str | None, private: bool) -> None:
    """Push every variant of the index under one name, and write the index with their ids on the Hub.

    Stop it however you like: the same command goes on. What is there already is not pushed again.
    """
    from ..sharing.ship import publish as push_all
    from ..zoo.index import INDEX

    push_all(owner, file=file or INDEX, runs=runs, tag=tag, private=private, log=click.echo)


@cli.command(epilog=examples("zoo-compress ship runs/quickstart test_resnet__pruned.digits_half quickstart.yaml"))
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.argument("name")
@click.argument("recipe")
@click.option("--cards", type=click.Path(path_type=Path), default="model_cards", show_default=True, help="Folder of cards.")
@click.option("--index", "file", type=click.Path(path_type=Path), help="The index to write; the package's own unless given.")
@click.option(
    "--seed-run", "seeds", multiple=True, type=click.Path(path_type=Path), help="Output folder of the same recipe with another seed."
)
def ship(directory: Path, name: str, recipe: str, cards: Path, file: Path | None, seeds: tuple[Path, ...]) -> None:
    """Add a finished run to the zoo (for maintainers): index, card, and weights below 1 MB.

    DIR is the output folder of RECIPE, a file in recipes/; NAME is BASE__METHOD.TAG.
    """
    from ..sharing.ship import ship as add
    from ..zoo.index import INDEX

    entry = add(directory, name, recipe, seeds=seeds, cards=cards, file=file or INDEX)
    click.echo(f"{entry.name}: {entry.size:,} bytes, {'shipped' if entry.checkpoint else 'too large to ship: its recipe makes it'}")


@cli.command(
    epilog=NAME_HELP
    + "\n\n"
    + examples(
        "zoo-compress export test_byobnet__pruned.fmnist_half --onnx model.onnx",
        "zoo-compress export runs/quickstart/model --onnx model.onnx --program model.pt2 --data digits",
        "zoo-compress export runs/quickstart/model --int8 model.onnx --data digits",
        "zoo-compress export runs/fmnist_slim/model --width 0.5 --onnx half.onnx",
        "zoo-compress export runs/fmnist_exits_joint/model --exit 2 --onnx short.onnx",
    )
)
@click.argument("name")
@click.option("--onnx", type=click.Path(path_type=Path, dir_okay=False), help="Write ONNX to this file and compare it in onnxruntime.")
@click.option("--program", type=click.Path(path_type=Path, dir_okay=False), help="Write torch.export's program to this file.")
@click.option("--int8", type=click.Path(path_type=Path, dir_okay=False), help="Write ONNX in eight bits to this file; needs data.")
@click.option("--width", type=float, help="Of a slimmable network, the width; the widest unless given.")
@click.option("--exit", type=int, help="Of a network with early exits, the one where it ends, from 0; its own end unless given.")
@click.option("--data", "source", help="Images to compare on; those of the card unless given, noise if there is none.")
@click.option("--data-root", help="Folder of the data set.")
def export(
    name: str,
    onnx: Path | None,
    program: Path | None,
    int8: Path | None,
    width: float | None,
    exit: int | None,
    source: str | None,
    data_root: str | None,
) -> None:
    """Export a model to ONNX or as a torch.export program, any batch size, outputs compared with the model's own to 1e-4.

    With --int8, weights and activations have eight bits, and accuracy and time of both files are printed: those are not the same.
    """
    from ..sharing import export as exporting

    if onnx is None and program is None and int8 is None:
        raise CompressError("export: expected --onnx FILE, --program FILE or --int8 FILE, found none")
    model, data = exporting.open_for_export(name, source, data_root)
    model = exporting.part(model, width, exit)
    for kind, path, write in (("ONNX", onnx, exporting.export_onnx), ("program", program, exporting.export_program)):
        if path is not None:
            done = write(model, path, data)
            images = f"{done.images} {f'images of {data.source}' if data else 'images of noise'}"
            click.echo(f"{path}: {kind}, {done.size:,} bytes; outputs on {images} differ by {done.difference:.1e}")
    if int8 is not None:
        from ..sharing.int8 import export_int8

        if data is None:
            raise CompressError("export: expected --data beside --int8, whose ranges and accuracy are found on images; found none")
        for kind, side in zip(("float", "int8"), export_int8(model, int8, data), strict=True):
            click.echo(
                f"{kind}: {side.size:,} bytes, top-1 {side.top1:.2f}%, {side.milliseconds:.2f} ± {side.iqr / 2:.2f} ms (batch 1, 1 thread)"
            )
